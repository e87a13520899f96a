//! Text to token ids and back: a guarded wrapper over the `tokenizers` crate, with loaders for
//! `tokenizer.json` directories and for the vocabularies that GGUF files carry.
//!
//! A tokenizer file is someone else's input to a parser that panics on some of them, so files are
//! checked before they are handed over, and every call into the parser is caught.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arete_records::atomic;
use arete_records::files::read_capped;
use serde_json::{Map, Value};
use tokenizers::pre_tokenizers::split::SplitPattern;
use tokenizers::{
    NormalizedString, Normalizer as _, OffsetReferential, OffsetType, PreTokenizedString,
    PreTokenizer as _, PreTokenizerWrapper,
};

use crate::Error;
use crate::json::{is_word, read_object};
use crate::text::template::ChatTemplate;

mod declared;
#[cfg(feature = "gguf")]
mod gguf;
mod spelling;
mod validate;

use self::declared::Declared;
#[cfg(feature = "gguf")]
pub use self::gguf::GgufVocabulary;

/// A `tokenizer.json` larger than this is refused; the largest published ones have 33 MB.
pub(crate) const MAX_TOKENIZER_BYTES: u64 = 64 << 20;
/// `tokenizer_config.json` and `special_tokens_map.json`; honest ones stay below 1 MB.
const MAX_CONFIG_BYTES: u64 = 16 << 20;
/// The longest text encoded in one piece: as much as a chat template may write.
const MAX_TEXT_BYTES: usize = 4 << 20;
/// A word of a regex-splitting tokenizer longer than this is looked at for a regex that gave up.
const LONG_WORD_BYTES: usize = 4096;

const TOKENIZER_FILE: &str = "tokenizer.json";
const CONFIG_FILE: &str = "tokenizer_config.json";
const SPECIAL_FILE: &str = "special_tokens_map.json";
const TEMPLATE_FILE: &str = "chat_template.jinja";

/// A model's tokenizer and what belongs to it: special tokens and chat template source.
///
/// Cloning is cheap: clones share one vocabulary.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    tokenizer: tokenizers::Tokenizer,
    /// The file it came from, for messages.
    path: PathBuf,
    /// `tokenizer.json` as it was read, written back unchanged by `save`; none if built from GGUF.
    json: Option<Vec<u8>>,
    /// `tokenizer_config.json`.
    config: Map<String, Value>,
    special: SpecialIds,
    template: Option<String>,
    /// Text is cut into words by a regular expression before merging.
    splits_by_regex: bool,
    /// Tokens are spelled in GPT-2's byte alphabet.
    byte_level: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct SpecialIds {
    bos: Option<i64>,
    eos: Option<i64>,
    unk: Option<i64>,
    pad: Option<i64>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("path", &self.0.path)
            .field("vocab_size", &self.vocab_size())
            .field("special", &self.0.special)
            .finish_non_exhaustive()
    }
}

/// Token ids with the bytes of the text each of them stands for.
pub(crate) struct Encoded {
    pub(crate) ids: Vec<i64>,
    /// Per token: start and end byte in the text.
    pub(crate) spans: Vec<(usize, usize)>,
}

impl Tokenizer {
    /// Loads `tokenizer.json` and, where present, `tokenizer_config.json`,
    /// `special_tokens_map.json` and `chat_template.jinja` (which wins over an inline template).
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if `tokenizer.json` cannot be read, [`Error::Field`] and [`Error::Tokenizer`]
    /// if a file is damaged, hostile or inconsistent.
    pub fn from_directory(directory: &Path) -> Result<Self, Error> {
        let path = directory.join(TOKENIZER_FILE);
        if !path.exists() && directory.join("tokenizer.model").exists() {
            return Err(Error::field(
                directory,
                TOKENIZER_FILE,
                "a tokenizer.json",
                "only a SentencePiece tokenizer.model; convert it with \
                 `AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)` of transformers",
            ));
        }
        let bytes = read_capped(&path, MAX_TOKENIZER_BYTES)?;
        let config = read_optional(&directory.join(CONFIG_FILE))?.unwrap_or_default();
        let special_map = read_optional(&directory.join(SPECIAL_FILE))?.unwrap_or_default();
        let sidecar = directory.join(TEMPLATE_FILE);
        let template = if sidecar.exists() {
            let bytes = read_capped(&sidecar, crate::text::template::MAX_SOURCE_BYTES)?;
            Some(String::from_utf8(bytes).map_err(|error| {
                Error::field(&sidecar, "text", "UTF-8", error.utf8_error().to_string())
            })?)
        } else {
            inline_template(&directory.join(CONFIG_FILE), &config)?
        };
        Self::from_parts(path, bytes, config, &special_map, template)
    }

