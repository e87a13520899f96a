//! Numbers that are not finite stop whoever meets them, by the name of their tensor.

use arete_model::checkpoint::gguf::Gguf;
use arete_model::{
    Batch, Checkpoint, Decoder, Device, Kind, ModelConfig, Source, adapter, logprobs, no_grad_guard,
};
use serde_json::json;

use crate::common::*;

#[test]
fn every_tensor_of_a_model_is_looked_at() {
    let scratch = Scratch::new();
    let config = ModelConfig::from_directory(&golden("llama_untied")).unwrap();
    for (tensor, shape) in config.expected_tensors() {
        let last = shape.iter().product::<i64>() as usize - 1;
        for (number, element) in
            [(f32::NAN, 0), (f32::INFINITY, last), (f32::NEG_INFINITY, last / 2)]
        {
            let model = scratch.copy(&golden("llama_untied"), "model");
            spoil(&weights(&model), &tensor, element, number);
            let error = load(&model).unwrap_err().to_string();
            let place = format!("NaN or an infinity at element {element}");
            assert!(error.contains(&tensor) && error.contains(&place), "{tensor}: {error}");
        }
    }
    // Whoever reads: 65, and the name.
    let model = scratch.copy(&golden("llama_untied"), "model");
    let name = "model.layers.1.self_attn.k_proj.weight";
    spoil(&weights(&model), name, 7, f32::NAN);
    let lines = scratch.line(&json!({"text": "hello"}));
    for command in ["logprobs", "generate"] {
        refuses(&[command, "--model", text(&model), "--jsonl", text(&lines)], 65, &[name]);
    }
}

#[test]
fn adapters_and_heads_are_looked_at() {
    let scratch = Scratch::new();
    let config = ModelConfig::from_directory(&golden("llama_untied")).unwrap();
    let tensors = [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight",
        "base_model.model.score.weight",
    ];
    for tensor in tensors {
        let adapter = scratch.copy(&golden("peft/reward"), "adapter");
        spoil(&weights(&adapter), tensor, 2, f32::NAN);
        let error = adapter::load(&adapter, "x", &config, Device::Cpu).unwrap_err().to_string();
        assert!(error.contains(tensor) && error.contains("element 2"), "{error}");
    }
}

#[test]
fn packed_and_gguf_weights_are_looked_at() {
    let scratch = Scratch::new();
    for (base, part) in [
        ("nf4_llama", "absmax"),
        ("nf4_llama_double", "nested_absmax"),
        ("nf4_llama_double", "nested_quant_map"),
    ] {
        let model = scratch.copy(&golden(base), "model");
        let name = format!("model.layers.0.mlp.up_proj.weight.{part}");
        spoil(&weights(&model), &name, 0, f32::NAN);
        let error = load(&model).unwrap_err().to_string();
        assert!(error.contains(&name), "{error}");
    }
    // Finite statistics can still give scales that are not.
    let model = scratch.copy(&golden("nf4_llama_double"), "model");
    let name = "model.layers.0.mlp.up_proj.weight";
    spoil(&weights(&model), &format!("{name}.nested_quant_map"), 0, 3e38);
    spoil(&weights(&model), &format!("{name}.nested_quant_map"), 255, 3e38);
    spoil(&weights(&model), &format!("{name}.nested_absmax"), 0, 3e38);
    match load(&model) {
        Err(error) => assert!(error.to_string().contains(&format!("{name}.absmax")), "{error}"),
        Ok(_) => panic!("scales of 1e76"),
    }

    let path = golden("gguf/llama.gguf");
    let file = Gguf::open(&path).unwrap();
    let whole = fs_err::read(&path).unwrap();
    for (name, tensor) in file.tensors() {
        let raw = file.raw(name).unwrap();
        let at = whole.windows(raw.len()).position(|window| window == raw).unwrap();
        let stored: &[u8] = match tensor.ggml_type.kind() {
            Kind::Float if raw.len() as i64 == 4 * tensor.shape.iter().product::<i64>() => {
                &[0, 0, 0xC0, 0x7F]
            }
            Kind::BFloat16 => &[0xC0, 0x7F],
            _ => &[0x00, 0x7E], // an f16, or a block's f16 scale
        };
        let mut spoilt = whole.clone();
        spoilt[at..at + stored.len()].copy_from_slice(stored);
        let spoilt_path = scratch.at("model.gguf");
        fs_err::write(&spoilt_path, spoilt).unwrap();
        let checkpoint = Checkpoint::open(&Source::Gguf(spoilt_path)).unwrap();
        let error = Decoder::load(&checkpoint, &in_f32()).unwrap_err().to_string();
        assert!(error.contains(name), "{name}: {error}");
    }
}

/// Finite weights whose products are not: attention over NaN was uniform, a NaN among the logits weighed nothing.
#[test]
fn numbers_that_overflow_reach_the_end() {
    let scratch = Scratch::new();
    let lines = scratch.line(&json!({"text": "hello there"}));
    for tensor in [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "lm_head.weight",
    ] {
        let model = scratch.copy(&golden("llama_untied"), "model");
        let change = |name: &str, numbers: arete_model::Tensor| match name {
            _ if name == tensor => Some(numbers * 1e38),
            // Queries of ordinary size leave finite scores; both are made large.
            _ if tensor.contains("q_proj") && name.contains("layers.0.self_attn.k_proj") => {
                Some(numbers * 1e30)
            }
            _ if tensor.contains("k_proj") && name.contains("layers.1.self_attn.q_proj") => {
                Some(numbers * 1e30)
            }
            "model.norm.weight" if tensor == "lm_head.weight" => Some(numbers * 1e5),
            _ => Some(numbers),
        };
        rewrite(&model, change, Vec::new());
        for dtype in ["f32", "bf16"] {
            let arguments = |command| {
                [command, "--model", text(&model), "--dtype", dtype, "--jsonl", text(&lines)]
            };
            refuses(&arguments("logprobs"), 1, &["is not finite", "overflowed"]);
            for sampling in [&["--temperature", "0"][..], &["--top-k", "5"], &[]] {
                let short = ["--max-new-tokens", "3"];
                refuses(
                    &[&arguments("generate")[..], &short, sampling].concat(),
                    1,
                    &["is not finite"],
                );
            }
        }
        let model = load(&model).unwrap();
        let _guard = no_grad_guard();
        let batch = Batch::from_sequences(&[[3i64, 4, 5, 6]]);
        let hidden = model.decoder.forward(&batch, None).unwrap();
        let error = model.decoder.logits(&hidden).unwrap_err().to_string();
        assert!(error.contains("logits"), "{error}");
        assert!(logprobs::of_rows(&model.decoder, &hidden, &batch, &[1, 2], 1.0, true).is_err());
    }
}
