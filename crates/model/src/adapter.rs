//! Adapters on disk, in peft's layout, and what they remember of their base.
//!
//! `adapter_config.json` and `adapter_model.safetensors` are peft's; `arete_adapter.json` beside them holds the
//! SHA-256 of the base and how it was packed, which peft does not record.

#[cfg(feature = "cli")]
pub mod card;
pub(crate) mod lora;
pub mod merge;
mod peft;
mod soup;

use std::path::Path;

use arete_records::atomic::{self, AtomicDir};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::Error;
use crate::checkpoint::check_adapter;
use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::safetensors::{SafetensorsFile, write_safetensors};
use crate::head::ScalarHead;
use crate::json::read_object;
use crate::model::Model;
use crate::nf4::Nf4Options;

pub use self::lora::{Adapter, LoraConfig, LoraPair, Target};
pub use self::soup::soup;

const CONFIG_FILE: &str = "adapter_config.json";
const WEIGHTS_FILE: &str = "adapter_model.safetensors";
const META_FILE: &str = "arete_adapter.json";
const HEAD_NAME: &str = "base_model.model.score.weight";
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// What an adapter is for, in peft's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Task {
    /// A policy (`CAUSAL_LM`).
    #[serde(rename = "CAUSAL_LM")]
    CausalLm,
    /// A reward model with its head (`SEQ_CLS`, `num_labels = 1`).
    #[serde(rename = "SEQ_CLS")]
    SequenceClassification,
}

/// What an adapter remembers of the base it was trained on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterMeta {
    /// Path or hub id of the base, as the user gave it.
    pub base_model: String,
    /// SHA-256 of the base's files; empty where another program wrote the adapter.
    pub base_sha256: String,
    /// How the base was packed during training (`nf4`, `nf4-double`), if it was.
    pub quantization: Option<String>,
    /// Policy or reward model.
    pub task: Task,
}

impl AdapterMeta {
    /// Describes `model` as the base of an adapter.
    pub fn of(model: &Model, base_model: &str, task: Task) -> Self {
        Self {
            base_model: base_model.to_owned(),
            base_sha256: model.base_sha256.clone(),
            quantization: quantization_name(model),
            task,
        }
    }

    /// Refuses a base that is not the one the adapter was trained on.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the weights or the packing differ. An adapter of another program names no sums, and passes.
    pub fn check_base(&self, model: &Model) -> Result<(), Error> {
        if self.base_sha256.is_empty() {
            return Ok(());
        }
        if !model.is_base(&self.base_sha256)? {
            return Err(Error::Invalid {
                name: "adapter's base",
                expected: format!("{} (sha256 {})", self.base_model, short(&self.base_sha256)),
                got: format!("a model with sha256 {}", short(&model.base_sha256)),
            });
        }
        let found = quantization_name(model);
        if self.quantization != found {
            let name = |packing: &Option<String>| packing.clone().unwrap_or("dense".to_owned());
            return Err(Error::Invalid {
                name: "adapter's base",
                expected: format!("weights held {}, as in training", name(&self.quantization)),
                got: name(&found),
            });
        }
        Ok(())
    }
}

fn short(sum: &str) -> &str {
    sum.get(..12).unwrap_or(sum)
}

/// How the base was packed when the adapter in `directory` was trained; `None` if it was dense, or another program wrote it.
///
/// # Errors
///
/// Unreadable files; [`Error::Field`] for a packing that this version does not know.
pub fn packing(directory: &Path) -> Result<Option<Nf4Options>, Error> {
    let Some(name) = read_own_meta(directory)?.and_then(|meta| meta.quantization) else {
        return Ok(None);
    };
    let known = [true, false].into_iter().find(|&double| packing_name(double) == name);
    let double_quantize = known.ok_or_else(|| {
        Error::field(&directory.join(META_FILE), "quantization", "nf4 or nf4-double", name)
    })?;
    Ok(Some(Nf4Options { double_quantize, ..Nf4Options::default() }))
}

fn packing_name(double_quantize: bool) -> &'static str {
    if double_quantize { "nf4-double" } else { "nf4" }
}

fn quantization_name(model: &Model) -> Option<String> {
    let options = model.decoder.quantization()?;
    Some(packing_name(options.double_quantize).to_owned())
}

/// An adapter read from disk.
#[derive(Debug)]
pub struct LoadedAdapter {
    /// The adapter.
    pub adapter: Adapter,
    /// Its scalar head, if it is a reward model.
    pub head: Option<ScalarHead>,
    /// What it remembers of its base.
    pub meta: AdapterMeta,
}

/// Writes an adapter as a directory, whole or not at all; what else is there under that name is set aside as `NAME.old-N`.
///
/// # Errors
///
/// [`Error::Io`] if writing fails.
pub fn save(
    directory: &Path,
    adapter: &Adapter,
    head: Option<&ScalarHead>,
    meta: &AdapterMeta,
) -> Result<(), Error> {
    let staging = AtomicDir::new(directory)?;
    write_files(staging.path(), adapter, head, meta)?;
    merge::put_in_place(staging, directory)
}

