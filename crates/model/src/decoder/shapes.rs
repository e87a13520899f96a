//! Decoders of a shape alone, whose weights nobody reads: for counting launches.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

use serde_json::json;

use super::*;
use crate::nf4::{CODEBOOK, Scales, dynamic_map};

impl Decoder {
    /// Mistral-7B's shape (v0.2 and later) with `n_layers` blocks, packed to four bits, in bf16. Packed weights are memory that was
    /// never written, and so takes none; the vocabulary matrix is zero, and the embedding too.
    pub(crate) fn of_mistral_7b_shape(n_layers: usize) -> Self {
        let json = json!({
            "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": n_layers, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "rope_theta": 1e6, "tie_word_embeddings": false,
            "sliding_window": null, "bos_token_id": 1, "eos_token_id": 2,
        });
        let config =
            ModelConfig::from_json(std::path::Path::new("test"), json.as_object().unwrap())
                .unwrap();
        let kind = Kind::BFloat16;
        let on = |kind| (kind, Device::Cpu);
        let ones = || Tensor::ones([4096], on(kind));
        let linear = |outputs: i64, inputs: i64| {
            Linear::Nf4(Nf4Tensor {
                codes: Tensor::empty([outputs * inputs / 2], on(Kind::Uint8)),
                absmax: Scales::Double {
                    codes: Tensor::empty([outputs * inputs / 64], on(Kind::Uint8)),
                    map: Tensor::from_slice(&dynamic_map()),
                    nested: Tensor::empty([outputs * inputs / 64 / 256, 2], on(Kind::Float)),
                },
                codebook: Tensor::from_slice(&CODEBOOK),
                outputs,
                inputs,
                block_size: 64,
            })
        };
        let layer = || Layer {
            input_norm: ones(),
            qkv: linear(6144, 4096),
            output: linear(4096, 4096),
            post_attention_norm: ones(),
            gate_up: linear(28_672, 4096),
            down: linear(4096, 14_336),
        };
        let embedding = Tensor::zeros([32_000, 4096], on(kind));
        Self {
            path: "Mistral-7B's shape".into(),
            device: Device::Cpu,
            kind,
            head: Some(embedding.shallow_clone()),
            embedding,
            layers: Layers::Held((0..n_layers).map(|_| layer()).collect()),
            norm: ones(),
            lean_head: None,
            cos_sin: rotary_table(&config).unwrap(),
            quantization: Some(Nf4Options::default()),
            packed_decoding: false,
            config,
        }
    }
}
