//! The stage: from files to files, an iteration at a time.

mod calibrate;
mod files;
mod finish;
mod probing;
mod state;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use arete_chain::constitution::{self, Constitution};
use arete_chain::memory::{self, PROMPT_TOKENS, Shape};
use arete_chain::reward_model::Base;
use arete_chain::{Member, Turns, members, reading, yardstick};
use arete_engine::EngineArgs;
use arete_model::machine::Machine;
use arete_model::{Chat, LoadOptions, Model, Source};
use arete_records::rows::RolloutRow;
use arete_records::{Aspect, Refusal, left_out, score_stats, stats};
use arete_stage::dry::DryRun;
use arete_stage::metrics::MetricsWriter;
use arete_stage::run::{self, Completion, StageRun, StageSpec, Start};
use arete_stage::{seal, timings};
use arete_training::{AdamW, CheckpointStore, Ranks, Select, runtime};
use serde_json::{Map, Value};

use self::files::{write_rows, write_scores};
use self::state::{Schedules, State};
use crate::Config;
use crate::assess;
use crate::config::ProgrammedReward;
use crate::engines::{Engines, Serving};
use crate::iteration::{Iteration, Outcome, Phase};
use crate::journal::{self, Journal};
use crate::models::Models;
use crate::prompts::{Prompt, Prompts, draw};
use crate::rollout::{Conversation, Sampler};
use crate::scorer::{NamedReward, RewardModels, Scores, Yardstick, asked};
use crate::spread;
use crate::standardisation::Standardisation;
use crate::update::Optimisers;

/// The setting that says how long it is trained: with more of it, training goes on.
const AMOUNTS: [&str; 1] = ["iterations"];
/// Names of the optimisers inside checkpoints.
const POLICY: &str = "policy";
const CRITIC: &str = "critic";
/// Directory of the sampled conversations.
const ROLLOUTS: &str = "rollouts";
/// The journal of servers' scores there.
const SCORES: &str = "scores.partial.jsonl";

/// What to train on and where to write.
#[derive(Clone, Debug)]
pub struct TrainInputs {
    /// Directory with `prompts.parquet`.
    pub prompts: PathBuf,
    /// Directory of reward models, one a directory: those of turns that the rollouts ask for, and all others, which read the answer.
    pub rewards: Option<PathBuf>,
    /// Further reward models, or the only ones; with neither, the reward is programmed.
    pub named_rewards: Vec<NamedReward>,
    /// The constitution whose turns are asked for; none for the one that the reward models carry, or the shipped turns.
    pub constitution: Option<PathBuf>,
    /// Directory of a reward model that only watches.
    pub yardstick: Option<PathBuf>,
    /// Where the results go.
    pub output: PathBuf,
}

/// Trains the policy, from the newest checkpoint in the output directory if there is one.
///
/// The same inputs, settings and seed give the same bytes (but for times) however often the run was interrupted.
///
/// # Errors
///
/// Bad settings or data, an unusable model, an interrupt, a full disk.
pub fn train(config: &Config, inputs: &TrainInputs) -> Result<()> {
    config.check()?;
    let ranks = Ranks::join(config.shards.virtual_shards)?;
    ranks.finish(train_on(&ranks, config, inputs))
}

/// What [`train`] would do; nothing is written.
///
/// # Errors
///
/// As [`train`], as far as it shows before the model is loaded.
pub fn dry_run(config: &Config, inputs: &TrainInputs) -> Result<DryRun> {
    let found = run::asking(|| train(config, inputs))?;
    let turns = constitution_of(inputs)?.map_or_else(Turns::default, |own| own.turns);
    let n_turns = turns.len();
    let device = Some(config.compute.device.as_str());
    let shape = Shape::of(config.model.as_deref().unwrap_or_default(), device, PROMPT_TOKENS)?;
    let [train, validation] = crate::prompts::counts(&inputs.prompts)?;
    Ok(DryRun::new("ppo", config, found)
        .counting("train", train)
        .counting("validation", validation)
        .counting("reward_models", reward_models(config, inputs, &turns)?.len())
        .taking(Some(shape.need(&config.demand(n_turns)?).to_json())))
}

