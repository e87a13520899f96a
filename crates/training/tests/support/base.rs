//! A base of a test's own, to be changed.

use std::path::{Path, PathBuf};

/// A copy of a model's directory.
pub(crate) fn copied(model: &Path, dir: &Path) -> PathBuf {
    let base = dir.join("base");
    fs_err::create_dir_all(&base).unwrap();
    for entry in fs_err::read_dir(model).unwrap() {
        let path = entry.unwrap().path();
        fs_err::copy(&path, base.join(path.file_name().unwrap())).unwrap();
    }
    base
}

/// Flips a bit of its last weight.
pub(crate) fn change_a_weight(base: &Path) {
    let weights = base.join("model.safetensors");
    let mut bytes = fs_err::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs_err::write(&weights, bytes).unwrap();
}
