//! Replies of all models to the same prompts, side by side, with what the page's script filters and sorts by.

use std::collections::HashMap;

use arete_chain::prompt_of;
use arete_records::rows::{ConversationRow, ScoreRow, TurnRow};
use arete_records::{Aspect, FinishReason, Message, stats};
use serde::Serialize;

use super::drawing::Colour;
use crate::run_files::Scoring;

/// What the section shows.
#[derive(Serialize)]
pub(crate) struct Replies<'a> {
    models: Vec<Model<'a>>,
    /// Places of every two models, the last against the first first.
    pairs: Vec<(usize, usize)>,
    /// Prompts that every model answered.
    n_all: usize,
    samples: Vec<Sample<'a>>,
}

#[derive(Serialize)]
struct Model<'a> {
    name: &'a str,
    colour: u8,
}

/// Everything of one prompt.
#[derive(Serialize)]
struct Sample<'a> {
    /// Whether the token limit cut a reply.
    is_cut: bool,
    /// Between the mean standardised scores of each pair of models.
    differences: Vec<f64>,
    /// Messages before the question.
    context: &'a [Message],
    question: Option<&'a str>,
    turns: Vec<Turn<'a>>,
}

#[derive(Serialize)]
struct Turn<'a> {
    aspect: Aspect,
    /// One a model.
    replies: Vec<Reply<'a>>,
}

#[derive(Serialize)]
struct Reply<'a> {
    text: &'a str,
    is_empty: bool,
    is_cut: bool,
    n_tokens: i32,
    /// Mean standardised score of those that read it.
    z: Option<f64>,
    /// What each of them gave it, where there are several.
    scores: Vec<(Aspect, f64)>,
    yardstick: Option<f64>,
}

/// Every prompt that all models answered, in the first one's order; at most so many, 0 = all.
pub(crate) fn side_by_side(scoring: &Scoring, max_samples: usize) -> Replies<'_> {
    let mut scores: HashMap<(&str, &str), Vec<&ScoreRow>> = HashMap::new();
    for row in &scoring.scores {
        scores.entry((row.model.as_str(), row.prompt_id.as_str())).or_default().push(row);
    }
    let by_prompt: Vec<HashMap<&str, &ConversationRow>> = scoring
        .replies
        .iter()
        .map(|(_, rows)| rows.iter().map(|row| (row.prompt_id.as_str(), row)).collect())
        .collect();
    let models = scoring.replies.iter().enumerate();
    let models: Vec<Model<'_>> =
        models.map(|(at, (name, _))| Model { name, colour: Colour::of_model(at).0 }).collect();
    let pairs = pairs(models.len());
    let mut samples = Vec::new();
    for first in scoring.replies.first().map_or(&[][..], |(_, rows)| rows) {
        let id = first.prompt_id.as_str();
        let rows: Option<Vec<&ConversationRow>> =
            by_prompt.iter().map(|own| own.get(id).copied()).collect();
        // Replies to other turns were left there by hand, or by another scoring.
        let has_turns = |row: &&ConversationRow| row.aspects().eq(first.aspects());
        let Some(rows) = rows.filter(|rows| rows.iter().all(has_turns)) else { continue };
        let turns: Vec<Turn<'_>> = first
            .aspects()
            .enumerate()
            .map(|(at, aspect)| {
                // What is called as no turn read the answer.
                let reads = |row: &ScoreRow| {
                    first.aspects().position(|own| own == row.aspect).unwrap_or(0) == at
                };
                let score = |model: &Model<'_>| -> Vec<&ScoreRow> {
                    let all = scores.get(&(model.name, id)).into_iter().flatten();
                    all.copied().filter(|row| reads(row)).collect()
                };
                let own = models.iter().zip(&rows);
                Turn {
                    aspect,
                    replies: own
                        .filter_map(|(model, row)| Some(reply(&score(model), row.turn(aspect)?)))
                        .collect(),
                }
            })
            .collect();
        let z = |at: usize| {
            stats::mean(&turns.iter().filter_map(|turn| turn.replies[at].z).collect::<Vec<_>>())
        };
        let prompt = prompt_of(&first.messages, first.turns.len()).unwrap_or(&first.messages);
        samples.push(Sample {
            is_cut: turns.iter().flat_map(|turn| &turn.replies).any(|reply| reply.is_cut),
            differences: pairs.iter().map(|&(first, last)| z(last) - z(first)).collect(),
            context: prompt.split_last().map_or(&[], |(_, context)| context),
            question: prompt.last().map(|message| message.content.as_str()),
            turns,
        });
    }
    let n_all = samples.len();
    if max_samples > 0 {
        samples.truncate(max_samples);
    }
    Replies { models, pairs, n_all, samples }
}

fn reply<'a>(scores: &[&ScoreRow], turn: &'a TurnRow) -> Reply<'a> {
    let text = turn.text.as_str();
    let z: Vec<(Aspect, f64)> = scores.iter().map(|row| (row.aspect, f64::from(row.z))).collect();
    let mean = || stats::mean(&z.iter().map(|(_, z)| *z).collect::<Vec<_>>());
    Reply {
        text,
        is_empty: text.trim().is_empty(),
        is_cut: turn.finish_reason == FinishReason::Length,
        n_tokens: turn.n_tokens,
        z: (!z.is_empty()).then(mean),
        yardstick: scores.iter().find_map(|row| row.yardstick).map(f64::from),
        scores: if z.len() > 1 { z } else { Vec::new() },
    }
}

/// Every two models, the last against the first first.
fn pairs(n_models: usize) -> Vec<(usize, usize)> {
    let mut pairs: Vec<(usize, usize)> =
        (0..n_models).flat_map(|last| (0..last).map(move |first| (first, last))).collect();
    pairs.sort_by_key(|&(first, last)| (std::cmp::Reverse(last), first));
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_model_is_compared_with_the_first_first() {
        assert_eq!(pairs(3), [(0, 2), (1, 2), (0, 1)]);
        assert_eq!(pairs(1), []);
    }
}
