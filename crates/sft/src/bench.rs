//! `arete-sft bench`: tokens a second of fine-tuning, beside this machine's matrix products.

use anyhow::Result;
use arete_model::bench::Table;
use arete_training::bench::{self, BenchArgs};

use crate::data::Example;
use crate::objective::CrossEntropy;

/// Measure training against this machine's matrix products
#[derive(Clone, Debug, clap::Args)]
pub struct Bench {
    #[command(flatten)]
    common: BenchArgs,
    /// Conversations an optimiser step
    #[arg(long, default_value_t = 16)]
    batch_size: usize,
    /// Tokens of a conversation, all of them imitated but the first
    #[arg(long, default_value_t = 100)]
    length: usize,
}

/// Measures whole optimiser steps and prints a table.
///
/// # Errors
///
/// An unusable model or device.
pub fn run(arguments: &Bench) -> Result<()> {
    let Bench { common, batch_size, length } = arguments;
    let (model, adapter) = common.load()?;
    let train: Vec<Example> = (0..*batch_size).map(|i| example(i, *length)).collect();
    let mut objective = CrossEntropy {
        decoder: &model.decoder,
        adapter: &adapter,
        train: &train,
        validation: &[],
        passes: common.compute.passes(common.micro_batch_tokens, false),
    };
    let ceiling = bench::ceiling_tokens_per_s(&model, true)?;
    let seconds = bench::step_s(&mut objective, adapter.parameters(), train.len())?;
    #[expect(clippy::cast_precision_loss, reason = "a small number")]
    let n_tokens = (batch_size * length) as f64;
    let mut table = Table::default();
    let work = format!("SFT step, {batch_size} × {length} tokens, LoRA r{}", common.rank);
    table.push(work, n_tokens / seconds, "tokens/s", Some(ceiling), "ceiling: products, twice");
    Ok(bench::print(&table, &model)?)
}

/// Some tokens, none of them special.
fn example(seed: usize, length: usize) -> Example {
    let token_ids = (0..length).map(|k| ((k * 37 + seed * 11) % 900 + 20) as i64).collect();
    Example { token_ids, target: (0..length).map(|k| k > 0).collect() }
}
