//! The client of OpenAI-compatible servers, against servers that behave, fail and lie.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

mod common;

use std::sync::atomic::Ordering;

use arete_curation::engine::server::{ServerConfig, ServerEngine};
use arete_curation::engine::{Chain, Drawing, Engine, Labels, Query};
use arete_model::generate::Sampling;
use arete_records::{FinishReason, Message};
use common::{Answer, serve};
use serde_json::{Value, json};

fn config() -> ServerConfig {
    ServerConfig { concurrency: 4, attempts: 4, timeout_s: 5.0, backoff_s: 0.001 }
}

fn ok(body: Value) -> Answer {
    Answer::Http(200, "", body.to_string())
}

fn reply(text: &str, finish_reason: &str) -> Answer {
    ok(json!({
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}],
        "usage": {"completion_tokens": 3},
    }))
}

fn verdict(candidates: &[(&str, f64)]) -> Answer {
    let top: Vec<Value> =
        candidates.iter().map(|(token, p)| json!({"token": token, "logprob": p.ln()})).collect();
    ok(json!({"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}))
}

fn last_text(request: &Value) -> String {
    let messages = request["messages"].as_array().unwrap();
    messages.last().unwrap()["content"].as_str().unwrap().to_owned()
}

fn drawing() -> Drawing {
    Drawing { seed: 1, sampling: Sampling::at(0.5), max_new_tokens: 7, is_verdict: false }
}

fn chain(question: &str, key: u64) -> Chain {
    Chain {
        messages: vec![Message::user(question)],
        questions: vec!["why?".to_owned()],
        key,
        samples: vec![0, 1],
    }
}

fn masses(engine: &Engine, questions: &[&str]) -> Vec<(f64, f64)> {
    let query = |question: &&str| Query {
        messages: vec![Message::user(*question)],
        opening: "not sent".to_owned(),
    };
    let queries: Vec<Query> = questions.iter().map(query).collect();
    let masses = engine.label_masses(&queries, Labels::AB).unwrap();
    masses.into_iter().map(|mass| (mass.first, mass.second)).collect()
}

#[test]
fn chains_are_asked_turn_by_turn_and_come_back_in_order() {
    let server = serve(|_, request| {
        let text = last_text(request);
        if text.starts_with("slow") {
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        reply(&format!(" re: {text} "), if text == "why?" { "length" } else { "stop" })
    });
    let engine = ServerEngine::connect(&server.url, "m", &config(), false).unwrap();
    let engine = Engine::Server(engine);
    let chains: Vec<Chain> = (0..6)
        .map(|i| chain(&format!("{} {i}", if i == 0 { "slow" } else { "fast" }), i))
        .collect();
    let replies = engine.chains(&chains, &drawing()).unwrap();
    assert_eq!(replies.len(), 6);
    for (i, samples) in replies.iter().enumerate() {
        assert_eq!(samples.len(), 2);
        let first = &samples[1][0];
        assert_eq!(first.text, format!("re: {} {i}", if i == 0 { "slow" } else { "fast" }));
        assert_eq!((first.finish_reason, first.n_tokens), (FinishReason::Stop, 3));
        assert_eq!(
            (samples[1][1].text.as_str(), samples[1][1].finish_reason),
            ("re: why?", FinishReason::Length)
        );
    }
    assert!(server.most_at_once.load(Ordering::SeqCst) <= 4);
    let requests = server.requests.lock().unwrap();
    let second = requests.iter().find(|r| last_text(r) == "why?").unwrap();
    assert_eq!(second["messages"].as_array().unwrap().len(), 3);
    assert_eq!((&second["max_tokens"], &second["temperature"]), (&json!(7), &json!(0.5)));
    // Every request has a seed of its own, the same in every run.
    let mut seeds: Vec<u64> = requests[1..].iter().map(|r| r["seed"].as_u64().unwrap()).collect();
    seeds.sort_unstable();
    let n_seeds = seeds.len();
    seeds.dedup();
    assert_eq!((n_seeds, seeds.len()), (24, 24));
}

#[test]
fn verdicts_add_up_the_spellings_of_a_label() {
    let server =
        serve(|_, _| verdict(&[("A", 0.5), (" A", 0.125), ("B", 0.25), ("Answer", 0.0625)]));
    let engine = Engine::Server(
        ServerEngine::connect(&format!("{}/v1/", server.url), "m", &config(), true).unwrap(),
    );
    let [(first, second)] = masses(&engine, &["which?"])[..] else { panic!("one query") };
    assert!((first - 0.625).abs() < 1e-12 && (second - 0.25).abs() < 1e-12);
    assert_eq!(server.requests.lock().unwrap()[0]["top_logprobs"], json!(20));
}

#[test]
fn passing_failures_are_tried_again() {
    let server = serve(|number, _| match number {
        0 => Answer::Http(429, "Retry-After: 0\r\n", "slow down".to_owned()),
        1 => Answer::Http(503, "", String::new()),
        2 => Answer::CutOff,
        _ => reply("fine", "stop"),
    });
    let engine = Engine::Server(ServerEngine::connect(&server.url, "m", &config(), false).unwrap());
    let replies = engine.chains(&[chain("q", 1)], &drawing()).unwrap();
    assert_eq!(replies[0][0][0].text, "fine");
}

#[test]
fn a_server_that_never_recovers_is_an_error_that_names_it() {
    let server = serve(|_, _| Answer::Http(500, "", "out of order".to_owned()));
    let error = ServerEngine::connect(&server.url, "m", &config(), false).unwrap_err().to_string();
    assert!(error.contains(&server.url) && error.contains("out of order"), "{error}");
    assert!(error.contains("4 attempts"), "{error}");
    let nobody = ServerEngine::connect("http://127.0.0.1:9", "m", &config(), false).unwrap_err();
    assert!(nobody.to_string().contains("127.0.0.1:9"), "{nobody}");
}

#[test]
fn a_refusal_that_lasts_is_not_repeated() {
    let server = serve(|_, _| Answer::Http(401, "", "bad key".to_owned()));
    let error = ServerEngine::connect(&server.url, "m", &config(), false).unwrap_err().to_string();
    assert!(error.contains("status 401") && error.contains("bad key"), "{error}");
    assert_eq!(server.requests.lock().unwrap().len(), 1);
}

#[test]
fn a_server_without_logprobs_is_found_out_at_the_start() {
    let server = serve(|_, _| reply("A", "stop"));
    let error = ServerEngine::connect(&server.url, "m", &config(), true).unwrap_err().to_string();
    assert!(error.contains("top_logprobs") && error.contains("pairwise-text"), "{error}");
}

#[test]
fn verdicts_that_make_no_sense_abstain_and_are_counted() {
    let server = serve(|number, request| {
        match last_text(request).as_str() {
        _ if number == 0 => verdict(&[("A", 0.9)]),
        "no logprobs" => reply("A", "stop"),
        "null" => ok(json!({"choices": [{"logprobs": {"content": [{"top_logprobs": [
            {"token": "A", "logprob": null}]}]}}]})),
        "nan text" => ok(json!({"choices": [{"logprobs": {"content": [{"top_logprobs": [
            {"token": "A", "logprob": "NaN"}]}]}}]})),
        "positive" => ok(json!({"choices": [{"logprobs": {"content": [{"top_logprobs": [
            {"token": "A", "logprob": 3.0}]}]}}]})),
        "too much" => verdict(&[("A", 0.9), ("B", 0.9)]),
        "array" => ok(json!([1, 2, 3])),
        // What Python's json writes of a NaN is no JSON.
        "bare nan" => Answer::Http(
            200,
            "",
            r#"{"choices":[{"logprobs":{"content":[{"top_logprobs":[{"token":"A","logprob":NaN}]}]}}]}"#
                .to_owned(),
        ),
        "page" => Answer::Http(200, "", "<html>busy</html>".to_owned()),
        "too long" => Answer::Http(400, "", "maximum context length is 2048 tokens".to_owned()),
        _ => verdict(&[("A", 0.5)]),
    }
    });
    let connected = ServerEngine::connect(&server.url, "m", &config(), true).unwrap();
    let engine = Engine::Server(connected);
    let lies = [
        "no logprobs",
        "null",
        "nan text",
        "positive",
        "too much",
        "array",
        "bare nan",
        "page",
        "too long",
    ];
    for mass in masses(&engine, &lies) {
        assert_eq!(mass, (0.0, 0.0));
    }
    assert_eq!(masses(&engine, &["honest"]), [(0.5, 0.0)]);
    let Engine::Server(server) = &engine else { panic!("it is a server") };
    assert_eq!(server.n_abstentions(), lies.len());
}

#[test]
fn a_filtered_reply_is_a_cut_one() {
    let server = serve(|number, _| match number {
        0 => reply("A", "stop"),
        1 => reply("how to", "content_filter"),
        // As Azure's filter answers.
        _ => ok(json!({"choices": [{"message": {}, "finish_reason": "content_filter"}]})),
    });
    let connected = ServerEngine::connect(&server.url, "m", &config(), false).unwrap();
    let engine = Engine::Server(connected);
    let chains = [chain("one", 1)];
    let replies = engine.chains(&chains, &drawing()).unwrap();
    let first = &replies[0][0][0];
    assert!(replies[0].iter().flatten().all(|reply| reply.finish_reason == FinishReason::Length));
    assert!(first.text == "how to" || first.text.is_empty());
}

#[test]
fn a_written_verdict_that_is_refused_abstains_and_is_counted() {
    let server = serve(|number, request| match last_text(request).as_str() {
        _ if number == 0 => reply("A", "stop"),
        "refused" => Answer::Http(400, "", "maximum context length is 2048 tokens".to_owned()),
        "nothing" => ok(json!({"choices": []})),
        _ => reply("B", "stop"),
    });
    let connected = ServerEngine::connect(&server.url, "m", &config(), false).unwrap();
    let engine = Engine::Server(connected);
    let chains = ["refused", "nothing", "fair"].map(|text| Chain {
        questions: Vec::new(),
        samples: vec![0],
        ..chain(text, 1)
    });
    let verdicts = Drawing { is_verdict: true, ..drawing() };
    let texts: Vec<String> = engine
        .chains(&chains, &verdicts)
        .unwrap()
        .into_iter()
        .map(|samples| samples[0][0].text.clone())
        .collect();
    assert_eq!(texts, ["", "", "B"]);
    let Engine::Server(server) = &engine else { panic!("it is a server") };
    assert_eq!(server.n_abstentions(), 2);
    // Where it is the reply that is wanted, the same is an error.
    assert!(engine.chains(&chains, &drawing()).unwrap_err().to_string().contains("status 400"));
}

#[test]
fn replies_that_make_no_sense_are_errors() {
    type Case = (&'static str, fn() -> Answer);
    let answers: [Case; 4] = [
        ("not JSON", || Answer::Http(200, "", "{\"choices\": [NaN".to_owned())),
        ("choices[0].message.content", || ok(json!({"choices": []}))),
        ("finish_reason", || reply("x", "tool_calls")),
        ("completion_tokens", || {
            ok(json!({"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}))
        }),
    ];
    for (expected, answer) in answers {
        let server = serve(move |_, _| answer());
        let error =
            ServerEngine::connect(&server.url, "m", &config(), false).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn impossible_settings_are_refused() {
    let error = |url: &str, config: ServerConfig| {
        ServerEngine::connect(url, "m", &config, false).unwrap_err().to_string()
    };
    assert!(error("localhost:8000", config()).contains("http://"));
    assert!(error("http://x", ServerConfig { attempts: 0, ..config() }).contains("at least 1"));
    assert!(error("http://x", ServerConfig { timeout_s: 0.0, ..config() }).contains("seconds"));
}
