//! `arete-dpo`: direct preference optimisation.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use arete_dpo::bench::Bench;
use arete_dpo::{Config, PairSource};
use arete_records::table::Column;
use arete_stage::cli::{self, StageArgs};
use arete_stage::inputs::Piped;
use arete_stage::{interrupt, recipe};
use clap::{ArgGroup, CommandFactory, FromArgMatches, Parser, Subcommand};

/// Teach a chat model which of two conversations is better, without reward models.
#[derive(Debug, Parser)]
#[command(name = "arete-dpo", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a LoRA policy on preferences (recipe table [dpo]); write it and the merged model
    #[command(after_help = "Examples:\n  arete-dpo train --recipe recipes/recommended.toml \
        --preferences runs/demo/preferences --model runs/demo/sft/merged --output runs/demo/dpo\n  \
        arete-dpo train --pairs mine.csv --column prompt=question --model models/SmolLM2-135M-Instruct --output runs/mine")]
    #[command(group = ArgGroup::new("data").required(true))]
    Train {
        #[command(flatten)]
        stage: StageArgs,
        /// Directory with <aspect>/{train,validation}.parquet
        #[arg(long, value_name = "DIR", group = "data")]
        preferences: Option<PathBuf>,
        /// Instead of those, a file of labelled pairs in any of the layouts (CSV, JSON, JSON lines, Parquet; - is a pipe)
        #[arg(long, value_name = "FILE", group = "data")]
        pairs: Option<PathBuf>,
        #[command(flatten)]
        config: Box<Config>,
    },
    /// Measure training against this machine's matrix products
    #[command(after_help = "Example:\n  arete-dpo bench --model models/SmolLM2-135M-Instruct")]
    Bench {
        #[command(flatten)]
        bench: Bench,
    },
}

fn main() -> ExitCode {
    cli::init_tracing();
    arete_stage::exit::run(run, arete_training::class_of)
}

fn run() -> anyhow::Result<()> {
    let matches = cli::matches(Cli::command());
    let (stage, preferences, pairs) = match Cli::from_arg_matches(&matches)?.command {
        Command::Train { stage, preferences, pairs, .. } => (stage, preferences, pairs),
        Command::Bench { bench } => return arete_dpo::bench::run(&bench).context("measuring"),
    };
    let matches = matches.subcommand_matches("train").expect("the command parsed");
    let config: Config = recipe::resolve(matches, "dpo", stage.recipe.as_deref())?;
    Column::check_used(config.column.as_deref(), pairs.as_deref())?;
    let mut piped = Piped::default();
    let source = match (preferences, pairs) {
        (Some(dir), _) => PairSource::Preferences(dir),
        (None, Some(file)) => PairSource::Pairs(piped.local(&file)?),
        (None, None) => unreachable!("clap demands one of them"),
    };
    if stage.dry_run {
        return Ok(arete_dpo::dry_run(&config, &source, &stage.output)?.print()?);
    }
    interrupt::install()?;
    arete_dpo::train(&config, &source, &stage.output)
        .with_context(|| format!("training on {}", source.path().display()))
}
