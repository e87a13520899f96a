//! What the subcommands share: opening an engine, finding an earlier stage's file, sharded runs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail};
use arete_engine::EngineArgs;
use arete_model::machine;
use arete_model::machine::Machine;
use arete_records::left_out::{self, LeftOut};
use arete_records::{Refusal, atomic, files, parquet, redact};
use arete_stage::run::{self, Completion, RunJson, StageRun, StageSpec, Start};
use arete_stage::timings;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::config::ComputeConfig;
use crate::engine::server::ServerConfig;
use crate::engine::{Engine, FleetEngine, LocalEngine, ServerEngine};
use arete_stage::exit::Unavailable;
use arete_stage::units::{SHARDS, Shard};

/// How a stage's units come about.
#[derive(Debug, Clone)]
pub enum Work {
    /// They are computed.
    Compute,
    /// They are taken from the parts of a job array.
    Adopt {
        /// The parts' directories.
        parts: Vec<PathBuf>,
        /// Where they were computed.
        place: Place,
        /// SHA-256 of what they were computed from, by name.
        inputs: BTreeMap<String, String>,
    },
}

/// Where a stage's model computes, as `run.json` has it. It follows from the settings and not from a
/// model in memory: a continued run that finds all units done records what an uninterrupted one does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// `cpu`, `cuda(0)`, `server`, or `none` where no model is asked.
    pub device: String,
    /// `float`, `bfloat16`, `half`, `unknown` of a server, or `none`.
    pub dtype: String,
}

impl Place {
    /// Of a stage that asks no model.
    pub fn none() -> Self {
        Self { device: "none".to_owned(), dtype: "none".to_owned() }
    }

    /// Of a model that is loaded with these settings, or stands behind an address.
    ///
    /// # Errors
    ///
    /// A refused setting for an unknown device or format.
    pub fn of(compute: &ComputeConfig, url: Option<&String>) -> Result<Self> {
        if url.is_some() {
            return Ok(Self { device: "server".to_owned(), dtype: "unknown".to_owned() });
        }
        let options = compute.load_options()?;
        Ok(Self {
            device: machine::device_name(options.device),
            dtype: machine::dtype_name(options.dtype).to_owned(),
        })
    }
}

impl Work {
    /// Where the units are, or were, computed.
    ///
    /// # Errors
    ///
    /// What `here` returns.
    pub fn place(&self, here: impl FnOnce() -> Result<Place>) -> Result<Place> {
        match self {
            Self::Compute => here(),
            Self::Adopt { place, .. } => Ok(place.clone()),
        }
    }

    /// Checks that the parts were made from what the stage would read now.
    ///
    /// # Errors
    ///
    /// Parts that do not add up naming the input that has changed.
    pub fn check(&self, run: &StageRun) -> Result<()> {
        let Self::Adopt { parts, inputs, .. } = self else { return Ok(()) };
        let changed = run.inputs().iter().find(|(name, sum)| inputs.get(*name) != Some(*sum));
        changed.map_or(Ok(()), |(name, _)| {
            let path = parts.first().cloned().unwrap_or_default();
            let reason = format!("its input `{name}` has changed since");
            Err(arete_stage::Error::Shards { path, reason }.into())
        })
    }
}

/// What a sharded run leaves beside its shards, so that `merge` can finish the stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Command {
    /// The subcommand.
    pub stage: String,
    /// Its settings, the part of the array among them.
    pub config: Value,
    /// The earlier stage's directory.
    pub input: PathBuf,
    /// The model, as it was named.
    pub model: Option<String>,
    /// The model before SFT, if `conversations` needs it.
    #[serde(default)]
    pub original: Option<String>,
}

const COMMAND: &str = "command.json";

impl Command {
    /// Writes it beside the shards.
    ///
    /// # Errors
    ///
    /// I/O.
    pub fn write(&self, output: &Path) -> Result<()> {
        fs_err::create_dir_all(output.join(SHARDS))?;
        let mut value = serde_json::to_value(self).expect("plain data always serialises");
        redact::redact_json(&mut value);
        let mut bytes = serde_json::to_vec_pretty(&value).expect("plain data always serialises");
        bytes.push(b'\n');
        Ok(atomic::write(output.join(SHARDS).join(COMMAND), &bytes)?)
    }

