//! The GPU's path, on the CPU, against the CPU's own: hidden states, log-probabilities, entropies, gradients, completions.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

use arete_records::FinishReason;

use super::*;
use crate::generate::{self, Completion, Generator, Options, Request, Sampling, Stream};
use crate::launches::Path;
use crate::{Adapter, LoraConfig, Source, logprobs, random};

fn load(name: &str, dtype: Kind, nf4: Option<Nf4Options>) -> Decoder {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name);
    let checkpoint = Checkpoint::open(&Source::Directory(path)).unwrap();
    Decoder::load(&checkpoint, &LoadOptions { device: Device::Cpu, dtype, nf4 }).unwrap()
}

/// Every factor random, so that everything has a gradient.
fn adapter(decoder: &Decoder, targets: &[Target]) -> Adapter {
    let config = LoraConfig { rank: 4, targets: targets.to_vec(), ..LoraConfig::default() };
    let mut adapter = Adapter::new("policy", decoder.config(), &config, 7, Device::Cpu).unwrap();
    {
        let _guard = tch::no_grad_guard();
        for (name, mut tensor) in adapter.parameters() {
            let values = random::symmetric(3, &name, tensor.numel(), 0.2);
            tensor.copy_(&Tensor::from_slice(&values).view_as(&tensor));
        }
    }
    adapter.set_trainable(true);
    adapter
}

fn ids(decoder: &Decoder, seed: i64, n: i64) -> Vec<i64> {
    let size = decoder.config().vocab_size as i64;
    (0..n).map(|k| (seed * 31 + k * 7 + k * k) % (size - 3) + 3).collect()
}

/// Prompts with answers that share them, an answer that goes on, and a sequence of its own.
fn forest(decoder: &Decoder) -> Batch {
    let mut builder = Batch::tree();
    for i in 0..3 {
        let root = builder.root(&ids(decoder, i, 11 + i));
        let answer = builder.child(root, &ids(decoder, 10 + i, 9));
        builder.child(root, &ids(decoder, 20 + i, 5));
        builder.child(answer, &ids(decoder, 30 + i, 4));
    }
    builder.root(&ids(decoder, 40, 23));
    builder.build()
}

/// Hidden states, log-probabilities, entropies, and the gradients of the adapter.
fn pass(
    decoder: &Decoder,
    batch: &Batch,
    targets: &[Target],
    recompute: bool,
) -> Vec<(String, Tensor)> {
    let adapter = adapter(decoder, targets);
    let predecessors = batch.predecessors();
    let rows: Vec<usize> =
        (0..batch.n_tokens()).filter(|&row| predecessors[row].is_some()).collect();
    let pass = decoder.pass(batch, &adapter, recompute).unwrap();
    let hidden = pass.hidden.detach();
    let found = logprobs::of_rows(decoder, &pass.hidden, batch, &rows, 0.8, true).unwrap();
    let loss = -(&found.logprob
        * Tensor::arange(rows.len() as i64, (Kind::Float, Device::Cpu)).sin())
    .mean(Kind::Float);
    pass.backward(&loss).unwrap();
    let mut out = vec![
        ("hidden states".to_owned(), hidden),
        ("log-probabilities".to_owned(), found.logprob.detach()),
        ("entropies".to_owned(), found.entropy),
    ];
    out.extend(adapter.parameters().into_iter().map(|(name, tensor)| (name, tensor.grad())));
    out
}

/// How far two passes are apart: the largest gap in each tensor, of its largest number.
fn gaps(found: &[(String, Tensor)], expected: &[(String, Tensor)]) -> Vec<(String, f64)> {
    assert_eq!(found.len(), expected.len());
    let gap = |((name, found), (_, expected)): (&(String, Tensor), &(String, Tensor))| {
        let wide = |tensor: &Tensor| tensor.to_kind(Kind::Double);
        let scale = wide(expected).abs().max().double_value(&[]);
        assert!(scale > 0.0, "{name} is zero");
        let gap = (wide(found) - wide(expected)).abs().max().double_value(&[]);
        (name.clone(), gap / scale)
    };
    found.iter().zip(expected).map(gap).collect()
}

