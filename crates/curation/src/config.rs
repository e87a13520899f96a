//! The settings of every subcommand: clap's flags and the recipe's tables in one struct each.

use std::path::PathBuf;

use arete_model::generate::Sampling;
use arete_model::runtime::{self, Dtype};
use arete_model::{LoadOptions, Source};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Error;
use crate::engine::server::ServerConfig;
use crate::prompts::Context;
use arete_stage::units::Shard;

/// Settings of `prompts`.
#[derive(Debug, Clone, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct PromptsConfig {
    /// How much of a conversation becomes the prompt
    #[arg(long, value_enum, default_value = "opening")]
    pub context: Context,
    /// Most prompts to keep, spread evenly over the inputs; 0 keeps all
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub limit: usize,
    /// Most prompts of the training split, which conversations, SFT and PPO learn from; 0 keeps all
    #[arg(long, default_value_t = 0, value_name = "N")]
    #[serde(default)]
    pub max_train: usize,
    /// Most prompts of the validation split, which probes and reward model evaluation read; 0 keeps all
    #[arg(long, default_value_t = 0, value_name = "N")]
    #[serde(default)]
    pub max_validation: usize,
    /// Most prompts of the test split, which only scoring reads; 0 keeps all
    #[arg(long, default_value_t = 0, value_name = "N")]
    #[serde(default)]
    pub max_test: usize,
    /// Longer prompts (in characters) are left out and counted
    #[arg(long, default_value_t = 2000, value_name = "N")]
    pub max_chars: usize,
    /// Name to record as every prompt's source, instead of what the records say
    #[arg(long, value_name = "NAME")]
    #[serde(default)]
    pub source: Option<String>,
    /// Seed of the spread
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// Where a local model computes, and in which number format.
#[derive(Debug, Clone, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct ComputeConfig {
    /// Where to compute: cpu, cuda, cuda:N, or auto
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Number format of weights and activations
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    /// Pack the model's matrices to four bits (NF4) at load
    #[arg(long, num_args = 0..=1, default_value_t = false, default_missing_value = "true",
          action = clap::ArgAction::Set, value_name = "BOOL")]
    pub nf4: bool,
}

impl ComputeConfig {
    /// As the model crate takes it.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] if there is no such device.
    pub fn load_options(&self) -> Result<LoadOptions, Error> {
        let device = runtime::device(&self.device)?;
        Ok(runtime::load_options(device, self.dtype, self.nf4, true))
    }
}

/// How replies are sampled.
#[derive(Debug, Clone, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct SamplingConfig {
    /// Most tokens sampled in one turn
    #[arg(long, default_value_t = 96, value_name = "N")]
    pub max_new_tokens: usize,
    /// Sampling temperature; 0 takes the most probable token
    #[arg(long, default_value_t = 0.7, value_name = "T")]
    pub temperature: f64,
    /// Only the k most probable tokens; 0 for all
    #[arg(long, default_value_t = 0, value_name = "K")]
    pub top_k: usize,
    /// Only the smallest set of tokens with this probability mass; 1 for all
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    pub top_p: f64,
    /// Seed of the random streams
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl SamplingConfig {
    /// As the engines take it.
    pub fn drawing(&self) -> crate::engine::Drawing {
        crate::engine::Drawing {
            seed: self.seed,
            sampling: Sampling {
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
            },
            max_new_tokens: self.max_new_tokens,
            is_verdict: false,
        }
    }
}

/// Where demonstrations come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DemonstrationSource {
    /// The model's own revisions.
    #[value(name = "self")]
    #[serde(rename = "self")]
    Revised,
    /// The shipped exemplars.
    Own,
    /// Both.
    Mix,
}

impl DemonstrationSource {
    /// Whether a model and prompts are needed.
    pub fn needs_model(self) -> bool {
        self != Self::Own
    }

    /// Whether the exemplars are needed.
    pub fn needs_exemplars(self) -> bool {
        self != Self::Revised
    }
}

/// How many turns a demonstration has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Turns {
    /// The answer alone.
    Answer,
    /// Answer, motivation, consequence.
    Chain,
}

/// What becomes of replies that the token limit cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Truncated {
    /// They are left out.
    Drop,
    /// They are cut at the last full sentence and the turn is closed; without one, left out.
    Trim,
    /// They stay as they are, as in the report.
    Keep,
}

