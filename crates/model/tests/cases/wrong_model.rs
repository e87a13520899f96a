//! Directories that were taken for another model than they are.

use arete_model::checkpoint::safetensors::SafetensorsFile;
use arete_model::{Batch, Checkpoint, Device, ModelConfig, Source, Tensor, adapter, no_grad_guard};
use serde_json::{Value, json};

use crate::common::*;

fn set(path: &std::path::Path, key: &str, value: Value) {
    edit(path, |map| drop(map.insert(key.to_owned(), value)));
}

/// transformers 5 ties only what is equal: the numbers are those of the same model with `tie_word_embeddings` false, whose logits
/// the golden holds.
#[test]
fn a_head_that_differs_is_not_tied() {
    let scratch = Scratch::new();
    let model = scratch.copy(&golden("llama_untied"), "model");
    set(&model.join("config.json"), "tie_word_embeddings", json!(true));
    let expected = SafetensorsFile::open(&golden("llama_untied/golden.safetensors")).unwrap();
    let ids = Vec::<i64>::try_from(expected.tensor("ids").unwrap().view([-1])).unwrap();
    let logits = |directory: &std::path::Path| {
        let _guard = no_grad_guard();
        let model = load(directory).unwrap();
        let hidden = model.decoder.forward(&Batch::from_sequences(&[&ids]), None).unwrap();
        model.decoder.logits(&hidden).unwrap()
    };
    let difference =
        (logits(&model) - expected.tensor("logits").unwrap().squeeze_dim(0)).abs().max();
    assert!(difference.double_value(&[]) <= 1e-5, "{difference:?}");
    // Copies keep it.
    let (adapter, merged) = (golden("peft/causal"), scratch.at("merged"));
    prints(&[
        "merge",
        "--model",
        text(&model),
        "--adapter",
        text(&adapter),
        "--dtype",
        "f32",
        "--output",
        text(&merged),
    ]);
    assert_eq!(object(&merged.join("config.json"))["tie_word_embeddings"], json!(false));
    let source = SafetensorsFile::open(&weights(&model)).unwrap().tensor("lm_head.weight").unwrap();
    let copied =
        SafetensorsFile::open(&weights(&merged)).unwrap().tensor("lm_head.weight").unwrap();
    assert!(source.equal(&copied));
    // An equal one is the embedding.
    let embedding = SafetensorsFile::open(&weights(&model))
        .unwrap()
        .tensor("model.embed_tokens.weight")
        .unwrap();
    let tied =
        |name: &str, tensor| Some(if name == "lm_head.weight" { embedding.copy() } else { tensor });
    rewrite(&model, tied, Vec::new());
    assert!(Checkpoint::open(&Source::Directory(model)).unwrap().config().tie_word_embeddings);
}

