//! What a directory of results is, which of its files others need, and the page (`README.md`) that tells them about it.
//!
//! A card says what was trained on what, with which settings, how good it is and where it fails, from the files that the
//! stage left: `run.json`, `evaluation.json`, `score_stats.json`, `metrics.jsonl`. It holds no date and no local path, so
//! that the same results give the same card.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use arete_records::atomic;
use arete_records::redact::redacted;
use arete_stage::run::{RUN_JSON, RunJson};
use serde_json::{Map, Value};

use crate::Error;
use crate::hub::{Content, RepositoryKind, Upload, split_id};
use crate::json::read_object;

/// Folder of rows by split beside the file that holds all of them.
const SPLITS: &str = "splits";

const ADAPTER_CONFIG: &str = "adapter_config.json";
const ADAPTER_META: &str = "arete_adapter.json";
const MODEL_CONFIG: &str = "config.json";
const SCORE_STATS: &str = "score_stats.json";
const READING: &str = "reading.json";
const MAX_JSON_BYTES: u64 = 4 << 20;
/// Files of a model directory beside its weights.
const MODEL_FILES: [&str; 7] = [
    MODEL_CONFIG,
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];
/// Directories of a stage that hold work in progress.
const WORK: [&str; 3] = ["checkpoint-", "shards", "."];

/// What a directory holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Artefact {
    /// A LoRA adapter in peft's layout; with a score head it is a reward model.
    Adapter {
        /// Whether it has a score head.
        reward: bool,
    },
    /// A Hugging Face model directory; with a score head it is a reward model.
    Model {
        /// Whether it is a `…ForSequenceClassification`.
        reward: bool,
    },
    /// Parquet files.
    Dataset,
}

/// A directory ready to be published.
#[derive(Debug)]
pub struct Publication {
    /// What it is.
    pub artefact: Artefact,
    /// Its files as others get them, the card among them.
    pub files: Vec<Upload>,
}

/// What the person who publishes adds to what the files say.
#[derive(Clone, Debug, Default)]
pub struct Details {
    /// Title of the page.
    pub title: String,
    /// Hub id of the base model, if the files do not name one.
    pub base_model: Option<String>,
    /// Identifier of a licence (`apache-2.0`).
    pub license: Option<String>,
}

impl Artefact {
    /// Finds out what `dir` holds.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if it holds no adapter, model or Parquet file; what is wrong with its configuration.
    pub fn of(dir: &Path) -> Result<Self, Error> {
        if dir.join(ADAPTER_CONFIG).is_file() {
            let config = read_object(&dir.join(ADAPTER_CONFIG), MAX_JSON_BYTES)?;
            return Ok(Self::Adapter {
                reward: config.get("task_type") == Some(&"SEQ_CLS".into()),
            });
        }
        if dir.join(MODEL_CONFIG).is_file() {
            let config = read_object(&dir.join(MODEL_CONFIG), MAX_JSON_BYTES)?;
            let name = config.get("architectures").and_then(|names| names[0].as_str());
            let reward = name.is_some_and(|name| name.ends_with("ForSequenceClassification"));
            return Ok(Self::Model { reward });
        }
        if !tables(dir)?.is_empty() {
            return Ok(Self::Dataset);
        }
        Err(Error::Invalid {
            name: "directory to push",
            expected: format!("{ADAPTER_CONFIG}, {MODEL_CONFIG} or Parquet files"),
            got: dir.display().to_string(),
        })
    }

    /// The kind of repository it belongs in.
    pub fn repository(self) -> RepositoryKind {
        match self {
            Self::Adapter { .. } | Self::Model { .. } => RepositoryKind::Model,
            Self::Dataset => RepositoryKind::Dataset,
        }
    }
}

