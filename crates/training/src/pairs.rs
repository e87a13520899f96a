//! What the trainers on pairs share: reward modelling and direct preference optimisation.

use arete_model::{Batch, BatchBuilder, SegmentIdx};
use serde::{Deserialize, Serialize};

/// What happens to a conversation longer than `max_length`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum OverLength {
    /// Its last `max_length` tokens are kept, and with them the answer and its end. Both sides of a pair lose the same
    /// tokens where these are common to both.
    TruncateLeft,
    /// Its first `max_length` tokens are kept (the report's setting, TRL's `keep_start`; no end of turn is seen).
    TruncateRight,
    /// The pair is left out (TRL's `RewardTrainer`).
    Drop,
}

/// What the loss aims at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Label {
    /// The chosen side wins with probability `chosen_prob`.
    Soft,
    /// The chosen side wins (TRL).
    Hard,
}

/// The tokens of a pair: its sides, and how many leading tokens both share.
#[derive(Clone, Copy, Debug)]
pub struct PairTokens<'a> {
    /// The better side.
    pub chosen: &'a [i64],
    /// The worse side.
    pub rejected: &'a [i64],
    /// Leading tokens that are computed once.
    pub n_shared: usize,
}

/// Pairs in one forward pass, each a tree: what both sides share, then each side's own tokens. Also the segments of the chosen
/// sides' own tokens, and those of the rejected ones'.
pub fn trees<'a>(pairs: impl IntoIterator<Item = PairTokens<'a>>) -> (Batch, [Vec<SegmentIdx>; 2]) {
    let mut builder = Batch::tree();
    let mut segments = [Vec::new(), Vec::new()];
    for PairTokens { chosen, rejected, n_shared } in pairs {
        let shared = &chosen[..n_shared];
        let root = (!shared.is_empty()).then(|| builder.root(shared));
        for (side, out) in [chosen, rejected].into_iter().zip(&mut segments) {
            out.push(add(&mut builder, root, &side[n_shared..]));
        }
    }
    (builder.build(), segments)
}

fn add(builder: &mut BatchBuilder, root: Option<SegmentIdx>, own: &[i64]) -> SegmentIdx {
    match root {
        Some(root) => builder.child(root, own),
        None => builder.root(own),
    }
}
