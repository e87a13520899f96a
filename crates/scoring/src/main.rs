//! `arete-scoring`: see the library's documentation for what the subcommands do.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use arete_chain::{Turns, members};
use arete_records::table::Column;
use arete_scoring::best_of::{self, BestOfInputs};
use arete_scoring::compare::{self, Arm, Format, ScoredRun};
use arete_scoring::distil::{self, DistilInputs};
use arete_scoring::{ReportInputs, RunFiles, ScoreConfig, ScoreInputs, doctor, policies, report};
use arete_stage::cli;
use arete_stage::exit::Usage;
use arete_stage::inputs::Piped;
use arete_stage::{interrupt, recipe};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

/// How a run's models compare, the page that shows it, and why a run went nowhere
#[derive(Parser)]
#[command(name = "arete-scoring", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Have models answer the test prompts and the reward models score them; print how they compare
    #[command(after_help = "Examples:\n  arete-scoring score --run runs/demo\n  \
        arete-scoring score --prompts runs/demo/prompts --original models/SmolLM2-135M-Instruct --sft runs/demo/sft/merged \
        --final runs/demo/ppo --rewards runs/demo/reward --output runs/demo/scoring")]
    Score {
        #[command(flatten)]
        places: Box<Places>,
        #[command(flatten)]
        config: ScoreConfig,
    },
    /// Write report.html: curves, reward models, judge, Score, replies side by side, provenance
    #[command(
        after_help = "Example:\n  arete-scoring report --run runs/demo --recipe recipes/demo.toml"
    )]
    Report {
        /// Directory of a run, with one directory a stage
        #[arg(long, value_name = "DIR")]
        run: PathBuf,
        /// The recipe the run was made with, to show in full
        #[arg(long, value_name = "FILE")]
        recipe: Option<PathBuf>,
        /// Most prompts shown side by side; 0 = all
        #[arg(long, default_value_t = 300, value_name = "N")]
        max_samples: usize,
        /// Directory that receives report.html and the charts [default: RUN/report]
        #[arg(long, value_name = "DIR")]
        output: Option<PathBuf>,
        /// Say what would be done, as JSON; write nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// Compare runs: what each gained, and the yardstick's scores between arms (recipes, say; several runs of one are its seeds)
    #[command(
        after_help = "Example:\n  arete-scoring compare report=runs/report-1 report=runs/report-2 \
        recommended=runs/recommended-1 recommended=runs/recommended-2"
    )]
    Compare {
        /// Runs, each under the name of its arm
        #[arg(required = true, value_name = "ARM=RUN")]
        runs: Vec<String>,
        /// The model that gains are counted from
        #[arg(long, default_value = "original", value_name = "NAME")]
        first: String,
        /// The model that is compared
        #[arg(long, default_value = "final", value_name = "NAME")]
        last: String,
        /// How it is printed
        #[arg(long, value_enum, default_value_t = Format::Text)]
        format: Format,
    },
    /// Of n chains for each prompt, keep the one that the reward models like best as a demonstration for `arete-sft train`
    #[command(
        after_help = "Example:\n  arete-scoring distil --run runs/demo --n 8 --recipe recipes/demo.toml \
        --output runs/demo/distilled"
    )]
    Distil {
        /// Chains sampled for each prompt
        #[arg(long, default_value_t = 8, value_name = "N")]
        n: usize,
        /// Directory of a run: its prompts (splits train and validation), reward models and base
        #[arg(long, value_name = "DIR")]
        run: PathBuf,
        /// The model that samples, and that the reward models belong to [default: RUN/sft/merged]
        #[arg(long, value_name = "MODEL")]
        base: Option<String>,
        /// Directory that receives demonstrations.parquet
        #[arg(long, value_name = "DIR")]
        output: PathBuf,
        /// Recipe (TOML) whose table [scoring] gives the settings; flags override it
        #[arg(long, value_name = "FILE")]
        recipe: Option<PathBuf>,
        /// Say what would be done, as JSON: settings, rows, memory; write nothing
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        config: ScoreConfig,
    },
    /// Say why the reward is flat: truncation, judge, reward models, best of n, KL, Score, and what to change
    #[command(after_help = "Examples:\n  arete-scoring doctor --run runs/demo\n  \
        arete-scoring doctor --run runs/demo --best-of 16 --recipe recipes/demo.toml")]
    Doctor {
        /// Directory of a run, with one directory a stage
        #[arg(long, value_name = "DIR")]
        run: PathBuf,
        /// Measure the gain of the best of N samples on validation prompts, with the models (0 = only look at files)
        #[arg(long, default_value_t = 0, value_name = "N")]
        best_of: usize,
        /// The model that samples for --best-of [default: RUN/sft/merged, else what the reward models name]
        #[arg(long, value_name = "MODEL")]
        base: Option<String>,
        /// The yardstick, which no recipe trained: are the ensemble's favourites better by it, too?
        #[arg(long, value_name = "DIR", requires = "best_of")]
        yardstick: Option<PathBuf>,
        /// Print the findings as JSON
        #[arg(long)]
        json: bool,
        /// Recipe (TOML) whose table [scoring] gives the settings of --best-of; flags override it
        #[arg(long, value_name = "FILE")]
        recipe: Option<PathBuf>,
        #[command(flatten)]
        config: ScoreConfig,
    },
}

