//! `arete-sft`: supervised fine-tuning on demonstrations.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use arete_sft::Config;
use arete_sft::bench::Bench;
use arete_stage::cli::{self, StageArgs};
use arete_stage::inputs::Piped;
use arete_stage::{interrupt, recipe};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

/// Teach a chat model to answer as demonstrations do.
#[derive(Debug, Parser)]
#[command(name = "arete-sft", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a LoRA adapter on demonstrations; write it and the merged model
    #[command(after_help = "Example:\n  arete-sft train --recipe recipes/recommended.toml \
        --demonstrations runs/demo/demonstrations --model models/SmolLM2-135M-Instruct --output runs/demo/sft")]
    Train {
        #[command(flatten)]
        stage: StageArgs,
        /// Directory with demonstrations.parquet, or a Parquet or JSON-lines file with `messages`, or `prompt` and `completion`
        #[arg(long, value_name = "PATH")]
        demonstrations: PathBuf,
        #[command(flatten)]
        config: Box<Config>,
    },
    /// Measure training against this machine's matrix products
    #[command(after_help = "Example:\n  arete-sft bench --model models/SmolLM2-135M-Instruct")]
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
    let (stage, demonstrations) = match Cli::from_arg_matches(&matches)?.command {
        Command::Train { stage, demonstrations, .. } => (stage, demonstrations),
        Command::Bench { bench } => return arete_sft::bench::run(&bench).context("measuring"),
    };
    let matches = matches.subcommand_matches("train").expect("the command parsed");
    let config: Config = recipe::resolve(matches, "sft", stage.recipe.as_deref())?;
    let mut piped = Piped::default();
    let local = piped.local(&demonstrations)?;
    if stage.dry_run {
        return Ok(arete_sft::dry_run(&config, &local, &stage.output)?.print()?);
    }
    interrupt::install()?;
    arete_sft::train(&config, &local, &stage.output)
        .with_context(|| format!("training on {}", demonstrations.display()))
}
