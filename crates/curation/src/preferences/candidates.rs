//! The pairs of samples that may be judged, and what was left out on the way.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use arete_chain::sample::key_of;
use arete_chain::trim::last_sentence;
use arete_chain::{Turns, prompt_of};
use arete_records::rows::ConversationRow;
use arete_records::{Aspect, FinishReason, Message, Role};

use super::PreferencesConfig;
use crate::config::Truncated;
use crate::judge::{Pair, side_through};
use crate::stage::percent;
use crate::{Error, conversations, stage};

/// The two samples of a prompt.
pub(super) struct Samples {
    pub(super) samples: [ConversationRow; 2],
    /// Messages of the prompt itself.
    pub(super) n_prompt: usize,
}

impl Samples {
    pub(super) fn truncated(&self, aspect: Aspect) -> [bool; 2] {
        [0, 1].map(|s| self.samples[s].is_cut(aspect))
    }
}

/// Reads the conversations by prompt, in the order of the file; `turns` are the constitution's.
pub(super) fn samples_of(input: &Path, turns: &Turns) -> Result<Vec<Samples>, Error> {
    let path = stage::file_of(input, conversations::STAGE);
    let rows: Vec<ConversationRow> = stage::rows_of(input, conversations::STAGE)?;
    turns.check_names(&rows[0].aspects().collect::<Vec<_>>(), &path)?;
    let mut order = Vec::new();
    let mut by_prompt: HashMap<String, [Option<ConversationRow>; 2]> = HashMap::new();
    for (idx, row) in rows.into_iter().enumerate() {
        let wrong = |field: &str, expected: &str, found: String| Error::Record {
            path: path.clone(),
            line: idx + 1,
            field: field.to_owned(),
            expected: expected.to_owned(),
            found,
        };
        let sample = usize::try_from(row.sample).ok().filter(|&sample| sample < 2);
        let sample = sample.ok_or_else(|| wrong("sample", "0 or 1", row.sample.to_string()))?;
        if prompt_of(&row.messages, turns.len()).is_err() {
            let n_messages = 2 * turns.len() - 1;
            let expected = format!("a prompt and the {n_messages} messages of a chain");
            return Err(wrong("messages", &expected, row.messages.len().to_string()));
        }
        let slots = by_prompt.entry(row.prompt_id.clone()).or_insert_with(|| {
            order.push(row.prompt_id.clone());
            [None, None]
        });
        if slots[sample].is_some() {
            let found = format!("sample {sample} of {} twice", row.prompt_id);
            return Err(wrong("prompt_id", "each sample of a prompt once", found));
        }
        slots[sample] = Some(row);
    }
    let mut out = Vec::with_capacity(order.len());
    for prompt_id in order {
        let Some([Some(zero), Some(one)]) = by_prompt.remove(&prompt_id) else {
            return Err(Error::File {
                path,
                field: format!("prompt {prompt_id}"),
                expected: "samples 0 and 1".to_owned(),
                found: "one of them".to_owned(),
            });
        };
        let n_prompt = zero.messages.len() - (2 * turns.len() - 1);
        if one.messages.len() != zero.messages.len()
            || one.messages[..n_prompt] != zero.messages[..n_prompt]
        {
            return Err(Error::File {
                path,
                field: format!("prompt {prompt_id}"),
                expected: "the same prompt in both samples".to_owned(),
                found: "two".to_owned(),
            });
        }
        out.push(Samples { samples: [zero, one], n_prompt });
    }
    Ok(out)
}

/// A pair that may be judged.
pub(super) struct Candidate {
    /// Index of the prompt.
    pub(super) prompt: usize,
    pub(super) aspect: Aspect,
    pub(super) pair: Pair,
}

/// Why prompts have no pair of an aspect.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Dropped {
    pub(super) truncated: usize,
    pub(super) untrimmable: usize,
    pub(super) identical: usize,
    pub(super) ties: usize,
    /// Of the ties, those on which the judge gave no verdict at all.
    pub(super) abstained: usize,
}