/// Where everything is; with --run, what is not named is looked for in that directory.
#[derive(Args)]
struct Places {
    /// Recipe (TOML) whose table [scoring] gives the settings; flags override it
    #[arg(long, value_name = "FILE")]
    recipe: Option<PathBuf>,
    /// Directory of a run, with one directory a stage
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
    /// Directory (or file) of the prompts [default: RUN/prompts]
    #[arg(long, value_name = "PATH")]
    prompts: Option<PathBuf>,
    /// The untouched model: directory, GGUF file or hub id [default: what RUN/sft started from]
    #[arg(long, value_name = "MODEL")]
    original: Option<String>,
    /// The fine-tuned model [default: RUN/sft/merged]
    #[arg(long, value_name = "MODEL")]
    sft: Option<String>,
    /// The model after PPO: its stage, adapter or merged directory [default: RUN/ppo]
    #[arg(long = "final", value_name = "MODEL")]
    last: Option<String>,
    /// Another model, as NAME=PLACE; may be repeated
    #[arg(long, value_name = "NAME=MODEL")]
    model: Vec<String>,
    /// The model that reward models and adapters belong to [default: the fine-tuned one, else the original]
    #[arg(long, value_name = "MODEL")]
    base: Option<String>,
    /// Directory of reward models, one a directory: of turns, or of virtues [default: RUN/reward]
    #[arg(long, alias = "reward", value_name = "DIR")]
    rewards: Option<PathBuf>,
    /// The yardstick (`make yardstick`), or a single reward model, which is marked as not cross-fitted [default: RUN/yardstick]
    #[arg(long, value_name = "DIR")]
    yardstick: Option<PathBuf>,
    /// Base of the yardstick's adapters [default: what they name]
    #[arg(long, value_name = "MODEL")]
    yardstick_base: Option<String>,
    /// Labelled pairs (hh-rlhf's form, JSON lines, .gz too, or Parquet): which side does each model find likelier?
    #[arg(long, value_name = "FILE")]
    pairs: Option<PathBuf>,
    /// Directory that receives the results [default: RUN/scoring]
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Say what would be done, as JSON: settings, rows, memory; write nothing
    #[arg(long)]
    dry_run: bool,
}

impl Places {
    fn inputs(self) -> anyhow::Result<ScoreInputs> {
        let in_run = |name: &str| self.run.as_ref().map(|run| run.join(name));
        let existing = |name: &str| in_run(name).filter(|path| path.exists());
        let text = |path: PathBuf| path.to_string_lossy().into_owned();
        let need = |found: Option<PathBuf>, name: &str| {
            found.ok_or_else(|| Usage(format!("--{name} is needed, or --run")))
        };
        let sft = self.sft.or_else(|| existing("sft/merged").map(text));
        let last = self.last.or_else(|| existing("ppo").map(text));
        let original = match (self.original, &self.run) {
            (Some(original), _) => Some(original),
            (None, Some(run)) => original_of(run)?,
            (None, None) => None,
        };
        let base = self.base.or_else(|| sft.clone()).or_else(|| original.clone());
        let base = base.ok_or_else(|| Usage("--base, --sft or --original is needed".to_owned()))?;
        let mut models = Vec::new();
        for (name, place) in [("original", original), ("sft", sft), ("final", last)] {
            models.extend(place.map(|place| (name.to_owned(), place)));
        }
        for model in self.model {
            let (name, place) = model
                .split_once('=')
                .ok_or_else(|| Usage(format!("--model: expected NAME=MODEL, got {model}")))?;
            models.push((name.to_owned(), place.to_owned()));
        }
        Ok(ScoreInputs {
            prompts: need(self.prompts.clone().or_else(|| in_run("prompts")), "prompts")?,
            models,
            base,
            rewards: need(self.rewards.clone().or_else(|| in_run("reward")), "rewards")?,
            yardstick: self.yardstick.clone().or_else(|| existing("yardstick")),
            yardstick_base: self.yardstick_base,
            pairs: self.pairs,
            output: need(self.output.clone().or_else(|| in_run("scoring")), "output")?,
        })
    }
}

/// What a run started from, as its first adapter says.
fn original_of(run: &Path) -> anyhow::Result<Option<String>> {
    let rewards = run.join("reward");
    let turns = Turns::of_reward_models(&rewards)?;
    let rewards = members::reward_models(&rewards, &turns)?;
    let mut adapters = vec![run.join("sft/adapter")];
    adapters.extend(rewards.iter().map(|member| member.dir.join("adapter")));
    adapters.iter().find(|dir| dir.is_dir()).map(|dir| policies::base_of_adapter(dir)).transpose()
}

