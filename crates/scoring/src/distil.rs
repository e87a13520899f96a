//! Best-of-n distillation: of n chains for a prompt the one that the reward models like best, as a demonstration for SFT.
//!
//! Inputs: prompts of splits train and validation, a base, its reward models. Output: `demonstrations.parquet`, which
//! `arete-sft train` takes. What fine-tuning on it gains stands beside PPO at the KL of best-of-n,
//! log n − (n − 1) / n (Stiennon et al. 2020, arXiv:2009.01325).

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use arete_chain::constitution::{Turns, carried_by_reward_models};
use arete_chain::reward_model::{Base, adapter_dir, standardise};
use arete_chain::{Member, members, reading};
use arete_model::{Model, machine};
use arete_records::rows::{ConversationRow, DemonstrationRow, PromptRow};
use arete_records::{FinishReason, Refusal, Split, parquet, score_stats, stats};
use arete_stage::interrupt;
use arete_stage::run::{self, Completion, StageSpec, Start};
use arete_stage::units::Units;
use serde_json::{Map, json};

use crate::config::ScoreConfig;
use crate::policies::{Policy, Shelf};
use crate::replies::{Drawing, sample_chains};
use crate::rewards::{StandardisedModel, aspect_scores, standardised};

/// Name of the file, as SFT looks for it.
const DEMONSTRATIONS: &str = "demonstrations";
/// Prompts sampled together: with 8 samples each, a full batch.
const PROMPTS_TOGETHER: usize = 8;

/// What to sample from and to choose with.
#[derive(Clone, Debug)]
pub struct DistilInputs {
    /// Directory (or file) of the prompts; the test split is left alone.
    pub prompts: PathBuf,
    /// The model that samples, and that the reward models belong to.
    pub base: String,
    /// Directory of reward models, one a directory: of turns, or of virtues, which read the answer.
    pub rewards: PathBuf,
    /// Where the demonstrations go.
    pub output: PathBuf,
}

/// Samples `n` chains for every prompt (at most `config.n_prompts` of those that are not of split test) and keeps the one
/// with the highest mean of the reward models' standardised scores, among those that the token limit cut nowhere.
///
/// # Errors
///
/// Bad settings or data, a model that cannot be used, an interrupt, a full disk.
pub fn run(config: &ScoreConfig, n: usize, inputs: &DistilInputs) -> Result<()> {
    config.check()?;
    if n < 2 {
        bail!(Refusal::setting("n", "at least 2 samples", n));
    }
    let base = Policy::resolve("base", &inputs.base, None)?.source;
    let file = match inputs.prompts.is_dir() {
        true => inputs.prompts.join("prompts.parquet"),
        false => inputs.prompts.clone(),
    };
    let constitution = carried_by_reward_models(&inputs.rewards)?;
    let turns = constitution.as_ref().map_or_else(Turns::default, |own| own.turns.clone());
    let mut files = vec![("prompts".to_owned(), file.clone())];
    files.extend(constitution.map(|own| ("constitution".to_owned(), own.path().to_owned())));
    files.extend(base.local_path().map(|path| ("base".to_owned(), path.to_owned())));
    let members = members::some_reward_models(&inputs.rewards, &turns)?;
    for Member { name: aspect, dir, .. } in &members {
        files.push((format!("reward {aspect}"), adapter_dir(dir)));
        let rule = dir.join(reading::FILE);
        files.extend(rule.is_file().then(|| (format!("reading {aspect}"), rule)));
        files.push((format!("score_stats {aspect}"), dir.join(score_stats::FILE)));
    }
    let mut settings = serde_json::to_value(config).expect("settings are numbers and words");
    settings["n_samples"] = n.into();
    settings["threads"] = 0.into();
    let (output, seed) = (inputs.output.as_path(), config.seed);
    let spec = StageSpec { stage: "distil", output, config: settings, seed, inputs: files };
    let run = match run::begin(spec)? {
        Start::UpToDate(_) => {
            run::say_up_to_date(output);
            return Ok(());
        }
        Start::Run(run) => run,
    };
    let prompts = prompts(&file, config.n_prompts)?;
    let options = config.load_options()?;
    config.admit(&base, turns.len())?;
    let mut shelf = Shelf::new(options);
    let teacher = Teacher::open(shelf.get(&base)?, &members, turns, config, n)?;
    let units =
        Units { output, name: DEMONSTRATIONS.to_owned(), n_items: prompts.len(), shard: None };
    let progress = arete_records::progress::start("distilling", "prompts", prompts.len() as u64);
    progress.skip((prompts.len() - units.missing()?.1) as u64);
    units.run::<_, anyhow::Error>(|items| {
        let mut rows = Vec::new();
        for together in prompts[items].chunks(PROMPTS_TOGETHER) {
            interrupt::check()?;
            rows.extend(teacher.best(together)?);
            progress.inc(together.len() as u64);
        }
        Ok(rows)
    })?;
    let rows: Vec<DemonstrationRow> = units.join()?;
    drop(progress);
    let n_left_out = prompts.len() - rows.len();
    if rows.is_empty() {
        let expected = "so many that some chain ends by itself";
        bail!(Refusal::setting("max_new_tokens", expected, config.max_new_tokens));
    }
    tracing::info!(demonstrations = rows.len(), left_out = n_left_out, n, "best of n");
    let counts = Map::from_iter([
        ("demonstrations".to_owned(), json!(rows.len())),
        ("left_out".to_owned(), json!(n_left_out)),
    ]);
    run.finish(Completion {
        device: machine::device_name(options.device),
        dtype: machine::dtype_name(options.dtype).to_owned(),
        counts,
    })?;
    Ok(())
}

