//! Where a reward model's scores lie: what makes the scores of several reward models comparable.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{Error, files, stats};

/// Name of the file beside a reward model's adapter.
pub const FILE: &str = "score_stats.json";

/// The contents of `score_stats.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoreStats {
    /// Mean score.
    pub mean: f64,
    /// Population standard deviation.
    pub std: f64,
    /// Number of conversations.
    pub n: usize,
    /// The split they are of.
    pub split: String,
    /// SHA-256 of the base that the reward model reads with.
    pub base_sha256: String,
    /// Number of prompts behind the conversations; 0 if not recorded.
    #[serde(default)]
    pub n_prompts: usize,
    /// Whose conversations they are, in words.
    #[serde(default)]
    pub source: String,
    /// Standard error of the mean, the replies of a prompt taken together; none if not recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standard_error: Option<f64>,
}

impl ScoreStats {
    /// Mean and standard deviation of scores.
    pub fn of(scores: &[f64], split: &str, base_sha256: &str) -> Self {
        Self {
            mean: stats::mean(scores),
            std: stats::std(scores),
            n: scores.len(),
            split: split.to_owned(),
            base_sha256: base_sha256.to_owned(),
            n_prompts: 0,
            source: String::new(),
            standard_error: None,
        }
    }

    /// Those of a reward model's directory; none if it has no such file.
    ///
    /// # Errors
    ///
    /// [`Error::Io`]; [`Error::Json`] if the file is damaged; [`Error::Damaged`] if a number in it cannot be.
    pub fn read(dir: impl AsRef<Path>) -> Result<Option<Self>, Error> {
        let path = dir.as_ref().join(FILE);
        let bytes = match files::read_small(&path) {
            Err(Error::Io(error)) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(None);
            }
            other => other?,
        };
        let stats: Self = serde_json::from_slice(&bytes).map_err(|error| Error::Json {
            path: path.clone(),
            line: error.line(),
            expected: "score statistics (mean, std, n, split, base_sha256)".to_owned(),
            got: error.to_string(),
        })?;
        if !(stats.mean.is_finite() && stats.std.is_finite() && stats.std >= 0.0) {
            return Err(Error::Damaged {
                path,
                what: "mean, std".to_owned(),
                expected: "finite numbers, std not negative".to_owned(),
                got: format!("{}, {}", stats.mean, stats.std),
            });
        }
        Ok(Some(stats))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_population_moments() {
        let stats = ScoreStats::of(&[1.0, 2.0, 3.0, 4.0], "validation", "b");
        assert_eq!((stats.mean, stats.n), (2.5, 4));
        assert!((stats.std - 1.25f64.sqrt()).abs() < 1e-12);
    }

    #[test]
    fn what_is_read_is_checked() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(ScoreStats::read(dir.path()).unwrap(), None);
        let read = |text: &str| {
            fs_err::write(dir.path().join(FILE), text).unwrap();
            ScoreStats::read(dir.path())
        };
        let good =
            r#"{"mean": 1.5, "std": 2.0, "n": 4, "split": "validation", "base_sha256": "x"}"#;
        let stats = read(good).unwrap().unwrap();
        assert_eq!((stats.mean, stats.std, stats.n), (1.5, 2.0, 4));
        let error = read(&good.replace("2.0", "-2.0")).unwrap_err().to_string();
        assert!(error.contains("std not negative, got 1.5, -2"), "{error}");
        let error = read(r#"{"mean": 1.5}"#).unwrap_err().to_string();
        assert!(error.contains("score_stats.json:1: expected score statistics"), "{error}");
    }
}
