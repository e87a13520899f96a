//! When, by which commit, from which model, in what time and on which machine a run was made: the one part of the page that is
//! never the same twice, and stands in one element, `<aside id="made">`.

use std::path::Path;

use arete_records::hashes::MACHINE;
use arete_stage::{clock, rounds, timings};
use serde::Serialize;
use serde_json::Value;

use crate::run_files::RunFiles;

/// What the element says; nothing that is not known.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Made {
    /// When the page was written.
    date: String,
    /// Of the program that wrote it.
    commit: Option<&'static str>,
    /// What the stages took, all attempts together.
    duration: Option<String>,
    /// What the run began with.
    model: Option<String>,
    machine: Option<String>,
}

impl Made {
    pub(crate) fn of(dir: &Path, run: &RunFiles) -> Self {
        let scored = run.scoring.as_ref().and_then(|scoring| scoring.summary.models.first());
        let tuned = || Some(run.stage("sft")?.config.get("model")?.as_str()?.to_owned());
        Self {
            date: clock::now(),
            commit: option_env!("ARETE_COMMIT"),
            duration: seconds(dir).map(duration),
            model: scored.map(|model| model.source.clone()).or_else(tuned),
            machine: machine(dir, run),
        }
    }
}

/// Seconds of the newest attempt at every stage, with those before that it went on from. None where `arete run` timed nothing.
fn seconds(dir: &Path) -> Option<f64> {
    let text = fs_err::read_to_string(dir.join(timings::FILE)).ok()?;
    let mut by_stage = std::collections::BTreeMap::new();
    for line in text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        let (Some(what), Some(seconds)) = (line["what"].as_str(), line["seconds"].as_f64()) else {
            continue;
        };
        let before = by_stage.get(what).copied().filter(|_| line["resumed"] == true);
        by_stage.insert(what.to_owned(), before.unwrap_or(0.0) + seconds);
    }
    (!by_stage.is_empty()).then(|| by_stage.values().sum())
}

/// `45 s`, `12 min`, `3.5 h`.
fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 100.0 => format!("{s:.0} s"),
        s if s < 6000.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

/// The machine of the last stage that says.
fn machine(dir: &Path, run: &RunFiles) -> Option<String> {
    let files = run.stages.iter().rev();
    let mut files = files.map(|stage| rounds::newest_place(dir, &stage.dir).join(MACHINE));
    let found =
        files.find_map(|path| serde_json::from_slice::<Value>(&fs_err::read(path).ok()?).ok())?;
    let text = |key: &str| found[key].as_str().filter(|text| !text.is_empty());
    let gpus: Vec<&str> =
        found["gpus"].as_array()?.iter().filter_map(|gpu| gpu["name"].as_str()).collect();
    let cores = found["cores"]["allowed"].as_u64();
    let parts = [
        text("cpu").map(str::to_owned),
        cores.map(|n| if n == 1 { "1 core".to_owned() } else { format!("{n} cores") }),
        found["threads"].as_i64().map(|n| format!("threads: {n}")),
        text("kernels").map(str::to_owned),
        text("libtorch").map(|version| format!("libtorch {version}")),
        (!gpus.is_empty()).then(|| gpus.join(", ")),
    ];
    Some(parts.into_iter().flatten().collect::<Vec<_>>().join(" · "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_that_went_on_are_added_up() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(seconds(dir.path()), None);
        for (what, took, resumed) in [
            ("sft", 100.0, false),
            ("sft", 7.0, false), // begun anew: what was before is another attempt
            ("sft", 3.0, true),
            ("ppo", 50.0, false),
            ("report", 0.5, false),
        ] {
            timings::log(dir.path(), what, took, &[("resumed", resumed.into())]).unwrap();
        }
        assert_eq!(seconds(dir.path()), Some(60.5));
        assert_eq!([59.6, 900.0, 9000.0].map(duration), ["60 s", "15 min", "2.5 h"]);
    }

    #[test]
    fn the_last_stage_s_machine_is_told() {
        let dir = tempfile::tempdir().unwrap();
        for stage in ["sft", "scoring"] {
            fs_err::create_dir_all(dir.path().join(stage)).unwrap();
        }
        let run = RunFiles::read(dir.path()).unwrap();
        assert_eq!(machine(dir.path(), &run), None);
        let found = |cpu: &str| {
            serde_json::json!({"cpu": cpu, "cores": {"allowed": 2}, "threads": 2, "kernels": "avx512-bf16",
                "libtorch": "2.13.0", "gpus": [{"name": "H200", "device": "cuda:0"}]})
        };
        for (stage, cpu) in [("sft", "an old one"), ("scoring", "EPYC")] {
            fs_err::write(dir.path().join(stage).join(MACHINE), found(cpu).to_string()).unwrap();
        }
        let expected = "EPYC · 2 cores · threads: 2 · avx512-bf16 · libtorch 2.13.0 · H200";
        assert_eq!(machine(dir.path(), &run).as_deref(), Some(expected));
        assert!(Made::of(dir.path(), &run).date.ends_with(" UTC"));
    }
}
