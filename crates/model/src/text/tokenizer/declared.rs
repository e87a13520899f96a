//! What `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` say beside `tokenizer.json`: special tokens,
//! tokens that only they name, and the space before a text.
//!
//! # Source
//!
//! transformers 5.24, `PreTrainedTokenizerBase._from_pretrained` and `TokenizersBackend`.

use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::AddedToken;

use super::{ADDED_FILE, CONFIG_FILE, SPECIAL_FILE, SpecialIds, guarded};
use crate::Error;

/// Tokens of `tokenizer_config.json` by their ids.
const DECODER: &str = "added_tokens_decoder";
/// More special tokens: a list, or an object with a name for each.
const EXTRA: &str = "extra_special_tokens";
/// The list's name before transformers 5.
const ADDITIONAL: &str = "additional_special_tokens";
/// Special tokens that every tokenizer may have, in the order in which they are added.
const STANDARD: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The three files.
pub(super) struct Declared<'a> {
    /// `tokenizer.json`, for messages.
    pub(super) path: &'a Path,
    pub(super) config: &'a Map<String, Value>,
    pub(super) map: &'a Map<String, Value>,
    pub(super) added: &'a Map<String, Value>,
}

/// Special tokens beyond [`STANDARD`].
#[derive(Default)]
struct More<'a> {
    /// Those that templates know by a name.
    named: Vec<(&'a str, AddedToken)>,
    /// Those of [`EXTRA`], which `added_tokens.json` is read with.
    extra: Option<Vec<AddedToken>>,
    /// Those of [`ADDITIONAL`], where there is no [`EXTRA`].
    additional: Vec<AddedToken>,
}

