//! Where prompts come from: files and directories here, data sets of the hub, standard input and pipes.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use arete_records::left_out;
use arete_records::table::{self, Format};

use crate::Error;

/// Most bytes that are taken from a pipe.
const MAX_PIPED_BYTES: u64 = 1 << 30;

/// Inputs as paths, and what holds those that had to be copied.
pub(super) struct Local {
    pub(super) paths: Vec<PathBuf>,
    /// Copies of what can be read once only; gone with this.
    _copies: Option<tempfile::TempDir>,
}

impl Local {
    /// What exists here as it is, what looks like a hub id downloaded, `-` and pipes copied: they are hashed first and read
    /// afterwards.
    ///
    /// # Errors
    ///
    /// A hub that cannot be reached, a pipe that gives more than a GiB, a full disk.
    pub(super) fn of(inputs: &[String]) -> Result<Self, Error> {
        let (mut paths, mut copies) = (Vec::new(), None);
        for (idx, input) in inputs.iter().enumerate() {
            let path = PathBuf::from(input);
            if input == "-" {
                let standard: &mut dyn Read = &mut std::io::stdin().lock();
                paths.push(copied(&mut copies, idx, Path::new("stdin"), standard)?);
            } else if path.metadata().is_ok_and(|found| !found.is_file() && !found.is_dir()) {
                let mut file = fs_err::File::open(&path)?;
                paths.push(copied(&mut copies, idx, &path, &mut file)?);
            } else if path.exists() || !is_hub_id(input) {
                paths.push(path);
            } else {
                let found = arete_model::hub::data_set(input).map_err(|error| match error {
                    arete_model::Error::Hub { what, reason } => {
                        let reason = format!("{reason}; and here is no file or directory `{input}`");
                        arete_model::Error::Hub { what, reason }
                    }
                    other => other,
                })?;
                paths.extend(of_splits(files(&[found])?));
            }
        }
        Ok(Self { paths, _copies: copies })
    }
}

/// What a reader gives as a file of the name of `path`.
fn copied(
    copies: &mut Option<tempfile::TempDir>,
    idx: usize,
    path: &Path,
    reader: &mut dyn Read,
) -> Result<PathBuf, Error> {
    let dir = match copies {
        Some(dir) => dir,
        None => copies.insert(tempfile::tempdir()?),
    };
    let own = dir.path().join(idx.to_string());
    fs_err::create_dir(&own)?;
    let target = own.join(path.file_name().unwrap_or("input".as_ref()));
    let mut file = fs_err::File::create(&target)?;
    let n_bytes = std::io::copy(&mut reader.take(MAX_PIPED_BYTES + 1), &mut file)?;
    file.flush()?;
    if n_bytes > MAX_PIPED_BYTES {
        return Err(Error::File {
            path: path.to_owned(),
            field: "size".to_owned(),
            expected: format!("at most {MAX_PIPED_BYTES} bytes from a pipe"),
            found: "more".to_owned(),
        });
    }
    Ok(target)
}

/// Of a data set's files those that belong to a split by their name, or all if none does: as
/// `datasets.load_dataset` takes them. hh-rlhf holds transcripts of another form beside its pairs.
pub(super) fn of_splits(files: Vec<PathBuf>) -> Vec<PathBuf> {
    const SPLITS: [&str; 8] =
        ["train", "training", "validation", "valid", "dev", "val", "test", "eval"];
    let names_split = |path: &PathBuf| {
        let stem = table::stem(path).to_lowercase();
        let mut words = stem.split(|c: char| !c.is_ascii_alphabetic());
        words.any(|word| SPLITS.contains(&word))
    };
    let (chosen, others): (Vec<PathBuf>, Vec<PathBuf>) = files.into_iter().partition(names_split);
    if chosen.is_empty() {
        return others;
    }
    for path in others {
        tracing::warn!(file = %path.display(), "left out: its name is that of no split");
    }
    chosen
}

/// `owner/name`, perhaps with `@revision` or `/path` behind it, as on the hub; unless `owner` is a
/// directory here, which makes it a mistyped path.
fn is_hub_id(text: &str) -> bool {
    let plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.@".contains(c))
    };
    let parts: Vec<&str> = text.split('/').collect();
    parts.len() >= 2 && parts.iter().all(|part| plain(part)) && !Path::new(parts[0]).exists()
}

/// The files named, directories replaced by the data files in them at any depth, sorted by path.
pub(super) fn files(inputs: &[PathBuf]) -> Result<Vec<PathBuf>, Error> {
    let mut out = Vec::new();
    for input in inputs {
        if !input.is_dir() {
            out.push(input.clone());
            continue;
        }
        let mut inside = Vec::new();
        collect(input, MAX_DEPTH, &mut inside)?;
        if inside.is_empty() {
            return Err(Error::File {
                path: input.clone(),
                field: "directory".to_owned(),
                expected: format!("at least one file: {}", table::READABLE),
                found: "none".to_owned(),
            });
        }
        inside.sort();
        out.extend(inside);
    }
    Ok(out)
}

/// Directories inside directories that are looked into: the hub's data sets have two levels.
const MAX_DEPTH: usize = 4;

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

fn collect(dir: &Path, depth: usize, out: &mut Vec<PathBuf>) -> Result<(), Error> {
    for entry in fs_err::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().to_lowercase());
        // Copies that editors and systems keep, which no reader of data sets takes for data.
        if name.as_ref().is_some_and(|name| name.starts_with(['.', '_'])) {
            continue;
        }
        if path.is_dir() && depth > 1 {
            collect(&path, depth - 1, out)?;
        } else if path.is_file() && !name.is_some_and(|name| NO_DATA.contains(&name.as_str())) {
            // A text in a directory is a licence or a note as often as not: it is named to be read.
            if Format::of(&path).is_some_and(|format| format != Format::Text) {
                out.push(path);
            }
        }
    }
    Ok(())
}
