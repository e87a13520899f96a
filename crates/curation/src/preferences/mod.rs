//! Judged pairs: every virtue's verdict on pairs of a prompt's samples, for every aspect; votes to
//! scores, scores to chosen and rejected. Where labels follow by construction nobody is asked: there are pairs, and neither verdicts
//! nor votes. Labelled pairs may be mixed in, or stand alone ([`labelled`]).

mod candidates;
mod config;
mod figures;
pub mod labelled;
mod pairing;
mod sets;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail};
use arete_chain::Constitution;
use arete_chain::memory::Demand;
use arete_records::rows::{JudgementRow, PreferenceRow};
use arete_records::{Refusal, Split, Virtue, files, parquet};
use arete_stage::interrupt;
use arete_stage::run::{RunJson, StageSpec};
use serde_json::{Map, json};

use crate::calibrate::Ballot;
use crate::config::Truncated;
use crate::conversations;
use crate::engine::Engine;
use crate::judge::Method;
use crate::judge::verdict::{Tally, Verdict, vote};
use crate::judge::{Judge, Pair};
use crate::memory;
use crate::stage::{self, Command, Estimate, Place, Work};
use crate::words::Words;
use arete_chain::exemplars::{self, Use};
use arete_stage::units::Units;

use self::candidates::{Candidate, Candidates, Dropped, Samples, samples_of};
pub use self::config::{By, Pairing, PreferencesConfig, Ties};
use self::figures::{summary, summary_table};
use self::labelled::Mixture;
use self::sets::Set;

/// The stage's name.
pub const STAGE: &str = "preferences";
/// Name of the verdicts' file.
pub const JUDGEMENTS: &str = "judgements";

/// What the stage reads besides its settings.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// Directory (or file) of the conversations.
    pub conversations: PathBuf,
    /// The model that judges; not needed for `contrast`.
    pub judge: Option<String>,
}

