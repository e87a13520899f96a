//! How rotary frequencies are stretched, in each of the spellings of `config.json`.

use serde_json::{Map, Value, json};

use super::reader::Reader;
use crate::Error;

/// How rotary frequencies are stretched for long contexts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// All divided by `factor` (`"rope_type": "linear"`).
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1's (`"rope_type": "llama3"`): long wavelengths divided, short ones kept, a ramp between.
    Llama3 {
        /// The divisor of long wavelengths.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are long.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are short.
        high_freq_factor: f64,
        /// Tokens of the original context.
        original_max_position_embeddings: usize,
    },
}

/// The rotary base and its scaling, in either spelling: keys of their own (transformers 4) or all under
/// `rope_parameters` (5). Both may be there if they agree.
pub(super) fn rope(reader: &Reader<'_>) -> Result<(f64, Option<RopeScaling>), Error> {
    let mut theta = reader.optional_number("rope_theta")?;
    check_all_rotate(reader)?;
    let mut scaling = None;
    for key in ["rope_parameters", "rope_scaling"] {
        let Some(value) = reader.present(key) else { continue };
        let Some(map) = value.as_object() else { return Err(reader.wrong(key, "an object")) };
        let inner = Reader { path: reader.path, map };
        if let Some(inner_theta) = inner.optional_number("rope_theta")? {
            if theta.is_some_and(|theta| theta != inner_theta) {
                let expected = format!("rope_theta {inner_theta}, as in {key}");
                return Err(reader.wrong("rope_theta", &expected));
            }
            theta = Some(inner_theta);
        }
        check_all_rotate(&inner)?;
        let found = scaling_of(&inner)?;
        if scaling.is_some_and(|scaling| scaling != found) {
            return Err(reader.wrong(key, "the same scaling as rope_parameters"));
        }
        scaling = Some(found);
    }
    Ok((theta.unwrap_or(10_000.0), scaling.flatten()))
}

/// Refuses a model in which some dimensions of a head do not rotate.
fn check_all_rotate(reader: &Reader<'_>) -> Result<(), Error> {
    let key = "partial_rotary_factor";
    match reader.optional_number(key)? {
        Some(factor) if factor != 1.0 => Err(reader.wrong(key, "1 (all dimensions rotate)")),
        _ => Ok(()),
    }
}

fn scaling_of(reader: &Reader<'_>) -> Result<Option<RopeScaling>, Error> {
    let mut others = reader.map.iter().filter(|(_, value)| !value.is_null());
    if let Some((key, _)) = others.clone().find(|(_, value)| value.is_object()) {
        return Err(reader.wrong(key, "no map (one rotary embedding for all layers)"));
    }
    let key = if reader.present("rope_type").is_some() { "rope_type" } else { "type" };
    let Some(kind) = reader.present(key) else {
        // Without a type the base alone can be meant, and anything else would be left out silently.
        let known = ["rope_theta", "partial_rotary_factor"];
        return match others.find(|(key, _)| !known.contains(&key.as_str())) {
            Some((stray, _)) => {
                let expected = format!("default, linear or llama3 beside `{stray}`");
                Err(reader.wrong("rope_type", &expected))
            }
            None => Ok(None),
        };
    };
    let number = |key: &str| -> Result<f64, Error> {
        reader.optional_number(key)?.ok_or_else(|| reader.wrong(key, "a number"))
    };
    match kind.as_str() {
        Some("default") => Ok(None),
        Some("linear") => Ok(Some(RopeScaling::Linear { factor: number("factor")? })),
        Some("llama3") => Ok(Some(RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_position_embeddings: reader.size("original_max_position_embeddings")?,
        })),
        _ => Err(reader.wrong(key, "default, linear or llama3")),
    }
}

/// The keys of a scaling as transformers writes them.
pub(super) fn rope_scaling_json(scaling: Option<RopeScaling>) -> Option<Map<String, Value>> {
    let value = match scaling? {
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_position_embeddings,
        }),
    };
    value.as_object().cloned()
}
