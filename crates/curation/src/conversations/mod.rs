//! Two or more samples of the chain for every prompt: the answer, and a reply to each further question of the constitution.

mod config;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail};
use arete_chain::constitution::{Personas, Turns};
use arete_chain::sample::key_of;
use arete_records::left_out::LeftOut;
use arete_records::rows::{ConversationRow, PromptRow, TurnRow};
use arete_records::{At, Refusal};
use arete_stage::interrupt;
use arete_stage::run::StageSpec;
use serde_json::{Map, Value, json};

use crate::engine::{Chain, Drawing, Engine, FleetEngine, Outcome, Refused, Reply};
use crate::judge::under_persona;
use crate::memory;
use crate::splits;
use crate::stage::{self, Command, Estimate, Place, Work, percent};
use crate::words::Words;
use arete_stage::units::Units;

pub use self::config::{ConversationsConfig, PersonaChoice};

/// The stage's name.
pub const STAGE: &str = "conversations";

/// Units sampled in one go: sequences of the next unit enter as those of the last one end, so that the
/// batch stays full.
const GROUP: usize = 16;

/// Most conversations a prompt: every pair of them is judged.
pub const MOST_SAMPLES: usize = 8;

/// Name recorded for the sample drawn under the virtuous persona.
pub const VIRTUOUS: &str = "virtuous";
/// Name recorded for the sample drawn under the vicious persona.
pub const VICIOUS: &str = "vicious";
/// Name recorded for the sample drawn from the model, where the other is from the original.
pub const TUNED: &str = "tuned";
/// Name recorded for the sample drawn from the original model.
pub const ORIGINAL: &str = "original";

/// What the stage reads besides its settings.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// Directory (or file) of the prompts.
    pub prompts: PathBuf,
    /// The model that talks.
    pub model: String,
    /// The model before SFT; needed by [`PersonaChoice::Original`] alone.
    pub original: Option<String>,
}

/// How the two samples of a prompt differ.
enum Contrast {
    /// By chance alone; there are so many of them.
    Chance(u64),
    /// By the system prompt.
    Personas(Personas),
    /// By the model.
    Models,
}

impl Contrast {
    fn of(config: &ConversationsConfig, words: &Words) -> Result<Self> {
        Ok(match config.personas {
            PersonaChoice::None => Self::Chance(config.samples_per_prompt as u64),
            PersonaChoice::Contrast => Self::Personas(words.constitution()?.personas()?.clone()),
            PersonaChoice::Original => Self::Models,
        })
    }

    /// What a sample is recorded as.
    fn name(&self, sample: u64) -> Option<&'static str> {
        let names = match self {
            Self::Chance(_) => return None,
            Self::Personas(_) => [VIRTUOUS, VICIOUS],
            Self::Models => [TUNED, ORIGINAL],
        };
        Some(names[usize::from(sample != 0)])
    }
}

/// What draws the samples.
struct Engines {
    /// All of them, or the first of each prompt.
    model: Engine,
    /// The second of each prompt, if it is another model's.
    original: Option<Engine>,
}

impl Engines {
    fn open(config: &ConversationsConfig, inputs: &Inputs, output: Option<&Path>) -> Result<Self> {
        let url = config.engine_url.as_ref();
        let urls = url.map(std::slice::from_ref);
        let (compute, server) = (&config.compute, &config.server);
        let original = original(config, inputs)?;
        // Servers hold the model; the one before SFT talks here.
        let open = |name: &str| stage::open_engine(name, None, urls, compute, server, false);
        let original = original.map(open).transpose()?;
        let engines = &config.engines;
        let model = stage::open_sampler(&inputs.model, url, engines, compute, server, output)?;
        Ok(Self { model, original })
    }

    /// The one that continues a chain.
    fn of(&self, chain: &Chain) -> &Engine {
        match &self.original {
            Some(original) if chain.samples == [1] => original,
            _ => &self.model,
        }
    }

