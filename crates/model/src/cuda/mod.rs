//! NF4 on NVIDIA GPUs: kernels compiled at run time, launched on torch's memory.
//!
//! The kernels (`kernels/*.cu`) are embedded as source. At first use NVRTC compiles them for the GPU at hand
//! (`nvrtc.rs`; machine code is kept under `~/.cache/arete`), and every later call is one launch on
//! torch's current stream. Neither building nor running on the CPU needs any part of
//! CUDA: the driver and NVRTC are opened when the first CUDA tensor arrives, and their absence is an error that
//! says what is missing.
//!
//! - [`dequantize`], [`quantize`], [`multiply`]: one kernel each.
//! - [`attend`], [`nf4_rows`]: a decoding step's attention and packed products, one launch each, on the CPU too.
//! - [`nf4_linear`]: a packed linear layer as the decoder computes it.
//! - [`n_gpus`], [`require`]: whether there is a GPU to compute on.
//! - [`install`]: lets the decoder use these kernels, in training too; [`table`] says which operation is which launch.
//! - [`plan`], [`nvrtc`]: launches and compilation, open to the tests that run without a GPU.
//!
//! How far this has been tried is said in `docs/cuda.md`.

#[cfg(feature = "cuda")]
mod decoding;
#[cfg(feature = "cuda")]
mod ffi;
#[cfg(feature = "cuda")]
mod launch;
#[cfg(feature = "cuda")]
mod linear;
#[cfg(feature = "cuda")]
pub mod nvrtc;
#[cfg(feature = "cuda")]
pub mod plan;
mod surroundings;
#[cfg(feature = "cuda")]
pub mod table;

use std::path::PathBuf;

use tch::Kind;

pub(crate) use surroundings::Surroundings;

#[cfg(feature = "cuda")]
pub use decoding::{AttentionTables, attend, nf4_rows};
#[cfg(feature = "cuda")]
pub(crate) use launch::has_flash;
#[cfg(all(test, feature = "cuda"))]
pub(crate) use launch::register;
#[cfg(feature = "cuda")]
pub use launch::{
    Absmax, Packed, dequantize, dequantize_into, generation, install, multiply, quantize,
};
#[cfg(feature = "cuda")]
pub use linear::nf4_linear;

/// Why the GPU could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// A library that CUDA needs cannot be opened. The CPU path needs none of them.
    #[error(
        "{library} cannot be opened ({}); {remedy}, or run with --device cpu",
        if searched.is_empty() {
            "searched where the system's loader looks".to_owned()
        } else {
            format!("searched where the system's loader looks and in {}",
                searched.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", "))
        }
    )]
    Missing {
        /// The library.
        library: &'static str,
        /// Folders searched besides the loader's own.
        searched: Vec<PathBuf>,
        /// What would provide it.
        remedy: &'static str,
    },

    /// The libtorch in use was built for the CPU alone.
    #[error(
        "this libtorch is the CPU's and knows no GPU; run `make setup DEVICE=cuda && make build`, or run with --device cpu"
    )]
    CpuBuild,

    /// This program was built without the feature `cuda`.
    #[error(
        "built without the feature `cuda` of arete-model; switch it on, or run with --device cpu"
    )]
    LeftOut,

    /// The driver is older than libtorch's CUDA.
    #[error(
        "the NVIDIA driver is for CUDA {}, this libtorch needs one for CUDA {} or later; update the driver, or run with --device cpu",
        surroundings::cuda_version(*found),
        surroundings::cuda_version(*needed)
    )]
    OldDriver {
        /// What the driver says, 12040 for 12.4.
        found: i32,
        /// What is needed.
        needed: i32,
    },

    /// libtorch does not see the GPU.
    #[error(
        "there is no GPU {index}, libtorch sees {n_gpus}{}; look at nvidia-smi and CUDA_VISIBLE_DEVICES, or run with --device cpu",
        Surroundings::current()
    )]
    NoGpu {
        /// The number asked for.
        index: usize,
        /// How many there are.
        n_gpus: usize,
    },

    /// The GPU's generation is older than every one this NVRTC compiles for.
    #[error(
        "the GPU has compute capability {}, this NVRTC compiles for {}",
        capability(*arch),
        supported.iter().map(|&arch| capability(arch)).collect::<Vec<_>>().join(", ")
    )]
    Arch {
        /// The GPU's generation, 86 for 8.6.
        arch: u32,
        /// What NVRTC supports.
        supported: Vec<u32>,
    },

    /// NVRTC refused a kernel file.
    #[error("compiling {program} for compute capability {}: {reason}{}\n{log}", capability(*arch), Surroundings::current())]
    Compile {
        /// The file.
        program: &'static str,
        /// The generation compiled for.
        arch: u32,
        /// NVRTC's error code.
        reason: String,
        /// Its messages.
        log: String,
    },

    /// A call into the CUDA driver failed.
    #[error("{what}: {reason}{}", Surroundings::current())]
    Driver {
        /// What was being done.
        what: String,
        /// The driver's error name and text.
        reason: String,
    },
}

