//! NF4: four-bit normal-float weights in bitsandbytes' format, bit for bit.
//!
//! A matrix is cut into blocks of 64 consecutive elements. Each block is scaled by its largest magnitude
//! (`absmax`) and every element becomes the nearest of 16 fixed numbers; two codes share a byte, the first
//! element in the high nibble. Double quantisation stores `absmax` itself in eight bits.
//!
//! # Source
//!
//! Dettmers et al. 2023 (arXiv:2305.14314); thresholds and codebook as in bitsandbytes.

use tch::{Kind, Tensor};

use crate::{Error, ops};

mod packing;

pub use packing::write_packed;

/// The 16 numbers an element can become, before scaling, in rising order.
pub const CODEBOOK: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// How weights are packed at load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nf4Options {
    /// Store `absmax` in eight bits, as bitsandbytes' `compress_statistics`.
    pub double_quantize: bool,
    /// Elements per `absmax`; bitsandbytes' default is 64.
    pub block_size: usize,
}

impl Default for Nf4Options {
    fn default() -> Self {
        Self { double_quantize: true, block_size: 64 }
    }
}

/// A packed matrix.
///
/// # Shapes
///
/// - `codes`: `[ceil(outputs · inputs / 2)]` u8, first element of a pair in the high nibble.
/// - `absmax`: of `ceil(outputs · inputs / block_size)` blocks.
/// - `codebook`: `[16]` f32.
#[derive(Debug)]
pub struct Nf4Tensor {
    /// Packed codes.
    pub codes: Tensor,
    /// One scale a block.
    pub absmax: Scales,
    /// The numbers the codes stand for.
    pub codebook: Tensor,
    /// Rows of the matrix.
    pub outputs: i64,
    /// Columns of the matrix.
    pub inputs: i64,
    /// Elements a block.
    pub block_size: i64,
}

impl Nf4Tensor {
    /// Packs `weight` `[out, in]` (f32, bf16 or f16).
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if `weight` is not a matrix or does not fill whole blocks.
    pub fn quantize(weight: &Tensor, options: Nf4Options) -> Result<Self, Error> {
        let size = weight.size();
        let block_size = options.block_size as i64;
        let [outputs, inputs] = size[..] else {
            return Err(Error::Shape { name: "weight", expected: vec![-1, -1], got: size });
        };
        if (outputs * inputs) % block_size != 0 || block_size % 2 != 0 || block_size <= 0 {
            return Err(Error::Shape { name: "weight", expected: vec![-1, block_size], got: size });
        }
        let weight = match weight.kind() {
            Kind::Float | Kind::BFloat16 => weight.contiguous(),
            _ => weight.to_kind(Kind::Float).contiguous(),
        };
        let cpu = (Kind::Float, tch::Device::Cpu);
        let codes = Tensor::zeros([outputs * inputs / 2], (Kind::Uint8, tch::Device::Cpu));
        let absmax = Tensor::zeros([outputs * inputs / block_size], cpu);
        let codebook = Tensor::from_slice(&CODEBOOK);
        let weight = weight.to_device(tch::Device::Cpu);
        ops::nf4_quantize(&weight, &codebook, block_size, &codes, &absmax)?;
        let absmax = match options.double_quantize {
            true => NestedAbsmax::quantize(&absmax).scales(),
            false => Scales::Single(absmax),
        };
        Ok(Self { codes, absmax, codebook, outputs, inputs, block_size })
    }

    /// The matrix `[out, in]` in `kind` (f32 or bf16).
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if libtorch cannot allocate it.
    pub fn dequantize(&self, kind: Kind) -> Result<Tensor, Error> {
        ops::nf4_dequantize(self, kind)
    }