    /// [`Engine::chains_each`], each chain by its own model.
    fn chains_each(
        &self,
        chains: &[Chain],
        drawing: &Drawing,
        done: &mut dyn FnMut(usize, Outcome) -> Result<()>,
    ) -> Result<()> {
        let Some(original) = &self.original else {
            return self.model.chains_each(chains, drawing, done);
        };
        for engine in [&self.model, original] {
            let is_own = |&idx: &usize| std::ptr::eq(self.of(&chains[idx]), engine);
            let places: Vec<usize> = (0..chains.len()).filter(is_own).collect();
            let own: Vec<Chain> = places.iter().map(|&idx| chains[idx].clone()).collect();
            engine.chains_each(&own, drawing, &mut |idx, replies| done(places[idx], replies))?;
        }
        Ok(())
    }
}

/// The model of the second samples, if that is another one.
fn original<'a>(config: &ConversationsConfig, inputs: &'a Inputs) -> Result<Option<&'a str>> {
    match (config.personas, &inputs.original) {
        (PersonaChoice::Original, Some(original)) => Ok(Some(original)),
        (PersonaChoice::Original, None) => Err(Refusal::setting(
            "original",
            "the model before SFT (--original MODEL), which personas = \"original\" needs"
                .to_owned(),
            "none",
        )
        .into()),
        _ => Ok(None),
    }
}

/// Runs the stage.
///
/// # Errors
///
/// Unreadable inputs, a model or server that fails, a full disk, a signal.
pub fn run(
    config: &ConversationsConfig,
    inputs: &Inputs,
    output: &Path,
    work: &Work,
) -> Result<()> {
    config.check()?;
    let started = Instant::now();
    let prompts: Vec<PromptRow> = stage::rows_of(&inputs.prompts, "prompts")?;
    check_ids(&inputs.prompts, &prompts)?;
    let words = Words::of(config.constitution.as_deref(), None)?;
    let turns = words.turns();
    let contrast = Contrast::of(config, &words)?;
    original(config, inputs)?;
    let server = config.engine_url.as_ref().or(config.engines.urls().and_then(<[_]>::first));
    let place = work.place(|| Place::of(&config.compute, server))?;
    let Some(run) = stage::begin(spec(config, inputs, output, &words)?)? else { return Ok(()) };
    work.check(&run)?;
    words.leave(output)?;
    let shard = config.shard;
    let units = Units { output, name: STAGE.to_owned(), n_items: prompts.len(), shard };
    match work {
        Work::Adopt { parts, .. } => units.adopt(parts)?,
        Work::Compute => {
            let (missing, n_missing) = units.missing()?;
            if !missing.is_empty() {
                let demand = memory::of_conversations(config, turns.len())?;
                memory::admit(STAGE, &demand, &inputs.model, &config.compute)?;
                let engines = Engines::open(config, inputs, Some(output))?;
                let progress =
                    arete_records::progress::start(STAGE, "prompts", prompts.len() as u64);
                progress.skip((prompts.len() - n_missing) as u64);
                for group in missing.chunks(GROUP) {
                    interrupt::check()?;
                    let drawing = config.sampling.drawing();
                    let asked = Asked { contrast: &contrast, turns: &turns, drawing };
                    sample(&engines, &prompts, &units, group, &asked, &progress)?;
                }
            }
        }
    }
    FleetEngine::forget(output)?;
    if shard.is_some() {
        Command {
            stage: STAGE.to_owned(),
            config: serde_json::to_value(config).expect("configurations always serialise"),
            input: inputs.prompts.clone(),
            model: Some(inputs.model.clone()),
            original: inputs.original.clone(),
        }
        .write(output)?;
        return stage::finish(run, STAGE, place, Map::new(), started);
    }
    let rows: Vec<ConversationRow> = units.join()?;
    let counts = summary(&rows, &turns, prompts.len(), config.samples_per_prompt);
    splits::write(output, STAGE, &rows, |row| row.split)?;
    stage::finish(run, STAGE, place, counts, started)
}

