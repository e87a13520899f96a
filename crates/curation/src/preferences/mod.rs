//! Judged pairs: every virtue's verdict on the two samples of a prompt, for every aspect; votes to
//! scores, scores to chosen and rejected.

mod candidates;
mod config;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use arete_chain::Constitution;
use arete_chain::verdicts::Verdicts;
use arete_records::rows::{JudgementRow, PreferenceRow};
use arete_records::{Aspect, Split, Virtue, parquet};
use arete_stage::interrupt;
use arete_stage::run::StageSpec;
use serde_json::{Map, Value, json};

use crate::Error;
use crate::config::Truncated;
use crate::conversations;
use crate::engine::Engine;
use crate::judge::Method;
use crate::judge::verdict::{Tally, Verdict, vote};
use crate::judge::{Judge, Pair};
use crate::stage::{self, Command, Estimate, Place, Work, percent};
use crate::words::Words;
use arete_chain::exemplars::{self, Use};
use arete_stage::units::Units;

use self::candidates::{Candidate, Candidates, Dropped, Samples, samples_of};
pub use self::config::{PreferencesConfig, Ties};

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
pub fn run(
    config: &PreferencesConfig,
    inputs: &Inputs,
    output: &Path,
    work: &Work,
) -> Result<(), Error> {
    let started = Instant::now();
    let words = words(config, inputs)?;
    let prompts = samples_of(&inputs.conversations, &words.turns())?;
    let candidates = Candidates::of(&prompts, &words.turns(), config.truncated);
    let place = work.place(|| match config.method {
        Method::Contrast => Ok(Place::none()),
        _ => Place::of(&config.judge.compute, config.judge.judge_url.as_deref()),
    })?;
    let Some(run) = stage::begin(spec(config, inputs, output, &words)?)? else {
        return Ok(());
    };
    work.check(&run)?;
    words.leave(output)?;
    for &aspect in &candidates.aspects {
        // Better now than after hours of judging.
        let dropped = candidates.dropped.get(&aspect).copied().unwrap_or_default();
        candidates.check(aspect, candidates.n_left(aspect), &dropped, config)?;
    }
    let shard = config.shard;
    let units = Units { output, name: JUDGEMENTS.to_owned(), n_items: prompts.len(), shard };
    match work {
        Work::Adopt { parts, .. } => units.adopt(parts)?,
        Work::Compute => {
            let (missing, n_missing) = units.missing();
            let tribunal = Tribunal::open(config, inputs, &words, !missing.is_empty())?;
            let judge = tribunal.judge(config)?;
            let progress =
                arete_records::progress::start("judging", "prompts", prompts.len() as u64);
            progress.skip((prompts.len() - n_missing) as u64);
            units.run::<_, Error>(|items| {
                interrupt::check()?;
                let n_items = items.len() as u64;
                let chosen: Vec<&Candidate> =
                    candidates.all.iter().filter(|c| items.contains(&c.prompt)).collect();
                let rows = judgements(&chosen, &prompts, judge.as_ref(), &words.virtues(), config)?;
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
    let rows: Vec<JudgementRow> = units.join()?;
    let mut counts = Map::new();
    counts.insert("prompts".to_owned(), json!(prompts.len()));
    counts.insert("judgements".to_owned(), json!(rows.len()));
    let virtues = words.virtues();
    for &aspect in &candidates.aspects {
        let (pairs, dropped) = pairs_of(aspect, &candidates, &prompts, &rows, config);
        candidates.check(aspect, pairs.len(), &dropped, config)?;
        write_splits(output, aspect, &prompts, &pairs)?;
        let figures = summary(aspect, &rows, &virtues, &pairs, &dropped, &prompts);
        counts.insert(aspect.name().to_owned(), figures);
    }
    let table = summary_table(&counts, &candidates.aspects, &virtues);
    tracing::info!("preferences\n{table}");
    stage::finish(run, STAGE, place, counts, started)
}

/// What a run would do, and how long it would take.
///
/// # Errors
///
/// As [`run`]; nothing is written.
pub fn estimate(
    config: &PreferencesConfig,
    inputs: &Inputs,
    output: &Path,
) -> Result<Estimate, Error> {
    let words = words(config, inputs)?;
    let prompts = samples_of(&inputs.conversations, &words.turns())?;
    let candidates = Candidates::of(&prompts, &words.turns(), config.truncated);
    let units =
        Units { output, name: JUDGEMENTS.to_owned(), n_items: prompts.len(), shard: config.shard };
    let (missing, n_missing) = units.missing();
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
    Ok(Estimate { stage: STAGE, counts, n_tokens, seconds })
}

/// The constitution given, or carried by the conversations.
fn words(config: &PreferencesConfig, inputs: &Inputs) -> Result<Words, Error> {
    Words::of(config.judge.constitution.as_deref(), Some(&inputs.conversations))
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
    ) -> Result<Self, Error> {
        let mut tribunal = Self { engine: None, constitution: None, exemplars: Vec::new() };
        if config.method == Method::Contrast || !needed {
            return Ok(tribunal);
        }
        let judge = &config.judge;
        let model = inputs.judge.as_deref().ok_or_else(|| Error::Setting {
            name: "judge",
            expected: format!("a model for the method {}", config.method.name()),
            got: "none".to_owned(),
        })?;
        tribunal.constitution = Some(words.constitution()?);
        if judge.few_shot > 0 {
            tribunal.exemplars = exemplars::load(&judge.exemplars, Use::FewShot, &words.turns())?;
        }
        tribunal.engine = Some(stage::open_engine(
            model,
            judge.judge_adapter.as_deref(),
            judge.judge_url.as_deref(),
            &judge.compute,
            &judge.server,
            config.method.needs_logprobs(),
        )?);
        Ok(tribunal)
    }

    fn judge<'a>(&'a self, config: &'a PreferencesConfig) -> Result<Option<Judge<'a>>, Error> {
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
) -> Result<StageSpec<'a>, Error> {
    let mut settings = crate::config::recorded(config);
    let conversations = stage::file_of(&inputs.conversations, conversations::STAGE);
    let mut files = vec![(conversations::STAGE.to_owned(), conversations)];
    let are_read = config.method != Method::Contrast;
    files.extend(words.input(are_read)?.map(|path| ("constitution".to_owned(), path)));
    if config.method != Method::Contrast {
        let judge = &config.judge;
        if judge.few_shot > 0 {
            files.push(("exemplars".to_owned(), judge.exemplars.clone()));
        }
        if let Some(adapter) = &judge.judge_adapter {
            files.push(("judge_adapter".to_owned(), adapter.clone()));
        }
        if let Some(model) = &inputs.judge {
            let remote = judge.judge_url.is_some();
            crate::config::record_model("judge", model, remote, &mut settings, &mut files)?;
        }
    }
    Ok(StageSpec { stage: STAGE, output, config: settings, seed: config.judge.seed, inputs: files })
}

/// Every virtue's verdict on the candidates of a unit.
fn judgements(
    candidates: &[&Candidate],
    prompts: &[Samples],
    judge: Option<&Judge<'_>>,
    virtues: &[Virtue],
    config: &PreferencesConfig,
) -> Result<Vec<JudgementRow>, Error> {
    let verdicts = match judge {
        Some(judge) => {
            let pairs: Vec<Pair> =
                candidates.iter().map(|candidate| candidate.pair.clone()).collect();
            let verdicts = judge.verdicts(&pairs)?;
            if config.min_pairs > 0 {
                judge.check_heard(&verdicts)?;
            }
            verdicts
        }
        None => candidates
            .iter()
            .map(|candidate| {
                by_construction(&prompts[candidate.prompt])
                    .map(|verdict| vec![verdict; virtues.len()])
            })
            .collect::<Result<_, _>>()?,
    };
    let name = judge.map_or("construction", Judge::name);
    let mut rows = Vec::new();
    for (candidate, verdicts) in candidates.iter().zip(verdicts) {
        let sample = &prompts[candidate.prompt].samples[0];
        for (&virtue, verdict) in virtues.iter().zip(verdicts) {
            let verdict = if config.flip { verdict.flipped() } else { verdict };
            let stored = |p: Option<f64>| p.map(|p| p as f32);
            rows.push(JudgementRow {
                prompt_id: sample.prompt_id.clone(),
                split: sample.split,
                aspect: candidate.aspect,
                virtue,
                method: config.method.name().to_owned(),
                judge: name.to_owned(),
                p_ab: stored(verdict.p_ab),
                p_ba: stored(verdict.p_ba),
                p_sample0: stored(verdict.p_sample0),
                vote: vote(verdict.p_sample0, config.tie_margin),
            });
        }
    }
    Ok(rows)
}

/// The verdict of contrastive sampling: the sample of the virtuous persona or of the tuned model, for certain.
fn by_construction(samples: &Samples) -> Result<Verdict, Error> {
    let personas = [0, 1].map(|s| samples.samples[s].persona.as_deref());
    let better = match personas {
        [Some(conversations::VIRTUOUS), Some(conversations::VICIOUS)]
        | [Some(conversations::TUNED), Some(conversations::ORIGINAL)] => 0,
        [Some(conversations::VICIOUS), Some(conversations::VIRTUOUS)]
        | [Some(conversations::ORIGINAL), Some(conversations::TUNED)] => 1,
        other => {
            return Err(Error::Setting {
                name: "method",
                expected:
                    "conversations sampled with personas = \"contrast\" or \"original\" for the \
                           method contrast"
                        .to_owned(),
                got: format!("personas {other:?} of prompt {}", samples.samples[0].prompt_id),
            });
        }
    };
    Ok(Verdict { p_ab: None, p_ba: None, p_sample0: Some(if better == 0 { 1.0 } else { 0.0 }) })
}

/// The preferences of one aspect, and what was left out.
fn pairs_of(
    aspect: Aspect,
    candidates: &Candidates,
    prompts: &[Samples],
    judgements: &[JudgementRow],
    config: &PreferencesConfig,
) -> (Vec<PreferenceRow>, Dropped) {
    let mut by_prompt: HashMap<&str, Vec<&JudgementRow>> = HashMap::new();
    for row in judgements.iter().filter(|row| row.aspect == aspect) {
        by_prompt.entry(&row.prompt_id).or_default().push(row);
    }
    let mut dropped = candidates.dropped.get(&aspect).copied().unwrap_or_default();
    let mut pairs = Vec::new();
    for candidate in candidates.all.iter().filter(|candidate| candidate.aspect == aspect) {
        let samples = &prompts[candidate.prompt];
        let prompt_id = &samples.samples[0].prompt_id;
        let own = by_prompt.get(prompt_id.as_str()).map_or(&[][..], Vec::as_slice);
        let tally = Tally::of(own.iter().copied());
        match prefer(candidate, samples, &tally, config.ties, config.truncated) {
            Some(pair) => pairs.push(pair),
            None => {
                dropped.ties += 1;
                dropped.abstained += usize::from(tally.p_sample0.is_none());
            }
        }
    }
    (pairs, dropped)
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
    let truncated = samples.truncated(candidate.aspect).map(open);
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
fn write_splits(
    output: &Path,
    aspect: Aspect,
    prompts: &[Samples],
    pairs: &[PreferenceRow],
) -> Result<(), Error> {
    let splits: HashMap<&str, Split> = prompts
        .iter()
        .map(|samples| (samples.samples[0].prompt_id.as_str(), samples.samples[0].split))
        .collect();
    let dir = output.join(aspect.name());
    fs_err::create_dir_all(&dir)?;
    for split in Split::ALL {
        let rows: Vec<PreferenceRow> =
            pairs.iter().filter(|pair| splits[pair.prompt_id.as_str()] == split).cloned().collect();
        if rows.is_empty() {
            tracing::warn!(aspect = aspect.name(), split = split.name(), "no pairs in this split");
            continue;
        }
        parquet::write(dir.join(format!("{}.parquet", split.name())), &rows)?;
    }
    Ok(())
}

/// The figures by which a judge's work on an aspect is known.
fn summary(
    aspect: Aspect,
    judgements: &[JudgementRow],
    virtues: &[Virtue],
    pairs: &[PreferenceRow],
    dropped: &Dropped,
    prompts: &[Samples],
) -> Value {
    let own: Vec<&JudgementRow> = judgements.iter().filter(|row| row.aspect == aspect).collect();
    let n_judged = own.len() / virtues.len();
    let n_cut = prompts.iter().flat_map(|s| s.truncated(aspect)).filter(|&cut| cut).count();
    let verdicts = Verdicts::of(own.iter().copied());
    let mut votes = Map::new();
    for virtue in virtues {
        let of = |wanted: Option<i32>| {
            own.iter().filter(|row| row.virtue == *virtue && row.vote == wanted).count()
        };
        let (zero, one, none) = (of(Some(0)), of(Some(1)), of(None));
        votes.insert(
            virtue.name().to_owned(),
            json!({"sample_0": zero, "sample_1": one, "none": none}),
        );
    }
    json!({
        "pairs": pairs.len(), "judged": n_judged, "ties": dropped.ties,
        "tie_percent": percent(dropped.ties, n_judged),
        "dropped_truncated": dropped.truncated, "dropped_untrimmable": dropped.untrimmable,
        "dropped_identical": dropped.identical, "truncated_replies": n_cut,
        "truncated_percent": percent(n_cut, 2 * prompts.len()),
        "first_position_percent": percent(verdicts.first, verdicts.seen),
        "swap_consistency_percent": percent(verdicts.consistent, verdicts.both),
        "abstained": verdicts.abstained, "abstained_percent": percent(verdicts.abstained, own.len()),
        "votes": votes,
    })
}

/// The summary of every aspect as one table: a figure a row, an aspect a column.
fn summary_table(counts: &Map<String, Value>, aspects: &[Aspect], virtues: &[Virtue]) -> String {
    const FIGURES: [(&str, &str); 10] = [
        ("pairs", "pairs"),
        ("pairs judged", "judged"),
        ("ties, %", "tie_percent"),
        ("replies cut by the token limit, %", "truncated_percent"),
        ("pairs left out for that", "dropped_truncated"),
        ("pairs without a sentence to trim to", "dropped_untrimmable"),
        ("pairs of equal samples", "dropped_identical"),
        ("first-shown preferred, %", "first_position_percent"),
        ("same verdict in both orders, %", "swap_consistency_percent"),
        ("verdicts abstained, %", "abstained_percent"),
    ];
    let heads: Vec<&str> =
        std::iter::once("").chain(aspects.iter().map(|aspect| aspect.name())).collect();
    let row = |name: String, cell: &dyn Fn(&Value) -> String| {
        let cells = aspects.iter().map(|aspect| cell(&counts[aspect.name()]));
        std::iter::once(name).chain(cells).collect::<Vec<String>>()
    };
    let mut rows: Vec<Vec<String>> = FIGURES
        .iter()
        .map(|(name, key)| row((*name).to_owned(), &|figures| stage::cell(&figures[*key])))
        .collect();
    for virtue in virtues {
        rows.push(row(format!("votes on {virtue}, sample 0 : 1 : none"), &|figures| {
            let votes = &figures["votes"][virtue.name()];
            format!("{} : {} : {}", votes["sample_0"], votes["sample_1"], votes["none"])
        }));
    }
    stage::table(&heads, &rows)
}

#[cfg(test)]
mod tests {
    use arete_chain::Turns;
    use arete_records::rows::{ConversationRow, TurnRow};
    use arete_records::{FinishReason, Message, Role};

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
        Samples { samples: [zero, one], n_prompt: 1 }
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
        let drop = Candidates::of(&prompts, &Turns::default(), Truncated::Drop);
        assert_eq!(Aspect::SHIPPED.map(|aspect| drop.n_left(aspect)), [0, 1, 0]);
        assert_eq!(texts(&drop.all[0].pair.sides[0]), ["Go on. And", "M0."]);
        assert_eq!(drop.finish_rates, "action 50.0 %, motivation 100.0 %, consequence 50.0 %");
    }

    #[test]
    fn trimming_cuts_every_cut_reply_and_keeping_none() {
        let prompts = [samples()];
        let trim = Candidates::of(&prompts, &Turns::default(), Truncated::Trim);
        // The consequence of sample 0 has no full sentence.
        assert_eq!(Aspect::SHIPPED.map(|aspect| trim.n_left(aspect)), [1, 1, 0]);
        assert_eq!(trim.dropped[&Aspect::CONSEQUENCE].untrimmable, 1);
        assert_eq!(texts(&trim.all[0].pair.sides[0]), ["Go on."]);
        assert_eq!(texts(&trim.all[1].pair.sides[0]), ["Go on.", "M0."]);
        let keep = Candidates::of(&prompts, &Turns::default(), Truncated::Keep);
        assert_eq!(Aspect::SHIPPED.map(|aspect| keep.n_left(aspect)), [1, 1, 1]);
        assert_eq!(texts(&keep.all[2].pair.sides[0]), ["Go on. And", "M0.", "C0 no end"]);
    }

    #[test]
    fn the_side_with_more_votes_is_chosen_and_carries_its_own_turns() {
        let prompts = [samples()];
        let candidates = Candidates::of(&prompts, &Turns::default(), Truncated::Keep);
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
        let trimmed = Candidates::of(&prompts, &Turns::default(), Truncated::Trim);
        let closed =
            prefer(&trimmed.all[0], &prompts[0], &tally, Ties::Drop, Truncated::Trim).unwrap();
        assert_eq!(texts(&closed.rejected), ["Go on."]);
        assert_eq!((closed.truncated_chosen, closed.truncated_rejected), (false, false));
    }

    #[test]
    fn a_tie_is_dropped_or_decided_by_probability() {
        let prompts = [samples()];
        let candidates = Candidates::of(&prompts, &Turns::default(), Truncated::Keep);
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
        let candidates = Candidates::of(&prompts, &Turns::default(), Truncated::Keep);
        let mut counts = Map::new();
        for aspect in Aspect::SHIPPED {
            let dropped = &candidates.dropped[&aspect];
            let figures = summary(aspect, &[], &Virtue::SHIPPED, &[], dropped, &prompts);
            counts.insert(aspect.name().to_owned(), figures);
        }
        let table = summary_table(&counts, &Aspect::SHIPPED, &Virtue::SHIPPED);
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
        let candidates = Candidates::of(&[samples()], &Turns::default(), Truncated::Drop);
        let dropped = candidates.dropped.get(&Aspect::ACTION).copied().unwrap_or_default();
        let error =
            candidates.check(Aspect::ACTION, 0, &dropped, &config).unwrap_err().to_string();
        assert!(error.starts_with("action: 0 pairs left of 1, expected at least 20"), "{error}");
        assert!(
            error.contains("motivation 100.0 %") && error.contains("max_new_tokens"),
            "{error}"
        );
    }
}