/// Runs the stage.
///
/// # Errors
///
/// Unreadable inputs, a judge that fails, too few pairs left, a full disk, a signal.
pub fn run(config: &PreferencesConfig, inputs: &Inputs, output: &Path, work: &Work) -> Result<()> {
    config.check()?;
    let started = Instant::now();
    let words = words(config, inputs)?;
    let prompts = samples_of(&inputs.conversations, &words.turns())?;
    let candidates = Candidates::of(&prompts, &words.turns(), config);
    let place = work.place(|| match config.method {
        Method::Contrast => Ok(Place::none()),
        _ => Place::of(&config.judge.compute, config.judge.urls().and_then(<[_]>::first)),
    })?;
    let ballot = ballot(config, &words)?;
    let without_vote = ballot.as_ref().map_or(&[][..], |ballot| ballot.without_vote.as_slice());
    let sets = sets::of(config.by, &words.turns(), &words.virtues(), without_vote)?;
    let mixture = Mixture::read(config, &words.turns())?;
    let Some(run) = stage::begin(spec(config, inputs, output, &words)?)? else {
        return Ok(());
    };
    work.check(&run)?;
    words.leave(output)?;
    if !without_vote.is_empty() {
        let names = arete_chain::constitution::listed(without_vote);
        tracing::warn!(virtues = names, "no vote: their judge is at chance, or was not examined");
    }
    for &aspect in &candidates.aspects {
        // Better now than after hours of judging.
        let dropped = candidates.dropped.get(&aspect).copied().unwrap_or_default();
        candidates.check(aspect, candidates.n_left(aspect), &dropped, config)?;
    }
    let shard = config.shard;
    let units = Units { output, name: JUDGEMENTS.to_owned(), n_items: prompts.len(), shard };
    match work {
        _ if config.method == Method::Contrast => {} // nobody is asked
        Work::Adopt { parts, .. } => units.adopt(parts)?,
        Work::Compute => {
            let (missing, n_missing) = units.missing()?;
            if let (Some(judge), false) = (&inputs.judge, missing.is_empty()) {
                let demand = demand(config, inputs, &words);
                memory::admit(STAGE, &demand, judge, &config.judge.compute)?;
            }
            let tribunal = Tribunal::open(config, inputs, &words, !missing.is_empty())?;
            let judge = tribunal.judge(config)?;
            if let (Some(judge), Some(ballot)) = (&judge, &ballot) {
                ballot.check_judge(judge.name(), run.inputs())?;
            }
            let electorate =
                Electorate { judge: judge.as_ref(), virtues: &words.virtues(), without_vote };
            let progress =
                arete_records::progress::start("judging", "prompts", prompts.len() as u64);
            progress.skip((prompts.len() - n_missing) as u64);
            units.run::<_, anyhow::Error>(|items| {
                interrupt::check()?;
                let n_items = items.len() as u64;
                let chosen: Vec<&Candidate> =
                    candidates.all.iter().filter(|c| items.contains(&c.prompt)).collect();
                let rows = judgements(&chosen, &prompts, &electorate, config)?;
                progress.inc(n_items);
                Ok(rows)
            })?;
            if let Some(Engine::Server(server)) = &tribunal.engine {
                tracing::info!(
                    abstentions = server.n_abstentions(),
                    "verdicts of the server that made no sense"
                );
            }
        }
    }
    if shard.is_some() {
        let config = serde_json::to_value(config).expect("configurations always serialise");
        let input = inputs.conversations.clone();
        Command {
            stage: STAGE.to_owned(),
            config,
            input,
            model: inputs.judge.clone(),
            original: None,
        }
        .write(output)?;
        return stage::finish(run, STAGE, place, Map::new(), started);
    }
    let rows: Vec<JudgementRow> = match config.method {
        Method::Contrast => Vec::new(),
        _ => units.join()?,
    };
    let mut counts = Map::new();
    counts.insert("prompts".to_owned(), json!(prompts.len()));
    counts.insert("judgements".to_owned(), json!(rows.len()));
    if config.calibration.is_some() {
        let names: Vec<&str> = without_vote.iter().map(|virtue| virtue.name()).collect();
        counts.insert("without_vote".to_owned(), json!(names));
    }
    for set in &sets {
        let (pairs, dropped) = pairs_of(set, &candidates, &prompts, &rows, without_vote, config)?;
        candidates.check(set.name, pairs.len(), &dropped, config)?;
        let n_train = pairs.iter().filter(|(split, _)| *split == Split::Train).count();
        let mixed = mixture.of(set, n_train, config);
        let judged: Vec<&JudgementRow> = rows.iter().filter(|row| set.counts(row)).collect();
        let virtues = match config.method {
            Method::Contrast => Vec::new(),
            _ => set.virtue.map_or_else(|| words.virtues(), |virtue| vec![virtue]),
        };
        let mut figures = summary(set, &judged, &virtues, &pairs, &dropped, &prompts);
        if !config.pairs.is_empty() {
            figures["labelled"] = mixed.len().into();
        }
        write_splits(output, set.name.name(), &[pairs, mixed].concat())?;
        counts.insert(set.name.name().to_owned(), figures);
    }
    let virtues = if rows.is_empty() { Vec::new() } else { words.virtues() };
    let table = summary_table(&counts, &sets, &virtues);
    tracing::info!("preferences\n{table}");
    stage::finish(run, STAGE, place, counts, started)
}

