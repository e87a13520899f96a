//! Batches of token sequences, packed one after the other without padding.
//!
//! A batch is a forest of segments. A segment may continue another one: its tokens then see the parent's
//! tokens (and the parent's parent's …) and their own past, and the parent is computed once however many
//! segments continue it. Two answers to one prompt are two children of one root.

use std::ops::Range;

use tch::{Device, Tensor};

use crate::{Error, ops};

mod sequences;

pub(crate) use sequences::Sequences;

/// A segment of a [`Batch`], in the order of creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentIdx(pub usize);

/// Where a segment lies in the batch.
#[derive(Clone, Debug)]
struct Segment {
    rows: Range<usize>,
    position: usize,
    parent: Option<usize>,
}

/// The tables the attention kernels read, all i64 on the CPU.
#[derive(Debug)]
pub(crate) struct Tables {
    /// `[S, 5]`: first row, rows, first position, first span, spans.
    pub(crate) segments: Tensor,
    /// `[P, 2]`: first slot, length.
    pub(crate) spans: Tensor,
    /// `[T + 1]`: ranges of segments that share no keys with each other.
    pub(crate) trees: Tensor,
    /// Segments and spans on the device, for the GPU's path over a cache.
    pub(crate) there: Option<[Tensor; 2]>,
    sequences: sequences::Once,
}

impl Tables {
    pub(crate) fn new(segments: &[[i64; 5]], spans: &[[i64; 2]], trees: &[i64]) -> Self {
        let here = |numbers: &[i64]| ops::on_host(numbers).expect("memory for a small table");
        let rows = |table: Vec<i64>, width: i64| here(&table).view([-1, width]);
        Self {
            segments: rows(segments.concat(), 5),
            spans: rows(spans.concat(), 2),
            trees: here(trees),
            there: None,
            sequences: sequences::Once::default(),
        }
    }

    /// The segments as flash attention takes them.
    pub(crate) fn sequences(&self, device: Device) -> Result<&Sequences, Error> {
        self.sequences.get(device, || {
            let numbers = |table: &Tensor| -> Vec<i64> {
                Vec::try_from(table.view([-1])).expect("i64 on the CPU: made above")
            };
            let (segments, spans) = (numbers(&self.segments), numbers(&self.spans));
            sequences::Layout::of(segments.as_chunks().0, spans.as_chunks().0)
        })
    }
}

/// Tokens of several sequences, packed without padding; see the module's head.
#[derive(Debug)]
pub struct Batch {
    token_ids: Vec<i64>,
    positions: Vec<i64>,
    segments: Vec<Segment>,
    pub(crate) tables: Tables,
}

impl Batch {
    /// A batch of independent sequences; none may be empty.
    pub fn from_sequences<S: AsRef<[i64]>>(sequences: &[S]) -> Self {
        let mut builder = BatchBuilder::default();
        for sequence in sequences {
            builder.root(sequence.as_ref());
        }
        builder.build()
    }

    /// Starts a batch whose segments may share prefixes.
    pub fn tree() -> BatchBuilder {
        BatchBuilder::default()
    }

    /// Number of tokens (rows of every per-token tensor).
    pub fn n_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// The tokens in row order.
    pub fn token_ids(&self) -> &[i64] {
        &self.token_ids
    }

    /// The rows of a segment.
    pub fn rows(&self, segment: SegmentIdx) -> Range<usize> {
        self.segments[segment.0].rows.clone()
    }

    /// The last row of a segment.
    pub fn last_row(&self, segment: SegmentIdx) -> usize {
        self.segments[segment.0].rows.end - 1
    }

    /// Number of segments.
    pub fn n_segments(&self) -> usize {
        self.segments.len()
    }

    /// The row whose hidden state predicts the token of `row`: the row before it, or the parent's last row.
    /// None for the first token of a root.
    pub fn predecessor(&self, row: usize) -> Option<usize> {
        let segment = self
            .segments
            .iter()
            .find(|segment| segment.rows.contains(&row))
            .expect("row lies in the batch");
        if row > segment.rows.start {
            return Some(row - 1);
        }
        segment.parent.map(|parent| self.segments[parent].rows.end - 1)
    }

    /// [`Batch::predecessor`] of every row.
    pub fn predecessors(&self) -> Vec<Option<usize>> {
        let mut out: Vec<Option<usize>> =
            (0..self.n_tokens()).map(|row| row.checked_sub(1)).collect();
        for segment in &self.segments {
            out[segment.rows.start] =
                segment.parent.map(|parent| self.segments[parent].rows.end - 1);
        }
        out
    }

    /// `[N]` i64 on `device`.
    pub(crate) fn token_tensor(&self, device: Device) -> Result<Tensor, Error> {
        ops::numbers_on(device, &self.token_ids)
    }

