//! `arete hello`: every stage, on a tiny chat model that is part of this program.

use std::path::PathBuf;

use anyhow::Result;

use crate::run::{self, RunArgs};
use crate::setup::SetupArgs;
use crate::starter;

/// Where it goes.
#[derive(Debug, Clone, clap::Args)]
pub struct HelloArgs {
    /// Directory of the run
    #[arg(long, value_name = "DIR", default_value = "runs/hello")]
    pub run: PathBuf,
    /// Show every stage's whole log
    #[arg(long)]
    pub verbose: bool,
}

/// Runs it; the exit code of the stage that failed, else 0.
///
/// # Errors
///
/// Those of a run.
pub fn run(arguments: &HelloArgs) -> Result<u8> {
    let recipe = starter::hello(&arguments.run.join("inputs"))?;
    let setup = SetupArgs {
        recipe: Some(recipe),
        run: Some(arguments.run.clone()),
        ..SetupArgs::default()
    };
    run::run(&RunArgs { setup, verbose: arguments.verbose, ..RunArgs::default() })
}
