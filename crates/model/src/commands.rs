//! The commands of `arete-model`. Results go to stdout, logs to stderr.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::ArgAction;
use serde_json::json;

use arete_model::adapter::{self, LoadedAdapter, Task};
use arete_model::machine::{self, Dtype};
use arete_model::{
    Batch, Checkpoint, Device, Kind, LoadOptions, Model, Nf4Options, Source, adapter::merge,
    kernels_name, nf4,
};

mod bench;
mod generate;
mod lines;
mod logprobs;
mod soup;

/// Generate, score, inspect and convert Llama and Mistral models
#[derive(Debug, clap::Parser)]
#[command(name = "arete-model", version, after_help = EXAMPLES)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "Examples:
  arete-model generate --model DIR --prompt 'How do I apologise?'
  arete-model logprobs --model FILE.gguf --jsonl conversations.jsonl
  arete-model inspect --model owner/name
  arete-model merge --model DIR --adapter ADAPTER --output MERGED
  arete-model soup honest/adapter=0.3 prudent/adapter=0.7 --output SOUP";

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Complete one prompt, or every line of a JSON Lines file
    Generate(generate::Generate),
    /// Log-probability of every token of every line
    Logprobs(logprobs::Logprobs),
    /// Talk with a model; an empty line ends the talk
    Chat(generate::Chat),
    /// Show the architecture, the tensors and the memory needed
    Inspect(Inspect),
    /// Write a model with the matrices of its blocks in four bits (NF4, as transformers saves with bitsandbytes)
    Quantize(Quantize),
    /// Write a model with an adapter merged in, in the model's own dtype where that has 16 bits and --dtype names no other
    Merge(Merge),
    /// Write adapters of one base as one adapter: the weighted sum of what each changes, exactly (its rank is the sum of theirs)
    Soup(soup::Soup),
    /// Measure sampling, prefill and training against this machine's matrix products
    Bench(bench::Bench),
    /// Show what this machine is and what of it is used, as JSON: CPU, instruction sets, cores, threads, number format, GPUs
    Machine,
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
    /// Where to compute: cpu, cuda, cuda:N, or auto
    #[arg(long, default_value = "auto", value_parser = parse_device)]
    device: Device,
    /// Number format of weights and activations
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    dtype: Dtype,
    /// Hold the blocks' matrices in four bits (NF4)
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    nf4: bool,
    /// Quantise the NF4 scales as well, for adapters trained with double_quantize = true
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    double_quantize: bool,
}

fn parse_device(text: &str) -> Result<Device, String> {
    machine::device(text).map_err(|error| error.to_string())
}

/// A whole number within bounds, for a flag.
fn ranged(low: u64, high: u64) -> impl Fn(&str) -> Result<usize, String> + Clone + Send + Sync {
    move |text: &str| {
        let number = text.parse::<u64>().ok().filter(|number| (low..=high).contains(number));
        let number = number.and_then(|number| usize::try_from(number).ok());
        number.ok_or_else(|| format!("expected a whole number from {low} to {high}"))
    }
}

/// The format that a name stands for in a file, whatever the device computes in; none of `auto`.
fn stored(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::Auto => None,
        Dtype::F32 => Some(Kind::Float),
        Dtype::Bf16 => Some(Kind::BFloat16),
        Dtype::F16 => Some(Kind::Half),
    }
}

impl ModelArgs {
    fn packing(&self) -> Nf4Options {
        Nf4Options { double_quantize: self.double_quantize, ..Nf4Options::default() }
    }

    fn options(&self) -> LoadOptions {
        machine::load_options(self.device, self.dtype, self.nf4, self.double_quantize)
    }

    fn load(&self) -> anyhow::Result<(Model, Option<LoadedAdapter>)> {
        // The hash reads the whole model once more, and only an adapter asks for it.
        let load = if self.adapter.is_some() { Model::load } else { Model::load_unhashed };
        let source = unchanged(&self.model)?;
        if let Some(dir) = &self.adapter {
            arete_stage::inputs::check(dir)?;
        }
        let model =
            load(&source, &self.options()).with_context(|| format!("loading {}", self.model))?;
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
                let loaded = adapter::load(dir, "adapter", &model.config, self.device)
                    .with_context(|| format!("loading adapter {}", dir.display()))?;
                loaded.meta.check_base(&model)?;
                Some(loaded)
            }
        };
        Ok((model, adapter))
    }
}

