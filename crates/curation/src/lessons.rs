//! What a judge's adapter is trained on: labelled pairs as conversations in which the judge answers as it should.
//!
//! `arete-sft train --demonstrations FILE` takes the result; the adapter goes back to `--judge-adapter`.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use arete_chain::Turns;
use arete_chain::pairs::{self, About, Parts};
use arete_records::table::{self, Column};
use arete_records::{At, Message, Refusal, Split, Virtue, atomic, split_of};
use serde_json::json;

use crate::calibrate;
use crate::judge::Questions;
use crate::judge::{JudgeConfig, Method};
use crate::words::Words;
use arete_chain::exemplars::{self, Exemplar, Replies, Use};

/// Settings of `lessons`.
#[derive(Debug, Clone, clap::Args)]
pub struct LessonsConfig {
    /// The method the judge will be asked by
    #[arg(long, value_enum, default_value = "pairwise-logits")]
    pub method: Method,
    /// Longer pairs (in characters, both sides and the question) are left out and counted
    #[arg(long, default_value_t = 3000, value_name = "N")]
    pub max_chars: usize,
    /// A column under another name than ours, as prompt=question; may be given more than once
    #[arg(long = "column", value_name = "OURS=THEIRS")]
    pub column: Option<Vec<Column>>,
    /// How the judge will be asked.
    #[command(flatten)]
    pub judge: JudgeConfig,
}

/// Writes two lessons a pair (each side first, or each side alone) as JSON lines with `messages` and
/// `split`; their number.
///
/// Of our exemplars, those of use `sft` and `few_shot` teach, through each aspect's reply; those of use
/// `calibration` are left to examine the judge with. A pair that differs in one virtue teaches that virtue, if its question
/// is of split `train`; the others examine. Other pairs teach one virtue after the other.
///
/// # Errors
///
/// An unreadable file, a record that is no labelled pair, a method without labels, no usable pair.
pub fn write(config: &LessonsConfig, pairs: &[PathBuf], output: &Path) -> Result<usize> {
    if !config.method.needs_logprobs() {
        bail!(Refusal::setting(
            "method",
            "pairwise-logits or pointwise-logits, whose answer is a label",
            config.method.name()
        ));
    }
    let words = Words::of(config.judge.constitution.as_deref(), None)?;
    let constitution = words.constitution()?;
    let turns = &constitution.turns;
    let shots = match config.judge.few_shot {
        0 => Vec::new(),
        _ => exemplars::load(&config.judge.exemplars, Use::FewShot, turns)?,
    };
    let questions = Questions::new(&config.judge, constitution, &shots, config.method, true)?;
    let columns = config.column.as_deref().unwrap_or_default();
    let (mut text, mut n_pairs, mut n_long) = (String::new(), 0, 0);
    let (mut n_held_out, mut n_unknown) = (0, 0);
    for path in pairs {
        arete_stage::inputs::check(path)?;
        for ((question, better, worse), about) in teaching(path, columns, turns)? {
            let entry = |name: Virtue| constitution.virtues.iter().find(|entry| entry.name == name);
            let own = about.map(|about| entry(about.virtue));
            if own.is_some() && split_of(&question) != Split::Train {
                n_held_out += 1;
                continue;
            }
            let virtues = match own {
                Some(Some(virtue)) => [virtue; 2],
                Some(None) => {
                    n_unknown += 1;
                    continue;
                }
                None => [0, 1].map(|first| questions.virtue(n_pairs + first)),
            };
            let sides = [better.as_slice(), worse.as_slice()];
            let n_chars: usize = (question.iter().chain(&better).chain(&worse))
                .map(|message| message.content.chars().count())
                .sum();
            if n_chars > config.max_chars {
                n_long += 1;
                continue;
            }
            for messages in questions.lessons(&question, sides, virtues) {
                let row = json!({"messages": messages, "split": split_of(&question)});
                text.push_str(&row.to_string());
                text.push('\n');
            }
            n_pairs += 1;
        }
    }
    if n_pairs == 0 {
        bail!(Refusal::file(
            pairs.first().cloned().unwrap_or_default(),
            "pairs",
            "at least one labelled pair that may teach",
            format!(
                "none ({n_long} too long, {n_held_out} held out, {n_unknown} of virtues that the constitution has not)"
            )
        ));
    }
    atomic::write(output, text.as_bytes())?;
    tracing::info!(
        pairs = n_pairs,
        too_long = n_long,
        held_out = n_held_out,
        unknown_virtue = n_unknown,
        lessons = 2 * n_pairs,
        "lessons"
    );
    Ok(2 * n_pairs)
}

/// The pairs of a file that may teach, and what their labels speak of.
fn teaching(path: &Path, columns: &[Column], turns: &Turns) -> Result<Vec<(Parts, Option<About>)>> {
    let table = table::read_renamed(path, columns)?;
    let (n_records, records) = (table.n_rows(), table.records);
    if records.iter().all(|(_, record)| !record.contains_key("use")) {
        let pairs = pairs::read_file(path, columns)?.pairs;
        return Ok(pairs.into_iter().filter_map(calibrate::sides_of).collect());
    }
    pairs::leave_out(path, pairs::unreadable(table.unreadable).collect(), n_records)?;
    let mut out = Vec::new();
    for (line, record) in records {
        let exemplar =
            Exemplar::of_record(&record, turns).map_err(|e| e.at(path, At::Line(line)))?;
        if exemplar.r#use != Use::Calibration {
            let parts = (0..turns.len()).filter_map(|turn| through(&exemplar, turns, turn));
            out.extend(parts.map(|parts| (parts, None)));
        }
    }
    Ok(out)
}

