//! The stages end to end, on a tiny chat model and on a server of our own.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

#[expect(dead_code, reason = "the tests of the client use the rest")]
mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use arete_curation::conversations::ConversationsConfig;
use arete_curation::demonstrations::DemonstrationsConfig;
use arete_curation::engine::{Chain, Drawing, Labels, LocalEngine, Query};
use arete_curation::preferences::PreferencesConfig;
use arete_curation::prompts::PromptsConfig;
use arete_curation::stage::Work;
use arete_curation::{
    calibrate, conversations, demonstrations, engine, merge, preferences, prompts,
};
use arete_model::generate::Sampling;
use arete_model::{Device, Kind, LoadOptions};
use arete_records::rows::{
    ConversationRow, DemonstrationRow, JudgementRow, PreferenceRow, PromptRow,
};
use arete_records::{Aspect, FinishReason, Message, Role, Split, parquet};
use arete_stage::run::RunJson;
use clap::{Args, FromArgMatches};
use common::{Answer, serve};
use serde_json::{Value, json};

fn fixture() -> String {
    format!("{}/../../tests/fixtures/tiny-chat", env!("CARGO_MANIFEST_DIR"))
}

fn data(name: &str) -> String {
    format!("{}/../../data/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// A configuration as the command line would give it.
fn config<C: Args + FromArgMatches>(flags: &[&str]) -> C {
    let command =
        C::augment_args(clap::Command::new("test").no_binary_name(true).args_override_self(true));
    C::from_arg_matches(&command.try_get_matches_from(flags).unwrap()).unwrap()
}

fn write_prompts(dir: &Path, n: usize) -> PathBuf {
    let output = dir.join("prompts");
    let limit = n.to_string();
    let config: PromptsConfig = config(&["--limit", &limit, "--max-chars", "120"]);
    prompts::run(&config, &[data("prompts")], &output).unwrap();
    output
}

fn conversations_config(flags: &[&str]) -> ConversationsConfig {
    let constitution = data("constitution.toml");
    let mut all = vec!["--max-new-tokens", "6", "--constitution", &constitution];
    all.extend_from_slice(flags);
    config(&all)
}

fn converse(prompts: &Path, output: &Path, flags: &[&str]) -> Vec<ConversationRow> {
    let inputs = conversations::Inputs {
        prompts: prompts.to_owned(),
        model: fixture(),
        original: Some(fixture()),
    };
    conversations::run(&conversations_config(flags), &inputs, output, &Work::Compute).unwrap();
    let joined = output.join("conversations.parquet");
    if joined.exists() { parquet::read(joined).unwrap() } else { Vec::new() }
}

fn preferences_config(flags: &[&str]) -> PreferencesConfig {
    let (constitution, exemplars) =
        (data("constitution.toml"), data("demonstrations/exemplars.jsonl"));
    let mut all = vec![
        "--truncated",
        "keep",
        "--min-pairs",
        "1",
        "--constitution",
        &constitution,
        "--exemplars",
        &exemplars,
    ];
    all.extend_from_slice(flags);
    config(&all)
}

fn judge(
    conversations: &Path,
    judge: Option<&str>,
    output: &Path,
    flags: &[&str],
) -> Result<(), arete_curation::Error> {
    let inputs = preferences::Inputs {
        conversations: conversations.to_owned(),
        judge: judge.map(str::to_owned),
    };
    preferences::run(&preferences_config(flags), &inputs, output, &Work::Compute)
}

fn pairs(output: &Path, aspect: Aspect) -> Vec<PreferenceRow> {
    ["train", "validation", "test"]
        .iter()
        .map(|split| output.join(aspect.name()).join(format!("{split}.parquet")))
        .filter(|path| path.exists())
        .flat_map(|path| parquet::read::<PreferenceRow>(path).unwrap())
        .collect()
}

fn bytes(path: impl AsRef<Path>) -> Vec<u8> {
    fs_err::read(path.as_ref()).unwrap()
}

#[test]
fn conversations_are_two_chains_a_prompt_and_shards_join_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 40);
    let rows = converse(&prompts, &dir.path().join("whole"), &[]);
    assert_eq!(rows.len(), 80);
    for (idx, row) in rows.iter().enumerate() {
        assert_eq!(row.sample, (idx % 2) as i32);
        assert_eq!(row.persona, None);
        let roles: Vec<Role> = row.messages.iter().map(|m| m.role).collect();
        assert_eq!(roles, [Role::User, Role::Assistant].repeat(3));
        assert_eq!(row.messages[2].content, "What is the motivation behind the answer?");
        assert_eq!(row.aspects().collect::<Vec<_>>(), Aspect::SHIPPED);
        for (turn, place) in row.turns.iter().zip([1, 3, 5]) {
            assert_eq!(row.messages[place].content, turn.text);
            let n_tokens = turn.n_tokens;
            assert!((1..=6).contains(&n_tokens));
            if turn.finish_reason == FinishReason::Length {
                assert_eq!(n_tokens, 6);
            }
        }
    }
    let differ = rows.chunks(2).filter(|pair| pair[0].messages != pair[1].messages).count();
    assert!(differ > 30, "{differ}");

    let parts = ["1/2", "2/2"].map(|shard| {
        let part = dir.path().join(shard.replace('/', "-"));
        converse(&prompts, &part, &["--shard", shard]);
        part
    });
    assert!(merge::merge(&parts[..1], &dir.path().join("half")).is_err());
    let merged = dir.path().join("merged");
    merge::merge(&parts, &merged).unwrap();
    let name = "conversations.parquet";
    assert_eq!(bytes(merged.join(name)), bytes(dir.path().join("whole").join(name)));
    assert_eq!(contents(&merged), contents(&dir.path().join("whole")));
    write_prompts(dir.path(), 41);
    let error = merge::merge(&parts, &dir.path().join("later")).unwrap_err().to_string();
    assert!(error.contains("its input `prompts` has changed since"), "{error}");
}

