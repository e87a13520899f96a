//! `arete-model bench`: this model's work beside this machine's matrix products, in one run.

use std::time::Instant;

use anyhow::Context;
use tch::Kind;

use super::ModelArgs;
use crate::bench::{Table, products_per_s, time};
use crate::generate::{self, Options, Request, Sampling, Stream};
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
    let mut table = Table::default();
    {
        let _guard = tch::no_grad_guard();
        let batch = arguments.batch;
        let bound = products_per_s(&model.decoder, batch, true)?;
        sampling(&model.decoder, batch, 4)?;
        let figure = sampling(&model.decoder, batch, arguments.new_tokens)?;
        let work = format!("sampling, {batch} sequences");
        table.push(work, figure, "tokens/s", Some(bound), "ceiling: products");

        let bound = products_per_s(&model.decoder, 512, false)?;
        let prefill = Batch::from_sequences(&vec![vec![7i64; 128]; 8]);
        let seconds = time(1.0, || model.decoder.forward(&prefill, None).map(drop))?;
        table.push(
            "prefill, 8 × 128 tokens",
            1024.0 / seconds,
            "tokens/s",
            Some(bound),
            "ceiling: products",
        );

        let bound = products_per_s(&model.decoder, 1, true)?;
        model.decoder.set_packed_decoding(true);
        sampling(&model.decoder, 1, 8)?;
        let figure = sampling(&model.decoder, 1, arguments.new_tokens)?;
        table.push("one sequence", figure, "tokens/s", Some(bound), "ceiling: dense products");
        model.decoder.set_packed_decoding(false);
    }
    let config = LoraConfig::default();
    let mut adapter =
        Adapter::new("bench", model.decoder.config(), &config, 0, model.decoder.device())?;
    adapter.set_trainable(true);
    let batch = Batch::from_sequences(&vec![vec![7i64; 100]; 16]);
    let counted: Vec<usize> = (0..1600).filter(|row| row % 100 != 0).collect();
    // Forward, and backward to the inputs alone: two products for each of the forward pass, three with the vocabulary's.
    let bound = products_per_s(&model.decoder, 512, true)? / 2.0;
    let seconds = time(1.0, || -> anyhow::Result<()> {
        let pass = model.decoder.pass(&batch, &adapter, false)?;
        let found = logprobs::of_rows(&model.decoder, &pass.hidden, &batch, &counted, 1.0, false)?;
        Ok(pass.backward(&-found.logprob.mean(Kind::Float))?)
    })?;
    table.push(
        "SFT pass, 16 × 100 tokens",
        1600.0 / seconds,
        "tokens/s",
        Some(bound),
        "ceiling: products, twice",
    );
    table.write(&mut std::io::stdout().lock(), &model.decoder).context("writing to stdout")
}