/// A model by its name, compared with what the stage that made it recorded, if a stage of ours did.
fn unchanged(model: &str) -> anyhow::Result<Source> {
    let source = Source::parse(model)?;
    if let Some(path) = source.local_path() {
        arete_stage::inputs::check(path)?;
    }
    Ok(source)
}

fn show_machine() -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(&machine::Machine::look())?;
    writeln!(std::io::stdout().lock(), "{text}").context("writing to stdout")
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
    /// Quantise the NF4 scales as well
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    double_quantize: bool,
    /// Number format of everything else; auto = bf16
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    dtype: Dtype,
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
pub(crate) fn run(arguments: Arguments) -> anyhow::Result<()> {
    match arguments.command {
        Command::Generate(arguments) => generate::run(&arguments),
        Command::Logprobs(arguments) => logprobs::run(&arguments),
        Command::Chat(arguments) => generate::chat(&arguments),
        Command::Inspect(arguments) => run_inspect(&arguments),
        Command::Quantize(arguments) => run_quantize(&arguments),
        Command::Merge(arguments) => run_merge(&arguments),
        Command::Soup(arguments) => soup::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Machine => show_machine(),
    }
}

fn run_inspect(arguments: &Inspect) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(&unchanged(&arguments.model)?)?;
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
    let double_quantize = arguments.double_quantize;
    let options = Nf4Options { double_quantize, ..Nf4Options::default() };
    let dtype = stored(arguments.dtype).unwrap_or(Kind::BFloat16);
    let source = unchanged(&arguments.model)?;
    nf4::write_packed(&source, &arguments.output, options, dtype)
        .with_context(|| format!("quantising {}", arguments.model))?;
    tracing::info!(output = %arguments.output.display(), "written");
    Ok(())
}

fn run_merge(arguments: &Merge) -> anyhow::Result<()> {
    let (model, adapter) = arguments.model.load()?;
    let Some(loaded) = adapter else {
        bail!(arete_stage::exit::Usage("merge needs --adapter DIR".to_owned()))
    };
    let source = Source::parse(&arguments.model.model)?;
    let packed = model.decoder.quantization().filter(|_| arguments.model.nf4);
    let dtype = match stored(arguments.model.dtype) {
        Some(dtype) => dtype,
        None => merge::output_dtype(&source, model.decoder.kind())?,
    };
    let (adapter, head) = (&loaded.adapter, loaded.head.as_ref());
    check_task(&model, &loaded)?;
    let (output, extra) = (&arguments.output, serde_json::Map::new());
    let staged = merge::Staged::write(&source, Some(adapter), head, output, dtype, packed, extra)?;
    let merged = Source::Directory(staged.path().to_path_buf());
    let options = LoadOptions { nf4: None, ..arguments.model.options() };
    let merged = Model::streamed(&merged, &options)?;
    let ids = model.tokenizer.encode("What is the motivation behind the answer?", true)?;
    let batch = Batch::from_sequences(&[ids]);
    let difference = merge::max_logit_difference(&merged, &model, adapter, &batch)?;
    staged.commit()?;
    let what = if merged.decoder.has_head() { "logits" } else { "hidden states" };
    tracing::info!(output = %output.display(), difference, "merged; largest difference of {what}");
    Ok(())
}

/// Refuses to merge a language model's adapter into a reward model: neither comes of it.
fn check_task(model: &Model, loaded: &LoadedAdapter) -> anyhow::Result<()> {
    if model.config.sequence_classification && loaded.meta.task == Task::CausalLm {
        bail!(arete_stage::exit::BadInput(
            "task_type: expected an adapter of a reward model (SEQ_CLS) for a base that is one (…ForSequenceClassification), \
             found one of a language model (CAUSAL_LM)"
                .to_owned()
        ))
    }
    Ok(())
}
