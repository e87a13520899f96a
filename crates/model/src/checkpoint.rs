//! Opening a model: where it is, what it is made of, its tensors one at a time.
//!
//! Tensors go by their Hugging Face names (`model.layers.0.self_attn.q_proj.weight`) whatever the file calls them.
//! Nothing is held in memory but headers; a tensor is read when it is asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::Value;
use tch::{Kind, Tensor};

#[cfg(feature = "gguf")]
use self::gguf::Gguf;
use self::safetensors::SafetensorsFile;
use crate::Error;
use crate::config::{ModelConfig, read_json_object};
use crate::nf4::Nf4Tensor;
use crate::template::ChatTemplate;
#[cfg(feature = "gguf")]
use crate::tokenizer::GgufVocabulary;
use crate::tokenizer::Tokenizer;

mod bitsandbytes;
mod bytes;
#[cfg(feature = "gguf")]
pub mod gguf;
pub mod safetensors;

/// The name of a sharded checkpoint's table.
const INDEX_FILE: &str = "model.safetensors.index.json";
const MAX_INDEX_BYTES: u64 = 25 << 20;
/// A checkpoint that is not sharded.
const SINGLE_FILE: &str = "model.safetensors";
/// GGUF's table of divisors of the rotary frequencies (Llama 3.1 and later).
#[cfg(feature = "gguf")]
const ROPE_FACTORS: &str = "rope_freqs.weight";
/// Endings of files that Python's pickle would open.
const PICKLE_ENDINGS: [&str; 5] = ["bin", "pt", "pth", "ckpt", "pkl"];

/// Where a model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A Hugging Face directory: `config.json`, safetensors, tokenizer.
    Directory(PathBuf),
    /// A GGUF file.
    Gguf(PathBuf),
    /// A hub repository.
    Hub {
        /// `owner/name`.
        id: String,
        /// Branch, tag or commit; `main` if absent.
        revision: Option<String>,
    },
}

impl Source {
    /// [`Source::parse`], and what lies on the hub is downloaded: then it is the directory of the snapshot, whose files can be
    /// hashed as any others, so that a branch that moves on is noticed.
    ///
    /// # Errors
    ///
    /// As [`Source::parse`]; [`Error::Hub`] if the download fails.
    pub fn fetch(given: &str) -> Result<Self, Error> {
        Ok(match Self::parse(given)? {
            Self::Hub { id, revision } => Self::Directory(download(&id, revision.as_deref())?),
            local => local,
        })
    }

    /// The directory or file of the model, unless it is on the hub.
    pub fn local_path(&self) -> Option<&Path> {
        match self {
            Self::Directory(path) | Self::Gguf(path) => Some(path),
            Self::Hub { .. } => None,
        }
    }

    /// Reads what a user gives as `--model`: a directory, a `.gguf` file, or a hub id (`owner/name`, `owner/name@revision`).
    ///
    /// # Errors
    ///
    /// [`Error::Pickle`] for a pickle file, [`Error::Source`] for anything else.
    pub fn parse(given: &str) -> Result<Self, Error> {
        let path = Path::new(given);
        let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
        if path.is_dir() {
            return Ok(Self::Directory(path.to_path_buf()));
        }
        if PICKLE_ENDINGS.contains(&ending) {
            return Err(pickle(path));
        }
        if path.is_file() {
            if ending.eq_ignore_ascii_case("gguf") {
                return Ok(Self::Gguf(path.to_path_buf()));
            }
            return Err(source_error(given, "another file (for safetensors name the directory)"));
        }
        let (id, revision) = match given.split_once('@') {
            Some((id, revision)) => (id, Some(revision.to_owned())),
            None => (given, None),
        };
        let part = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        match id.split_once('/') {
            Some((owner, name))
                if part(owner) && part(name) && !ending.eq_ignore_ascii_case("gguf") =>
            {
                Ok(Self::Hub { id: id.to_owned(), revision })
            }
            _ => Err(source_error(given, "nothing of that name")),
        }
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Directory(path) | Self::Gguf(path) => write!(formatter, "{}", path.display()),
            Self::Hub { id, revision: None } => formatter.write_str(id),
            Self::Hub { id, revision: Some(revision) } => write!(formatter, "{id}@{revision}"),
        }
    }
}

