//! Checks on `tokenizer.json` before and after the `tokenizers` crate reads it.
//!
//! Before: what makes that crate panic, or break its own rules, on a crafted file (merges longer
//! than any token, a prefix cut inside a character, chunks of length zero). After: what it accepts
//! with a warning and then gets wrong (an added token under another id than the file says).

use std::collections::HashSet;
use std::path::Path;

use serde_json::Value;

use crate::Error;

/// Ids above this are no honest vocabulary's; they would only make tables large.
const MAX_VOCABULARY: u64 = 1 << 22;

pub(super) fn check(path: &Path, json: &Value) -> Result<(), Error> {
    if !json.is_object() {
        return Err(Error::field(path, "JSON", "an object", kind(json)));
    }
    let model = &json["model"];
    if !model.is_object() {
        return Err(Error::field(path, "model", "an object", kind(model)));
    }
    match model["vocab"] {
        Value::Object(_) => check_vocabulary(path, model)?,
        Value::Array(_) => {} // Unigram: checked by its own reader
        ref other => return Err(Error::field(path, "model.vocab", "an object", kind(other))),
    }
    if !model["merges"].is_null() {
        check_merges(path, model)?;
    }
    for part in ["normalizer", "pre_tokenizer", "post_processor", "decoder"] {
        check_lengths(path, part, &json[part])?;
    }
    for part in ["normalizer", "decoder"] {
        check_growth(path, part, &json[part])?;
    }
    check_pieces(path, &json["post_processor"])
}

/// How many times as long a text may become. Honest normalizers write three bytes for one (`▁` for a space).
const MAX_GROWTH: usize = 64;
/// The longest text that is put before every text or piece of it.
const MAX_PREPENDED_BYTES: usize = 1024;
/// Pieces that a post-processor may put a sequence together of; honest ones have three.
const MAX_PIECES: usize = 64;

/// Refuses a normalizer or decoder that makes gigabytes of a few words.
fn check_growth(path: &Path, part: &str, step: &Value) -> Result<(), Error> {
    let growth = growth(step);
    if growth <= MAX_GROWTH {
        return Ok(());
    }
    let expected = format!("texts at most {MAX_GROWTH} times as long");
    Err(Error::field(path, part, expected, format!("{growth} times, or more")))
}

/// At most so many times as long a text becomes by a step; a constant part that is too long counts as endless growth.
fn growth(step: &Value) -> usize {
    let text_bytes = |key: &str| step[key].as_str().map_or(0, str::len);
    match step["type"].as_str() {
        Some("Replace") => {
            let pattern = &step["pattern"];
            // An empty text stands before every character and at the end.
            let (found, more) = match (pattern["String"].as_str(), pattern["Regex"].as_str()) {
                (Some(""), _) => (1, 1),
                (Some(text), _) => (text.len(), 0),
                _ => (1, 1),
            };
            more + text_bytes("content").div_ceil(found).max(1)
        }
        Some("Prepend") if text_bytes("prepend") > MAX_PREPENDED_BYTES => usize::MAX,
        Some("Precompiled") => step["precompiled_charsmap"].as_str().map_or(1, longest_replacement),
        _ => ["normalizers", "decoders"]
            .iter()
            .filter_map(|key| step[*key].as_array())
            .flatten()
            .map(growth)
            .fold(1, usize::saturating_mul),
    }
}

/// The longest text that SentencePiece's table of characters has for one; a table that says it is longer than it is counts as
/// endless growth, since its reader takes the room before it looks.
///
/// # Source
///
/// `spm_precompiled` 0.1.4, `parse`: the length of a trie in bytes, the trie, texts that each end with a zero byte.
fn longest_replacement(table: &str) -> usize {
    let Some(bytes) = bytes_of_base64(table) else { return 1 }; // its reader refuses it
    let Some((length, rest)) = bytes.split_first_chunk() else { return 1 };
    let texts = usize::try_from(u32::from_le_bytes(*length)).ok().and_then(|n| rest.get(n..));
    let longest = |texts: &[u8]| texts.split(|byte| *byte == 0).map(<[u8]>::len).max();
    texts.and_then(longest).map_or(usize::MAX, |n_bytes| n_bytes.max(1))
}

