//! The stage: from files to files, an iteration at a time.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use arete_chain::reading;
use arete_chain::reward_model::Base;
use arete_model::adapter_files::{self, AdapterMeta, Task};
use arete_model::{Batch, Chat, LoadOptions, Model, Source, merge};
use arete_records::rows::RolloutRow;
use arete_records::stats::{self, Resampling};
use arete_records::{Aspect, ScoreStats, Split, atomic, left_out, parquet, score_stats};
use arete_stage::metrics::MetricsWriter;
use arete_stage::run::{self, Completion, StageRun, StageSpec, Start};
use arete_stage::{interrupt, timings};
use arete_training::{CheckpointStore, Schedule, Select, runtime};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::alarm::{Baseline, Change};
use crate::assess;
use crate::iteration::{Iteration, Outcome, Phase};
use crate::journal::{self, Journal};
use crate::probe::Probe;
use crate::prompts::{Prompt, Prompts, draw};
use crate::rollout::{Purpose, Sampler};
use crate::scorer::{Ensemble, Yardstick};
use crate::update::{LossScale, Models, Optimisers, Rates};
use crate::{Config, Error};

/// Names of the optimisers inside checkpoints.
const POLICY: &str = "policy";
const CRITIC: &str = "critic";
/// Directory of the sampled conversations.
const ROLLOUTS: &str = "rollouts";
/// Prompts whose logits are compared between the merged model and the adapter.
const N_COMPARED: usize = 8;
/// Conversations shown in the log after a probe.
const N_SHOWN: usize = 3;

/// What to train on and where to write.
#[derive(Clone, Debug)]
pub struct TrainInputs {
    /// Directory with `prompts.parquet`.
    pub prompts: PathBuf,
    /// Directory with `<aspect>/adapter`; none for a programmed reward.
    pub rewards: Option<PathBuf>,
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
/// Bad settings or data, an unusable model, an interrupt, a full disk: see [`Error`].
pub fn train(config: &Config, inputs: &TrainInputs) -> Result<(), Error> {
    config.check()?;
    let name = config.model.as_deref().ok_or_else(|| setting("model", "a base model"))?;
    if inputs.rewards.is_some() == config.programmed_reward.is_some() {
        return Err(setting("rewards", "either --rewards or --programmed-reward"));
    }
    let source = Source::fetch(name)?;
    let run = match open(config, inputs, &source)? {
        Start::UpToDate(_) => {
            tracing::info!(output = %inputs.output.display(), "up to date");
            return Ok(());
        }
        Start::Run(run) => run,
    };
    let options = config.compute.start()?;
    let model = Model::load(&source, &options)?;
    let counts = Stage::new(config, inputs, &model, &options, &run)?.train(name, &source)?;
    if let Some(bytes) = runtime::peak_rss_bytes() {
        tracing::info!(mib = bytes >> 20, "peak memory");
        timings::log(run.output(), "memory", 0.0, &[("peak_rss_bytes", bytes.into())])?;
    }
    run.finish(Completion {
        device: runtime::device_name(options.device),
        dtype: runtime::dtype_name(options.dtype).to_owned(),
        counts,
    })?;
    Ok(())
}

fn setting(name: &'static str, expected: &str) -> Error {
    let got = if name == "rewards" { "both or neither" } else { "none" };
    Error::Setting { name, expected: expected.to_owned(), got: got.to_owned() }
}

fn open(config: &Config, inputs: &TrainInputs, source: &Source) -> Result<Start, Error> {
    let mut files = vec![("prompts".to_owned(), inputs.prompts.clone())];
    let mut push = |name: String, path: PathBuf| {
        if path.exists() {
            files.push((name, path));
        }
    };
    for aspect in Aspect::ALL {
        if let Some(dir) = &inputs.rewards {
            let dir = dir.join(aspect.name());
            push(format!("reward_{aspect}"), dir.join("adapter"));
            push(format!("reward_{aspect}_stats"), dir.join(score_stats::FILE));
            push(format!("reward_{aspect}_reading"), dir.join(reading::FILE));
        }
    }
    if let Some(dir) = &inputs.yardstick {
        for part in ["adapter", "merged", score_stats::FILE, reading::FILE] {
            push(format!("yardstick_{part}"), dir.join(part));
        }
    }
    let mut recorded = config.clone();
    if let Some(path) = source.local_path() {
        push("model".to_owned(), path.to_owned());
        recorded.model = None; // its contents are an input; where they lie changes nothing
    }
    let mut recorded = serde_json::to_value(&recorded).expect("settings are numbers and words");
    arete_training::forget_harmless(&mut recorded, &["max_rows", "keep_graph_tokens"]);
    Ok(run::begin(StageSpec {
        stage: "ppo",
        output: &inputs.output,
        config: recorded,
        seed: config.seed,
        inputs: files,
    })?)
}

/// What a checkpoint holds beside the tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct State {
    /// Iterations finished.
    iteration: u64,
    /// Conversations sampled in all of them.
    episodes: u64,
    /// Weight of the KL penalty from here on.
    kl_coef: f64,
    /// The newest iteration that was probed.
    probed: Option<u64>,
    /// The best probe after an iteration.
    best: Option<Best>,
    /// The probe before the first iteration: its score, and what later ones are measured against.
    first_probe: Option<(f64, Baseline)>,
    /// The probe that the yardstick liked best.
    highest_probe: Option<Baseline>,
    /// Loss scale of an f16 run.
    loss_scale: LossScale,
}