/// Every file of a stage but wall times, the machine and the lock.
fn contents(dir: &Path) -> std::collections::BTreeMap<PathBuf, Vec<u8>> {
    fn visit(dir: &Path, base: &Path, files: &mut std::collections::BTreeMap<PathBuf, Vec<u8>>) {
        for entry in fs_err::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                visit(&path, base, files);
            } else if path.file_name().is_some_and(|name| {
                name != "timings.jsonl" && name != "machine.json" && name != ".lock"
            }) {
                files.insert(path.strip_prefix(base).unwrap().to_owned(), bytes(&path));
            }
        }
    }
    let mut files = std::collections::BTreeMap::new();
    visit(dir, dir, &mut files);
    files
}

#[test]
fn sharded_judging_and_revising_give_an_unsharded_runs_files() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 80);
    let samples = dir.path().join("conversations");
    converse(&prompts, &samples, &[]);
    let judged = |name: &str, flags: &[&str]| {
        let output = dir.path().join(name);
        let flags = [&["--method", "likelihood"], flags].concat();
        judge(&samples, Some(&fixture()), &output, &flags).unwrap();
        output
    };
    let parts =
        ["1/3", "2/3", "3/3"].map(|part| judged(&part.replace('/', "-"), &["--shard", part]));
    let whole = judged("judged", &[]);
    let merged = dir.path().join("judged-merged");
    merge::merge(&parts, &merged).unwrap();
    assert!(pairs(&whole, Aspect::CONSEQUENCE).len() > 20);
    assert_eq!(contents(&merged), contents(&whole));

    let revised = |name: &str, flags: &[&str]| {
        let (constitution, exemplars) =
            (data("constitution.toml"), data("demonstrations/exemplars.jsonl"));
        let mut all = vec!["--max-new-tokens", "4", "--truncated", "keep"];
        all.extend(["--constitution", &constitution, "--exemplars", &exemplars]);
        all.extend_from_slice(flags);
        let inputs =
            demonstrations::Inputs { prompts: Some(prompts.clone()), model: Some(fixture()) };
        let output = dir.path().join(name);
        demonstrations::run(&config(&all), &inputs, &output, &Work::Compute).unwrap();
        output
    };
    let parts = ["1/2", "2/2"].map(|part| revised(&format!("r{}", &part[..1]), &["--shard", part]));
    let whole = revised("revised", &[]);
    let merged = dir.path().join("revised-merged");
    merge::merge(&parts, &merged).unwrap();
    assert_eq!(contents(&merged), contents(&whole));
}

/// Runs the program again and again, each time killed a little later, until it ends by itself. Shard
/// files that a killed run left must never be written again.
fn kill_until_done(args: &[&str], output: &Path, whole_s: std::time::Duration) -> usize {
    use std::os::unix::fs::MetadataExt;
    let mut shards = std::collections::BTreeMap::new();
    for attempt in 0..200 {
        let mut child = Command::new(env!("CARGO_BIN_EXE_arete-curation"))
            .args(args)
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(whole_s * (attempt + 2) / 14);
        child.kill().unwrap();
        if child.wait().unwrap().success() {
            return attempt as usize;
        }
        let Ok(entries) = fs_err::read_dir(output.join("shards")) else { continue };
        for entry in entries.map(Result::unwrap) {
            let name = entry.file_name().into_string().unwrap();
            // Files under temporary names may come and go, and what has no seal yet is made anew.
            let is_sealed = entry.path().with_file_name(format!(".{name}.seal")).is_file();
            if name.ends_with(".parquet") && !name.contains("tmp") && is_sealed {
                let inode = entry.metadata().unwrap().ino();
                assert_eq!(*shards.entry(name.clone()).or_insert(inode), inode, "{name}");
            }
        }
    }
    panic!("the run never ended");
}

