//! What Arete's training stages share: optimiser, schedule, data order, checkpoints and the step loop.
//!
//! SFT, reward modelling and DPO describe their loss as an [`Objective`] and hand it to [`train`]; PPO, whose loop is its
//! own, uses the parts: [`AdamW`], [`LossScale`], [`Schedule`], [`order`], [`CheckpointStore`], [`config`], [`runtime`].
//!
//! Method and its deviations from the usual trainers:
//! - Batches are packed: token sequences lie one after the other without padding (`arete_model::batch`), so the linear
//!   layers run on real tokens only, and sorting by length, which serves to save padding, has nothing to save.
//!   Micro-batches are cut by a token budget instead (`arete_chain::batches`).
//! - A step's loss is one mean over the whole step (all its target tokens, all its pairs); micro-batches add their
//!   share of that mean, so where they are cut changes nothing but rounding.
//! - A batch is cut into a fixed number of shards ([`shards`]); each one's gradients are computed by themselves and summed
//!   in the order of shards, by one process or by several ([`ranks`]): the bytes are the same.
//! - The order of the data is a pure function of seed and step; nothing else is random (no dropout). A run that was
//!   interrupted therefore continues from its last checkpoint to the same bytes.
//! - A loss or gradient that is not finite stops the run before it reaches the optimiser; only f16 on a GPU skips
//!   the step instead, and halves its loss scale.

pub mod bench;
pub mod checkpoint;
pub mod config;
pub mod error;
pub mod evaluation;
mod loss_scale;
pub mod optimiser;
pub mod order;
pub mod pairs;
mod passes;
pub mod ranks;
mod refused;
pub mod runtime;
pub mod schedule;
pub mod shards;
mod trainer;

pub use checkpoint::{CheckpointStore, forget_harmless};
pub use config::{ComputeArgs, Counted, LoopArgs, LoraArgs, Pace, ShardArgs, within_positions};
pub use error::{Error, class_of, class_within};
pub use loss_scale::LossScale;
pub use optimiser::{AdamW, AdamWConfig, check_settings};
pub use passes::Passes;
pub use ranks::Ranks;
pub use refused::{not_rendered, too_few_pairs};
pub use schedule::{Schedule, ScheduleKind};
pub use shards::Reduce;
pub use trainer::{
    Evaluation, LoopConfig, Objective, Outcome, Select, StepReport, TrainerState, train,
};
