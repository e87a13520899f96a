//! Constitutional-AI demonstrations: an initial answer, its critique, its revision, under principles
//! drawn per prompt; and the shipped exemplars.
//!
//! # Source
//!
//! Bai et al. 2022 (arXiv:2212.08073), section 3. Differs from it in the few-shot examples, which
//! show exemplary answers instead of whole critiques: small models imitate the nearest text.

mod config;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail};
use arete_chain::constitution::{Principle, Turns, draw};
use arete_chain::sample::key_of;
use arete_chain::trim::last_sentence;
use arete_records::left_out::LeftOut;
use arete_records::rows::{DemonstrationRow, PromptRow, Round};
use arete_records::{FinishReason, Message, Refusal, Role, files};
use arete_stage::interrupt;
use arete_stage::run::StageSpec;
use serde_json::{Map, Value, json};

use crate::config::Truncated;
use crate::engine::{Chain, Drawing, Engine, FleetEngine, Refused, Reply};
use crate::memory;
use crate::splits;
use crate::stage::{self, Command, Estimate, Place, Work};
use crate::words::Words;
use arete_chain::exemplars::{self, Exemplar, Use};
use arete_stage::units::Units;

pub use self::config::{DemonstrationSource, DemonstrationsConfig, Explained};

/// The stage's name.
pub const STAGE: &str = "demonstrations";

/// The `source` of the model's own revisions.
const REVISED: &str = "self";
/// The `source` of the shipped exemplars.
const OWN: &str = "own";

/// What the stage reads besides its settings.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// Directory (or file) of the prompts; not needed for `own`.
    pub prompts: Option<PathBuf>,
    /// The model that answers and revises; not needed for `own`.
    pub model: Option<String>,
}

/// Runs the stage.
///
/// # Errors
///
/// Unreadable inputs, a model or server that fails, a full disk, a signal.
pub fn run(
    config: &DemonstrationsConfig,
    inputs: &Inputs,
    output: &Path,
    work: &Work,
) -> Result<()> {
    config.check()?;
    let started = Instant::now();
    let material = Material::read(config, inputs)?;
    let place = work.place(|| match config.source.needs_model() {
        true => {
            let engines = config.engines.urls().and_then(<[_]>::first);
            Place::of(&config.compute, config.engine_url.as_ref().or(engines))
        }
        false => Ok(Place::none()),
    })?;
    let Some(run) = stage::begin(spec(config, inputs, output, &material.words)?)? else {
        return Ok(());
    };
    work.check(&run)?;
    material.words.leave(output)?;
    let shard = config.shard;
    let units = Units { output, name: STAGE.to_owned(), n_items: material.prompts.len(), shard };
    match work {
        Work::Adopt { parts, .. } => units.adopt(parts)?,
        Work::Compute => {
            let (missing, n_missing) = units.missing()?;
            if let (Some(model), false) = (&inputs.model, missing.is_empty()) {
                let demand = memory::of_demonstrations(config, material.turns.len())?;
                memory::admit(STAGE, &demand, model, &config.compute)?;
                let engine = open(config, model, Some(output))?;
                let progress =
                    arete_records::progress::start(STAGE, "prompts", material.prompts.len() as u64);
                progress.skip((material.prompts.len() - n_missing) as u64);
                for unit in missing {
                    interrupt::check()?;
                    let prompts = &material.prompts[units.items(unit)];
                    let (rows, left_out) = revise(&engine, &material, prompts, config)?;
                    units.write_with(unit, &rows, &left_out)?;
                    progress.inc(prompts.len() as u64);
                }
            }
        }
    }
    FleetEngine::forget(output)?;
    if shard.is_some() {
        let input = inputs.prompts.clone().unwrap_or_default();
        let config = serde_json::to_value(config).expect("configurations always serialise");
        Command {
            stage: STAGE.to_owned(),
            config,
            input,
            model: inputs.model.clone(),
            original: None,
        }
        .write(output)?;
        return stage::finish(run, STAGE, place, Map::new(), started);
    }
    let turns = &material.turns;
    let own: Vec<DemonstrationRow> = material.own.iter().map(|own| own_row(own, turns)).collect();
    let rows: Vec<DemonstrationRow> = units.join_with(own)?;
    let counts = summary(&rows, material.prompts.len());
    if rows.is_empty() {
        bail!(Refusal::file(
            output,
            "demonstrations",
            "at least one",
            "none: every revision was cut by the token limit (raise max_new_tokens, or \
                    truncated = \"trim\")"
        ));
    }
    splits::write(output, STAGE, &rows, |row| row.split)?;
    stage::finish(run, STAGE, place, counts, started)
}

