//! Where prompts come from: files and directories here, data sets of the hub, standard input and pipes.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use arete_records::table::{self, Format};
use arete_records::{Refusal, Split, left_out};
use arete_stage::inputs::Piped;

/// What exists here as it is, what looks like a hub id downloaded, `-` and pipes copied.
///
/// # Errors
///
/// A hub that cannot be reached, a pipe that gives more than a GiB, a full disk.
pub(super) fn local(inputs: &[String], piped: &mut Piped) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for input in inputs {
        let path = PathBuf::from(input);
        if input == "-" || path.exists() || !is_hub_id(input) {
            paths.push(piped.local(&path)?);
            continue;
        }
        let found = arete_model::hub::data_set(input).map_err(|error| match error {
            arete_model::Error::Hub { what, reason } => {
                let reason = format!("{reason}; and here is no file or directory `{input}`");
                arete_model::Error::Hub { what, reason }
            }
            other => other,
        })?;
        paths.extend(of_splits(files(&[found])?));
    }
    Ok(paths)
}

/// Of a data set's files those that belong to a split by their name, or all if none does: as
/// `datasets.load_dataset` takes them. hh-rlhf holds transcripts of another form beside its pairs.
pub(super) fn of_splits(files: Vec<PathBuf>) -> Vec<PathBuf> {
    let (chosen, others): (Vec<PathBuf>, Vec<PathBuf>) =
        files.into_iter().partition(|path| split_in(&table::stem(path)).is_some());
    if chosen.is_empty() {
        return others;
    }
    for path in others {
        tracing::warn!(file = %path.display(), "left out: its name is that of no split");
    }
    chosen
}

/// The split that a name of a file or folder has for one of its words, as `datasets.load_dataset` reads names.
fn split_in(name: &str) -> Option<Split> {
    name.to_lowercase().split(|c: char| !c.is_ascii_alphabetic()).find_map(|word| match word {
        "train" | "training" => Some(Split::Train),
        "validation" | "valid" | "dev" | "val" => Some(Split::Validation),
        "test" | "testing" | "eval" | "evaluation" => Some(Split::Test),
        _ => None,
    })
}

/// The split that a file is held out for by its name, or by that of its folder inside of an input.
pub(crate) fn held_out(inputs: &[PathBuf], file: &Path) -> Option<Split> {
    let is_inside = |dir: &&Path| {
        let up = dir.parent();
        inputs.iter().any(|input| up.is_some_and(|up| up.starts_with(input)))
    };
    let folder = file.parent().filter(is_inside).and_then(Path::file_name);
    split_in(&table::stem(file))
        .or_else(|| split_in(&folder?.to_string_lossy()))
        .filter(|split| *split != Split::Train)
}

/// `owner/name`, perhaps with `@revision` or `/path` behind it, as on the hub; unless `owner` is a
/// directory here or `name` that of a data file, which makes it a mistyped path.
pub fn is_hub_id(text: &str) -> bool {
    let plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.@".contains(c))
    };
    let parts: Vec<&str> = text.split('/').collect();
    let is_file = parts.len() == 2 && Format::of(Path::new(text)).is_some();
    parts.len() >= 2
        && parts.iter().all(|part| plain(part))
        && !is_file
        && !Path::new(parts[0]).exists()
}

/// The files named, directories replaced by the data files in them at any depth, sorted by path.
pub(super) fn files(inputs: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut out = Vec::new();
    for input in inputs {
        if !input.is_dir() {
            out.push(input.clone());
            continue;
        }
        let mut inside = Vec::new();
        collect(input, MAX_DEPTH, &mut inside)?;
        if inside.is_empty() {
            bail!(Refusal::file(
                input,
                "directory",
                format!(
                    "at least one file: {} (a text only where it is named itself)",
                    table::READABLE
                ),
                "none"
            ));
        }
        inside.sort();
        out.extend(inside);
    }
    Ok(out)
}

/// Directories inside directories that are looked into; deeper ones, or links that point upwards, are refused when the input is hashed.
const MAX_DEPTH: usize = 32;

/// Names of files beside a data set's that hold no records, as `datasets` leaves them out, and our own marks.
const NO_DATA: [&str; 8] = [
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "run.json",
    "stage.json",
    left_out::FILE,
];

fn collect(dir: &Path, depth: usize, out: &mut Vec<PathBuf>) -> Result<()> {
    // The results of a stage of ours: its table alone, neither records of the work nor the same rows by split.
    let is_stage = dir.join("run.json").is_file();
    for entry in fs_err::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().to_lowercase());
        // Copies that editors and systems keep, which no reader of data sets takes for data.
        if name.as_ref().is_some_and(|name| name.starts_with(['.', '_'])) {
            continue;
        }
        if path.is_dir() && depth > 1 && !is_stage {
            collect(&path, depth - 1, out)?;
        } else if path.is_file() && !name.is_some_and(|name| NO_DATA.contains(&name.as_str())) {
            // A text in a directory is a licence or a note as often as not: it is named to be read.
            let format = Format::of(&path).filter(|format| *format != Format::Text);
            if format.is_some_and(|format| !is_stage || format == Format::Parquet) {
                out.push(path);
            }
        }
    }
    Ok(())
}
