//! The architecture of a model, from `config.json` or GGUF metadata.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::Error;
#[cfg(feature = "gguf")]
use crate::checkpoint::gguf::Metadata;

/// Architectures this crate runs, as `config.json` names them.
pub const SUPPORTED: &str = "LlamaForCausalLM, MistralForCausalLM, LlamaForSequenceClassification, \
                             MistralForSequenceClassification";

/// Largest accepted `config.json`.
const MAX_CONFIG_BYTES: u64 = 4 << 20;
/// Most numbers in the table of rotary angles: a gibibyte, two million positions of heads of 128.
const MAX_ANGLES: usize = 1 << 28;

/// Which family a model belongs to (they differ in names and in the sliding window).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama, and models that use its architecture (SmolLM2).
    Llama,
    /// Mistral.
    Mistral,
}

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

/// The shape of a decoder. Names are those of `config.json` in plain words.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Llama or Mistral.
    pub family: Family,
    /// True for `…ForSequenceClassification` (a reward model).
    pub sequence_classification: bool,
    /// V.
    pub vocab_size: usize,
    /// D.
    pub hidden_size: usize,
    /// F, the width of the feed-forward network.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_layers: usize,
    /// H.
    pub num_heads: usize,
    /// K.
    pub num_kv_heads: usize,
    /// E.
    pub head_size: usize,
    /// Added to the mean square in RMS norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// How its frequencies are stretched, if they are.
    pub rope_scaling: Option<RopeScaling>,
    /// Tokens each token sees, itself included; `None` for all.
    pub sliding_window: Option<usize>,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// Whether the vocabulary matrix is the embedding.
    pub tie_word_embeddings: bool,
    /// Begin of text.
    pub bos_token_id: Option<i64>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<i64>,
    /// Padding, if named.
    pub pad_token_id: Option<i64>,
    /// Mean and standard deviation of a reward model's scores on reference completions.
    pub score_stats: Option<(f64, f64)>,
}

/// Checked access to a JSON object; errors name the file and the key.
struct Reader<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
}

impl Reader<'_> {
    fn wrong(&self, key: &str, expected: &str) -> Error {
        let found = match self.map.get(key) {
            None => "nothing".to_owned(),
            Some(value) => value.to_string().chars().take(80).collect(),
        };
        Error::field(self.path, key, expected, found)
    }

    fn present(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn size(&self, key: &str) -> Result<usize, Error> {
        self.optional_size(key)?.ok_or_else(|| self.wrong(key, "a positive integer"))
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>, Error> {
        let Some(value) = self.present(key) else { return Ok(None) };
        match value.as_u64() {
            Some(size) if (1..1 << 31).contains(&size) => Ok(Some(size as usize)),
            _ => Err(self.wrong(key, "a positive integer below 2^31")),
        }
    }

    fn optional_number(&self, key: &str) -> Result<Option<f64>, Error> {
        match self.present(key) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) if number.is_finite() => Ok(Some(number)),
                _ => Err(self.wrong(key, "a number")),
            },
        }
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, Error> {
        match self.present(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.wrong(key, "true or false")),
        }
    }

    /// An id or a list of ids.
    fn ids(&self, key: &str) -> Result<Vec<i64>, Error> {
        let one = |value: &Value| {
            value.as_i64().filter(|id| *id >= 0).ok_or_else(|| self.wrong(key, "token ids"))
        };
        match self.present(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(values)) => values.iter().map(one).collect(),
            Some(value) => Ok(vec![one(value)?]),
        }
    }
}

/// Reads a small JSON file that holds an object.
pub(crate) fn read_json_object(path: &Path, max_bytes: u64) -> Result<Map<String, Value>, Error> {
    let n_bytes = fs_err::metadata(path)?.len();
    if n_bytes > max_bytes {
        let expected = format!("at most {max_bytes} bytes");
        return Err(Error::field(path, "file size", expected, format!("{n_bytes} bytes")));
    }
    match serde_json::from_slice(&fs_err::read(path)?) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::field(path, "content", "a JSON object", "another JSON value")),
        Err(error) => Err(Error::field(path, "content", "JSON", error.to_string())),
    }
}

