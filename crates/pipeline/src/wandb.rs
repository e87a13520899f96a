//! `arete wandb`: the trainings of a run as Weights & Biases' client leaves runs offline; `wandb sync` uploads them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use arete_records::hashes::{RUN_JSON, STAGE_JSON, walk};
use arete_records::{atomic, hex, jsonl, redact};
use arete_stage::exit::BadInput;
use arete_stage::wandb::WandbRun;
use arete_stage::{clock, metrics};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::setup::dated;

/// What is written, and where.
#[derive(Debug, Clone, clap::Args)]
pub struct WandbArgs {
    /// Directory of a run, with one directory a stage
    #[arg(long, value_name = "DIR")]
    pub run: PathBuf,
    /// Directory that receives wandb/offline-run-… [default: the run's]
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,
    /// The project that `wandb sync` uploads to
    #[arg(long, value_name = "NAME", default_value = "arete")]
    pub project: String,
}

/// Writes every training of the run; the directories, a line each.
///
/// # Errors
///
/// A directory without metrics, damaged files, I/O.
pub fn run(arguments: &WandbArgs) -> Result<String> {
    let root = dated(&arguments.run);
    let files = walk(&root, &|_| false).with_context(|| format!("reading {}", root.display()))?;
    let is_own = |file: &&String| {
        let mut parts = file.split('/');
        file.rsplit('/').next() == Some(metrics::FILE)
            && parts.all(|part| !part.starts_with('.') && !atomic::is_set_aside(part))
    };
    let output = arguments.output.clone().unwrap_or_else(|| root.clone()).join("wandb");
    let name = fs_err::canonicalize(&root)?;
    let name = name.file_name().map(|name| name.to_string_lossy().into_owned());
    let group = redact::redacted(&name.unwrap_or_default()).into_owned();
    let mut text = String::new();
    for file in files.iter().filter(is_own) {
        let stage = file.trim_end_matches(metrics::FILE).trim_end_matches('/');
        let made = training(&root, stage, &group, &arguments.project)?;
        let dir = place(&output, &made.id)?;
        // The client's own folder for what it uploads beside the numbers.
        fs_err::create_dir_all(dir.join("files"))?;
        atomic::write(dir.join(format!("run-{}.wandb", made.id)), &made.to_bytes())?;
        writeln!(text, "{}", dir.display())?;
    }
    if text.is_empty() {
        let what = format!("expected stages with {}, found none", metrics::FILE);
        return Err(BadInput(format!("{}: {what}", root.display())).into());
    }
    Ok(text)
}

/// The training of a stage.
fn training(root: &Path, stage: &str, group: &str, project: &str) -> Result<WandbRun> {
    let dir = root.join(stage);
    let mark = [RUN_JSON, STAGE_JSON].map(|name| dir.join(name));
    let mark = mark.iter().find(|path| path.is_file());
    let record: Value = match mark {
        Some(path) => serde_json::from_slice(&fs_err::read(path)?)
            .map_err(|error| BadInput(format!("{}: expected JSON: {error}", path.display())))?,
        None => Value::Null,
    };
    let fingerprint = record["fingerprint"].as_str().unwrap_or_default();
    let sum = Sha256::digest(format!("{group}/{stage}/{fingerprint}"));
    let mut history: BTreeMap<u64, BTreeMap<String, Value>> = BTreeMap::new();
    for (line, value) in jsonl::read(dir.join(metrics::FILE))? {
        let Some((step, values)) = value["step"].as_u64().zip(value.as_object()) else {
            let path = dir.join(metrics::FILE);
            let what =
                format!("{}:{line}: expected an object with a number `step`", path.display());
            return Err(BadInput(what).into());
        };
        // A step's probe stands in a line of its own; W&B takes one a step.
        let known = values.iter().filter(|(name, value)| *name != "step" && value.is_number());
        let known = known.map(|(name, value)| (name.clone(), value.clone()));
        history.entry(step).or_default().extend(known);
    }
    Ok(WandbRun {
        id: hex(&sum)[..8].to_owned(),
        project: project.to_owned(),
        group: group.to_owned(),
        job_type: stage.to_owned(),
        name: format!("{group} {stage}"),
        started_s: clock::now_s(),
        config: metrics::flat(&record["config"]),
        history,
    })
}

/// The directory of a run: the one that it has already, or a new one named after the second.
fn place(output: &Path, id: &str) -> Result<PathBuf> {
    let ending = format!("-{id}");
    if output.is_dir() {
        for entry in fs_err::read_dir(output)? {
            let path = entry?.path();
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
            let name = name.unwrap_or_default();
            if name.starts_with("offline-run-") && name.ends_with(&ending) {
                return Ok(path);
            }
        }
    }
    Ok(output.join(format!("offline-run-{}{ending}", clock::stamp())))
}