/// What a run would do, and how long it would take.
///
/// # Errors
///
/// As [`run`]; nothing is written.
pub fn estimate(config: &PreferencesConfig, inputs: &Inputs, output: &Path) -> Result<Estimate> {
    config.check()?;
    let words = words(config, inputs)?;
    let prompts = samples_of(&inputs.conversations, &words.turns())?;
    let candidates = Candidates::of(&prompts, &words.turns(), config);
    let units =
        Units { output, name: JUDGEMENTS.to_owned(), n_items: prompts.len(), shard: config.shard };
    let (missing, n_missing) = units.missing()?;
    let to_do: Vec<&Candidate> = candidates
        .all
        .iter()
        .filter(|candidate| {
            missing.iter().any(|&unit| units.items(unit).contains(&candidate.prompt))
        })
        .collect();
    let mut counts = Map::new();
    counts.insert("prompts".to_owned(), json!(prompts.len()));
    counts.insert("prompts_to_do".to_owned(), json!(n_missing));
    for &aspect in &candidates.aspects {
        counts.insert(format!("pairs_{aspect}"), json!(candidates.n_left(aspect)));
    }
    let (mut n_tokens, mut seconds) = (None, None);
    if config.method != Method::Contrast && !to_do.is_empty() {
        let tribunal = Tribunal::open(config, inputs, &words, true)?;
        let judge = tribunal.judge(config)?.expect("the method asks a judge");
        let engine = tribunal.engine.as_ref().expect("opened for the judge");
        let pairs: Vec<Pair> = to_do.iter().map(|candidate| candidate.pair.clone()).collect();
        counts.insert("verdicts_to_do".to_owned(), json!(judge.queries(&pairs).len()));
        n_tokens = Some(0);
        for pair in &pairs {
            // The pair once per order; the virtues' questions after it are short.
            let n_virtues = words.virtues().len();
            for query in judge.queries(std::slice::from_ref(pair)).iter().step_by(n_virtues) {
                n_tokens =
                    n_tokens.zip(engine.n_tokens(&query.messages)?).map(|(sum, n)| sum + n as u64);
            }
        }
        if matches!(engine, Engine::Local(_)) {
            let probe = &pairs[..pairs.len().min(4)];
            let started = Instant::now();
            judge.verdicts(probe)?;
            let per_pair_s = started.elapsed().as_secs_f64() / probe.len() as f64;
            seconds = Some((per_pair_s * pairs.len() as f64).ceil());
        }
    }
    let demand = demand(config, inputs, &words);
    let memory = memory::of_stage(demand, inputs.judge.as_deref(), &config.judge.compute)?;
    Ok(Estimate { stage: STAGE, counts, n_tokens, seconds, memory })
}

/// What is counted of the judge's memory: what is judged is as long as what was sampled.
fn demand(config: &PreferencesConfig, inputs: &Inputs, words: &Words) -> Demand {
    let sampled = RunJson::read(&inputs.conversations).ok();
    let sampled = sampled.and_then(|run| run.config.get("max_new_tokens")?.as_u64());
    let most = sampled.map_or(96, |most| most as usize);
    memory::of_preferences(config, words.turns().len(), most)
}

/// The constitution given, or carried by the conversations.
fn words(config: &PreferencesConfig, inputs: &Inputs) -> Result<Words> {
    Words::of(config.judge.constitution.as_deref(), Some(&inputs.conversations))
}

/// Who may vote, if a calibration says so.
fn ballot(config: &PreferencesConfig, words: &Words) -> Result<Option<Ballot>> {
    let Some(path) = &config.calibration else { return Ok(None) };
    let few_shot = config.judge.few_shot;
    Ballot::read(path, &words.virtues(), config.method, few_shot).map(Some)
}

/// The judge's files, read; and the judge itself if it will be asked.
struct Tribunal<'w> {
    engine: Option<Engine>,
    constitution: Option<&'w Constitution>,
    exemplars: Vec<exemplars::Exemplar>,
}

impl<'w> Tribunal<'w> {
    fn open(
        config: &PreferencesConfig,
        inputs: &Inputs,
        words: &'w Words,
        needed: bool,
    ) -> Result<Self> {
        let mut tribunal = Self { engine: None, constitution: None, exemplars: Vec::new() };
        if config.method == Method::Contrast || !needed {
            return Ok(tribunal);
        }
        let judge = &config.judge;
        let model = inputs.judge.as_deref().ok_or_else(|| {
            Refusal::setting(
                "judge",
                format!("a model for the method {}", config.method.name()),
                "none",
            )
        })?;
        tribunal.constitution = Some(words.constitution()?);
        if judge.few_shot > 0 {
            tribunal.exemplars = exemplars::load(&judge.exemplars, Use::FewShot, &words.turns())?;
        }
        tribunal.engine = Some(stage::open_engine(
            model,
            judge.judge_adapter.as_deref(),
            judge.urls(),
            &judge.compute,
            &judge.server,
            config.method.needs_logprobs(),
        )?);
        Ok(tribunal)
    }

    fn judge<'a>(&'a self, config: &'a PreferencesConfig) -> Result<Option<Judge<'a>>> {
        let (Some(engine), Some(constitution)) = (&self.engine, self.constitution) else {
            return Ok(None);
        };
        Judge::new(engine, &config.judge, constitution, &self.exemplars, config.method).map(Some)
    }
}

