//! The calls of the GPU's path that the CPU's own has none of: what goes to the device and comes back, and what is computed there.

use tch::{Device, Kind, Tensor};

use super::{
    SampleSettings, arete_composite, arete_join_factors, arete_read, arete_sample_there,
    arete_upload, check, raw, raw_or_null, take,
};
use crate::Error;

/// Whether numbers of this kind on this device take the GPU's path: what CUDA tensors take, and with `ARETE_COMPOSITE=1` f32 and
/// bf16 on the CPU, too (`csrc/fused.h`).
pub(crate) fn gpu_shaped(device: Device, kind: Kind) -> bool {
    match device {
        Device::Cuda(_) => matches!(kind, Kind::Float | Kind::BFloat16 | Kind::Half),
        // SAFETY: the function reads a setting of the process or, in tests, of the thread.
        _ => matches!(kind, Kind::Float | Kind::BFloat16) && unsafe { arete_composite() },
    }
}

/// Whether attention in training is libtorch's flash attention. It takes heads of a multiple of 8 numbers up to 256.
pub(super) fn takes_flash(qkv: &Tensor, head_size: usize) -> bool {
    let fits = head_size.is_multiple_of(8) && head_size <= 256;
    match qkv.device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(index) => fits && crate::cuda::has_flash(index, qkv.kind()),
        device => fits && gpu_shaped(device, qkv.kind()),
    }
}

/// Numbers for the device, in one copy that nobody waits for.
pub(crate) fn upload(values: &[i64], device: Device) -> Result<Tensor, Error> {
    let index = match device {
        Device::Cuda(index) => i32::try_from(index).expect("few GPUs"),
        _ => -1,
    };
    uploaded(values, index)
}

/// Numbers that stay on the host whatever the device.
pub(crate) fn on_host(values: &[i64]) -> Result<Tensor, Error> {
    uploaded(values, -2)
}

fn uploaded(values: &[i64], to: i32) -> Result<Tensor, Error> {
    let mut out = std::ptr::null();
    // SAFETY: the slice is as long as it says.
    check(unsafe { arete_upload(values.as_ptr(), values.len() as i64, to, &raw mut out) })?;
    Ok(take(out))
}

/// Numbers on a device: on the GPU's path by [`upload`].
pub(crate) fn numbers_on(device: Device, values: &[i64]) -> Result<Tensor, Error> {
    if gpu_shaped(device, Kind::Float) {
        upload(values, device)
    } else {
        Ok(Tensor::from_slice(values).f_to_device(device)?)
    }
}

/// LoRA's factors of up to three layers that share their input: A stacked, B along a diagonal and scaled, both in `kind`.
pub(crate) fn join_factors(
    pairs: [Option<[&Tensor; 2]>; 3],
    inputs: i64,
    outputs: [i64; 3],
    scale: f64,
    kind: Kind,
) -> Result<(Tensor, Tensor), Error> {
    let master = |part: usize, which: usize| raw_or_null(pairs[part].map(|pair| pair[which]));
    let ranks = pairs.map(|pair| pair.map_or(0, |[a, _]| a.size()[0]));
    let sizes: Vec<i64> = [inputs].into_iter().chain(ranks).chain(outputs).collect();
    let format = match kind {
        Kind::Float => 0,
        Kind::BFloat16 => 1,
        _ => 2,
    };
    let (mut a, mut b) = (std::ptr::null(), std::ptr::null());
    // SAFETY: all pointers are live tensors or null where the C++ side allows it; there are seven sizes.
    check(unsafe {
        arete_join_factors(
            master(0, 0),
            master(1, 0),
            master(2, 0),
            master(0, 1),
            master(1, 1),
            master(2, 1),
            sizes.as_ptr(),
            scale,
            format,
            &raw mut a,
            &raw mut b,
        )
    })?;
    Ok((take(a), take(b)))
}

/// Draws tokens where the logits are: draw i from row `sources[i]` (or i) by `uniforms[i]`, f64 on the same device. The drawn are
/// read by [`read_drawn`].
pub(crate) fn sample_there(
    logits: &Tensor,
    sources: Option<&Tensor>,
    uniforms: &Tensor,
    settings: SampleSettings,
) -> Result<Tensor, Error> {
    let SampleSettings { temperature, top_k, top_p } = settings;
    let mut out = std::ptr::null();
    // SAFETY: all pointers are live tensors or null where the C++ side allows it.
    check(unsafe {
        arete_sample_there(
            raw(logits),
            raw_or_null(sources),
            raw(uniforms),
            temperature,
            top_k,
            top_p,
            &raw mut out,
        )
    })?;
    Ok(take(out))
}

/// What [`sample_there`] drew: tokens and their log-probabilities. The one place where a step waits for the device.
pub(crate) fn read_drawn(drawn: &Tensor) -> Result<(Vec<i64>, Vec<f32>), Error> {
    let mut packed = vec![0i64; drawn.numel()];
    // SAFETY: the buffer has as many numbers as the tensor, which is i64.
    check(unsafe { arete_read(raw(drawn), packed.as_mut_ptr()) })?;
    let token = |packed: &i64| i64::from(packed.cast_unsigned() as u32);
    let logprob = |packed: &i64| f32::from_bits((packed.cast_unsigned() >> 32) as u32);
    Ok((packed.iter().map(token).collect(), packed.iter().map(logprob).collect()))
}
