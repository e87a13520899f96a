//! Unpacking of GGUF's quantised blocks, with the float operations in the order of the PyPI package `gguf`.

use half::{bf16, f16};
use tch::Kind;

use super::GgmlType;

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Rounds each element once, to nearest even, into the bits of `kind` (bf16 or f16).
pub(super) fn round(wide: &[f32], kind: Kind, out: &mut [u16]) {
    for (out, &value) in out.iter_mut().zip(wide) {
        *out = match kind {
            Kind::BFloat16 => bf16::from_f32(value).to_bits(),
            _ => f16::from_f32(value).to_bits(),
        };
    }
}

/// The six-bit scales and minima of a K-quant block of 256, eight of each in twelve bytes.
fn k_scales(packed: &[u8]) -> ([u8; 8], [u8; 8]) {
    let (mut scales, mut minima) = ([0; 8], [0; 8]);
    for i in 0..4 {
        scales[i] = packed[i] & 63;
        minima[i] = packed[4 + i] & 63;
        scales[4 + i] = (packed[8 + i] & 15) | ((packed[i] >> 6) << 4);
        minima[4 + i] = (packed[8 + i] >> 4) | ((packed[4 + i] >> 6) << 4);
    }
    (scales, minima)
}

impl GgmlType {
    /// Unpacks one stored row into `out` (as many elements as the row has).
    pub(super) fn to_f32(self, row: &[u8], out: &mut [f32]) {
        let (n, n_bytes) = self.block();
        let convert: fn(&[u8], &mut [f32]) = match self {
            Self::F32 => |block, out| {
                out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
            },
            Self::F16 => |block, out| out[0] = half_at(block, 0),
            Self::BF16 => |block, out| out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32(),
            Self::Q8_0 => q8_0,
            Self::Q4_0 => q4_0,
            Self::Q4_1 => q4_1,
            Self::Q5_0 => q5_0,
            Self::Q5_1 => q5_1,
            Self::Q4_K => q4_k,
            Self::Q5_K => q5_k,
            Self::Q6_K => q6_k,
        };
        for (block, out) in row.chunks_exact(n_bytes).zip(out.chunks_exact_mut(n)) {
            convert(block, out);
        }
    }
}

fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (out, &q) in out.iter_mut().zip(&block[2..]) {
        *out = f32::from(q.cast_signed()) * d;
    }
}

fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (i, &q) in block[2..18].iter().enumerate() {
        out[i] = d * (f32::from(q & 15) - 8.0);
        out[16 + i] = d * (f32::from(q >> 4) - 8.0);
    }
}

fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (i, &q) in block[4..20].iter().enumerate() {
        out[i] = d * f32::from(q & 15) + m;
        out[16 + i] = d * f32::from(q >> 4) + m;
    }
}

/// The 32 fifth bits of a block.
fn high_bits(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

fn q5_0(block: &[u8], out: &mut [f32]) {
    let (d, high) = (half_at(block, 0), high_bits(block, 2));
    for (i, &q) in block[6..22].iter().enumerate() {
        let low_five = u32::from(q & 15) | (((high >> i) & 1) << 4);
        let high_five = u32::from(q >> 4) | (((high >> (16 + i)) & 1) << 4);
        out[i] = d * (low_five as f32 - 16.0);
        out[16 + i] = d * (high_five as f32 - 16.0);
    }
}

fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m, high) = (half_at(block, 0), half_at(block, 2), high_bits(block, 4));
    for (i, &q) in block[8..24].iter().enumerate() {
        let low_five = u32::from(q & 15) | (((high >> i) & 1) << 4);
        let high_five = u32::from(q >> 4) | (((high >> (16 + i)) & 1) << 4);
        out[i] = d * low_five as f32 + m;
        out[16 + i] = d * high_five as f32 + m;
    }
}

fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, d_min) = (half_at(block, 0), half_at(block, 2));
    let (scales, minima) = k_scales(&block[4..16]);
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, minimum) = (d * f32::from(scales[part]), d_min * f32::from(minima[part]));
        let codes = &block[16 + part / 2 * 32..][..32];
        for (out, &q) in out.iter_mut().zip(codes) {
            let code = if part % 2 == 0 { q & 15 } else { q >> 4 };
            *out = scale * f32::from(code) - minimum;
        }
    }
}

fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, d_min) = (half_at(block, 0), half_at(block, 2));
    let (scales, minima) = k_scales(&block[4..16]);
    let high = &block[16..48];
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, minimum) = (d * f32::from(scales[part]), d_min * f32::from(minima[part]));
        let codes = &block[48 + part / 2 * 32..][..32];
        for (i, (out, &q)) in out.iter_mut().zip(codes).enumerate() {
            let code = if part % 2 == 0 { q & 15 } else { q >> 4 };
            *out = scale * f32::from(code | (((high[i] >> part) & 1) << 4)) - minimum;
        }
    }
}

fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    for (i, out) in out.iter_mut().enumerate() {
        // Two halves of 128; in each, four runs of 32 share the bytes of `high`.
        let (half, run, at) = (i / 128, i % 128 / 32, i % 32);
        let low_byte = low[half * 64 + (run % 2) * 32 + at];
        let low_bits = if run < 2 { low_byte & 15 } else { low_byte >> 4 };
        let high_two = (high[half * 32 + at] >> (2 * run)) & 3;
        let code = (low_bits | (high_two << 4)).cast_signed() - 32;
        let scale = d * f32::from(scales[i / 16].cast_signed());
        *out = scale * f32::from(code);
    }
}
