//! `arete-model`: use, look at and convert models from the command line.

use std::process::ExitCode;

use arete_stage::cli;

mod commands;

fn main() -> ExitCode {
    cli::init_tracing();
    arete_stage::exit::run(|| commands::run(cli::parse()), arete_model::class_of)
}
