//! The constitution that a stage works by, if any: turns and virtues are the shipped ones where no file says otherwise.

use std::path::{Path, PathBuf};

use anyhow::Result;
use arete_chain::constitution::{Constitution, SHIPPED, Turns};
use arete_records::{Refusal, Virtue};

/// What a stage was given, what its input carries, or what lies in the usual place; none if nothing does.
pub(crate) struct Words(Option<Constitution>);

impl Words {
    /// `given`: the setting; `input`: the earlier stage's results, which may carry a constitution.
    ///
    /// # Errors
    ///
    /// As [`Constitution::of_stage`].
    pub(crate) fn of(given: Option<&Path>, input: Option<&Path>) -> Result<Self> {
        Ok(Self(Constitution::of_stage(given, input)?))
    }

    /// The turns of the chain.
    pub(crate) fn turns(&self) -> Turns {
        self.0.as_ref().map_or_else(Turns::default, |own| own.turns.clone())
    }

    /// The virtues, in order.
    pub(crate) fn virtues(&self) -> Vec<Virtue> {
        self.0.as_ref().map_or_else(|| Virtue::SHIPPED.into(), Constitution::virtue_names)
    }

    /// The constitution itself, where its words are needed.
    ///
    /// # Errors
    ///
    /// A refused file if there is none.
    pub(crate) fn constitution(&self) -> Result<&Constitution> {
        Ok(self.0.as_ref().ok_or_else(|| {
            Refusal::file(
                SHIPPED,
                "constitution",
                "a constitution there, or another one (--constitution FILE)",
                "no such file",
            )
        })?)
    }

    /// The file, if the results depend on it: of one of the shipped names only where its words `are_read`.
    ///
    /// # Errors
    ///
    /// As [`Words::constitution`], if its words are read.
    pub(crate) fn input(&self, are_read: bool) -> Result<Option<PathBuf>> {
        let own = if are_read { Some(self.constitution()?) } else { self.0.as_ref() };
        let own = own.filter(|own| are_read || !own.has_shipped_names());
        Ok(own.map(|own| own.path().to_owned()))
    }

    /// Leaves a copy among the results, where there is one to carry.
    ///
    /// # Errors
    ///
    /// I/O.
    pub(crate) fn leave(&self, output: &Path) -> Result<()> {
        Ok(self.0.as_ref().map_or(Ok(()), |own| own.leave(output))?)
    }
}
