//! `arete-dpo bench`: pairs a second of preference optimisation, beside this machine's matrix products.

use anyhow::{Result, bail};
use arete_model::bench::Table;
use arete_records::Refusal;
use arete_training::bench::{self, BenchArgs};
use arete_training::{Error as TrainingError, Evaluation, Objective, Passes, StepReport};

use crate::config::LossType;
use crate::data::{Pair, Sequence};
use crate::loss::LossSettings;
use crate::objective::{DirectPreference, Reference};

/// Measure training against this machine's matrix products
#[derive(Clone, Debug, clap::Args)]
pub struct Bench {
    #[command(flatten)]
    common: BenchArgs,
    /// Pairs an optimiser step
    #[arg(long, default_value_t = 16)]
    batch_size: usize,
    /// Tokens of a side, the prompt among them
    #[arg(long, default_value_t = 100)]
    length: usize,
    /// Tokens of the prompt, which both sides share
    #[arg(long, default_value_t = 45)]
    prompt: usize,
}

/// Measures whole optimiser steps, the reference computed in each as in a first epoch and remembered as in later ones, and
/// prints a table.
///
/// # Errors
///
/// An unusable model or device; a prompt that leaves no reply.
pub fn run(arguments: &Bench) -> Result<()> {
    let Bench { common, batch_size, length, prompt } = arguments;
    if !(1..*length).contains(prompt) {
        bail!(Refusal::setting(
            "prompt",
            format!("1 to {} tokens", length.saturating_sub(1)),
            prompt
        ));
    }
    let (model, adapter) = common.load()?;
    let train: Vec<Pair> = (0..*batch_size).map(|seed| made_up(seed, *length, *prompt)).collect();
    let loss = LossSettings { loss_type: LossType::Sigmoid, beta: 0.1, label_smoothing: 0.0 };
    let passes = common.compute.passes(common.micro_batch_tokens, false);
    let objective = DirectPreference::new(&model.decoder, &adapter, (&train, &[]), loss, passes);
    let ceiling = bench::ceiling_tokens_per_s(&model, false)?;
    let mut forgetful = Forgetful { objective, forgets: true };
    let mut table = Table::default();
    for (name, forgets, n_products) in
        [("with the reference", true, 1.5), ("reference known", false, 1.0)]
    {
        forgetful.forgets = forgets;
        let seconds = bench::step_s(&mut forgetful, adapter.parameters(), train.len())?;
        #[expect(clippy::cast_precision_loss, reason = "small numbers")]
        let (n_pairs, n_tokens) =
            (train.len() as f64, train.iter().map(Pair::n_tokens).sum::<usize>() as f64);
        table.push(
            format!("DPO step, {batch_size} pairs, {name}, LoRA r{}", common.rank),
            n_pairs / seconds,
            "pairs/s",
            Some(ceiling * n_pairs / (n_products * n_tokens)),
            format!(
                "{length} tokens a side, {prompt} shared; ceiling: products, {}",
                2.0 * n_products
            ),
        );
    }
    Ok(bench::print(&table, &model)?)
}

/// Forgets the reference before every step, if asked to.
#[derive(Debug)]
struct Forgetful<'a> {
    objective: DirectPreference<'a>,
    forgets: bool,
}

impl Objective for Forgetful<'_> {
    fn accumulate(
        &mut self,
        shard: &[usize],
        step: &[usize],
        scale: f64,
    ) -> Result<Vec<f64>, TrainingError> {
        if self.forgets {
            self.objective.train_reference = Reference::unknown(self.objective.train.len());
        }
        self.objective.accumulate(shard, step, scale)
    }

    fn passes(&self) -> Passes {
        self.objective.passes()
    }

    fn report(&self, step: &[usize], shards: &[Vec<f64>]) -> StepReport {
        self.objective.report(step, shards)
    }

    fn n_validation(&self) -> usize {
        self.objective.n_validation()
    }

    fn measure(&mut self, examples: std::ops::Range<usize>) -> Result<Vec<f64>, TrainingError> {
        self.objective.measure(examples)
    }

    fn evaluation(&mut self, parts: &[Vec<f64>]) -> Result<Evaluation, TrainingError> {
        self.objective.evaluation(parts)
    }
}

/// A pair of tokens that mean nothing, none of them special.
fn made_up(seed: usize, length: usize, prompt: usize) -> Pair {
    let side = |which: usize| {
        let token = |place: usize| {
            let own = if place < prompt { 0 } else { which };
            ((place * 37 + seed * 11 + own) % 900 + 20) as i64
        };
        let token_ids = (0..length).map(token).collect();
        Sequence { token_ids, counted: (prompt..length).collect(), n_own_tokens: length - prompt }
    };
    Pair::new(side(1), side(2), 1.0, 0)
}