#[test]
fn a_key_that_changes_the_formula_is_refused_by_name() {
    let scratch = Scratch::new();
    let config = ModelConfig::from_directory(&golden("llama_untied")).unwrap();
    let adapter = scratch.copy(&golden("peft/causal"), "adapter");
    let path = adapter.join("adapter_config.json");
    let original = fs_err::read(&path).unwrap();
    let load = || adapter::load(&adapter, "x", &config, Device::Cpu);
    load().unwrap();
    for (key, value) in [
        ("alora_invocation_tokens", json!([1, 2])),
        ("layer_replication", json!([[0, 2], [0, 2]])),
        ("use_dora", json!(true)),
        ("rank_pattern", json!({"q_proj": 8})),
        ("alpha_pattern", json!({"q_proj": 8})),
        ("bias", json!("lora_only")),
        ("lora_bias", json!(true)),
        ("fan_in_fan_out", json!(true)),
        ("use_qalora", json!(true)),
        ("use_bdlora", json!({"nblocks": 2})),
        ("target_parameters", json!(["mlp.experts"])),
        ("trainable_token_indices", json!([1])),
        ("kasa_config", json!({"beta": 1})),
        ("arrow_config", json!({"top_k": 2})),
        ("megatron_config", json!({"a": 1})),
        ("ensure_weight_tying", json!(true)),
        ("a_key_of_tomorrow", json!(false)),
        ("another_of_tomorrow", json!(3)),
        ("use_rslora", json!("yes")),
        ("lora_alpha", json!("NaN")),
        ("peft_type", json!("LOHA")),
    ] {
        fs_err::write(&path, &original).unwrap();
        set(&path, key, value);
        let error = load().unwrap_err().to_string();
        assert!(error.contains(key), "{key}: {error}");
        let base = golden("llama_untied");
        let lines = scratch.line(&json!({"text": "hello"}));
        if key.starts_with('a') {
            let arguments = [
                "logprobs",
                "--model",
                text(&base),
                "--adapter",
                text(&adapter),
                "--jsonl",
                text(&lines),
            ];
            refuses(&arguments, 65, &[key]);
        }
    }
    for (key, value) in [
        ("a_key_of_tomorrow", json!(null)),
        ("alora_invocation_tokens", json!(null)),
        ("layer_replication", json!([])),
        ("runtime_config", json!({"ephemeral_gpu_offload": true})),
        ("layers_to_transform", json!([0, 1])),
        ("peft_version", json!("9.9")),
    ] {
        fs_err::write(&path, &original).unwrap();
        set(&path, key, value);
        load().unwrap_or_else(|error| panic!("{key}: {error}"));
    }
    // peft leaves tensors unread on layers that the configuration leaves out.
    for (key, value) in [
        ("target_modules", json!(["q_proj"])),
        ("exclude_modules", json!(["model.layers.1.mlp.up_proj"])),
        ("layers_to_transform", json!(0)),
    ] {
        fs_err::write(&path, &original).unwrap();
        set(&path, key, value);
        assert!(load().unwrap_err().to_string().contains(key), "{key}");
    }
}

#[test]
fn an_adapter_beside_a_model_is_not_passed_over() {
    let scratch = Scratch::new();
    let both = scratch.copy(&golden("llama_untied"), "both");
    scratch.copy(&golden("peft/causal"), "both");
    let lines = scratch.line(&json!({"text": "hello"}));
    refuses(
        &["logprobs", "--model", text(&both), "--jsonl", text(&lines)],
        65,
        &["adapter_config.json", "--adapter"],
    );
    refuses(
        &["quantize", "--model", text(&both), "--output", text(&scratch.at("out"))],
        65,
        &["--adapter"],
    );
    assert_eq!(scratch.names(), ["both", "lines.jsonl"]);
}

#[test]
fn a_reward_model_does_not_speak() {
    let scratch = Scratch::new();
    let reward = golden("peft/merged");
    let lines = scratch.line(&json!({"text": "hello"}));
    for command in ["logprobs", "generate"] {
        let arguments = [command, "--model", text(&reward), "--jsonl", text(&lines)];
        refuses(&arguments, 65, &["architectures", "reward model"]);
    }
    refuses(&["generate", "--model", text(&reward), "--prompt", "Hi"], 65, &["reward model"]);
    // A language model's adapter makes nothing of it, and nothing is left.
    let adapter = scratch.copy(&golden("peft/causal"), "adapter");
    let output = scratch.at("merged");
    let arguments = [
        "merge",
        "--model",
        text(&reward),
        "--adapter",
        text(&adapter),
        "--dtype",
        "f32",
        "--output",
        text(&output),
    ];
    refuses(&arguments, 65, &["task_type", "SEQ_CLS"]);
    assert_eq!(scratch.names(), ["adapter", "lines.jsonl"]);
    // One of a reward model that brings no head leaves it its own, as peft's merge does.
    set(&adapter.join("adapter_config.json"), "task_type", json!("SEQ_CLS"));
    prints(&arguments);
    let (before, after) = (
        SafetensorsFile::open(&weights(&reward)).unwrap(),
        SafetensorsFile::open(&weights(&output)).unwrap(),
    );
    assert!(before.tensor("score.weight").unwrap().equal(&after.tensor("score.weight").unwrap()));
    assert_eq!(
        object(&output.join("config.json"))["architectures"],
        json!(["LlamaForSequenceClassification"])
    );
    assert!(
        !before
            .tensor("model.layers.0.self_attn.q_proj.weight")
            .unwrap()
            .equal(&after.tensor("model.layers.0.self_attn.q_proj.weight").unwrap())
    );
}

