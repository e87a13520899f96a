//! What can be set about preferences.

use std::path::PathBuf;

use anyhow::{Result, bail};
use arete_records::Refusal;
use arete_stage::settings;
use arete_stage::units::Shard;
use serde::{Deserialize, Serialize};

use crate::config::Truncated;
use crate::judge::{JudgeConfig, Method};

/// What becomes of a pair with as many votes for one side as for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Ties {
    /// It is left out.
    Drop,
    /// The higher mean probability decides.
    Probability,
}

/// Which pairs of a prompt's samples become preferences.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Pairing {
    /// Every pair.
    All,
    /// The sample that wins most against all others beside the one that loses most.
    BestWorst,
}

/// What preferences are about, and with them the reward models.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum By {
    /// A turn's reply each, by the votes of all virtues.
    #[default]
    Aspect,
    /// A virtue each.
    Virtue,
    /// Both.
    Both,
}

impl By {
    /// Whether there is a set of each turn.
    pub fn has_aspects(self) -> bool {
        self != Self::Virtue
    }

    /// Whether there is a set of each virtue.
    pub fn has_virtues(self) -> bool {
        self != Self::Aspect
    }
}

/// Settings of `preferences`.
#[derive(Debug, Clone, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct PreferencesConfig {
    /// How a verdict is reached
    #[arg(long, value_enum, default_value = "pairwise-logits")]
    pub method: Method,
    /// What becomes of pairs with a reply that the token limit cut
    #[arg(long, value_enum, default_value = "drop")]
    pub truncated: Truncated,
    /// What becomes of pairs with equal votes
    #[arg(long, value_enum, default_value = "drop")]
    pub ties: Ties,
    /// What the preferences are about, and with them the reward models: a turn each, by all virtues' votes; a virtue each, by its own
    /// verdicts on the answers; or both
    #[arg(long, value_enum, default_value = "aspect")]
    #[serde(default)]
    pub by: By,
    /// A virtue gives no vote if its probability is nearer to one half than this
    #[arg(long, default_value_t = 0.0, value_name = "P")]
    pub tie_margin: f64,
    /// Exchange the sides of every verdict, for a method that `calibrate` found to point the wrong way
    #[arg(long, num_args = 0..=1, default_value_t = false, default_missing_value = "true",
          action = clap::ArgAction::Set, value_name = "BOOL")]
    pub flip: bool,
    /// Which pairs of a prompt's samples become preferences (with two samples there is only one)
    #[arg(long, value_enum, default_value = "all")]
    pub pairing: Pairing,
    /// What `calibrate` wrote about this judge (directory or calibration.json): virtues whose judge is at chance have no vote
    #[arg(long, value_name = "PATH")]
    #[serde(default)]
    pub calibration: Option<PathBuf>,
    /// Files of labelled pairs (hh-rlhf's form, our virtue pairs, …) whose training split is mixed in
    #[arg(long, num_args = 1.., value_name = "F")]
    #[serde(default)]
    pub pairs: Vec<PathBuf>,
    /// Most labelled pairs that are mixed in, for each judged pair to train on
    #[arg(long, default_value_t = 1.0, value_name = "W")]
    pub pairs_weight: f64,
    /// Aspect that labelled pairs speak of, where they do not say [default: the answer]
    #[arg(long, value_name = "ASPECT")]
    #[serde(default)]
    pub pairs_aspect: Option<String>,
    /// Fewest pairs an aspect (or a virtue) may be left with
    #[arg(long, default_value_t = 20, value_name = "N")]
    pub min_pairs: usize,
    /// Part i of n of a job array
    #[arg(long, value_name = "I/N")]
    #[serde(default)]
    pub shard: Option<Shard>,
    /// How the judge is asked.
    #[command(flatten)]
    #[serde(flatten)]
    pub judge: JudgeConfig,
}

impl PreferencesConfig {
    /// Refuses what the stage cannot use, before it begins.
    ///
    /// # Errors
    ///
    /// A refused setting.
    pub fn check(&self) -> Result<()> {
        let by_construction = self.method == Method::Contrast;
        if self.by.has_virtues() && by_construction {
            let expected =
                "aspect, for the method contrast labels by construction and knows no virtue";
            bail!(Refusal::setting("by", expected, format!("{:?}", self.by).to_lowercase()));
        }
        if self.calibration.is_some() && by_construction {
            bail!(Refusal::setting(
                "calibration",
                "a method that asks a judge",
                "contrast, which labels by construction"
            ));
        }
        if !(0.0..0.5).contains(&self.tie_margin) {
            bail!(Refusal::setting("tie_margin", "a number below one half", self.tie_margin));
        }
        settings::positive("pairs_weight", self.pairs_weight)?;
        self.judge.check(self.method)
    }
}
