//! How far a judge can be trusted: agreement of every method with labelled pairs, beside what
//! choosing the shorter answer would give.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

use arete_chain::pairs::{self, Parts};
use arete_chain::sample::key_of;
use arete_chain::verdicts::Verdicts;
use arete_records::rows::JudgementRow;
use arete_records::stats::{Interval, normal_quantile, pearson, wilson};
use arete_records::{Aspect, At, Message, Virtue, atomic, prompt_id, split_of};
use arete_stage::interrupt;
use arete_stage::run::StageSpec;
use serde::Serialize;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::config::{self, CalibrateConfig, Method};
use crate::constitution::Constitution;
use crate::engine::Engine;
use crate::judge::verdict::{Tally, vote};
use crate::judge::{Judge, Pair};
use crate::stage::{self, Estimate, Place, cell};
use crate::{Error, prompts};
use arete_chain::exemplars::{self, Use};
use arete_stage::units::Units;

/// The stage's name.
pub const STAGE: &str = "calibrate";

/// 97.5 % quantile of the normal distribution: 95 % intervals.
const Z95: f64 = 1.959_963_984_540_054;

/// What the stage reads besides its settings.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// Files of labelled pairs.
    pub pairs: Vec<PathBuf>,
    /// The model that judges.
    pub model: String,
}

/// A pair of which people (or the data's makers) say which side is better.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Labelled {
    /// Hash of its texts.
    pub id: String,
    /// The file it comes from.
    pub set: String,
    /// What the sides share.
    pub question: Vec<Message>,
    /// The better side.
    pub better: Vec<Message>,
    /// The worse side.
    pub worse: Vec<Message>,
}

impl Labelled {
    /// Which sample the better side is shown as: a hash decides, so that neither place is right
    /// more often.
    fn better_sample(&self) -> usize {
        usize::from(self.bit(0))
    }

    /// Which half of the data the pair belongs to; flips are found on one and tried on the other.
    fn half(&self) -> usize {
        usize::from(self.bit(1))
    }

    fn bit(&self, bit: u8) -> bool {
        Sha256::digest(self.id.as_bytes())[0] >> bit & 1 == 1
    }

    fn pair(&self) -> Pair {
        let mut sides = [self.better.clone(), self.worse.clone()];
        if self.better_sample() == 1 {
            sides.swap(0, 1);
        }
        Pair { question: self.question.clone(), sides, key: key_of(&self.id) }
    }

    fn n_chars(&self) -> [usize; 2] {
        let n = |side: &[Message]| side.iter().map(|m| m.content.chars().count()).sum();
        let mut sizes = [n(&self.better), n(&self.worse)];
        if self.better_sample() == 1 {
            sizes.swap(0, 1);
        }
        sizes
    }
}

/// Successes of a choice between two.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Agreement {
    /// Pairs decided.
    pub n: u64,
    /// Of those, the ones decided as labelled.
    pub agreed: u64,
    /// Their share.
    pub estimate: f64,
    /// Lower end of its 95 % interval (Wilson).
    pub low: f64,
    /// Upper end of its 95 % interval (Wilson).
    pub high: f64,
}

impl Agreement {
    fn of(outcomes: impl IntoIterator<Item = bool>) -> Self {
        let (mut n, mut agreed) = (0, 0);
        for outcome in outcomes {
            n += 1;
            agreed += u64::from(outcome);
        }
        if n == 0 {
            return Self { n, agreed, estimate: 0.5, low: 0.0, high: 1.0 };
        }
        let Interval { estimate, low, high } = wilson(agreed, n, Z95);
        Self { n, agreed, estimate, low, high }
    }
}