/// Gathers what others need of `dir`, and writes its card.
///
/// # Errors
///
/// As [`Artefact::of`]; [`Error::Invalid`] if an adapter's base is a local path and `details` names no hub id instead.
pub fn prepare(dir: &Path, details: &Details) -> Result<Publication, Error> {
    let dir = &fs_err::canonicalize(dir)?;
    if let Some(given) = &details.base_model {
        split_id(given)?;
    }
    let artefact = Artefact::of(dir)?;
    let facts = Facts::read(dir)?;
    let mut base = details.base_model.clone();
    let mut files = Vec::new();
    match artefact {
        Artefact::Adapter { reward } => {
            let config_path = dir.join(ADAPTER_CONFIG);
            let mut config = read_object(&config_path, MAX_JSON_BYTES)?;
            let recorded = config.get("base_model_name_or_path").and_then(Value::as_str);
            let (id, revision) = adapter_base(base.as_deref(), recorded)?;
            config.insert("base_model_name_or_path".to_owned(), id.clone().into());
            if let Some(revision) = revision {
                config.insert("revision".to_owned(), revision.into());
            }
            files.push(json_file(ADAPTER_CONFIG, config));
            if dir.join(ADAPTER_META).is_file() {
                let mut meta = read_object(&dir.join(ADAPTER_META), MAX_JSON_BYTES)?;
                meta.insert("base_model".to_owned(), id.clone().into());
                files.push(json_file(ADAPTER_META, meta));
            }
            files.push(file_of(dir, Path::new("adapter_model.safetensors")));
            if reward && let Some(stats) = &facts.score_stats {
                files.push(json_file(SCORE_STATS, stats.clone()));
            }
            if reward && let Some(rule) = &facts.reading {
                files.push(json_file(READING, rule.clone()));
            }
            base = Some(id);
        }
        Artefact::Model { .. } => {
            let present = MODEL_FILES.iter().filter(|name| dir.join(name).is_file());
            files.extend(present.map(|name| file_of(dir, Path::new(name))));
            let weights = list(dir)?;
            let weights = weights.iter().filter(|path| has_ending(path, "safetensors"));
            files.extend(weights.map(|path| file_of(dir, path)));
            if base.is_none() {
                base = facts.setting("model").and_then(hub_id).map(|(id, _)| id);
            }
        }
        Artefact::Dataset => {
            files.extend(tables(dir)?.iter().map(|path| file_of(dir, path)));
        }
    }
    let tables = tables(dir)?;
    let card = Card { artefact, details, base: base.as_deref(), facts: &facts, tables: &tables };
    files
        .push(Upload { path: "README.md".to_owned(), content: Content::Bytes(card.text().into()) });
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(Publication { artefact, files })
}

/// The base an adapter names for others: an id of the hub, and its revision.
fn adapter_base(
    given: Option<&str>,
    recorded: Option<&str>,
) -> Result<(String, Option<String>), Error> {
    if let Some(given) = given {
        return Ok((given.to_owned(), None));
    }
    recorded.and_then(hub_id).ok_or_else(|| Error::Invalid {
        name: "base_model",
        expected: "the hub id of the base (--base-model owner/name): the adapter names a place on this machine".to_owned(),
        got: recorded.unwrap_or("none").to_owned(),
    })
}

/// An id of the hub, and its revision, unless the text is a place on this machine.
fn hub_id(text: &str) -> Option<(String, Option<String>)> {
    let (id, revision) = match text.split_once('@') {
        Some((id, revision)) => (id, Some(revision.to_owned())),
        None => (text, None),
    };
    let is_local = Path::new(text).exists() || text.ends_with(".gguf");
    (split_id(id).is_ok() && !is_local).then(|| (id.to_owned(), revision))
}

fn json_file(name: &str, object: Map<String, Value>) -> Upload {
    let mut text =
        serde_json::to_string_pretty(&Value::Object(object)).expect("it was JSON before");
    text.push('\n');
    Upload { path: name.to_owned(), content: Content::Bytes(text.into_bytes()) }
}

fn file_of(dir: &Path, relative: &Path) -> Upload {
    let parts: Vec<_> = relative.iter().map(|part| part.to_string_lossy()).collect();
    Upload { path: parts.join("/"), content: Content::File(dir.join(relative)) }
}

