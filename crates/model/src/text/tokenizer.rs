//! Text to token ids and back: a guarded wrapper over the `tokenizers` crate, with loaders for
//! `tokenizer.json` directories and for the vocabularies that GGUF files carry.
//!
//! A tokenizer file is someone else's input to a parser that panics on some of them, so files are
//! checked before they are handed over, and every call into the parser is caught.

use std::collections::BTreeMap;
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
use crate::json::{is_word, read_object, stand_in};
use crate::text::template::{ChatTemplate, DEFAULT_DATE};

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
const ADDED_FILE: &str = "added_tokens.json";
const TEMPLATE_FILE: &str = "chat_template.jinja";
/// Templates for other uses, one file each.
const TEMPLATES: &str = "additional_chat_templates";
/// The template that is used, among named ones.
const DEFAULT: &str = "default";

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
    beside: Beside,
    special: SpecialIds,
    /// What templates know by name beyond `special`: each name and its token.
    named: Vec<(String, String)>,
    /// Rows of the model's embedding, where the model is known.
    n_rows: Option<usize>,
    /// Text is cut into words by a regular expression before merging.
    splits_by_regex: bool,
    /// Tokens are spelled in GPT-2's byte alphabet.
    byte_level: bool,
}

/// What lies beside `tokenizer.json`.
#[derive(Default)]
struct Beside {
    /// `tokenizer_config.json`; without its templates, where files of their own go before them.
    config: Map<String, Value>,
    /// `special_tokens_map.json`.
    map: Map<String, Value>,
    /// `added_tokens.json`: ids by token.
    added: Map<String, Value>,
    /// The chat template.
    template: Option<String>,
    /// Templates of [`TEMPLATES`] by their names: they are only kept.
    others: BTreeMap<String, String>,
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
    /// Loads `tokenizer.json` and, where present, `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json` and
    /// `chat_template.jinja` (which wins over an inline template, as does one of `additional_chat_templates/` named default).
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if `tokenizer.json` cannot be read, [`Error::Field`] and [`Error::Tokenizer`]
    /// if a file is damaged, hostile or inconsistent.
    pub fn from_directory(directory: &Path) -> Result<Self, Error> {
        let path = directory.join(TOKENIZER_FILE);
        let older = [
            ("tokenizer.model", "a SentencePiece tokenizer.model"),
            ("vocab.json", "vocab.json and its merges"),
        ];
        let older = older.iter().find(|(file, _)| directory.join(file).exists());
        if let Some((_, what)) = older.filter(|_| !path.exists()) {
            let found = format!(
                "only {what}; convert it with `AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)` of transformers"
            );
            return Err(Error::field(directory, TOKENIZER_FILE, "a tokenizer.json", found));
        }
        let bytes = read_capped(&path, MAX_TOKENIZER_BYTES)?;
        let optional = |name: &str| -> Result<Map<String, Value>, Error> {
            Ok(read_optional(&directory.join(name))?.unwrap_or_default())
        };
        let mut config = optional(CONFIG_FILE)?;
        let mut others = template_files(directory)?;
        let template = if others.is_empty() {
            inline_template(&directory.join(CONFIG_FILE), &config)?
        } else {
            config.remove("chat_template");
            others.remove(DEFAULT)
        };
        let (map, added) = (optional(SPECIAL_FILE)?, optional(ADDED_FILE)?);
        Self::from_parts(path, bytes, Beside { config, map, added, template, others })
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

    fn from_parts(path: PathBuf, bytes: Vec<u8>, beside: Beside) -> Result<Self, Error> {
        let mut json: Value = serde_json::from_slice(&bytes).map_err(|error| {
            let found = stand_in(&bytes).map_or_else(|| error.to_string(), str::to_owned);
            Error::field(&path, "JSON", "a JSON object", found)
        })?;
        validate::check(&path, &json)?;
        keep_whole_offsets(&mut json["post_processor"]);
        declared::set_prefix_space(&mut json, &beside.config);
        let mut tokenizer = guarded(&path, || {
            <tokenizers::Tokenizer as serde::Deserialize>::deserialize(&json)
                .map_err(|error| error.to_string())
        })?;
        drop_cutting(&path, &mut tokenizer)?;
        validate::check_added(&path, &json, &tokenizer)?;
        let Beside { config, map, added, .. } = &beside;
        let (special, named) =
            Declared { path: &path, config, map, added }.apply(&mut tokenizer)?;
        Ok(Self::assemble(tokenizer, path, Some(bytes), beside, special, named))
    }

    fn assemble(
        tokenizer: tokenizers::Tokenizer,
        path: PathBuf,
        json: Option<Vec<u8>>,
        beside: Beside,
        special: SpecialIds,
        named: Vec<(String, String)>,
    ) -> Self {
        let (splits_by_regex, byte_level) = match tokenizer.get_pre_tokenizer() {
            Some(pre_tokenizer) => (splits_by_regex(pre_tokenizer), is_byte_level(pre_tokenizer)),
            None => (false, false),
        };
        Self(Arc::new(Inner {
            tokenizer,
            path,
            json,
            beside,
            special,
            named,
            n_rows: None,
            splits_by_regex,
            byte_level,
        }))
    }

    /// The same tokenizer, just made, for a model whose embedding has so many rows: a text with a token beyond is refused.
    pub(crate) fn for_rows(mut self, n_rows: usize) -> Self {
        Arc::get_mut(&mut self.0).expect("just made, so nobody else has it").n_rows = Some(n_rows);
        self
    }

    /// Says that there are tokens without a row in the embedding: harmless as long as no text has one.
    pub(crate) fn warn_of_tokens_without_row(&self) {
        let Some(n_rows) = self.0.n_rows else { return };
        let added = self.0.tokenizer.get_added_vocabulary().get_added_tokens_decoder();
        let n_added = added.keys().max().map_or(0, |id| *id as usize + 1);
        let n_ids = self.0.tokenizer.get_vocab_size(false).max(n_added);
        if n_ids > n_rows {
            let (path, first) = (self.0.path.display(), self.token(n_rows as i64));
            tracing::warn!(%path, n_ids, n_rows, ?first, "more tokens than the model's embedding has rows: a text that has one of them is refused");
        }
    }

    fn check_rows(&self, ids: &[u32]) -> Result<(), Error> {
        let Some(n_rows) = self.0.n_rows else { return Ok(()) };
        let Some(&id) = ids.iter().find(|id| **id as usize >= n_rows) else { return Ok(()) };
        let token = self.token(i64::from(id)).unwrap_or_default();
        let expected = format!("an id below {n_rows}, the rows of the model's embedding");
        Err(Error::field(&self.0.path, format!("token {token:?}"), expected, id.to_string()))
    }

    /// The ids of `text`; special tokens spelled out in it become those tokens. With
    /// `add_special`, what the tokenizer puts around a sequence is added (a leading BOS, as a rule):
    /// texts rendered by a chat template already contain it.
    ///
    /// # Errors
    ///
    /// [`Error::TextTooLong`] above 4 MiB; [`Error::Tokenizer`] if the tokenizer fails; [`Error::Field`] if the text has a
    /// token for which the model has no embedding.
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
        self.check_rows(encoding.get_ids())?;
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
        match &self.0.beside.template {
            Some(source) => {
                ChatTemplate::compile(path, source, self.template_variables(), DEFAULT_DATE)
            }
            None => Err(Error::NoTemplate { path: self.0.path.clone() }),
        }
    }

