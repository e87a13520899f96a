//! Judging: which of two samples shows more of each virtue.

pub mod verdict;

mod config;

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, bail};
use arete_chain::constitution::{Constitution, VirtueEntry};
use arete_chain::dialogue;
use arete_records::{Aspect, Message, Refusal, Role, Virtue, left_out};

use self::verdict::{LabelMass, Verdict};
use crate::engine::{Chain, Drawing, Engine, Labels, Query, Reply, by_frequency};
use arete_chain::exemplars::Exemplar;
use arete_stage::exit::Unavailable;

pub use self::config::{JudgeConfig, Method, Orders, PAIRWISE_TEMPLATE, POINTWISE_TEMPLATE};

/// Where a template's question ends and the beginning of the judge's reply follows.
const REPLY: &str = "{reply}";

/// Questions enough to tell a judge that never answers from one that abstains now and then.
const FEWEST_ASKED: usize = 20;

/// Characters of a written verdict without a label that are told.
const BEGINNING_CHARS: usize = 24;

/// Two samples of one prompt, each through the reply that is judged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// What the samples share.
    pub question: Vec<Message>,
    /// What each sample has after it: replies, with the user's turns between them.
    pub sides: [Vec<Message>; 2],
    /// Part of the keys of random streams (written verdicts only).
    pub key: u64,
}

/// A judge: an engine, and what it is asked.
#[derive(Debug)]
pub struct Judge<'a> {
    engine: &'a Engine,
    questions: Questions<'a>,
    /// How written verdicts began that hold no label, and how often.
    unread: Mutex<BTreeMap<String, usize>>,
}

impl<'a> Judge<'a> {
    /// Checks the templates and prepares the judged examples.
    ///
    /// # Errors
    ///
    /// Those of [`Questions::new`].
    pub fn new(
        engine: &'a Engine,
        config: &'a JudgeConfig,
        constitution: &'a Constitution,
        exemplars: &[Exemplar],
        method: Method,
    ) -> Result<Self> {
        // Only a local model can be made to continue a reply, and a written verdict is its own.
        let continues = matches!(engine, Engine::Local(_)) && method.needs_logprobs();
        let questions = Questions::new(config, constitution, exemplars, method, continues)?;
        Ok(Self { engine, questions, unread: Mutex::default() })
    }

    /// The judge's name.
    pub fn name(&self) -> &str {
        self.engine.name()
    }

    /// The virtues it is asked about, in the order of its verdicts.
    pub fn virtues(&self) -> Vec<Virtue> {
        self.questions.constitution.virtue_names()
    }

    /// The turn that is the answer.
    pub fn answer(&self) -> Aspect {
        self.questions.constitution.turns.answer()
    }

    /// Every virtue's verdict on every pair.
    ///
    /// # Errors
    ///
    /// The engine's.
    pub fn verdicts(&self, pairs: &[Pair]) -> Result<Vec<Vec<Verdict>>> {
        let n_refused = self.engine.n_refused();
        let verdicts = self.asked(pairs)?;
        let n_refused = self.engine.n_refused() - n_refused;
        let n_asked = pairs.len() * self.questions.n_virtues() * self.questions.askings();
        if !left_out::is_share(n_refused, n_asked) {
            // A server that answers like this is at fault: nothing of these verdicts is kept.
            bail!(Unavailable(format!(
                "{}: verdicts: {n_refused} of {n_asked} questions refused, or answered with nonsense (see the warnings above)",
                self.name()
            )));
        }
        Ok(verdicts)
    }

