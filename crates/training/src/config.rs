//! Settings that several stages share, as flags and as keys of their recipe tables (flattened into each stage's own).

use arete_chain::memory::{self, Demand, Role};
use arete_model::{LoadOptions, LoraConfig, ModelConfig, Target};
use arete_records::Refusal;
use arete_stage::settings;
use clap::ArgAction;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use crate::runtime::{self, Dtype};
use crate::shards::Reduce;
use crate::trainer::{LoopConfig, Select};
use crate::{AdamWConfig, Error, Passes, Ranks, Schedule, ScheduleKind, check_settings};

/// Every [`Target`], as the flag takes them.
const ALL_TARGETS: &str = "q,k,v,o,gate,up,down";

/// The most tokens of a sequence: `max_length`, and no more than the model has positions.
pub fn within_positions(model: &ModelConfig, max_length: usize) -> usize {
    let positions = model.max_position_embeddings;
    if max_length > positions {
        tracing::warn!(
            max_length,
            positions,
            "the model has fewer positions than max_length, which is taken as that"
        );
    }
    max_length.min(positions)
}

/// The shape of the adapters that a stage trains.
#[derive(Clone, Debug, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct LoraArgs {
    /// LoRA rank (Hu et al. 2021; 16 as in the Alignment Handbook's QLoRA recipes)
    #[arg(long, default_value_t = 16)]
    pub rank: usize,
    /// LoRA alpha; the update is scaled by alpha / rank
    #[arg(long, default_value_t = 32.0)]
    pub alpha: f64,
    /// Linear layers that get an update, separated by commas (all, as in QLoRA)
    #[arg(long, value_enum, value_delimiter = ',', default_value = ALL_TARGETS, value_name = "TARGET,…")]
    pub targets: Vec<Target>,
}

impl LoraArgs {
    /// As the model crate takes it.
    pub fn config(&self) -> LoraConfig {
        LoraConfig { rank: self.rank, alpha: self.alpha, targets: self.targets.clone() }
    }

    /// Refuses shapes that no adapter has.
    ///
    /// # Errors
    ///
    /// A refused setting.
    pub fn check(&self) -> Result<(), Refusal> {
        settings::at_least("rank", self.rank, 1)?;
        settings::positive("alpha", self.alpha)
    }
}

/// Names of the settings that count for the memory of a trainer.
const COUNTED: [&str; 10] = [
    "rank",
    "targets",
    "batch_size",
    "micro_batch_tokens",
    "max_length",
    "nf4",
    "double_quantize",
    "recompute",
    "dtype",
    "merge",
];

/// What of a trainer's settings counts for memory.
#[derive(Clone, Copy, Debug)]
pub struct Counted<'a> {
    /// The adapter's shape.
    pub lora: &'a LoraArgs,
    /// How the frozen model is held.
    pub compute: &'a ComputeArgs,
    /// The step loop.
    pub steps: &'a LoopArgs,
    /// Examples of an optimiser step.
    pub batch_size: usize,
    /// Most tokens of an example.
    pub max_length: usize,
    /// Whether the merged model is written; `None` where it always is, and is no setting.
    pub merge: Option<bool>,
}

impl Counted<'_> {
    /// What the trainer of `stage` takes.
    ///
    /// # Errors
    ///
    /// [`Refusal::BadSetting`] for a size of 0.
    pub fn demand(&self, stage: &'static str, role: Role) -> Result<Demand, Refusal> {
        let &Self { lora, compute, steps, batch_size, max_length, merge } = self;
        let positive = |key, value| memory::positive(stage, key, value);
        let settings = memory::Settings {
            batch_size: positive("batch_size", batch_size)?,
            micro_batch_tokens: positive("micro_batch_tokens", steps.micro_batch_tokens)?,
            max_length: positive("max_length", max_length)?,
            virtual_shards: positive("virtual_shards", steps.shards.virtual_shards)?,
            merge: merge.unwrap_or(true),
            ..compute.counted(lora)
        };
        let n_keys = COUNTED.len() - usize::from(merge.is_none());
        Ok(Demand { role, settings, keys: &COUNTED[..n_keys] })
    }
}

/// How the frozen model is held, and where it computes.
#[derive(Clone, Debug, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct ComputeArgs {
    /// Pack the frozen model's blocks to NF4 (QLoRA); adapters that share a base must all have been trained over it packed
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub nf4: bool,
    /// Quantise the NF4 scales as well
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub double_quantize: bool,
    /// Keep only each block's input for the backward pass and run the block again there: less memory, a third more time
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub recompute: bool,
    /// Number format of the frozen model and of activations
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    /// Where to compute: cpu, cuda, cuda:N, or auto
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// CPU threads; 0 = one a core
    #[arg(long, default_value_t = 0)]
    pub threads: u32,
}

impl ComputeArgs {
    /// What of these settings counts for memory.
    pub fn counted(&self, lora: &LoraArgs) -> memory::Settings {
        memory::Settings {
            rank: lora.rank as u64,
            targets: lora.targets.clone(),
            recompute: self.recompute,
            double_quantize: self.double_quantize,
            ..memory::Settings::new(self.dtype, self.nf4)
        }
    }

    /// Passes of at most so many tokens; where the plan asks for it (`saving`), with as little kept as can be.
    pub fn passes(&self, micro_batch_tokens: usize, saving: bool) -> Passes {
        let passes = Passes::new(micro_batch_tokens, self.recompute);
        if saving {
            passes.save();
        }
        passes
    }