/// The directory of a hub model's snapshot, downloaded where it is not here yet.
fn download(id: &str, revision: Option<&str>) -> Result<PathBuf, Error> {
    #[cfg(feature = "hub")]
    return crate::hub::download_model(id, revision);
    #[cfg(not(feature = "hub"))]
    Err(Error::Source {
        given: revision.map_or(id.to_owned(), |revision| format!("{id}@{revision}")),
        expected: "a local model (built without the feature `hub`)",
        found: "a hub id".to_owned(),
    })
}

fn source_error(given: &str, found: &str) -> Error {
    Error::Source {
        given: given.to_owned(),
        expected: "a Hugging Face directory, a .gguf file or a hub id (owner/name)",
        found: found.to_owned(),
    }
}

fn pickle(path: &Path) -> Error {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.display().to_string(),
        _ => ".".to_owned(),
    };
    Error::Pickle { path: path.to_path_buf(), command: conversion_command(&directory) }
}

/// The command that turns a directory or repository of pickle files into one of safetensors.
pub(crate) fn conversion_command(from: &str) -> String {
    let name = from.trim_end_matches('/').rsplit('/').next().unwrap_or("model");
    let to = if name == "." || name.is_empty() { "model" } else { name };
    format!(
        "python -c \"import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; \
         a, b = sys.argv[1:]; M.from_pretrained(a).save_pretrained(b); T.from_pretrained(a).save_pretrained(b)\" \
         '{from}' '{to}-safetensors'"
    )
}

/// An opened model.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    config: ModelConfig,
    files: Files,
}

#[derive(Debug)]
enum Files {
    Safetensors(Weights),
    #[cfg(feature = "gguf")]
    Gguf {
        file: Gguf,
        names: BTreeMap<String, String>,
    },
}

/// The tensors of one safetensors file, or of several that an index ties together.
#[derive(Debug)]
struct Weights {
    path: PathBuf,
    files: Vec<SafetensorsFile>,
    place: BTreeMap<String, usize>,
}

impl Weights {
    fn open(directory: &Path) -> Result<Self, Error> {
        let single = directory.join(SINGLE_FILE);
        let index = directory.join(INDEX_FILE);
        let (mut files, mut place) = (Vec::new(), BTreeMap::new());
        // As in transformers, a whole file goes before shards.
        if single.is_file() {
            let file = SafetensorsFile::open(&single)?;
            place.extend(file.names().map(|name| (name.to_owned(), 0)));
            files.push(file);
        } else if index.is_file() {
            for (name, tensors) in shards_of_index(&index)? {
                let file = SafetensorsFile::open(&directory.join(&name))?;
                for tensor in tensors {
                    if !file.contains(&tensor) {
                        let path = file.path().to_path_buf();
                        return Err(Error::MissingTensor { path, name: tensor });
                    }
                    place.insert(tensor, files.len());
                }
                if let Some(stray) = file.names().find(|name| !place.contains_key(*name)) {
                    let expected = format!("only tensors that {INDEX_FILE} lists");
                    return Err(Error::field(file.path(), stray, expected, "another"));
                }
                files.push(file);
            }
        } else {
            return Err(no_weights(directory));
        }
        Ok(Self { path: directory.to_path_buf(), files, place })
    }

    fn file_of(&self, name: &str) -> Result<&SafetensorsFile, Error> {
        self.place
            .get(name)
            .map(|&idx| &self.files[idx])
            .ok_or_else(|| Error::MissingTensor { path: self.path.clone(), name: name.to_owned() })
    }