fn spec<'a>(
    config: &PreferencesConfig,
    inputs: &Inputs,
    output: &'a Path,
    words: &Words,
) -> Result<StageSpec<'a>> {
    let mut settings = crate::config::recorded(config);
    if config.by == By::default() {
        // Not recorded: results of versions that knew nothing else stay.
        settings.as_object_mut().expect("settings are a table").remove("by");
    }
    let conversations = stage::file_of(&inputs.conversations, conversations::STAGE);
    let mut files = vec![(conversations::STAGE.to_owned(), conversations)];
    let are_read = config.method != Method::Contrast;
    files.extend(words.input(are_read)?.map(|path| ("constitution".to_owned(), path)));
    files.extend(labelled::inputs(&config.pairs));
    if let Some(path) = &config.calibration {
        let file = if path.is_dir() { path.join("calibration.json") } else { path.clone() };
        files.push(("calibration".to_owned(), file));
    }
    if config.method != Method::Contrast {
        let judge = &config.judge;
        if judge.few_shot > 0 {
            files.push(("exemplars".to_owned(), files::shipped(&judge.exemplars)));
        }
        if let Some(adapter) = &judge.judge_adapter {
            files.push(("judge_adapter".to_owned(), adapter.clone()));
        }
        if let Some(model) = &inputs.judge {
            let remote = judge.urls().is_some();
            crate::config::record_model("judge", model, remote, &mut settings, &mut files)?;
        }
    }
    Ok(StageSpec { stage: STAGE, output, config: settings, seed: config.judge.seed, inputs: files })
}

/// Who judges, and by what.
struct Electorate<'a> {
    judge: Option<&'a Judge<'a>>,
    virtues: &'a [Virtue],
    /// Those whose verdicts are recorded but do not count.
    without_vote: &'a [Virtue],
}

/// Every virtue's verdict on the candidates of a unit.
fn judgements(
    candidates: &[&Candidate],
    prompts: &[Samples],
    electorate: &Electorate<'_>,
    config: &PreferencesConfig,
) -> Result<Vec<JudgementRow>> {
    let Electorate { judge, virtues, without_vote } = *electorate;
    let judge = judge.expect("units are missing, so the tribunal is open");
    let pairs: Vec<Pair> = candidates.iter().map(|candidate| candidate.pair.clone()).collect();
    let verdicts = judge.verdicts(&pairs)?;
    if config.min_pairs > 0 {
        judge.check_heard(&verdicts)?;
    }
    let mut rows = Vec::new();
    for (candidate, verdicts) in candidates.iter().zip(verdicts) {
        let samples = &prompts[candidate.prompt];
        for (&virtue, verdict) in virtues.iter().zip(verdicts) {
            let verdict = if config.flip { verdict.flipped() } else { verdict };
            let stored = |p: Option<f64>| p.map(|p| p as f32);
            rows.push(JudgementRow {
                prompt_id: samples.pair_id(candidate.samples),
                split: samples.samples[0].split,
                aspect: candidate.aspect,
                virtue,
                method: config.method.name().to_owned(),
                judge: judge.name().to_owned(),
                p_ab: stored(verdict.p_ab),
                p_ba: stored(verdict.p_ba),
                p_sample0: stored(verdict.p_sample0),
                vote: vote(verdict.p_sample0, config.tie_margin)
                    .filter(|_| !without_vote.contains(&virtue)),
            });
        }
    }
    Ok(rows)
}

/// The verdict of contrastive sampling: the sample of the virtuous persona or of the tuned model, for certain.
fn by_construction(samples: &Samples) -> Result<Verdict> {
    let personas: Vec<Option<&str>> =
        samples.samples.iter().map(|sample| sample.persona.as_deref()).collect();
    let better = match personas[..] {
        [Some(conversations::VIRTUOUS), Some(conversations::VICIOUS)]
        | [Some(conversations::TUNED), Some(conversations::ORIGINAL)] => 0,
        [Some(conversations::VICIOUS), Some(conversations::VIRTUOUS)]
        | [Some(conversations::ORIGINAL), Some(conversations::TUNED)] => 1,
        _ => {
            bail!(Refusal::setting(
                "method",
                "conversations sampled with personas = \"contrast\" or \"original\" for the \
                           method contrast"
                    .to_owned(),
                format!("personas {personas:?} of prompt {}", samples.samples[0].prompt_id)
            ));
        }
    };
    Ok(Verdict { p_ab: None, p_ba: None, p_sample0: Some(if better == 0 { 1.0 } else { 0.0 }) })
}

