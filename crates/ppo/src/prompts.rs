//! Prompts as tokens, and the order in which they are drawn.

use std::path::Path;

use anyhow::{Result, bail};
use arete_model::Chat;
use arete_records::left_out::LeftOut;
use arete_records::rows::PromptRow;
use arete_records::{Message, Refusal, Split, parquet};
use arete_training::order::permutation;

/// Name of the file in a prompts directory.
const PROMPTS: &str = "prompts.parquet";

/// A prompt to answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// Its id.
    pub prompt_id: String,
    /// Its messages; the last is the user's.
    pub messages: Vec<Message>,
    /// The tokens to sample after.
    pub token_ids: Vec<i64>,
}

/// The prompts of the splits that training may look at.
#[derive(Clone, Debug, Default)]
pub struct Prompts {
    /// What rollouts answer.
    pub train: Vec<Prompt>,
    /// What probes and score statistics answer.
    pub validation: Vec<Prompt>,
    /// Prompts too long for the model, as `conversations` leaves them out.
    pub left_out: Vec<LeftOut>,
}

/// Prompts of the splits train and validation in `DIR/prompts.parquet` (or a file).
///
/// # Errors
///
/// Those of [`parquet::read`].
pub fn counts(path: &Path) -> Result<[usize; 2]> {
    let path = if path.is_dir() { path.join(PROMPTS) } else { path.to_owned() };
    let rows: Vec<PromptRow> = parquet::read(&path)?;
    let n_in = |split| rows.iter().filter(|row| row.split == split).count();
    Ok([Split::Train, Split::Validation].map(n_in))
}

impl Prompts {
    /// Reads `DIR/prompts.parquet` (or a file) and renders the prompts.
    ///
    /// # Errors
    ///
    /// A file's failure if the file is unusable; Refused prompts if there is no prompt to train on;
    /// a prompt too long if that is because `reserved` further tokens fit behind none; The model's failure if the chat
    /// template refuses one.
    pub fn read(path: &Path, chat: &Chat<'_>, context: usize, reserved: usize) -> Result<Self> {
        let path = if path.is_dir() { path.join(PROMPTS) } else { path.to_owned() };
        let rows: Vec<PromptRow> = parquet::read(&path)?;
        let (mut out, mut first_too_long) = (Self::default(), None);
        for row in rows {
            let list = match row.split {
                Split::Train => &mut out.train,
                Split::Validation => &mut out.validation,
                Split::Test => continue,
            };
            let token_ids = chat.render_prompt(&row.prompt)?;
            if token_ids.len() + reserved > context {
                let (got, prompt_id) = (token_ids.len(), row.prompt_id);
                tracing::warn!(
                    prompt_id,
                    tokens = got,
                    "prompt and replies exceed the model's positions, left out"
                );
                let reason =
                    format!("{got} tokens and {reserved} of replies exceed {context} positions");
                out.left_out.push(LeftOut::new(&prompt_id, reason));
                first_too_long.get_or_insert((got, prompt_id));
                continue;
            }
            list.push(Prompt { prompt_id: row.prompt_id, messages: row.prompt, token_ids });
        }
        if let Some((got, prompt_id)) = first_too_long.filter(|_| out.train.is_empty()) {
            let expected = context.saturating_sub(reserved);
            bail!(Refusal::file(
                &path,
                format!("prompt {prompt_id}"),
                format!(
                    "at most {expected} tokens ({context} of the model less {reserved} for the replies)"
                ),
                got
            ));
        }
        if out.train.is_empty() {
            bail!(Refusal::file(
                &path,
                "split",
                "at least one prompt of the train split",
                format!("none, and {} of the validation split", out.validation.len())
            ));
        }
        Ok(out)
    }
}

/// The prompts of an iteration: every pass over them has an order of its own, and rollouts follow each other through
/// the passes without gaps.
pub fn draw(n_prompts: usize, rollout_size: usize, iteration: u64, seed: u64) -> Vec<usize> {
    let n = n_prompts as u64;
    let mut order: Option<(u64, Vec<usize>)> = None;
    let first = (iteration - 1) * rollout_size as u64;
    (first..first + rollout_size as u64)
        .map(|counter| {
            let (pass, within) = (counter / n, counter % n);
            if order.as_ref().is_none_or(|(known, _)| *known != pass) {
                order = Some((pass, permutation(seed, &format!("prompts/{pass}"), n_prompts)));
            }
            let (_, order) = order.as_ref().expect("it was just made");
            order[usize::try_from(within).expect("below the number of prompts")]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pass_sees_every_prompt_once() {
        let drawn: Vec<usize> = (1..=7).flat_map(|iteration| draw(14, 6, iteration, 3)).collect();
        assert_eq!(drawn.len(), 42);
        for pass in drawn.chunks(14) {
            let mut pass = pass.to_vec();
            pass.sort_unstable();
            assert_eq!(pass, (0..14).collect::<Vec<_>>());
        }
        assert_ne!(drawn[..14], drawn[14..28]);
        assert_ne!(drawn[..14], (1..=7).flat_map(|i| draw(14, 6, i, 4)).collect::<Vec<_>>()[..14]);
        // More conversations than prompts: the passes follow each other within the iteration.
        assert_eq!(draw(2, 4, 1, 0).len(), 4);
    }
}
