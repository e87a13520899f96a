//! A rollout cut into forward passes, a fresh order an epoch, and its first pass before any step.

use std::ops::Range;

use anyhow::Result;
use arete_chain::batches::{self, Packed};
use arete_model::{Batch, Tensor};
use arete_training::Ranks;
use arete_training::order::permutation;
use arete_training::shards::cut;
use tch::{Device, Kind};

use crate::config::Config;
use crate::models::{Graph, Learning, Models};
use crate::rollout::Conversation;
use crate::spread::{from_bytes, to_bytes};

/// Conversations packed into one forward pass.
#[derive(Debug)]
pub(crate) struct Pack {
    /// Which conversations, by index.
    pub(crate) conversations: Vec<usize>,
    /// Their tokens.
    pub(crate) batch: Batch,
    /// Rows of the policy's own tokens.
    pub(crate) rows: Vec<usize>,
    /// `[n]` i64: the row before each, whose hidden state holds the token's value.
    pub(crate) states: Tensor,
}

impl Pack {
    /// Packs the conversations of `order` into passes of at most `budget` tokens, in that order.
    pub(crate) fn all(
        conversations: &[Conversation],
        order: &[usize],
        budget: usize,
    ) -> Result<Vec<Self>> {
        let n_tokens: Vec<usize> =
            order.iter().map(|&idx| conversations[idx].token_ids.len()).collect();
        let runs = batches::micro_batches(&n_tokens, budget)?;
        Ok(runs.into_iter().map(|run| Self::new(conversations, order[run].to_vec())).collect())
    }

    fn new(all: &[Conversation], conversations: Vec<usize>) -> Self {
        let sequences: Vec<&[i64]> =
            conversations.iter().map(|&idx| all[idx].token_ids.as_slice()).collect();
        // The prompt's last token stays with each conversation: its state comes before the first own token.
        let n_prompt = conversations.iter().map(|&idx| all[idx].n_prompt).min().unwrap_or(0);
        let packed = Packed::new(&sequences, n_prompt.saturating_sub(1));
        let mut rows = Vec::new();
        for (place, &idx) in conversations.iter().enumerate() {
            rows.extend(all[idx].own_tokens().map(|token| packed.row(place, token)));
        }
        let states: Vec<i64> = rows.iter().map(|&row| row as i64 - 1).collect();
        Self { conversations, batch: packed.batch, rows, states: Tensor::from_slice(&states) }
    }
}

/// What one optimiser step learns from: fixed shards, packed each by itself.
#[derive(Debug)]
pub(crate) struct Minibatch {
    pub(crate) shards: Vec<Vec<Pack>>,
}

impl Minibatch {
    /// The packs of a run of shards.
    fn packs(&self, shards: Range<usize>) -> impl Iterator<Item = &Pack> {
        self.shards[shards].iter().flatten()
    }

    /// Own tokens in all.
    pub(crate) fn n_own(&self) -> usize {
        self.shards.iter().flatten().map(|pack| pack.rows.len()).sum()
    }

    /// Conversations in all.
    pub(crate) fn n_conversations(&self) -> usize {
        self.shards.iter().flatten().map(|pack| pack.conversations.len()).sum()
    }
}

/// The minibatches of one pass over a rollout.
#[derive(Debug)]
pub(crate) struct Epoch {
    pub(crate) minibatches: Vec<Minibatch>,
}

/// The rollout as the policy and the critic saw it before any step.
pub struct FirstPass<'a> {
    /// `[n]` f32: log P of every own token, in the order of conversations; nats.
    pub old_logprob: Tensor,
    /// `[n]` f32: value of the state before each, if there is a critic.
    pub old_value: Option<Tensor>,
    /// `[n]` f32: entropy of the policy there; nats.
    pub entropy: Tensor,
    /// Kept for the first update.
    pub(crate) graphs: Option<Vec<Graph<'a>>>,
}

impl std::fmt::Debug for FirstPass<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FirstPass").field("keeps_graphs", &self.graphs.is_some()).finish()
    }
}

/// A rollout, packed for learning.
#[derive(Debug)]
pub struct PackedRollout {
    pub(crate) epochs: Vec<Epoch>,
    /// Flat places of each conversation's own tokens: from, to.
    own: Vec<(usize, usize)>,
    /// The first pass can be kept for the first update.
    keep: bool,
}