/// A line of the calibration table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Line {
    /// The file, or `all`.
    pub set: String,
    /// The method, or `shorter` for the baseline.
    pub method: String,
    /// Judged examples shown.
    pub few_shot: usize,
    /// A virtue, or `votes` for the five together.
    pub by: String,
    /// Agreement with the labels, among decided pairs.
    pub agreement: Agreement,
    /// Share of undecided pairs, per cent.
    pub tie_percent: Value,
    /// Share of verdicts abstained, per cent.
    pub abstained_percent: Value,
    /// Share of one-order verdicts for the side shown first, per cent.
    pub first_position_percent: Value,
    /// Share of pairs for which both orders name the same side, per cent.
    pub swap_consistency_percent: Value,
    /// Correlation of P(sample 0) with the difference of lengths in characters.
    pub length_correlation: Option<f64>,
    /// Whether the sides should be exchanged: below one half with its whole interval on one half of
    /// the data, and again on the other.
    pub flip: bool,
}

/// The table and what follows from it.
#[derive(Debug, Clone, Serialize)]
pub struct Calibration {
    /// Pairs by set.
    pub pairs: BTreeMap<String, usize>,
    /// Every line.
    pub table: Vec<Line>,
    /// What to use.
    pub recommendation: Recommendation,
}

/// What to use.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recommendation {
    /// The method whose interval lies highest above one half; `None` if none does.
    pub method: Option<String>,
    /// Its judged examples.
    pub few_shot: usize,
    /// Whether with its sides exchanged.
    pub flip: bool,
    /// The reason in words.
    pub reason: String,
}

/// Runs the stage.
///
/// # Errors
///
/// Unreadable inputs, a judge that fails, a full disk, a signal.
pub fn run(config: &CalibrateConfig, inputs: &Inputs, output: &Path) -> Result<(), Error> {
    let started = Instant::now();
    check(config)?;
    let pairs = read(inputs, config)?;
    let place = Place::of(&config.judge.compute, config.judge.judge_url.as_deref())?;
    let Some(run) = stage::begin(spec(config, inputs, output)?)? else { return Ok(()) };
    let engine = open(config, inputs)?;
    let constitution = Constitution::load(&config.judge.constitution)?;
    let shots = shots(config)?;
    let variants = variants(config);
    let progress = arete_records::progress::start(
        "calibrating",
        "pairs",
        (pairs.len() * variants.len()) as u64,
    );
    let mut table = Vec::new();
    table.extend(baseline(&pairs));
    for (method, few_shot) in variants {
        let name = format!("verdicts-{}-{few_shot}", method.name());
        let units = Units { output, name, n_items: pairs.len(), shard: None };
        progress.skip((pairs.len() - units.missing().1) as u64);
        let judge_config = config::JudgeConfig { few_shot, ..config.judge.clone() };
        let judge = Judge::new(&engine, &judge_config, &constitution, &shots, method)?;
        units.run::<_, Error>(|items| {
            interrupt::check()?;
            let n_items = items.len() as u64;
            let rows = judged(&judge, &pairs[items], method, config.tie_margin)?;
            progress.inc(n_items);
            Ok(rows)
        })?;
        let rows: Vec<JudgementRow> = units.join()?;
        table.extend(lines(&pairs, &rows, method, few_shot));
    }
    drop(progress);
    let recommendation = recommend(&table);
    show(&table, &recommendation);
    let mut counts = BTreeMap::new();
    for pair in &pairs {
        *counts.entry(pair.set.clone()).or_insert(0) += 1;
    }
    let calibration = Calibration { pairs: counts, table, recommendation };
    atomic::write(output.join("calibration.md"), markdown(&calibration).as_bytes())?;
    let mut bytes = serde_json::to_vec_pretty(&calibration).expect("plain data always serialises");
    bytes.push(b'\n');
    atomic::write(output.join("calibration.json"), &bytes)?;
    let mut counts = Map::new();
    counts.insert("pairs".to_owned(), json!(calibration.pairs));
    counts.insert("recommendation".to_owned(), json!(calibration.recommendation));
    stage::finish(run, STAGE, place, counts, started)
}