    /// The command of an array, and the run of its first part, after all parts have been found to belong together.
    ///
    /// # Errors
    ///
    /// Parts that do not add up if a part is incomplete or the parts do not belong together.
    pub fn of_parts(parts: &[PathBuf]) -> Result<(Self, RunJson)> {
        let mut whole: Option<(Self, RunJson)> = None;
        for part in parts {
            let wrong = |reason: String| arete_stage::Error::Shards { path: part.clone(), reason };
            let mut run = RunJson::read(part)
                .map_err(|error| wrong(format!("not a complete part of a job array: {error}")))?;
            let path = part.join(SHARDS).join(COMMAND);
            let bytes = files::read_small(&path)
                .map_err(|error| wrong(format!("not made with --shard: {error}")))?;
            let mut command: Self = serde_json::from_slice(&bytes)
                .map_err(|error| wrong(format!("{COMMAND}: {error}")))?;
            let shard = command.config.as_object_mut().and_then(|config| config.remove("shard"));
            let shard: Option<Shard> = shard.and_then(|shard| serde_json::from_value(shard).ok());
            if shard.is_none_or(|shard| shard.parts() != parts.len()) {
                bail!(wrong(format!("expected a part of {}, got {shard:?}", parts.len())));
            }
            if let Some(config) = run.config.as_object_mut() {
                config.remove("shard");
            }
            match &whole {
                None => whole = Some((command, run)),
                Some((first, first_run)) => {
                    // Of the settings those that count: how a server is talked to may differ.
                    let same = first.stage == command.stage
                        && of_any_gpu(&first_run.config) == of_any_gpu(&run.config);
                    if !same {
                        bail!(wrong("made with other settings than the first part".to_owned(),));
                    }
                    if first_run.inputs != run.inputs {
                        bail!(wrong("made from other inputs than the first part".to_owned()));
                    }
                    let place =
                        |run: &RunJson| (any_gpu(&run.device).to_owned(), run.dtype.clone());
                    if place(first_run) != place(&run) {
                        bail!(wrong(format!(
                            "computed on {} in {}, the first part on {} in {}",
                            run.device, run.dtype, first_run.device, first_run.dtype
                        )));
                    }
                }
            }
        }
        let none = || arete_stage::Error::Shards {
            path: PathBuf::new(),
            reason: "no parts given".to_owned(),
        };
        Ok(whole.ok_or_else(none)?)
    }
}

/// A device's name without the number of the GPU: which of a machine's GPUs computed a part says nothing of the part.
fn any_gpu(device: &str) -> &str {
    if device.starts_with("cuda:") { "cuda" } else { device }
}

/// Settings with every GPU named alike.
fn of_any_gpu(config: &Value) -> Value {
    match config {
        Value::Object(map) => {
            let entries = map.iter().map(|(key, value)| match value {
                Value::String(device) if key == "device" => (key.clone(), any_gpu(device).into()),
                other => (key.clone(), of_any_gpu(other)),
            });
            Value::Object(entries.collect())
        }
        other => other.clone(),
    }
}

/// Opens the engine a stage was asked for.
///
/// # Errors
///
/// A model that cannot be loaded, a server that cannot be used, an adapter for servers.
pub fn open_engine(
    model: &str,
    adapter: Option<&Path>,
    urls: Option<&[String]>,
    compute: &ComputeConfig,
    server: &ServerConfig,
    needs_logprobs: bool,
) -> Result<Engine> {
    match (urls, adapter) {
        (None, _) => {
            let engine = LocalEngine::load(model, adapter, &compute.load_options()?)?;
            Ok(Engine::Local(Box::new(engine)))
        }
        (Some(urls), None) => {
            Ok(Engine::Server(ServerEngine::connect_all(urls, model, server, needs_logprobs)?))
        }
        (Some(_), Some(adapter)) => Err(Refusal::setting(
            "judge_adapter",
            "none together with judge_url: the server holds its adapters",
            adapter.display(),
        )
        .into()),
    }
}

/// The model of a stage, for which servers sample if the settings name any and there is an `output` for their replies.
///
/// # Errors
///
/// As [`open_engine`] and [`FleetEngine::connect`].
///
/// # Panics
///
/// On both kinds of servers at once, which [`crate::config::check_servers`] refuses.
pub fn open_sampler(
    model: &str,
    url: Option<&String>,
    engines: &EngineArgs,
    compute: &ComputeConfig,
    server: &ServerConfig,
    output: Option<&Path>,
) -> Result<Engine> {
    match (url, engines.urls().and(output)) {
        (_, None) => {
            let urls = url.map(std::slice::from_ref);
            open_engine(model, None, urls, compute, server, false)
        }
        (None, Some(output)) => {
            let own = LocalEngine::load(model, None, &compute.load_options()?)?;
            Ok(Engine::Fleet(Box::new(FleetEngine::connect(own, engines, server, output)?)))
        }
        (Some(_), Some(_)) => {
            unreachable!("both kinds of servers are refused by the stage's check")
        }
    }
}

/// An earlier stage's rows: of `DIR/NAME.parquet`, or of the file itself.
///
/// # Errors
///
/// A missing or damaged file, or one without rows.
pub fn rows_of<T: parquet::Row>(input: &Path, name: &str) -> Result<Vec<T>> {
    let path = file_of(input, name);
    let rows: Vec<T> = parquet::read(&path)?;
    if rows.is_empty() {
        bail!(Refusal::file(&path, "rows", "at least one", "none"));
    }
    Ok(rows)
}

