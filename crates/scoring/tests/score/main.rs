//! The stage `score` on the small chat model: its files, its resume, its errors.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

mod by_hand;
mod engines;
#[expect(dead_code, reason = "the tests of other crates use the rest")]
#[path = "../../../engine/tests/support/stand_in.rs"]
mod stand_in;
mod yardsticks;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use arete_chain::rulers::Ruler;
use arete_chain::words::BagOfWords;
use arete_chain::yardstick::{Card, FoldCard, JudgeCard, fold_dir};
use arete_chain::{CutReply, Reading, Ruled, Transcript, Turns, through_aspect};
use arete_model::adapter::{self, AdapterMeta, Task};
use arete_model::generate::{self, Options, Request, Sampling, Sequence, Stream, TurnEnd};
use arete_model::machine::Dtype;
use arete_model::{Adapter, Batch, LoadOptions, LoraConfig, Model, ScalarHead, SegmentIdx, Source};
use arete_records::rows::{ConversationRow, DemonstrationRow, PromptRow, ScoreRow};
use arete_records::{Aspect, FinishReason, Message, Split, fold_of, parquet, prompt_id};
use arete_scoring::rows::{CoherenceRow, PolicyPreferenceRow};
use arete_scoring::summary::{Scale, Scope};
use arete_scoring::{ScoreConfig, ScoreInputs, score};
use arete_stage::run::{Completion, RunJson, StageSpec, Start};
use clap::Parser;
use tch::{Device, Kind};

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-chat")
}

#[derive(Parser)]
struct Defaults {
    #[command(flatten)]
    config: ScoreConfig,
}

fn config() -> ScoreConfig {
    let config = Defaults::parse_from(["test"]).config;
    let (device, dtype) = ("cpu".to_owned(), Dtype::F32);
    ScoreConfig { max_new_tokens: 24, draws: 200, device, dtype, ..config }
}

fn options() -> LoadOptions {
    LoadOptions { device: Device::Cpu, dtype: Kind::Float, nf4: None }
}

/// A run directory with prompts, three reward models and a policy adapter, all of them arbitrary.
struct Run {
    dir: tempfile::TempDir,
}