fn has_ending(path: &Path, ending: &str) -> bool {
    path.extension().is_some_and(|found| found == ending)
}

/// Parquet files under `dir`, by relative path, in order: of rows that lie there by split as well (`splits/`), those alone;
/// none of results that were set aside.
fn tables(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let is_whole = |path: &Path| dir.join(path).with_file_name(SPLITS).is_dir();
    let is_set_aside = |part: &std::ffi::OsStr| atomic::is_set_aside(&part.to_string_lossy());
    Ok(list(dir)?
        .into_iter()
        .filter(|path| has_ending(path, "parquet") && !is_whole(path))
        .filter(|path| !path.iter().any(is_set_aside))
        .collect())
}

/// Files under `dir` by relative path, in order, without those of work in progress.
fn list(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut out = Vec::new();
    let mut waiting = vec![PathBuf::new()];
    while let Some(folder) = waiting.pop() {
        for entry in fs_err::read_dir(dir.join(&folder))? {
            let entry = entry?;
            let name = entry.file_name();
            let is_work = WORK.iter().any(|start| name.to_string_lossy().starts_with(start));
            if is_work || arete_records::atomic::is_leftover(&entry.path()) {
                continue;
            }
            let relative = folder.join(name);
            match entry.file_type()?.is_dir() {
                true => waiting.push(relative),
                false => out.push(relative),
            }
        }
    }
    out.sort();
    Ok(out)
}

/// What a stage wrote about its results, in their directory or the one above.
#[derive(Debug, Default)]
struct Facts {
    run: Option<RunJson>,
    evaluation: Option<Map<String, Value>>,
    score_stats: Option<Map<String, Value>>,
    reading: Option<Map<String, Value>>,
    /// The last value of every logged metric.
    metrics: BTreeMap<String, Value>,
}

impl Facts {
    fn read(dir: &Path) -> Result<Self, Error> {
        let places = [Some(dir), dir.parent()];
        let home = places.into_iter().flatten().find(|place| place.join(RUN_JSON).is_file());
        let Some(home) = home else {
            return Ok(Self::default());
        };
        let object = |name: &str| {
            let path = home.join(name);
            path.is_file().then(|| read_object(&path, MAX_JSON_BYTES)).transpose()
        };
        let mut metrics = BTreeMap::new();
        let log = home.join("metrics.jsonl");
        if log.is_file() {
            for (_, line) in arete_records::jsonl::read(&log)? {
                if let Value::Object(line) = line {
                    metrics.extend(line);
                }
            }
        }
        Ok(Self {
            run: Some(RunJson::read(home)?),
            evaluation: object("evaluation.json")?,
            score_stats: object(SCORE_STATS)?,
            reading: object(READING)?,
            metrics,
        })
    }

    fn setting(&self, key: &str) -> Option<&str> {
        self.run.as_ref()?.config.get(key)?.as_str()
    }

    fn stage(&self) -> &str {
        self.run.as_ref().map_or("", |run| &run.stage)
    }
}

/// Everything a card is made of.
struct Card<'a> {
    artefact: Artefact,
    details: &'a Details,
    base: Option<&'a str>,
    facts: &'a Facts,
    tables: &'a [PathBuf],
}

