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
use crate::steps::{self, Step};

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
    let steps = selected(&setup, arguments)?;
    check::everything(&setup, &steps)?;
    let shape = check::shape(&setup)?;
    if let Some(shape) = shape.as_ref().filter(|_| !arguments.ignore_room) {
        for remark in check::room(&setup, shape, &steps, Room::here(&setup)?)? {
            writeln!(std::io::stderr(), "{remark}")?;
        }
    }
    let plan = plan(&setup, &steps, shape.as_ref())?;
    if arguments.dry_run {
        std::io::stdout().lock().write_all(plan.as_bytes())?;
        return Ok(0);
    }
    interrupt::install()?;
    std::io::stderr().lock().write_all(plan.as_bytes())?;
    check::fetch(&setup, &steps)?;
    let code = run_all(&setup, &steps, arguments)?;
    if code == 0 {
        std::io::stdout().lock().write_all(results(&setup, &steps)?.as_bytes())?;
    }
    Ok(code)
}

/// Runs these steps one after the other; the exit code of the first that fails, else 0.
pub(crate) fn run_all(setup: &Setup, steps: &[Step], arguments: &RunArgs) -> Result<u8> {
    setup.write_recipe_as_run()?;
    let width = width(steps);
    for step in steps {
        interrupt::check()?;
        let code = run_step(step, arguments, width)?;
        if code != 0 {
            return Ok(code);
        }
    }
    Ok(0)
}

/// What a run that has come to its end has to show: the Scores and the page.
fn results(setup: &Setup, steps: &[Step]) -> Result<String> {
    let ran = |name| steps.iter().any(|step| step.stage.name == name);
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

/// The steps between `--from` and `--until` (stages of the last round), as far as they are in: those that the last one needs, in order.
fn selected(setup: &Setup, arguments: &RunArgs) -> Result<Vec<Step>> {
    let named = |name: &Option<String>| name.as_deref().and_then(Stage::named);
    let (from, until) = match named(&arguments.only) {
        Some(only) => (Some(only), Some(only)),
        None => (named(&arguments.from), named(&arguments.until)),
    };
    let mut steps = steps::of(setup)?;
    let newest = |steps: &[Step], stage: &Stage| {
        steps.iter().rposition(|step| step.stage.name == stage.name)
    };
    if let Some(until) = until {
        let Some(at) = newest(&steps, until) else {
            let message =
                format!("the recipe leaves `{0}` out: --set {0}.enabled=true", until.name);
            return Err(Usage(message).into());
        };
        let (needed, round) = (needed(until), steps[at].round());
        steps.truncate(at + 1);
        // A round needs all of those before it.
        let is_earlier = |step: &Step| step.round() < round && round.is_some();
        steps.retain(|step| is_earlier(step) || needed.contains(&step.stage.name));
    }
    if let Some(from) = from {
        // Of a stage that is left out, what would come after it.
        let at = newest(&steps, from).unwrap_or_else(|| {
            let comes_before = |step: &Step| step.stage.position() < from.position();
            steps.iter().rposition(comes_before).map_or(0, |at| at + 1)
        });
        steps.drain(..at);
        if let Some(until) = until.filter(|_| steps.is_empty()) {
            let message =
                format!("--from {} --until {}: nothing lies between", from.name, until.name);
            return Err(Usage(message).into());
        }
    }
    Ok(steps)
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
fn plan(setup: &Setup, steps: &[Step], shape: Option<&Shape>) -> Result<String> {
    let mut text = format!("{}", setup.dir.display());
    if let Some(recipe) = setup.recipe_path() {
        write!(text, ", {}", recipe.display())?;
    }
    if let Ok(model) = setup.model() {
        write!(text, ", {model}")?;
    }
    text.push('\n');
    let width = width(steps);
    let mut pending: Vec<String> = Vec::new();
    for (at, step) in steps.iter().enumerate() {
        let Step { stage, setup } = step;
        let label = step.label();
        let state = status::state(setup, stage);
        let read = |name: &&'static str| step.reads(name, &steps[..at]).map(Step::label);
        let waits_for = stage.reads.iter().filter_map(read).find(|read| pending.contains(read));
        let what = match (&state, &waits_for) {
            (State::Complete, None) => "up to date".to_owned(),
            (State::Complete, Some(read)) => {
                format!("done before; runs if `{read}` turns out otherwise")
            }
            // What is to come need not be there yet.
            (State::Missing, _) | (State::Refused { .. }, Some(_)) => "runs".to_owned(),
            (State::HalfDone { how_far }, None) => format!("goes on: {how_far}"),
            (state, _) => format!("runs: {}: {}", state.word(), state.details()),
        };
        if !matches!(state, State::Complete) || waits_for.is_some() {
            pending.push(label.clone());
        }
        let memory = match (shape, stage.demand) {
            (Some(shape), Some(demand)) => {
                format!("{:.1} GB", shape.need(&demand(setup)?).peak().1 as f64 / 1e9)
            }
            _ => String::new(),
        };
        let time = last_seconds(setup, &label).map(duration).unwrap_or_default();
        let line = format!("  {label:<width$}  {memory:>8}  {time:>8}  {what}");
        writeln!(text, "{}", line.trim_end())?;
    }
    Ok(text)
}

/// Columns that the names of steps take.
fn width(steps: &[Step]) -> usize {
    const LEAST: usize = 14;
    steps.iter().map(|step| step.label().len()).max().unwrap_or_default().max(LEAST)
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

/// Runs one step, if there is work, and says in one line how that went; its exit code.
fn run_step(step: &Step, arguments: &RunArgs, width: usize) -> Result<u8> {
    let (Step { stage, setup }, label) = (step, step.label());
    let before = status::state(setup, stage);
    let say = |what: &str| writeln!(std::io::stderr(), "{label:<width$}  {what}");
    if before == State::Complete {
        say("up to date")?;
        return Ok(0);
    }
    let started = Instant::now();
    let show_all = arguments.verbose || !std::io::stderr().is_terminal();
    let log = setup.dir.join("logs").join(format!("{}.log", label.replace('/', "-")));
    let words = SetupArgs {
        // By its name, whatever day it is when the stage begins.
        run: Some(setup.dir.clone()),
        rounds: setup.round.map(|round| round.of),
        round: setup.round.map(|round| round.number),
        ..arguments.setup.clone()
    };
    let ended = child::run(stage.name, &label, &words, arguments.ignore_room, &log, show_all)
        .with_context(|| format!("running {label}"))?;
    let seconds = started.elapsed().as_secs_f64();
    if ended.code == 0 {
        let fields = [("resumed", (before != State::Missing).into())];
        timings::log(&setup.dir, &label, seconds, &fields)?;
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
