//! The held-out probe: how the policy does on validation prompts that it never learns from.
//!
//! The prompts and the random streams are the same at every probe, so probes can be compared pair by pair. With a
//! yardstick the probe is the alarm for over-optimisation ([`crate::alarm`]): the ensemble rises, the yardstick falls.

use anyhow::Result;
use arete_chain::reward_model::Base;
use arete_model::{Adapter, Chat, Model};
use arete_records::rows::RolloutRow;
use arete_records::stats;
use arete_training::Ranks;

use crate::alarm::Baseline;
use crate::assess::{assess, describe, rows};
use crate::config::Config;
use crate::engines::Serving;
use crate::prompts::Prompt;
use crate::rollout::{Conversation, Layout, Purpose, Sampler};
use crate::scorer::{RewardModels, Scores, Yardstick};
use crate::spread::{self, Policy, Sampled};

/// What is probed, and with what.
#[derive(Debug)]
pub struct Probe<'a> {
    /// The processes that share the work.
    pub ranks: &'a Ranks,
    /// The base.
    pub model: &'a Model,
    /// Its chat template.
    pub chat: &'a Chat<'a>,
    /// The reward models.
    pub rewards: &'a RewardModels,
    /// One more, beside them.
    pub yardstick: Option<&'a Yardstick>,
    /// The prompts.
    pub prompts: Vec<&'a Prompt>,
    /// Servers that answer in this process's place.
    pub(crate) serving: Option<Serving<'a>>,
    /// How they are answered.
    pub sampler: Sampler,
}

/// What a probe found.
#[derive(Clone, Debug)]
pub struct Report {
    /// Mean of what the scores pay, by the ensemble, clip and penalty of the run: what the best checkpoint is chosen by.
    pub score: f64,
    /// Mean standardised score of the reward models.
    pub z_mean: f64,
    /// Numbers to log.
    pub metrics: Vec<(String, f64)>,
    /// What later probes are measured against.
    pub baseline: Baseline,
    /// The conversations.
    pub rows: Vec<RolloutRow>,
    /// Their scores.
    pub scores: Scores,
}

impl Report {
    /// Tokens sampled.
    pub fn n_sampled(&self) -> usize {
        let of = |row: &RolloutRow| row.turns.iter().filter_map(|turn| turn.n_tokens).sum::<i32>();
        usize::try_from(self.rows.iter().map(of).sum::<i32>()).expect("counts are not negative")
    }
}

impl Probe<'_> {
    /// Answers the prompts with the policy and scores the answers.
    ///
    /// # Errors
    ///
    /// As [`Sampler::sample`] and [`RewardModels::scores`].
    pub fn run(
        &self,
        policy: &Adapter,
        config: &Config,
        kl_coef: f64,
        iteration: u64,
    ) -> Result<Report> {
        let decoder = &self.model.decoder;
        let ranks = self.ranks;
        let (model, chat, serving) = (self.model, self.chat, self.serving);
        let policy = Policy { ranks, model, chat, adapter: Some(policy), serving };
        let Sampled { conversations, .. } =
            spread::sample(policy, &self.sampler, &self.prompts, Purpose::Probe, 0, None)?;
        let budget = config.micro_batch_tokens;
        let base = Base { model: self.model, chat: self.chat, micro_batch_tokens: budget };
        let prompt_id = |c: &Conversation| self.prompts[c.prompt].prompt_id.clone();
        let raw = spread::raw_scores(ranks, self.rewards, base, &conversations)?;
        let scores = self.rewards.scores(raw, &conversations, iteration, prompt_id)?;
        // The KL of what is sampled here; greedy answers have none, and are measured as if they had been sampled.
        let sampled = self.sampler.temperature > 0.0;
        let temperature = if sampled { self.sampler.temperature } else { config.temperature };
        let logprob = |adapter| {
            spread::logprobs(ranks, decoder, adapter, &conversations, temperature, budget)
        };
        let kl = logprob(policy.adapter)? - logprob(None)?; // [n]
        let layout = Layout::new(&conversations);
        let assessment = assess(scores, &conversations, &layout, &kl, kl_coef, config)?;

        let turns = &self.sampler.turns;
        let mut metrics: Vec<(String, f64)> = describe(&conversations, turns, &assessment.scores)
            .into_iter()
            .map(|(name, value)| (format!("probe/{name}"), value))
            .collect();
        let score = stats::mean(&assessment.paid);
        metrics.push(("probe/scores".to_owned(), score));
        if sampled {
            metrics.push(("probe/kl".to_owned(), stats::mean(&assessment.kl)));
        }
        let narrow = |scores: &[f64]| scores.iter().map(|&score| score as f32).collect();
        let z_means = assessment.scores.z_means();
        let mut baseline = Baseline { z: narrow(&z_means), yardstick: Vec::new() };
        if let Some(yardstick) = self.yardstick {
            let scores = yardstick.scores(base, &conversations, iteration, prompt_id)?;
            metrics.push(("probe/yardstick".to_owned(), stats::mean(&scores)));
            baseline.yardstick = narrow(&scores);
        }
        Ok(Report {
            score,
            z_mean: stats::mean(&z_means),
            baseline,
            metrics,
            rows: rows(iteration, &conversations, &self.prompts, &assessment, turns),
            scores: assessment.scores,
        })
    }
}
