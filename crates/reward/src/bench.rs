//! `arete-reward bench`: pairs a second of reward modelling, beside this machine's matrix products.

use std::path::PathBuf;

use anyhow::{Result, bail};
use arete_model::bench::Table;
use arete_model::{Model, ScalarHead};
use arete_training::bench::{self, BenchArgs};
use arete_training::too_few_pairs;

use crate::config::{Label, OverLength};
use crate::data::{self, Pair, Rendering, Sequence};
use crate::objective::BradleyTerry;

/// Tokens that the sides of a made-up pair share, and that each has alone: about what the sides of hh-rlhf's harmless-base
/// pairs have when both are cut on the left to 100 tokens (172 tokens a pair, both sides counted).
const N_SHARED: usize = 45;
const N_OWN: usize = 41;

/// Measure training against this machine's matrix products
#[derive(Clone, Debug, clap::Args)]
pub struct Bench {
    #[command(flatten)]
    common: BenchArgs,
    /// Pairs an optimiser step
    #[arg(long, default_value_t = 20)]
    batch_size: usize,
    /// Take the first pairs of this file instead of made-up ones (hh-rlhf's form, JSON lines, .gz too, or Parquet)
    #[arg(long, value_name = "FILE")]
    pairs: Option<PathBuf>,
    /// With --pairs: most tokens of a side, cut on the left
    #[arg(long, default_value_t = 100)]
    max_length: usize,
}

/// Measures whole optimiser steps, once with what a pair shares computed twice and once with it computed once, and prints
/// a table.
///
/// # Errors
///
/// An unusable model, device or file.
pub fn run(arguments: &Bench) -> Result<()> {
    let common = &arguments.common;
    let (model, adapter) = common.load()?;
    let mut head = ScalarHead::normal(model.config.hidden_size, 0, model.decoder.device());
    head.set_trainable(true);
    let shared = arguments.pairs(&model)?;
    let apart: Vec<Pair> = shared.iter().map(|pair| Pair { n_shared: 0, ..pair.clone() }).collect();
    let ceiling = bench::ceiling_tokens_per_s(&model, false)?;
    let mut table = Table::default();
    for (name, train) in [("each side by itself", &apart), ("shared prefix once", &shared)] {
        let mut objective = BradleyTerry {
            decoder: &model.decoder,
            adapter: &adapter,
            head: &head,
            train,
            validation: &[],
            center: 0.01,
            passes: common.compute.passes(common.micro_batch_tokens, false),
            evaluated: None,
        };
        let mut parameters = adapter.parameters();
        parameters.push(("score".to_owned(), head.weight.shallow_clone()));
        let seconds = bench::step_s(&mut objective, parameters, train.len())?;
        #[expect(clippy::cast_precision_loss, reason = "small numbers")]
        let (n_pairs, n_tokens) =
            (train.len() as f64, train.iter().map(Pair::n_tokens).sum::<usize>() as f64);
        table.push(
            format!("reward step, {} pairs, {name}, LoRA r{}", train.len(), common.rank),
            n_pairs / seconds,
            "pairs/s",
            Some(ceiling * n_pairs / n_tokens),
            format!("{:.0} tokens a pair; ceiling: products, twice", n_tokens / n_pairs),
        );
    }
    Ok(bench::print(&table, &model)?)
}

impl Bench {
    fn pairs(&self, model: &Model) -> Result<Vec<Pair>> {
        let Some(path) = &self.pairs else {
            return Ok((0..self.batch_size).map(made_up).collect());
        };
        let (mut rows, _) = data::read_pairs(path, &[])?;
        rows.truncate(2 * self.batch_size); // some may be identical after cutting
        let rendering = Rendering {
            max_length: self.max_length,
            over_length: OverLength::TruncateLeft,
            label: Label::Hard,
            margin_per_vote: 0.0,
        };
        let mut pairs = data::tokenize(path, &rows, &model.chat()?, &rendering)?.pairs;
        pairs.truncate(self.batch_size);
        if pairs.is_empty() {
            bail!(too_few_pairs(path, self.batch_size, 0, "none left after cutting"));
        }
        Ok(pairs)
    }
}

/// A pair of tokens that mean nothing, none of them special.
fn made_up(seed: usize) -> Pair {
    let side = |which: usize| {
        let token = |k: usize| {
            let own = if k < N_SHARED { 0 } else { which };
            ((k * 37 + seed * 11 + own) % 900 + 20) as i64
        };
        let token_ids = (0..N_SHARED + N_OWN).map(token).collect();
        Sequence { token_ids, n_own_tokens: N_OWN }
    };
    let (chosen, rejected) = (side(1), side(2));
    Pair { chosen, rejected, n_shared: N_SHARED, chosen_prob: 1.0, margin: 0.0 }
}
