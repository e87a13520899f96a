//! Tables and labelled pairs in the layouts of public data sets, against what `datasets` and TRL read in them
//! (`scripts/goldens/layouts.py`).

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use arete_chain::pairs;
use arete_records::left_out::LeftOut;
use arete_records::{Message, table};
use serde_json::{Map, Value};

fn cases() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/cases/layouts")
}

fn expected<T: serde::de::DeserializeOwned>(name: &str) -> BTreeMap<String, T> {
    serde_json::from_slice(&fs_err::read(cases().join(name)).unwrap()).unwrap()
}

#[test]
fn every_format_of_table_is_read_as_datasets_reads_it() {
    let expected: BTreeMap<String, Vec<Map<String, Value>>> = expected("tables.json");
    assert_eq!(expected.len(), 12);
    for (name, rows) in expected {
        let found = table::read(cases().join(&name)).unwrap();
        let numbers: Vec<usize> = found.iter().map(|(number, _)| *number).collect();
        assert_eq!(numbers, (1..=rows.len()).collect::<Vec<_>>(), "{name}");
        let found: Vec<Map<String, Value>> = found.into_iter().map(|(_, row)| row).collect();
        assert_eq!(found, rows, "{name}");
    }
}

#[test]
fn every_layout_of_pairs_is_read_as_its_makers_mean_it() {
    let expected: BTreeMap<String, Vec<[Vec<Message>; 2]>> = expected("pairs.json");
    assert_eq!(expected.len(), 16);
    for (name, wanted) in expected {
        let file = pairs::read_file(&cases().join(&name), &[]).unwrap();
        let is_even = |left: &LeftOut| left.reason == "prefers neither side";
        assert!(file.left_out.iter().all(is_even), "{name}: {:?}", file.left_out);
        let found: Vec<[Vec<Message>; 2]> = (file.pairs.into_iter())
            .map(|pair| [pair.chosen.messages, pair.rejected.messages])
            .collect();
        assert_eq!(found, wanted, "{name}");
    }
}

/// A pair without its question is refused by name, and has it by a mapping.
#[test]
fn a_question_under_another_name_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("orca.jsonl");
    let line = r#"{"system": "Be brief.", "question": "Is it fair?", "chosen": "Ask.", "rejected": "Take it."}"#;
    fs_err::write(&path, line).unwrap();
    let error = pairs::read_file(&path, &[]).unwrap_err().to_string();
    assert!(error.contains("orca.jsonl: row 1: chosen"), "{error}");
    assert!(error.contains("system, question, chosen, rejected"), "{error}");
    // Nor is its better reply taken for a prompt.
    let record = serde_json::from_str(line).unwrap();
    let error = pairs::conversation_of(&record).unwrap_err();
    assert!(error.field == "chosen" && error.got.contains("question"), "{error:?}");
    let file = pairs::read_file(&path, &["prompt=question".parse().unwrap()]).unwrap();
    let question = [Message::system("Be brief."), Message::user("Is it fair?")];
    assert_eq!(file.pairs[0].chosen.messages[..2], question);
    assert_eq!(file.pairs[0].rejected.messages[2], Message::assistant("Take it."));
    let error = pairs::read_file(&path, &["prompt=query".parse().unwrap()]).unwrap_err();
    assert!(error.to_string().contains("a column `query`"), "{error}");
}

#[test]
fn one_bad_pair_of_a_thousand_is_left_out_and_many_end_the_reading() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pairs.jsonl");
    let write = |n_bad: usize| {
        let line = |row: usize| match row < n_bad {
            true => r#"{"prompt": "q", "chosen": 5, "rejected": "y"}"#.to_owned(),
            false => format!(r#"{{"prompt": "q {row}", "chosen": "x", "rejected": "y"}}"#),
        };
        let lines: Vec<String> = (0..1000).map(line).collect();
        fs_err::write(&path, lines.join("\n")).unwrap();
    };
    write(1);
    let file = pairs::read_file(&path, &[]).unwrap();
    assert_eq!((file.pairs.len(), file.n_records), (999, 1000));
    assert_eq!(file.left_out[0].item, "pairs.jsonl:1");
    assert!(file.left_out[0].reason.starts_with("chosen: expected a text or a list"));
    write(101);
    let error = pairs::read_file(&path, &[]).unwrap_err().to_string();
    assert!(error.contains("row 1: chosen") && error.contains("101 of 1000 records"), "{error}");
}
