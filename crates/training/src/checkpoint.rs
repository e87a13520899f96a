//! Checkpoints that are there whole or not at all, and are checked before they are trusted.
//!
//! `checkpoint-000120/` holds `tensors.safetensors`, `trainer_state.json` and, written last, `MANIFEST.json` with the size
//! and SHA-256 of both. The directory is filled under a temporary name, flushed, and renamed. A reader takes the
//! newest one whose manifest verifies.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use arete_records::atomic::AtomicDir;
use arete_records::files;
use arete_stage::run::CHECKPOINT_PREFIX;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};

use crate::Error;

/// File with the tensors.
pub(crate) const TENSORS: &str = "tensors.safetensors";
/// File with everything else, in JSON.
const STATE: &str = "trainer_state.json";
/// File that vouches for the others.
const MANIFEST: &str = "MANIFEST.json";
/// Version of the layout.
const FORMAT: u32 = 1;

/// The checkpoints of one run.
#[derive(Debug, Clone)]
pub struct CheckpointStore {
    dir: PathBuf,
    fingerprint: String,
    dtype: String,
    keep: usize,
}

/// A checkpoint that was read and verified.
#[derive(Debug)]
pub struct Loaded<S> {
    /// Steps finished when it was written.
    pub step: u64,
    /// The tensors, on the CPU.
    pub tensors: BTreeMap<String, Tensor>,
    /// The rest.
    pub state: S,
}

#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    format: u32,
    step: u64,
    fingerprint: String,
    /// What was computed in, once `auto` was resolved.
    #[serde(default)]
    dtype: Option<String>,
    files: BTreeMap<String, FileEntry>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct FileEntry {
    n_bytes: u64,
    sha256: String,
}

impl FileEntry {
    fn of(bytes: &[u8]) -> Self {
        let digest = Sha256::digest(bytes);
        let sha256 = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        Self { n_bytes: bytes.len() as u64, sha256 }
    }
}

impl CheckpointStore {
    /// The checkpoints in `dir` of the run that `fingerprint` identifies (settings and inputs), computed in `dtype`; the
    /// newest `keep` are kept, at least one.
    pub fn new(dir: &Path, fingerprint: &str, dtype: &str, keep: usize) -> Self {
        let (fingerprint, dtype) = (fingerprint.to_owned(), dtype.to_owned());
        Self { dir: dir.to_owned(), fingerprint, dtype, keep: keep.max(1) }
    }

    /// Writes the checkpoint of `step`, then removes those that are neither among the newest nor in `protect`.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] or [`Error::Records`] if the disk refuses; then the earlier checkpoints are as they were.
    pub fn save<S: Serialize>(
        &self,
        step: u64,
        tensors: &[(String, Tensor)],
        state: &S,
        protect: &[u64],
    ) -> Result<(), Error> {
        let target = self.path(step);
        let dir = AtomicDir::new(&target)?;
        let mut files = BTreeMap::new();
        let tensors = serialize(tensors)?;
        let state = serde_json::to_vec_pretty(state)
            .expect("a trainer's state has string keys and finite numbers");
        for (name, bytes) in [(TENSORS, tensors), (STATE, state)] {
            fs_err::write(dir.path().join(name), &bytes)?;
            files.insert(name.to_owned(), FileEntry::of(&bytes));
        }
        let manifest = Manifest {
            format: FORMAT,
            step,
            fingerprint: self.fingerprint.clone(),
            dtype: Some(self.dtype.clone()),
            files,
        };
        let manifest = serde_json::to_vec_pretty(&manifest).expect("a manifest always serialises");
        fs_err::write(dir.path().join(MANIFEST), manifest)?;
        dir.commit()?;
        let mut steps = self.steps()?;
        // Later ones are damaged: this run passed them over when it began.
        steps.retain(|&other| other <= step);
        steps.truncate(steps.len().saturating_sub(self.keep));
        self.remove(steps.into_iter().filter(|step| !protect.contains(step)))
    }

    /// Removes every checkpoint but those of `steps`.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if one cannot be removed.
    pub fn keep_only(&self, steps: &[u64]) -> Result<(), Error> {
        self.remove(self.steps()?.into_iter().filter(|step| !steps.contains(step)))
    }

