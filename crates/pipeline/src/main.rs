//! `arete`: the pipeline from one program.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use arete_pipeline::cluster::{self, Cluster};
use arete_pipeline::hello::{self, HelloArgs};
use arete_pipeline::launch::{self, LaunchArgs};
use arete_pipeline::memory::{self, Shape};
use arete_pipeline::push::{self, PushArgs};
use arete_pipeline::run::{self, RunArgs};
use arete_pipeline::setup::{Setup, SetupArgs};
use arete_pipeline::stages::PIPELINE;
use arete_pipeline::sweep::{self, SweepArgs};
use arete_pipeline::wandb::{self, WandbArgs};
use arete_pipeline::{check, diagnosis, shell, starter, status};
use arete_scoring::report;
use arete_stage::cli;
use clap::{CommandFactory, Parser, Subcommand};

/// Teach a chat model virtue by AI feedback: prompts, demonstrations, SFT, conversations, preferences, reward models, PPO,
/// Score and page
#[derive(Debug, Parser)]
#[command(name = "arete", version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "Examples:
  arete hello                                                        every stage in seconds, on a tiny model
  arete run --recipe recipes/demo.toml --dry-run                     what would be done
  arete run --recipe recipes/demo.toml --set ppo.kl_coef=0.02        does what is not up to date
  arete status --recipe recipes/demo.toml                            where the run stands, and why
  arete sweep --recipe recipes/demo.toml --set ppo.learning_rate=1e-4,3e-4
  arete run --recipe recipes/demo.toml --rounds 3                    three times answer, judge, learn, tune

Exit codes: 0 done; 1 failed; 2 flags or settings; 65 bad data, an unknown key of the recipe among it; 69 a server does not
answer; 70 a fault of the program; 71 too little memory or disk; 74 the system refused, a full disk too; 130, 143 stopped by a signal: the same command goes on.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Run what is not up to date, the whole plan shown first
    Run(Box<RunArgs>),
    /// Say of every stage: complete, stale (which key or input), half-done (how far), missing, damaged
    Status(Box<StatusArgs>),
    /// Count the memory of every stage, and say on which GPUs each fits
    Plan(Box<PlanArgs>),
    /// List the stages: what each reads and leaves
    Stages,
    /// Run with several values of some keys: --set TABLE.KEY=VALUE,VALUE; one table and one page at the end
    Sweep(Box<SweepArgs>),
    /// Run every stage on a tiny chat model that is part of this program, in seconds
    Hello(HelloArgs),
    /// Write a starter folder: recipe, constitution, prompts, exemplars, README
    New(NewArgs),
    /// Run a training program as several processes on this machine, which train together: --processes N -- COMMAND
    Launch(LaunchArgs),
    /// Say why the reward is flat, one line each
    Doctor(Box<diagnosis::DoctorArgs>),
    /// Compare runs: what each gained, and the yardstick's scores between arms
    Compare(diagnosis::CompareArgs),
    /// Set policies on the front of two virtues: what each gained in the one and in the other
    Front(diagnosis::FrontArgs),
    /// Write the page of a run
    Report(ReportArgs),
    /// Write the trainings of a run as Weights & Biases' client leaves them offline; `wandb sync` uploads them
    Wandb(WandbArgs),
    /// Upload an adapter, a merged model or a data set to the hub, with a card
    Push(PushArgs),
    /// Print the completions of a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the man page, or write one of every command
    Man {
        /// Directory that receives a page of every command
        #[arg(long, value_name = "DIR")]
        output: Option<PathBuf>,
    },
    /// The work of one stage, in this process
    #[command(hide = true)]
    Stage {
        /// The stage
        name: String,
        #[command(flatten)]
        setup: Box<SetupArgs>,
    },
}

/// Which run is looked at.
#[derive(Debug, clap::Args)]
struct StatusArgs {
    #[command(flatten)]
    setup: SetupArgs,
    /// End with exit code 1 unless every stage is complete
    #[arg(long)]
    exit_code: bool,
    /// JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// What memory is counted for.
#[derive(Debug, clap::Args)]
struct PlanArgs {
    #[command(flatten)]
    setup: SetupArgs,
    /// Tokens of a prompt with its template
    #[arg(long, value_name = "N", default_value_t = check::PROMPT_TOKENS,
          value_parser = clap::value_parser!(u64).range(1..))]
    prompt_tokens: u64,
    /// Time as well: steps and iterations by a simulated clock, at the rates of this file (docs/scale.md)
    #[arg(long, value_name = "FILE")]
    cluster: Option<PathBuf>,
    /// JSON instead of tables
    #[arg(long)]
    json: bool,
}

/// The folder to start from.
#[derive(Debug, clap::Args)]
struct NewArgs {
    /// The folder
    dir: PathBuf,
    /// The model that the recipe names: directory, GGUF file or hub id
    #[arg(long, value_name = "MODEL", default_value = "HuggingFaceTB/SmolLM2-135M-Instruct")]
    model: String,
}

