//! `arete-model`: use, look at and convert models from the command line.

use std::process::ExitCode;

use arete_records::cli;
use clap::Parser;

fn main() -> ExitCode {
    let arguments = arete_model::commands::Arguments::parse();
    cli::init_tracing();
    cli::exit_code_of::<arete_model::Error>(arete_model::commands::run(arguments))
}
