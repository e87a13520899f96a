//! Sequences into forward passes: runs of them within a token budget, and what they share computed once.
//!
//! A token's hidden state is the same to the bit however its sequence is packed ([`arete_model::Batch`]); gradients differ
//! by rounding.

use std::ops::Range;

use arete_model::{Batch, BatchBuilder, Error, SegmentIdx};

/// A shorter common beginning is not worth a segment of its own.
const MIN_SHARED: usize = 8;
/// Sequences that share one computed beginning. The backward pass of attention gives each such tree to one thread,
/// so there should be several.
const PER_TREE: usize = 8;

/// Cuts items into consecutive runs of at most `budget` tokens; an item above the budget is a run of its own.
///
/// # Errors
///
/// [`Error::Invalid`] if the budget is 0.
pub fn micro_batches(n_tokens: &[usize], budget: usize) -> Result<Vec<Range<usize>>, Error> {
    if budget == 0 {
        let (expected, got) = ("at least 1".to_owned(), "0".to_owned());
        return Err(Error::Invalid { name: "micro_batch_tokens", expected, got });
    }
    let mut runs = Vec::new();
    let (mut start, mut total) = (0, 0);
    for (item, &n) in n_tokens.iter().enumerate() {
        if item > start && total + n > budget {
            runs.push(start..item);
            (start, total) = (item, 0);
        }
        total += n;
    }
    if start < n_tokens.len() {
        runs.push(start..n_tokens.len());
    }
    Ok(runs)
}

/// Sequences in one batch, every beginning that neighbours share computed once: the prompt of several samples, and the
/// aspects of a chain, of which each continues the one before. For forward passes alone.
#[derive(Debug)]
pub(crate) struct Forest {
    /// The batch.
    pub(crate) batch: Batch,
    /// The segment that each sequence ends with.
    tails: Vec<SegmentIdx>,
}

impl Forest {
    /// # Panics
    ///
    /// If a sequence is empty.
    pub(crate) fn new<S: AsRef<[i64]>>(sequences: &[S]) -> Self {
        let mut builder = Batch::tree();
        let mut tails = Vec::with_capacity(sequences.len());
        grow(&mut builder, &mut tails, sequences, None, 0);
        Self { batch: builder.build(), tails }
    }

    /// The row of each sequence's last token.
    pub(crate) fn last_rows(&self) -> Vec<i64> {
        self.tails.iter().map(|&tail| self.batch.last_row(tail) as i64).collect()
    }
}

/// Adds neighbours of which the first `done` tokens stand in `parent`.
fn grow<S: AsRef<[i64]>>(
    builder: &mut BatchBuilder,
    tails: &mut Vec<SegmentIdx>,
    sequences: &[S],
    parent: Option<SegmentIdx>,
    done: usize,
) {
    let mut at = 0;
    while at < sequences.len() {
        let first = sequences[at].as_ref();
        let mut shared = first.len();
        let mut end = at + 1;
        while let Some(next) = sequences.get(end) {
            let common = n_common(first, next.as_ref()).min(shared);
            if common < done + MIN_SHARED {
                break;
            }
            (shared, end) = (common, end + 1);
        }
        let own = &first[done..shared];
        let segment = match parent {
            Some(parent) if own.is_empty() => parent,
            Some(parent) => builder.child(parent, own),
            None => builder.root(own),
        };
        // Those that end here need no segment of their own.
        let whole = sequences[at..end].iter().take_while(|s| s.as_ref().len() == shared).count();
        tails.extend(std::iter::repeat_n(segment, whole));
        grow(builder, tails, &sequences[at + whole..end], Some(segment), shared);
        at = end;
    }
}

