//! What can be set about calibration.

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