    /// Builds a tokenizer from a GGUF file's `tokenizer.ggml.*` entries; `path` is for messages.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if the vocabulary is of an unsupported kind or contradicts itself.
    #[cfg(feature = "gguf")]
    pub fn from_gguf(path: &Path, vocabulary: GgufVocabulary) -> Result<Self, Error> {
        gguf::build(path, vocabulary)
    }

    fn from_parts(
        path: PathBuf,
        bytes: Vec<u8>,
        config: Map<String, Value>,
        special_map: &Map<String, Value>,
        template: Option<String>,
    ) -> Result<Self, Error> {
        let mut json: Value = serde_json::from_slice(&bytes)
            .map_err(|error| Error::field(&path, "JSON", "a JSON object", error.to_string()))?;
        validate::check(&path, &json)?;
        keep_whole_offsets(&mut json["post_processor"]);
        declared::set_prefix_space(&mut json, &config);
        let mut tokenizer = guarded(&path, || {
            <tokenizers::Tokenizer as serde::Deserialize>::deserialize(&json)
                .map_err(|error| error.to_string())
        })?;
        drop_cutting(&path, &mut tokenizer)?;
        validate::check_added(&path, &json, &tokenizer)?;
        let special =
            Declared { path: &path, config: &config, map: special_map }.apply(&mut tokenizer)?;
        Ok(Self::assemble(tokenizer, path, Some(bytes), config, special, template))
    }

    fn assemble(
        tokenizer: tokenizers::Tokenizer,
        path: PathBuf,
        json: Option<Vec<u8>>,
        config: Map<String, Value>,
        special: SpecialIds,
        template: Option<String>,
    ) -> Self {
        let (splits_by_regex, byte_level) = match tokenizer.get_pre_tokenizer() {
            Some(pre_tokenizer) => (splits_by_regex(pre_tokenizer), is_byte_level(pre_tokenizer)),
            None => (false, false),
        };
        Self(Arc::new(Inner {
            tokenizer,
            path,
            json,
            config,
            special,
            template,
            splits_by_regex,
            byte_level,
        }))
    }

