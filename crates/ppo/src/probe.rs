//! The held-out probe: how the policy does on validation prompts that it never learns from.
//!
//! The prompts and the random streams are the same at every probe, so probes can be compared pair by pair. With a
//! yardstick the probe is the alarm for over-optimisation ([`crate::alarm`]): the ensemble rises, the yardstick falls.

use arete_model::{Adapter, Chat, Model};
use arete_records::rows::RolloutRow;
use arete_records::{Aspect, stats};

use crate::Error;
use crate::alarm::Baseline;
use crate::assess::{assess, describe, rows};
use crate::config::Config;
use crate::prompts::Prompt;
use crate::rollout::{Layout, Purpose, Sampler, own_logprobs};
use crate::scorer::{Ensemble, Scoring, Yardstick};

/// What is probed, and with what.
#[derive(Debug)]
pub struct Probe<'a> {
    /// The base.
    pub model: &'a Model,
    /// Its chat template.
    pub chat: &'a Chat<'a>,
    /// The reward models.
    pub ensemble: &'a Ensemble,
    /// One more, beside them.
    pub yardstick: Option<&'a Yardstick>,
    /// The prompts.
    pub prompts: Vec<&'a Prompt>,
    /// How they are answered.
    pub sampler: Sampler,
}

/// What a probe found.
#[derive(Clone, Debug)]
pub struct Report {
    /// Mean standardised score of the ensemble: what the best checkpoint is chosen by.
    pub z_mean: f64,
    /// Numbers to log.
    pub metrics: Vec<(String, f64)>,
    /// What later probes are measured against.
    pub baseline: Baseline,
    /// The conversations.
    pub rows: Vec<RolloutRow>,
}

impl Probe<'_> {
    /// Answers the prompts with the policy and scores the answers.
    ///
    /// # Errors
    ///
    /// As [`Sampler::sample`] and [`Ensemble::scores`].
    pub fn run(
        &self,
        policy: &Adapter,
        config: &Config,
        kl_coef: f64,
        iteration: u64,
    ) -> Result<Report, Error> {
        let decoder = &self.model.decoder;
        let conversations = self.sampler.sample(
            self.model,
            self.chat,
            Some(policy),
            &self.prompts,
            Purpose::Probe,
            0,
            None,
        )?;
        let budget = config.micro_batch_tokens;
        let scoring = Scoring { decoder, chat: self.chat, budget };
        let scores = self.ensemble.scores(scoring, &conversations, iteration, |conversation| {
            self.prompts[conversation.prompt].prompt_id.clone()
        })?;
        let logprob =
            |adapter| own_logprobs(decoder, adapter, &conversations, config.temperature, budget);
        let kl = logprob(Some(policy))? - logprob(None)?; // [n]
        let layout = Layout::new(&conversations);
        let assessment = assess(scores, &conversations, &layout, &kl, kl_coef, config)?;

        let aspects: Vec<Aspect> =
            self.ensemble.members.iter().map(|member| member.aspect).collect();
        let mut metrics: Vec<(String, f64)> =
            describe(&conversations, &aspects, &assessment.scores)
                .into_iter()
                .map(|(name, value)| (format!("probe/{name}"), value))
                .collect();
        metrics.push(("probe/kl".to_owned(), stats::mean(&assessment.kl)));
        let narrow = |scores: &[f64]| scores.iter().map(|&score| score as f32).collect();
        let z_means = assessment.scores.z_means();
        let mut baseline = Baseline { z: narrow(&z_means), yardstick: Vec::new() };
        if let Some(yardstick) = self.yardstick {
            let scores = yardstick.scores(scoring, &conversations)?;
            metrics.push(("probe/yardstick".to_owned(), stats::mean(&scores)));
            baseline.yardstick = narrow(&scores);
        }
        Ok(Report {
            z_mean: stats::mean(&z_means),
            baseline,
            metrics,
            rows: rows(iteration, &conversations, &self.prompts, &assessment),
        })
    }
}
