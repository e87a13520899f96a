//! What results depend on, and how two sets of it differ.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;

use arete_records::hashes::HashCache;
use arete_records::{hex, redact};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::StageSpec;
use crate::Error;

/// Version of the layout of files in a run directory; a change makes stages run again.
const FORMAT: &str = "1";

/// The key under which stages record their device, and the value that leaves the choice to the machine.
const DEVICE: &str = "device";
const AUTO: &str = "auto";

/// What a device's name stands for here.
static RESOLVE: OnceLock<fn(&str) -> Option<String>> = OnceLock::new();

/// Everything the results depend on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Origin {
    pub(super) stage: String,
    pub(super) config: Value,
    pub(super) seed: u64,
    pub(super) inputs: BTreeMap<String, String>,
    pub(super) versions: BTreeMap<String, String>,
}

impl Origin {
    pub(super) fn of(spec: &StageSpec<'_>, cache: &mut HashCache) -> Result<Self, Error> {
        let mut inputs = BTreeMap::new();
        for (name, path) in &spec.inputs {
            inputs.insert(name.clone(), cache.sha256_path(path)?);
            crate::inputs::check_with(path, cache)?;
        }
        Ok(Self {
            stage: spec.stage.to_owned(),
            config: {
                let mut config = sorted(&spec.config);
                redact::redact_json(&mut config);
                config
            },
            seed: spec.seed,
            inputs,
            versions: BTreeMap::from([
                ("arete".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
                ("format".to_owned(), FORMAT.to_owned()),
            ]),
        })
    }

    pub(super) fn fingerprint(&self) -> String {
        let json = serde_json::to_vec(self).expect("maps with string keys always serialise");
        hex(&Sha256::digest(json))
    }

    /// These values with the device as it would be named now: results do not change hands because `auto` is written out,
    /// or a name is left to `auto` again. `used` is the device that results were made on.
    pub(super) fn as_if_now(&self, used: &str, now: &Self) -> Self {
        let mut same = self.clone();
        let (Some(old), Some(new)) = (device_of(&self.config), device_of(&now.config)) else {
            return same;
        };
        // Where nothing was computed with a model (`none`, `server`), its device says nothing.
        let is_used = ["none", "server"].contains(&used) || canonical(&new) == canonical(used);
        if new == AUTO || (old == AUTO && is_used) || canonical(&old) == canonical(&new) {
            same.config[DEVICE] = new.into();
        }
        same
    }

    /// These values with the device as this machine has it, if the program said how to find out.
    pub(super) fn on_this_machine(&self) -> Self {
        let mut same = self.clone();
        if let (Some(resolve), Some(device)) = (RESOLVE.get(), device_of(&self.config)) {
            same.config[DEVICE] = resolve(&device).unwrap_or_else(|| canonical(&device)).into();
        }
        same
    }

    /// Identifies what checkpoints are of: everything that results depend on but for `amounts`, how long the work goes on.
    pub(super) fn lineage(&self, amounts: &[&str]) -> String {
        let mut same = self.clone();
        if let Some(config) = same.config.as_object_mut() {
            config.retain(|key, _| !amounts.contains(&key.as_str()));
        }
        same.fingerprint()
    }

    /// The amounts that were smaller, if nothing but them differs and none is smaller now.
    pub(super) fn grown(&self, new: &Self, amounts: &[&str]) -> Option<Map<String, Value>> {
        if amounts.is_empty() || self.lineage(amounts) != new.lineage(amounts) {
            return None;
        }
        let mut grown = Map::new();
        for key in amounts {
            let (old, new) = (self.config.get(*key), new.config.get(*key));
            if old == new {
                continue;
            }
            let (old, new) = (old?, new?);
            if new.as_f64()? < old.as_f64()? {
                return None;
            }
            grown.insert((*key).to_owned(), old.clone());
        }
        Some(grown)
    }

    /// Every setting and input that differs.
    pub(super) fn changes(&self, new: &Self) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut compare = |what, key: &str, old: Option<String>, new: Option<String>| {
            if old != new {
                let shown = |value: Option<String>| value.unwrap_or_else(|| "(none)".to_owned());
                changes.push(Change {
                    what,
                    key: key.to_owned(),
                    old: shown(old),
                    new: shown(new),
                });
            }
        };
        compare("stage", "stage", Some(self.stage.clone()), Some(new.stage.clone()));
        compare("recipe key", "seed", Some(self.seed.to_string()), Some(new.seed.to_string()));
        let (old_config, new_config) = (flattened(&self.config), flattened(&new.config));
        for key in union(&old_config, &new_config) {
            let get = |config: &BTreeMap<String, String>| config.get(key).cloned();
            compare("recipe key", key, get(&old_config), get(&new_config));
        }
        for key in union(&self.inputs, &new.inputs) {
            compare("input", key, self.inputs.get(key).cloned(), new.inputs.get(key).cloned());
        }
        for key in union(&self.versions, &new.versions) {
            let get = |versions: &BTreeMap<String, String>| versions.get(key).cloned();
            compare("version", key, get(&self.versions), get(&new.versions));
        }
        changes
    }
}

/// One thing that results depend on and that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// `recipe key`, `input`, `version` or `stage`.
    pub what: &'static str,
    /// Its name; of a setting, dotted.
    pub key: String,
    /// What the results were made with (of an input, its SHA-256).
    pub old: String,
    /// What they would be made with now.
    pub new: String,
}

fn device_of(config: &Value) -> Option<String> {
    config.get(DEVICE)?.as_str().map(str::to_owned)
}

/// `cuda` is the first GPU.
fn canonical(device: &str) -> String {
    if device == "cuda" { "cuda:0".to_owned() } else { device.to_owned() }
}

/// Has unfinished work compared by the device that a name stands for on this machine: `auto` and what it stands for are
/// then the same. The first caller decides; this crate knows no devices.
pub fn resolve_devices_with(resolve: fn(&str) -> Option<String>) {
    // A second caller could only say the same.
    let _ = RESOLVE.set(resolve);
}

fn union<'a>(
    a: &'a BTreeMap<String, String>,
    b: &'a BTreeMap<String, String>,
) -> BTreeSet<&'a String> {
    a.keys().chain(b.keys()).collect()
}

/// Settings by dotted key.
fn flattened(config: &Value) -> BTreeMap<String, String> {
    fn visit(prefix: &str, value: &Value, out: &mut BTreeMap<String, String>) {
        match value {
            Value::Object(map) if !map.is_empty() => {
                for (key, value) in map {
                    let key =
                        if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                    visit(&key, value, out);
                }
            }
            other => {
                out.insert(prefix.to_owned(), other.to_string());
            }
        }
    }
    let mut out = BTreeMap::new();
    visit("", config, &mut out);
    out
}

/// The same value with every object's keys sorted, so that equal settings give equal bytes.
fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let sorted: BTreeMap<&String, Value> =
                map.iter().map(|(key, value)| (key, self::sorted(value))).collect();
            Value::Object(sorted.into_iter().map(|(key, value)| (key.clone(), value)).collect())
        }
        Value::Array(items) => items.iter().map(sorted).collect(),
        other => other.clone(),
    }
}
