use std::io::Read;

use serde_json::json;

use super::*;

/// A gzipped golden written by `scripts/goldens/`.
pub(crate) fn golden(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name);
    let mut text = String::new();
    let file = fs_err::File::open(path).unwrap();
    flate2::read::GzDecoder::new(file).read_to_string(&mut text).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn ids_of(value: &Value) -> Vec<i64> {
    value.as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect()
}

fn strings(value: &Value) -> Vec<String> {
    value.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
}

pub(crate) fn mistral_vocabulary(golden: &Value) -> GgufVocabulary {
    let mut score = 0.0;
    let scores = golden["score_steps"].as_array().unwrap().iter().map(|step| {
        score += step.as_f64().unwrap();
        score as f32
    });
    let scores = scores.collect();
    GgufVocabulary {
        model: "llama".to_owned(),
        tokens: strings(&golden["tokens"]),
        scores,
        token_types: ids_of(&golden["types"]).iter().map(|&t| i32::try_from(t).unwrap()).collect(),
        bos_id: Some(1),
        eos_id: Some(2),
        unk_id: Some(0),
        ..GgufVocabulary::default()
    }
}

/// Mistral-7B-Instruct-v0.2's tokenizer, as from a GGUF file.
pub(crate) fn mistral() -> Tokenizer {
    let golden = golden("tokenizer_mistral.json.gz");
    let built =
        Tokenizer::from_gguf(Path::new("mistral.gguf"), mistral_vocabulary(&golden)).unwrap();
    // As in the published directory: one space before a whole text. Of GGUF files llama.cpp puts one after every special token,
    // too (tests/cases/tokens.rs).
    let directory = tempfile::tempdir().unwrap();
    built.save(directory.path()).unwrap();
    let path = directory.path().join(TOKENIZER_FILE);
    let mut json: Value = serde_json::from_slice(&fs_err::read(&path).unwrap()).unwrap();
    json["normalizer"] = Value::Null;
    json["pre_tokenizer"] =
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
    fs_err::write(path, json.to_string()).unwrap();
    Tokenizer::from_directory(directory.path()).unwrap()
}

/// A vocabulary small enough to follow by hand: the 256 bytes, ` t`, `he`, ` the`, two line breaks
/// in one token, and ChatML's special tokens; ids from 256 on in this order.
pub(crate) fn small_vocabulary() -> GgufVocabulary {
    let mut bytes: Vec<String> = (0..=255_u8).map(|b| spelling::of_byte(b).to_string()).collect();
    let extra = ["Ġt", "he", "Ġthe", "ĊĊ", "<|endoftext|>", "<|im_start|>", "<|im_end|>"];
    bytes.extend(extra.map(str::to_owned));
    let mut token_types = vec![1; 260];
    token_types.extend([3; 3]);
    GgufVocabulary {
        model: "gpt2".to_owned(),
        pre: Some("smollm".to_owned()),
        tokens: bytes,
        token_types,
        merges: ["Ġ t", "h e", "Ġt he", "Ċ Ċ"].map(str::to_owned).to_vec(),
        bos_id: Some(261),
        eos_id: Some(262),
        unk_id: Some(260),
        pad_id: Some(262),
        ..GgufVocabulary::default()
    }
}

pub(crate) fn small() -> Tokenizer {
    Tokenizer::from_gguf(Path::new("small.gguf"), small_vocabulary()).unwrap()
}

#[test]
fn mistral_ids_equal_those_of_transformers() {
    let golden = golden("tokenizer_mistral.json.gz");
    let tokenizer = mistral();
    for (text, ids) in strings(&golden["texts"]).iter().zip(golden["ids"].as_array().unwrap()) {
        assert_eq!(tokenizer.encode(text, false).unwrap(), ids_of(ids), "{text:?}");
    }
    assert_eq!(tokenizer.encode("Hi", true).unwrap()[0], 1, "BOS first");
    assert_eq!((tokenizer.pad_id(), tokenizer.eos_id()), (Some(0), Some(2)));
}

#[test]
fn sentencepiece_agrees_on_texts_without_leading_space_or_special_tokens() {
    let golden = golden("tokenizer_mistral.json.gz");
    let own = golden["sentencepiece"].as_array().unwrap();
    let mut n_differing = 0;
    for (text, own) in strings(&golden["texts"]).iter().zip(own) {
        let excused = text.starts_with([' ', '▁'])
            || ["<s>", "</s>", "<unk>"].iter().any(|token| text.contains(token));
        assert!(own.is_null() || excused, "{text:?}");
        n_differing += usize::from(!own.is_null());
    }
    assert!(n_differing < 100, "{n_differing}");
}