#[test]
fn a_run_killed_at_any_moment_ends_with_an_uninterrupted_runs_files() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (prompts, model) = (write_prompts(dir.path(), 160), fixture());
    let (prompts, samples) = (prompts.to_str().unwrap().to_owned(), at("conversations"));
    let constitution = data("constitution.toml");
    let stages: [(&str, Vec<&str>); 2] = [
        (
            "conversations",
            vec![
                "conversations",
                "--prompts",
                &prompts,
                "--model",
                &model,
                "--max-new-tokens",
                "12",
            ],
        ),
        (
            "preferences",
            vec![
                "preferences",
                "--conversations",
                &samples,
                "--judge",
                &model,
                "--method",
                "likelihood",
                "--truncated",
                "keep",
            ],
        ),
    ];
    for (name, mut args) in stages {
        args.extend(["--constitution", &constitution]);
        let (whole, killed) = (at(name), at(&format!("{name}-killed")));
        let started = std::time::Instant::now();
        let (code, _, stderr) = program(&[&args[..], &["--output", &whole]].concat());
        assert_eq!(code, Some(0), "{stderr}");
        let args = [&args[..], &["--output", &killed]].concat();
        let n_kills = kill_until_done(&args, Path::new(&killed), started.elapsed());
        assert!(n_kills > 1, "{n_kills}");
        assert_eq!(contents(Path::new(&killed)), contents(Path::new(&whole)));
    }
}

#[test]
fn what_a_model_cannot_take_is_left_out_or_abstained_from_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 8);
    let file = prompts.join("prompts.parquet");
    let mut rows: Vec<PromptRow> = parquet::read(&file).unwrap();
    // A megabyte of words, and what fits the model once, but not twice in a judge's question.
    rows[2].prompt = vec![Message::user("many words ".repeat(100_000))];
    let path = dir.path().join("long.parquet");
    parquet::write(&path, &rows).unwrap();
    let samples = dir.path().join("conversations");
    let mut conversations = converse(&path, &samples, &[]);
    assert_eq!(conversations.len(), 14);
    assert!(conversations.iter().all(|row| row.prompt_id != rows[2].prompt_id));
    let run = RunJson::read(&samples).unwrap();
    assert_eq!((&run.counts["prompts"], &run.counts["prompts_too_long"]), (&json!(8), &json!(1)));

    let long = "word ".repeat(1500);
    for row in &mut conversations[..2] {
        row.messages[1].content = format!("{long}{}", row.sample);
        row.turns[0].text = row.messages[1].content.clone();
    }
    let path = dir.path().join("conversations.parquet");
    parquet::write(&path, &conversations).unwrap();
    for method in ["pairwise-logits", "pairwise-text", "pointwise-logits", "likelihood"] {
        let output = dir.path().join(method);
        let flags = ["--method", method, "--min-pairs", "0", "--pointwise-template"];
        let template = format!("{long}{{question}} {{answer}} {{virtue}}?");
        judge(&path, Some(&fixture()), &output, &[&flags[..], &[&template]].concat()).unwrap();
        let rows: Vec<JudgementRow> = parquet::read(output.join("judgements.parquet")).unwrap();
        let of_long = rows.iter().filter(|row| row.prompt_id == conversations[0].prompt_id);
        assert!(of_long.clone().count() >= 15);
        if method == "likelihood" {
            continue; // each conversation fits by itself
        }
        assert!(
            of_long.clone().all(|row| row.p_sample0.is_none() && row.vote.is_none()),
            "{method}"
        );
    }
}

#[test]
fn prompts_of_one_id_are_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 4);
    let mut rows: Vec<PromptRow> = parquet::read(prompts.join("prompts.parquet")).unwrap();
    rows.push(rows[1].clone());
    let path = dir.path().join("twice.parquet");
    parquet::write(&path, &rows).unwrap();
    let inputs =
        conversations::Inputs { prompts: path, model: "none/such".to_owned(), original: None };
    let output = dir.path().join("out");
    let error = conversations::run(&conversations_config(&[]), &inputs, &output, &Work::Compute);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("twice.parquet:5") && error.contains("as in row 2"), "{error}");
    assert!(!output.exists());
}

#[test]
fn damaged_parquet_prompts_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 4);
    let good = bytes(prompts.join("prompts.parquet"));
    let refuse = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        fs_err::write(&path, bytes).unwrap();
        let input = [path.to_str().unwrap().to_owned()];
        let error = prompts::run(&config(&[]), &input, &dir.path().join("x")).unwrap_err();
        let error = error.to_string();
        assert!(error.contains(name), "{error}");
        error
    };
    refuse("cut.parquet", &good[..good.len() / 2]);
    refuse("text.parquet", b"prompt\nwhat is this?\n");
    // A footer that claims four gigabytes.
    let mut hostile = good.clone();
    let at = hostile.len() - 8;
    hostile[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    refuse("hostile.parquet", &hostile);
    // A file of another stage: none of the columns a prompt may be in.
    let samples = dir.path().join("conversations");
    converse(&prompts, &samples, &[]);
    let judged = dir.path().join("judged");
    judge(&samples, Some(&fixture()), &judged, &["--method", "likelihood"]).unwrap();
    let error = refuse("columns.parquet", &bytes(judged.join("judgements.parquet")));
    assert!(error.contains("one of the columns prompt, messages"), "{error}");
}

#[test]
fn a_completion_does_not_depend_on_its_neighbours() {
    let dir = tempfile::tempdir().unwrap();
    let (few, many) = (dir.path().join("few"), dir.path().join("many"));
    fs_err::create_dir_all(&few).unwrap();
    fs_err::create_dir_all(&many).unwrap();
    let mut few = converse(&write_prompts(&few, 5), &few.join("out"), &[]);
    let mut many = converse(&write_prompts(&many, 20), &many.join("out"), &[]);
    // Of few prompts each split is given one: the same prompt may be of another then.
    few.iter_mut().chain(&mut many).for_each(|row| row.split = Split::Train);
    assert_eq!(few[..], many[..10]);
}