    fn remove(&self, steps: impl Iterator<Item = u64>) -> Result<(), Error> {
        for step in steps {
            // Under its own name until it is gone: a reader that meets half of it finds the manifest violated.
            let path = self.path(step);
            match fs_err::remove_file(path.join(MANIFEST)) {
                // A kill came between these two removals the last time.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                other => other?,
            }
            fs_err::remove_dir_all(path)?;
        }
        Ok(())
    }

    /// The newest checkpoint that verifies; newer ones that do not are named in a warning and passed over.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`] if it is of another run (settings, data or base changed) or was computed in another dtype, or if
    /// its state cannot be read;
    /// [`Error::Io`].
    pub fn latest<S: DeserializeOwned>(&self) -> Result<Option<Loaded<S>>, Error> {
        for step in self.steps()?.into_iter().rev() {
            match self.verified(step)? {
                Ok(files) => return self.parse(step, &files).map(Some),
                Err(reason) => {
                    let path = self.path(step);
                    tracing::warn!(path = %path.display(), reason, "checkpoint is damaged, taking the one before");
                }
            }
        }
        Ok(None)
    }

    /// The checkpoint of one step.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`] if it does not verify; [`Error::Io`] if it cannot be read.
    pub fn load<S: DeserializeOwned>(&self, step: u64) -> Result<Loaded<S>, Error> {
        match self.verified(step)? {
            Ok(files) => self.parse(step, &files),
            Err(reason) => Err(Error::Checkpoint {
                path: self.path(step),
                field: MANIFEST.to_owned(),
                expected: "a checkpoint that verifies".to_owned(),
                got: reason,
            }),
        }
    }

    /// The files of a checkpoint, or why they are not to be trusted.
    fn verified(&self, step: u64) -> Result<Result<Vec<Vec<u8>>, String>, Error> {
        let dir = self.path(step);
        let Some(manifest) = read_if_any(&dir.join(MANIFEST))? else {
            return Ok(Err(format!("{MANIFEST} is missing")));
        };
        let manifest: Manifest = match serde_json::from_slice(&manifest) {
            Ok(manifest) => manifest,
            Err(error) => return Ok(Err(format!("{MANIFEST}: {error}"))),
        };
        if manifest.format != FORMAT || manifest.step != step {
            let Manifest { format, step, .. } = manifest;
            return Ok(Err(format!("{MANIFEST}: layout {format}, step {step}")));
        }
        if manifest.fingerprint != self.fingerprint {
            return Err(Error::Checkpoint {
                path: dir.join(MANIFEST),
                field: "fingerprint (settings, data, base model)".to_owned(),
                expected: self.fingerprint.clone(),
                got: manifest.fingerprint,
            });
        }
        if let Some(dtype) = manifest.dtype.filter(|dtype| *dtype != self.dtype) {
            return Err(Error::Checkpoint {
                path: dir.join(MANIFEST),
                field:
                    "dtype (this machine may compute in another by itself: name it with --dtype)"
                        .to_owned(),
                expected: self.dtype.clone(),
                got: dtype,
            });
        }
        let mut files = Vec::new();
        for name in [TENSORS, STATE] {
            let Some(bytes) = read_if_any(&dir.join(name))? else {
                return Ok(Err(format!("{name} is missing")));
            };
            if manifest.files.get(name) != Some(&FileEntry::of(&bytes)) {
                return Ok(Err(format!("{name} is not what {MANIFEST} says")));
            }
            files.push(bytes);
        }
        Ok(Ok(files))
    }

    fn parse<S: DeserializeOwned>(&self, step: u64, files: &[Vec<u8>]) -> Result<Loaded<S>, Error> {
        let wrong = |file: &str, got: String| Error::Checkpoint {
            path: self.path(step).join(file),
            field: "contents".to_owned(),
            expected: "what this version writes".to_owned(),
            got,
        };
        let tensors = deserialize(&files[0]).map_err(|got| wrong(TENSORS, got))?;
        let state =
            serde_json::from_slice(&files[1]).map_err(|error| wrong(STATE, error.to_string()))?;
        Ok(Loaded { step, tensors, state })
    }

    /// The directory of a step's checkpoint.
    pub fn path(&self, step: u64) -> PathBuf {
        self.dir.join(format!("{CHECKPOINT_PREFIX}{step:06}"))
    }

