//! What the benches of the training stages share: their flags, and the speed of optimiser steps beside the products
//! that they cannot do without.

use std::io::Write;

use arete_model::bench::{Table, products_per_s, time};
use arete_model::{Adapter, LoraConfig, Model, Source};

use crate::{AdamW, AdamWConfig, ComputeArgs, Error, Objective};

/// Rows of the products that the ceiling is measured with.
const CEILING_ROWS: usize = 512;
/// Learning rate of the measured steps; their result is thrown away.
const LEARNING_RATE: f64 = 1e-4;
/// Seconds that a figure is measured for, at least.
const SECONDS: f64 = 5.0;

/// Flags of a bench.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchArgs {
    /// Base model: a Hugging Face directory, a GGUF file, or a hub id
    #[arg(long)]
    pub model: String,
    /// LoRA rank, on all linear layers
    #[arg(long, default_value_t = 16)]
    pub rank: usize,
    /// Most tokens in one forward pass
    #[arg(long, default_value_t = 1024)]
    pub micro_batch_tokens: usize,
    /// How the base is held, and where it computes.
    #[command(flatten)]
    pub compute: ComputeArgs,
}

impl BenchArgs {
    /// Loads the base and makes an adapter to train.
    ///
    /// # Errors
    ///
    /// An unusable device or model.
    pub fn load(&self) -> Result<(Model, Adapter), Error> {
        let options = self.compute.start()?;
        let model = Model::load(&Source::parse(&self.model)?, &options)?;
        let lora = LoraConfig { rank: self.rank, alpha: 32.0, ..LoraConfig::default() };
        let mut adapter = Adapter::new("bench", &model.config, &lora, 0, options.device)?;
        adapter.set_trainable(true);
        Ok((model, adapter))
    }
}

/// Seconds of an optimiser step over all of `n_examples`: forward, backward, clipping, update.
///
/// # Errors
///
/// What the objective returns.
pub fn step_s(
    objective: &mut dyn Objective,
    parameters: Vec<(String, tch::Tensor)>,
    n_examples: usize,
) -> Result<f64, Error> {
    let examples: Vec<usize> = (0..n_examples).collect();
    let mut optimiser = AdamW::new(parameters, AdamWConfig::default())?;
    time(SECONDS, || {
        objective.accumulate_all(&examples, 1.0)?;
        optimiser.step(LEARNING_RATE, Some(1.0), 1).map(drop)
    })
}

/// Tokens a second that the products of a training step alone would give: a forward pass, and a backward pass to the
/// inputs, which is as many products again; what LoRA, attention, norms and the optimiser take is not in it.
///
/// # Errors
///
/// [`Error::Model`] if libtorch cannot allocate or multiply.
pub fn ceiling_tokens_per_s(model: &Model, with_vocabulary: bool) -> Result<f64, Error> {
    Ok(products_per_s(&model.decoder, CEILING_ROWS, with_vocabulary)? / 2.0)
}

/// Writes a table to stdout.
///
/// # Errors
///
/// [`Error::Io`] if stdout is closed.
pub fn print(table: &Table, model: &Model) -> Result<(), Error> {
    let mut out = std::io::stdout().lock();
    table.write(&mut out, &model.decoder)?;
    Ok(out.flush()?)
}