#[test]
fn original_draws_the_second_sample_from_the_other_model_and_labels_by_construction() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 40);
    let samples = dir.path().join("conversations");
    let rows = converse(&prompts, &samples, &["--personas", "original"]);
    // Here both models are the same one, so the samples are those of plain sampling, and in their order.
    let plain = converse(&prompts, &dir.path().join("plain"), &[]);
    assert_eq!(rows.len(), plain.len());
    for (row, plain) in rows.iter().zip(&plain) {
        let expected = if row.sample == 0 { "tuned" } else { "original" };
        assert_eq!(row.persona.as_deref(), Some(expected));
        assert_eq!((row.sample, &row.messages), (plain.sample, &plain.messages));
    }
    let output = dir.path().join("preferences");
    judge(&samples, None, &output, &["--method", "contrast"]).unwrap();
    for pair in pairs(&output, Aspect::ACTION) {
        let tuned = rows.iter().find(|row| row.prompt_id == pair.prompt_id).unwrap();
        assert_eq!(pair.chosen[0].content, tuned.turns[0].text);
    }
    let config = conversations_config(&["--personas", "original"]);
    let inputs = conversations::Inputs { prompts, model: fixture(), original: None };
    let error = conversations::run(&config, &inputs, &dir.path().join("no"), &Work::Compute);
    assert!(error.unwrap_err().to_string().contains("--original"));
}

#[test]
fn contrast_samples_under_two_personas_and_labels_by_construction() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 24);
    let samples = dir.path().join("conversations");
    let rows = converse(&prompts, &samples, &["--personas", "contrast"]);
    for row in &rows {
        let expected = if row.sample == 0 { "virtuous" } else { "vicious" };
        assert_eq!(row.persona.as_deref(), Some(expected));
        assert!(row.messages.iter().all(|message| message.role != Role::System));
    }
    let output = dir.path().join("preferences");
    judge(&samples, None, &output, &["--method", "contrast"]).unwrap();
    for (place, aspect) in Aspect::SHIPPED.into_iter().enumerate() {
        let pairs = pairs(&output, aspect);
        assert!(pairs.len() > 15);
        for pair in pairs {
            let virtuous =
                rows.iter().find(|row| row.prompt_id == pair.prompt_id && row.sample == 0).unwrap();
            assert_eq!(pair.chosen[0].content, virtuous.turns[0].text);
            assert_eq!(pair.chosen.len(), 1 + 2 * place);
            assert_eq!((pair.score_chosen, pair.score_rejected), (5, 0));
            assert_eq!(pair.chosen_prob, 1.0);
        }
    }
    // Without personas there is nothing to label by.
    let plain = dir.path().join("plain");
    converse(&prompts, &plain, &[]);
    let error = judge(&plain, None, &dir.path().join("no"), &["--method", "contrast"]).unwrap_err();
    assert!(error.to_string().contains("personas"), "{error}");
}

#[test]
fn every_method_of_a_local_judge_gives_five_verdicts_a_pair() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 12);
    let samples = dir.path().join("conversations");
    converse(&prompts, &samples, &[]);
    for method in ["pairwise-logits", "pairwise-text", "pointwise-logits", "likelihood"] {
        let output = dir.path().join(method);
        // The tiny model says anything: most verdicts may abstain, and then no pair is left.
        let flags =
            ["--method", method, "--min-pairs", "0", "--few-shot", "1", "--verdict-tokens", "3"];
        judge(&samples, Some(&fixture()), &output, &flags).unwrap();
        let rows: Vec<JudgementRow> = parquet::read(output.join("judgements.parquet")).unwrap();
        assert_eq!(rows.len() % 5, 0);
        assert!(rows.len() > 100, "{}", rows.len());
        assert!(rows.iter().all(|row| row.method == method && row.judge == "tiny-chat"));
        for row in &rows {
            for p in [row.p_ab, row.p_ba, row.p_sample0].into_iter().flatten() {
                assert!((0.0..=1.0).contains(&p), "{row:?}");
            }
            assert!(row.p_sample0.is_some() || row.vote.is_none());
        }
        if method == "likelihood" {
            assert!(rows.iter().all(|row| row.p_sample0.is_some()));
        }
    }
}

#[test]
fn shared_prefixes_give_the_probabilities_of_unshared_ones() {
    let prefix = "word and another word, ".repeat(12);
    let queries: Vec<Query> = (0..24)
        .map(|idx| Query {
            messages: vec![Message::user(format!(
                "{prefix} pair {} question {}",
                idx / 5,
                idx % 5
            ))],
            opening: "Assistant".to_owned(),
        })
        .collect();
    for (dtype, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 1e-3)] {
        let options = LoadOptions { device: Device::Cpu, dtype, nf4: None };
        let mut local = LocalEngine::load(&fixture(), None, &options).unwrap();
        let masses = |local: LocalEngine| {
            let engine = engine::Engine::Local(Box::new(local));
            let masses = engine.label_masses(&queries, Labels::AB).unwrap();
            let engine::Engine::Local(local) = engine else { panic!("it is local") };
            (*local, masses)
        };
        let (returned, shared) = masses(local);
        local = returned;
        local.share_prefixes = false;
        let (_, unshared) = masses(local);
        for (a, b) in shared.iter().zip(&unshared) {
            assert!(a.first > 0.0 && a.second > 0.0);
            let (p, q) = (a.first / (a.first + a.second), b.first / (b.first + b.second));
            assert!((p - q).abs() <= tolerance, "{dtype:?}: {p} {q}");
            assert!((a.first - b.first).abs() <= tolerance * a.first.max(1e-3));
        }
    }
}

