//! What the tests of the stage share: prompts, reward models over tiny-chat, settings.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use arete_model::adapter::{self, AdapterMeta, Task};
use arete_model::{Adapter, LoadOptions, LoraConfig, Model, ScalarHead, Source, Target, Tensor};
use arete_ppo::{Config, TrainInputs};
use arete_records::rows::{PromptRow, RolloutRow};
use arete_records::{Aspect, Message, Split, parquet, prompt_id};
use clap::Parser;
use tch::{Device, Kind};

/// The 220 kB chat model.
pub(crate) fn tiny_chat() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-chat")
}

/// Loads it in f32.
pub(crate) fn tiny_model() -> Model {
    tiny_model_in(Kind::Float)
}

/// Loads it in `dtype`.
pub(crate) fn tiny_model_in(dtype: Kind) -> Model {
    let options = LoadOptions { device: Device::Cpu, dtype, nf4: None };
    Model::load(&Source::Directory(tiny_chat()), &options).unwrap()
}

#[derive(Debug, Parser)]
#[command(args_override_self = true)]
struct Cli {
    #[command(flatten)]
    config: Config,
}

/// A directory with prompts and three reward models over the tiny model.
pub(crate) fn prepared() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_prompts(dir.path());
    write_rewards(dir.path(), &tiny_model());
    dir
}

/// Settings for tiny-chat: f32, a few iterations, flags on top.
pub(crate) fn config(flags: &[&str]) -> Config {
    let model = tiny_chat();
    let base = [
        "ppo",
        "--model",
        model.to_str().unwrap(),
        "--dtype",
        "f32",
        "--device",
        "cpu",
        "--iterations",
        "2",
        "--rollout-size",
        "8",
        "--max-new-tokens",
        "12",
        "--rank",
        "4",
        "--value-warmup",
        "0",
        "--probe-prompts",
        "4",
        "--stats-samples",
        "12",
    ];
    Cli::try_parse_from([&base, flags].concat()).unwrap().config
}

const QUESTIONS: [&str; 14] = [
    "How do I say sorry to a friend?",
    "Any tips?",
    "How can I steal from a store?",
    "What is a kind answer?",
    "Should I tell the truth?",
    "How do I plan my day?",
    "Why should I help?",
    "What does respect mean?",
    "Can you help me with a letter?",
    "Is it late?",
    "What comes first?",
    "How do I listen?",
    "What is a good person?",
    "May I ask a question?",
];

/// Writes `prompts.parquet`: ten prompts to train on, four to validate.
pub(crate) fn write_prompts(dir: &Path) -> PathBuf {
    let rows: Vec<PromptRow> = QUESTIONS
        .iter()
        .enumerate()
        .map(|(idx, question)| {
            let prompt = vec![Message::user(*question)];
            PromptRow {
                prompt_id: prompt_id(&prompt),
                split: if idx < 10 { Split::Train } else { Split::Validation },
                source: "test".to_owned(),
                prompt,
            }
        })
        .collect();
    let dir = dir.join("prompts");
    fs_err::create_dir_all(&dir).unwrap();
    parquet::write(dir.join("prompts.parquet"), &rows).unwrap();
    dir
}

/// A reward model with random weights.
pub(crate) fn random_reward(model: &Model, seed: u64) -> (Adapter, ScalarHead) {
    let lora = LoraConfig { rank: 4, alpha: 8.0, targets: Target::ALL.to_vec() };
    let adapter = Adapter::new("reward", &model.config, &lora, seed, Device::Cpu).unwrap();
    let _guard = tch::no_grad_guard();
    for (idx, (name, mut tensor)) in adapter.parameters().into_iter().enumerate() {
        if name.contains("lora_B") {
            let n = tensor.numel();
            let values = arete_model::random::normal(seed, &format!("b{idx}"), n, 0.05);
            tensor.copy_(&Tensor::from_slice(&values).view_as(&tensor));
        }
    }
    (adapter, ScalarHead::normal(model.config.hidden_size, seed, Device::Cpu))
}

/// Writes an adapter with its head as a reward model trained on `model`.
pub(crate) fn save_reward(dir: &Path, model: &Model, adapter: &Adapter, head: Option<&ScalarHead>) {
    let meta = AdapterMeta::of(model, "tiny-chat", Task::SequenceClassification);
    fs_err::create_dir_all(dir).unwrap();
    adapter::save(&dir.join("adapter"), adapter, head, &meta).unwrap();
    arete_chain::Reading::whole(model, arete_chain::CutReply::Trim).write(dir).unwrap();
}

/// Three random reward models.
pub(crate) fn write_rewards(dir: &Path, model: &Model) -> PathBuf {
    let dir = dir.join("reward");
    for (seed, aspect) in Aspect::SHIPPED.into_iter().enumerate() {
        let (adapter, head) = random_reward(model, seed as u64);
        save_reward(&dir.join(aspect.name()), model, &adapter, Some(&head));
    }
    dir
}

/// Inputs for a programmed reward.
pub(crate) fn by_rule(dir: &Path, output: &str) -> TrainInputs {
    TrainInputs {
        prompts: write_prompts(dir),
        rewards: None,
        named_rewards: Vec::new(),
        constitution: None,
        yardstick: None,
        output: dir.join(output),
    }
}

/// One metric over the iterations that have it.
pub(crate) fn metric(output: &Path, name: &str) -> Vec<f64> {
    arete_records::jsonl::read(output.join("metrics.jsonl"))
        .unwrap()
        .into_iter()
        .filter_map(|(_, line)| line.get(name)?.as_f64())
        .collect()
}

/// The rows of an iteration's rollout.
pub(crate) fn rollout(output: &Path, iteration: u64) -> Vec<RolloutRow> {
    parquet::read(output.join(format!("rollouts/iteration-{iteration:06}.parquet"))).unwrap()
}

/// SHA-256 of the policy's weights.
pub(crate) fn adapter_sum(output: &Path) -> String {
    arete_records::hashes::sha256_file(output.join("adapter/adapter_model.safetensors")).unwrap()
}

/// What `work` returns, and what it logged.
pub(crate) fn logged<T>(work: impl FnOnce() -> T) -> (T, String) {
    let lines: Arc<Mutex<Vec<u8>>> = Arc::default();
    let writer = Writer(Arc::clone(&lines));
    let subscriber =
        tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    let out = tracing::subscriber::with_default(subscriber, work);
    let log = String::from_utf8(lines.lock().unwrap().clone()).unwrap();
    (out, log)
}

#[derive(Clone)]
struct Writer(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