/// The bytes that a text in base64 stands for (RFC 4648, with padding).
fn bytes_of_base64(text: &str) -> Option<Vec<u8>> {
    let (mut bits, mut n_bits, mut bytes) = (0_u32, 0, Vec::with_capacity(text.len() / 4 * 3));
    for letter in text.trim_end_matches('=').bytes() {
        let value = match letter {
            b'A'..=b'Z' => letter - b'A',
            b'a'..=b'z' => letter - b'a' + 26,
            b'0'..=b'9' => letter - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6 | u32::from(value)) & 0xFFF_FFFF;
        n_bits += 6;
        if n_bits >= 8 {
            n_bits -= 8;
            bytes.push((bits >> n_bits) as u8);
        }
    }
    Some(bytes)
}

/// Refuses a post-processor that repeats a text over and over.
fn check_pieces(path: &Path, processor: &Value) -> Result<(), Error> {
    for key in ["single", "pair"] {
        let n = processor[key].as_array().map_or(0, Vec::len);
        if n > MAX_PIECES {
            let expected = format!("at most {MAX_PIECES} pieces");
            return Err(Error::field(
                path,
                format!("post_processor.{key}"),
                expected,
                n.to_string(),
            ));
        }
    }
    let inner = processor["processors"].as_array();
    inner.into_iter().flatten().try_for_each(|inner| check_pieces(path, inner))
}

fn check_vocabulary(path: &Path, model: &Value) -> Result<(), Error> {
    let Value::Object(vocab) = &model["vocab"] else { return Ok(()) };
    let mut seen = HashSet::with_capacity(vocab.len());
    for (token, id) in vocab {
        let field = || format!("model.vocab[{token:?}]");
        match id.as_u64() {
            Some(id) if id < MAX_VOCABULARY => {
                if !seen.insert(id) {
                    let found = format!("{id}, which is taken");
                    return Err(Error::field(path, field(), "an id of its own", found));
                }
            }
            _ => {
                let expected = format!("an id below {MAX_VOCABULARY}");
                return Err(Error::field(path, field(), expected, id.to_string()));
            }
        }
    }
    Ok(())
}

fn check_merges(path: &Path, model: &Value) -> Result<(), Error> {
    let Value::Array(merges) = &model["merges"] else {
        return Err(Error::field(path, "model.merges", "an array", kind(&model["merges"])));
    };
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or_default();
    let vocab = &model["vocab"];
    let mut joined = String::new();
    for (rank, merge) in merges.iter().enumerate() {
        let wrong = || {
            let field = format!("model.merges[{rank}]");
            let expected = "two tokens of the vocabulary that join to a third";
            Error::field(path, field, expected, merge.to_string())
        };
        let (left, right) = match merge {
            Value::String(pair) => pair.split_once(' ').ok_or_else(wrong)?,
            Value::Array(pair) => match pair.as_slice() {
                [Value::String(left), Value::String(right)] => (left.as_str(), right.as_str()),
                _ => return Err(wrong()),
            },
            _ => return Err(wrong()),
        };
        joined.clear();
        joined.push_str(left);
        joined.push_str(right.strip_prefix(prefix).ok_or_else(wrong)?);
        let known = |token: &str| vocab.get(token).is_some();
        if !(known(left) && known(right) && known(&joined)) {
            return Err(wrong());
        }
    }
    Ok(())
}

/// `FixedLength` with length 0 panics when it is used.
fn check_lengths(path: &Path, field: &str, part: &Value) -> Result<(), Error> {
    match part {
        Value::Object(fields) => {
            if fields.get("type").is_some_and(|name| name == "FixedLength")
                && fields.get("length").and_then(Value::as_u64) == Some(0)
            {
                return Err(Error::field(path, format!("{field}.length"), "at least 1", "0"));
            }
            fields
                .iter()
                .try_for_each(|(key, value)| check_lengths(path, &format!("{field}.{key}"), value))
        }
        Value::Array(items) => items.iter().enumerate().try_for_each(|(index, value)| {
            check_lengths(path, &format!("{field}[{index}]"), value)
        }),
        _ => Ok(()),
    }
}

/// Every added token has the id that the file gives it.
pub(super) fn check_added(
    path: &Path,
    json: &Value,
    tokenizer: &tokenizers::Tokenizer,
) -> Result<(), Error> {
    let Some(added) = json["added_tokens"].as_array() else { return Ok(()) };
    for (index, token) in added.iter().enumerate() {
        let content = token["content"].as_str().unwrap_or_default();
        let got = tokenizer.token_to_id(content).map(u64::from);
        if content.is_empty() || got != token["id"].as_u64() {
            let expected = match got {
                Some(id) => format!("{id}, the vocabulary's for {content:?}"),
                None => "a token".to_owned(),
            };
            let found = token["id"].to_string();
            return Err(Error::field(path, format!("added_tokens[{index}].id"), expected, found));
        }
    }
    Ok(())
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