#[test]
fn replies_behind_shared_prefixes_have_the_logprobs_of_unshared_ones() {
    // Two sides under two personas, as the method `likelihood` asks; and one that is too long.
    let mut conversations: Vec<Vec<Message>> = (0..12)
        .map(|idx| {
            vec![
                Message::system(format!("You are persona {}.", idx % 2)),
                Message::user("word and another word, ".repeat(8)),
                Message::assistant(format!("Side {} says so.", idx / 2)),
            ]
        })
        .collect();
    conversations.push(vec![Message::user("many ".repeat(3000)), Message::assistant("x")]);
    let options = LoadOptions { device: Device::Cpu, dtype: Kind::Float, nf4: None };
    let logprobs = |share: bool| {
        let mut local = LocalEngine::load(&fixture(), None, &options).unwrap();
        local.share_prefixes = share;
        engine::Engine::Local(Box::new(local)).reply_logprobs(&conversations).unwrap()
    };
    let (shared, unshared) = (logprobs(true), logprobs(false));
    assert!(shared[12].is_nan() && unshared[12].is_nan());
    for (idx, (a, b)) in shared.iter().zip(&unshared).take(12).enumerate() {
        assert!(*a < -5.0 && (a - b).abs() < 1e-4 * a.abs(), "{idx}: {a} {b}");
        assert!(idx == 0 || shared[idx - 1] != *a);
    }
}

#[test]
fn written_verdicts_behind_shared_prefixes_are_those_of_unshared_ones() {
    let about = |pair: usize| format!("pair {pair}: {}", "word and another word, ".repeat(6));
    let chains: Vec<Chain> = (0..15)
        .map(|idx| Chain {
            messages: vec![Message::user(format!("{}Which? {}", about(idx / 5), idx % 5))],
            questions: Vec::new(),
            key: idx as u64 / 5,
            samples: vec![idx as u64 % 5],
        })
        .collect();
    let drawing =
        Drawing { seed: 3, sampling: Sampling::at(1.0), max_new_tokens: 9, is_verdict: true };
    let options = LoadOptions { device: Device::Cpu, dtype: Kind::Float, nf4: None };
    let replies = |share: bool| {
        let mut local = LocalEngine::load(&fixture(), None, &options).unwrap();
        local.share_prefixes = share;
        engine::Engine::Local(Box::new(local)).chains(&chains, &drawing).unwrap()
    };
    let (shared, unshared) = (replies(true), replies(false));
    assert_eq!(shared, unshared);
    assert!(shared.windows(2).any(|pair| pair[0] != pair[1]));
}

