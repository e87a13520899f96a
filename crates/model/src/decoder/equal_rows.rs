//! A sequence's hidden states, log-probabilities and gradients to its inputs have the same bits alone, beside others, in another
//! order and with any number of threads; the adapter's gradients of one batch with any number of threads. On this machine and at
//! every instruction-set level.

use serde_json::json;

use super::*;
use crate::levels::at_every_level;
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

fn decoder(kind: Kind, packed: bool) -> Decoder {
    let config = smollm2_shape();
    let ones = || Tensor::ones([576], (kind, Device::Cpu));
    let linear = |purpose: &str, outputs: i64, inputs: i64| {
        let weight = matrix(purpose, outputs, inputs, kind);
        match packed {
            true => Linear::Nf4(Nf4Tensor::quantize(&weight, Nf4Options::default()).unwrap()),
            false => Linear::Dense(weight),
        }
    };
    let layer = Layer {
        input_norm: ones(),
        qkv: linear("qkv", 960, 576),
        output: linear("output", 576, 576),
        post_attention_norm: ones(),
        gate_up: linear("gate_up", 3072, 576),
        down: linear("down", 576, 1536),
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
            [("first", &found[0], &expected[0]), ("log-probabilities", &found[1], &expected[1])]
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

/// An adapter of rank 24 on every matrix, and so on fused ones of rank 72 and 48.
fn adapter(kind: Kind) -> PreparedLayer {
    let pair = |purpose: &str, outputs: i64, rank: i64, inputs: i64| {
        let a = matrix(&format!("{purpose} a"), rank, inputs, kind).set_requires_grad(true);
        let b = matrix(&format!("{purpose} b"), outputs, rank, kind).set_requires_grad(true);
        Some((a, b))
    };
    PreparedLayer {
        qkv: pair("qkv", 960, 72, 576),
        output: pair("output", 576, 24, 576),
        gate_up: pair("gate_up", 3072, 48, 576),
        down: pair("down", 576, 24, 1536),
    }
}

/// Gradients to the block's inputs `[n, D]` of each sequence, computed together, and those of the adapter's tensors.
fn gradients(decoder: &Decoder, sequences: &[Vec<i64>]) -> (Vec<[Tensor; 2]>, Vec<Tensor>) {
    let batch = Batch::from_sequences(sequences);
    let tokens = batch.token_tensor(Device::Cpu).unwrap();
    let leaf = decoder.embed(&tokens).unwrap().set_requires_grad(true); // [N, D]
    let prepared = adapter(decoder.kind);
    let positions = batch.position_tensor(Device::Cpu).unwrap();
    let attend = |qkv: &Tensor| decoder.attend(qkv, &positions, &batch.tables);
    let (hidden, delta) = decoder.block(0, &leaf, None, Some(&prepared), attend).unwrap();
    let out = ops::rms_norm(&hidden, Some(&delta), &decoder.norm, 1e-5).unwrap().0;
    let found =
        ops::token_logprobs(&out, decoder.head.as_ref().unwrap(), &tokens, 0.8, false).unwrap().0;
    found.sum(Kind::Float).backward();
    let grad = leaf.grad();
    let mut row = 0;
    let own = sequences.iter().map(|ids| {
        let n = ids.len() as i64;
        let part = grad.narrow(0, row, n);
        row += n;
        [part.shallow_clone(), part]
    });
    let own = own.collect();
    let pairs = [prepared.qkv, prepared.output, prepared.gate_up, prepared.down];
    (own, pairs.into_iter().flatten().flat_map(|(a, b)| [a.grad(), b.grad()]).collect())
}

/// At the level that the environment names, which the test below sets in processes of their own.
#[test]
fn rows_are_equal_here() {
    let sequences = sequences();
    let reversed: Vec<Vec<i64>> = sequences.iter().rev().cloned().collect();
    for (kind, packed) in
        [(Kind::Float, false), (Kind::BFloat16, false), (Kind::Float, true), (Kind::BFloat16, true)]
    {
        let decoder = decoder(kind, packed);
        let forward = |sequences: &[Vec<i64>]| {
            let _guard = tch::no_grad_guard();
            together(&decoder, sequences)
        };
        tch::set_num_threads(1);
        let expected = forward(&sequences);
        let (expected_grad, expected_adapter) = gradients(&decoder, &sequences);
        for threads in [1, 2, 8] {
            tch::set_num_threads(threads);
            let what = |how: &str| format!("{kind:?}, packed {packed}, {threads} threads, {how}");
            same(&what("together"), &forward(&sequences), &expected);
            let (grad, of_adapter) = gradients(&decoder, &sequences);
            same(&what("gradients together"), &grad, &expected_grad);
            for (idx, (found, expected)) in of_adapter.iter().zip(&expected_adapter).enumerate() {
                assert!(found.equal(expected), "{}", what(&format!("adapter gradient {idx}")));
            }
            if threads == 8 {
                continue;
            }
            let backwards = |mut found: Vec<[Tensor; 2]>| {
                found.reverse();
                found
            };
            same(&what("in another order"), &backwards(forward(&reversed)), &expected);
            let alone: Vec<_> = sequences.chunks(1).flat_map(forward).collect();
            same(&what("alone"), &alone, &expected);
            let grad = backwards(gradients(&decoder, &reversed).0);
            same(&what("gradients in another order"), &grad, &expected_grad);
            let alone = sequences.chunks(1).flat_map(|one| gradients(&decoder, one).0);
            same(&what("gradients alone"), &alone.collect::<Vec<_>>(), &expected_grad);
        }
    }
}

#[test]
fn rows_are_equal_at_every_level() {
    at_every_level("decoder::equal_rows::rows_are_equal_here");
}
