//! The stages end to end, on a tiny chat model and on a server of our own.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

#[expect(dead_code, reason = "the tests of the client use the rest")]
#[path = "../common/mod.rs"]
mod common;
mod engines;
mod judged;
mod sampled;
mod servers;
#[expect(dead_code, reason = "the tests of other crates use the rest")]
#[path = "../../../engine/tests/support/stand_in.rs"]
mod stand_in;
mod whole_runs;

use std::path::{Path, PathBuf};
use std::process::Command;

use arete_curation::conversations::ConversationsConfig;
use arete_curation::demonstrations::DemonstrationsConfig;
use arete_curation::engine::{Chain, Drawing, Labels, LocalEngine, Query};
use arete_curation::preferences::PreferencesConfig;
use arete_curation::prompts::PromptsConfig;
use arete_curation::stage::Work;
use arete_curation::{
    calibrate, conversations, demonstrations, engine, merge, preferences, prompts,
};
use arete_model::generate::Sampling;
use arete_model::{Device, Kind, LoadOptions};
use arete_records::rows::{
    ConversationRow, DemonstrationRow, JudgementRow, PreferenceRow, PromptRow,
};
use arete_records::{Aspect, FinishReason, Message, Role, Split, parquet};
use arete_stage::run::RunJson;
use clap::{Args, FromArgMatches};
use common::{Answer, serve};
use serde_json::{Value, json};

fn fixture() -> String {
    format!("{}/../../tests/fixtures/tiny-chat", env!("CARGO_MANIFEST_DIR"))
}

fn data(name: &str) -> String {
    format!("{}/../../data/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// A configuration as the command line would give it.
fn config<C: Args + FromArgMatches>(flags: &[&str]) -> C {
    let command =
        C::augment_args(clap::Command::new("test").no_binary_name(true).args_override_self(true));
    C::from_arg_matches(&command.try_get_matches_from(flags).unwrap()).unwrap()
}

fn write_prompts(dir: &Path, n: usize) -> PathBuf {
    let output = dir.join("prompts");
    let limit = n.to_string();
    let config: PromptsConfig = config(&["--limit", &limit, "--max-chars", "120"]);
    prompts::run(&config, &[data("prompts")], &output).unwrap();
    output
}

fn conversations_config(flags: &[&str]) -> ConversationsConfig {
    let constitution = data("constitution.toml");
    let mut all = vec!["--max-new-tokens", "6", "--constitution", &constitution];
    all.extend_from_slice(flags);
    config(&all)
}

fn converse(prompts: &Path, output: &Path, flags: &[&str]) -> Vec<ConversationRow> {
    let inputs = conversations::Inputs {
        prompts: prompts.to_owned(),
        model: fixture(),
        original: Some(fixture()),
    };
    conversations::run(&conversations_config(flags), &inputs, output, &Work::Compute).unwrap();
    let joined = output.join("conversations.parquet");
    if joined.exists() { parquet::read(joined).unwrap() } else { Vec::new() }
}

fn preferences_config(flags: &[&str]) -> PreferencesConfig {
    let (constitution, exemplars) =
        (data("constitution.toml"), data("demonstrations/exemplars.jsonl"));
    let mut all = vec![
        "--truncated",
        "keep",
        "--min-pairs",
        "1",
        "--constitution",
        &constitution,
        "--exemplars",
        &exemplars,
    ];
    all.extend_from_slice(flags);
    config(&all)
}

fn judge(
    conversations: &Path,
    judge: Option<&str>,
    output: &Path,
    flags: &[&str],
) -> anyhow::Result<()> {
    let inputs = preferences::Inputs {
        conversations: conversations.to_owned(),
        judge: judge.map(str::to_owned),
    };
    preferences::run(&preferences_config(flags), &inputs, output, &Work::Compute)
}

fn pairs(output: &Path, aspect: Aspect) -> Vec<PreferenceRow> {
    ["train", "validation", "test"]
        .iter()
        .map(|split| output.join(aspect.name()).join(format!("{split}.parquet")))
        .filter(|path| path.exists())
        .flat_map(|path| parquet::read::<PreferenceRow>(path).unwrap())
        .collect()
}

fn bytes(path: impl AsRef<Path>) -> Vec<u8> {
    fs_err::read(path.as_ref()).unwrap()
}

/// Every file of a stage but wall times, the machine and the lock.
fn contents(dir: &Path) -> std::collections::BTreeMap<PathBuf, Vec<u8>> {
    fn visit(dir: &Path, base: &Path, files: &mut std::collections::BTreeMap<PathBuf, Vec<u8>>) {
        for entry in fs_err::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                visit(&path, base, files);
            } else if path.file_name().is_some_and(|name| {
                name != "timings.jsonl" && name != "machine.json" && name != ".lock"
            }) {
                files.insert(path.strip_prefix(base).unwrap().to_owned(), bytes(&path));
            }
        }
    }
    let mut files = std::collections::BTreeMap::new();
    visit(dir, dir, &mut files);
    files
}
