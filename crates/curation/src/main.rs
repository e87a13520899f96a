//! `arete-curation`: see the library's documentation for what the subcommands do.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use arete_curation::bench::BenchConfig;
use arete_curation::calibrate::CalibrateConfig;
use arete_curation::conversations::ConversationsConfig;
use arete_curation::demonstrations::DemonstrationsConfig;
use arete_curation::lessons::LessonsConfig;
use arete_curation::preferences::PreferencesConfig;
use arete_curation::prompts::PromptsConfig;
use arete_curation::stage::{Estimate, Work};
use arete_curation::{
    Error, bench, calibrate, conversations, demonstrations, export, lessons, merge, preferences,
    prompts,
};
use arete_stage::cli::{self, StageArgs};
use arete_stage::{interrupt, recipe};
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};

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
        dry: DryRun,
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
        dry: DryRun,
        #[command(flatten)]
        config: DemonstrationsConfig,
    },
    /// Samples two chains of answer, motivation and consequence for every prompt
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
        dry: DryRun,
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
        dry: DryRun,
        #[command(flatten)]
        config: PreferencesConfig,
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
        dry: DryRun,
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

#[derive(clap::Args)]
struct DryRun {
    /// Print counts, tokens and a time estimate; write nothing
    #[arg(long)]
    dry_run: bool,
}

fn main() -> ExitCode {
    let matches = Cli::command().get_matches();
    cli::init_tracing();
    arete_stage::exit::run(|| run(&matches), arete_curation::class_of)
}

fn run(matches: &ArgMatches) -> anyhow::Result<()> {
    interrupt::install()?;
    let parsed = Cli::from_arg_matches(matches)?;
    let (name, matches) = matches.subcommand().context("no subcommand")?;
    match parsed.command {
        Command::Prompts { input, stage, dry, .. } => {
            let config: PromptsConfig = recipe::resolve(matches, name, stage.recipe.as_deref())?;
            let estimate = || prompts::estimate(&config, &input);
            either(dry, estimate, || prompts::run(&config, &input, &stage.output))
        }
        Command::Demonstrations { prompts, model, stage, dry, .. } => {
            let config: DemonstrationsConfig =
                recipe::resolve(matches, name, stage.recipe.as_deref())?;
            let inputs = demonstrations::Inputs { prompts, model };
            let estimate = || demonstrations::estimate(&config, &inputs, &stage.output);
            let work = Work::Compute;
            either(dry, estimate, || demonstrations::run(&config, &inputs, &stage.output, &work))
        }
        Command::Conversations { prompts, model, original, stage, dry, .. } => {
            let config: ConversationsConfig =
                recipe::resolve(matches, name, stage.recipe.as_deref())?;
            let inputs = conversations::Inputs { prompts, model, original };
            let estimate = || conversations::estimate(&config, &inputs, &stage.output);
            let work = Work::Compute;
            either(dry, estimate, || conversations::run(&config, &inputs, &stage.output, &work))
        }
        Command::Preferences { conversations, judge, stage, dry, .. } => {
            let config: PreferencesConfig =
                recipe::resolve(matches, name, stage.recipe.as_deref())?;
            let inputs = preferences::Inputs { conversations, judge };
            let estimate = || preferences::estimate(&config, &inputs, &stage.output);
            let work = Work::Compute;
            either(dry, estimate, || preferences::run(&config, &inputs, &stage.output, &work))
        }
        Command::Calibrate { pairs, model, stage, dry, .. } => {
            let config: CalibrateConfig = recipe::resolve(matches, name, stage.recipe.as_deref())?;
            let inputs = calibrate::Inputs { pairs, model };
            let estimate = || calibrate::estimate(&config, &inputs, &stage.output);
            either(dry, estimate, || calibrate::run(&config, &inputs, &stage.output))
        }
        Command::Lessons { pairs, output, config } => {
            lessons::write(&config, &pairs, &output)?;
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
    dry: DryRun,
    estimate: impl FnOnce() -> Result<Estimate, Error>,
    stage: impl FnOnce() -> Result<(), Error>,
) -> anyhow::Result<()> {
    if !dry.dry_run {
        return Ok(stage()?);
    }
    let text = serde_json::to_string_pretty(&estimate()?)?;
    writeln!(std::io::stdout(), "{text}")?;
    Ok(())
}
