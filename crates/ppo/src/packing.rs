//! Packs sequences that begin alike: what they share (a chat template's system prompt) is computed once for several.
//!
//! A token's hidden state is the same to the bit either way ([`arete_model::Batch`]); gradients differ by rounding.

use arete_model::{Batch, SegmentIdx};

/// A shorter common beginning is not worth a segment of its own.
const MIN_SHARED: usize = 8;
/// Sequences that share one computed beginning. The backward pass of attention gives each such tree to one thread,
/// so there should be several.
const PER_TREE: usize = 8;

/// Whole sequences in one batch.
#[derive(Debug)]
pub(crate) struct Packed {
    /// The batch.
    pub(crate) batch: Batch,
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
    pub(crate) fn new<S: AsRef<[i64]>>(sequences: &[S], at_most: usize) -> Self {
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
    pub(crate) fn row(&self, sequence: usize, token: usize) -> usize {
        let place =
            token.checked_sub(self.n_shared).expect("the token is in the sequence's own part");
        self.batch.rows(self.tails[sequence]).start + place
    }

    /// The row of a sequence's last token.
    pub(crate) fn last_row(&self, sequence: usize) -> usize {
        self.batch.last_row(self.tails[sequence])
    }
}

/// Tokens, at most `limit`, with which all sequences begin.
fn common_beginning<S: AsRef<[i64]>>(sequences: &[S], limit: usize) -> usize {
    let Some((first, others)) = sequences.split_first() else { return 0 };
    let first = &first.as_ref()[..limit];
    others.iter().fold(limit, |n, other| {
        first[..n].iter().zip(other.as_ref()).take_while(|(a, b)| a == b).count()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

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
            assert_eq!(packed.last_row(idx), packed.row(idx, 12));
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
        assert_eq!((alone.last_row(0), alone.n_shared), (12, 0));
    }
}
