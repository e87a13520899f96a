//! Layouts of public data sets in which a pair is not written as `chosen` and `rejected`: several replies with marks, a
//! name of the better one, trees of messages.

use std::collections::{BTreeMap, HashMap};

use arete_records::jsonl::NumberedObject;
use arete_records::{Message, Role};
use serde_json::{Map, Value};

use super::fields::{FieldError, context, present, prompt, question};
use super::{Conversation, LabelledPair};

/// The two sides of a record, the better first; none where it prefers neither.
pub(super) type Sides = Option<[Vec<Message>; 2]>;

/// The sides of a record in one of the layouts of this file; `None` if it is in none of them.
pub(super) fn sides(record: &Map<String, Value>) -> Option<Result<Sides, FieldError>> {
    let has = |fields: &[&str]| fields.iter().all(|field| present(record, field).is_some());
    Some(if has(&["completions"]) {
        marked(record, "completions", "response", &mark_of_completion)
    } else if has(&["answers"]) {
        marked(record, "answers", "answer", &|answer| Some(-number(answer, "rank")?))
    } else if has(&["response_0", "response_1", "better_response_id"]) {
        let better = whole(&record["better_response_id"]);
        named(record, ["response_0", "response_1"], better, "better_response_id")
    } else if has(&["response_1", "response_2", "preference_strength"]) {
        let better = leaning(&record["preference_strength"]);
        named(record, ["response_1", "response_2"], better, "preference_strength")
    } else if has(&["response1", "response2", "overall_preference"]) {
        let better = leaning(&record["overall_preference"]);
        named(record, ["response1", "response2"], better, "overall_preference")
    } else {
        return None;
    })
}

fn number(value: &Value, field: &str) -> Option<f64> {
    value.get(field).and_then(Value::as_f64).filter(|number| number.is_finite())
}

/// A whole number, however it is written: pandas makes 1.0 of 1 in a column that lacks one.
fn whole(value: &Value) -> Option<i64> {
    #[expect(clippy::cast_possible_truncation, reason = "a whole number of that size")]
    let of_float =
        |number: f64| (number.fract() == 0.0 && number.abs() < 1e9).then_some(number as i64);
    value.as_i64().or_else(|| of_float(value.as_f64()?))
}

/// UltraFeedback's overall score, or the mean of its four ratings where that is missing.
fn mark_of_completion(completion: &Value) -> Option<f64> {
    let overall = number(completion, "overall_score");
    overall.or_else(|| number(completion, "fine-grained_score")).or_else(|| {
        let annotations = completion.get("annotations")?.as_object()?;
        let ratings: Vec<f64> = annotations
            .values()
            .filter_map(|annotation| annotation.get("Rating")?.as_str()?.parse().ok())
            .collect();
        #[expect(clippy::cast_precision_loss, reason = "a handful of ratings")]
        let mean = ratings.iter().sum::<f64>() / ratings.len() as f64;
        (!ratings.is_empty()).then_some(mean)
    })
}

/// Below nought prefers the first, above nought the second: HelpSteer's scale from −3 to 3. −1 for neither.
fn leaning(value: &Value) -> Option<i64> {
    let strength = value.as_f64().filter(|strength| strength.is_finite())?;
    Some(if strength < 0.0 {
        0
    } else if strength > 0.0 {
        1
    } else {
        -1
    })
}

/// The question of a record, which has to have one.
fn asked(record: &Map<String, Value>) -> Result<Vec<Message>, FieldError> {
    let found = match context(record) {
        Some(context) => Some(prompt("context", context)?),
        None => question(record)?,
    };
    found.filter(|question| !question.is_empty()).ok_or_else(|| {
        let expected = "a column `prompt`, `instruction` or `context` with what is replied to";
        FieldError::columns("prompt", expected, record)
    })
}

fn reply(question: &[Message], text: &str) -> Vec<Message> {
    let mut messages = question.to_vec();
    messages.push(Message::assistant(text.trim()));
    messages
}

/// Of replies with marks the best and the worst, the first of each; neither where all marks are equal.
fn marked(
    record: &Map<String, Value>,
    field: &'static str,
    text: &str,
    mark: &dyn Fn(&Value) -> Option<f64>,
) -> Result<Sides, FieldError> {
    let wrong = |expected: &str| FieldError::new(field, expected, &record[field]);
    let items = record[field].as_array().ok_or_else(|| wrong("a list of replies"))?;
    let found = items.iter().map(|item| item.get(text)?.as_str().zip(mark(item)));
    let replies: Vec<(&str, f64)> = found
        .collect::<Option<_>>()
        .ok_or_else(|| wrong("a text and a mark (overall_score, or rank) in each"))?;
    let question = asked(record)?;
    Ok(extremes(&replies)
        .map(|[best, worst]| [best, worst].map(|idx| reply(&question, replies[idx].0))))
}