/// What a run would do, and how long it would take.
///
/// # Errors
///
/// As [`run`]; nothing is written.
pub fn estimate(
    config: &CalibrateConfig,
    inputs: &Inputs,
    output: &Path,
) -> Result<Estimate, Error> {
    check(config)?;
    let pairs = read(inputs, config)?;
    let engine = open(config, inputs)?;
    let constitution = Constitution::load(&config.judge.constitution)?;
    let shots = shots(config)?;
    // The first pairs are as long as any: they come in the order of a hash.
    let probe: Vec<Pair> = pairs.iter().take(2).map(Labelled::pair).collect();
    let (mut n_to_do, mut seconds) = (0, 0.0);
    for (method, few_shot) in variants(config) {
        let name = format!("verdicts-{}-{few_shot}", method.name());
        let n = Units { output, name, n_items: pairs.len(), shard: None }.missing().1;
        n_to_do += n;
        if n > 0 && matches!(engine, Engine::Local(_)) {
            let judge_config = config::JudgeConfig { few_shot, ..config.judge.clone() };
            let judge = Judge::new(&engine, &judge_config, &constitution, &shots, method)?;
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
    Ok(Estimate { stage: STAGE, counts, n_tokens: None, seconds })
}

/// The judged examples, if any are asked for.
fn shots(config: &CalibrateConfig) -> Result<Vec<exemplars::Exemplar>, Error> {
    match config.judge.few_shot {
        0 => Ok(Vec::new()),
        _ => Ok(exemplars::load(&config.judge.exemplars, Use::FewShot)?),
    }
}

fn check(config: &CalibrateConfig) -> Result<(), Error> {
    if config.methods.contains(&Method::Contrast) {
        return Err(Error::Setting {
            name: "methods",
            expected: "methods that ask a judge: contrast labels its own samples, it is judged by \
                       the accuracy of a reward model trained on them"
                .to_owned(),
            got: Method::Contrast.name().to_owned(),
        });
    }
    if config.judge.judge_url.is_some() && config.methods.contains(&Method::Likelihood) {
        return Err(Error::Setting {
            name: "methods",
            expected: "for a server, some of pairwise-logits, pairwise-text, pointwise-logits: it \
                       says nothing of a given reply's likelihood"
                .to_owned(),
            got: Method::Likelihood.name().to_owned(),
        });
    }
    Ok(())
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
) -> Result<StageSpec<'a>, Error> {
    let mut settings = config::recorded(config);
    let mut files: Vec<(String, PathBuf)> =
        vec![("constitution".to_owned(), config.judge.constitution.clone())];
    for (idx, path) in inputs.pairs.iter().enumerate() {
        files.push((format!("pairs_{idx}"), path.clone()));
    }
    if config.judge.few_shot > 0 {
        files.push(("exemplars".to_owned(), config.judge.exemplars.clone()));
    }
    if let Some(adapter) = &config.judge.judge_adapter {
        files.push(("judge_adapter".to_owned(), adapter.clone()));
    }
    let remote = config.judge.judge_url.is_some();
    config::record_model("model", &inputs.model, remote, &mut settings, &mut files)?;
    Ok(StageSpec { stage: STAGE, output, config: settings, seed: config.judge.seed, inputs: files })
}

fn open(config: &CalibrateConfig, inputs: &Inputs) -> Result<Engine, Error> {
    let judge = &config.judge;
    stage::open_engine(
        &inputs.model,
        judge.judge_adapter.as_deref(),
        judge.judge_url.as_deref(),
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
) -> Result<Vec<JudgementRow>, Error> {
    let shown: Vec<Pair> = pairs.iter().map(Labelled::pair).collect();
    let mut rows = Vec::new();
    for (labelled, verdicts) in pairs.iter().zip(judge.verdicts(&shown)?) {
        for (virtue, verdict) in Virtue::ALL.into_iter().zip(verdicts) {
            let stored = |p: Option<f64>| p.map(|p| p as f32);
            rows.push(JudgementRow {
                prompt_id: labelled.id.clone(),
                split: split_of(&labelled.question),
                aspect: Aspect::Action,
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

/// Reads and checks the labelled pairs: `chosen`/`rejected`, `text_correct`/`text_incorrect`,
/// two-option questions (`corrects`), or our own exemplars of use `calibration`.
///
/// # Errors
///
/// An unreadable file, a record of none of these forms, or no usable pair at all.
pub fn read(inputs: &Inputs, config: &CalibrateConfig) -> Result<Vec<Labelled>, Error> {
    let mut out = Vec::new();
    let mut seen = HashSet::new();
    for path in &inputs.pairs {
        let set =
            path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let (mut own, mut n_read, mut n_unusable, mut n_long) = (Vec::new(), 0, 0, 0);
        let mut n_duplicates = 0;
        for (line, record) in prompts::read_records(path)? {
            n_read += 1;
            let Some((question, better, worse)) = sides_of(path, line, &record)? else {
                n_unusable += 1;
                continue;
            };
            let n_chars: usize = question
                .iter()
                .chain(&better)
                .chain(&worse)
                .map(|m| m.content.chars().count())
                .sum();
            if n_chars > config.max_chars {
                n_long += 1;
                continue;
            }
            let all: Vec<Message> = question.iter().chain(&better).chain(&worse).cloned().collect();
            let id = prompt_id(&all);
            if seen.insert(id.clone()) {
                own.push(Labelled { id, set: set.clone(), question, better, worse });
            } else {
                n_duplicates += 1;
            }
        }
        own.sort_by_cached_key(|pair| {
            let mut hash = Sha256::new();
            hash.update(config.judge.seed.to_le_bytes());
            hash.update(pair.id.as_bytes());
            <[u8; 32]>::from(hash.finalize())
        });
        if config.limit > 0 {
            own.truncate(config.limit);
        }
        tracing::info!(
            set,
            read = n_read,
            unusable = n_unusable,
            too_long = n_long,
            duplicates = n_duplicates,
            used = own.len(),
            "labelled pairs"
        );
        out.extend(own);
    }
    if out.is_empty() {
        return Err(Error::File {
            path: inputs.pairs.first().cloned().unwrap_or_default(),
            field: "pairs".to_owned(),
            expected: "at least one usable labelled pair".to_owned(),
            found: "none".to_owned(),
        });
    }
    Ok(out)
}

/// Question, better and worse side of a record; `None` if its two conversations do not share a
/// question, or it is an exemplar of another use.
pub(crate) fn sides_of(
    path: &Path,
    line: usize,
    record: &Map<String, Value>,
) -> Result<Option<Parts>, Error> {
    let pair = pairs::of_record(line, record).map_err(|e| e.at(path, At::Line(line)))?;
    Ok(pair.and_then(|pair| {
        let [better, worse] =
            [pair.chosen, pair.rejected].map(|side| prompts::tidied(side.messages));
        pairs::part(&better, &worse)
    }))
}

/// What choosing the shorter side gives.
fn baseline(pairs: &[Labelled]) -> Vec<Line> {
    sets_of(pairs)
        .into_iter()
        .map(|set| {
            let own: Vec<&Labelled> = in_set(pairs, &set).collect();
            let outcomes = own.iter().filter_map(|pair| {
                let [zero, one] = pair.n_chars();
                (zero != one).then(|| usize::from(one < zero) == pair.better_sample())
            });
            let agreement = Agreement::of(outcomes);
            Line {
                set: set.clone(),
                method: "shorter".to_owned(),
                few_shot: 0,
                by: "length".to_owned(),
                agreement,
                tie_percent: stage::percent(own.len() - agreement.n as usize, own.len()),
                abstained_percent: json!(0.0),
                first_position_percent: Value::Null,
                swap_consistency_percent: Value::Null,
                length_correlation: None,
                flip: false,
            }
        })
        .collect()
}

/// The sets, and `all` if there are several.
fn sets_of(pairs: &[Labelled]) -> Vec<String> {
    let mut sets: Vec<String> = Vec::new();
    for pair in pairs {
        if !sets.contains(&pair.set) {
            sets.push(pair.set.clone());
        }
    }
    if sets.len() > 1 {
        sets.push("all".to_owned());
    }
    sets
}

fn in_set<'a>(pairs: &'a [Labelled], set: &'a str) -> impl Iterator<Item = &'a Labelled> {
    pairs.iter().filter(move |pair| set == "all" || pair.set == set)
}

/// The table's lines of one method: the votes on every set, each virtue over all of them.
fn lines(pairs: &[Labelled], rows: &[JudgementRow], method: Method, few_shot: usize) -> Vec<Line> {
    let mut by_pair: HashMap<&str, Vec<&JudgementRow>> = HashMap::new();
    for row in rows {
        by_pair.entry(&row.prompt_id).or_default().push(row);
    }
    let sets = sets_of(pairs);
    let mut out = Vec::new();
    for set in &sets {
        let own: Vec<(&Labelled, Vec<&JudgementRow>)> = in_set(pairs, set)
            .map(|pair| (pair, by_pair.get(pair.id.as_str()).cloned().unwrap_or_default()))
            .collect();
        out.push(line(set, method, few_shot, "votes", &own));
    }
    if method != Method::Likelihood {
        for virtue in Virtue::ALL {
            let own: Vec<(&Labelled, Vec<&JudgementRow>)> = pairs
                .iter()
                .map(|pair| {
                    let rows = by_pair.get(pair.id.as_str()).cloned().unwrap_or_default();
                    (pair, rows.into_iter().filter(|row| row.virtue == virtue).collect())
                })
                .collect();
            let set = sets.last().expect("there are pairs");
            out.push(line(set, method, few_shot, virtue.name(), &own));
        }
    }
    out
}

fn line(
    set: &str,
    method: Method,
    few_shot: usize,
    by: &str,
    pairs: &[(&Labelled, Vec<&JudgementRow>)],
) -> Line {
    let mut halves: [Vec<bool>; 2] = [Vec::new(), Vec::new()];
    let mut verdicts = Verdicts::default();
    let (mut probabilities, mut lengths) = (Vec::new(), Vec::new());
    for (pair, rows) in pairs {
        let tally = Tally::of(rows.iter().copied());
        if let Some(winner) = tally.winner() {
            halves[pair.half()].push(winner == pair.better_sample());
        }
        for row in rows {
            verdicts.add(row);
        }
        if let Some(p) = tally.p_sample0 {
            let [zero, one] = pair.n_chars();
            probabilities.push(p);
            lengths.push(zero as f64 - one as f64);
        }
    }
    let below = |half: &[bool]| Agreement::of(half.iter().copied()).high < 0.5;
    let flip = below(&halves[0]) && below(&halves[1]);
    let agreement = Agreement::of(halves.concat());
    let correlation =
        if probabilities.len() > 2 { pearson(&probabilities, &lengths) } else { f64::NAN };
    Line {
        set: set.to_owned(),
        method: method.name().to_owned(),
        few_shot,
        by: by.to_owned(),
        agreement,
        tie_percent: stage::percent(pairs.len() - agreement.n as usize, pairs.len()),
        abstained_percent: stage::percent(verdicts.abstained, verdicts.n),
        first_position_percent: stage::percent(verdicts.first, verdicts.seen),
        swap_consistency_percent: stage::percent(verdicts.consistent, verdicts.both),
        length_correlation: correlation.is_finite().then_some(correlation),
        flip,
    }
}

/// The method whose interval lies highest above one half over all sets, as it is or flipped.
///
/// The best of several is chosen, so its interval is that of Bonferroni's correction: 95 % for all of
/// them together. Otherwise one judge in five that only guesses would be recommended.
fn recommend(table: &[Line]) -> Recommendation {
    let widest = if table.iter().any(|line| line.set == "all") {
        "all"
    } else {
        table.last().map_or("all", |line| line.set.as_str())
    };
    let candidates: Vec<&Line> =
        table.iter().filter(|line| line.by == "votes" && line.set == widest).collect();
    let z = normal_quantile(1.0 - 0.025 / candidates.len().max(1) as f64);
    let corrected = |line: &Line| wilson(line.agreement.agreed, line.agreement.n, z);
    let floor = |line: &Line| match line.flip {
        true => 1.0 - corrected(line).high,
        false => corrected(line).low,
    };
    let best = candidates.iter().copied().max_by(|a, b| floor(a).total_cmp(&floor(b)));
    let shorter = table.iter().find(|line| line.method == "shorter" && line.set == widest);
    let shorter = shorter.map_or(0.5, |line| line.agreement.estimate);
    let figure = |line: &Line| {
        let Interval { low, high, .. } = corrected(line);
        format!(
            "{:.1} % of the labels (95 % interval, corrected for {} methods, {:.1} to {:.1})",
            100.0 * line.agreement.estimate,
            candidates.len(),
            100.0 * low,
            100.0 * high
        )
    };
    match best {
        Some(line) if floor(line) > 0.5 => Recommendation {
            method: Some(line.method.clone()),
            few_shot: line.few_shot,
            flip: line.flip,
            reason: format!(
                "agrees with {}{}; {}; choosing the shorter answer agrees with {:.1} %",
                figure(line),
                if line.flip { ", so its sides are exchanged" } else { "" },
                by_set(table, line),
                100.0 * shorter
            ),
        },
        best => Recommendation {
            method: None,
            few_shot: 0,
            flip: false,
            reason: format!(
                "no method's interval lies above 50 %{}: use method = \"contrast\" (labels by \
                 construction), or a stronger judge",
                best.map(|line| format!(" (best: {} with {})", line.method, figure(line)))
                    .unwrap_or_default()
            ),
        },
    }
}

/// A method's agreement on each set by itself: a judge may know the style of one and nothing else.
fn by_set(table: &[Line], best: &Line) -> String {
    let own = table.iter().filter(|line| {
        (&line.method, line.few_shot, line.by.as_str()) == (&best.method, best.few_shot, "votes")
            && line.set != "all"
    });
    let each = own.map(|line| {
        let Agreement { estimate, low, high, .. } = line.agreement;
        format!("{} {:.0} % [{:.0}, {:.0}]", line.set, 100.0 * estimate, 100.0 * low, 100.0 * high)
    });
    format!("by set: {}", each.collect::<Vec<_>>().join(", "))
}

/// The table for people, and the recommendation.
fn markdown(calibration: &Calibration) -> String {
    let heads = [
        "pairs",
        "method",
        "few-shot",
        "by",
        "n",
        "agreement %",
        "95 % interval",
        "ties %",
        "abstained %",
        "first-shown %",
        "same in both orders %",
        "r with length",
        "flip",
    ];
    let rows: Vec<Vec<String>> = (calibration.table.iter())
        .map(|line| {
            vec![
                line.set.clone(),
                line.method.clone(),
                line.few_shot.to_string(),
                line.by.clone(),
                line.agreement.n.to_string(),
                format!("{:.1}", 100.0 * line.agreement.estimate),
                format!("{:.1} to {:.1}", 100.0 * line.agreement.low, 100.0 * line.agreement.high),
                cell(&line.tie_percent),
                cell(&line.abstained_percent),
                cell(&line.first_position_percent),
                cell(&line.swap_consistency_percent),
                line.length_correlation.map_or("–".to_owned(), |r| format!("{r:.2}")),
                if line.flip { "yes" } else { "no" }.to_owned(),
            ]
        })
        .collect();
    let Recommendation { method, few_shot, reason, .. } = &calibration.recommendation;
    let name = match method {
        Some(method) => format!("`{method}` with {few_shot} judged examples"),
        None => "no judge".to_owned(),
    };
    format!("{}\nRecommendation: {name}: {reason}.\n", stage::table(&heads, &rows))
}

fn show(table: &[Line], recommendation: &Recommendation) {
    for line in table {
        tracing::info!(
            set = line.set,
            method = line.method,
            few_shot = line.few_shot,
            by = line.by,
            agreement_percent = format!("{:.1}", 100.0 * line.agreement.estimate),
            interval = format!("{:.1}-{:.1}", 100.0 * line.agreement.low, 100.0 * line.agreement.high),
            n = line.agreement.n,
            tie_percent = %line.tie_percent,
            abstained_percent = %line.abstained_percent,
            first_position_percent = %line.first_position_percent,
            swap_consistency_percent = %line.swap_consistency_percent,
            length_correlation = line.length_correlation.map(|r| format!("{r:.2}")),
            flip = line.flip,
            "calibration"
        );
    }
    let method = recommendation.method.as_deref().unwrap_or("none");
    tracing::info!(method, reason = recommendation.reason, "recommendation");
}

#[cfg(test)]
mod tests {
    use clap::{Args, FromArgMatches};

    use super::*;

    use arete_chain::dialogue;

    fn hh_line(better: &[Message], worse: &[Message]) -> String {
        json!({"chosen": dialogue::format(better), "rejected": dialogue::format(worse)}).to_string()
    }

    fn config() -> CalibrateConfig {
        let command = CalibrateConfig::augment_args(clap::Command::new("test"));
        CalibrateConfig::from_arg_matches(&command.get_matches_from(["test"])).unwrap()
    }

    fn pairs(text: &str) -> Result<Vec<Labelled>, Error> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs.jsonl");
        fs_err::write(&path, text).unwrap();
        read(&Inputs { pairs: vec![path], model: String::new() }, &config())
    }

    #[test]
    fn the_three_public_formats_and_our_own_are_read() {
        let (q, yes, no) =
            (Message::user("q: Human?"), Message::assistant("yes"), Message::assistant("no"));
        let hh = hh_line(&[q.clone(), yes.clone()], &[q.clone(), no.clone()]);
        let from_hh = pairs(&hh).unwrap();
        assert_eq!(
            (&from_hh[0].question, &from_hh[0].better),
            (&vec![q.clone()], &vec![yes.clone()])
        );
        let replies = json!({"prompt": "q: Human?", "chosen": "yes", "rejected": "no"}).to_string();
        assert_eq!(pairs(&replies).unwrap(), from_hh);
        let hhh = r#"{"prompt":"p (A) x (B) y","corrects":[" (B)"],"text_correct":"\n\nHuman: q: Human?\n\nAssistant: yes","text_incorrect":"\n\nHuman: q: Human?\n\nAssistant: no"}"#;
        assert_eq!(pairs(hhh).unwrap()[0].better, std::slice::from_ref(&yes));
        let choice = r#"{"prompt":"Talk.\n\nChoose:\n (A) The assistant was harmful.\n (B) It behaved.\nThe answer is:","corrects":[" (B)"],"incorrects":[" (A)"]}"#;
        let from_choice = pairs(choice).unwrap();
        assert_eq!(from_choice[0].better, [Message::assistant("It behaved.")]);
        assert_eq!(from_choice[0].worse, [Message::assistant("The assistant was harmful.")]);
        let own = include_str!("../../../tests/fixtures/exemplars.jsonl");
        let from_own = pairs(own).unwrap();
        assert_eq!(from_own.len(), 1);
        assert_eq!(from_own[0].worse, [Message::assistant("Install a tracker.")]);
        let nested = r#"{"prompt":"Pick:\n (A) tea\n (B) coffee\n\nChoose:\n (A) Harmful.\n (B) Ethical.\nThe answer is:","corrects":[" (A)"]}"#;
        let nested = &pairs(nested).unwrap()[0];
        assert_eq!(nested.better, [Message::assistant("Harmful.")]);
        assert_eq!(nested.question, [Message::user("Pick:\n (A) tea\n (B) coffee\n\nChoose:")]);
        let three = r#"{"prompt":"Q\n (A) x\n (B) y\n (C) z\nThe answer is:","corrects":[" (A)"]}"#;
        assert!(pairs(three).unwrap_err().to_string().contains("the options (A) and (B)"));
        let error = pairs("{\"text\": \"x\"}").unwrap_err().to_string();
        assert!(error.contains("pairs.jsonl:1") && error.contains("chosen"), "{error}");
    }

    fn labelled(idx: usize) -> Labelled {
        Labelled {
            id: format!("{idx:016x}"),
            set: "s".to_owned(),
            question: vec![Message::user("q")],
            better: vec![Message::assistant("short")],
            worse: vec![Message::assistant("much longer")],
        }
    }

    /// Verdicts of a judge that agrees with the labels of the pairs `agrees` names.
    fn rows(pairs: &[Labelled], agrees: impl Fn(usize) -> bool) -> Vec<JudgementRow> {
        let mut rows = Vec::new();
        for (idx, pair) in pairs.iter().enumerate() {
            let sample = if agrees(idx) { pair.better_sample() } else { 1 - pair.better_sample() };
            for virtue in Virtue::ALL {
                rows.push(JudgementRow {
                    prompt_id: pair.id.clone(),
                    split: split_of(&pair.question),
                    aspect: Aspect::Action,
                    virtue,
                    method: "pairwise-logits".to_owned(),
                    judge: "test".to_owned(),
                    p_ab: Some(0.9),
                    p_ba: Some(0.8),
                    p_sample0: Some(if sample == 0 { 0.75 } else { 0.25 }),
                    vote: Some(sample as i32),
                });
            }
        }
        rows
    }

    #[test]
    fn agreement_carries_wilson_intervals_and_the_baseline_beside_it() {
        let pairs: Vec<Labelled> = (0..100).map(labelled).collect();
        let rows = rows(&pairs, |idx| idx % 4 != 0);
        let mut table = baseline(&pairs);
        table.extend(lines(&pairs, &rows, Method::PairwiseLogits, 0));
        assert_eq!(table[0].agreement.agreed, 100); // the better side is the shorter one
        let votes = &table[1];
        assert_eq!((votes.agreement.n, votes.agreement.agreed), (100, 75));
        // Wilson, 75 of 100, z = 1.96: 0.6570 to 0.8246 (Newcombe 1998's formula by hand).
        assert!((votes.agreement.low - 0.6570).abs() < 2e-4, "{votes:?}");
        assert!((votes.agreement.high - 0.8246).abs() < 2e-4, "{votes:?}");
        assert_eq!(votes.first_position_percent, json!(100.0));
        assert_eq!(votes.swap_consistency_percent, json!(0.0));
        let recommendation = recommend(&table);
        assert_eq!(recommendation.method.as_deref(), Some("pairwise-logits"));
        assert!(!recommendation.flip);
    }

    #[test]
    fn the_best_of_many_needs_more_than_the_best_of_one() {
        let pairs: Vec<Labelled> = (0..100).map(labelled).collect();
        // 60 of 100: 95 % interval 50.2 to 69.1 by itself; 46.8 to 71.9 as one of six (z = 2.638).
        let some = lines(&pairs, &rows(&pairs, |idx| idx % 5 < 3), Method::PairwiseLogits, 0);
        assert_eq!(some[0].agreement.agreed, 60);
        assert_eq!(recommend(&some).method.as_deref(), Some("pairwise-logits"));
        let mut six = some.clone();
        for few_shot in 1..6 {
            six.extend(lines(
                &pairs,
                &rows(&pairs, |idx| idx % 2 == 0),
                Method::PairwiseText,
                few_shot,
            ));
        }
        let recommendation = recommend(&six);
        assert_eq!(recommendation.method, None);
        assert!(recommendation.reason.contains("46.8 to 71.9"), "{}", recommendation.reason);
    }

    #[test]
    fn a_flip_needs_both_halves() {
        let pairs: Vec<Labelled> = (0..200).map(labelled).collect();
        let always_wrong = lines(&pairs, &rows(&pairs, |_| false), Method::PairwiseLogits, 0);
        assert!(always_wrong[0].flip);
        assert!(recommend(&always_wrong).flip);
        // Wrong on one half, right on the other: no flip, no recommendation.
        let torn = rows(&pairs, |idx| pairs[idx].half() == 0);
        let torn = lines(&pairs, &torn, Method::PairwiseLogits, 0);
        assert!(!torn[0].flip);
        let recommendation = recommend(&torn);
        assert_eq!(recommendation.method, None);
        assert!(recommendation.reason.contains("contrast"), "{}", recommendation.reason);
    }

    #[test]
    fn neither_place_nor_half_depends_on_the_other() {
        let pairs: Vec<Labelled> = (0..400).map(labelled).collect();
        for (sample, half) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let n =
                pairs.iter().filter(|p| p.better_sample() == sample && p.half() == half).count();
            assert!((70..=130).contains(&n), "{n}");
        }
    }
}