#[test]
fn bytes_merges_and_digits_by_hand() {
    let tokenizer = small();
    let byte = |c: char| c as i64;
    // "the" at the start of a text has no space, so no ` t`.
    assert_eq!(tokenizer.encode("the the", false).unwrap(), [byte('t'), 257, 258]);
    // Digits stand alone, and so does the space before one.
    assert_eq!(tokenizer.encode(" 12", false).unwrap(), [byte(' '), byte('1'), byte('2')]);
    assert_eq!(tokenizer.encode("é\n\n", false).unwrap(), [0xC3, 0xA9, 259]);
    assert_eq!(tokenizer.encode("<|im_end|>\n", false).unwrap(), [262, byte('\n')]);
    assert_eq!(tokenizer.decode(&[byte('t'), 257, 262, 258, 70_000, -1]).unwrap(), "the the");
    assert_eq!(tokenizer.decode_with_special(&[262, 258]).unwrap(), "<|im_end|> the");
    assert_eq!(tokenizer.text_token_id(" the"), Some(258));
    assert_eq!(tokenizer.text_token_id(" then"), None);
    assert_eq!(tokenizer.token_id("<|im_end|>"), Some(262));
    assert!(tokenizer.is_special(262) && !tokenizer.is_special(258) && !tokenizer.is_special(-1));
    assert_eq!(tokenizer.special_tokens().len(), 3);
}

#[test]
fn byte_alphabet_is_gpt2s() {
    // From `bytes_to_unicode()` in transformers/convert_slow_tokenizer.py.
    let expected = [
        (b' ', 'Ġ'),
        (b'\n', 'Ċ'),
        (b'!', '!'),
        (0, 'Ā'),
        (0x7F, 'ġ'),
        (0xA0, 'ł'),
        (0xAD, 'Ń'),
        (0xFF, 'ÿ'),
    ];
    for (byte, c) in expected {
        assert_eq!(spelling::of_byte(byte), c, "{byte}");
    }
}

#[test]
fn padding_is_never_end_of_sequence() {
    assert_eq!(small().pad_id(), Some(260), "declared as EOS, so the unknown token");
    let mut vocabulary = small_vocabulary();
    vocabulary.unk_id = None;
    let tokenizer = Tokenizer::from_gguf(Path::new("x"), vocabulary.clone()).unwrap();
    assert_eq!(tokenizer.pad_id(), Some(261), "then BOS");
    vocabulary.tokens[260] = "<|finetune_right_pad_id|>".to_owned();
    let tokenizer = Tokenizer::from_gguf(Path::new("x"), vocabulary).unwrap();
    assert_eq!(tokenizer.pad_id(), Some(260), "one named for padding goes first");
}

#[test]
fn saved_tokenizers_load_again_with_the_same_ids() {
    let directory = tempfile::tempdir().unwrap();
    let mut vocabulary = small_vocabulary();
    vocabulary.chat_template = Some("{{ messages[0]['content'] }}".to_owned());
    let tokenizer = Tokenizer::from_gguf(Path::new("small.gguf"), vocabulary).unwrap();
    tokenizer.save(directory.path()).unwrap();
    let loaded = Tokenizer::from_directory(directory.path()).unwrap();
    let text = "Then the 3 theses…\n\n<|im_end|> é";
    assert_eq!(loaded.encode(text, true).unwrap(), tokenizer.encode(text, true).unwrap());
    assert_eq!(loaded.pad_id(), Some(260));
    assert_eq!((loaded.bos_id(), loaded.eos_id()), (Some(261), Some(262)));
    assert_eq!(loaded.template().unwrap().source(), "{{ messages[0]['content'] }}");

    // The padding token is the declared one, unless the copy is read at the last token that is none.
    let pad_token = || {
        let text = fs_err::read(directory.path().join(CONFIG_FILE)).unwrap();
        serde_json::from_slice::<Value>(&text).unwrap()["pad_token"].clone()
    };
    assert_eq!(pad_token(), "<|im_end|>");
    tokenizer.save_with_padding(directory.path()).unwrap();
    assert_eq!(pad_token(), "<|endoftext|>");

    // Byte for byte the same when saved again, and the sidecar wins over the inline template.
    fs_err::write(directory.path().join(TEMPLATE_FILE), "sidecar").unwrap();
    let loaded = Tokenizer::from_directory(directory.path()).unwrap();
    assert_eq!(loaded.template().unwrap().source(), "sidecar");
    let again = tempfile::tempdir().unwrap();
    loaded.save(again.path()).unwrap();
    for file in [TOKENIZER_FILE, SPECIAL_FILE] {
        let bytes = |directory: &Path| fs_err::read(directory.join(file)).unwrap();
        assert_eq!(bytes(directory.path()), bytes(again.path()), "{file}");
    }
}

