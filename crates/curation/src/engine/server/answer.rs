//! What a server answered: replies and candidates out of JSON that is someone else's. Pure functions of values.

use arete_engine::http::{self, Failure, FailureKind, kind_of_status};
use arete_records::FinishReason;
use arete_records::table::shortened;
use serde_json::Value;

use super::super::{Labels, Reply};
use crate::judge::verdict::LabelMass;

/// An answer of status 200, unless it is none or says that something went wrong.
pub(super) fn parse(text: &str) -> Result<Value, Failure> {
    let answer = http::parse(text)?;
    reported(&answer).map_or(Ok(answer), Err)
}

/// The mass of either label, and the candidates that it was added up from.
pub(super) fn verdict(
    answer: &Value,
    labels: Labels,
) -> Result<(LabelMass, Vec<(String, f64)>), Failure> {
    let request = |reason: String| Failure::new(FailureKind::Request, reason);
    let candidates = candidates(answer).map_err(request)?;
    let mass = masses(&candidates, labels).map_err(request)?;
    Ok((mass, candidates))
}

/// What an answer of status 200 says went wrong, if it says so: routers report their provider's fault that way.
pub(super) fn reported(answer: &Value) -> Option<Failure> {
    let error = answer.get("error").filter(|error| !error.is_null());
    let is_without = answer.get("choices").is_none_or(|choices| choices.get(0).is_none());
    let Some(error) = error else {
        return is_without.then(|| {
            Failure::passing(format!("an answer without choices: {}", shortened(answer)))
        });
    };
    let text = error
        .get("message")
        .and_then(Value::as_str)
        .map_or_else(|| shortened(error), str::to_owned);
    let code = ["code", "status"].iter().find_map(|key| match error.get(*key) {
        Some(Value::Number(code)) => code.as_u64(),
        Some(Value::String(code)) => code.parse().ok(),
        _ => None,
    });
    let reason = match code {
        Some(code) => format!("the server reports an error ({code}): {text}"),
        None => format!("the server reports an error: {text}"),
    };
    Some(Failure::new(code.map_or(FailureKind::Passing, kind_of_status), reason))
}

/// The text of a message: a text, or a list of parts that are texts.
fn text_of(content: &Value) -> Option<String> {
    match content {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => {
            parts.iter().map(|part| part["text"].as_str().or_else(|| part.as_str())).collect()
        }
        _ => None,
    }
}

