//! `launch/`: the sbatch files are bash, and the training one really trains in two processes under a stand-in for `srun`.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

#[expect(dead_code, reason = "the test of the pipeline uses the rest")]
mod run;

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use run::{Pipeline, repository, text};

/// Starts its command twice as Slurm starts a step's tasks; ends with the first exit code that is none of success.
const SRUN: &str = r#"#!/bin/bash
while [[ $1 == -* ]]; do
    echo "$1" >>"$SRUN_OPTIONS"
    shift
done
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=localhost
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
done
code=0
for _ in 0 1; do
    wait -n || code=$?
done
exit "$code"
"#;

fn slurm(name: &str) -> PathBuf {
    repository().join("launch/slurm").join(name)
}

#[test]
fn sbatch_files_are_bash() {
    let mut n = 0;
    for entry in fs_err::read_dir(repository().join("launch/slurm")).unwrap() {
        let path = entry.unwrap().path();
        let output = Command::new("bash").arg("-n").arg(&path).output().unwrap();
        assert!(output.status.success(), "{}: {}", path.display(), text(&output.stderr));
        n += 1;
    }
    assert_eq!(n, 3);
}

#[test]
fn the_training_job_trains_in_two_processes() {
    let pipeline = Pipeline::new("launch", "keep", 24).with(&[("OMP_NUM_THREADS", "1")]);
    for stage in ["prompts", "demonstrations", "sft"] {
        pipeline.run(stage);
    }
    let bin = tempfile::tempdir().unwrap();
    let srun = bin.path().join("srun");
    fs_err::write(&srun, SRUN).unwrap();
    fs_err::set_permissions(&srun, std::fs::Permissions::from_mode(0o755)).unwrap();
    let options = bin.path().join("options");
    let path = format!("{}:{}", bin.path().display(), std::env::var("PATH").unwrap());
    let job = |words: &[String]| {
        let mut command = pipeline.words(&[vec!["bash".to_owned()], words.to_vec()].concat());
        command.env("PATH", &path).env("SRUN_OPTIONS", &options);
        // What sbatch gives its script.
        for (name, value) in [
            ("SLURM_JOB_ID", (std::process::id() % 20_000).to_string()),
            ("SLURM_NTASKS", "2".to_owned()),
            ("SLURM_PROCID", "0".to_owned()),
            ("SLURM_CPUS_PER_TASK", "1".to_owned()),
        ] {
            command.env(name, value);
        }
        command.output().unwrap()
    };
    let script = slurm("train.sbatch").to_str().unwrap().to_owned();
    let train = pipeline.command_to("sft", "job", &[]);
    let done = job(&[vec![script.clone()], train.clone()].concat());
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert_eq!(pipeline.files_of("job"), pipeline.files_of("sft"));
    let timings = fs_err::read_to_string(pipeline.at("job/timings.jsonl")).unwrap();
    assert!(timings.contains("\"n_ranks\":2"), "{timings}");
    let said = fs_err::read_to_string(&options).unwrap();
    assert_eq!(said, "--kill-on-bad-exit=1\n--label\n");
    // The same command without srun is refused, not run twice or alone.
    let alone = job(&[vec!["-c".to_owned(), "exec \"$0\" \"$@\"".to_owned()], train].concat());
    assert_eq!(alone.status.code(), Some(2), "{}", text(&alone.stderr));
    assert!(text(&alone.stderr).contains("SLURM_NTASKS"), "{}", text(&alone.stderr));
    let without = job(&[script]);
    assert_eq!(without.status.code(), Some(2), "{}", text(&without.stderr));
}
