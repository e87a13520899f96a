//! `arete-reward`: train reward models, score conversations with them.

use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::Context;
use arete_records::Aspect;
use arete_records::table::Column;
use arete_reward::bench::Bench;
use arete_reward::score::ScoreConfig;
use arete_reward::{Config, PreferenceSource, TrainInputs};
use arete_stage::cli::{self, StageArgs};
use arete_stage::inputs::Piped;
use arete_stage::{interrupt, recipe};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

/// Reward models: learn which of two conversations is better, and score conversations.
#[derive(Debug, Parser)]
#[command(name = "arete-reward", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Which reward models to train: those of all sets of preferences (none named), or that of one.
#[derive(Clone, Copy, Debug)]
struct Wanted(Option<Aspect>);

impl FromStr for Wanted {
    type Err = arete_records::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "all" { Ok(Self(None)) } else { text.parse().map(|aspect| Self(Some(aspect))) }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train reward models on preferences (recipe table [reward]), or one on human pairs ([yardstick])
    #[command(
        after_help = "Examples:\n  arete-reward train --aspect all --preferences runs/demo/preferences \
        --conversations runs/demo/conversations --model runs/demo/sft/merged --output runs/demo/reward\n  \
        arete-reward train --preferences runs/demo/preferences --pairs mine.csv --pairs-weight 0.5 --model runs/demo/sft/merged \
        --output runs/mixed\n  \
        arete-reward train --pairs hh-rlhf.jsonl.gz --model models/SmolLM2-135M-Instruct --output runs/yardstick"
    )]
    Train {
        #[command(flatten)]
        stage: StageArgs,
        /// The reward models to train: all that there are preferences for, or one, by the name of a turn of the constitution
        /// (action, motivation, consequence as shipped) or of a virtue; each goes into its own directory in --output
        #[arg(long, default_value = "all", value_name = "NAME")]
        aspect: Wanted,
        /// Directory with <name>/{train,validation}.parquet, a set of a turn or a virtue each
        #[arg(long, value_name = "DIR", required_unless_present = "pairs")]
        preferences: Option<PathBuf>,
        /// Human pairs (hh-rlhf's form, JSON lines, .gz too, or Parquet): without --preferences one reward model, into --output
        /// itself; with them mixed in (--pairs-weight, --pairs-aspect)
        #[arg(long, value_name = "FILE")]
        pairs: Option<PathBuf>,
        /// Directory with conversations.parquet, to standardise scores with (default: both sides of the validation pairs)
        #[arg(long, value_name = "DIR")]
        conversations: Option<PathBuf>,
        #[command(flatten)]
        config: Box<Config>,
    },
    /// Measure training against this machine's matrix products
    #[command(after_help = "Example:\n  arete-reward bench --model models/SmolLM2-135M-Instruct")]
    Bench {
        #[command(flatten)]
        bench: Bench,
    },
    /// Score conversations
    #[command(after_help = "Example:\n  arete-reward score --model runs/demo/sft/merged \
        --adapter runs/demo/reward/action/adapter --input conversations.jsonl --output scores.jsonl")]
    Score {
        #[command(flatten)]
        config: ScoreConfig,
    },
}

fn main() -> ExitCode {
    cli::init_tracing();
    arete_stage::exit::run(run, arete_training::class_of)
}

fn run() -> anyhow::Result<()> {
    let matches = cli::matches(Cli::command());
    match Cli::from_arg_matches(&matches)?.command {
        Command::Train { stage, aspect, preferences, pairs, conversations, .. } => {
            let matches = matches.subcommand_matches("train").expect("the command parsed");
            let table = if preferences.is_none() { "yardstick" } else { "reward" };
            let config: Config = recipe::resolve(matches, table, stage.recipe.as_deref())?;
            let mut piped = Piped::default();
            let pairs = pairs.map(|file| piped.local(&file)).transpose()?;
            Column::check_used(config.column.as_deref(), pairs.as_deref())?;
            let mixed = preferences.as_ref().and(pairs.clone());
            let (preferences, from) = match (preferences, pairs) {
                (Some(dir), _) => {
                    let sets = aspect.0.into_iter().collect();
                    (PreferenceSource::Stage { dir: dir.clone(), sets }, dir)
                }
                (None, Some(file)) => (PreferenceSource::Pairs(file.clone()), file),
                (None, None) => unreachable!("clap demands one of them"),
            };
            interrupt::install()?;
            let inputs = TrainInputs { preferences, mixed, conversations, output: stage.output };
            if stage.dry_run {
                return Ok(arete_reward::dry_run(&config, &inputs)?.print()?);
            }
            arete_reward::train(&config, &inputs)
                .with_context(|| format!("training on {}", from.display()))
        }
        Command::Bench { bench } => arete_reward::bench::run(&bench).context("measuring"),
        Command::Score { config } => arete_reward::score::run(&config)
            .with_context(|| format!("scoring {}", config.input.display())),
    }
}