    /// Matrices with the same number of columns, one below the other.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless they are packed alike: one block size, one codebook, a scale for every block.
    pub(crate) fn stack(parts: &[Self]) -> Result<Self, Error> {
        let first = &parts[0];
        for part in parts {
            let blocks = part.outputs * part.inputs / first.block_size;
            let alike = part.block_size == first.block_size
                && part.inputs == first.inputs
                && part.absmax.n_blocks() as i64 == blocks
                && part.codebook.equal(&first.codebook);
            if !alike {
                let describe = |part: &Self| {
                    let (n, size) = (part.absmax.n_blocks(), part.block_size);
                    format!("{} columns, {n} blocks of {size}", part.inputs)
                };
                return Err(Error::Invalid {
                    name: "packed matrices held as one",
                    expected: format!(
                        "the same packing and codebook as the first: {}",
                        describe(first)
                    ),
                    got: describe(part),
                });
            }
        }
        let codes: Vec<&Tensor> = parts.iter().map(|part| &part.codes).collect();
        let absmax: Vec<&Scales> = parts.iter().map(|part| &part.absmax).collect();
        Ok(Self {
            codes: Tensor::f_cat(&codes, 0)?,
            absmax: Scales::stack(&absmax)?,
            codebook: first.codebook.shallow_clone(),
            outputs: parts.iter().map(|part| part.outputs).sum(),
            inputs: first.inputs,
            block_size: first.block_size,
        })
    }

    /// The first `outputs` rows, which must fill whole blocks.
    pub(crate) fn first_rows(&self, outputs: i64) -> Self {
        let n = outputs * self.inputs;
        Self {
            codes: self.codes.narrow(0, 0, n / 2),
            absmax: self.absmax.first(n / self.block_size),
            codebook: self.codebook.shallow_clone(),
            outputs,
            ..*self
        }
    }

    /// On a device whose kernels read scales of eight bits as they are, or with scales in f32 for the CPU's, which do not.
    pub(crate) fn placed(self, device: tch::Device, reads_double: bool) -> Self {
        let absmax = if reads_double { self.absmax } else { self.absmax.to_single() };
        Self {
            codes: self.codes.to_device(device),
            absmax: absmax.to_device(device),
            codebook: self.codebook.to_device(device),
            ..self
        }
    }

    /// Bytes held.
    pub fn n_bytes(&self) -> usize {
        self.codes.numel() + self.absmax.n_bytes()
    }
}

/// The scales of a matrix's blocks.
///
/// # Shapes
///
/// - `codes`: `[blocks]` u8; `map`: `[256]` f32; `nested`: `[ceil(blocks / 256), 2]` f32, a factor and an addend.
#[derive(Debug)]
pub enum Scales {
    /// `[blocks]` f32.
    Single(Tensor),
    /// Eight bits each: `map[code] · nested[block / 256][0] + nested[block / 256][1]`.
    Double {
        /// One code a block.
        codes: Tensor,
        /// What the codes stand for.
        map: Tensor,
        /// Factor and addend of every 256 blocks.
        nested: Tensor,
    },
}

impl Scales {
    /// Scales of eight bits as bitsandbytes stores them: in f32 where their own blocks are not of [`NESTED_BLOCK`], which kernels
    /// take.
    pub(crate) fn of_parts(
        codes: Tensor,
        map: Tensor,
        scales: &Tensor,
        block: usize,
        offset: f32,
    ) -> Self {
        if block != NESTED_BLOCK {
            return Self::Single(expand_absmax(&codes, &map, scales, block, offset));
        }
        let addends = scales.full_like(f64::from(offset));
        Self::Double { codes, map, nested: Tensor::stack(&[scales, &addends], 1) }
    }

    /// Blocks that have one.
    pub fn n_blocks(&self) -> usize {
        match self {
            Self::Single(absmax) => absmax.numel(),
            Self::Double { codes, .. } => codes.numel(),
        }
    }

    fn n_bytes(&self) -> usize {
        match self {
            Self::Single(absmax) => 4 * absmax.numel(),
            Self::Double { codes, map, nested } => {
                codes.numel() + 4 * (map.numel() + nested.numel())
            }
        }
    }

