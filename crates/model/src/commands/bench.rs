//! `arete-model bench`: this model's work beside this machine's matrix products, in one run.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};
use tch::Kind;

use super::{ModelArgs, ranged};
use arete_model::bench::{Table, peak_rss_bytes, products, products_per_s, read_bytes_per_s, time};
use arete_model::generate::{self, Options, Request, Sampling, Stream};
use arete_model::{
    Adapter, Batch, Decoder, Device, LoadOptions, LoraConfig, Model, Source, logprobs,
};

/// Measure loading, sampling, prefill and training against this machine's matrix products
#[derive(Debug, clap::Args)]
pub(crate) struct Bench {
    #[command(flatten)]
    model: ModelArgs,
    /// Sequences sampled at a time
    #[arg(long, default_value_t = 64, value_parser = ranged(1, 1 << 16))]
    batch: usize,
    /// New tokens per sequence
    #[arg(long, default_value_t = 48, value_parser = ranged(1, 1 << 20))]
    new_tokens: usize,
    /// Only loading, packing to four bits, and one sequence: for a model that training does not fit beside
    #[arg(long)]
    decode_only: bool,
}

fn requests(n: usize, prompt_tokens: usize, new_tokens: usize) -> Vec<Request> {
    (0..n)
        .map(|i| Request {
            prompt_ids: (0..prompt_tokens).map(|k| ((k * 37 + i * 11) % 900 + 20) as i64).collect(),
            streams: vec![Stream { seed: 0, prompt: i as u64, sample: 0 }],
            tails: Vec::new(),
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

/// Tokens a second of one sequence, from its first new token on: the prompt is not in it.
fn decoding(decoder: &Decoder, new_tokens: usize) -> anyhow::Result<f64> {
    let options = Options::new(Sampling::at(0.7), Vec::new());
    let request = requests(1, 16, new_tokens.max(2)).remove(0);
    let mut times = Vec::with_capacity(request.max_new_tokens);
    generate::stream::<arete_model::Error>(decoder, None, None, &request, &options, &mut |_| {
        times.push(Instant::now());
        Ok(())
    })?;
    let seconds = times[times.len() - 1].duration_since(times[0]).as_secs_f64();
    Ok((times.len() - 1) as f64 / seconds)
}

pub(crate) fn run(arguments: &Bench) -> anyhow::Result<()> {
    let mut table = Table::default();
    // Programs of their own come first, while this one holds no memory and keeps no thread spinning.
    if !arguments.decode_only {
        let seconds = cold_start(&arguments.model)?;
        table.push("process start to first token", seconds, "s", None, "files in the page cache");
    }
    if arguments.model.device == Device::Cpu {
        push_packed(arguments, &mut table)?;
    }
    if arguments.decode_only {
        return write(&table, None);
    }
    let (model, _) = arguments.model.load()?;
    push_batches(arguments, &model.decoder, &mut table)?;
    push_training(&model.decoder, &mut table)?;
    write(&table, Some(&model.decoder))
}

fn write(table: &Table, decoder: Option<&Decoder>) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match decoder {
        Some(decoder) => table.write(&mut out, decoder),
        None => table.write_rows(&mut out),
    }
    .context("writing to stdout")
}

/// Seconds until `arete-model generate` of one token writes it, the fastest of three; the first also fills the page cache.
fn cold_start(model: &ModelArgs) -> anyhow::Result<f64> {
    let program = std::env::current_exe().context("finding this program")?;
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let mut command = Command::new(&program);
        command.args(["generate", "--prompt", "Hi", "--max-new-tokens", "1", "--model"]);
        command.arg(&model.model).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        if model.nf4 {
            command.arg("--nf4");
        }
        if model.double_quantize {
            command.arg("--double-quantize");
        }
        let start = Instant::now();
        let mut child = command.spawn().context("starting arete-model generate")?;
        let mut out = child.stdout.take().expect("its output was asked for");
        let first = out.read(&mut [0; 16]);
        let seconds = start.elapsed().as_secs_f64();
        std::io::copy(&mut out, &mut std::io::sink()).context("reading its output")?;
        let status = child.wait().context("waiting for arete-model generate")?;
        ensure!(status.success() && first? > 0, "arete-model generate ended with {status}");
        best = best.min(seconds);
    }
    Ok(best)
}

/// Loading and packing to four bits with the memory it takes, and one sequence from the packed weights.
fn push_packed(arguments: &Bench, table: &mut Table) -> anyhow::Result<()> {
    let _guard = tch::no_grad_guard();
    let options = LoadOptions { nf4: Some(arguments.model.packing()), ..arguments.model.options() };
    let start = Instant::now();
    let mut model = Model::load_unhashed(&Source::parse(&arguments.model.model)?, &options)?;
    let seconds = start.elapsed().as_secs_f64();
    let peak = peak_rss_bytes().map_or(f64::NAN, |bytes| bytes as f64 / (1u64 << 30) as f64);
    table.push("load and pack to NF4", seconds, "s", None, "");
    let held =
        format!("{:.2} GiB of weights held", model.decoder.n_bytes() as f64 / (1u64 << 30) as f64);
    table.push("its peak memory", peak, "GiB", None, held);
    let decoder = &mut model.decoder;
    decoder.set_packed_decoding(true);
    let bound = read_bytes_per_s()? / decoder.bytes_per_token() as f64;
    decoding(decoder, 8)?;
    let figure = decoding(decoder, arguments.new_tokens)?;
    table.push(
        "one sequence, four-bit weights",
        figure,
        "tokens/s",
        Some(bound),
        "ceiling: reading the weights once a token",
    );
    Ok(())
}

/// Sampling of many sequences and of one, and prefill.
fn push_batches(arguments: &Bench, decoder: &Decoder, table: &mut Table) -> anyhow::Result<()> {
    let _guard = tch::no_grad_guard();
    let batch = arguments.batch;
    for rows in [1, batch, 512] {
        let ratio = products(decoder, rows, rows < 512)?.ours_against_libtorch;
        table.push(
            format!("products of {rows} rows, ours against libtorch's"),
            ratio,
            "times",
            None,
            "both in turn",
        );
    }
    let bound = products_per_s(decoder, batch, true)?;
    sampling(decoder, batch, 4)?;
    let figure = sampling(decoder, batch, arguments.new_tokens)?;
    let work = format!("sampling, {batch} sequences");
    table.push(work, figure, "tokens/s", Some(bound), "ceiling: products");

    let bound = products_per_s(decoder, 512, false)?;
    let prefill = Batch::from_sequences(&vec![vec![7i64; 128]; 8]);
    let seconds = time(1.0, || decoder.forward(&prefill, None).map(drop))?;
    let work = "prefill, 8 × 128 tokens";
    table.push(work, 1024.0 / seconds, "tokens/s", Some(bound), "ceiling: products");

    let bound = products_per_s(decoder, 1, true)?;
    let figure = decoding(decoder, arguments.new_tokens)?;
    table.push("one sequence", figure, "tokens/s", Some(bound), "ceiling: products");
    Ok(())
}

fn push_training(decoder: &Decoder, table: &mut Table) -> anyhow::Result<()> {
    let config = LoraConfig::default();
    let mut adapter = Adapter::new("bench", decoder.config(), &config, 0, decoder.device())?;
    adapter.set_trainable(true);
    let batch = Batch::from_sequences(&vec![vec![7i64; 100]; 16]);
    let counted: Vec<usize> = (0..1600).filter(|row| row % 100 != 0).collect();
    // Forward, and backward to the inputs alone: two products for each of the forward pass, three with the vocabulary's.
    let bound = products_per_s(decoder, 512, true)? / 2.0;
    let seconds = time(1.0, || -> anyhow::Result<()> {
        let pass = decoder.pass(&batch, &adapter, false)?;
        let found = logprobs::of_rows(decoder, &pass.hidden, &batch, &counted, 1.0, false)?;
        Ok(pass.backward(&-found.logprob.mean(Kind::Float))?)
    })?;
    let work = "SFT pass, 16 × 100 tokens";
    table.push(work, 1600.0 / seconds, "tokens/s", Some(bound), "ceiling: products, twice");
    Ok(())
}