    /// The ids of `text`; special tokens spelled out in it become those tokens. With
    /// `add_special`, what the tokenizer puts around a sequence is added (a leading BOS, as a rule):
    /// texts rendered by a chat template already contain it.
    ///
    /// # Errors
    ///
    /// [`Error::TextTooLong`] above 4 MiB; [`Error::Tokenizer`] if the tokenizer fails.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<i64>, Error> {
        Ok(self.encode_with_spans(text, add_special)?.ids)
    }

    pub(crate) fn encode_with_spans(
        &self,
        text: &str,
        add_special: bool,
    ) -> Result<Encoded, Error> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(Error::TextTooLong { bytes: text.len(), limit: MAX_TEXT_BYTES });
        }
        let encoding = guarded(&self.0.path, || {
            self.0.tokenizer.encode(text, add_special).map_err(|error| error.to_string())
        })?;
        if self.0.splits_by_regex {
            self.check_words(text, &encoding)?;
        }
        Ok(Encoded {
            ids: encoding.get_ids().iter().map(|&id| i64::from(id)).collect(),
            spans: encoding.get_offsets().to_vec(),
        })
    }

    /// Refuses an encoding whose word-splitting regex gave up half way.
    ///
    /// On a backtrack or stack limit the regex engine just ends, and all that follows comes out as
    /// one word with other ids than any other implementation gives. Such a word is long and has
    /// text after white space; but there are patterns that do not cut at white space at all, so a
    /// piece of it is split once more: a piece that is short enough is split in earnest.
    fn check_words(&self, text: &str, encoding: &tokenizers::Encoding) -> Result<(), Error> {
        let mut word = (None, 0, 0); // id, start and end byte
        let words = encoding.get_word_ids().iter().zip(encoding.get_offsets());
        for (&id, &(start, end)) in words.chain(std::iter::once((&None, &(0, 0)))) {
            if id.is_some() && id == word.0 {
                word.2 = end;
                continue;
            }
            if word.2 - word.1 > LONG_WORD_BYTES
                && self.is_split_in_pieces(&text[word.1..word.2])?
            {
                return Err(Error::Tokenizer {
                    path: self.0.path.clone(),
                    reason: format!(
                        "the regular expression that splits words gave up at byte {} of the text \
                         (too long a run of the same kind of character)",
                        word.1
                    ),
                });
            }
            word = (id, start, end.max(start));
        }
        Ok(())
    }

    /// Whether what came out as one word is several where only the surroundings of a white space are looked at.
    fn is_split_in_pieces(&self, word: &str) -> Result<bool, Error> {
        let Some(piece) = around_space(word) else { return Ok(false) };
        let Some(pre_tokenizer) = self.0.tokenizer.get_pre_tokenizer() else { return Ok(false) };
        let pieces = guarded(&self.0.path, || {
            let mut piece = NormalizedString::from(piece);
            if let Some(normalizer) = self.0.tokenizer.get_normalizer() {
                normalizer.normalize(&mut piece).map_err(|error| error.to_string())?;
            }
            let mut pieces = PreTokenizedString::from(piece);
            pre_tokenizer.pre_tokenize(&mut pieces).map_err(|error| error.to_string())?;
            Ok(pieces.get_splits(OffsetReferential::Original, OffsetType::Byte).len())
        })?;
        Ok(pieces > 1)
    }

    /// The text of `ids`, without special tokens. Ids outside the vocabulary stand for no text.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] if the decoder named by the tokenizer's file fails.
    pub fn decode(&self, ids: &[i64]) -> Result<String, Error> {
        self.decode_with(ids, true)
    }

    /// The text of `ids`, special tokens spelled out.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] if the decoder named by the tokenizer's file fails.
    pub fn decode_with_special(&self, ids: &[i64]) -> Result<String, Error> {
        self.decode_with(ids, false)
    }

    fn decode_with(&self, ids: &[i64], skip_special: bool) -> Result<String, Error> {
        let ids: Vec<u32> = ids.iter().filter_map(|&id| u32::try_from(id).ok()).collect();
        guarded(&self.0.path, || {
            self.0.tokenizer.decode(&ids, skip_special).map_err(|error| error.to_string())
        })
    }

    /// Decodes a completion token by token, for showing it while it is sampled.
    #[must_use]
    pub fn stream(&self) -> TextStream<'_> {
        TextStream { tokenizer: self, ids: Vec::new(), start: 0, shown: 0 }
    }

    /// The id of a token by its spelling in the vocabulary (`<|im_end|>`, `Ġthe`, `▁the`).
    #[must_use]
    pub fn token_id(&self, token: &str) -> Option<i64> {
        self.0.tokenizer.token_to_id(token).map(i64::from)
    }

    /// The id of the one token that stands for exactly `text` in the middle of a sentence, such as
    /// `"A"` or `" A"`; none if `text` takes several tokens.
    #[must_use]
    pub fn text_token_id(&self, text: &str) -> Option<i64> {
        let spelling = if self.0.byte_level {
            spelling::of_bytes(text)
        } else {
            text.replace(' ', spelling::METASPACE)
        };
        self.token_id(&spelling)
    }

    /// The spelling of a token in the vocabulary.
    #[must_use]
    pub fn token(&self, id: i64) -> Option<String> {
        self.0.tokenizer.id_to_token(u32::try_from(id).ok()?)
    }

    /// Whether `id` is a special token: one that `decode` leaves out.
    #[must_use]
    pub fn is_special(&self, id: i64) -> bool {
        let added = self.0.tokenizer.get_added_vocabulary().get_added_tokens_decoder();
        u32::try_from(id).is_ok_and(|id| added.get(&id).is_some_and(|token| token.special))
    }

    /// Every special token with its id, by id.
    #[must_use]
    pub fn special_tokens(&self) -> Vec<(String, i64)> {
        self.added_tokens(true)
    }

    /// The tokens that are found in a text before it is split into words, by id: those that are special, or those that are not.
    pub(crate) fn added_tokens(&self, special: bool) -> Vec<(String, i64)> {
        let added = self.0.tokenizer.get_added_vocabulary().get_added_tokens_decoder();
        let mut special: Vec<_> = added
            .iter()
            .filter(|(_, token)| token.special == special)
            .map(|(&id, token)| (token.content.clone(), i64::from(id)))
            .collect();
        special.sort_by_key(|(_, id)| *id);
        special
    }

    /// Tokens in the vocabulary, added ones included. The model's may be padded beyond it.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.0.tokenizer.get_vocab_size(true)
    }

    /// Beginning of sequence.
    #[must_use]
    pub fn bos_id(&self) -> Option<i64> {
        self.0.special.bos
    }

    /// End of sequence, as the tokenizer's file declares it. What ends an assistant's turn is
    /// [`crate::text::Chat::end_of_turn_id`].
    #[must_use]
    pub fn eos_id(&self) -> Option<i64> {
        self.0.special.eos
    }

    /// The token for unknown text.
    #[must_use]
    pub fn unk_id(&self) -> Option<i64> {
        self.0.special.unk
    }

    /// The padding token, which is never EOS: a reward model's head is read at the last token that
    /// is not padding, and an EOS there must count. The declared one if it differs from EOS, else
    /// a special token named for padding, else the unknown token, else BOS.
    #[must_use]
    pub fn pad_id(&self) -> Option<i64> {
        let SpecialIds { bos, eos, unk, pad } = self.0.special;
        let named = || {
            let mut special = self.special_tokens().into_iter();
            special.find(|(token, _)| token.to_lowercase().contains("pad")).map(|(_, id)| id)
        };
        [pad, named(), unk, bos].into_iter().flatten().find(|id| Some(*id) != eos)
    }

    /// The model's chat template, compiled.
    ///
    /// # Errors
    ///
    /// [`Error::NoTemplate`] if the model has none, [`Error::Template`] if it does not compile.
    pub fn template(&self) -> Result<ChatTemplate, Error> {
        // In a directory it has a file of its own as a rule; in GGUF files it is part of the metadata.
        let sidecar = self.0.path.with_file_name(TEMPLATE_FILE);
        let in_directory = self.0.path.file_name().is_some_and(|name| name == TOKENIZER_FILE);
        let path = if in_directory && sidecar.exists() { &sidecar } else { &self.0.path };
        match &self.0.template {
            Some(source) => ChatTemplate::new(path, source, self.template_variables()),
            None => Err(Error::NoTemplate { path: self.0.path.clone() }),
        }
    }

    /// What templates know under `bos_token`, `eos_token`, …
    pub(crate) fn template_variables(&self) -> Vec<(&'static str, String)> {
        let SpecialIds { bos, eos, unk, pad } = self.0.special;
        [("bos_token", bos), ("eos_token", eos), ("unk_token", unk), ("pad_token", pad)]
            .into_iter()
            .filter_map(|(name, id)| Some((name, self.token(id?)?)))
            .collect()
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and, if the
    /// model has a template, `chat_template.jinja` into an existing directory, so that transformers
    /// loads the same tokenizer from there. The padding token written is [`Self::pad_id`]'s.
    ///
    /// # Errors
    ///
    /// [`Error::Records`] if a file cannot be written.
    pub fn save(&self, directory: &Path) -> Result<(), Error> {
        let inner = &*self.0;
        let json = match &inner.json {
            Some(bytes) => bytes.clone(),
            None => guarded(&inner.path, || {
                inner.tokenizer.to_string(false).map_err(|error| error.to_string())
            })?
            .into_bytes(),
        };
        let mut config = inner.config.clone();
        let mut special_map = Map::new();
        for (name, id) in [
            ("bos_token", inner.special.bos),
            ("eos_token", inner.special.eos),
            ("unk_token", inner.special.unk),
            ("pad_token", self.pad_id()),
        ] {
            if let Some(token) = id.and_then(|id| self.token(id)) {
                special_map.insert(name.to_owned(), Value::String(token.clone()));
                config.insert(name.to_owned(), Value::String(token));
            }
        }
        config.entry("tokenizer_class").or_insert_with(|| "PreTrainedTokenizerFast".into());
        if let Some(template) = &inner.template {
            // The sidecar wins where both are known; transformers before 4.47 reads the key only.
            config.insert("chat_template".to_owned(), Value::String(template.clone()));
            atomic::write(directory.join(TEMPLATE_FILE), template.as_bytes())?;
        }
        atomic::write(directory.join(TOKENIZER_FILE), &json)?;
        atomic::write(directory.join(CONFIG_FILE), pretty(config).as_bytes())?;
        atomic::write(directory.join(SPECIAL_FILE), pretty(special_map).as_bytes())?;
        Ok(())
    }
}