/// What a run would do, and how long it would take.
///
/// # Errors
///
/// As [`run`]; nothing is written.
pub fn estimate(config: &ConversationsConfig, inputs: &Inputs, output: &Path) -> Result<Estimate> {
    config.check()?;
    let prompts: Vec<PromptRow> = stage::rows_of(&inputs.prompts, "prompts")?;
    let words = Words::of(config.constitution.as_deref(), None)?;
    let turns = words.turns();
    let contrast = Contrast::of(config, &words)?;
    let units =
        Units { output, name: STAGE.to_owned(), n_items: prompts.len(), shard: config.shard };
    let (missing, n_missing) = units.missing()?;
    let engines = Engines::open(config, inputs, None)?;
    let chains = |items: &[PromptRow]| -> Vec<Chain> {
        items.iter().flat_map(|prompt| chains_of(prompt, &contrast, &turns)).collect()
    };
    let mut n_prompt_tokens = 0;
    for &unit in &missing {
        for chain in chains(&prompts[units.items(unit)]) {
            n_prompt_tokens += engines.model.n_tokens(&chain.messages)?.unwrap_or(0) as u64;
        }
    }
    let n_conversations = n_missing * config.samples_per_prompt;
    let n_new = (n_conversations * turns.len() * config.sampling.max_new_tokens) as u64;
    let mut seconds = None;
    let is_own = config.engines.urls().is_none(); // else it takes as long as servers take
    if let (Some(&unit), Engine::Local(_), true) = (missing.first(), &engines.model, is_own) {
        // One turn of a few tokens for a whole unit: the rate at the batch size of the real run.
        let probe: Vec<Chain> = chains(&prompts[units.items(unit)])
            .into_iter()
            .map(|chain| Chain { questions: Vec::new(), ..chain })
            .collect();
        let mut drawing = config.sampling.drawing();
        drawing.max_new_tokens = drawing.max_new_tokens.min(8);
        let started = Instant::now();
        let replies = engines.model.chains(&probe, &drawing)?;
        let n_sampled: usize = replies.iter().flatten().flatten().map(|reply| reply.n_tokens).sum();
        let per_token_s = started.elapsed().as_secs_f64() / n_sampled.max(1) as f64;
        seconds = Some((n_new as f64 * per_token_s).ceil());
    }
    let mut counts = Map::new();
    counts.insert("prompts".to_owned(), json!(prompts.len()));
    counts.insert("prompts_to_do".to_owned(), json!(n_missing));
    counts.insert("conversations_to_do".to_owned(), json!(n_conversations));
    counts.insert("new_tokens_at_most".to_owned(), json!(n_new));
    let demand = memory::of_conversations(config, turns.len())?;
    let memory = memory::of_stage(demand, Some(&inputs.model), &config.compute)?;
    let n_tokens = Some(n_prompt_tokens + n_new);
    Ok(Estimate { stage: STAGE, counts, n_tokens, seconds, memory })
}

/// Refuses prompts of which two have one id: their conversations could not be told apart.
fn check_ids(input: &Path, prompts: &[PromptRow]) -> Result<()> {
    let mut seen = HashMap::new();
    for (idx, prompt) in prompts.iter().enumerate() {
        if let Some(first) = seen.insert(prompt.prompt_id.as_str(), idx) {
            bail!(Refusal::at(
                stage::file_of(input, "prompts"),
                At::Line(idx + 1),
                "prompt_id",
                "each prompt once",
                format!("{} again, as in row {}", prompt.prompt_id, first + 1)
            ));
        }
    }
    Ok(())
}

