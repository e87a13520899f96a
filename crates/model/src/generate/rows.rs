//! How many sequences are in flight, and the cache that they need.

use tch::Device;

use super::{Options, Request, own_slots};
use crate::decoder::Decoder;
use crate::{Error, cuda};

/// On the CPU, which is as fast with fewer.
const ON_THE_CPU: usize = 64;
/// Of a GPU's free memory what sampling leaves to others: passes over prompts, the allocator's rounding, the kernels' scratch.
const LEFT_FREE: f64 = 0.25;

/// Slots of the prompt and of all streams.
fn all_slots(request: &Request) -> usize {
    let own = (0..request.streams.len()).map(|stream| own_slots(request, stream));
    own.fold(request.prompt_ids.len(), usize::saturating_add)
}

/// Slots of a sequence of the request that has most.
fn slots_a_row(requests: &[Request]) -> usize {
    let of = |request: &Request| all_slots(request).div_ceil(request.streams.len().max(1));
    requests.iter().map(of).max().unwrap_or(0)
}

/// Slots for `max_rows` sequences of the largest requests, or for all of them if that is less.
pub(super) fn capacity(requests: &[Request], max_rows: usize) -> usize {
    let all: usize = requests.iter().map(all_slots).sum();
    let largest = requests.iter().map(all_slots).max().unwrap_or(0);
    all.min(slots_a_row(requests).saturating_mul(max_rows).max(largest)).max(1)
}

/// The most sequences in flight that were asked for, or that the device holds.
pub(super) fn in_flight(decoder: &Decoder, requests: &[Request], max_rows: usize) -> usize {
    if max_rows != Options::BY_MEMORY {
        return max_rows;
    }
    let free = match decoder.device() {
        Device::Cuda(index) => cuda::memory(index).map(|(free, _)| free),
        _ => None,
    };
    let config = decoder.config();
    let number = decoder.kind().elt_size_in_bytes();
    let slot = 2 * decoder.n_layers() * config.num_kv_heads * config.head_size * number;
    // Logits, and the widest results of a block: gate and up, and what is made of them.
    let step = (config.vocab_size + 4 * config.intermediate_size + 8 * config.hidden_size) * number;
    free.map_or(ON_THE_CPU, |free| by_memory(free, slot * slots_a_row(requests) + step))
}

/// Sequences of so many bytes each in so many that are free.
fn by_memory(free: u64, bytes_a_row: usize) -> usize {
    let usable = free - (free as f64 * LEFT_FREE) as u64;
    usize::try_from(usable / bytes_a_row.max(1) as u64).unwrap_or(usize::MAX).max(1)
}

/// What `make` makes for so many rows; where memory does not suffice, for half as many, once.
pub(super) fn tried_smaller<T>(
    rows: usize,
    make: impl Fn(usize) -> Result<T, Error>,
) -> Result<(T, usize), Error> {
    match make(rows) {
        Err(Error::OutOfMemory { what }) if rows > 1 => {
            let fewer = rows / 2;
            tracing::warn!(%what, rows, fewer, "out of memory: half as many sequences in flight");
            Ok((make(fewer)?, fewer))
        }
        made => Ok((made?, rows)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_rows_as_three_quarters_of_what_is_free_hold() {
        // Mistral-7B: 128 KiB a slot, 500 slots, and 20 GB: 15 GB for rows of 65.5 MB and a little.
        assert_eq!(by_memory(20_000_000_000, 500 * 131_072), 228);
        assert_eq!(by_memory(1000, 10_000), 1);
        assert_eq!(by_memory(0, 0), 1);
    }

    #[test]
    fn memory_that_does_not_suffice_is_asked_for_once_more_by_half() {
        let made = |limit: usize| {
            move |rows: usize| match rows <= limit {
                true => Ok(rows),
                false => Err(Error::OutOfMemory { what: format!("{rows} rows") }),
            }
        };
        assert_eq!(tried_smaller(10, made(10)).unwrap(), (10, 10));
        assert_eq!(tried_smaller(10, made(5)).unwrap(), (5, 5));
        let error = tried_smaller(10, made(4)).unwrap_err().to_string();
        assert_eq!(error, "libtorch: 5 rows");
        assert!(tried_smaller(1, made(0)).is_err());
        let other =
            tried_smaller(8, |_| -> Result<(), _> { Err(Error::NonFinite { what: "x".into() }) });
        assert!(matches!(other, Err(Error::NonFinite { .. })));
    }
}
