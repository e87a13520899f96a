//! The whole pairs of a file, and which of them are held out.

use std::collections::HashSet;
use std::path::Path;

use arete_records::left_out::LeftOut;
use arete_records::table::Column;
use arete_records::{Error, Role, Split, fill_splits, split_of};

use super::{LabelledPair, PairFile, of_row, read_file};

/// Reads labelled pairs as the hub has them ([`super`]). Repeated pairs are read once; pairs with a side that
/// does not end with a reply, and rows that are no pairs or prefer neither side, are left out and named.
///
/// # Errors
///
/// A file's failure if the file is unusable, or too many rows are no such pairs.
pub fn read_pairs(
    path: &Path,
    columns: &[Column],
) -> Result<(Vec<LabelledPair>, Vec<LeftOut>), Error> {
    let PairFile { mut pairs, mut left_out, .. } = read_file(path, columns)?;
    let mut seen = HashSet::new();
    pairs.retain(|pair| {
        let reason = if !pair.is_whole() {
            "a side does not end with a reply"
        } else if seen.insert((pair.chosen.clone(), pair.rejected.clone())) {
            return true;
        } else {
            "the same pair as a row before"
        };
        left_out.push(of_row(path, pair.row, reason));
        false
    });
    Ok((pairs, left_out))
}

/// The splits of pairs: that which a pair names. Those that name none have that of their opening question, and where none names
/// one, each split has one where there are enough ([`fill_splits`]).
pub fn splits_of_pairs(pairs: &[LabelledPair]) -> Vec<Split> {
    let keyed = |pair: &LabelledPair| {
        let messages = &pair.chosen.messages;
        let asked = messages.iter().find(|message| message.role == Role::User);
        let key = asked.map_or_else(String::new, |message| message.content.trim().to_owned());
        (key, pair.split.unwrap_or_else(|| split_of(messages)))
    };
    let mut items: Vec<(String, Split)> = pairs.iter().map(keyed).collect();
    if pairs.iter().all(|pair| pair.split.is_none()) {
        fill_splits(&mut items);
    }
    items.into_iter().map(|(_, split)| split).collect()
}

#[cfg(test)]
mod tests {
    use arete_records::Message;

    use super::*;

    #[test]
    fn pairs_are_read_once_and_unfinished_ones_counted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs.jsonl");
        let good = r#"{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}"#;
        let empty = r#"{"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: c"}"#;
        let lists = r#"{"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "x"}], "rejected": "y", "chosen_prob": 0.7}"#;
        fs_err::write(&path, format!("{good}\n{good}\n{empty}\n{lists}\n")).unwrap();
        let (pairs, left_out) = read_pairs(&path, &[]).unwrap();
        let items: Vec<&str> = left_out.iter().map(|left| &*left.item).collect();
        assert_eq!((pairs.len(), items), (2, vec!["pairs.jsonl:2", "pairs.jsonl:3"]));
        assert_eq!(pairs[0].chosen.messages, [Message::user("a"), Message::assistant("b")]);
        assert_eq!(pairs[1].rejected.messages, [Message::user("q"), Message::assistant("y")]);
        assert_eq!(pairs[1].chosen_prob, 0.7);
    }

    #[test]
    fn bad_rows_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs.jsonl");
        let read = |line: &str| {
            fs_err::write(&path, line).unwrap();
            let error = read_pairs(&path, &[]).unwrap_err().to_string();
            error.split_once("pairs.jsonl").unwrap().1.to_owned()
        };
        assert_eq!(
            read(r#"{"chosen": "x"}"#),
            ": row 1: rejected: expected columns `chosen` and `rejected`, got chosen"
        );
        let range = r#"{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c", "chosen_prob": 1.5}"#;
        assert!(read(range).contains("chosen_prob: expected a number within 0 to 1, got 1.5"));
        assert!(read("[1]").contains("expected an object"));
    }
}
