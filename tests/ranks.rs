//! Several processes over libtorch's c10d: the same bytes with any number of them, also when they are killed; who falls is
//! named; what cannot be is refused.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

#[expect(dead_code, reason = "the test of the pipeline uses the rest")]
mod run;

use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Output, Stdio};
use std::time::{Duration, Instant};

use rand_chacha::rand_core::Rng;
use run::{Pipeline, program, text};

const ONE_THREAD: &[(&str, &str)] = &[("OMP_NUM_THREADS", "1")];

/// A pipeline that has come as far as the stages before `until`.
fn pipeline(name: &str, stages: &[&str]) -> Pipeline {
    let pipeline = Pipeline::new(name, "keep", 24).with(ONE_THREAD);
    stages.iter().for_each(|stage| drop(pipeline.run(stage)));
    pipeline
}

/// `arete launch` of a stage.
fn launched(
    pipeline: &Pipeline,
    n: usize,
    stage: &str,
    folder: &str,
    flags: &[&str],
) -> std::process::Command {
    let arete = program("arete").to_str().unwrap().to_owned();
    let launch = [arete, "launch".into(), "--processes".into(), n.to_string(), "--".into()];
    pipeline.words(&[&launch[..], &pipeline.command_to(stage, folder, flags)].concat())
}

fn succeed(output: &Output) {
    assert!(output.status.success(), "{}\n{}", output.status, text(&output.stderr));
}

fn assert_same_files(pipeline: &Pipeline, one: &str, several: &str) {
    let (one_files, several_files) = (pipeline.files_of(one), pipeline.files_of(several));
    assert!(one_files.len() > 3, "{one}: {one_files:?}");
    let differing: Vec<&String> = one_files
        .iter()
        .filter(|(name, sum)| several_files.get(*name) != Some(sum))
        .map(|(name, _)| name)
        .chain(several_files.keys().filter(|name| !one_files.contains_key(*name)))
        .collect();
    assert!(differing.is_empty(), "{one} and {several} differ in {differing:?}");
}

#[test]
fn one_two_three_and_four_processes_leave_the_same_bytes() {
    let before =
        ["prompts", "demonstrations", "sft", "conversations", "preferences", "reward", "yardstick"];
    let pipeline = pipeline("ranks", &before);
    for stage in ["dpo", "ppo"] {
        let output = pipeline.words(&pipeline.command_to(stage, stage, &[])).output().unwrap();
        succeed(&output);
    }
    for stage in ["sft", "reward", "dpo", "ppo"] {
        for n in [2, 3, 4] {
            let folder = format!("{stage}-{n}");
            let output = launched(&pipeline, n, stage, &folder, &[]).output().unwrap();
            succeed(&output);
            assert_same_files(&pipeline, stage, &folder);
            // What went over the network is told beside what is the same.
            let dir = if stage == "reward" { format!("{folder}/action") } else { folder };
            let timings = fs_err::read_to_string(pipeline.at(&dir).join("timings.jsonl")).unwrap();
            let lines = timings.lines().map(|line| serde_json::from_str(line).unwrap());
            let told: Vec<serde_json::Value> =
                lines.filter(|line: &serde_json::Value| line["what"] == "communication").collect();
            assert!(told.len() >= 3, "{stage}: {timings}");
            for line in told {
                assert_eq!(line["n_ranks"], n);
                assert!(
                    line["n_bytes"].as_u64().unwrap() > 0
                        && line["seconds"].as_f64().unwrap() > 0.0
                );
            }
        }
        // As many shards as examples and more: some are empty.
        if stage == "reward" {
            let flags = ["--virtual-shards", "16", "--epochs", "1"];
            let one = pipeline.words(&pipeline.command_to(stage, "many-1", &flags)).output();
            succeed(&one.unwrap());
            succeed(&launched(&pipeline, 3, stage, "many-3", &flags).output().unwrap());
            assert_same_files(&pipeline, "many-1", "many-3");
        }
    }
    // The order of the sum is what makes them the same: without it, one process and several round differently.
    let flags = ["--reduce", "fast"];
    let two = launched(&pipeline, 2, "sft", "sft-fast", &flags).output().unwrap();
    succeed(&two);
    let weights =
        |folder: &str| pipeline.files_of(folder)["checkpoint-000004/tensors.safetensors"].clone();
    assert_ne!(weights("sft"), weights("sft-fast"));
}

/// Processes of a stage, started as torchrun would.
fn start(pipeline: &Pipeline, words: &[Vec<String>]) -> Vec<Child> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let n = words.len();
    let start = |(rank, words): (usize, &Vec<String>)| {
        let variables = [
            ("RANK", rank.to_string()),
            ("LOCAL_RANK", rank.to_string()),
            ("WORLD_SIZE", n.to_string()),
            ("MASTER_ADDR", "127.0.0.1".to_owned()),
            ("MASTER_PORT", port.to_string()),
        ];
        let mut command = pipeline.words(words);
        command.envs(variables).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
    };
    words.iter().enumerate().map(start).collect()
}

const LONG: [&str; 8] =
    ["--epochs", "12", "--max-steps", "40", "--checkpoint-every", "3", "--select", "best"];

fn n_steps(pipeline: &Pipeline, folder: &str) -> usize {
    let path = pipeline.at(folder).join("metrics.jsonl");
    fs_err::read_to_string(path).map_or(0, |text| text.lines().count())
}