#[test]
fn a_mistral_directory_keeps_bos_and_byte_fallback() {
    let directory = tempfile::tempdir().unwrap();
    let tokenizer = mistral();
    tokenizer.save(directory.path()).unwrap();
    let loaded = Tokenizer::from_directory(directory.path()).unwrap();
    for text in ["Hello  world </s> x", "𝒜 \n\t", " lead"] {
        assert_eq!(loaded.encode(text, true).unwrap(), tokenizer.encode(text, true).unwrap());
    }
    let ids = tokenizer.encode("für 𝒜 ", false).unwrap();
    assert_eq!(loaded.decode(&ids).unwrap(), "für 𝒜 ");
    assert!(matches!(loaded.template(), Err(Error::NoTemplate { .. })));
}

#[test]
fn a_stream_shows_characters_when_they_are_complete() {
    let tokenizer = mistral();
    let ids = tokenizer.encode("naïve 𝒜 ok", false).unwrap();
    let mut stream = tokenizer.stream();
    let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(pieces.concat(), "naïve 𝒜 ok");
    assert!(pieces.iter().all(|piece| !piece.contains('\u{FFFD}')));
    assert!(pieces.contains(&"𝒜".to_owned()) && pieces.contains(&String::new()), "{pieces:?}");
}

#[test]
fn offsets_cover_the_text_with_the_spaces() {
    for tokenizer in [small(), mistral()] {
        let text = "Is the end\n\n near? é";
        let encoded = tokenizer.encode_with_spans(text, false).unwrap();
        let mut end = 0;
        for &(start, stop) in &encoded.spans {
            assert!(start <= end && stop >= end, "{:?}", encoded.spans);
            end = stop;
        }
        assert_eq!(end, text.len());
    }
}

#[test]
fn a_regex_that_gives_up_is_noticed() {
    let tokenizer = small();
    let gap = " ".repeat(1_100_000);
    let error = tokenizer.encode(&format!("a{gap}b c d"), false).unwrap_err();
    assert!(matches!(error, Error::Tokenizer { .. }), "{error}");
    // Long words and long gaps of honest size are none of that.
    tokenizer.encode(&"x".repeat(100_000), false).unwrap();
    tokenizer.encode(&format!("a{}b", " ".repeat(20_000)), false).unwrap();
    let error = tokenizer.encode(&"x".repeat(MAX_TEXT_BYTES + 1), false).unwrap_err();
    assert!(matches!(error, Error::TextTooLong { .. }), "{error}");
}

#[test]
fn gguf_vocabularies_that_contradict_themselves_are_refused() {
    let refused = |change: fn(&mut GgufVocabulary), field: &str| {
        let mut vocabulary = small_vocabulary();
        change(&mut vocabulary);
        let error = Tokenizer::from_gguf(Path::new("bad.gguf"), vocabulary).unwrap_err();
        let message = error.to_string();
        assert!(message.contains("bad.gguf") && message.contains(field), "{message}");
    };
    refused(|v| v.pre = Some("martian".to_owned()), "tokenizer.ggml.pre: expected default");
    refused(|v| v.pre = Some("martian".to_owned()), "found martian");
    refused(|v| v.model = "bert".to_owned(), "tokenizer.ggml.model");
    refused(|v| v.tokens.clear(), "tokenizer.ggml.tokens");
    refused(|v| v.tokens[7] = "a".to_owned(), "tokenizer.ggml.tokens[97]");
    refused(|v| v.token_types.truncate(9), "tokenizer.ggml.token_type");
    refused(|v| v.eos_id = Some(263), "tokenizer.ggml.eos_token_id");
    refused(|v| v.bos_id = Some(-1), "tokenizer.ggml.bos_token_id");
    refused(|v| v.merges.push("no-space".to_owned()), "tokenizer.ggml.merges[4]");
    refused(|v| v.merges.push("Ġthe Ġthe".to_owned()), "");
    refused(|v| v.merges.push(format!("{} a", "a".repeat(99))), "tokenizer.ggml.merges[4]");
    refused(|v| v.model = "llama".to_owned(), "tokenizer.ggml.scores");
}

