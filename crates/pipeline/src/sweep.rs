//! `arete sweep`: the same pipeline with several values of some keys, one run directory a combination.
//!
//! Stages that no value touches are run once, in `RUN/shared`, and every combination has a link to them: their settings and
//! inputs are the same, hence their bytes. At the end stand one table of all combinations and one page, and where `ppo.weights` were swept over the
//! front of the two virtues that they weigh.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use arete_records::Aspect;
use arete_scoring::compare::{self, Arm, Comparison, ScoredRun};
use arete_scoring::front::{self, Front};
use arete_scoring::summary::Scale;
use arete_stage::exit::{BadInput, Usage};
use arete_stage::interrupt;
use arete_stage::recipe::Setting;
use serde_json::Value;

use crate::check;
use crate::run::{self, RunArgs};
use crate::setup::{Setup, SetupArgs, dated};
use crate::{stages, steps};

/// The directory of stages that all combinations share.
const SHARED: &str = "shared";
/// The files of the table and of the page.
const TABLE: &str = "sweep.md";
const PAGE: &str = "sweep.html";

/// What is swept over.
#[derive(Debug, Clone, clap::Args)]
pub struct SweepArgs {
    /// The setup; a --set with values separated by commas is swept over
    #[command(flatten)]
    pub setup: SetupArgs,
    /// Show the combinations and run nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Show every stage's whole log
    #[arg(long)]
    pub verbose: bool,
}

/// One run of a sweep.
struct Combination {
    name: String,
    setup: SetupArgs,
}

/// Runs every combination; the exit code of the first stage that failed, else 0.
///
/// # Errors
///
/// Fewer than two combinations, what `arete run` refuses of any of them, I/O.
pub fn run(arguments: &SweepArgs) -> Result<u8> {
    let root = match &arguments.setup.run {
        Some(root) => dated(root),
        None => {
            let mut root = Setup::new(&SetupArgs { set: Vec::new(), ..arguments.setup.clone() })?
                .dir
                .into_os_string();
            root.push("-sweep");
            PathBuf::from(root)
        }
    };
    let combinations = combinations(&arguments.setup, &root)?;
    let setups =
        combinations.iter().map(|one| Setup::new(&one.setup)).collect::<Result<Vec<_>>>()?;
    for setup in &setups {
        if setup.round.is_some() {
            return Err(Usage("a sweep has no rounds: leave --rounds out".to_owned()).into());
        }
        check::everything(setup, &steps::of(setup)?)?;
    }
    let shared = shared(&setups)?;
    let mut out = std::io::stderr().lock();
    writeln!(out, "{}: {} combinations", root.display(), combinations.len())?;
    writeln!(out, "  once for all: {}", shared.iter().copied().collect::<Vec<_>>().join(", "))?;
    combinations.iter().try_for_each(|one| writeln!(out, "  {}", one.name))?;
    drop(out);
    if arguments.dry_run {
        return Ok(0);
    }
    interrupt::install()?;
    let once = SetupArgs { run: Some(root.join(SHARED)), ..combinations[0].setup.clone() };
    let code = run_stages(&once, arguments, |name| shared.contains(name))?;
    if code != 0 {
        return Ok(code);
    }
    for one in &combinations {
        writeln!(std::io::stderr(), "\n{}", one.name)?;
        let dir = one.setup.run.as_deref().context("every combination has a directory")?;
        link(dir, &shared)?;
        let code = run_stages(&one.setup, arguments, |name| !shared.contains(name))?;
        if code != 0 {
            return Ok(code);
        }
    }
    let runs = scored(&combinations)?;
    let mut text = table(&runs)?;
    if let Some(axes) = axes(&setups)? {
        let first = if setups[0].has("sft")? { "sft" } else { "original" };
        let front = Front::of(&runs, axes, first)?;
        front.write(&root.join(front::DIR))?;
        write!(text, "\n{}", front.text())?;
        // Their pages show it, now that it is there.
        for one in &combinations {
            let code = run_stages(&one.setup, arguments, |name| name == "report")?;
            if code != 0 {
                return Ok(code);
            }
        }
    }
    arete_records::atomic::write(root.join(TABLE), text.as_bytes())?;
    if let Some(comparison) = compared(&runs)? {
        let page = root.join(PAGE);
        arete_records::atomic::write(&page, compare::html(&runs, &comparison).as_bytes())?;
        writeln!(text, "page: {}", page.display())?;
    }
    std::io::stdout().lock().write_all(text.as_bytes())?;
    Ok(0)
}