/// The files of [`save`] in an existing directory (a checkpoint that is itself written atomically).
///
/// # Errors
///
/// [`Error::Io`] if writing fails.
pub fn write_files(
    directory: &Path,
    adapter: &Adapter,
    head: Option<&ScalarHead>,
    meta: &AdapterMeta,
) -> Result<(), Error> {
    let targets: Vec<&str> = Target::ALL
        .iter()
        .filter(|target| adapter.config.targets.contains(target))
        .map(|target| target.short_name())
        .collect();
    let LoraConfig { rank, alpha, .. } = adapter.config;
    let config = config_json(meta, rank, alpha, head.is_some(), &targets);
    let mut tensors = adapter.parameters();
    if let Some(head) = head {
        tensors.push((HEAD_NAME.to_owned(), head.weight.shallow_clone()));
    }
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    write_json(&directory.join(CONFIG_FILE), &config)?;
    let meta = serde_json::to_value(meta).expect("plain data serialises");
    write_json(&directory.join(META_FILE), &meta)?;
    write_safetensors(&directory.join(WEIGHTS_FILE), &tensors)
}

/// The contents of `adapter_config.json`.
fn config_json(
    meta: &AdapterMeta,
    rank: usize,
    alpha: f64,
    has_head: bool,
    targets: &[&str],
) -> Value {
    json!({
        "peft_type": "LORA",
        "task_type": meta.task,
        "base_model_name_or_path": meta.base_model,
        "r": rank,
        "lora_alpha": alpha_json(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "modules_to_save": has_head.then_some(["score"]),
        "target_modules": targets,
        "use_dora": false,
        "use_rslora": false,
    })
}

/// peft writes whole alphas as integers.
fn alpha_json(alpha: f64) -> Value {
    if alpha.fract() == 0.0 { json!(alpha as i64) } else { json!(alpha) }
}

pub(crate) fn write_json(path: &Path, value: &Value) -> Result<(), Error> {
    let mut text = serde_json::to_string_pretty(value).expect("plain data serialises");
    text.push('\n');
    Ok(atomic::write(path, text.as_bytes())?)
}

/// Reads an adapter of ours or of peft's.
///
/// # Errors
///
/// [`Error::Field`] for a kind of adapter this crate does not run (DoRA, biases, per-layer ranks, PiSSA and others that
/// change the base, any key of `adapter_config.json` that is not known to leave the formula as it is), [`Error::TensorShape`] or [`Error::MissingTensor`] if it does not fit the model.
pub fn load(
    directory: &Path,
    name: &str,
    model: &ModelConfig,
    device: Device,
) -> Result<LoadedAdapter, Error> {
    check_adapter(directory)?;
    let path = directory.join(CONFIG_FILE);
    let config = read_object(&path, MAX_CONFIG_BYTES)?;
    let (rank, alpha) = peft::rank_and_alpha(&path, &config)?;
    let file = SafetensorsFile::open(&directory.join(WEIGHTS_FILE))?;
    let reader = PairReader { file: &file, model, rank, device };
    let mut layers = Vec::with_capacity(model.num_layers);
    let mut targets = Vec::new();
    let mut used = 0;
    for layer in 0..model.num_layers {
        let mut pairs: [Option<LoraPair>; 7] = Default::default();
        for (slot, target) in pairs.iter_mut().zip(Target::ALL) {
            *slot = reader.pair(layer, target)?;
            if slot.is_some() {
                if !peft::is_on(&config, layer, target) {
                    let field = "target_modules, exclude_modules, layers_to_transform";
                    let (expected, found) = (
                        "every layer that has tensors",
                        format!("not {} of layer {layer}", target.module()),
                    );
                    return Err(Error::field(&path, field, expected, found));
                }
                used += 2;
                if !targets.contains(&target) {
                    targets.push(target);
                }
            }
        }
        layers.push(pairs);
    }
    let head = match file.contains(HEAD_NAME) {
        true => {
            used += 1;
            Some(ScalarHead::from_weight(&file.tensor(HEAD_NAME)?, model.hidden_size, device)?)
        }
        false => None,
    };
    if used != file.names().count() {
        let known = |name: &&str| !reader.knows(name);
        let stranger = file.names().find(known).unwrap_or_default().to_owned();
        let expected = "LoRA factors of this model's linear layers and at most a score head";
        return Err(Error::field(file.path(), "tensors", expected, stranger));
    }
    if targets.is_empty() {
        return Err(Error::field(file.path(), "tensors", "at least one LoRA pair", "none"));
    }
    targets.sort();
    let meta = read_meta(directory, &config, head.is_some())?;
    let config = LoraConfig { rank, alpha, targets };
    Ok(LoadedAdapter { adapter: Adapter { name: name.to_owned(), config, layers }, head, meta })
}

/// What an adapter of ours says of its base; none if another program wrote it.
fn read_own_meta(directory: &Path) -> Result<Option<AdapterMeta>, Error> {
    let path = directory.join(META_FILE);
    if !path.is_file() {
        return Ok(None);
    }
    let map = read_object(&path, MAX_CONFIG_BYTES)?;
    let meta = serde_json::from_value(Value::Object(map))
        .map_err(|error| Error::field(&path, "content", "an adapter's base", error.to_string()))?;
    Ok(Some(meta))
}

fn read_meta(
    directory: &Path,
    config: &serde_json::Map<String, Value>,
    has_head: bool,
) -> Result<AdapterMeta, Error> {
    if let Some(meta) = read_own_meta(directory)? {
        return Ok(meta);
    }
    let base = config.get("base_model_name_or_path").and_then(Value::as_str).unwrap_or_default();
    Ok(AdapterMeta {
        base_model: base.to_owned(),
        base_sha256: String::new(),
        quantization: None,
        task: match config.get("task_type").and_then(Value::as_str) {
            Some("SEQ_CLS") => Task::SequenceClassification,
            _ if has_head => Task::SequenceClassification,
            _ => Task::CausalLm,
        },
    })
}

struct PairReader<'a> {
    file: &'a SafetensorsFile,
    model: &'a ModelConfig,
    rank: usize,
    device: Device,
}

