//! What can be known to fail later is refused before the first stage: settings of every table, stages that miss what they
//! read, places that do not exist, devices, servers, memory, disk.

use std::net::{TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use arete_curation::calibrate::CalibrateConfig;
use arete_curation::conversations::{ConversationsConfig, PersonaChoice};
use arete_curation::demonstrations::DemonstrationsConfig;
use arete_curation::judge::Method;
use arete_curation::preferences::PreferencesConfig;
use arete_curation::prompts::{self, PromptsConfig};
use arete_model::{Source, machine};
use arete_records::files;
use arete_stage::exit::{BadInput, OutOfRoom, Usage};
use serde_json::Value;

use crate::memory::{self, Shape};
use crate::setup::Setup;
use crate::stages::{PIPELINE, Stage};
use crate::steps::{self, Step};

pub use arete_chain::memory::PROMPT_TOKENS;
/// The constitution of stages that are given none.
const CONSTITUTION: &str = "data/constitution.toml";
/// Seconds a server may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(5);

/// Checks everything that needs no computing; `steps` are those that are to run.
///
/// # Errors
///
/// The first thing that is refused.
pub fn everything(setup: &Setup, steps: &[Step]) -> Result<()> {
    tables(setup)?;
    steps::check(setup)?;
    let stages: Vec<&Stage> = steps.iter().map(|step| step.stage).collect();
    reads(setup, &stages)?;
    places(setup, &stages)?;
    splits(setup, &stages)?;
    for stage in stages {
        device(&(stage.settings)(setup)?)?;
    }
    Ok(())
}

/// Every table of the recipe is read by the parser of its own program, also of stages that are left out.
///
/// # Errors
///
/// An unknown key, naming the nearest; a value that does not fit.
pub fn tables(setup: &Setup) -> Result<()> {
    for stage in &PIPELINE {
        (stage.settings)(setup)?;
        setup.has(stage.name)?;
    }
    setup.checked("calibrate", CalibrateConfig::check)?;
    setup.checked("yardstick", arete_reward::Config::check)?;
    Ok(())
}

/// A stage that is in has what it cannot do without.
fn reads(setup: &Setup, stages: &[&Stage]) -> Result<()> {
    for stage in stages {
        for name in stage.reads.iter().filter(|name| is_needed(setup, stage, name)) {
            if !setup.has(name)? {
                let message = format!(
                    "`{}` reads `{name}`, which the recipe leaves out: leave it out, too, or put `{name}` in",
                    stage.name
                );
                return Err(Usage(message).into());
            }
        }
    }
    Ok(())
}

/// Whether a stage cannot do without another: a base there is always, and a final model need not be.
fn is_needed(setup: &Setup, stage: &Stage, read: &str) -> bool {
    match (stage.name, read) {
        ("sft", "demonstrations") => true,
        (_, "sft" | "dpo" | "ppo") | ("report", _) => false,
        ("ppo", "reward") => setup
            .settings::<arete_ppo::Config>("ppo")
            .is_ok_and(|config| config.programmed_reward.is_none()),
        _ => true,
    }
}

/// Prompts that lie here give every stage its split: scoring answers those for testing alone, and comes last.
fn splits(setup: &Setup, stages: &[&Stage]) -> Result<()> {
    let has = |name: &str| stages.iter().any(|stage| stage.name == name);
    let paths: Vec<PathBuf> = setup.prompts.iter().map(PathBuf::from).collect();
    let lie_here = paths.iter().all(|path| path.is_file() || path.is_dir());
    if !(has("prompts") && has("scoring") && lie_here) {
        return Ok(());
    }
    let config: PromptsConfig = setup.settings("prompts")?;
    let [train, validation, test] = prompts::splits(&config, &paths)?;
    if test > 0 {
        return Ok(());
    }
    let message = format!(
        "{}: scoring needs a prompt for testing, of these {train} are for training and {validation} for validation: three \
         at least give each split one",
        setup.prompts.join(", ")
    );
    Err(BadInput(message).into())
}

/// Files, directories, models and servers that the stages name.
fn places(setup: &Setup, stages: &[&Stage]) -> Result<()> {
    for stage in stages {
        match stage.name {
            "prompts" => setup.prompts.iter().try_for_each(|input| prompts_of(input))?,
            "demonstrations" => {
                let config: DemonstrationsConfig = setup.settings(stage.name)?;
                if config.source.needs_model() {
                    asked(setup.model()?, config.engine_url.as_deref())?;
                    servers(config.engines.urls())?;
                    constitution(config.constitution.as_deref())?;
                }
                if config.source.needs_exemplars() {
                    file(&config.exemplars, "the exemplars")?;
                }
            }
            "conversations" => {
                let config: ConversationsConfig = setup.settings(stage.name)?;
                if config.personas == PersonaChoice::Contrast {
                    constitution(config.constitution.as_deref())?;
                }
                asked(setup.model()?, config.engine_url.as_deref())?;
                servers(config.engines.urls())?;
            }
            "preferences" => {
                let config: PreferencesConfig = setup.settings(stage.name)?;
                if config.method != Method::Contrast {
                    constitution(config.judge.constitution.as_deref())?;
                    if config.judge.few_shot > 0 {
                        file(&config.judge.exemplars, "the exemplars")?;
                    }
                    if let Some(path) = &config.calibration {
                        exists(path, "the judge's calibration")?;
                    }
                    if let Some(dir) = &config.judge.judge_adapter {
                        exists(dir, "the judge's adapter")?;
                    }
                    match (config.judge.urls(), &setup.judge) {
                        (None, Some(judge)) => model(judge)?,
                        (urls, _) => servers(urls)?,
                    }
                }
                config.pairs.iter().try_for_each(|path| exists(path, "the labelled pairs"))?;
            }
            "report" => {}
            _ => model(setup.model()?)?,
        }
        if stage.name == "ppo" {
            let config: arete_ppo::Config = setup.settings(stage.name)?;
            servers(config.engines.urls())?;
            servers(config.reward_urls())?;
        }
        if stage.name == "scoring" {
            let config: arete_scoring::ScoreConfig = setup.settings(stage.name)?;
            servers(config.engines.urls())?;
        }
        if ["ppo", "scoring"].contains(&stage.name) {
            setup.yardstick.iter().try_for_each(|dir| exists(dir, "the yardstick"))?;
        }
        if stage.name == "scoring" {
            setup.pairs.iter().try_for_each(|file| exists(file, "the labelled pairs"))?;
        }
    }
    Ok(())
}

fn constitution(given: Option<&Path>) -> Result<()> {
    file(given.unwrap_or(Path::new(CONSTITUTION)), "the constitution")
}

/// A path that has to be a file.
fn file(path: &Path, what: &str) -> Result<()> {
    let path = &files::shipped(path);
    exists(path, what)?;
    if path.is_dir() {
        let message = format!("{}: expected a file, found a directory", path.display());
        return Err(BadInput(message)).with_context(|| format!("looking for {what}"));
    }
    Ok(())
}

fn exists(path: &Path, what: &str) -> Result<()> {
    fs_err::metadata(path)
        .map_err(|_| {
            let here = "; relative paths, a recipe's too, begin in the working directory";
            let hint = if path.is_relative() { here } else { "" };
            BadInput(format!("{}: no such file or directory{hint}", path.display()))
        })
        .with_context(|| format!("looking for {what}"))?;
    Ok(())
}

/// A file, a directory, or `owner/name` on the hub; below a directory that exists, a name is a path.
fn prompts_of(input: &str) -> Result<()> {
    let path = Path::new(input);
    if !path.exists() && prompts::is_hub_id(input) {
        return Ok(());
    }
    exists(path, "the prompts")
}

/// A model that is asked here, or by a server.
fn asked(name: &str, url: Option<&str>) -> Result<()> {
    url.map_or_else(|| model(name), server)
}

fn model(name: &str) -> Result<()> {
    Source::parse(name).with_context(|| format!("looking for the model {name}")).map(drop)
}

fn servers(urls: Option<&[String]>) -> Result<()> {
    urls.into_iter().flatten().try_for_each(|url| server(url))
}

fn server(url: &str) -> Result<()> {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let host = rest.split(['/', '?']).next().unwrap_or_default();
    let host = host.rsplit('@').next().unwrap_or_default(); // no name and password in messages
    let port = if url.starts_with("https") { 443 } else { 80 };
    let address = if host.rsplit(']').next().is_some_and(|end| end.contains(':')) {
        host.to_owned()
    } else {
        format!("{host}:{port}")
    };
    let reached = address.to_socket_addrs().and_then(|mut found| {
        let found = found.next().ok_or_else(|| std::io::Error::other("no address"))?;
        TcpStream::connect_timeout(&found, CONNECT)
    });
    match reached {
        Ok(_) => Ok(()),
        Err(error) => {
            let message = format!("no server answers at {address}: {error}");
            Err(arete_stage::exit::Unavailable(message).into())
        }
    }
}

/// Brings models of the hub here before the first stage: one that is not there, or a hub that does not answer, would show
/// when the stage that needs it begins.
///
/// # Errors
///
/// No such model, or a download that fails.
pub fn fetch(setup: &Setup, steps: &[Step]) -> Result<()> {
    let (mut names, mut is_judged) = (Vec::new(), false);
    for Step { stage, setup } in steps {
        let settings = (stage.settings)(setup)?;
        let is_elsewhere = |key| settings.get(key).is_some_and(|url| !url.is_null());
        match stage.name {
            "prompts" | "report" => {}
            "preferences" => is_judged |= !is_elsewhere("judge_url"),
            // They load what earlier stages left.
            "reward" | "dpo" | "ppo" if setup.base()? != setup.model()? => {}
            _ if is_elsewhere("engine_url") => {}
            "demonstrations" if settings["source"] == "own" => {}
            _ => names.push(setup.model()?),
        }
    }
    names.extend(setup.judge.as_deref().filter(|_| is_judged));
    names.sort_unstable();
    names.dedup();
    for name in names {
        Source::fetch(name).with_context(|| format!("looking for the model {name}"))?;
    }
    Ok(())
}

/// A device that a stage names is there.
fn device(settings: &Value) -> Result<()> {
    if let Some(name) = settings.get("device").and_then(Value::as_str) {
        machine::device(name)?;
    }
    Ok(())
}

/// Room for a run, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// Memory of the device that the stages get.
    pub memory: memory::Room,
    /// Free disk where the run goes.
    pub free_disk: Option<u64>,
}

