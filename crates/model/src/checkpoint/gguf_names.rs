//! Tensors and vocabulary of a GGUF file under the names that the rest of the crate has for them.

use super::gguf::Metadata;
use crate::Error;
use crate::checkpoint::config::special_id;
use crate::text::tokenizer::GgufVocabulary;

/// GGUF's table of divisors of the rotary frequencies (Llama 3.1 and later).
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The Hugging Face name of a llama-architecture GGUF tensor; None for tables the decoder computes itself.
pub(super) fn hugging_face_name(name: &str) -> Option<String> {
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
    let layer: usize = layer.parse().ok().filter(|number: &usize| number.to_string() == layer)?;
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
pub(super) fn vocabulary(metadata: &Metadata) -> Result<GgufVocabulary, Error> {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let tokens = metadata.optional_strings(&key("tokens"))?.unwrap_or_default();
    let id = |name: &str| special_id(metadata, name, tokens.len());
    let text = |name: &str| metadata.optional_string(&key(name)).map(|t| t.map(str::to_owned));
    let model = metadata.string(&key("model"))?.to_owned();
    let merges = metadata.optional_strings(&key("merges"))?;
    if model == "gpt2" && merges.is_none() {
        let expected = "the merges of a gpt2 vocabulary (without them every text falls into bytes)";
        return Err(Error::field(metadata.path(), key("merges"), expected, "nothing"));
    }
    Ok(GgufVocabulary {
        model,
        pre: text("pre")?,
        token_types: metadata
            .optional_numbers(&key("token_type"))?
            .unwrap_or_default()
            .into_iter()
            .map(|value| value as i32)
            .collect(),
        merges: merges.unwrap_or_default(),
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
        tokens,
    })
}