fn train_on(ranks: &Ranks, config: &Config, inputs: &TrainInputs) -> Result<()> {
    let name =
        config.model.as_deref().ok_or_else(|| Refusal::setting("model", "a base model", "none"))?;
    let constitution = constitution_of(inputs)?;
    let turns = constitution.as_ref().map_or_else(Turns::default, |own| own.turns.clone());
    let rewards = reward_models(config, inputs, &turns)?;
    let source = Source::fetch(name)?;
    let run = match open(ranks, config, inputs, &rewards, &source, constitution.as_ref())? {
        Start::UpToDate(_) => {
            run::say_up_to_date(&inputs.output);
            return Ok(());
        }
        Start::Run(run) => run,
    };
    if let Some(own) = &constitution {
        own.leave(run.output())?;
    }
    let options = config.compute.start_on(ranks)?;
    let saving = memory::admit("ppo", &source, options.device, &config.demand(turns.len())?)?;
    let model = Model::load(&source, &options)?;
    let over = (&source, &model);
    let stage = Stage::new(ranks, config, inputs, &rewards, turns, over, &options, &run, name)?;
    if saving {
        stage.models.passes.save();
    }
    let counts = stage.train(name, &source)?;
    if !ranks.is_first() {
        return Ok(());
    }
    if let Some(bytes) = runtime::peak_rss_bytes() {
        tracing::info!(mib = bytes >> 20, "peak memory");
        timings::log(run.output(), "memory", 0.0, &[("peak_rss_bytes", bytes.into())])?;
    }
    Machine::write(run.output())?;
    run.finish(Completion {
        device: runtime::device_name(options.device),
        dtype: runtime::dtype_name(options.dtype).to_owned(),
        counts,
    })?;
    Ok(())
}

/// The constitution given or carried by the reward models, if it is of other turns than the shipped ones.
fn constitution_of(inputs: &TrainInputs) -> Result<Option<Constitution>> {
    let given = inputs.constitution.as_deref().map(Constitution::load).transpose()?;
    let own = match (&inputs.rewards, given) {
        (Some(dir), given) => {
            let carried = constitution::carried_by_reward_models(dir)?;
            if let Some(given) = &given {
                let trained = carried.as_ref().map_or_else(Turns::default, |own| own.turns.clone());
                trained.check_same(&given.turns, given.path())?;
            }
            given.or(carried)
        }
        (None, given) => given,
    };
    Ok(own.filter(|own| own.turns != Turns::default()))
}

/// The reward models of the directory, as far as they read what is asked for, and those that are named.
fn reward_models(config: &Config, inputs: &TrainInputs, turns: &Turns) -> Result<Vec<NamedReward>> {
    let refuse = |expected: &str, got: &str| {
        let (expected, got) = (expected.to_owned(), got.to_owned());
        Err(Refusal::setting("rewards", expected, got).into())
    };
    let is_given = inputs.rewards.is_some() || !inputs.named_rewards.is_empty();
    if is_given && config.programmed_reward.as_ref().is_some_and(ProgrammedReward::is_control) {
        // So that a recipe's one key makes a control of a whole pipeline.
        tracing::warn!("a control: the reward models that are given are not read");
        return Ok(Vec::new());
    }
    if is_given == config.programmed_reward.is_some() {
        let expected = "either reward models (--rewards, --reward) or --programmed-reward";
        return refuse(expected, if is_given { "both" } else { "neither" });
    }
    let mut out = Vec::new();
    if let Some(dir) = &inputs.rewards {
        let asked: Vec<Aspect> = asked(turns, config.rollout).map(|(_, aspect)| aspect).collect();
        let mut members = members::some_reward_models(dir, turns)?;
        members.retain(|member| member.turn < asked.len());
        let unread = asked.iter().filter(|&&turn| members.iter().all(|own| own.name != turn));
        for turn in unread.filter(|_| inputs.named_rewards.is_empty()) {
            tracing::warn!(%turn, "no reward model reads this turn");
        }
        let named =
            |member: Member| NamedReward { name: member.name.name().to_owned(), dir: member.dir };
        out.extend(members.into_iter().map(named));
    }
    for reward in &inputs.named_rewards {
        if out.iter().any(|other| other.name == reward.name) {
            return refuse("a name of its own for every reward model", &reward.name);
        }
        out.push(reward.clone());
    }
    if out.is_empty() && is_given {
        return refuse("a reward model of a turn that is asked for, or of the answer", "none");
    }
    Ok(out)
}