impl PackedRollout {
    /// Packs a rollout for every epoch; a fresh order each, where there are several minibatches.
    ///
    /// # Errors
    ///
    /// The trainer's failure if the token budget is 0.
    pub fn new(conversations: &[Conversation], config: &Config, iteration: u64) -> Result<Self> {
        let n = conversations.len();
        let epochs = (0..config.epochs)
            .map(|epoch| {
                let order = if config.n_minibatches == 1 {
                    (0..n).collect()
                } else {
                    permutation(config.seed, &format!("minibatches/{iteration}/{epoch}"), n)
                };
                let pack = |part: &[usize]| -> Result<Minibatch> {
                    let shards = cut(part.len(), config.shards.virtual_shards);
                    let budget = config.micro_batch_tokens;
                    let shards = shards
                        .into_iter()
                        .map(|shard| Pack::all(conversations, &part[shard], budget));
                    Ok(Minibatch { shards: shards.collect::<Result<_, _>>()? })
                };
                let minibatches =
                    order.chunks(n / config.n_minibatches).map(pack).collect::<Result<_>>()?;
                Ok(Epoch { minibatches })
            })
            .collect::<Result<_>>()?;
        let mut at = 0;
        let own = conversations
            .iter()
            .map(|conversation| {
                let from = at;
                at += conversation.n_own();
                (from, at)
            })
            .collect();
        let n_tokens: usize = conversations.iter().map(|c| c.token_ids.len()).sum();
        let keep = config.n_minibatches == 1 && n_tokens <= config.keep_graph_tokens;
        Ok(Self { epochs, own, keep })
    }

    /// Own tokens in all.
    pub fn n_own(&self) -> usize {
        self.own.last().map_or(0, |(_, end)| *end)
    }

    /// `[n]` i64: flat places of a pack's own tokens.
    pub(crate) fn places(&self, pack: &Pack) -> Tensor {
        let places: Vec<i64> = pack
            .conversations
            .iter()
            .flat_map(|&idx| self.own[idx].0 as i64..self.own[idx].1 as i64)
            .collect();
        Tensor::from_slice(&places)
    }

    /// What policy and critic say before any step; keeps the graphs if they are the first update's. Each process computes
    /// its own shards.
    ///
    /// # Errors
    ///
    /// The model's failure if memory runs out.
    pub fn first_pass<'s>(
        &'s self,
        ranks: &Ranks,
        models: &'s Models<'_>,
        learning: Learning,
    ) -> Result<FirstPass<'s>> {
        let keeps = || self.keep && models.passes.keeps_graphs();
        let empty = || Tensor::zeros([self.n_own() as i64], (Kind::Float, Device::Cpu));
        let (mut old_logprob, mut old_value, mut entropy) = (empty(), empty(), empty());
        let mut graphs = Vec::new();
        let in_turn = models.in_turn(learning);
        // Where memory runs out, the graphs that were kept go first.
        let saw = |pack: &'s Pack, graphs: &mut Vec<Graph<'s>>| -> Result<_> {
            models.passes.within(|| {
                if !keeps() {
                    graphs.clear();
                }
                let learning = if keeps() { learning } else { Learning::Neither };
                let policy = models.policy_pass(pack, learning, true)?;
                let learns = learning != Learning::Neither && !in_turn;
                let critic = match models.has_critic() {
                    true => Some(models.critic_pass(pack, &policy.hidden, learns)?),
                    false => None,
                };
                Ok((policy, critic))
            })
        };
        let own_packs = |rank: usize| {
            let minibatches = self.epochs[0].minibatches.iter();
            minibatches.flat_map(move |m| m.packs(ranks.part_of(m.shards.len(), rank)))
        };
        for pack in own_packs(ranks.rank()) {
            let (policy, critic) = saw(pack, &mut graphs)?;
            let places = self.places(pack);
            let _guard = tch::no_grad_guard();
            let _ = old_logprob.index_copy_(0, &places, &policy.logprob);
            if let Some(critic) = &critic {
                let _ = old_value.index_copy_(0, &places, &critic.value);
            }
            let _ = entropy.index_copy_(0, &places, &policy.entropy);
            if keeps() {
                graphs.push(Graph { policy, critic: critic.filter(|_| !in_turn) });
            }
        }
        if ranks.n_ranks() > 1 {
            let mut parts = vec![&mut old_logprob, &mut entropy];
            if models.has_critic() {
                parts.push(&mut old_value);
            }
            for values in parts {
                exchange(ranks, values, &|rank| {
                    own_packs(rank).map(|pack| self.places(pack)).collect()
                })?;
            }
        }
        let graphs = keeps().then_some(graphs);
        let old_value = models.has_critic().then_some(old_value);
        Ok(FirstPass { old_logprob, old_value, entropy, graphs })
    }
}

/// Fills in the numbers that other processes computed; `places_of` says where each process's are, in the order it has them.
fn exchange(
    ranks: &Ranks,
    values: &mut Tensor,
    places_of: &dyn Fn(usize) -> Vec<Tensor>,
) -> Result<()> {
    let _guard = tch::no_grad_guard();
    let empty = || Tensor::zeros([0], (Kind::Int64, Device::Cpu));
    let places = |rank: usize| -> Tensor {
        let parts = places_of(rank);
        if parts.is_empty() { empty() } else { Tensor::cat(&parts, 0) }
    };
    let own: Vec<f32> = Vec::try_from(values.index_select(0, &places(ranks.rank())))?;
    for (rank, bytes) in ranks.gather(&to_bytes(&own))?.iter().enumerate() {
        let found: Vec<f32> = from_bytes(bytes).collect();
        let _ = values.index_copy_(0, &places(rank), &Tensor::from_slice(&found));
    }
    Ok(())
}
