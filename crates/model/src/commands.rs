//! The commands of `arete-model`. Results go to stdout, logs to stderr.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use arete_records::{Message, cli};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::adapter_files::{self, LoadedAdapter};
use crate::generate::{self, Options, Request, Sampling, Stream};
use crate::{
    Batch, Checkpoint, Device, Kind, LoadOptions, Model, Nf4Options, Source, default_dtype,
    kernels_name, logprobs, merge,
};

mod bench;
mod push;

/// Generate, score, inspect and convert Llama and Mistral models
#[derive(Debug, clap::Parser)]
#[command(name = "arete-model", version, after_help = EXAMPLES)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "Examples:
  arete-model generate --model DIR --prompt 'How do I apologise?'
  arete-model logprobs --model FILE.gguf --jsonl conversations.jsonl
  arete-model inspect --model owner/name
  arete-model merge --model DIR --adapter ADAPTER --output MERGED";

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Complete one prompt, or every line of a JSON Lines file
    Generate(Generate),
    /// Log-probability of every token of every line
    Logprobs(Logprobs),
    /// Talk with a model; an empty line ends the talk
    Chat(Chat),
    /// Show the architecture, the tensors and the memory needed
    Inspect(Inspect),
    /// Write a model with its matrices rounded to four bits (dense file, NF4 values)
    Quantize(Quantize),
    /// Write a model with an adapter merged in
    Merge(Merge),
    /// Measure sampling, prefill and training against this machine's matrix products
    Bench(bench::Bench),
    /// Upload an adapter, a merged model or a data set to the hub, with a card
    Push(push::Push),
}

/// Which model, and how it is held.
#[derive(Debug, clap::Args)]
struct ModelArgs {
    /// Hugging Face directory, GGUF file or hub id (owner/name)
    #[arg(long, value_name = "DIR|FILE.gguf|ID")]
    model: String,
    /// Adapter directory (ours or peft's)
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Device: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu", value_parser = parse_device)]
    device: Device,
    /// Compute dtype: f32, bf16 or f16 [default: bf16 where the device computes in it, else f32]
    #[arg(long, value_parser = parse_dtype)]
    dtype: Option<Kind>,
    /// Hold the blocks' matrices in four bits (NF4, double quantisation)
    #[arg(long)]
    nf4: bool,
}

fn parse_device(text: &str) -> Result<Device, String> {
    match text.split_once(':') {
        None if text == "cpu" => Ok(Device::Cpu),
        None if text == "cuda" => Ok(Device::Cuda(0)),
        Some(("cuda", idx)) => {
            idx.parse().map(Device::Cuda).map_err(|_| format!("`{idx}` is no device number"))
        }
        _ => Err("expected cpu, cuda or cuda:N".to_owned()),
    }
}

fn parse_dtype(text: &str) -> Result<Kind, String> {
    match text {
        "f32" => Ok(Kind::Float),
        "bf16" => Ok(Kind::BFloat16),
        "f16" => Ok(Kind::Half),
        _ => Err("expected f32, bf16 or f16".to_owned()),
    }
}

impl ModelArgs {
    fn options(&self) -> LoadOptions {
        LoadOptions {
            device: self.device,
            dtype: self.dtype.unwrap_or_else(|| default_dtype(self.device)),
            nf4: self.nf4.then(Nf4Options::default),
        }
    }

    fn load(&self) -> anyhow::Result<(Model, Option<LoadedAdapter>)> {
        let model = Model::load(&Source::parse(&self.model)?, &self.options())
            .with_context(|| format!("loading {}", self.model))?;
        tracing::info!(
            model = %self.model,
            dtype = ?model.decoder.kind(),
            kernels = kernels_name(),
            mib = model.decoder.n_bytes() >> 20,
            "loaded"
        );
        let adapter = match &self.adapter {
            None => None,
            Some(dir) => {
                let loaded = adapter_files::load(dir, "adapter", &model.config, self.device)
                    .with_context(|| format!("loading adapter {}", dir.display()))?;
                loaded.meta.check_base(&model)?;
                Some(loaded)
            }
        };
        Ok((model, adapter))
    }
}

