//! `arete-curation`: see the library's documentation for what the subcommands do.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use arete_curation::bench::BenchConfig;
use arete_curation::calibrate::CalibrateConfig;
use arete_curation::conversations::ConversationsConfig;
use arete_curation::demonstrations::DemonstrationsConfig;
use arete_curation::lessons::LessonsConfig;
use arete_curation::preferences::PreferencesConfig;
use arete_curation::preferences::labelled::LabelledConfig;
use arete_curation::prompts::PromptsConfig;
use arete_curation::stage::{Estimate, Work};
use arete_curation::{
    bench, calibrate, conversations, demonstrations, export, lessons, merge, preferences, prompts,
};
use arete_stage::cli::{self, StageArgs};
use arete_stage::dry::DryRun;
use arete_stage::inputs::Piped;
use arete_stage::run::asking;
use arete_stage::{interrupt, recipe};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use serde::Serialize;

/// Curates data for RLAIF: prompts, demonstrations, conversations, judged preference pairs
#[derive(Parser)]
#[command(version, name = "arete-curation")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Reads prompts from files or the hub, deduplicates, spreads and splits them
    Prompts {
        /// Files or directories (.jsonl, .json, .csv, .tsv, .txt, .parquet), or hub ids like Anthropic/hh-rlhf
        #[arg(long, required = true, num_args = 1.., value_name = "F")]
        input: Vec<String>,
        #[command(flatten)]
        stage: StageArgs,
        #[command(flatten)]
        config: PromptsConfig,
    },
    /// Has a model answer, criticise and revise by the constitution; adds the shipped exemplars
    Demonstrations {
        /// Directory of the prompts; not needed with --source own
        #[arg(long, value_name = "DIR")]
        prompts: Option<PathBuf>,
        /// Model directory, GGUF file or hub id (or the name a server knows it by); not needed with
        /// --source own
        #[arg(long, value_name = "MODEL")]
        model: Option<String>,
        #[command(flatten)]
        stage: StageArgs,
        #[command(flatten)]
        config: DemonstrationsConfig,
    },
    /// Samples two or more chains of answer, motivation and consequence for every prompt
    Conversations {
        /// Directory of the prompts
        #[arg(long, value_name = "DIR")]
        prompts: PathBuf,
        /// Model directory, GGUF file or hub id (or the name a server knows it by)
        #[arg(long, value_name = "MODEL")]
        model: String,
        /// The model before SFT, which --personas original draws each second sample from
        #[arg(long, value_name = "MODEL")]
        original: Option<String>,
        #[command(flatten)]
        stage: StageArgs,
        #[command(flatten)]
        config: ConversationsConfig,
    },
    /// Has a judge compare the two samples of every prompt by five virtues, aspect by aspect
    Preferences {
        /// Directory of the conversations
        #[arg(long, value_name = "DIR")]
        conversations: PathBuf,
        /// Judging model (directory, GGUF file, hub id, or a server's name); not needed with
        /// --method contrast
        #[arg(long, value_name = "MODEL")]
        judge: Option<String>,
        #[command(flatten)]
        stage: StageArgs,
        #[command(flatten)]
        config: PreferencesConfig,
    },
    /// Writes labelled pairs as preferences, a directory for each aspect or virtue, without a judge
    Labelled {
        /// Files of labelled pairs (hh-rlhf, HHH, HarmfulVsEthical, our exemplars or virtue pairs)
        #[arg(long, required = true, num_args = 1.., value_name = "F")]
        pairs: Vec<PathBuf>,
        /// Directory that receives <aspect or virtue>/{train,validation,test}.parquet
        #[arg(long, value_name = "DIR")]
        output: PathBuf,
        #[command(flatten)]
        config: LabelledConfig,
    },
    /// Measures how far every judging method agrees with labelled pairs
    Calibrate {
        /// Files of labelled pairs (hh-rlhf, HHH, HarmfulVsEthical, or our exemplars)
        #[arg(long, required = true, num_args = 1.., value_name = "F")]
        pairs: Vec<PathBuf>,
        /// Judging model (directory, GGUF file, hub id, or a server's name)
        #[arg(long, value_name = "MODEL")]
        model: String,
        #[command(flatten)]
        stage: StageArgs,
        #[command(flatten)]
        config: CalibrateConfig,
    },
    /// Writes labelled pairs as conversations that train a judge's adapter with `arete-sft train`
    Lessons {
        /// Files of labelled pairs (hh-rlhf, HHH, HarmfulVsEthical, or our exemplars)
        #[arg(long, required = true, num_args = 1.., value_name = "F")]
        pairs: Vec<PathBuf>,
        /// The file to write (.jsonl)
        #[arg(long, value_name = "F")]
        output: PathBuf,
        #[command(flatten)]
        config: LessonsConfig,
    },
    /// Measures conversations and judging against this machine's matrix products
    Bench {
        /// Model directory, GGUF file or hub id
        #[arg(long, value_name = "MODEL")]
        model: String,
        #[command(flatten)]
        config: BenchConfig,
    },
    /// Joins the parts of a job array (runs with --shard) into the stage's result
    Merge {
        /// The output directories of all parts
        #[arg(long, required = true, num_args = 1.., value_name = "DIR")]
        parts: Vec<PathBuf>,
        /// Directory that receives the results
        #[arg(long, value_name = "DIR")]
        output: PathBuf,
    },
    /// Writes preferences in another program's form
    Export {
        /// The form
        #[arg(long = "as", value_enum, value_name = "FORM")]
        form: export::Form,
        /// A preference file, or the directory of one aspect
        #[arg(long, value_name = "PATH")]
        input: PathBuf,
        /// The file to write
        #[arg(long, value_name = "F")]
        output: PathBuf,
    },
}

