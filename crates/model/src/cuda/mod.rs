//! NF4 on NVIDIA GPUs: kernels compiled at run time, launched on torch's memory.
//!
//! The kernels (`kernels/*.cu`) are embedded as source. At first use NVRTC compiles them for the GPU at hand
//! (`nvrtc.rs`; machine code is kept under `~/.cache/arete`), and every later call is one launch on the legacy
//! default stream, which is torch's own unless changed. Neither building nor running on the CPU needs any part of
//! CUDA: the driver and NVRTC are opened when the first CUDA tensor arrives, and their absence is an error that
//! says what is missing.
//!
//! - [`dequantize`], [`quantize`], [`multiply`]: one kernel each.
//! - [`nf4_linear`]: a packed linear layer as the decoder computes it.
//! - [`n_gpus`], [`require`]: whether there is a GPU to compute on.
//! - [`install`]: lets the decoder's linear layer use these kernels, in training too.
//! - [`plan`], [`nvrtc`]: launches and compilation, open to the tests that run without a GPU.
//!
//! How far this has been tried is said in `docs/cuda.md`.

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

use std::path::PathBuf;

#[cfg(feature = "cuda")]
pub use launch::{Absmax, Packed, dequantize, dequantize_into, install, multiply, quantize};
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

    /// libtorch does not see the GPU.
    #[error(
        "there is no GPU {index}, libtorch sees {n_gpus}; look at nvidia-smi and CUDA_VISIBLE_DEVICES, or run with --device cpu"
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
    #[error("compiling {program} for compute capability {}: {reason}\n{log}", capability(*arch))]
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
    #[error("{what}: {reason}")]
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
        Err(CudaError::NoGpu { index, n_gpus })
    }
    #[cfg(not(feature = "cuda"))]
    Err(CudaError::LeftOut)
}

fn capability(arch: u32) -> String {
    format!("{}.{}", arch / 10, arch % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

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
