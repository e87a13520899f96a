//! How far a judge can be trusted: agreement of every method with labelled pairs, beside what
//! choosing the shorter answer would give.

mod config;
mod pairs;
mod table;
mod virtues;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use arete_chain::Constitution;
use arete_chain::exemplars::{self, Use};
use arete_records::rows::JudgementRow;
use arete_records::{atomic, files, left_out, split_of};
use arete_stage::interrupt;
use arete_stage::run::StageSpec;
use arete_stage::units::Units;
use serde_json::{Map, json};

use crate::engine::Engine;
use crate::judge::verdict::vote;
use crate::judge::{Judge, JudgeConfig, Method, Pair};
use crate::stage::{self, Estimate, Place};
use crate::words::Words;

pub use self::config::CalibrateConfig;
pub use self::pairs::{Labelled, read};
pub use self::table::{Agreement, Calibration, Line, Recommendation};
pub use self::virtues::{Ballot, VirtueLine};

pub(crate) use self::pairs::sides_of;
use self::table::{baseline, lines, markdown, recommend, show};

/// The stage's name.
pub const STAGE: &str = "calibrate";

/// What the stage reads besides its settings.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// Files of labelled pairs.
    pub pairs: Vec<PathBuf>,
    /// The model that judges.
    pub model: String,
}

/// Runs the stage.
///
/// # Errors
///
/// Unreadable inputs, a judge that fails, a full disk, a signal.
pub fn run(config: &CalibrateConfig, inputs: &Inputs, output: &Path) -> Result<()> {
    let started = Instant::now();
    config.check()?;
    let (pairs, left_out) = read(inputs, config)?;
    let place = Place::of(&config.judge.compute, config.judge.urls().and_then(<[_]>::first))?;
    let words = words(config)?;
    let constitution = words.constitution()?;
    let Some(run) = stage::begin(spec(config, inputs, output, &words)?)? else { return Ok(()) };
    words.leave(output)?;
    left_out::write(output, &left_out)?;
    let engine = open(config, inputs)?;
    let shots = shots(config, constitution)?;
    let variants = variants(config);
    let progress = arete_records::progress::start(
        "calibrating",
        "pairs",
        (pairs.len() * variants.len()) as u64,
    );
    let mut table = Vec::new();
    let mut virtues = Vec::new();
    table.extend(baseline(&pairs));
    for (method, few_shot) in variants {
        let name = format!("verdicts-{}-{few_shot}", method.name());
        let units = Units { output, name, n_items: pairs.len(), shard: None };
        progress.skip((pairs.len() - units.missing()?.1) as u64);
        let judge_config = JudgeConfig { few_shot, ..config.judge.clone() };
        let judge = Judge::new(&engine, &judge_config, constitution, &shots, method)?;
        units.run::<_, anyhow::Error>(|items| {
            interrupt::check()?;
            let n_items = items.len() as u64;
            let rows = judged(&judge, &pairs[items], method, config.tie_margin)?;
            progress.inc(n_items);
            Ok(rows)
        })?;
        let rows: Vec<JudgementRow> = units.join()?;
        table.extend(lines(&pairs, &rows, method, few_shot));
        virtues.extend(virtues::examine(&pairs, &rows, &words.virtues(), method, few_shot));
    }
    drop(progress);
    let recommendation = recommend(&table);
    show(&table, &recommendation);
    let mut counts = BTreeMap::new();
    for pair in &pairs {
        *counts.entry(pair.set.clone()).or_insert(0) += 1;
    }
    let judge = engine.name().to_owned();
    let calibration = Calibration { judge, pairs: counts, table, virtues, recommendation };
    atomic::write(output.join("calibration.md"), markdown(&calibration).as_bytes())?;
    let mut bytes = serde_json::to_vec_pretty(&calibration).expect("plain data always serialises");
    bytes.push(b'\n');
    atomic::write(output.join("calibration.json"), &bytes)?;
    let mut counts = Map::new();
    counts.insert("pairs".to_owned(), json!(calibration.pairs));
    counts.insert("left_out".to_owned(), json!(left_out.len()));
    counts.insert("recommendation".to_owned(), json!(calibration.recommendation));
    stage::finish(run, STAGE, place, counts, started)
}

