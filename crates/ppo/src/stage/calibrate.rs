//! Statistics of reward models that came without: taken once, on replies of the model that PPO starts from.

use std::collections::BTreeMap;
use std::path::Path;

use arete_chain::reward_model::Base;
use arete_records::{Aspect, ScoreStats, Split, atomic, score_stats};

use super::Stage;
use crate::Error;
use crate::prompts::Prompt;
use crate::rollout::Purpose;

impl Stage<'_> {
    /// Takes the statistics of reward models that came without, once: a resumed run reads them back.
    pub(super) fn calibrate(&mut self) -> Result<(), Error> {
        let missing: Vec<&str> = self
            .rewards
            .members
            .iter()
            .filter(|member| member.stats.is_none())
            .map(|member| member.aspect.name())
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let path = self.output.join(score_stats::FILE);
        if !path.exists() {
            let missing = missing.join(", ");
            tracing::info!(missing, "no score statistics: taking them on the reference's replies");
            self.timed("statistics", 0, |stage| stage.measure_scores(&path))?;
        }
        // Read back even when they were just written, so that a resumed run uses the same bits.
        let bytes = fs_err::read(&path)?;
        let stored: BTreeMap<Aspect, ScoreStats> =
            serde_json::from_slice(&bytes).map_err(|error| Error::NotAReward {
                path,
                expected: "the score statistics this stage wrote",
                got: error.to_string(),
            })?;
        for member in &mut self.rewards.members {
            if member.stats.is_none() {
                member.stats = stored.get(&member.aspect).cloned();
            }
        }
        Ok(())
    }

    fn measure_scores(&mut self, path: &Path) -> Result<(), Error> {
        let (prompts, split) = if self.prompts.validation.is_empty() {
            tracing::warn!("no validation prompts: score statistics are of training prompts");
            (&self.prompts.train, Split::Train)
        } else {
            (&self.prompts.validation, Split::Validation)
        };
        let prompts: Vec<&Prompt> =
            prompts.iter().cycle().take(self.config.stats_samples).collect();
        let purpose = Purpose::Statistics;
        let conversations =
            self.sampler.sample(self.model, &self.chat, None, &prompts, purpose, 0, None)?;
        let base = Base {
            model: self.model,
            chat: &self.chat,
            micro_batch_tokens: self.config.micro_batch_tokens,
        };
        let (raw, _) = self.rewards.raw_scores(base, &conversations)?;
        self.rewards.calibrate(&raw, split.name(), &self.model.base_sha256)?;
        let stats: BTreeMap<Aspect, &ScoreStats> = self
            .rewards
            .members
            .iter()
            .filter_map(|member| Some((member.aspect, member.stats.as_ref()?)))
            .collect();
        let json = serde_json::to_vec_pretty(&stats).expect("finite numbers serialise");
        atomic::write(path, &json)?;
        for member in &mut self.rewards.members {
            member.stats = None;
        }
        Ok(())
    }
}
