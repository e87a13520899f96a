//! The client of OpenAI-compatible servers, against servers that behave, fail and lie.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

mod common;

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arete_curation::engine::server::{ServerConfig, ServerEngine};
use arete_curation::engine::{Chain, Drawing, Engine, Labels, Query};
use arete_model::generate::Sampling;
use arete_records::left_out::{self, LeftOut};
use arete_records::rows::{ConversationRow, PromptRow};
use arete_records::{Class, FinishReason, Message, Split, parquet, prompt_id};
use common::{Answer, serve, serve_paths};
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
    let server = serve(|number, request| match last_text(request).as_str() {
        _ if number == 0 => verdict(&[("A", 0.9)]),
        "no logprobs" => reply("A", "stop"),
        "null" => ok(json!({"choices": [{"logprobs": {"content": [{"top_logprobs": [
            {"token": "A", "logprob": null}]}]}}]})),
        "nan text" => ok(json!({"choices": [{"logprobs": {"content": [{"top_logprobs": [
            {"token": "A", "logprob": "NaN"}]}]}}]})),
        "positive" => ok(json!({"choices": [{"logprobs": {"content": [{"top_logprobs": [
            {"token": "A", "logprob": 3.0}]}]}}]})),
        "too much" => verdict(&[("A", 0.9), ("B", 0.9)]),
        "too long" => Answer::Http(400, "", "maximum context length is 2048 tokens".to_owned()),
        _ => verdict(&[("A", 0.5)]),
    });
    let connected = ServerEngine::connect(&server.url, "m", &config(), true).unwrap();
    let engine = Engine::Server(connected);
    let lies = ["no logprobs", "null", "nan text", "positive", "too much", "too long"];
    for mass in masses(&engine, &lies) {
        assert_eq!(mass, (0.0, 0.0));
    }
    assert_eq!(masses(&engine, &["honest"]), [(0.5, 0.0)]);
    let Engine::Server(server) = &engine else { panic!("it is a server") };
    assert_eq!(server.n_abstentions(), lies.len());
}

