//! Four-bit matrices as bitsandbytes stores them in safetensors: the codes under the weight's own name, the
//! scales and their description beside it.

use serde::Deserialize;
use tch::{Kind, Tensor};

use super::{Weights, bytes};
use crate::Error;
use crate::nf4::{CODEBOOK, Nf4Tensor, Scales};

const STATE: &str = ".quant_state.bitsandbytes__nf4";
const PARTS: [&str; 4] = [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"];

/// A description of a matrix has some two hundred bytes.
const MAX_STATE_BYTES: u64 = 1 << 16;
/// bitsandbytes' largest block, and far above its 256 for the second quantisation.
const MAX_BLOCK: i64 = 4096;
const MAX_NESTED_BLOCK: usize = 1 << 16;
/// Writers differ in the last bit of the codebook, no more.
const CODEBOOK_TOLERANCE: f64 = 1e-6;

/// bitsandbytes' description of a packed matrix, the part that is needed.
#[derive(Deserialize)]
struct State {
    quant_type: String,
    blocksize: i64,
    shape: Vec<i64>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f32>,
}

/// Whether a tensor belongs to a packed matrix of another name.
pub(super) fn is_part(name: &str) -> bool {
    name.contains(".weight.")
        && (name.contains(".quant_state.") || PARTS.iter().any(|part| name.ends_with(part)))
}

/// The unpacked shape, if `name` is packed.
pub(super) fn packed_shape(weights: &Weights, name: &str) -> Result<Option<Vec<i64>>, Error> {
    Ok(state(weights, name)?.map(|state| state.shape))
}

fn state(weights: &Weights, name: &str) -> Result<Option<State>, Error> {
    let key = format!("{name}{STATE}");
    if !weights.contains(&key) {
        let other = format!("{name}.quant_state.");
        return match weights.place.range(other.clone()..).next() {
            Some((found, _)) if found.starts_with(&other) => {
                let expected = "NF4 (the only four-bit type read here)";
                Err(Error::field(&weights.path, name, expected, found.clone()))
            }
            _ => Ok(None),
        };
    }
    let file = weights.file_of(&key)?;
    let fail = |expected: &str, found: String| Error::field(file.path(), &key, expected, found);
    let n_bytes = file.shape(&key).and_then(|shape| shape.iter().product::<i64>().try_into().ok());
    if file.kind(&key) != Some(Kind::Uint8) || n_bytes.is_none_or(|n: u64| n > MAX_STATE_BYTES) {
        let found = format!("{:?} {:?}", file.kind(&key), file.shape(&key));
        return Err(fail(&format!("at most {MAX_STATE_BYTES} bytes of JSON"), found));
    }
    let bytes = Vec::<u8>::try_from(&file.tensor(&key)?.view([-1]))?;
    let state: State = serde_json::from_slice(&bytes)
        .map_err(|error| fail("a quantisation state", error.to_string()))?;
    let sizes_fit = state.shape.len() == 2
        && state.shape.iter().all(|size| (1..1 << 31).contains(size))
        && (1..=MAX_BLOCK).contains(&state.blocksize)
        && state.nested_blocksize.is_none_or(|size| (1..=MAX_NESTED_BLOCK).contains(&size))
        && state.blocksize % 2 == 0
        && (state.shape[0] * state.shape[1]) % state.blocksize == 0;
    if state.quant_type != "nf4" || !sizes_fit {
        let State { quant_type, shape, blocksize, nested_blocksize, .. } = &state;
        let found =
            format!("{quant_type} {shape:?} in blocks of {blocksize}, {nested_blocksize:?} nested");
        return Err(fail("nf4, a matrix of whole blocks", found));
    }
    Ok(Some(state))
}

/// The packed matrix of that name; None if it is stored dense.
pub(super) fn read(weights: &Weights, name: &str) -> Result<Option<Nf4Tensor>, Error> {
    let Some(state) = state(weights, name)? else { return Ok(None) };
    let (outputs, inputs) = (state.shape[0], state.shape[1]);
    let elements = outputs * inputs;
    let codes = codes(weights, name, elements / 2)?;
    let part = |suffix: &str, kind: Kind, n: i64| -> Result<Tensor, Error> {
        let key = format!("{name}{suffix}");
        let file = weights.file_of(&key)?;
        let shape = file.shape(&key).unwrap_or_default();
        if file.kind(&key) != Some(kind) || shape.iter().product::<i64>() != n {
            let found = format!("{:?} {shape:?}", file.kind(&key));
            return Err(Error::field(file.path(), key, format!("{n} of {kind:?}"), found));
        }
        Ok(file.tensor(&key)?.view([-1]))
    };
    let codebook = part(".quant_map", Kind::Float, 16)?;
    let largest = (&codebook - Tensor::from_slice(&CODEBOOK)).abs().max().double_value(&[]);
    if largest.is_nan() || largest > CODEBOOK_TOLERANCE {
        let path = weights.file_of(&format!("{name}.quant_map"))?.path();
        let found = format!("numbers off by up to {largest:e}");
        return Err(Error::field(
            path,
            format!("{name}.quant_map"),
            "NF4's sixteen numbers",
            found,
        ));
    }
    let blocks = elements / state.blocksize;
    let absmax = match (state.nested_blocksize, state.nested_offset) {
        (Some(nested_blocksize), Some(offset)) => {
            let codes = part(".absmax", Kind::Uint8, blocks)?;
            let map = part(".nested_quant_map", Kind::Float, 256)?;
            let n_scales = (blocks as usize).div_ceil(nested_blocksize) as i64;
            let scales = part(".nested_absmax", Kind::Float, n_scales)?;
            Scales::of_parts(codes, map, &scales, nested_blocksize, offset)
        }
        _ => Scales::Single(part(".absmax", Kind::Float, blocks)?),
    };
    let expanded = absmax.expand().contiguous();
    let place = bytes::first_non_finite(Kind::Float, bytes::bytes_of(&expanded));
    if let Some(place) = place {
        let path = weights.file_of(name)?.path();
        return Err(bytes::not_finite(path, &format!("{name}.absmax"), place));
    }
    let block_size = state.blocksize;
    Ok(Some(Nf4Tensor { codes, absmax, codebook, outputs, inputs, block_size }))
}

/// The packed codes as bytes. bitsandbytes can store them under another dtype (`bnb_4bit_quant_storage`, which FSDP needs): the
/// bytes are the same.
fn codes(weights: &Weights, name: &str, n: i64) -> Result<Tensor, Error> {
    let file = weights.file_of(name)?;
    let shape = file.shape(name).unwrap_or_default();
    let (kind, count) = (file.kind(name), shape.iter().product::<i64>());
    let width = kind.map_or(0, |kind| kind.elt_size_in_bytes() as i64);
    let known = [Kind::Uint8, Kind::BFloat16, Kind::Half, Kind::Float].map(Some).contains(&kind);
    if !known || count * width != n {
        let found = format!("{kind:?} {shape:?}");
        let expected =
            format!("{n} bytes of codes, stored as U8, BF16, F16 or F32 (bnb_4bit_quant_storage)");
        return Err(Error::field(file.path(), name, expected, found));
    }
    file.raw(name)
}
