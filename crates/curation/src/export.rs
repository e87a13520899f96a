//! Preference files in the forms other programs read.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use arete_chain::dialogue;
use arete_records::rows::PreferenceRow;
use arete_records::{Message, Refusal, atomic, parquet};
use serde_json::json;

/// The forms that can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Form {
    /// hh-rlhf's JSON lines: `chosen` and `rejected` as `"\n\nHuman: …\n\nAssistant: …"`.
    Hh,
}

/// Writes the preferences of a file (or of every split in a directory) as JSON lines; the number of
/// pairs.
///
/// # Errors
///
/// An unreadable input, a directory without preference files, a full disk.
pub fn export(form: Form, input: &Path, output: &Path) -> Result<usize> {
    let mut text = String::new();
    let (mut n_pairs, mut n_changed) = (0, 0);
    for path in files(input)? {
        arete_stage::inputs::check(&path)?;
        for row in parquet::read::<PreferenceRow>(&path)? {
            let (line, changed) = match form {
                Form::Hh => hh_line(&row),
            };
            n_changed += usize::from(changed);
            text.push_str(&line);
            text.push('\n');
            n_pairs += 1;
        }
    }
    atomic::write(output, text.as_bytes())?;
    if n_changed > 0 {
        tracing::warn!(
            pairs = n_changed,
            "a blank line before `Human:` or `Assistant:` inside a turn became a line break: in this \
             form it would begin another turn"
        );
    }
    Ok(n_pairs)
}

/// A pair's line, and whether a turn had to be changed to stay one turn.
fn hh_line(row: &PreferenceRow) -> (String, bool) {
    let mut changed = false;
    let mut whole = |side: &[Message]| {
        let mut messages: Vec<Message> = row.prompt.iter().chain(side).cloned().collect();
        for message in &mut messages {
            let one = dialogue::as_one_turn(&message.content);
            changed |= one != message.content;
            message.content = one;
        }
        dialogue::format(&messages)
    };
    let line = json!({"chosen": whole(&row.chosen), "rejected": whole(&row.rejected)}).to_string();
    (line, changed)
}

fn files(input: &Path) -> Result<Vec<PathBuf>> {
    if !input.is_dir() {
        return Ok(vec![input.to_owned()]);
    }
    let names = ["train", "validation", "test"].map(|split| input.join(format!("{split}.parquet")));
    let found: Vec<PathBuf> = names.into_iter().filter(|path| path.exists()).collect();
    if found.is_empty() {
        bail!(Refusal::file(
            input,
            "directory",
            "train.parquet, validation.parquet or test.parquet",
            "none (name the directory of one aspect)"
        ));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_that_plays_both_speakers_stays_one_turn() {
        let row = PreferenceRow {
            prompt: vec![Message::user("q")],
            chosen: vec![Message::assistant("a\n\n\nHuman: more?\n\nAssistant: b")],
            rejected: vec![Message::assistant("c")],
            score_chosen: 5,
            score_rejected: 0,
            chosen_prob: 1.0,
            prompt_id: String::new(),
            truncated_chosen: false,
            truncated_rejected: false,
        };
        let (line, changed) = hh_line(&row);
        assert!(changed);
        let record: serde_json::Value = serde_json::from_str(&line).unwrap();
        let turns = dialogue::parse(record["chosen"].as_str().unwrap()).unwrap();
        let reply = "a\nHuman: more?\nAssistant: b";
        assert_eq!(turns, [Message::user("q"), Message::assistant(reply)]);
    }

    #[test]
    fn a_pair_becomes_two_strings_of_the_hub() {
        let dir = tempfile::tempdir().unwrap();
        let row = PreferenceRow {
            prompt: vec![Message::user("Hi: there")],
            chosen: vec![Message::assistant("Hello.")],
            rejected: vec![
                Message::assistant("Go away."),
                Message::user("?"),
                Message::assistant("No."),
            ],
            score_chosen: 4,
            score_rejected: 1,
            chosen_prob: 0.75,
            prompt_id: "00".to_owned(),
            truncated_chosen: false,
            truncated_rejected: false,
        };
        parquet::write(dir.path().join("train.parquet"), &[row]).unwrap();
        let output = dir.path().join("hh.jsonl");
        assert_eq!(export(Form::Hh, dir.path(), &output).unwrap(), 1);
        assert_eq!(
            fs_err::read_to_string(output).unwrap(),
            "{\"chosen\":\"\\n\\nHuman: Hi: there\\n\\nAssistant: Hello.\",\
             \"rejected\":\"\\n\\nHuman: Hi: there\\n\\nAssistant: Go away.\\n\\nHuman: ?\\n\\nAssistant: No.\"}\n"
        );
    }
}