/// A completion decoded as it grows: characters of several tokens appear when they are complete.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<i64>,
    /// Decoding starts here: far enough back for the decoder to know the left context.
    start: usize,
    /// The text of the ids before this one has been given out.
    shown: usize,
}

impl TextStream<'_> {
    /// The text that `id` completes; empty in the middle of a character.
    ///
    /// # Errors
    ///
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: i64) -> Result<String, Error> {
        self.ids.push(id);
        let before = self.tokenizer.decode(&self.ids[self.start..self.shown])?;
        let text = self.tokenizer.decode(&self.ids[self.start..])?;
        if text.ends_with('\u{FFFD}') {
            return Ok(String::new());
        }
        let new = text.get(before.len()..).unwrap_or_default().to_owned();
        self.start = self.shown;
        self.shown = self.ids.len();
        Ok(new)
    }
}

/// Runs `call`, turning a panic inside the tokenizers crate into an error.
fn guarded<T>(path: &Path, call: impl FnOnce() -> Result<T, String>) -> Result<T, Error> {
    // Nothing that `call` may leave half done is used after a panic: its result is dropped.
    let result = catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
        let message = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_else(|| "unknown panic".to_owned());
        Err(format!("the parser failed: {message}"))
    });
    result.map_err(|reason| Error::Tokenizer { path: path.to_path_buf(), reason })
}