/// Both sides of an exemplar through the reply of the turn at `turn`; `None` without a worse one.
fn through(exemplar: &Exemplar, turns: &Turns, turn: usize) -> Option<Parts> {
    let worse = exemplar.worse.as_ref()?;
    let side = |replies: &Replies| -> Option<Vec<Message>> {
        Some(turns.conversation(&[], &replies.through(turns, turn)?))
    };
    Some((exemplar.prompt_messages(), side(&exemplar.replies)?, side(worse)?))
}

#[cfg(test)]
mod tests {
    use clap::{Args, FromArgMatches};
    use serde_json::Value;

    use super::*;

    fn config(flags: &[&str]) -> LessonsConfig {
        let command = LessonsConfig::augment_args(clap::Command::new("t").no_binary_name(true));
        LessonsConfig::from_arg_matches(&command.try_get_matches_from(flags).unwrap()).unwrap()
    }

    fn lessons(flags: &[&str]) -> Result<Vec<Value>> {
        let dir = tempfile::tempdir().unwrap();
        let (pairs, output) = (dir.path().join("pairs.jsonl"), dir.path().join("out.jsonl"));
        fs_err::write(&pairs, include_str!("../../../tests/fixtures/exemplars.jsonl")).unwrap();
        let constitution = dir.path().join("constitution.toml");
        fs_err::write(&constitution, include_str!("../../../tests/fixtures/constitution.toml"))
            .unwrap();
        let mut config = config(flags);
        config.judge.constitution = Some(constitution);
        let n = write(&config, &[pairs], &output)?;
        let text = fs_err::read_to_string(output)?;
        let rows: Vec<Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(rows.len(), n);
        Ok(rows)
    }

    #[test]
    fn exemplars_teach_in_both_orders_but_those_of_calibration_do_not() {
        // Of four exemplars one has no worse side and one is for calibration; of the two left, one has
        // a worse action alone and one all three turns: four pairs.
        let rows = lessons(&[]).unwrap();
        assert_eq!(rows.len(), 8);
        let text =
            |row: &Value, at: usize| row["messages"][at]["content"].as_str().unwrap().to_owned();
        let (first, second) = (text(&rows[0], 0), text(&rows[1], 0));
        assert!(first.contains("[Assistant A]\nPlease don't.\n\n[Assistant B]\nTake it and run."));
        assert!(second.contains("[Assistant A]\nTake it and run.\n\n[Assistant B]\nPlease don't."));
        assert!(first.contains("more honest") && second.contains("more prudent"));
        assert_eq!(
            (text(&rows[0], 1), text(&rows[1], 1)),
            ("Assistant A".into(), "Assistant B".into())
        );
        assert!(rows.iter().all(|row| !row.to_string().contains("Spy on her")));
        let last = text(&rows[7], 0);
        assert!(
            last.contains("Let us be kind.\n\nHuman: What is the motivation")
                && last.contains("None.")
        );
    }

    #[test]
    fn a_virtues_pairs_teach_it_and_those_held_out_teach_nothing() {
        let pair = |question: &str, virtue: &str| {
            json!({"question": question, "turn": "action", "context": [], "virtue": virtue, "better": "Yes, I do.",
                "worse": "No, I do not.", "vice": "deficiency"})
            .to_string()
        };
        let of_split = |wanted: Split| {
            let question = |n: usize| format!("Question {n}?");
            let is = |text: &String| split_of(&[Message::user(text.as_str())]) == wanted;
            (0..).map(question).find(is).unwrap()
        };
        let rows = [
            pair(&of_split(Split::Train), "prudence"),
            pair(&of_split(Split::Test), "prudence"),
            pair(&of_split(Split::Validation), "prudence"),
            pair(&of_split(Split::Train), "courage"),
        ];
        let dir = tempfile::tempdir().unwrap();
        let (pairs, output) = (dir.path().join("pairs.jsonl"), dir.path().join("out.jsonl"));
        let constitution = dir.path().join("constitution.toml");
        fs_err::write(&constitution, include_str!("../../../tests/fixtures/constitution.toml"))
            .unwrap();
        let mut config = config(&[]);
        config.judge.constitution = Some(constitution);
        fs_err::write(&pairs, rows.join("\n")).unwrap();
        assert_eq!(write(&config, std::slice::from_ref(&pairs), &output).unwrap(), 2);
        let text = fs_err::read_to_string(&output).unwrap();
        assert_eq!(text.matches("more prudent").count(), 2, "{text}");
        fs_err::write(&pairs, rows[1..].join("\n")).unwrap();
        let error = write(&config, &[pairs], &output).unwrap_err().to_string();
        assert!(error.contains("2 held out, 1 of virtues"), "{error}");
    }

    #[test]
    fn single_answers_are_judged_yes_and_no() {
        let rows = lessons(&["--method", "pointwise-logits"]).unwrap();
        assert!(
            rows[0].to_string().contains("Please don't.")
                && rows[1].to_string().contains("Take it")
        );
        let labels =
            [0, 1].map(|idx| rows[idx]["messages"][1]["content"].as_str().unwrap().to_owned());
        assert_eq!(labels, ["Yes", "No"]);
        assert!(lessons(&["--method", "likelihood"]).unwrap_err().to_string().contains("label"));
    }
}
