//! A net under moved code: the whole tiny pipeline in f32, one thread, on the lowest instruction set, against hashes that
//! were recorded before.
//!
//! `ARETE_RECORD=1 cargo test --release --workspace --test recorded` records anew; the commit that does it says which byte
//! changed and why. Hashes are kept per CPU kind (`tests/fixtures/recorded/`), since libtorch's own libraries choose by the
//! CPU even where a lesser instruction set is forced; on a kind without any the test says so and compares two runs.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

#[expect(dead_code, reason = "the test of the pipeline uses the rest")]
mod run;

use std::collections::BTreeMap;
use std::path::PathBuf;

use arete_stage::run::RunJson;
use run::{Pipeline, STAGES, repository};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The lowest level of everything that chooses by the CPU, and one thread.
const LOWEST: &[(&str, &str)] = &[
    ("ARETE_CPU_KERNELS", "baseline"),
    ("ATEN_CPU_CAPABILITY", "default"),
    ("MKL_CBWR", "COMPATIBLE"),
    ("ONEDNN_MAX_CPU_ISA", "SSE41"),
    ("OMP_NUM_THREADS", "1"),
];

/// What a run is held against.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Recorded {
    /// SHA-256 of Parquet, safetensors and metrics, by path in the run.
    files: BTreeMap<String, String>,
    /// What each stage's `run.json` says that no machine decides.
    runs: BTreeMap<String, Run>,
}

/// The fields of a `run.json` that are compared.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Run {
    config: Value,
    inputs: Vec<String>,
    counts: Value,
}

impl Recorded {
    /// Runs every stage in a directory of its own.
    fn of(name: &str) -> Self {
        let pipeline = Pipeline::new(name, "keep", 24).with(LOWEST);
        for (stage, _) in STAGES {
            pipeline.run(stage);
        }
        let files = pipeline.files();
        let is_result = |path: &str| {
            // Rows by split are copies of what is recorded.
            let is_copy = path.contains("/splits/");
            path.ends_with(".parquet") && !is_copy
                || path.ends_with(".safetensors")
                || path.ends_with("metrics.jsonl")
        };
        let runs = files
            .keys()
            .filter_map(|path| path.strip_suffix("/run.json"))
            .map(|dir| (dir.to_owned(), Run::read(&pipeline, dir)))
            .collect();
        let files = files.into_iter().filter(|(path, _)| is_result(path)).collect();
        Self { files, runs }
    }
}

impl Run {
    fn read(pipeline: &Pipeline, dir: &str) -> Self {
        let mut run = RunJson::read(pipeline.at(dir)).unwrap();
        // A hash of the page's own code, which is meant to change with it.
        if let Value::Object(config) = &mut run.config {
            config.remove("page");
        }
        // The hashes of inputs are those of files that are compared themselves, or that change with the data.
        Self {
            config: relative(run.config),
            inputs: run.inputs.into_keys().collect(),
            counts: Value::Object(run.counts),
        }
    }
}

/// The same settings without the folder of this checkout.
fn relative(config: Value) -> Value {
    let root = repository();
    let text = config.to_string().replace(root.to_str().unwrap(), "");
    serde_json::from_str(&text).unwrap()
}

/// Vendor, family and model of the CPU, as the kernel names them.
fn cpu_kind() -> String {
    let text = fs_err::read_to_string("/proc/cpuinfo").unwrap();
    let value = |key: &str| {
        let line =
            text.lines().find(|line| line.split(':').next().is_some_and(|k| k.trim() == key));
        line.and_then(|line| line.split(':').nth(1)).map_or("unknown", str::trim).to_owned()
    };
    ["vendor_id", "cpu family", "model"].map(value).join("-")
}

fn recorded_path() -> PathBuf {
    repository().join("tests/fixtures/recorded").join(format!("{}.json", cpu_kind()))
}

#[test]
fn moved_code_changes_no_byte() {
    let found = Recorded::of("recorded");
    let path = recorded_path();
    if std::env::var_os("ARETE_RECORD").is_some() {
        fs_err::create_dir_all(path.parent().unwrap()).unwrap();
        fs_err::write(&path, serde_json::to_string_pretty(&found).unwrap() + "\n").unwrap();
        println!("recorded {} files in {}", found.files.len(), path.display());
        return;
    }
    let expected = if path.is_file() {
        serde_json::from_str(&fs_err::read_to_string(&path).unwrap()).unwrap()
    } else {
        println!("nothing is recorded for CPUs of kind {}: comparing two runs", cpu_kind());
        Recorded::of("recorded-again")
    };
    let changed: Vec<&String> = expected
        .files
        .iter()
        .filter(|(path, sum)| found.files.get(*path) != Some(sum))
        .map(|(path, _)| path)
        .chain(found.files.keys().filter(|path| !expected.files.contains_key(*path)))
        .collect();
    assert!(changed.is_empty(), "other bytes than recorded: {changed:#?}");
    for (dir, run) in &expected.runs {
        assert_eq!(found.runs.get(dir), Some(run), "{dir}/run.json");
    }
    assert_eq!(found.runs.len(), expected.runs.len());
    println!("{} files and {} runs as recorded", found.files.len(), found.runs.len());
}