/// Settings of sampling.
#[derive(Debug, clap::Args)]
struct SamplingArgs {
    /// Divides the logits; 0 takes the most probable token
    #[arg(long, default_value_t = 0.7)]
    temperature: f64,
    /// Only the k most probable tokens; 0 for all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Only the smallest set of tokens with this mass; 1 for all
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Most new tokens
    #[arg(long, default_value_t = 128)]
    max_new_tokens: usize,
    /// Text that ends a completion; may be repeated
    #[arg(long = "stop", value_name = "TEXT")]
    stop: Vec<String>,
    /// Seed of all random streams
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl SamplingArgs {
    fn options(&self, model: &Model) -> anyhow::Result<Options> {
        let Self { temperature, top_k, top_p, .. } = *self;
        let mut options = Options::new(Sampling { temperature, top_k, top_p }, model.stop_ids()?);
        options.stop_strings = self.stop.clone();
        Ok(options)
    }

    fn request(&self, prompt_ids: Vec<i64>, prompt: u64) -> Request {
        Request {
            prompt_ids,
            streams: vec![Stream { seed: self.seed, prompt, sample: 0 }],
            max_new_tokens: self.max_new_tokens,
            turns: 1,
            extra_tokens: 0,
        }
    }
}

#[derive(Debug, clap::Args)]
struct Generate {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// One user turn to answer
    #[arg(long, required_unless_present = "jsonl", conflicts_with = "jsonl")]
    prompt: Option<String>,
    /// Lines of {"messages": […]} (answered through the chat template) or {"text": …} (continued as it is)
    #[arg(long, value_name = "FILE")]
    jsonl: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct Logprobs {
    #[command(flatten)]
    model: ModelArgs,
    /// Lines of {"messages": […]} or {"text": …}
    #[arg(long, value_name = "FILE")]
    jsonl: PathBuf,
}

#[derive(Debug, clap::Args)]
struct Chat {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

#[derive(Debug, clap::Args)]
struct Inspect {
    /// Hugging Face directory, GGUF file or hub id
    #[arg(long, value_name = "DIR|FILE.gguf|ID")]
    model: String,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
}

#[derive(Debug, clap::Args)]
struct Quantize {
    /// Hugging Face directory, GGUF file or hub id
    #[arg(long, value_name = "DIR|FILE.gguf|ID")]
    model: String,
    /// Directory to write
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Leave absmax in f32 instead of eight bits
    #[arg(long)]
    single: bool,
}

#[derive(Debug, clap::Args)]
struct Merge {
    #[command(flatten)]
    model: ModelArgs,
    /// Directory to write
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
}

/// Runs a command.
///
/// # Errors
///
/// Whatever went wrong, with its context; the binary prints it.
pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    match arguments.command {
        Command::Generate(arguments) => run_generate(&arguments),
        Command::Logprobs(arguments) => run_logprobs(&arguments),
        Command::Chat(arguments) => run_chat(&arguments),
        Command::Inspect(arguments) => run_inspect(&arguments),
        Command::Quantize(arguments) => run_quantize(&arguments),
        Command::Merge(arguments) => run_merge(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Push(arguments) => push::run(&arguments),
    }
}

/// One line of input.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Line {
    Messages { messages: Vec<Message> },
    Text { text: String },
}

fn read_lines(path: &Path) -> anyhow::Result<Vec<Line>> {
    let lines = arete_records::jsonl::read(path)?;
    lines
        .into_iter()
        .map(|(number, value)| {
            serde_json::from_value(value).map_err(|_| {
                let path = path.display();
                cli::BadInput(format!(
                    "{path}, line {number}: expected {{\"messages\": […]}} or {{\"text\": …}}"
                ))
                .into()
            })
        })
        .collect()
}

fn print_line(value: &Value) -> anyhow::Result<()> {
    writeln!(std::io::stdout().lock(), "{value}").context("writing to stdout")
}

fn run_generate(arguments: &Generate) -> anyhow::Result<()> {
    let lines = match (&arguments.prompt, &arguments.jsonl) {
        (Some(prompt), _) => vec![Line::Messages { messages: vec![Message::user(prompt)] }],
        (None, Some(path)) => read_lines(path)?,
        (None, None) => bail!("no prompt"),
    };
    let (mut model, adapter) = arguments.model.load()?;
    model.decoder.set_packed_decoding(lines.len() == 1);
    let chat = model.chat()?;
    let mut requests = Vec::with_capacity(lines.len());
    for (prompt, line) in lines.iter().enumerate() {
        let ids = match line {
            Line::Messages { messages } => chat.render_prompt(messages)?,
            Line::Text { text } => model.tokenizer.encode(text, true)?,
        };
        requests.push(arguments.sampling.request(ids, prompt as u64));
    }
    let options = arguments.sampling.options(&model)?;
    let adapter = adapter.as_ref().map(|loaded| &loaded.adapter);
    let progress = cli::progress("generating", "completions", requests.len() as u64);
    // Lines are printed in the order of the input, each as soon as all before it are.
    let (mut waiting, mut next) = (BTreeMap::new(), 0);
    let single = arguments.prompt.is_some();
    let print = |completion: &generate::Completion| -> anyhow::Result<()> {
        let text = chat.reply_text(&completion.token_ids)?;
        if single {
            return writeln!(std::io::stdout().lock(), "{text}").context("writing to stdout");
        }
        print_line(&json!({
            "text": text,
            "token_ids": completion.token_ids,
            "logprobs": completion.logprobs,
            "finish_reason": completion.finish_reason,
        }))
    };
    let mut failure = None;
    generate::run(
        &model.decoder,
        Some(&model.tokenizer),
        adapter,
        &requests,
        &options,
        &mut |_| Ok(Vec::new()),
        &mut |mut sequence| {
            progress.inc(1);
            waiting.insert(sequence.request, sequence.turns.pop().expect("one turn was sampled"));
            while let Some(completion) = waiting.remove(&next) {
                next += 1;
                if failure.is_none() {
                    failure = print(&completion).err();
                }
            }
            Ok(())
        },
    )?;
    failure.map_or(Ok(()), Err)
}

fn run_logprobs(arguments: &Logprobs) -> anyhow::Result<()> {
    let lines = read_lines(&arguments.jsonl)?;
    let (model, adapter) = arguments.model.load()?;
    let _guard = tch::no_grad_guard();
    let progress = cli::progress("logprobs", "lines", lines.len() as u64);
    for line in &lines {
        let ids = match line {
            Line::Messages { messages } => model.chat()?.render(messages)?.token_ids,
            Line::Text { text } => model.tokenizer.encode(text, true)?,
        };
        if ids.is_empty() {
            print_line(&json!({"token_ids": [], "logprobs": []}))?;
            continue;
        }
        let batch = Batch::from_sequences(&[&ids]);
        let adapter = adapter.as_ref().map(|loaded| &loaded.adapter);
        let hidden = model.decoder.forward(&batch, adapter)?;
        let rows: Vec<usize> = (1..ids.len()).collect();
        let logprob = match rows.is_empty() {
            true => Vec::new(),
            false => {
                let found = logprobs::of_rows(&model.decoder, &hidden, &batch, &rows, 1.0, false)?;
                Vec::<f32>::try_from(&found.logprob.to_device(Device::Cpu))?
            }
        };
        let logprob: Vec<Option<f32>> =
            std::iter::once(None).chain(logprob.into_iter().map(Some)).collect();
        print_line(&json!({"token_ids": ids, "logprobs": logprob}))?;
        progress.inc(1);
    }
    Ok(())
}

fn run_chat(arguments: &Chat) -> anyhow::Result<()> {
    let (mut model, adapter) = arguments.model.load()?;
    model.decoder.set_packed_decoding(true);
    let chat = model.chat()?;
    let options = arguments.sampling.options(&model)?;
    let adapter = adapter.as_ref().map(|loaded| &loaded.adapter);
    let mut messages: Vec<Message> = Vec::new();
    let mut input = BufReader::new(std::io::stdin());
    loop {
        write!(std::io::stdout().lock(), "> ").and_then(|()| std::io::stdout().flush())?;
        let mut line = String::new();
        if input.read_line(&mut line)? == 0 || line.trim().is_empty() {
            return Ok(());
        }
        messages.push(Message::user(line.trim()));
        let prompt = chat.render_prompt(&messages)?;
        let request = arguments.sampling.request(prompt, messages.len() as u64);
        let (decoder, tokenizer) = (&model.decoder, Some(&model.tokenizer));
        let completion = generate::complete(decoder, tokenizer, adapter, &[request], &options)?
            .remove(0)
            .remove(0);
        let reply = chat.reply_text(&completion.token_ids)?;
        writeln!(std::io::stdout().lock(), "{}", cli::printable(&reply))?;
        messages.push(Message::assistant(reply));
    }
}

fn run_inspect(arguments: &Inspect) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(&Source::parse(&arguments.model)?)?;
    let config = checkpoint.config();
    let (mut n_weights, mut n_linear) = (0i64, 0i64);
    let mut tensors = Vec::new();
    for name in checkpoint.names() {
        let shape = checkpoint.shape(&name)?;
        let n: i64 = shape.iter().product();
        n_weights += n;
        if name.contains("_proj.") {
            n_linear += n;
        }
        tensors.push(json!({"name": name, "shape": shape}));
    }
    let mib = |bytes: i64| (bytes >> 20).max(1);
    let others = n_weights - n_linear;
    let cache_bytes = 2 * (config.num_layers * config.num_kv_heads * config.head_size * 2) as i64;
    let mut out = json!({
        "config": config.to_json(Kind::BFloat16),
        "n_weights": n_weights,
        "weights_mib": {
            "f32": mib(4 * n_weights),
            "bf16": mib(2 * n_weights),
            "nf4": mib(2 * others + n_linear / 2 + n_linear / 16),
        },
        "kv_cache_bytes_per_token_bf16": cache_bytes,
    });
    if arguments.tensors {
        out["tensors"] = json!(tensors);
    }
    let text = serde_json::to_string_pretty(&out)?;
    writeln!(std::io::stdout().lock(), "{text}").context("writing to stdout")
}

fn run_quantize(arguments: &Quantize) -> anyhow::Result<()> {
    let options = Nf4Options { double_quantize: !arguments.single, ..Nf4Options::default() };
    let source = Source::parse(&arguments.model)?;
    let extra = serde_json::Map::new();
    merge::write_model(
        &source,
        None,
        None,
        &arguments.output,
        Kind::BFloat16,
        Some(options),
        extra,
    )?;
    tracing::info!(output = %arguments.output.display(), "written");
    Ok(())
}

fn run_merge(arguments: &Merge) -> anyhow::Result<()> {
    let (model, adapter) = arguments.model.load()?;
    let Some(loaded) = adapter else { bail!(cli::Usage("merge needs --adapter DIR".to_owned())) };
    let source = Source::parse(&arguments.model.model)?;
    let packed = model.decoder.quantization().filter(|_| arguments.model.nf4);
    let dtype = arguments.model.options().dtype;
    let (adapter, head) = (&loaded.adapter, loaded.head.as_ref());
    let extra = serde_json::Map::new();
    merge::write_model(&source, Some(adapter), head, &arguments.output, dtype, packed, extra)?;
    let merged = Source::Directory(arguments.output.clone());
    let options = LoadOptions { nf4: None, ..arguments.model.options() };
    let merged = Model::load(&merged, &options)?;
    let ids = model.tokenizer.encode("What is the motivation behind the answer?", true)?;
    let batch = Batch::from_sequences(&[ids]);
    let difference = merge::max_logit_difference(&merged, &model, adapter, &batch)?;
    tracing::info!(output = %arguments.output.display(), difference, "merged; largest difference of logits");
    Ok(())
}