/// Tokens of a reply. The interface lets a server keep silent about it; then none are counted. A count that is none is refused.
fn n_tokens(answer: &Value) -> Result<usize, String> {
    let n = &answer["usage"]["completion_tokens"];
    if n.is_null() {
        return Ok(0);
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked")]
    let whole = |n: f64| n as usize;
    n.as_f64()
        .filter(|n| (0.0..1e9).contains(n) && n.fract() == 0.0)
        .map(whole)
        .ok_or_else(|| format!("usage.completion_tokens: expected a number of tokens, got {n}"))
}

/// Whether the model thought, and came to no reply.
pub(super) fn is_thought(answer: &Value) -> bool {
    let message = &answer["choices"][0]["message"];
    let is_silent = text_of(&message["content"]).is_none_or(|text| text.trim().is_empty());
    let thought =
        ["reasoning_content", "reasoning"].into_iter().find_map(|key| message[key].as_str());
    is_silent && thought.is_some_and(|thought| !thought.is_empty())
}

/// The first choice's text, why it ended, and how many tokens it took.
pub(super) fn reply(answer: &Value) -> Result<Reply, Failure> {
    let refused = |reason: String| Failure::new(FailureKind::Request, reason);
    let choice = &answer["choices"][0];
    let message = &choice["message"];
    let text = text_of(&message["content"]).map(|text| text.trim().to_owned());
    let n_tokens = n_tokens(answer).map_err(refused)?;
    let finish_reason = match choice["finish_reason"].as_str() {
        Some("stop" | "eos" | "eos_token" | "stop_sequence" | "end" | "end_turn") => {
            FinishReason::Stop
        }
        Some("length" | "max_tokens") => FinishReason::Length,
        Some("content_filter") => {
            tracing::warn!("the server's content filter broke a reply off: it counts as cut");
            let (text, finish_reason) = (text.unwrap_or_default(), FinishReason::Length);
            return Ok(Reply { text, finish_reason, n_tokens });
        }
        other => {
            return Err(refused(format!("finish_reason: expected stop or length, got {other:?}")));
        }
    };
    let is_silent = text.as_ref().is_none_or(String::is_empty);
    if is_silent && let Some(refusal) = message["refusal"].as_str() {
        return Err(refused(format!("the model refused: {refusal}")));
    }
    if is_thought(answer) {
        return Err(refused(
            "all tokens went into the model's thoughts and none into a reply: give it more (max_new_tokens, or \
             verdict_tokens of a judge), or have the server turn its thinking off"
                .to_owned(),
        ));
    }
    let text =
        text.ok_or_else(|| refused("reply without choices[0].message.content".to_owned()))?;
    Ok(Reply { text, finish_reason, n_tokens })
}

/// The first token's candidates: text and log-probability, each once.
pub(super) fn candidates(answer: &Value) -> Result<Vec<(String, f64)>, String> {
    let at = "choices[0].logprobs.content[0].top_logprobs";
    let found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        .as_array()
        .filter(|candidates| !candidates.is_empty())
        .ok_or_else(|| format!("expected {at}, got none"))?;
    let mut candidates: Vec<(String, f64)> = Vec::new();
    for candidate in found {
        let token = candidate["token"].as_str();
        // Minus infinity has no word in JSON: writers make it null.
        if token.is_some() && candidate["logprob"].is_null() {
            continue;
        }
        let read = token
            .zip(candidate["logprob"].as_f64())
            .filter(|(_, logprob)| *logprob <= 1e-3) // NaN fails too
            .map(|(token, logprob)| (token.to_owned(), logprob))
            .ok_or_else(|| {
                format!("{at}: expected a token and its log-probability, got {candidate}")
            })?;
        // Some servers put the sampled token first and then again among the most probable.
        if !candidates.contains(&read) {
            candidates.push(read);
        }
    }
    if candidates.is_empty() {
        return Err(format!("{at}: expected a candidate with a probability, got none"));
    }
    Ok(candidates)
}

/// Whether a token is a label: bare, or after a space.
pub(super) fn spells(token: &str, label: &str) -> bool {
    token.trim_start_matches([' ', 'Ġ', '▁']) == label
}

/// Adds up the candidates that spell a label.
pub(super) fn masses(candidates: &[(String, f64)], labels: Labels) -> Result<LabelMass, String> {
    let mass = |label: &str| -> f64 {
        candidates
            .iter()
            .filter(|(token, _)| spells(token, label))
            .map(|(_, logprob)| logprob.exp())
            .sum()
    };
    let mass = LabelMass { first: mass(labels.first), second: mass(labels.second) };
    let total: f64 = candidates.iter().map(|(_, logprob)| logprob.exp()).sum();
    if total > 1.0 + 1e-2 {
        return Err(format!("log-probabilities add up to a probability of {total:.3}"));
    }
    Ok(mass)
}

/// The token that the server gave most probability.
pub(super) fn most_probable(candidates: &[(String, f64)]) -> Option<&str> {
    let best = candidates.iter().max_by(|a, b| a.1.total_cmp(&b.1));
    best.map(|(token, _)| token.as_str())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn answer(message: Value, finish_reason: &str) -> Value {
        json!({"choices": [{"message": message, "finish_reason": finish_reason}]})
    }

    #[test]
    fn what_the_official_client_can_read_is_read() {
        let text = json!({"content": " It would be kind. "});
        for reason in ["stop", "eos_token", "end", "eos", "end_turn"] {
            let reply = reply(&answer(text.clone(), reason)).unwrap_or_else(|_| panic!("{reason}"));
            assert_eq!((reply.text.as_str(), reply.n_tokens), ("It would be kind.", 0));
            assert_eq!(reply.finish_reason, FinishReason::Stop);
        }
        let parts = json!({"content": [{"type": "text", "text": "It would "}, {"type": "text", "text": "be kind."}]});
        let mut parts = answer(parts, "length");
        for (usage, n) in [
            (json!(null), 0),
            (json!({"completion_tokens": 7.0}), 7),
            (json!({"completion_tokens": 9}), 9),
        ] {
            parts["usage"] = usage;
            let reply = reply(&parts).unwrap_or_else(|_| panic!("{parts}"));
            assert_eq!((reply.text.as_str(), reply.n_tokens), ("It would be kind.", n));
        }
    }

    #[test]
    fn a_count_of_tokens_that_is_none_is_refused() {
        let mut absurd = answer(json!({"content": "Kindly."}), "stop");
        for n in [json!(-1), json!(i64::MIN), json!(u64::MAX), json!(1e300), json!(1.5), json!("9")]
        {
            absurd["usage"] = json!({"completion_tokens": n});
            let refusal = reply(&absurd).err().unwrap_or_else(|| panic!("{n} was taken"));
            assert!(refusal.reason.contains("usage.completion_tokens"), "{}", refusal.reason);
        }
    }

    #[test]
    fn silence_is_refused_with_its_cause() {
        let refused = |message| {
            reply(&answer(message, "length"))
                .err()
                .map(|failure| failure.reason)
                .unwrap_or_default()
        };
        assert!(
            refused(json!({"content": null, "refusal": "I can't."})).contains("refused: I can't.")
        );
        let thought = refused(json!({"content": null, "reasoning_content": "Okay, the user"}));
        assert!(thought.contains("thoughts") && thought.contains("verdict_tokens"), "{thought}");
        assert!(refused(json!({"content": "", "reasoning": "Okay"})).contains("thoughts"));
        assert!(refused(json!({"content": null})).contains("message.content"));
        // An empty reply that nothing explains is a reply.
        assert!(reply(&answer(json!({"content": ""}), "stop")).is_ok());
    }

    #[test]
    fn errors_of_status_200_are_what_they_say() {
        let kind = |answer: Value| reported(&answer).map(|failure| failure.kind);
        assert!(
            kind(json!({"error": {"code": 429, "message": "slow"}})) == Some(FailureKind::Passing)
        );
        assert!(
            kind(json!({"error": {"code": 404, "message": "none"}})) == Some(FailureKind::Lasting)
        );
        assert!(
            kind(json!({"error": {"code": 400, "message": "long"}})) == Some(FailureKind::Request)
        );
        assert!(kind(json!({"error": "upstream"})) == Some(FailureKind::Passing));
        assert!(kind(json!({"choices": null})) == Some(FailureKind::Passing));
        assert!(
            kind(json!({"choices": null, "error": {"code": 504, "message": "x"}}))
                == Some(FailureKind::Passing)
        );
        assert!(kind(answer(json!({"content": "x"}), "stop")).is_none());
        let reason = reported(&json!({"error": {"code": 429, "message": "rate limited upstream"}}));
        assert!(
            reason.is_some_and(|failure| failure.reason.contains("(429): rate limited upstream"))
        );
    }

    #[test]
    fn a_candidate_counts_once_and_minus_infinity_not_at_all() {
        let lp = |p: f64| p.ln();
        let top = |tokens: &[(&str, Option<f64>)]| {
            let tokens: Vec<Value> = tokens
                .iter()
                .map(|(token, p)| json!({"token": token, "logprob": p.map(lp)}))
                .collect();
            json!({"choices": [{"logprobs": {"content": [{"top_logprobs": tokens}]}}]})
        };
        let twice =
            candidates(&top(&[("A", Some(0.7)), ("A", Some(0.7)), ("B", Some(0.2)), ("C", None)]));
        let twice = twice.unwrap();
        assert_eq!(twice.len(), 2);
        let mass = masses(&twice, Labels::AB).unwrap();
        assert!((mass.first - 0.7).abs() < 1e-9 && (mass.second - 0.2).abs() < 1e-9);
        assert_eq!(most_probable(&twice), Some("A"));
        let much = candidates(&top(&[("A", Some(0.9)), ("B", Some(0.9))])).unwrap();
        assert!(masses(&much, Labels::AB).is_err());
        assert!(candidates(&top(&[])).is_err());
    }
}