/// The GPUs that torch can compute on; none without the feature `cuda`.
///
/// The first call loads libtorch's CUDA part, where there is one: no program calls a symbol of it, so linkers leave it out of
/// what they load at start. It must come before anything else asks torch about GPUs, for torch remembers the answer.
pub fn n_gpus() -> usize {
    #[cfg(feature = "cuda")]
    {
        static LOADED: std::sync::Once = std::sync::Once::new();
        LOADED.call_once(ffi::load_libtorch_cuda);
        usize::try_from(tch::Cuda::device_count()).unwrap_or(0)
    }
    #[cfg(not(feature = "cuda"))]
    0
}

/// Checks that torch can compute on GPU `index`, before anything is sent there: torch itself would panic.
///
/// # Errors
///
/// [`CudaError::LeftOut`], [`CudaError::CpuBuild`], [`CudaError::Missing`] without a driver, [`CudaError::NoGpu`].
pub fn require(index: usize) -> Result<(), CudaError> {
    let n_gpus = n_gpus();
    if index < n_gpus {
        return Ok(());
    }
    #[cfg(feature = "cuda")]
    {
        if !ffi::libtorch_has_cuda() {
            return Err(CudaError::CpuBuild);
        }
        ffi::require_driver()?;
        Err(unseen(index, n_gpus, ffi::driver_version()))
    }
    #[cfg(not(feature = "cuda"))]
    Err(CudaError::LeftOut)
}

/// The driver that libtorch's CUDA 13 needs, as drivers count.
#[cfg(feature = "cuda")]
const NEEDED_DRIVER: i32 = 13_000;

/// Why a GPU is not seen where there is a driver of this version.
#[cfg(feature = "cuda")]
fn unseen(index: usize, n_gpus: usize, driver: Option<i32>) -> CudaError {
    match driver {
        Some(found) if n_gpus == 0 && found < NEEDED_DRIVER => {
            CudaError::OldDriver { found, needed: NEEDED_DRIVER }
        }
        _ => CudaError::NoGpu { index, n_gpus },
    }
}

/// The number format to compute in on a GPU of a generation: bf16 from Ampere on; Turing multiplies f16 on its tensor cores and bf16 on none.
pub fn default_kind(arch: u32) -> Kind {
    if arch >= 80 { Kind::BFloat16 } else { Kind::Half }
}

/// The generation of GPU `index`, if it can be opened.
pub(crate) fn generation_of(index: usize) -> Option<u32> {
    #[cfg(feature = "cuda")]
    if index < n_gpus() {
        return generation(index).ok();
    }
    let _ = index;
    None
}

/// Bytes of GPU `index` that nobody holds, and all it has; none where it cannot be asked.
pub fn memory(index: usize) -> Option<(u64, u64)> {
    #[cfg(feature = "cuda")]
    if index < n_gpus() {
        return launch::memory(index).ok();
    }
    let _ = index;
    None
}

fn capability(arch: u32) -> String {
    format!("{}.{}", arch / 10, arch % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turing_computes_in_f16_and_later_ones_in_bf16() {
        assert_eq!(default_kind(75), Kind::Half);
        assert_eq!([80, 86, 89, 90, 120].map(default_kind), [Kind::BFloat16; 5]);
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn an_old_driver_is_told_from_a_gpu_that_is_not_there() {
        let message = unseen(0, 0, Some(12_040)).to_string();
        assert!(
            message.starts_with(
                "the NVIDIA driver is for CUDA 12.4, this libtorch needs one for CUDA 13.0"
            ),
            "{message}"
        );
        assert!(matches!(unseen(0, 0, Some(13_010)), CudaError::NoGpu { .. }));
        assert!(matches!(unseen(3, 2, Some(12_040)), CudaError::NoGpu { index: 3, n_gpus: 2 }));
    }

    #[test]
    fn a_missing_library_is_named_with_its_remedy() {
        let error = CudaError::Missing {
            library: "libnvrtc",
            searched: vec!["/somewhere".into()],
            remedy: "run `make setup DEVICE=cuda`",
        };
        assert_eq!(
            error.to_string(),
            "libnvrtc cannot be opened (searched where the system's loader looks and in /somewhere); \
             run `make setup DEVICE=cuda`, or run with --device cpu"
        );
    }
}