/// Truncation and padding that a file asks for would silently change what is encoded.
fn drop_cutting(path: &Path, tokenizer: &mut tokenizers::Tokenizer) -> Result<(), Error> {
    guarded(path, || {
        tokenizer.with_truncation(None).map(drop).map_err(|error| error.to_string())?;
        tokenizer.with_padding(None);
        Ok(())
    })
}

/// Tells post-processors not to leave white space out of token offsets: the chain needs every
/// token's true extent. Ids do not depend on it.
fn keep_whole_offsets(post_processor: &mut Value) {
    match post_processor {
        Value::Object(fields) => {
            for (key, value) in fields.iter_mut() {
                if key == "trim_offsets" {
                    *value = Value::Bool(false);
                } else {
                    keep_whole_offsets(value);
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(keep_whole_offsets),
        _ => {}
    }
}

fn splits_by_regex(pre_tokenizer: &PreTokenizerWrapper) -> bool {
    match pre_tokenizer {
        PreTokenizerWrapper::ByteLevel(byte_level) => byte_level.use_regex,
        PreTokenizerWrapper::Split(split) => matches!(split.pattern, SplitPattern::Regex(_)),
        PreTokenizerWrapper::Sequence(sequence) => sequence.as_ref().iter().any(splits_by_regex),
        _ => false,
    }
}

fn is_byte_level(pre_tokenizer: &PreTokenizerWrapper) -> bool {
    match pre_tokenizer {
        PreTokenizerWrapper::ByteLevel(_) => true,
        PreTokenizerWrapper::Sequence(sequence) => sequence.as_ref().iter().any(is_byte_level),
        _ => false,
    }
}

/// A short piece of `word` with white space, beyond its first two characters, and text after it; none if there is no such.
fn around_space(word: &str) -> Option<&str> {
    const CHARS_BEFORE: usize = 32;
    const CHARS_AFTER: usize = 8;
    let inside = word.char_indices().nth(2)?.0;
    let gap = inside + word[inside..].find(char::is_whitespace)?;
    let after = gap + word[gap..].find(|c: char| !c.is_whitespace())?;
    let begin = word[..after].char_indices().rev().nth(CHARS_BEFORE).map_or(0, |(at, _)| at);
    let end =
        word[after..].char_indices().nth(CHARS_AFTER).map_or(word.len(), |(at, _)| after + at);
    Some(&word[begin..end])
}

/// `chat_template` of `tokenizer_config.json`: a string, or a list of named ones (`default` counts).
fn inline_template(path: &Path, config: &Map<String, Value>) -> Result<Option<String>, Error> {
    let wrong = |found: &str| {
        Error::field(path, "chat_template", "a string, or a list with one named default", found)
    };
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(template)) => Ok(Some(template.clone())),
        Some(Value::Array(named)) => {
            let default = named.iter().find(|entry| entry["name"] == "default");
            match default.and_then(|entry| entry["template"].as_str()) {
                Some(template) => Ok(Some(template.to_owned())),
                None => Err(wrong("a list without one")),
            }
        }
        Some(_) => Err(wrong("something else")),
    }
}

/// A small JSON file that may be absent; numbers that are not finite are left out.
fn read_optional(path: &Path) -> Result<Option<Map<String, Value>>, Error> {
    if !path.exists() {
        return Ok(None);
    }
    let mut object = read_object(path, MAX_CONFIG_BYTES)?;
    object.retain(|_, value| !is_word(value));
    Ok(Some(object))
}

fn pretty(object: Map<String, Value>) -> String {
    let mut text = serde_json::to_string_pretty(&Value::Object(object))
        .expect("a map with string keys is JSON");
    text.push('\n');
    text
}

#[cfg(test)]
pub(crate) mod tests;
