//! Opening a model: where it is, what it is made of, its tensors one at a time.
//!
//! Tensors go by their Hugging Face names (`model.layers.0.self_attn.q_proj.weight`) whatever the file calls them.
//! Nothing is held in memory but headers; a tensor is read when it is asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use arete_records::files::read_capped;
use arete_records::hashes;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};

use self::config::{GENERATION_FILE, MAX_CONFIG_BYTES};
#[cfg(feature = "gguf")]
use self::gguf::Gguf;
use self::safetensors::SafetensorsFile;
use crate::Error;
use crate::json::{is_word, read_object};
use crate::machine::runtime::dtype_name;
use crate::nf4::Nf4Tensor;
use crate::text::template::ChatTemplate;
use crate::text::tokenizer::{MAX_TOKENIZER_BYTES, Tokenizer};

mod bitsandbytes;
mod bytes;
pub(crate) mod config;
mod directory;
#[cfg(feature = "gguf")]
pub mod gguf;
#[cfg(feature = "gguf")]
mod gguf_names;
pub mod safetensors;
mod source;

pub use self::config::{Family, ModelConfig, RopeScaling};
pub(crate) use self::directory::check_adapter;
#[cfg(feature = "gguf")]
use self::gguf_names::{ROPE_FACTORS, hugging_face_name, vocabulary};
pub use self::source::Source;
#[cfg(feature = "hub")]
pub(crate) use self::source::conversion_command;
use self::source::download;

