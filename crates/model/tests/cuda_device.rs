//! The CUDA kernels on a real GPU against the CPU: same inputs, equal bits where the format defines them, else within
//! the rounding of the dtype. Without a GPU every test here says so and passes.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]
#![expect(clippy::print_stderr, reason = "a skipped test says why")]

use arete_model::cuda::plan::AttentionShape;
use arete_model::cuda::{self, AttentionTables, Packed};
use arete_model::nf4::{Nf4Options, Nf4Tensor, Scales};
use arete_model::{Adapter, Batch, Checkpoint, Decoder, LoadOptions, LoraConfig, Source, logprobs};
use tch::{Device, Kind, Tensor};

const GPU: Device = Device::Cuda(0);
const GOLDENS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens");

fn gpu_is_here() -> bool {
    let here = cuda::n_gpus() > 0;
    if !here {
        eprintln!("skipped: no GPU, or libtorch without CUDA (`make setup DEVICE=cuda`)");
    }
    here
}

fn random(shape: [i64; 2], seed: i64) -> Tensor {
    tch::manual_seed(seed);
    // Blocks whose scales differ by 100x and more.
    let numel = shape[0] * shape[1];
    let scales = (Tensor::arange(numel, (Kind::Float, Device::Cpu)) / 64.0).floor().remainder(5.0);
    Tensor::randn([numel], (Kind::Float, Device::Cpu)).g_mul(&scales.exp()).view(shape) * 0.01
}

fn on_gpu(weight: &Nf4Tensor) -> Nf4Tensor {
    Nf4Tensor {
        codes: weight.codes.to_device(GPU),
        absmax: weight.absmax.to_device(GPU),
        codebook: weight.codebook.to_device(GPU),
        ..*weight
    }
}

fn assert_equal(name: &str, got: &Tensor, expected: &Tensor) {
    let got = got.to_device(Device::Cpu);
    assert_eq!(got.kind(), expected.kind(), "{name}");
    assert!(got.equal(expected), "{name} differs from the CPU's");
}

fn assert_close(name: &str, got: &Tensor, expected: &Tensor, tolerance: f64) {
    let (got, expected) =
        (got.to_device(Device::Cpu).to_kind(Kind::Double), expected.to_kind(Kind::Double));
    let scale = expected.abs().max().double_value(&[]);
    let gap = (got - &expected).abs().max().double_value(&[]);
    assert!(gap <= tolerance * scale, "{name}: {gap:e} off, largest value {scale:e}");
}

#[test]
fn quantise_and_dequantise_equal_the_cpu() {
    if !gpu_is_here() {
        return;
    }
    for kind in [Kind::Float, Kind::BFloat16] {
        for shape in [[64, 64], [576, 1536], [3, 64], [33, 192]] {
            let dense = random(shape, 1).to_kind(kind);
            let options = Nf4Options { double_quantize: false, block_size: 64 };
            let packed = Nf4Tensor::quantize(&dense, options).unwrap();
            let (codes, absmax) = cuda::quantize(&dense.to_device(GPU), 64).unwrap();
            assert_equal("codes", &codes, &packed.codes);
            assert_equal("absmax", &absmax, &packed.absmax.expand());
            let here = on_gpu(&packed);
            for out in [Kind::Float, Kind::BFloat16] {
                let got = cuda::dequantize(&Packed::from(&here), out).unwrap();
                assert_equal("weights", &got, &packed.dequantize(out).unwrap());
            }
            let half = cuda::dequantize(&Packed::from(&here), Kind::Half).unwrap();
            assert_equal(
                "weights",
                &half,
                &packed.dequantize(Kind::Float).unwrap().to_kind(Kind::Half),
            );
        }
    }
}

#[test]
fn double_quantised_scales_are_read_as_they_are() {
    if !gpu_is_here() {
        return;
    }
    let options = Nf4Options { double_quantize: true, block_size: 64 };
    let double = Nf4Tensor::quantize(&random([300, 64], 2), options).unwrap();
    assert!(matches!(double.absmax, Scales::Double { .. }));
    let here = on_gpu(&double);
    let packed = Packed::from(&here);
    let expected = double.dequantize(Kind::Float).unwrap();
    assert_equal("weights", &cuda::dequantize(&packed, Kind::Float).unwrap(), &expected);
    let x = random([3, 64], 3);
    let product = cuda::multiply(&x.to_device(GPU), &packed).unwrap();
    assert_close("product", &product, &x.matmul(&expected.tr()), 1e-5);
}

#[test]
fn products_equal_the_cpu() {
    if !gpu_is_here() {
        return;
    }
    for [outputs, inputs] in [[576, 576], [1, 64], [37, 1088], [4096, 14_336], [14_336, 4096]] {
        let weight =
            Nf4Tensor::quantize(&random([outputs, inputs], 4), Nf4Options::default()).unwrap();
        let here = on_gpu(&weight);
        let dense = weight.dequantize(Kind::Float).unwrap();
        for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 8e-3), (Kind::Half, 1e-3)] {
            let x = (random([40, inputs], 5) / 10.0).to_kind(kind);
            let expected = x.to_kind(Kind::Float).matmul(&dense.tr());
            for rows in [1, 2, 3, 8, 16, 17, 40] {
                let x = x.narrow(0, 0, rows).to_device(GPU);
                let y = cuda::nf4_linear(&x, &here).unwrap();
                assert_eq!(y.kind(), kind);
                let name = format!("{rows} rows, [{outputs}, {inputs}], {kind:?}");
                assert_close(&name, &y, &expected.narrow(0, 0, rows), tolerance);
            }
            // A row's bits do not depend on its neighbours' number; without tensor cores 17 rows are unpacked for cuBLAS.
            let x = x.to_device(GPU);
            let most = if kind == Kind::Half { 40 } else { 16 };
            let all = cuda::nf4_linear(&x.narrow(0, 0, most), &here).unwrap();
            let one = cuda::nf4_linear(&x.narrow(0, 0, 1), &here).unwrap();
            assert!(all.narrow(0, 0, 1).equal(&one), "[{outputs}, {inputs}] {kind:?}");
        }
    }
}

