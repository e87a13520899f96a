//! Passes with gradients where memory may run out: once less is kept for the backward pass, then the error says what to set.

use std::cell::Cell;
use std::error::Error as StdError;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;

use arete_records::{Class, memory_refused};

use crate::{Error, class_of};

/// How much goes into a pass with gradients, and how much of it is kept for the backward pass. Clones share what they have learned.
#[derive(Clone, Debug)]
pub struct Passes {
    /// Most tokens of a pass.
    pub micro_batch_tokens: usize,
    recompute: bool,
    keeps_graphs: bool,
    /// Memory is short: blocks run again, and no graph outlives its pass.
    saving: Rc<Cell<bool>>,
}

impl Passes {
    /// As the settings say.
    pub fn new(micro_batch_tokens: usize, recompute: bool) -> Self {
        Self { micro_batch_tokens, recompute, keeps_graphs: false, saving: Rc::default() }
    }

    /// Of a trainer that keeps the graphs of a first pass.
    #[must_use]
    pub fn keeping_graphs(self, keeps_graphs: bool) -> Self {
        Self { keeps_graphs, ..self }
    }

    /// From now on keeps as little as can be.
    pub fn save(&self) {
        self.saving.set(true);
    }

    /// Whether blocks run again in the backward pass.
    pub fn recompute(&self) -> bool {
        self.recompute || self.saving.get()
    }

    /// Whether the graphs of a first pass may be kept.
    pub fn keeps_graphs(&self) -> bool {
        self.keeps_graphs && !self.saving.get()
    }

    /// Runs `work`; where memory does not suffice, once more with less kept for the backward pass, which changes no byte on the CPU, and
    /// so from then on.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`] where that does not suffice either, or all else that `work` returns.
    pub fn within<T, E>(&self, mut work: impl FnMut() -> Result<T, E>) -> Result<T, E>
    where
        E: From<Error> + AsRef<dyn StdError + 'static>,
    {
        let what = match refused(&mut work)? {
            Ok(done) => return Ok(done),
            Err(what) => what,
        };
        if self.recompute() && !self.keeps_graphs() {
            return Err(self.out_of_memory(what).into());
        }
        tracing::warn!(%what, "out of memory: blocks run again in the backward pass from now on");
        self.save();
        refused(&mut work)?.map_err(|what| self.out_of_memory(what).into())
    }

    fn out_of_memory(&self, what: String) -> Error {
        Error::OutOfMemory { what, micro_batch_tokens: self.micro_batch_tokens }
    }
}

/// The result of `work`, inside it what libtorch said if memory did not suffice: as an error, or from one of tch's functions that panic.
fn refused<T, E>(work: &mut impl FnMut() -> Result<T, E>) -> Result<Result<T, String>, E>
where
    E: AsRef<dyn StdError + 'static>,
{
    // What `work` had added to gradients by then is zeroed before it runs again.
    let error = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(done)) => return Ok(Ok(done)),
        Ok(Err(error)) => error,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            match text.and_then(memory_refused) {
                Some(what) => return Ok(Err(what)),
                None => resume_unwind(panic),
            }
        }
    };
    let mut cause: Option<&(dyn StdError + 'static)> = Some(error.as_ref());
    while let Some(own) = cause {
        if class_of(own) == Some(Class::Memory) {
            return Ok(Err(own.to_string()));
        }
        cause = own.source();
    }
    Err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> Error {
        arete_model::Error::OutOfMemory { what: "you tried to allocate 8 bytes".to_owned() }.into()
    }

    #[test]
    fn less_is_kept_once_and_from_then_on() {
        let passes = Passes::new(1024, false);
        let asked = Cell::new(0);
        let work = || -> Result<usize, Error> {
            asked.set(asked.get() + 1);
            if passes.recompute() { Ok(asked.get()) } else { Err(full()) }
        };
        assert_eq!(passes.within(work).unwrap(), 2);
        assert!(passes.clone().recompute());
        assert_eq!(passes.within(work).unwrap(), 3);
        // A first pass's graphs are let go, too.
        let passes = Passes::new(1024, true).keeping_graphs(true);
        let work = || if passes.keeps_graphs() { Err(full()) } else { Ok(()) };
        passes.within::<_, Error>(work).unwrap();
    }

    #[test]
    fn what_does_not_fit_either_way_says_what_to_set() {
        for (recompute, times) in [(false, 2), (true, 1)] {
            let mut asked = 0;
            let error = Passes::new(1024, recompute).within(|| -> Result<(), Error> {
                asked += 1;
                Err(full())
            });
            let error = error.unwrap_err();
            assert!(matches!(error, Error::OutOfMemory { micro_batch_tokens: 1024, .. }));
            assert_eq!(class_of(&error), Some(Class::Memory));
            let message = error.to_string();
            let parts = ["8 bytes", "recompute", "micro_batch_tokens below 1024", "nf4 = true"];
            assert!(parts.iter().all(|part| message.contains(part)), "{message}");
            assert_eq!(asked, times);
        }
    }

    #[test]
    fn a_panic_for_memory_counts_and_others_go_on() {
        let passes = Passes::new(1024, false);
        let work = || -> anyhow::Result<u8> {
            assert!(
                passes.recompute(),
                "Torch(\"DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes\")"
            );
            Ok(7)
        };
        assert_eq!(passes.within(work).unwrap(), 7);
        let other = || Passes::new(1, false).within(|| -> Result<(), Error> { panic!("a fault") });
        assert!(catch_unwind(other).is_err());
        let other = || Err(Error::NonFinite { step: 1, what: "loss".to_owned() });
        let error = Passes::new(1, false).within::<(), _>(other).unwrap_err();
        assert!(matches!(error, Error::NonFinite { .. }));
    }
}