    /// Fails if a judge has answered none of many questions, and says what it said instead: better now than when all
    /// pairs have been asked about.
    ///
    /// # Errors
    ///
    /// A refused setting for the judge.
    pub fn check_heard(&self, verdicts: &[Vec<Verdict>]) -> Result<()> {
        let is_silent = |verdict: &Verdict| {
            [verdict.p_ab, verdict.p_ba, verdict.p_sample0].iter().all(Option::is_none)
        };
        let n_asked = verdicts.len() * self.questions.n_virtues() * self.questions.askings();
        if n_asked < FEWEST_ASKED || !verdicts.iter().flatten().all(is_silent) {
            return Ok(());
        }
        let labels = match self.questions.method {
            Method::PointwiseLogits => Labels::YES_NO,
            _ => Labels::AB,
        };
        let Labels { first, second } = labels;
        let (expected, instead) = match self.questions.method {
            Method::PairwiseText => {
                let unread = self.unread.lock().unwrap_or_else(PoisonError::into_inner);
                let n_tokens = self.questions.config.verdict_tokens;
                let expected = format!(
                    "a judge who writes {first} or {second}; in none of {n_asked} questions did it (a model that thinks first needs \
                     more verdict_tokens than {n_tokens}, or a server that turns its thinking off)"
                );
                (expected, by_frequency(&unread))
            }
            _ => {
                let expected = format!(
                    "a judge whose replies begin with {first} or {second}; in {n_asked} of {n_asked} questions it gave them too \
                     little probability, or none (a model that thinks first, or decorates its answer, needs --method \
                     pairwise-text with verdict_tokens enough)"
                );
                (expected, self.engine.instead())
            }
        };
        let instead: Vec<String> =
            instead.into_iter().take(5).map(|(text, n)| format!("{text:?} ({n})")).collect();
        let found = if instead.is_empty() { "none of them".to_owned() } else { instead.join(", ") };
        Err(Refusal::setting("judge", expected, found).into())
    }

    fn asked(&self, pairs: &[Pair]) -> Result<Vec<Vec<Verdict>>> {
        match self.questions.method {
            Method::PairwiseLogits | Method::PairwiseText => self.pairwise(pairs),
            Method::PointwiseLogits => self.pointwise(pairs),
            Method::Likelihood => self.likelihood(pairs),
            Method::Contrast => Err(Refusal::setting(
                "method",
                "a method that asks a judge",
                "contrast, which labels by construction",
            )
            .into()),
        }
    }

    /// The conversations the judge is asked about `pairs`: [`Questions::of`].
    pub fn queries(&self, pairs: &[Pair]) -> Vec<Query> {
        self.questions.of(pairs)
    }

    fn pairwise(&self, pairs: &[Pair]) -> Result<Vec<Vec<Verdict>>> {
        let queries = self.queries(pairs);
        let p_first = match self.questions.method {
            Method::PairwiseText => self.written(pairs, queries)?,
            _ => probabilities(self.engine.label_masses(&queries, Labels::AB)?),
        };
        let n = self.questions.n_virtues();
        let by_pair = p_first.chunks_exact(n * self.questions.askings());
        Ok(by_pair
            .map(|p| {
                let of = |virtue: usize| match self.questions.config.orders {
                    Orders::One => Verdict::one_order(p[virtue]),
                    Orders::Both => Verdict::both_orders(p[virtue], p[n + virtue]),
                };
                (0..n).map(of).collect()
            })
            .collect())
    }

    /// Samples the verdicts as text.
    fn written(&self, pairs: &[Pair], queries: Vec<Query>) -> Result<Vec<Option<f64>>> {
        let per_pair = self.questions.n_virtues() * self.questions.askings();
        let chain = |(idx, query): (usize, Query)| Chain {
            messages: query.messages,
            questions: Vec::new(),
            key: pairs[idx / per_pair].key,
            samples: vec![(idx % per_pair) as u64],
        };
        let chains: Vec<Chain> = queries.into_iter().enumerate().map(chain).collect();
        let drawing = Drawing {
            seed: self.questions.config.seed,
            sampling: arete_model::generate::Sampling::GREEDY,
            max_new_tokens: self.questions.config.verdict_tokens,
            is_verdict: true,
        };
        // What is longer than the judge's positions is not asked: an abstention.
        let (mut fitting, mut asked) = (Vec::new(), Vec::new());
        for (idx, chain) in chains.iter().enumerate() {
            if self.engine.fits(chain, drawing.max_new_tokens)? {
                fitting.push(chain.clone());
                asked.push(idx);
            }
        }
        if asked.len() < chains.len() {
            tracing::warn!(
                questions = chains.len() - asked.len(),
                "longer than the judge's positions, counted as abstentions"
            );
        }
        let mut out = vec![None; chains.len()];
        let replies = self.engine.chains(&fitting, &drawing)?;
        for (idx, replies) in asked.into_iter().zip(replies) {
            let Reply { text, .. } = &replies[0][0];
            out[idx] =
                verdict::read_label(text, Labels::AB.first, Labels::AB.second).map(f64::from);
            if out[idx].is_none() {
                let beginning: String = text.trim_start().chars().take(BEGINNING_CHARS).collect();
                let mut unread = self.unread.lock().unwrap_or_else(PoisonError::into_inner);
                *unread.entry(beginning).or_insert(0) += 1;
            }
        }
        Ok(out)
    }

