//! Numbers as bytes, random ones, and the values bitsandbytes made.

use arete_model::cuda::plan::Format;
use half::{bf16, f16};
use safetensors::SafeTensors;

use crate::machine::CRATE;

pub(crate) fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

pub(crate) fn floats(bytes: &[u8]) -> Vec<f32> {
    numbers(bytes, Format::F32)
}

pub(crate) fn numbers(bytes: &[u8], format: Format) -> Vec<f32> {
    match format {
        Format::F32 => bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().expect("four bytes")))
            .collect(),
        Format::BF16 => {
            bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
        }
        Format::F16 => {
            bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
        }
    }
}

pub(crate) fn encoded(values: &[f32], format: Format) -> Vec<u8> {
    match format {
        Format::F32 => bytes_of(values),
        Format::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        Format::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
    }
}

/// What rounding to the format may change, relative to the number.
pub(crate) fn epsilon(format: Format) -> f64 {
    match format {
        Format::F32 => 0.0,
        Format::BF16 => 2f64.powi(-8),
        Format::F16 => 2f64.powi(-11),
    }
}

/// Uniform in [-1, 1).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    pub(crate) fn number(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / 8_388_608.0 - 1.0
    }
}

pub(crate) struct Goldens(Vec<u8>);

impl Goldens {
    pub(crate) fn read(file: &str) -> Self {
        Self(fs_err::read(format!("{CRATE}/tests/goldens/{file}")).expect("the goldens exist"))
    }
    pub(crate) fn get(&self, name: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.0)
            .and_then(|file| file.tensor(name).map(|tensor| tensor.data().to_vec()))
            .unwrap_or_else(|error| panic!("{name}: {error}"))
    }
    pub(crate) fn shape(&self, name: &str) -> Vec<usize> {
        let file = SafeTensors::deserialize(&self.0).expect("checked in get");
        file.tensor(name).expect("checked in get").shape().to_vec()
    }
}
