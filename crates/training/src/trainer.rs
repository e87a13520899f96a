//! The step loop of SFT and reward modelling: accumulate, clip, update, log, evaluate, checkpoint, resume.

use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use arete_stage::metrics::MetricsWriter;
use arete_stage::timings;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::order::Plan;
use crate::shards::{self, cut};
use crate::{AdamW, CheckpointStore, Error, LossScale, Passes, Ranks, Schedule, ShardArgs};

/// The optimiser's name inside checkpoints.
const OPTIMISER: &str = "optimiser";

/// What a step computed.
#[derive(Debug, Default)]
pub struct StepReport {
    /// The step's mean loss.
    pub loss: f64,
    /// Tokens that went through the model.
    pub n_tokens: u64,
    /// Further numbers to log, in order.
    pub metrics: Vec<(&'static str, f64)>,
}

/// What an evaluation found; logged as `eval_loss`, `eval_<name>`.
#[derive(Debug, Default)]
pub struct Evaluation {
    /// The mean loss over the validation set; the lower, the better.
    pub loss: f64,
    /// Further numbers to log, without the prefix.
    pub metrics: Vec<(&'static str, f64)>,
}

/// A loss over a data set.
///
/// A step and an evaluation are computed in parts, perhaps by several processes. Of each part an objective gives numbers (sums,
/// or one of each example) in a layout of its own, and from those of all parts, in order, the report.
pub trait Objective {
    /// Adds the gradients of `loss_scale` times what the examples of a shard have in the mean loss over the whole `step` to the
    /// trained tensors; the numbers of the shard.
    ///
    /// # Errors
    ///
    /// Whatever the model refuses.
    fn accumulate(
        &mut self,
        shard: &[usize],
        step: &[usize],
        loss_scale: f64,
    ) -> Result<Vec<f64>, Error>;

    /// How much goes into a pass, and what is kept of it.
    fn passes(&self) -> Passes;

    /// What a step computed, from the numbers of its shards.
    fn report(&self, step: &[usize], shards: &[Vec<f64>]) -> StepReport;

    /// Examples in the validation set.
    fn n_validation(&self) -> usize;

    /// Measures some of the validation set; their numbers.
    ///
    /// # Errors
    ///
    /// Whatever the model refuses.
    fn measure(&mut self, examples: Range<usize>) -> Result<Vec<f64>, Error>;

    /// What an evaluation found, from the numbers of its parts.
    ///
    /// # Errors
    ///
    /// Whatever libtorch refuses.
    fn evaluation(&mut self, parts: &[Vec<f64>]) -> Result<Evaluation, Error>;

    /// A step as one shard.
    ///
    /// # Errors
    ///
    /// As [`Objective::accumulate`].
    fn accumulate_all(&mut self, step: &[usize], loss_scale: f64) -> Result<StepReport, Error> {
        let numbers = self.accumulate(step, step, loss_scale)?;
        Ok(self.report(step, &[numbers]))
    }

    /// Measures the validation set as one part; `None` if there is none.
    ///
    /// # Errors
    ///
    /// As [`Objective::measure`].
    fn evaluate(&mut self) -> Result<Option<Evaluation>, Error> {
        let n = self.n_validation();
        if n == 0 {
            return Ok(None);
        }
        let numbers = self.measure(0..n)?;
        self.evaluation(&[numbers]).map(Some)
    }
}

/// Which weights a run ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Select {
    /// Those of the last step.
    Last,
    /// Those of the evaluation with the lowest validation loss.
    Best,
}

/// Settings of [`train`].
#[derive(Clone, Copy, Debug)]
pub struct LoopConfig {
    /// Learning rates.
    pub schedule: Schedule,
    /// Largest gradient norm; `None` = no clipping.
    pub max_grad_norm: Option<f64>,
    /// Steps between evaluations; 0 = only after the last step.
    pub eval_every: u64,
    /// Steps between checkpoints; 0 = only after the last step and on a signal.
    pub checkpoint_every: u64,
    /// Newest checkpoints kept while training (after it: the last, and the best if selected).
    pub keep_checkpoints: usize,
    /// Which weights to end with.
    pub select: Select,
    /// The cut of a batch.
    pub shards: ShardArgs,
    /// What the model computes in: a checkpoint of another dtype is refused.
    pub dtype: &'static str,
    /// Whether to scale the loss (f16): then a step whose gradients overflow is skipped.
    pub scale_loss: bool,
}

/// What a checkpoint holds beside the tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Steps finished.
    pub global_step: u64,
    /// Tokens that went through the model in all of them.
    pub num_tokens: u64,
    /// Step and validation loss of the best evaluation.
    pub best: Option<(u64, f64)>,
    /// Current loss scale, 1 without scaling, and steps since it last changed.
    pub loss_scale: (f64, u64),
}

/// What [`train`] returns.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The state after the last step.
    pub state: TrainerState,
    /// The step whose weights the trained tensors of the process that writes now hold.
    pub selected_step: u64,
}

