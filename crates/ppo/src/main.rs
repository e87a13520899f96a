//! `arete-ppo`: train a policy against an ensemble of reward models.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use arete_ppo::{Config, TrainInputs};
use arete_stage::cli::{self, StageArgs};
use arete_stage::{interrupt, recipe};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

/// PPO: sample conversations, score them with reward models, and make the better ones likelier.
#[derive(Debug, Parser)]
#[command(name = "arete-ppo", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a policy (recipe table [ppo])
    #[command(
        after_help = "Example:\n  arete-ppo train --prompts runs/demo/prompts --model runs/demo/sft/merged \
        --rewards runs/demo/reward --output runs/demo/ppo --recipe recipes/demo.toml"
    )]
    Train {
        #[command(flatten)]
        stage: StageArgs,
        /// Directory with prompts.parquet
        #[arg(long, value_name = "DIR")]
        prompts: PathBuf,
        /// Directory with the reward models, one a turn of the constitution (of the answer alone with --rollout answer):
        /// <turn>/adapter and <turn>/score_stats.json
        #[arg(long, alias = "reward", value_name = "DIR")]
        rewards: Option<PathBuf>,
        /// Directory of a reward model that only watches the probes: adapter/ on the same base, or merged/
        #[arg(long, value_name = "DIR")]
        yardstick: Option<PathBuf>,
        /// Constitution (TOML) with the turns to ask for [default: the one that the reward models carry, or the shipped
        /// turns]
        #[arg(long, value_name = "FILE")]
        constitution: Option<PathBuf>,
        #[command(flatten)]
        config: Box<Config>,
    },
    /// Measure iterations at the peers' setting against this machine's matrix products
    Bench(arete_ppo::bench::Arguments),
}

fn main() -> ExitCode {
    cli::init_tracing();
    arete_stage::exit::exit_code(run(), arete_ppo::class_of)
}

fn run() -> anyhow::Result<()> {
    let matches = Cli::command().get_matches();
    match Cli::from_arg_matches(&matches)?.command {
        Command::Train { stage, prompts, rewards, yardstick, constitution, .. } => {
            let matches = matches.subcommand_matches("train").expect("the command parsed");
            let config: Config = recipe::resolve(matches, "ppo", stage.recipe.as_deref())?;
            interrupt::install()?;
            let context = format!("training on {}", prompts.display());
            let inputs =
                TrainInputs { prompts, rewards, constitution, yardstick, output: stage.output };
            arete_ppo::train(&config, &inputs).with_context(|| context)
        }
        Command::Bench(arguments) => {
            arete_ppo::bench::run(&arguments).context("measuring PPO iterations")
        }
    }
}
