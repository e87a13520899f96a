//! Servers that sample in the policy's place: when they get which adapter, and where their replies are kept.
//!
//! A version of the policy is the number of iterations behind it: iteration i samples with version i − 1, a probe after it with
//! version i. The journal of an iteration holds the replies to its rollout, and to the probe after it; whoever does the iteration again
//! after a kill gets them from there, so the bytes of a run stay the same although servers would reply otherwise.

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use arete_chain::sample::Start;
use arete_engine::canary::Canary;
use arete_engine::chains::{self, Asked, Counts, Refused};
use arete_engine::fleet::Tenant;
use arete_engine::journal::Journal;
use arete_engine::{EngineArgs, Fleet, ServerConfig};
use arete_model::adapter::{self, AdapterMeta, Task};
use arete_model::{Adapter, Chat, Model};
use arete_stage::timings;
use arete_training::Ranks;

use crate::journal;
use crate::rollout::{Conversation, Purpose};
use crate::spread::Policy;

/// Directory of adapters for servers, unless the settings name another.
const ADAPTERS: &str = "engines";

/// The servers of a run.
#[derive(Debug)]
pub(crate) struct Engines {
    fleet: RefCell<Fleet>,
    meta: AdapterMeta,
    output: PathBuf,
    rollouts: PathBuf,
    /// The version that servers hold.
    held: Cell<Option<u64>>,
}

/// The servers, asked for a version of the policy.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Serving<'a> {
    pub(crate) engines: &'a Engines,
    pub(crate) version: u64,
}

/// What is asked of servers, and how it is drawn.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    pub(crate) starts: Vec<Start<'a>>,
    pub(crate) asked: Asked,
    pub(crate) purpose: Purpose,
}

impl Engines {
    /// Finds every server, and proves that each holds the base; `name` is what the user calls it, `run` tells this run from others.
    ///
    /// # Errors
    ///
    /// As [`Fleet::connect`].
    pub(crate) fn connect(
        ranks: &Ranks,
        (args, config): (&EngineArgs, &ServerConfig),
        (model, chat): (&Model, &Chat<'_>),
        (name, run): (&str, &str),
        output: &Path,
        rollouts: &Path,
    ) -> Result<Self> {
        let canary = Canary::of(model, chat)?;
        let dir = output.join(ADAPTERS);
        let tenant = Tenant { run, dir: &dir, is_first: ranks.is_first() };
        let fleet = Fleet::connect(args, config, tenant, canary)?;
        // Nobody loads anything before the first has removed what earlier attempts left.
        ranks.meet()?;
        Ok(Self {
            fleet: RefCell::new(fleet),
            meta: AdapterMeta::of(model, name, Task::CausalLm),
            output: output.to_owned(),
            rollouts: rollouts.to_owned(),
            held: Cell::new(None),
        })
    }

    /// Lets go of the adapter, and of the directory for adapters if it is the run's own.
    pub(crate) fn close(self) -> Result<()> {
        self.fleet.into_inner().close()?;
        let own = self.output.join(ADAPTERS);
        if own.is_dir() {
            fs_err::remove_dir_all(own)?;
        }
        Ok(())
    }
}

impl Serving<'_> {
    /// Conversations by start and sample.
    pub(crate) fn sample(
        &self,
        policy: Policy<'_>,
        request: &Request<'_>,
    ) -> Result<(Vec<Conversation>, Counts)> {
        let Policy { ranks, model, chat, adapter, .. } = policy;
        let Self { engines, version } = self;
        let number = match request.purpose {
            Purpose::Rollout => version + 1,
            Purpose::Probe => *version,
            Purpose::Statistics => 0,
        };
        let mut journal = Journal::open(&journal::path_of(&engines.rollouts, number))?;
        let mut fleet = engines.fleet.borrow_mut();
        if ranks.n_ranks() > 1
            && let Some(adapter) = adapter
        {
            self.hold(&mut fleet, ranks, model, adapter)?;
        }
        let started = Instant::now();
        let first: Vec<usize> = request
            .starts
            .iter()
            .scan(0, |at, start| {
                let first = *at;
                *at += start.streams.len();
                Some(first)
            })
            .collect();
        let n_all = request.starts.iter().map(|start| start.streams.len()).sum();
        let mut conversations = vec![None; n_all];
        let mut ready = |fleet: &mut Fleet| match adapter {
            Some(adapter) if ranks.n_ranks() == 1 => self.hold(fleet, ranks, model, adapter),
            _ => Ok(()),
        };
        let counts = chains::sample(
            &mut fleet,
            chat,
            &request.starts,
            &request.asked,
            &mut journal,
            &mut ready,
            &mut |start, sample, chain| match chain {
                Ok(chain) => {
                    conversations[first[start] + sample] = Some(chain);
                    Ok(())
                }
                Err(Refused(reason)) => {
                    let item = format!("conversation with prompt {start} of the batch");
                    Err(arete_engine::Error::Refused { item, reason }.into())
                }
            },
        )?;
        let seconds = started.elapsed().as_secs_f64();
        let fields = [
            ("iteration", number.into()),
            ("n_tokens", counts.n_sampled.into()),
            ("n_replayed", counts.n_known.into()),
            ("n_lost", counts.n_lost.into()),
        ];
        if ranks.is_first() {
            timings::log(&engines.output, "engines", seconds, &fields)?;
        }
        let whole = |conversation: Option<_>| conversation.expect("every chain ends");
        Ok((conversations.into_iter().map(whole).collect(), counts))
    }

    /// Has the servers hold this version, if they do not already. With several processes the first does it for all.
    fn hold(
        &self,
        fleet: &mut Fleet,
        ranks: &Ranks,
        model: &Model,
        policy: &Adapter,
    ) -> Result<()> {
        let Self { engines, version } = self;
        if engines.held.get() == Some(*version) {
            return Ok(());
        }
        let values = fleet.canary().under(model, policy)?;
        if ranks.is_first() {
            let started = Instant::now();
            let mut copy = policy.deep_copy("policy");
            copy.set_trainable(false);
            let write = |path: &Path| {
                Ok::<_, anyhow::Error>(adapter::save(path, &copy, None, &engines.meta)?)
            };
            let verdict = fleet.load(values.clone(), write)?;
            let fields = [
                ("version", (*version).into()),
                ("canary_difference", verdict.difference.into()),
                ("canary_step", verdict.step.into()),
            ];
            timings::log(&engines.output, "load", started.elapsed().as_secs_f64(), &fields)?;
        }
        if ranks.n_ranks() > 1 {
            let name = fleet.adapter().filter(|_| ranks.is_first()).unwrap_or_default();
            let names = ranks.gather(name.as_bytes())?;
            if !ranks.is_first() {
                fleet.adopt(&String::from_utf8_lossy(&names[0]), values);
            }
        }
        engines.held.set(Some(*version));
        Ok(())
    }
}