/// A probe that none was better than.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Best {
    iteration: u64,
    /// Mean of what the scores pay.
    score: f64,
}

/// The learning rates of policy and critic.
struct Schedules {
    policy: Schedule,
    critic: Schedule,
}

impl Schedules {
    fn new(config: &Config) -> Result<Self, Error> {
        let of =
            |peak| Schedule::new(config.schedule, peak, config.warmup_ratio, config.iterations);
        Ok(Self { policy: of(config.learning_rate)?, critic: of(config.value_learning_rate)? })
    }

    fn rates(&self, n_done: u64) -> Rates {
        Rates {
            policy: self.policy.learning_rate(n_done),
            critic: self.critic.learning_rate(n_done),
        }
    }
}

/// Everything a run holds.
struct Stage<'a> {
    config: &'a Config,
    model: &'a Model,
    options: LoadOptions,
    output: PathBuf,
    chat: Chat<'a>,
    prompts: Prompts,
    ensemble: Ensemble,
    yardstick: Option<Yardstick>,
    sampler: Sampler,
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
    fn new(
        config: &'a Config,
        inputs: &TrainInputs,
        model: &'a Model,
        options: &LoadOptions,
        run: &StageRun,
    ) -> Result<Self, Error> {
        let output = run.output().to_owned();
        let chat = model.chat()?;
        let sampler = Sampler {
            kind: config.rollout,
            max_new_tokens: config.max_new_tokens,
            temperature: config.temperature,
            stop_ids: model.stop_ids()?,
            max_rows: config.max_rows,
            seed: config.seed,
        };
        // Reward models also read what closes the last turn.
        let reserved = config.rollout.n_turns() * config.max_new_tokens
            + sampler.n_question_tokens(&chat)?
            + chat.next_turn(false, "")?.len();
        let context = model.config.max_position_embeddings;
        let prompts = Prompts::read(&inputs.prompts, &chat, context, reserved)?;
        left_out::write(&output, &prompts.left_out)?;
        let ensemble = match (&inputs.rewards, &config.programmed_reward) {
            (Some(dir), _) => Ensemble::load(dir, model, config.rollout)?,
            (None, Some(rule)) => Ensemble::programmed(rule, config.rollout),
            (None, None) => unreachable!("checked in train"),
        };
        let yardstick = match &inputs.yardstick {
            Some(dir) => Some(Yardstick::load(dir, model, options)?),
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
        let loaded = store.latest::<State>()?;
        let saved = loaded.as_ref().map(|loaded| (loaded.step, loaded.state.probed));
        let state = match loaded {
            Some(loaded) => {
                optimisers.policy.load_state(POLICY, &loaded.tensors)?;
                optimisers.critic.load_state(CRITIC, &loaded.tensors)?;
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
                loss_scale: optimisers.scale,
            },
        };
        tracing::info!(
            prompts = prompts.train.len(),
            validation = prompts.validation.len(),
            policy_parameters = optimisers.policy.n_parameters(),
            critic_parameters = optimisers.critic.n_parameters(),
            dtype = runtime::dtype_name(options.dtype),
            "policy, critic and reward models over one base"
        );
        if let Some((iteration, _)) = saved {
            journal::remove_through(&output.join(ROLLOUTS), iteration)?;
        }
        if yardstick.is_none() {
            tracing::info!("no yardstick: nothing watches for over-optimisation");
        }
        // Of the last iteration its own line, and that of its probe if it was probed.
        let logged = saved.map(|(iteration, probed)| {
            (iteration, usize::from(iteration > 0) + usize::from(probed == Some(iteration)))
        });
        let metrics = MetricsWriter::open_within(&output, logged)?;
        Ok(Self {
            schedules: Schedules::new(config)?,
            options: *options,
            config,
            model,
            output,
            chat,
            prompts,
            ensemble,
            yardstick,
            sampler,
            models,
            optimisers,
            store,
            metrics,
            state,
            saved,
        })
    }

    /// Every iteration and probe that is left, and the results.
    fn train(mut self, name: &str, source: &Source) -> Result<Map<String, Value>, Error> {
        self.calibrate()?;
        match self.iterate_and_probe() {
            // Raised before an iteration's first step or within a probe: the weights are those after a whole iteration.
            Err(Error::Interrupted(interrupted)) => {
                self.checkpoint()?;
                return Err(interrupted.into());
            }
            other => other?,
        }
        self.finish(name, source)
    }

    fn iterate_and_probe(&mut self) -> Result<(), Error> {
        let total = self.config.iterations;
        let progress = arete_records::progress::start("ppo", "iterations", total);
        progress.skip(self.state.iteration);
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
            progress.message(self.iterate()?);
            progress.inc(1);
            // With a probe, the checkpoint is written when that is over.
            if self.is_due(self.config.checkpoint_every) && !self.is_due(self.config.probe_every) {
                self.checkpoint()?;
            }
        }
    }

    /// Whether what is done before the first iteration, after the last, and every so many, is due now.
    fn is_due(&self, every: u64) -> bool {
        let n_done = self.state.iteration;
        n_done == 0
            || n_done == self.config.iterations
            || (every > 0 && n_done.is_multiple_of(every))
    }

    /// Takes the statistics of reward models that came without, once: a resumed run reads them back.
    fn calibrate(&mut self) -> Result<(), Error> {
        let missing: Vec<&str> = self
            .ensemble
            .members
            .iter()
            .filter(|member| member.stats.is_none())
            .map(|member| member.aspect.name())
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let path = self.output.join(score_stats::FILE);
        if !path.exists() {
            let missing = missing.join(", ");
            tracing::info!(missing, "no score statistics: taking them on the reference's replies");
            self.timed("statistics", 0, |stage| stage.measure_scores(&path))?;
        }
        // Read back even when they were just written, so that a resumed run uses the same bits.
        let bytes = fs_err::read(&path)?;
        let stored: BTreeMap<Aspect, ScoreStats> =
            serde_json::from_slice(&bytes).map_err(|error| Error::NotAReward {
                path,
                expected: "the score statistics this stage wrote",
                got: error.to_string(),
            })?;
        for member in &mut self.ensemble.members {
            if member.stats.is_none() {
                member.stats = stored.get(&member.aspect).cloned();
            }
        }
        Ok(())
    }

    fn measure_scores(&mut self, path: &Path) -> Result<(), Error> {
        let (prompts, split) = if self.prompts.validation.is_empty() {
            tracing::warn!("no validation prompts: score statistics are of training prompts");
            (&self.prompts.train, Split::Train)
        } else {
            (&self.prompts.validation, Split::Validation)
        };
        let prompts: Vec<&Prompt> =
            prompts.iter().cycle().take(self.config.stats_samples).collect();
        let purpose = Purpose::Statistics;
        let conversations =
            self.sampler.sample(self.model, &self.chat, None, &prompts, purpose, 0, None)?;
        let base = Base {
            model: self.model,
            chat: &self.chat,
            micro_batch_tokens: self.config.micro_batch_tokens,
        };
        let (raw, _) = self.ensemble.raw_scores(base, &conversations)?;
        self.ensemble.calibrate(&raw, split.name(), &self.model.base_sha256)?;
        let stats: BTreeMap<Aspect, &ScoreStats> = self
            .ensemble
            .members
            .iter()
            .filter_map(|member| Some((member.aspect, member.stats.as_ref()?)))
            .collect();
        let json = serde_json::to_vec_pretty(&stats).expect("finite numbers serialise");
        atomic::write(path, &json)?;
        for member in &mut self.ensemble.members {
            member.stats = None;
        }
        Ok(())
    }

    /// One rollout and its updates, and their files; a note for the progress bar.
    fn iterate(&mut self) -> Result<String, Error> {
        let started = Instant::now();
        interrupt::check()?;
        let config = self.config;
        let iteration = self.state.iteration + 1;
        let rates = self.schedules.rates(self.state.iteration);
        let drawn = draw(self.prompts.train.len(), config.rollout_size, iteration, config.seed);
        let prompts: Vec<&Prompt> = drawn.iter().map(|&idx| &self.prompts.train[idx]).collect();
        let rollouts = self.output.join(ROLLOUTS);
        let mut journal = Journal::open(&rollouts, iteration, prompts.len())?;
        let work = Iteration {
            config,
            model: self.model,
            chat: &self.chat,
            ensemble: &self.ensemble,
            sampler: &self.sampler,
            iteration,
            kl_coef: self.state.kl_coef,
            rates,
        };
        let outcome = work.run(&self.models, &mut self.optimisers, &prompts, Some(&mut journal))?;
        let Outcome { conversations, assessment, report, mut metrics, phases } = outcome;

        let rows = assess::rows(iteration, &conversations, &prompts, &assessment);
        write_rows(&rollouts.join(format!("iteration-{iteration:06}.parquet")), &rows)?;
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

    /// Wall times and throughput, a line a phase, and TRL's `eps` (conversations a second) for the whole.
    fn log_phases(&self, phases: &[Phase], seconds: f64, n: usize) -> Result<(), Error> {
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

    /// Answers validation prompts, logs how that went, keeps the best, and warns of over-optimisation.
    fn probe(&mut self) -> Result<(), Error> {
        if self.prompts.validation.is_empty() {
            tracing::warn!("no validation prompts: nothing is probed");
            return Ok(());
        }
        let iteration = self.state.iteration;
        let config = self.config;
        let clock = Clock { output: &self.output, iteration };
        let n_prompts = config.probe_prompts;
        let probe = Probe {
            model: self.model,
            chat: &self.chat,
            ensemble: &self.ensemble,
            yardstick: self.yardstick.as_ref(),
            prompts: self.prompts.validation.iter().take(n_prompts).collect(),
            sampler: Sampler { temperature: config.probe_temperature(), ..self.sampler.clone() },
        };
        let mut report = clock.time("probe", |n| {
            let report = probe.run(&self.models.policy, config, self.state.kl_coef, iteration)?;
            *n = report.n_sampled();
            Ok(report)
        })?;
        write_rows(&completions_path(&self.output, iteration), &report.rows)?;
        show(&report.rows, &probe.prompts);
        tracing::info!(
            iteration,
            score = round(report.score),
            z_mean = round(report.z_mean),
            "probe"
        );
        let mut is_hacked = false;
        if let Some((_, first)) = &self.state.first_probe {
            let highest = self.state.highest_probe.as_ref().unwrap_or(first);
            let since = |earlier| Change::between(earlier, &report.baseline, config.seed);
            let (metrics, alarm) = watch(since(first), since(highest), iteration);
            report.metrics.extend(metrics);
            is_hacked = alarm;
        } else {
            self.state.first_probe = Some((report.score, report.baseline.clone()));
        }
        let highest = &mut self.state.highest_probe;
        if highest.as_ref().is_none_or(|highest| report.baseline.is_above(highest)) {
            *highest = Some(report.baseline.clone());
        }
        log(&mut self.metrics, iteration, &report.metrics)?;
        let is_better = self.state.best.is_none_or(|best| report.score > best.score);
        if iteration > 0 && is_better && !is_hacked {
            self.state.best = Some(Best { iteration, score: report.score });
        }
        Ok(())
    }

    /// Writes the state after the last whole iteration, unless that was done.
    fn checkpoint(&mut self) -> Result<(), Error> {
        let iteration = self.state.iteration;
        let state = Some((iteration, self.state.probed));
        if self.saved == state {
            return Ok(());
        }
        self.metrics.flush()?;
        let clock = Clock { output: &self.output, iteration };
        clock.time("checkpoint", |_| {
            let mut tensors = self.optimisers.policy.state(POLICY);
            tensors.extend(self.optimisers.critic.state(CRITIC));
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

    /// Puts the selected weights in place and writes the results; what there is to count.
    fn finish(mut self, name: &str, source: &Source) -> Result<Map<String, Value>, Error> {
        let last = self.state.iteration;
        let selected = self.best().unwrap_or(last);
        if selected != last {
            let best = self.store.load::<State>(selected)?;
            self.optimisers.policy.load_parameters(POLICY, &best.tensors)?;
        }
        self.metrics.flush()?;
        self.store.keep_only(&[last, selected])?;
        tracing::info!(selected, "weights selected");
        if selected == 0 && last > 0 {
            tracing::warn!(
                "every probe after an iteration rang the alarm for over-optimisation: the start is the result"
            );
        }
        if let (Some((first, _)), Some(best)) = (&self.state.first_probe, self.state.best)
            && best.score < *first
        {
            tracing::warn!(
                before = round(*first),
                best = round(best.score),
                "no probe after an iteration is as good as the one before the first: the policy is worse than its base"
            );
        }
        self.models.policy.set_trainable(false);
        let policy = &self.models.policy;
        let meta = AdapterMeta::of(self.model, name, Task::CausalLm);
        adapter_files::save(&self.output.join("adapter"), policy, None, &meta)?;

        let mut counts = Map::new();
        counts.insert("iterations".to_owned(), last.into());
        counts.insert("episodes".to_owned(), self.state.episodes.into());
        counts.insert("train".to_owned(), self.prompts.train.len().into());
        counts.insert("validation".to_owned(), self.prompts.validation.len().into());
        counts.insert("selected_iteration".to_owned(), selected.into());
        counts.extend(self.probe_difference(selected, last)?);
        if self.config.merge {
            let difference = self.merge(source)?;
            counts.insert("max_logit_difference_merged".to_owned(), difference.into());
        }
        Ok(counts)
    }

    /// The reward models' mean on validation prompts, before and after, with 95 % intervals of the difference: for the selected
    /// weights, whose interval does not know that they were chosen on these prompts, and for the last, which were not chosen.
    fn probe_difference(&self, selected: u64, last: u64) -> Result<Map<String, Value>, Error> {
        let mut out = Map::new();
        let Some(before) = self.probed_scores(0)? else { return Ok(out) };
        let resampling = Resampling::seeded(self.config.seed);
        for (name, iteration) in
            [("probe_z_difference", selected), ("probe_z_difference_last", last)]
        {
            let Some(after) = self.probed_scores(iteration)? else { continue };
            let change = stats::paired_difference_of(&before, &after, stats::mean, resampling);
            let interval = change.interval;
            let [mean_before, mean_after] = [&before, &after].map(|z| stats::mean(&z.concat()));
            tracing::info!(
                iteration,
                before = round(mean_before),
                after = round(mean_after),
                difference = round(interval.estimate),
                low = round(interval.low),
                high = round(interval.high),
                "ensemble on validation prompts"
            );
            out.insert(name.to_owned(), json!(interval));
            if iteration == selected {
                out.insert("probe_z_before".to_owned(), mean_before.into());
                out.insert("probe_z_after".to_owned(), mean_after.into());
            }
        }
        Ok(out)
    }

    /// Mean standardised score of each probed conversation, if that iteration was probed.
    fn probed_scores(&self, iteration: u64) -> Result<Option<Vec<Vec<f64>>>, Error> {
        let path = completions_path(&self.output, iteration);
        if !path.exists() {
            return Ok(None);
        }
        let rows: Vec<RolloutRow> = parquet::read(path)?;
        Ok(Some(rows.iter().map(|row| vec![z_mean(row)]).collect()))
    }

    /// Writes the merged model; the largest difference between its logits and the adapter's.
    fn merge(&self, source: &Source) -> Result<f64, Error> {
        let output = self.output.join("merged");
        let policy = &self.models.policy;
        let LoadOptions { dtype, nf4, .. } = self.options;
        let dtype = merge::output_dtype(source, dtype)?;
        merge::write_model(source, Some(policy), None, &output, dtype, nf4, Map::new())?;
        let options = LoadOptions { nf4: None, ..self.options };
        let merged = Model::streamed(&Source::Directory(output), &options)?;
        let all = if self.prompts.validation.is_empty() {
            &self.prompts.train
        } else {
            &self.prompts.validation
        };
        let prompts: Vec<&[i64]> =
            all.iter().take(N_COMPARED).map(|prompt| prompt.token_ids.as_slice()).collect();
        let batch = Batch::from_sequences(&prompts);
        let difference = merge::max_logit_difference(&merged, self.model, policy, &batch)?;
        tracing::info!(difference, "largest |Δlogit| between merged model and adapter");
        Ok(difference)
    }

    fn timed<T>(
        &mut self,
        what: &'static str,
        iteration: u64,
        work: impl FnOnce(&mut Self) -> Result<T, Error>,
    ) -> Result<T, Error> {
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
    fn time<T>(
        &self,
        what: &str,
        work: impl FnOnce(&mut usize) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let started = Instant::now();
        let mut n_tokens = 0;
        let out = work(&mut n_tokens)?;
        let seconds = started.elapsed().as_secs_f64();
        let fields = [("iteration", self.iteration.into()), ("n_tokens", n_tokens.into())];
        timings::log(self.output, what, seconds, &fields)?;
        Ok(out)
    }
}

fn completions_path(output: &Path, iteration: u64) -> PathBuf {
    output.join(format!("completions/iteration-{iteration:06}.parquet"))
}

fn write_rows(path: &Path, rows: &[RolloutRow]) -> Result<(), Error> {
    if let Some(dir) = path.parent() {
        fs_err::create_dir_all(dir)?;
    }
    Ok(parquet::write(path, rows)?)
}

/// The first completions of a probe, for the terminal; all of them are in `completions/`.
fn show(rows: &[RolloutRow], prompts: &[&Prompt]) {
    for (row, prompt) in rows.iter().zip(prompts).take(N_SHOWN) {
        let replies = row.messages.iter().skip(prompt.messages.len()).step_by(2);
        let replies: Vec<&str> = replies.map(|message| message.content.as_str()).collect();
        let question = prompt.messages.last().map_or("", |message| message.content.as_str());
        tracing::info!(
            iteration = row.iteration,
            prompt_id = row.prompt_id,
            z_mean = round(z_mean(row)),
            kl = row.kl,
            question,
            replies = replies.join(" | "),
            "completion"
        );
    }
}

/// Mean standardised score of a conversation.
fn z_mean(row: &RolloutRow) -> f64 {
    let z = [row.z_action, row.z_motivation, row.z_consequence];
    let z: Vec<f64> = z.into_iter().flatten().map(f64::from).collect();
    stats::mean(&z)
}

/// What the yardstick says of the change since the first probe and since the one it liked best, for the metrics; and whether
/// the reward models are being gamed, with a warning if so.
fn watch(
    since_first: Option<Change>,
    since_highest: Option<Change>,
    iteration: u64,
) -> (Vec<(String, f64)>, bool) {
    let (Some(first), Some(highest)) = (since_first, since_highest) else {
        return (Vec::new(), false);
    };
    let alarm = [first, highest].iter().any(Change::is_over_optimised);
    if alarm {
        tracing::warn!(
            iteration,
            z_gain = round(first.z.estimate),
            yardstick_gain = round(first.yardstick.estimate),
            yardstick_since_highest = round(highest.yardstick.estimate),
            yardstick_since_highest_high = round(highest.yardstick.high),
            "over-optimisation: the reward models' scores rise, the yardstick falls; stop earlier, raise kl_coef, or \
             choose a more cautious ensemble"
        );
    }
    let metrics = vec![
        ("probe/z_gain".to_owned(), first.z.estimate),
        ("probe/yardstick_gain".to_owned(), first.yardstick.estimate),
        ("probe/yardstick_since_highest".to_owned(), highest.yardstick.estimate),
        ("probe/over_optimised".to_owned(), f64::from(u8::from(alarm))),
    ];
    (metrics, alarm)
}

fn log(metrics: &mut MetricsWriter, step: u64, line: &[(String, f64)]) -> Result<(), Error> {
    let line: Vec<(&str, f64)> = line.iter().map(|(name, value)| (name.as_str(), *value)).collect();
    Ok(metrics.log(step, &line)?)
}

/// Four significant places after the point, for the log.
fn round(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}