impl Dropped {
    /// What became of the pairs that are missing, and what would help against each.
    fn advice(&self, truncated: Truncated) -> String {
        let otherwise = match truncated {
            Truncated::Drop => ", or use truncated = \"trim\" or \"keep\"",
            Truncated::Trim => ", or use truncated = \"keep\"",
            Truncated::Keep => "",
        };
        let causes = [
            (
                self.truncated + self.untrimmable,
                format!("cut by the token limit: raise max_new_tokens of the conversations{otherwise}"),
            ),
            (self.identical, "of equal replies: raise the temperature of the conversations".to_owned()),
            (self.abstained, "on which the judge gave no verdict: take another judge or method".to_owned()),
            (
                self.ties - self.abstained,
                "ties: use ties = \"probability\", or a judge that tells the samples apart".to_owned(),
            ),
        ];
        let found: Vec<String> = causes
            .into_iter()
            .filter(|(n, _)| *n > 0)
            .map(|(n, cause)| format!("{n} {cause}"))
            .collect();
        if found.is_empty() {
            return "nothing was left out: use more prompts, or a lower min_pairs".to_owned();
        }
        found.join("; ")
    }
}

/// Every pair that may be judged, and what was left out beforehand.
pub(super) struct Candidates {
    pub(super) all: Vec<Candidate>,
    pub(super) dropped: BTreeMap<Aspect, Dropped>,
    /// The turns, in the order of the chain.
    pub(super) aspects: Vec<Aspect>,
    pub(super) n_prompts: usize,
    pub(super) finish_rates: String,
}

impl Candidates {
    pub(super) fn of(prompts: &[Samples], turns: &Turns, truncated: Truncated) -> Self {
        let aspects = turns.names();
        let mut all = Vec::new();
        let mut dropped: BTreeMap<Aspect, Dropped> = BTreeMap::new();
        for (prompt, samples) in prompts.iter().enumerate() {
            for (turn, &aspect) in aspects.iter().enumerate() {
                let dropped = dropped.entry(aspect).or_default();
                if truncated == Truncated::Drop && samples.truncated(aspect).contains(&true) {
                    dropped.truncated += 1;
                    continue;
                }
                let sides = [0, 1].map(|s| side(samples, s, turn, truncated));
                let [Some(zero), Some(one)] = sides else {
                    dropped.untrimmable += 1;
                    continue;
                };
                if zero == one {
                    dropped.identical += 1;
                    continue;
                }
                let messages = &samples.samples[0].messages;
                let pair = Pair {
                    question: messages[..samples.n_prompt].to_vec(),
                    sides: [zero, one],
                    key: key_of(&samples.samples[0].prompt_id) ^ turn as u64,
                };
                all.push(Candidate { prompt, aspect, pair });
            }
        }
        let n_replies = 2 * prompts.len();
        let finish_rate = |&aspect: &Aspect| {
            let cut = prompts.iter().flat_map(|s| s.truncated(aspect)).filter(|&cut| cut).count();
            format!("{aspect} {} %", percent(n_replies - cut, n_replies))
        };
        let finish_rates = aspects.iter().map(finish_rate).collect::<Vec<_>>().join(", ");
        Self { all, dropped, aspects, n_prompts: prompts.len(), finish_rates }
    }

    pub(super) fn n_left(&self, aspect: Aspect) -> usize {
        self.all.iter().filter(|candidate| candidate.aspect == aspect).count()
    }

    /// Fails if an aspect has too few pairs for a reward model.
    pub(super) fn check(
        &self,
        aspect: Aspect,
        left: usize,
        dropped: &Dropped,
        config: &PreferencesConfig,
    ) -> Result<(), Error> {
        if left >= config.min_pairs {
            return Ok(());
        }
        Err(Error::TooFewPairs {
            aspect,
            left,
            total: self.n_prompts,
            needed: config.min_pairs,
            finish_rates: self.finish_rates.clone(),
            advice: dropped.advice(config.truncated),
        })
    }
}

/// One sample's messages after the prompt through the reply of the turn at `turn`; cut replies trimmed if
/// asked (`None` if one of them has no full sentence).
fn side(
    samples: &Samples,
    sample: usize,
    turn: usize,
    truncated: Truncated,
) -> Option<Vec<Message>> {
    let row = &samples.samples[sample];
    let mut side = side_through(&row.messages, samples.n_prompt, turn);
    if truncated == Truncated::Trim {
        let replies = side.iter_mut().filter(|message| message.role == Role::Assistant);
        for (turn, reply) in row.turns.iter().zip(replies) {
            if turn.finish_reason == FinishReason::Length {
                reply.content = last_sentence(&reply.content)?.to_owned();
            }
        }
    }
    Some(side)
}