/// What a run would do, and how long it would take.
///
/// # Errors
///
/// As [`run`]; nothing is written.
pub fn estimate(config: &DemonstrationsConfig, inputs: &Inputs, output: &Path) -> Result<Estimate> {
    config.check()?;
    let material = Material::read(config, inputs)?;
    let units = Units {
        output,
        name: STAGE.to_owned(),
        n_items: material.prompts.len(),
        shard: config.shard,
    };
    let (missing, n_missing) = units.missing()?;
    let n_explained = if config.turns == Explained::Chain { material.turns.len() - 1 } else { 0 };
    let n_turns = 1 + 2 * config.rounds + n_explained;
    let n_new = (n_missing * n_turns * config.sampling.max_new_tokens) as u64;
    let (mut n_prompt_tokens, mut seconds) = (0, None);
    if let (Some(&first), Some(model)) = (missing.first(), &inputs.model) {
        let engine = open(config, model, None)?;
        let mut probe = Vec::new();
        for &unit in &missing {
            for prompt in &material.prompts[units.items(unit)] {
                let trail = material.trail(prompt, config)?;
                n_prompt_tokens += engine.n_tokens(&trail.messages)?.unwrap_or(0) as u64;
                if unit == first {
                    probe.push(Chain { questions: Vec::new(), ..trail });
                }
            }
        }
        if matches!(engine, Engine::Local(_)) && config.engines.urls().is_none() {
            let mut drawing = config.sampling.drawing();
            drawing.max_new_tokens = drawing.max_new_tokens.min(8);
            let started = Instant::now();
            let replies = engine.chains(&probe, &drawing)?;
            let n_sampled: usize =
                replies.iter().flatten().flatten().map(|reply| reply.n_tokens).sum();
            let per_token_s = started.elapsed().as_secs_f64() / n_sampled.max(1) as f64;
            seconds = Some((n_new as f64 * per_token_s).ceil());
        }
    }
    let mut counts = Map::new();
    counts.insert("own".to_owned(), json!(material.own.len()));
    counts.insert("prompts".to_owned(), json!(material.prompts.len()));
    counts.insert("prompts_to_do".to_owned(), json!(n_missing));
    let demand = memory::of_demonstrations(config, material.turns.len())?;
    let memory = memory::of_stage(demand, inputs.model.as_deref(), &config.compute)?;
    let n_tokens = Some(n_prompt_tokens + n_new);
    Ok(Estimate { stage: STAGE, counts, n_tokens, seconds, memory })
}

/// Everything read from files.
struct Material {
    prompts: Vec<PromptRow>,
    words: Words,
    turns: Turns,
    /// Exemplary answers shown before the question.
    shots: Vec<Message>,
    /// Exemplars that become demonstrations as they are.
    own: Vec<Exemplar>,
}

impl Material {
    fn read(config: &DemonstrationsConfig, inputs: &Inputs) -> Result<Self> {
        let words = Words::of(config.constitution.as_deref(), None)?;
        let turns = words.turns();
        let (prompts, shots, own) = (Vec::new(), Vec::new(), Vec::new());
        let mut material = Self { prompts, words, turns, shots, own };
        let turns = &material.turns;
        if config.source.needs_exemplars() {
            material.own = exemplars::load(&config.exemplars, Use::Sft, turns)?;
            if material.own.is_empty() {
                bail!(Refusal::file(
                    &config.exemplars,
                    "use",
                    "at least one exemplar with use = \"sft\"",
                    "none"
                ));
            }
        }
        if !config.source.needs_model() {
            return Ok(material);
        }
        let (Some(prompts), Some(_)) = (&inputs.prompts, &inputs.model) else {
            bail!(Refusal::setting(
                "source",
                "--prompts and --model for the model's own revisions",
                "one of them missing (source = \"own\" needs neither)"
            ));
        };
        material.prompts = stage::rows_of(prompts, "prompts")?;
        material.words.constitution()?;
        if config.few_shot > 0 {
            let shots = exemplars::load(&config.exemplars, Use::FewShot, turns)?;
            if shots.len() < config.few_shot {
                bail!(Refusal::setting(
                    "few_shot",
                    format!("at most the {} few-shot exemplars there are", shots.len()),
                    config.few_shot
                ));
            }
            for shot in &shots[..config.few_shot] {
                material.shots.push(Message::user(shot.prompt.trim()));
                material.shots.push(Message::assistant(shot.replies.answer(turns)));
            }
        }
        Ok(material)
    }