    /// The steps that have a checkpoint, oldest first.
    fn steps(&self) -> Result<Vec<u64>, Error> {
        let mut steps = Vec::new();
        for entry in fs_err::read_dir(&self.dir)? {
            let name = entry?.file_name();
            let step = name.to_str().and_then(|name| name.strip_prefix(CHECKPOINT_PREFIX));
            steps.extend(step.and_then(|digits| digits.parse::<u64>().ok()));
        }
        steps.sort_unstable();
        Ok(steps)
    }
}

fn read_if_any(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    // As large as the trained weights are.
    match files::read_capped(path, 1 << 40) {
        Err(arete_records::Error::Io(error)) if error.kind() == std::io::ErrorKind::NotFound => {
            Ok(None)
        }
        other => Ok(Some(other?)),
    }
}

/// The bytes of a safetensors file with these f32 and i64 tensors.
pub(crate) fn serialize(tensors: &[(String, Tensor)]) -> Result<Vec<u8>, Error> {
    let mut parts = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let (dtype, width) = match tensor.kind() {
            Kind::Float => (Dtype::F32, 4),
            Kind::Int64 => (Dtype::I64, 8),
            other => {
                return Err(Error::Invalid {
                    name: "checkpoint tensors",
                    expected: "f32 or i64".to_owned(),
                    got: format!("`{name}`: {other:?}"),
                });
            }
        };
        let tensor = tensor.f_to_device(tch::Device::Cpu)?.f_contiguous()?;
        let mut bytes = vec![0u8; tensor.numel() * width];
        tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
        let shape: Vec<usize> = tensor
            .size()
            .into_iter()
            .map(|size| usize::try_from(size).expect("sizes are not negative"))
            .collect();
        parts.push((name.as_str(), dtype, shape, bytes));
    }
    let views: Vec<(&str, TensorView<'_>)> = parts
        .iter()
        .map(|(name, dtype, shape, bytes)| {
            let view = TensorView::new(*dtype, shape.clone(), bytes)
                .expect("the bytes were sized from the shape");
            (*name, view)
        })
        .collect();
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    Ok(safetensors::serialize(views, Some(metadata)).expect("names are distinct, sizes agree"))
}

/// The tensors of such a file.
pub(crate) fn deserialize(bytes: &[u8]) -> Result<BTreeMap<String, Tensor>, String> {
    let file = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.tensors() {
        let kind = match view.dtype() {
            Dtype::F32 => Kind::Float,
            Dtype::I64 => Kind::Int64,
            other => return Err(format!("tensor `{name}` of type {other:?}")),
        };
        let shape: Vec<i64> = view
            .shape()
            .iter()
            .map(|&size| i64::try_from(size).map_err(|error| error.to_string()))
            .collect::<Result<_, _>>()?;
        let tensor = Tensor::f_from_data_size(view.data(), &shape, kind)
            .map_err(|error| error.to_string())?;
        tensors.insert(name, tensor);
    }
    Ok(tensors)
}