/// The name of a sharded checkpoint's table.
const INDEX_FILE: &str = "model.safetensors.index.json";
const MAX_INDEX_BYTES: u64 = 25 << 20;
/// A checkpoint that is not sharded.
const SINGLE_FILE: &str = "model.safetensors";

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
                if !directory.join(&name).exists() {
                    let expected = format!("every file that {INDEX_FILE} names: {name}");
                    return Err(Error::field(directory, "weights", expected, "no such file"));
                }
                let file = SafetensorsFile::open(&directory.join(&name))?;
                for tensor in tensors {
                    if !file.contains(&tensor) {
                        let path = file.path().to_path_buf();
                        return Err(Error::MissingTensor { path, name: tensor });
                    }
                    place.insert(tensor, files.len());
                }
                let is_here = |name: &&str| place.get(*name) == Some(&files.len());
                if let Some(stray) = file.names().find(|name| !is_here(name)) {
                    let expected = format!("only tensors that {INDEX_FILE} lists for this file");
                    return Err(Error::field(file.path(), stray, expected, "another"));
                }
                files.push(file);
            }
        } else {
            return Err(directory::no_weights(directory));
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
        directory::check_model(directory)?;
        let config = ModelConfig::from_directory(directory)?;
        let weights = Weights::open(directory)?;
        let expected = config.expected_tensors();
        let ours = |name: &str| expected.iter().any(|(known, _)| known == name);
        for name in weights.place.keys() {
            let of_model =
                name.strip_suffix(".bias").is_some_and(|stem| ours(&format!("{stem}.weight")));
            if of_model || (name.ends_with(".bias") && !is_beyond(name, &config)) {
                let expected = "no biases (they are not supported)";
                return Err(Error::field(weights.file_of(name)?.path(), name, expected, "a bias"));
            }
        }
        let files = Files::Safetensors(weights);
        let mut opened = Self { path: directory.to_path_buf(), config, files };
        opened.part_head()?;
        opened.warn_of_strangers();
        opened.checked()
    }

    /// Where a file has a vocabulary matrix of its own although the configuration says it is the embedding, its numbers decide,
    /// as in transformers (5.24, `PreTrainedModel.tie_weights`): unlike numbers are not tied.
    fn part_head(&mut self) -> Result<(), Error> {
        let (embedding, head) = ("model.embed_tokens.weight", "lm_head.weight");
        let both = self.contains(embedding) && self.contains(head);
        if self.config.sequence_classification || !self.config.tie_word_embeddings || !both {
            return Ok(());
        }
        let (one, other) = (self.tensor(embedding)?, self.tensor(head)?);
        let same = one.size() == other.size()
            && match one.kind() == other.kind() {
                true => one.f_equal(&other)?,
                false => one.f_to_kind(Kind::Double)?.f_equal(&other.f_to_kind(Kind::Double)?)?,
            };
        if !same {
            let path = self.path.display();
            tracing::warn!(
                %path,
                "tie_word_embeddings is true, but lm_head.weight differs from the embedding: the model's own head is used"
            );
            self.config.tie_word_embeddings = false;
        }
        Ok(())
    }

    /// Says which tensors of the files the model does not have: they are read by nobody, and copied nowhere.
    fn warn_of_strangers(&self) {
        let expected = self.config.expected_tensors();
        let known = |name: &str| {
            name == "lm_head.weight"
                || name.ends_with(".inv_freq")
                || expected.iter().any(|(known, _)| known == name)
        };
        let names = self.names();
        let strangers: Vec<&String> = names.iter().filter(|name| !known(name)).collect();
        if let Some(first) = strangers.first() {
            let (path, n) = (self.path.display(), strangers.len());
            tracing::warn!(%path, first, n, "tensors that the configuration does not have are left out");
        }
    }

    #[cfg(feature = "gguf")]
    fn open_gguf(path: &Path) -> Result<Self, Error> {
        let file = Gguf::open(path)?;
        check_whole(&file)?;
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
        check_blocks(path, &config, &names)?;
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
            Files::Safetensors(_) => self.narrowed(name, self.tensor(name)?, kind),
            #[cfg(feature = "gguf")]
            Files::Gguf { file, names } => {
                let stored = names.get(name).ok_or_else(|| self.missing(name))?;
                file.tensor_as(stored, kind, self.interleaved_heads(name))
            }
        }
    }

    /// A tensor in another dtype, whose range must hold its numbers.
    fn narrowed(&self, name: &str, tensor: Tensor, kind: Kind) -> Result<Tensor, Error> {
        let may_overflow =
            tensor.kind() != kind && (kind == Kind::Half || tensor.kind() == Kind::Double);
        let tensor = tensor.f_to_kind(kind)?;
        if may_overflow
            && let Some(place) =
                bytes::first_non_finite(kind, bytes::bytes_of(&tensor.contiguous()))
        {
            let expected = format!("numbers that fit {}", dtype_name(kind));
            let found = format!("a larger one at element {place}; use another dtype");
            return Err(Error::field(self.path_of(name), name, expected, found));
        }
        Ok(tensor)
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
                    return self.narrowed(&parts[0].0, whole, kind);
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

    /// SHA-256 over the model's weights, configuration and vocabulary, in hex: what makes it the model it is. Other files beside
    /// them, cards and the settings of generation among them, do not count. A GGUF file is one with its metadata.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn sha256(&self) -> Result<String, Error> {
        let files = match &self.files {
            Files::Safetensors(weights) => &weights.files,
            #[cfg(feature = "gguf")]
            Files::Gguf { .. } => return Ok(hashes::sha256_path(&self.path)?),
        };
        let mut sums = Vec::with_capacity(files.len());
        for file in files {
            sums.push(hashes::sha256_file(file.path())?);
        }
        sums.sort();
        let mut hasher = Sha256::new();
        hasher.update(format!("{}\n{}\n", self.config.identity(), sums.join("\n")));
        hasher.update(vocabulary_identity(&self.path.join("tokenizer.json"))?);
        Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// `generation_config.json` as it stands; empty if there is none.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if it is damaged.
    pub fn generation_settings(&self) -> Result<Map<String, Value>, Error> {
        let path = self.path.join(GENERATION_FILE);
        if !path.exists() {
            return Ok(Map::new());
        }
        let mut settings = read_object(&path, MAX_CONFIG_BYTES)?;
        settings.retain(|_, value| !is_word(value));
        Ok(settings)
    }

    /// The model's tokenizer.
    ///
    /// # Errors
    ///
    /// What is wrong with its files.
    pub fn tokenizer(&self) -> Result<Tokenizer, Error> {
        let tokenizer = match &self.files {
            Files::Safetensors(_) => Tokenizer::from_directory(&self.path)?,
            #[cfg(feature = "gguf")]
            Files::Gguf { file, .. } => {
                Tokenizer::from_gguf(&self.path, vocabulary(file.metadata())?)?
            }
        };
        Ok(tokenizer.for_rows(self.config.vocab_size))
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

/// Whether a tensor belongs to a block that the configuration does not have.
fn is_beyond(name: &str, config: &ModelConfig) -> bool {
    let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next());
    let layer = layer.and_then(|layer| layer.parse::<usize>().ok());
    layer.is_some_and(|layer| layer >= config.num_layers)
}

/// Refuses tensors that the metadata do not imply, as llama.cpp does: without them it would be another model.
#[cfg(feature = "gguf")]
fn check_blocks(
    path: &Path,
    config: &ModelConfig,
    names: &BTreeMap<String, String>,
) -> Result<(), Error> {
    let expected = config.expected_tensors();
    let is_ours = |name: &str| expected.iter().any(|(known, _)| known == name);
    let Some((_, stranger)) = names.iter().find(|(name, _)| !is_ours(name)) else { return Ok(()) };
    let n_blocks = config.num_layers;
    let expected = format!("only tensors of the {n_blocks} blocks that llama.block_count says");
    Err(Error::field(path, stranger, expected, "one of another block"))
}

/// Refuses one part of a model that was split into several files.
#[cfg(feature = "gguf")]
fn check_whole(file: &Gguf) -> Result<(), Error> {
    let (count, number) = ("split.count", "split.no");
    let n_parts = file.metadata().optional_size(count)?.unwrap_or(1);
    if n_parts <= 1 {
        return Ok(());
    }
    let part = file.metadata().optional_size(number)?.unwrap_or(0) + 1;
    let expected = "a model in one file (join the parts with `llama-gguf-split --merge FIRST_PART WHOLE.gguf` of llama.cpp)";
    Err(Error::field(file.path(), count, expected, format!("part {part} of {n_parts}")))
}

/// Tensors by shard, from the index; shard names must stay inside the directory.
pub(crate) fn shards_of_index(index: &Path) -> Result<BTreeMap<String, BTreeSet<String>>, Error> {
    let map = read_object(index, MAX_INDEX_BYTES)?;
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

/// What of a `tokenizer.json` decides which numbers a text has, as one line: weights under another vocabulary are another model.
/// Empty where there is none, or where it is no JSON: whoever needs the tokenizer says so.
fn vocabulary_identity(path: &Path) -> Result<String, Error> {
    if !path.is_file() {
        return Ok(String::new());
    }
    let tokenizer: Value =
        serde_json::from_slice(&read_capped(path, MAX_TOKENIZER_BYTES)?).unwrap_or_default();
    let parts = ["model", "added_tokens", "normalizer", "pre_tokenizer"];
    Ok(parts.map(|part| tokenizer[part].to_string()).join("\n"))
}

#[cfg(test)]
mod tests;
