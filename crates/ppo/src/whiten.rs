//! Normalising numbers over the valid tokens of a whole rollout.

use tch::{Kind, Tensor};

use crate::Error;
use crate::error::check_shape;

/// Added to the variance before its root is taken, as in TRL.
const EPS: f64 = 1e-8;

/// Mean 0 and variance 1 over the valid entries; 0 elsewhere.
///
/// # Shapes
///
/// - `x`: any shape, f32; `valid`: the same shape, bool.
///
/// # Errors
///
/// [`Error::Shape`] if the shapes differ.
///
/// # Source
///
/// `masked_whiten` of TRL 1.12 and of Huang et al. 2024 (arXiv:2403.17031); variance with Bessel's correction as in TRL.
/// Unlike theirs it is defined for a single token (variance 0), and sums are f64.
pub fn whiten(x: &Tensor, valid: &Tensor) -> Result<Tensor, Error> {
    let (mean, inverse) = moments(x, valid)?;
    Ok(((x.to_kind(Kind::Double) - mean) * inverse)
        .to_kind(Kind::Float)
        .where_self(valid, &x.zeros_like()))
}

/// Variance 1 over the valid entries, the mean kept; 0 elsewhere.
///
/// # Shapes
///
/// As [`whiten`].
///
/// # Errors
///
/// As [`whiten`].
///
/// # Source
///
/// `masked_whiten(shift_mean=False)` of TRL 1.12, which keeps the mean as it was while the rest is scaled.
pub fn rescale(x: &Tensor, valid: &Tensor) -> Result<Tensor, Error> {
    let (mean, inverse) = moments(x, valid)?;
    Ok(((x.to_kind(Kind::Double) - mean) * inverse + mean)
        .to_kind(Kind::Float)
        .where_self(valid, &x.zeros_like()))
}

/// Mean, and 1 / sqrt(variance + eps), over the valid entries.
fn moments(x: &Tensor, valid: &Tensor) -> Result<(f64, f64), Error> {
    check_shape("valid", valid, &x.size())?;
    let own = x.masked_select(valid).to_kind(Kind::Double); // [n]
    let n = own.numel();
    if n == 0 {
        return Ok((0.0, 1.0));
    }
    let mean = f64::try_from(own.mean(Kind::Double))?;
    let squares = f64::try_from((own - mean).square().sum(Kind::Double))?;
    #[expect(clippy::cast_precision_loss, reason = "token counts are far below 2^52")]
    let variance = if n > 1 { squares / (n - 1) as f64 } else { 0.0 };
    Ok((mean, 1.0 / (variance + EPS).sqrt()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_tensors::{batch, bools, values_of};

    #[test]
    fn four_numbers_by_hand() {
        // 1, 3, 5 count: mean 3, variance (4 + 0 + 4) / 2 = 4.
        let x = batch(&[&[1.0, f32::NAN], &[3.0, 5.0]]);
        let valid = bools(&[&[true, false], &[true, true]]);
        assert_eq!(values_of(&whiten(&x, &valid).unwrap()), [-1.0, 0.0, 0.0, 1.0]);
        assert_eq!(values_of(&rescale(&x, &valid).unwrap()), [2.0, 0.0, 3.0, 4.0]);
    }

    #[test]
    fn one_token_and_none_are_no_trouble() {
        let x = batch(&[&[2.5, 1.0]]);
        let one = bools(&[&[true, false]]);
        assert_eq!(values_of(&whiten(&x, &one).unwrap()), [0.0, 0.0]);
        assert_eq!(values_of(&rescale(&x, &one).unwrap()), [2.5, 0.0]);
        let none = bools(&[&[false, false]]);
        assert_eq!(values_of(&whiten(&x, &none).unwrap()), [0.0, 0.0]);
    }

    #[test]
    fn shapes_are_checked() {
        assert!(whiten(&batch(&[&[1.0]]), &bools(&[&[true, true]])).is_err());
    }
}
