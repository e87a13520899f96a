//! `arete-model`: use, look at and convert models from the command line.

use std::process::ExitCode;

use arete_stage::cli;
use clap::Parser;

fn main() -> ExitCode {
    let arguments = arete_model::commands::Arguments::parse();
    cli::init_tracing();
    arete_stage::exit::exit_code(arete_model::commands::run(arguments), arete_model::class_of)
}