/// Takes out of a stage's recorded settings what cannot change a result, the stage's `own` such keys among it: a run may be
/// continued with other values of these.
pub fn forget_harmless(recorded: &mut serde_json::Value, own: &[&str]) {
    if let serde_json::Value::Object(recorded) = recorded {
        for key in ["checkpoint_every", "keep_checkpoints"].iter().chain(own) {
            recorded.remove(*key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors(value: f32) -> Vec<(String, Tensor)> {
        vec![
            ("a".to_owned(), Tensor::from_slice(&[value, f32::MIN_POSITIVE / 4.0]).view([2, 1])),
            ("n".to_owned(), Tensor::from_slice(&[7i64])),
        ]
    }

    fn first(loaded: &Loaded<Vec<u64>>) -> f32 {
        f32::try_from(loaded.tensors["a"].get(0)).unwrap()
    }

    #[test]
    fn another_dtype_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = |dtype| CheckpointStore::new(dir.path(), "f", dtype, 2);
        store("bf16").save(3, &tensors(0.1), &vec![1u64], &[]).unwrap();
        let message = store("f32").latest::<Vec<u64>>().unwrap_err().to_string();
        assert!(message.contains("dtype") && message.contains("--dtype"), "{message}");
        assert!(
            message.contains("expected f32, found bf16")
                || message.contains("expected f32, got bf16"),
            "{message}"
        );
        assert!(store("bf16").latest::<Vec<u64>>().unwrap().is_some());
    }

    #[test]
    fn a_damaged_newer_checkpoint_does_not_cost_a_good_one() {
        let dir = tempfile::tempdir().unwrap();
        let store = CheckpointStore::new(dir.path(), "f", "f32", 1);
        store.save(10, &tensors(0.1), &vec![1u64], &[10]).unwrap();
        fs_err::write(store.path(10).join(TENSORS), b"torn").unwrap();
        store.save(3, &tensors(0.3), &vec![1u64], &[]).unwrap();
        assert_eq!(store.latest::<Vec<u64>>().unwrap().unwrap().step, 3);
    }

    #[test]
    fn what_is_saved_comes_back_to_the_bit() {
        let dir = tempfile::tempdir().unwrap();
        let store = CheckpointStore::new(dir.path(), "f", "f32", 2);
        assert!(store.latest::<Vec<u64>>().unwrap().is_none());
        store.save(3, &tensors(0.1), &vec![1u64, 2], &[]).unwrap();
        let loaded = store.latest::<Vec<u64>>().unwrap().unwrap();
        assert_eq!((loaded.step, &loaded.state), (3, &vec![1, 2]));
        assert_eq!(loaded.tensors["a"].size(), [2, 1]);
        let values: Vec<f32> = Vec::try_from(loaded.tensors["a"].view([-1])).unwrap();
        assert_eq!(values[0].to_bits(), 0.1f32.to_bits());
        assert_eq!(values[1].to_bits(), (f32::MIN_POSITIVE / 4.0).to_bits());
        assert_eq!(i64::try_from(&loaded.tensors["n"]).unwrap(), 7);
    }

    #[test]
    fn the_newest_and_the_protected_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store = CheckpointStore::new(dir.path(), "f", "f32", 2);
        for step in 1..=5 {
            store.save(step, &tensors(0.0), &Vec::<u64>::new(), &[1]).unwrap();
        }
        assert_eq!(store.steps().unwrap(), vec![1, 4, 5]);
        store.keep_only(&[5]).unwrap();
        assert_eq!(store.steps().unwrap(), vec![5]);
    }

    #[test]
    fn a_checkpoint_that_a_kill_left_half_removed_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let store = CheckpointStore::new(dir.path(), "f", "f32", 1);
        store.save(1, &tensors(0.0), &Vec::<u64>::new(), &[]).unwrap();
        fs_err::remove_file(store.path(1).join(MANIFEST)).unwrap();
        store.save(2, &tensors(0.0), &Vec::<u64>::new(), &[]).unwrap();
        assert_eq!(store.steps().unwrap(), vec![2]);
    }

    #[test]
    fn a_damaged_checkpoint_is_passed_over() {
        for file in [TENSORS, STATE, MANIFEST] {
            let dir = tempfile::tempdir().unwrap();
            let store = CheckpointStore::new(dir.path(), "f", "f32", 3);
            store.save(1, &tensors(1.0), &Vec::<u64>::new(), &[]).unwrap();
            store.save(2, &tensors(2.0), &Vec::<u64>::new(), &[]).unwrap();
            let path = store.path(2).join(file);
            let mut bytes = fs_err::read(&path).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x40;
            fs_err::write(&path, &bytes).unwrap();
            assert_eq!(first(&store.latest().unwrap().unwrap()), 1.0, "flipped a bit of {file}");
            fs_err::remove_file(&path).unwrap();
            assert_eq!(first(&store.latest().unwrap().unwrap()), 1.0, "removed {file}");
            assert!(store.load::<Vec<u64>>(2).is_err());
        }
    }

    #[test]
    fn a_checkpoint_of_another_run_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        CheckpointStore::new(dir.path(), "old", "f32", 1)
            .save(1, &tensors(1.0), &Vec::<u64>::new(), &[])
            .unwrap();
        let error = CheckpointStore::new(dir.path(), "new", "f32", 1)
            .latest::<Vec<u64>>()
            .unwrap_err()
            .to_string();
        assert!(error.contains("expected new, got old"), "{error}");
    }
}
