//! Writing a model in four bits: a Hugging Face directory as transformers saves it with bitsandbytes.
//!
//! The blocks' matrices become codes, scales and a description each; everything else stays dense. Tensors are read, packed
//! and written one at a time. Files are read back by [`crate::Checkpoint`] and by transformers alike.
//!
//! # Source
//!
//! bitsandbytes 0.50 `functional.QuantState.as_dict(packed=True)`.

use std::path::Path;

use arete_records::atomic::AtomicDir;
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use crate::Error;
use crate::adapter::merge::{ShardWriter, linear_of, put_in_place, write_settings};
use crate::checkpoint::{Checkpoint, Source};
use crate::nf4::{NESTED_BLOCK, NestedAbsmax, Nf4Options, Nf4Tensor, dynamic_map};

/// Writes `source` with the matrices of its blocks in NF4 and the rest in `dtype`. What else is there under the name of
/// `output` is set aside as `OUTPUT.old-N`.
///
/// # Errors
///
/// What is wrong with the source (a scalar head is not supported: such a model is written dense by
/// [`crate::adapter::merge`]), or [`Error::Io`] if writing fails; nothing is left under `output` then.
pub fn write_packed(
    source: &Source,
    output: &Path,
    options: Nf4Options,
    dtype: Kind,
) -> Result<(), Error> {
    let _guard = tch::no_grad_guard();
    let checkpoint = Checkpoint::open(source)?;
    let config = checkpoint.config();
    if config.sequence_classification {
        return Err(Error::Invalid {
            name: "model",
            expected: "a language model".to_owned(),
            got: "a reward model, whose head transformers would pack as well".to_owned(),
        });
    }
    let staging = AtomicDir::new(output)?;
    let mut config_json = config.to_json(dtype);
    config_json.insert("quantization_config".to_owned(), quantization_config(options, dtype));
    write_settings(&checkpoint, staging.path(), config_json)?;

    let mut writer = ShardWriter::new(staging.path());
    let names: Vec<String> = config.expected_tensors().into_iter().map(|(name, _)| name).collect();
    let progress = arete_records::progress::start("quantising", "tensors", names.len() as u64);
    for name in names {
        let weight = checkpoint.tensor(&name)?;
        if linear_of(&name).is_some() {
            for (name, part) in packed_parts(&name, &weight, options, dtype)? {
                writer.push(name, part)?;
            }
        } else {
            writer.push(name, weight.to_kind(dtype))?;
        }
        progress.inc(1);
    }
    writer.finish()?;
    put_in_place(staging, output)
}

/// The tensors that stand for one matrix, under bitsandbytes' names.
fn packed_parts(
    name: &str,
    weight: &Tensor,
    options: Nf4Options,
    dtype: Kind,
) -> Result<Vec<(String, Tensor)>, Error> {
    let plain = Nf4Tensor::quantize(weight, Nf4Options { double_quantize: false, ..options })?;
    let shape = format!("[{}, {}]", plain.outputs, plain.inputs);
    let dtype_name = dtype_name(dtype);
    let mut state = format!(
        "{{\"quant_type\": \"nf4\", \"blocksize\": {}, \"dtype\": \"{dtype_name}\", \"shape\": {shape}",
        options.block_size
    );
    let mut parts =
        vec![(String::new(), plain.codes.view([-1, 1])), (".quant_map".to_owned(), plain.codebook)];
    let absmax = plain.absmax.expand();
    if options.double_quantize {
        let NestedAbsmax { codes, absmax, offset } = NestedAbsmax::quantize(&absmax);
        let offset = json!(f64::from(offset));
        state += &format!(
            ", \"nested_blocksize\": {NESTED_BLOCK}, \"nested_dtype\": \"float32\", \"nested_offset\": {offset}"
        );
        parts.push((".absmax".to_owned(), Tensor::from_slice(&codes)));
        parts.push((".nested_absmax".to_owned(), Tensor::from_slice(&absmax)));
        parts.push((".nested_quant_map".to_owned(), Tensor::from_slice(&dynamic_map())));
    } else {
        parts.push((".absmax".to_owned(), absmax));
    }
    state.push('}');
    let state = Tensor::from_slice(state.as_bytes());
    parts.push((".quant_state.bitsandbytes__nf4".to_owned(), state));
    Ok(parts.into_iter().map(|(suffix, part)| (format!("{name}{suffix}"), part)).collect())
}

fn dtype_name(dtype: Kind) -> &'static str {
    match dtype {
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        _ => "float32",
    }
}

/// What transformers needs to know to load the directory.
fn quantization_config(options: Nf4Options, dtype: Kind) -> Value {
    json!({
        "quant_method": "bitsandbytes",
        "load_in_4bit": true,
        "load_in_8bit": false,
        "_load_in_4bit": true,
        "_load_in_8bit": false,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": options.double_quantize,
        "bnb_4bit_compute_dtype": dtype_name(dtype),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": null,
        "llm_int8_threshold": 6.0,
    })
}