impl ModelConfig {
    /// Reads `config.json`, and the end-of-text ids of `generation_config.json` where it exists.
    ///
    /// # Errors
    ///
    /// [`Error::Architecture`] for another architecture, [`Error::Field`] for a missing or impossible key.
    pub fn from_directory(directory: &Path) -> Result<Self, Error> {
        let path = directory.join("config.json");
        let mut config = Self::from_json(&path, &read_json_object(&path, MAX_CONFIG_BYTES)?)?;
        let generation = directory.join("generation_config.json");
        if generation.exists() {
            let map = read_json_object(&generation, MAX_CONFIG_BYTES)?;
            for id in (Reader { path: &generation, map: &map }).ids("eos_token_id")? {
                if !config.eos_token_ids.contains(&id) {
                    config.eos_token_ids.push(id);
                }
            }
        }
        Ok(config)
    }

    /// The configuration in an already parsed `config.json`; `path` is for messages.
    ///
    /// # Errors
    ///
    /// As [`ModelConfig::from_directory`].
    pub fn from_json(path: &Path, map: &Map<String, Value>) -> Result<Self, Error> {
        let reader = Reader { path, map };
        let (family, sequence_classification) = architecture(&reader)?;
        let (rope_theta, rope_scaling) = rope(&reader)?;
        check_quantization(&reader)?;
        for (key, supported) in [("hidden_act", "silu"), ("hidden_activation", "silu")] {
            if reader.present(key).is_some_and(|value| value.as_str() != Some(supported)) {
                return Err(reader.wrong(key, supported));
            }
        }
        for key in ["attention_bias", "mlp_bias"] {
            if reader.flag(key, false)? {
                return Err(reader.wrong(key, "false (biases are not supported)"));
            }
        }
        let (hidden_size, num_heads) =
            (reader.size("hidden_size")?, reader.size("num_attention_heads")?);
        let head_size = match reader.optional_size("head_dim")? {
            Some(size) => size,
            None if hidden_size % num_heads == 0 => hidden_size / num_heads,
            None => {
                return Err(
                    reader.wrong("head_dim", "a size (hidden_size is not a multiple of the heads)")
                );
            }
        };
        let score_stats =
            match (reader.optional_number("score_mean")?, reader.optional_number("score_std")?) {
                (Some(mean), Some(std)) if std > 0.0 => Some((mean, std)),
                (None, None) => None,
                (Some(_), _) => return Err(reader.wrong("score_std", "a positive number")),
                (None, Some(_)) => return Err(reader.wrong("score_mean", "a number")),
            };
        // What transformers' LlamaConfig and MistralConfig say where a key is absent.
        let (kv_heads, positions) = match family {
            Family::Llama => (num_heads, 2048),
            Family::Mistral => (8, 131_072),
        };
        let config = Self {
            family,
            sequence_classification,
            vocab_size: reader.size("vocab_size")?,
            hidden_size,
            intermediate_size: reader.size("intermediate_size")?,
            num_layers: reader.size("num_hidden_layers")?,
            num_heads,
            num_kv_heads: reader.optional_size("num_key_value_heads")?.unwrap_or(kv_heads),
            head_size,
            rms_norm_eps: reader.optional_number("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            sliding_window: match family {
                Family::Mistral if !map.contains_key("sliding_window") => Some(4096),
                Family::Mistral => reader.optional_size("sliding_window")?,
                Family::Llama => None, // transformers' Llama has none, whatever the file says
            },
            max_position_embeddings: reader
                .optional_size("max_position_embeddings")?
                .unwrap_or(positions),
            tie_word_embeddings: reader.flag("tie_word_embeddings", false)?,
            bos_token_id: reader.ids("bos_token_id")?.first().copied(),
            eos_token_ids: reader.ids("eos_token_id")?,
            // Some older files say -1 for none.
            pad_token_id: match reader.present("pad_token_id").and_then(Value::as_i64) {
                Some(-1) => None,
                _ => reader.ids("pad_token_id")?.first().copied(),
            },
            score_stats,
        };
        config.check(path)
    }