/// The model that a run's reward models belong to.
fn base_of(run: &Path, given: Option<String>) -> anyhow::Result<String> {
    let merged = run.join("sft/merged");
    Ok(match given {
        Some(base) => base,
        None if merged.is_dir() => merged.to_string_lossy().into_owned(),
        None => original_of(run)?.ok_or_else(|| Usage("--base is needed".to_owned()))?,
    })
}

/// Measures the best of `n` and leaves the result in `RUN/best-of`.
fn measure_best_of(
    run: &Path,
    n: usize,
    base: Option<String>,
    yardstick: Option<PathBuf>,
    config: &ScoreConfig,
) -> anyhow::Result<()> {
    let base = base_of(run, base)?;
    let inputs = BestOfInputs {
        prompts: run.join("prompts"),
        base,
        rewards: run.join("reward"),
        yardstick,
        output: run.join("best-of"),
    };
    best_of::run(config, n, &inputs)?;
    Ok(())
}

/// `ARM=RUN`.
fn arm(text: &str) -> anyhow::Result<Arm> {
    match text.split_once('=') {
        Some((name, run)) if !name.is_empty() && !run.is_empty() => {
            Ok(Arm { name: name.to_owned(), run: PathBuf::from(run) })
        }
        _ => {
            Err(Usage(format!("expected ARM=RUN (recommended=runs/mine, say), got {text}")).into())
        }
    }
}

fn main() -> ExitCode {
    cli::init_tracing();
    arete_stage::exit::run(run, arete_engine::class_of)
}

fn run() -> anyhow::Result<()> {
    let matches = cli::matches(Cli::command());
    interrupt::install()?;
    let parsed = Cli::from_arg_matches(&matches)?;
    let (_, matches) = matches.subcommand().context("no subcommand")?;
    let text = match parsed.command {
        Command::Score { places, .. } => {
            let config: ScoreConfig =
                recipe::resolve(matches, "scoring", places.recipe.as_deref())?;
            let dry_run = places.dry_run;
            let mut inputs = places.inputs()?;
            let mut piped = Piped::default();
            inputs.pairs = inputs.pairs.map(|pairs| piped.local(&pairs)).transpose()?;
            Column::check_used(config.column.as_deref(), inputs.pairs.as_deref())?;
            if dry_run {
                return Ok(arete_scoring::dry::of_score(&config, &inputs)?.print()?);
            }
            arete_scoring::score(&config, &inputs)
                .with_context(|| format!("scoring into {}", inputs.output.display()))?
        }
        Command::Report { run, recipe, max_samples, output, dry_run } => {
            let output = output.unwrap_or_else(|| report::default_output(&run));
            let inputs = ReportInputs { run, recipe, max_samples, output };
            if dry_run {
                return Ok(arete_scoring::dry::of_report(&inputs)?.print()?);
            }
            let page = report::report(&inputs)
                .with_context(|| format!("reporting on {}", inputs.run.display()))?;
            format!("{}\n", page.display())
        }
        Command::Compare { runs, first, last, format } => {
            let runs = runs
                .iter()
                .map(|text| ScoredRun::read(arm(text)?))
                .collect::<anyhow::Result<Vec<_>>>()?;
            compare::check(&runs, &first, &last)?;
            let comparison = compare::compare(&runs, &first, &last);
            compare::shown(&runs, &comparison, format)
        }
        Command::Distil { n, run, base, output, recipe, dry_run, .. } => {
            let config: ScoreConfig = recipe::resolve(matches, "scoring", recipe.as_deref())?;
            let (prompts, rewards) = (run.join("prompts"), run.join("reward"));
            let base = base_of(&run, base)?;
            let inputs = DistilInputs { prompts, base, rewards, output };
            if dry_run {
                return Ok(arete_scoring::dry::of_distil(&config, n, &inputs)?.print()?);
            }
            distil::run(&config, n, &inputs)
                .with_context(|| format!("distilling from {}", run.display()))?;
            String::new()
        }
        Command::Doctor { run, best_of, base, yardstick, json, recipe, .. } => {
            if best_of > 0 {
                let config: ScoreConfig = recipe::resolve(matches, "scoring", recipe.as_deref())?;
                measure_best_of(&run, best_of, base, yardstick, &config)
                    .with_context(|| format!("sampling for {}", run.display()))?;
            }
            let files =
                RunFiles::read(&run).with_context(|| format!("reading {}", run.display()))?;
            let findings = doctor::diagnose(&files);
            if json {
                serde_json::to_string_pretty(&findings)? + "\n"
            } else {
                doctor::text(&findings)
            }
        }
    };
    std::io::stdout().lock().write_all(text.as_bytes())?;
    Ok(())
}
