//! The stage `score`: every model answers the test prompts, every reward model scores the turn it reads.
//!
//! One model is in memory at a time. Work proceeds in units of 32 prompts whose rows go to `shards/`; a killed run
//! continues with what is missing, and the joined files are the same.

mod results;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use arete_chain::constitution::{Constitution, Turns, carried_by_reward_models};
use arete_chain::pairs::{self, LabelledPair};
use arete_chain::reward_model::{Base, RewardModel, adapter_dir};
use arete_chain::yardstick::{self, Place};
use arete_chain::{Member, Yardstick, members, reading};
use arete_engine::EngineArgs;
use arete_model::machine::Machine;
use arete_model::{Adapter, Source, machine};
use arete_records::rows::{ConversationRow, PromptRow};
use arete_records::{Aspect, Refusal, Split, files, left_out, parquet, score_stats};
use arete_stage::interrupt;
use arete_stage::run::{self, Completion, StageRun, StageSpec, Start};
use arete_stage::units::{SHARDS, Units};
use serde_json::{Map, Value};

use crate::config::ScoreConfig;
use crate::policies::{self, Policy, Shelf, load_adapter, vocabulary_sha256};
use crate::replies::{Drawing, sample_chains};
use crate::rewards::{self, ReplyLogprob, answers, aspect_scores};
use crate::rows::{MeasureRow, PolicyPreferenceRow, TokensRow, YardstickRow};
use crate::servers::Servers;
use crate::summary::{Labels, Summary};
use crate::{labels, table};

/// Units sampled together: completions do not depend on their neighbours, full batches are faster.
const UNITS_TOGETHER: usize = 2;

/// The directory with one file of replies a model.
pub const REPLIES: &str = "replies";
/// The scores' file.
pub const SCORES: &str = "scores.parquet";
/// The coherence's file.
pub const COHERENCE: &str = "coherence.parquet";
/// The file of policies on labelled pairs.
pub const POLICY_PREFERENCES: &str = "policy_preferences.parquet";
/// The file of everything that is said about the models.
pub const SUMMARY: &str = "summary.json";

/// What the stage reads besides its settings.
#[derive(Clone, Debug)]
pub struct ScoreInputs {
    /// Directory (or file) of the prompts.
    pub prompts: PathBuf,
    /// Names and places of the models, the most untouched first.
    pub models: Vec<(String, String)>,
    /// The model that the reward models, and adapters among the models, belong to.
    pub base: String,
    /// Directory of reward models, one a directory: of turns, or of virtues, which read the answer.
    pub rewards: PathBuf,
    /// A merged reward model, or an adapter's directory, used for comparison only.
    pub yardstick: Option<PathBuf>,
    /// The base of the yardstick, if it is an adapter.
    pub yardstick_base: Option<String>,
    /// Labelled pairs.
    pub pairs: Option<PathBuf>,
    /// Where the results go.
    pub output: PathBuf,
}

/// Runs the stage; the table that says how the models compare.
///
/// # Errors
///
/// Bad settings or data, a model that cannot be used, an interrupt, a full disk.
pub fn score(config: &ScoreConfig, inputs: &ScoreInputs) -> Result<String> {
    config.check()?;
    let plan = Plan::new(config, inputs)?;
    let output = &inputs.output;
    match run::begin(plan.spec(output)?)? {
        Start::UpToDate(_) => run::say_up_to_date(output),
        Start::Run(run) => plan.run(run)?,
    }
    Ok(table::of(&read_summary(output)?))
}

/// The contents of `summary.json` of a stage's directory.
///
/// # Errors
///
/// The system's failure if there is none, A refused file if it is damaged.
pub fn read_summary(dir: &Path) -> Result<Summary> {
    let path = dir.join(SUMMARY);
    Ok(serde_json::from_slice(&files::read_small(&path)?).map_err(|error| {
        Refusal::file(&path, "JSON", "what `arete-scoring score` writes", error)
    })?)
}

/// Everything resolved, nothing loaded.
struct Plan<'a> {
    config: &'a ScoreConfig,
    inputs: &'a ScoreInputs,
    base: Source,
    /// The constitution that the reward models carry, and the turns of the chain.
    constitution: Option<Constitution>,
    turns: Turns,
    members: Vec<Member>,
    policies: Vec<Policy>,
    yardstick: Option<Place>,
    labels: Option<Labels>,
    prompts_file: PathBuf,
}

