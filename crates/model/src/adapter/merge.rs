//! Merging an adapter into its base: a full Hugging Face directory, always dense.
//!
//! W + scale · B A is computed in f32 and rounded once to the output dtype. Tensors are read one at a time and
//! written in shards of at most [`SHARD_BYTES`].

use std::path::{Path, PathBuf};

use arete_records::atomic::AtomicDir;
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

use crate::adapter::lora::{Adapter, Target};
use crate::adapter::write_json;
use crate::checkpoint::safetensors::write_safetensors;
use crate::checkpoint::{Checkpoint, Source};
use crate::head::ScalarHead;
use crate::nf4::{Nf4Options, Nf4Tensor};
use crate::{Batch, Error, Model};

/// Most bytes of one weight file.
pub const SHARD_BYTES: usize = 2 << 30;

/// Writes `source` with `adapter` merged in; with `head` it becomes a `…ForSequenceClassification`. What else is there under the
/// name of `output` is set aside as `OUTPUT.old-N`.
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
    Staged::write(source, adapter, head, output, dtype, packed, extra)?.commit()
}

/// A model that is written but not yet under its name: to be looked at before it is.
#[derive(Debug)]
pub struct Staged {
    directory: AtomicDir,
    output: PathBuf,
}

impl Staged {
    /// [`write_model`] up to the last step. Dropped uncommitted, it is gone.
    ///
    /// # Errors
    ///
    /// As [`merge`].
    pub fn write(
        source: &Source,
        adapter: Option<&Adapter>,
        head: Option<&ScalarHead>,
        output: &Path,
        dtype: Kind,
        packed: Option<Nf4Options>,
        extra: Map<String, Value>,
    ) -> Result<Self, Error> {
        let _guard = tch::no_grad_guard();
        let checkpoint = Checkpoint::open(source)?;
        let mut config = checkpoint.config().clone();
        // A reward model stays one, with its own head, unless the adapter brings another.
        config.sequence_classification |= head.is_some();
        let directory = AtomicDir::new(output)?;

        let mut config_json = config.to_json(dtype);
        let is_end = |id: i64| config.eos_token_ids.contains(&id);
        if head.is_some() && config.pad_token_id.is_none_or(is_end) {
            // A reward model is read at its last real token, which padding with end-of-text would hide.
            let pad_id = checkpoint.tokenizer()?.pad_id().unwrap_or(0);
            config_json.insert("pad_token_id".to_owned(), json!(pad_id));
        }
        config_json.extend(extra);
        write_settings(&checkpoint, directory.path(), config_json)?;
        if head.is_some() {
            checkpoint.tokenizer()?.save_with_padding(directory.path())?;
        }

        let mut writer = ShardWriter::new(directory.path());
        // What the configuration has, and nothing else that lies in the files.
        let names: Vec<String> =
            config.expected_tensors().into_iter().map(|(name, _)| name).collect();
        let progress = arete_records::progress::start("merging", "tensors", names.len() as u64);
        for name in names {
            let weight = match head {
                Some(head) if name == "score.weight" => head.weight.detach().to_kind(dtype),
                _ => merged(&checkpoint, &name, adapter, packed)?.to_kind(dtype),
            };
            writer.push(name, weight)?;
            progress.inc(1);
        }
        writer.finish()?;
        Ok(Self { directory, output: output.to_path_buf() })
    }

    /// Where it is for now.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Puts it under its name; what else is there under that name is set aside.
    ///
    /// # Errors
    ///
    /// [`Error::Records`] if the disk refuses.
    pub fn commit(self) -> Result<(), Error> {
        put_in_place(self.directory, &self.output)
    }
}

/// One tensor of the merged model: `[out, in]` f32 for a matrix of a block, as stored otherwise.
fn merged(
    checkpoint: &Checkpoint,
    name: &str,
    adapter: Option<&Adapter>,
    packed: Option<Nf4Options>,
) -> Result<Tensor, Error> {
    let mut weight = checkpoint.tensor(name)?.to_kind(Kind::Float);
    if let Some((layer, target)) = linear_of(name) {
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
    Ok(weight)
}

/// Commits a directory that a user named, and says where another one of that name went.
pub(crate) fn put_in_place(directory: AtomicDir, output: &Path) -> Result<(), Error> {
    if let Some(aside) = directory.commit_beside()? {
        let (output, aside) = (output.display(), aside.display());
        tracing::info!(%output, %aside, "what was there was set aside");
    }
    Ok(())
}

/// Configuration, generation settings and tokenizer.
pub(crate) fn write_settings(
    checkpoint: &Checkpoint,
    directory: &Path,
    config: Map<String, Value>,
) -> Result<(), Error> {
    write_json(&directory.join("config.json"), &Value::Object(config))?;
    // The source's own settings, all of them, and what it does not say.
    let mut generation = checkpoint.generation_settings()?;
    if let Some(bos) = checkpoint.config().bos_token_id {
        generation.entry("bos_token_id").or_insert(json!(bos));
    }
    let eos = &checkpoint.config().eos_token_ids;
    if !eos.is_empty() {
        generation.entry("eos_token_id").or_insert(json!(eos));
    }
    write_json(&directory.join("generation_config.json"), &Value::Object(generation))?;
    checkpoint.tokenizer()?.save(directory)
}

/// Largest difference between `merged` and `model` with `adapter` over the tokens of `batch`: of logits, or of hidden states where
/// one of them is a reward model.
///
/// # Errors
///
/// [`Error::Torch`] if memory runs out, [`Error::NonFinite`].
pub fn max_logit_difference(
    merged: &Model,
    model: &Model,
    adapter: &Adapter,
    batch: &Batch,
) -> Result<f64, Error> {
    let _guard = tch::no_grad_guard();
    let (mut one, mut other) =
        (merged.decoder.forward(batch, None)?, model.decoder.forward(batch, Some(adapter))?);
    if merged.decoder.has_head() && model.decoder.has_head() {
        (one, other) = (merged.decoder.logits(&one)?, model.decoder.logits(&other)?);
    }
    let difference = one.to_kind(Kind::Float) - other.to_kind(Kind::Float);
    merged.decoder.check_finite("differences of the merged model", &difference)?;
    Ok(difference.abs().max().double_value(&[]))
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
