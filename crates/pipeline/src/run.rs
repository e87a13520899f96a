//! `arete run`: everything is checked, the whole plan is shown, and what is not up to date is done, stage by stage.
//!
//! Each stage runs in a process of its own (this program again, as `arete stage NAME`), which gives all its memory back when it
//! ends. A signal is passed on to it and waited for, so that it ends with a checkpoint; its exit code is ours. Its log goes to
//! `RUN/logs/STAGE.log`; on a terminal the newest line of it is shown, elsewhere (or with --verbose) all of it.

mod child;

use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::time::Instant;

use anyhow::{Context, Result};
use arete_stage::exit::Usage;
use arete_stage::{interrupt, timings};
use clap::Args;
use serde_json::Value;

use crate::check::{self, Room};
use crate::memory::Shape;
use crate::setup::{Setup, SetupArgs};
use crate::stages::{Stage, names};
use crate::status::{self, State};

/// What is run.
#[derive(Debug, Clone, Default, Args)]
pub struct RunArgs {
    /// The setup.
    #[command(flatten)]
    pub setup: SetupArgs,
    /// Run this stage and what it needs
    #[arg(long, value_name = "STAGE", value_parser = clap::builder::PossibleValuesParser::new(names()))]
    pub until: Option<String>,
    /// Begin with this stage: those before it stay as they are
    #[arg(long, value_name = "STAGE", value_parser = clap::builder::PossibleValuesParser::new(names()))]
    pub from: Option<String>,
    /// Run this stage alone
    #[arg(long, value_name = "STAGE", conflicts_with_all = ["until", "from"],
          value_parser = clap::builder::PossibleValuesParser::new(names()))]
    pub only: Option<String>,
    /// Show the plan and run nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Run even if memory or disk look too small
    #[arg(long)]
    pub ignore_room: bool,
    /// Show every stage's whole log
    #[arg(long)]
    pub verbose: bool,
}

/// Runs the pipeline; the exit code of the stage that failed, else 0.
///
/// # Errors
///
/// What is refused before the first stage; a stage that cannot be started.
pub fn run(arguments: &RunArgs) -> Result<u8> {
    let setup = Setup::new(&arguments.setup)?;
    let stages = selected(&setup, arguments)?;
    check::everything(&setup, &stages)?;
    let shape = check::shape(&setup)?;
    if let Some(shape) = shape.as_ref().filter(|_| !arguments.ignore_room) {
        check::room(&setup, shape, &stages, Room::here(&setup.dir))?;
    }
    let plan = plan(&setup, &stages, shape.as_ref())?;
    if arguments.dry_run {
        std::io::stdout().lock().write_all(plan.as_bytes())?;
        return Ok(0);
    }
    interrupt::install()?;
    std::io::stderr().lock().write_all(plan.as_bytes())?;
    let code = run_all(&setup, &stages, arguments)?;
    if code == 0 {
        std::io::stdout().lock().write_all(results(&setup, &stages)?.as_bytes())?;
    }
    Ok(code)
}

/// Runs these stages one after the other; the exit code of the first that fails, else 0.
pub(crate) fn run_all(setup: &Setup, stages: &[&Stage], arguments: &RunArgs) -> Result<u8> {
    setup.write_recipe_as_run()?;
    for stage in stages {
        interrupt::check()?;
        let code = run_stage(setup, stage, arguments)?;
        if code != 0 {
            return Ok(code);
        }
    }
    Ok(0)
}

/// What a run that has come to its end has to show: the Scores and the page.
fn results(setup: &Setup, stages: &[&Stage]) -> Result<String> {
    let ran = |name| stages.iter().any(|stage| stage.name == name);
    let mut text = String::new();
    if ran("scoring") {
        text +=
            &arete_scoring::table::of(&arete_scoring::score::read_summary(&setup.at("scoring"))?);
    }
    if ran("report") {
        writeln!(
            text,
            "report: {}",
            setup.at("report").join(arete_scoring::report::PAGE).display()
        )?;
    }
    Ok(text)
}

/// The stages between `--from` and `--until`, as far as they are in: those that the last one needs, in order.
fn selected(setup: &Setup, arguments: &RunArgs) -> Result<Vec<&'static Stage>> {
    let named = |name: &Option<String>| name.as_deref().and_then(Stage::named);
    let (from, until) = match named(&arguments.only) {
        Some(only) => (Some(only), Some(only)),
        None => (named(&arguments.from), named(&arguments.until)),
    };
    let mut stages = setup.stages()?;
    if let Some(until) = until {
        if !setup.has(until.name)? {
            let message =
                format!("the recipe leaves `{0}` out: --set {0}.enabled=true", until.name);
            return Err(Usage(message).into());
        }
        let needed = needed(until);
        stages.retain(|stage| needed.contains(&stage.name));
    }
    if let Some(from) = from {
        stages.retain(|stage| stage.position() >= from.position());
    }
    Ok(stages)
}

