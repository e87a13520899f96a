//! Settings of `score`: flags, and the `[scoring]` table of a recipe.

use arete_model::LoadOptions;
use arete_model::generate::Sampling;
use arete_model::machine::{self, Dtype};
use arete_records::table::Column;
use clap::ArgAction;
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::endpoint::{self, Endpoint};

/// Settings of scoring.
#[derive(Clone, Debug, PartialEq, clap::Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScoreConfig {
    /// Most test prompts to answer, the first of the file; 0 = all of them
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub n_prompts: usize,
    /// Most tokens sampled in one turn (as the conversations the reward models learned from)
    #[arg(long, default_value_t = 96, value_name = "N")]
    pub max_new_tokens: usize,
    /// Sampling temperature; 0 takes the most probable token
    #[arg(long, default_value_t = 0.7, value_name = "T")]
    pub temperature: f64,
    /// Only the k most probable tokens; 0 = all
    #[arg(long, default_value_t = 0, value_name = "K")]
    pub top_k: usize,
    /// Only the smallest set of tokens with this probability mass; 1 = all
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    pub top_p: f64,
    /// Most labelled pairs of --pairs to use, the first of the file; 0 = all of them
    #[arg(long, default_value_t = 200, value_name = "N")]
    pub max_pairs: usize,
    /// The one comparison that the run is judged by, named before it: LAST - FIRST, TURN (answer, all, or its name),
    /// MEASURE (yardstick, bag of words, score; each also "… at equal length")
    #[arg(long, default_value = endpoint::DEFAULT, value_name = "WORDS")]
    pub primary: String,
    /// A column under another name than ours, as prompt=question; may be given more than once
    #[arg(long = "column", value_name = "OURS=THEIRS")]
    #[serde(default)]
    pub column: Option<Vec<Column>>,
    /// Redraws of every bootstrap
    #[arg(long, default_value_t = 10_000, value_name = "N")]
    pub draws: usize,
    /// Most tokens in one forward pass (a longer conversation goes alone); changes scores only by rounding
    #[arg(long, default_value_t = 2048, value_name = "N")]
    pub micro_batch_tokens: usize,
    /// Pack every model's blocks to NF4 at load (as the reward models' base was, if it was)
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub nf4: bool,
    /// Quantise the NF4 scales as well
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub double_quantize: bool,
    /// Number format of weights and activations
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    /// Where to compute: cpu, cuda, cuda:N, or auto
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// CPU threads; 0 = one a core
    #[arg(long, default_value_t = 0)]
    pub threads: u32,
    /// Seed of the replies' random streams and of the bootstrap
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl ScoreConfig {
    /// Refuses settings that no run can use.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`].
    pub fn check(&self) -> Result<(), Error> {
        for (name, value) in [
            ("max_new_tokens", self.max_new_tokens),
            ("draws", self.draws),
            ("micro_batch_tokens", self.micro_batch_tokens),
        ] {
            if value == 0 {
                return Err(setting(name, "at least 1", "0"));
            }
        }
        self.endpoint().map(|_| ())
    }

    /// The primary endpoint.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] if it is none.
    pub fn endpoint(&self) -> Result<Endpoint, Error> {
        self.primary
            .parse()
            .map_err(|expected: String| setting("primary", &expected, &self.primary))
    }

    /// How replies are drawn.
    pub fn sampling(&self) -> Sampling {
        Sampling { temperature: self.temperature, top_k: self.top_k, top_p: self.top_p }
    }

    /// How models are loaded; sets the number of CPU threads.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] if there is no such device.
    pub fn load_options(&self) -> Result<LoadOptions, Error> {
        machine::set_threads(self.threads);
        let device = machine::device(&self.device)?;
        Ok(machine::load_options(device, self.dtype, self.nf4, self.double_quantize))
    }
}

pub(crate) fn setting(name: &'static str, expected: &str, got: &str) -> Error {
    Error::Setting { name, expected: expected.to_owned(), got: got.to_owned() }
}