fn spec<'a>(
    config: &ConversationsConfig,
    inputs: &Inputs,
    output: &'a Path,
    words: &Words,
) -> Result<StageSpec<'a>> {
    let mut settings = crate::config::recorded(config);
    let mut files = vec![("prompts".to_owned(), stage::file_of(&inputs.prompts, "prompts"))];
    let are_read = config.personas == PersonaChoice::Contrast;
    files.extend(words.input(are_read)?.map(|path| ("constitution".to_owned(), path)));
    let remote = config.engine_url.is_some();
    crate::config::record_model("model", &inputs.model, remote, &mut settings, &mut files)?;
    if let (PersonaChoice::Original, Some(original)) = (config.personas, &inputs.original) {
        crate::config::record_model("original", original, remote, &mut settings, &mut files)?;
    }
    Ok(StageSpec {
        stage: STAGE,
        output,
        config: settings,
        seed: config.sampling.seed,
        inputs: files,
    })
}

/// One chain with all samples, or one chain a persona or model.
fn chains_of(prompt: &PromptRow, contrast: &Contrast, turns: &Turns) -> Vec<Chain> {
    let questions: Vec<String> = turns.questions().into_iter().map(str::to_owned).collect();
    let chain = |messages, samples| Chain {
        messages,
        questions: questions.clone(),
        key: key_of(&prompt.prompt_id),
        samples,
    };
    match contrast {
        Contrast::Chance(n) => vec![chain(prompt.prompt.clone(), (0..*n).collect())],
        Contrast::Models => [0, 1].map(|sample| chain(prompt.prompt.clone(), vec![sample])).into(),
        Contrast::Personas(personas) => [&personas.virtuous, &personas.vicious]
            .into_iter()
            .zip(0..)
            .map(|(persona, sample)| {
                chain(under_persona(persona, &prompt.prompt, &[]), vec![sample])
            })
            .collect(),
    }
}

/// What the model is asked for, and how its replies are drawn.
struct Asked<'a> {
    contrast: &'a Contrast,
    turns: &'a Turns,
    drawing: Drawing,
}

/// All samples of every prompt of some units; a unit's shard is written when its last reply ends.
fn sample(
    engines: &Engines,
    prompts: &[PromptRow],
    units: &Units<'_>,
    group: &[usize],
    asked: &Asked<'_>,
    progress: &arete_records::progress::Progress,
) -> Result<()> {
    let Asked { contrast, turns, drawing } = asked;
    let mut chains = Vec::new();
    let mut owners: Vec<(usize, usize)> = Vec::new(); // of each chain: place in the group, prompt
    let mut n_left = vec![0; group.len()];
    let mut left_out: Vec<Vec<LeftOut>> = vec![Vec::new(); group.len()];
    for (place, &unit) in group.iter().enumerate() {
        for idx in units.items(unit) {
            let own = chains_of(&prompts[idx], contrast, turns);
            let mut fits = true;
            for chain in &own {
                fits &= engines.of(chain).fits(chain, drawing.max_new_tokens)?;
            }
            if !fits {
                tracing::warn!(
                    prompt_id = prompts[idx].prompt_id,
                    "prompt and replies exceed the model's positions, left out"
                );
                let reason = "prompt and replies exceed the model's positions";
                left_out[place].push(LeftOut::new(&prompts[idx].prompt_id, reason));
                continue;
            }
            n_left[place] += own.len();
            owners.extend(own.iter().map(|_| (place, idx)));
            chains.extend(own);
        }
    }
    let mut rows: Vec<Vec<(usize, Vec<ConversationRow>)>> = vec![Vec::new(); group.len()];
    let mut refused: HashMap<usize, Refused> = HashMap::new(); // by prompt
    let write = |place: usize,
                 mut rows: Vec<(usize, Vec<ConversationRow>)>,
                 mut left_out: Vec<LeftOut>,
                 refused: &HashMap<usize, Refused>| {
        let items = units.items(group[place]);
        let own: Vec<LeftOut> = items
            .clone()
            .filter_map(|idx| {
                let Refused(reason) = refused.get(&idx)?;
                Some(LeftOut::new(&prompts[idx].prompt_id, reason))
            })
            .collect();
        stage::check_refused(engines.model.name(), &own, items.len())?;
        for LeftOut { item, reason } in &own {
            tracing::warn!(prompt_id = item, reason, "refused by the server, left out");
        }
        left_out.extend(own);
        let ids: HashSet<&str> = left_out.iter().map(|item| item.item.as_str()).collect();
        rows.sort_by_key(|(chain, _)| *chain); // chains end in any order
        let rows: Vec<ConversationRow> = rows
            .into_iter()
            .flat_map(|(_, rows)| rows)
            .filter(|row| !ids.contains(row.prompt_id.as_str()))
            .collect();
        units.write_with(group[place], &rows, &left_out)?;
        progress.inc(units.items(group[place]).len() as u64);
        Ok::<_, anyhow::Error>(interrupt::check()?)
    };
    for place in (0..group.len()).filter(|&place| n_left[place] == 0) {
        write(place, Vec::new(), std::mem::take(&mut left_out[place]), &refused)?;
    }
    engines.chains_each(&chains, drawing, &mut |chain, outcome| {
        let (place, idx) = owners[chain];
        match outcome {
            Ok(samples) => {
                let found = chains[chain].samples.iter().zip(samples).map(|(&sample, replies)| {
                    let name = contrast.name(sample);
                    row(&prompts[idx], turns, sample, name, replies, drawing.seed)
                });
                rows[place].push((chain, found.collect()));
            }
            Err(reason) => {
                refused.entry(idx).or_insert(reason);
            }
        }
        n_left[place] -= 1;
        if n_left[place] > 0 {
            return Ok(());
        }
        let (rows, left_out) = (&mut rows[place], &mut left_out[place]);
        write(place, std::mem::take(rows), std::mem::take(left_out), &refused)
    })
}