fn open(
    ranks: &Ranks,
    config: &Config,
    inputs: &TrainInputs,
    rewards: &[NamedReward],
    source: &Source,
    constitution: Option<&Constitution>,
) -> Result<Start> {
    let mut files = vec![("prompts".to_owned(), inputs.prompts.clone())];
    let mut push = |name: String, path: PathBuf| {
        if path.exists() {
            files.push((name, path));
        }
    };
    if let Some(own) = constitution {
        push("constitution".to_owned(), own.path().to_owned());
    }
    for NamedReward { name, dir } in rewards {
        push(format!("reward_{name}"), dir.join("adapter"));
        push(format!("reward_{name}_stats"), dir.join(score_stats::FILE));
        push(format!("reward_{name}_reading"), dir.join(reading::FILE));
    }
    if let Some(dir) = &inputs.yardstick {
        for (name, path) in yardstick::files(dir)? {
            push(name, path);
        }
    }
    let mut recorded = config.clone();
    if let Some(path) = source.local_path() {
        push("model".to_owned(), path.to_owned());
        recorded.model = None; // its contents are an input; where they lie changes nothing
    }
    let mut recorded = serde_json::to_value(&recorded).expect("settings are numbers and words");
    arete_training::forget_harmless(
        &mut recorded,
        &["max_rows", "keep_graph_tokens", "engine_difference", "reward_tolerance", "reward_urls"],
    );
    if config.reward_urls().is_some() {
        recorded["reward_servers"] = true.into(); // where they stand changes nothing
    }
    EngineArgs::record_in(&mut recorded);
    let spec = StageSpec {
        stage: "ppo",
        output: &inputs.output,
        config: recorded,
        seed: config.seed,
        inputs: files,
    };
    Ok(ranks.begin(spec, &AMOUNTS)?)
}

/// Everything a run holds.
struct Stage<'a> {
    ranks: &'a Ranks,
    config: &'a Config,
    model: &'a Model,
    options: LoadOptions,
    output: PathBuf,
    chat: Chat<'a>,
    prompts: Prompts,
    rewards: RewardModels,
    yardstick: Option<Yardstick>,
    sampler: Sampler,
    /// Servers that sample in this process's place.
    engines: Option<Engines>,
    models: Models<'a>,
    optimisers: Optimisers,
    schedules: Schedules,
    store: CheckpointStore,
    metrics: MetricsWriter,
    state: State,
    /// The newest iteration that has a checkpoint, and whether its probe is in it.
    saved: Option<(u64, Option<u64>)>,
}