impl<'a> Plan<'a> {
    fn new(config: &'a ScoreConfig, inputs: &'a ScoreInputs) -> Result<Self> {
        let base = Policy::resolve("base", &inputs.base, None)?.source;
        let mut names = BTreeSet::new();
        let mut policies = Vec::new();
        for (name, given) in &inputs.models {
            let is_name = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            if name.is_empty() || name.starts_with('.') || !name.chars().all(is_name) {
                bail!(Refusal::setting("model", "a name of letters, digits, - _ and dots", name));
            }
            if !names.insert(name.as_str()) {
                bail!(Refusal::setting("model", "every name once", name));
            }
            policies.push(Policy::resolve(name, given, Some(&base))?);
        }
        if policies.is_empty() {
            bail!(Refusal::setting("model", "at least one model to score", "none"));
        }
        let base_of_yardstick = inputs.yardstick_base.as_deref();
        let yardstick = inputs
            .yardstick
            .as_ref()
            .map(|dir| Place::resolve(dir, base_of_yardstick))
            .transpose()?;
        if yardstick.as_ref().is_some_and(|place| !place.is_cross_fitted()) {
            tracing::warn!(
                "the yardstick is a single reward model, not cross-fitted: it may have seen the test prompts (make yardstick)"
            );
        }
        let prompts_file = if inputs.prompts.is_dir() {
            inputs.prompts.join("prompts.parquet")
        } else {
            inputs.prompts.clone()
        };
        let labels = labels::of(&inputs.rewards)?;
        let constitution = carried_by_reward_models(&inputs.rewards)?;
        let turns = constitution.as_ref().map_or_else(Turns::default, |own| own.turns.clone());
        let members = members::some_reward_models(&inputs.rewards, &turns)?;
        let names = members.iter().map(|member| member.name).chain(turns.names());
        config.endpoint()?.check_turn(&names.collect())?;
        Ok(Self {
            config,
            inputs,
            base,
            constitution,
            turns,
            members,
            policies,
            yardstick,
            labels,
            prompts_file,
        })
    }

