//! Preference files in the forms other programs read.

use std::path::{Path, PathBuf};

use arete_records::rows::PreferenceRow;
use arete_records::{Message, atomic, parquet};
use serde_json::json;

use crate::{Error, hh};

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
pub fn export(form: Form, input: &Path, output: &Path) -> Result<usize, Error> {
    let mut text = String::new();
    let mut n_pairs = 0;
    for path in files(input)? {
        for row in parquet::read::<PreferenceRow>(&path)? {
            let line = match form {
                Form::Hh => hh_line(&row),
            };
            text.push_str(&line);
            text.push('\n');
            n_pairs += 1;
        }
    }
    atomic::write(output, text.as_bytes())?;
    Ok(n_pairs)
}

fn hh_line(row: &PreferenceRow) -> String {
    let whole = |side: &[Message]| {
        let messages: Vec<Message> = row.prompt.iter().chain(side).cloned().collect();
        hh::format(&messages)
    };
    json!({"chosen": whole(&row.chosen), "rejected": whole(&row.rejected)}).to_string()
}

fn files(input: &Path) -> Result<Vec<PathBuf>, Error> {
    if !input.is_dir() {
        return Ok(vec![input.to_owned()]);
    }
    let names = ["train", "validation", "test"].map(|split| input.join(format!("{split}.parquet")));
    let found: Vec<PathBuf> = names.into_iter().filter(|path| path.exists()).collect();
    if found.is_empty() {
        return Err(Error::File {
            path: input.to_owned(),
            field: "directory".to_owned(),
            expected: "train.parquet, validation.parquet or test.parquet".to_owned(),
            found: "none (name the directory of one aspect)".to_owned(),
        });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

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