impl<'a> Stage<'a> {
    #[expect(clippy::too_many_arguments, reason = "what a run is made of")]
    fn new(
        ranks: &'a Ranks,
        config: &'a Config,
        inputs: &TrainInputs,
        named: &[NamedReward],
        turns: Turns,
        (source, model): (&Source, &'a Model),
        options: &LoadOptions,
        run: &StageRun,
        name: &str,
    ) -> Result<Self> {
        let output = run.output().to_owned();
        let chat = model.chat()?;
        let sampler = Sampler {
            turns,
            kind: config.rollout,
            max_new_tokens: config.max_new_tokens,
            temperature: config.temperature,
            stop_ids: model.stop_ids()?,
            samples_per_prompt: config.samples_per_prompt,
            max_rows: config.max_rows,
            seed: config.seed,
        };
        // Reward models also read what closes the last turn.
        let turns = &sampler.turns;
        let reserved = config.rollout.n_turns(turns.len()) * config.max_new_tokens
            + sampler.n_question_tokens(&chat)?
            + chat.next_turn(false, "")?.len();
        let context = model.config.max_position_embeddings;
        let prompts = Prompts::read(&inputs.prompts, &chat, context, reserved)?;
        left_out::write(&output, &prompts.left_out)?;
        let mut rewards = match &config.programmed_reward {
            Some(rule) => RewardModels::programmed(rule, turns, config.rollout),
            None => RewardModels::load(named, model, turns, config.rollout)?,
        };
        if let Some(weights) = &config.weights {
            rewards.weigh(weights)?;
        }
        if let (Some(urls), None) = (config.reward_urls(), &config.programmed_reward) {
            let base = Base { model, chat: &chat, micro_batch_tokens: config.micro_batch_tokens };
            let servers = (urls, &config.server, config.reward_tolerance);
            let journal = output.join(ROLLOUTS).join(SCORES);
            rewards.serve(servers, named, turns, base, &prompts.train, &journal)?;
        }
        let yardstick = match &inputs.yardstick {
            Some(dir) => Some(Yardstick::load(dir, source, model, options)?),
            None => None,
        };

        let models = Models::new(&model.decoder, config)?;
        let mut optimisers = Optimisers::new(&models, config)?;
        let store = CheckpointStore::new(
            &output,
            run.fingerprint(),
            runtime::dtype_name(options.dtype),
            config.keep_checkpoints,
        );
        let found = if ranks.is_first() { store.latest::<State>()? } else { None };
        let loaded = ranks.share_checkpoint(found)?;
        let saved = loaded.as_ref().map(|loaded| (loaded.step, loaded.state.probed));
        let state = match loaded {
            Some(loaded) => {
                optimisers.policy.load_state(POLICY, &loaded.tensors)?;
                if let Some(critic) = &mut optimisers.critic {
                    critic.load_state(CRITIC, &loaded.tensors)?;
                }
                optimisers.scale = loaded.state.loss_scale;
                tracing::info!(iteration = loaded.step, "resuming from checkpoint");
                loaded.state
            }
            None => State {
                iteration: 0,
                episodes: 0,
                kl_coef: config.kl_coef,
                probed: None,
                best: None,
                first_probe: None,
                highest_probe: None,
                standardisation: None,
                loss_scale: optimisers.scale,
            },
        };
        tracing::info!(
            prompts = prompts.train.len(),
            validation = prompts.validation.len(),
            policy_parameters = optimisers.policy.n_parameters(),
            critic_parameters = optimisers.critic.as_ref().map_or(0, AdamW::n_parameters),
            rewards = rewards.names().join(", "),
            algorithm = config.algorithm.name(),
            dtype = runtime::dtype_name(options.dtype),
            "policy and reward models over one base"
        );
        if let Some((iteration, _)) = saved
            && ranks.is_first()
        {
            journal::remove_through(&output.join(ROLLOUTS), iteration)?;
            for dir in [ROLLOUTS, "completions"] {
                seal::check_all(&output.join(dir))?;
            }
        }
        // After the journals that a checkpoint made needless are gone, and before anything is sampled.
        let engines = match config.engines.urls() {
            Some(_) => {
                let place = fs_err::canonicalize(&output)?;
                let own = format!("{} {}", place.display(), run.fingerprint());
                Some(Engines::connect(
                    ranks,
                    (&config.engines, &config.server),
                    (model, &chat),
                    (name, &own),
                    &output,
                    &output.join(ROLLOUTS),
                )?)
            }
            None => None,
        };
        if yardstick.is_none() {
            tracing::info!("no yardstick: nothing watches for over-optimisation");
        }
        // Of the last iteration its own line, and that of its probe if it was probed.
        let logged = saved.filter(|_| ranks.is_first()).map(|(iteration, probed)| {
            (iteration, usize::from(iteration > 0) + usize::from(probed == Some(iteration)))
        });
        let metrics = MetricsWriter::open_within(&output, logged)?;
        Ok(Self {
            ranks,
            schedules: Schedules::new(config)?,
            options: *options,
            config,
            model,
            output,
            chat,
            prompts,
            rewards,
            yardstick,
            sampler,
            engines,
            models,
            optimisers,
            store,
            metrics,
            state,
            saved,
        })
    }

    /// Every iteration and probe that is left, and the results.
    fn train(mut self, name: &str, source: &Source) -> Result<Map<String, Value>> {
        self.calibrate()?;
        match self.iterate_and_probe() {
            // Raised before an iteration's first step or within a probe: the weights are those after a whole iteration.
            Err(error) if spread::signal_of(&error).is_some() => {
                self.checkpoint()?;
                return Err(error);
            }
            other => other?,
        }
        if !self.ranks.is_first() {
            return Ok(Map::new());
        }
        if let Some(engines) = self.engines.take() {
            engines.close()?;
        }
        let scores = self.output.join(ROLLOUTS).join(SCORES);
        if scores.exists() {
            fs_err::remove_file(scores)?;
        }
        self.finish(name, source)
    }

    fn iterate_and_probe(&mut self) -> Result<()> {
        let total = self.config.iterations;
        // One process shows how far all are.
        let start = || arete_records::progress::start("ppo", "iterations", total);
        let progress = self.ranks.is_first().then(start);
        progress.iter().for_each(|progress| progress.skip(self.state.iteration));
        loop {
            if self.is_due(self.config.probe_every)
                && self.state.probed != Some(self.state.iteration)
            {
                self.probe()?;
                self.state.probed = Some(self.state.iteration);
                self.checkpoint()?;
            }
            if self.state.iteration == total {
                return Ok(());
            }
            let note = self.iterate()?;
            if let Some(progress) = &progress {
                progress.message(note);
                progress.inc(1);
            }
            // With a probe, the checkpoint is written when that is over.
            if self.is_due(self.config.checkpoint_every) && !self.is_due(self.config.probe_every) {
                self.checkpoint()?;
            }
        }
    }

    /// The servers, asked for the policy as it is now.
    fn serving(&self) -> Option<Serving<'_>> {
        let version = self.state.iteration;
        self.engines.as_ref().map(|engines| Serving { engines, version })
    }