/// Replies with the length of what it is asked; judges the side that holds "good" better.
fn talking_server(request: &Value, n_good: usize) -> Answer {
    let messages = request["messages"].as_array().unwrap();
    let text = messages.last().unwrap()["content"].as_str().unwrap();
    if request["logprobs"] == json!(true) {
        let (a, b) = (text.find("[Assistant A]"), text.find("[Assistant B]"));
        let (Some(a), Some(b)) = (a, b) else {
            return answer(&json!({"choices": [{"logprobs": {"content": [{"top_logprobs": [
                {"token": "A", "logprob": -0.1}]}]}}]}));
        };
        // Four of five for the good side shown first, three of five shown second: p 0.8 and 0.4.
        let p_a: f64 = match (text[a..b].contains("good"), text[b..].contains("good")) {
            (true, false) => 0.8,
            (false, true) => 0.4,
            _ => 0.5,
        };
        let top = [("A", p_a), ("B", 1.0 - p_a)]
            .map(|(token, p)| json!({"token": token, "logprob": p.ln()}));
        return answer(&json!({"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}));
    }
    let seed = request["seed"].as_u64().unwrap();
    let word = if seed as usize % 10 < n_good { "good" } else { "bad" };
    answer(&json!({
        "choices": [{"message": {"content": format!("{word} {seed}")}, "finish_reason": "stop"}],
        "usage": {"completion_tokens": 2},
    }))
}

fn answer(body: &Value) -> Answer {
    Answer::Http(200, "", body.to_string())
}

fn converse_by_server(
    prompts: &Path,
    output: &Path,
    url: &str,
    concurrency: &str,
) -> Result<(), arete_curation::Error> {
    let flags = ["--engine-url", url, "--concurrency", concurrency, "--attempts", "1"];
    let inputs = conversations::Inputs {
        prompts: prompts.to_owned(),
        model: "served".to_owned(),
        original: None,
    };
    conversations::run(&conversations_config(&flags), &inputs, output, &Work::Compute)
}

#[test]
fn identical_replies_give_identical_rows_and_a_broken_run_continues() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 70);
    let healthy = serve(|_, request| talking_server(request, 5));
    let name = "conversations.parquet";
    let (one, eight) = (dir.path().join("one"), dir.path().join("eight"));
    converse_by_server(&prompts, &one, &healthy.url, "1").unwrap();
    converse_by_server(&prompts, &eight, &healthy.url, "8").unwrap();
    assert_eq!(bytes(one.join(name)), bytes(eight.join(name)));

    // A server that goes down for good in the second unit (after the probe and 32 · 2 · 3 replies)
    // and comes back for the second run, at the same address.
    let down = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
    let flag = std::sync::Arc::clone(&down);
    let mortal = serve(move |number, request| {
        if number > 250 && flag.load(std::sync::atomic::Ordering::SeqCst) {
            return Answer::Http(500, "", "down".to_owned());
        }
        talking_server(request, 5)
    });
    let broken = dir.path().join("broken");
    let error = converse_by_server(&prompts, &broken, &mortal.url, "4").unwrap_err();
    assert!(error.to_string().contains("down"), "{error}");
    assert!(broken.join("shards/conversations-000000.parquet").exists());
    assert!(!broken.join("run.json").exists());
    down.store(false, std::sync::atomic::Ordering::SeqCst);
    let before = mortal.requests.lock().unwrap().len();
    converse_by_server(&prompts, &broken, &mortal.url, "4").unwrap();
    assert_eq!(bytes(one.join(name)), bytes(broken.join(name)));
    // Only the two missing units were asked for: 38 prompts, two samples, three turns, one probe.
    assert_eq!(mortal.requests.lock().unwrap().len() - before, 38 * 2 * 3 + 1);
    // And a third run asks for nothing.
    converse_by_server(&prompts, &broken, &mortal.url, "4").unwrap();
    assert_eq!(mortal.requests.lock().unwrap().len() - before, 38 * 2 * 3 + 1);
}

#[test]
fn a_servers_logprobs_become_votes_and_preferences() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 40);
    let server = serve(|_, request| talking_server(request, 5));
    let samples = dir.path().join("conversations");
    converse_by_server(&prompts, &samples, &server.url, "4").unwrap();
    let output = dir.path().join("preferences");
    judge(&samples, Some("served"), &output, &["--judge-url", &server.url]).unwrap();
    let rows: Vec<ConversationRow> = parquet::read(samples.join("conversations.parquet")).unwrap();
    let pairs = pairs(&output, Aspect::ACTION);
    assert!(pairs.len() > 5, "{}", pairs.len());
    for pair in &pairs {
        // Only pairs of a good and a bad answer are decided.
        assert!(pair.chosen[0].content.starts_with("good"), "{pair:?}");
        assert!(pair.rejected[0].content.starts_with("bad"), "{pair:?}");
        assert_eq!((pair.score_chosen, pair.score_rejected), (5, 0));
        // logit 0.8 = ln 4, logit 0.4 of the other shown first = ln (2/3): sigmoid of half of
        // ln 4 - ln (2/3) = ln 6 is sqrt 6 / (1 + sqrt 6) = 0.71010.
        assert!((pair.chosen_prob - 0.7101).abs() < 1e-4, "{}", pair.chosen_prob);
    }
    let judgements: Vec<JudgementRow> = parquet::read(output.join("judgements.parquet")).unwrap();
    assert_eq!(judgements.len(), 40 * 3 * 5);
    let torn = judgements.iter().filter(|row| row.p_sample0 == Some(0.5)).count();
    assert!(
        torn > 0 && judgements.iter().all(|row| (row.p_sample0 == Some(0.5)) == row.vote.is_none())
    );
    assert_eq!(rows.len(), 80);
    // A flip exchanges the sides.
    let flipped = dir.path().join("flipped");
    judge(&samples, Some("served"), &flipped, &["--judge-url", &server.url, "--flip"]).unwrap();
    let flipped = self::pairs(&flipped, Aspect::ACTION);
    assert_eq!(flipped.len(), pairs.len());
    assert!(flipped.iter().all(|pair| pair.chosen[0].content.starts_with("bad")));
}