/// Every combination of the values, with a directory named after its own.
fn combinations(setup: &SetupArgs, root: &Path) -> Result<Vec<Combination>> {
    let mut all = vec![Vec::new()];
    let mut keys = BTreeSet::new();
    for setting in &setup.set {
        let text = setting.to_string();
        let key = text.split('=').next().unwrap_or_default().to_owned();
        if !keys.insert(key.clone()) {
            let message = format!("--set: `{key}` comes twice: name all of its values in one");
            return Err(Usage(message).into());
        }
        let values = setting.alternatives().map_err(Usage)?;
        let longer = all.iter().flat_map(|chosen: &Vec<(Setting, bool)>| {
            let one = |value: &Setting| {
                let mut longer = chosen.clone();
                longer.push((value.clone(), values.len() > 1));
                longer
            };
            values.iter().map(one).collect::<Vec<_>>()
        });
        all = longer.collect();
    }
    if all.len() < 2 {
        let message = "nothing to sweep over: --set TABLE.KEY=VALUE,VALUE names the values";
        return Err(Usage(message.to_owned()).into());
    }
    let combinations: Vec<Combination> = all
        .into_iter()
        .map(|chosen| {
            let swept = chosen.iter().filter(|(_, swept)| *swept);
            let name = swept.map(|(setting, _)| named(setting)).collect::<Vec<_>>().join(",");
            let set = chosen.into_iter().map(|(setting, _)| setting).collect();
            let setup = SetupArgs { set, run: Some(root.join(&name)), ..setup.clone() };
            Combination { name, setup }
        })
        .collect();
    let names: BTreeSet<&str> = combinations.iter().map(|one| &*one.name).collect();
    if names.len() < combinations.len() {
        return Err(Usage("--set: two combinations are the same".to_owned()).into());
    }
    Ok(combinations)
}

/// A value as a directory's name.
fn named(setting: &Setting) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._=+-".contains(c);
    let replaced = |c: char| match c {
        c if plain(c) => c,
        ',' => '+',
        _ => '_',
    };
    let text = setting.to_string();
    text.chars().filter(|c| !"\"' {}[]".contains(*c)).map(replaced).collect()
}

/// The stages that are in every combination with the same settings and from the same inputs, and read from such stages alone.
fn shared(setups: &[Setup]) -> Result<BTreeSet<&'static str>> {
    let mut shared = BTreeSet::new();
    let Some((first, others)) = setups.split_first() else { return Ok(shared) };
    for stage in first.stages()? {
        let made_from = |setup: &Setup| -> Result<[Value; 2]> {
            Ok([(stage.settings)(setup)?, stages::given(setup, stage.name)?])
        };
        let own = made_from(first)?;
        let mut same = true;
        for other in others {
            same &= other.has(stage.name)? && made_from(other)? == own;
            // A stage that only some combinations have is read by its readers, too.
            for read in stage.reads {
                same &= other.has(read)? == first.has(read)?;
            }
        }
        for read in stage.reads {
            same &= !first.has(read)? || shared.contains(read);
        }
        if same && stage.name != "report" {
            shared.insert(stage.name);
        }
    }
    Ok(shared)
}

