//! Four-bit matrices as bitsandbytes stores them in safetensors: the codes under the weight's own name, the
//! scales and their description beside it.

use serde::Deserialize;
use tch::{Kind, Tensor};

use super::safetensors::SafetensorsFile;
use crate::Error;
use crate::nf4::{self, Nf4Tensor};

const STATE: &str = ".quant_state.bitsandbytes__nf4";
const PARTS: [&str; 4] = [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"];

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
pub(super) fn packed_shape(file: &SafetensorsFile, name: &str) -> Result<Option<Vec<i64>>, Error> {
    Ok(state(file, name)?.map(|state| state.shape))
}

fn state(file: &SafetensorsFile, name: &str) -> Result<Option<State>, Error> {
    let key = format!("{name}{STATE}");
    if !file.contains(&key) {
        if file.names().any(|other| other.starts_with(&format!("{name}.quant_state."))) {
            let expected = "NF4 (the only four-bit type read here)";
            return Err(Error::field(file.path(), name, expected, "another four-bit type"));
        }
        return Ok(None);
    }
    let bytes: Vec<u8> = Vec::try_from(&file.tensor(&key)?.to_kind(Kind::Uint8).view([-1]))
        .map_err(|_| Error::field(file.path(), &key, "bytes of JSON", "another dtype"))?;
    let state: State = serde_json::from_slice(&bytes)
        .map_err(|error| Error::field(file.path(), &key, "a quantisation state", error.to_string()))?;
    let sizes_fit = state.shape.len() == 2
        && state.shape.iter().all(|size| (1..1 << 31).contains(size))
        && state.blocksize > 0
        && (state.shape[0] * state.shape[1]) % state.blocksize == 0;
    if state.quant_type != "nf4" || !sizes_fit {
        let found = format!("{} {:?} in blocks of {}", state.quant_type, state.shape, state.blocksize);
        return Err(Error::field(file.path(), &key, "nf4, a matrix of whole blocks", found));
    }
    Ok(Some(state))
}

/// The packed matrix of that name, with its scales expanded; None if it is stored dense.
pub(super) fn read(file: &SafetensorsFile, name: &str) -> Result<Option<Nf4Tensor>, Error> {
    let Some(state) = state(file, name)? else { return Ok(None) };
    let (outputs, inputs) = (state.shape[0], state.shape[1]);
    let elements = outputs * inputs;
    let part = |suffix: &str, kind: Kind, n: i64| -> Result<Tensor, Error> {
        let key = format!("{name}{suffix}");
        let tensor = file.tensor(&key)?;
        if tensor.kind() != kind || tensor.numel() as i64 != n {
            let found = format!("{:?} {:?}", tensor.kind(), tensor.size());
            return Err(Error::field(file.path(), key, format!("{n} of {kind:?}"), found));
        }
        Ok(tensor.view([-1]))
    };
    let codes = part("", Kind::Uint8, elements / 2)?;
    let codebook = part(".quant_map", Kind::Float, 16)?;
    let blocks = elements / state.blocksize;
    let absmax = match (state.nested_blocksize, state.nested_offset) {
        (Some(nested_blocksize), Some(offset)) if nested_blocksize > 0 => {
            let codes = part(".absmax", Kind::Uint8, blocks)?;
            let map = part(".nested_quant_map", Kind::Float, 256)?;
            let n_scales = (blocks as usize).div_ceil(nested_blocksize) as i64;
            let scales = part(".nested_absmax", Kind::Float, n_scales)?;
            nf4::expand_absmax(&codes, &map, &scales, nested_blocksize, offset)
        }
        _ => part(".absmax", Kind::Float, blocks)?,
    };
    let block_size = state.blocksize;
    Ok(Some(Nf4Tensor { codes, absmax, codebook, outputs, inputs, block_size }))
}