/// A minimal word-level tokenizer file, to be broken in one place.
fn file() -> Value {
    json!({
        "version": "1.0",
        "truncation": { "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0 },
        "padding": null,
        "added_tokens": [{ "id": 2, "content": "</s>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true }],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": { "type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "vocab": { "a": 0, "b": 1, "</s>": 2, "ab": 3 },
            "merges": [["a", "b"]] },
    })
}

fn load(file: &Value) -> Result<Tokenizer, Error> {
    let directory = tempfile::tempdir().unwrap();
    fs_err::write(directory.path().join(TOKENIZER_FILE), file.to_string()).unwrap();
    Tokenizer::from_directory(directory.path())
}

#[test]
fn truncation_in_the_file_does_not_cut_texts() {
    assert_eq!(load(&file()).unwrap().encode("abab</s>a", false).unwrap(), [3, 3, 2, 0]);
}

#[test]
fn damaged_and_hostile_files_are_refused() {
    let cases: Vec<(&str, Value, &str)> = vec![
        ("/model/vocab/b", json!(0), "model.vocab"),
        ("/model/vocab/b", json!(-1), "model.vocab"),
        ("/model/vocab/b", json!(1_u64 << 40), "model.vocab"),
        ("/model/vocab", json!("x"), "model.vocab"),
        ("/model/merges/0", json!(["a", "zzzzzzzzzzzzzzzzzzzzzzzz"]), "model.merges[0]"),
        ("/model/merges/0", json!("ab"), "model.merges[0]"),
        ("/model/merges/0", json!(["b", "a"]), "model.merges[0]"),
        ("/model/continuing_subword_prefix", json!("é"), "model.merges[0]"),
        ("/model", json!(7), "model"),
        ("/model/type", json!("Magic"), "tokenizer.json"),
        ("/version", json!("9"), "tokenizer.json"),
        ("/added_tokens/0/id", json!(1), "added_tokens[0].id"),
        ("/added_tokens/0/content", json!(""), "added_tokens[0].id"),
        ("/pre_tokenizer", json!({ "type": "FixedLength", "length": 0 }), "pre_tokenizer.length"),
        (
            "/normalizer",
            json!({ "type": "Precompiled", "precompiled_charsmap": "AAAA" }),
            "tokenizer.json",
        ),
        (
            "/pre_tokenizer",
            json!({ "type": "Split", "pattern": { "Regex": "(" }, "behavior": "Isolated", "invert": false }),
            "tokenizer.json",
        ),
    ];
    for (pointer, value, named) in cases {
        let mut file = file();
        *file.pointer_mut(pointer).unwrap() = value.clone();
        let message = load(&file).map(|_| ()).expect_err(pointer).to_string();
        assert!(
            message.contains(named) && message.contains("tokenizer.json"),
            "{value}: {message}"
        );
    }
    for text in ["", "{", "[]", "nonsense", "{\"model\": {}}"] {
        let directory = tempfile::tempdir().unwrap();
        fs_err::write(directory.path().join(TOKENIZER_FILE), text).unwrap();
        Tokenizer::from_directory(directory.path()).unwrap_err();
    }
}

#[test]
fn deep_nesting_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    fs_err::write(directory.path().join(TOKENIZER_FILE), "[".repeat(100_000)).unwrap();
    Tokenizer::from_directory(directory.path()).unwrap_err();
}

#[test]
fn a_declared_special_token_is_one() {
    let directory = tempfile::tempdir().unwrap();
    fs_err::write(directory.path().join(TOKENIZER_FILE), file().to_string()).unwrap();
    let config = |text: &str| {
        fs_err::write(directory.path().join(CONFIG_FILE), text).unwrap();
        Tokenizer::from_directory(directory.path())
    };
    let loaded = config(
        r#"{"eos_token": {"content": "</s>"}, "chat_template": [
        {"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]}"#,
    );
    let loaded = loaded.unwrap();
    assert_eq!(loaded.eos_id(), Some(2));
    assert_eq!(loaded.template().unwrap().source(), "y");
    // As in transformers, one that nobody has is added.
    let added = config(r#"{"eos_token": "<none>"}"#).unwrap();
    let id = added.token_id("<none>").unwrap();
    assert_eq!((added.eos_id(), added.is_special(id)), (Some(id), true));
    assert_eq!(added.vocab_size(), loaded.vocab_size() + 1);
    config(r#"{"chat_template": 3}"#).unwrap_err();
    config("[").unwrap_err();
}

#[test]
fn files_of_older_tokenizers_alone_are_refused_with_advice() {
    for name in ["tokenizer.model", "vocab.json"] {
        let directory = tempfile::tempdir().unwrap();
        fs_err::write(directory.path().join(name), "x").unwrap();
        let error = Tokenizer::from_directory(directory.path()).unwrap_err();
        let message = error.to_string();
        assert!(message.contains("save_pretrained") && message.contains(name), "{message}");
        assert!(matches!(error, Error::Field { .. }), "{error:?}");
    }
}

#[test]
fn what_was_not_downloaded_and_what_splits_special_tokens_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let message = || Tokenizer::from_directory(directory.path()).unwrap_err().to_string();
    fs_err::write(path(TOKENIZER_FILE), "version https://git-lfs.github.com/spec/v1\n").unwrap();
    assert!(message().contains("tokenizer.json") && message().contains("git lfs pull"));
    fs_err::write(path(TOKENIZER_FILE), file().to_string()).unwrap();
    fs_err::write(path(CONFIG_FILE), r#"{"split_special_tokens": true}"#).unwrap();
    assert!(message().contains("split_special_tokens: expected false"), "{}", message());
    fs_err::write(path(CONFIG_FILE), r#"{"split_special_tokens": false}"#).unwrap();
    Tokenizer::from_directory(directory.path()).unwrap();
}

proptest::proptest! {
    #[test]
    fn byte_level_text_survives(text in ".{0,80}") {
        let tokenizer = small();
        let ids = tokenizer.encode(&text, false).unwrap();
        proptest::prop_assert_eq!(tokenizer.decode_with_special(&ids).unwrap(), text);
    }

    #[test]
    fn no_mutilated_file_panics(at in 0_usize..700, byte: u8) {
        let mut text = file().to_string().into_bytes();
        let at = at % text.len();
        text[at] = byte;
        let directory = tempfile::tempdir().unwrap();
        fs_err::write(directory.path().join(TOKENIZER_FILE), text).unwrap();
        if let Ok(tokenizer) = Tokenizer::from_directory(directory.path()) {
            let _ = tokenizer.encode("abab</s> ab", true);
        }
    }
}

/// Files that made gigabytes of a few words, or took minutes over them.
#[test]
fn parts_that_make_texts_far_longer_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    small().save(directory.path()).unwrap();
    let path = directory.path().join("tokenizer.json");
    let honest: Value = serde_json::from_slice(&fs_err::read(&path).unwrap()).unwrap();
    let load = |part: &str, value: Value| {
        let mut json = honest.clone();
        json[part] = value;
        fs_err::write(&path, json.to_string()).unwrap();
        Tokenizer::from_directory(directory.path())
    };
    let replace = |pattern: &str, content: String| serde_json::json!({"type": "Replace", "pattern": {"String": pattern}, "content": content});
    let sequence = |key: &str, step: Value, n: usize| {
        let mut sequence = serde_json::json!({"type": "Sequence"});
        sequence[key] = vec![step; n].into();
        sequence
    };
    let times_10 = || replace("a", "a".repeat(10));
    let charsmap =
        |table: &str| serde_json::json!({"type": "Precompiled", "precompiled_charsmap": table});
    let piece = serde_json::json!({"Sequence": {"id": "A", "type_id": 0}});
    let pieces = serde_json::json!({"type": "TemplateProcessing", "single": vec![piece; 100_000], "pair": [], "special_tokens": {}});
    for (part, value) in [
        ("normalizer", replace("a", "b".repeat(100_000))),
        ("normalizer", replace("", "b".repeat(100))),
        ("normalizer", sequence("normalizers", times_10(), 2)),
        ("normalizer", serde_json::json!({"type": "Prepend", "prepend": "b".repeat(2000)})),
        ("decoder", sequence("decoders", times_10(), 12)),
        ("post_processor", pieces),
        // A trie of eight gigabytes in eleven letters, and one character that becomes two thousand.
        ("normalizer", charsmap("/////////w==")),
        ("normalizer", charsmap("/////w==")),
        ("normalizer", sequence("normalizers", charsmap("/////////w=="), 1)),
        ("normalizer", charsmap(&format!("BAAAAAAAAAA{}", "B".repeat(4096)))),
    ] {
        let refused = load(part, value).unwrap_err().to_string();
        assert!(refused.contains(part) && refused.contains("expected"), "{refused}");
    }
    load("normalizer", sequence("normalizers", replace(" ", "▁".to_owned()), 3)).unwrap();
    load("normalizer", serde_json::json!({"type": "Prepend", "prepend": "▁"})).unwrap();
}