/// The call on a GPU and the same call on the CPU: rows of very different lengths, two of them over one prefix.
#[test]
fn attention_equals_the_cpu() {
    if !gpu_is_here() {
        return;
    }
    let segments = [[0, 1, 0, 0, 1], [1, 1, 399, 1, 2], [2, 1, 1_299, 3, 2], [3, 3, 126, 5, 1]];
    let spans = [[3_000, 1], [0, 300], [300, 100], [0, 300], [400, 1_000], [1_400, 129]];
    for [heads, kv_heads, head_size, window] in [[32, 8, 128, 0], [9, 3, 64, 200], [5, 1, 80, 0]] {
        let shape = AttentionShape { heads, kv_heads, head_size, window };
        let tables = |device| AttentionTables::new(&segments, &spans, shape, device).unwrap();
        let draw = |rows: i64, width: u32, seed| random([rows, i64::from(width)], seed).tanh();
        let q = draw(6, heads * head_size, 1) * 4.0;
        let keys = draw(3_001, kv_heads * head_size, 2);
        let values = draw(3_001, kv_heads * head_size, 3);
        for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 8e-3), (Kind::Half, 1e-3)] {
            let [q, keys, values] = [&q, &keys, &values].map(|tensor| tensor.to_kind(kind));
            let expected = cuda::attend(&q, &keys, &values, &tables(Device::Cpu)).unwrap();
            let [q, keys, values] = [q, keys, values].map(|tensor| tensor.to_device(GPU));
            let got = cuda::attend(&q, &keys, &values, &tables(GPU)).unwrap();
            assert_close(&format!("{shape:?} in {kind:?}"), &got, &expected, tolerance);
            let again = cuda::attend(&q, &keys, &values, &tables(GPU)).unwrap();
            assert!(got.equal(&again), "{shape:?} in {kind:?}: two runs differ");
        }
    }
}

/// Logits and adapter gradients of a packed model.
fn logits_and_gradients(device: Device, dtype: Kind) -> (Tensor, Vec<Tensor>) {
    let source = Source::Directory(format!("{GOLDENS}/nf4_llama").into());
    let checkpoint = Checkpoint::open(&source).unwrap();
    let options = LoadOptions { device, dtype, nf4: None };
    let decoder = Decoder::load(&checkpoint, &options).unwrap();
    let config = LoraConfig::default();
    let mut adapter = Adapter::new("policy", decoder.config(), &config, 7, device).unwrap();
    {
        let _guard = tch::no_grad_guard();
        for (i, (_, tensor)) in adapter.parameters().into_iter().enumerate() {
            let noise = random([tensor.size()[0], tensor.size()[1]], i as i64).to_device(device);
            let mut tensor = tensor;
            tensor.copy_(&(noise.tanh() * 0.05));
        }
    }
    adapter.set_trainable(true);
    // 30 tokens are unpacked for cuBLAS, 11 take the fused kernel.
    let mut gradients = Vec::new();
    let mut all_logits = Vec::new();
    for length in [30, 11] {
        let ids: Vec<i64> = (0..length).map(|i| 3 + (i * 7) % 90).collect();
        let batch = Batch::from_sequences(&[ids]);
        let hidden = decoder.forward(&batch, Some(&adapter)).unwrap();
        all_logits.push(decoder.logits(&hidden.detach()).unwrap().to_device(Device::Cpu));
        let rows: Vec<usize> = (1..length as usize).collect();
        let out = logprobs::of_rows(&decoder, &hidden, &batch, &rows, 1.0, false).unwrap();
        out.logprob.mean(Kind::Float).backward();
    }
    for (_, tensor) in adapter.parameters() {
        gradients.push(tensor.grad().to_device(Device::Cpu));
    }
    (Tensor::cat(&all_logits, 0), gradients)
}

#[test]
fn a_packed_model_has_the_cpus_logits_and_gradients() {
    if !gpu_is_here() {
        return;
    }
    let (logits, gradients) = logits_and_gradients(Device::Cpu, Kind::Float);
    for (dtype, tolerance) in [(Kind::Float, 1e-3), (Kind::BFloat16, 0.15), (Kind::Half, 0.02)] {
        let (got, got_gradients) = logits_and_gradients(GPU, dtype);
        assert_close(&format!("logits in {dtype:?}"), &got, &logits, tolerance);
        for (i, (got, expected)) in got_gradients.iter().zip(&gradients).enumerate() {
            assert_close(&format!("gradient {i} in {dtype:?}"), got, expected, 4.0 * tolerance);
        }
    }
}