/// A stage and every stage it reads from, however far away.
fn needed(stage: &Stage) -> Vec<&'static str> {
    let mut names = Vec::new();
    let mut waiting = vec![stage.name];
    while let Some(name) = waiting.pop() {
        let stage = Stage::named(name).expect("the list names its own stages");
        if !names.contains(&stage.name) {
            names.push(stage.name);
            waiting.extend(stage.reads);
        }
    }
    names
}

/// The plan: of each stage whether it runs and why, the memory it takes and the time it took last.
fn plan(setup: &Setup, stages: &[&Stage], shape: Option<&Shape>) -> Result<String> {
    let mut text = format!("{}", setup.dir.display());
    if let Some(recipe) = setup.recipe_path() {
        write!(text, ", {}", recipe.display())?;
    }
    if let Ok(model) = setup.model() {
        write!(text, ", {model}")?;
    }
    text.push('\n');
    let mut pending: Vec<&str> = Vec::new();
    for stage in stages {
        let state = status::state(setup, stage);
        let waits_for = stage.reads.iter().find(|name| pending.contains(name));
        let what = match (&state, waits_for) {
            (State::Complete, None) => "up to date".to_owned(),
            (State::Complete, Some(read)) => {
                format!("done before; runs if `{read}` turns out otherwise")
            }
            (State::Missing, _) => "runs".to_owned(),
            (State::HalfDone { how_far }, None) => format!("goes on: {how_far}"),
            (state, _) => format!("runs: {}: {}", state.word(), state.details()),
        };
        if !matches!(state, State::Complete) || waits_for.is_some() {
            pending.push(stage.name);
        }
        let memory = match (shape, stage.demand) {
            (Some(shape), Some(demand)) => {
                format!("{:.1} GB", shape.need(&demand(setup)?).peak().1 as f64 / 1e9)
            }
            _ => String::new(),
        };
        let time = last_seconds(setup, stage.name).map(duration).unwrap_or_default();
        let line = format!("  {:<14}  {memory:>8}  {time:>8}  {what}", stage.name);
        writeln!(text, "{}", line.trim_end())?;
    }
    Ok(text)
}

/// Seconds that the stage took when it last ran to its end.
fn last_seconds(setup: &Setup, stage: &str) -> Option<f64> {
    let text = fs_err::read_to_string(setup.dir.join(timings::FILE)).ok()?;
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let own = lines.filter(|line| line["what"] == stage && line["resumed"] == false);
    own.filter_map(|line| line["seconds"].as_f64()).next_back()
}

fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 100.0 => format!("{s:.0} s"),
        s if s < 6000.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

/// Runs one stage, if there is work, and says in one line how that went; its exit code.
fn run_stage(setup: &Setup, stage: &Stage, arguments: &RunArgs) -> Result<u8> {
    let before = status::state(setup, stage);
    let say = |what: &str| writeln!(std::io::stderr(), "{:<14}  {what}", stage.name);
    if before == State::Complete {
        say("up to date")?;
        return Ok(0);
    }
    let started = Instant::now();
    let show_all = arguments.verbose || !std::io::stderr().is_terminal();
    let log = setup.dir.join("logs").join(format!("{}.log", stage.name));
    let ended = child::run(stage.name, &arguments.setup, &log, show_all)
        .with_context(|| format!("running {}", stage.name))?;
    let seconds = started.elapsed().as_secs_f64();
    if ended.code == 0 {
        let fields = [("resumed", (before != State::Missing).into())];
        timings::log(&setup.dir, stage.name, seconds, &fields)?;
        say(&format!("done in {}", duration(seconds)))?;
    } else {
        if !show_all {
            writeln!(std::io::stderr(), "{}", ended.last_lines)?;
        }
        say(&format!("ended with exit code {}; its log: {}", ended.code, log.display()))?;
    }
    Ok(ended.code)
}

/// `arete stage NAME`: the work of one stage, in this process.
///
/// # Errors
///
/// Those of the stage.
pub fn stage(name: &str, arguments: &SetupArgs) -> Result<()> {
    interrupt::install()?;
    child::take_signals();
    let stage = Stage::named(name).ok_or_else(|| Usage(format!("no stage is called {name}")))?;
    (stage.run)(&Setup::new(arguments)?)
}
