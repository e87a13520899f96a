//! What the tests of the trainers' programs share: the tiny chat model, what a program said, and the files whose bytes are promised. Each
//! crate's test takes it in by its path.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Output;

/// The tiny chat model.
pub(crate) fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-chat")
}

/// What a program wrote to stderr.
pub(crate) fn message(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Every file whose bytes are promised.
pub(crate) fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut out = BTreeMap::new();
    for entry in fs_err::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() {
            let inner = files(&path).into_iter();
            out.extend(inner.map(|(file, bytes)| (format!("{name}/{file}"), bytes)));
        } else if !name.starts_with('.')
            && !["timings.jsonl", "machine.json"].contains(&name.as_str())
            && !name.contains("tfevents")
        {
            out.insert(name, fs_err::read(&path).unwrap());
        }
    }
    out
}

/// Two finished runs have the same bytes.
pub(crate) fn assert_same_files(a: &Path, b: &Path) {
    let (a, b) = (files(a), files(b));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (name, bytes) in &a {
        assert!(bytes == &b[name], "{name} differs");
    }
    // In a directory of its own where a stage writes several.
    for file in ["run.json", "adapter/adapter_model.safetensors"] {
        assert!(a.keys().any(|name| name.ends_with(file)), "{file}");
    }
}
