//! Settings of `score`: flags, and the `[scoring]` table of a recipe.

use arete_model::generate::Sampling;
use arete_model::{LoadOptions, Nf4Options, default_dtype};
use clap::ArgAction;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use crate::Error;

/// Number format of weights and activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// bf16 where the device computes in it, else f32.
    Auto,
    /// 32-bit floats.
    F32,
    /// 16-bit floats with the range of f32.
    Bf16,
    /// 16-bit floats, on a GPU; on the CPU as `auto`.
    F16,
}

/// Settings of scoring.
#[derive(Clone, Debug, PartialEq, clap::Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScoreConfig {
    /// Most test prompts to answer, the first of the file; 0 = all of them
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub n_prompts: usize,
    /// Most tokens sampled in one turn (as the conversations the reward models learned from)
    #[arg(long, default_value_t = 96, value_name = "N")]
    pub max_new_tokens: usize,
    /// Sampling temperature; 0 takes the most probable token
    #[arg(long, default_value_t = 0.7, value_name = "T")]
    pub temperature: f64,
    /// Only the k most probable tokens; 0 = all
    #[arg(long, default_value_t = 0, value_name = "K")]
    pub top_k: usize,
    /// Only the smallest set of tokens with this probability mass; 1 = all
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    pub top_p: f64,
    /// Most labelled pairs of --pairs to use, the first of the file; 0 = all of them
    #[arg(long, default_value_t = 200, value_name = "N")]
    pub max_pairs: usize,
    /// Redraws of every bootstrap
    #[arg(long, default_value_t = 10_000, value_name = "N")]
    pub draws: usize,
    /// Most tokens in one forward pass (a longer conversation goes alone); changes scores only by rounding
    #[arg(long, default_value_t = 2048, value_name = "N")]
    pub micro_batch_tokens: usize,
    /// Pack every model's blocks to NF4 at load (as the reward models' base was, if it was)
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub nf4: bool,
    /// Quantise the NF4 scales as well
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub double_quantize: bool,
    /// Number format of weights and activations
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    /// Where to compute: cpu, cuda, cuda:N, or auto
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// CPU threads; 0 = one a core
    #[arg(long, default_value_t = 0)]
    pub threads: u32,
    /// Seed of the replies' random streams and of the bootstrap
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl ScoreConfig {
    /// Refuses settings that no run can use.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`].
    pub fn check(&self) -> Result<(), Error> {
        for (name, value) in [
            ("max_new_tokens", self.max_new_tokens),
            ("draws", self.draws),
            ("micro_batch_tokens", self.micro_batch_tokens),
        ] {
            if value == 0 {
                return Err(setting(name, "at least 1", "0"));
            }
        }
        Ok(())
    }

    /// How replies are drawn.
    pub fn sampling(&self) -> Sampling {
        Sampling { temperature: self.temperature, top_k: self.top_k, top_p: self.top_p }
    }

    /// How models are loaded; sets the number of CPU threads.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] if there is no such device.
    pub fn load_options(&self) -> Result<LoadOptions, Error> {
        if let Ok(threads @ 1..) = i32::try_from(self.threads) {
            tch::set_num_threads(threads);
        }
        let device = device(&self.device)?;
        let dtype = match self.dtype {
            Dtype::F32 => Kind::Float,
            Dtype::Bf16 => Kind::BFloat16,
            Dtype::F16 if device != Device::Cpu => Kind::Half,
            Dtype::Auto | Dtype::F16 => default_dtype(device),
        };
        let nf4 = self
            .nf4
            .then(|| Nf4Options { double_quantize: self.double_quantize, ..Nf4Options::default() });
        Ok(LoadOptions { device, dtype, nf4 })
    }
}

fn device(name: &str) -> Result<Device, Error> {
    let n_gpus = if tch::Cuda::is_available() { tch::Cuda::device_count() } else { 0 };
    let gpu = match name {
        "cpu" => return Ok(Device::Cpu),
        "auto" if n_gpus == 0 => return Ok(Device::Cpu),
        "auto" | "cuda" => Some(0),
        other => other.strip_prefix("cuda:").and_then(|number| number.parse::<usize>().ok()),
    };
    match gpu {
        Some(gpu) if i64::try_from(gpu).is_ok_and(|gpu| gpu < n_gpus) => Ok(Device::Cuda(gpu)),
        _ => {
            let expected = format!("cpu, auto, cuda or cuda:N with N below {n_gpus}");
            Err(setting("device", &expected, name))
        }
    }
}

pub(crate) fn setting(name: &'static str, expected: &str, got: &str) -> Error {
    Error::Setting { name, expected: expected.to_owned(), got: got.to_owned() }
}

/// `f32`, `bf16` or `f16`.
pub(crate) fn dtype_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Float => "f32",
        Kind::BFloat16 => "bf16",
        Kind::Half => "f16",
        _ => "other",
    }
}

/// `cpu` or `cuda:N`.
pub(crate) fn device_name(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        _ => "cpu".to_owned(),
    }
}