/// Trains to the end of the plan, from the newest checkpoint in `output` if there is one.
///
/// Writes `metrics.jsonl`, events, `timings.jsonl` and checkpoints into `output`; the same inputs, settings and
/// `fingerprint` give the same bytes (but for times) however often the run was interrupted. Of several processes ([`Ranks`]) the
/// first alone reads and writes there; the trained tensors of the others are those of its last step.
///
/// # Errors
///
/// [`Error::Interrupted`] after a signal, with a checkpoint written; [`Error::NonFinite`]; [`Error::Checkpoint`] if the
/// checkpoint found is of another run; whatever the model, the disk or libtorch refuse.
pub fn train(
    ranks: &Ranks,
    objective: &mut dyn Objective,
    optimiser: &mut AdamW,
    plan: &Plan,
    config: &LoopConfig,
    output: &Path,
    fingerprint: &str,
) -> Result<Outcome, Error> {
    plan.check()?;
    let store = CheckpointStore::new(output, fingerprint, config.dtype, config.keep_checkpoints);
    ranks.meet()?;
    let found = if ranks.is_first() { store.latest::<TrainerState>()? } else { None };
    let loaded = ranks.share_checkpoint(found)?;
    let resumed_at = loaded.as_ref().map(|loaded| loaded.step);
    let state = match loaded {
        Some(loaded) => {
            optimiser.load_state(OPTIMISER, &loaded.tensors)?;
            tracing::info!(step = loaded.step, "resuming from checkpoint");
            loaded.state
        }
        None => TrainerState {
            global_step: 0,
            num_tokens: 0,
            best: None,
            loss_scale: (LossScale::new(config.scale_loss).factor(), 0),
        },
    };
    let files = match ranks.is_first() {
        true => Some(Files { output, store, metrics: MetricsWriter::open_at(output, resumed_at)? }),
        false => None,
    };
    let mut run = Run { ranks, objective, optimiser, plan, config, files, state };
    run.run_to_end()?;
    run.select()
}

struct Run<'a> {
    ranks: &'a Ranks,
    objective: &'a mut dyn Objective,
    optimiser: &'a mut AdamW,
    plan: &'a Plan,
    config: &'a LoopConfig,
    /// Of the process that writes.
    files: Option<Files<'a>>,
    state: TrainerState,
}

/// What a run leaves.
struct Files<'a> {
    output: &'a Path,
    store: CheckpointStore,
    metrics: MetricsWriter,
}

impl Files<'_> {
    fn time(&self, what: &str, started: Instant, fields: &[(&str, Value)]) -> Result<(), Error> {
        Ok(timings::log(self.output, what, started.elapsed().as_secs_f64(), fields)?)
    }
}

