//! `--dry-run`: what a stage would do, with which settings, on how much, in how much memory. Nothing is written.

use std::io::Write;
use std::path::PathBuf;

use arete_records::redact;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::run::Standing;

/// What a stage would do.
#[derive(Debug, Serialize)]
pub struct DryRun {
    /// The stage.
    stage: String,
    /// In each of its directories.
    would: Vec<Would>,
    /// The settings, resolved.
    settings: Value,
    /// What there is to read, and what is done already, by name.
    counts: Map<String, Value>,
    /// The most that it takes; none where no model is loaded.
    memory: Option<Value>,
    /// Tokens to compute, prompts included, where they are counted.
    n_tokens: Option<u64>,
    /// Seconds this will take, where they were measured on a few rows.
    seconds: Option<f64>,
}

/// What would become of a directory.
#[derive(Debug, Serialize)]
struct Would {
    output: PathBuf,
    does: &'static str,
    #[serde(flatten)]
    found: Standing,
}

impl DryRun {
    /// From the settings and what [`asking`](crate::run::asking) found.
    ///
    /// # Panics
    ///
    /// Never: settings are numbers and words.
    pub fn new(stage: &str, settings: &impl Serialize, found: Vec<(PathBuf, Standing)>) -> Self {
        let would = |(output, found)| Would { output, does: does(&found), found };
        Self {
            stage: stage.to_owned(),
            would: found.into_iter().map(would).collect(),
            settings: serde_json::to_value(settings).expect("settings are numbers and words"),
            counts: Map::new(),
            memory: None,
            n_tokens: None,
            seconds: None,
        }
    }

    /// With a number of rows, pairs, prompts.
    #[must_use]
    pub fn counting(mut self, name: impl Into<String>, n: usize) -> Self {
        self.counts.insert(name.into(), n.into());
        self
    }

    /// With everything that was counted, and what it would cost.
    #[must_use]
    pub fn costing(
        mut self,
        counts: Map<String, Value>,
        n_tokens: Option<u64>,
        seconds: Option<f64>,
    ) -> Self {
        self.counts.extend(counts);
        (self.n_tokens, self.seconds) = (n_tokens, seconds);
        self
    }

    /// With the memory it takes.
    #[must_use]
    pub fn taking(mut self, memory: Option<Value>) -> Self {
        self.memory = memory;
        self
    }

    /// Prints it as JSON on stdout, without secrets.
    ///
    /// # Errors
    ///
    /// A closed stdout.
    pub fn print(&self) -> std::io::Result<()> {
        let mut value = serde_json::to_value(self).map_err(std::io::Error::other)?;
        redact::redact_json(&mut value);
        writeln!(std::io::stdout().lock(), "{value:#}")
    }
}

fn does(found: &Standing) -> &'static str {
    match found {
        Standing::Missing => "begins",
        Standing::Complete => "nothing: the results are there and up to date",
        Standing::Stale { .. } => "moves the results aside and begins anew",
        Standing::GoesOn { .. } => "goes on from where the results ended",
        Standing::HalfDone => "goes on where it stopped",
        Standing::HalfDoneOtherwise { .. } => "moves the unfinished work aside and begins anew",
        Standing::Damaged { .. } => "moves what is damaged aside and begins anew",
        Standing::Foreign { .. } => "refuses: the directory holds files that no stage made",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_be_done_is_said_in_words_and_by_its_kind() {
        let found = vec![(PathBuf::from("runs/a"), Standing::HalfDone)];
        let plan = DryRun::new("sft", &serde_json::json!({"rank": 4}), found).counting("train", 3);
        let value = serde_json::to_value(plan.taking(None)).unwrap();
        let expected = serde_json::json!({
            "stage": "sft", "settings": {"rank": 4}, "counts": {"train": 3}, "memory": null, "n_tokens": null, "seconds": null,
            "would": [{"output": "runs/a", "does": "goes on where it stopped", "is": "half_done"}],
        });
        assert_eq!(value, expected);
    }
}
