//! Journals of replies and of scores: each as it came, so that a run that was stopped or killed gets the same again although the
//! servers would give others.
//!
//! A reply is kept under a hash of what was asked: tokens, sampling, seed, and which weights. So a journal cannot answer
//! a question that was never put, whatever the order of questions.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

use arete_model::generate::Completion;
use arete_records::{FinishReason, atomic, files, hex, sealed};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::Error;
use crate::dialect::Draw;

/// Largest journal that is read: far more than the replies of one rollout.
const MAX_BYTES: u64 = 4 << 30;

/// A file of replies, or none that is kept.
#[derive(Debug, Default)]
pub struct Journal {
    file: Option<fs_err::File>,
    known: HashMap<String, Completion>,
}

/// A reply as a line of JSON; log-probabilities as the bits of f32, which no parser rounds.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    request: String,
    token_ids: Vec<i64>,
    logprob_bits: Vec<u32>,
    finish_reason: FinishReason,
    /// Who replied, and with what: for readers.
    server: String,
    weights: String,
}

/// A file of scores, or none that is kept.
#[derive(Debug, Default)]
pub struct ScoreJournal {
    file: Option<fs_err::File>,
    known: HashMap<String, f64>,
}

/// A score as a line of JSON.
#[derive(Debug, Serialize, Deserialize)]
struct ScoreLine {
    request: String,
    score_bits: u64,
}

/// Opens a file of sealed lines for more of them, and hands over those that are there.
fn open<L: DeserializeOwned>(path: &Path, mut take: impl FnMut(L)) -> Result<fs_err::File, Error> {
    if let Some(dir) = path.parent() {
        fs_err::create_dir_all(dir)?;
    }
    let bytes = match files::read_capped(path, MAX_BYTES) {
        Err(arete_records::Error::Io(error)) if error.kind() == std::io::ErrorKind::NotFound => {
            Vec::new()
        }
        other => other?,
    };
    let n_good = sealed::read(&bytes, |json| {
        let Ok(line) = serde_json::from_slice(json) else { return false };
        take(line);
        true
    });
    if n_good < bytes.len() {
        atomic::write(path, &bytes[..n_good])?; // a kill cut the last line
    }
    Ok(fs_err::OpenOptions::new().create(true).append(true).open(path)?)
}

fn write(file: &mut fs_err::File, line: &impl Serialize) -> Result<(), Error> {
    let json = serde_json::to_string(line).expect("numbers and text serialise");
    Ok(file.write_all(sealed::line(&json).as_bytes())?)
}

impl ScoreJournal {
    /// Opens the journal in `path`, and reads what an earlier attempt left.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the file cannot be read or written.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let mut known = HashMap::new();
        let file = open(path, |ScoreLine { request, score_bits }| {
            known.insert(request, f64::from_bits(score_bits));
        })?;
        Ok(Self { file: Some(file), known })
    }

    /// What a sequence is scored under: which reward model, and its tokens.
    pub(crate) fn request(model: &str, token_ids: &[i64]) -> String {
        let mut hash = Sha256::new();
        hash.update((model.len() as u64).to_le_bytes());
        hash.update(model);
        token_ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
        hex(&hash.finalize()[..16])
    }

    pub(crate) fn score(&self, request: &str) -> Option<f64> {
        self.known.get(request).copied()
    }

    /// Adds a score; equal sequences have one.
    pub(crate) fn append(&mut self, request: String, score: f64) -> Result<(), Error> {
        let line = ScoreLine { request, score_bits: score.to_bits() };
        if let Some(file) = &mut self.file {
            write(file, &line)?;
        }
        self.known.insert(line.request, score);
        Ok(())
    }
}