/// Two kills; `make torture` kills twenty times.
#[test]
fn torture_by_kills_of_any_rank_ends_with_the_same_bytes() {
    let pipeline = pipeline("ranks-killed", &["prompts", "demonstrations"]);
    let one = pipeline.words(&pipeline.command_to("sft", "whole", &LONG)).output().unwrap();
    succeed(&one);
    let n_kills = if std::env::var_os("ARETE_TORTURE").is_some() { 20 } else { 2 };
    let n_all = n_steps(&pipeline, "whole");
    let mut rng = arete_model::random::stream(21, "kills");
    let mut draw = |below: usize| usize::try_from(rng.next_u64() % below as u64).unwrap();
    let mut n_fell = 0;
    for kill in 0..n_kills {
        let n_ranks = 2 + draw(3);
        let words = vec![pipeline.command_to("sft", "killed", &LONG); n_ranks];
        let mut ranks = start(&pipeline, &words);
        let fallen = draw(n_ranks);
        let started = Instant::now();
        let is_there = |ranks: &mut Vec<Child>| ranks[0].try_wait().unwrap().is_none();
        while n_steps(&pipeline, "killed") <= n_all * kill / (n_kills + 1) && is_there(&mut ranks) {
            assert!(started.elapsed() < Duration::from_secs(240), "no progress");
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::sleep(Duration::from_millis(draw(40) as u64));
        ranks[fallen].kill().unwrap();
        let killed_at = Instant::now();
        for (rank, child) in ranks.into_iter().enumerate() {
            let output = child.wait_with_output().unwrap();
            let log = text(&output.stderr);
            if rank == fallen {
                assert_eq!(output.status.signal(), Some(9), "{log}");
                continue;
            }
            assert!(killed_at.elapsed() < Duration::from_secs(30), "{:?}", killed_at.elapsed());
            // The last rank's part may have been over.
            if output.status.code() != Some(0) {
                assert_eq!(output.status.code(), Some(74), "{log}");
                assert!(log.contains(&format!("error: rank {fallen} of {n_ranks}")), "{log}");
                n_fell += 1;
            }
        }
    }
    assert!(n_fell >= n_kills, "{n_fell} processes fell with {n_kills} killed ones");
    succeed(&launched(&pipeline, 3, "sft", "killed", &LONG).output().unwrap());
    assert_same_files(&pipeline, "whole", "killed");
}

#[test]
fn a_signal_stops_all_at_a_checkpoint_and_another_number_goes_on() {
    let pipeline = pipeline("ranks-stopped", &["prompts", "demonstrations"]);
    let one = pipeline.words(&pipeline.command_to("sft", "whole", &LONG)).output().unwrap();
    succeed(&one);
    // To `arete launch`, which passes it on; and to one rank alone.
    for by_launch in [true, false] {
        let folder = format!("stopped-{by_launch}");
        let mut ranks = if by_launch {
            let mut launch = launched(&pipeline, 2, "sft", &folder, &LONG);
            vec![launch.stderr(Stdio::piped()).spawn().unwrap()]
        } else {
            start(&pipeline, &vec![pipeline.command_to("sft", &folder, &LONG); 2])
        };
        while n_steps(&pipeline, &folder) < 4 {
            assert!(ranks[0].try_wait().unwrap().is_none(), "ended before it was stopped");
            std::thread::sleep(Duration::from_millis(2));
        }
        let last = ranks.last().unwrap().id().to_string();
        let done = std::process::Command::new("sh")
            .args(["-c", &format!("kill -TERM {last}")])
            .status()
            .unwrap();
        assert!(done.success());
        for child in ranks {
            let output = child.wait_with_output().unwrap();
            assert_eq!(output.status.code(), Some(143), "{}", text(&output.stderr));
        }
        let n_done = n_steps(&pipeline, &folder);
        assert!(n_done < n_steps(&pipeline, "whole"), "nothing was left to do");
        succeed(&launched(&pipeline, 4, "sft", &folder, &LONG).output().unwrap());
        assert_same_files(&pipeline, "whole", &folder);
    }
}

#[test]
fn what_does_not_go_together_is_refused_by_name() {
    let pipeline = pipeline("ranks-refused", &["prompts", "demonstrations"]);
    let own = pipeline.command_to("sft", "refused", &[]);
    let variables = |variables: &[(&str, &str)]| {
        let mut command = pipeline.words(&own);
        let output = command.envs(variables.iter().copied()).output().unwrap();
        (output.status.code(), text(&output.stderr))
    };
    for (set, message) in [
        (&[("WORLD_SIZE", "2"), ("RANK", "0")][..], "MASTER_ADDR: expected"),
        (&[("SLURM_NTASKS", "4"), ("SLURM_PROCID", "0")], "Put `srun` before the command"),
    ] {
        let (code, log) = variables(set);
        assert_eq!(code, Some(2), "{log}");
        assert!(log.contains(message), "{log}");
    }
    let more =
        launched(&pipeline, 3, "sft", "refused", &["--virtual-shards", "2"]).output().unwrap();
    assert_eq!(more.status.code(), Some(2), "{}", text(&more.stderr));
    let expected = "virtual_shards: expected at least as many as the 3 processes, got 2";
    assert!(text(&more.stderr).contains(expected), "{}", text(&more.stderr));
    // A process with another seed: both end, and say why.
    let other = pipeline.command_to("sft", "refused", &["--seed", "8"]);
    let ranks = start(&pipeline, &[own, other]);
    let logs: Vec<(Option<i32>, String)> = ranks
        .into_iter()
        .map(|child| child.wait_with_output().unwrap())
        .map(|output| (output.status.code(), text(&output.stderr)))
        .collect();
    assert_eq!([logs[0].0, logs[1].0], [Some(74), Some(74)], "{logs:?}");
    assert!(logs[1].1.contains("rank 1 has other settings than rank 0"), "{}", logs[1].1);
    assert!(
        logs[0].1.contains("rank 1 of 2") && logs[0].1.contains("other settings"),
        "{}",
        logs[0].1
    );
}