    fn contains(&self, name: &str) -> bool {
        self.place.contains_key(name)
    }
}

impl Checkpoint {
    /// Opens a model; a hub id is downloaded first.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with its files, named.
    pub fn open(source: &Source) -> Result<Self, Error> {
        match source {
            Source::Directory(path) => Self::open_directory(path),
            #[cfg(feature = "gguf")]
            Source::Gguf(path) => Self::open_gguf(path),
            #[cfg(not(feature = "gguf"))]
            Source::Gguf(path) => Err(Error::Source {
                given: path.display().to_string(),
                expected: "a Hugging Face directory (built without the feature `gguf`)",
                found: "a GGUF file".to_owned(),
            }),
            Source::Hub { id, revision } => {
                Self::open_directory(&download(id, revision.as_deref())?)
            }
        }
    }

    fn open_directory(directory: &Path) -> Result<Self, Error> {
        let config = ModelConfig::from_directory(directory)?;
        let weights = Weights::open(directory)?;
        if let Some(name) = weights.place.keys().find(|name| name.ends_with(".bias")) {
            let expected = "no biases (they are not supported)";
            return Err(Error::field(weights.file_of(name)?.path(), name, expected, "a bias"));
        }
        let files = Files::Safetensors(weights);
        Self { path: directory.to_path_buf(), config, files }.checked()
    }

    #[cfg(feature = "gguf")]
    fn open_gguf(path: &Path) -> Result<Self, Error> {
        let file = Gguf::open(path)?;
        let mut names = BTreeMap::new();
        for name in file.tensors().keys().filter(|name| *name != ROPE_FACTORS) {
            let Some(known) = hugging_face_name(name) else {
                let expected = "a tensor of the llama architecture, no biases or experts";
                return Err(Error::field(path, name, expected, "another tensor"));
            };
            names.insert(known, name.clone());
        }
        let Some(embedding) = file.tensors().get("token_embd.weight") else {
            let name = "token_embd.weight".to_owned();
            return Err(Error::MissingTensor { path: path.to_path_buf(), name });
        };
        let vocab_size = embedding.shape[0] as usize;
        let tied = !names.contains_key("lm_head.weight");
        let mut config = ModelConfig::from_gguf(file.metadata(), tied, vocab_size)?;
        if file.tensors().contains_key(ROPE_FACTORS) {
            let factors = file.tensor_as(ROPE_FACTORS, Kind::Float, None)?;
            let factors = Vec::<f32>::try_from(&factors.view([-1]))?;
            config.set_rope_factors(path, ROPE_FACTORS, &factors)?;
        }
        let files = Files::Gguf { file, names };
        Self { path: path.to_path_buf(), config, files }.checked()
    }

    /// Checks that every tensor the configuration implies is there, with its shape and holding numbers: what is
    /// wrong with a checkpoint is said before anything is read.
    fn checked(self) -> Result<Self, Error> {
        for (name, shape) in self.config.expected_tensors() {
            self.expect_shape(&name, &shape)?;
        }
        Ok(self)
    }

    /// The directory or file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The architecture.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Names of the tensors, sorted; a packed matrix is one name.
    pub fn names(&self) -> Vec<String> {
        match &self.files {
            Files::Safetensors(weights) => {
                weights.place.keys().filter(|name| !bitsandbytes::is_part(name)).cloned().collect()
            }
            #[cfg(feature = "gguf")]
            Files::Gguf { names, .. } => names.keys().cloned().collect(),
        }
    }

    /// Whether a tensor is there.
    pub fn contains(&self, name: &str) -> bool {
        match &self.files {
            Files::Safetensors(weights) => weights.contains(name),
            #[cfg(feature = "gguf")]
            Files::Gguf { names, .. } => names.contains_key(name),
        }
    }