impl Card<'_> {
    fn text(&self) -> String {
        let mut out = self.front_matter();
        let what = self.what();
        let _ = writeln!(out, "# {}\n\n{what}", self.details.title);
        if !matches!(self.artefact, Artefact::Dataset) {
            let base = self.base.map_or_else(
                || "Not named by the files it was made from.".to_owned(),
                |base| format!("`{base}`."),
            );
            let _ = writeln!(out, "\n## Base model\n\n{base}{}", self.packing());
        }
        out += &self.data();
        out += &self.hyper_parameters();
        out += &self.metrics();
        let _ = writeln!(out, "\n## Use\n\n{}", self.usage());
        let _ = writeln!(out, "\n## Limits\n\n{}", self.limits());
        out += &self.provenance();
        redacted(&out).into_owned()
    }

    fn front_matter(&self) -> String {
        let mut out = "---\n".to_owned();
        let mut line = |key: &str, value: &str| {
            let _ = writeln!(out, "{key}: {value}");
        };
        let reward = match self.artefact {
            Artefact::Adapter { reward } => {
                line("library_name", "peft");
                reward
            }
            Artefact::Model { reward } => {
                line("library_name", "transformers");
                reward
            }
            Artefact::Dataset => false,
        };
        if let Some(license) = &self.details.license {
            line("license", license);
        }
        if let Some(base) = self.base.filter(|_| self.artefact != Artefact::Dataset) {
            line("base_model", base);
            let is_adapter = matches!(self.artefact, Artefact::Adapter { .. });
            line("base_model_relation", if is_adapter { "adapter" } else { "finetune" });
        }
        if self.artefact != Artefact::Dataset {
            line("pipeline_tag", if reward { "text-classification" } else { "text-generation" });
        }
        out += "tags:\n- arete\n- rlaif\n";
        if reward {
            out += "- reward-model\n";
        }
        if self.artefact == Artefact::Dataset {
            out += &self.configs();
        }
        out + "---\n\n"
    }

    /// Which files are which part of a data set: `train`, `validation` and `test` of a folder are its splits, any other
    /// file is a part by itself.
    fn configs(&self) -> String {
        let mut configs: BTreeMap<String, Vec<(String, String)>> = BTreeMap::new();
        for path in self.tables {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let folder = path.parent().map(|folder| match folder.ends_with(SPLITS) {
                true => folder.parent().unwrap_or(folder),
                false => folder,
            });
            let folder = folder.map(|folder| folder.to_string_lossy().replace('/', "-"));
            let folder = folder.filter(|folder| !folder.is_empty());
            let is_split = ["train", "validation", "test"].contains(&stem.as_str());
            let (config, split) = if is_split {
                (folder.unwrap_or("default".to_owned()), stem)
            } else {
                let name = folder.map_or(stem.clone(), |folder| format!("{folder}-{stem}"));
                (name, "train".to_owned())
            };
            configs.entry(config).or_default().push((split, path.to_string_lossy().into_owned()));
        }
        let mut out = "configs:\n".to_owned();
        for (name, parts) in configs {
            let _ = writeln!(out, "- config_name: {name}\n  data_files:");
            for (split, path) in parts {
                let _ = writeln!(out, "  - split: {split}\n    path: {path}");
            }
        }
        out
    }

    fn what(&self) -> String {
        let stage = self.facts.stage();
        let about = match (self.artefact, stage) {
            (Artefact::Adapter { reward: true }, "yardstick")
            | (Artefact::Model { reward: true }, "yardstick") => {
                "A reward model trained on human preference pairs, to compare models by and never to train against"
            }
            (Artefact::Adapter { reward: true }, _) => {
                "A reward model: a LoRA adapter with a scalar head that scores conversations"
            }
            (Artefact::Model { reward: true }, _) => "A reward model that scores conversations",
            (Artefact::Adapter { reward: false }, _) => "A LoRA adapter of a chat model",
            (Artefact::Model { reward: false }, _) => "A chat model",
            (Artefact::Dataset, _) => "A data set",
        };
        let aspect = self.facts.setting("aspect");
        let aspect = aspect.map_or(String::new(), |aspect| format!(" (aspect `{aspect}`)"));
        let by = match stage {
            "" => {
                "made with Arete (reinforcement learning from AI feedback, guided by virtue ethics)"
                    .to_owned()
            }
            stage => format!(
                "made by stage `{stage}` of Arete (reinforcement learning from AI feedback, guided by virtue ethics)"
            ),
        };
        format!("{about}{aspect}, {by}.")
    }

    fn packing(&self) -> &'static str {
        let run = self.facts.run.as_ref();
        match run.and_then(|run| run.config.get("nf4")).and_then(Value::as_bool) {
            Some(true) => " Its blocks were held in NF4 (four bits) while training.",
            Some(false) | None => "",
        }
    }

    fn data(&self) -> String {
        let Some(run) = &self.facts.run else {
            return "\n## Data\n\nThe files do not say.\n".to_owned();
        };
        let mut out = "\n## Data\n\n| input | SHA-256 |\n|---|---|\n".to_owned();
        for (name, sum) in &run.inputs {
            let _ = writeln!(out, "| {name} | `{sum}` |");
        }
        out + "\n" + &table("count", run.counts.iter())
    }

    fn hyper_parameters(&self) -> String {
        match self.facts.run.as_ref().map(|run| &run.config) {
            Some(Value::Object(config)) if !config.is_empty() => {
                format!("\n## Hyper-parameters\n\n{}", table("setting", config.iter()))
            }
            _ => String::new(),
        }
    }

    fn metrics(&self) -> String {
        let Facts { evaluation, score_stats, metrics, .. } = self.facts;
        let mut out = String::new();
        if let Some(evaluation) = evaluation {
            out += "\nOn pairs not trained on unless the split says so:\n\n";
            out += &table("evaluation", evaluation.iter());
        }
        if let Some(stats) = score_stats {
            out += "\nScores lie as follows; standardise with them:\n\n";
            out += &table("score_stats", stats.iter().filter(|(key, _)| *key != "base_sha256"));
        }
        if !metrics.is_empty() {
            out += "\nLast logged:\n\n";
            out += &table("metric", metrics.iter());
        }
        match out.is_empty() {
            true => out,
            false => format!("\n## Metrics\n{out}"),
        }
    }

    fn usage(&self) -> String {
        let title = &self.details.title;
        let base = self.base.unwrap_or("BASE");
        let lines = match self.artefact {
            Artefact::Adapter { reward: true } => format!(
                "from peft import PeftModel\nfrom transformers import AutoModelForSequenceClassification\n\n\
                 base = AutoModelForSequenceClassification.from_pretrained(\"{base}\", num_labels=1)\n\
                 model = PeftModel.from_pretrained(base, \"{title}\")"
            ),
            Artefact::Adapter { reward: false } => format!(
                "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n\
                 base = AutoModelForCausalLM.from_pretrained(\"{base}\")\n\
                 model = PeftModel.from_pretrained(base, \"{title}\")"
            ),
            Artefact::Model { reward: true } => format!(
                "from transformers import AutoModelForSequenceClassification\n\n\
                 model = AutoModelForSequenceClassification.from_pretrained(\"{title}\")"
            ),
            Artefact::Model { reward: false } => format!(
                "from transformers import AutoModelForCausalLM\n\n\
                 model = AutoModelForCausalLM.from_pretrained(\"{title}\")"
            ),
            Artefact::Dataset => {
                format!("from datasets import load_dataset\n\ndata = load_dataset(\"{title}\")")
            }
        };
        let read = match self.artefact {
            Artefact::Adapter { reward: true } | Artefact::Model { reward: true } => {
                "\n\nThe input is the whole chat template of a conversation, what follows the last end of turn included; the \
                 score is read at its last token. `num_labels` is 1."
            }
            _ => "",
        };
        format!("```python\n{lines}\n```{read}")
    }

    fn limits(&self) -> String {
        let cut = match (self.facts.setting("over_length"), self.facts.run.as_ref()) {
            (Some(over_length), Some(run)) => {
                let length = run.config.get("max_length").map_or(String::new(), Value::to_string);
                format!(
                    "\n- Conversations longer than {length} tokens were cut or left out (`{over_length}`)."
                )
            }
            _ => String::new(),
        };
        match self.artefact {
            Artefact::Adapter { reward: true } | Artefact::Model { reward: true } => format!(
                "- Scores are unbounded; only differences mean something, and only between scores of this model.\n\
                 - It has learnt what its labels prefer, which need not be virtue: look at the accuracy above beside that of \
                 the best null ruler, and at the correlation with length.\n\
                 - A policy that is optimised against it will find its mistakes.{cut}"
            ),
            Artefact::Adapter { reward: false } | Artefact::Model { reward: false } => format!(
                "- It imitates, or was rewarded for, what a judge prefers; that is no guarantee of good conduct, nor of \
                 truth.\n- Evaluated on few prompts, in English; look at replies before you rely on it.{cut}"
            ),
            Artefact::Dataset => "- Replies and labels come from language models unless a column says otherwise, and carry \
                 their mistakes; some replies are deliberately bad, so that better ones can be told from them."
                .to_owned(),
        }
    }

    fn provenance(&self) -> String {
        let Some(run) = &self.facts.run else { return String::new() };
        let versions: Vec<String> =
            run.versions.iter().map(|(name, version)| format!("{name} {version}")).collect();
        let RunJson { seed, device, dtype, fingerprint, .. } = run;
        format!(
            "\n## Provenance\n\nSeed {seed}, {device}, {dtype}; {}. Fingerprint `{fingerprint}`.\n",
            versions.join(", ")
        )
    }
}

