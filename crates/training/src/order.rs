//! Which examples a step sees. Nothing here holds state: the order is a function of seed and step.

use rand_chacha::rand_core::Rng;

use crate::Error;

/// A random order of `0..n`, drawn from a ChaCha stream of its own.
///
/// # Source
///
/// Fisher–Yates; each swap partner is drawn without bias by rejection.
pub fn permutation(seed: u64, purpose: &str, n: usize) -> Vec<usize> {
    let mut rng = arete_model::random::stream(seed, purpose);
    let mut order: Vec<usize> = (0..n).collect();
    for last in (1..n).rev() {
        let bound = last as u64 + 1;
        let limit = u64::MAX - u64::MAX % bound; // a multiple of `bound`: every residue is as likely
        let draw = loop {
            let draw = rng.next_u64();
            if draw < limit {
                break draw % bound;
            }
        };
        order.swap(last, usize::try_from(draw).expect("at most `last`"));
    }
    order
}

/// The steps of a run over a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Examples in the data set.
    pub n_examples: usize,
    /// Examples a step, but for the last of an epoch, which takes what is left.
    pub batch_size: usize,
    /// Passes over the data.
    pub epochs: u64,
    /// Stop after so many steps, if given.
    pub max_steps: Option<u64>,
    /// Seed of the order.
    pub seed: u64,
}

impl Plan {
    /// Checks that there is something to do.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there are no examples, or a step would have none.
    pub fn check(&self) -> Result<(), Error> {
        for (name, number) in [("examples", self.n_examples), ("batch_size", self.batch_size)] {
            if number == 0 {
                let (expected, got) = ("at least 1".to_owned(), "0".to_owned());
                return Err(Error::Invalid { name, expected, got });
            }
        }
        if self.total_steps() == 0 {
            return Err(Error::Invalid {
                name: "epochs",
                expected: "at least one step".to_owned(),
                got: format!("{} epochs, max_steps {:?}", self.epochs, self.max_steps),
            });
        }
        Ok(())
    }

    /// Steps in a pass over the data.
    pub fn steps_per_epoch(&self) -> u64 {
        self.n_examples.div_ceil(self.batch_size) as u64
    }

    /// Steps in all.
    pub fn total_steps(&self) -> u64 {
        let steps = self.steps_per_epoch() * self.epochs;
        self.max_steps.map_or(steps, |most| steps.min(most))
    }

    /// The examples of the step after `n_done` finished ones.
    pub fn examples(&self, n_done: u64) -> Vec<usize> {
        let epoch = n_done / self.steps_per_epoch();
        let within = usize::try_from(n_done % self.steps_per_epoch()).expect("below n_examples");
        let order = permutation(self.seed, &format!("order/{epoch}"), self.n_examples);
        let start = within * self.batch_size;
        order[start..self.n_examples.min(start + self.batch_size)].to_vec()
    }

    /// Passes over the data after `n_done` steps, fractional.
    #[expect(clippy::cast_precision_loss, reason = "step counts are far below 2^52")]
    pub fn epoch(&self, n_done: u64) -> f64 {
        n_done as f64 / self.steps_per_epoch() as f64
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_epoch_sees_every_example_once_and_epochs_differ() {
        let plan = Plan { n_examples: 10, batch_size: 4, epochs: 2, max_steps: None, seed: 5 };
        assert_eq!((plan.steps_per_epoch(), plan.total_steps()), (3, 6));
        let epoch = |first: u64| -> Vec<usize> {
            (first..first + 3).flat_map(|step| plan.examples(step)).collect()
        };
        assert_eq!(plan.examples(2).len(), 2);
        let (one, two) = (epoch(0), epoch(3));
        assert_ne!(one, two);
        for mut seen in [one, two] {
            seen.sort_unstable();
            assert_eq!(seen, (0..10).collect::<Vec<_>>());
        }
        assert_eq!(plan.epoch(3), 1.0);
        assert_eq!(Plan { max_steps: Some(4), ..plan }.total_steps(), 4);
        assert_ne!(Plan { seed: 6, ..plan }.examples(0), plan.examples(0));
    }

    proptest! {
        #[test]
        fn a_permutation_loses_nothing(seed in any::<u64>(), n in 0usize..100) {
            let mut order = permutation(seed, "test", n);
            order.sort_unstable();
            prop_assert_eq!(order, (0..n).collect::<Vec<_>>());
        }
    }
}
