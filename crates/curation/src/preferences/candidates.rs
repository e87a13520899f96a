//! The pairs of samples that may be judged, and what was left out on the way.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Result, bail};
use arete_chain::sample::key_of;
use arete_chain::trim::last_sentence;
use arete_chain::{Turns, prompt_of};
use arete_records::rows::ConversationRow;
use arete_records::{Aspect, At, FinishReason, Message, Refusal, Role};
use arete_stage::exit::BadInput;

use super::{PreferencesConfig, sets};
use crate::config::Truncated;
use crate::conversations::{self, MOST_SAMPLES};
use crate::judge::{Pair, side_through};
use crate::stage;
use crate::stage::percent;

/// The samples of a prompt, two at least.
pub(super) struct Samples {
    pub(super) samples: Vec<ConversationRow>,
    /// Messages of the prompt itself.
    pub(super) n_prompt: usize,
}

impl Samples {
    pub(super) fn n_cut(&self, aspect: Aspect) -> usize {
        self.samples.iter().filter(|sample| sample.is_cut(aspect)).count()
    }

    /// Every pair of samples: 0 and 1, 0 and 2, …
    fn pairs(&self) -> impl Iterator<Item = [usize; 2]> {
        let n = self.samples.len();
        (0..n).flat_map(move |zero| (zero + 1..n).map(move |one| [zero, one]))
    }

    /// By what the verdicts on a pair are known: the prompt's id, and where there are more than two samples, which of them
    /// stand for 0 and 1.
    pub(super) fn pair_id(&self, [zero, one]: [usize; 2]) -> String {
        let prompt_id = &self.samples[0].prompt_id;
        match self.samples.len() {
            2 => prompt_id.clone(),
            _ => format!("{prompt_id}:{zero}-{one}"),
        }
    }
}

/// Reads the conversations by prompt, in the order of the file; `turns` are the constitution's.
pub(super) fn samples_of(input: &Path, turns: &Turns) -> Result<Vec<Samples>> {
    let path = stage::file_of(input, conversations::STAGE);
    let rows: Vec<ConversationRow> = stage::rows_of(input, conversations::STAGE)?;
    turns.check_names(&rows[0].aspects().collect::<Vec<_>>(), &path)?;
    let mut order = Vec::new();
    let mut by_prompt: HashMap<String, Vec<Option<ConversationRow>>> = HashMap::new();
    for (idx, row) in rows.into_iter().enumerate() {
        let wrong = |field: &str, expected: &str, found: String| {
            Refusal::at(&path, At::Row(idx + 1), field, expected, found)
        };
        let is_known = |&sample: &usize| sample < MOST_SAMPLES;
        let sample = usize::try_from(row.sample).ok().filter(is_known).ok_or_else(|| {
            let expected = format!("0 to {}", MOST_SAMPLES - 1);
            wrong("sample", &expected, row.sample.to_string())
        })?;
        if prompt_of(&row.messages, turns.len()).is_err() {
            let n_messages = 2 * turns.len() - 1;
            let expected = format!("a prompt and the {n_messages} messages of a chain");
            bail!(wrong("messages", &expected, row.messages.len().to_string()));
        }
        let slots = by_prompt.entry(row.prompt_id.clone()).or_insert_with(|| {
            order.push(row.prompt_id.clone());
            Vec::new()
        });
        slots.resize(slots.len().max(sample + 1), None);
        if slots[sample].is_some() {
            let found = format!("sample {sample} of {} twice", row.prompt_id);
            bail!(wrong("prompt_id", "each sample of a prompt once", found));
        }
        slots[sample] = Some(row);
    }
    let mut out = Vec::with_capacity(order.len());
    for prompt_id in order {
        let slots = by_prompt.remove(&prompt_id).unwrap_or_default();
        let n_slots = slots.len().max(2);
        let samples: Vec<ConversationRow> = slots.into_iter().flatten().collect();
        if samples.len() < n_slots {
            let found = match samples.len() {
                1 => "one of them".to_owned(),
                n => format!("{n} of them"),
            };
            bail!(Refusal::file(
                &path,
                format!("prompt {prompt_id}"),
                match n_slots {
                    2 => "samples 0 and 1".to_owned(),
                    n => format!("samples 0 to {}", n - 1),
                },
                found
            ));
        }
        let zero = &samples[0].messages;
        let n_prompt = zero.len() - (2 * turns.len() - 1);
        let is_other = |row: &ConversationRow| {
            row.messages.len() != zero.len() || row.messages[..n_prompt] != zero[..n_prompt]
        };
        if samples.iter().any(is_other) {
            bail!(Refusal::file(
                &path,
                format!("prompt {prompt_id}"),
                "the same prompt in all samples",
                "two"
            ));
        }
        out.push(Samples { samples, n_prompt });
    }
    Ok(out)
}

