//! A model in this process whose replies servers sample: tokens in and out, by its own template, proved by a canary.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use anyhow::Result;
use arete_engine::canary::Canary;
use arete_engine::chains::{self, Asked, Weights};
use arete_engine::fleet::Tenant;
use arete_engine::journal::Journal;
use arete_engine::{EngineArgs, Fleet, ServerConfig};
use arete_stage::units::SHARDS;

use super::local::{replies_of, start};
use super::{Chain, Drawing, LocalEngine, Outcome, Parts, Refused};
/// Replies of units that are not done; among the shards, and no result.
const JOURNAL: &str = "replies.partial.jsonl";

/// The model, and the servers that hold it, too.
#[derive(Debug)]
pub struct FleetEngine {
    model: LocalEngine,
    fleet: RefCell<Fleet>,
    journal: RefCell<Journal>,
}

impl FleetEngine {
    /// Finds the servers, and proves that each holds the model. Replies go to a journal below `output` until [`FleetEngine::forget`].
    ///
    /// # Errors
    ///
    /// As [`Fleet::connect`]; a journal that cannot be opened.
    pub fn connect(
        model: LocalEngine,
        args: &EngineArgs,
        config: &ServerConfig,
        output: &Path,
    ) -> Result<Self> {
        let canary = Canary::of(model.model(), &model.chat()?)?;
        fs_err::create_dir_all(output)?;
        let run = fs_err::canonicalize(output)?.display().to_string();
        let dir = output.join(SHARDS);
        let tenant = Tenant { run: &run, dir: &dir, is_first: true };
        let fleet = RefCell::new(Fleet::connect(args, config, tenant, canary)?);
        let journal = RefCell::new(Journal::open(&journal_path(output))?);
        Ok(Self { model, fleet, journal })
    }

    /// The model.
    pub(super) fn model(&self) -> &LocalEngine {
        &self.model
    }

    pub(super) fn chains_each(
        &self,
        chains: &[Chain],
        drawing: &Drawing,
        done: &mut dyn FnMut(usize, Outcome) -> Result<()>,
    ) -> Result<()> {
        let (model, chat) = (self.model.model(), self.model.chat()?);
        let starts = chains.iter().map(|chain| start(&chat, chain, drawing.seed));
        let starts: Vec<_> = starts.collect::<Result<_, _>>()?;
        let asked = Asked {
            weights: Weights::Base,
            sampling: drawing.sampling,
            stop_ids: model.stop_ids()?,
            max_new_tokens: drawing.max_new_tokens,
        };
        let (mut fleet, mut journal) = (self.fleet.borrow_mut(), self.journal.borrow_mut());
        let mut parts = Parts::of(chains);
        let mut refused = vec![false; chains.len()];
        chains::sample(
            &mut fleet,
            &chat,
            &starts,
            &asked,
            &mut journal,
            &mut |_| Ok(()),
            &mut |idx, sample, chain| match chain {
                // The first sample that is refused decides; the chain's others are of no use.
                Err(_) if refused[idx] => Ok(()),
                Err(chains::Refused(reason)) => {
                    refused[idx] = true;
                    done(idx, Err(Refused(reason)))
                }
                Ok(chain) => match parts.put(idx, sample, replies_of(&chain)) {
                    Some(whole) => done(idx, Ok(whole)),
                    None => Ok(()),
                },
            },
        )?;
        Ok(())
    }

    /// Removes the journal of a stage that is done, if there is one.
    ///
    /// # Errors
    ///
    /// A file that cannot be removed.
    pub fn forget(output: &Path) -> Result<()> {
        let path = journal_path(output);
        if path.exists() {
            fs_err::remove_file(path)?;
        }
        Ok(())
    }
}

fn journal_path(output: &Path) -> PathBuf {
    output.join(SHARDS).join(JOURNAL)
}
