//! The prompts whose keys and values are in the cache, and which slots they have in common.
//!
//! A new prompt takes over the beginning it shares with one in flight and brings slots for the rest only. Slots are
//! given back when the last prompt that reads them is gone.
//!
//! Pure bookkeeping: whoever calls allocates and frees the slots.

use crate::cache::Run;

/// Fewer tokens in common are not worth keeping another prompt's slots for.
const FEWEST_SHARED: usize = 16;

/// Slots of a prompt, in the order of its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// The prompt that brought them.
    owner: usize,
    /// The part of the owner's slots that is read.
    pub(super) run: Run,
}

/// A prompt in the cache.
#[derive(Debug)]
struct Prefix {
    token_ids: Vec<i64>,
    /// Other prompts' slots, then all that it brought.
    parts: Vec<Part>,
    /// Sequences sampled from it, and prompts that read its slots.
    users: usize,
}

/// The prompts in the cache, numbered; numbers are used again.
#[derive(Debug, Default)]
pub(super) struct Prefixes(Vec<Option<Prefix>>);

impl Prefixes {
    /// The slots in flight that hold a beginning of `token_ids`: the longest there is; none if it is short.
    pub(super) fn shared(&self, token_ids: &[i64]) -> Vec<Part> {
        let mut longest: (usize, Option<&Prefix>) = (0, None);
        for prefix in self.0.iter().flatten() {
            let n = prefix.token_ids.iter().zip(token_ids).take_while(|(a, b)| a == b).count();
            if n > longest.0 {
                longest = (n, Some(prefix));
            }
        }
        let (n, Some(prefix)) = longest else { return Vec::new() };
        if n < FEWEST_SHARED {
            return Vec::new();
        }
        let mut left = n;
        let mut parts = Vec::new();
        for part in &prefix.parts {
            let length = part.run.length.min(left);
            if length > 0 {
                parts.push(Part { run: Run { length, ..part.run }, ..*part });
            }
            left -= length;
        }
        parts
    }

    /// Adds a prompt that reads `shared` slots and brings `own` for its other tokens; `users` sequences will leave it.
    pub(super) fn insert(
        &mut self,
        token_ids: &[i64],
        shared: Vec<Part>,
        own: Run,
        users: usize,
    ) -> usize {
        for part in &shared {
            self.at(part.owner).users += 1;
        }
        let idx = self.0.iter().position(Option::is_none).unwrap_or(self.0.len());
        let mut parts = shared;
        parts.push(Part { owner: idx, run: own });
        let prefix = Prefix { token_ids: token_ids.to_vec(), parts, users };
        match self.0.get_mut(idx) {
            Some(free) => *free = Some(prefix),
            None => self.0.push(Some(prefix)),
        }
        idx
    }

    /// The slots of a prompt, in order.
    pub(super) fn runs(&self, idx: usize) -> impl Iterator<Item = Run> {
        let prefix = self.0[idx].as_ref().expect("prefixes outlive their users");
        prefix.parts.iter().map(|part| part.run)
    }

    /// One sequence of a prompt has ended: the slots that nobody reads any more.
    pub(super) fn leave(&mut self, idx: usize) -> Vec<Run> {
        let mut free = Vec::new();
        let mut leaving = vec![idx];
        while let Some(idx) = leaving.pop() {
            let prefix = self.at(idx);
            prefix.users -= 1;
            if prefix.users == 0 {
                for part in std::mem::take(&mut prefix.parts) {
                    if part.owner == idx {
                        free.push(part.run);
                    } else {
                        leaving.push(part.owner);
                    }
                }
                self.0[idx] = None;
            }
        }
        free
    }

    fn at(&mut self, idx: usize) -> &mut Prefix {
        self.0[idx].as_mut().expect("prefixes outlive their users")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: usize, length: usize) -> Run {
        Run { start, length }
    }

    fn tokens(n_common: usize, n: usize, own: i64) -> Vec<i64> {
        (0..n).map(|k| if k < n_common { k as i64 } else { own * 1000 + k as i64 }).collect()
    }

    /// Adds a prompt with `users` sequences whose own slots begin at `start`.
    fn admit(prefixes: &mut Prefixes, token_ids: &[i64], start: usize, users: usize) -> usize {
        let shared = prefixes.shared(&token_ids[..token_ids.len() - 1]);
        let n_shared: usize = shared.iter().map(|part| part.run.length).sum();
        prefixes.insert(token_ids, shared, run(start, token_ids.len() - n_shared), users)
    }

    fn runs(prefixes: &Prefixes, idx: usize) -> Vec<Run> {
        prefixes.runs(idx).collect()
    }

    #[test]
    fn a_prompt_takes_over_the_longest_common_beginning() {
        let mut prefixes = Prefixes::default();
        let a = admit(&mut prefixes, &tokens(20, 30, 1), 0, 1);
        let b = admit(&mut prefixes, &tokens(20, 40, 2), 100, 1);
        assert_eq!(runs(&prefixes, a), [run(0, 30)]);
        assert_eq!(runs(&prefixes, b), [run(0, 20), run(100, 20)]);
        // As b, but for its last five tokens: 20 slots of a, 15 of b.
        let mut like_b = tokens(20, 40, 2);
        like_b[35..].fill(7);
        let c = admit(&mut prefixes, &like_b, 200, 1);
        assert_eq!(runs(&prefixes, c), [run(0, 20), run(100, 15), run(200, 5)]);
    }

    #[test]
    fn the_last_token_of_an_equal_prompt_is_computed_again() {
        let mut prefixes = Prefixes::default();
        let ids = tokens(20, 20, 0);
        admit(&mut prefixes, &ids, 0, 1);
        let again = admit(&mut prefixes, &ids, 50, 1);
        assert_eq!(runs(&prefixes, again), [run(0, 19), run(50, 1)]);
    }

    #[test]
    fn short_beginnings_are_not_shared() {
        let mut prefixes = Prefixes::default();
        admit(&mut prefixes, &tokens(FEWEST_SHARED - 1, 30, 1), 0, 1);
        let b = admit(&mut prefixes, &tokens(FEWEST_SHARED - 1, 30, 2), 100, 1);
        assert_eq!(runs(&prefixes, b), [run(100, 30)]);
    }

    #[test]
    fn slots_are_given_back_when_nobody_reads_them() {
        let mut prefixes = Prefixes::default();
        let a = admit(&mut prefixes, &tokens(20, 30, 1), 0, 2);
        let b = admit(&mut prefixes, &tokens(20, 40, 2), 100, 1);
        assert_eq!(prefixes.leave(a), []);
        assert_eq!(prefixes.leave(a), []); // b still reads 20 of them
        let c = admit(&mut prefixes, &tokens(20, 25, 3), 200, 1);
        assert_eq!(c, 2); // a's number is not free
        assert_eq!(runs(&prefixes, c), [run(0, 20), run(200, 5)]);
        assert_eq!(prefixes.leave(b), [run(100, 20)]);
        assert_eq!(prefixes.leave(c), [run(200, 5), run(0, 30)]);
        assert!(prefixes.0.iter().all(Option::is_none));
        assert_eq!(admit(&mut prefixes, &tokens(0, 17, 4), 0, 1), 0);
    }
}
