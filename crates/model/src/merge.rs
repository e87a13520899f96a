//! Merging an adapter into its base: a full Hugging Face directory, always dense.
//!
//! W + scale · B A is computed in f32 and rounded once to the output dtype. Tensors are read one at a time and
//! written in shards of at most [`SHARD_BYTES`].

use std::path::Path;

use arete_records::atomic::AtomicDir;
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

use crate::adapter_files::write_json;
use crate::checkpoint::safetensors::write_safetensors;
use crate::checkpoint::{Checkpoint, Source};
use crate::head::ScalarHead;
use crate::lora::{Adapter, Target};
use crate::nf4::{Nf4Options, Nf4Tensor};
use crate::{Batch, Error, Model};

/// Most bytes of one weight file.
pub const SHARD_BYTES: usize = 2 << 30;

/// Writes `source` with `adapter` merged in; with `head` it becomes a `…ForSequenceClassification`.
///
/// `extra` is added to `config.json` (`score_mean`, `score_std`, `pad_token_id`, …).
///
/// # Errors
///
/// What is wrong with the source, or [`Error::Io`] if writing fails; nothing is left under `output` then.
pub fn merge(
    source: &Source,
    adapter: &Adapter,
    head: Option<&ScalarHead>,
    output: &Path,
    dtype: Kind,
    extra: Map<String, Value>,
) -> Result<(), Error> {
    write_model(source, Some(adapter), head, output, dtype, None, extra)
}

/// The dtype for a model merged from `source`: the source's own where that has 16 bits, so that a CPU that computes in f32 does
/// not write Mistral-7B twice as large as it was; else the compute dtype.
///
/// # Errors
///
/// What is wrong with the source.
pub fn output_dtype(source: &Source, compute: Kind) -> Result<Kind, Error> {
    let stored = Checkpoint::open(source)?.stored_kind();
    Ok(stored.filter(|kind| matches!(kind, Kind::BFloat16 | Kind::Half)).unwrap_or(compute))
}

/// [`merge`] in full generality: without an adapter it writes the base dense; `packed` first packs and unpacks the
/// base's matrices, so that the result is what a stage saw that held its base in four bits.
///
/// # Errors
///
/// As [`merge`].
pub fn write_model(
    source: &Source,
    adapter: Option<&Adapter>,
    head: Option<&ScalarHead>,
    output: &Path,
    dtype: Kind,
    packed: Option<Nf4Options>,
    extra: Map<String, Value>,
) -> Result<(), Error> {
    let _guard = tch::no_grad_guard();
    let checkpoint = Checkpoint::open(source)?;
    let mut config = checkpoint.config().clone();
    config.sequence_classification = head.is_some();
    let staging = AtomicDir::new(output)?;

    let mut config_json = config.to_json(dtype);
    if head.is_some() && config.pad_token_id.is_none_or(|id| config.eos_token_ids.contains(&id)) {
        // A reward model is read at its last real token, which padding with end-of-text would hide.
        let pad_id = checkpoint.tokenizer()?.pad_id().unwrap_or(0);
        config_json.insert("pad_token_id".to_owned(), json!(pad_id));
    }
    config_json.extend(extra);
    write_settings(&checkpoint, staging.path(), config_json)?;

    let mut writer = ShardWriter::new(staging.path());
    let tied = config.tie_word_embeddings;
    let drop_head = |name: &str| {
        name == "score.weight" || (name == "lm_head.weight" && (tied || head.is_some()))
    };
    let names: Vec<String> =
        checkpoint.names().into_iter().filter(|name| !drop_head(name)).collect();
    let progress = arete_records::progress::start("merging", "tensors", names.len() as u64);
    for name in names {
        let mut weight = checkpoint.tensor(&name)?.to_kind(Kind::Float);
        if let Some((layer, target)) = linear_of(&name) {
            if let Some(options) = packed {
                weight = Nf4Tensor::quantize(&weight, options)?.dequantize(Kind::Float)?;
            }
            if let Some(pair) = adapter.and_then(|adapter| adapter.pair(layer, target)) {
                let scale = adapter.map_or(0.0, |adapter| adapter.config.scale());
                let cpu = tch::Device::Cpu;
                let (a, b) = (pair.lora_a.to_device(cpu), pair.lora_b.to_device(cpu));
                weight += b.matmul(&a) * scale; // [out, in]
            }
        }
        writer.push(name, weight.to_kind(dtype))?;
        progress.inc(1);
    }
    if let Some(head) = head {
        writer.push("score.weight".to_owned(), head.weight.detach().to_kind(dtype))?;
    }
    writer.finish()?;
    Ok(staging.commit()?)
}

