//! A batch's segments as libtorch's flash attention takes them: sequences of queries and of keys, the last query at the last key.

use std::cell::OnceCell;

use tch::{Device, Tensor};

use crate::Error;

/// Where the queries and keys of every segment begin.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// `[S + 1]`: first rows of the segments, and their end.
    query_starts: Vec<i32>,
    /// `[S + 1]`: the same of their keys.
    key_starts: Vec<i32>,
    /// The row of every key, where segments continue others; else the keys stand as the rows do.
    sources: Option<Vec<i64>>,
    longest_query: i64,
    longest_key: i64,
}

impl Layout {
    /// Of tables as in [`super::Tables`], whose segments follow one another without gaps.
    pub(super) fn of(segments: &[[i64; 5]], spans: &[[i64; 2]]) -> Self {
        let mut keys = Vec::new();
        let (mut query_starts, mut key_starts) = (vec![0], vec![0]);
        let (mut longest_query, mut longest_key) = (0, 0);
        let mut n_rows = 0;
        for &[row, rows, _, first_span, n_spans] in segments {
            debug_assert_eq!(row, n_rows, "segments follow one another");
            let before = keys.len() as i64;
            for &[slot, length] in &spans[first_span as usize..(first_span + n_spans) as usize] {
                keys.extend(slot..slot + length);
            }
            n_rows += rows;
            query_starts.push(n_rows as i32);
            key_starts.push(keys.len() as i32);
            longest_query = longest_query.max(rows);
            longest_key = longest_key.max(keys.len() as i64 - before);
        }
        let as_rows = keys.len() as i64 == n_rows && (0..n_rows).eq(keys.iter().copied());
        let sources = (!as_rows).then_some(keys);
        Self { query_starts, key_starts, sources, longest_query, longest_key }
    }
}

/// A [`Layout`] on a device.
#[derive(Debug)]
pub(crate) struct Sequences {
    pub(crate) query_starts: Tensor,
    pub(crate) key_starts: Tensor,
    pub(crate) sources: Option<Tensor>,
    pub(crate) longest_query: i64,
    pub(crate) longest_key: i64,
    device: Device,
}

impl Sequences {
    fn new(layout: &Layout, device: Device) -> Result<Self, Error> {
        let there = |tensor: Tensor| tensor.f_to_device(device);
        Ok(Self {
            query_starts: there(Tensor::from_slice(&layout.query_starts))?,
            key_starts: there(Tensor::from_slice(&layout.key_starts))?,
            sources: layout
                .sources
                .as_ref()
                .map(|sources| there(Tensor::from_slice(sources)))
                .transpose()?,
            longest_query: layout.longest_query,
            longest_key: layout.longest_key,
            device,
        })
    }
}

/// Made when first asked for, for every layer of a pass.
#[derive(Debug, Default)]
pub(super) struct Once(OnceCell<Sequences>);

impl Once {
    pub(super) fn get(
        &self,
        device: Device,
        layout: impl FnOnce() -> Layout,
    ) -> Result<&Sequences, Error> {
        if self.0.get().is_none() {
            let made = Sequences::new(&layout(), device)?;
            assert!(self.0.set(made).is_ok(), "nothing else sets it in between");
        }
        let found = self.0.get().expect("set above");
        assert_eq!(found.device, device, "a batch is computed on one device");
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn independent_sequences_have_the_rows_for_keys() {
        let layout = Layout::of(&[[0, 3, 0, 0, 1], [3, 2, 0, 1, 1]], &[[0, 3], [3, 2]]);
        let expected = Layout {
            query_starts: vec![0, 3, 5],
            key_starts: vec![0, 3, 5],
            sources: None,
            longest_query: 3,
            longest_key: 3,
        };
        assert_eq!(layout, expected);
    }

    /// A root of two tokens, two answers to it, and one that goes on from the second answer.
    #[test]
    fn a_continued_segment_has_its_lineage_for_keys() {
        let segments = [[0, 2, 0, 0, 1], [2, 1, 2, 1, 2], [3, 2, 2, 3, 2], [5, 1, 4, 5, 3]];
        let spans = [[0, 2], [0, 2], [2, 1], [0, 2], [3, 2], [0, 2], [3, 2], [5, 1]];
        let layout = Layout::of(&segments, &spans);
        let expected = Layout {
            query_starts: vec![0, 2, 3, 5, 6],
            key_starts: vec![0, 2, 5, 9, 14],
            sources: Some(vec![0, 1, 0, 1, 2, 0, 1, 3, 4, 0, 1, 3, 4, 5]),
            longest_query: 2,
            longest_key: 5,
        };
        assert_eq!(layout, expected);
    }
}