/// The preferences of one set, and what was left out.
fn pairs_of(
    set: &Set,
    candidates: &Candidates,
    prompts: &[Samples],
    judgements: &[JudgementRow],
    without_vote: &[Virtue],
    config: &PreferencesConfig,
) -> Result<(Vec<(Split, PreferenceRow)>, Dropped)> {
    let mut by_pair: HashMap<&str, Vec<&JudgementRow>> = HashMap::new();
    let counts = |row: &&JudgementRow| set.counts(row) && !without_vote.contains(&row.virtue);
    for row in judgements.iter().filter(counts) {
        by_pair.entry(&row.prompt_id).or_default().push(row);
    }
    let mut dropped = candidates.dropped.get(&set.aspect).copied().unwrap_or_default();
    let judged = (candidates.all.iter())
        .filter(|candidate| candidate.aspect == set.aspect)
        .map(|candidate| {
            let samples = &prompts[candidate.prompt];
            if config.method == Method::Contrast {
                let verdict = by_construction(samples)?;
                let verdict = if config.flip { verdict.flipped() } else { verdict };
                return Ok((candidate, Tally { votes: [0, 0], p_sample0: verdict.p_sample0 }));
            }
            let id = samples.pair_id(candidate.samples);
            let own = by_pair.get(id.as_str()).map_or(&[][..], Vec::as_slice);
            Ok((candidate, Tally::of(own.iter().copied())))
        })
        .collect::<Result<Vec<(&Candidate, Tally)>>>()?;
    let judged = match config.pairing {
        Pairing::All => judged,
        Pairing::BestWorst => pairing::best_worst(judged),
    };
    let mut pairs = Vec::new();
    for (candidate, tally) in judged {
        let samples = &prompts[candidate.prompt];
        let ties = match config.method {
            Method::Contrast => Ties::Probability, // no votes, but no tie
            _ => config.ties,
        };
        match prefer(candidate, samples, &tally, ties, config.truncated) {
            Some(pair) => pairs.push((samples.samples[0].split, pair)),
            None => {
                dropped.ties += 1;
                dropped.abstained += usize::from(tally.p_sample0.is_none());
            }
        }
    }
    Ok((pairs, dropped))
}

/// The row of a decided pair; `None` for a tie.
fn prefer(
    candidate: &Candidate,
    samples: &Samples,
    tally: &Tally,
    ties: Ties,
    cut: Truncated,
) -> Option<PreferenceRow> {
    let chosen = match ties {
        Ties::Drop => tally.winner(),
        Ties::Probability => tally.winner().or_else(|| tally.likelier()),
    }?;
    let rejected = 1 - chosen;
    let p_sample0 = tally.p_sample0?;
    // A trimmed reply is closed: left open, its missing end of turn would tell the sides apart by itself.
    let open = |truncated| truncated && cut != Truncated::Trim;
    let truncated = candidate.samples.map(|s| open(samples.samples[s].is_cut(candidate.aspect)));
    Some(PreferenceRow {
        prompt: candidate.pair.question.clone(),
        chosen: candidate.pair.sides[chosen].clone(),
        rejected: candidate.pair.sides[rejected].clone(),
        score_chosen: tally.votes[chosen],
        score_rejected: tally.votes[rejected],
        chosen_prob: (if chosen == 0 { p_sample0 } else { 1.0 - p_sample0 }) as f32,
        prompt_id: samples.samples[0].prompt_id.clone(),
        truncated_chosen: truncated[chosen],
        truncated_rejected: truncated[rejected],
    })
}

