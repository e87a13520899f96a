//! A sequence's hidden states and log-probabilities have the same bits alone, beside others, in another order and with any number
//! of threads, on this machine and with every lower instruction set forced in turn.

use std::process::{Command, Stdio};

use serde_json::json;

use super::*;
use crate::{logprobs, random};

/// SmolLM2's shapes with a single block and a small vocabulary.
fn smollm2_shape() -> ModelConfig {
    let json = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 1,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 1000, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64, "rope_theta": 1e5, "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2,
    });
    ModelConfig::from_json(std::path::Path::new("test"), json.as_object().unwrap()).unwrap()
}

fn matrix(purpose: &str, outputs: i64, inputs: i64, kind: Kind) -> Tensor {
    let values = random::symmetric(3, purpose, (outputs * inputs) as usize, 0.1);
    Tensor::from_slice(&values).view([outputs, inputs]).to_kind(kind)
}

fn decoder(kind: Kind) -> Decoder {
    let config = smollm2_shape();
    let ones = || Tensor::ones([576], (kind, Device::Cpu));
    let layer = Layer {
        input_norm: ones(),
        qkv: Linear::Dense(matrix("qkv", 960, 576, kind)),
        output: Linear::Dense(matrix("output", 576, 576, kind)),
        post_attention_norm: ones(),
        gate_up: Linear::Dense(matrix("gate_up", 3072, 576, kind)),
        down: Linear::Dense(matrix("down", 576, 1536, kind)),
    };
    let embedding = matrix("embedding", 1000, 576, kind);
    Decoder {
        path: "equal rows".into(),
        device: Device::Cpu,
        kind,
        head: Some(embedding.shallow_clone()),
        embedding,
        layers: Layers::Held(vec![layer]),
        norm: ones(),
        lean_head: None,
        cos_sin: rotary_table(&config).unwrap(),
        quantization: None,
        packed_decoding: false,
        config,
    }
}

/// Sequences of 1 to 17 tokens, 75 together.
fn sequences() -> Vec<Vec<i64>> {
    let lengths = [1, 2, 17, 3, 11, 1, 9, 5, 16, 10];
    let token = |i: usize, k: usize| ((i * 131 + k * 37) % 997 + 3) as i64;
    lengths.iter().enumerate().map(|(i, n)| (0..*n).map(|k| token(i, k)).collect()).collect()
}

/// Hidden states `[n, D]` and log-probabilities `[n - 1]` of each sequence, computed together.
fn together(decoder: &Decoder, sequences: &[Vec<i64>]) -> Vec<[Tensor; 2]> {
    let batch = Batch::from_sequences(sequences);
    let hidden = decoder.forward(&batch, None).unwrap(); // [N, D]
    let predecessors = batch.predecessors();
    let rows: Vec<usize> =
        (0..batch.n_tokens()).filter(|row| predecessors[*row].is_some()).collect();
    let logprob = logprobs::of_rows(decoder, &hidden, &batch, &rows, 0.8, false).unwrap().logprob; // [N - sequences]
    let (mut row, mut at) = (0, 0);
    let own = sequences.iter().map(|ids| {
        let n = ids.len() as i64;
        let parts = [hidden.narrow(0, row, n), logprob.narrow(0, at, n - 1)];
        (row, at) = (row + n, at + n - 1);
        parts
    });
    own.collect()
}

#[track_caller]
fn same(what: &str, found: &[[Tensor; 2]], expected: &[[Tensor; 2]]) {
    for (idx, (found, expected)) in found.iter().zip(expected).enumerate() {
        for (name, found, expected) in
            [("hidden", &found[0], &expected[0]), ("log-probabilities", &found[1], &expected[1])]
        {
            let largest = || (found - expected).abs().max().double_value(&[]);
            assert!(
                found.equal(expected),
                "{what}, sequence {idx}: {name} differ by {}",
                largest()
            );
        }
    }
}

/// At the level that the environment names, which the test below sets in processes of their own.
#[test]
fn rows_are_equal_here() {
    let _guard = tch::no_grad_guard();
    let sequences = sequences();
    let reversed: Vec<Vec<i64>> = sequences.iter().rev().cloned().collect();
    for kind in [Kind::Float, Kind::BFloat16] {
        if kind == Kind::Float && ops::kernels_name() != "avx2" {
            continue; // the products are MKL's, and not equal with its lowest instruction set
        }
        let decoder = decoder(kind);
        tch::set_num_threads(1);
        let expected = together(&decoder, &sequences);
        for threads in [1, 2, 8] {
            tch::set_num_threads(threads);
            let what = |how: &str| format!("{kind:?}, {threads} threads, {how}");
            same(&what("together"), &together(&decoder, &sequences), &expected);
            let mut backwards = together(&decoder, &reversed);
            backwards.reverse();
            same(&what("in another order"), &backwards, &expected);
            let alone = sequences.chunks(1).flat_map(|one| together(&decoder, one));
            same(&what("alone"), &alone.collect::<Vec<_>>(), &expected);
        }
    }
}

/// What forces each level: oneDNN's, ours, libtorch's own kernels' and MKL's.
const LEVELS: [(&str, &[(&str, &str)]); 4] = [
    ("AVX-512 BF16", &[("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")]),
    ("AVX-512", &[("ONEDNN_MAX_CPU_ISA", "AVX512_CORE"), ("ARETE_CPU_KERNELS", "avx2")]),
    (
        "AVX2",
        &[
            ("ONEDNN_MAX_CPU_ISA", "AVX2"),
            ("ARETE_CPU_KERNELS", "avx2"),
            ("ATEN_CPU_CAPABILITY", "avx2"),
            ("MKL_ENABLE_INSTRUCTIONS", "AVX2"),
        ],
    ),
    (
        "baseline",
        &[
            ("ONEDNN_MAX_CPU_ISA", "SSE41"),
            ("ARETE_CPU_KERNELS", "baseline"),
            ("ATEN_CPU_CAPABILITY", "default"),
            ("MKL_ENABLE_INSTRUCTIONS", "SSE4_2"),
            ("MKL_CBWR", "COMPATIBLE"),
        ],
    ),
];

#[test]
fn rows_are_equal_at_every_lower_level() {
    // A CPU without AVX-512 runs the first two levels at its own.
    let first = if std::arch::is_x86_feature_detected!("avx512f") { 0 } else { 2 };
    let start = |(level, variables): (&'static str, &[(&str, &str)])| {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "decoder::equal_rows::rows_are_equal_here", "--nocapture"])
            .env_remove("DNNL_MAX_CPU_ISA")
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        (level, child.unwrap())
    };
    let children: Vec<_> = LEVELS[first..].iter().copied().map(start).collect();
    for (level, child) in children {
        let output = child.wait_with_output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{level}: {stdout}{stderr}");
        assert!(stdout.contains("1 passed"), "{level}: {stdout}");
    }
}
