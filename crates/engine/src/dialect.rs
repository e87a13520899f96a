//! How kinds of servers are asked and what they answer: pure functions of JSON values.
//!
//! # Source
//!
//! vLLM 0.32 (`entrypoints/openai/completion/protocol.py`, `entrypoints/serve/lora`, `entrypoints/pooling`); SGLang
//! (`/generate`, `/load_lora_adapter`, `/unload_lora_adapter`), after its documentation: no SGLang server was at hand.

use arete_model::generate::{Completion, Sampling};
use arete_records::FinishReason;
use arete_records::table::shortened;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::http::{Failure, FailureKind};

/// Which kind of server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Dialect {
    /// vLLM with `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1.
    #[default]
    Vllm,
    /// SGLang with `--enable-lora`.
    Sglang,
}

/// Where adapters and models are listed.
pub(crate) const MODELS: &str = "/v1/models";

/// A model or an adapter that a server lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    /// Its name.
    pub name: String,
    /// Where it was loaded from.
    pub path: Option<String>,
    /// The base of an adapter; none of a base.
    pub parent: Option<String>,
}

/// What a reply is sampled from.
#[derive(Clone, Debug)]
pub(crate) struct Prompt<'a> {
    /// The base's name.
    pub(crate) base: &'a str,
    /// The adapter's, if it is not the base that replies.
    pub(crate) adapter: Option<&'a str>,
    /// The tokens before the reply.
    pub(crate) token_ids: &'a [i64],
    /// Keeps what servers remember of prompts apart by adapter.
    pub(crate) salt: &'a str,
}

/// How a reply is drawn.
#[derive(Clone, Debug)]
pub(crate) struct Draw<'a> {
    pub(crate) sampling: Sampling,
    pub(crate) seed: u64,
    pub(crate) max_new_tokens: usize,
    pub(crate) stop_ids: &'a [i64],
}

