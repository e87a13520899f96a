//! What a run remembers between iterations and in checkpoints.

use std::collections::BTreeMap;

use anyhow::Result;
use arete_training::{LossScale, Schedule};
use serde::{Deserialize, Serialize};

use crate::Config;
use crate::alarm::Baseline;
use crate::standardisation::Standardisation;
use crate::update::Rates;

/// What a checkpoint holds beside the tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct State {
    /// Iterations finished.
    pub(crate) iteration: u64,
    /// Conversations sampled in all of them.
    pub(crate) episodes: u64,
    /// Weight of the KL penalty from here on.
    pub(crate) kl_coef: f64,
    /// The newest iteration that was probed.
    pub(crate) probed: Option<u64>,
    /// The best probe after an iteration.
    pub(crate) best: Option<Best>,
    /// The probe before the first iteration: its score, and what later ones are measured against.
    pub(crate) first_probe: Option<(f64, Baseline)>,
    /// The probe that the yardstick liked best.
    pub(crate) highest_probe: Option<Baseline>,
    /// How the first rollout's scores lie, by reward model.
    pub(crate) standardisation: Option<BTreeMap<String, Standardisation>>,
    /// Loss scale of an f16 run.
    pub(crate) loss_scale: LossScale,
}

/// A probe that none was better than.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Best {
    pub(crate) iteration: u64,
    /// Mean of what the scores pay.
    pub(crate) score: f64,
}

/// The learning rates of policy and critic.
pub(crate) struct Schedules {
    pub(crate) policy: Schedule,
    pub(crate) critic: Schedule,
}

impl Schedules {
    pub(crate) fn new(config: &Config) -> Result<Self> {
        let of =
            |peak| Schedule::new(config.schedule, peak, config.warmup_ratio, config.iterations);
        Ok(Self { policy: of(config.learning_rate)?, critic: of(config.value_learning_rate)? })
    }

    pub(crate) fn rates(&self, n_done: u64) -> Rates {
        Rates {
            policy: self.policy.learning_rate(n_done),
            critic: self.critic.learning_rate(n_done),
        }
    }
}