    fn spec(&self, output: &'a Path) -> Result<StageSpec<'a>> {
        let mut config = serde_json::to_value(self.config).expect("settings are numbers and words");
        // These change no result.
        let settings = config.as_object_mut().expect("settings are a table");
        settings.remove("threads");
        EngineArgs::record_in(&mut config);
        let mut files = vec![("prompts".to_owned(), self.prompts_file.clone())];
        let mut record = |name: String, path: Option<&Path>| {
            files.extend(path.map(|path| (name, path.to_owned())));
        };
        for policy in &self.policies {
            record(format!("model {}", policy.name), policy.files());
        }
        record("base".to_owned(), self.base.local_path());
        if let (Some(place), Some(dir)) = (&self.yardstick, &self.inputs.yardstick) {
            let base = place.source.local_path().map(Path::to_owned);
            files.extend(base.map(|path| ("yardstick base".to_owned(), path)));
            files.extend(yardstick::files(dir)?);
        }
        let order: Vec<Value> = self.policies.iter().map(|p| p.name.as_str().into()).collect();
        if let Some(own) = &self.constitution {
            files.push(("constitution".to_owned(), own.path().to_owned()));
        }
        for Member { name, dir, .. } in &self.members {
            files.push((format!("reward {name}"), adapter_dir(dir)));
            let rule = dir.join(reading::FILE);
            if rule.is_file() {
                files.push((format!("reading {name}"), rule));
            }
            let stats = dir.join(score_stats::FILE);
            if stats.is_file() {
                files.push((format!("score_stats {name}"), stats));
            }
        }
        if let Some(pairs) = &self.inputs.pairs {
            files.push(("pairs".to_owned(), pairs.clone()));
        }
        let settings = config.as_object_mut().expect("settings are a table");
        settings.insert("models".to_owned(), Value::Array(order));
        // Not a setting: runs of versions that took the replies' text in tokens anew are done again.
        settings.insert("perplexity".to_owned(), "of the sampled tokens".into());
        settings.insert("yardstick".to_owned(), "of answers, by fold".into());
        settings.insert(
            "labels".to_owned(),
            serde_json::to_value(&self.labels).expect("words serialise"),
        );
        Ok(StageSpec { stage: "scoring", output, config, seed: self.config.seed, inputs: files })
    }

    /// The reward model beside whose scores those of the yardstick stand: the first that reads the answer.
    fn beside_yardstick(&self) -> Option<Aspect> {
        self.members.iter().find(|member| member.turn == 0).map(|member| member.name)
    }

    fn run(&self, run: StageRun) -> Result<()> {
        let output = run.output().to_owned();
        if let Some(own) = &self.constitution {
            own.leave(&output)?;
        }
        let options = self.config.load_options()?;
        self.config.admit(&self.base, self.turns.len())?;
        let prompts = self.prompts()?;
        // The summary is written last: if it is there, a kill came between it and run.json.
        if !(run.is_resumed() && output.join(SUMMARY).is_file()) {
            let (output, shelf, servers) = (&*output, Shelf::new(options), None);
            let mut work = Work { plan: self, prompts: &prompts, output, shelf, servers };
            work.all()?;
        }
        let shards = output.join(SHARDS);
        if shards.is_dir() {
            fs_err::remove_dir_all(shards)?;
        }
        let summary = read_summary(&output)?;
        let mut counts = Map::new();
        counts.insert("prompts".to_owned(), summary.n_prompts.into());
        counts.insert("prompts_left_out".to_owned(), summary.n_left_out.into());
        counts.insert("models".to_owned(), summary.models.len().into());
        Machine::write(run.output())?;
        run.finish(Completion {
            device: machine::device_name(options.device),
            dtype: machine::dtype_name(options.dtype).to_owned(),
            counts,
        })?;
        Ok(())
    }

    /// What is measured of every conversation: each turn, by its reward model if there is one, then what others score.
    fn columns(&self) -> Vec<Column> {
        let place = |name: Aspect| self.members.iter().position(|member| member.name == name);
        let turns = self.turns.names().into_iter().enumerate();
        let turns = turns.map(|(turn, name)| Column { name, turn, member: place(name) });
        let others = self.members.iter().enumerate();
        let others = others.filter(|(_, member)| !member.is_of_turn(&self.turns));
        turns
            .chain(others.map(|(at, Member { name, turn, .. })| Column {
                name: *name,
                turn: *turn,
                member: Some(at),
            }))
            .collect()
    }

    /// The policies, those of the base last.
    fn in_loading_order(&self) -> Vec<&Policy> {
        let mut policies: Vec<&Policy> = self.policies.iter().collect();
        policies.sort_by_key(|policy| crate::policies::same_source(&policy.source, &self.base));
        policies
    }

    /// The test prompts.
    fn prompts(&self) -> Result<Vec<PromptRow>> {
        let mut prompts: Vec<PromptRow> = parquet::read(&self.prompts_file)?;
        let n_rows = prompts.len();
        prompts.retain(|prompt| prompt.split == Split::Test);
        let mut ids = BTreeSet::new();
        prompts.retain(|prompt| ids.insert(prompt.prompt_id.clone()));
        if self.config.n_prompts > 0 {
            prompts.truncate(self.config.n_prompts);
        }
        if prompts.is_empty() {
            bail!(Refusal::file(
                &self.prompts_file,
                "split",
                "at least one test prompt",
                format!("none among {n_rows} rows")
            ));
        }
        Ok(prompts)
    }
}

/// A turn of every conversation, or a virtue in it.
#[derive(Clone, Copy)]
struct Column {
    name: Aspect,
    /// The turn that is read.
    turn: usize,
    /// The reward model, by its number.
    member: Option<usize>,
}

/// The stage at work.
struct Work<'a> {
    plan: &'a Plan<'a>,
    prompts: &'a [PromptRow],
    output: &'a Path,
    shelf: Shelf,
    servers: Option<Servers>,
}

impl<'a> Work<'a> {
    fn all(&mut self) -> Result<()> {
        for policy in self.plan.in_loading_order() {
            self.reply(policy)?;
        }
        if let Some(servers) = self.servers.take() {
            servers.close()?;
        }
        // The base was loaded last: the reward models read with it.
        for policy in &self.plan.policies {
            self.measure(policy)?;
        }
        let labelled = self.labelled()?;
        for policy in self.plan.in_loading_order().into_iter().rev() {
            self.judge_pairs(policy, &labelled)?;
        }
        for policy in &self.plan.policies {
            self.measure_by_yardstick(policy)?;
        }
        self.join(&labelled)
    }

