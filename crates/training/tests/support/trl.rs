//! What the tests against TRL share: the tiny chat model in f32, and the goldens of the crate that takes this in by its path.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use arete_model::{Device, Kind, LoadOptions, Model, Source, Tensor};
use serde_json::Value;

/// A path in the crate.
pub(crate) fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The tiny chat model.
pub(crate) fn tiny_chat() -> Model {
    let source = Source::Directory(here("../../tests/fixtures/tiny-chat"));
    let options = LoadOptions { device: Device::Cpu, dtype: Kind::Float, nf4: None };
    Model::load(&source, &options).unwrap()
}

/// What TRL did: numbers, and tensors by name.
pub(crate) fn golden() -> (Value, BTreeMap<String, Tensor>) {
    let json = fs_err::read_to_string(here("tests/goldens/trl.json")).unwrap();
    let tensors = Tensor::read_safetensors(here("tests/goldens/trl.safetensors")).unwrap();
    (serde_json::from_str(&json).unwrap(), tensors.into_iter().collect())
}

/// ‖ours − theirs‖ / ‖theirs‖.
pub(crate) fn relative_difference(ours: &Tensor, theirs: &Tensor) -> f64 {
    let norm = |tensor: &Tensor| f64::try_from(tensor.to_kind(Kind::Double).norm()).unwrap();
    norm(&(ours - theirs)) / norm(theirs)
}