    /// Sets the number of threads and resolves device and number format.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] if there is no such device.
    pub fn start(&self) -> Result<LoadOptions, Error> {
        self.start_on(&Ranks::alone())
    }

    /// [`ComputeArgs::start`] of one of several processes: each takes a GPU of its own where none is named.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] if there is no such device.
    pub fn start_on(&self, ranks: &Ranks) -> Result<LoadOptions, Error> {
        runtime::set_threads(self.threads);
        let device = match runtime::device(&self.device)? {
            Device::Cuda(_) if ranks.n_ranks() > 1 && ["auto", "cuda"].contains(&&*self.device) => {
                runtime::device(&format!("cuda:{}", ranks.local_rank()))?
            }
            device => device,
        };
        Ok(runtime::load_options(device, self.dtype, self.nf4, self.double_quantize))
    }
}

/// How a batch is cut, and its gradients summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
pub struct ShardArgs {
    /// Fixed parts that every batch is cut into, whose gradients are computed by themselves and summed in order: the most processes
    /// that can train together. Another number changes results by rounding
    #[arg(long, default_value_t = 4)]
    pub virtual_shards: usize,
    /// How several processes sum gradients: the same bytes with any number of them, or less traffic
    #[arg(long, value_enum, default_value_t = Reduce::Ordered)]
    pub reduce: Reduce,
}

/// How fast and how long a stage trains: settings whose defaults differ from stage to stage.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Part of all steps in which it rises from 0.
    pub warmup_ratio: f64,
    /// Passes over the data.
    pub epochs: u64,
    /// Examples an optimiser step.
    pub batch_size: usize,
}

/// Settings of the step loop that SFT and reward modelling share.
#[derive(Clone, Debug, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct LoopArgs {
    /// How the learning rate falls after the warm-up
    #[arg(long, value_enum, default_value_t = ScheduleKind::Cosine)]
    pub schedule: ScheduleKind,
    /// Stop after so many steps, whatever the epochs
    #[arg(long)]
    #[serde(default)]
    pub max_steps: Option<u64>,
    /// Most tokens in one forward pass (a longer example goes alone); bounds memory, changes results only by rounding
    #[arg(long, default_value_t = 1024)]
    pub micro_batch_tokens: usize,
    /// Decoupled weight decay
    #[arg(long, default_value_t = 0.0)]
    pub weight_decay: f64,
    /// Largest norm of the gradient; 0 = no clipping
    #[arg(long, default_value_t = 1.0)]
    pub max_grad_norm: f64,
    /// Steps between evaluations on the validation split; 0 = only after the last
    #[arg(long, default_value_t = 20)]
    pub eval_every: u64,
    /// Steps between checkpoints; 0 = only after the last and on a signal
    #[arg(long, default_value_t = 20)]
    pub checkpoint_every: u64,
    /// Newest checkpoints kept while training
    #[arg(long, default_value_t = 2)]
    pub keep_checkpoints: usize,
    /// Weights to end with: of the last step, or of the lowest validation loss
    #[arg(long, value_enum, default_value_t = Select::Last)]
    pub select: Select,
    /// The cut of a batch.
    #[command(flatten)]
    #[serde(flatten)]
    pub shards: ShardArgs,
}

impl LoopArgs {
    /// Refuses what no step loop can do, with the settings that each stage has of its own.
    ///
    /// # Errors
    ///
    /// A refused setting.
    pub fn check(&self, pace: Pace) -> Result<(), Refusal> {
        settings::not_negative("learning_rate", pace.learning_rate)?;
        settings::fraction("warmup_ratio", pace.warmup_ratio)?;
        settings::at_least("epochs", pace.epochs, 1)?;
        settings::at_least("batch_size", pace.batch_size, 1)?;
        settings::at_least("max_steps", self.max_steps.unwrap_or(1), 1)?;
        settings::at_least("micro_batch_tokens", self.micro_batch_tokens, 1)?;
        settings::at_least("virtual_shards", self.shards.virtual_shards, 1)?;
        settings::not_negative("weight_decay", self.weight_decay)?;
        settings::not_negative("max_grad_norm", self.max_grad_norm)
    }

    /// The optimiser's settings.
    pub fn adamw(&self) -> AdamWConfig {
        AdamWConfig { weight_decay: self.weight_decay, ..AdamWConfig::default() }
    }

    /// The loop's settings for `n_steps` steps of a model computing in `dtype`.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] naming the setting.
    pub fn loop_config(
        &self,
        learning_rate: f64,
        warmup_ratio: f64,
        n_steps: u64,
        dtype: Kind,
    ) -> Result<LoopConfig, Error> {
        check_settings(self.max_grad_norm, self.weight_decay)?;
        Ok(LoopConfig {
            schedule: Schedule::new(self.schedule, learning_rate, warmup_ratio, n_steps)?,
            max_grad_norm: (self.max_grad_norm > 0.0).then_some(self.max_grad_norm),
            eval_every: self.eval_every,
            checkpoint_every: self.checkpoint_every,
            keep_checkpoints: self.keep_checkpoints,
            select: self.select,
            shards: self.shards,
            dtype: runtime::dtype_name(dtype),
            scale_loss: dtype == Kind::Half,
        })
    }
}
