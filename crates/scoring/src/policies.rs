//! The models that are compared: where they are, and one of them in memory at a time.

use std::path::{Path, PathBuf};

use anyhow::Result;
use arete_model::adapter::{self, LoadedAdapter};
use arete_model::{LoadOptions, Model, Nf4Options, Source, Tokenizer};
use arete_records::Refusal;
use sha2::{Digest, Sha256};

/// What marks a directory as a peft adapter.
const ADAPTER_CONFIG: &str = "adapter_config.json";
/// What marks a directory as a model.
const MODEL_CONFIG: &str = "config.json";

/// A model to compare.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// `original`, `sft`, `final`, …
    pub name: String,
    /// As the user named it.
    pub given: String,
    /// The weights.
    pub source: Source,
    /// An adapter over them.
    pub adapter: Option<PathBuf>,
}

impl Policy {
    /// Finds out what `given` is: a model (directory, GGUF file, hub id), an adapter over `base`, or a stage's directory
    /// with `adapter/` or `merged/` in it (the adapter is taken, since the base is loaded anyway, unless
    /// the base is that merged model).
    ///
    /// # Errors
    ///
    /// The model's failure if it is none of these; A refused setting if an adapter has no base.
    pub fn resolve(name: &str, given: &str, base: Option<&Source>) -> Result<Self> {
        let path = Path::new(given);
        let policy = |source: Source, adapter: Option<PathBuf>| Self {
            name: name.to_owned(),
            given: given.to_owned(),
            source,
            adapter,
        };
        let over_base = |adapter: PathBuf| match base {
            Some(base) => Ok(policy(base.clone(), Some(adapter))),
            None => {
                Err(Refusal::setting("base", "the model that the adapters belong to", "none")
                    .into())
            }
        };
        if path.join(ADAPTER_CONFIG).is_file() {
            return over_base(path.to_owned());
        }
        if path.is_dir() && !path.join(MODEL_CONFIG).is_file() {
            let (adapter, merged) = (path.join("adapter"), path.join("merged"));
            let has_merged = merged.join(MODEL_CONFIG).is_file();
            let merged_is_base = base.is_some_and(|base| same_place(base, &merged));
            if adapter.join(ADAPTER_CONFIG).is_file()
                && !(has_merged && merged_is_base)
                && base.is_some()
            {
                return over_base(adapter);
            }
            if has_merged {
                return Ok(policy(Source::Directory(merged), None));
            }
        }
        Ok(policy(Source::fetch(given)?, None))
    }

    /// The files that the policy is made of, for hashing.
    pub fn files(&self) -> Option<&Path> {
        self.adapter.as_deref().or_else(|| self.source.local_path())
    }
}

/// Whether a source is this path, however it is spelled.
fn same_place(source: &Source, path: &Path) -> bool {
    let canonical = |path: &Path| fs_err::canonicalize(path).ok();
    source.local_path().and_then(canonical).is_some_and(|place| Some(place) == canonical(path))
}

/// Whether two sources are the same model.
pub(crate) fn same_source(a: &Source, b: &Source) -> bool {
    a == b || b.local_path().is_some_and(|path| same_place(a, path))
}

/// The base that an adapter says it was trained on (peft's `base_model_name_or_path`).
///
/// # Errors
///
/// The system's failure, A refused file if the adapter's configuration is missing or says nothing.
pub fn base_of_adapter(adapter: &Path) -> Result<String> {
    Ok(arete_chain::yardstick::base_of_adapter(adapter)?)
}

/// Holds one model at a time.
#[derive(Debug)]
pub(crate) struct Shelf {
    options: LoadOptions,
    held: Option<(Source, Option<Nf4Options>, Model)>,
}

impl Shelf {
    pub(crate) fn new(options: LoadOptions) -> Self {
        Self { options, held: None }
    }

