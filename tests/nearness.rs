//! How far the results of a stage are from those of another run of it, file by file.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use arete_model::{Kind, Tensor};
use arete_records::parquet;
use serde_json::Value;

/// Numbers of rows, metrics and evaluations may differ by so much, of 1 or of the larger of the two: in f32, sums in another order.
const NUMBERS: f64 = 1e-4;
/// Trained tensors by so much of their norm. Adam's first steps are as long whatever the gradient's size, so where a gradient is next
/// to nothing rounding decides a whole step.
const TENSORS: f64 = 1e-3;

/// Names of results below `dir`, as far as one run of a stage has to leave what another leaves.
fn results(dir: &Path) -> BTreeSet<PathBuf> {
    let (mut found, mut waiting) = (BTreeSet::new(), vec![dir.to_path_buf()]);
    while let Some(folder) = waiting.pop() {
        for entry in fs_err::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if path.is_dir() {
                waiting.push(path);
            } else if !name.starts_with('.') {
                found.insert(path.strip_prefix(dir).unwrap().to_path_buf());
            }
        }
    }
    found
}

/// Holds every result of `found` against that of `expected`; the furthest number and the furthest tensor.
pub(crate) fn compare(found: &Path, expected: &Path) -> Furthest {
    let names = results(expected);
    assert_eq!(results(found), names, "{}", found.display());
    let mut furthest = Furthest::default();
    for name in names {
        let both = [found.join(&name), expected.join(&name)];
        let is_bookkeeping = ["run.json", "machine.json", "timings.jsonl", "MANIFEST.json"]
            .contains(&name.file_name().unwrap().to_str().unwrap());
        match name.extension().and_then(|extension| extension.to_str()) {
            Some("json" | "jsonl") if !is_bookkeeping => {
                let [found, expected] = both.map(|path| lines(&path));
                furthest.values(&name.display().to_string(), &found, &expected);
            }
            Some("parquet") => {
                let rows = |path: PathBuf| -> Value {
                    parquet::read_json(path).unwrap().into_iter().map(Value::Object).collect()
                };
                let [found, expected] = both.map(rows);
                furthest.values(&name.display().to_string(), &found, &expected);
            }
            Some("safetensors") => furthest.tensors(&name.display().to_string(), both),
            _ => {}
        }
    }
    furthest
}

/// A file of JSON, or of a line of it each.
fn lines(path: &Path) -> Value {
    let text = fs_err::read_to_string(path).unwrap();
    let values = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
    values.collect::<Result<Vec<_>, _>>().unwrap().into()
}

/// The largest differences of a comparison, and where they are.
#[derive(Debug, Default)]
pub(crate) struct Furthest {
    number: Option<(f64, String)>,
    tensor: Option<(f64, String)>,
}

impl Furthest {
    fn values(&mut self, place: &str, found: &Value, expected: &Value) {
        match (found, expected) {
            (Value::Array(found), Value::Array(expected)) => {
                assert_eq!(found.len(), expected.len(), "{place}");
                for (idx, (found, expected)) in found.iter().zip(expected).enumerate() {
                    self.values(&format!("{place}[{idx}]"), found, expected);
                }
            }
            (Value::Object(found), Value::Object(expected)) => {
                assert!(found.keys().eq(expected.keys()), "{place}");
                for (key, found) in found {
                    // Hashes of files that are compared themselves.
                    if !key.contains("sha256") {
                        self.values(&format!("{place}.{key}"), found, &expected[key]);
                    }
                }
            }
            (Value::Number(a), Value::Number(b)) => {
                let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
                let gap = (a - b).abs() / a.abs().max(b.abs()).max(1.0);
                assert!(gap <= NUMBERS, "{place}: {a}, expected {b}");
                keep(&mut self.number, gap, place);
            }
            _ => assert_eq!(found, expected, "{place}"),
        }
    }

    fn tensors(&mut self, place: &str, both: [PathBuf; 2]) {
        // A file's tensors come in any order.
        let [found, expected] = both.map(|path| {
            let mut tensors = Tensor::read_safetensors(path).unwrap();
            tensors.sort_by(|a, b| a.0.cmp(&b.0));
            tensors
        });
        assert_eq!(found.len(), expected.len(), "{place}");
        for ((name, found), (expected_name, expected)) in found.iter().zip(&expected) {
            assert_eq!((name, found.size()), (expected_name, expected.size()), "{place}");
            let norm = |tensor: &Tensor| tensor.to_kind(Kind::Double).norm().double_value(&[]);
            let gap = norm(&(found - expected)) / norm(expected).max(f64::MIN_POSITIVE);
            assert!(gap <= TENSORS, "{place}: {name} is {gap} of its norm off");
            keep(&mut self.tensor, gap, &format!("{place}: {name}"));
        }
    }
}

fn keep(furthest: &mut Option<(f64, String)>, gap: f64, place: &str) {
    if furthest.as_ref().is_none_or(|(largest, _)| gap > *largest) {
        *furthest = Some((gap, place.to_owned()));
    }
}