    /// Whether what is done before the first iteration, after the last, and every so many, is due now.
    fn is_due(&self, every: u64) -> bool {
        let n_done = self.state.iteration;
        n_done == 0
            || n_done == self.config.iterations
            || (every > 0 && n_done.is_multiple_of(every))
    }

    /// One rollout and its updates, and their files; a note for the progress bar.
    fn iterate(&mut self) -> Result<String> {
        let started = Instant::now();
        spread::check_interrupt(self.ranks)?;
        let config = self.config;
        let iteration = self.state.iteration + 1;
        let rates = self.schedules.rates(self.state.iteration);
        let drawn = draw(self.prompts.train.len(), config.n_prompts(), iteration, config.seed);
        let prompts: Vec<&Prompt> = drawn.iter().map(|&idx| &self.prompts.train[idx]).collect();
        let rollouts = self.output.join(ROLLOUTS);
        let version = self.state.iteration;
        let serving = self.engines.as_ref().map(|engines| Serving { engines, version });
        let mut journal = match serving {
            // Their replies have a journal of their own.
            Some(_) => None,
            None => Some(Journal::open(
                &rollouts,
                iteration,
                config.rollout_size,
                config.samples_per_prompt,
            )?),
        };
        let work = Iteration {
            ranks: self.ranks,
            config,
            model: self.model,
            chat: &self.chat,
            rewards: &self.rewards,
            sampler: &self.sampler,
            serving,
            iteration,
            kl_coef: self.state.kl_coef,
            rates,
        };
        let outcome = work.run(&self.models, &mut self.optimisers, &prompts, journal.as_mut())?;
        let Outcome { conversations, assessment, report, mut metrics, phases } = outcome;

        let rows =
            assess::rows(iteration, &conversations, &prompts, &assessment, &self.sampler.turns);
        let path = rollouts.join(format!("iteration-{iteration:06}.parquet"));
        write_rows(&path, &rows)?;
        write_scores(&path, &rows, &assessment.scores)?;
        if iteration == 1 {
            self.check_standardisation(&conversations, &assessment.scores, &mut metrics);
        }
        let mean_kl = stats::mean(&assessment.kl);
        let kl_coef = self.state.kl_coef;
        self.state.iteration = iteration;
        self.state.episodes += conversations.len() as u64;
        self.state.kl_coef = config.kl_controller().next(kl_coef, mean_kl, conversations.len());
        self.state.loss_scale = self.optimisers.scale;
        metrics.push(("episode".to_owned(), self.state.episodes as f64));
        log(&mut self.metrics, iteration, &metrics)?;
        let seconds = started.elapsed().as_secs_f64();
        self.log_phases(&phases, seconds, conversations.len())?;
        self.ranks.log_traffic(&self.output, ("iteration", iteration))?;
        let (paid, reward) = (stats::mean(&assessment.paid), stats::mean(&assessment.reward));
        tracing::info!(
            iteration,
            score = round(paid),
            reward = round(reward),
            kl = round(mean_kl),
            approx_kl = round(report.approx_kl),
            value_loss = round(report.value_loss),
            seconds = round(seconds),
            "iteration"
        );
        Ok(format!("score {paid:.3}, KL {mean_kl:.2}"))
    }

