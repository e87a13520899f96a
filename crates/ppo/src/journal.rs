//! The sequences of a rollout as they end, so that a stopped or killed run need not sample them again.
//!
//! A sequence depends on the policy and on its own random stream alone, never on its neighbours. So the rest of a
//! half-finished rollout can be sampled later, and an iteration that is done again after its rollout was whole
//! samples nothing. Journals go when a checkpoint makes them needless; they are no results.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Result;
use arete_chain::sample;
use arete_model::generate::{Completion, Sequence};
use arete_records::{FinishReason, atomic, files, sealed};
use serde::{Deserialize, Serialize};

/// Largest journal that is read: far more than the sequences of one rollout.
const MAX_BYTES: u64 = 4 << 30;
const SUFFIX: &str = ".partial.jsonl";

/// The journal of one iteration's rollout.
#[derive(Debug)]
pub struct Journal {
    file: fs_err::File,
    /// Samples of a request.
    n_samples: usize,
    /// Sequences of an earlier attempt, by conversation.
    known: Vec<Option<Sequence>>,
}

/// A sequence as a line of JSON; log-probabilities as the bits of f32, which no parser
/// rounds.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    request: usize,
    turns: Vec<Turn>,
    appended: Vec<Vec<i64>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Turn {
    token_ids: Vec<i64>,
    logprob_bits: Vec<u32>,
    finish_reason: FinishReason,
}

impl Journal {
    /// Opens the journal of an iteration's rollout of `n` sequences in `dir`, `n_samples` of each prompt, and reads what an earlier attempt left.
    ///
    /// # Errors
    ///
    /// The system's failure if the file cannot be read or written.
    pub fn open(dir: &Path, iteration: u64, n: usize, n_samples: usize) -> Result<Self> {
        fs_err::create_dir_all(dir)?;
        let path = path_of(dir, iteration);
        let bytes = match files::read_capped(&path, MAX_BYTES) {
            Err(arete_records::Error::Io(error))
                if error.kind() == std::io::ErrorKind::NotFound =>
            {
                Vec::new()
            }
            other => other?,
        };
        let mut known = vec![None; n];
        let n_good = read_lines(&bytes, &mut known);
        if n_good < bytes.len() {
            atomic::write(&path, &bytes[..n_good])?; // a kill cut the last line
        }
        let file = fs_err::OpenOptions::new().create(true).append(true).open(path)?;
        Ok(Self { file, n_samples, known })
    }

    /// Whether an earlier attempt left this sequence.
    pub(crate) fn knows(&self, conversation: usize) -> bool {
        self.known.get(conversation).is_some_and(Option::is_some)
    }
}

impl sample::Journal for Journal {
    fn take_known(&mut self) -> Vec<Sequence> {
        let mut known: Vec<Sequence> =
            std::mem::take(&mut self.known).into_iter().flatten().collect();
        for sequence in &mut known {
            // Lines count conversations.
            let conversation = sequence.request;
            sequence.request = conversation / self.n_samples;
            sequence.stream = conversation % self.n_samples;
        }
        known
    }

    fn append(&mut self, sequence: &Sequence) -> std::io::Result<()> {
        let turn = |completion: &Completion| Turn {
            token_ids: completion.token_ids.clone(),
            logprob_bits: completion.logprobs.iter().map(|logprob| logprob.to_bits()).collect(),
            finish_reason: completion.finish_reason,
        };
        let line = Line {
            request: sequence.request * self.n_samples + sequence.stream,
            turns: sequence.turns.iter().map(turn).collect(),
            appended: sequence.appended.clone(),
        };
        let json = serde_json::to_string(&line).expect("numbers and lists serialise");
        self.file.write_all(sealed::line(&json).as_bytes())
    }
}

/// Removes the journals of iterations up to `last`, which a checkpoint has made needless.
///
/// # Errors
///
/// The system's failure if one cannot be removed.
pub fn remove_through(dir: &Path, last: u64) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    for entry in fs_err::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        let iteration = name
            .as_deref()
            .and_then(|name| name.strip_prefix("iteration-")?.strip_suffix(SUFFIX)?.parse().ok());
        if iteration.is_some_and(|iteration: u64| iteration <= last) {
            fs_err::remove_file(path)?;
        }
    }
    Ok(())
}

/// The journal of an iteration.
pub(crate) fn path_of(dir: &Path, iteration: u64) -> PathBuf {
    dir.join(format!("iteration-{iteration:06}{SUFFIX}"))
}

