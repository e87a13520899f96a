//! Models made anew from the goldens, and the program run on them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use arete_model::checkpoint::safetensors::{SafetensorsFile, write_safetensors};
use arete_model::{Device, Error, Kind, LoadOptions, Model, Source, Tensor};
use serde_json::{Map, Value};

pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

pub(crate) fn tiny_chat() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-chat")
}

/// A folder that is gone at the end.
pub(crate) struct Scratch(tempfile::TempDir);

impl Scratch {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A copy of a directory's files, links followed, that can be changed.
    pub(crate) fn copy(&self, from: &Path, name: &str) -> PathBuf {
        let to = self.at(name);
        fs_err::create_dir_all(&to).unwrap();
        for entry in fs_err::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                let target = to.join(path.file_name().unwrap());
                let _ = fs_err::remove_file(&target); // it may be a link by now
                fs_err::write(target, fs_err::read(&path).unwrap()).unwrap();
            }
        }
        to
    }

    pub(crate) fn names(&self) -> Vec<String> {
        names(self.0.path())
    }

    /// A file of one JSON line.
    pub(crate) fn line(&self, line: &Value) -> PathBuf {
        let path = self.at("lines.jsonl");
        fs_err::write(&path, format!("{line}\n")).unwrap();
        path
    }
}

pub(crate) fn names(directory: &Path) -> Vec<String> {
    let entries = fs_err::read_dir(directory).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

pub(crate) fn object(path: &Path) -> Map<String, Value> {
    serde_json::from_slice(&fs_err::read(path).unwrap()).unwrap()
}

/// Changes a JSON object in its file.
pub(crate) fn edit(path: &Path, change: impl FnOnce(&mut Map<String, Value>)) {
    let mut map = if path.exists() { object(path) } else { Map::new() };
    change(&mut map);
    fs_err::write(path, Value::Object(map).to_string()).unwrap();
}

/// Changes the tensors of a model's directory; none in place of one removes it.
pub(crate) fn rewrite(
    directory: &Path,
    change: impl Fn(&str, Tensor) -> Option<Tensor>,
    more: Vec<(&str, Tensor)>,
) {
    let path = weights(directory);
    let file = SafetensorsFile::open(&path).unwrap();
    let mut tensors: Vec<(String, Tensor)> = file
        .names()
        .filter_map(|name| Some((name.to_owned(), change(name, file.tensor(name).unwrap())?)))
        .collect();
    tensors.extend(more.into_iter().map(|(name, tensor)| (name.to_owned(), tensor)));
    write_safetensors(&path, &tensors).unwrap();
}

pub(crate) fn weights(directory: &Path) -> PathBuf {
    let adapter = directory.join("adapter_model.safetensors");
    if adapter.exists() && !directory.join("model.safetensors").exists() {
        adapter
    } else {
        directory.join("model.safetensors")
    }
}

/// Writes one number into a tensor of a safetensors file, which the library would refuse to read afterwards.
pub(crate) fn spoil(path: &Path, name: &str, element: usize, number: f32) {
    let mut bytes = fs_err::read(path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let parsed: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let entry = &parsed[name];
    let begin = 8 + header + entry["data_offsets"][0].as_u64().unwrap() as usize;
    let full = number.to_le_bytes();
    let stored: &[u8] = match entry["dtype"].as_str().unwrap() {
        "F32" => &full,
        "BF16" => &full[2..], // the upper half: a NaN's and an infinity's too
        other => panic!("{other}"),
    };
    let at = begin + element * stored.len();
    bytes[at..at + stored.len()].copy_from_slice(stored);
    fs_err::write(path, bytes).unwrap();
}

pub(crate) fn in_f32() -> LoadOptions {
    LoadOptions { device: Device::Cpu, dtype: Kind::Float, nf4: None }
}

pub(crate) fn load(directory: &Path) -> Result<Model, Error> {
    Model::load(&Source::Directory(directory.to_owned()), &in_f32())
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub(crate) fn program(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_arete-model"))
        .args(arguments)
        .env("RUST_LOG", "info")
        .env("OMP_NUM_THREADS", "1")
        .env_remove("RUST_BACKTRACE")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Standard output of a run that must succeed.
#[track_caller]
pub(crate) fn prints(arguments: &[&str]) -> String {
    let output = program(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// Standard error of a run that must fail with `code`, nothing on standard output, and every one of `words` in the message.
#[track_caller]
pub(crate) fn refuses(arguments: &[&str], code: i32, words: &[&str]) -> String {
    let output = program(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
    assert!(output.stdout.is_empty(), "{arguments:?}");
    for word in words {
        assert!(stderr.contains(word), "{word}: {stderr}");
    }
    assert!(!stderr.contains("panicked"), "{stderr}");
    stderr
}

/// The ids and the log-probabilities of a text.
#[track_caller]
pub(crate) fn logprobs(
    scratch: &Scratch,
    model: &Path,
    line: &Value,
    more: &[&str],
) -> (Vec<i64>, Vec<f64>) {
    let lines = scratch.line(line);
    let arguments = ["logprobs", "--model", text(model), "--dtype", "f32", "--jsonl", text(&lines)];
    let row: Value = serde_json::from_str(&prints(&[&arguments, more].concat())).unwrap();
    let numbers: Vec<Option<f64>> = serde_json::from_value(row["logprobs"].clone()).unwrap();
    (
        serde_json::from_value(row["token_ids"].clone()).unwrap(),
        numbers.into_iter().flatten().collect(),
    )
}

pub(crate) fn largest(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}