    fn pointwise(&self, pairs: &[Pair]) -> Result<Vec<Vec<Verdict>>> {
        let p_yes = probabilities(self.engine.label_masses(&self.queries(pairs), Labels::YES_NO)?);
        let n = self.questions.n_virtues();
        Ok(p_yes
            .chunks_exact(2 * n)
            .map(|p| (0..n).map(|virtue| Verdict::pointwise(p[virtue], p[n + virtue])).collect())
            .collect())
    }

    /// log P(reply | virtuous) − log P(reply | vicious) of each side's own reply, compared. The
    /// personas speak for all virtues at once, so their verdicts are equal.
    fn likelihood(&self, pairs: &[Pair]) -> Result<Vec<Vec<Verdict>>> {
        let personas = self.questions.constitution.personas()?;
        let mut conversations = Vec::new();
        for pair in pairs {
            for side in &pair.sides {
                for persona in [&personas.virtuous, &personas.vicious] {
                    conversations.push(under_persona(persona, &pair.question, side));
                }
            }
        }
        let logprobs = self.engine.reply_logprobs(&conversations)?;
        Ok(logprobs
            .chunks_exact(4)
            .map(|l| {
                let lead = (l[0] - l[1]) - (l[2] - l[3]);
                let p_sample0 = lead.is_finite().then(|| 1.0 / (1.0 + (-lead).exp()));
                vec![Verdict { p_ab: None, p_ba: None, p_sample0 }; self.questions.n_virtues()]
            })
            .collect())
    }
}

/// What a judge is asked, and the examples it is shown.
#[derive(Debug)]
pub struct Questions<'a> {
    config: &'a JudgeConfig,
    constitution: &'a Constitution,
    method: Method,
    /// The text of the question.
    template: &'a str,
    /// How the judge's reply begins.
    opening: String,
    shots: Vec<Message>,
}

impl<'a> Questions<'a> {
    /// Checks the templates and prepares the judged examples. `continues`: the judge can be made to
    /// continue a reply that the template begins.
    ///
    /// # Errors
    ///
    /// A refused setting if a template lacks a placeholder or there are too few exemplars with a
    /// worse side.
    pub fn new(
        config: &'a JudgeConfig,
        constitution: &'a Constitution,
        exemplars: &[Exemplar],
        method: Method,
        continues: bool,
    ) -> Result<Self> {
        config.check(method)?;
        let (name, template, _) = config.template(method);
        check_vices(name, template, constitution)?;
        let (template, opening) = template.split_once(REPLY).unwrap_or((template, ""));
        let opening = if continues { opening.to_owned() } else { String::new() };
        let mut questions =
            Self { config, constitution, method, template, opening, shots: Vec::new() };
        questions.shots = questions.shots_of(exemplars)?;
        Ok(questions)
    }

    /// The conversations the judge is asked about `pairs`: every virtue for each order (or side) of
    /// each pair.
    pub fn of(&self, pairs: &[Pair]) -> Vec<Query> {
        let mut queries = Vec::new();
        for pair in pairs {
            let question = question_text(&pair.question);
            let texts = [side_text(&pair.sides[0]), side_text(&pair.sides[1])];
            for first in 0..self.askings() {
                for virtue in &self.constitution.virtues {
                    let text = if self.method == Method::PointwiseLogits {
                        self.pointwise_question(virtue, &question, &texts[first])
                    } else {
                        self.pairwise_question(virtue, &question, &texts[first], &texts[1 - first])
                    };
                    let mut messages = self.shots.clone();
                    messages.push(Message::user(text));
                    queries.push(Query { messages, opening: self.opening.clone() });
                }
            }
        }
        queries
    }