    /// The labelled pairs by which policies are compared, if there are any.
    fn labelled(&self) -> Result<Vec<LabelledPair>> {
        let Some(path) = &self.plan.inputs.pairs else { return Ok(Vec::new()) };
        let config = self.plan.config;
        let (mut labelled, left_out) =
            pairs::read_pairs(path, config.column.as_deref().unwrap_or_default())?;
        left_out::write(self.output, &left_out)?;
        if labelled.is_empty() {
            let found = format!("none, and {} rows left out", left_out.len());
            bail!(Refusal::file(
                path,
                "rows",
                "pairs of conversations that end with a reply",
                found
            ));
        }
        if config.max_pairs > 0 {
            labelled.truncate(config.max_pairs);
        }
        Ok(labelled)
    }

    fn reply(&mut self, policy: &Policy) -> Result<()> {
        let (units, tokens) = (self.units("replies", policy), self.units("tokens", policy));
        let missing = units.missing()?.0;
        if missing.is_empty() {
            return Ok(());
        }
        let config = self.plan.config;
        let drawing = Drawing {
            sampling: config.sampling(),
            max_new_tokens: config.max_new_tokens,
            seed: config.seed,
            n_samples: 1,
        };
        let model = self.shelf.get(&policy.source)?;
        let adapter = match &policy.adapter {
            Some(dir) => Some(load_adapter(dir, &policy.name, model)?),
            None => None,
        };
        let has_servers = config.engines.urls().is_some();
        let is_served = has_servers && policies::same_source(&policy.source, &self.plan.base);
        if has_servers && !is_served {
            tracing::info!(
                model = policy.name,
                "another model than the base, which the servers hold: it answers here"
            );
        }
        if is_served && self.servers.is_none() {
            self.servers = Some(Servers::connect(config, model, self.output)?);
        }
        let mut served = match &mut self.servers {
            Some(servers) if is_served => {
                Some((servers, Servers::journal(self.output, &policy.name)?, model.chat()?))
            }
            _ => None,
        };
        let loaded = adapter.as_ref();
        let adapter = loaded.map(|loaded| &loaded.adapter);
        let vocabulary = vocabulary_sha256(&model.tokenizer);
        let limit = model.config.max_position_embeddings;
        let progress =
            arete_records::progress::start("replies", "prompts", self.prompts.len() as u64);
        progress.message(&policy.name);
        let n_missing: usize = missing.iter().map(|&unit| units.items(unit).len()).sum();
        progress.skip((self.prompts.len() - n_missing) as u64);
        for together in missing.chunks(UNITS_TOGETHER) {
            interrupt::check()?;
            let items: Vec<PromptRow> = together
                .iter()
                .flat_map(|&unit| self.prompts[units.items(unit)].iter().cloned())
                .collect();
            let turns = &self.plan.turns;
            let chains = match &mut served {
                Some((servers, journal, chat)) => {
                    let (over, own) = ((model, &*chat), (policy.name.as_str(), loaded));
                    servers.chains(over, own, &items, turns, &drawing, journal)?
                }
                None => sample_chains(model, adapter, &items, turns, &drawing)?,
            };
            for &unit in together {
                let ids: BTreeSet<&str> =
                    self.prompts[units.items(unit)].iter().map(|p| p.prompt_id.as_str()).collect();
                let own = chains.iter().filter(|(row, _)| ids.contains(row.prompt_id.as_str()));
                let (rows, mut sampled): (Vec<ConversationRow>, Vec<TokensRow>) = own
                    .map(|(row, chain)| {
                        (row.clone(), TokensRow::of(&row.prompt_id, chain, &vocabulary))
                    })
                    .unzip();
                if config.temperature > 0.0 {
                    let marked: Vec<_> =
                        sampled.iter().map(|row| rewards::sampled_chain(row, limit)).collect();
                    let logprobs = rewards::reply_logprobs(
                        &model.decoder,
                        adapter,
                        &marked,
                        config.temperature,
                        config.micro_batch_tokens,
                    )?;
                    for (row, logprobs) in sampled.iter_mut().zip(logprobs) {
                        row.logprobs = logprobs.iter().map(|reply| reply.sum as f32).collect();
                    }
                }
                // The replies' file last: where it is, the unit is done.
                tokens.write(unit, &sampled)?;
                units.write(unit, &rows)?;
            }
            progress.inc(items.len() as u64);
        }
        Ok(())
    }