    /// What templates know under `bos_token`, `eos_token`, …
    pub(crate) fn template_variables(&self) -> Vec<(String, String)> {
        let SpecialIds { bos, eos, unk, pad } = self.0.special;
        [("bos_token", bos), ("eos_token", eos), ("unk_token", unk), ("pad_token", pad)]
            .into_iter()
            .filter_map(|(name, id)| Some((name.to_owned(), self.token(id?)?)))
            .chain(self.0.named.iter().cloned())
            .collect()
    }

    /// Writes `tokenizer.json` and what lies beside it (settings, special and added tokens, chat templates) into an existing
    /// directory, so that transformers loads the same tokenizer from there, with the padding token that was declared.
    ///
    /// # Errors
    ///
    /// [`Error::Records`] if a file cannot be written.
    pub fn save(&self, directory: &Path) -> Result<(), Error> {
        self.write(directory, self.0.special.pad)
    }

    /// [`Self::save`] with the padding token of [`Self::pad_id`], for reward models.
    ///
    /// # Errors
    ///
    /// As [`Self::save`].
    pub fn save_with_padding(&self, directory: &Path) -> Result<(), Error> {
        self.write(directory, self.pad_id())
    }

    fn write(&self, directory: &Path, pad: Option<i64>) -> Result<(), Error> {
        let inner = &*self.0;
        let json = match &inner.json {
            Some(bytes) => bytes.clone(),
            None => guarded(&inner.path, || {
                inner.tokenizer.to_string(false).map_err(|error| error.to_string())
            })?
            .into_bytes(),
        };
        let (mut config, mut special_map) = (inner.beside.config.clone(), inner.beside.map.clone());
        for (name, id) in [
            ("bos_token", inner.special.bos),
            ("eos_token", inner.special.eos),
            ("unk_token", inner.special.unk),
            ("pad_token", pad),
        ] {
            if let Some(token) = id.and_then(|id| self.token(id)) {
                special_map.insert(name.to_owned(), Value::String(token.clone()));
                config.insert(name.to_owned(), Value::String(token));
            }
        }
        config.entry("tokenizer_class").or_insert_with(|| "PreTrainedTokenizerFast".into());
        // A list of named templates stays where it is: a file would go before it.
        let is_list = config.get("chat_template").is_some_and(Value::is_array);
        if let Some(template) = inner.beside.template.as_ref().filter(|_| !is_list) {
            // The sidecar wins where both are known; transformers before 4.47 reads the key only.
            config.insert("chat_template".to_owned(), Value::String(template.clone()));
            atomic::write(directory.join(TEMPLATE_FILE), template.as_bytes())?;
        }
        for (name, template) in &inner.beside.others {
            fs_err::create_dir_all(directory.join(TEMPLATES))?;
            let path = directory.join(TEMPLATES).join(format!("{name}.jinja"));
            atomic::write(path, template.as_bytes())?;
        }
        if !inner.beside.added.is_empty() {
            let added = pretty(inner.beside.added.clone());
            atomic::write(directory.join(ADDED_FILE), added.as_bytes())?;
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

/// The templates that have files of their own, by name: `chat_template.jinja` is the default, unless there is another one.
fn template_files(directory: &Path) -> Result<BTreeMap<String, String>, Error> {
    let mut paths = vec![(DEFAULT.to_owned(), directory.join(TEMPLATE_FILE))];
    paths.retain(|(_, path)| path.exists());
    if directory.join(TEMPLATES).is_dir() {
        for entry in fs_err::read_dir(directory.join(TEMPLATES))? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".jinja"));
            paths.extend(name.map(|name| (name.to_owned(), path.clone())));
        }
    }
    let text = |(name, path): (String, PathBuf)| {
        let bytes = read_capped(&path, crate::text::template::MAX_SOURCE_BYTES)?;
        let text = String::from_utf8(bytes).map_err(|error| {
            Error::field(&path, "text", "UTF-8", error.utf8_error().to_string())
        })?;
        Ok((name, text))
    };
    paths.into_iter().map(text).collect()
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
