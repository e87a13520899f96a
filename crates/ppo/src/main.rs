//! `arete-ppo`: train a policy against an ensemble of reward models.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use arete_ppo::{Config, NamedReward, TrainInputs};
use arete_records::Refusal;
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
        /// Directory with the reward models, <name>/adapter and <name>/score_stats.json each: one named as a turn reads that turn's
        /// reply (with --rollout answer only the answer is asked for), every other (a virtue's, say) the answer
        #[arg(long, value_name = "DIR")]
        rewards: Option<PathBuf>,
        /// One reward model more, or the only one, by name; repeated for several. One named as a turn reads that turn's
        /// reply, every other (a virtue's, say) the answer. Without a name the same as --rewards
        #[arg(long, value_name = "NAME=DIR")]
        reward: Vec<RewardFlag>,
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

/// A value of `--reward`.
#[derive(Clone, Debug)]
enum RewardFlag {
    Named(NamedReward),
    Directory(PathBuf),
}

impl std::str::FromStr for RewardFlag {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // A path with `=` in one of its folders' names is no NAME=DIR: names have no `/`.
        Ok(text.parse().map_or_else(|_| Self::Directory(text.into()), Self::Named))
    }
}

/// The directory of an aspect's reward models each, and those that are named.
fn sorted(
    rewards: Option<PathBuf>,
    flags: Vec<RewardFlag>,
) -> anyhow::Result<(Option<PathBuf>, Vec<NamedReward>)> {
    let (mut directories, mut named) = (Vec::from_iter(rewards), Vec::new());
    for flag in flags {
        match flag {
            RewardFlag::Named(reward) => named.push(reward),
            RewardFlag::Directory(dir) => directories.push(dir),
        }
    }
    if let [first, second, ..] = directories.as_slice() {
        return Err(Refusal::setting(
            "rewards",
            format!("one directory ({}), and others as NAME=DIR", first.display()),
            second.display(),
        )
        .into());
    }
    Ok((directories.pop(), named))
}

fn main() -> ExitCode {
    cli::init_tracing();
    arete_stage::exit::run(run, |cause| {
        arete_engine::class_of(cause).or_else(|| arete_training::class_of(cause))
    })
}

fn run() -> anyhow::Result<()> {
    let matches = cli::matches(Cli::command());
    match Cli::from_arg_matches(&matches)?.command {
        Command::Train { stage, prompts, rewards, reward, yardstick, constitution, .. } => {
            let matches = matches.subcommand_matches("train").expect("the command parsed");
            let config: Config = recipe::resolve(matches, "ppo", stage.recipe.as_deref())?;
            interrupt::install()?;
            let context = format!("training on {}", prompts.display());
            let (rewards, named_rewards) = sorted(rewards, reward)?;
            let output = stage.output;
            let inputs =
                TrainInputs { prompts, rewards, named_rewards, constitution, yardstick, output };
            if stage.dry_run {
                return Ok(arete_ppo::dry_run(&config, &inputs)?.print()?);
            }
            arete_ppo::train(&config, &inputs).with_context(|| context)
        }
        Command::Bench(arguments) => {
            arete_ppo::bench::run(&arguments).context("measuring PPO iterations")
        }
    }
}
