//! Files of earlier layouts stay readable, or are refused in words that say what to do.
//!
//! `tests/fixtures/earlier/v1` is a run as layout 1 wrote it (version 0.1.0: fourteen prompts, the tiny chat model, adapters of rank
//! 1; without merged models). It is never written again: a layout that changes leaves it and adds another beside it. What layouts
//! before it did without is taken out of copies here.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

use std::path::{Path, PathBuf};

use arete_chain::Reading;
use arete_curation::prompts::tally;
use arete_model::{Device, ModelConfig, adapter};
use arete_records::rows::{
    ConversationRow, DemonstrationRow, JudgementRow, PreferenceRow, PromptRow, RolloutRow, ScoreRow,
};
use arete_records::{Aspect, ScoreStats, parquet};
use arete_scoring::compare::{Arm, ScoredRun};
use arete_scoring::rows::{CoherenceRow, PolicyPreferenceRow};
use arete_scoring::{ReportInputs, RunFiles, doctor, report};
use arete_stage::inputs;
use arete_stage::run::{RunJson, StageSpec, Start, begin};
use arete_tests::fuzz::repository;
use arete_training::CheckpointStore;
use serde_json::{Value, json};

/// A copy of a layout's run.
struct Earlier(tempfile::TempDir);

impl Earlier {
    fn copy(layout: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        copy(&repository().join("tests/fixtures/earlier").join(layout), dir.path());
        Self(dir)
    }

    fn at(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    /// Changes a JSON file.
    fn edit(&self, path: &str, change: impl FnOnce(&mut Value)) {
        let path = self.at(path);
        let mut value = serde_json::from_slice(&fs_err::read(&path).unwrap()).unwrap();
        change(&mut value);
        fs_err::write(path, value.to_string()).unwrap();
    }

    fn without(&self, path: &str, keys: &[&str]) {
        self.edit(path, |value| {
            for key in keys {
                value.as_object_mut().unwrap().remove(*key).unwrap();
            }
        });
    }
}

fn copy(from: &Path, to: &Path) {
    for entry in fs_err::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            fs_err::create_dir(&target).unwrap();
            copy(&path, &target);
        } else {
            fs_err::copy(&path, target).unwrap();
        }
    }
}

const STAGES: [&str; 10] = [
    "prompts",
    "demonstrations",
    "sft",
    "conversations",
    "preferences",
    "reward/action",
    "reward/motivation",
    "reward/consequence",
    "ppo",
    "scoring",
];

#[test]
fn every_table_of_layout_1_is_read() {
    let run = Earlier::copy("v1");
    let prompts: Vec<PromptRow> = parquet::read(run.at("prompts/prompts.parquet")).unwrap();
    assert_eq!(prompts.len(), 14);
    assert_eq!(tally(&prompts).0["arete/advice"], 4);
    let rows: Vec<DemonstrationRow> =
        parquet::read(run.at("demonstrations/demonstrations.parquet")).unwrap();
    assert_eq!(rows.len(), 165 + 14);
    let rows: Vec<ConversationRow> =
        parquet::read(run.at("conversations/conversations.parquet")).unwrap();
    assert_eq!(rows.len(), 28);
    assert_eq!(rows.iter().filter(|row| row.is_cut(Aspect::MOTIVATION)).count(), 2);
    let rows: Vec<JudgementRow> = parquet::read(run.at("preferences/judgements.parquet")).unwrap();
    assert_eq!(rows.len(), 210);
    let rows: Vec<PreferenceRow> =
        parquet::read(run.at("preferences/action/train.parquet")).unwrap();
    assert_eq!(rows.len(), 12);
    for iteration in 1..=2 {
        let path = run.at(&format!("ppo/rollouts/iteration-{iteration:06}.parquet"));
        assert_eq!(parquet::read::<RolloutRow>(path).unwrap().len(), 4);
    }
    let rows: Vec<ScoreRow> = parquet::read(run.at("scoring/scores.parquet")).unwrap();
    assert_eq!(rows.len(), 3 * 3);
    let rows: Vec<CoherenceRow> = parquet::read(run.at("scoring/coherence.parquet")).unwrap();
    assert_eq!(rows.len(), 3 * 3);
    let path = run.at("scoring/policy_preferences.parquet");
    assert_eq!(parquet::read::<PolicyPreferenceRow>(path).unwrap().len(), 3 * 12);
}