/// Settings of `demonstrations`.
#[derive(Debug, Clone, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct DemonstrationsConfig {
    /// Where demonstrations come from: the model's own revisions, the shipped exemplars, or both
    #[arg(long, value_enum, default_value = "mix")]
    pub source: DemonstrationSource,
    /// Rounds of critique and revision
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub rounds: usize,
    /// Exemplary answers shown before the question
    #[arg(long, default_value_t = 2, value_name = "K")]
    pub few_shot: usize,
    /// Turns of the model's own demonstrations
    #[arg(long, value_enum, default_value = "chain")]
    pub turns: Turns,
    /// What becomes of revisions that the token limit cut
    #[arg(long, value_enum, default_value = "trim")]
    pub truncated: Truncated,
    /// Constitution (TOML): principles, virtue questions, personas
    #[arg(long, default_value = "data/constitution.toml", value_name = "FILE")]
    pub constitution: PathBuf,
    /// Exemplary replies (JSON lines)
    #[arg(long, default_value = "data/demonstrations/exemplars.jsonl", value_name = "FILE")]
    pub exemplars: PathBuf,
    /// Address of an OpenAI-compatible server that generates instead of a local model
    #[arg(long, value_name = "URL")]
    #[serde(default)]
    pub engine_url: Option<String>,
    /// Part i of n of a job array
    #[arg(long, value_name = "I/N")]
    #[serde(default)]
    pub shard: Option<Shard>,
    /// How replies are sampled.
    #[command(flatten)]
    #[serde(flatten)]
    pub sampling: SamplingConfig,
    /// Where the model computes.
    #[command(flatten)]
    #[serde(flatten)]
    pub compute: ComputeConfig,
    /// How a server is talked to.
    #[command(flatten)]
    #[serde(flatten)]
    pub server: ServerConfig,
}

/// Under which system prompts conversations are sampled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum PersonaChoice {
    /// None: both samples are drawn alike.
    None,
    /// Sample 0 under the constitution's virtuous persona, sample 1 under its vicious one (RLCD, Yang et al. 2023).
    Contrast,
    /// None, but sample 1 is drawn from --original, the model before SFT: for models too small to follow a persona (after
    /// ALMoST, Kim et al. 2023, where the better model's reply is the preferred one).
    Original,
}

/// Settings of `conversations`.
#[derive(Debug, Clone, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct ConversationsConfig {
    /// Under which system prompts the two samples are drawn
    #[arg(long, value_enum, default_value = "none")]
    pub personas: PersonaChoice,
    /// Constitution (TOML): principles, virtue questions, personas
    #[arg(long, default_value = "data/constitution.toml", value_name = "FILE")]
    pub constitution: PathBuf,
    /// Address of an OpenAI-compatible server that generates instead of a local model
    #[arg(long, value_name = "URL")]
    #[serde(default)]
    pub engine_url: Option<String>,
    /// Part i of n of a job array
    #[arg(long, value_name = "I/N")]
    #[serde(default)]
    pub shard: Option<Shard>,
    /// How replies are sampled.
    #[command(flatten)]
    #[serde(flatten)]
    pub sampling: SamplingConfig,
    /// Where the model computes.
    #[command(flatten)]
    #[serde(flatten)]
    pub compute: ComputeConfig,
    /// How a server is talked to.
    #[command(flatten)]
    #[serde(flatten)]
    pub server: ServerConfig,
}

/// How a verdict on two samples is reached.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// The logits of the labels A and B after both samples were shown.
    PairwiseLogits,
    /// The label the judge writes, as in the report.
    PairwiseText,
    /// The logits of Yes and No about each sample alone.
    PointwiseLogits,
    /// log P of each sample's reply under the virtuous against the vicious persona.
    Likelihood,
    /// No judge: the sample drawn under the virtuous persona, or from the model after SFT, is preferred.
    Contrast,
}

impl Method {
    /// The name used in flags, columns and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::PairwiseLogits => "pairwise-logits",
            Self::PairwiseText => "pairwise-text",
            Self::PointwiseLogits => "pointwise-logits",
            Self::Likelihood => "likelihood",
            Self::Contrast => "contrast",
        }
    }

    /// Whether verdicts are read from log-probabilities.
    pub fn needs_logprobs(self) -> bool {
        matches!(self, Self::PairwiseLogits | Self::PointwiseLogits)
    }
}

/// In how many orders a pair is shown to the judge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Orders {
    /// Sample 0 first, as in the report.
    One,
    /// Each sample first once; their verdicts are averaged so that a preference for a place cancels.
    Both,
}

/// What becomes of a pair with as many votes for one side as for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Ties {
    /// It is left out.
    Drop,
    /// The higher mean probability decides.
    Probability,
}