fn main() -> ExitCode {
    cli::init_tracing();
    arete_stage::exit::run(run, arete_engine::class_of)
}

fn run() -> anyhow::Result<()> {
    let matches = cli::matches(Cli::command());
    interrupt::install()?;
    let parsed = Cli::from_arg_matches(&matches)?;
    let (name, matches) = matches.subcommand().context("no subcommand")?;
    match parsed.command {
        Command::Prompts { input, stage, .. } => {
            let config: PromptsConfig = recipe::resolve(matches, name, stage.recipe.as_deref())?;
            let estimate = || prompts::estimate(&config, &input);
            either(stage.dry_run, &config, estimate, || {
                prompts::run(&config, &input, &stage.output)
            })
        }
        Command::Demonstrations { prompts, model, stage, .. } => {
            let config: DemonstrationsConfig =
                recipe::resolve(matches, name, stage.recipe.as_deref())?;
            let inputs = demonstrations::Inputs { prompts, model };
            let estimate = || demonstrations::estimate(&config, &inputs, &stage.output);
            let work = Work::Compute;
            either(stage.dry_run, &config, estimate, || {
                demonstrations::run(&config, &inputs, &stage.output, &work)
            })
        }
        Command::Conversations { prompts, model, original, stage, .. } => {
            let config: ConversationsConfig =
                recipe::resolve(matches, name, stage.recipe.as_deref())?;
            let inputs = conversations::Inputs { prompts, model, original };
            let estimate = || conversations::estimate(&config, &inputs, &stage.output);
            let work = Work::Compute;
            either(stage.dry_run, &config, estimate, || {
                conversations::run(&config, &inputs, &stage.output, &work)
            })
        }
        Command::Preferences { conversations, judge, stage, .. } => {
            let config: PreferencesConfig =
                recipe::resolve(matches, name, stage.recipe.as_deref())?;
            let inputs = preferences::Inputs { conversations, judge };
            let estimate = || preferences::estimate(&config, &inputs, &stage.output);
            let work = Work::Compute;
            either(stage.dry_run, &config, estimate, || {
                preferences::run(&config, &inputs, &stage.output, &work)
            })
        }
        Command::Labelled { pairs, output, config } => {
            let mut piped = Piped::default();
            let pairs = piped.all_local(&pairs)?;
            Ok(preferences::labelled::run(&config, &pairs, &output)?)
        }
        Command::Calibrate { pairs, model, stage, .. } => {
            let config: CalibrateConfig = recipe::resolve(matches, name, stage.recipe.as_deref())?;
            let mut piped = Piped::default();
            let pairs = piped.all_local(&pairs)?;
            let inputs = calibrate::Inputs { pairs, model };
            let estimate = || calibrate::estimate(&config, &inputs, &stage.output);
            either(stage.dry_run, &config, estimate, || {
                calibrate::run(&config, &inputs, &stage.output)
            })
        }
        Command::Lessons { pairs, output, config } => {
            let mut piped = Piped::default();
            lessons::write(&config, &piped.all_local(&pairs)?, &output)?;
            Ok(())
        }
        Command::Bench { model, config } => {
            Ok(bench::run(&config, &model, &mut std::io::stdout().lock())?)
        }
        Command::Merge { parts, output } => merge::merge(&parts, &output)
            .with_context(|| format!("merging into {}", output.display())),
        Command::Export { form, input, output } => {
            let n_pairs = export::export(form, &input, &output)?;
            tracing::info!(n_pairs, output = %output.display(), "exported");
            Ok(())
        }
    }
}

/// Runs a stage, or prints what it would do as JSON on stdout.
fn either(
    dry_run: bool,
    config: &impl Serialize,
    estimate: impl FnOnce() -> anyhow::Result<Estimate>,
    stage: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    if !dry_run {
        return stage();
    }
    let found = asking(stage)?;
    let Estimate { stage, counts, n_tokens, seconds, memory } = estimate()?;
    let plan = DryRun::new(stage, config, found).costing(counts, n_tokens, seconds).taking(memory);
    Ok(plan.print()?)
}