impl Run {
    fn new(n_test: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let run = Self { dir };
        let prompts: Vec<PromptRow> = (0..n_test + 5)
            .map(|idx| {
                let prompt =
                    vec![Message::user(format!("Question {idx}: how do I help a friend?"))];
                let split = match idx {
                    idx if idx < n_test => Split::Test,
                    idx if idx < n_test + 3 => Split::Validation,
                    _ => Split::Train,
                };
                PromptRow {
                    prompt_id: prompt_id(&prompt),
                    split,
                    source: "test".to_owned(),
                    prompt,
                }
            })
            .collect();
        fs_err::create_dir_all(run.at("prompts")).unwrap();
        parquet::write(run.at("prompts/prompts.parquet"), &prompts).unwrap();
        let model = Model::load(&Source::Directory(fixture()), &options()).unwrap();
        for (seed, aspect) in (1..).zip(Aspect::SHIPPED) {
            let adapter = adapter(&model, aspect.name(), seed);
            let head = ScalarHead::normal(model.config.hidden_size, seed, Device::Cpu);
            let meta =
                AdapterMeta::of(&model, fixture().to_str().unwrap(), Task::SequenceClassification);
            let dir = run.at("reward").join(aspect.name());
            adapter::save(&dir.join("adapter"), &adapter, Some(&head), &meta).unwrap();
            arete_chain::Reading::whole(&model, arete_chain::CutReply::Trim).write(&dir).unwrap();
            let stats = format!(
                r#"{{"mean": 0.25, "std": 2.0, "n": 8, "split": "validation", "base_sha256": "{}"}}"#,
                model.base_sha256
            );
            fs_err::write(dir.join("score_stats.json"), stats).unwrap();
        }
        let meta = AdapterMeta::of(&model, fixture().to_str().unwrap(), Task::CausalLm);
        adapter::save(&run.at("ppo/adapter"), &adapter(&model, "policy", 9), None, &meta).unwrap();
        run
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn inputs(&self) -> ScoreInputs {
        let text = |path: PathBuf| path.to_str().unwrap().to_owned();
        ScoreInputs {
            prompts: self.at("prompts"),
            models: vec![
                ("original".to_owned(), text(fixture())),
                ("final".to_owned(), text(self.at("ppo"))),
            ],
            base: text(fixture()),
            rewards: self.at("reward"),
            yardstick: None,
            yardstick_base: None,
            pairs: None,
            output: self.at("scoring"),
        }
    }
}

/// An adapter that changes something.
fn adapter(model: &Model, name: &str, seed: u64) -> Adapter {
    let config = LoraConfig { rank: 4, ..LoraConfig::default() };
    let adapter = Adapter::new(name, &model.config, &config, seed, Device::Cpu).unwrap();
    let _guard = tch::no_grad_guard();
    for (name, mut tensor) in adapter.parameters() {
        if name.contains("lora_B") {
            let values: Vec<f32> = (0..tensor.numel())
                .map(|at| 0.03 * ((at as f32 + 1.3) * (seed as f32 + 0.7)).sin())
                .collect();
            tensor.copy_(&tch::Tensor::from_slice(&values).view_(tensor.size()));
        }
    }
    adapter
}

#[test]
fn models_are_scored_and_compared() {
    let run = Run::new(5);
    let pairs = run.at("pairs.jsonl");
    let line = |good: &str, bad: &str| {
        format!(
            r#"{{"chosen": "\n\nHuman: Hi\n\nAssistant: {good}", "rejected": "\n\nHuman: Hi\n\nAssistant: {bad}"}}"#
        )
    };
    fs_err::write(&pairs, [line("Hello there.", "Go away!"), line("Yes.", "No")].join("\n"))
        .unwrap();
    let inputs = ScoreInputs { pairs: Some(pairs), ..run.inputs() };
    let text = score(&config(), &inputs).unwrap();
    assert!(text.contains("final − original") && text.contains("human pairs"), "{text}");

    let out = run.at("scoring");
    let scores: Vec<ScoreRow> = parquet::read(out.join("scores.parquet")).unwrap();
    assert_eq!(scores.len(), 2 * 5 * 3);
    let coherence: Vec<CoherenceRow> = parquet::read(out.join("coherence.parquet")).unwrap();
    assert_eq!(coherence.len(), scores.len());
    let replies: Vec<ConversationRow> = parquet::read(out.join("replies/final.parquet")).unwrap();
    let originals: Vec<ConversationRow> =
        parquet::read(out.join("replies/original.parquet")).unwrap();
    assert_eq!((replies.len(), originals.len()), (5, 5));
    assert_ne!(replies, originals);
    assert!(replies.iter().all(|row| row.split == Split::Test));
    assert!(!out.join("shards").exists());

    // A score is that of the conversation through the aspect's reply, one conversation at a time.
    let model = Model::load(&Source::Directory(fixture()), &options()).unwrap();
    let chat = model.chat().unwrap();
    let _guard = tch::no_grad_guard();
    for row in scores.iter().filter(|row| row.model == "final") {
        let dir = run.at("reward").join(row.aspect.name()).join("adapter");
        let loaded = adapter::load(&dir, "x", &model.config, Device::Cpu).unwrap();
        let reply = replies.iter().find(|reply| reply.prompt_id == row.prompt_id).unwrap();
        let (messages, _) = through_aspect(reply, row.aspect).unwrap();
        // Every cut reply ends at its last full sentence, if it has one, and is closed.
        let mut messages = messages.to_vec();
        for (turn, message) in reply.turns.iter().zip(messages.iter_mut().skip(1).step_by(2)) {
            if turn.finish_reason == FinishReason::Length
                && let Some(kept) = arete_chain::trim::last_sentence(&message.content)
            {
                message.content = kept.to_owned();
            }
        }
        let rendered = chat.render(&messages).unwrap();
        let batch = Batch::from_sequences(&[&rendered.token_ids]);
        let hidden = model.decoder.forward(&batch, Some(&loaded.adapter)).unwrap();
        let last = hidden.get(batch.last_row(SegmentIdx(0)) as i64).unsqueeze(0);
        let expected = f64::try_from(loaded.head.unwrap().forward(&last).get(0)).unwrap();
        assert!((f64::from(row.score) - expected).abs() < 1e-4, "{row:?}, expected {expected}");
        assert!((f64::from(row.z) - (f64::from(row.score) - 0.25) / 2.0).abs() < 1e-5);
    }

    let summary = arete_scoring::score::read_summary(&out).unwrap();
    assert_eq!((summary.n_prompts, summary.n_left_out), (5, 0));
    let primary = &summary.primary;
    assert_eq!((primary.measure.as_str(), primary.n_seeds), ("score", 1));
    assert!(primary.reason.contains("no yardstick") && primary.reason.contains("no evidence"));
    let equal_length = &summary.equal_length["final - original"];
    assert_eq!((equal_length.figure.value, primary.value), (None, None));
    let rulers = &summary.models[0].preference_accuracy.as_ref().unwrap().null_rulers;
    // "Hello there." is longer than "Go away!", "Yes." longer than "No".
    assert_eq!((rulers.best, rulers.best_accuracy()), (Ruler::Longer, 1.0));
    let raw = summary.models[1].score(Scale::Raw, Scope::All).unwrap();
    let own: Vec<f64> =
        scores.iter().filter(|row| row.model == "final").map(|row| f64::from(row.score)).collect();
    let mean = own.iter().sum::<f64>() / 15.0;
    let std = (own.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 15.0).sqrt();
    assert!((raw.score.estimate - (mean - 0.5 * std)).abs() < 1e-9);
    let preferences: Vec<PolicyPreferenceRow> =
        parquet::read(out.join("policy_preferences.parquet")).unwrap();
    assert_eq!(preferences.len(), 4);
    assert_eq!(preferences[0].model, "original");
    assert!(preferences.iter().all(|row| row.logprob_chosen < 0.0 && row.n_tokens_chosen > 0));

    // A second call has nothing to do and says the same.
    assert_eq!(score(&config(), &inputs).unwrap(), text);
}

#[test]
fn any_number_of_models_is_compared_and_final_is_the_outcome() {
    let run = Run::new(4);
    let mut inputs = run.inputs();
    let model = Model::load(&Source::Directory(fixture()), &options()).unwrap();
    // A model with other words than the base's: its tokens are read from its replies' text.
    let other = run.at("other");
    let copied =
        ["config.json", "model.safetensors", "chat_template.jinja", "tokenizer_config.json"];
    fs_err::create_dir_all(&other).unwrap();
    for name in copied {
        fs_err::copy(fixture().join(name), other.join(name)).unwrap();
    }
    let tokenizer = fs_err::read_to_string(fixture().join("tokenizer.json")).unwrap();
    // Two tokens change places.
    let tokenizer = tokenizer.replace("\"x\":90,\"y\":91", "\"y\":90,\"x\":91");
    fs_err::write(other.join("tokenizer.json"), tokenizer).unwrap();
    inputs.models.push(("other".to_owned(), other.to_str().unwrap().to_owned()));
    let another = run.at("another");
    let meta = AdapterMeta::of(&model, fixture().to_str().unwrap(), Task::CausalLm);
    adapter::save(&another, &adapter(&model, "policy", 5), None, &meta).unwrap();
    inputs.models.push(("another-seed".to_owned(), another.to_str().unwrap().to_owned()));
    let text = score(&config(), &inputs).unwrap();
    assert!(text.contains("another-seed − other") && text.contains("final − original"), "{text}");
    assert!(text.contains("* perplexity of the text"), "{text}");

    let summary = arete_scoring::score::read_summary(&inputs.output).unwrap();
    let names: Vec<&str> = summary.models.iter().map(|own| own.name.as_str()).collect();
    assert_eq!(names, ["original", "final", "other", "another-seed"]);
    assert_eq!(
        summary.models.iter().map(|own| own.retokenised).collect::<Vec<_>>(),
        [false, false, true, false]
    );
    // Every two models, four scales less the missing yardstick's two, four scopes.
    assert_eq!(summary.differences.len(), 6 * 2 * 4);
    let headline = summary.headline(Scale::Raw).unwrap();
    assert_eq!((headline.first.as_str(), headline.last.as_str()), ("original", "final"));
    let scores: Vec<ScoreRow> = parquet::read(inputs.output.join("scores.parquet")).unwrap();
    assert_eq!(scores.len(), 4 * 4 * 3);
}

#[test]
fn a_killed_run_ends_with_the_same_bytes() {
    let run = Run::new(40); // two units
    let start = |output: &str| {
        let at = |name: &str| run.at(name).to_str().unwrap().to_owned();
        let fixture = fixture().to_str().unwrap().to_owned();
        Command::new(env!("CARGO_BIN_EXE_arete-scoring"))
            .args(["score", "--prompts", &at("prompts"), "--reward", &at("reward")])
            .args(["--original", &fixture, "--final", &at("ppo"), "--output", &at(output)])
            .args(["--max-new-tokens", "12", "--draws", "200", "--device", "cpu", "--threads", "1"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    };
    let started = Instant::now();
    assert!(start("whole").wait().unwrap().success());
    let whole_run = started.elapsed();
    let mut n_begun = 0;
    for kill in 1..=4 {
        let mut child = start("killed");
        std::thread::sleep(whole_run.mul_f64(0.2 * f64::from(kill)));
        child.kill().unwrap();
        child.wait().unwrap();
        n_begun += u8::from(!run.at("killed/run.json").exists());
    }
    assert!(n_begun > 0, "every kill came too late");
    assert!(start("killed").wait().unwrap().success());
    let (whole, killed) = (run.at("whole"), run.at("killed"));
    let recorded = RunJson::read(&whole).unwrap();
    assert_eq!(recorded, RunJson::read(&killed).unwrap());
    let outputs: Vec<&str> = recorded.outputs.keys().map(String::as_str).collect();
    assert_eq!(
        outputs,
        [
            "coherence.parquet",
            "replies/final.parquet",
            "replies/original.parquet",
            "scores.parquet",
            "summary.json"
        ]
    );
    for file in outputs {
        assert_eq!(
            fs_err::read(whole.join(file)).unwrap(),
            fs_err::read(killed.join(file)).unwrap(),
            "{file}"
        );
    }
}

#[test]
fn finished_units_are_not_done_again() {
    let run = Run::new(40); // two units
    let inputs = run.inputs();
    let config = ScoreConfig { max_new_tokens: 6, ..config() };
    // Ends in the middle: the second policy's adapter cannot be read.
    let adapter = run.at("ppo/adapter/adapter_model.safetensors");
    let whole = fs_err::read(&adapter).unwrap();
    fs_err::write(&adapter, &whole[..whole.len() / 2]).unwrap();
    assert!(score(&config, &inputs).is_err());
    let shard = inputs.output.join("shards/replies-original-000001.parquet");
    let written = || fs_err::metadata(&shard).unwrap().modified().unwrap();
    let first = written();
    assert!(score(&config, &inputs).is_err());
    assert_eq!(written(), first);
}

#[test]
fn what_cannot_be_scored_is_said() {
    let run = Run::new(2);
    let message = |config: &ScoreConfig, inputs: &ScoreInputs| {
        let error = score(config, inputs).unwrap_err();
        fs_err::remove_dir_all(&inputs.output).ok();
        error.to_string()
    };
    let zero = ScoreConfig { max_new_tokens: 0, ..config() };
    assert!(message(&zero, &run.inputs()).contains("max_new_tokens: expected at least 1"));
    let mut twice = run.inputs();
    twice.models[1].0 = "original".to_owned();
    assert!(message(&config(), &twice).contains("every name once"));
    let mut path = run.inputs();
    path.models[1].0 = "../x".to_owned();
    assert!(message(&config(), &path).contains("a name of letters"));
    let long = ScoreConfig { max_new_tokens: 100_000, ..config() };
    assert!(message(&long, &run.inputs()).contains("fit every model"));

    // No test prompts.
    let rows: Vec<PromptRow> = parquet::read(run.at("prompts/prompts.parquet")).unwrap();
    let train: Vec<PromptRow> =
        rows.iter().filter(|row| row.split == Split::Train).cloned().collect();
    parquet::write(run.at("train.parquet"), &train).unwrap();
    let only_train = ScoreInputs { prompts: run.at("train.parquet"), ..run.inputs() };
    assert!(message(&config(), &only_train).contains("at least one test prompt"));

    // A reward model of another base.
    let meta = run.at("reward/action/adapter/arete_adapter.json");
    let text = fs_err::read_to_string(&meta).unwrap();
    let model = Model::load(&Source::Directory(fixture()), &options()).unwrap();
    fs_err::write(&meta, text.replace(&model.base_sha256, &"0".repeat(64))).unwrap();
    assert!(message(&config(), &run.inputs()).contains("adapter's base: expected"));
}

#[test]
fn labels_made_of_a_contrast_make_its_score_circular() {
    let run = Run::new(3);
    for (stage, config) in [
        ("preferences", serde_json::json!({ "method": "contrast" })),
        ("conversations", serde_json::json!({ "personas": "original" })),
    ] {
        let output = run.at(stage);
        let spec = StageSpec { stage, output: &output, config, seed: 0, inputs: Vec::new() };
        match arete_stage::run::begin(spec).unwrap() {
            Start::Run(run) => run.finish(Completion::default()).unwrap(),
            Start::UpToDate(_) => unreachable!("it is new"),
        }
    }
    let text = score(&config(), &run.inputs()).unwrap();
    assert!(text.contains("final − original (circular)"), "{text}");
    let summary = arete_scoring::score::read_summary(&run.at("scoring")).unwrap();
    assert!(summary.differences.iter().all(|own| own.circular));
    assert!(summary.equal_length["final - original"].circular);
    assert!(summary.primary.reason.contains("circular"));
}

fn run_binary(args: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_arete-scoring")).args(args).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn a_run_directory_is_all_the_program_needs() {
    let run = Run::new(4);
    let recipe = run.at("recipe.toml");
    let text =
        "[run]\ndevice = \"cpu\"\ndtype = \"f32\"\n\n[scoring]\nmax_new_tokens = 8\ndraws = 100\n";
    fs_err::write(&recipe, text).unwrap();
    let (dir, recipe) = (run.dir.path().to_str().unwrap(), recipe.to_str().unwrap());
    let (code, stdout, stderr) = run_binary(&["score", "--run", dir, "--recipe", recipe]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.starts_with("Primary endpoint: final − original, answer, score"), "{stdout}");
    assert!(
        stdout.contains("no evidence") && stdout.contains("not comparable: 4 pairs"),
        "{stdout}"
    );
    let again = run_binary(&["score", "--run", dir, "--recipe", recipe]);
    assert_eq!((again.0, &again.1), (0, &stdout));
    assert!(again.2.contains("up to date"), "{}", again.2);

    let (code, stdout, stderr) =
        run_binary(&["doctor", "--run", dir, "--recipe", recipe, "--best-of", "4"]);
    assert_eq!(code, 0, "{stderr}");
    assert!(
        stdout.contains("best of 4") && stdout.contains("3 prompts of validation prompts"),
        "{stdout}"
    );
    let (code, stdout, _) = run_binary(&["doctor", "--run", dir, "--json"]);
    let findings: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((code, findings[3]["step"].as_str()), (0, Some("best of 4")));

    let (code, stdout, stderr) = run_binary(&["report", "--run", dir]);
    assert_eq!(code, 0, "{stderr}");
    assert!(Path::new(stdout.trim()).is_file());

    let (more, elsewhere) = (format!("best-so-far={}", fixture().display()), run.at("elsewhere"));
    let of_all = ["score", "--run", dir, "--recipe", recipe, "--model", &more];
    let (code, stdout, stderr) =
        run_binary(&[&of_all[..], &["--output", elsewhere.to_str().unwrap()]].concat());
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("best-so-far − final"), "{stdout}");
    assert_eq!(run_binary(&["score", "--run", dir, "--model", "nameless"]).0, 2);

    assert_eq!(run_binary(&["score"]).0, 2);
    assert_eq!(run_binary(&["score", "--run", dir, "--draws", "0"]).0, 2);
    assert_eq!(run_binary(&["report", "--run", run.at("nowhere").to_str().unwrap()]).0, 65);
    // Of an older version: scoring refuses to read it, doctor says why.
    fs_err::remove_file(run.at("reward/action/reading.json")).unwrap();
    let (code, _, stderr) = run_binary(&["score", "--run", dir, "--max-new-tokens", "9"]);
    assert_eq!(code, 65, "{stderr}");
    assert!(stderr.contains("made by an older version"), "{stderr}");
    let (code, stdout, _) = run_binary(&["doctor", "--run", dir]);
    assert_eq!(code, 0);
    assert!(stdout.contains("train the reward models again"), "{stdout}");
    fs_err::write(run.at("reward/action/adapter/adapter_config.json"), "{").unwrap();
    assert_eq!(run_binary(&["score", "--run", dir, "--max-new-tokens", "9"]).0, 65);
}

#[test]
fn the_favourite_of_several_chains_becomes_a_demonstration() {
    let run = Run::new(2);
    let (dir, base) = (run.dir.path().to_str().unwrap(), fixture().to_str().unwrap().to_owned());
    let output = run.at("distilled");
    let distil = |n: &str, output: &Path| {
        let output = output.to_str().unwrap();
        let flags =
            ["--max-new-tokens", "64", "--dtype", "f32", "--device", "cpu", "--threads", "1"];
        let places = ["distil", "--run", dir, "--base", &base, "--n", n, "--output", output];
        run_binary(&[&places[..], &flags].concat())
    };
    let (code, _, stderr) = distil("6", &output);
    assert_eq!(code, 0, "{stderr}");
    let rows: Vec<DemonstrationRow> = parquet::read(output.join("demonstrations.parquet")).unwrap();
    let counts = RunJson::read(&output).unwrap().counts;
    // Of five prompts that are not of split test, with or without a chain that ends by itself.
    assert_eq!(rows.len() as u64, counts["demonstrations"].as_u64().unwrap());
    assert_eq!(rows.len() as u64 + counts["left_out"].as_u64().unwrap(), 5);
    assert!(rows.iter().all(|row| row.split != Split::Test && row.source == "best-of-6"));

    // Drawn again, no chain that ends by itself is liked better than the one that was kept.
    let model = Model::load(&Source::Directory(fixture()), &options()).unwrap();
    let chat = model.chat().unwrap();
    let reader =
        arete_chain::reward_model::Base { model: &model, chat: &chat, micro_batch_tokens: 512 };
    let prompts: Vec<PromptRow> = parquet::read(run.at("prompts/prompts.parquet")).unwrap();
    let turns = Turns::default();
    let settings = config();
    let drawing = arete_scoring::replies::Drawing {
        sampling: settings.sampling(),
        max_new_tokens: 64,
        seed: settings.seed,
        n_samples: 6,
    };
    for row in &rows {
        let prompt = prompts.iter().find(|prompt| prompt.prompt_id == row.prompt_id).unwrap();
        let own = std::slice::from_ref(prompt);
        let chains = arete_scoring::replies::sample_chains(&model, None, own, &turns, &drawing);
        let chains: Vec<ConversationRow> =
            chains.unwrap().into_iter().map(|(row, _)| row).collect();
        let mut totals = vec![0.0; chains.len()];
        for aspect in turns.names() {
            let reward = run.at("reward").join(aspect.name());
            let reward = arete_chain::RewardModel::over(&reward, "r", &model).unwrap();
            let scores =
                arete_scoring::rewards::aspect_scores(&reward, reader, &chains, &[aspect]).unwrap();
            // The three reward models have the same statistics: their sum ranks as the mean of standardised scores.
            totals.iter_mut().zip(scores).for_each(|(total, score)| *total += score[0]);
        }
        let ends = |row: &ConversationRow| row.aspects().all(|aspect| !row.is_cut(aspect));
        let closed = chains.iter().zip(totals).filter(|(chain, _)| ends(chain));
        let (best, _) = closed.max_by(|(_, a), (_, b)| a.total_cmp(b)).unwrap();
        assert_eq!(best.messages, row.messages);
    }

    assert!(distil("6", &output).2.contains("up to date"));
    let (code, _, stderr) = distil("1", &run.at("one"));
    assert_eq!((code, stderr.contains("at least 2 samples")), (2, true), "{stderr}");
}