impl Run<'_> {
    fn run_to_end(&mut self) -> Result<(), Error> {
        let total = self.plan.total_steps();
        // One process shows how far all are.
        let start = || arete_records::progress::start("training", "steps", total);
        let progress = self.ranks.is_first().then(start);
        progress.iter().for_each(|progress| progress.skip(self.state.global_step));
        while self.state.global_step < total {
            if let Err(interrupted) = self.ranks.check_interrupt() {
                self.checkpoint()?;
                return Err(interrupted);
            }
            let loss = self.step()?;
            if let Some(progress) = &progress {
                progress.message(format!("loss {loss:.4}"));
                progress.inc(1);
            }
            let n_done = self.state.global_step;
            let is_due =
                |every: u64| n_done == total || (every > 0 && n_done.is_multiple_of(every));
            let improved = is_due(self.config.eval_every) && self.evaluate()?;
            if is_due(self.config.checkpoint_every)
                || (improved && self.config.select == Select::Best)
            {
                self.checkpoint()?;
            }
        }
        Ok(())
    }

    /// One optimiser step; returns its loss.
    fn step(&mut self) -> Result<f64, Error> {
        let started = Instant::now();
        let n_done = self.state.global_step;
        let step = n_done + 1;
        let learning_rate = self.config.schedule.learning_rate(n_done);
        let (loss_scale, _) = self.state.loss_scale;
        let report = self.accumulate(&self.plan.examples(n_done), loss_scale)?;
        if !report.loss.is_finite() {
            return Err(Error::NonFinite { step, what: "the loss".to_owned() });
        }
        let grad_norm = self.update(learning_rate, step)?;
        self.state.global_step = step;
        self.state.num_tokens += report.n_tokens;
        let mut line = vec![("loss", report.loss)];
        line.extend(&report.metrics);
        #[expect(clippy::cast_precision_loss, reason = "token counts are far below 2^52")]
        line.extend([
            ("grad_norm", grad_norm),
            ("learning_rate", learning_rate),
            ("num_tokens", self.state.num_tokens as f64),
            ("epoch", self.plan.epoch(step)),
        ]);
        if self.config.scale_loss {
            line.push(("loss_scale", loss_scale));
        }
        if let Some(files) = &mut self.files {
            files.metrics.log(step, &line)?;
            let fields = [("step", step.into()), ("n_tokens", report.n_tokens.into())];
            files.time("training step", started, &fields)?;
            self.ranks.log_traffic(files.output, ("step", step))?;
        }
        Ok(report.loss)
    }

    /// The gradients of a step, shard by shard.
    fn accumulate(&mut self, step: &[usize], loss_scale: f64) -> Result<StepReport, Error> {
        let ShardArgs { virtual_shards, reduce } = self.config.shards;
        let cuts = cut(step.len(), virtual_shards);
        let sizes: Vec<usize> = cuts.iter().map(Range::len).collect();
        let passes = self.objective.passes();
        let objective = &mut *self.objective;
        let work =
            |shard: usize| objective.accumulate(&step[cuts[shard].clone()], step, loss_scale);
        let optimisers = &mut [&mut *self.optimiser];
        let numbers = shards::accumulate(&passes, self.ranks, reduce, &sizes, optimisers, work)?;
        Ok(self.objective.report(step, &numbers))
    }

    /// Takes the gradients at hand; returns their norm (infinite if an f16 overflow made this step be skipped).
    fn update(&mut self, learning_rate: f64, step: u64) -> Result<f64, Error> {
        let (factor, n_good) = self.state.loss_scale;
        let scale = LossScale { factor: self.config.scale_loss.then_some(factor), n_good };
        if scale.factor.is_some() {
            self.optimiser.scale_gradients(1.0 / factor);
        }
        let (norm, next) = match self.optimiser.step(learning_rate, self.config.max_grad_norm, step)
        {
            Ok(norm) => (norm, scale.after_step()),
            Err(Error::NonFinite { what, .. }) if scale.can_fall() => {
                tracing::warn!(step, what, loss_scale = factor, "overflow in f16, step skipped");
                self.optimiser.zero_grad();
                (f64::INFINITY, scale.after_overflow())
            }
            Err(error) => return Err(error),
        };
        self.state.loss_scale = (next.factor(), next.n_good);
        Ok(norm)
    }

    /// Logs the validation metrics; whether they are the best so far.
    fn evaluate(&mut self) -> Result<bool, Error> {
        let started = Instant::now();
        let Some(evaluation) = self.measure()? else { return Ok(false) };
        let step = self.state.global_step;
        let names: Vec<String> =
            evaluation.metrics.iter().map(|(name, _)| format!("eval_{name}")).collect();
        let mut line = vec![("eval_loss", evaluation.loss)];
        line.extend(names.iter().map(String::as_str).zip(evaluation.metrics.iter().map(|m| m.1)));
        if let Some(files) = &mut self.files {
            files.metrics.log(step, &line)?;
            tracing::info!(step, loss = evaluation.loss, "evaluated");
            files.time("evaluation", started, &[("step", step.into())])?;
        }
        let improved = evaluation.loss.is_finite()
            && self.state.best.is_none_or(|(_, best)| evaluation.loss < best);
        if improved {
            self.state.best = Some((step, evaluation.loss));
        }
        Ok(improved)
    }

    /// The validation set in as many parts as a batch.
    fn measure(&mut self) -> Result<Option<Evaluation>, Error> {
        let n = self.objective.n_validation();
        if n == 0 {
            return Ok(None);
        }
        let cuts = cut(n, self.config.shards.virtual_shards);
        let own = cuts[self.ranks.own_part(cuts.len())].iter().filter(|part| !part.is_empty());
        let own: Vec<Vec<f64>> =
            own.map(|part| self.objective.measure(part.clone())).collect::<Result<_, _>>()?;
        let parts = shards::gather(self.ranks, &own)?;
        self.objective.evaluation(&parts).map(Some)
    }

    fn checkpoint(&mut self) -> Result<(), Error> {
        let started = Instant::now();
        let protect: Vec<u64> = self.best_step().into_iter().collect();
        let step = self.state.global_step;
        let Some(files) = &mut self.files else { return Ok(()) };
        files.metrics.flush()?;
        files.store.save(step, &self.optimiser.state(OPTIMISER), &self.state, &protect)?;
        tracing::debug!(step, "checkpoint written");
        files.time("checkpoint", started, &[("step", step.into())])
    }

    /// The step whose checkpoint is kept because its weights may be selected.
    fn best_step(&self) -> Option<u64> {
        match self.config.select {
            Select::Best => self.state.best.map(|(step, _)| step),
            Select::Last => None,
        }
    }

    /// Puts the selected weights in place and removes the checkpoints nobody needs any more.
    fn select(mut self) -> Result<Outcome, Error> {
        let last = self.state.global_step;
        let selected_step = self.best_step().unwrap_or(last);
        if let Some(files) = &mut self.files {
            if selected_step != last {
                let best = files.store.load::<TrainerState>(selected_step)?;
                self.optimiser.load_parameters(OPTIMISER, &best.tensors)?;
            }
            files.metrics.flush()?;
            files.store.keep_only(&[last, selected_step])?;
        }
        Ok(Outcome { state: self.state, selected_step })
    }
}
