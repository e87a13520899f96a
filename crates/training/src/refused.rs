//! What every trainer refuses in the same words.

use std::path::Path;

use arete_records::Refusal;

/// Too few pairs to train on: `reason` says where the others went.
pub fn too_few_pairs(path: &Path, expected: usize, got: usize, reason: &str) -> Refusal {
    let expected = format!("at least {expected} pairs to train on");
    Refusal::file(path, "", expected, format!("{got} ({reason})"))
}

/// The context of a row (or line, counted from 1) whose conversation the model's chat template refuses.
pub fn not_rendered(path: &Path, row: usize) -> String {
    format!("{}: row {row} cannot be rendered", path.display())
}
