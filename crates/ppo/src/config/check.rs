//! What settings may not be, alone and together.

use std::fmt;

use anyhow::Result;
use arete_records::Refusal;
use arete_stage::settings::{at_least, fraction, not_negative, positive};

use super::{Aggregation, Algorithm, Config, CriticKind, RolloutKind};
use crate::kl::KlControl;
use crate::reward::{Ensemble, Placement};

impl Config {
    /// Checks what cannot be said by types.
    ///
    /// # Errors
    ///
    /// A refused setting naming the key.
    pub fn check(&self) -> Result<()> {
        self.lora.check()?;
        positive("temperature", self.temperature)?;
        positive("clip_range", self.clip_range)?;
        positive("value_clip_range", self.value_clip_range)?;
        positive("kl_target", self.kl_target)?;
        positive("kl_horizon", self.kl_horizon)?;
        positive("soft_min_temperature", self.soft_min_temperature)?;
        for (name, value) in [
            ("learning_rate", self.learning_rate),
            ("value_learning_rate", self.value_learning_rate),
            ("kl_coef", self.kl_coef),
            ("value_coef", self.value_coef),
            ("target_kl", self.target_kl),
            ("ensemble_std_weight", self.ensemble_std_weight),
            ("missing_eos_penalty", self.missing_eos_penalty),
            ("score_clip", self.score_clip),
            ("importance_cap", self.importance_cap),
            ("max_grad_norm", self.max_grad_norm),
            ("weight_decay", self.weight_decay),
            ("probe_temperature", self.probe_temperature()),
            ("engine_difference", self.engine_difference),
            ("reward_tolerance", self.reward_tolerance),
        ] {
            not_negative(name, value)?;
        }
        // The coefficient is multiplied by 1 ± 0.2 · rollout_size / kl_horizon, which must stay above 0.
        let slow =
            self.kl_control == KlControl::Fixed || self.kl_horizon >= self.rollout_size as f64;
        check("kl_horizon", slow, "at least rollout_size", &self.kl_horizon)?;
        for (name, value) in
            [("gamma", self.gamma), ("lambda", self.lambda), ("warmup_ratio", self.warmup_ratio)]
        {
            fraction(name, value)?;
        }
        for (name, value) in [
            ("max_new_tokens", self.max_new_tokens),
            ("rollout_size", self.rollout_size),
            ("samples_per_prompt", self.samples_per_prompt),
            ("n_minibatches", self.n_minibatches),
            ("micro_batch_tokens", self.micro_batch_tokens),
            ("probe_prompts", self.probe_prompts),
            ("stats_samples", self.stats_samples),
            ("max_rows", self.max_rows),
        ] {
            at_least(name, value, 1)?;
        }
        self.engines.check()?;
        self.server.check()?;
        at_least("iterations", self.iterations, 1)?;
        at_least("epochs", self.epochs, 1)?;
        at_least("virtual_shards", self.shards.virtual_shards, 1)?;
        if self.algorithm == Algorithm::Ppo {
            let expected = format!(
                "fewer than the {} iterations, or the policy never learns",
                self.iterations
            );
            let learns = self.value_warmup < self.iterations;
            check("value_warmup", learns, &expected, &self.value_warmup)?;
        }
        let moves = self.kl_control == KlControl::Fixed || self.kl_coef > 0.0;
        check("kl_coef", moves, "a number above 0, for kl_control = adaptive multiplies it", &0)?;
        check(
            "n_minibatches",
            self.rollout_size.is_multiple_of(self.n_minibatches),
            &format!("a divisor of rollout_size ({})", self.rollout_size),
            &self.n_minibatches,
        )?;
        let mixes_turns = self.ensemble != Ensemble::Mean && self.rollout == RolloutKind::Chain;
        check(
            "placement",
            !(mixes_turns && self.placement == Placement::PerTurn),
            "final, for an ensemble other than mean over a chain",
            &"per_turn",
        )?;
        self.check_groups()?;
        self.check_weights()
    }

    /// What the algorithms ask of each other's settings.
    fn check_groups(&self) -> Result<()> {
        check(
            "samples_per_prompt",
            self.rollout_size.is_multiple_of(self.samples_per_prompt),
            &format!("a divisor of rollout_size ({})", self.rollout_size),
            &self.samples_per_prompt,
        )?;
        let name = self.algorithm.name();
        if !self.algorithm.is_group() {
            return check(
                "aggregation",
                self.aggregation == Aggregation::SumThenNormalize,
                "sum_then_normalize, for ppo compares no groups",
                &"normalize_then_sum",
            );
        }
        check(
            "samples_per_prompt",
            self.samples_per_prompt >= 2,
            &format!("at least 2, for {name} compares the samples of a prompt"),
            &self.samples_per_prompt,
        )?;
        let no_critic = format!("trunk (the default), for {name} has no critic");
        let value = match self.value {
            CriticKind::Trunk => "trunk",
            CriticKind::TrunkDetached => "trunk_detached",
            CriticKind::Adapter => "adapter",
        };
        check("value", self.value == CriticKind::Trunk, &no_critic, &value)?;
        for (key, value) in [("gamma", self.gamma), ("lambda", self.lambda)] {
            let whole = format!("1, for {name} compares whole replies");
            #[expect(clippy::float_cmp, reason = "1 is exact, and all that is allowed")]
            check(key, value == 1.0, &whole, &value)?;
        }
        let tokens = format!("false, for {name} estimates no advantage token by token");
        check("whiten_rewards", !self.whiten_rewards, &tokens, &true)?;
        let is_split = self.aggregation == Aggregation::NormalizeThenSum;
        check(
            "ensemble",
            !is_split || self.ensemble == Ensemble::Mean,
            "mean, for aggregation = normalize_then_sum",
            &self.ensemble.name(),
        )
    }

    fn check_weights(&self) -> Result<()> {
        let Some(weights) = &self.weights else { return Ok(()) };
        let is_good = weights.0.values().all(|weight| weight.is_finite() && *weight >= 0.0);
        check("weights", is_good, "numbers of at least 0", weights)?;
        check(
            "weights",
            self.ensemble != Ensemble::Min,
            "none, for ensemble = min takes the lowest score as it is",
            weights,
        )
    }
}

fn check(name: &'static str, is_good: bool, expected: &str, got: &impl fmt::Display) -> Result<()> {
    if is_good {
        return Ok(());
    }
    Err(Refusal::setting(name, expected.to_owned(), got).into())
}