    /// The prompt after the examples; a prompt's own system message leads.
    fn shown(&self, prompt: &[Message]) -> Vec<Message> {
        let n_system = prompt.iter().take_while(|message| message.role == Role::System).count();
        let (system, rest) = prompt.split_at(n_system);
        system.iter().chain(&self.shots).chain(rest).cloned().collect()
    }

    /// Initial answer, then critique and revision for every round, as one chain.
    fn trail(&self, prompt: &PromptRow, config: &DemonstrationsConfig) -> Result<Chain> {
        let questions = (self.principles(prompt, config)?.into_iter())
            .flat_map(|principle| [principle.critique.clone(), principle.revision.clone()])
            .collect();
        Ok(Chain {
            messages: self.shown(&prompt.prompt),
            questions,
            key: key_of(&prompt.prompt_id),
            samples: vec![0],
        })
    }

    /// The principle of every round.
    fn principles(
        &self,
        prompt: &PromptRow,
        config: &DemonstrationsConfig,
    ) -> Result<Vec<&Principle>> {
        let fitting = self.words.constitution()?.fitting(self.turns.answer())?;
        let seed = config.sampling.seed;
        Ok((0..config.rounds).map(|round| draw(&fitting, &prompt.prompt_id, seed, round)).collect())
    }
}

fn spec<'a>(
    config: &DemonstrationsConfig,
    inputs: &Inputs,
    output: &'a Path,
    words: &Words,
) -> Result<StageSpec<'a>> {
    let mut settings = crate::config::recorded(config);
    let mut files = Vec::new();
    if config.source.needs_model() {
        if let Some(prompts) = &inputs.prompts {
            files.push(("prompts".to_owned(), stage::file_of(prompts, "prompts")));
        }
        if let Some(model) = &inputs.model {
            let remote = config.engine_url.is_some();
            crate::config::record_model("model", model, remote, &mut settings, &mut files)?;
        }
    }
    let are_read = config.source.needs_model();
    files.extend(words.input(are_read)?.map(|path| ("constitution".to_owned(), path)));
    if config.source.needs_exemplars() || config.few_shot > 0 {
        files.push(("exemplars".to_owned(), files::shipped(&config.exemplars)));
    }
    Ok(StageSpec {
        stage: STAGE,
        output,
        config: settings,
        seed: config.sampling.seed,
        inputs: files,
    })
}

fn open(config: &DemonstrationsConfig, model: &str, output: Option<&Path>) -> Result<Engine> {
    let url = config.engine_url.as_ref();
    stage::open_sampler(model, url, &config.engines, &config.compute, &config.server, output)
}

/// A shipped exemplar as a demonstration.
fn own_row(exemplar: &Exemplar, turns: &Turns) -> DemonstrationRow {
    DemonstrationRow {
        prompt_id: exemplar.prompt_id(),
        split: exemplar.split(),
        source: OWN.to_owned(),
        initial: exemplar
            .worse
            .as_ref()
            .map(|worse| worse.answer(turns).to_owned())
            .unwrap_or_default(),
        rounds: Vec::new(),
        messages: exemplar.conversation(turns),
    }
}