impl Dialect {
    /// The name in settings and records.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::Sglang => "sglang",
        }
    }

    /// Where an adapter is loaded.
    pub(crate) fn load_path(self) -> &'static str {
        match self {
            Self::Vllm => "/v1/load_lora_adapter",
            Self::Sglang => "/load_lora_adapter",
        }
    }

    /// Where it is unloaded.
    pub(crate) fn unload_path(self) -> &'static str {
        match self {
            Self::Vllm => "/v1/unload_lora_adapter",
            Self::Sglang => "/unload_lora_adapter",
        }
    }

    /// Where replies are sampled, and given text is read.
    pub(crate) fn sample_path(self) -> &'static str {
        match self {
            Self::Vllm => "/v1/completions",
            Self::Sglang => "/generate",
        }
    }

    /// What a server that has no such path should have been started with.
    pub(crate) fn advice(self) -> &'static str {
        match self {
            Self::Vllm => {
                "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in the environment and --enable-lora --max-lora-rank R"
            }
            Self::Sglang => "start it with --enable-lora and without data parallelism",
        }
    }

    /// A request for one reply.
    pub(crate) fn sample(self, prompt: &Prompt<'_>, draw: &Draw<'_>) -> Value {
        let Draw { sampling, seed, max_new_tokens, stop_ids } = draw;
        match self {
            // Our own list of tokens ends a reply and nothing else; all filters are named, or the model's own defaults apply.
            Self::Vllm => json!({
                "model": prompt.adapter.unwrap_or(prompt.base),
                "prompt": prompt.token_ids,
                "n": 1,
                "stream": false,
                "max_tokens": max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "seed": seed,
                "ignore_eos": true,
                "stop_token_ids": stop_ids,
                "logprobs": 0,
                "return_token_ids": true,
                "skip_special_tokens": false,
                "add_special_tokens": false,
                "cache_salt": prompt.salt,
            }),
            Self::Sglang => {
                let mut body = json!({
                    "input_ids": prompt.token_ids,
                    "sampling_params": {
                        "max_new_tokens": max_new_tokens,
                        "temperature": sampling.temperature,
                        "top_p": sampling.top_p,
                        "top_k": if sampling.top_k == 0 { -1 } else { sampling.top_k as i64 },
                        "min_p": 0.0,
                        "repetition_penalty": 1.0,
                        "sampling_seed": seed,
                        "ignore_eos": true,
                        "stop_token_ids": stop_ids,
                        "skip_special_tokens": false,
                    },
                    "return_logprob": true,
                    "stream": false,
                });
                // Without this key the adapter is silently not used.
                if let Some(adapter) = prompt.adapter {
                    body["lora_path"] = json!(adapter);
                }
                body
            }
        }
    }

    /// A request for the log-probabilities of the prompt's own tokens.
    pub(crate) fn read(self, prompt: &Prompt<'_>) -> Value {
        match self {
            Self::Vllm => json!({
                "model": prompt.adapter.unwrap_or(prompt.base),
                "prompt": prompt.token_ids,
                "n": 1,
                "stream": false,
                "max_tokens": 1,
                "temperature": 1.0,
                "prompt_logprobs": 0,
                "add_special_tokens": false,
                "cache_salt": prompt.salt,
            }),
            Self::Sglang => {
                let mut body = json!({
                    "input_ids": prompt.token_ids,
                    "sampling_params": { "max_new_tokens": 1, "temperature": 1.0 },
                    "return_logprob": true,
                    "logprob_start_len": 0,
                    "stream": false,
                });
                if let Some(adapter) = prompt.adapter {
                    body["lora_path"] = json!(adapter);
                }
                body
            }
        }
    }

    /// The reply that an answer holds.
    ///
    /// # Errors
    ///
    /// What makes no sense: a server that answers so is at fault.
    pub(crate) fn reply(self, answer: &Value, draw: &Draw<'_>) -> Result<Completion, Failure> {
        let wrong = |what: String| Failure::lasting(format!("{what}: {}", shortened(answer)));
        let (token_ids, logprobs, reason) = match self {
            Self::Vllm => {
                let choice = &answer["choices"][0];
                let logprobs: Option<Vec<f64>> = array(&choice["logprobs"]["token_logprobs"])
                    .and_then(|values| values.iter().map(Value::as_f64).collect());
                (ids(&choice["token_ids"]), logprobs, choice["finish_reason"].as_str())
            }
            Self::Sglang => {
                let meta = &answer["meta_info"];
                let logprobs = array(&meta["output_token_logprobs"])
                    .and_then(|values| values.iter().map(|entry| entry[0].as_f64()).collect());
                (ids(&answer["output_ids"]), logprobs, meta["finish_reason"]["type"].as_str())
            }
        };
        let token_ids = token_ids.ok_or_else(|| {
            wrong(
                "expected the reply's tokens (return_token_ids, which vLLM has since 0.10.2)"
                    .to_owned(),
            )
        })?;
        let logprobs = logprobs
            .filter(|found| found.len() == token_ids.len())
            .filter(|found| found.iter().all(|value| *value <= 1e-3)) // NaN fails, too
            .ok_or_else(|| {
                wrong("expected a log-probability for each of the reply's tokens".to_owned())
            })?;
        let finish_reason = match reason {
            Some("stop") => FinishReason::Stop,
            Some("length") => FinishReason::Length,
            // A server that is being stopped lets go of what it works on.
            Some(other @ ("abort" | "error")) => {
                return Err(Failure::passing(format!("the reply was broken off ({other})")));
            }
            other => {
                return Err(wrong(format!(
                    "finish_reason: expected stop or length, got {other:?}"
                )));
            }
        };
        let (n, stops) = (token_ids.len(), |id: &i64| draw.stop_ids.contains(id));
        let is_closed = token_ids.last().is_some_and(stops);
        let is_sound = match finish_reason {
            FinishReason::Stop => is_closed && n <= draw.max_new_tokens,
            FinishReason::Length => !is_closed && n == draw.max_new_tokens,
        };
        if !is_sound || token_ids.iter().rev().skip(1).any(stops) {
            let expected = "expected a reply that ends at a stop token, or at the limit of tokens, and nowhere else";
            return Err(wrong(format!(
                "{expected}, got {n} tokens of {} that end by {finish_reason:?} at {:?}",
                draw.max_new_tokens,
                token_ids.last()
            )));
        }
        #[expect(clippy::cast_possible_truncation, reason = "servers compute them in f32")]
        let logprobs = logprobs.into_iter().map(|value| value as f32).collect();
        Ok(Completion { token_ids, logprobs, finish_reason })
    }

    /// log P of each token of the prompt but the first.
    ///
    /// # Errors
    ///
    /// What makes no sense.
    pub(crate) fn values(self, answer: &Value, token_ids: &[i64]) -> Result<Vec<f64>, Failure> {
        let found = match self {
            Self::Vllm => array(&answer["choices"][0]["prompt_logprobs"]),
            Self::Sglang => array(&answer["meta_info"]["input_token_logprobs"]),
        };
        let value = |(id, entry): (&i64, &Value)| match self {
            Self::Vllm => entry[id.to_string()]["logprob"].as_f64(),
            Self::Sglang => entry[0].as_f64().filter(|_| entry[1].as_i64() == Some(*id)),
        };
        found
            .filter(|found| found.len() == token_ids.len())
            .and_then(|found| token_ids.iter().zip(found).skip(1).map(value).collect())
            .ok_or_else(|| {
                let what = "expected log-probabilities of the prompt's tokens (prompt_logprobs)";
                Failure::lasting(format!("{what}: {}", shortened(answer)))
            })
    }
}

