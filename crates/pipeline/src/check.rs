//! What can be known to fail later is refused before the first stage: settings of every table, stages that miss what they
//! read, places that do not exist, devices, servers, memory, disk.

use std::net::{TcpStream, ToSocketAddrs};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use arete_curation::calibrate::CalibrateConfig;
use arete_curation::conversations::{ConversationsConfig, PersonaChoice};
use arete_curation::demonstrations::DemonstrationsConfig;
use arete_curation::judge::Method;
use arete_curation::preferences::PreferencesConfig;
use arete_model::{Source, machine};
use arete_stage::exit::{BadInput, Usage};
use serde_json::Value;

use crate::memory::Shape;
use crate::setup::Setup;
use crate::stages::{PIPELINE, Stage};
use crate::steps::{self, Step};

/// Tokens of a prompt where nobody counts them.
pub const PROMPT_TOKENS: u64 = 128;
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
    setup.checked::<CalibrateConfig>("calibrate")?;
    setup.checked::<arete_reward::Config>("yardstick")?;
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

/// Files, directories, models and servers that the stages name.
fn places(setup: &Setup, stages: &[&Stage]) -> Result<()> {
    for stage in stages {
        match stage.name {
            "prompts" => setup.prompts.iter().try_for_each(|input| prompts(input))?,
            "demonstrations" => {
                let config: DemonstrationsConfig = setup.settings(stage.name)?;
                if config.source.needs_model() {
                    asked(setup.model()?, config.engine_url.as_deref())?;
                    constitution(config.constitution.as_deref())?;
                }
                if config.source.needs_exemplars() {
                    exists(&config.exemplars, "the exemplars")?;
                }
            }
            "conversations" => {
                let config: ConversationsConfig = setup.settings(stage.name)?;
                if config.personas == PersonaChoice::Contrast {
                    constitution(config.constitution.as_deref())?;
                }
                asked(setup.model()?, config.engine_url.as_deref())?;
            }
            "preferences" => {
                let config: PreferencesConfig = setup.settings(stage.name)?;
                if config.method != Method::Contrast {
                    constitution(config.judge.constitution.as_deref())?;
                    if config.judge.few_shot > 0 {
                        exists(&config.judge.exemplars, "the exemplars")?;
                    }
                    if let Some(judge) = &setup.judge {
                        asked(judge, config.judge.judge_url.as_deref())?;
                    } else if let Some(url) = &config.judge.judge_url {
                        server(url)?;
                    }
                }
            }
            "report" => {}
            _ => model(setup.model()?)?,
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
    exists(given.unwrap_or(Path::new(CONSTITUTION)), "the constitution")
}

fn exists(path: &Path, what: &str) -> Result<()> {
    fs_err::metadata(path)
        .map_err(|_| BadInput(format!("{}: no such file or directory", path.display())))
        .with_context(|| format!("looking for {what}"))?;
    Ok(())
}

/// A file, a directory, or `owner/name` on the hub; below a directory that exists, a name is a path.
fn prompts(input: &str) -> Result<()> {
    let path = Path::new(input);
    let is_below = path.components().count() > 1
        && path.components().next().is_some_and(|first| Path::new(first.as_os_str()).exists());
    if path.exists() || (input.contains('/') && !path.is_absolute() && !is_below) {
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

/// A device that a stage names is there.
fn device(settings: &Value) -> Result<()> {
    if let Some(name) = settings.get("device").and_then(Value::as_str) {
        machine::device(name)?;
    }
    Ok(())
}

/// Room on the machine, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// Memory that this process and its children may have in all.
    pub memory: Option<u64>,
    /// Memory that is free now.
    pub free_memory: Option<u64>,
    /// Free disk where the run goes.
    pub free_disk: Option<u64>,
}

impl Room {
    /// Of this machine, for a run in `dir`.
    pub fn here(dir: &Path) -> Self {
        let info = fs_err::read_to_string("/proc/meminfo").unwrap_or_default();
        let figure = |name: &str| -> Option<u64> {
            let line = info.lines().find(|line| line.starts_with(name))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib << 10)
        };
        let limits = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
        let limit = limits
            .iter()
            .find_map(|file| fs_err::read_to_string(file).ok()?.trim().parse::<u64>().ok());
        let capped = |bytes: Option<u64>| match (bytes, limit) {
            (Some(bytes), Some(limit)) => Some(bytes.min(limit)),
            (bytes, limit) => bytes.or(limit),
        };
        let existing = dir.ancestors().find(|dir| dir.exists());
        let existing = existing.filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let disk = rustix::fs::statvfs(existing).ok();
        Self {
            memory: capped(figure("MemTotal:")),
            free_memory: capped(figure("MemAvailable:")),
            free_disk: disk.map(|disk| disk.f_bavail * disk.f_frsize),
        }
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
    Shape::of(name, Some(&device), PROMPT_TOKENS).map(Some)
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

/// Refuses what cannot fit: more memory than the machine has, more disk than is free.
///
/// # Errors
///
/// What is needed, what there is, and what to do.
pub fn room(setup: &Setup, shape: &Shape, steps: &[Step], room: Room) -> Result<()> {
    let gb = |bytes: u64| format!("{:.1} GB", bytes as f64 / 1e9);
    for Step { stage, setup } in steps {
        let Some(demand) = stage.demand else { continue };
        let (phase, bytes) = shape.need(&demand(setup)?).peak();
        if let Some(memory) = room.memory.filter(|memory| shape.is_on_cpu() && bytes > *memory) {
            let message = format!(
                "{}: needs {} of memory ({phase}), this machine has {}: `arete plan` says what saves memory; \
                 --ignore-room runs anyway",
                stage.name,
                gb(bytes),
                gb(memory)
            );
            return Err(arete_stage::exit::OutOfRoom(message).into());
        }
    }
    let bytes = written(shape, steps)?;
    if let Some(free) = room.free_disk.filter(|free| bytes > *free) {
        let message = format!(
            "{}: the models to be written take {}, free are {}; --ignore-room runs anyway",
            setup.dir.display(),
            gb(bytes),
            gb(free)
        );
        return Err(arete_stage::exit::OutOfRoom(message).into());
    }
    Ok(())
}