/// A Markdown table of what is plain enough for one; nested objects by `key.part`.
fn table<'a>(what: &str, entries: impl Iterator<Item = (&'a String, &'a Value)>) -> String {
    let mut out = format!("| {what} | value |\n|---|---|\n");
    for (key, value) in entries {
        match value {
            Value::Null => {}
            Value::Object(parts) => {
                for (part, value) in parts.iter().filter(|(_, value)| !value.is_null()) {
                    let _ = writeln!(out, "| {key}.{part} | {} |", cell(value));
                }
            }
            value => {
                let _ = writeln!(out, "| {key} | {} |", cell(value));
            }
        }
    }
    out
}

/// A value on one line; of a local path the last part alone.
fn cell(value: &Value) -> String {
    match value {
        // Where a server stood says nothing of what it served, and may say more than its owner wants known.
        Value::String(text) if text.contains("://") => "(an address)".to_owned(),
        Value::String(text) if text.starts_with(['/', '~', '.']) || Path::new(text).exists() => {
            let name = Path::new(text).file_name().unwrap_or_default();
            name.to_string_lossy().into_owned()
        }
        Value::String(text) => text.replace(['\n', '|'], " "),
        Value::Number(number) if number.is_f64() => {
            let number = number.as_f64().unwrap_or(f64::NAN);
            if number != 0.0 && (number.abs() < 1e-3 || number.abs() >= 1e6) {
                format!("{number:e}")
            } else {
                format!("{}", (number * 1e6).round() / 1e6)
            }
        }
        Value::Array(items) => items.iter().map(cell).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_short_and_say_nothing_of_this_machine() {
        let value = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        for (json, expected) in [
            ("0.1234567891", "0.123457"),
            ("1e-4", "1e-4"),
            ("20", "20"),
            ("true", "true"),
            (r#"["q", "v"]"#, "q, v"),
            (r#""/home/somebody/models/tiny""#, "tiny"),
            (r#""a | b""#, "a   b"),
        ] {
            assert_eq!(cell(&value(json)), expected);
        }
    }

    #[test]
    fn a_place_on_this_machine_is_no_hub_id() {
        assert_eq!(hub_id("owner/name"), Some(("owner/name".to_owned(), None)));
        assert_eq!(hub_id("owner/name@v1"), Some(("owner/name".to_owned(), Some("v1".to_owned()))));
        for local in ["/owner/name", "runs/demo/sft", "./name", "owner/name.gguf", "src/lib.rs"] {
            assert_eq!(hub_id(local), None, "{local}");
        }
        let error = adapter_base(None, Some("/data/base")).unwrap_err().to_string();
        assert!(
            error.contains("--base-model owner/name") && error.contains("/data/base"),
            "{error}"
        );
        assert_eq!(adapter_base(Some("me/base"), Some("/data/base")).unwrap().0, "me/base");
    }
}