/// The prompts that may teach, at most `most` unless that is 0.
fn prompts(file: &Path, most: usize) -> Result<Vec<PromptRow>> {
    let mut prompts: Vec<PromptRow> = parquet::read(file)?;
    prompts.retain(|prompt| prompt.split != Split::Test);
    if most > 0 {
        prompts.truncate(most);
    }
    if prompts.is_empty() {
        bail!(Refusal::file(
            file,
            "split",
            "at least one prompt of split train or validation",
            "none"
        ));
    }
    Ok(prompts)
}

/// The base, and the reward models that choose among its chains.
struct Teacher<'a> {
    model: &'a Model,
    turns: Turns,
    /// With the turn that each reads.
    reward_models: Vec<StandardisedModel>,
    drawing: Drawing,
    micro_batch_tokens: usize,
}

impl<'a> Teacher<'a> {
    fn open(
        model: &'a Model,
        members: &[Member],
        turns: Turns,
        config: &ScoreConfig,
        n_samples: usize,
    ) -> Result<Self> {
        let reward_models = standardised(members, &turns, model)?;
        let (max_new_tokens, seed) = (config.max_new_tokens, config.seed);
        let drawing = Drawing { sampling: config.sampling(), max_new_tokens, seed, n_samples };
        let micro_batch_tokens = config.micro_batch_tokens;
        Ok(Self { model, turns, reward_models, drawing, micro_batch_tokens })
    }

    /// The best chain of each prompt that has one.
    fn best(&self, prompts: &[PromptRow]) -> Result<Vec<DemonstrationRow>> {
        let Self { model, turns, .. } = self;
        let chains = sample_chains(model, None, prompts, turns, &self.drawing)?;
        let mut rows: Vec<ConversationRow> = chains.into_iter().map(|(row, _)| row).collect();
        rows.retain(|row| row.turns.iter().all(|t| t.finish_reason == FinishReason::Stop));
        let chat = model.chat()?;
        let base = Base { model, chat: &chat, micro_batch_tokens: self.micro_batch_tokens };
        let mut z = vec![Vec::with_capacity(turns.len()); rows.len()];
        for (read, reward, stats) in &self.reward_models {
            for (z, score) in z.iter_mut().zip(aspect_scores(reward, base, &rows, &[*read])?) {
                z.push(standardise(score[0], stats));
            }
        }
        let scored: Vec<(ConversationRow, f64)> =
            rows.into_iter().zip(z.iter().map(|z| stats::mean(z))).collect();
        Ok(favourites(scored, self.drawing.n_samples))
    }
}

/// The row with the highest score of each prompt, in the order in which prompts first come up; of equals the first.
fn favourites(scored: Vec<(ConversationRow, f64)>, n: usize) -> Vec<DemonstrationRow> {
    let mut best: Vec<(ConversationRow, f64)> = Vec::new();
    for (row, score) in scored {
        match best.iter_mut().find(|(own, _)| own.prompt_id == row.prompt_id) {
            Some(own) if score > own.1 => *own = (row, score),
            Some(_) => {}
            None => best.push((row, score)),
        }
    }
    let demonstration = |(row, _): (ConversationRow, f64)| DemonstrationRow {
        source: format!("best-of-{n}"),
        initial: row.turns.first().map(|turn| turn.text.clone()).unwrap_or_default(),
        prompt_id: row.prompt_id,
        split: row.split,
        rounds: Vec::new(),
        messages: row.messages,
    };
    best.into_iter().map(demonstration).collect()
}

#[cfg(test)]
mod tests {
    use arete_records::rows::TurnRow;
    use arete_records::{Aspect, Message};

    use super::*;

    fn row(prompt_id: &str, text: &str) -> ConversationRow {
        let turn = TurnRow {
            aspect: Aspect::ACTION,
            text: text.to_owned(),
            finish_reason: FinishReason::Stop,
            n_tokens: 1,
        };
        ConversationRow {
            prompt_id: prompt_id.to_owned(),
            split: Split::Train,
            sample: 0,
            persona: None,
            messages: vec![Message::user("q"), Message::assistant(text)],
            turns: vec![turn],
            seed: 0,
        }
    }

    #[test]
    fn each_prompt_keeps_its_favourite() {
        let scored = vec![
            (row("b", "b0"), -2.0),
            (row("b", "b1"), -1.0),
            (row("b", "b2"), -1.0),
            (row("a", "a0"), 3.0),
            (row("a", "a1"), 2.0),
        ];
        let found = favourites(scored, 3);
        let texts: Vec<&str> = found.iter().map(|row| row.initial.as_str()).collect();
        assert_eq!(texts, ["b1", "a0"]);
        assert_eq!((found[0].source.as_str(), found[0].messages.len()), ("best-of-3", 2));
        assert!(favourites(Vec::new(), 3).is_empty());
    }
}
