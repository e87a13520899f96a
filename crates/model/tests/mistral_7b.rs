//! Everything of Mistral-7B-Instruct-v0.2 but its weights: published configuration, tokenizer and chat template, as the script of
//! `make bench-7b` writes them, against what transformers and mistral-common make of them.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use arete_model::Family;
use arete_model::{Chat, ChatTemplate, ModelConfig, Tokenizer};
use arete_records::Message;
use serde_json::Value;

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

fn golden(name: &str) -> Value {
    let bytes = fs_err::read(goldens().join(name)).unwrap();
    let mut text = String::new();
    match name.ends_with(".gz") {
        true => flate2::read::GzDecoder::new(&bytes[..]).read_to_string(&mut text).unwrap(),
        false => (&bytes[..]).read_to_string(&mut text).unwrap(),
    };
    serde_json::from_str(&text).unwrap()
}

/// The directory that the script writes, without weights.
fn written() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let script =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/bench/random_mistral.py");
    let output = Command::new("python3")
        .arg(script)
        .arg(directory.path())
        .arg("--no-weights")
        .output()
        .expect("`make setup` needs python3 as well");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    directory
}

#[test]
fn the_configuration_is_the_published_one() {
    let directory = written();
    let published = golden("config/mistral_7b_instruct_v0.2.json");
    let text = fs_err::read_to_string(directory.path().join("config.json")).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), published);
    let config = ModelConfig::from_directory(directory.path()).unwrap();
    assert_eq!((config.family, config.sliding_window), (Family::Mistral, None));
    assert_eq!((config.hidden_size, config.intermediate_size), (4096, 14_336));
    assert_eq!((config.num_layers, config.num_heads, config.num_kv_heads), (32, 32, 8));
    assert_eq!((config.head_size, config.vocab_size), (128, 32_000));
    assert_eq!((config.rope_theta, config.rms_norm_eps), (1e6, 1e-5));
    assert_eq!((config.max_position_embeddings, config.tie_word_embeddings), (32_768, false));
    assert_eq!((config.bos_token_id, config.eos_token_ids.as_slice()), (Some(1), &[2][..]));
    // 7,241,732,096 parameters, as the hub's page says.
    let sizes =
        config.expected_tensors().into_iter().map(|(_, shape)| shape.iter().product::<i64>());
    assert_eq!(sizes.sum::<i64>(), 7_241_732_096);
}

#[test]
fn the_tokenizer_gives_the_ids_of_transformers() {
    let directory = written();
    let tokenizer = Tokenizer::from_directory(directory.path()).unwrap();
    let golden = golden("tokenizer_mistral.json.gz");
    let texts = golden["texts"].as_array().unwrap();
    assert_eq!(texts.len(), 500);
    for (text, ids) in texts.iter().zip(golden["ids"].as_array().unwrap()) {
        let expected: Vec<i64> = serde_json::from_value(ids.clone()).unwrap();
        assert_eq!(tokenizer.encode(text.as_str().unwrap(), false).unwrap(), expected, "{text}");
    }
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(1), Some(2)));
}

/// mistral-common defines the format; the published template of 2024 gives its ids for every conversation, that of 2023 (which
/// puts no space around replies) for a single question.
#[test]
fn both_published_templates_render_and_one_refuses_a_system_role() {
    let directory = written();
    let tokenizer = Tokenizer::from_directory(directory.path()).unwrap();
    let later = tokenizer.template().unwrap();
    let source = golden("templates.json")["templates"]["mistral_2023"].as_str().unwrap().to_owned();
    let variables =
        [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(name, text)| (name, text.to_owned()));
    let earlier = ChatTemplate::new(Path::new("2023"), &source, variables.to_vec()).unwrap();
    assert!(earlier.refuses_system() && !later.refuses_system());
    let chat = Chat::new(&tokenizer, &later).unwrap();
    for case in golden("tokenizer_mistral.json.gz")["chat"].as_array().unwrap() {
        let texts: Vec<String> = serde_json::from_value(case["turns"].clone()).unwrap();
        let expected: Vec<i64> = serde_json::from_value(case["ids"].clone()).unwrap();
        let turn = |(i, text): (usize, &String)| match i % 2 {
            0 => Message::user(text),
            _ => Message::assistant(text),
        };
        let messages: Vec<Message> = texts.iter().enumerate().map(turn).collect();
        assert_eq!(chat.render_prompt(&messages).unwrap(), expected, "{texts:?}");
    }
    // A system text reaches both models: as the template has it, or before the first question.
    let messages = [Message::system("Be kind."), Message::user("Hi"), Message::assistant("Yo")];
    for template in [&earlier, &later] {
        let chat = Chat::new(&tokenizer, template).unwrap();
        assert_eq!(chat.prepends_system(&messages), template.refuses_system());
        let text = tokenizer.decode(&chat.render(&messages).unwrap().token_ids).unwrap();
        assert!(text.contains("Be kind.\n\nHi"), "{text}");
    }
}