impl PairReader<'_> {
    fn names(layer: usize, target: Target) -> [String; 2] {
        let module = format!("base_model.model.model.layers.{layer}.{}", target.module());
        [format!("{module}.lora_A.weight"), format!("{module}.lora_B.weight")]
    }

    fn knows(&self, name: &str) -> bool {
        name == HEAD_NAME
            || (0..self.model.num_layers).any(|layer| {
                Target::ALL.iter().any(|t| Self::names(layer, *t).iter().any(|known| known == name))
            })
    }

    fn pair(&self, layer: usize, target: Target) -> Result<Option<LoraPair>, Error> {
        let [a, b] = Self::names(layer, target);
        if !self.file.contains(&a) && !self.file.contains(&b) {
            return Ok(None);
        }
        let (outputs, inputs) = target.size(self.model);
        Ok(Some(LoraPair {
            lora_a: self.tensor(&a, [self.rank, inputs])?,
            lora_b: self.tensor(&b, [outputs, self.rank])?,
        }))
    }

    fn tensor(&self, name: &str, shape: [usize; 2]) -> Result<Tensor, Error> {
        let tensor = self.file.tensor(name)?;
        let expected = shape.map(|size| size as i64).to_vec();
        if tensor.size() != expected {
            return Err(Error::TensorShape {
                path: self.file.path().to_path_buf(),
                name: name.to_owned(),
                expected,
                found: tensor.size(),
            });
        }
        Ok(tensor.to_kind(Kind::Float).to_device(self.device))
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn an_adapter_says_how_its_base_was_packed() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(packing(dir.path()).unwrap(), None);
        let write = |name: &str| {
            let text = format!(
                r#"{{"base_model": "b", "base_sha256": "", "task": "CAUSAL_LM", "quantization": {name}}}"#
            );
            fs_err::write(dir.path().join(META_FILE), text).unwrap();
            packing(dir.path())
        };
        assert_eq!(write("null").unwrap(), None);
        assert!(!write(r#""nf4""#).unwrap().unwrap().double_quantize);
        assert!(write(r#""nf4-double""#).unwrap().unwrap().double_quantize);
        assert!(write(r#""fp4""#).unwrap_err().to_string().contains("fp4"));
    }

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
    }

    /// peft 0.21, `LoraConfig.init_lora_weights`: some kinds subtract their start from the base before they train.
    #[test]
    fn adapters_of_a_changed_base_are_refused() {
        let model = ModelConfig::from_directory(&golden("llama_untied")).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let weights = "adapter_model.safetensors";
        fs_err::copy(golden("peft/causal").join(weights), directory.path().join(weights)).unwrap();
        let config = golden("peft/causal/adapter_config.json");
        let mut config: Value = serde_json::from_slice(&fs_err::read(config).unwrap()).unwrap();
        let mut load = |kind: Value| {
            config["init_lora_weights"] = kind;
            fs_err::write(directory.path().join("adapter_config.json"), config.to_string())
                .unwrap();
            super::load(directory.path(), "x", &model, Device::Cpu)
        };
        for kind in ["pissa", "pissa_niter_16", "olora", "loftq", "corda", "lora_ga"] {
            let text = load(kind.into()).unwrap_err().to_string();
            assert!(text.contains("init_lora_weights") && text.contains(kind), "{text}");
            assert!(text.contains("changed base"), "{text}");
        }
        for kind in ["gaussian", "orthogonal", "eva"] {
            load(kind.into()).unwrap();
        }
        for kind in [true.into(), false.into(), Value::Null] {
            load(kind).unwrap();
        }
    }
}
