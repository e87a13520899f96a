//! Key/value cache: one arena of token slots for all sequences in flight.
//!
//! A sequence owns a run of slots and may read those of a shared prefix; the attention kernels take lists of
//! runs ("spans"), so forking a prefix copies nothing.

use tch::Tensor;

use crate::Error;
use crate::decoder::Decoder;

/// A run of slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) start: usize,
    pub(crate) length: usize,
}

/// Keys and values of every layer, and which slots are free.
#[derive(Debug)]
pub(crate) struct Cache {
    /// Per layer `[slots, K·E]`, keys then values.
    pub(crate) layers: Vec<(Tensor, Tensor)>,
    free: FreeList,
}

impl Cache {
    /// A cache of `capacity` token slots in the decoder's dtype.
    pub(crate) fn new(decoder: &Decoder, capacity: usize) -> Result<Self, Error> {
        let config = decoder.config();
        let shape = [capacity as i64, (config.num_kv_heads * config.head_size) as i64];
        let options = (decoder.kind(), decoder.device());
        let layers = (0..decoder.n_layers())
            .map(|_| Ok((Tensor::f_zeros(shape, options)?, Tensor::f_zeros(shape, options)?)))
            .collect::<Result<_, Error>>()?;
        Ok(Self { layers, free: FreeList::new(capacity) })
    }

    /// A run of `length` slots, if one is free.
    pub(crate) fn allocate(&mut self, length: usize) -> Option<Run> {
        self.free.allocate(length)
    }

    /// Gives a run back.
    pub(crate) fn release(&mut self, run: Run) {
        self.free.release(run);
    }
}

/// Free runs in rising order, neighbours joined; allocation is first fit, hence deterministic.
#[derive(Debug)]
struct FreeList(Vec<Run>);

impl FreeList {
    fn new(capacity: usize) -> Self {
        Self(vec![Run { start: 0, length: capacity }])
    }

    fn allocate(&mut self, length: usize) -> Option<Run> {
        let idx = self.0.iter().position(|run| run.length >= length)?;
        let start = self.0[idx].start;
        self.0[idx].start += length;
        self.0[idx].length -= length;
        if self.0[idx].length == 0 {
            self.0.remove(idx);
        }
        Some(Run { start, length })
    }

    fn release(&mut self, run: Run) {
        if run.length == 0 {
            return;
        }
        let idx = self.0.partition_point(|free| free.start < run.start);
        self.0.insert(idx, run);
        for at in [idx, idx.wrapping_sub(1)] {
            if let Some([left, right]) =
                self.0.get(at..=at.wrapping_add(1)).map(|pair| [pair[0], pair[1]])
                && left.start + left.length == right.start
            {
                self.0[at].length += right.length;
                self.0.remove(at + 1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_neighbours_join() {
        let mut free = FreeList::new(10);
        let a = free.allocate(4).unwrap();
        let b = free.allocate(4).unwrap();
        assert_eq!((a.start, b.start), (0, 4));
        assert_eq!(free.allocate(4), None);
        free.release(a);
        assert_eq!(free.0.len(), 2);
        free.release(b);
        assert_eq!(free.0, vec![Run { start: 0, length: 10 }]);
    }
}
