//! Several adapters as one, against peft's own weighted sum (`scripts/goldens/soup.py`).

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use arete_model::adapter::{self, AdapterMeta, Task};
use arete_model::{Adapter, Batch, LoadOptions, LoraConfig, Model, ScalarHead, Source, Tensor};
use tch::{Device, Kind};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/soup").join(name)
}

fn tiny_chat() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-chat")
}

fn tensors(path: &Path) -> BTreeMap<String, Tensor> {
    Tensor::read_safetensors(path).unwrap().into_iter().collect()
}

fn model() -> Model {
    let options = LoadOptions { device: Device::Cpu, dtype: Kind::Float, nf4: None };
    Model::load(&Source::Directory(tiny_chat()), &options).unwrap()
}

fn soup(arguments: &[String], output: &Path) -> (bool, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_arete-model"));
    command.arg("soup").args(arguments).arg("--output").arg(output);
    let done = command.output().unwrap();
    (done.status.success(), String::from_utf8_lossy(&done.stderr).into_owned())
}

fn of(adapter: &Path, weight: &str) -> String {
    format!("{}={weight}", adapter.display())
}

#[test]
fn the_sum_is_pefts() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("sum");
    let arguments = [of(&golden("honest"), "0.3"), of(&golden("prudent"), "0.7")];
    let (succeeded, message) = soup(&arguments, &output);
    assert!(succeeded, "{message}");
    let ours = tensors(&output.join("adapter_model.safetensors"));
    let theirs = tensors(&golden("sum/adapter_model.safetensors"));
    assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>());
    for (name, tensor) in &ours {
        assert!(tensor.equal(&theirs[name]), "{name}");
    }
    // Read back, it moves the base as peft's does.
    let model = model();
    let loaded = adapter::load(&output, "sum", &model.config, Device::Cpu).unwrap();
    assert_eq!((loaded.adapter.config.rank, loaded.adapter.config.alpha), (5, 5.0));
    let expected = tensors(&golden("logits.safetensors"));
    let ids: Vec<i64> = expected["ids"].reshape([-1]).try_into().unwrap();
    let batch = Batch::from_sequences(&[&ids]);
    let _guard = tch::no_grad_guard();
    let logits = |adapter: Option<&Adapter>| {
        let hidden = model.decoder.forward(&batch, adapter).unwrap();
        model.decoder.logits(&hidden).unwrap()
    };
    let difference = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
    let summed = logits(Some(&loaded.adapter));
    assert!(difference(&summed, &expected["logits"]) < 1e-4);
    assert!(difference(&logits(None), &expected["logits"]) > 0.1);
}

/// An adapter of ours with a B that is not zero.
fn write(dir: &Path, name: &str, model: &Model, head: bool) -> PathBuf {
    let lora = LoraConfig { rank: 2, ..LoraConfig::default() };
    let adapter = Adapter::new(name, &model.config, &lora, 3, Device::Cpu).unwrap();
    let task = if head { Task::SequenceClassification } else { Task::CausalLm };
    let head = head.then(|| ScalarHead::normal(model.config.hidden_size, 1, Device::Cpu));
    let meta = AdapterMeta::of(model, "tiny-chat", task);
    // As a stage's directory holds it.
    let path = dir.join(name);
    fs_err::create_dir_all(&path).unwrap();
    adapter::save(&path.join("adapter"), &adapter, head.as_ref(), &meta).unwrap();
    path
}

#[test]
fn what_cannot_be_summed_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut model = model();
    let (one, reward) = (write(dir, "one", &model, false), write(dir, "reward", &model, true));
    let (succeeded, message) = soup(&[of(&one, "-1.5")], &dir.join("negated"));
    assert!(succeeded, "{message}");
    model.base_sha256 = "0123456789abcdef".repeat(4);
    let other = write(dir, "other", &model, false);
    for (arguments, wanted) in [
        (vec![of(&one, "1"), of(&other, "1")], "soup: expected adapters of one base"),
        (vec![of(&reward, "1")], "the scores of two heads are no sum"),
        (vec![of(&one, "nan")], "expected ADAPTER=WEIGHT"),
        (vec![one.display().to_string()], "expected ADAPTER=WEIGHT"),
        (vec![of(&dir.join("none"), "1")], "adapter_config.json"),
        (Vec::new(), "ADAPTER=WEIGHT"),
    ] {
        let output = dir.join("refused");
        let (succeeded, message) = soup(&arguments, &output);
        assert!(!succeeded && message.contains(wanted), "{arguments:?}: {message}");
        assert!(!output.exists());
    }
}
