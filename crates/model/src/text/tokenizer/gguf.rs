//! Tokenizers from the vocabularies in GGUF files, built without a detour through JSON.
//!
//! # Source
//!
//! The conversion follows transformers 5.23 (`integrations/gguf/gguf_tokenizer_mapping.py`) with
//! these differences: `smollm` and its kin split digits one by one as the published
//! `tokenizer.json` does (transformers' table lacks them), `add_space_prefix` is honoured, an
//! unknown `pre` is an error instead of GPT-2's regular expression, and `llama-bpe` and `tekken`
//! take a word that is in the vocabulary whole, as their published files and llama.cpp do. Where a
//! file says nothing (`pre`, BOS, spaces around special tokens, tokens that end a turn), llama.cpp
//! decides: the files are its own (`src/llama-vocab.cpp`).

use std::cmp::Ordering;
use std::collections::HashMap;
use std::path::Path;

use serde_json::Map;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, BpeBuilder, Merges, Vocab};
use tokenizers::normalizers::prepend::Prepend;
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::utils::Sequence as NormalizerSequence;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::Split;
use tokenizers::pre_tokenizers::split::SplitPattern;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior,
};

use super::spelling::{METASPACE, of_bytes};
use super::{Beside, SpecialIds, Tokenizer, drop_cutting, guarded};
use crate::Error;

// llama.cpp's token types.
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const BYTE: i32 = 6;

/// Tokens that llama.cpp takes for control tokens whatever their type, by their names (`special_eot_id`).
const ENDS_OF_TURN: [&str; 13] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
];

/// Contractions, words, digits in groups of up to three, punctuation, white space.
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// As Llama 3's, digits one by one.
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Splits at changes from lower to upper case.
const TEKKEN_SPLIT: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// llama.cpp's for files that name no `pre`: punctuation apart, GPT-2's words, digits in groups, in groups of three.
const DEFAULT_SPLITS: [&str; 4] = [
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
];

const KNOWN_PRE: &str = "default, gpt-2, gpt2, phi-2, mpt, olmo, smollm, starcoder, refact, \
                         command-r, codeshell, llama-bpe, llama3, llama-v3, falcon3, dbrx, \
                         smaug-bpe, qwen2, deepseek-r1-qwen, stablelm2, tekken";