    /// Each in f32: `[blocks]`.
    pub fn expand(&self) -> Tensor {
        match self {
            Self::Single(absmax) => absmax.shallow_clone(),
            Self::Double { codes, map, nested } => expand_nested(codes, map, nested),
        }
    }

    fn to_single(&self) -> Self {
        Self::Single(self.expand())
    }

    /// Those of matrices one below the other. Eight bits stay eight bits where every matrix but the last has whole groups of
    /// [`NESTED_BLOCK`] blocks (any 7B model's do) and all have one map; else a group would have two factors.
    fn stack(parts: &[&Self]) -> Result<Self, Error> {
        let (last, others) = parts.split_last().expect("at least one matrix");
        let whole = others.iter().all(|part| part.n_blocks().is_multiple_of(NESTED_BLOCK));
        if let (Self::Double { map, .. }, true) = (last, whole) {
            let doubled = |part: &&Self| match part {
                Self::Double { codes, map: own, nested } if own.equal(map) => {
                    Some((codes.shallow_clone(), nested.shallow_clone()))
                }
                _ => None,
            };
            if let Some(parts) = parts.iter().map(doubled).collect::<Option<Vec<_>>>() {
                let (codes, nested): (Vec<Tensor>, Vec<Tensor>) = parts.into_iter().unzip();
                return Ok(Self::Double {
                    codes: Tensor::f_cat(&codes, 0)?,
                    map: map.shallow_clone(),
                    nested: Tensor::f_cat(&nested, 0)?,
                });
            }
        }
        let parts: Vec<Tensor> = parts.iter().map(|part| part.expand()).collect();
        Ok(Self::Single(Tensor::f_cat(&parts, 0)?))
    }

    /// Those of the first `n` blocks.
    fn first(&self, n: i64) -> Self {
        match self {
            Self::Single(absmax) => Self::Single(absmax.narrow(0, 0, n)),
            Self::Double { codes, map, nested } => {
                let groups = n.cast_unsigned().div_ceil(NESTED_BLOCK as u64).cast_signed();
                Self::Double {
                    codes: codes.narrow(0, 0, n),
                    map: map.shallow_clone(),
                    nested: nested.narrow(0, 0, groups),
                }
            }
        }
    }

    /// On a device.
    pub fn to_device(&self, device: tch::Device) -> Self {
        match self {
            Self::Single(absmax) => Self::Single(absmax.to_device(device)),
            Self::Double { codes, map, nested } => Self::Double {
                codes: codes.to_device(device),
                map: map.to_device(device),
                nested: nested.to_device(device),
            },
        }
    }
}

/// Elements per block of the second quantisation.
pub const NESTED_BLOCK: usize = 256;

/// `absmax` in eight bits: the offset (its mean) taken off, then blocks of 256 scaled by their largest
/// magnitude and coded by bitsandbytes' signed dynamic map.
#[derive(Debug, Clone, PartialEq)]
pub struct NestedAbsmax {
    /// One code a block of weights.
    pub codes: Vec<u8>,
    /// One scale per 256 codes.
    pub absmax: Vec<f32>,
    /// The mean of the original `absmax`.
    pub offset: f32,
}

impl NestedAbsmax {
    /// Codes `absmax` `[n]` f32.
    pub fn quantize(absmax: &Tensor) -> Self {
        let offset = absmax.mean(Kind::Float).double_value(&[]) as f32;
        let values: Vec<f32> =
            Vec::try_from(&absmax.to_kind(Kind::Float).view([-1])).expect("absmax is f32");
        let map = dynamic_map();
        let mut codes = Vec::with_capacity(values.len());
        let mut scales = Vec::new();
        for block in values.chunks(NESTED_BLOCK) {
            let shifted: Vec<f32> = block.iter().map(|value| value - offset).collect();
            let largest = shifted.iter().fold(0f32, |top, value| top.max(value.abs()));
            scales.push(largest);
            for value in shifted {
                let scaled = if largest > 0.0 { value / largest } else { 0.0 };
                codes.push(nearest(&map, scaled.clamp(-1.0, 1.0)));
            }
        }
        Self { codes, absmax: scales, offset }
    }

