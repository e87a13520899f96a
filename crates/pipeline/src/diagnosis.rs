//! Runs looked at afterwards: `arete doctor` and `arete compare`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use arete_scoring::best_of::{self, BestOfInputs};
use arete_scoring::compare::{self, Arm, Format, ScoredRun};
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
    let arm = |text: &String| match text.split_once('=') {
        Some((name, run)) if !name.is_empty() && !run.is_empty() => {
            Ok(Arm { name: name.to_owned(), run: PathBuf::from(run) })
        }
        _ => Err(Usage(format!("expected ARM=RUN (recommended=runs/mine, say), got {text}"))),
    };
    let mut runs = Vec::new();
    for text in &arguments.runs {
        runs.push(ScoredRun::read(arm(text)?)?);
    }
    let CompareArgs { first, last, format, .. } = arguments;
    compare::check(&runs, first, last)?;
    Ok(compare::shown(&runs, &compare::compare(&runs, first, last), *format))
}
