//! The architecture of a model, from `config.json` or GGUF metadata.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::Error;
use crate::json::read_object;

use self::reader::Reader;
pub use self::rope::RopeScaling;
use self::rope::{rope, rope_scaling_json};

#[cfg(feature = "gguf")]
mod gguf;
#[cfg(feature = "gguf")]
pub(crate) use self::gguf::special_id;
mod reader;
mod rope;

/// Architectures this crate runs, as `config.json` names them.
pub(crate) const SUPPORTED: &str = "LlamaForCausalLM, MistralForCausalLM, LlamaForSequenceClassification, \
                             MistralForSequenceClassification";

/// A model's settings of generation, beside its `config.json`.
pub(crate) const GENERATION_FILE: &str = "generation_config.json";
/// Largest accepted `config.json`.
pub(crate) const MAX_CONFIG_BYTES: u64 = 4 << 20;
/// Most numbers in the table of rotary angles: a gibibyte, two million positions of heads of 128.
const MAX_ANGLES: usize = 1 << 27;

/// Which family a model belongs to (they differ in names and in the sliding window).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama, and models that use its architecture (SmolLM2).
    Llama,
    /// Mistral.
    Mistral,
}

impl Family {
    /// What `config.json` calls it.
    fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
        }
    }
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

impl ModelConfig {
    /// Reads `config.json`, and the end-of-text ids of `generation_config.json` where it exists.
    ///
    /// # Errors
    ///
    /// [`Error::Architecture`] for another architecture, [`Error::Field`] for a missing or impossible key.
    pub fn from_directory(directory: &Path) -> Result<Self, Error> {
        let path = directory.join("config.json");
        let mut config = Self::from_json(&path, &read_object(&path, MAX_CONFIG_BYTES)?)?;
        let generation = directory.join(GENERATION_FILE);
        if generation.exists() {
            let map = read_object(&generation, MAX_CONFIG_BYTES)?;
            for id in (Reader { path: &generation, map: &map }).ids("eos_token_id")? {
                if id >= config.vocab_size as i64 {
                    let expected = format!("ids below the vocabulary's {}", config.vocab_size);
                    return Err(Error::field(
                        &generation,
                        "eos_token_id",
                        expected,
                        id.to_string(),
                    ));
                }
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
        if family == Family::Mistral {
            check_layer_types(&reader, config.num_layers, config.sliding_window)?;
        }
        config.check(path)
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

    /// Everything that the numbers of a forward pass depend on beside the weights, as one line.
    pub(crate) fn identity(&self) -> String {
        let plain = Self {
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            pad_token_id: None,
            score_stats: None,
            ..self.clone()
        };
        Value::Object(plain.to_json(tch::Kind::Float)).to_string()
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
            Family::Llama => ("Llama", self.family.model_type()),
            Family::Mistral => ("Mistral", self.family.model_type()),
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
    let (family, sequence_classification) = match listed {
        Some("LlamaForCausalLM") => (Family::Llama, false),
        Some("MistralForCausalLM") => (Family::Mistral, false),
        Some("LlamaForSequenceClassification") => (Family::Llama, true),
        Some("MistralForSequenceClassification") => (Family::Mistral, true),
        Some(other) => return Err(unsupported("architectures", other)),
        None => match reader.present("model_type").and_then(Value::as_str) {
            Some("llama") => (Family::Llama, false),
            Some("mistral") => (Family::Mistral, false),
            other => return Err(unsupported("model_type", other.unwrap_or("nothing"))),
        },
    };
    // transformers' AutoModel goes by `model_type`, others by `architectures`: it must be one model to both.
    let model_type = family.model_type();
    if reader.present("model_type").is_some_and(|found| found != model_type) {
        let listed = listed.unwrap_or_default();
        return Err(
            reader.wrong("model_type", &format!("{model_type}, as architectures says {listed}"))
        );
    }
    Ok((family, sequence_classification))
}

/// Refuses `layer_types` that change the model: transformers takes a Mistral that has them for a Ministral, whose layers see all
/// tokens or those in the window by their types.
fn check_layer_types(
    reader: &Reader<'_>,
    n_layers: usize,
    sliding_window: Option<usize>,
) -> Result<(), Error> {
    let key = "layer_types";
    let Some(types) = reader.present(key) else { return Ok(()) };
    let kind = match sliding_window {
        Some(_) => "sliding_attention",
        None => "full_attention",
    };
    let is_one = |types: &Vec<Value>| types.len() == n_layers && types.iter().all(|t| t == kind);
    if types.as_array().is_some_and(is_one) {
        return Ok(());
    }
    let window = sliding_window.map_or("null".to_owned(), |window| window.to_string());
    let expected = format!(
        "{n_layers} times {kind}, as sliding_window is {window} (layers that differ are not supported)"
    );
    Err(reader.wrong(key, &expected))
}

/// Refuses weights packed in a way this crate does not read (its tensors would be missing or misread).
fn check_quantization(reader: &Reader<'_>) -> Result<(), Error> {
    let key = "quantization_config";
    let Some(value) = reader.present(key) else { return Ok(()) };
    let Some(map) = value.as_object() else { return Err(reader.wrong(key, "an object")) };
    let inner = Reader { path: reader.path, map };
    let method = inner.present("quant_method").and_then(Value::as_str);
    let kind = inner.present("bnb_4bit_quant_type").and_then(Value::as_str);
    let is_8bit = |key| inner.flag(key, false);
    if is_8bit("load_in_8bit")? || is_8bit("_load_in_8bit")? {
        let expected = "four-bit NF4 or unquantised weights (load the model with transformers and save it dequantised)";
        return Err(Error::field(
            reader.path,
            "load_in_8bit",
            expected,
            "an int8 checkpoint of bitsandbytes",
        ));
    }
    // bitsandbytes' own default is fp4; files without a method are older bitsandbytes ones.
    match (method.unwrap_or("bitsandbytes"), kind) {
        ("bitsandbytes", Some("nf4")) => Ok(()),
        ("bitsandbytes", _) => Err(inner.wrong("bnb_4bit_quant_type", "nf4")),
        _ => Err(inner.wrong("quant_method", "bitsandbytes (in NF4), or unquantised weights")),
    }
}

#[cfg(test)]
mod tests;
