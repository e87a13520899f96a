//! `arete-dpo`: direct preference optimisation.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use arete_dpo::Config;
use arete_dpo::bench::Bench;
use arete_stage::cli::{self, StageArgs};
use arete_stage::{interrupt, recipe};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

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
    #[command(after_help = "Example:\n  arete-dpo train --recipe recipes/recommended.toml \
        --preferences runs/demo/preferences --model runs/demo/sft/merged --output runs/demo/dpo")]
    Train {
        #[command(flatten)]
        stage: StageArgs,
        /// Directory with <aspect>/{train,validation}.parquet
        #[arg(long, value_name = "DIR")]
        preferences: PathBuf,
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
    arete_stage::exit::exit_code(run(), arete_dpo::class_of)
}

fn run() -> anyhow::Result<()> {
    let matches = Cli::command().get_matches();
    let (stage, preferences) = match Cli::from_arg_matches(&matches)?.command {
        Command::Train { stage, preferences, .. } => (stage, preferences),
        Command::Bench { bench } => return arete_dpo::bench::run(&bench).context("measuring"),
    };
    let matches = matches.subcommand_matches("train").expect("the command parsed");
    let config: Config = recipe::resolve(matches, "dpo", stage.recipe.as_deref())?;
    interrupt::install()?;
    arete_dpo::train(&config, &preferences, &stage.output)
        .with_context(|| format!("training on {}", preferences.display()))
}