    /// The configuration of a GGUF file of the llama architecture.
    ///
    /// # Errors
    ///
    /// As [`ModelConfig::from_directory`].
    #[cfg(feature = "gguf")]
    pub fn from_gguf(metadata: &Metadata, tied: bool, vocab_size: usize) -> Result<Self, Error> {
        let path = metadata.path();
        let architecture = metadata.string("general.architecture")?;
        if architecture != "llama" {
            return Err(Error::Architecture {
                path: path.to_path_buf(),
                field: "general.architecture".to_owned(),
                found: architecture.chars().take(80).collect(),
                supported: "llama (Llama, Mistral, SmolLM2)".to_owned(),
            });
        }
        let key = |name: &str| format!("{architecture}.{name}");
        let size = |name: &str| metadata.size(&key(name));
        let (hidden_size, num_heads) = (size("embedding_length")?, size("attention.head_count")?);
        // As llama.cpp: linear where no type is named, under the old key too; a factor of 0 stands for none.
        let rope_scaling = match metadata.optional_string(&key("rope.scaling.type"))? {
            Some("none") => None,
            None | Some("linear") => {
                let factor = match metadata.optional_number(&key("rope.scaling.factor"))? {
                    Some(factor) => Some(factor),
                    None => metadata.optional_number(&key("rope.scale_linear"))?,
                };
                let stretches = |factor: &f64| *factor != 0.0 && *factor != 1.0;
                let factor = factor.filter(stretches).map(decimal);
                factor.map(|factor| RopeScaling::Linear { factor })
            }
            Some(other) => {
                let found: String = other.chars().take(80).collect();
                return Err(Error::field(path, key("rope.scaling.type"), "none or linear", found));
            }
        };
        if let Some(experts) = metadata.optional_size(&key("expert_count"))?.filter(|n| *n > 0) {
            let expected = "no experts (mixtures are not supported)";
            return Err(Error::field(path, key("expert_count"), expected, experts.to_string()));
        }
        let head_size = match metadata.optional_size(&key("attention.key_length"))? {
            Some(size) => size,
            None if hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
            None => {
                let expected = format!("a multiple of {num_heads} heads");
                return Err(Error::field(
                    path,
                    key("embedding_length"),
                    expected,
                    hidden_size.to_string(),
                ));
            }
        };
        for name in ["attention.value_length", "rope.dimension_count"] {
            if let Some(size) = metadata.optional_size(&key(name))?.filter(|n| *n != head_size) {
                let expected = format!("{head_size}, the size of a head");
                return Err(Error::field(path, key(name), expected, size.to_string()));
            }
        }
        let sliding_window =
            metadata.optional_size(&key("attention.sliding_window"))?.filter(|n| *n > 0);
        let id = |name: &str| -> Result<Option<i64>, Error> {
            Ok(metadata.optional_size(&format!("tokenizer.ggml.{name}"))?.map(|id| id as i64))
        };
        let mut eos_token_ids = Vec::new();
        for name in ["eos_token_id", "eot_token_id"] {
            eos_token_ids.extend(id(name)?.filter(|id| !eos_token_ids.contains(id)));
        }
        let config = Self {
            // Files of both families say `llama`; only Mistral has a window.
            family: if sliding_window.is_some() { Family::Mistral } else { Family::Llama },
            sequence_classification: false,
            vocab_size,
            hidden_size,
            intermediate_size: size("feed_forward_length")?,
            num_layers: size("block_count")?,
            num_heads,
            num_kv_heads: metadata
                .optional_size(&key("attention.head_count_kv"))?
                .unwrap_or(num_heads),
            head_size,
            rms_norm_eps: decimal(metadata.number(&key("attention.layer_norm_rms_epsilon"))?),
            rope_theta: metadata.optional_number(&key("rope.freq_base"))?.map_or(10_000.0, decimal),
            rope_scaling,
            sliding_window,
            max_position_embeddings: size("context_length")?,
            tie_word_embeddings: tied,
            bos_token_id: id("bos_token_id")?,
            eos_token_ids,
            pad_token_id: id("padding_token_id")?,
            score_stats: None,
        };
        config.check(path)
    }