/// Leading tokens that are the same.
#[must_use]
pub fn n_common(a: &[i64], b: &[i64]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Whole sequences in one batch, their common beginning computed once for several; also for training.
#[derive(Debug)]
pub struct Packed {
    /// The batch.
    pub batch: Batch,
    /// The segment that each sequence ends with.
    tails: Vec<SegmentIdx>,
    /// Tokens that lie in a segment before it.
    n_shared: usize,
}

impl Packed {
    /// Packs sequences that may share at most so many tokens; the last token of each is never shared.
    ///
    /// # Panics
    ///
    /// If a sequence is empty.
    pub fn new<S: AsRef<[i64]>>(sequences: &[S], at_most: usize) -> Self {
        let shortest = sequences.iter().map(|s| s.as_ref().len()).min().unwrap_or(0);
        let n_shared = common_beginning(sequences, at_most.min(shortest.saturating_sub(1)));
        if sequences.len() < 2 || n_shared < MIN_SHARED {
            let tails = (0..sequences.len()).map(SegmentIdx).collect();
            return Self { batch: Batch::from_sequences(sequences), tails, n_shared: 0 };
        }
        let mut builder = Batch::tree();
        let mut tails = Vec::with_capacity(sequences.len());
        for part in sequences.chunks(PER_TREE) {
            let root = builder.root(&part[0].as_ref()[..n_shared]);
            tails.extend(part.iter().map(|s| builder.child(root, &s.as_ref()[n_shared..])));
        }
        Self { batch: builder.build(), tails, n_shared }
    }

    /// The row of a sequence's token, which must not lie in the shared beginning.
    pub fn row(&self, sequence: usize, token: usize) -> usize {
        let place =
            token.checked_sub(self.n_shared).expect("the token is in the sequence's own part");
        self.batch.rows(self.tails[sequence]).start + place
    }
}

/// Tokens, at most `limit`, with which all sequences begin.
fn common_beginning<S: AsRef<[i64]>>(sequences: &[S], limit: usize) -> usize {
    let Some((first, others)) = sequences.split_first() else { return 0 };
    let first = &first.as_ref()[..limit];
    others.iter().fold(limit, |n, other| n_common(&first[..n], other.as_ref()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn micro_batches_keep_the_order_and_the_budget() {
        assert_eq!(micro_batches(&[4, 4, 4, 9, 1, 1], 8).unwrap(), [0..2, 2..3, 3..4, 4..6]);
        assert_eq!(micro_batches(&[3, 4, 5, 20, 1], 8).unwrap(), [0..2, 2..3, 3..4, 4..5]);
        assert!(micro_batches(&[], 8).unwrap().is_empty());
        assert!(micro_batches(&[1], 0).is_err());
    }

    #[test]
    fn a_chains_aspects_share_all_that_goes_before() {
        // Two conversations after one prompt of 10 tokens; each aspect continues the one before by 9.
        let through = |sample: i64, n: i64| -> Vec<i64> {
            (100..110).chain(1000 * sample..1000 * sample + 9 * n).collect()
        };
        let sequences: Vec<Vec<i64>> =
            [1, 2].iter().flat_map(|&s| [1, 2, 3].map(|n| through(s, n))).collect();
        let forest = Forest::new(&sequences);
        assert_eq!(forest.batch.n_tokens(), 10 + 2 * 27);
        for (tokens, row) in sequences.iter().zip(forest.last_rows()) {
            assert_eq!(forest.batch.token_ids()[row as usize], *tokens.last().unwrap());
        }
        // The same sequence twice is computed once.
        assert_eq!(Forest::new(&[&sequences[0], &sequences[0]]).batch.n_tokens(), 19);
        assert_eq!(Forest::new::<Vec<i64>>(&[]).last_rows(), [0_i64; 0]);
    }

    proptest! {
        #[test]
        fn micro_batches_cover_everything_once(lengths in prop::collection::vec(1usize..50, 0..40), budget in 1usize..100) {
            let runs = micro_batches(&lengths, budget).unwrap();
            prop_assert_eq!(runs.iter().cloned().flatten().collect::<Vec<_>>(), (0..lengths.len()).collect::<Vec<_>>());
            for run in runs {
                prop_assert!(run.len() == 1 || lengths[run].iter().sum::<usize>() <= budget);
            }
        }

        /// Along a tail's lineage stand its sequence's tokens, whatever the others are.
        #[test]
        fn a_forest_holds_every_sequence(sequences in prop::collection::vec(prop::collection::vec(0i64..2, 1..40), 0..12)) {
            let mut sequences = sequences;
            sequences.sort(); // neighbours that share much
            let forest = Forest::new(&sequences);
            prop_assert_eq!(forest.tails.len(), sequences.len());
            for (tokens, row) in sequences.iter().zip(forest.last_rows()) {
                let mut found = vec![];
                let mut at = Some(row as usize);
                while let Some(row) = at {
                    found.push(forest.batch.token_ids()[row]);
                    at = forest.batch.predecessor(row);
                }
                found.reverse();
                prop_assert_eq!(&found, tokens);
            }
        }
    }

    fn sequence(shared: i64, own: &[i64]) -> Vec<i64> {
        (100..100 + shared).chain(own.iter().copied()).collect()
    }

    #[test]
    fn a_common_beginning_is_packed_once_for_eight() {
        let sequences: Vec<Vec<i64>> = (0..11).map(|i| sequence(10, &[i, 7, 9])).collect();
        let packed = Packed::new(&sequences, 50);
        assert_eq!(packed.batch.n_tokens(), 2 * 10 + 11 * 3);
        for (idx, tokens) in sequences.iter().enumerate() {
            for (token, id) in tokens.iter().enumerate().skip(10) {
                assert_eq!(packed.batch.token_ids()[packed.row(idx, token)], *id);
            }
            // The first own token is predicted by the last shared one.
            let before = packed.batch.predecessor(packed.row(idx, 10)).unwrap();
            assert_eq!(packed.batch.token_ids()[before], 109);
        }
    }

    #[test]
    fn little_in_common_is_packed_plainly() {
        let plain = Packed::new(&[sequence(7, &[1]), sequence(7, &[2])], 50);
        assert_eq!((plain.batch.n_tokens(), plain.n_shared), (16, 0));
        let few = Packed::new(&[sequence(12, &[1]), sequence(12, &[2])], 7);
        assert_eq!((few.batch.n_tokens(), few.n_shared), (26, 0));
        // Equal sequences share all but their last token.
        let equal = Packed::new(&[sequence(12, &[]), sequence(12, &[])], 50);
        assert_eq!((equal.batch.n_tokens(), equal.n_shared), (11 + 1 + 1, 11));
        let alone = Packed::new(&[sequence(12, &[1])], 50);
        assert_eq!((alone.row(0, 12), alone.n_shared), (12, 0));
    }
}