/// Fills in the sequences of whole lines; the number of bytes they take.
fn read_lines(bytes: &[u8], known: &mut [Option<Sequence>]) -> usize {
    sealed::read(bytes, |json| {
        let Some(sequence) = parse(json) else { return false };
        let Some(slot) = known.get_mut(sequence.request) else { return false };
        *slot = Some(sequence);
        true
    })
}

fn parse(json: &[u8]) -> Option<Sequence> {
    let Line { request, turns, appended } = serde_json::from_slice(json).ok()?;
    let turns = turns
        .into_iter()
        .map(|turn| Completion {
            token_ids: turn.token_ids,
            logprobs: turn.logprob_bits.into_iter().map(f32::from_bits).collect(),
            finish_reason: turn.finish_reason,
        })
        .collect();
    Some(Sequence { request, stream: 0, turns, appended })
}

#[cfg(test)]
mod tests {
    use arete_chain::sample::Journal as _;

    use super::*;

    fn sequence(request: usize) -> Sequence {
        let turn = |token: i64, finish_reason| Completion {
            token_ids: vec![token, token + 1],
            logprobs: vec![-0.1, -1e-30],
            finish_reason,
        };
        Sequence {
            request,
            stream: 0,
            turns: vec![turn(5, FinishReason::Stop), turn(9, FinishReason::Length)],
            appended: vec![vec![1, 2, 3]],
        }
    }

    #[test]
    fn what_ended_before_a_kill_is_there_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path(), 3, 4, 1).unwrap();
        assert_eq!(journal.take_known(), []);
        for request in [2, 0] {
            journal.append(&sequence(request)).unwrap();
        }
        let path = path_of(dir.path(), 3);
        let whole = fs_err::read(&path).unwrap();
        // Killed within the line of the second sequence.
        fs_err::write(&path, &whole[..whole.len() - 9]).unwrap();
        let mut journal = Journal::open(dir.path(), 3, 4, 1).unwrap();
        assert_eq!(journal.take_known(), [sequence(2)]);
        journal.append(&sequence(0)).unwrap();
        assert_eq!(fs_err::read(&path).unwrap(), whole);
        let known = Journal::open(dir.path(), 3, 4, 1).unwrap().take_known();
        assert_eq!(known, [sequence(0), sequence(2)]);
        // A bit that flipped in a line: it and what follows is sampled again.
        for at in 0..8 * whole.len() {
            let mut bytes = whole.clone();
            bytes[at / 8] ^= 1 << (at % 8);
            let mut known = vec![None; 4];
            let n_good = read_lines(&bytes, &mut known);
            assert!(n_good < whole.len(), "{at}");
            let intact = known
                .into_iter()
                .flatten()
                .all(|found| [sequence(0), sequence(2)].contains(&found));
            assert!(intact, "{at}");
        }
        // Another rollout size cannot come with the same settings; such lines are not trusted.
        assert_eq!(Journal::open(dir.path(), 3, 1, 1).unwrap().take_known(), []);
    }

    #[test]
    fn several_samples_of_a_prompt_are_kept_apart() {
        let dir = tempfile::tempdir().unwrap();
        let of = |request, stream| Sequence { stream, ..sequence(request) };
        let mut journal = Journal::open(dir.path(), 1, 6, 3).unwrap();
        for (request, stream) in [(1, 2), (0, 1), (1, 0)] {
            journal.append(&of(request, stream)).unwrap();
        }
        let mut journal = Journal::open(dir.path(), 1, 6, 3).unwrap();
        assert!(journal.knows(1) && journal.knows(3) && journal.knows(5) && !journal.knows(0));
        assert_eq!(journal.take_known(), [of(0, 1), of(1, 0), of(1, 2)]);
    }

    #[test]
    fn journals_go_with_their_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        remove_through(&dir.path().join("none"), 9).unwrap();
        for iteration in 1..=3 {
            Journal::open(dir.path(), iteration, 1, 1).unwrap();
        }
        fs_err::write(dir.path().join("iteration-000001.parquet"), "rows").unwrap();
        remove_through(dir.path(), 2).unwrap();
        let mut left: Vec<String> = fs_err::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        left.sort();
        assert_eq!(left, ["iteration-000001.parquet", "iteration-000003.partial.jsonl"]);
    }
}