    /// Takes the scaling that a GGUF file gives as a table of divisors, one per pair of dimensions.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if the table is not one of the published Llama 3 models'.
    #[cfg(feature = "gguf")]
    pub(crate) fn set_rope_factors(
        &mut self,
        path: &Path,
        field: &str,
        factors: &[f32],
    ) -> Result<(), Error> {
        if let Some(scaling) = self.rope_scaling {
            let expected = "no other scaling beside the table";
            return Err(Error::field(path, field, expected, format!("{scaling:?}")));
        }
        // llama.cpp's converter computes the table from config.json and drops the parameters: the published ones
        // (Llama 3.1: 8, Llama 3.2: 32) are tried. A divisor is the plain frequency over the stretched one.
        let plain = Self { rope_scaling: None, ..self.clone() }.inverse_frequencies();
        for factor in [8.0, 32.0] {
            let known = Self {
                rope_scaling: Some(RopeScaling::Llama3 {
                    factor,
                    low_freq_factor: 1.0,
                    high_freq_factor: 4.0,
                    original_max_position_embeddings: 8192,
                }),
                ..self.clone()
            };
            let stretched = known.inverse_frequencies();
            let divisors = plain.iter().zip(&stretched).map(|(plain, new)| plain / new);
            let close = |(a, b): (f32, &f32)| (a - b).abs() <= 1e-4 * a.abs();
            if factors.len() == plain.len() && divisors.zip(factors).all(close) {
                *self = known;
                return Ok(());
            }
        }
        let found: Vec<f32> = factors.iter().copied().take(4).collect();
        let expected = "the divisors of Llama 3.1 or 3.2";
        Err(Error::field(path, field, expected, format!("{} from {found:?}", factors.len())))
    }