/// What a GGUF file says about its tokenizer: the `tokenizer.ggml.*` entries and the template.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufVocabulary {
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece BPE).
    pub model: String,
    /// `tokenizer.ggml.pre`: how a `gpt2` vocabulary's text is split into words.
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`, in the order of their ids.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.token_type`: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused,
    /// 6 byte; empty or one per token.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.merges`: pairs separated by a space, best first.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.scores`: empty or one per token; the higher, the earlier merged.
    pub scores: Vec<f32>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos_id: Option<i64>,
    /// `tokenizer.ggml.eos_token_id`.
    pub eos_id: Option<i64>,
    /// `tokenizer.ggml.unknown_token_id`.
    pub unk_id: Option<i64>,
    /// `tokenizer.ggml.padding_token_id`.
    pub pad_id: Option<i64>,
    /// `tokenizer.ggml.add_bos_token`; absent = yes for `llama`, no for `gpt2`.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`; absent = no.
    pub add_eos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix` of a `llama` vocabulary; absent = yes.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

pub(super) fn build(path: &Path, mut vocabulary: GgufVocabulary) -> Result<Tokenizer, Error> {
    check(path, &vocabulary)?;
    for (id, token) in
        vocabulary.tokens.iter_mut().enumerate().filter(|(_, token)| token.is_empty())
    {
        *token = format!("[EMPTY_{id}]"); // as llama.cpp names them
    }
    let mut tokenizer = match vocabulary.model.as_str() {
        "gpt2" => byte_level(path, &mut vocabulary)?,
        "llama" => sentencepiece(path, &mut vocabulary)?,
        other => {
            let expected = "gpt2 or llama";
            return Err(Error::field(path, "tokenizer.ggml.model", expected, other));
        }
    };
    drop_cutting(path, &mut tokenizer)?;
    let GgufVocabulary { model, tokens, bos_id, eos_id, unk_id, pad_id, .. } = &vocabulary;
    let special = SpecialIds { bos: *bos_id, eos: *eos_id, unk: *unk_id, pad: *pad_id };
    let name = |id: Option<i64>| -> Option<&String> { tokens.get(usize::try_from(id?).ok()?) };

    let declared = [special.bos, special.eos, special.unk, special.pad];
    let mut added: Vec<AddedToken> = Vec::new();
    for (id, token) in (0_i64..).zip(tokens) {
        let kind = usize::try_from(id).ok().and_then(|id| vocabulary.token_types.get(id));
        let control = matches!(kind, Some(&(CONTROL | UNKNOWN))) || declared.contains(&Some(id));
        let ends_turn = ENDS_OF_TURN.contains(&token.as_str());
        if ends_turn && !control && kind.is_some() {
            let path = path.display();
            tracing::warn!(%path, token, "a token that ends turns, but no control token: it is taken for one, as llama.cpp does");
        }
        let special = control || ends_turn;
        if special || kind == Some(&USER_DEFINED) {
            added.push(AddedToken::from(token.clone(), special).normalized(false));
        }
    }
    guarded(path, || tokenizer.add_tokens(added).map(drop).map_err(|error| error.to_string()))?;

    let add_bos = vocabulary.add_bos.unwrap_or(model == "llama") && special.bos.is_some();
    let add_eos = vocabulary.add_eos.unwrap_or(false) && special.eos.is_some();
    let bos = name(special.bos).filter(|_| add_bos);
    let eos = name(special.eos).filter(|_| add_eos);
    if bos.is_some() || eos.is_some() {
        let processor = surround(bos.zip(special.bos), eos.zip(special.eos))
            .map_err(|reason| Error::Tokenizer { path: path.to_path_buf(), reason })?;
        tokenizer.with_post_processor(Some(processor));
    }

    let mut config = Map::new();
    config.insert("add_bos_token".into(), add_bos.into());
    config.insert("add_eos_token".into(), add_eos.into());
    config.insert("clean_up_tokenization_spaces".into(), false.into());
    config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    let template = vocabulary.chat_template.take();
    let beside = Beside { config, template, ..Beside::default() };
    Ok(Tokenizer::assemble(tokenizer, path.to_path_buf(), None, beside, special, Vec::new()))
}

/// Lists as long as they must be, ids inside the vocabulary, no token twice.
fn check(path: &Path, vocabulary: &GgufVocabulary) -> Result<(), Error> {
    let n_tokens = vocabulary.tokens.len();
    if n_tokens == 0 {
        return Err(Error::field(path, "tokenizer.ggml.tokens", "at least one token", "none"));
    }
    for (key, found) in [
        ("tokenizer.ggml.token_type", vocabulary.token_types.len()),
        ("tokenizer.ggml.scores", vocabulary.scores.len()),
    ] {
        if found != 0 && found != n_tokens {
            let expected = format!("{n_tokens} entries, one per token");
            return Err(Error::field(path, key, expected, found.to_string()));
        }
    }
    for (key, id) in [
        ("tokenizer.ggml.bos_token_id", vocabulary.bos_id),
        ("tokenizer.ggml.eos_token_id", vocabulary.eos_id),
        ("tokenizer.ggml.unknown_token_id", vocabulary.unk_id),
        ("tokenizer.ggml.padding_token_id", vocabulary.pad_id),
    ] {
        if let Some(id) = id
            && !usize::try_from(id).is_ok_and(|id| id < n_tokens)
        {
            return Err(Error::field(path, key, format!("0..{n_tokens}"), id.to_string()));
        }
    }
    Ok(())
}

/// Token spellings to ids; an entry twice would leave one of its ids unreachable.
fn index(path: &Path, spellings: impl Iterator<Item = String>) -> Result<Vocab, Error> {
    let mut vocab = Vocab::default();
    vocab.reserve(spellings.size_hint().0);
    for (id, token) in (0_u32..).zip(spellings) {
        if let Some(first) = vocab.insert(token, id) {
            let field = format!("tokenizer.ggml.tokens[{id}]");
            return Err(Error::field(path, field, "every token once", format!("token {first}")));
        }
    }
    Ok(vocab)
}

fn build_bpe(path: &Path, model: BpeBuilder) -> Result<BPE, Error> {
    guarded(path, || model.build().map_err(|error| error.to_string()))
}

/// Byte-level BPE, as GPT-2's.
fn byte_level(
    path: &Path,
    vocabulary: &mut GgufVocabulary,
) -> Result<tokenizers::Tokenizer, Error> {
    let pre = vocabulary.pre.as_deref().unwrap_or("default");
    if pre == "default" {
        let path = path.display();
        tracing::warn!(
            %path,
            "tokenizer.ggml.pre does not say how the text is split into words: llama.cpp's own default is taken, which is none of \
             the published models'; convert the file anew"
        );
    }
    let gpt2 = ByteLevel::new(false, true, true);
    let (pre_tokenizer, ignore_merges): (PreTokenizerWrapper, bool) = match pre {
        "default" => (split_in_turn(&DEFAULT_SPLITS), false),
        "gpt-2" | "gpt2" | "phi-2" | "mpt" | "olmo" => (gpt2.into(), false),
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" => {
            (Sequence::new(vec![Digits::new(true).into(), gpt2.into()]).into(), false)
        }
        "llama-bpe" | "llama3" | "llama-v3" | "falcon3" => (split_in_turn(&[LLAMA3_SPLIT]), true),
        "dbrx" | "smaug-bpe" => (split_in_turn(&[LLAMA3_SPLIT]), false),
        "qwen2" | "deepseek-r1-qwen" | "stablelm2" => (split_in_turn(&[QWEN2_SPLIT]), false),
        "tekken" => (split_in_turn(&[TEKKEN_SPLIT]), true),
        other => return Err(Error::field(path, "tokenizer.ggml.pre", KNOWN_PRE, other)),
    };
    if vocabulary.add_bos.is_none() {
        // llama.cpp's default for files from before the flag.
        let own = ["llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"];
        vocabulary.add_bos = Some(own.contains(&pre));
    }

    let types = &vocabulary.token_types;
    let vocab = index(
        path,
        vocabulary.tokens.iter().enumerate().map(|(id, token)| {
            // Tokens written as they read, not in the byte alphabet, are respelled; control and
            // user-defined ones are matched in the text itself and stay.
            let added = matches!(types.get(id), Some(&(CONTROL | USER_DEFINED | UNKNOWN)));
            if added || token.chars().all(in_byte_alphabet) {
                token.clone()
            } else {
                of_bytes(token)
            }
        }),
    )?;
    let longest = vocab.keys().map(String::len).max().unwrap_or(0);
    let mut merges: Merges = Vec::with_capacity(vocabulary.merges.len());
    for (rank, merge) in vocabulary.merges.iter().enumerate() {
        match merge.split_once(' ') {
            Some((left, right)) if !right.contains(' ') && left.len() + right.len() <= longest => {
                merges.push((left.to_owned(), right.to_owned()));
            }
            _ => {
                let field = format!("tokenizer.ggml.merges[{rank}]");
                let expected = "two tokens, with a space between, that join to a third";
                return Err(Error::field(path, field, expected, format!("{merge:?}")));
            }
        }
    }
    let model = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(ignore_merges);
    let mut tokenizer = tokenizers::Tokenizer::new(build_bpe(path, model)?);
    tokenizer.with_pre_tokenizer(Some(pre_tokenizer));
    tokenizer.with_decoder(Some(ByteLevel::new(false, true, true)));
    Ok(tokenizer)
}

/// Cuts text by each expression in turn, what it matches apart, and spells the words in bytes.
fn split_in_turn(patterns: &[&str]) -> PreTokenizerWrapper {
    let split = |pattern: &&str| -> PreTokenizerWrapper {
        let pattern = SplitPattern::Regex((*pattern).to_owned());
        Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
            .expect("this file's own regular expressions compile")
            .into()
    };
    let bytes = PreTokenizerWrapper::from(ByteLevel::new(false, true, false));
    Sequence::new(patterns.iter().map(split).chain([bytes]).collect()).into()
}

/// SentencePiece BPE with byte fallback, as Llama's and Mistral's.
fn sentencepiece(
    path: &Path,
    vocabulary: &mut GgufVocabulary,
) -> Result<tokenizers::Tokenizer, Error> {
    if vocabulary.scores.is_empty() {
        let expected = "one per token";
        return Err(Error::field(path, "tokenizer.ggml.scores", expected, "none"));
    }
    let vocab = index(path, vocabulary.tokens.iter().cloned())?;
    let merges = merges_by_score(&vocab, vocabulary);
    let model = BPE::builder().vocab_and_merges(vocab, merges).fuse_unk(true).byte_fallback(true);
    let model = match vocabulary.unk_id.and_then(|id| usize::try_from(id).ok()) {
        Some(unk) => model.unk_token(vocabulary.tokens[unk].clone()),
        None => model,
    };
    let mut tokenizer = tokenizers::Tokenizer::new(build_bpe(path, model)?);
    // Every run of text between special tokens begins with a space of its own, whatever it begins with itself.
    let add_prefix = vocabulary.add_space_prefix.unwrap_or(true);
    let spaces = Replace::new(" ", METASPACE).expect("a literal pattern compiles");
    let prefix = add_prefix.then(|| Prepend::new(METASPACE.to_owned()).into());
    let normalizers = prefix.into_iter().chain([NormalizerWrapper::from(spaces)]).collect();
    guarded(path, || {
        let normalizer = NormalizerSequence::new(normalizers);
        tokenizer.with_normalizer(Some(normalizer)).map(drop).map_err(|error| error.to_string())
    })?;
    let metaspace = Replace::new(METASPACE, " ").expect("a literal pattern compiles");
    let mut decoders: Vec<DecoderWrapper> =
        vec![metaspace.into(), ByteFallback::new().into(), Fuse::new().into()];
    if add_prefix {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(DecoderSequence::new(decoders)));
    Ok(tokenizer)
}

/// The merges that a SentencePiece vocabulary implies: every way to cut a token into two others,
/// by the token's score, ties as in transformers' `generate_merges`.
fn merges_by_score(vocab: &Vocab, vocabulary: &GgufVocabulary) -> Merges {
    struct Merge<'a> {
        score: f32,
        lengths: (usize, usize),
        pair: (&'a str, &'a str),
    }
    let text = |id: usize| {
        let kind = vocabulary.token_types.get(id);
        !matches!(kind, Some(&(UNKNOWN | CONTROL | BYTE)))
    };
    let mergeable: HashMap<&str, u32> = vocab
        .iter()
        .filter(|(_, id)| text(**id as usize))
        .map(|(token, &id)| (token.as_str(), id))
        .collect();
    let mut merges: Vec<Merge<'_>> = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        if !text(id) {
            continue;
        }
        let n_chars = token.chars().count();
        let mut cuts: Vec<_> = token
            .char_indices()
            .enumerate()
            .skip(1)
            .filter_map(|(n_left, (at, _))| {
                let pair = token.split_at(at);
                let ids = (*mergeable.get(pair.0)?, *mergeable.get(pair.1)?);
                Some((ids, (n_left, n_chars - n_left), pair))
            })
            .collect();
        cuts.sort_by_key(|(ids, ..)| *ids);
        let score = vocabulary.scores[id];
        merges.extend(cuts.into_iter().map(|(_, lengths, pair)| Merge { score, lengths, pair }));
    }
    merges.sort_by(|a, b| {
        let by_score = b.score.partial_cmp(&a.score).unwrap_or(Ordering::Equal);
        by_score.then(b.lengths.cmp(&a.lengths))
    });
    merges.into_iter().map(|merge| (merge.pair.0.to_owned(), merge.pair.1.to_owned())).collect()
}

/// A post-processor that puts BOS before and EOS after a sequence.
fn surround(
    bos: Option<(&String, i64)>,
    eos: Option<(&String, i64)>,
) -> Result<TemplateProcessing, String> {
    // Built from its JSON form: the builder parses a string in which `:` and `$` have a meaning.
    let special = |id: &str| serde_json::json!({ "SpecialToken": { "id": id, "type_id": 0 } });
    let sequence = |name: &str| serde_json::json!({ "Sequence": { "id": name, "type_id": 0 } });
    let mut single = Vec::new();
    let mut pair = Vec::new();
    let mut tokens = Map::new();
    for (token, id) in [bos, eos].into_iter().flatten() {
        let entry = serde_json::json!({ "id": token, "ids": [id], "tokens": [token] });
        tokens.insert(token.clone(), entry);
    }
    for name in ["A", "B"] {
        let pieces = [
            bos.map(|(token, _)| special(token)),
            Some(sequence(name)),
            eos.map(|(token, _)| special(token)),
        ];
        if name == "A" {
            single.extend(pieces.iter().flatten().cloned());
        }
        pair.extend(pieces.into_iter().flatten());
    }
    serde_json::from_value(serde_json::json!({
        "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens,
    }))
    .map_err(|error| error.to_string())
}

fn in_byte_alphabet(c: char) -> bool {
    matches!(u32::from(c), 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF | 0x100..=0x143)
}
