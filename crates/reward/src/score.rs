//! Scoring conversations from a file.

use std::io::Write;
use std::path::{Path, PathBuf};

use arete_chain::pairs::{self, FieldError};
use arete_chain::reward_model::{Base, RewardModel};
use arete_model::Source;
use arete_records::{At, Role, atomic};
use arete_training::runtime::{self, Dtype};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::Error;
use crate::data::Conversation;

/// Settings of scoring.
#[derive(Clone, Debug, clap::Args, Serialize, Deserialize)]
pub struct ScoreConfig {
    /// Merged reward model (…ForSequenceClassification), or with --adapter the base
    #[arg(long)]
    pub model: String,
    /// Directory with the reward model's adapter and head
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// JSON lines (.gz too) or Parquet with `messages`, or with `chosen` and `rejected` (and `prompt`)
    #[arg(long, value_name = "FILE")]
    pub input: PathBuf,
    /// JSON lines with the scores, one for every row; `-` for stdout
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
    /// Fields of the input's rows that stand beside the scores (split, messages, say)
    #[arg(long, num_args = 1.., value_name = "FIELD")]
    #[serde(default)]
    pub copy: Vec<String>,
    /// Most tokens in one forward pass; changes scores only by rounding
    #[arg(long, default_value_t = 4096)]
    pub micro_batch_tokens: usize,
    /// Pack the model's blocks to NF4
    #[arg(long)]
    pub nf4: bool,
    /// With --nf4: the scales in eight bits, as `double_quantize` in a recipe
    #[arg(long, requires = "nf4")]
    pub double_quantize: bool,
    /// Number format of the model and of activations
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    /// Where to compute: cpu, cuda, cuda:N, or auto
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// CPU threads; 0 = one a core
    #[arg(long, default_value_t = 0)]
    pub threads: u32,
}

/// Scores every row of `config.input`: `{"row", "score", "n_tokens"}`, or for pairs `{"row", "score_chosen",
/// "score_rejected", "n_tokens_chosen", "n_tokens_rejected"}`; with `prompt_id` where the input has it.
///
/// # Errors
///
/// Bad rows, an unusable model, a full disk: see [`Error`].
pub fn run(config: &ScoreConfig) -> Result<(), Error> {
    let rows = read(&config.input, &config.copy)?;
    runtime::set_threads(config.threads);
    let device = runtime::device(&config.device)?;
    let options = runtime::load_options(device, config.dtype, config.nf4, config.double_quantize);
    let source = Source::parse(&config.model)?;
    for path in source.local_path().into_iter().chain(config.adapter.as_deref()) {
        arete_stage::inputs::check(path)?;
    }
    let (model, reward) = RewardModel::load(&source, config.adapter.as_deref(), &options)?;
    let chat = model.chat()?;
    let base = Base { model: &model, chat: &chat, micro_batch_tokens: config.micro_batch_tokens };

    let mut sequences = Vec::new();
    for row in &rows {
        for conversation in &row.conversations {
            let token_ids =
                reward.token_ids(base, &conversation.transcript()).map_err(|source| {
                    let (path, row, source) = (config.input.clone(), row.row, Box::new(source));
                    Error::Rendering { path, row, source }
                })?;
            sequences.push(token_ids);
        }
    }
    let scores = reward.sequence_scores(&model, &sequences, config.micro_batch_tokens)?;
    let mut out = Vec::new();
    let mut read = sequences.iter().map(Vec::len).zip(scores);
    for row in &rows {
        let own: Vec<(usize, f64)> = read.by_ref().take(row.conversations.len()).collect();
        let names: &[&str] = if own.len() == 1 { &[""] } else { &["_chosen", "_rejected"] };
        let mut line = Map::new();
        line.insert("row".to_owned(), row.row.into());
        if let Some(id) = &row.prompt_id {
            line.insert("prompt_id".to_owned(), id.as_str().into());
        }
        line.extend(row.copied.iter().map(|(field, value)| (field.clone(), value.clone())));
        if let Some((_, score)) = own.iter().find(|(_, score)| !score.is_finite()) {
            let (row, path) = (row.row, config.input.display());
            let what = format!("score of row {row} of {path} ({score})");
            return Err(arete_model::Error::NonFinite { what }.into());
        }
        for (name, (_, score)) in names.iter().zip(&own) {
            line.insert(format!("score{name}"), (*score).into());
        }
        for (name, (n_tokens, _)) in names.iter().zip(&own) {
            line.insert(format!("n_tokens{name}"), (*n_tokens).into());
        }
        writeln!(out, "{}", Value::Object(line)).expect("writing to memory cannot fail");
    }
    tracing::info!(rows = rows.len(), "scored");
    if config.output == Path::new("-") {
        std::io::stdout().lock().write_all(&out)?;
        return Ok(());
    }
    Ok(atomic::write(&config.output, &out)?)
}

/// A row to score: one conversation, or the two of a pair.
struct Row {
    row: usize,
    prompt_id: Option<String>,
    conversations: Vec<Conversation>,
    /// Fields that are passed on.
    copied: Vec<(String, Value)>,
}

fn read(path: &Path, copy: &[String]) -> Result<Vec<Row>, Error> {
    let mut rows = Vec::new();
    for (row, object) in pairs::records(path)? {
        let refused = |error: FieldError| error.at(path, At::Row(row));
        let conversations = match object.get("messages") {
            Some(value) => {
                let truncated = object.get("truncated").and_then(Value::as_bool).unwrap_or(false);
                let messages =
                    pairs::messages("messages", value, Role::Assistant).map_err(refused)?;
                vec![Conversation { messages, truncated }]
            }
            None => {
                let pair = pairs::of_record(row, &object).map_err(refused)?;
                pair.map(|pair| vec![pair.chosen, pair.rejected]).unwrap_or_default()
            }
        };
        if conversations.is_empty()
            || conversations.iter().any(|conversation| conversation.messages.is_empty())
        {
            let got = Value::Array(Vec::new());
            return Err(refused(FieldError::new("messages", "at least one message", &got)).into());
        }
        let prompt_id = object.get("prompt_id").and_then(Value::as_str).map(str::to_owned);
        let field = |name: &String| match object.get(name) {
            Some(value) => Ok((name.clone(), value.clone())),
            None => {
                let expected = format!("a column `{name}`");
                Err(refused(FieldError::columns("copy", expected, &object)))
            }
        };
        let copied = copy.iter().map(field).collect::<Result<_, arete_records::Refusal>>()?;
        rows.push(Row { row, prompt_id, conversations, copied });
    }
    Ok(rows)
}
