//! A packed linear layer on a GPU: the fused kernel for few rows, else the weights unpacked into a scratch buffer
//! for cuBLAS.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

use tch::{Device, Tensor};

use super::launch::{Packed, dequantize_into, multiply};
use super::plan;
use crate::Error;
use crate::nf4::Nf4Tensor;

/// One buffer per GPU and dtype, as large as the largest matrix so far. Every layer unpacks into the same one: the
/// stream runs a layer's product before the next layer's unpacking. Locked until both are queued.
static SCRATCH: LazyLock<Mutex<HashMap<(usize, u8), Tensor>>> = LazyLock::new(Mutex::default);

/// `x Wᵀ` with W packed NF4, without gradients.
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
/// Few rows: f32 products of unrounded weights. Many: weights rounded to the dtype of `x`, as bitsandbytes does.
pub fn nf4_linear(x: &Tensor, weight: &Nf4Tensor) -> Result<Tensor, Error> {
    let packed = Packed::from(weight);
    let few = x.size().first().is_some_and(|&rows| rows <= i64::from(plan::MAX_ROWS));
    if few && weight.inputs % 32 == 0 {
        return multiply(x, &packed);
    }
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
    let _no_grad = tch::no_grad_guard();
    let numel = weight.outputs * weight.inputs;
    let key = (index, x.kind() as u8);
    let mut buffers = SCRATCH.lock().unwrap_or_else(PoisonError::into_inner);
    if buffers.get(&key).is_none_or(|buffer| buffer.size()[0] < numel) {
        buffers.remove(&key); // freed before its successor is allocated
        buffers.insert(key, Tensor::f_empty([numel], (x.kind(), x.device()))?);
    }
    let dense = buffers[&key].f_narrow(0, 0, numel)?;
    let dense = dense.f_view([weight.outputs, weight.inputs])?; // [outputs, inputs]
    dequantize_into(&packed, &dense)?;
    Ok(x.f_mm(&dense.f_tr()?)?) // [N, outputs]
}