#[test]
fn a_base_is_its_weights_and_its_configuration() {
    let scratch = Scratch::new();
    let model = scratch.copy(&tiny_chat(), "model");
    let sum = |directory: &std::path::Path| {
        Checkpoint::open(&Source::Directory(directory.to_owned())).unwrap().sha256().unwrap()
    };
    let original = sum(&model);
    assert_eq!(load(&model).unwrap().base_sha256, original);
    // What a download, a card or a tokenizer's setting adds.
    fs_err::write(model.join("README.md"), "# A card").unwrap();
    fs_err::create_dir_all(model.join("original")).unwrap();
    fs_err::write(model.join("original/params.json"), "{}").unwrap();
    set(&model.join("generation_config.json"), "eos_token_id", json!([2, 0]));
    set(&model.join("tokenizer_config.json"), "model_max_length", json!(77));
    let config = fs_err::read_to_string(model.join("config.json")).unwrap();
    fs_err::write(model.join("config.json"), format!("\n{}\n\n", config.replace(',', " ,")))
        .unwrap();
    assert_eq!(sum(&model), original);
    // What makes it another.
    for (key, value) in [("rms_norm_eps", json!(1e-4)), ("rope_theta", json!(123.0))] {
        let other = scratch.copy(&tiny_chat(), "other");
        edit(&other.join("config.json"), |config| {
            if key == "rope_theta" {
                config.remove("rope_parameters");
            }
            config.insert(key.to_owned(), value);
        });
        assert_ne!(sum(&other), original, "{key}");
    }
    let other = scratch.copy(&tiny_chat(), "other");
    rewrite(
        &other,
        |name, tensor| Some(if name == "model.norm.weight" { tensor * 1.01 } else { tensor }),
        Vec::new(),
    );
    assert_ne!(sum(&other), original);
    // Adapters that earlier versions wrote know the sum of all files.
    let plain = load(&tiny_chat()).unwrap();
    assert!(plain.is_base(&arete_records::hashes::sha256_path(tiny_chat()).unwrap()).unwrap());
    assert!(!plain.is_base(&"0".repeat(64)).unwrap());
}

#[test]
fn four_bits_are_read_however_they_are_stored() {
    let scratch = Scratch::new();
    let line = json!({"text": "hello there"});
    let packed = golden("nf4_llama_double");
    let (_, expected) = logprobs(&scratch, &packed, &line, &[]);
    // The same bytes under other names (bnb_4bit_quant_storage).
    for (storage, width) in [("BF16", 2), ("F16", 2), ("F32", 4)] {
        let model = scratch.copy(&packed, "stored");
        let path = weights(&model);
        let bytes = fs_err::read(&path).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut parsed: serde_json::Map<String, Value> =
            serde_json::from_slice(&bytes[8..8 + header]).unwrap();
        for (name, entry) in &mut parsed {
            if name.ends_with("_proj.weight") {
                let n: u64 = entry["shape"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|n| n.as_u64().unwrap())
                    .product();
                entry["dtype"] = json!(storage);
                entry["shape"] = json!([n / width, 1]);
            }
        }
        let mut text = Value::Object(parsed).to_string();
        while !text.len().is_multiple_of(8) {
            text.push(' ');
        }
        let whole = [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &bytes[8 + header..]]
            .concat();
        fs_err::write(&path, whole).unwrap();
        assert_eq!(logprobs(&scratch, &model, &line, &[]).1, expected, "{storage}");
    }
    // Single matrices left dense: here with the very numbers that the four bits stand for.
    let checkpoint = Checkpoint::open(&Source::Directory(packed.clone())).unwrap();
    for name in ["model.layers.1.mlp.gate_proj.weight", "model.layers.0.self_attn.q_proj.weight"] {
        let model = scratch.copy(&packed, "mixed");
        let dense = checkpoint.tensor(name).unwrap();
        let without = |known: &str, tensor: Tensor| (!known.starts_with(name)).then_some(tensor);
        rewrite(&model, without, vec![(name, dense)]);
        let (_, found) = logprobs(&scratch, &model, &line, &[]);
        assert!(largest(&found, &expected) <= 1e-5, "{name}: {found:?} {expected:?}");
    }
    // Eight bits are named.
    let model = scratch.copy(&packed, "int8");
    edit(&model.join("config.json"), |config| {
        config["quantization_config"] = json!({"load_in_8bit": true, "quant_method": "bitsandbytes", "bnb_4bit_quant_type": "fp4"});
    });
    refuses(&["inspect", "--model", text(&model)], 65, &["load_in_8bit", "int8"]);
}