fn row(
    prompt: &PromptRow,
    turns: &Turns,
    sample: u64,
    persona: Option<&str>,
    replies: Vec<Reply>,
    seed: u64,
) -> ConversationRow {
    assert_eq!(replies.len(), turns.len(), "a reply a turn");
    let texts: Vec<&str> = replies.iter().map(|reply| reply.text.as_str()).collect();
    let messages = turns.conversation(&prompt.prompt, &texts);
    let turn = |(aspect, reply): (_, Reply)| TurnRow {
        aspect,
        text: reply.text,
        finish_reason: reply.finish_reason,
        n_tokens: i32::try_from(reply.n_tokens).unwrap_or(i32::MAX),
    };
    ConversationRow {
        prompt_id: prompt.prompt_id.clone(),
        split: prompt.split,
        sample: i32::try_from(sample).expect("a handful of samples"),
        persona: persona.map(str::to_owned),
        messages,
        turns: turns.names().into_iter().zip(replies).map(turn).collect(),
        seed,
    }
}

/// Counts and shows how many replies the token limit cut, turn by turn.
fn summary(
    rows: &[ConversationRow],
    turns: &Turns,
    n_prompts: usize,
    n_samples: usize,
) -> Map<String, Value> {
    let mut counts = Map::new();
    counts.insert("prompts".to_owned(), json!(n_prompts));
    counts.insert("conversations".to_owned(), json!(rows.len()));
    let n_too_long = n_prompts.saturating_sub(rows.len() / n_samples);
    counts.insert("prompts_too_long".to_owned(), json!(n_too_long));
    for aspect in turns.names() {
        let n_cut = rows.iter().filter(|row| row.is_cut(aspect)).count();
        let of =
            |row: &ConversationRow| row.turn(aspect).map_or(0, |turn| i64::from(turn.n_tokens));
        let n_tokens: i64 = rows.iter().map(of).sum();
        let mean_tokens = n_tokens as f64 / rows.len().max(1) as f64;
        tracing::info!(
            aspect = aspect.name(),
            truncated = n_cut,
            truncated_percent = %percent(n_cut, rows.len()),
            mean_tokens = format!("{mean_tokens:.1}"),
            "replies"
        );
        counts.insert(format!("truncated_{aspect}"), json!(n_cut));
        counts.insert(format!("n_tokens_{aspect}"), json!(n_tokens));
    }
    counts
}
