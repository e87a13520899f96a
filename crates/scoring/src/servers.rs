//! Servers that answer test prompts for the base, and for adapters over it. Other models answer here: servers hold one base.

use std::path::Path;

use anyhow::Result;
use arete_chain::Turns;
use arete_chain::sample::SampledChain;
use arete_engine::Fleet;
use arete_engine::canary::Canary;
use arete_engine::chains::{self, Asked, Refused, Weights};
use arete_engine::fleet::Tenant;
use arete_engine::journal::Journal;
use arete_model::adapter::{self, LoadedAdapter};
use arete_model::{Chat, Model};
use arete_records::rows::{ConversationRow, PromptRow};
use arete_stage::units::SHARDS;

use crate::config::ScoreConfig;
use crate::replies::{self, Drawing};

/// The servers, and which policy's adapter they hold.
#[derive(Debug)]
pub(crate) struct Servers {
    fleet: Fleet,
    held: Option<String>,
}

impl Servers {
    /// Finds every server, and proves that each holds `base`.
    ///
    /// # Errors
    ///
    /// As [`Fleet::connect`].
    pub(crate) fn connect(config: &ScoreConfig, base: &Model, output: &Path) -> Result<Self> {
        let canary = Canary::of(base, &base.chat()?)?;
        let run = fs_err::canonicalize(output)?.display().to_string();
        let dir = output.join(SHARDS);
        let tenant = Tenant { run: &run, dir: &dir, is_first: true };
        Ok(Self {
            fleet: Fleet::connect(&config.engines, &config.server, tenant, canary)?,
            held: None,
        })
    }

    /// The journal of a policy's replies; it goes with the shards.
    ///
    /// # Errors
    ///
    /// A file that cannot be read or written.
    pub(crate) fn journal(output: &Path, policy: &str) -> Result<Journal> {
        Ok(Journal::open(&output.join(SHARDS).join(format!("replies-{policy}.partial.jsonl")))?)
    }

    /// [`replies::sample_chains`], by the servers.
    ///
    /// # Errors
    ///
    /// As there, and those of servers.
    pub(crate) fn chains(
        &mut self,
        (model, chat): (&Model, &Chat<'_>),
        (name, policy): (&str, Option<&LoadedAdapter>),
        prompts: &[PromptRow],
        turns: &Turns,
        drawing: &Drawing,
        journal: &mut Journal,
    ) -> Result<Vec<(ConversationRow, SampledChain)>> {
        let (fitting, starts) = replies::starts(model, chat, prompts, turns, drawing)?;
        let asked = Asked {
            weights: if policy.is_some() { Weights::Adapter } else { Weights::Base },
            sampling: drawing.sampling,
            stop_ids: model.stop_ids()?,
            max_new_tokens: drawing.max_new_tokens,
        };
        let held = &mut self.held;
        let mut hold = |fleet: &mut Fleet| -> Result<()> {
            let Some(policy) = policy.filter(|_| held.as_deref() != Some(name)) else {
                return Ok(());
            };
            let values = fleet.canary().under(model, &policy.adapter)?;
            fleet.load(values, |path| {
                Ok::<_, anyhow::Error>(adapter::save(path, &policy.adapter, None, &policy.meta)?)
            })?;
            *held = Some(name.to_owned());
            Ok(())
        };
        let mut found = vec![vec![None; drawing.n_samples]; fitting.len()];
        chains::sample(
            &mut self.fleet,
            chat,
            &starts,
            &asked,
            journal,
            &mut hold,
            &mut |start, sample, chain| match chain {
                Ok(chain) => {
                    found[start][sample] = Some(chain);
                    Ok(())
                }
                Err(Refused(reason)) => {
                    let item = format!("prompt {}", fitting[start].prompt_id);
                    Err(arete_engine::Error::Refused { item, reason }.into())
                }
            },
        )?;
        let whole = |chain: Option<_>| chain.expect("every chain ends");
        let chains = found.into_iter().map(|samples| samples.into_iter().map(whole).collect());
        Ok(replies::rows(&fitting, chains.collect(), turns, drawing))
    }

    /// Lets go of the adapter that servers hold.
    ///
    /// # Errors
    ///
    /// As [`Fleet::close`].
    pub(crate) fn close(self) -> Result<()> {
        Ok(self.fleet.close()?)
    }
}