/// Places of the highest and of the lowest mark, the first of equals; none if they are the same.
fn extremes(replies: &[(&str, f64)]) -> Option<[usize; 2]> {
    let mut best = 0;
    let mut worst = 0;
    for (idx, (_, mark)) in replies.iter().enumerate() {
        if *mark > replies[best].1 {
            best = idx;
        }
        if *mark < replies[worst].1 {
            worst = idx;
        }
    }
    (replies.get(best)?.1 > replies[worst].1).then_some([best, worst])
}

/// Two replies of which the better is named by its number.
fn named(
    record: &Map<String, Value>,
    fields: [&'static str; 2],
    better: Option<i64>,
    by: &'static str,
) -> Result<Sides, FieldError> {
    let texts = [0, 1].map(|idx| record[fields[idx]].as_str());
    let [Some(first), Some(second)] = texts else {
        let idx = usize::from(texts[0].is_some());
        return Err(FieldError::new(fields[idx], "a text", &record[fields[idx]]));
    };
    let question = asked(record)?;
    let sides = [reply(&question, first), reply(&question, second)];
    match better {
        Some(0) => Ok(Some(sides)),
        Some(1) => Ok(Some(sides).map(|[first, second]| [second, first])),
        Some(-1) => Ok(None),
        _ => Err(FieldError::new(by, "which of the two is better", &record[by])),
    }
}

/// What the records of a file came to.
#[derive(Default)]
pub(super) struct Found {
    pub(super) pairs: Vec<LabelledPair>,
    /// Rows that cannot be used, and why.
    pub(super) wrong: Vec<(usize, FieldError)>,
    /// Rows that prefer neither side.
    pub(super) even: Vec<usize>,
}

/// Whether most records are of a layout: one odd record does not decide how a file is read.
fn are_mostly(records: &[NumberedObject], is_such: impl Fn(&Map<String, Value>) -> bool) -> bool {
    2 * records.iter().filter(|(_, record)| is_such(record)).count() > records.len()
}

/// Whether records are single rated replies (HelpSteer), of which those to one prompt belong together.
pub(super) fn are_rated(records: &[NumberedObject]) -> bool {
    are_mostly(records, |record| {
        let has = |field: &&str| record.contains_key(*field);
        ["prompt", "response", "helpfulness"].iter().all(has)
            && !["chosen", "rejected"].iter().any(has)
    })
}

/// A reply with its row and its mark.
type Rated<'a> = (usize, &'a Map<String, Value>, &'a str, f64);

/// The pairs among single rated replies: of each prompt the most and the least helpful; and what went wrong with rows.
pub(super) fn rated(records: &[NumberedObject]) -> Found {
    let mut order: Vec<(&str, &str)> = Vec::new();
    let mut by_prompt: HashMap<(&str, &str), Vec<Rated<'_>>> = HashMap::new();
    let mut found = Found::default();
    for (row, record) in records {
        let text = |field: &str| record.get(field).and_then(Value::as_str);
        let mark = record.get("helpfulness").and_then(Value::as_f64);
        match (text("prompt"), text("response"), mark) {
            (Some(prompt), Some(response), Some(mark)) => {
                let asked = (text("system").unwrap_or_default(), prompt);
                let own = by_prompt.entry(asked).or_default();
                if own.is_empty() {
                    order.push(asked);
                }
                own.push((*row, record, response, mark));
            }
            _ => {
                let expected = "prompt and response, texts, and helpfulness, a number";
                found.wrong.push((*row, FieldError::columns("record", expected, record)));
            }
        }
    }
    for asked_for in order {
        let own = &by_prompt[&asked_for];
        let marks: Vec<(&str, f64)> = own.iter().map(|(_, _, text, mark)| (*text, *mark)).collect();
        let Some(places) = extremes(&marks) else {
            found.even.extend(own.iter().map(|(row, ..)| *row));
            continue;
        };
        let (row, record, ..) = own[places[0]];
        match asked(record) {
            Ok(question) => {
                let sides = places.map(|idx| reply(&question, marks[idx].0));
                found.pairs.push(pair(row, sides));
            }
            Err(error) => found.wrong.push((row, error)),
        }
    }
    found
}

fn pair(row: usize, [chosen, rejected]: [Vec<Message>; 2]) -> LabelledPair {
    let side = |messages| Conversation { messages, truncated: false };
    LabelledPair {
        row,
        chosen: side(chosen),
        rejected: side(rejected),
        chosen_prob: 1.0,
        vote_lead: 0,
        about: None,
        split: None,
    }
}

/// A message of OpenAssistant's trees.
struct Node<'a> {
    row: usize,
    id: &'a str,
    parent: Option<&'a str>,
    message: Message,
    rank: Option<f64>,
}

