//! For the shell: completions and man pages, from clap's own description of the program.

use std::path::Path;

use anyhow::Result;
use clap::Command;
use clap_complete::Shell;

/// The completions of a shell, to be sourced or installed.
pub fn completions(mut program: Command, shell: Shell) -> Vec<u8> {
    let mut text = Vec::new();
    let name = program.get_name().to_owned();
    clap_complete::generate(shell, &mut program, name, &mut text);
    text
}

/// One man page.
///
/// # Errors
///
/// I/O.
pub fn man_page(program: Command) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    clap_mangen::Man::new(program).render(&mut text)?;
    Ok(text)
}

/// A man page for the program and for each of its commands, into a directory.
///
/// # Errors
///
/// I/O.
pub fn man_pages(program: Command, dir: &Path) -> Result<()> {
    fs_err::create_dir_all(dir)?;
    Ok(clap_mangen::generate_to(program, dir)?)
}