impl Journal {
    /// Opens the journal in `path`, and reads what an earlier attempt left.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the file cannot be read or written.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let mut known = HashMap::new();
        let file = open(path, |line: Line| {
            let Line { request, token_ids, logprob_bits, finish_reason, .. } = line;
            let logprobs = logprob_bits.into_iter().map(f32::from_bits).collect();
            known.insert(request, Completion { token_ids, logprobs, finish_reason });
        })?;
        Ok(Self { file: Some(file), known })
    }

    /// How many replies an earlier attempt left.
    #[must_use]
    pub fn n_known(&self) -> usize {
        self.known.len()
    }

    /// The reply to a request, if it is known.
    pub(crate) fn reply(&self, request: &str) -> Option<&Completion> {
        self.known.get(request)
    }

    /// Adds a reply.
    pub(crate) fn append(
        &mut self,
        request: String,
        reply: &Completion,
        server: String,
        weights: &str,
    ) -> Result<(), Error> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let line = Line {
            request,
            token_ids: reply.token_ids.clone(),
            logprob_bits: reply.logprobs.iter().map(|logprob| logprob.to_bits()).collect(),
            finish_reason: reply.finish_reason,
            server,
            weights: weights.to_owned(),
        };
        write(file, &line)
    }
}

/// The hash of a request: the tokens before the reply, how it is drawn, and by which role's weights.
pub(crate) fn request(role: &str, token_ids: &[i64], draw: &Draw<'_>) -> String {
    let Draw { sampling, seed, max_new_tokens, stop_ids } = draw;
    let mut hash = Sha256::new();
    hash.update((role.len() as u64).to_le_bytes());
    hash.update(role);
    hash.update(seed.to_le_bytes());
    hash.update((*max_new_tokens as u64).to_le_bytes());
    for number in [sampling.temperature, sampling.top_p] {
        hash.update(number.to_bits().to_le_bytes());
    }
    hash.update((sampling.top_k as u64).to_le_bytes());
    for ids in [stop_ids, token_ids] {
        hash.update((ids.len() as u64).to_le_bytes());
        ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
    }
    hex(&hash.finalize()[..16])
}

#[cfg(test)]
mod tests {
    use arete_model::generate::Sampling;

    use super::*;

    fn reply(token: i64) -> Completion {
        Completion {
            token_ids: vec![token, 2],
            logprobs: vec![-0.1, -1e-30],
            finish_reason: FinishReason::Stop,
        }
    }

    #[test]
    fn replies_are_found_again_bit_for_bit_and_a_cut_line_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rollouts/x.partial.jsonl");
        let mut journal = Journal::open(&path).unwrap();
        for token in 5..8 {
            journal.append(format!("{token}"), &reply(token), "http://a".to_owned(), "v1").unwrap();
        }
        let whole = fs_err::read(&path).unwrap();
        let journal = Journal::open(&path).unwrap();
        assert_eq!(journal.n_known(), 3);
        let found = journal.reply("6").unwrap();
        assert_eq!(found, &reply(6));
        assert_eq!(found.logprobs[1].to_bits(), (-1e-30f32).to_bits());
        assert!(journal.reply("9").is_none());
        fs_err::write(&path, &whole[..whole.len() - 4]).unwrap();
        let mut journal = Journal::open(&path).unwrap();
        assert_eq!(journal.n_known(), 2);
        journal.append("7".to_owned(), &reply(7), "http://a".to_owned(), "v1").unwrap();
        assert_eq!(fs_err::read(&path).unwrap(), whole);
    }

    #[test]
    fn a_request_is_known_by_all_that_decides_its_reply() {
        let draw = Draw { sampling: Sampling::at(0.7), seed: 1, max_new_tokens: 9, stop_ids: &[2] };
        let others = [
            request("policy", &[1, 2, 3], &draw),
            request("base", &[1, 2, 3], &draw),
            request("policy", &[1, 2], &draw),
            request("policy", &[1, 2, 3], &Draw { seed: 2, ..draw.clone() }),
            request("policy", &[1, 2, 3], &Draw { max_new_tokens: 8, ..draw.clone() }),
            request("policy", &[1, 2, 3], &Draw { sampling: Sampling::at(0.8), ..draw.clone() }),
            request("policy", &[1, 2, 3], &Draw { sampling: Sampling::GREEDY, ..draw.clone() }),
            // The border between stop tokens and prompt.
            request("policy", &[2, 3], &Draw { stop_ids: &[2, 1], ..draw.clone() }),
        ];
        for (at, one) in others.iter().enumerate() {
            assert!(!others[..at].contains(one), "{at}");
        }
        assert_eq!(others[0], request("policy", &[1, 2, 3], &draw));
    }
}