impl Declared<'_> {
    /// Adds the tokens that only these files name, makes the declared ones special, and returns their ids; and the names and
    /// tokens that only templates know.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if a token cannot have the id that is given for it, or a list of tokens is none.
    pub(super) fn apply(
        &self,
        tokenizer: &mut tokenizers::Tokenizer,
    ) -> Result<(SpecialIds, Vec<(String, String)>), Error> {
        self.check_splitting()?;
        self.add_listed(tokenizer)?;
        let More { named: more, extra, additional } = self.more()?;
        let standard = STANDARD.into_iter().filter_map(|key| Some((key, self.token(key)?)));
        let standard: Vec<_> = standard.collect();
        let is_special = |text: &str| {
            let mut all = standard.iter().map(|(_, token)| token).chain(extra.iter().flatten());
            all.any(|token| token.content == text)
        };
        self.add_legacy(tokenizer, is_special)?;
        let (mut ids, mut named) = (SpecialIds::default(), Vec::new());
        for (key, token) in standard.into_iter().chain(more) {
            let text = token.content.clone();
            let id = self.make_special(tokenizer, key, token)?;
            match key {
                "bos_token" => ids.bos = Some(id),
                "eos_token" => ids.eos = Some(id),
                "unk_token" => ids.unk = Some(id),
                "pad_token" => ids.pad = Some(id),
                _ => named.push((key.to_owned(), text)),
            }
        }
        for token in extra.unwrap_or(additional) {
            // One that is there already stays as it is, special or not.
            if !is_added(tokenizer, &token.content) {
                self.make_special(tokenizer, EXTRA, token)?;
            }
        }
        Ok((ids, named))
    }

    /// The special tokens beyond the standard ones, from the keys and in the order of transformers.
    fn more(&self) -> Result<More<'_>, Error> {
        let mut more = More::default();
        let (config_path, map_path) =
            (self.path.with_file_name(CONFIG_FILE), self.path.with_file_name(SPECIAL_FILE));
        let is_legacy = !self.config.contains_key(DECODER);
        if is_legacy {
            more.named.extend(own_names(self.map));
        }
        more.named.extend(own_names(self.config));
        let (mut extra, mut additional) = (self.config.get(EXTRA), self.config.get(ADDITIONAL));
        if additional.is_some() && extra.is_none_or(is_nothing) {
            extra = additional.take();
        }
        if let Some(names) = extra.and_then(Value::as_object) {
            more.named.extend(by_name(&config_path, names)?);
            extra = None;
        }
        more.extra = extra.map(|list| tokens(&config_path, EXTRA, list)).transpose()?;
        if let Some(list) = additional {
            more.additional = tokens(&config_path, ADDITIONAL, list)?;
        }
        if !is_legacy {
            return Ok(more);
        }
        match self.map.get(EXTRA) {
            Some(Value::Object(names)) => more.named.extend(by_name(&map_path, names)?),
            Some(list) => {
                more.extra.get_or_insert_default().extend(tokens(&map_path, EXTRA, list)?);
            }
            None => {}
        }
        if let Some(list) = self.map.get(ADDITIONAL) {
            more.additional = tokens(&map_path, ADDITIONAL, list)?;
        }
        Ok(more)
    }

    /// Adds the tokens of `added_tokens.json` that `tokenizer.json` lacks, in the order of their ids.
    fn add_legacy(
        &self,
        tokenizer: &mut tokenizers::Tokenizer,
        is_special: impl Fn(&str) -> bool,
    ) -> Result<(), Error> {
        if self.config.contains_key(DECODER) {
            return Ok(());
        }
        let mut listed: Vec<(&str, Option<u64>)> =
            self.added.iter().map(|(token, id)| (token.as_str(), id.as_u64())).collect();
        listed.sort_by_key(|(_, id)| *id);
        for (text, id) in listed {
            if text.is_empty() || is_added(tokenizer, text) {
                continue;
            }
            let special = is_special(text);
            add(self.path, tokenizer, AddedToken::from(text, special).normalized(!special))?;
            let found = tokenizer.token_to_id(text);
            if found.map(u64::from) != id || id.is_none() {
                let path = self.path.with_file_name(ADDED_FILE);
                let number = |id: Option<u64>| id.map_or("none".to_owned(), |id| id.to_string());
                let expected = format!(
                    "{}, the id it has beside {}",
                    number(found.map(u64::from)),
                    super::TOKENIZER_FILE
                );
                return Err(Error::field(&path, format!("token {text:?}"), expected, number(id)));
            }
        }
        Ok(())
    }

    /// Refuses a tokenizer that spells special tokens out as other text: a template's would be none.
    fn check_splitting(&self) -> Result<(), Error> {
        let key = "split_special_tokens";
        match self.config.get(key) {
            None | Some(Value::Null | Value::Bool(false)) => Ok(()),
            Some(found) => {
                let path = self.path.with_file_name(CONFIG_FILE);
                let expected = "false (special tokens in a text are those tokens)";
                Err(Error::field(&path, key, expected, found.to_string()))
            }
        }
    }

    /// The declared token of that name. `special_tokens_map.json` counts for files of older versions only, which list no tokens
    /// in `tokenizer_config.json`; there it comes first.
    fn token(&self, key: &str) -> Option<AddedToken> {
        let own = self.config.get(key).and_then(token);
        if self.config.contains_key(DECODER) {
            return own;
        }
        let mapped = self.map.get(key).and_then(token);
        if let (Some(own), Some(mapped)) = (&own, &mapped)
            && own.content != mapped.content
        {
            let path = self.path.with_file_name(CONFIG_FILE);
            tracing::warn!(
                path = %path.display(),
                key,
                own = own.content,
                mapped = mapped.content,
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
        token: AddedToken,
    ) -> Result<i64, Error> {
        let text = token.content.clone();
        let added = tokenizer.get_added_vocabulary().get_added_tokens_decoder();
        let known = added.values().find(|known| known.content == text).cloned();
        if known.as_ref().is_none_or(|known| !known.special) {
            if known.is_none() && tokenizer.token_to_id(&text).is_none() {
                let path = self.path.display();
                tracing::warn!(%path, key, token = text, "not in tokenizer.json: added after its tokens, as transformers does");
            }
            add(self.path, tokenizer, AddedToken { special: true, ..known.unwrap_or(token) })?;
        }
        tokenizer.token_to_id(&text).map(i64::from).ok_or_else(|| {
            let path = self.path.with_file_name(CONFIG_FILE);
            Error::field(&path, key, "a token", format!("{text:?}"))
        })
    }
}

fn add(path: &Path, tokenizer: &mut tokenizers::Tokenizer, token: AddedToken) -> Result<(), Error> {
    guarded(path, || tokenizer.add_tokens([token]).map(drop).map_err(|error| error.to_string()))
}

/// Whether a text is an added token.
fn is_added(tokenizer: &tokenizers::Tokenizer, text: &str) -> bool {
    let added = tokenizer.get_added_vocabulary().get_added_tokens_decoder();
    added.values().any(|known| known.content == text)
}

/// A special token, given as a string or as an object with `content`.
fn token(value: &Value) -> Option<AddedToken> {
    let content = value.as_str().or_else(|| value.get("content")?.as_str());
    let content = content.filter(|text| !text.is_empty())?;
    let flag = |key: &str| value.get(key).and_then(Value::as_bool).unwrap_or(false);
    let token = AddedToken::from(content, true).normalized(flag("normalized"));
    Some(token.single_word(flag("single_word")).lstrip(flag("lstrip")).rstrip(flag("rstrip")))
}

/// Tokens under names of the model's own: `image_token` and the like.
fn own_names(map: &Map<String, Value>) -> impl Iterator<Item = (&str, AddedToken)> {
    map.iter()
        .filter(|(key, _)| key.ends_with("_token") && !STANDARD.contains(&key.as_str()))
        .filter_map(|(key, value)| Some((key.as_str(), token(value)?)))
}

/// Tokens in an object, by their names.
fn by_name<'a>(
    path: &Path,
    names: &'a Map<String, Value>,
) -> Result<Vec<(&'a str, AddedToken)>, Error> {
    let one = |(name, value): (&'a String, &Value)| {
        let token = token(value).ok_or_else(|| not_a_token(path, EXTRA, value))?;
        Ok((name.as_str(), token))
    };
    names.iter().map(one).collect()
}

/// The tokens of a list.
fn tokens(path: &Path, key: &str, list: &Value) -> Result<Vec<AddedToken>, Error> {
    match list {
        Value::Null => Ok(Vec::new()),
        Value::Array(list) => list
            .iter()
            .map(|value| token(value).ok_or_else(|| not_a_token(path, key, value)))
            .collect(),
        other => Err(not_a_token(path, key, other)),
    }
}

fn not_a_token(path: &Path, key: &str, found: &Value) -> Error {
    let found: String = found.to_string().chars().take(80).collect();
    Error::field(path, key, "a list of tokens, or an object of tokens by their names", found)
}

/// What Python takes for false.
fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
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