    /// Angle per position of each pair of dimensions, `[E/2]` f32, as transformers computes it.
    ///
    /// # Source
    ///
    /// transformers 5.23, `modeling_rope_utils.py`: `_compute_linear_scaling_rope_parameters`,
    /// `_compute_llama3_parameters`.
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        let theta = self.rope_theta as f32;
        let plain = (0..self.head_size / 2)
            .map(|i| 1.0 / theta.powf((2 * i) as f32 / self.head_size as f32));
        match self.rope_scaling {
            None => plain.collect(),
            Some(RopeScaling::Linear { factor }) => {
                plain.map(|frequency| frequency / factor as f32).collect()
            }
            Some(RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            }) => {
                let original = original_max_position_embeddings as f64;
                let long = (original / low_freq_factor) as f32;
                let short = (original / high_freq_factor) as f32;
                let (factor, original) = (factor as f32, original as f32);
                let span = (high_freq_factor - low_freq_factor) as f32;
                plain
                    .map(|frequency| {
                        let wavelength = 2.0 * std::f32::consts::PI / frequency;
                        if wavelength > long {
                            return frequency / factor;
                        }
                        if wavelength < short {
                            return frequency;
                        }
                        let smooth = (original / wavelength - low_freq_factor as f32) / span;
                        (1.0 - smooth) * frequency / factor + smooth * frequency
                    })
                    .collect()
            }
        }
    }

    /// Every tensor a checkpoint of this configuration holds, with its shape.
    pub fn expected_tensors(&self) -> Vec<(String, Vec<i64>)> {
        let size = |n: usize| n as i64;
        let (hidden, wide) = (size(self.hidden_size), size(self.intermediate_size));
        let queries = size(self.num_heads * self.head_size);
        let keys = size(self.num_kv_heads * self.head_size);
        let vocabulary = size(self.vocab_size);
        let mut out = vec![("model.embed_tokens.weight".to_owned(), vec![vocabulary, hidden])];
        for layer in 0..self.num_layers {
            let modules = [
                ("input_layernorm", vec![hidden]),
                ("self_attn.q_proj", vec![queries, hidden]),
                ("self_attn.k_proj", vec![keys, hidden]),
                ("self_attn.v_proj", vec![keys, hidden]),
                ("self_attn.o_proj", vec![hidden, queries]),
                ("post_attention_layernorm", vec![hidden]),
                ("mlp.gate_proj", vec![wide, hidden]),
                ("mlp.up_proj", vec![wide, hidden]),
                ("mlp.down_proj", vec![hidden, wide]),
            ];
            out.extend(
                modules.map(|(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape)),
            );
        }
        out.push(("model.norm.weight".to_owned(), vec![hidden]));
        if self.sequence_classification {
            out.push(("score.weight".to_owned(), vec![1, hidden]));
        } else if !self.tie_word_embeddings {
            out.push(("lm_head.weight".to_owned(), vec![vocabulary, hidden]));
        }
        out
    }

    /// Refuses sizes that cannot belong together or that no real model has.
    fn check(self, path: &Path) -> Result<Self, Error> {
        let fail = |field: &str, expected: String, found: String| {
            Err(Error::field(path, field, expected, found))
        };
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return fail(
                "num_key_value_heads",
                format!("a divisor of {} heads", self.num_heads),
                self.num_kv_heads.to_string(),
            );
        }
        if !self.head_size.is_multiple_of(2) {
            return fail("head_dim", "an even size".to_owned(), self.head_size.to_string());
        }
        let limits = [
            ("vocab_size", self.vocab_size, 4 << 20),
            ("hidden_size", self.hidden_size, 1 << 16),
            ("intermediate_size", self.intermediate_size, 1 << 18),
            ("num_hidden_layers", self.num_layers, 1 << 10),
            ("num_attention_heads", self.num_heads, 1 << 10),
            ("head_dim", self.head_size, 1 << 12),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 24),
        ];
        for (field, size, limit) in limits {
            if size > limit {
                return fail(field, format!("at most {limit}"), size.to_string());
            }
        }
        // The table of rotary angles holds so many numbers.
        if self.max_position_embeddings * self.head_size > MAX_ANGLES {
            return fail(
                "max_position_embeddings",
                format!("at most {} at heads of {}", MAX_ANGLES / self.head_size, self.head_size),
                self.max_position_embeddings.to_string(),
            );
        }
        for (field, value) in [("rms_norm_eps", self.rms_norm_eps), ("rope_theta", self.rope_theta)]
        {
            if !(value > 0.0 && value < 1e15) {
                return fail(field, "a positive number".to_owned(), value.to_string());
            }
        }
        let (fits, found) = match self.rope_scaling {
            None => (true, String::new()),
            Some(RopeScaling::Linear { factor }) => (factor >= 1.0, format!("factor {factor}")),
            Some(RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                ..
            }) => (
                factor >= 1.0 && low > 0.0 && high > low,
                format!("factor {factor}, low_freq_factor {low}, high_freq_factor {high}"),
            ),
        };
        if !fits {
            return fail("rope scaling", "factors of at least 1, low below high".to_owned(), found);
        }
        for id in self.bos_token_id.into_iter().chain(self.eos_token_ids.iter().copied()) {
            if id >= self.vocab_size as i64 {
                let expected = format!("ids below the vocabulary's {}", self.vocab_size);
                return fail("special token ids", expected, id.to_string());
            }
        }
        Ok(self)
    }

    /// A `config.json` that transformers 4 and 5 both read: both spellings of the rotary base and of the dtype.
    pub fn to_json(&self, dtype: tch::Kind) -> Map<String, Value> {
        let (family, model_type) = match self.family {
            Family::Llama => ("Llama", "llama"),
            Family::Mistral => ("Mistral", "mistral"),
        };
        let task = if self.sequence_classification { "SequenceClassification" } else { "CausalLM" };
        let dtype = match dtype {
            tch::Kind::BFloat16 => "bfloat16",
            tch::Kind::Half => "float16",
            _ => "float32",
        };
        let eos = match self.eos_token_ids[..] {
            [] => Value::Null,
            [id] => json!(id),
            _ => json!(self.eos_token_ids),
        };
        let mut out = Map::new();
        let mut put = |key: &str, value: Value| {
            out.insert(key.to_owned(), value);
        };
        put("architectures", json!([format!("{family}For{task}")]));
        put("model_type", json!(model_type));
        put("attention_bias", json!(false));
        put("attention_dropout", json!(0.0));
        put("bos_token_id", json!(self.bos_token_id));
        put("eos_token_id", eos);
        put("pad_token_id", json!(self.pad_token_id));
        put("head_dim", json!(self.head_size));
        put("hidden_act", json!("silu"));
        put("hidden_size", json!(self.hidden_size));
        put("intermediate_size", json!(self.intermediate_size));
        put("max_position_embeddings", json!(self.max_position_embeddings));
        put("num_attention_heads", json!(self.num_heads));
        put("num_hidden_layers", json!(self.num_layers));
        put("num_key_value_heads", json!(self.num_kv_heads));
        put("rms_norm_eps", json!(self.rms_norm_eps));
        // transformers 4 reads the first two, 5 the third.
        let scaling = rope_scaling_json(self.rope_scaling);
        let mut parameters = scaling
            .clone()
            .unwrap_or_else(|| Map::from_iter([("rope_type".to_owned(), json!("default"))]));
        parameters.insert("rope_theta".to_owned(), json!(self.rope_theta));
        put("rope_theta", json!(self.rope_theta));
        put("rope_scaling", json!(scaling));
        put("rope_parameters", Value::Object(parameters));
        if self.family == Family::Mistral {
            put("sliding_window", json!(self.sliding_window));
        }
        put("tie_word_embeddings", json!(self.tie_word_embeddings));
        put("torch_dtype", json!(dtype));
        put("dtype", json!(dtype));
        put("use_cache", json!(true));
        put("vocab_size", json!(self.vocab_size));
        if self.sequence_classification {
            put("num_labels", json!(1));
            put("id2label", json!({"0": "LABEL_0"}));
            put("label2id", json!({"LABEL_0": 0}));
        }
        if let Some((mean, std)) = self.score_stats {
            put("score_mean", json!(mean));
            put("score_std", json!(std));
        }
        out
    }
}

