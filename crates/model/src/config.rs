//! The architecture of a model, from `config.json` or GGUF metadata.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::Error;
use crate::checkpoint::gguf::Metadata;

/// Architectures this crate runs, as `config.json` names them.
pub const SUPPORTED: &str = "LlamaForCausalLM, MistralForCausalLM, LlamaForSequenceClassification, \
                             MistralForSequenceClassification";

/// Largest accepted `config.json`.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// Which family a model belongs to (they differ in names and in the sliding window).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama, and models that use its architecture (SmolLM2).
    Llama,
    /// Mistral.
    Mistral,
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
        let rope_theta = rope_theta(&reader)?;
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
            None => return Err(reader.wrong("head_dim", "a size (hidden_size is not a multiple of the heads)")),
        };
        let score_stats = match (
            reader.optional_number("score_mean")?,
            reader.optional_number("score_std")?,
        ) {
            (Some(mean), Some(std)) => Some((mean, std)),
            _ => None,
        };
        let config = Self {
            family,
            sequence_classification,
            vocab_size: reader.size("vocab_size")?,
            hidden_size,
            intermediate_size: reader.size("intermediate_size")?,
            num_layers: reader.size("num_hidden_layers")?,
            num_heads,
            num_kv_heads: reader.optional_size("num_key_value_heads")?.unwrap_or(num_heads),
            head_size,
            rms_norm_eps: reader.optional_number("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            sliding_window: match family {
                Family::Mistral => reader.optional_size("sliding_window")?,
                Family::Llama => None,
            },
            max_position_embeddings: reader.optional_size("max_position_embeddings")?.unwrap_or(2048),
            tie_word_embeddings: reader.flag("tie_word_embeddings", false)?,
            bos_token_id: reader.ids("bos_token_id")?.first().copied(),
            eos_token_ids: reader.ids("eos_token_id")?,
            pad_token_id: reader.ids("pad_token_id")?.first().copied(),
            score_stats,
        };
        config.check(path)
    }

    /// The configuration of a GGUF file of the llama architecture.
    ///
    /// # Errors
    ///
    /// As [`ModelConfig::from_directory`].
    pub fn from_gguf(metadata: &Metadata, tied: bool, vocab_size: usize) -> Result<Self, Error> {
        let path = metadata.path();
        let architecture = metadata.string("general.architecture")?;
        let family = match architecture {
            "llama" => Family::Llama,
            "mistral" | "mistral3" => Family::Mistral,
            other => {
                return Err(Error::Architecture {
                    path: path.to_path_buf(),
                    field: "general.architecture".to_owned(),
                    found: other.to_owned(),
                    supported: "llama, mistral".to_owned(),
                });
            }
        };
        let key = |name: &str| format!("{architecture}.{name}");
        let size = |name: &str| metadata.size(&key(name));
        let (hidden_size, num_heads) = (size("embedding_length")?, size("attention.head_count")?);
        if let Some(kind) = metadata.optional_string(&key("rope.scaling.type"))?
            && kind != "none"
        {
            return Err(Error::field(path, key("rope.scaling.type"), "none", kind));
        }
        let head_size = match metadata.optional_size(&key("attention.key_length"))? {
            Some(size) => size,
            None => match metadata.optional_size(&key("rope.dimension_count"))? {
                Some(size) => size,
                None => hidden_size / num_heads,
            },
        };
        let id = |name: &str| -> Result<Option<i64>, Error> {
            Ok(metadata.optional_size(&format!("tokenizer.ggml.{name}"))?.map(|id| id as i64))
        };
        let config = Self {
            family,
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
            rms_norm_eps: metadata.number(&key("attention.layer_norm_rms_epsilon"))?,
            rope_theta: metadata.optional_number(&key("rope.freq_base"))?.unwrap_or(10_000.0),
            sliding_window: metadata.optional_size(&key("attention.sliding_window"))?,
            max_position_embeddings: size("context_length")?,
            tie_word_embeddings: tied,
            bos_token_id: id("bos_token_id")?,
            eos_token_ids: id("eos_token_id")?.into_iter().collect(),
            pad_token_id: id("padding_token_id")?,
            score_stats: None,
        };
        config.check(path)
    }

    /// Refuses sizes that cannot belong together or that no real model has.
    fn check(self, path: &Path) -> Result<Self, Error> {
        let fail = |field: &str, expected: String, found: String| {
            Err(Error::field(path, field, expected, found))
        };
        if self.num_heads % self.num_kv_heads != 0 {
            return fail(
                "num_key_value_heads",
                format!("a divisor of {} heads", self.num_heads),
                self.num_kv_heads.to_string(),
            );
        }
        if self.head_size % 2 != 0 {
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
        if !(self.rms_norm_eps > 0.0 && self.rope_theta > 0.0) {
            let found = format!("{} and {}", self.rms_norm_eps, self.rope_theta);
            return fail("rms_norm_eps and rope_theta", "positive numbers".to_owned(), found);
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
        put("rope_theta", json!(self.rope_theta));
        put("rope_scaling", Value::Null);
        put("rope_parameters", json!({"rope_theta": self.rope_theta, "rope_type": "default"}));
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

/// The rotary base in either spelling; a scaled rotary embedding is refused.
fn rope_theta(reader: &Reader<'_>) -> Result<f64, Error> {
    for key in ["rope_parameters", "rope_scaling"] {
        let Some(value) = reader.present(key) else { continue };
        let Some(map) = value.as_object() else { return Err(reader.wrong(key, "an object")) };
        let inner = Reader { path: reader.path, map };
        for name in ["rope_type", "type"] {
            if inner.present(name).is_some_and(|kind| kind.as_str() != Some("default")) {
                return Err(inner.wrong(name, "default (scaled rotary embeddings are not supported)"));
            }
        }
        if let Some(theta) = inner.optional_number("rope_theta")? {
            return Ok(theta);
        }
    }
    Ok(reader.optional_number("rope_theta")?.unwrap_or(10_000.0))
}