    /// The model, loaded unless it is the one held; the one held before goes first.
    pub(crate) fn get(&mut self, source: &Source) -> Result<&Model> {
        self.get_packed(source, self.options.nf4)
    }

    /// [`Shelf::get`], the weights packed in this way instead of the run's.
    pub(crate) fn get_packed(
        &mut self,
        source: &Source,
        nf4: Option<Nf4Options>,
    ) -> Result<&Model> {
        let held =
            self.held.take_if(|(held, packing, _)| *packing == nf4 && same_source(held, source));
        let entry = match held {
            Some(entry) => entry,
            None => {
                self.held = None;
                tracing::info!(model = %source, "loading");
                let options = LoadOptions { nf4, ..self.options };
                (source.clone(), nf4, Model::load(source, &options)?)
            }
        };
        Ok(&self.held.insert(entry).2)
    }
}

/// SHA-256 of what every token of a vocabulary stands for: whether two models' tokens mean the same.
pub(crate) fn vocabulary_sha256(tokenizer: &Tokenizer) -> String {
    let mut hash = Sha256::new();
    for id in 0..tokenizer.vocab_size() {
        let token = i64::try_from(id).ok().and_then(|id| tokenizer.token(id)).unwrap_or_default();
        hash.update((token.len() as u64).to_le_bytes());
        hash.update(token);
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads an adapter and checks that it belongs to `model`.
pub(crate) fn load_adapter(dir: &Path, name: &str, model: &Model) -> Result<LoadedAdapter> {
    let loaded = adapter::load(dir, name, &model.config, model.decoder.device())?;
    loaded.meta.check_base(model)?;
    Ok(loaded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(path: &Path) {
        fs_err::create_dir_all(path.parent().unwrap()).unwrap();
        fs_err::write(path, b"{}").unwrap();
    }

    #[test]
    fn a_stage_is_its_adapter_over_the_base_and_the_base_is_itself() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        touch(&at("sft/adapter/adapter_config.json"));
        touch(&at("sft/merged/config.json"));
        touch(&at("ppo/adapter/adapter_config.json"));
        touch(&at("ppo/merged/config.json"));
        touch(&at("other/merged/config.json"));
        let base = Source::Directory(at("sft/merged"));
        let resolve = |name: &str, base: Option<&Source>| {
            Policy::resolve("x", at(name).to_str().unwrap(), base).map(|p| (p.source, p.adapter))
        };
        let over = |adapter: &str| (base.clone(), Some(at(adapter)));
        assert_eq!(resolve("ppo", Some(&base)).unwrap(), over("ppo/adapter"));
        assert_eq!(resolve("ppo/adapter", Some(&base)).unwrap(), over("ppo/adapter"));
        assert_eq!(
            resolve("ppo/merged", Some(&base)).unwrap(),
            (Source::Directory(at("ppo/merged")), None)
        );
        // However it is spelled, the merged SFT model is the base.
        let respelled = Source::Directory(at("sft/../sft/merged"));
        assert_eq!(resolve("sft", Some(&respelled)).unwrap(), (base.clone(), None));
        assert_eq!(
            resolve("other", Some(&base)).unwrap(),
            (Source::Directory(at("other/merged")), None)
        );
        assert_eq!(resolve("ppo", None).unwrap(), (Source::Directory(at("ppo/merged")), None));
        assert!(
            resolve("ppo/adapter", None).unwrap_err().to_string().starts_with("base: expected")
        );
        assert!(resolve("nowhere", Some(&base)).is_err());
    }

    #[test]
    fn an_adapter_names_its_base() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(ADAPTER_CONFIG);
        fs_err::write(&path, br#"{"base_model_name_or_path": "models/x"}"#).unwrap();
        assert_eq!(base_of_adapter(dir.path()).unwrap(), "models/x");
        fs_err::write(&path, b"{}").unwrap();
        assert!(base_of_adapter(dir.path()).unwrap_err().to_string().contains("found nothing"));
    }
}
