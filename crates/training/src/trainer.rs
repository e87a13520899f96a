//! The step loop of SFT and reward modelling: accumulate, clip, update, log, evaluate, checkpoint, resume.

use std::path::Path;
use std::time::Instant;

use arete_stage::metrics::MetricsWriter;
use arete_stage::{interrupt, timings};
use serde::{Deserialize, Serialize};

use crate::order::Plan;
use crate::{AdamW, CheckpointStore, Error, LossScale, Schedule};

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
pub trait Objective {
    /// Adds the gradients of `loss_scale` times the mean loss over `examples` to the trained tensors.
    ///
    /// # Errors
    ///
    /// Whatever the model refuses.
    fn accumulate(&mut self, examples: &[usize], loss_scale: f64) -> Result<StepReport, Error>;

    /// Measures the validation set; `None` if there is none.
    ///
    /// # Errors
    ///
    /// Whatever the model refuses.
    fn evaluate(&mut self) -> Result<Option<Evaluation>, Error>;
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
    /// The step whose weights the trained tensors now hold.
    pub selected_step: u64,
}

/// Trains to the end of the plan, from the newest checkpoint in `output` if there is one.
///
/// Writes `metrics.jsonl`, events, `timings.jsonl` and checkpoints into `output`; the same inputs, settings and
/// `fingerprint` give the same bytes (but for times) however often the run was interrupted.
///
/// # Errors
///
/// [`Error::Interrupted`] after a signal, with a checkpoint written; [`Error::NonFinite`]; [`Error::Checkpoint`] if the
/// checkpoint found is of another run; whatever the model, the disk or libtorch refuse.
pub fn train(
    objective: &mut dyn Objective,
    optimiser: &mut AdamW,
    plan: &Plan,
    config: &LoopConfig,
    output: &Path,
    fingerprint: &str,
) -> Result<Outcome, Error> {
    plan.check()?;
    let store = CheckpointStore::new(output, fingerprint, config.dtype, config.keep_checkpoints);
    let loaded = store.latest::<TrainerState>()?;
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
    let metrics = MetricsWriter::open_at(output, resumed_at)?;
    let mut run = Run { objective, optimiser, plan, config, output, store, metrics, state };
    run.run_to_end()?;
    run.select()
}

struct Run<'a> {
    objective: &'a mut dyn Objective,
    optimiser: &'a mut AdamW,
    plan: &'a Plan,
    config: &'a LoopConfig,
    output: &'a Path,
    store: CheckpointStore,
    metrics: MetricsWriter,
    state: TrainerState,
}

impl Run<'_> {
    fn run_to_end(&mut self) -> Result<(), Error> {
        let total = self.plan.total_steps();
        let progress = arete_records::progress::start("training", "steps", total);
        progress.skip(self.state.global_step);
        while self.state.global_step < total {
            if let Err(interrupted) = interrupt::check() {
                self.checkpoint()?;
                return Err(interrupted.into());
            }
            let loss = self.step()?;
            progress.message(format!("loss {loss:.4}"));
            progress.inc(1);
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
        let report = self.objective.accumulate(&self.plan.examples(n_done), loss_scale)?;
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
        self.metrics.log(step, &line)?;
        let fields = [("step", step.into()), ("n_tokens", report.n_tokens.into())];
        timings::log(self.output, "training step", started.elapsed().as_secs_f64(), &fields)?;
        Ok(report.loss)
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
        let Some(evaluation) = self.objective.evaluate()? else { return Ok(false) };
        let step = self.state.global_step;
        let names: Vec<String> =
            evaluation.metrics.iter().map(|(name, _)| format!("eval_{name}")).collect();
        let mut line = vec![("eval_loss", evaluation.loss)];
        line.extend(names.iter().map(String::as_str).zip(evaluation.metrics.iter().map(|m| m.1)));
        self.metrics.log(step, &line)?;
        tracing::info!(step, loss = evaluation.loss, "evaluated");
        let seconds = started.elapsed().as_secs_f64();
        timings::log(self.output, "evaluation", seconds, &[("step", step.into())])?;
        let improved = evaluation.loss.is_finite()
            && self.state.best.is_none_or(|(_, best)| evaluation.loss < best);
        if improved {
            self.state.best = Some((step, evaluation.loss));
        }
        Ok(improved)
    }

    fn checkpoint(&mut self) -> Result<(), Error> {
        let started = Instant::now();
        self.metrics.flush()?;
        let protect: Vec<u64> = self.best_step().into_iter().collect();
        let step = self.state.global_step;
        self.store.save(step, &self.optimiser.state(OPTIMISER), &self.state, &protect)?;
        tracing::debug!(step, "checkpoint written");
        let seconds = started.elapsed().as_secs_f64();
        timings::log(self.output, "checkpoint", seconds, &[("step", step.into())])?;
        Ok(())
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
        if selected_step != last {
            let best = self.store.load::<TrainerState>(selected_step)?;
            self.optimiser.load_parameters(OPTIMISER, &best.tensors)?;
        }
        self.metrics.flush()?;
        self.store.keep_only(&[last, selected_step])?;
        Ok(Outcome { state: self.state, selected_step })
    }
}
