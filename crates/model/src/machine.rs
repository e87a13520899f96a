//! What the machine is that a program computes on, in one place: for `arete-model machine`, and as `machine.json` beside a
//! stage's wall times, like them no part of its results.

use std::path::Path;
use std::thread;

use serde::Serialize;
use tch::{Device, Kind};

use crate::ops::{self, Amx};
use crate::self_test::{OnednnIsa, SelfTest, self_tests};
use crate::{Error, cuda, default_dtype, kernels_name};

mod cores;
mod groups;
mod memory;
pub(crate) mod runtime;

pub use cores::Cores;
pub use memory::Memory;
pub use runtime::{
    Dtype, device, device_name, dtype_name, keep_to_cores, load_options, set_threads,
};

/// Name of the file in a stage's output.
pub use arete_records::hashes::MACHINE as FILE;

/// How threads wait for their next work (`csrc/waiting.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Waiting {
    /// They spin for some microseconds, then sleep, so that beside other work no core is lost.
    Briefly,
    /// As `OMP_WAIT_POLICY` or `GOMP_SPINCOUNT` says.
    FromEnvironment,
    /// There is one thread.
    NotAtAll,
}

/// A GPU that libtorch can compute on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Gpu {
    /// What the driver calls it.
    pub name: String,
    /// `cuda:N`.
    pub device: String,
}

/// CPU, GPUs and libraries, and what of them is in use.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The CPU's name, empty where the system does not tell.
    pub cpu: String,
    /// The compiler's target (`x86_64`, `aarch64`).
    pub architecture: &'static str,
    /// Cores there are and may be used.
    pub cores: Cores,
    /// libtorch's threads.
    pub threads: i32,
    /// How they wait.
    pub waiting: Waiting,
    /// Instruction set of our kernels.
    pub kernels: String,
    /// What became of the CPU's matrix tiles.
    pub amx: Amx,
    /// Instruction set of libtorch's own kernels.
    pub libtorch_isa: String,
    /// Instruction set that oneDNN may use.
    pub onednn_isa: OnednnIsa,
    /// Number format on the CPU unless one is asked for.
    pub dtype: &'static str,
    /// Why.
    pub dtype_reason: &'static str,
    /// Version of libtorch.
    pub libtorch: String,
    /// GPUs.
    pub gpus: Vec<Gpu>,
    /// What the NVIDIA driver says of itself, empty without one.
    pub nvidia_driver: String,
    /// Whether rows were equal where a model has been loaded.
    pub self_tests: Vec<SelfTest>,
}

impl Machine {
    /// Looks at the machine as it is for this process now.
    pub fn look() -> Self {
        runtime::keep_to_cores();
        let kind = default_dtype(Device::Cpu);
        Self {
            cpu: cpu_name(),
            architecture: std::env::consts::ARCH,
            cores: Cores::look(),
            threads: tch::get_num_threads(),
            waiting: ops::wait_briefly(),
            kernels: kernels_name(),
            amx: Amx::current(),
            libtorch_isa: ops::libtorch_isa(),
            onednn_isa: OnednnIsa::current(),
            dtype: runtime::dtype_name(kind),
            dtype_reason: match kind {
                Kind::BFloat16 => "this CPU multiplies bf16 in one instruction",
                _ => "this CPU has no instruction for products in bf16",
            },
            libtorch: ops::libtorch_version(),
            gpus: gpus(),
            nvidia_driver: first_line("/proc/driver/nvidia/version"),
            self_tests: self_tests(),
        }
    }

    /// Writes [`Machine::look`] as `machine.json` into `dir`.
    ///
    /// # Errors
    ///
    /// [`Error::Records`] if it cannot be written.
    pub fn write(dir: impl AsRef<Path>) -> Result<(), Error> {
        let mut text = serde_json::to_string_pretty(&Self::look()).expect("plain data serialises");
        text.push('\n');
        Ok(arete_records::atomic::write(dir.as_ref().join(FILE), text.as_bytes())?)
    }
}

fn first_line(path: &str) -> String {
    let text = fs_err::read_to_string(path).unwrap_or_default();
    text.lines().next().unwrap_or_default().trim().to_owned()
}

/// `model name` of `/proc/cpuinfo`; on other systems and kinds of CPU what there is.
fn cpu_name() -> String {
    let text = fs_err::read_to_string("/proc/cpuinfo").unwrap_or_default();
    name_in_cpuinfo(&text)
}

fn name_in_cpuinfo(text: &str) -> String {
    let field = |wanted: &str| {
        let pairs = text.lines().filter_map(|line| line.split_once(':'));
        let mut values = pairs.filter(|(name, _)| name.trim() == wanted);
        values.next().map(|(_, value)| value.trim().to_owned())
    };
    let number = |wanted: &str| field(wanted).map(|value| format!(", {wanted} {value}"));
    let detail: String = ["cpu family", "model", "CPU implementer", "CPU part"]
        .into_iter()
        .filter_map(number)
        .collect();
    format!("{}{detail}", field("model name").unwrap_or_default())
        .trim_start_matches(", ")
        .to_owned()
}

fn gpus() -> Vec<Gpu> {
    let names = gpu_names();
    let device = |idx: usize| runtime::device_name(Device::Cuda(idx));
    let name = |idx: usize| names.get(idx).cloned().unwrap_or_default();
    (0..cuda::n_gpus()).map(|idx| Gpu { name: name(idx), device: device(idx) }).collect()
}

/// The `Model:` lines of the driver's folders, in the order of the bus as CUDA numbers by default where all GPUs are alike.
fn gpu_names() -> Vec<String> {
    let Ok(entries) = fs_err::read_dir("/proc/driver/nvidia/gpus") else { return Vec::new() };
    let mut folders: Vec<_> = entries.filter_map(Result::ok).map(|entry| entry.path()).collect();
    folders.sort();
    let model = |folder: &std::path::PathBuf| {
        let text = fs_err::read_to_string(folder.join("information")).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("Model:"))?;
        Some(line.trim().to_owned())
    };
    folders.iter().filter_map(model).collect()
}

/// Cores that this process may use: the smaller of its affinity and its control group's quota, at least one.
pub fn allowed_cores() -> usize {
    thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_is_named_on_either_kind() {
        let x86 = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nprocessor: 1\nmodel : 18\n";
        assert_eq!(name_in_cpuinfo(x86), "AMD EPYC, cpu family 25, model 17");
        let arm = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n";
        assert_eq!(name_in_cpuinfo(arm), "CPU implementer 0x41, CPU part 0xd40");
        assert_eq!(name_in_cpuinfo(""), "");
    }

    #[test]
    fn the_file_says_what_is_in_use() {
        let dir = tempfile_dir();
        Machine::write(&dir).unwrap();
        let text = fs_err::read_to_string(dir.join(FILE)).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["kernels"], kernels_name());
        assert!(value["libtorch"].as_str().unwrap().starts_with("2."), "{text}");
        assert!(value["threads"].as_i64().unwrap() >= 1, "{text}");
        assert_eq!(value["cores"]["allowed"], allowed_cores());
        fs_err::remove_dir_all(dir).unwrap();
    }

    fn tempfile_dir() -> std::path::PathBuf {
        let dir = std::env::temp_dir().join(format!("arete-machine-{}", std::process::id()));
        fs_err::create_dir_all(&dir).unwrap();
        dir
    }
}