    /// As a packed matrix holds them.
    pub fn scales(&self) -> Scales {
        let (codes, map) = (Tensor::from_slice(&self.codes), Tensor::from_slice(&dynamic_map()));
        Scales::of_parts(codes, map, &Tensor::from_slice(&self.absmax), NESTED_BLOCK, self.offset)
    }
}

/// `map[code] · scale + offset` per code: `[n]` f32.
///
/// # Shapes
///
/// - `codes`: `[n]` u8; `map`: `[256]` f32; `scales`: `[ceil(n / block)]` f32.
fn expand_absmax(
    codes: &Tensor,
    map: &Tensor,
    scales: &Tensor,
    block: usize,
    offset: f32,
) -> Tensor {
    let n = codes.size()[0];
    let scales = scales.repeat_interleave_self_int(block as i64, 0, None).narrow(0, 0, n); // [n]
    map.index_select(0, &codes.to_kind(Kind::Int64)) * scales + f64::from(offset)
}

/// `map[code] · nested[i / 256][0] + nested[i / 256][1]` per code: `[n]` f32.
///
/// # Shapes
///
/// - `codes`: `[n]` u8; `map`: `[256]` f32; `nested`: `[ceil(n / 256), 2]` f32.
fn expand_nested(codes: &Tensor, map: &Tensor, nested: &Tensor) -> Tensor {
    let n = codes.numel() as i64;
    let pairs = nested.view([-1, 2]).repeat_interleave_self_int(NESTED_BLOCK as i64, 0, None);
    let pairs = pairs.narrow(0, 0, n); // [n, 2]
    let entries = map.index_select(0, &codes.view([-1]).to_kind(Kind::Int64));
    entries * pairs.select(1, 0) + pairs.select(1, 1)
}

/// Index of the entry of the rising `map` nearest to `x`; the lower one of two equally near.
fn nearest(map: &[f32; 256], x: f32) -> u8 {
    let above = map.partition_point(|&entry| entry < x).min(255);
    let below = above.saturating_sub(1);
    let idx = if (x - map[below]).abs() <= (map[above] - x).abs() { below } else { above };
    u8::try_from(idx).expect("the map has 256 entries")
}

/// bitsandbytes' `create_dynamic_map(signed=True, max_exponent_bits=7, total_bits=8)`, rising.
///
/// # Source
///
/// bitsandbytes `functional.create_dynamic_map`; Dettmers 2016 (arXiv:1511.04561).
pub fn dynamic_map() -> [f32; 256] {
    let mut entries: Vec<f32> = vec![0.0, 1.0]; // all arithmetic in f32, as in PyTorch
    for exponent in 0..7i32 {
        let items = (1usize << exponent) + 1; // boundaries; their midpoints are the entries
        let boundaries = linspace(0.1, 1.0, items);
        let scale = 10f64.powi(exponent - 6);
        for pair in boundaries.windows(2) {
            let entry = scale as f32 * ((pair[0] + pair[1]) / 2.0);
            entries.push(entry);
            entries.push(-entry);
        }
    }
    let mut out = [0f32; 256];
    assert_eq!(entries.len(), 256, "127 midpoints of each sign, 0 and 1");
    entries.sort_by(f32::total_cmp);
    out.copy_from_slice(&entries);
    out
}

/// PyTorch's `linspace` in f32: from both ends towards the middle, with fused multiply-adds.
fn linspace(start: f32, end: f32, n: usize) -> Vec<f32> {
    let step = (end - start) / (n - 1) as f32;
    let at = |i: usize| match i < n / 2 {
        true => step.mul_add(i as f32, start),
        false => (-step).mul_add((n - 1 - i) as f32, end),
    };
    (0..n).map(at).collect()
}

#[cfg(test)]
mod tests;
