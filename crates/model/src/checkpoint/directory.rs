//! What a directory is that is not a model, in words that say what to do.

use std::path::{Path, PathBuf};

use super::source::{PICKLE_ENDINGS, pickle};
use crate::Error;
use crate::json::read_object;

/// Names that mark an adapter's directory.
const ADAPTER_CONFIG: &str = "adapter_config.json";
const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// Refuses what has no `config.json`, and a model with an adapter beside it.
pub(super) fn check_model(directory: &Path) -> Result<(), Error> {
    let wrong = |found: String| {
        Err(Error::field(directory, "config.json", "a Hugging Face model's directory", found))
    };
    let is_adapter = directory.join(ADAPTER_CONFIG).exists();
    if directory.join("config.json").exists() {
        if !is_adapter {
            return Ok(());
        }
        return Err(Error::field(
            directory,
            ADAPTER_CONFIG,
            "a model without an adapter beside it",
            "an adapter, which transformers would load over the weights: move adapter_config.json and the adapter's weights \
             to a directory of their own and name that with --adapter, or remove them",
        ));
    }
    if is_adapter {
        let base = match base_of(directory) {
            Some(base) => format!("its base ({base})"),
            None => "its base".to_owned(),
        };
        return wrong(format!(
            "an adapter: name {base} with --model, and this directory with --adapter"
        ));
    }
    let files = names(directory);
    if let Some(file) = files.iter().find(|file| file.ends_with(".gguf")) {
        let file = directory.join(file);
        return wrong(format!("none, but a GGUF file: name the file itself, {}", file.display()));
    }
    if files.iter().any(|file| file == "params.json") {
        let found = "params.json, the layout of Mistral's and Meta's own programs; take the repository's Hugging Face files, or \
                     convert them with transformers";
        return wrong(found.to_owned());
    }
    let inner = subdirectories(directory, |path| path.join("config.json").is_file());
    match inner.as_slice() {
        [] => wrong("none".to_owned()),
        [one, ..] => {
            wrong(format!("none, but models in directories below it, such as {}", one.display()))
        }
    }
}

/// Why a directory has no weights this crate opens.
pub(super) fn no_weights(directory: &Path) -> Error {
    let files = names(directory);
    let is_pickle = |file: &&String| {
        let ending = Path::new(file).extension().and_then(|ending| ending.to_str());
        ending.is_some_and(|ending| PICKLE_ENDINGS.contains(&ending))
    };
    if let Some(file) = files.iter().find(is_pickle) {
        return pickle(&directory.join(file));
    }
    let expected = "model.safetensors, or model.safetensors.index.json and its shards";
    let found = match files.iter().find(|file| file.ends_with(".safetensors")) {
        Some(file) => format!(
            "{file}, which nothing says how to read as the whole model (a variant, or another layout)"
        ),
        None => "neither".to_owned(),
    };
    Error::field(directory, "weights", expected, found)
}

/// Refuses what is no adapter's directory.
pub(crate) fn check_adapter(directory: &Path) -> Result<(), Error> {
    let wrong = |what: &str, expected: &str, found: String| {
        Err(Error::field(directory, what, expected, found))
    };
    if !directory.join(ADAPTER_CONFIG).exists() {
        let expected = "an adapter's directory, as peft writes it";
        let inner = subdirectories(directory, |path| path.join(ADAPTER_CONFIG).is_file());
        let found = match inner.as_slice() {
            [one, ..] => format!("none, but an adapter in {}", one.display()),
            [] if directory.is_file() => of_file(directory),
            [] if !directory.is_dir() => "no directory of that name".to_owned(),
            [] if directory.join("config.json").exists() => {
                "none, but config.json: a model, not an adapter; name it with --model".to_owned()
            }
            [] => "none".to_owned(),
        };
        return wrong(ADAPTER_CONFIG, expected, found);
    }
    if !directory.join(ADAPTER_WEIGHTS).exists() {
        if let Some(file) = names(directory).into_iter().find(|file| file.ends_with(".bin")) {
            let path = directory.join(file);
            let (from, to) = (path.display().to_string(), directory.join(ADAPTER_WEIGHTS));
            let command = format!(
                "python -c \"import sys, torch; from safetensors.torch import save_file; a, b = sys.argv[1:]; \
                 save_file({{k: v.contiguous() for k, v in torch.load(a, weights_only=True).items()}}, b)\" '{from}' '{}'",
                to.display()
            );
            return Err(Error::Pickle { path, command });
        }
        return wrong(ADAPTER_WEIGHTS, "the adapter's weights", "none".to_owned());
    }
    Ok(())
}

/// What a file is that was named as an adapter.
fn of_file(path: &Path) -> String {
    if path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gguf")) {
        return "a GGUF file; take the adapter as peft wrote it, before its conversion".to_owned();
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = parent.unwrap_or(Path::new("."));
    format!("a file; name the directory it lies in, {}", directory.display())
}

/// The base an adapter names.
fn base_of(directory: &Path) -> Option<String> {
    let config = read_object(&directory.join(ADAPTER_CONFIG), MAX_CONFIG_BYTES).ok()?;
    let base = config.get("base_model_name_or_path")?.as_str()?;
    (!base.is_empty()).then(|| base.chars().take(200).collect())
}

/// Names of the files of a directory, in order.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs_err::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Directories right below one, of which something is true.
fn subdirectories(directory: &Path, is: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
    names(directory).into_iter().map(|name| directory.join(name)).filter(|path| is(path)).collect()
}