    /// `[N]` i64 on `device`: each token's position in its own sequence.
    pub(crate) fn position_tensor(&self, device: Device) -> Result<Tensor, Error> {
        ops::numbers_on(device, &self.positions)
    }

    /// One more than the highest position.
    pub(crate) fn longest(&self) -> usize {
        self.positions.iter().max().map_or(0, |&position| position as usize + 1)
    }
}

/// Collects the segments of a [`Batch`].
#[derive(Debug, Default)]
pub struct BatchBuilder {
    segments: Vec<(Vec<i64>, Option<usize>)>,
}

impl BatchBuilder {
    /// Adds a sequence of its own.
    ///
    /// # Panics
    ///
    /// If `token_ids` is empty.
    pub fn root(&mut self, token_ids: &[i64]) -> SegmentIdx {
        self.push(token_ids, None)
    }

    /// Adds tokens that continue `parent`.
    ///
    /// # Panics
    ///
    /// If `token_ids` is empty or `parent` is not of this batch.
    pub fn child(&mut self, parent: SegmentIdx, token_ids: &[i64]) -> SegmentIdx {
        assert!(parent.0 < self.segments.len(), "the parent belongs to this batch");
        self.push(token_ids, Some(parent.0))
    }

    fn push(&mut self, token_ids: &[i64], parent: Option<usize>) -> SegmentIdx {
        assert!(!token_ids.is_empty(), "a segment has at least one token");
        self.segments.push((token_ids.to_vec(), parent));
        SegmentIdx(self.segments.len() - 1)
    }

    /// Number of tokens so far.
    pub fn n_tokens(&self) -> usize {
        self.segments.iter().map(|(ids, _)| ids.len()).sum()
    }

    /// Packs the segments, each tree in one piece.
    pub fn build(self) -> Batch {
        let n = self.segments.len();
        let mut root_of = vec![0; n];
        for (idx, (_, parent)) in self.segments.iter().enumerate() {
            root_of[idx] = parent.map_or(idx, |parent| root_of[parent]);
        }
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by_key(|&idx| root_of[idx]); // stable: parents stay before children
        let mut placed: Vec<Option<Segment>> = vec![None; n];
        let (mut token_ids, mut positions) = (Vec::new(), Vec::new());
        let (mut segment_table, mut span_table, mut trees) = (Vec::new(), Vec::new(), Vec::new());
        for (place, &idx) in order.iter().enumerate() {
            let (ids, parent) = &self.segments[idx];
            let position = parent.map_or(0, |parent| {
                let parent = placed[parent].as_ref().expect("parents are placed first");
                parent.position + parent.rows.len()
            });
            let rows = token_ids.len()..token_ids.len() + ids.len();
            token_ids.extend_from_slice(ids);
            positions.extend((position..position + ids.len()).map(|position| position as i64));
            placed[idx] = Some(Segment { rows: rows.clone(), position, parent: *parent });
            let mut lineage = vec![rows.clone()];
            let mut ancestor = *parent;
            while let Some(at) = ancestor {
                let segment = placed[at].as_ref().expect("parents are placed first");
                lineage.push(segment.rows.clone());
                ancestor = segment.parent;
            }
            if parent.is_none() {
                trees.push(place as i64);
            }
            segment_table.push([
                rows.start as i64,
                rows.len() as i64,
                position as i64,
                span_table.len() as i64,
                lineage.len() as i64,
            ]);
            span_table
                .extend(lineage.iter().rev().map(|rows| [rows.start as i64, rows.len() as i64]));
        }
        trees.push(n as i64);
        let segments =
            placed.into_iter().map(|segment| segment.expect("every segment is placed")).collect();
        let tables = Tables::new(&segment_table, &span_table, &trees);
        Batch { token_ids, positions, segments, tables }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_continue_their_parents_positions() {
        let mut builder = Batch::tree();
        let a = builder.root(&[1, 2]);
        let b = builder.root(&[9]);
        let a1 = builder.child(a, &[3]);
        let a2 = builder.child(a, &[4, 5]);
        let a11 = builder.child(a1, &[6]);
        let batch = builder.build();
        // Trees are packed whole: a, a1, a2, a11, then b.
        assert_eq!(batch.token_ids(), &[1, 2, 3, 4, 5, 6, 9]);
        assert_eq!(batch.positions, vec![0, 1, 2, 2, 3, 3, 0]);
        assert_eq!(batch.rows(a2), 3..5);
        assert_eq!(batch.last_row(b), 6);
        let expected = [None, Some(0), Some(1), Some(1), Some(3), Some(2), None];
        assert_eq!(batch.predecessors(), expected);
        for (row, expected) in expected.into_iter().enumerate() {
            assert_eq!(batch.predecessor(row), expected);
        }
        assert_eq!(batch.rows(a11), 5..6);
        let trees: Vec<i64> = Vec::try_from(&batch.tables.trees).unwrap();
        assert_eq!(trees, vec![0, 4, 5]);
    }
}