/// Family and task from `architectures`, or from `model_type` where that is missing.
fn architecture(reader: &Reader<'_>) -> Result<(Family, bool), Error> {
    let listed = reader
        .present("architectures")
        .and_then(Value::as_array)
        .and_then(|list| list.first())
        .and_then(Value::as_str);
    let unsupported = |field: &str, found: &str| Error::Architecture {
        path: reader.path.to_path_buf(),
        field: field.to_owned(),
        found: found.to_owned(),
        supported: SUPPORTED.to_owned(),
    };
    match listed {
        Some("LlamaForCausalLM") => Ok((Family::Llama, false)),
        Some("MistralForCausalLM") => Ok((Family::Mistral, false)),
        Some("LlamaForSequenceClassification") => Ok((Family::Llama, true)),
        Some("MistralForSequenceClassification") => Ok((Family::Mistral, true)),
        Some(other) => Err(unsupported("architectures", other)),
        None => match reader.present("model_type").and_then(Value::as_str) {
            Some("llama") => Ok((Family::Llama, false)),
            Some("mistral") => Ok((Family::Mistral, false)),
            other => Err(unsupported("model_type", other.unwrap_or("nothing"))),
        },
    }
}

/// The rotary base and its scaling, in either spelling: keys of their own (transformers 4) or all under
/// `rope_parameters` (5). Both may be there if they agree.
fn rope(reader: &Reader<'_>) -> Result<(f64, Option<RopeScaling>), Error> {
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

fn rope_scaling_json(scaling: Option<RopeScaling>) -> Option<Map<String, Value>> {
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

/// Refuses weights packed in a way this crate does not read (its tensors would be missing or misread).
fn check_quantization(reader: &Reader<'_>) -> Result<(), Error> {
    let key = "quantization_config";
    let Some(value) = reader.present(key) else { return Ok(()) };
    let Some(map) = value.as_object() else { return Err(reader.wrong(key, "an object")) };
    let inner = Reader { path: reader.path, map };
    let method = inner.present("quant_method").and_then(Value::as_str);
    let kind = inner.present("bnb_4bit_quant_type").and_then(Value::as_str);
    // bitsandbytes' own default is fp4; files without a method are older bitsandbytes ones.
    match (method.unwrap_or("bitsandbytes"), kind) {
        ("bitsandbytes", Some("nf4")) => Ok(()),
        ("bitsandbytes", _) => Err(inner.wrong("bnb_4bit_quant_type", "nf4")),
        _ => Err(inner.wrong("quant_method", "bitsandbytes (in NF4), or unquantised weights")),
    }
}

/// A number that a file holds as f32, as people write it: 1e-5, not 0.000009999999747378752.
#[cfg(feature = "gguf")]
fn decimal(value: f64) -> f64 {
    let narrow = value as f32;
    if f64::from(narrow) != value {
        return value;
    }
    narrow.to_string().parse().expect("a finite number is written and read")
}

#[cfg(test)]
mod tests;
