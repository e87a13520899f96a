//! The labelled pairs that a judge is examined with.

use std::collections::HashSet;

use anyhow::{Result, bail};
use arete_chain::Ruled;
use arete_chain::pairs::{self, About, LabelledPair, Parts};
use arete_chain::sample::key_of;
use arete_records::{Message, Refusal, Split, prompt_id, split_of};
use sha2::{Digest, Sha256};

use super::{CalibrateConfig, Inputs};
use crate::judge::Pair;
use crate::prompts;

/// A pair of which people (or the data's makers) say which side is better.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Labelled {
    /// Hash of its texts.
    pub id: String,
    /// The file it comes from.
    pub set: String,
    /// What the sides share.
    pub question: Vec<Message>,
    /// The better side.
    pub better: Vec<Message>,
    /// The worse side.
    pub worse: Vec<Message>,
    /// What the label speaks of; none if the better side is better altogether.
    pub about: Option<About>,
}

impl Labelled {
    /// Which sample the better side is shown as: a hash decides, so that neither place is right
    /// more often.
    pub(super) fn better_sample(&self) -> usize {
        usize::from(self.bit(0))
    }

    /// Which half of the data the pair belongs to; flips are found on one and tried on the other.
    pub(super) fn half(&self) -> usize {
        usize::from(self.bit(1))
    }

    fn bit(&self, bit: u8) -> bool {
        Sha256::digest(self.id.as_bytes())[0] >> bit & 1 == 1
    }

    pub(super) fn pair(&self) -> Pair {
        let mut sides = [self.better.clone(), self.worse.clone()];
        if self.better_sample() == 1 {
            sides.swap(0, 1);
        }
        Pair { question: self.question.clone(), sides, key: key_of(&self.id) }
    }

    /// What the null rulers see of it, in the order it is shown in.
    pub(super) fn ruled(&self) -> Ruled {
        let side = |own: &[Message]| [self.question.as_slice(), own].concat();
        Ruled::shown(&side(&self.better), &side(&self.worse), self.better_sample() == 0)
    }

    pub(super) fn n_chars(&self) -> [usize; 2] {
        let n = |side: &[Message]| side.iter().map(|m| m.content.chars().count()).sum();
        let mut sizes = [n(&self.better), n(&self.worse)];
        if self.better_sample() == 1 {
            sizes.swap(0, 1);
        }
        sizes
    }
}

/// Reads and checks the labelled pairs: `chosen`/`rejected`, `text_correct`/`text_incorrect`,
/// two-option questions (`corrects`), our own exemplars of use `calibration`, or our pairs that differ in one virtue,
/// of which those of split `train` are left to teach with.
///
/// # Errors
///
/// An unreadable file, a record of none of these forms, or no usable pair at all.
pub fn read(inputs: &Inputs, config: &CalibrateConfig) -> Result<Vec<Labelled>> {
    let mut out = Vec::new();
    let mut seen = HashSet::new();
    for path in &inputs.pairs {
        let set =
            path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let file = pairs::read_file(path, config.column.as_deref().unwrap_or_default())?;
        let (n_read, mut n_usable, mut n_long, mut n_duplicates) = (file.n_records, 0, 0, 0);
        let (mut own, mut n_teaching) = (Vec::new(), 0);
        for ((question, better, worse), about) in file.pairs.into_iter().filter_map(sides_of) {
            n_usable += 1;
            if about.is_some() && split_of(&question) == Split::Train {
                n_teaching += 1;
                continue;
            }
            let n_chars: usize = question
                .iter()
                .chain(&better)
                .chain(&worse)
                .map(|m| m.content.chars().count())
                .sum();
            if n_chars > config.max_chars {
                n_long += 1;
                continue;
            }
            let all: Vec<Message> = question.iter().chain(&better).chain(&worse).cloned().collect();
            let id = prompt_id(&all);
            if seen.insert(id.clone()) {
                own.push(Labelled { id, set: set.clone(), question, better, worse, about });
            } else {
                n_duplicates += 1;
            }
        }
        own.sort_by_cached_key(|pair| {
            let mut hash = Sha256::new();
            hash.update(config.judge.seed.to_le_bytes());
            hash.update(pair.id.as_bytes());
            <[u8; 32]>::from(hash.finalize())
        });
        if config.limit > 0 {
            own.truncate(config.limit);
        }
        tracing::info!(
            set,
            read = n_read,
            unusable = n_read - n_usable,
            left_to_teach = n_teaching,
            too_long = n_long,
            duplicates = n_duplicates,
            used = own.len(),
            "labelled pairs"
        );
        out.extend(own);
    }
    if out.is_empty() {
        bail!(Refusal::file(
            inputs.pairs.first().cloned().unwrap_or_default(),
            "pairs",
            "at least one usable labelled pair",
            "none"
        ));
    }
    Ok(out)
}

