//! Times the NF4 kernels on the GPU at hand against its measured copy bandwidth: one Markdown row a kernel and shape.
//!
//! Run: `cargo run --release -p arete-model --example cuda_kernels` (needs `make setup DEVICE=cuda`).

use std::io::Write;
use std::time::Instant;

use anyhow::{Context, bail};
use arete_model::cuda::{self, Packed};
use arete_model::nf4::CODEBOOK;
use tch::{Cuda, Device, Kind, Tensor};

const GPU: Device = Device::Cuda(0);
/// Copies of each matrix, taken in turn, so that none is still in the L2 cache.
const WORKING_SET_BYTES: i64 = 1 << 30;
const REPEATS: usize = 200;

/// Mean seconds of `work(i)` for i = 0, 1, …, queued without waiting in between.
fn seconds(mut work: impl FnMut(usize) -> anyhow::Result<()>) -> anyhow::Result<f64> {
    for i in 0..REPEATS / 10 {
        work(i)?;
    }
    Cuda::synchronize(0);
    let start = Instant::now();
    for i in 0..REPEATS {
        work(i)?;
    }
    Cuda::synchronize(0);
    Ok(start.elapsed().as_secs_f64() / REPEATS as f64)
}

struct Matrix {
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    shape: [i64; 2],
}

impl Matrix {
    fn packed(&self) -> Packed<'_> {
        Packed {
            codes: &self.codes,
            codebook: &self.codebook,
            absmax: cuda::Absmax::Single(&self.absmax),
            outputs: self.shape[0],
            inputs: self.shape[1],
            block_size: 64,
        }
    }
}

fn main() -> anyhow::Result<()> {
    if cuda::n_gpus() == 0 {
        bail!("no GPU, or libtorch without CUDA: run `make setup DEVICE=cuda`");
    }
    let _guard = tch::no_grad_guard();
    let mut out = std::io::stdout().lock();
    let mut row = |kernel: &str, shape: &str, bytes: i64, seconds: f64, copy: f64| {
        let rate = bytes as f64 / seconds / 1e9;
        writeln!(
            out,
            "| {kernel} | {shape} | {:.1} | {:.1} | {rate:.0} | {:.0} % |",
            bytes as f64 / 1e6,
            seconds * 1e6,
            100.0 * rate / copy
        )
        .context("writing the table")
    };

    // Reads and writes count, as the driver's own bandwidth test counts them.
    let half = WORKING_SET_BYTES / 2;
    let from = Tensor::zeros([half], (Kind::Uint8, GPU));
    let mut to = Tensor::zeros([half], (Kind::Uint8, GPU));
    let copy_seconds = seconds(|_| {
        to.copy_(&from);
        Ok(())
    })?;
    let copy = WORKING_SET_BYTES as f64 / copy_seconds / 1e9;
    drop((from, to));
    row("copy", "512 MiB", WORKING_SET_BYTES, copy_seconds, copy)?;

    // Mistral-7B: query/key/value, output, gate and up, down. Then SmolLM2's gate and up.
    for shape in [[6144, 4096], [4096, 4096], [28_672, 4096], [4096, 14_336], [3072, 576]] {
        let [outputs, inputs] = shape;
        let n = outputs * inputs;
        let packed_bytes = n / 2 + n / 64 * 4;
        let text = format!("{outputs} x {inputs}");
        let dense = Tensor::randn(shape, (Kind::BFloat16, GPU)) * 0.02;
        let (codes, absmax) = cuda::quantize(&dense, 64)?;
        let codebook = Tensor::from_slice(&CODEBOOK).to_device(GPU);
        let copies = (WORKING_SET_BYTES / packed_bytes).clamp(1, 256);
        let matrices: Vec<Matrix> = (0..copies)
            .map(|_| Matrix {
                codes: codes.copy(),
                absmax: absmax.copy(),
                codebook: codebook.shallow_clone(),
                shape,
            })
            .collect();
        let at = |i: usize| &matrices[i % matrices.len()];

        let time = seconds(|_| {
            let _: () = drop(cuda::quantize(&dense, 64)?);
            Ok(())
        })?;
        row("quantise bf16", &text, 2 * n + packed_bytes, time, copy)?;
        let weights = Tensor::empty(shape, (Kind::BFloat16, GPU));
        let time = seconds(|i| Ok(cuda::dequantize_into(&at(i).packed(), &weights)?))?;
        row("dequantise bf16", &text, packed_bytes + 2 * n, time, copy)?;
        for rows in [1, 2, 4, 8, 16] {
            let x = Tensor::randn([rows, inputs], (Kind::BFloat16, GPU));
            let bytes = packed_bytes + 2 * rows * (inputs + outputs);
            let time = seconds(|i| {
                let _: () = drop(cuda::multiply(&x, &at(i).packed())?);
                Ok(())
            })?;
            row(&format!("multiply bf16, {rows} rows"), &text, bytes, time, copy)?;
        }
        for rows in [1, 8, 16, 32, 64] {
            let x = Tensor::randn([rows, inputs], (Kind::BFloat16, GPU));
            let bytes = packed_bytes + 2 * rows * (inputs + outputs);
            let time = seconds(|i| {
                let _: () = drop(cuda::nf4_rows(&x, &at(i).packed())?);
                Ok(())
            })?;
            row(&format!("nf4_rows bf16, {rows} rows"), &text, bytes, time, copy)?;
        }
        let x = Tensor::randn([16, inputs], (Kind::BFloat16, GPU));
        let time = seconds(|i| {
            cuda::dequantize_into(&at(i).packed(), &weights)?;
            let _: () = drop(x.f_mm(&weights.f_tr()?)?);
            Ok(())
        })?;
        let bytes = packed_bytes + 4 * n + 32 * (inputs + outputs);
        row("dequantise + cuBLAS, 16 rows", &text, bytes, time, copy)?;
    }
    Ok(())
}