impl Room {
    /// Of this machine, for a run.
    ///
    /// # Errors
    ///
    /// A device that there is not.
    pub fn here(setup: &Setup) -> Result<Self> {
        let existing = setup.dir.ancestors().find(|dir| dir.exists());
        let existing = existing.filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let disk = rustix::fs::statvfs(existing).ok();
        let device = machine::device(setup.device()?.as_deref().unwrap_or("auto"))?;
        Ok(Self {
            memory: memory::Room::of(device),
            free_disk: disk.map(|disk| disk.f_bavail * disk.f_frsize),
        })
    }
}

/// The model's shape, where it can be told: none for a model that is still on the hub.
///
/// # Errors
///
/// A model or a device that there is not.
pub fn shape(setup: &Setup) -> Result<Option<Shape>> {
    let Ok(name) = setup.model() else { return Ok(None) };
    if Source::parse(name)?.local_path().is_none() {
        return Ok(None);
    }
    let device = setup.device()?;
    let device = machine::device_name(machine::device(device.as_deref().unwrap_or("auto"))?);
    Ok(Some(Shape::of(name, Some(&device), PROMPT_TOKENS)?))
}

/// Bytes of the models that the stages write: each merged one whole.
fn written(shape: &Shape, steps: &[Step]) -> Result<u64> {
    let mut n_models = 0;
    for Step { stage, setup } in steps {
        let merges = (stage.settings)(setup)?.get("merge").and_then(Value::as_bool);
        n_models += match stage.name {
            "sft" | "dpo" => 1,
            "reward" if merges == Some(true) => 3,
            "ppo" if merges == Some(true) => 1,
            _ => 0,
        };
    }
    Ok(n_models * shape.dense_bytes())
}

/// Refuses what cannot fit: more memory than the device has, more disk than is free. Of stages that start in another way than they are
/// set, or in little memory, a sentence each.
///
/// # Errors
///
/// What is needed, what there is, and what to do.
pub fn room(setup: &Setup, shape: &Shape, steps: &[Step], room: Room) -> Result<Vec<String>> {
    let refused = |what: String| OutOfRoom(format!("{what}; --ignore-room runs anyway"));
    let mut remarks = Vec::new();
    for Step { stage, setup } in steps {
        let Some(demand) = stage.demand else { continue };
        match room.memory.ask(stage.name, shape, &demand(setup)?) {
            Ok(start) => remarks.extend(start.remark),
            Err(arete_model::Error::NoRoom { what }) => return Err(refused(what).into()),
            Err(error) => return Err(error.into()),
        }
    }
    let bytes = written(shape, steps)?;
    if let Some(free) = room.free_disk.filter(|free| bytes > *free) {
        let gb = |bytes: u64| format!("{:.1} GB", bytes as f64 / 1e9);
        let dir = setup.dir.display();
        let what =
            format!("{dir}: the models to be written take {}, free are {}", gb(bytes), gb(free));
        return Err(refused(what).into());
    }
    Ok(remarks)
}
