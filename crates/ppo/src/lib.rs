//! PPO with an ensemble of reward models over one base.
//!
//! In: prompts, a base model, reward models (adapter and head each, one a turn) trained on that base. Out: the policy's
//! adapter, the merged model, every sampled conversation, metrics. One set of frozen weights serves all roles: the
//! policy and the critic are adapters over it, the reward models too, and the reference is the base with no adapter.
//!
//! An iteration samples a rollout ([`rollout`]), scores it ([`scorer`]), turns scores and KL into token rewards
//! ([`reward`]), estimates advantages ([`gae`], [`whiten`]) and takes a few clipped steps ([`models`], [`packs`], [`loss`], [`update`]). Where
//! PPO implementations differ, this one chooses:
//! - old log-probabilities come from the trainer's own forward pass, so the first ratio is exactly 1 (TRL takes the
//!   sampler's); with one minibatch that pass is also the first update's;
//! - the sampling temperature divides all logits (sampling, old, new, reference); no top-k or top-p, which would make the
//!   sampled distribution another than the one that is trained;
//! - scores are paid at the last sampled token of a reply (TRL: at the padding after it);
//! - every mean over tokens is over the policy's own tokens and over the whole minibatch, whatever the micro-batches;
//! - GAE steps over user turns; returns are taken before advantages are whitened;
//! - KL enters the reward as k1, `logprob − ref_logprob`, detached; no dropout; gradients are clipped at norm 1;
//! - policy and critic have an optimiser each.
//!
//! # Source
//!
//! Schulman et al. 2017 (arXiv:1707.06347); Ziegler et al. 2019 (arXiv:1909.08593); Huang et al. 2024 (arXiv:2403.17031);
//! ensembles: Coste et al. 2023 (arXiv:2310.02743).

pub mod advantage;
pub mod alarm;
mod assess;
pub mod bench;
pub mod config;
mod engines;
pub mod gae;
pub mod group;
mod iteration;
pub mod journal;
pub mod kl;
pub mod length;
pub mod loss;
pub mod models;
pub mod packs;
pub mod probe;
pub mod prompts;
pub mod reward;
pub mod rollout;
pub mod scorer;
mod shape;
mod spread;
mod stage;
pub mod standardisation;
pub mod update;
pub mod whiten;

pub use config::Config;
pub use scorer::NamedReward;
pub use stage::{TrainInputs, dry_run, train};

#[cfg(test)]
mod test_tensors {
    //! Small tensors for unit tests.

    use tch::{Kind, Tensor};

    /// `[B, T]` f32.
    pub(crate) fn batch(rows: &[&[f32]]) -> Tensor {
        Tensor::from_slice(&rows.concat()).view([rows.len() as i64, -1])
    }

    /// `[B, T]` bool.
    pub(crate) fn bools(rows: &[&[bool]]) -> Tensor {
        Tensor::from_slice(&rows.concat()).view([rows.len() as i64, -1])
    }

    /// All entries, row by row.
    pub(crate) fn values_of(tensor: &Tensor) -> Vec<f64> {
        Vec::try_from(tensor.to_kind(Kind::Double).reshape([-1])).unwrap()
    }

    /// Equal up to f32 rounding.
    pub(crate) fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-5 * (1.0 + b.abs())
    }
}