/// Whether records are messages of OpenAssistant's trees: a row each, or a tree each with its replies nested.
pub(super) fn are_trees(records: &[NumberedObject]) -> bool {
    are_mostly(records, |record| {
        let is_row =
            ["message_id", "parent_id", "role", "text"].iter().all(|f| record.contains_key(*f));
        is_row || record.get("prompt").is_some_and(|prompt| prompt.get("replies").is_some())
    })
}

/// The question that opens a tree, of a record that holds a whole tree or its first message; none of other messages.
pub(super) fn opening(record: &Map<String, Value>) -> Option<&str> {
    match record.get("prompt").filter(|prompt| prompt.get("replies").is_some()) {
        Some(tree) => tree.get("text")?.as_str(),
        None => {
            let opens = record.get("parent_id").is_some_and(Value::is_null);
            let asks = record.get("role").is_some_and(|role| role == "prompter");
            record.get("text")?.as_str().filter(|_| opens && asks)
        }
    }
}

/// The pairs of trees: wherever people ranked several replies to a message, the first and the last of them.
pub(super) fn trees(records: &[NumberedObject]) -> Found {
    let (mut nodes, mut wrong) = (Vec::new(), Vec::new());
    for (row, record) in records {
        let tree = record.get("prompt").filter(|prompt| prompt.get("replies").is_some());
        let found = match tree {
            Some(tree) => nested(*row, tree, None, &mut nodes, 0),
            None => {
                node(*row, &|field| record.get(field), parent_of(record)).map(|n| nodes.push(n))
            }
        };
        if found.is_none() {
            let expected = "a message: message_id, parent_id, role prompter or assistant, text";
            wrong.push((*row, FieldError::columns("record", expected, record)));
        }
    }
    let by_id: HashMap<&str, usize> =
        nodes.iter().enumerate().map(|(idx, node)| (node.id, idx)).collect();
    let mut replies: BTreeMap<usize, Vec<usize>> = BTreeMap::new(); // of each message that has any
    for (idx, node) in nodes.iter().enumerate() {
        let ranked = node.message.role == Role::Assistant && node.rank.is_some();
        if let Some(&parent) = node.parent.and_then(|id| by_id.get(id)).filter(|_| ranked) {
            replies.entry(parent).or_default().push(idx);
        }
    }
    let mut pairs = Vec::new();
    for (parent, own) in replies {
        let marks: Vec<(&str, f64)> =
            own.iter().map(|&idx| ("", -nodes[idx].rank.unwrap_or_default())).collect();
        let Some(places) = extremes(&marks) else { continue };
        let Some(before) = path_to(parent, &nodes, &by_id) else { continue };
        let sides = places.map(|place| {
            let own = nodes[own[place]].message.clone();
            before.iter().cloned().chain([own]).collect::<Vec<Message>>()
        });
        pairs.push(pair(nodes[own[places[0]]].row, sides));
    }
    Found { pairs, wrong, even: Vec::new() }
}

fn parent_of(record: &Map<String, Value>) -> Option<&str> {
    record.get("parent_id").and_then(Value::as_str)
}

fn node<'a>(
    row: usize,
    field: &dyn Fn(&str) -> Option<&'a Value>,
    parent: Option<&'a str>,
) -> Option<Node<'a>> {
    let text = field("text")?.as_str()?.trim();
    let message = match field("role")?.as_str()? {
        "prompter" => Message::user(text),
        "assistant" => Message::assistant(text),
        _ => return None,
    };
    let rank = field("rank").and_then(Value::as_f64);
    Some(Node { row, id: field("message_id")?.as_str()?, parent, message, rank })
}

/// Deepest tree of messages that is walked.
const MAX_TURNS: usize = 200;

fn nested<'a>(
    row: usize,
    tree: &'a Value,
    parent: Option<&'a str>,
    nodes: &mut Vec<Node<'a>>,
    depth: usize,
) -> Option<()> {
    let own = node(row, &|field| tree.get(field), parent).filter(|_| depth < MAX_TURNS)?;
    let id = own.id;
    nodes.push(own);
    for reply in tree.get("replies").and_then(Value::as_array).into_iter().flatten() {
        nested(row, reply, Some(id), nodes, depth + 1)?;
    }
    Some(())
}

/// The messages from the root through one; none if a parent is missing or they go round in a circle.
fn path_to(idx: usize, nodes: &[Node<'_>], by_id: &HashMap<&str, usize>) -> Option<Vec<Message>> {
    let mut path = vec![nodes[idx].message.clone()];
    let mut at = idx;
    while let Some(parent) = nodes[at].parent {
        at = *by_id.get(parent)?;
        path.push(nodes[at].message.clone());
        if path.len() > MAX_TURNS {
            return None;
        }
    }
    path.reverse();
    Some(path)
}
