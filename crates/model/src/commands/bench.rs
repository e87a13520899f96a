//! `arete-model bench`: this model's work beside this machine's matrix products, in one run.
//!
//! Absolute figures drift on shared machines; the ratio to the ceiling measured a moment earlier does not.

use std::io::Write as _;
use std::time::Instant;

use anyhow::Context;
use tch::{Kind, Tensor};

use super::ModelArgs;
use crate::generate::{self, Options, Request, Sampling, Stream};
use crate::lora::Target;
use crate::{Adapter, Batch, Decoder, LoraConfig, logprobs};

/// Measure sampling, prefill and training against this machine's matrix products
#[derive(Debug, clap::Args)]
pub(super) struct Bench {
    #[command(flatten)]
    model: ModelArgs,
    /// Sequences sampled at a time
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// New tokens per sequence
    #[arg(long, default_value_t = 48)]
    new_tokens: usize,
}

/// Calls `work` for at least a second; seconds per call.
fn time(mut work: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    work()?;
    let (start, mut n) = (Instant::now(), 0);
    while start.elapsed().as_secs_f64() < 1.0 {
        work()?;
        n += 1;
    }
    Ok(start.elapsed().as_secs_f64() / f64::from(n))
}

/// Tokens a second that the linear layers alone would give, dense, in the compute dtype.
fn ceiling(decoder: &Decoder, rows: usize, with_head: bool) -> anyhow::Result<f64> {
    let config = decoder.config();
    let mut products: Vec<(usize, usize, usize)> = vec![];
    let size = |target: Target| target.size(config);
    let (q, k, gate) = (size(Target::Q), size(Target::K), size(Target::Gate));
    products.push((q.0 + 2 * k.0, q.1, config.num_layers));
    products.push((size(Target::O).0, size(Target::O).1, config.num_layers));
    products.push((2 * gate.0, gate.1, config.num_layers));
    products.push((size(Target::Down).0, size(Target::Down).1, config.num_layers));
    if with_head {
        products.push((config.vocab_size, config.hidden_size, 1));
    }
    let options = (decoder.kind(), decoder.device());
    let mut seconds = 0.0;
    for (outputs, inputs, count) in products {
        let weights: Vec<Tensor> = (0..if count > 1 { 6 } else { 1 })
            .map(|_| {
                Tensor::randn([outputs as i64, inputs as i64], (Kind::Float, options.1))
                    .to_kind(options.0)
            })
            .collect();
        let x = Tensor::randn([rows as i64, inputs as i64], (Kind::Float, options.1))
            .to_kind(options.0);
        let each = time(|| {
            for weight in &weights {
                let _ = x.f_matmul(&weight.transpose(0, 1))?;
            }
            Ok(())
        })?;
        seconds += each / weights.len() as f64 * count as f64;
    }
    Ok(rows as f64 / seconds)
}

fn requests(n: usize, prompt_tokens: usize, new_tokens: usize) -> Vec<Request> {
    (0..n)
        .map(|i| Request {
            prompt_ids: (0..prompt_tokens).map(|k| ((k * 37 + i * 11) % 900 + 20) as i64).collect(),
            streams: vec![Stream { seed: 0, prompt: i as u64, sample: 0 }],
            max_new_tokens: new_tokens,
            turns: 1,
            extra_tokens: 0,
        })
        .collect()
}

/// New tokens a second, the prompts' prefill included, no token ending a sequence.
fn sampling(decoder: &Decoder, rows: usize, new_tokens: usize) -> anyhow::Result<f64> {
    let options = Options::new(Sampling::at(0.7), Vec::new());
    let requests = requests(rows, 16, new_tokens);
    let start = Instant::now();
    generate::complete(decoder, None, None, &requests, &options)?;
    Ok((rows * new_tokens) as f64 / start.elapsed().as_secs_f64())
}

pub(super) fn run(arguments: &Bench) -> anyhow::Result<()> {
    let (mut model, _) = arguments.model.load()?;
    let mut rows: Vec<(String, f64, f64)> = Vec::new();
    {
        let _guard = tch::no_grad_guard();
        let batch = arguments.batch;
        let bound = ceiling(&model.decoder, batch, true)?;
        sampling(&model.decoder, batch, 4)?;
        let figure = sampling(&model.decoder, batch, arguments.new_tokens)?;
        rows.push((format!("sampling, {batch} sequences, tokens/s"), figure, bound));

        let bound = ceiling(&model.decoder, 512, false)?;
        let prefill = Batch::from_sequences(&vec![vec![7i64; 128]; 8]);
        let seconds = time(|| Ok(model.decoder.forward(&prefill, None).map(drop)?))?;
        rows.push(("prefill, 8 × 128 tokens, tokens/s".to_owned(), 1024.0 / seconds, bound));

        let bound = ceiling(&model.decoder, 1, true)?;
        model.decoder.set_packed_decoding(true);
        sampling(&model.decoder, 1, 8)?;
        let figure = sampling(&model.decoder, 1, arguments.new_tokens)?;
        rows.push(("one sequence, tokens/s (ceiling: dense products)".to_owned(), figure, bound));
        model.decoder.set_packed_decoding(false);
    }
    let config = LoraConfig::default();
    let mut adapter =
        Adapter::new("bench", model.decoder.config(), &config, 0, model.decoder.device())?;
    adapter.set_trainable(true);
    let batch = Batch::from_sequences(&vec![vec![7i64; 100]; 16]);
    let counted: Vec<usize> = (0..1600).filter(|row| row % 100 != 0).collect();
    // Forward, and backward to the inputs alone: two products for each of the forward pass, three with the vocabulary's.
    let bound = ceiling(&model.decoder, 512, true)? / 2.0;
    let seconds = time(|| {
        let pass = model.decoder.pass(&batch, &adapter, false)?;
        let found = logprobs::of_rows(&model.decoder, &pass.hidden, &batch, &counted, 1.0, false)?;
        Ok(pass.backward(&-found.logprob.mean(Kind::Float))?)
    })?;
    rows.push(("SFT step, 16 × 100 tokens, tokens/s".to_owned(), 1600.0 / seconds, bound));

    let mut out = std::io::stdout().lock();
    writeln!(out, "| work | figure | products alone | ratio |\n|---|---|---|---|")?;
    for (work, figure, bound) in rows {
        writeln!(out, "| {work} | {figure:.0} | {bound:.0} | {:.2} |", figure / bound)?;
    }
    let status = fs_err::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or("VmHWM: unknown");
    writeln!(out, "\npeak memory: {}", peak.trim_start_matches("VmHWM:").trim())
        .context("writing to stdout")
}