    fn n_virtues(&self) -> usize {
        self.constitution.virtues.len()
    }

    /// The virtue of a number, one after the other.
    pub fn virtue(&self, number: usize) -> &VirtueEntry {
        &self.constitution.virtues[number % self.n_virtues()]
    }

    /// How often the judge is asked about a pair and a virtue.
    fn askings(&self) -> usize {
        match (self.method, self.config.orders) {
            (Method::PointwiseLogits, _) | (_, Orders::Both) => 2,
            (_, Orders::One) => 1,
        }
    }

    /// Conversations in which the judge answers as it should: a better and a worse side are shown in
    /// both orders (or one after the other), each time by one of the virtues. What a judge's
    /// adapter is trained on.
    pub fn lessons(
        &self,
        question: &[Message],
        sides: [&[Message]; 2],
        virtues: [&VirtueEntry; 2],
    ) -> [Vec<Message>; 2] {
        let question = question_text(question);
        let texts = sides.map(side_text);
        [0, 1].map(|first| {
            let virtue = virtues[first];
            let (asked, labels) = if self.method == Method::PointwiseLogits {
                (self.pointwise_question(virtue, &question, &texts[first]), Labels::YES_NO)
            } else {
                let asked =
                    self.pairwise_question(virtue, &question, &texts[first], &texts[1 - first]);
                (asked, Labels::AB)
            };
            let label = if first == 0 { labels.first } else { labels.second };
            let mut messages = self.shots.clone();
            messages.push(Message::user(asked));
            messages.push(self.answer(label));
            messages
        })
    }

    fn answer(&self, label: &str) -> Message {
        Message::assistant(format!("{} {label}", self.opening).trim())
    }

    fn pairwise_question(&self, virtue: &VirtueEntry, question: &str, a: &str, b: &str) -> String {
        self.filled(virtue, &[("question", question), ("a", a), ("b", b)])
    }

    fn pointwise_question(&self, virtue: &VirtueEntry, question: &str, answer: &str) -> String {
        self.filled(virtue, &[("question", question), ("answer", answer)])
    }

    /// The template with these values and the constitution's words about a virtue.
    fn filled(&self, virtue: &VirtueEntry, values: &[(&str, &str)]) -> String {
        let mut values = values.to_vec();
        values.push(("virtue", virtue.name.name()));
        values.push(("virtue_question", &virtue.question));
        values.extend(virtue.deficiency.as_deref().map(|vice| ("deficiency", vice)));
        values.extend(virtue.excess.as_deref().map(|vice| ("excess", vice)));
        fill(self.template, &values)
    }

    /// Judged examples as turns of the conversation. They do not depend on the virtue asked about
    /// later, so all questions share them.
    fn shots_of(&self, exemplars: &[Exemplar]) -> Result<Vec<Message>> {
        let n_wanted = self.config.few_shot;
        if n_wanted == 0 || self.method == Method::Likelihood {
            return Ok(Vec::new());
        }
        let usable: Vec<_> = exemplars
            .iter()
            .filter_map(|exemplar| exemplar.worse.as_ref().map(|worse| (exemplar, worse)))
            .take(n_wanted)
            .collect();
        if usable.len() < n_wanted {
            bail!(Refusal::setting(
                "few_shot",
                format!("at most the {} few-shot exemplars with a worse side", usable.len()),
                n_wanted
            ));
        }
        let turns = &self.constitution.turns;
        let mut shots = Vec::new();
        for (idx, (better, worse)) in usable.into_iter().enumerate() {
            let virtue = self.virtue(idx);
            let good_first = idx % 2 == 0;
            let (good, bad) = (better.replies.answer(turns), worse.answer(turns));
            let (asked, answer) = if self.method == Method::PointwiseLogits {
                let text = if good_first { good } else { bad };
                let asked = self.pointwise_question(virtue, &better.prompt, text);
                (asked, if good_first { Labels::YES_NO.first } else { Labels::YES_NO.second })
            } else {
                let (a, b) = if good_first { (good, bad) } else { (bad, good) };
                let asked = self.pairwise_question(virtue, &better.prompt, a, b);
                (asked, if good_first { Labels::AB.first } else { Labels::AB.second })
            };
            shots.push(Message::user(asked));
            shots.push(self.answer(answer));
        }
        Ok(shots)
    }
}