    /// The dtype in which the files hold the embedding, which is never packed; `None` for GGUF, whose tensors are unpacked.
    pub fn stored_kind(&self) -> Option<Kind> {
        let name = "model.embed_tokens.weight";
        match &self.files {
            Files::Safetensors(weights) => weights.file_of(name).ok()?.kind(name),
            #[cfg(feature = "gguf")]
            Files::Gguf { .. } => None,
        }
    }

    /// A tensor's shape once unpacked.
    ///
    /// # Errors
    ///
    /// [`Error::MissingTensor`], or a packed matrix whose description cannot be read.
    pub fn shape(&self, name: &str) -> Result<Vec<i64>, Error> {
        match &self.files {
            Files::Safetensors(weights) => match bitsandbytes::packed_shape(weights, name)? {
                Some(shape) => Ok(shape),
                None => {
                    let file = weights.file_of(name)?;
                    Ok(file.shape(name).expect("the file has it").to_vec())
                }
            },
            #[cfg(feature = "gguf")]
            Files::Gguf { file, names } => {
                let stored = names.get(name).ok_or_else(|| self.missing(name))?;
                Ok(file.tensors()[stored].shape.clone())
            }
        }
    }

    /// One tensor on the CPU: stored floats as they are, packed ones as f32, Q and K rows as transformers has them.
    ///
    /// # Errors
    ///
    /// [`Error::MissingTensor`], [`Error::Io`], or what is wrong with a packed matrix.
    pub fn tensor(&self, name: &str) -> Result<Tensor, Error> {
        match &self.files {
            Files::Safetensors(weights) => match bitsandbytes::read(weights, name)? {
                Some(packed) => packed.dequantize(Kind::Float),
                None => weights.file_of(name)?.tensor(name),
            },
            #[cfg(feature = "gguf")]
            Files::Gguf { file, names } => {
                let stored = names.get(name).ok_or_else(|| self.missing(name))?;
                let kind = file.tensors()[stored].ggml_type.kind();
                file.tensor_as(stored, kind, self.interleaved_heads(name))
            }
        }
    }

