//! Normalising numbers over the valid tokens of a whole rollout.

use anyhow::Result;
use tch::{Kind, Tensor};

use crate::shape::check_shape;

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
/// Another shape if the shapes differ.
///
/// # Source
///
/// `masked_whiten` of TRL 1.12 and of Huang et al. 2024 (arXiv:2403.17031); variance with Bessel's correction as in TRL.
/// Unlike theirs it is defined for a single token (variance 0), and sums are f64.
pub fn whiten(x: &Tensor, valid: &Tensor) -> Result<Tensor> {
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
pub fn rescale(x: &Tensor, valid: &Tensor) -> Result<Tensor> {
    let (mean, inverse) = moments(x, valid)?;
    Ok(((x.to_kind(Kind::Double) - mean) * inverse + mean)
        .to_kind(Kind::Float)
        .where_self(valid, &x.zeros_like()))
}

/// Mean, and 1 / sqrt(variance + eps), over the valid entries.
fn moments(x: &Tensor, valid: &Tensor) -> Result<(f64, f64)> {
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
    use proptest::prelude::*;

    use super::*;
    use crate::test_tensors::{batch, bools, close, values_of};

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
    proptest! {
        #[test]
        fn what_lies_outside_valid_and_the_order_change_nothing(
            rows in prop::collection::vec((-3.0f32..3.0, prop::bool::weighted(0.8)), 2..40),
            noise in -9.0f32..9.0,
        ) {
            let tensors = |rows: &[(f32, bool)]| {
                let (x, valid): (Vec<f32>, Vec<bool>) = rows.iter().copied().unzip();
                (batch(&[&x]), bools(&[&valid]))
            };
            let (x, valid) = tensors(&rows);
            let noisy: Vec<(f32, bool)> =
                rows.iter().map(|&(x, valid)| (if valid { x } else { noise }, valid)).collect();
            let backwards: Vec<(f32, bool)> = rows.iter().rev().copied().collect();
            for normalise in [whiten, rescale] {
                let out = values_of(&normalise(&x, &valid).unwrap());
                prop_assert_eq!(&values_of(&normalise(&tensors(&noisy).0, &valid).unwrap()), &out);
                let (x, valid) = tensors(&backwards);
                let turned = values_of(&normalise(&x, &valid).unwrap());
                for (a, b) in turned.into_iter().rev().zip(out) {
                    prop_assert!(close(a, b));
                }
            }
        }

        #[test]
        fn variance_is_1_and_the_mean_is_removed_or_kept(x in prop::collection::vec(-3.0f32..3.0, 3..40)) {
            let spread = arete_records::stats::std(&x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
            prop_assume!(spread > 0.1);
            let (tensor, valid) = (batch(&[&x]), bools(&[&vec![true; x.len()]]));
            let n = x.len() as f64;
            let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
            for (out, expected) in
                [(whiten(&tensor, &valid), 0.0), (rescale(&tensor, &valid), mean)]
            {
                let out = values_of(&out.unwrap());
                prop_assert!(close(arete_records::stats::mean(&out), expected));
                let variance = arete_records::stats::std(&out).powi(2) * n / (n - 1.0);
                prop_assert!((variance - 1.0).abs() < 1e-4, "{variance}");
            }
        }
    }
}