    /// Do the statistics fit the policy that this run starts from? Told in log, metrics and `run.json`; no reason to stop.
    fn check_standardisation(
        &mut self,
        conversations: &[Conversation],
        scores: &Scores,
        metrics: &mut Vec<(String, f64)>,
    ) {
        let prompts: Vec<usize> = conversations.iter().map(|c| c.prompt).collect();
        let mut found = BTreeMap::new();
        for (idx, member) in self.rewards.members.iter().enumerate() {
            let Some(statistics) = member.stats.as_ref().filter(|stats| stats.n > 0) else {
                continue;
            };
            let z = Scores::column(&scores.z, idx);
            let Some(result) = Standardisation::of(&z, &prompts, statistics) else { continue };
            let Standardisation { z, limit, spread, fits } = result;
            if !fits {
                tracing::warn!(
                    reward = member.name,
                    z,
                    limit,
                    spread,
                    statistics = statistics.source,
                    "the policy's first scores are not standardised (mean 0 within the limit, spread 0.6 to 1.6): the score \
                     statistics are of other replies than this run starts from, and every weight in standard deviations \
                     means something else"
                );
            }
            metrics.push((format!("z_limit_{}", member.name), limit));
            found.insert(member.name.clone(), result);
        }
        self.state.standardisation = Some(found);
    }

    /// Wall times and throughput, a line a phase, and TRL's `eps` (conversations a second) for the whole.
    fn log_phases(&self, phases: &[Phase], seconds: f64, n: usize) -> Result<()> {
        let iteration = ("iteration", self.state.iteration.into());
        for phase in phases {
            let tokens_per_s = phase.tokens_per_s();
            let fields = [
                iteration.clone(),
                ("n_tokens", phase.n_tokens.into()),
                ("tokens_per_s", tokens_per_s.into()),
            ];
            timings::log(&self.output, phase.what, phase.seconds, &fields)?;
            tracing::debug!(phase = phase.what, seconds = phase.seconds, tokens_per_s, "phase");
        }
        let fields = [iteration, ("eps", (n as f64 / seconds).into())];
        Ok(timings::log(&self.output, "iteration", seconds, &fields)?)
    }

    /// Writes the state after the last whole iteration, unless that was done.
    fn checkpoint(&mut self) -> Result<()> {
        let iteration = self.state.iteration;
        let state = Some((iteration, self.state.probed));
        if self.saved == state || !self.ranks.is_first() {
            return Ok(());
        }
        self.metrics.flush()?;
        let clock = Clock { output: &self.output, iteration };
        clock.time("checkpoint", |_| {
            let mut tensors = self.optimisers.policy.state(POLICY);
            tensors.extend(self.optimisers.critic.iter().flat_map(|critic| critic.state(CRITIC)));
            let protect: Vec<u64> = self.best().into_iter().collect();
            Ok(self.store.save(iteration, &tensors, &self.state, &protect)?)
        })?;
        self.saved = state;
        journal::remove_through(&self.output.join(ROLLOUTS), iteration)
    }

    /// The iteration whose weights may be selected.
    fn best(&self) -> Option<u64> {
        match self.config.select {
            // Where every probe so far rang the alarm, the start is the best.
            Select::Best if self.state.first_probe.is_some() => {
                Some(self.state.best.map_or(0, |best| best.iteration))
            }
            Select::Best | Select::Last => None,
        }
    }

    fn timed<T>(
        &mut self,
        what: &'static str,
        iteration: u64,
        work: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let started = Instant::now();
        let out = work(self)?;
        let seconds = started.elapsed().as_secs_f64();
        timings::log(&self.output, what, seconds, &[("iteration", iteration.into())])?;
        Ok(out)
    }
}

/// Logs how long the phases of an iteration take, and how many tokens went through them.
struct Clock<'a> {
    output: &'a Path,
    iteration: u64,
}

impl Clock<'_> {
    fn time<T>(&self, what: &str, work: impl FnOnce(&mut usize) -> Result<T>) -> Result<T> {
        let started = Instant::now();
        let mut n_tokens = 0;
        let out = work(&mut n_tokens)?;
        let seconds = started.elapsed().as_secs_f64();
        let fields = [("iteration", self.iteration.into()), ("n_tokens", n_tokens.into())];
        timings::log(self.output, what, seconds, &fields)?;
        Ok(out)
    }
}

/// Mean standardised score of a conversation.
fn z_mean(row: &RolloutRow) -> f64 {
    stats::mean(&row.z())
}

fn log(metrics: &mut MetricsWriter, step: u64, line: &[(String, f64)]) -> Result<()> {
    let line: Vec<(&str, f64)> = line.iter().map(|(name, value)| (name.as_str(), *value)).collect();
    Ok(metrics.log(step, &line)?)
}

/// Four significant places after the point, for the log.
fn round(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}