/// A pair that may be judged.
pub(super) struct Candidate {
    /// Index of the prompt.
    pub(super) prompt: usize,
    pub(super) aspect: Aspect,
    /// Which samples stand for 0 and 1.
    pub(super) samples: [usize; 2],
    pub(super) pair: Pair,
}

/// Why pairs of an aspect were left out.
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
                format!(
                    "cut by the token limit: raise max_new_tokens of the conversations{otherwise}"
                ),
            ),
            (
                self.identical,
                "of equal replies: raise the temperature of the conversations".to_owned(),
            ),
            (
                self.abstained,
                "on which the judge gave no verdict: take another judge or method".to_owned(),
            ),
            (
                self.ties - self.abstained,
                "ties: use ties = \"probability\", or a judge that tells the samples apart"
                    .to_owned(),
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
    /// Pairs of samples, those left out included.
    pub(super) n_pairs: usize,
    pub(super) finish_rates: String,
}

impl Candidates {
    pub(super) fn of(prompts: &[Samples], turns: &Turns, config: &PreferencesConfig) -> Self {
        Self::among(prompts, sets::judged(config.by, turns), config.truncated)
    }

    /// Those in the replies of these turns, the first of the chain.
    pub(super) fn among(prompts: &[Samples], aspects: Vec<Aspect>, truncated: Truncated) -> Self {
        let mut all = Vec::new();
        let mut dropped: BTreeMap<Aspect, Dropped> = BTreeMap::new();
        let turns: Vec<(usize, Aspect)> = aspects.iter().copied().enumerate().collect();
        let mut n_pairs = 0;
        for (prompt, samples) in prompts.iter().enumerate() {
            n_pairs += samples.pairs().count();
            let pairs = |turn| (0..).zip(samples.pairs()).map(move |pair| (turn, pair));
            for ((turn, aspect), (number, own)) in turns.iter().flat_map(|&turn| pairs(turn)) {
                let dropped = dropped.entry(aspect).or_default();
                match candidate(samples, (turn, aspect), own, truncated) {
                    Ok(pair) => {
                        let key = pair.key ^ (number << 32); // the first pair's is what it is with two samples
                        let pair = Pair { key, ..pair };
                        all.push(Candidate { prompt, aspect, samples: own, pair });
                    }
                    Err(Reason::Truncated) => dropped.truncated += 1,
                    Err(Reason::Untrimmable) => dropped.untrimmable += 1,
                    Err(Reason::Identical) => dropped.identical += 1,
                }
            }
        }
        let n_replies = n_replies(prompts);
        let finish_rate = |&aspect: &Aspect| {
            let cut: usize = prompts.iter().map(|samples| samples.n_cut(aspect)).sum();
            format!("{aspect} {} %", percent(n_replies - cut, n_replies))
        };
        let finish_rates = aspects.iter().map(finish_rate).collect::<Vec<_>>().join(", ");
        Self { all, dropped, aspects, n_pairs, finish_rates }
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
    ) -> Result<()> {
        if left >= config.min_pairs {
            return Ok(());
        }
        bail!(BadInput(format!(
            "{aspect}: {left} pairs left of {}, expected at least {}; replies that ended by themselves: {}; of the pairs {}",
            self.n_pairs,
            config.min_pairs,
            self.finish_rates,
            dropped.advice(config.truncated)
        )))
    }
}

/// Replies of one turn in all conversations.
pub(super) fn n_replies(prompts: &[Samples]) -> usize {
    prompts.iter().map(|samples| samples.samples.len()).sum()
}

/// Why a pair is left out.
enum Reason {
    Truncated,
    Untrimmable,
    Identical,
}

/// Two samples through a turn's reply, if they may be judged.
fn candidate(
    samples: &Samples,
    (turn, aspect): (usize, Aspect),
    own: [usize; 2],
    truncated: Truncated,
) -> Result<Pair, Reason> {
    let is_cut = |sample: usize| samples.samples[sample].is_cut(aspect);
    if truncated == Truncated::Drop && own.into_iter().any(is_cut) {
        return Err(Reason::Truncated);
    }
    let [Some(zero), Some(one)] = own.map(|sample| side(samples, sample, turn, truncated)) else {
        return Err(Reason::Untrimmable);
    };
    if zero == one {
        return Err(Reason::Identical);
    }
    let first = &samples.samples[0];
    Ok(Pair {
        question: first.messages[..samples.n_prompt].to_vec(),
        sides: [zero, one],
        key: key_of(&first.prompt_id) ^ turn as u64,
    })
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