/// Configuration, generation settings and tokenizer.
pub(crate) fn write_settings(
    checkpoint: &Checkpoint,
    directory: &Path,
    config: Map<String, Value>,
) -> Result<(), Error> {
    write_json(&directory.join("config.json"), &Value::Object(config))?;
    let generation = json!({
        "bos_token_id": checkpoint.config().bos_token_id,
        "eos_token_id": checkpoint.config().eos_token_ids,
    });
    write_json(&directory.join("generation_config.json"), &generation)?;
    checkpoint.tokenizer()?.save(directory)
}

/// Largest difference of logits between `merged` and `model` with `adapter`, over the tokens of `batch`.
///
/// # Errors
///
/// [`Error::Torch`] if memory runs out.
pub fn max_logit_difference(
    merged: &Model,
    model: &Model,
    adapter: &Adapter,
    batch: &Batch,
) -> Result<f64, Error> {
    let _guard = tch::no_grad_guard();
    let one = merged.decoder.logits(&merged.decoder.forward(batch, None)?)?;
    let other = model.decoder.logits(&model.decoder.forward(batch, Some(adapter))?)?;
    let difference = (one.to_kind(Kind::Float) - other.to_kind(Kind::Float)).abs().max();
    Ok(difference.double_value(&[]))
}

/// The block and layer a matrix belongs to.
pub(crate) fn linear_of(name: &str) -> Option<(usize, Target)> {
    let (layer, module) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let module = module.strip_suffix(".weight")?;
    let target = Target::ALL.into_iter().find(|target| target.module() == module)?;
    Some((layer.parse().ok()?, target))
}

/// Collects tensors and writes them as one file, or as shards with an index.
pub(crate) struct ShardWriter<'a> {
    directory: &'a Path,
    pending: Vec<(String, Tensor)>,
    pending_bytes: usize,
    total_bytes: usize,
    shards: Vec<Vec<String>>,
}

impl<'a> ShardWriter<'a> {
    pub(crate) fn new(directory: &'a Path) -> Self {
        Self {
            directory,
            pending: Vec::new(),
            pending_bytes: 0,
            total_bytes: 0,
            shards: Vec::new(),
        }
    }

    pub(crate) fn push(&mut self, name: String, tensor: Tensor) -> Result<(), Error> {
        let n_bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
        if self.pending_bytes + n_bytes > SHARD_BYTES && !self.pending.is_empty() {
            self.write_shard()?;
        }
        self.pending_bytes += n_bytes;
        self.total_bytes += n_bytes;
        self.pending.push((name, tensor));
        Ok(())
    }

    /// Writes under a name without the number of shards, which is not known yet.
    fn write_shard(&mut self) -> Result<(), Error> {
        let path = self.directory.join(format!("shard-{}.safetensors", self.shards.len()));
        write_safetensors(&path, &self.pending)?;
        self.shards.push(self.pending.drain(..).map(|(name, _)| name).collect());
        self.pending_bytes = 0;
        Ok(())
    }

    pub(crate) fn finish(mut self) -> Result<(), Error> {
        if self.shards.is_empty() {
            return write_safetensors(&self.directory.join("model.safetensors"), &self.pending);
        }
        self.write_shard()?;
        let count = self.shards.len();
        let mut map = Map::new();
        for (idx, names) in self.shards.iter().enumerate() {
            let name = format!("model-{:05}-of-{count:05}.safetensors", idx + 1);
            let from = self.directory.join(format!("shard-{idx}.safetensors"));
            fs_err::rename(from, self.directory.join(&name))?;
            map.extend(names.iter().map(|tensor| (tensor.clone(), json!(name))));
        }
        map.sort_keys();
        let index = json!({"metadata": {"total_size": self.total_bytes}, "weight_map": map});
        write_json(&self.directory.join("model.safetensors.index.json"), &index)
    }
}
