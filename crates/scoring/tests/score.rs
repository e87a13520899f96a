//! The stage `score` on the small chat model: its files, its resume, its errors.

use std::path::{Path, PathBuf};

use arete_model::adapter_files::{self, AdapterMeta, Task};
use arete_model::chain::aspect_conversation;
use arete_model::generate::{self, Options, Request, Sampling, Stream};
use arete_model::{Adapter, Batch, LoadOptions, LoraConfig, Model, ScalarHead, SegmentIdx, Source};
use arete_records::rows::{ConversationRow, PromptRow, ScoreRow};
use arete_records::{Aspect, FinishReason, Message, Split, parquet, prompt_id};
use arete_scoring::config::Dtype;
use arete_scoring::rows::{CoherenceRow, PolicyPreferenceRow};
use arete_scoring::summary::{Scale, Scope};
use arete_scoring::{ScoreConfig, ScoreInputs, score};
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
        for (seed, aspect) in (1..).zip(Aspect::ALL) {
            let adapter = adapter(&model, aspect.name(), seed);
            let head = ScalarHead::normal(model.config.hidden_size, seed, Device::Cpu);
            let meta =
                AdapterMeta::of(&model, fixture().to_str().unwrap(), Task::SequenceClassification);
            let dir = run.at("reward").join(aspect.name());
            adapter_files::save(&dir.join("adapter"), &adapter, Some(&head), &meta).unwrap();
            let stats = format!(
                r#"{{"mean": 0.25, "std": 2.0, "n": 8, "split": "validation", "base_sha256": "{}"}}"#,
                model.base_sha256
            );
            fs_err::write(dir.join("score_stats.json"), stats).unwrap();
        }
        let meta = AdapterMeta::of(&model, fixture().to_str().unwrap(), Task::CausalLm);
        adapter_files::save(&run.at("ppo/adapter"), &adapter(&model, "policy", 9), None, &meta)
            .unwrap();
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
        let loaded = adapter_files::load(&dir, "x", &model.config, Device::Cpu).unwrap();
        let reply = replies.iter().find(|reply| reply.prompt_id == row.prompt_id).unwrap();
        let messages = aspect_conversation(&reply.messages, row.aspect).unwrap();
        let rendered = match reply.finish_reason(row.aspect) {
            FinishReason::Stop => chat.render(messages).unwrap(),
            FinishReason::Length => chat.render_truncated(messages).unwrap(),
        };
        let batch = Batch::from_sequences(&[&rendered.token_ids]);
        let hidden = model.decoder.forward(&batch, Some(&loaded.adapter)).unwrap();
        let last = hidden.get(batch.last_row(SegmentIdx(0)) as i64).unsqueeze(0);
        let expected = f64::try_from(loaded.head.unwrap().forward(&last).get(0)).unwrap();
        assert!((f64::from(row.score) - expected).abs() < 1e-4, "{row:?}, expected {expected}");
        assert!((f64::from(row.z) - (f64::from(row.score) - 0.25) / 2.0).abs() < 1e-5);
    }

    let summary = arete_scoring::score::read_summary(&out).unwrap();
    assert_eq!((summary.n_prompts, summary.n_left_out), (5, 0));
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
fn a_killed_run_ends_with_the_same_bytes() {
    let run = Run::new(40); // two units
    let inputs = run.inputs();
    let config = ScoreConfig { max_new_tokens: 6, ..config() };
    score(&config, &inputs).unwrap();
    let files = [
        "scores.parquet",
        "coherence.parquet",
        "replies/final.parquet",
        "summary.json",
        "run.json",
    ];
    let bytes = |name: &str| fs_err::read(inputs.output.join(name)).unwrap();
    let expected = files.map(bytes);

    // Ends in the middle: the second policy's adapter cannot be read.
    fs_err::remove_dir_all(&inputs.output).unwrap();
    let adapter = run.at("ppo/adapter/adapter_model.safetensors");
    let hidden = run.at("hidden");
    let whole = fs_err::read(&adapter).unwrap();
    fs_err::copy(&adapter, &hidden).unwrap();
    fs_err::write(&adapter, &whole[..whole.len() / 2]).unwrap();
    assert!(score(&config, &inputs).is_err());
    assert!(inputs.output.join("shards/replies-original-000001.parquet").exists());
    fs_err::copy(&hidden, &adapter).unwrap();
    // The input changed, so this starts afresh …
    score(&config, &inputs).unwrap();
    assert_eq!(files.map(bytes), expected);

    // … but this continues: only the missing unit is done again.
    let stage = Stage::cut(&inputs.output);
    score(&config, &inputs).unwrap();
    assert_eq!(files.map(bytes), expected);
    stage.check();
}

/// Turns a finished directory back into one that was killed while the last unit was scored.
struct Stage {
    kept: PathBuf,
    before: std::time::SystemTime,
}

impl Stage {
    fn cut(output: &Path) -> Self {
        let run: serde_json::Value =
            serde_json::from_slice(&fs_err::read(output.join("run.json")).unwrap()).unwrap();
        let mut stage = serde_json::Map::new();
        for key in ["stage", "config", "seed", "inputs", "versions", "fingerprint"] {
            stage.insert(key.to_owned(), run[key].clone());
        }
        stage.insert("clearing".to_owned(), false.into());
        stage.insert("foreign".to_owned(), Vec::<String>::new().into());
        let shards = output.join("shards");
        fs_err::create_dir_all(&shards).unwrap();
        for model in ["original", "final"] {
            let rows: Vec<ConversationRow> =
                parquet::read(output.join(format!("replies/{model}.parquet"))).unwrap();
            for (unit, rows) in rows.chunks(32).enumerate() {
                parquet::write(shards.join(format!("replies-{model}-{unit:06}.parquet")), rows)
                    .unwrap();
            }
        }
        for entry in fs_err::read_dir(output).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() && !path.file_name().unwrap().to_str().unwrap().starts_with('.') {
                fs_err::remove_file(path).unwrap();
            }
        }
        fs_err::remove_dir_all(output.join("replies")).unwrap();
        let text = serde_json::to_vec(&serde_json::Value::Object(stage)).unwrap();
        fs_err::write(output.join("stage.json"), text).unwrap();
        Self { kept: shards, before: std::time::SystemTime::now() }
    }

    fn check(&self) {
        assert!(!self.kept.exists());
        assert!(self.before <= std::time::SystemTime::now());
    }
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

fn run_binary(args: &[&str]) -> (i32, String, String) {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_arete-scoring"))
        .args(args)
        .output()
        .unwrap();
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
    assert!(stdout.starts_with("Score = ") && stdout.contains("final − original"), "{stdout}");
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

    assert_eq!(run_binary(&["score"]).0, 2);
    assert_eq!(run_binary(&["score", "--run", dir, "--draws", "0"]).0, 2);
    assert_eq!(run_binary(&["report", "--run", run.at("nowhere").to_str().unwrap()]).0, 65);
    fs_err::write(run.at("reward/action/adapter/adapter_config.json"), "{").unwrap();
    assert_eq!(run_binary(&["score", "--run", dir, "--max-new-tokens", "9"]).0, 65);
}
