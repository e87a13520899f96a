//! What every failure on a GPU names: the driver and the GPU, as far as they are known by then.

use std::fmt;
use std::sync::{Mutex, PoisonError};

/// Driver and GPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Surroundings {
    /// CUDA's version that the driver is for, as it counts: 13010 for 13.1.
    pub(crate) driver: Option<i32>,
    /// The GPU opened last.
    pub(crate) gpu: Option<GpuName>,
}

/// A GPU as messages name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GpuName {
    pub(crate) index: usize,
    pub(crate) name: String,
    /// Its generation, 86 for compute capability 8.6.
    pub(crate) arch: u32,
}

static KNOWN: Mutex<Surroundings> = Mutex::new(Surroundings { driver: None, gpu: None });

impl Surroundings {
    pub(crate) fn current() -> Self {
        KNOWN.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    #[cfg(feature = "cuda")]
    pub(super) fn note_driver(version: i32) {
        KNOWN.lock().unwrap_or_else(PoisonError::into_inner).driver = Some(version);
    }

    #[cfg(feature = "cuda")]
    pub(super) fn note_gpu(gpu: GpuName) {
        KNOWN.lock().unwrap_or_else(PoisonError::into_inner).gpu = Some(gpu);
    }
}

/// `13.1` for 13010.
pub(crate) fn cuda_version(counted: i32) -> String {
    format!("{}.{}", counted / 1000, counted % 1000 / 10)
}

/// In brackets, to be put after a message; nothing where nothing is known.
impl fmt::Display for Surroundings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let driver =
            self.driver.map(|version| format!("driver for CUDA {}", cuda_version(version)));
        let gpu = self.gpu.as_ref().map(|GpuName { index, name, arch }| {
            format!("GPU {index}: {name}, compute capability {}", super::capability(*arch))
        });
        let parts: Vec<String> = driver.into_iter().chain(gpu).collect();
        if parts.is_empty() { Ok(()) } else { write!(f, " ({})", parts.join(", ")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn driver_and_gpu_are_named() {
        let gpu = GpuName { index: 1, name: "Tesla T4".to_owned(), arch: 75 };
        let text = |driver, gpu| Surroundings { driver, gpu }.to_string();
        assert_eq!(text(None, None), "");
        assert_eq!(text(Some(12040), None), " (driver for CUDA 12.4)");
        let expected = " (driver for CUDA 13.1, GPU 1: Tesla T4, compute capability 7.5)";
        assert_eq!(text(Some(13010), Some(gpu)), expected);
    }
}