/// Which run is shown.
#[derive(Debug, clap::Args)]
struct ReportArgs {
    /// Directory of a run, with one directory a stage
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// The recipe the run was made with, to show in full
    #[arg(long, value_name = "FILE")]
    recipe: Option<PathBuf>,
    /// Most prompts shown side by side; 0 = all
    #[arg(long, default_value_t = 300, value_name = "N")]
    max_samples: usize,
}

fn main() -> ExitCode {
    arete_stage::run::resolve_devices_with(|name| {
        arete_model::machine::device(name).ok().map(arete_model::machine::device_name)
    });
    let mut answer = 0; // `status --exit-code` answers by it
    let work = || parsed().map(|code| answer = code);
    let ended = arete_stage::exit::run(work, |cause| {
        arete_engine::class_of(cause).or_else(|| arete_training::class_of(cause))
    });
    if ended == ExitCode::SUCCESS { ExitCode::from(answer) } else { ended }
}

fn parsed() -> Result<u8> {
    let command = cli::parse::<Cli>().command;
    // A stage's own log is shown by the run; of what only looks, just warnings.
    let is_work = matches!(command, Command::Stage { .. } | Command::Doctor(_) | Command::Push(_));
    cli::init_tracing_at(if is_work { "info" } else { "warn" });
    execute(command)
}

fn execute(command: Command) -> Result<u8> {
    let text = match command {
        Command::Run(arguments) => return run::run(&arguments),
        Command::Sweep(arguments) => return sweep::run(&arguments),
        Command::Hello(arguments) => return hello::run(&arguments),
        Command::Launch(arguments) => return launch::run(&arguments),
        Command::Status(arguments) => return look(&arguments),
        Command::Stage { name, setup } => return run::stage(&name, &setup).map(|()| 0),
        Command::Plan(arguments) => plan(&arguments)?,
        Command::Stages => stages(),
        Command::New(arguments) => {
            starter::new(&arguments.dir, &arguments.model)?;
            format!("{}: begin with its README.md\n", arguments.dir.display())
        }
        Command::Doctor(arguments) => diagnosis::doctor(&arguments)?,
        Command::Compare(arguments) => diagnosis::compare(&arguments)?,
        Command::Front(arguments) => diagnosis::front(&arguments)?,
        Command::Report(ReportArgs { run, recipe, max_samples }) => {
            let output = report::default_output(&run);
            let inputs = arete_scoring::ReportInputs { run, recipe, max_samples, output };
            let page = arete_scoring::report(&inputs)
                .with_context(|| format!("reporting on {}", inputs.run.display()))?;
            format!("{}\n", page.display())
        }
        Command::Wandb(arguments) => wandb::run(&arguments)?,
        Command::Push(arguments) => return push::run(&arguments).map(|()| 0),
        Command::Completions { shell } => {
            return print(&shell::completions(Cli::command(), shell));
        }
        Command::Man { output: None } => return print(&shell::man_page(Cli::command())?),
        Command::Man { output: Some(dir) } => {
            shell::man_pages(Cli::command(), &dir)?;
            format!("{}\n", dir.display())
        }
    };
    print(text.as_bytes())
}

fn print(text: &[u8]) -> Result<u8> {
    std::io::stdout().lock().write_all(text)?;
    Ok(0)
}

fn look(arguments: &StatusArgs) -> Result<u8> {
    let setup = Setup::new(&arguments.setup)?;
    check::tables(&setup)?;
    let seen = status::look(&setup)?;
    let text = if arguments.json {
        serde_json::to_string_pretty(&seen)? + "\n"
    } else {
        status::text(&seen)
    };
    print(text.as_bytes())?;
    let is_done = seen.iter().all(|seen| seen.state.is_done());
    Ok(u8::from(arguments.exit_code && !is_done))
}

fn plan(arguments: &PlanArgs) -> Result<String> {
    let setup = Setup::new(&arguments.setup)?;
    let device = setup.device()?;
    let shape = Shape::of(setup.model()?, device.as_deref(), arguments.prompt_tokens)?;
    let planned = memory::plan(&setup, &shape)?;
    let clocks = match &arguments.cluster {
        Some(path) => cluster::clocks(&setup, &shape, &Cluster::load(path)?)?,
        None => Vec::new(),
    };
    if arguments.json {
        let mut json = memory::json(&planned, &shape);
        if arguments.cluster.is_some() {
            json["cluster"] = serde_json::to_value(&clocks)?;
        }
        return Ok(serde_json::to_string_pretty(&json)? + "\n");
    }
    let times = if clocks.is_empty() { String::new() } else { cluster::text(&clocks) };
    Ok(memory::text(&planned, &shape) + &times)
}

fn stages() -> String {
    let line = |stage: &arete_pipeline::stages::Stage| {
        let reads = if stage.reads.is_empty() { "–".to_owned() } else { stage.reads.join(", ") };
        let by_default =
            if stage.by_default { "" } else { " (out unless its table says enabled = true)" };
        format!("{:<14}  {}{by_default}\n{:<14}  reads: {reads}\n", stage.name, stage.writes, "")
    };
    PIPELINE.iter().map(line).collect()
}
