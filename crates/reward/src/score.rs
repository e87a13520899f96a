//! Scoring conversations from a file.

use std::io::Write;
use std::path::{Path, PathBuf};

use arete_chain::RewardModel;
use arete_chain::pairs::{self, FieldError};
use arete_model::Source;
use arete_records::{At, Role, atomic};
use arete_training::runtime::{self, Dtype};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::Error;
use crate::config::OverLength;
use crate::data::{self, Conversation};

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
    /// Most tokens of a conversation; 0 = as many as the model takes
    #[arg(long, default_value_t = 0)]
    pub max_length: usize,
    /// What happens to longer ones (`drop` gives them null)
    #[arg(long, value_enum, default_value_t = OverLength::TruncateLeft)]
    pub over_length: OverLength,
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
    let rows = read(&config.input)?;
    runtime::set_threads(config.threads);
    let device = runtime::device(&config.device)?;
    let options = runtime::load_options(device, config.dtype, config.nf4, config.double_quantize);
    let source = Source::parse(&config.model)?;
    let (model, reward) = RewardModel::load(&source, config.adapter.as_deref(), &options)?;
    let chat = model.chat()?;
    let most = model.config.max_position_embeddings;
    let max_length = if config.max_length == 0 { most } else { config.max_length.min(most) };

    let mut sequences = Vec::new();
    // For every conversation of every row, its place in `sequences`, unless it was dropped.
    let mut places = Vec::with_capacity(rows.len());
    for row in &rows {
        let mut own = Vec::new();
        for conversation in &row.conversations {
            let tokens =
                data::tokenize_conversation(conversation, &chat, max_length, config.over_length)
                    .map_err(|source| Error::Rendering {
                        path: config.input.clone(),
                        row: row.row,
                        source: Box::new(source),
                    })?;
            own.push(tokens.map(|(sequence, _)| {
                sequences.push(sequence.token_ids);
                sequences.len() - 1
            }));
        }
        places.push(own);
    }
    let scores = reward.sequence_scores(&model, &sequences, config.micro_batch_tokens)?;
    let mut out = Vec::new();
    for (row, places) in rows.iter().zip(places) {
        let names: &[&str] = if places.len() == 1 { &[""] } else { &["_chosen", "_rejected"] };
        let mut line = Map::new();
        line.insert("row".to_owned(), row.row.into());
        if let Some(id) = &row.prompt_id {
            line.insert("prompt_id".to_owned(), id.as_str().into());
        }
        if let Some(&at) = places.iter().flatten().find(|&&at| !scores[at].is_finite()) {
            let (row, path, score) = (row.row, config.input.display(), scores[at]);
            let what = format!("score of row {row} of {path} ({score})");
            return Err(arete_model::Error::NonFinite { what }.into());
        }
        for (name, place) in names.iter().zip(&places) {
            let score = place.map_or(Value::Null, |at| scores[at].into());
            line.insert(format!("score{name}"), score);
        }
        for (name, place) in names.iter().zip(&places) {
            let n_tokens = place.map_or(Value::Null, |at| sequences[at].len().into());
            line.insert(format!("n_tokens{name}"), n_tokens);
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
}

fn read(path: &Path) -> Result<Vec<Row>, Error> {
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
        rows.push(Row { row, prompt_id, conversations });
    }
    Ok(rows)
}
