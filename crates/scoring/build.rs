//! Tells the page which commit the program is of, where the sources are a git work tree.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // A folder unpacked inside another project's work tree is not of that project's commit.
    let is_tracked = git(&["ls-files", "--error-unmatch", "build.rs"]).is_some();
    let Some(dir) = git(&["rev-parse", "--absolute-git-dir"]).filter(|_| is_tracked) else {
        return;
    };
    // What moves with every commit; a file that is not there would run this every time.
    let moving = ["HEAD", "logs/HEAD"].map(|file| Path::new(&dir).join(file));
    for file in moving.iter().filter(|file| file.is_file()) {
        println!("cargo:rerun-if-changed={}", file.display());
    }
    if let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) {
        println!("cargo:rustc-env=ARETE_COMMIT={commit}");
    }
}

/// What git says, if there is one and it succeeds.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