    /// One kind of work on the prompts, for one policy.
    fn units(&self, kind: &str, policy: &Policy) -> Units<'a> {
        let name = format!("{kind}-{}", policy.name);
        Units { output: self.output, name, n_items: self.prompts.len(), shard: None }
    }

    /// The replies of a policy to the prompts of some units.
    fn replies(&self, policy: &Policy, units: &[usize]) -> Result<Vec<Vec<ConversationRow>>> {
        units.iter().map(|&unit| Ok(self.units("replies", policy).read(unit)?)).collect()
    }

    /// Scores by the reward models, and log-probabilities under the base.
    fn measure(&mut self, policy: &Policy) -> Result<()> {
        let (units, tokens) = (self.units("scores", policy), self.units("tokens", policy));
        let missing = units.missing()?.0;
        if missing.is_empty() {
            return Ok(());
        }
        let replies = self.replies(policy, &missing)?;
        let tokens: Vec<Vec<TokensRow>> =
            missing.iter().map(|&unit| tokens.read(unit)).collect::<Result<_, _>>()?;
        let budget = self.plan.config.micro_batch_tokens;
        let model = self.shelf.get(&self.plan.base)?;
        let vocabulary = vocabulary_sha256(&model.tokenizer);
        let limit = model.config.max_position_embeddings;
        let chat = model.chat()?;
        let reader = Base { model, chat: &chat, micro_batch_tokens: budget };
        let mut reward_models = Vec::new();
        for Member { name, dir, .. } in &self.plan.members {
            reward_models.push(RewardModel::over(dir, name.name(), model)?);
        }
        let columns = self.plan.columns();
        let progress =
            arete_records::progress::start("scores", "prompts", self.prompts.len() as u64);
        progress.message(&policy.name);
        let n_missing: usize = missing.iter().map(|&unit| units.items(unit).len()).sum();
        progress.skip((self.prompts.len() - n_missing) as u64);
        for ((&unit, replies), tokens) in missing.iter().zip(&replies).zip(&tokens) {
            interrupt::check()?;
            let retokenised = tokens.iter().any(|row| row.vocabulary != vocabulary);
            let mut marked = Vec::new();
            for (row, tokens) in replies.iter().zip(tokens) {
                marked.push(match retokenised {
                    false => rewards::sampled_chain(tokens, limit),
                    true => rewards::marked_chain(&chat, row, limit)?,
                });
            }
            let logprobs = rewards::reply_logprobs(&model.decoder, None, &marked, 1.0, budget)?;
            // How far the model's own view of its replies is from the base's.
            let kl = match self.plan.config.temperature {
                t if t > 0.0 && !retokenised => {
                    let base = rewards::reply_logprobs(&model.decoder, None, &marked, t, budget)?;
                    kl_of(tokens, &base)
                }
                _ => vec![None; marked.len() * self.plan.turns.len()],
            };
            let mut rows = Vec::new();
            for &Column { name, turn, member } in &columns {
                let read = self.plan.turns.names()[turn];
                let is_turn = read == name;
                let scores: Vec<Option<f64>> = match member.map(|at| &reward_models[at]) {
                    Some(reward) => aspect_scores(reward, reader, replies, &[read])?
                        .into_iter()
                        .map(|score| Some(score[0]))
                        .collect(),
                    None => vec![None; replies.len()],
                };
                let n_turns = self.plan.turns.len();
                let scored = replies.iter().zip(scores).zip(&logprobs).enumerate();
                for (at, ((row, score), logprobs)) in scored {
                    let own = logprobs[turn];
                    let score = score.map(|score| finite(score, name.name(), policy, row));
                    rows.push(MeasureRow {
                        prompt_id: row.prompt_id.clone(),
                        aspect: name,
                        score: score.transpose()?,
                        base_logprob: own.sum as f32,
                        n_base_tokens: i32::try_from(own.n_tokens).unwrap_or(i32::MAX),
                        kl: kl[at * n_turns + turn].filter(|_| is_turn),
                        retokenised,
                    });
                }
            }
            units.write(unit, &rows)?;
            progress.inc(units.items(unit).len() as u64);
        }
        Ok(())
    }

    fn measure_by_yardstick(&mut self, policy: &Policy) -> Result<()> {
        let Some(yardstick) = &self.plan.yardstick else { return Ok(()) };
        let units = self.units("yardstick", policy);
        let missing = units.missing()?.0;
        if missing.is_empty() {
            return Ok(());
        }
        let replies = self.replies(policy, &missing)?;
        let budget = self.plan.config.micro_batch_tokens;
        let model = self.shelf.get_packed(&yardstick.source, yardstick.nf4)?;
        let chat = model.chat()?;
        let judge = Yardstick::over(yardstick, model)?;
        let base = Base { model, chat: &chat, micro_batch_tokens: budget };
        for (&unit, replies) in missing.iter().zip(&replies) {
            interrupt::check()?;
            let transcripts = answers(replies)?;
            let by_words = judge.word_scores(&transcripts);
            let scores = judge.scores(base, &transcripts)?;
            let mut rows = Vec::new();
            for (at, (row, score)) in replies.iter().zip(scores).enumerate() {
                rows.push(YardstickRow {
                    prompt_id: row.prompt_id.clone(),
                    score: finite(score, "yardstick", policy, row)?,
                    words: by_words.as_ref().map(|scores| scores[at] as f32),
                });
            }
            units.write(unit, &rows)?;
        }
        Ok(())
    }

    /// How probable a policy finds either side of the labelled pairs.
    fn judge_pairs(&mut self, policy: &Policy, labelled: &[LabelledPair]) -> Result<()> {
        let units = Units { n_items: labelled.len(), ..self.units("pairs", policy) };
        let missing = units.missing()?.0;
        if missing.is_empty() {
            return Ok(());
        }
        let budget = self.plan.config.micro_batch_tokens;
        let model = self.shelf.get(&policy.source)?;
        let limit = model.config.max_position_embeddings;
        let chat = model.chat()?;
        let adapter: Option<Adapter> = match &policy.adapter {
            Some(dir) => Some(load_adapter(dir, &policy.name, model)?.adapter),
            None => None,
        };
        let progress = arete_records::progress::start("pairs", "pairs", labelled.len() as u64);
        progress.message(&policy.name);
        for &unit in &missing {
            interrupt::check()?;
            let pairs = &labelled[units.items(unit)];
            let mut marked = Vec::new();
            for side in pairs.iter().flat_map(|pair| [&pair.chosen, &pair.rejected]) {
                marked.push(rewards::marked_last(&chat, &side.messages, limit)?);
            }
            let logprobs =
                rewards::reply_logprobs(&model.decoder, adapter.as_ref(), &marked, 1.0, budget)?;
            let mut rows = Vec::new();
            for (pair, sides) in pairs.iter().zip(logprobs.chunks_exact(2)) {
                let [chosen, rejected] = [sides[0][0], sides[1][0]];
                // A conversation beyond the model's positions has nothing left to compare.
                let (Some(logprob_chosen), Some(logprob_rejected)) =
                    (chosen.mean(), rejected.mean())
                else {
                    continue;
                };
                rows.push(PolicyPreferenceRow {
                    model: policy.name.clone(),
                    pair: i32::try_from(pair.row).unwrap_or(i32::MAX),
                    logprob_chosen: logprob_chosen as f32,
                    logprob_rejected: logprob_rejected as f32,
                    n_tokens_chosen: i32::try_from(chosen.n_tokens).unwrap_or(i32::MAX),
                    n_tokens_rejected: i32::try_from(rejected.n_tokens).unwrap_or(i32::MAX),
                });
            }
            units.write(unit, &rows)?;
            progress.inc(pairs.len() as u64);
        }
        Ok(())
    }
}

/// What each reply is likelier under its own model than under the base, reply by reply.
fn kl_of(tokens: &[TokensRow], base: &[Vec<ReplyLogprob>]) -> Vec<Option<f32>> {
    let of = |(row, base): (&TokensRow, &Vec<ReplyLogprob>)| {
        let own = row.logprobs.iter().zip(base);
        own.map(|(own, base)| Some(own - base.sum as f32)).collect::<Vec<_>>()
    };
    tokens.iter().zip(base).flat_map(of).collect()
}

fn finite(score: f64, aspect: &str, policy: &Policy, row: &ConversationRow) -> Result<f32> {
    if score.is_finite() {
        return Ok(score as f32);
    }
    let (model, prompt_id) = (&policy.name, &row.prompt_id);
    bail!("the {aspect} reward model's score of {model}'s reply to prompt {prompt_id} is {score}")
}
