//! A packed linear layer on a GPU by itself, as the decoder computes it.

use tch::{Device, Tensor};

use super::launch::install;
use crate::Error;
use crate::nf4::Nf4Tensor;
use crate::ops::{self, WeightRef};

/// `x Wᵀ` with W packed NF4: straight from the packed weights for up to 256 rows on tensor cores (16 without), else unpacked into the
/// layers' common buffer for cuBLAS.
///
/// # Shapes
///
/// - `x`: `[N, inputs]` f32, bf16 or f16, on the GPU of `weight`.
/// - result: `[N, outputs]` in the dtype of `x`.
///
/// # Errors
///
/// [`Error::Shape`] or [`Error::Invalid`] if the parts do not fit together, [`Error::Cuda`] if the GPU cannot be
/// used.
///
/// # Source
///
/// Weights rounded to the dtype of `x`, as bitsandbytes does; only the kernel without tensor cores multiplies them unrounded.
pub fn nf4_linear(x: &Tensor, weight: &Nf4Tensor) -> Result<Tensor, Error> {
    if x.dim() != 2 || x.size()[1] != weight.inputs {
        return Err(Error::Shape { name: "x", expected: vec![-1, weight.inputs], got: x.size() });
    }
    let Device::Cuda(index) = x.device() else {
        return Err(Error::Invalid {
            name: "x",
            expected: "a tensor on a GPU".to_owned(),
            got: format!("one on {:?}", x.device()),
        });
    };
    install(index, x.kind())?;
    ops::linear(x, &WeightRef::Nf4(weight), None, true)
}
