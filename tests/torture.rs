//! `scripts/torture`, which `make torture-suite` runs for hours, here with a few cases of each driver; and that it finds what is wrong.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

#[expect(dead_code, reason = "the test of the pipeline uses the rest")]
mod run;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use run::{program, repository, text};

/// The runner, with its scratch folder.
fn suite(name: &str, programs: &Path, arguments: &[&str]) -> (Output, PathBuf) {
    let work = Path::new(env!("CARGO_TARGET_TMPDIR")).join("torture").join(name);
    let mut command = Command::new("python3");
    command.arg(repository().join("scripts/torture/run.py")).env("PYTHONDONTWRITEBYTECODE", "1");
    command.arg("--programs").arg(programs).arg("--work").arg(&work).args(arguments);
    (command.output().expect("python3 starts"), work)
}

#[test]
fn a_few_of_each_driver_find_nothing() {
    const FEW: &str = "kills:4,steps:3,power:3,faults:7,flips:6,hostile:20,servers:2,hub:4,limits:3,signals:2,races:1,secrets:2,soak:10";
    let programs = program("arete").parent().unwrap().to_owned();
    let (output, _) = suite("few", &programs, &["--patience", "20", FEW]);
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{}\n{stdout}\n{stderr}", output.status);
    println!("{stdout}");
    for driver in FEW.split(',') {
        let name = driver.split(':').next().unwrap();
        assert!(stdout.contains(&format!("| {name} | ")), "no row of {name}:\n{stdout}");
    }
    assert!(stdout.ends_with("nothing was found\n"), "{stdout}");
}

/// Programs that do their work and are wrong in one way: the suite must say so.
fn broken(name: &str, script: &str) -> PathBuf {
    let dir =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join("torture").join(format!("{name}-programs"));
    fs_err::create_dir_all(&dir).unwrap();
    for name in ["arete", "model", "curation", "sft", "reward", "dpo", "ppo", "scoring"] {
        let real = program(name);
        let path = dir.join(real.file_name().unwrap());
        let script = script.replace("{real}", real.to_str().unwrap());
        fs_err::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs_err::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    dir
}

#[test]
fn what_is_wrong_is_found() {
    // A failure has a panic's exit code, and a success leaves rubbish where it ran.
    let script = r#"'{real}' "$@"
code=$?
[ $code = 0 ] || exit 101
: > .x.tmp-1-1"#;
    let few = ["--only", "^(lines-prompt-empty|recipe-unknown-key)$", "hostile"];
    let (output, work) = suite("broken", &broken("broken", script), &few);
    let stdout = text(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{stdout}\n{}", text(&output.stderr));
    assert!(stdout.contains("exit code 101 is not documented"), "{stdout}");
    assert!(stdout.contains("left behind: "), "{stdout}");
    assert!(work.join("findings").is_dir() && work.join("results/hostile.jsonl").is_file());
}

#[test]
fn a_driver_that_is_none_is_named() {
    let (output, _) = suite("none", Path::new("."), &["kils:3"]);
    assert_eq!(output.status.code(), Some(2));
    let stderr = text(&output.stderr);
    assert!(stderr.contains("there is no driver 'kils'") && stderr.contains("kills"), "{stderr}");
}