#[test]
fn numbers_that_python_writes_are_read() {
    let scratch = Scratch::new();
    let model = scratch.copy(&golden("llama_untied"), "model");
    let line = json!({"text": "hello there"});
    let expected = logprobs(&scratch, &model, &line, &[]);
    let patch = |file: &str, from: &str, to: &str| {
        let path = model.join(file);
        let text = fs_err::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{text}");
        fs_err::write(path, text.replacen(from, to, 1)).unwrap();
    };
    patch("config.json", "{", "{\"router_jitter\": NaN, \"a\": [-Infinity], ");
    patch("tokenizer_config.json", "{", "{\"model_max_length\": Infinity, ");
    assert_eq!(logprobs(&scratch, &model, &line, &[]), expected);
    // Where one is needed, it is refused by name.
    patch("config.json", "\"rms_norm_eps\": 1e-05", "\"rms_norm_eps\": NaN");
    refuses(&["inspect", "--model", text(&model)], 65, &["rms_norm_eps", "NaN"]);
}

#[test]
fn wrong_directories_are_told_what_they_are() {
    let scratch = Scratch::new();
    let (base, adapter) = (golden("llama_untied"), golden("peft/causal"));
    let lines = scratch.line(&json!({"text": "hello"}));
    let as_model = |directory: &std::path::Path, words: &[&str]| {
        refuses(&["logprobs", "--model", text(directory), "--jsonl", text(&lines)], 65, words);
    };
    as_model(&adapter, &["an adapter", "its base (llama_untied)", "--adapter"]);
    let gguf = scratch.at("gguf");
    fs_err::create_dir(&gguf).unwrap();
    fs_err::copy(golden("gguf/llama.gguf"), gguf.join("model.gguf")).unwrap();
    as_model(&gguf, &["GGUF", "model.gguf"]);
    let run = scratch.at("run");
    scratch.copy(&base, "run/merged");
    scratch.copy(&adapter, "run/adapter");
    as_model(&run, &["run/merged"]);
    fs_err::create_dir(scratch.at("empty")).unwrap();
    as_model(&scratch.at("empty"), &["config.json"]);
    let variant = scratch.copy(&base, "variant");
    fs_err::remove_file(variant.join("golden.safetensors")).unwrap();
    fs_err::rename(variant.join("model.safetensors"), variant.join("model.fp16.safetensors"))
        .unwrap();
    as_model(&variant, &["model.fp16.safetensors"]);

    let as_adapter = |directory: &std::path::Path, words: &[&str]| {
        let arguments = [
            "logprobs",
            "--model",
            text(&base),
            "--adapter",
            text(directory),
            "--jsonl",
            text(&lines),
        ];
        refuses(&arguments, 65, words);
    };
    let pickled = scratch.copy(&adapter, "pickled");
    fs_err::rename(pickled.join("adapter_model.safetensors"), pickled.join("adapter_model.bin"))
        .unwrap();
    as_adapter(&pickled, &["pickle", "adapter_model.bin", "weights_only=True"]);
    as_adapter(&base, &["a model, not an adapter"]);
    as_adapter(&run, &["run/adapter"]);
    as_adapter(&scratch.at("nothing"), &["no directory of that name"]);
}
