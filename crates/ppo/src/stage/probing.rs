//! Probes within a run: what they show on the terminal, which is the best, and the alarm for over-optimisation.

use anyhow::Result;

use super::files::{completions_path, write_rows, write_scores};
use super::state::Best;
use super::{Clock, Stage, log, round};
use crate::alarm::Change;
use crate::engines::Serving;
use crate::probe::{Probe, Report};
use crate::prompts::Prompt;
use crate::rollout::Sampler;

/// Conversations shown in the log after a probe.
const N_SHOWN: usize = 3;

impl Stage<'_> {
    /// Answers validation prompts, logs how that went, keeps the best, and warns of over-optimisation.
    pub(super) fn probe(&mut self) -> Result<()> {
        if self.prompts.validation.is_empty() {
            tracing::warn!("no validation prompts: nothing is probed");
            return Ok(());
        }
        let iteration = self.state.iteration;
        let config = self.config;
        let clock = Clock { output: &self.output, iteration };
        let n_prompts = config.probe_prompts;
        let probe = Probe {
            ranks: self.ranks,
            model: self.model,
            chat: &self.chat,
            rewards: &self.rewards,
            yardstick: self.yardstick.as_ref(),
            serving: self.engines.as_ref().map(|engines| Serving { engines, version: iteration }),
            prompts: self.prompts.validation.iter().take(n_prompts).collect(),
            sampler: Sampler {
                temperature: config.probe_temperature(),
                samples_per_prompt: 1,
                ..self.sampler.clone()
            },
        };
        let mut report = clock.time("probe", |n| {
            let report = probe.run(&self.models.policy, config, self.state.kl_coef, iteration)?;
            *n = report.n_sampled();
            Ok(report)
        })?;
        let path = completions_path(&self.output, iteration);
        write_rows(&path, &report.rows)?;
        write_scores(&path, &report.rows, &report.scores)?;
        show(&report, &probe.prompts);
        tracing::info!(
            iteration,
            score = round(report.score),
            z_mean = round(report.z_mean),
            "probe"
        );
        let mut is_hacked = false;
        if let Some((_, first)) = &self.state.first_probe {
            let highest = self.state.highest_probe.as_ref().unwrap_or(first);
            let since = |earlier| Change::between(earlier, &report.baseline, config.seed);
            let (metrics, alarm) = watch(since(first), since(highest), iteration);
            report.metrics.extend(metrics);
            is_hacked = alarm;
        } else {
            self.state.first_probe = Some((report.score, report.baseline.clone()));
        }
        let highest = &mut self.state.highest_probe;
        if highest.as_ref().is_none_or(|highest| report.baseline.is_above(highest)) {
            *highest = Some(report.baseline.clone());
        }
        log(&mut self.metrics, iteration, &report.metrics)?;
        let is_better = self.state.best.is_none_or(|best| report.score > best.score);
        if iteration > 0 && is_better && !is_hacked {
            self.state.best = Some(Best { iteration, score: report.score });
        }
        Ok(())
    }
}

/// The first completions of a probe, for the terminal; all of them are in `completions/`.
fn show(report: &Report, prompts: &[&Prompt]) {
    let rows = report.rows.iter().zip(report.scores.z_means());
    for ((row, z_mean), prompt) in rows.zip(prompts).take(N_SHOWN) {
        let replies = row.messages.iter().skip(prompt.messages.len()).step_by(2);
        let replies: Vec<&str> = replies.map(|message| message.content.as_str()).collect();
        let question = prompt.messages.last().map_or("", |message| message.content.as_str());
        tracing::info!(
            iteration = row.iteration,
            prompt_id = row.prompt_id,
            z_mean = round(z_mean),
            kl = row.kl,
            question,
            replies = replies.join(" | "),
            "completion"
        );
    }
}

/// What the yardstick says of the change since the first probe and since the one it liked best, for the metrics; and whether
/// the reward models are being gamed, with a warning if so.
fn watch(
    since_first: Option<Change>,
    since_highest: Option<Change>,
    iteration: u64,
) -> (Vec<(String, f64)>, bool) {
    let (Some(first), Some(highest)) = (since_first, since_highest) else {
        return (Vec::new(), false);
    };
    let alarm = [first, highest].iter().any(Change::is_over_optimised);
    if alarm {
        tracing::warn!(
            iteration,
            z_gain = round(first.z.estimate),
            yardstick_gain = round(first.yardstick.estimate),
            yardstick_since_highest = round(highest.yardstick.estimate),
            yardstick_since_highest_high = round(highest.yardstick.high),
            "over-optimisation: the reward models' scores rise, the yardstick falls; stop earlier, raise kl_coef, or \
             choose a more cautious ensemble"
        );
    }
    let metrics = vec![
        ("probe/z_gain".to_owned(), first.z.estimate),
        ("probe/yardstick_gain".to_owned(), first.yardstick.estimate),
        ("probe/yardstick_since_highest".to_owned(), highest.yardstick.estimate),
        ("probe/over_optimised".to_owned(), f64::from(u8::from(alarm))),
    ];
    (metrics, alarm)
}
