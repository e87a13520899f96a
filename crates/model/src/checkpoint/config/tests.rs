//! Tests of reading and writing model configurations.

use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::checkpoint::config::gguf::decimal;
use crate::checkpoint::gguf::{self, Metadata};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

/// A small Llama, with `changes` applied (null removes a key).
fn llama(changes: Value) -> Result<ModelConfig, Error> {
    let mut map = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 96,
        "max_position_embeddings": 64, "rope_theta": 50000.0, "eos_token_id": 2,
    });
    let map = map.as_object_mut().unwrap();
    for (key, value) in changes.as_object().unwrap() {
        map.insert(key.clone(), value.clone());
    }
    ModelConfig::from_json(Path::new("config.json"), map)
}

fn message(changes: Value) -> String {
    llama(changes).unwrap_err().to_string()
}

#[test]
fn files_of_transformers_are_read() {
    for name in ["llama_tied_v4", "llama_tied_v5"] {
        let config = ModelConfig::from_directory(&golden(name)).unwrap();
        assert_eq!(config.family, Family::Llama);
        assert_eq!(config.rope_theta, 50000.0, "{name}");
        assert_eq!(config.rope_scaling, None);
        assert!(config.tie_word_embeddings && !config.sequence_classification);
        assert_eq!((config.hidden_size, config.intermediate_size), (32, 48));
        assert_eq!((config.num_heads, config.num_kv_heads, config.head_size), (4, 2, 12));
        assert_eq!((config.num_layers, config.vocab_size), (2, 96));
        assert_eq!(config.rms_norm_eps, 1e-5);
        assert_eq!(config.eos_token_ids, [2]);
        assert_eq!((config.bos_token_id, config.pad_token_id), (Some(1), Some(0)));
        assert_eq!(config.sliding_window, None);
    }
    let config = ModelConfig::from_directory(&golden("mistral_sliding")).unwrap();
    assert_eq!((config.family, config.sliding_window), (Family::Mistral, Some(8)));
    assert_eq!((config.rope_theta, config.tie_word_embeddings), (1e6, false));
}

#[test]
fn absent_keys_mean_what_transformers_says() {
    // LlamaConfig() and MistralConfig() of transformers 5.23.
    let config =
        llama(json!({"num_key_value_heads": null, "rope_theta": null, "eos_token_id": null}));
    let config = config.unwrap();
    assert_eq!((config.num_kv_heads, config.head_size, config.rope_theta), (4, 8, 10_000.0));
    assert!(config.eos_token_ids.is_empty() && config.sliding_window.is_none());
    let mistral = json!({"architectures": ["MistralForCausalLM"], "model_type": "mistral"});
    assert_eq!(llama(mistral).unwrap().sliding_window, Some(4096));
    let mistral = json!({"architectures": ["MistralForCausalLM"], "model_type": null, "sliding_window": null});
    assert_eq!(llama(mistral).unwrap().sliding_window, None);
    let mistral = json!({"architectures": null, "model_type": "mistral", "sliding_window": 128});
    assert_eq!(llama(mistral).unwrap().sliding_window, Some(128));
    // A Llama with the key runs without a window in transformers too.
    assert_eq!(llama(json!({"sliding_window": 128})).unwrap().sliding_window, None);
    assert_eq!(llama(json!({"pad_token_id": -1})).unwrap().pad_token_id, None);
    let plain = json!({"partial_rotary_factor": 1.0, "rope_scaling": {"rope_theta": 50000.0}});
    assert_eq!(llama(plain).unwrap().rope_scaling, None);
}