    /// [`Checkpoint::tensor`] in `kind` (f32, bf16 or f16), each element rounded once, to nearest even.
    ///
    /// For a GGUF file this unpacks straight into `kind`, without an f32 copy of the whole tensor.
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::tensor`].
    pub fn tensor_as(&self, name: &str, kind: Kind) -> Result<Tensor, Error> {
        match &self.files {
            Files::Safetensors(_) => Ok(self.tensor(name)?.f_to_kind(kind)?),
            #[cfg(feature = "gguf")]
            Files::Gguf { file, names } => {
                let stored = names.get(name).ok_or_else(|| self.missing(name))?;
                file.tensor_as(stored, kind, self.interleaved_heads(name))
            }
        }
    }

    /// Matrices of given shapes, one below the other, in `kind`: what [`Checkpoint::tensor_as`] gives for each, mostly
    /// without a copy.
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::expect_shape`] and [`Checkpoint::tensor_as`].
    pub(crate) fn stacked(
        &self,
        parts: &[(String, [i64; 2])],
        kind: Kind,
    ) -> Result<Tensor, Error> {
        for (name, shape) in parts {
            self.expect_shape(name, shape)?;
        }
        match &self.files {
            #[cfg(feature = "gguf")]
            Files::Gguf { file, names } => {
                let stored: Vec<_> = parts
                    .iter()
                    .map(|(name, _)| (names[name].as_str(), self.interleaved_heads(name)))
                    .collect();
                file.stacked(&stored, kind)
            }
            Files::Safetensors(weights) => {
                let files: Vec<_> = parts
                    .iter()
                    .map(|(name, _)| Ok((weights.file_of(name)?, name.as_str())))
                    .collect::<Result<_, Error>>()?;
                let packed = bitsandbytes::packed_shape(weights, &parts[0].0)?.is_some();
                if !packed && let Some(whole) = safetensors::stacked(&files)? {
                    return Ok(whole.f_to_kind(kind)?);
                }
                let parts: Vec<Tensor> = parts
                    .iter()
                    .map(|(name, _)| self.tensor_as(name, kind))
                    .collect::<Result<_, _>>()?;
                Ok(Tensor::f_cat(&parts, 0)?)
            }
        }
    }

    /// Checks a tensor's presence, shape, and that it holds floats (or packed floats), without reading it.
    ///
    /// # Errors
    ///
    /// [`Error::MissingTensor`], [`Error::TensorShape`], or [`Error::Field`] if it holds no floats.
    pub fn expect_shape(&self, name: &str, shape: &[i64]) -> Result<(), Error> {
        let found = self.shape(name)?;
        if found != shape {
            return Err(Error::TensorShape {
                path: self.path_of(name).to_path_buf(),
                name: name.to_owned(),
                expected: shape.to_vec(),
                found,
            });
        }
        if let Files::Safetensors(weights) = &self.files
            && bitsandbytes::packed_shape(weights, name)?.is_none()
        {
            let file = weights.file_of(name)?;
            match file.kind(name).expect("the file has it") {
                Kind::Float | Kind::BFloat16 | Kind::Half | Kind::Double => {}
                other => {
                    let found = format!("{other:?}");
                    return Err(Error::field(file.path(), name, "F32, BF16, F16 or F64", found));
                }
            }
        }
        Ok(())
    }

    /// [`Checkpoint::tensor`], after [`Checkpoint::expect_shape`].
    ///
    /// # Errors
    ///
    /// As both.
    pub fn tensor_of_shape(&self, name: &str, shape: &[i64]) -> Result<Tensor, Error> {
        self.expect_shape(name, shape)?;
        self.tensor(name)
    }

    /// A matrix that the checkpoint itself holds in NF4 (bitsandbytes).
    ///
    /// # Errors
    ///
    /// What is wrong with its parts.
    pub fn nf4(&self, name: &str) -> Result<Option<Nf4Tensor>, Error> {
        match &self.files {
            Files::Safetensors(weights) => bitsandbytes::read(weights, name),
            #[cfg(feature = "gguf")]
            Files::Gguf { .. } => Ok(None),
        }
    }

    /// SHA-256 over the model's weights and configuration, in hex.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn sha256(&self) -> Result<String, Error> {
        Ok(arete_records::hashes::sha256_path(&self.path)?)
    }

    /// The model's tokenizer.
    ///
    /// # Errors
    ///
    /// What is wrong with its files.
    pub fn tokenizer(&self) -> Result<Tokenizer, Error> {
        match &self.files {
            Files::Safetensors(_) => Tokenizer::from_directory(&self.path),
            #[cfg(feature = "gguf")]
            Files::Gguf { file, .. } => {
                Tokenizer::from_gguf(&self.path, vocabulary(file.metadata())?)
            }
        }
    }

    /// The model's chat template.
    ///
    /// # Errors
    ///
    /// [`Error::NoTemplate`] if it has none.
    pub fn template(&self) -> Result<ChatTemplate, Error> {
        self.tokenizer()?.template()
    }

    /// The file a tensor lies in.
    fn path_of(&self, name: &str) -> &Path {
        match &self.files {
            Files::Safetensors(weights) => {
                weights.file_of(name).map_or(self.path.as_path(), SafetensorsFile::path)
            }
            #[cfg(feature = "gguf")]
            Files::Gguf { .. } => &self.path,
        }
    }

    #[cfg(feature = "gguf")]
    fn missing(&self, name: &str) -> Error {
        Error::MissingTensor { path: self.path.clone(), name: name.to_owned() }
    }

    /// Heads whose rows GGUF stores interleaved: those of Q and K in Llama files.
    #[cfg(feature = "gguf")]
    fn interleaved_heads(&self, name: &str) -> Option<usize> {
        if name.ends_with("self_attn.q_proj.weight") {
            Some(self.config.num_heads)
        } else if name.ends_with("self_attn.k_proj.weight") {
            Some(self.config.num_kv_heads)
        } else {
            None
        }
    }
}

