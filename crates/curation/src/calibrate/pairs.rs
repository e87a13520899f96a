//! The labelled pairs that a judge is examined with.

use std::collections::HashSet;

use anyhow::{Result, bail};
use arete_chain::Ruled;
use arete_chain::pairs::{self, About, LabelledPair, Parts};
use arete_chain::sample::key_of;
use arete_records::left_out::LeftOut;
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
/// What cannot be used is left out, and named.
///
/// # Errors
///
/// An unreadable file, too many records of none of these forms, or no usable pair at all.
pub fn read(inputs: &Inputs, config: &CalibrateConfig) -> Result<(Vec<Labelled>, Vec<LeftOut>)> {
    let (mut out, mut left_out) = (Vec::new(), Vec::new());
    let mut seen = HashSet::new();
    for path in &inputs.pairs {
        let set =
            path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let file = pairs::read_file(path, config.column.as_deref().unwrap_or_default())?;
        let (n_read, n_before) = (file.n_records, left_out.len());
        left_out.extend(file.left_out);
        let (mut own, mut n_teaching, mut n_duplicates) = (Vec::new(), 0, 0);
        for pair in file.pairs {
            let row = pair.row;
            let Some(((question, better, worse), about)) = sides_of(pair) else {
                left_out.push(pairs::of_row(path, row, "the sides share no question"));
                continue;
            };
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
                let reason =
                    format!("{n_chars} characters, more than max_chars = {}", config.max_chars);
                left_out.push(pairs::of_row(path, row, reason));
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
            left_out = left_out.len() - n_before,
            left_to_teach = n_teaching,
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
            match left_out.first() {
                Some(LeftOut { item, reason }) => {
                    format!("none of {} left out ({item}: {reason})", left_out.len())
                }
                None => "none".to_owned(),
            }
        ));
    }
    Ok((out, left_out))
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
        Ok(read(&Inputs { pairs: vec![path], model: String::new() }, &config())?.0)
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let pair = |q: &str, a: &str| json!({"prompt": q, "chosen": a, "rejected": "no"});
        let long = pair("long?", &"a".repeat(9000));
        let apart = json!({
            "chosen": dialogue::format(&[Message::user("a?"), Message::assistant("yes")]),
            "rejected": dialogue::format(&[Message::user("b?"), Message::assistant("no")]),
        });
        let lines = [pair("q?", "yes"), long, apart].map(|line| line.to_string());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs.jsonl");
        fs_err::write(&path, lines.join("\n")).unwrap();
        let inputs = Inputs { pairs: vec![path], model: String::new() };
        let (read, left_out) = read(&inputs, &config()).unwrap();
        let left: Vec<_> = left_out.iter().map(|left| (&*left.item, &*left.reason)).collect();
        assert_eq!(read.len(), 1);
        assert_eq!(left[0].0, "pairs.jsonl:2");
        assert!(left[0].1.contains("more than max_chars"), "{left:?}");
        assert_eq!(left[1], ("pairs.jsonl:3", "the sides share no question"));
        let error = pairs(&lines[2]).unwrap_err().to_string();
        assert!(error.contains("none of 1 left out (pairs.jsonl:1: the sides share"), "{error}");
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