#[test]
fn ends_of_text_come_from_both_files() {
    let directory = tempfile::tempdir().unwrap();
    let config = golden("llama_tied_v5");
    fs_err::copy(config.join("config.json"), directory.path().join("config.json")).unwrap();
    let generation = directory.path().join("generation_config.json");
    fs_err::write(&generation, r#"{"eos_token_id": [2, 5]}"#).unwrap();
    let config = ModelConfig::from_directory(directory.path()).unwrap();
    assert_eq!(config.eos_token_ids, [2, 5]);
    fs_err::write(&generation, r#"{"eos_token_id": [2, 1099511627776]}"#).unwrap();
    let message = ModelConfig::from_directory(directory.path()).unwrap_err().to_string();
    let (named, found) = ("generation_config.json: eos_token_id", "found 1099511627776");
    assert!(message.contains(named) && message.contains(found), "{message}");
    fs_err::write(&generation, r#"{"eos_token_id": "two"}"#).unwrap();
    let message = ModelConfig::from_directory(directory.path()).unwrap_err().to_string();
    assert!(message.contains("generation_config.json: eos_token_id"), "{message}");
}

#[test]
fn reward_models_carry_their_score_statistics() {
    let config = llama(json!({
        "architectures": ["LlamaForSequenceClassification"], "score_mean": 0.5, "score_std": 2.0,
    }));
    let config = config.unwrap();
    assert!(config.sequence_classification);
    assert_eq!(config.score_stats, Some((0.5, 2.0)));
    assert!(message(json!({"score_mean": 0.5})).contains("score_std"));
    assert!(message(json!({"score_mean": 0.5, "score_std": 0.0})).contains("score_std"));
    assert!(message(json!({"score_std": 1.0})).contains("score_mean"));
}

#[test]
fn what_is_not_supported_is_named() {
    let text = message(json!({"architectures": ["Qwen2ForCausalLM"]}));
    assert_eq!(
        text,
        "config.json: architectures: unsupported architecture Qwen2ForCausalLM, supported: \
         LlamaForCausalLM, MistralForCausalLM, LlamaForSequenceClassification, \
         MistralForSequenceClassification"
    );
    for (changes, words) in [
        (json!({"hidden_size": null}), "hidden_size: expected a positive integer, found null"),
        (
            json!({"hidden_size": "32"}),
            "hidden_size: expected a positive integer below 2^31, found \"32\"",
        ),
        (json!({"num_hidden_layers": 0}), "num_hidden_layers"),
        (json!({"num_hidden_layers": 1_000_000}), "at most 1024, found 1000000"),
        (json!({"vocab_size": -1}), "vocab_size"),
        (
            json!({"max_position_embeddings": 1 << 24, "head_dim": 128}),
            "max_position_embeddings: expected at most 1048576 at heads of 128, found 16777216",
        ),
        (json!({"num_attention_heads": 3}), "head_dim"),
        (json!({"num_key_value_heads": 3}), "a divisor of 4 heads, found 3"),
        (json!({"head_dim": 7}), "an even size, found 7"),
        (json!({"attention_bias": true}), "attention_bias"),
        (json!({"mlp_bias": true}), "mlp_bias"),
        (json!({"hidden_act": "gelu"}), "hidden_act: expected silu, found \"gelu\""),
        (json!({"rms_norm_eps": 0.0}), "rms_norm_eps"),
        (json!({"rope_theta": -1.0}), "rope_theta"),
        (json!({"tie_word_embeddings": "yes"}), "tie_word_embeddings"),
        (json!({"eos_token_id": [1, "2"]}), "eos_token_id"),
        (json!({"eos_token_id": 96}), "special token ids"),
        (
            json!({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),
            "rope_type: expected default, linear or llama3, found \"yarn\"",
        ),
        (json!({"rope_scaling": {"type": "linear"}}), "factor: expected a number, found nothing"),
        (json!({"rope_scaling": {"type": "linear", "factor": 0.5}}), "factor 0.5"),
        (json!({"rope_scaling": [1]}), "rope_scaling: expected an object"),
        (
            json!({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
            "rope_theta: expected rope_theta 10000",
        ),
        (
            json!({"rope_parameters": {"rope_theta": 50000.0, "partial_rotary_factor": 0.5}}),
            "partial_rotary_factor",
        ),
        (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor: expected 1"),
        (
            json!({"rope_scaling": {"factor": 4.0}}),
            "rope_type: expected default, linear or llama3 beside `factor`, found nothing",
        ),
        (
            json!({"rope_parameters": {"rope_theta": 50000.0, "factor": 4.0}}),
            "rope_type: expected default, linear or llama3 beside `factor`, found nothing",
        ),
        (
            json!({"rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}}}),
            "full_attention: expected no map",
        ),
        (
            json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}),
            "quant_method: expected bitsandbytes",
        ),
        (
            json!({"quantization_config": {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "fp4"}}),
            "expected nf4, found \"fp4\"",
        ),
        (
            json!({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": true}}),
            "load_in_8bit: expected four-bit NF4",
        ),
    ] {
        let text = message(changes);
        assert!(text.starts_with("config.json: ") && text.contains(words), "{text}");
    }
}

/// AutoModelForCausalLM of transformers 5.23 loads a Mistral where `model_type` says so, and a Ministral for `layer_types`.
#[test]
fn keys_by_which_transformers_takes_another_model_are_refused() {
    for (architecture, model_type) in
        [("MistralForCausalLM", "llama"), ("LlamaForCausalLM", "mistral")]
    {
        let text = message(json!({"architectures": [architecture], "model_type": model_type}));
        assert!(text.contains("model_type: expected") && text.contains(architecture), "{text}");
        assert!(text.ends_with(&format!("found \"{model_type}\"")), "{text}");
    }
    let mistral = |window: Value, types: Value| {
        llama(
            json!({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window,
            "layer_types": types}),
        )
    };
    let (full, sliding) = ("full_attention", "sliding_attention");
    assert_eq!(mistral(json!(4), json!([sliding, sliding])).unwrap().sliding_window, Some(4));
    assert_eq!(mistral(json!(null), json!([full, full])).unwrap().sliding_window, None);
    assert_eq!(mistral(json!(4), json!(null)).unwrap().sliding_window, Some(4));
    for (window, types) in [
        (json!(4), json!([full, sliding])),
        (json!(4), json!([full, full])),
        (json!(null), json!([sliding, sliding])),
        (json!(4), json!([sliding])),
        (json!(4), json!(sliding)),
    ] {
        let text = mistral(window, types).unwrap_err().to_string();
        assert!(text.contains("layer_types: expected 2 times"), "{text}");
    }
    assert!(llama(json!({"layer_types": [full, sliding]})).is_ok(), "transformers' Llama has none");
}

#[test]
fn json_that_is_none_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.json");
    let message = |content: &str| {
        fs_err::write(&path, content).unwrap();
        ModelConfig::from_directory(directory.path()).unwrap_err().to_string()
    };
    for content in ["", "{", "[]", "null", "\u{feff}{}", &"[".repeat(1000)] {
        let text = message(content);
        assert!(text.contains("config.json: content: expected"), "{content:?}: {text}");
    }
    fs_err::remove_file(&path).unwrap();
    let text = ModelConfig::from_directory(directory.path()).unwrap_err().to_string();
    assert!(text.contains("config.json"), "{text}");
}

const LLAMA3: RopeScaling = RopeScaling::Llama3 {
    factor: 32.0,
    low_freq_factor: 1.0,
    high_freq_factor: 4.0,
    original_max_position_embeddings: 8192,
};

fn llama32(scaling: Option<RopeScaling>) -> ModelConfig {
    let config = llama(json!({"head_dim": 64, "rope_theta": 500_000.0})).unwrap();
    ModelConfig { rope_scaling: scaling, ..config }
}

#[test]
fn stretched_frequencies_are_transformers() {
    // ROPE_INIT_FUNCTIONS["llama3"] and ["linear"] of transformers 5.23.
    let expected: [f32; 32] = [
        1.0,
        0.663_601_3,
        0.440_366_63,
        0.292_227_83,
        0.193_922_76,
        0.128_687_38,
        0.085_397_1,
        0.056_669_62,
        0.037_606_03,
        0.024_955_409,
        0.016_560_44,
        0.010_989_529,
        0.007_292_665,
        0.004_839_421_2,
        0.003_211_446,
        0.001_290_548,
        0.000_429_556_7,
        9.708_286e-5,
        1.946_163_9e-5,
        1.291_476_75e-5,
        8.570_256e-6,
        5.687_232_3e-6,
        3.774_054_4e-6,
        2.504_467_1e-6,
        1.661_967_4e-6,
        1.102_883_6e-6,
        7.318_749_3e-7,
        4.856_731e-7,
        3.222_933e-7,
        2.138_742_3e-7,
        1.419_272e-7,
        9.418_306_5e-8,
    ];
    for (ours, theirs) in llama32(Some(LLAMA3)).inverse_frequencies().into_iter().zip(expected) {
        assert!((ours - theirs).abs() <= 1e-6 * theirs, "{ours} {theirs}");
    }
    let config = llama(json!({"head_dim": 16, "rope_theta": 10_000.0,
        "rope_scaling": {"type": "linear", "factor": 4.0}}));
    let expected = [
        0.25,
        0.079_056_94,
        0.025,
        0.007_905_695,
        0.002_5,
        0.000_790_569_47,
        0.000_25,
        7.905_695e-5,
    ];
    for (ours, theirs) in config.unwrap().inverse_frequencies().into_iter().zip(expected) {
        assert!((ours - theirs).abs() <= 1e-6 * theirs, "{ours} {theirs}");
    }
}

#[test]
fn divisors_of_gguf_files_are_recognised() {
    // `rope_freqs` as llama.cpp's converter computes it for Llama 3.2 1B.
    let mut factors = [1.0; 32];
    factors[15..18].copy_from_slice(&[1.651_329_3, 3.292_262_8, 9.666_731]);
    factors[18..].fill(32.0);
    let mut config = llama32(None);
    config.set_rope_factors(Path::new("x.gguf"), "rope_freqs.weight", &factors).unwrap();
    assert_eq!(config.rope_scaling, Some(LLAMA3));
    for wrong in [&factors[..31], &[1.0; 32], &[f32::NAN; 32]] {
        let mut config = llama32(None);
        let error = config.set_rope_factors(Path::new("x.gguf"), "rope_freqs.weight", wrong);
        assert!(error.unwrap_err().to_string().contains("x.gguf: rope_freqs.weight"));
        assert_eq!(config.rope_scaling, None);
    }
}

/// A GGUF file's metadata with `changes`.
fn of_gguf(changes: &[(&str, gguf::Value)]) -> Result<ModelConfig, Error> {
    use gguf::Value::{Float, String, Unsigned};
    let plain = [
        ("general.architecture", String("llama".to_owned())),
        ("llama.embedding_length", Unsigned(32)),
        ("llama.attention.head_count", Unsigned(4)),
        ("llama.feed_forward_length", Unsigned(48)),
        ("llama.block_count", Unsigned(2)),
        ("llama.context_length", Unsigned(64)),
        ("llama.attention.layer_norm_rms_epsilon", Float(f64::from(1e-5f32))),
    ];
    let entries = plain.iter().chain(changes);
    let entries = entries.map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
    ModelConfig::from_gguf(&Metadata::new(Path::new("x.gguf"), entries), true, 96)
}

/// llama.cpp, `llama_model::load_hparams`: the type is linear unless named, `rope.scale_linear` is the old factor.
#[test]
fn linear_scaling_of_gguf_files_needs_no_type() {
    use gguf::Value::{Float, String, Unsigned};
    let kind = |name: &str| ("llama.rope.scaling.type", String(name.to_owned()));
    let (factor, old) = ("llama.rope.scaling.factor", "llama.rope.scale_linear");
    let four = Some(RopeScaling::Linear { factor: 4.0 });
    for (changes, expected) in [
        (vec![], None),
        (vec![(factor, Float(4.0))], four),
        (vec![(old, Float(4.0))], four),
        (vec![(factor, Float(4.0)), (old, Float(8.0))], four),
        (vec![kind("linear"), (factor, Float(4.0))], four),
        (vec![kind("linear"), (old, Unsigned(4))], four),
        (vec![kind("linear")], None),
        (vec![kind("none"), (factor, Float(4.0))], None),
        (vec![(factor, Float(0.0))], None),
        (vec![(factor, Float(1.0))], None),
    ] {
        assert_eq!(of_gguf(&changes).unwrap().rope_scaling, expected, "{changes:?}");
    }
    let text = of_gguf(&[kind("yarn"), (factor, Float(4.0))]).unwrap_err().to_string();
    assert!(text.contains("rope.scaling.type: expected none or linear"), "{text}");
    let mut config = of_gguf(&[(factor, Float(4.0))]).unwrap();
    let table = config.set_rope_factors(Path::new("x.gguf"), "rope_freqs.weight", &[1.0; 4]);
    assert!(table.unwrap_err().to_string().contains("no other scaling"));
}

#[test]
fn numbers_kept_as_f32_are_read_as_written() {
    assert_eq!(decimal(f64::from(1e-5f32)), 1e-5);
    assert_eq!(decimal(100_000.0), 100_000.0);
    assert_eq!(decimal(0.1), 0.1);
}

#[test]
fn files_that_transformers_4_and_5_were_asked_about_are_written() {
    // `scripts/goldens/config_json.py` holds what both make of these files.
    let text = |name: &str| fs_err::read_to_string(golden("config").join(name)).unwrap();
    let written = |config: &ModelConfig, kind| {
        format!("{}\n", serde_json::to_string_pretty(&Value::Object(config.to_json(kind))).unwrap())
    };
    let common = ModelConfig {
        tie_word_embeddings: true,
        bos_token_id: Some(1),
        eos_token_ids: vec![2, 5],
        pad_token_id: Some(0),
        ..llama32(Some(LLAMA3))
    };
    assert_eq!(written(&common, tch::Kind::BFloat16), text("llama3.json"));
    let reward = ModelConfig {
        family: Family::Mistral,
        sequence_classification: true,
        tie_word_embeddings: false,
        head_size: 8,
        rope_theta: 1e6,
        rope_scaling: None,
        eos_token_ids: vec![2],
        score_stats: Some((0.1, 0.3)),
        ..common
    };
    assert_eq!(written(&reward, tch::Kind::Float), text("mistral_reward.json"));
}

fn scalings() -> impl Strategy<Value = Option<RopeScaling>> {
    prop_oneof![
        Just(None),
        (1u32..40).prop_map(|n| Some(RopeScaling::Linear { factor: f64::from(n) / 8.0 + 1.0 })),
        Just(Some(LLAMA3)),
    ]
}

proptest! {
    #[test]
    fn what_is_written_is_read_again(
        mistral: bool, reward: bool, tied: bool, layers in 1usize..9, kv in 1usize..4, group in 1usize..4,
        half in 1usize..9, window in proptest::option::of(1usize..100), rope_scaling in scalings(),
        eos in proptest::collection::vec(0i64..96, 0..3), pad in proptest::option::of(0i64..96),
        stats in proptest::option::of((-5.0f64..5.0, 0.1f64..5.0)),
    ) {
        let mut eos = eos;
        eos.dedup();
        let config = ModelConfig {
            family: if mistral { Family::Mistral } else { Family::Llama },
            sequence_classification: reward, vocab_size: 96, hidden_size: 32, intermediate_size: 48,
            num_layers: layers, num_heads: kv * group, num_kv_heads: kv, head_size: 2 * half,
            rms_norm_eps: 1e-5, rope_theta: 123_456.0, rope_scaling,
            sliding_window: if mistral { window } else { None },
            max_position_embeddings: 64, tie_word_embeddings: tied, bos_token_id: Some(1),
            eos_token_ids: eos, pad_token_id: pad, score_stats: stats,
        };
        let text = Value::Object(config.to_json(tch::Kind::BFloat16)).to_string();
        let Value::Object(map) = serde_json::from_str(&text).unwrap() else { unreachable!() };
        prop_assert_eq!(ModelConfig::from_json(Path::new("x"), &map).unwrap(), config);
    }

    #[test]
    fn any_values_give_a_configuration_or_an_error(
        key in proptest::sample::select(vec![
            "architectures", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
            "rope_theta", "rope_scaling", "rope_parameters", "eos_token_id", "vocab_size", "quantization_config",
            "rms_norm_eps", "sliding_window", "score_mean", "pad_token_id",
        ]),
        value in proptest::sample::select(vec![
            json!(null), json!(-1), json!(0), json!(1), json!(3), json!(u64::MAX), json!(1e300), json!("x"), json!([]),
            json!([1]), json!({}), json!({"rope_type": 1}), json!({"rope_type": "llama3", "factor": 0}), json!(true),
        ]),
    ) {
        let _ = llama(json!({key: value}));
    }
}
