//! Runs looked at afterwards: `arete doctor`, `arete compare` and `arete front`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use arete_records::Aspect;
use arete_scoring::best_of::{self, BestOfInputs};
use arete_scoring::compare::{self, Arm, Format, ScoredRun};
use arete_scoring::front::{self, Front};
use arete_scoring::{RunFiles, ScoreConfig, doctor as scoring_doctor};
use arete_stage::exit::Usage;
use arete_stage::interrupt;

use crate::setup::{Setup, SetupArgs};

/// Which run is diagnosed.
#[derive(Debug, Clone, clap::Args)]
pub struct DoctorArgs {
    /// The setup.
    #[command(flatten)]
    pub setup: SetupArgs,
    /// Measure the gain of the best of N samples on validation prompts, with the models (0 = only look at files)
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub best_of: usize,
    /// Print the findings as JSON
    #[arg(long)]
    pub json: bool,
    /// Show what this machine is and what of it is used, as JSON, instead of a diagnosis
    #[arg(long)]
    pub machine: bool,
}

/// The diagnosis of a run, as a text.
///
/// # Errors
///
/// A directory that holds no run, damaged files; with `--best-of`, what fails there.
pub fn doctor(arguments: &DoctorArgs) -> Result<String> {
    if arguments.machine {
        return Ok(serde_json::to_string_pretty(&arete_model::machine::Machine::look())? + "\n");
    }
    let setup = Setup::new(&arguments.setup)?;
    if arguments.best_of > 0 {
        interrupt::install()?;
        let config: ScoreConfig = setup.settings("scoring")?;
        let inputs = BestOfInputs {
            prompts: setup.at("prompts"),
            base: setup.base()?,
            rewards: setup.at("reward"),
            yardstick: setup.yardstick.clone(),
            output: setup.at("best-of"),
        };
        best_of::run(&config, arguments.best_of, &inputs)
            .with_context(|| format!("sampling for {}", setup.dir.display()))?;
    }
    let files =
        RunFiles::read(&setup.dir).with_context(|| format!("reading {}", setup.dir.display()))?;
    let findings = scoring_doctor::diagnose(&files);
    if arguments.json {
        return Ok(serde_json::to_string_pretty(&findings)? + "\n");
    }
    Ok(scoring_doctor::text(&findings))
}

/// Which runs are compared.
#[derive(Debug, Clone, clap::Args)]
pub struct CompareArgs {
    /// Runs, each under the name of its arm; several runs of one arm are its seeds
    #[arg(required = true, value_name = "ARM=RUN")]
    pub runs: Vec<String>,
    /// The model that gains are counted from
    #[arg(long, default_value = "original", value_name = "NAME")]
    pub first: String,
    /// The model that is compared
    #[arg(long, default_value = "final", value_name = "NAME")]
    pub last: String,
    /// How it is printed
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
}

/// The comparison, as a text.
///
/// # Errors
///
/// A run that was not scored, or with another yardstick than the others.
pub fn compare(arguments: &CompareArgs) -> Result<String> {
    let runs = scored(&arguments.runs)?;
    let CompareArgs { first, last, format, .. } = arguments;
    compare::check(&runs, first, last)?;
    Ok(compare::shown(&runs, &compare::compare(&runs, first, last), *format))
}

/// The runs of `ARM=RUN`.
fn scored(runs: &[String]) -> Result<Vec<ScoredRun>> {
    let arm = |text: &String| match text.split_once('=') {
        Some((name, run)) if !name.is_empty() && !run.is_empty() => {
            Ok(Arm { name: name.to_owned(), run: PathBuf::from(run) })
        }
        _ => Err(Usage(format!("expected ARM=RUN (recommended=runs/mine, say), got {text}"))),
    };
    runs.iter().map(|text| ScoredRun::read(arm(text)?)).collect()
}

/// Which policies stand on a front.
#[derive(Debug, Clone, clap::Args)]
pub struct FrontArgs {
    /// Runs that were scored by the same reward models, each under the name of its policy; every model that a run scored after --first is
    /// a point (a soup scored with `arete-scoring score --model soup=DIR`, too)
    #[arg(required = true, value_name = "ARM=RUN")]
    pub runs: Vec<String>,
    /// The two reward models that policies are measured by
    #[arg(long, num_args = 2, required = true, value_names = ["NAME", "NAME"])]
    pub axes: Vec<Aspect>,
    /// The model that gains are counted from
    #[arg(long, default_value = "sft", value_name = "NAME")]
    pub first: String,
    /// Directory that receives the front; the page of a run has it from RUN/front [default: that of the first run]
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,
}

/// Writes the front; a table of it.
///
/// # Errors
///
/// A run that was not scored, or by other reward models than the others; I/O.
pub fn front(arguments: &FrontArgs) -> Result<String> {
    let FrontArgs { runs, axes, first, output } = arguments;
    let runs = scored(runs)?;
    let [x, y] = axes[..] else { unreachable!("clap takes two") };
    if x == y {
        return Err(Usage(format!("--axes: expected two different names, got {x} twice")).into());
    }
    let front = Front::of(&runs, [x, y], first)?;
    let output = output.clone().unwrap_or_else(|| runs[0].arm.run.join(front::DIR));
    front.write(&output)?;
    Ok(front.text())
}