/// In f32 within 1e-5; in bf16 about as near to f32 as the CPU's own path is.
#[test]
fn a_pass_is_the_same_on_both_paths() {
    let nf4 = Some(Nf4Options::default());
    let some = [Target::K, Target::Down, Target::Up];
    for (name, nf4, targets) in [
        ("llama_untied", None, &Target::ALL[..]),
        ("llama_untied", None, &some),
        ("gradients/base", nf4, &Target::ALL),
        ("mistral_sliding", None, &Target::ALL),
    ] {
        // Loaded on the path they run on: on the GPU's, scales of eight bits stay so.
        let both = |dtype| {
            [false, true].map(|gpu| {
                let _path = Path::of_gpu(gpu);
                load(name, dtype, nf4)
            })
        };
        let [wide, narrow] = [Kind::Float, Kind::BFloat16].map(both);
        let [own, gpus] = wide.each_ref().map(Decoder::block_bytes);
        assert_eq!(gpus != own, nf4.is_some(), "{name}: scales are held alike on both paths");
        // More than 64 rows, and few.
        let few = Batch::from_sequences(&[ids(&wide[0], 5, 12), ids(&wide[0], 6, 19)]);
        for (batch, recompute) in [(forest(&wide[0]), false), (few, true)] {
            let on = |decoders: &[Decoder; 2], gpu: bool| {
                let _path = Path::of_gpu(gpu);
                pass(&decoders[usize::from(gpu)], &batch, targets, recompute)
            };
            let what = format!("{name}, {} rows, nf4 {}", batch.n_tokens(), nf4.is_some());
            let expected = on(&wide, false);
            for (part, gap) in gaps(&on(&wide, true), &expected) {
                assert!(gap <= 1e-5, "{what}, f32: {part} is {gap} off");
            }
            let (found, own) =
                (gaps(&on(&narrow, true), &expected), gaps(&on(&narrow, false), &expected));
            for ((part, gap), (_, own)) in found.into_iter().zip(own) {
                assert!(
                    gap <= 2.0 * own + 0.02,
                    "{what}, bf16: {part} is {gap} off, the CPU's own {own}"
                );
            }
        }
    }
}

fn completions(decoder: &Decoder, adapter: &Adapter, sampling: Sampling) -> Vec<Vec<Completion>> {
    let common = ids(decoder, 1, 21);
    let request = |i: u64| Request {
        streams: (0..3).map(|sample| Stream { seed: 5, prompt: i, sample }).collect(),
        tails: if i == 1 { vec![vec![4], Vec::new(), vec![5, 6, 7]] } else { Vec::new() },
        ..Request::new([&common[..], &ids(decoder, 50 + i as i64, 4)].concat(), Vec::new(), 6)
    };
    let requests: Vec<Request> = (0..4).map(request).collect();
    let options = Options { max_rows: 7, ..Options::new(sampling, vec![9]) };
    generate::complete(decoder, None, Some(adapter), &requests, &options).unwrap()
}

/// The same streams draw the same tokens; log-probabilities agree.
#[test]
fn completions_are_the_same_on_both_paths() {
    for (name, nf4) in [
        ("llama_untied", None),
        ("mistral_sliding", None),
        ("gradients/base", Some(Nf4Options::default())),
    ] {
        let decoder = load(name, Kind::Float, nf4);
        let adapter = adapter(&decoder, &Target::ALL);
        for sampling in [
            Sampling::GREEDY,
            Sampling::at(1.0),
            Sampling { temperature: 0.9, top_k: 20, top_p: 0.8 },
            Sampling { temperature: 1.2, top_k: 0, top_p: 0.6 },
        ] {
            let [found, expected] = [true, false].map(|gpu| {
                let _path = Path::of_gpu(gpu);
                completions(&decoder, &adapter, sampling)
            });
            for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
                assert_eq!(found.token_ids, expected.token_ids, "{name}, {sampling:?}");
                assert_eq!(found.finish_reason, expected.finish_reason);
                for (found, expected) in found.logprobs.iter().zip(&expected.logprobs) {
                    assert!((found - expected).abs() <= 1e-4, "{name}: {found} {expected}");
                }
            }
        }
    }
}

/// A second turn goes on on the same cache.
#[test]
fn a_reply_is_the_same_on_both_paths() {
    let decoder = load("llama_untied", Kind::Float, None);
    let [found, expected] = [true, false].map(|gpu| {
        let _path = Path::of_gpu(gpu);
        let streams = (0..2).map(|sample| Stream { seed: 5, prompt: 0, sample }).collect();
        let request =
            Request { turns: 2, extra_tokens: 3, ..Request::new(ids(&decoder, 2, 9), streams, 5) };
        let requests = [request];
        let options = Options::new(Sampling::at(1.0), Vec::new());
        let mut generator = Generator::new(&decoder, None, None, &requests, &options).unwrap();
        let mut turns = Vec::new();
        while let Some(ended) = generator.next() {
            let ended = ended.unwrap();
            if ended.turn == 0 {
                generator.reply(&[7, 8, 9]).unwrap();
            }
            turns.push((ended.stream, ended.turn, ended.completion.token_ids));
            assert_eq!(ended.completion.finish_reason, FinishReason::Length);
        }
        turns
    });
    assert_eq!(found, expected);
    assert_eq!(found.len(), 4);
}

/// A number that is not finite is an error on the GPU's path, too, and says whose it is.
#[test]
fn a_broken_model_draws_nothing_on_the_gpus_path() {
    let mut decoder = load("llama_untied", Kind::Float, None);
    let _path = Path::of_gpu(true);
    decoder.head = decoder.head.as_ref().map(|head| head * f64::NAN);
    let requests = [Request::new(vec![3, 4, 5], vec![Stream { seed: 1, prompt: 0, sample: 0 }], 2)];
    let options = Options::new(Sampling::at(1.0), Vec::new());
    let error = generate::complete(&decoder, None, None, &requests, &options).unwrap_err();
    assert!(
        matches!(&error, Error::NonFinite { what } if what.contains("logits of request 0")),
        "{error}"
    );
}
