//! What `tokenizer_config.json` and `special_tokens_map.json` say beside `tokenizer.json`: special tokens, tokens that only they
//! name, and the space before a text.
//!
//! # Source
//!
//! transformers 5.24, `PreTrainedTokenizerBase._from_pretrained` and `TokenizersBackend`.

use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::AddedToken;

use super::{CONFIG_FILE, SpecialIds, guarded};
use crate::Error;

/// Tokens of `tokenizer_config.json` by their ids.
const DECODER: &str = "added_tokens_decoder";

/// The two files.
pub(super) struct Declared<'a> {
    /// `tokenizer.json`, for messages.
    pub(super) path: &'a Path,
    pub(super) config: &'a Map<String, Value>,
    pub(super) map: &'a Map<String, Value>,
}

impl Declared<'_> {
    /// Adds the tokens that only these files name, makes the declared ones special, and returns their ids.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if a token cannot have the id that is given for it.
    pub(super) fn apply(&self, tokenizer: &mut tokenizers::Tokenizer) -> Result<SpecialIds, Error> {
        self.add_listed(tokenizer)?;
        let mut id_of = |key: &str| -> Result<Option<i64>, Error> {
            let Some(token) = self.token(key) else { return Ok(None) };
            Ok(Some(self.make_special(tokenizer, key, token)?))
        };
        Ok(SpecialIds {
            bos: id_of("bos_token")?,
            eos: id_of("eos_token")?,
            unk: id_of("unk_token")?,
            pad: id_of("pad_token")?,
        })
    }

    /// The declared token of that name. `special_tokens_map.json` counts for files of older versions only, which list no tokens
    /// in `tokenizer_config.json`; there it comes first.
    fn token(&self, key: &str) -> Option<&str> {
        let own = text(self.config, key);
        if self.config.contains_key(DECODER) {
            return own;
        }
        let mapped = text(self.map, key);
        if let (Some(own), Some(mapped)) = (own, mapped)
            && own != mapped
        {
            let path = self.path.with_file_name(CONFIG_FILE);
            tracing::warn!(
                path = %path.display(),
                key,
                own,
                mapped,
                "special_tokens_map.json says another token, and is believed, as transformers does"
            );
        }
        mapped.or(own)
    }

    /// Adds the tokens of [`DECODER`], in the order of their ids.
    fn add_listed(&self, tokenizer: &mut tokenizers::Tokenizer) -> Result<(), Error> {
        let Some(listed) = self.config.get(DECODER).and_then(Value::as_object) else {
            return Ok(());
        };
        let mut listed: Vec<(u32, &Value)> =
            listed.iter().filter_map(|(id, token)| Some((id.parse().ok()?, token))).collect();
        listed.sort_by_key(|(id, _)| *id);
        for (id, entry) in listed {
            let Some(content) = entry["content"].as_str().filter(|text| !text.is_empty()) else {
                continue;
            };
            let flag = |key: &str| entry[key].as_bool().unwrap_or(false);
            let token = AddedToken::from(content, flag("special"))
                .single_word(flag("single_word"))
                .lstrip(flag("lstrip"))
                .rstrip(flag("rstrip"))
                .normalized(entry["normalized"].as_bool().unwrap_or(!flag("special")));
            add(self.path, tokenizer, token)?;
            let found = tokenizer.token_to_id(content);
            if found != Some(id) {
                let path = self.path.with_file_name(CONFIG_FILE);
                let found = found.map_or("none".to_owned(), |id| id.to_string());
                let expected = format!(
                    "{id} for {content:?} in {} too (save the tokenizer once with transformers: \
                     AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR))",
                    super::TOKENIZER_FILE
                );
                return Err(Error::field(&path, DECODER, expected, found));
            }
        }
        Ok(())
    }

    /// A declared token is special whatever `tokenizer.json` says of it, and is added if that lacks it.
    fn make_special(
        &self,
        tokenizer: &mut tokenizers::Tokenizer,
        key: &str,
        token: &str,
    ) -> Result<i64, Error> {
        let added = tokenizer.get_added_vocabulary().get_added_tokens_decoder();
        let known = added.values().find(|known| known.content == token).cloned();
        if known.as_ref().is_none_or(|known| !known.special) {
            if known.is_none() && tokenizer.token_to_id(token).is_none() {
                let path = self.path.display();
                tracing::warn!(%path, key, token, "not in tokenizer.json: added after its tokens, as transformers does");
            }
            let mut special =
                known.unwrap_or_else(|| AddedToken::from(token, true).normalized(false));
            special.special = true;
            add(self.path, tokenizer, special)?;
        }
        tokenizer.token_to_id(token).map(i64::from).ok_or_else(|| {
            let path = self.path.with_file_name(CONFIG_FILE);
            Error::field(&path, key, "a token", format!("{token:?}"))
        })
    }
}

fn add(path: &Path, tokenizer: &mut tokenizers::Tokenizer, token: AddedToken) -> Result<(), Error> {
    guarded(path, || tokenizer.add_tokens([token]).map(drop).map_err(|error| error.to_string()))
}

/// The text of a special token, given as a string or as an object with `content`.
fn text<'a>(config: &'a Map<String, Value>, key: &str) -> Option<&'a str> {
    let text = match config.get(key)? {
        Value::String(token) => Some(token.as_str()),
        Value::Object(fields) => fields.get("content")?.as_str(),
        _ => None,
    };
    text.filter(|text| !text.is_empty())
}

/// Obeys `add_prefix_space` where transformers does: in the classes of GPT-2 and of Llama. Elsewhere `tokenizer.json` decides.
pub(super) fn set_prefix_space(json: &mut Value, config: &Map<String, Value>) {
    let Some(add) = config.get("add_prefix_space").and_then(Value::as_bool) else { return };
    let class = config.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
    match class.trim_end_matches("Fast") {
        "GPT2Tokenizer" => each(&mut json["pre_tokenizer"], &mut |part| {
            if part["type"] == "ByteLevel" {
                part["add_prefix_space"] = add.into();
            }
        }),
        "LlamaTokenizer" | "CodeLlamaTokenizer" => {
            let mut set = |part: &mut Value| {
                let scheme = &part["prepend_scheme"];
                if part["type"] == "Metaspace" && (*scheme != "never") != add {
                    part["prepend_scheme"] = if add { "first" } else { "never" }.into();
                }
            };
            each(&mut json["pre_tokenizer"], &mut set);
            each(&mut json["decoder"], &mut set);
            if !add {
                without_prefix(json);
            }
        }
        _ => {}
    }
}

/// Older files of Llama prepend by a normaliser and strip by a decoder.
fn without_prefix(json: &mut Value) {
    each(&mut json["normalizer"], &mut |part| {
        if let Some(parts) = part.get_mut("normalizers").and_then(Value::as_array_mut) {
            parts.retain(|part| part["type"] != "Prepend");
        }
    });
    if json["normalizer"]["type"] == "Prepend" {
        json["normalizer"] = Value::Null;
    }
    each(&mut json["decoder"], &mut |part| {
        if let Some(parts) = part.get_mut("decoders").and_then(Value::as_array_mut) {
            parts.retain(|part| !(part["type"] == "Strip" && part["start"] == json!(1)));
        }
    });
}

/// Visits every object of a tree.
fn each(part: &mut Value, visit: &mut dyn FnMut(&mut Value)) {
    match part {
        Value::Object(_) => {
            visit(part);
            if let Value::Object(fields) = part {
                fields.values_mut().for_each(|inner| each(inner, visit));
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|inner| each(inner, visit)),
        _ => {}
    }
}
