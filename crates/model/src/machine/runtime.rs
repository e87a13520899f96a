//! Device, number format and threads of a run, as every stage's flags name them.

use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use crate::{Error, LoadOptions, Nf4Options, cuda, default_dtype, machine, ops};

/// Number format of the frozen weights and of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// bf16 where the device computes in it, else f32.
    Auto,
    /// 32-bit floats.
    F32,
    /// 16-bit floats with the range of f32.
    Bf16,
    /// 16-bit floats, on a GPU (training scales the loss); on the CPU as `auto`.
    F16,
}

/// The device a name stands for: `cpu`, `cuda`, `cuda:N`, or `auto` (the first GPU if there is one).
///
/// # Errors
///
/// [`Error::Invalid`] for another name; [`Error::Cuda`] if there is no such GPU, or none can be used.
pub fn device(name: &str) -> Result<Device, Error> {
    let gpu = match name {
        "cpu" => return Ok(Device::Cpu),
        "auto" if cuda::n_gpus() == 0 => {
            if let Some(reason) = why_not(cuda::require(0)) {
                tracing::warn!(%reason, "device auto: computing on the CPU");
            }
            return Ok(Device::Cpu);
        }
        "auto" | "cuda" => Some(0),
        other => other.strip_prefix("cuda:").and_then(|number| number.parse::<usize>().ok()),
    };
    let gpu = gpu.ok_or_else(|| Error::Invalid {
        name: "device",
        expected: "cpu, auto, cuda or cuda:N".to_owned(),
        got: name.to_owned(),
    })?;
    cuda::require(gpu)?;
    Ok(Device::Cuda(gpu))
}

/// What a user who may have expected a GPU is told: nothing where this libtorch, or this program, is for the CPU alone.
fn why_not(gpu: Result<(), cuda::CudaError>) -> Option<String> {
    match gpu.err()? {
        cuda::CudaError::CpuBuild | cuda::CudaError::LeftOut => None,
        error => Some(error.to_string()),
    }
}

/// How to load a model on `device`: dense in `dtype`, or its blocks packed to four bits.
pub fn load_options(device: Device, dtype: Dtype, nf4: bool, double_quantize: bool) -> LoadOptions {
    let dtype = match dtype {
        Dtype::Auto => default_dtype(device),
        Dtype::F32 => Kind::Float,
        Dtype::Bf16 => Kind::BFloat16,
        Dtype::F16 if device == Device::Cpu => {
            let dtype = default_dtype(device);
            tracing::info!(dtype = dtype_name(dtype), "f16 is for GPUs");
            dtype
        }
        Dtype::F16 => Kind::Half,
    };
    let nf4 = nf4.then(|| Nf4Options { double_quantize, ..Nf4Options::default() });
    LoadOptions { device, dtype, nf4 }
}

/// `f32`, `bf16` or `f16`.
pub fn dtype_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Float => "f32",
        Kind::BFloat16 => "bf16",
        Kind::Half => "f16",
        _ => "other",
    }
}

/// `cpu` or `cuda:N`.
pub fn device_name(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        _ => "cpu".to_owned(),
    }
}

/// Whether a number of threads was asked for.
static ASKED: AtomicBool = AtomicBool::new(false);

/// Sets the threads libtorch computes with; 0 leaves the choice to [`keep_to_cores`].
pub fn set_threads(threads: u32) {
    if let Ok(threads @ 1..) = i32::try_from(threads) {
        ASKED.store(true, Ordering::Relaxed);
        tch::set_num_threads(threads);
    }
    keep_to_cores();
}

/// Takes back threads beyond the cores that affinity and control groups leave to this process, unless a number was asked for (here or
/// with `OMP_NUM_THREADS`), and has those that are left wait without spinning for long. Loading a model does it.
pub fn keep_to_cores() {
    let named = std::env::var_os("OMP_NUM_THREADS").is_some_and(|value| !value.is_empty());
    let allowed = i32::try_from(machine::allowed_cores()).unwrap_or(i32::MAX);
    if !named && !ASKED.load(Ordering::Relaxed) && tch::get_num_threads() > allowed {
        tch::set_num_threads(allowed);
    }
    ops::wait_briefly();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_in_the_place_of_a_gpu_is_explained_where_one_could_be_expected() {
        assert_eq!(why_not(Ok(())), None);
        assert_eq!(why_not(Err(cuda::CudaError::CpuBuild)), None);
        let old = cuda::CudaError::OldDriver { found: 12_040, needed: 13_000 };
        assert!(why_not(Err(old)).is_some_and(|reason| reason.contains("12.4")));
    }

    #[test]
    fn devices_are_parsed_and_checked() {
        assert_eq!(device("cpu").unwrap(), Device::Cpu);
        // Whatever is missing here (a libtorch for CUDA, the driver, so many GPUs), the error says what to do.
        let error = device("cuda:99").unwrap_err();
        assert!(matches!(error, Error::Cuda(_)), "{error:?}");
        assert!(error.to_string().contains("--device cpu"), "{error}");
        let error = device("cuda:x").unwrap_err().to_string();
        assert!(error.contains("expected cpu, auto, cuda or cuda:N, got cuda:x"), "{error}");
    }
}
