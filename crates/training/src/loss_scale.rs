//! The loss scale of f16, whose small gradients would vanish without one.

use serde::{Deserialize, Serialize};

/// First factor.
const FIRST: f64 = 65536.0;
/// Steps without overflow after which the factor doubles.
const GROWTH_STEPS: u64 = 2000;

/// Factor of the loss, and how it changes.
///
/// # Source
///
/// PyTorch's `GradScaler` with its defaults, but that an overflow at a factor of 1 is an error: halving on would never
/// learn.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    /// The factor; none in formats that need none.
    pub factor: Option<f64>,
    /// Steps since it last changed.
    pub n_good: u64,
}

impl LossScale {
    /// The first scale, or none.
    #[must_use]
    pub fn new(is_scaled: bool) -> Self {
        Self { factor: is_scaled.then_some(FIRST), n_good: 0 }
    }

    /// What the loss is multiplied by.
    #[must_use]
    pub fn factor(&self) -> f64 {
        self.factor.unwrap_or(1.0)
    }

    /// Whether a step that overflows may be skipped: there is a factor to halve.
    #[must_use]
    pub fn can_fall(&self) -> bool {
        self.factor() > 1.0
    }

    /// After a step that overflowed and was skipped.
    #[must_use]
    pub fn after_overflow(&self) -> Self {
        Self { factor: self.factor.map(|factor| 0.5 * factor), n_good: 0 }
    }

    /// After a step whose gradients were finite.
    #[must_use]
    pub fn after_step(&self) -> Self {
        match self.factor {
            Some(factor) if self.n_good + 1 == GROWTH_STEPS => {
                Self { factor: Some(2.0 * factor), n_good: 0 }
            }
            Some(_) => Self { n_good: self.n_good + 1, ..*self },
            None => *self,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_halves_doubles_and_stays_away() {
        let scale = LossScale::new(true);
        assert_eq!((scale.factor(), scale.can_fall()), (65536.0, true));
        assert_eq!(scale.after_overflow(), LossScale { factor: Some(32768.0), n_good: 0 });
        let near = LossScale { factor: Some(8.0), n_good: 1998 };
        assert_eq!(near.after_step().n_good, 1999);
        assert_eq!(near.after_step().after_step(), LossScale { factor: Some(16.0), n_good: 0 });
        let none = LossScale::new(false);
        assert_eq!((none.factor(), none.can_fall(), none.after_step()), (1.0, false, none));
        assert!(!LossScale { factor: Some(1.0), n_good: 0 }.can_fall());
    }
}
