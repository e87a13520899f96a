//! What can be set about calibration.

use anyhow::{Result, bail};
use arete_records::Refusal;
use arete_records::table::Column;
use serde::{Deserialize, Serialize};

use crate::judge::{JudgeConfig, Method};

/// Settings of `calibrate`.
#[derive(Debug, Clone, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct CalibrateConfig {
    /// Methods to examine
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        value_name = "METHOD",
        default_value = "pairwise-logits,pairwise-text,pointwise-logits,likelihood"
    )]
    pub methods: Vec<Method>,
    /// Most pairs to take from each file, spread evenly; 0 takes all
    #[arg(long, default_value_t = 200, value_name = "N")]
    pub limit: usize,
    /// Longer pairs (in characters, both answers and the question) are left out and counted
    #[arg(long, default_value_t = 3000, value_name = "N")]
    pub max_chars: usize,
    /// A virtue gives no vote if its probability is nearer to one half than this
    #[arg(long, default_value_t = 0.0, value_name = "P")]
    pub tie_margin: f64,
    /// A column under another name than ours, as prompt=question; may be given more than once
    #[arg(long = "column", value_name = "OURS=THEIRS")]
    #[serde(default)]
    pub column: Option<Vec<Column>>,
    /// How the judge is asked.
    #[command(flatten)]
    #[serde(flatten)]
    pub judge: JudgeConfig,
}

impl CalibrateConfig {
    /// Refuses what the stage cannot use, before it begins.
    ///
    /// # Errors
    ///
    /// A refused setting.
    pub fn check(&self) -> Result<()> {
        if self.methods.contains(&Method::Contrast) {
            bail!(Refusal::setting(
                "methods",
                "methods that ask a judge: contrast labels its own samples, it is judged by \
                           the accuracy of a reward model trained on them"
                    .to_owned(),
                Method::Contrast.name()
            ));
        }
        if self.judge.urls().is_some() && self.methods.contains(&Method::Likelihood) {
            bail!(Refusal::setting(
                "methods",
                "for a server, some of pairwise-logits, pairwise-text, pointwise-logits: it \
                           says nothing of a given reply's likelihood"
                    .to_owned(),
                Method::Likelihood.name()
            ));
        }
        if !(0.0..0.5).contains(&self.tie_margin) {
            bail!(Refusal::setting("tie_margin", "a number below one half", self.tie_margin));
        }
        self.methods.iter().try_for_each(|&method| self.judge.check(method))
    }
}
