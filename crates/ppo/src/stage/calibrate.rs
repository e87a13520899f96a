//! What is measured once before the first iteration, on replies of the model that the run starts from: statistics of reward
//! models that came without, and what reply lengths explain of scores.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use arete_chain::reward_model::Base;
use arete_records::{Refusal, ScoreStats, Split, atomic, files, score_stats};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Stage;
use crate::length::LengthTrend;
use crate::prompts::Prompt;
use crate::rollout::{Conversation, Purpose, Sampler};
use crate::scorer::Member;
use crate::spread::{self, Policy, Sampled};

/// File of the length trends.
const LENGTH_TRENDS: &str = "length_trends.json";
/// Statistics of fewer replies are said to rest on little.
const MIN_SAMPLES: usize = 64;

/// Replies of the reference, and what the reward models think of them.
struct Replies {
    conversations: Vec<Conversation>,
    raw: Vec<Vec<f64>>,
    /// The prompt of each.
    prompts: Vec<usize>,
    split: Split,
}

impl Stage<'_> {
    /// Measures what is missing, once: a resumed run reads it back.
    pub(super) fn calibrate(&mut self) -> Result<()> {
        let is_missing = |member: &&Member| member.stats.is_none();
        let missing: Vec<&str> = self.rewards.members.iter().filter(is_missing).map(name).collect();
        let missing = missing.join(", ");
        let (stats, trends) =
            (self.output.join(score_stats::FILE), self.output.join(LENGTH_TRENDS));
        for file in [&stats, &trends] {
            self.ranks.share_file(file)?;
        }
        let wants_stats = !missing.is_empty() && !stats.exists();
        let wants_trends = self.config.length_residual && !trends.exists();
        let replies = match wants_stats || wants_trends {
            true => Some(self.timed("statistics", 0, |stage| stage.replies_of_reference())?),
            false => None,
        };
        if !missing.is_empty() {
            if wants_stats && let Some(replies) = &replies {
                tracing::info!(
                    missing,
                    "no score statistics: taking them on the reference's replies"
                );
                self.measure_scores(replies, &stats)?;
            }
            // Read back even when they were just written, so that a resumed run uses the same bits.
            let stored: BTreeMap<String, ScoreStats> = read(stats)?;
            for member in self.rewards.members.iter_mut().filter(|m| m.stats.is_none()) {
                member.stats = stored.get(&member.name).cloned();
            }
        }
        if self.config.length_residual {
            if wants_trends && let Some(replies) = &replies {
                self.rewards.fit_length(&replies.conversations, &replies.raw);
                let found = self.rewards.members.iter();
                let found: BTreeMap<&str, Option<LengthTrend>> =
                    found.map(|member| (name(member), member.length_trend)).collect();
                write(&trends, &found)?;
            }
            let stored: BTreeMap<String, Option<LengthTrend>> = read(trends)?;
            for member in &mut self.rewards.members {
                member.length_trend = stored.get(&member.name).copied().flatten();
                if let Some(LengthTrend { slope, mean_length }) = member.length_trend {
                    tracing::info!(
                        reward = member.name,
                        slope,
                        mean_length,
                        "what length explains of its scores is taken from them"
                    );
                }
            }
        }
        Ok(())
    }

    /// `stats_samples` conversations of the reference at validation prompts, several a prompt where prompts are few.
    fn replies_of_reference(&mut self) -> Result<Replies> {
        let (prompts, split) = if self.prompts.validation.is_empty() {
            tracing::warn!("no validation prompts: score statistics are of training prompts");
            (&self.prompts.train, Split::Train)
        } else {
            (&self.prompts.validation, Split::Validation)
        };
        let n = self.config.stats_samples;
        if n < MIN_SAMPLES {
            tracing::warn!(n, wanted = MIN_SAMPLES, "score statistics rest on few replies");
        }
        let drawn: Vec<usize> = (0..prompts.len()).cycle().take(n).collect();
        let asked: Vec<&Prompt> = drawn.iter().map(|&idx| &prompts[idx]).collect();
        let purpose = Purpose::Statistics;
        let sampler = Sampler { samples_per_prompt: 1, ..self.sampler.clone() };
        let (ranks, model, chat) = (self.ranks, self.model, &self.chat);
        let policy = Policy { ranks, model, chat, adapter: None, serving: self.serving() };
        let Sampled { conversations, .. } =
            spread::sample(policy, &sampler, &asked, purpose, 0, None)?;
        let base = Base {
            model: self.model,
            chat: &self.chat,
            micro_batch_tokens: self.config.micro_batch_tokens,
        };
        let (raw, _) = spread::raw_scores(ranks, &self.rewards, base, &conversations)?;
        Ok(Replies { conversations, raw, prompts: drawn, split })
    }

    /// Writes the statistics of the members that have none.
    fn measure_scores(&mut self, replies: &Replies, path: &Path) -> Result<()> {
        let had: Vec<bool> = self.rewards.members.iter().map(|m| m.stats.is_some()).collect();
        let base = &self.model.base_sha256;
        self.rewards.calibrate(&replies.raw, &replies.prompts, replies.split.name(), base)?;
        let measured = self.rewards.members.iter().zip(&had).filter(|(_, had)| !**had);
        let stats: BTreeMap<&str, &ScoreStats> = measured
            .filter_map(|(member, _)| Some((name(member), member.stats.as_ref()?)))
            .collect();
        write(path, &stats)?;
        for (member, _) in self.rewards.members.iter_mut().zip(had).filter(|(_, had)| !had) {
            member.stats = None;
        }
        Ok(())
    }
}

fn name(member: &Member) -> &str {
    &member.name
}

fn write(path: &Path, value: &impl Serialize) -> Result<()> {
    let json = serde_json::to_vec_pretty(value).expect("finite numbers serialise");
    Ok(atomic::write(path, &json)?)
}

fn read<T: DeserializeOwned>(path: PathBuf) -> Result<T> {
    let bytes = files::read_small(&path)?;
    Ok(serde_json::from_slice(&bytes)
        .map_err(|error| Refusal::file(&path, "", "what this stage wrote", error))?)
}