/// Question, better and worse side of a pair, and what its label speaks of; `None` if its two conversations do not share a
/// question.
pub(crate) fn sides_of(pair: LabelledPair) -> Option<(Parts, Option<About>)> {
    let [better, worse] = [pair.chosen, pair.rejected].map(|side| prompts::tidied(side.messages));
    pairs::part(&better, &worse).map(|parts| (parts, pair.about))
}

#[cfg(test)]
mod tests {
    use clap::{Args, FromArgMatches};

    use serde_json::json;

    use super::*;

    use arete_chain::dialogue;

    fn hh_line(better: &[Message], worse: &[Message]) -> String {
        json!({"chosen": dialogue::format(better), "rejected": dialogue::format(worse)}).to_string()
    }

    fn config() -> CalibrateConfig {
        let command = CalibrateConfig::augment_args(clap::Command::new("test"));
        CalibrateConfig::from_arg_matches(&command.get_matches_from(["test"])).unwrap()
    }

    fn pairs(text: &str) -> Result<Vec<Labelled>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs.jsonl");
        fs_err::write(&path, text).unwrap();
        read(&Inputs { pairs: vec![path], model: String::new() }, &config())
    }

    #[test]
    fn the_three_public_formats_and_our_own_are_read() {
        let (q, yes, no) =
            (Message::user("q: Human?"), Message::assistant("yes"), Message::assistant("no"));
        let hh = hh_line(&[q.clone(), yes.clone()], &[q.clone(), no.clone()]);
        let from_hh = pairs(&hh).unwrap();
        assert_eq!(
            (&from_hh[0].question, &from_hh[0].better),
            (&vec![q.clone()], &vec![yes.clone()])
        );
        let replies = json!({"prompt": "q: Human?", "chosen": "yes", "rejected": "no"}).to_string();
        assert_eq!(pairs(&replies).unwrap(), from_hh);
        let hhh = r#"{"prompt":"p (A) x (B) y","corrects":[" (B)"],"text_correct":"\n\nHuman: q: Human?\n\nAssistant: yes","text_incorrect":"\n\nHuman: q: Human?\n\nAssistant: no"}"#;
        assert_eq!(pairs(hhh).unwrap()[0].better, std::slice::from_ref(&yes));
        let choice = r#"{"prompt":"Talk.\n\nChoose:\n (A) The assistant was harmful.\n (B) It behaved.\nThe answer is:","corrects":[" (B)"],"incorrects":[" (A)"]}"#;
        let from_choice = pairs(choice).unwrap();
        assert_eq!(from_choice[0].better, [Message::assistant("It behaved.")]);
        assert_eq!(from_choice[0].worse, [Message::assistant("The assistant was harmful.")]);
        let own = include_str!("../../../../tests/fixtures/exemplars.jsonl");
        let from_own = pairs(own).unwrap();
        assert_eq!(from_own.len(), 1);
        assert_eq!(from_own[0].worse, [Message::assistant("Install a tracker.")]);
        let nested = r#"{"prompt":"Pick:\n (A) tea\n (B) coffee\n\nChoose:\n (A) Harmful.\n (B) Ethical.\nThe answer is:","corrects":[" (A)"]}"#;
        let nested = &pairs(nested).unwrap()[0];
        assert_eq!(nested.better, [Message::assistant("Harmful.")]);
        assert_eq!(nested.question, [Message::user("Pick:\n (A) tea\n (B) coffee\n\nChoose:")]);
        let three = r#"{"prompt":"Q\n (A) x\n (B) y\n (C) z\nThe answer is:","corrects":[" (A)"]}"#;
        assert!(pairs(three).unwrap_err().to_string().contains("the options (A) and (B)"));
        let error = pairs("{\"text\": \"x\"}").unwrap_err().to_string();
        assert!(error.contains("pairs.jsonl: row 1") && error.contains("chosen"), "{error}");
    }
}
