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
    Ok(())
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
