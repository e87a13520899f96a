//! The dependency direction between the crates, read from `cargo metadata`.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// What each crate may depend on directly, itself left out.
const ALLOWED: &[(&str, &[&str])] = &[
    ("arete-records", &[]),
    ("arete-stage", &["arete-records"]),
    ("arete-model", &["arete-stage", "arete-records"]),
    ("arete-chain", &["arete-model", "arete-records"]),
    ("arete-training", &["arete-chain", "arete-model", "arete-stage", "arete-records"]),
    ("arete-engine", &["arete-chain", "arete-model", "arete-stage", "arete-records"]),
    (
        "arete-curation",
        &["arete-engine", "arete-chain", "arete-model", "arete-stage", "arete-records"],
    ),
    (
        "arete-scoring",
        &["arete-engine", "arete-chain", "arete-model", "arete-stage", "arete-records"],
    ),
    (
        "arete-sft",
        &["arete-training", "arete-chain", "arete-model", "arete-stage", "arete-records"],
    ),
    (
        "arete-reward",
        &["arete-training", "arete-chain", "arete-model", "arete-stage", "arete-records"],
    ),
    (
        "arete-dpo",
        &["arete-training", "arete-chain", "arete-model", "arete-stage", "arete-records"],
    ),
    (
        "arete-ppo",
        &[
            "arete-training",
            "arete-engine",
            "arete-chain",
            "arete-model",
            "arete-stage",
            "arete-records",
        ],
    ),
    (
        "arete-pipeline",
        &[
            "arete-curation",
            "arete-sft",
            "arete-reward",
            "arete-dpo",
            "arete-ppo",
            "arete-scoring",
            "arete-training",
            "arete-engine",
            "arete-chain",
            "arete-model",
            "arete-stage",
            "arete-records",
        ],
    ),
];

/// Direct workspace dependencies of every workspace package (normal and build, not dev).
fn workspace_dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .output()
        .expect("cargo metadata runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    packages
        .iter()
        .map(|package| {
            let dependencies = package["dependencies"].as_array().expect("dependencies");
            let names = dependencies
                .iter()
                .filter(|dependency| dependency["kind"] != "dev")
                .map(|dependency| dependency["name"].as_str().expect("name").to_owned())
                .filter(|name| name.starts_with("arete-"))
                .collect();
            (package["name"].as_str().expect("name").to_owned(), names)
        })
        .collect()
}

#[test]
fn dependencies_point_one_way() {
    let found = workspace_dependencies();
    for (name, allowed) in ALLOWED {
        let names = found.get(*name).unwrap_or_else(|| panic!("{name} is not in the workspace"));
        for dependency in names {
            assert!(
                allowed.contains(&dependency.as_str()),
                "{name} depends on {dependency}; allowed: {allowed:?} (stages meet in files)"
            );
        }
    }
}

#[test]
fn every_crate_is_listed() {
    for name in workspace_dependencies().keys().filter(|name| *name != "arete-tests") {
        assert!(ALLOWED.iter().any(|(listed, _)| listed == name), "{name} is missing from ALLOWED");
    }
}

#[test]
fn records_does_not_link_libtorch() {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "-p", "arete-records", "--offline", "--edges", "normal", "--prefix", "none"])
        .output()
        .expect("cargo tree runs");
    let tree = String::from_utf8_lossy(&output.stdout);
    assert!(tree.contains("parquet"), "cargo tree printed: {tree}");
    assert!(!tree.lines().any(|line| line.starts_with("torch-sys") || line.starts_with("tch ")));
}
