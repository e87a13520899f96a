//! peft's `adapter_config.json`, read by a list of what is known: a key that is not on it may change the formula.
//!
//! # Source
//!
//! peft 0.21, `LoraConfig`.

use std::path::Path;

use serde_json::{Map, Value};

use crate::Error;
use crate::adapter::lora::{MAX_RANK, Target};

/// Keys that say where an adapter comes from, how it was trained or which layers it is on (its tensors tell that, too): what it
/// computes does not depend on them.
const WITHOUT_EFFECT: [&str; 24] = [
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",   // the name of a module
    "modules_to_save", // what they are is checked with the tensors
    "peft_version",
    "qalora_group_size", // of use_qalora
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    // Read beside this list.
    "init_lora_weights",
    "lora_alpha",
    "peft_type",
    "r",
    "use_rslora",
];

/// Keys that are accepted where they say that nothing is changed: `null`, `false`, an empty list or object, or this.
const WITHOUT_USE: [(&str, &str); 18] = [
    ("alora_invocation_tokens", "null (activated LoRA is not supported)"),
    ("alpha_pattern", "no patterns (one alpha for all layers)"),
    ("arrow_config", "null (routing between adapters is not supported)"),
    ("bias", "none"),
    ("ensure_weight_tying", "false"),
    ("fan_in_fan_out", "false"),
    ("kasa_config", "null"),
    ("layer_replication", "null (repeated layers are not supported)"),
    ("lora_bias", "false"),
    ("megatron_config", "null"),
    ("monteclora_config", "null"),
    ("rank_pattern", "no patterns (one rank for all layers)"),
    ("target_parameters", "null (adapted parameters of other kinds are not supported)"),
    ("trainable_token_indices", "null (trained embeddings are not supported)"),
    ("use_bdlora", "null"),
    ("use_dora", "false (DoRA is not supported)"),
    ("use_qalora", "false"),
    ("velora_config", "null"),
];

/// Rank and alpha; refuses what changes the formula.
pub(super) fn rank_and_alpha(
    path: &Path,
    config: &serde_json::Map<String, Value>,
) -> Result<(usize, f64), Error> {
    let fail = |key: &str, expected: &str| {
        let found = config.get(key).map_or("nothing".to_owned(), Value::to_string);
        Error::field(path, key, expected, found)
    };
    if config.get("peft_type").and_then(Value::as_str) != Some("LORA") {
        return Err(fail("peft_type", "LORA"));
    }
    check_keys(path, config)?;
    // PiSSA, OLoRA, LoftQ, CorDA and their like train on a base they have changed; on the original one the factors are
    // wrong. peft writes `true` where they were converted back.
    let key = "init_lora_weights";
    let keeps_base = match config.get(key) {
        None | Some(Value::Null | Value::Bool(_)) => true,
        Some(kind) => ["gaussian", "orthogonal", "eva"].iter().any(|known| kind == known),
    };
    if !keeps_base {
        let expected = "true, false, gaussian, orthogonal or eva (the others need a changed base; convert the \
                        adapter with peft's path_initial_model_for_weight_conversion)";
        return Err(fail(key, expected));
    }
    let rank = config
        .get("r")
        .and_then(Value::as_u64)
        .filter(|rank| (1..=MAX_RANK as u64).contains(rank))
        .ok_or_else(|| fail("r", "a rank from 1 to 65535"))? as usize;
    let alpha = config
        .get("lora_alpha")
        .and_then(Value::as_f64)
        .ok_or_else(|| fail("lora_alpha", "a number"))?;
    // Rank-stabilised LoRA divides by sqrt(r) instead of r: an alpha that gives the same scale.
    let stabilised = match config.get("use_rslora") {
        None | Some(Value::Null) => false,
        Some(Value::Bool(stabilised)) => *stabilised,
        Some(_) => return Err(fail("use_rslora", "true or false")),
    };
    Ok((rank, if stabilised { alpha * (rank as f64).sqrt() } else { alpha }))
}

/// Refuses every key that changes the formula, or may.
fn check_keys(path: &Path, config: &Map<String, Value>) -> Result<(), Error> {
    let is_unused = |value: &Value| match value {
        Value::Null => true,
        Value::Bool(used) => !used,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::String(word) => word == "none",
        Value::Number(_) => false,
    };
    for (key, value) in config {
        let known = WITHOUT_USE.iter().find(|(name, _)| name == key);
        let expected = match known {
            _ if WITHOUT_EFFECT.contains(&key.as_str()) => continue,
            Some(_) if is_unused(value) => continue,
            None if value.is_null() => continue,
            Some((_, expected)) => *expected,
            None => "a key that is known to leave the adapter's formula as it is, or null",
        };
        let found: String = value.to_string().chars().take(80).collect();
        return Err(Error::field(path, key, expected, found));
    }
    Ok(())
}

/// Whether the configuration lets an adapter be on that layer: peft leaves tensors for any other unread. Patterns given as
/// regular expressions are not looked at.
pub(super) fn is_on(config: &Map<String, Value>, layer: usize, target: Target) -> bool {
    let name = format!("model.layers.{layer}.{}", target.module());
    let names = |key: &str| config.get(key).and_then(Value::as_array);
    let among = |names: &Vec<Value>| {
        names
            .iter()
            .filter_map(Value::as_str)
            .any(|known| name.ends_with(&format!(".{known}")) || name == known)
    };
    let layers = match config.get("layers_to_transform") {
        Some(Value::Array(layers)) => Some(layers.clone()),
        Some(one @ Value::Number(_)) => Some(vec![one.clone()]),
        _ => None,
    };
    names("target_modules").is_none_or(among)
        && !names("exclude_modules").is_some_and(among)
        && layers
            .is_none_or(|layers| layers.iter().any(|known| known.as_u64() == Some(layer as u64)))
}
