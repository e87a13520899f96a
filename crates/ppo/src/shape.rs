//! Shapes at the boundary of the pure functions.

use anyhow::{Result, bail};
use tch::Tensor;

/// Fails unless `tensor`, the argument `name`, has the shape `expected`.
pub(crate) fn check_shape(name: &str, tensor: &Tensor, expected: &[i64]) -> Result<()> {
    let got = tensor.size();
    if got != expected {
        bail!(refused(name, expected, &got));
    }
    Ok(())
}

/// What is said of the argument `name` with a wrong shape; -1 stands for any size.
pub(crate) fn refused(name: &str, expected: &[i64], got: &[i64]) -> String {
    format!("{name}: expected shape {expected:?}, got {got:?}")
}