/// `DIR/NAME.parquet`, or the file itself.
pub fn file_of(input: &Path, name: &str) -> PathBuf {
    if input.is_dir() { input.join(format!("{name}.parquet")) } else { input.to_owned() }
}

/// Begins a stage; `None` if its results are up to date.
///
/// # Errors
///
/// Those of [`run::begin`].
pub fn begin(spec: StageSpec<'_>) -> Result<Option<StageRun>> {
    let output = spec.output.to_owned();
    match run::begin(spec)? {
        Start::UpToDate(_) => {
            run::say_up_to_date(&output);
            Ok(None)
        }
        Start::Run(run) => Ok(Some(run)),
    }
}

/// Writes `run.json`, and the wall time into `timings.jsonl`.
///
/// # Errors
///
/// I/O.
pub fn finish(
    run: StageRun,
    stage: &str,
    place: Place,
    counts: Map<String, Value>,
    started: Instant,
) -> Result<()> {
    let Place { device, dtype } = place;
    Machine::write(run.output())?;
    timings::log(run.output(), stage, started.elapsed().as_secs_f64(), &[])?;
    Ok(run.finish(Completion { device, dtype, counts })?)
}

/// What `--dry-run` reports.
#[derive(Debug, Serialize)]
pub struct Estimate {
    /// The stage.
    pub stage: &'static str,
    /// What will be done and what is done already, by name.
    pub counts: Map<String, Value>,
    /// Tokens to compute, prompts included.
    pub n_tokens: Option<u64>,
    /// Seconds this will take, measured on a few rows.
    pub seconds: Option<f64>,
    /// The most memory it takes; none where no model is loaded here.
    pub memory: Option<Value>,
}

/// Fails if a server refused more of a unit's items than a [share](left_out::is_share): then it is at fault and not they, and
/// nothing of the unit is kept.
///
/// # Errors
///
/// The server's failure with the first refusal.
pub fn check_refused(server: &str, refused: &[LeftOut], n_items: usize) -> Result<()> {
    match refused.first() {
        Some(LeftOut { item, reason }) if !left_out::is_share(refused.len(), n_items) => {
            let n = refused.len();
            let reason = format!("{n} of {n_items} prompts refused; of prompt {item}: {reason}");
            Err(Unavailable(format!("{server}: replies: {reason}")).into())
        }
        _ => Ok(()),
    }
}

/// A share in per cent, for tables.
pub fn percent(part: usize, whole: usize) -> Value {
    if whole == 0 {
        Value::Null
    } else {
        json!((1000.0 * part as f64 / whole as f64).round() / 10.0)
    }
}

/// A table in Markdown, its columns aligned for the eye.
///
/// # Panics
///
/// If a row has not as many cells as there are heads.
pub fn table(heads: &[&str], rows: &[Vec<String>]) -> String {
    let heads: Vec<String> = heads.iter().map(|&head| head.to_owned()).collect();
    let mut widths = vec![3; heads.len()];
    for row in std::iter::once(&heads).chain(rows) {
        assert_eq!(row.len(), heads.len(), "one cell a column");
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let line = |cells: &[String]| {
        let padded = cells.iter().zip(&widths).map(|(cell, &width)| format!(" {cell:<width$} |"));
        format!("|{}\n", padded.collect::<String>())
    };
    let rule: Vec<String> = widths.iter().map(|&width| "-".repeat(width)).collect();
    let rows: String = rows.iter().map(|row| line(row)).collect();
    format!("{}{}{rows}", line(&heads), line(&rule))
}

/// A figure that may be missing, for tables.
pub fn cell(value: &Value) -> String {
    if value.is_null() { "–".to_owned() } else { value.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parts of one job array that ran on two GPUs of a machine belong together; those of the CPU and a GPU do not.
    #[test]
    fn parts_of_two_gpus_are_alike() {
        let config =
            |device: &str| json!({ "compute": { "device": device, "dtype": "auto" }, "n": 3 });
        assert_eq!(of_any_gpu(&config("cuda:0")), of_any_gpu(&config("cuda:1")));
        assert_eq!(of_any_gpu(&config("cuda")), of_any_gpu(&config("cuda:1")));
        assert_ne!(of_any_gpu(&config("cpu")), of_any_gpu(&config("cuda:1")));
        assert_eq!(
            ["cpu", "auto", "server", "cuda:12"].map(any_gpu),
            ["cpu", "auto", "server", "cuda"]
        );
    }

    #[test]
    fn tables_are_aligned() {
        let rows = [
            vec!["ä".to_owned(), cell(&percent(1, 3))],
            vec!["b".to_owned(), cell(&percent(0, 0))],
        ];
        let text = table(&["name", "%"], &rows);
        assert_eq!(text, "| name | %    |\n| ---- | ---- |\n| ä    | 33.3 |\n| b    | –    |\n");
    }
}