/// What a server lists.
pub(crate) fn cards(answer: &Value) -> Result<Vec<Card>, Failure> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let card = |card: &Value| {
        Some(Card {
            name: text(&card["id"])?,
            path: text(&card["root"]),
            parent: text(&card["parent"]),
        })
    };
    let found = array(&answer["data"]).and_then(|found| found.iter().map(card).collect());
    found.ok_or_else(|| {
        Failure::passing(format!("expected a list of models: {}", shortened(answer)))
    })
}

/// Whether a refusal says that an adapter of this name is there already.
pub(crate) fn is_loaded_already(failure: &Failure) -> bool {
    failure.kind == FailureKind::Request && failure.reason.contains("already")
}

/// What a refusal to load means for the next attempt: a file that another machine wrote a moment ago may not be seen yet.
pub(crate) fn of_loading(dialect: Dialect, failure: Failure) -> Failure {
    let is_unseen = ["No adapter found", "does not exist", "not found at"]
        .iter()
        .any(|sign| failure.reason.contains(sign));
    match failure.status {
        Some(404 | 400) if is_unseen => Failure { kind: FailureKind::Passing, ..failure },
        Some(404 | 405) => {
            let reason = format!(
                "{}; it takes no adapters at run time: {}",
                failure.reason,
                dialect.advice()
            );
            Failure { reason, ..failure }
        }
        _ => failure,
    }
}

fn array(value: &Value) -> Option<&Vec<Value>> {
    value.as_array()
}

