//! The configuration in a GGUF file's metadata.

use std::path::Path;

use super::{Family, ModelConfig, RopeScaling};
use crate::Error;
use crate::checkpoint::gguf::{Metadata, Value};

impl ModelConfig {
    /// The configuration of a GGUF file of the llama architecture.
    ///
    /// # Errors
    ///
    /// As [`ModelConfig::from_directory`].
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
        let id = |name: &str| special_id(metadata, name, vocab_size);
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
}

/// A number that a file holds as f32, as people write it: 1e-5, not 0.000009999999747378752.
pub(super) fn decimal(value: f64) -> f64 {
    let narrow = value as f32;
    if f64::from(narrow) != value {
        return value;
    }
    narrow.to_string().parse().expect("a finite number is written and read")
}

/// A special token's id under `tokenizer.ggml.NAME`, or what llama.cpp takes where the file names none, or none that is in the
/// vocabulary (writers put -1, which reads as 2^32 - 1, for a padding token that there is not).
///
/// # Source
///
/// llama.cpp, `llama_vocab::impl::load`: SentencePiece vocabularies have `<unk>`, `<s>` and `</s>` first.
pub(crate) fn special_id(
    metadata: &Metadata,
    name: &str,
    vocab_size: usize,
) -> Result<Option<i64>, Error> {
    let key = format!("tokenizer.ggml.{name}");
    let given = match metadata.get(&key) {
        Some(Value::Signed(id)) if *id < 0 => Some(None),
        _ => metadata.optional_size(&key)?.map(|id| Some(id).filter(|id| *id < vocab_size)),
    };
    if let Some(Some(id)) = given {
        return Ok(Some(id as i64));
    }
    let is_sentencepiece =
        metadata.optional_string("tokenizer.ggml.model")?.is_some_and(|model| model == "llama");
    let default = match name {
        "unknown_token_id" if is_sentencepiece => Some(0),
        "bos_token_id" if is_sentencepiece => Some(1),
        "eos_token_id" if is_sentencepiece => Some(2),
        _ => None,
    };
    let default = default.filter(|id| (*id as usize) < vocab_size);
    if given.is_some() {
        let path = metadata.path().display();
        tracing::warn!(%path, key, ?default, "no token of the vocabulary; this one is taken, as llama.cpp does");
    }
    Ok(default)
}
