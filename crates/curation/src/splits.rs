//! Rows once more, a file a split, with a card by which `datasets.load_dataset` of a stage's folder gives true splits.
//!
//! Our own stages read the one file with a column `split`. Without a card `load_dataset` would take every JSON file of the
//! folder for data, and whoever gives it that file alone trains on test rows.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use arete_records::{Split, atomic, parquet};

/// Folder of the files.
const FOLDER: &str = "splits";
/// The card, by the name that the hub and `datasets` know.
const CARD: &str = "README.md";

/// Writes them beside `FILE.parquet` of a stage; a split without rows has no file, which `datasets` would refuse.
///
/// # Errors
///
/// I/O.
pub(crate) fn write<R: parquet::Row + Clone>(
    output: &Path,
    file: &str,
    rows: &[R],
    split_of: impl Fn(&R) -> Split,
) -> Result<()> {
    fs_err::create_dir_all(output.join(FOLDER))?;
    let mut card = "---\nconfigs:\n- config_name: default\n  data_files:\n".to_owned();
    for split in Split::ALL {
        let own: Vec<R> = rows.iter().filter(|row| split_of(row) == split).cloned().collect();
        let path = format!("{FOLDER}/{}.parquet", split.name());
        if own.is_empty() {
            continue;
        }
        parquet::write(output.join(&path), &own)?;
        let _ = writeln!(card, "  - split: {}\n    path: {path}", split.name());
    }
    let _ = writeln!(
        card,
        "---\n\n`{file}.parquet` by its column `split`, for `datasets.load_dataset`."
    );
    Ok(atomic::write(output.join(CARD), card.as_bytes())?)
}