/// The judge's default question about two samples. What follows `{reply}` begins the reply of a
/// local judge: without it small models talk before they choose.
pub const PAIRWISE_TEMPLATE: &str = "Two assistants replied to the same question.\n\n\
    Question: {question}\n\n[Assistant A]\n{a}\n\n[Assistant B]\n{b}\n\n\
    {virtue_question} Reply with the letter A or B only.{reply}Assistant";

/// The judge's default question about one sample.
pub const POINTWISE_TEMPLATE: &str = "Question: {question}\n\n[Answer]\n{answer}\n\n\
    Does this answer show {virtue}? Reply with Yes or No only.";

/// How a judge is asked.
#[derive(Debug, Clone, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct JudgeConfig {
    /// Orders in which a pair is shown
    #[arg(long, value_enum, default_value = "both")]
    pub orders: Orders,
    /// Judged examples shown before the question
    #[arg(long, default_value_t = 0, value_name = "K")]
    pub few_shot: usize,
    /// Question about two samples, with {question}, {a}, {b}, {virtue_question}; what follows {reply}
    /// begins the judge's reply (local judges only)
    #[arg(long, default_value = PAIRWISE_TEMPLATE, value_name = "TEXT", hide_default_value = true)]
    pub judge_template: String,
    /// Question about one sample, with {question}, {answer}, {virtue} or {virtue_question}; {reply} as
    /// above
    #[arg(long, default_value = POINTWISE_TEMPLATE, value_name = "TEXT", hide_default_value = true)]
    pub pointwise_template: String,
    /// Most tokens of a written verdict
    #[arg(long, default_value_t = 16, value_name = "N")]
    pub verdict_tokens: usize,
    /// Adapter (peft directory) over the judge
    #[arg(long, value_name = "DIR")]
    #[serde(default)]
    pub judge_adapter: Option<PathBuf>,
    /// Address of an OpenAI-compatible server that judges instead of a local model
    #[arg(long, value_name = "URL")]
    #[serde(default)]
    pub judge_url: Option<String>,
    /// Constitution (TOML): principles, virtue questions, personas
    #[arg(long, default_value = "data/constitution.toml", value_name = "FILE")]
    pub constitution: PathBuf,
    /// Exemplary replies (JSON lines), for the judged examples
    #[arg(long, default_value = "data/demonstrations/exemplars.jsonl", value_name = "FILE")]
    pub exemplars: PathBuf,
    /// Seed of written verdicts, spread and halves
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Where the judge computes.
    #[command(flatten)]
    #[serde(flatten)]
    pub compute: ComputeConfig,
    /// How a server is talked to.
    #[command(flatten)]
    #[serde(flatten)]
    pub server: ServerConfig,
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
    /// A virtue gives no vote if its probability is nearer to one half than this
    #[arg(long, default_value_t = 0.0, value_name = "P")]
    pub tie_margin: f64,
    /// Exchange the sides of every verdict, for a method that `calibrate` found to point the wrong way
    #[arg(long, num_args = 0..=1, default_value_t = false, default_missing_value = "true",
          action = clap::ArgAction::Set, value_name = "BOOL")]
    pub flip: bool,
    /// Fewest pairs an aspect may be left with
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
    /// How the judge is asked.
    #[command(flatten)]
    #[serde(flatten)]
    pub judge: JudgeConfig,
}

/// The settings that results depend on, for `run.json`: without paths of inputs (their contents are
/// hashed), without how a server is talked to, without what is not set.
///
/// # Panics
///
/// Never: the configurations serialise to tables.
pub fn recorded(config: &impl Serialize) -> Value {
    const LEFT_OUT: [&str; 7] = [
        "constitution",
        "exemplars",
        "judge_adapter",
        "concurrency",
        "attempts",
        "timeout_s",
        "backoff_s",
    ];
    let mut value = serde_json::to_value(config).expect("configurations always serialise");
    let table = value.as_object_mut().expect("configurations are tables");
    table.retain(|key, value| !LEFT_OUT.contains(&key.as_str()) && !value.is_null());
    value
}

/// A model's entry among a stage's inputs (one on the hub is downloaded); the name of a server's model goes into the settings
/// instead.
///
/// # Errors
///
/// No such model, or a download that fails.
pub fn record_model(
    name: &str,
    model: &str,
    remote: bool,
    settings: &mut Value,
    inputs: &mut Vec<(String, PathBuf)>,
) -> Result<(), Error> {
    if remote {
        settings[name] = Value::String(model.to_owned());
    } else if let Some(path) = Source::fetch(model)?.local_path() {
        inputs.push((name.to_owned(), path.to_owned()));
    }
    Ok(())
}