/// Writes one file a split. A split without pairs gets none: `datasets.load_dataset` refuses a
/// directory that holds an empty one.
fn write_splits(output: &Path, name: &str, pairs: &[(Split, PreferenceRow)]) -> Result<()> {
    let dir = output.join(name);
    fs_err::create_dir_all(&dir)?;
    for split in Split::ALL {
        let own = pairs.iter().filter(|(of, _)| *of == split);
        let rows: Vec<PreferenceRow> = own.map(|(_, pair)| pair.clone()).collect();
        if rows.is_empty() {
            tracing::warn!(name, split = split.name(), "no pairs in this split");
            continue;
        }
        parquet::write(dir.join(format!("{}.parquet", split.name())), &rows)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use arete_chain::Turns;
    use arete_records::rows::{ConversationRow, TurnRow};
    use arete_records::{Aspect, FinishReason, Message, Role};

    use super::*;

    fn row(sample: i32, texts: [&str; 3], cut: [bool; 3]) -> ConversationRow {
        let messages = Turns::default().conversation(&[Message::user("q")], &texts);
        let reason = |cut| if cut { FinishReason::Length } else { FinishReason::Stop };
        let turn = |((aspect, text), cut): ((Aspect, &str), bool)| TurnRow {
            aspect,
            text: text.to_owned(),
            finish_reason: reason(cut),
            n_tokens: 1,
        };
        ConversationRow {
            prompt_id: "00000000000000aa".to_owned(),
            split: Split::Train,
            sample,
            persona: None,
            messages,
            turns: Aspect::SHIPPED.into_iter().zip(texts).zip(cut).map(turn).collect(),
            seed: 0,
        }
    }

    fn samples() -> Samples {
        let zero = row(0, ["Go on. And", "M0.", "C0 no end"], [true, false, true]);
        let one = row(1, ["Stop.", "M1.", "C1."], [false; 3]);
        Samples { samples: vec![zero, one], n_prompt: 1 }
    }

    fn texts(side: &[Message]) -> Vec<&str> {
        side.iter()
            .filter(|message| message.role == Role::Assistant)
            .map(|message| message.content.as_str())
            .collect()
    }

    #[test]
    fn only_the_aspects_own_reply_counts_as_truncated() {
        let prompts = [samples()];
        let drop = Candidates::among(&prompts, Turns::default().names(), Truncated::Drop);
        assert_eq!(Aspect::SHIPPED.map(|aspect| drop.n_left(aspect)), [0, 1, 0]);
        assert_eq!(texts(&drop.all[0].pair.sides[0]), ["Go on. And", "M0."]);
        assert_eq!(drop.finish_rates, "action 50.0 %, motivation 100.0 %, consequence 50.0 %");
    }

    #[test]
    fn trimming_cuts_every_cut_reply_and_keeping_none() {
        let prompts = [samples()];
        let trim = Candidates::among(&prompts, Turns::default().names(), Truncated::Trim);
        // The consequence of sample 0 has no full sentence.
        assert_eq!(Aspect::SHIPPED.map(|aspect| trim.n_left(aspect)), [1, 1, 0]);
        assert_eq!(trim.dropped[&Aspect::CONSEQUENCE].untrimmable, 1);
        assert_eq!(texts(&trim.all[0].pair.sides[0]), ["Go on."]);
        assert_eq!(texts(&trim.all[1].pair.sides[0]), ["Go on.", "M0."]);
        let keep = Candidates::among(&prompts, Turns::default().names(), Truncated::Keep);
        assert_eq!(Aspect::SHIPPED.map(|aspect| keep.n_left(aspect)), [1, 1, 1]);
        assert_eq!(texts(&keep.all[2].pair.sides[0]), ["Go on. And", "M0.", "C0 no end"]);
    }

    #[test]
    fn the_side_with_more_votes_is_chosen_and_carries_its_own_turns() {
        let prompts = [samples()];
        let candidates = Candidates::among(&prompts, Turns::default().names(), Truncated::Keep);
        let motivation = &candidates.all[1];
        let tally = Tally { votes: [1, 3], p_sample0: Some(0.625) };
        let pair = prefer(motivation, &prompts[0], &tally, Ties::Drop, Truncated::Keep).unwrap();
        assert_eq!((pair.score_chosen, pair.score_rejected), (3, 1));
        assert_eq!(pair.chosen_prob, 0.375); // may be below one half
        assert_eq!(texts(&pair.chosen), ["Stop.", "M1."]);
        assert_eq!(texts(&pair.rejected), ["Go on. And", "M0."]);
        assert_eq!(pair.prompt, [Message::user("q")]);
        assert_eq!((pair.truncated_chosen, pair.truncated_rejected), (false, false));
        let action =
            prefer(&candidates.all[0], &prompts[0], &tally, Ties::Drop, Truncated::Keep).unwrap();
        assert_eq!((action.truncated_chosen, action.truncated_rejected), (false, true));
        let trimmed = Candidates::among(&prompts, Turns::default().names(), Truncated::Trim);
        let closed =
            prefer(&trimmed.all[0], &prompts[0], &tally, Ties::Drop, Truncated::Trim).unwrap();
        assert_eq!(texts(&closed.rejected), ["Go on."]);
        assert_eq!((closed.truncated_chosen, closed.truncated_rejected), (false, false));
    }

    #[test]
    fn a_tie_is_dropped_or_decided_by_probability() {
        let prompts = [samples()];
        let candidates = Candidates::among(&prompts, Turns::default().names(), Truncated::Keep);
        let tie = Tally { votes: [2, 2], p_sample0: Some(0.75) };
        assert!(
            prefer(&candidates.all[0], &prompts[0], &tie, Ties::Drop, Truncated::Keep).is_none()
        );
        let pair =
            prefer(&candidates.all[0], &prompts[0], &tie, Ties::Probability, Truncated::Keep)
                .unwrap();
        assert_eq!(texts(&pair.chosen), ["Go on. And"]);
        let even = Tally { votes: [2, 2], p_sample0: Some(0.5) };
        assert!(
            prefer(&candidates.all[0], &prompts[0], &even, Ties::Probability, Truncated::Keep)
                .is_none()
        );
    }

    #[test]
    fn contrast_prefers_the_virtuous_persona_and_needs_one() {
        let mut samples = samples();
        assert!(by_construction(&samples).unwrap_err().to_string().contains("contrast"));
        samples.samples[0].persona = Some("vicious".to_owned());
        samples.samples[1].persona = Some("virtuous".to_owned());
        assert_eq!(by_construction(&samples).unwrap().p_sample0, Some(0.0));
    }

    #[test]
    fn the_summary_shows_every_figure_of_every_aspect() {
        let prompts = [samples()];
        let candidates = Candidates::among(&prompts, Turns::default().names(), Truncated::Keep);
        let mut counts = Map::new();
        for aspect in Aspect::SHIPPED {
            let dropped = &candidates.dropped[&aspect];
            let set = Set::of_aspect(aspect);
            let figures = summary(&set, &[], &Virtue::SHIPPED, &[], dropped, &prompts);
            counts.insert(aspect.name().to_owned(), figures);
        }
        let table = summary_table(&counts, &Aspect::SHIPPED.map(Set::of_aspect), &Virtue::SHIPPED);
        let cells = |name: &str| -> Vec<&str> {
            let line = table.lines().find(|line| line.contains(name)).unwrap();
            line.split('|').map(str::trim).filter(|cell| !cell.is_empty()).skip(1).collect()
        };
        assert_eq!(cells("cut by the token limit"), ["50.0", "0.0", "50.0"]);
        assert_eq!(cells("first-shown"), ["–", "–", "–"]);
        assert_eq!(cells("votes on respect"), ["0 : 0 : 0"; 3]);
        assert!(table.contains("motivation"));
    }

    #[test]
    fn too_few_pairs_show_the_finish_rates() {
        use clap::{Args, FromArgMatches};
        let command = PreferencesConfig::augment_args(clap::Command::new("test"));
        let config =
            PreferencesConfig::from_arg_matches(&command.get_matches_from(["test"])).unwrap();
        let candidates = Candidates::among(&[samples()], Turns::default().names(), Truncated::Drop);
        let dropped = candidates.dropped.get(&Aspect::ACTION).copied().unwrap_or_default();
        let error = candidates.check(Aspect::ACTION, 0, &dropped, &config).unwrap_err().to_string();
        assert!(error.starts_with("action: 0 pairs left of 1, expected at least 20"), "{error}");
        assert!(
            error.contains("motivation 100.0 %") && error.contains("max_new_tokens"),
            "{error}"
        );
        // Where nothing was cut and nothing left out, neither is advised.
        let nothing = Default::default();
        let error = candidates.check(Aspect::ACTION, 3, &nothing, &config).unwrap_err().to_string();
        assert!(error.contains("use more prompts, or a lower min_pairs"), "{error}");
        assert!(!error.contains("max_new_tokens") && !error.contains("ties ="), "{error}");
    }
}