/// Runs those stages of a setup that are `wanted`.
fn run_stages(
    setup: &SetupArgs,
    arguments: &SweepArgs,
    wanted: impl Fn(&str) -> bool,
) -> Result<u8> {
    let resolved = Setup::new(setup)?;
    let mut steps = steps::of(&resolved)?;
    steps.retain(|step| wanted(step.stage.name));
    let arguments =
        RunArgs { setup: setup.clone(), verbose: arguments.verbose, ..RunArgs::default() };
    run::run_all(&resolved, &steps, &arguments)
}

/// Links to the shared stages; one that is there stays.
fn link(dir: &Path, shared: &BTreeSet<&str>) -> Result<()> {
    fs_err::create_dir_all(dir)?;
    for name in shared {
        let (link, target) = (dir.join(name), Path::new("..").join(SHARED).join(name));
        match fs_err::read_link(&link) {
            Ok(found) if found == target => {}
            Err(_) if !link.exists() => fs_err::os::unix::fs::symlink(target, link)?,
            _ => {
                let message = format!(
                    "{}: expected a link to {}, found something else: choose another --run",
                    link.display(),
                    target.display()
                );
                return Err(BadInput(message).into());
            }
        }
    }
    Ok(())
}

/// The first two reward models whose weights differ between the combinations: what a front is of.
fn axes(setups: &[Setup]) -> Result<Option<[Aspect; 2]>> {
    let mut weights = Vec::new();
    for setup in setups {
        let config: arete_ppo::Config = setup.settings("ppo")?;
        weights.push(config.weights.unwrap_or_default().0);
    }
    let names: BTreeSet<&String> = weights.iter().flat_map(|own| own.keys()).collect();
    let of = |own: &BTreeMap<String, f64>, name: &str| own.get(name).copied().unwrap_or(1.0);
    let differs =
        |name: &&&String| weights.iter().any(|own| of(own, name) != of(&weights[0], name));
    let mut axes = names.iter().filter(differs).filter_map(|name| Aspect::new(name).ok());
    Ok(axes.next().zip(axes.next()).map(|(x, y)| [x, y]))
}

/// What scoring left in each combination.
fn scored(combinations: &[Combination]) -> Result<Vec<ScoredRun>> {
    let mut runs = Vec::new();
    for one in combinations {
        let run = one.setup.run.clone().context("every combination has a directory")?;
        runs.push(ScoredRun::read(Arm { name: one.name.clone(), run })?);
    }
    Ok(runs)
}

/// Each combination's Score and what it gained, and the runs compared.
fn table(runs: &[ScoredRun]) -> Result<String> {
    let mut text = String::from(
        "| combination | model | gain over the original, standardised [95 %] |\n|---|---|---|\n",
    );
    for run in runs {
        let (name, gain) = match run.summary.headline(Scale::Standardised) {
            Some(gain) => {
                let interval = &gain.score.interval;
                let shown = format!(
                    "{:+.3} [{:+.3}, {:+.3}]",
                    interval.estimate, interval.low, interval.high
                );
                (gain.last.clone(), shown)
            }
            None => ("–".to_owned(), "–".to_owned()),
        };
        writeln!(text, "| {} | {name} | {gain} |", run.arm.name)?;
    }
    if let Some(comparison) = compared(runs)? {
        writeln!(text, "\n{}", compare::text(runs, &comparison))?;
    }
    Ok(text)
}

/// The combinations compared in what they are about; none where they have no two models in common.
fn compared(runs: &[ScoredRun]) -> Result<Option<Comparison>> {
    let Some(first) = runs.first() else { return Ok(None) };
    let names = (first.summary.models.first(), first.summary.outcome());
    let (Some(from), Some(to)) = names else { return Ok(None) };
    let has = |run: &ScoredRun, name: &str| run.summary.models.iter().any(|own| own.name == name);
    if from.name == to.name || !runs.iter().all(|run| has(run, &from.name) && has(run, &to.name)) {
        return Ok(None);
    }
    compare::check(runs, &from.name, &to.name)?;
    Ok(Some(compare::compare(runs, &from.name, &to.name)))
}