/// What a run would do, and how long it would take.
///
/// # Errors
///
/// As [`run`]; nothing is written.
pub fn estimate(config: &CalibrateConfig, inputs: &Inputs, output: &Path) -> Result<Estimate> {
    config.check()?;
    let (pairs, _) = read(inputs, config)?;
    let engine = open(config, inputs)?;
    let words = words(config)?;
    let constitution = words.constitution()?;
    let shots = shots(config, constitution)?;
    // The first pairs are as long as any: they come in the order of a hash.
    let probe: Vec<Pair> = pairs.iter().take(2).map(Labelled::pair).collect();
    let (mut n_to_do, mut seconds) = (0, 0.0);
    for (method, few_shot) in variants(config) {
        let name = format!("verdicts-{}-{few_shot}", method.name());
        let n = Units { output, name, n_items: pairs.len(), shard: None }.missing()?.1;
        n_to_do += n;
        if n > 0 && matches!(engine, Engine::Local(_)) {
            let judge_config = JudgeConfig { few_shot, ..config.judge.clone() };
            let judge = Judge::new(&engine, &judge_config, constitution, &shots, method)?;
            let started = Instant::now();
            judge.verdicts(&probe)?;
            seconds += started.elapsed().as_secs_f64() / probe.len() as f64 * n as f64;
        }
    }
    let mut counts = Map::new();
    counts.insert("pairs".to_owned(), json!(pairs.len()));
    counts.insert("methods".to_owned(), json!(variants(config).len()));
    counts.insert("pairs_to_judge".to_owned(), json!(n_to_do));
    let seconds = matches!(engine, Engine::Local(_)).then(|| seconds.ceil());
    Ok(Estimate { stage: STAGE, counts, n_tokens: None, seconds, memory: None })
}

fn words(config: &CalibrateConfig) -> Result<Words> {
    Words::of(config.judge.constitution.as_deref(), None)
}

/// The judged examples, if any are asked for.
fn shots(
    config: &CalibrateConfig,
    constitution: &Constitution,
) -> Result<Vec<exemplars::Exemplar>> {
    match config.judge.few_shot {
        0 => Ok(Vec::new()),
        _ => Ok(exemplars::load(&config.judge.exemplars, Use::FewShot, &constitution.turns)?),
    }
}

/// Every method without examples, and with them if any are asked for.
fn variants(config: &CalibrateConfig) -> Vec<(Method, usize)> {
    let mut out = Vec::new();
    for &method in &config.methods {
        out.push((method, 0));
        if config.judge.few_shot > 0 && method != Method::Likelihood {
            out.push((method, config.judge.few_shot));
        }
    }
    out
}

fn spec<'a>(
    config: &CalibrateConfig,
    inputs: &Inputs,
    output: &'a Path,
    words: &Words,
) -> Result<StageSpec<'a>> {
    let mut settings = crate::config::recorded(config);
    let mut files: Vec<(String, PathBuf)> = Vec::new();
    files.extend(words.input(true)?.map(|path| ("constitution".to_owned(), path)));
    for (idx, path) in inputs.pairs.iter().enumerate() {
        files.push((format!("pairs_{idx}"), path.clone()));
    }
    if config.judge.few_shot > 0 {
        files.push(("exemplars".to_owned(), files::shipped(&config.judge.exemplars)));
    }
    if let Some(adapter) = &config.judge.judge_adapter {
        files.push(("judge_adapter".to_owned(), adapter.clone()));
    }
    let remote = config.judge.urls().is_some();
    crate::config::record_model("model", &inputs.model, remote, &mut settings, &mut files)?;
    Ok(StageSpec { stage: STAGE, output, config: settings, seed: config.judge.seed, inputs: files })
}

fn open(config: &CalibrateConfig, inputs: &Inputs) -> Result<Engine> {
    let judge = &config.judge;
    stage::open_engine(
        &inputs.model,
        judge.judge_adapter.as_deref(),
        judge.urls(),
        &judge.compute,
        &judge.server,
        config.methods.iter().any(|method| method.needs_logprobs()),
    )
}

/// The verdicts on a unit of pairs, as rows (the pair's id in place of the prompt's).
fn judged(
    judge: &Judge<'_>,
    pairs: &[Labelled],
    method: Method,
    tie_margin: f64,
) -> Result<Vec<JudgementRow>> {
    let shown: Vec<Pair> = pairs.iter().map(Labelled::pair).collect();
    let mut rows = Vec::new();
    let virtues = judge.virtues();
    for (labelled, verdicts) in pairs.iter().zip(judge.verdicts(&shown)?) {
        for (&virtue, verdict) in virtues.iter().zip(verdicts) {
            let stored = |p: Option<f64>| p.map(|p| p as f32);
            rows.push(JudgementRow {
                prompt_id: labelled.id.clone(),
                split: split_of(&labelled.question),
                aspect: labelled.about.map_or(judge.answer(), |about| about.aspect),
                virtue,
                method: method.name().to_owned(),
                judge: judge.name().to_owned(),
                p_ab: stored(verdict.p_ab),
                p_ba: stored(verdict.p_ba),
                p_sample0: stored(verdict.p_sample0),
                vote: vote(verdict.p_sample0, tie_margin),
            });
        }
    }
    Ok(rows)
}