/// Refuses a template that speaks of a vice which the constitution does not name.
fn check_vices(name: &'static str, template: &str, constitution: &Constitution) -> Result<()> {
    for virtue in &constitution.virtues {
        for (key, vice) in [("deficiency", &virtue.deficiency), ("excess", &virtue.excess)] {
            if vice.is_none() && template.contains(&format!("{{{key}}}")) {
                bail!(Refusal::setting(
                    name,
                    format!("no {{{key}}}, or a constitution that names it for every virtue"),
                    format!("virtues.{} without {key}", virtue.name)
                ));
            }
        }
    }
    Ok(())
}

/// The messages of one side under a system prompt, which comes before any of the prompt's own.
pub fn under_persona(persona: &str, question: &[Message], side: &[Message]) -> Vec<Message> {
    let mut messages = vec![Message::system(persona)];
    for message in question.iter().chain(side) {
        match message.role {
            Role::System => {
                messages[0].content.push_str("\n\n");
                messages[0].content.push_str(&message.content);
            }
            _ => messages.push(message.clone()),
        }
    }
    messages
}

fn probabilities(masses: Vec<LabelMass>) -> Vec<Option<f64>> {
    masses.into_iter().map(LabelMass::p_first).collect()
}

/// A prompt as the judge reads it: one question as it is, several turns with their speakers.
fn question_text(question: &[Message]) -> String {
    match question {
        [only] => only.content.clone(),
        several => dialogue::format(several).trim().to_owned(),
    }
}

/// A sample as the judge reads it: the answer, then the later questions and replies with their
/// speakers.
fn side_text(side: &[Message]) -> String {
    let Some((answer, rest)) = side.split_first() else { return String::new() };
    format!("{}{}", answer.content, dialogue::format(rest))
}

/// Puts values into a template in one pass: braces inside the values stay as they are.
fn fill(template: &str, values: &[(&str, &str)]) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(open) = rest.find('{') {
        out.push_str(&rest[..open]);
        rest = &rest[open..];
        let value = rest.find('}').and_then(|close| {
            let name = &rest[1..close];
            values.iter().find(|(known, _)| *known == name).map(|(_, value)| (close, *value))
        });
        match value {
            Some((close, value)) => {
                out.push_str(value);
                rest = &rest[close + 1..];
            }
            None => {
                out.push('{');
                rest = &rest[1..];
            }
        }
    }
    out.push_str(rest);
    out
}

/// The messages of one sample through the reply of the turn at `turn`, prompt left out.
pub fn side_through(messages: &[Message], n_prompt: usize, turn: usize) -> Vec<Message> {
    messages[n_prompt..].iter().take(1 + 2 * turn).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_with_braces_survive() {
        let text = fill(
            "Q {question} A {a} B {b} {unknown} {virtue_question}",
            &[
                ("question", "{a} {b}"),
                ("a", "{b}"),
                ("b", "b}"),
                ("virtue_question", "{question}"),
            ],
        );
        assert_eq!(text, "Q {a} {b} A {b} B b} {unknown} {question}");
    }

    #[test]
    fn the_default_templates_open_the_reply_and_hold_what_is_needed() {
        let (question, opening) = PAIRWISE_TEMPLATE.split_once(REPLY).unwrap();
        assert_eq!(opening, "Assistant");
        assert!(
            ["{question}", "{a}", "{b}", "{virtue_question}"].iter().all(|p| question.contains(p))
        );
    }

    #[test]
    fn a_side_reads_as_answer_then_dialogue() {
        let messages = [
            Message::user("q"),
            Message::assistant("act"),
            Message::user("why"),
            Message::assistant("because"),
            Message::user("what for"),
            Message::assistant("good"),
        ];
        let side = |turn| side_text(&side_through(&messages, 1, turn));
        assert_eq!(side(0), "act");
        assert_eq!(side(1), "act\n\nHuman: why\n\nAssistant: because");
        assert_eq!(
            side(2),
            "act\n\nHuman: why\n\nAssistant: because\n\nHuman: what for\n\nAssistant: good"
        );
    }
}