#[test]
fn marks_models_and_checkpoints_of_layout_1_are_read() {
    let run = Earlier::copy("v1");
    for stage in STAGES {
        let mark = RunJson::read(run.at(stage)).unwrap();
        assert_eq!(mark.versions["format"], "1", "{stage}");
        inputs::check(run.at(stage)).unwrap();
    }
    let model =
        ModelConfig::from_directory(&repository().join("tests/fixtures/tiny-chat")).unwrap();
    for place in ["sft/adapter", "reward/action/adapter"] {
        let loaded = adapter::load(&run.at(place), "x", &model, Device::Cpu).unwrap();
        assert_eq!(loaded.adapter.config.rank, 1);
        assert_eq!(loaded.head.is_some(), place.starts_with("reward"));
    }
    let stats = ScoreStats::read(run.at("reward/action")).unwrap().unwrap();
    assert_eq!((stats.n, stats.mean), (64, 0.077_194_102_632_347_5));
    let reading = Reading::read(&run.at("reward/action")).unwrap().unwrap();
    assert_eq!(reading.max_length, Some(512));
    let fingerprint = RunJson::read(run.at("ppo")).unwrap().fingerprint;
    let manifest = fs_err::read(run.at("ppo/checkpoint-000002/MANIFEST.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let store = |fingerprint: &str| CheckpointStore::new(&run.at("ppo"), fingerprint, "f32", 2);
    let own = manifest["fingerprint"].as_str().unwrap();
    let loaded = store(own).latest::<Value>().unwrap().unwrap();
    assert_eq!((loaded.step, loaded.state["iteration"].as_u64()), (2, Some(2)));
    // Of other settings it is refused by name.
    let other = format!("{fingerprint}0");
    let refused = store(&other).latest::<Value>().unwrap_err().to_string();
    assert!(refused.contains("fingerprint") && refused.contains("MANIFEST.json"), "{refused}");
    // The layout before named no dtype.
    run.without("ppo/checkpoint-000002/MANIFEST.json", &["dtype"]);
    assert_eq!(store(own).latest::<Value>().unwrap().unwrap().step, 2);
    // A later layout is none that this version reads.
    run.edit("ppo/checkpoint-000002/MANIFEST.json", |manifest| manifest["format"] = json!(2));
    let refused = store(own).load::<Value>(2).unwrap_err().to_string();
    assert!(refused.contains("layout 2"), "{refused}");
}

#[test]
fn page_diagnosis_and_comparison_of_layout_1_are_made() {
    let run = Earlier::copy("v1");
    let files = RunFiles::read(run.0.path()).unwrap();
    assert_eq!(files.names(), [Aspect::ACTION, Aspect::MOTIVATION, Aspect::CONSEQUENCE]);
    assert!(files.outdated_scoring.is_none());
    assert!(!doctor::diagnose(&files).is_empty());
    let inputs = ReportInputs {
        run: run.0.path().to_owned(),
        recipe: None,
        max_samples: 2,
        output: run.at("report"),
    };
    let page = fs_err::read_to_string(report(&inputs).unwrap()).unwrap();
    assert!(page.contains("final") && page.contains("consequence"));
    let arm = Arm { name: "earlier".to_owned(), run: run.0.path().to_owned() };
    assert_eq!(ScoredRun::read(arm).unwrap().summary.models.len(), 3);
}

/// `run.json` had no hash of its own contents.
#[test]
fn marks_without_a_sum_are_read() {
    let run = Earlier::copy("v1");
    run.without("prompts/run.json", &["sha256"]);
    let mark = RunJson::read(run.at("prompts")).unwrap();
    assert_eq!((mark.counts["kept"].as_u64(), mark.sha256), (Some(14), None));
    inputs::check(run.at("prompts")).unwrap();
    // What it recorded of its outputs is compared all the same.
    let path = run.at("prompts/prompts.parquet");
    let mut bytes = fs_err::read(&path).unwrap();
    bytes[100] ^= 1;
    fs_err::write(&path, bytes).unwrap();
    let refused = inputs::check(run.at("prompts")).unwrap_err().to_string();
    assert!(refused.contains("prompts.parquet"), "{refused}");
}

/// Statistics did not say how many prompts and whose replies they rest on.
#[test]
fn statistics_without_their_source_are_read() {
    let run = Earlier::copy("v1");
    run.without("reward/action/score_stats.json", &["n_prompts", "source"]);
    let stats = ScoreStats::read(run.at("reward/action")).unwrap().unwrap();
    assert_eq!((stats.n, stats.n_prompts, stats.source.as_str()), (64, 0, ""));
}

/// Reward models had no reading rule: they read cut replies otherwise than they were trained on.
#[test]
fn reward_models_without_a_reading_rule_are_to_be_trained_again() {
    let run = Earlier::copy("v1");
    fs_err::remove_file(run.at("reward/action/reading.json")).unwrap();
    let refused = Reading::read(&run.at("reward/action")).unwrap_err().to_string();
    assert!(refused.contains("older version") && refused.contains("train it again"), "{refused}");
    // A page is made without it, which says so.
    let files = RunFiles::read(run.0.path()).unwrap();
    let reward = &files.rewards[&Aspect::ACTION];
    assert!(reward.unreadable.as_ref().unwrap().contains("train it again"));
}

/// A summary without a primary endpoint compares replies that were read in different ways.
#[test]
fn scores_of_an_older_version_are_left_out_of_the_page_in_words() {
    let run = Earlier::copy("v1");
    run.without("scoring/summary.json", &["primary"]);
    let files = RunFiles::read(run.0.path()).unwrap();
    assert!(files.scoring.is_none());
    assert!(files.outdated_scoring.unwrap().contains("older version"));
}

/// Results of another layout are never gone on with: they are set aside, and the stage begins anew.
#[test]
fn results_of_another_layout_are_set_aside() {
    let run = Earlier::copy("v1");
    let mark = RunJson::read(run.at("prompts")).unwrap();
    run.edit("prompts/run.json", |mark| {
        mark["versions"]["format"] = json!("0");
        mark.as_object_mut().unwrap().remove("sha256");
    });
    let output = run.at("prompts");
    let spec = StageSpec {
        stage: "prompts",
        output: &output,
        config: mark.config.clone(),
        seed: mark.seed,
        inputs: Vec::new(),
    };
    match begin(spec).unwrap() {
        Start::Run(_) => {}
        Start::UpToDate(_) => panic!("results of layout 0 were taken for ours"),
    }
    assert!(run.at("prompts.old-1/prompts.parquet").is_file());
    assert!(!run.at("prompts/prompts.parquet").exists());
}