#[test]
fn demonstrations_are_the_models_revisions_and_the_shipped_exemplars() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 40);
    let (constitution, exemplars) =
        (data("constitution.toml"), data("demonstrations/exemplars.jsonl"));
    let run = |name: &str, flags: &[&str], prompts: Option<&Path>| {
        let mut all = vec![
            "--constitution",
            &constitution,
            "--exemplars",
            &exemplars,
            "--max-new-tokens",
            "6",
            "--truncated",
            "keep",
        ];
        all.extend_from_slice(flags);
        let config: DemonstrationsConfig = config(&all);
        let inputs = demonstrations::Inputs {
            prompts: prompts.map(Path::to_owned),
            model: prompts.map(|_| fixture()),
        };
        let output = dir.path().join(name);
        demonstrations::run(&config, &inputs, &output, &Work::Compute)?;
        let rows: Vec<DemonstrationRow> =
            parquet::read(output.join("demonstrations.parquet")).unwrap();
        Ok::<_, arete_curation::Error>(rows)
    };
    let own = run("own", &["--source", "own"], None).unwrap();
    assert!(own.len() >= 100);
    assert!(own.iter().all(|row| row.source == "own" && row.messages.len() == 6));
    let revised = run("self", &["--source", "self", "--rounds", "2"], Some(&prompts)).unwrap();
    assert!(revised.len() > 20, "{}", revised.len()); // an empty revision is left out
    for row in &revised {
        assert_eq!((row.rounds.len(), row.messages.len()), (2, 6));
        assert_eq!(row.messages[1].content, row.rounds[1].revision);
    }
    let principles: std::collections::BTreeSet<&str> =
        revised.iter().flat_map(|row| row.rounds.iter().map(|r| r.principle.as_str())).collect();
    assert!(principles.len() > 8, "{principles:?}");
    let mix = run("mix", &["--source", "mix", "--turns", "answer"], Some(&prompts)).unwrap();
    let n_own = mix.iter().filter(|row| row.source == "own").count();
    assert_eq!(n_own, own.len());
    assert!(mix.iter().any(|row| row.source == "self" && row.messages.len() == 2));
    let error = run("no", &["--source", "self"], None).unwrap_err().to_string();
    assert!(error.contains("--prompts and --model"), "{error}");
}

fn program(args: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_arete-curation")).args(args).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn the_program_resolves_recipes_and_fails_with_the_right_codes() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (recipe, output, input) = (at("recipe.toml"), at("prompts"), data("prompts"));
    fs_err::write(&recipe, "[prompts]\nlimit = 7\ncontext = \"full\"\n").unwrap();
    let prompts = ["prompts", "--input", &input, "--recipe", &recipe, "--output", &output];
    let (code, stdout, stderr) = program(&[&prompts[..], &["--dry-run"]].concat());
    assert_eq!(code, Some(0), "{stderr}");
    let estimate: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(estimate["counts"]["kept"], json!(7));
    assert!(!Path::new(&output).exists());
    let (code, stdout, stderr) = program(&prompts);
    assert_eq!((code, stdout.as_str()), (Some(0), ""), "{stderr}");
    let run = RunJson::read(&output).unwrap();
    assert_eq!((&run.config["limit"], &run.config["context"]), (&json!(7), &json!("full")));
    assert!(program(&prompts).2.contains("up to date"));
    let (_, _, stderr) = program(&[&prompts[..], &["--limit", "9"]].concat());
    assert!(stderr.contains("limit") && stderr.contains("7") && stderr.contains("9"), "{stderr}");

    fs_err::write(&recipe, "[prompts]\nlimt = 7\n").unwrap();
    let (code, _, stderr) = program(&prompts);
    assert_eq!(code, Some(65), "{stderr}");
    assert!(stderr.contains("did you mean `limit`"), "{stderr}");
    let missing = at("missing.jsonl");
    let (code, _, stderr) = program(&["prompts", "--input", &missing, "--output", &at("x")]);
    assert_eq!(code, Some(74), "{stderr}");
    let empty = at("empty.jsonl");
    fs_err::write(&empty, "").unwrap();
    let (code, _, stderr) = program(&["prompts", "--input", &empty, "--output", &at("y")]);
    assert_eq!(code, Some(65), "{stderr}");
    let (code, _, _) = program(&["prompts", "--output", &at("z")]);
    assert_eq!(code, Some(2));
}

#[test]
fn damaged_conversations_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 4);
    let samples = dir.path().join("conversations");
    let rows = converse(&prompts, &samples, &[]);
    let try_rows = |name: &str, rows: &[ConversationRow]| {
        let path = dir.path().join(format!("{name}.parquet"));
        parquet::write(&path, rows).unwrap();
        judge(&path, None, &dir.path().join(name), &["--method", "contrast"])
            .unwrap_err()
            .to_string()
    };
    assert!(try_rows("twice", &[rows.clone(), rows.clone()].concat()).contains("twice"));
    assert!(try_rows("one", &rows[..3]).contains("samples 0 and 1"));
    assert!(try_rows("none", &[]).contains("at least one"));
    let mut other = rows.clone();
    other[1].messages[0].content.push('!');
    assert!(try_rows("other", &other).contains("the same prompt"));
    let mut short = rows.clone();
    short[0].messages.truncate(3);
    assert!(try_rows("short", &short).contains("the 5 messages of a chain"));
}