fn ids(value: &Value) -> Option<Vec<i64>> {
    let ids: Vec<i64> = array(value)?.iter().map(Value::as_i64).collect::<Option<_>>()?;
    (!ids.is_empty() && ids.iter().all(|id| *id >= 0)).then_some(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRAW: Draw<'_> =
        Draw { sampling: Sampling::GREEDY, seed: 3, max_new_tokens: 3, stop_ids: &[2, 9] };

    fn vllm(token_ids: &[i64], reason: &str) -> Value {
        let logprobs = vec![-0.5; token_ids.len()];
        json!({"choices": [{
            "token_ids": token_ids, "finish_reason": reason, "logprobs": {"token_logprobs": logprobs},
        }]})
    }

    fn sglang(token_ids: &[i64], reason: &str) -> Value {
        let logprobs: Vec<Value> = token_ids.iter().map(|id| json!([-0.5, id, null])).collect();
        json!({"output_ids": token_ids, "meta_info": {
            "finish_reason": {"type": reason, "matched": 2}, "output_token_logprobs": logprobs,
        }})
    }

    #[test]
    fn replies_are_read_in_either_dialect_and_must_make_sense() {
        for (dialect, answer) in
            [(Dialect::Vllm, vllm as fn(&[i64], &str) -> Value), (Dialect::Sglang, sglang)]
        {
            let read = |ids: &[i64], reason: &str| dialect.reply(&answer(ids, reason), &DRAW);
            let reply = read(&[5, 2], "stop").unwrap();
            assert_eq!(
                (&reply.token_ids[..], &reply.logprobs[..]),
                (&[5, 2][..], &[-0.5, -0.5][..])
            );
            assert_eq!(reply.finish_reason, FinishReason::Stop);
            assert_eq!(read(&[5, 6, 7], "length").unwrap().finish_reason, FinishReason::Length);
            for (ids, reason) in [
                (&[5, 6][..], "stop"),   // ends nowhere
                (&[5, 6], "length"),     // cut before the limit
                (&[5, 6, 2], "length"),  // at a stop token
                (&[2, 6, 9], "stop"),    // goes on after one
                (&[5, 6, 7, 2], "stop"), // beyond the limit
                (&[][..], "stop"),
                (&[-1, 2], "stop"),
                (&[5, 2], "tool_calls"),
            ] {
                let failure = read(ids, reason).unwrap_err();
                assert_eq!(failure.kind, FailureKind::Lasting, "{ids:?} {reason}: {failure:?}");
            }
            assert_eq!(read(&[5], "abort").unwrap_err().kind, FailureKind::Passing);
        }
        let mut liar = vllm(&[5, 2], "stop");
        liar["choices"][0]["logprobs"]["token_logprobs"] = json!([-0.5, 0.7]);
        assert!(Dialect::Vllm.reply(&liar, &DRAW).is_err());
        liar["choices"][0]["logprobs"]["token_logprobs"] = json!([-0.5]);
        assert!(Dialect::Vllm.reply(&liar, &DRAW).is_err());
    }

    #[test]
    fn values_are_those_of_the_prompts_own_tokens() {
        let answer = json!({"choices": [{"prompt_logprobs": [
            null, {"7": {"logprob": -1.5, "rank": 3}}, {"8": {"logprob": -0.25}, "4": {"logprob": -0.1}},
        ]}]});
        assert_eq!(Dialect::Vllm.values(&answer, &[1, 7, 8]).unwrap(), [-1.5, -0.25]);
        assert!(Dialect::Vllm.values(&answer, &[1, 7, 9]).is_err());
        assert!(Dialect::Vllm.values(&answer, &[1, 7]).is_err());
        let answer = json!({"meta_info": {"input_token_logprobs": [
            [null, 1, null], [-1.5, 7, null], [-0.25, 8, null],
        ]}});
        assert_eq!(Dialect::Sglang.values(&answer, &[1, 7, 8]).unwrap(), [-1.5, -0.25]);
        assert!(Dialect::Sglang.values(&answer, &[1, 7, 9]).is_err());
    }

    #[test]
    fn an_adapter_is_named_where_each_dialect_reads_it() {
        let prompt = Prompt { base: "smol", adapter: Some("a-1"), token_ids: &[1, 7], salt: "s" };
        let vllm = Dialect::Vllm.sample(&prompt, &DRAW);
        assert_eq!((&vllm["model"], &vllm["prompt"]), (&json!("a-1"), &json!([1, 7])));
        assert_eq!((&vllm["logprobs"], &vllm["top_p"]), (&json!(0), &json!(1.0)));
        let sglang = Dialect::Sglang.sample(&prompt, &DRAW);
        assert_eq!((&sglang["lora_path"], &sglang["input_ids"]), (&json!("a-1"), &json!([1, 7])));
        assert_eq!(sglang["sampling_params"]["top_k"], json!(-1));
        let base = Prompt { adapter: None, ..prompt };
        assert_eq!(Dialect::Vllm.read(&base)["model"], json!("smol"));
        assert_eq!(Dialect::Sglang.read(&base).get("lora_path"), None);
    }

    #[test]
    fn what_a_refusal_to_load_means() {
        let of = |status, reason: &str| {
            let failure = Failure::new(crate::http::kind_of_status(u64::from(status)), reason);
            of_loading(Dialect::Vllm, Failure { status: Some(status), ..failure })
        };
        let unseen = of(404, "Loading lora X failed: No adapter found for /a/b");
        assert_eq!(unseen.kind, FailureKind::Passing);
        let closed = of(404, r#"{"detail":"Not Found"}"#);
        assert_eq!(closed.kind, FailureKind::Lasting);
        assert!(closed.reason.contains("VLLM_ALLOW_RUNTIME_LORA_UPDATING"), "{}", closed.reason);
        assert!(is_loaded_already(&of(400, "The lora adapter 'x' has already been loaded.")));
        assert!(!is_loaded_already(&of(400, "Both 'lora_name' and 'lora_path' must be provided.")));
    }
}