/// A page of a proxy, an error that a router reports with status 200, no JSON: what comes between us and the server passes.
#[test]
fn what_is_no_answer_is_asked_again() {
    let noise: [fn() -> Answer; 6] = [
        || Answer::Http(200, "", "<html>proxy login</html>".to_owned()),
        || ok(json!([1, 2, 3])),
        || ok(json!({"choices": null})),
        || ok(json!({"error": {"message": "rate limited upstream", "code": 429}})),
        || ok(json!({"error": "upstream timed out"})),
        // What Python's json writes of a NaN is no JSON.
        || Answer::Http(200, "", r#"{"choices":[{"logprobs":NaN}]}"#.to_owned()),
    ];
    for noise in noise {
        let passes = serve(move |number, _| match number {
            0 => verdict(&[("A", 0.9)]),
            1..3 => noise(),
            _ => verdict(&[("A", 0.5)]),
        });
        let engine = ServerEngine::connect(&passes.url, "m", &config(), true).unwrap();
        let engine = Engine::Server(engine);
        assert_eq!(masses(&engine, &["honest"]), [(0.5, 0.0)]);
        let Engine::Server(server) = &engine else { panic!("it is a server") };
        assert_eq!(server.n_abstentions(), 0);
        // What does not pass ends the work with the server's own words: nothing of it is kept.
        let lasts =
            serve(move |number, _| if number == 0 { verdict(&[("A", 0.9)]) } else { noise() });
        let engine = ServerEngine::connect(&lasts.url, "m", &config(), true).unwrap();
        let query = Query { messages: vec![Message::user("q")], opening: String::new() };
        let error =
            Engine::Server(engine).label_masses(&[query], Labels::AB).unwrap_err().to_string();
        assert!(error.contains("4 attempts"), "{error}");
    }
    let closed = serve(|_, _| ok(json!({"error": {"message": "No endpoints found", "code": 404}})));
    let error = ServerEngine::connect(&closed.url, "m", &config(), false).unwrap_err().to_string();
    assert!(error.contains("No endpoints found"), "{error}");
    assert_eq!(closed.requests.lock().unwrap().len(), 1);
}

#[test]
fn servers_of_other_dialects_are_asked_in_theirs() {
    let server = serve(|_, request| {
        let wrong = |text: &str| Answer::Http(400, "", text.to_owned());
        match request {
            _ if request.get("max_tokens").is_some() => {
                wrong("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
            }
            _ if request.get("top_p").is_some() => wrong("`top_p` must be > 0.0 and < 1.0"),
            _ if request["top_logprobs"].as_u64().is_some_and(|n| n > 5) => {
                wrong("top_logprobs must be less than or equal to 5")
            }
            _ => verdict(&[("A", 0.5)]),
        }
    });
    let engine = ServerEngine::connect(&server.url, "m", &config(), true).unwrap();
    assert_eq!(masses(&Engine::Server(engine), &["q"]), [(0.5, 0.0)]);
}

/// vLLM with a reasoning parser: one token is all thought.
#[test]
fn a_model_that_thinks_first_passes_the_probe() {
    let thought = || {
        ok(json!({"choices": [{"message": {"content": null, "reasoning_content": "Okay, the user"},
            "finish_reason": "length"}], "usage": {"completion_tokens": 1}}))
    };
    let server = serve(move |number, _| if number == 0 { thought() } else { reply("A", "stop") });
    let engine = Engine::Server(ServerEngine::connect(&server.url, "m", &config(), false).unwrap());
    assert_eq!(engine.chains(&[chain("q", 1)], &drawing()).unwrap()[0][0][0].text, "A");
    let always = serve(move |_, _| thought());
    let engine = Engine::Server(ServerEngine::connect(&always.url, "m", &config(), false).unwrap());
    let error = engine.chains(&[chain("q", 1)], &drawing()).unwrap_err().to_string();
    assert!(error.contains("thoughts") && error.contains("max_new_tokens"), "{error}");
}

#[test]
fn a_reply_far_longer_than_was_asked_for_is_refused() {
    let server = serve(|number, _| match number {
        0 => reply("A", "stop"),
        _ => reply(&"x".repeat(10_000_000), "stop"),
    });
    let engine = Engine::Server(ServerEngine::connect(&server.url, "m", &config(), false).unwrap());
    let error = engine.chains(&[chain("q", 1)], &drawing()).unwrap_err().to_string();
    assert!(error.contains("7 tokens asked for"), "{error}");
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
        "nothing" => {
            ok(json!({"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}))
        }
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
    let answers: [Case; 3] = [
        ("not JSON", || Answer::Http(200, "", "{\"choices\": [NaN".to_owned())),
        ("without choices", || ok(json!({"choices": []}))),
        ("finish_reason", || reply("x", "tool_calls")),
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
    assert!(error("http://x/v1?key=abc", config()).contains("behind its path"));
    for wrong in ["bob:hunter2@x:80", "http:/bob:hunter2@x", "http://bob:hunter2@x/?key=hunter2"] {
        assert!(!error(wrong, config()).contains("hunter2"), "{wrong}");
    }
    assert!(error("http://x", ServerConfig { attempts: 0, ..config() }).contains("at least 1"));
    assert!(error("http://x", ServerConfig { timeout_s: 0.0, ..config() }).contains("seconds"));
}

// The program against servers that refuse, hang and echo.
const KEY: &str = "sk-canary-0123456789";

fn prompts(dir: &Path, n: usize) -> Vec<String> {
    fs_err::create_dir_all(dir).unwrap();
    let row = |idx: usize| {
        let prompt = vec![Message::user(format!("question {idx}"))];
        let (source, split) = ("test".to_owned(), Split::Train);
        PromptRow { prompt_id: prompt_id(&prompt), split, source, prompt }
    };
    let rows: Vec<PromptRow> = (0..n).map(row).collect();
    parquet::write(dir.join("prompts.parquet"), &rows).unwrap();
    rows.into_iter().map(|row| row.prompt_id).collect()
}

fn conversations(dir: &Path, url: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_arete-curation"));
    command.arg("conversations").arg("--prompts").arg(dir.join("prompts"));
    command.args(["--model", "served", "--engine-url", url, "--max-new-tokens", "8"]);
    command.args(["--attempts", "2", "--backoff-s", "0.01", "--output"]).arg(dir.join("out"));
    command.env("OPENAI_API_KEY", KEY);
    for name in ["http_proxy", "https_proxy", "all_proxy", "no_proxy"] {
        command.env_remove(name).env_remove(name.to_ascii_uppercase());
    }
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

#[track_caller]
fn finishes(command: &mut Command, code: i32) -> String {
    let done = command.output().unwrap();
    let text = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(code), "{text}");
    text
}

fn texts_below(dir: &Path) -> String {
    let mut text = String::new();
    for entry in fs_err::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        text += &match path.is_dir() {
            true => texts_below(&path),
            false => String::from_utf8_lossy(&fs_err::read(&path).unwrap()).into_owned(),
        };
    }
    text
}

#[test]
fn one_prompt_that_a_server_refuses_is_left_out_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let ids = prompts(&dir.path().join("prompts"), 40);
    let filter = |_: usize, request: &Value| match request.to_string().contains("\"question 7\"") {
        true => Answer::Http(400, "", format!("filtered; you sent Bearer {KEY}")),
        false => reply("It would be kind.", "stop"),
    };
    let server = serve(filter);
    let text = finishes(&mut conversations(dir.path(), &server.url), 0);
    let output = dir.path().join("out");
    let rows: Vec<ConversationRow> = parquet::read(output.join("conversations.parquet")).unwrap();
    assert_eq!(rows.len(), 78);
    let [LeftOut { item, reason }] = &left_out::read(&output).unwrap()[..] else { panic!("one") };
    assert_eq!(*item, ids[7]);
    assert!(reason.contains("status 400: filtered") && text.contains(&ids[7]), "{text}");
    // Neither the key that the server sent back nor where it stands is written or shown.
    assert!(!text.contains(KEY) && reason.contains("***"), "{text}");
    let written = texts_below(&output);
    assert!(!written.contains(KEY) && !written.contains(&server.url));
    // Where a server stands changes nothing: with a user and a password before it, nothing is asked again.
    let moved = serve(filter);
    let address = moved.url.replace("http://", "http://bob:hunter2secret@");
    let text = finishes(&mut conversations(dir.path(), &format!("{address}/v1")), 0);
    assert!(text.contains("up to date") && moved.requests.lock().unwrap().is_empty(), "{text}");
}

#[test]
fn a_server_that_moved_goes_on_with_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    prompts(&dir.path().join("prompts"), 40);
    let dies = serve(|number, _| match number {
        0..210 => reply("It would be kind.", "stop"),
        _ => Answer::Http(500, "", "out of order".to_owned()),
    });
    let address = dies.url.replace("http://", "http://bob:hunter2secret@");
    let text = finishes(conversations(dir.path(), &address).args(["--concurrency", "1"]), 69);
    assert!(text.contains("out of order") && !text.contains("hunter2"), "{text}");
    assert!(!texts_below(&dir.path().join("out")).contains("hunter2"));
    let moved = serve(|_, _| reply("It would be kind.", "stop"));
    finishes(&mut conversations(dir.path(), &moved.url), 0);
    // The unit of 32 prompts was done: eight prompts, two samples, three turns, and the probe.
    assert_eq!(moved.requests.lock().unwrap().len(), 1 + 8 * 2 * 3);
}

#[test]
fn a_server_that_refuses_everything_ends_the_stage_and_nothing_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    prompts(&dir.path().join("prompts"), 40);
    let server = serve(|number, _| match number {
        0 => reply("A", "stop"),
        _ => Answer::Http(400, "", "no such model".to_owned()),
    });
    let text = finishes(&mut conversations(dir.path(), &server.url), 69);
    assert!(
        text.contains("prompts refused; of prompt") && text.contains("no such model"),
        "{text}"
    );
    assert!(!dir.path().join("out/shards").exists());
    let mended = serve(|_, _| reply("It would be kind.", "stop"));
    finishes(&mut conversations(dir.path(), &mended.url), 0);
    assert!(left_out::read(&dir.path().join("out")).unwrap().is_empty());
}

#[test]
fn a_key_with_a_line_end_is_trimmed_and_a_proxy_for_https_is_not_asked() {
    let dir = tempfile::tempdir().unwrap();
    prompts(&dir.path().join("prompts"), 1);
    let server = serve(|_, _| reply("It would be kind.", "stop"));
    let mut command = conversations(dir.path(), &server.url);
    finishes(
        command.env("OPENAI_API_KEY", "sk-test-123\n").env("HTTPS_PROXY", "http://127.0.0.1:9"),
        0,
    );
    let mut command = conversations(dir.path(), &server.url);
    command.args(["--seed", "2"]).env("OPENAI_API_KEY", "sk-\ntest-123");
    let text = finishes(&mut command, 2);
    assert!(text.contains("OPENAI_API_KEY") && !text.contains("test-123"), "{text}");
}

#[test]
fn a_signal_is_answered_while_a_server_hangs() {
    let dir = tempfile::tempdir().unwrap();
    prompts(&dir.path().join("prompts"), 40);
    let server = serve(|number, _| {
        if number > 20 {
            std::thread::sleep(Duration::from_secs(60));
        }
        reply("It would be kind.", "stop")
    });
    let child = conversations(dir.path(), &server.url).spawn().unwrap();
    let started = Instant::now();
    while server.requests.lock().unwrap().len() < 22 && started.elapsed().as_secs() < 60 {
        std::thread::sleep(Duration::from_millis(50));
    }
    let signalled = Instant::now();
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let done = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(130), "{text}");
    assert!(signalled.elapsed() < Duration::from_secs(2), "{:?}", signalled.elapsed());
}

/// vLLM's `logprob_token_ids`: probabilities of exactly the labels, which need not be among the first twenty candidates.
#[test]
fn labels_own_probabilities_are_asked_for_where_the_server_gives_them() {
    let tokenize = |path: &str, body: &Value| {
        let id = |text: &str| {
            ["A", " A", "B", " B", "Yes", " Yes", "No"].iter().position(|t| *t == text)
        };
        match (path, id(body["prompt"].as_str().unwrap())) {
            ("/tokenize", Some(id)) => ok(json!({"count": 1, "tokens": [100 + id]})),
            ("/tokenize", None) => ok(json!({"count": 2, "tokens": [7, 8]})), // " No" is two
            _ => Answer::Http(404, "", String::new()),
        }
    };
    let honest = |_: usize, request: &Value| match request.get("logprob_token_ids") {
        // Without the key the labels are not among the candidates at all.
        None => verdict(&[("Well", 0.9), ("So", 0.05)]),
        Some(ids) if *ids == json!([100, 101, 102, 103]) => {
            verdict(&[("Well", 0.9), ("A", 0.001), (" A", 0.002), ("B", 0.0005), (" B", 0.0005)])
        }
        Some(ids) => {
            assert_eq!(*ids, json!([104, 105, 106]));
            verdict(&[("Well", 0.9), ("Yes", 0.001), (" Yes", 0.002), ("No", 0.0005)])
        }
    };
    let server = serve_paths(tokenize, honest);
    let engine = Engine::Server(ServerEngine::connect(&server.url, "m", &config(), true).unwrap());
    let [(first, second)] = masses(&engine, &["which?"])[..] else { panic!("one query") };
    assert!((first - 0.003).abs() < 1e-12 && (second - 0.001).abs() < 1e-12, "{first} {second}");
    let query = Query { messages: vec![Message::user("kind?")], opening: String::new() };
    let mass = engine.label_masses(&[query], Labels::YES_NO).unwrap()[0];
    assert!((mass.first - 0.003).abs() < 1e-12 && (mass.second - 0.0005).abs() < 1e-12);

    // One that knows how to tokenise, but not that key, is asked as ever.
    let server = serve_paths(tokenize, |_, _| {
        let many: Vec<(&str, f64)> =
            ["A", " A", "B", " B", "C", "D", "E"].map(|t| (t, 0.1)).to_vec();
        verdict(&many)
    });
    let engine = Engine::Server(ServerEngine::connect(&server.url, "m", &config(), true).unwrap());
    let [(first, _)] = masses(&engine, &["which?"])[..] else { panic!("one query") };
    assert!((first - 0.2).abs() < 1e-12);
    let requests = server.requests.lock().unwrap();
    assert!(requests.last().unwrap().get("logprob_token_ids").is_none());
}

/// Says A as often as the question's number tells.
fn numbered(request: &Value) -> Answer {
    let n: u32 = last_text(request).parse().unwrap_or(50);
    verdict(&[("A", f64::from(n) / 128.0), ("B", 0.25)])
}

#[test]
fn several_judges_share_the_questions_and_a_lost_one_is_survived() {
    let questions: Vec<String> = (1..=60).map(|n| n.to_string()).collect();
    let questions: Vec<&str> = questions.iter().map(String::as_str).collect();
    let expected: Vec<i32> = (1..=60).collect();
    let config = ServerConfig { concurrency: 2, attempts: 3, timeout_s: 0.5, backoff_s: 0.001 };
    type Mood = (&'static str, fn() -> Answer);
    let moods: [Mood; 4] = [
        ("dies", || Answer::Nothing),
        ("is being stopped", || Answer::Http(503, "", "shutting down".to_owned())),
        ("lost its model", || Answer::Http(404, "", "the model `m` does not exist".to_owned())),
        ("hangs", || {
            std::thread::sleep(Duration::from_millis(700));
            Answer::Nothing
        }),
    ];
    for (name, mood) in moods {
        let sound = serve(|_, request| numbered(request));
        let is_ill = Arc::new(AtomicBool::new(true));
        let ill = Arc::clone(&is_ill);
        let moody = serve(move |number, request| match number {
            5.. if ill.load(Ordering::SeqCst) => mood(),
            _ => numbered(request),
        });
        let urls = [sound.url.clone(), moody.url.clone()];
        let engine = ServerEngine::connect_all(&urls, "m", &config, true).unwrap();
        let engine = Engine::Server(engine);
        let n_asked = |server: &common::Server| server.requests.lock().unwrap().len();
        let firsts = |engine: &Engine| -> Vec<i32> {
            let numbers = masses(engine, &questions).into_iter().map(|(first, _)| first * 128.0);
            numbers.map(|number| number.round() as i32).collect()
        };
        assert_eq!(firsts(&engine), expected, "{name}");
        // The probe and four verdicts came from it; its requests in flight were tried twice, and that was all.
        assert!((5..=10).contains(&n_asked(&moody)), "{name}: {}", n_asked(&moody));
        assert!(n_asked(&sound) > 50, "{name}: {}", n_asked(&sound));
        assert!(sound.most_at_once.load(Ordering::SeqCst) <= 2, "{name}");
        // It is back, and gets work again.
        is_ill.store(false, Ordering::SeqCst);
        let (before, since) = (n_asked(&moody), Instant::now());
        while n_asked(&moody) < before + 10 {
            assert!(since.elapsed() < Duration::from_secs(20), "{name}: it was not looked for");
            assert_eq!(firsts(&engine), expected, "{name}");
        }
        assert_eq!(engine.n_refused(), 0, "{name}");
    }
}

#[test]
fn the_last_judge_has_all_its_attempts_and_then_ends_the_work() {
    let is_ill = Arc::new(AtomicBool::new(false));
    let judge = || {
        let ill = Arc::clone(&is_ill);
        serve(move |_, request| match ill.load(Ordering::SeqCst) {
            true => Answer::Http(500, "", "out of order".to_owned()),
            false => numbered(request),
        })
    };
    let servers = [judge(), judge()];
    let urls = servers.each_ref().map(|server| server.url.clone());
    let engine = Engine::Server(ServerEngine::connect_all(&urls, "m", &config(), true).unwrap());
    is_ill.store(true, Ordering::SeqCst);
    let query = Query { messages: vec![Message::user("1")], opening: String::new() };
    let error = engine.label_masses(&[query], Labels::AB).unwrap_err();
    assert_eq!(error.chain().find_map(arete_engine::class_of), Some(Class::Unavailable));
    let text = error.to_string();
    assert!(text.contains("out of order (4 attempts)"), "{text}");
    // Two attempts at the one, four at the other.
    let mut n_asked = servers.each_ref().map(|server| {
        let requests = server.requests.lock().unwrap();
        assert!(requests.len() == 3 || text.contains(&server.url), "{text}");
        requests.len()
    });
    n_asked.sort_unstable();
    assert_eq!(n_asked, [1 + 2, 1 + 4]);

    // At the start all must be there.
    let sound = serve(|_, request| numbered(request));
    let refused = |urls: &[String]| {
        ServerEngine::connect_all(urls, "m", &config(), true).unwrap_err().to_string()
    };
    let text = refused(&[sound.url.clone(), servers[0].url.clone()]);
    assert!(text.contains(&servers[0].url) && text.contains("out of order"), "{text}");
    assert!(refused(&[sound.url.clone(), sound.url.clone()]).contains("each once"));
    assert!(refused(&[]).contains("got none"));
}

/// Labels are read alike whoever answers: from their own probabilities, if every server gives them.
#[test]
fn judges_of_two_kinds_are_read_in_the_way_that_both_know() {
    let tokenize = |_: &str, body: &Value| match body["prompt"].as_str() {
        Some(text) if !text.starts_with(' ') => ok(json!({"tokens": [text.len()]})),
        _ => Answer::Http(404, "", String::new()),
    };
    let judge = |request: &Value| match request.get("logprob_token_ids") {
        Some(_) => verdict(&[("A", 0.5), ("B", 0.25)]),
        None => verdict(&[("A", 0.125), ("B", 0.25), ("C", 0.1), ("D", 0.1)]),
    };
    let knows = || serve_paths(tokenize, move |_, request| judge(request));
    let plain = || serve(move |_, request| judge(request));
    let asked = |servers: [common::Server; 2]| {
        let urls = servers.each_ref().map(|server| server.url.clone());
        let engine = ServerEngine::connect_all(&urls, "m", &config(), true).unwrap();
        let masses = masses(&Engine::Server(engine), &["q"; 20]);
        masses.into_iter().map(|(first, _)| (first * 1e3).round() as i32).collect::<Vec<_>>()
    };
    assert_eq!(asked([knows(), knows()]), [500; 20]);
    assert_eq!(asked([knows(), plain()]), [125; 20]);
}