#[test]
fn several_samples_give_every_pair_or_the_best_beside_the_worst() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 30);
    let two = converse(&prompts, &dir.path().join("two"), &[]);
    let samples = dir.path().join("four");
    let four = converse(&prompts, &samples, &["--samples-per-prompt", "4"]);
    assert_eq!(four.len(), 2 * two.len());
    // The first two samples are what they are without the others.
    for (idx, row) in two.iter().enumerate() {
        assert_eq!(row, &four[4 * (idx / 2) + idx % 2]);
    }
    assert_eq!(four.iter().map(|row| row.sample).max(), Some(3));

    let [all, best] = ["all", "best_worst"].map(|pairing| {
        let output = dir.path().join(pairing);
        let flags = ["--method", "likelihood", "--pairing", pairing];
        judge(&samples, Some(&fixture()), &output, &flags).unwrap();
        output
    });
    // Judged are the same pairs, by the samples that they are of.
    assert_eq!(bytes(all.join("judgements.parquet")), bytes(best.join("judgements.parquet")));
    let rows: Vec<JudgementRow> = parquet::read(all.join("judgements.parquet")).unwrap();
    let of_first: std::collections::BTreeSet<&str> = (rows.iter())
        .filter_map(|row| row.prompt_id.strip_prefix(&format!("{}:", four[0].prompt_id)))
        .collect();
    assert_eq!(
        of_first.into_iter().collect::<Vec<_>>(),
        ["0-1", "0-2", "0-3", "1-2", "1-3", "2-3"]
    );
    let (all, best) = (pairs(&all, Aspect::ACTION), pairs(&best, Aspect::ACTION));
    assert!(all.len() > 150 && (25..=30).contains(&best.len()), "{} {}", all.len(), best.len());
    assert!(best.iter().all(|pair| all.contains(pair)));
    let prompts_of_best: std::collections::BTreeSet<&str> =
        best.iter().map(|pair| pair.prompt_id.as_str()).collect();
    assert_eq!(prompts_of_best.len(), best.len());

    for (flags, expected) in [
        (vec!["--samples-per-prompt", "9"], "2 to 8"),
        (vec!["--samples-per-prompt", "1"], "2 to 8"),
        (vec!["--samples-per-prompt", "3", "--personas", "original"], "2 with personas"),
    ] {
        let inputs = conversations::Inputs {
            prompts: prompts.clone(),
            model: fixture(),
            original: Some(fixture()),
        };
        let output = dir.path().join("refused");
        let config = conversations_config(&flags);
        let error = conversations::run(&config, &inputs, &output, &Work::Compute).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn virtues_at_chance_have_no_vote_and_labelled_pairs_are_mixed_in() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 40);
    let samples = dir.path().join("conversations");
    converse(&prompts, &samples, &[]);
    let (virtue_pairs, constitution) = (data("virtues/pairs.jsonl"), data("constitution.toml"));
    let calibration = dir.path().join("calibration");
    let flags = ["--methods", "likelihood", "--limit", "40", "--constitution", &constitution];
    let inputs = calibrate::Inputs { pairs: vec![PathBuf::from(&virtue_pairs)], model: fixture() };
    calibrate::run(&config(&flags), &inputs, &calibration).unwrap();
    let file = calibration.join("calibration.json");
    let mut found: Value = serde_json::from_slice(&bytes(&file)).unwrap();
    let lines = found["virtues"].as_array_mut().unwrap();
    assert_eq!(lines.len(), 5);
    let n_pairs: u64 = lines.iter().map(|line| line["n_pairs"].as_u64().unwrap()).sum();
    assert_eq!(n_pairs, 40);
    assert!(
        fs_err::read_to_string(calibration.join("calibration.md")).unwrap().contains("may vote")
    );
    // A model that knows nothing tells nothing apart; say that it knew honesty.
    for line in lines {
        line["may_vote"] = json!(line["virtue"] == "honesty");
    }
    // Beside its run.json it would be damaged; a file of one's own is believed.
    let told = dir.path().join("told");
    fs_err::create_dir(&told).unwrap();
    fs_err::write(told.join("calibration.json"), found.to_string()).unwrap();

    let output = dir.path().join("preferences");
    let calibration = told.to_str().unwrap();
    let flags = [
        "--method",
        "likelihood",
        "--calibration",
        calibration,
        "--pairs",
        &virtue_pairs,
        "--pairs-weight",
        "0.5",
    ];
    judge(&samples, Some(&fixture()), &output, &flags).unwrap();
    let rows: Vec<JudgementRow> = parquet::read(output.join("judgements.parquet")).unwrap();
    assert!(rows.iter().any(|row| row.vote.is_some()));
    assert!(rows.iter().all(|row| row.vote.is_none() || row.virtue.name() == "honesty"));
    let counts = RunJson::read(&output).unwrap().counts;
    assert_eq!(counts["without_vote"], json!(["prudence", "compassion", "humility", "respect"]));
    let (own, labelled) = (
        counts["action"]["pairs"].as_u64().unwrap(),
        counts["action"]["labelled"].as_u64().unwrap(),
    );
    let rows = pairs(&output, Aspect::ACTION);
    assert_eq!(rows.len() as u64, own + labelled);
    let train: Vec<PreferenceRow> = parquet::read(output.join("action/train.parquet")).unwrap();
    assert_eq!(labelled, ((train.len() as u64 - labelled) as f64 * 0.5).round() as u64);
    // One virtue votes; a labelled pair carries one vote as well.
    assert!(rows.iter().all(|row| (row.score_chosen, row.score_rejected) == (1, 0)));

    let other = judge(
        &samples,
        Some(&fixture()),
        &dir.path().join("x"),
        &["--calibration", calibration, "--method", "pairwise-logits"],
    );
    assert!(other.unwrap_err().to_string().contains("no line of it"));
    let contrast = judge(
        &samples,
        None,
        &dir.path().join("y"),
        &["--calibration", calibration, "--method", "contrast"],
    );
    assert!(contrast.unwrap_err().to_string().contains("asks a judge"));
}