/// The demonstrations of a unit's prompts, those left out whose revision cannot be used; and the prompts that have none
/// because the model or its server would not take them.
fn revise(
    engine: &Engine,
    material: &Material,
    prompts: &[PromptRow],
    config: &DemonstrationsConfig,
) -> Result<(Vec<DemonstrationRow>, Vec<LeftOut>)> {
    let drawing = config.sampling.drawing();
    let (mut chains, mut owners) = (Vec::new(), Vec::new());
    let (mut left_out, mut refused) = (Vec::new(), Vec::new());
    for prompt in prompts {
        let chain = material.trail(prompt, config)?;
        if engine.fits(&chain, drawing.max_new_tokens)? {
            owners.push(prompt);
            chains.push(chain);
        } else {
            tracing::warn!(
                prompt_id = prompt.prompt_id,
                "prompt and replies exceed the model's positions, left out"
            );
            let reason = "prompt and replies exceed the model's positions";
            left_out.push(LeftOut::new(&prompt.prompt_id, reason));
        }
    }
    let mut rows = Vec::new();
    for (prompt, outcome) in owners.into_iter().zip(engine.outcomes(&chains, &drawing)?) {
        let samples = match outcome {
            Ok(samples) => samples,
            Err(Refused(reason)) => {
                refused.push(LeftOut::new(&prompt.prompt_id, reason));
                continue;
            }
        };
        let mut replies = samples.into_iter().flatten();
        let initial = replies.next().expect("a chain has a first reply");
        let mut rounds = Vec::new();
        let mut last = None;
        for principle in material.principles(prompt, config)? {
            let critique = replies.next().expect("a critique for every round");
            let revision = replies.next().expect("a revision for every round");
            rounds.push(Round {
                principle: principle.id.clone(),
                critique: critique.text,
                revision: revision.text.clone(),
            });
            last = Some(revision);
        }
        let last = last.expect("at least one round: checked in Material::read");
        let Some(answer) = usable(last, config.truncated) else { continue };
        let mut messages = prompt.prompt.clone();
        messages.push(Message::assistant(answer));
        rows.push(DemonstrationRow {
            prompt_id: prompt.prompt_id.clone(),
            split: prompt.split,
            source: REVISED.to_owned(),
            initial: initial.text,
            rounds,
            messages,
        });
    }
    if config.turns == Explained::Chain && material.turns.len() > 1 {
        rows = explain(engine, rows, &material.turns, &drawing, config.truncated, &mut refused)?;
    }
    stage::check_refused(engine.name(), &refused, prompts.len())?;
    for LeftOut { item, reason } in &refused {
        tracing::warn!(prompt_id = item, reason, "refused by the server, left out");
    }
    left_out.extend(refused);
    Ok((rows, left_out))
}

/// A reply's text as a demonstration may have it.
fn usable(reply: Reply, truncated: Truncated) -> Option<String> {
    let text = match (reply.finish_reason, truncated) {
        (FinishReason::Stop, _) | (_, Truncated::Keep) => Some(reply.text),
        (FinishReason::Length, Truncated::Trim) => last_sentence(&reply.text).map(str::to_owned),
        (FinishReason::Length, Truncated::Drop) => None,
    };
    text.filter(|text| !text.trim().is_empty())
}

/// Adds the replies to the further questions, as the model gives them of the revised answer.
fn explain(
    engine: &Engine,
    rows: Vec<DemonstrationRow>,
    turns: &Turns,
    drawing: &Drawing,
    truncated: Truncated,
    refused: &mut Vec<LeftOut>,
) -> Result<Vec<DemonstrationRow>> {
    let questions = turns.questions();
    let chains: Vec<Chain> = rows
        .iter()
        .map(|row| {
            let mut messages = row.messages.clone();
            messages.push(Message::user(questions[0]));
            Chain {
                messages,
                questions: questions[1..].iter().map(|&question| question.to_owned()).collect(),
                key: key_of(&row.prompt_id),
                samples: vec![1], // another stream than the revision's
            }
        })
        .collect();
    let mut out = Vec::new();
    for (mut row, outcome) in rows.into_iter().zip(engine.outcomes(&chains, drawing)?) {
        let samples = match outcome {
            Ok(samples) => samples,
            Err(Refused(reason)) => {
                refused.push(LeftOut::new(&row.prompt_id, reason));
                continue;
            }
        };
        let texts: Option<Vec<String>> =
            samples.into_iter().flatten().map(|reply| usable(reply, truncated)).collect();
        let Some(texts) = texts else { continue };
        for (question, text) in questions.iter().zip(texts) {
            row.messages.push(Message::user(*question));
            row.messages.push(Message::assistant(text));
        }
        out.push(row);
    }
    Ok(out)
}

fn summary(rows: &[DemonstrationRow], n_prompts: usize) -> Map<String, Value> {
    let (revised, own): (Vec<_>, Vec<_>) = rows.iter().partition(|row| row.source == REVISED);
    let unchanged = revised
        .iter()
        .filter(|row| row.rounds.last().is_some_and(|round| round.revision == row.initial))
        .count();
    let left_out = n_prompts - revised.len();
    tracing::info!(own = own.len(), revised = revised.len(), unchanged, left_out, "demonstrations");
    let mut counts = Map::new();
    counts.insert(OWN.to_owned(), json!(own.len()));
    counts.insert(REVISED.to_owned(), json!(revised.len()));
    counts.insert("unchanged_by_revision".to_owned(), json!(unchanged));
    counts.insert("left_out".to_owned(), json!(left_out));
    counts
}