/// Why a directory has no weights this crate opens.
fn no_weights(directory: &Path) -> Error {
    let pickled = fs_err::read_dir(directory).into_iter().flatten().flatten().map(|e| e.path());
    let is_pickle = |path: &PathBuf| {
        path.extension()
            .and_then(|ending| ending.to_str())
            .is_some_and(|ending| PICKLE_ENDINGS.contains(&ending))
    };
    match pickled.filter(is_pickle).min() {
        Some(path) => pickle(&path),
        None => {
            Error::field(directory, "weights", "model.safetensors or an index of shards", "neither")
        }
    }
}

/// Tensors by shard, from the index; shard names must stay inside the directory.
pub(crate) fn shards_of_index(index: &Path) -> Result<BTreeMap<String, BTreeSet<String>>, Error> {
    let map = read_json_object(index, MAX_INDEX_BYTES)?;
    let Some(Value::Object(weights)) = map.get("weight_map") else {
        return Err(Error::field(
            index,
            "weight_map",
            "shards by tensor name",
            "nothing of the sort",
        ));
    };
    let mut out: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (tensor, shard) in weights {
        let safe = |name: &&str| {
            name.ends_with(".safetensors")
                && !name.starts_with('.')
                && name.len() <= 255
                && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let Some(shard) = shard.as_str().filter(safe) else {
            let expected = "the name of a .safetensors file in the same directory";
            return Err(Error::field(index, tensor, expected, shard.to_string()));
        };
        out.entry(shard.to_owned()).or_default().insert(tensor.clone());
    }
    Ok(out)
}

/// The Hugging Face name of a llama-architecture GGUF tensor; None for tables the decoder computes itself.
#[cfg(feature = "gguf")]
fn hugging_face_name(name: &str) -> Option<String> {
    let fixed = match name {
        "token_embd.weight" => Some("model.embed_tokens.weight"),
        "output_norm.weight" => Some("model.norm.weight"),
        "output.weight" => Some("lm_head.weight"),
        _ => None,
    };
    if let Some(fixed) = fixed {
        return Some(fixed.to_owned());
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    let module = match rest.strip_suffix(".weight")? {
        "attn_norm" => "input_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{module}.weight"))
}

/// What the metadata says about the tokenizer.
#[cfg(feature = "gguf")]
fn vocabulary(metadata: &gguf::Metadata) -> Result<GgufVocabulary, Error> {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let id = |name: &str| -> Result<Option<i64>, Error> {
        Ok(metadata.optional_size(&key(name))?.map(|id| id as i64))
    };
    let text = |name: &str| metadata.optional_string(&key(name)).map(|t| t.map(str::to_owned));
    Ok(GgufVocabulary {
        model: metadata.string(&key("model"))?.to_owned(),
        pre: text("pre")?,
        tokens: metadata.optional_strings(&key("tokens"))?.unwrap_or_default(),
        token_types: metadata
            .optional_numbers(&key("token_type"))?
            .unwrap_or_default()
            .into_iter()
            .map(|value| value as i32)
            .collect(),
        merges: metadata.optional_strings(&key("merges"))?.unwrap_or_default(),
        scores: metadata
            .optional_numbers(&key("scores"))?
            .unwrap_or_default()
            .into_iter()
            .map(|value| value as f32)
            .collect(),
        bos_id: id("bos_token_id")?,
        eos_id: id("eos_token_id")?,
        unk_id: id("unknown_token_id")?,
        pad_id: id("padding_token_id")?,
        add_bos: metadata.optional_flag(&key("add_bos_token"))?,
        add_eos: metadata.optional_flag(&key("add_eos_token"))?,
        add_space_prefix: metadata.optional_flag(&key("add_space_prefix"))?,
        chat_template: metadata.optional_string("tokenizer.chat_template")?.map(str::to_owned),
    })
}

#[cfg(test)]
mod tests;
