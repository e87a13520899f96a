//! Scoring conversations from a file.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use arete_chain::pairs::{self, FieldError};
use arete_chain::reward_model::{Base, RewardModel};
use arete_model::Source;
use arete_records::{Role, atomic, left_out, table};
use arete_stage::inputs::Piped;
use arete_training::not_rendered;
use arete_training::runtime::{self, Dtype};
use clap::ArgAction;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::data::Conversation;

/// Settings of scoring.
#[derive(Clone, Debug, clap::Args, Serialize, Deserialize)]
pub struct ScoreConfig {
    /// Merged reward model (…ForSequenceClassification), or with --adapter the base [default: the one that the adapter names]
    #[arg(long, required_unless_present = "adapter")]
    pub model: Option<String>,
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
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub nf4: bool,
    /// Quantise the NF4 scales as well
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
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
/// "score_rejected", "n_tokens_chosen", "n_tokens_rejected"}`; with `id` and `prompt_id` where the input has them. A row that
/// cannot be scored has `error` instead, unless such rows are more than a [share](left_out::is_share).
///
/// # Errors
///
/// Too many bad rows, an unusable model, a full disk.
pub fn run(config: &ScoreConfig) -> Result<()> {
    let mut piped = Piped::default();
    let mut rows = read(&piped.local(&config.input)?, &config.copy)?;
    runtime::set_threads(config.threads);
    let device = runtime::device(&config.device)?;
    let options = runtime::load_options(device, config.dtype, config.nf4, config.double_quantize);
    let source = Source::parse(&base_of(config)?)?;
    for path in source.local_path().into_iter().chain(config.adapter.as_deref()) {
        arete_stage::inputs::check(path)?;
    }
    let (model, reward) = RewardModel::load(&source, config.adapter.as_deref(), &options)?;
    let chat = model.chat()?;
    let base = Base { model: &model, chat: &chat, micro_batch_tokens: config.micro_batch_tokens };

    let (mut sequences, n_rows) = (Vec::new(), rows.len());
    let mut n_bad = rows.iter().filter(|row| row.error.is_some()).count();
    for row in &mut rows {
        let own = row.conversations.iter().map(|own| reward.token_ids(base, &own.transcript()));
        match own.collect::<Result<Vec<_>, _>>() {
            Ok(own) => sequences.extend(own),
            Err(error) => {
                n_bad += 1;
                if !left_out::is_share(n_bad, n_rows) {
                    return Err(error).with_context(|| not_rendered(&config.input, row.row));
                }
                tracing::warn!(row = row.row, %error, "row not scored");
                row.error = Some(format!("cannot be rendered: {error}"));
                row.conversations.clear();
            }
        }
    }
    let scores = reward.sequence_scores(&model, &sequences, config.micro_batch_tokens)?;
    let mut out = Vec::new();
    let mut read = sequences.iter().map(Vec::len).zip(scores);
    for row in &rows {
        let own: Vec<(usize, f64)> = read.by_ref().take(row.conversations.len()).collect();
        let names: &[&str] = match own.len() {
            0 => &[],
            1 => &[""],
            _ => &["_chosen", "_rejected"],
        };
        let mut line = Map::new();
        line.insert("row".to_owned(), row.row.into());
        line.extend(row.copied.iter().map(|(field, value)| (field.clone(), value.clone())));
        line.extend(row.error.iter().map(|error| ("error".to_owned(), error.as_str().into())));
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
    tracing::info!(rows = n_rows - n_bad, bad = n_bad, "scored");
    if config.output == Path::new("-") {
        std::io::stdout().lock().write_all(&out)?;
        return Ok(());
    }
    Ok(atomic::write(&config.output, &out)?)
}

/// The base: the one that is named, else the one that the adapter was trained over.
fn base_of(config: &ScoreConfig) -> Result<String> {
    if let Some(model) = &config.model {
        return Ok(model.clone());
    }
    let dir = config.adapter.as_deref().expect("clap demands one of them");
    Ok(arete_chain::yardstick::base_of_adapter(dir)?)
}

/// Fields by which people know their rows.
const IDS: [&str; 2] = ["id", "prompt_id"];

/// A row to score: one conversation, or the two of a pair.
struct Row {
    row: usize,
    conversations: Vec<Conversation>,
    /// Fields that are passed on, those first by which a row is known.
    copied: Vec<(String, Value)>,
    /// Why it has no score.
    error: Option<String>,
}

fn read(path: &Path, copy: &[String]) -> Result<Vec<Row>> {
    let table = table::read_renamed(path, &[])?;
    let (mut rows, mut wrong) = (Vec::new(), Vec::new());
    for (row, error) in pairs::unreadable(table.unreadable) {
        let error_text = Some(error.to_string());
        wrong.push((row, error));
        rows.push(Row { row, conversations: Vec::new(), copied: Vec::new(), error: error_text });
    }
    for (row, object) in table.records {
        let known = IDS.into_iter().filter(|name| !copy.iter().any(|asked| asked == name));
        let known = known.filter_map(|name| Some((name.to_owned(), object.get(name)?.clone())));
        let mut copied: Vec<(String, Value)> = known.collect();
        let asked = copied_of(&object, copy);
        let found = conversations_of(row, &object).and_then(|own| Ok((own, asked?)));
        let (conversations, error) = match found {
            Ok((conversations, asked)) => {
                copied.extend(asked);
                (conversations, None)
            }
            Err(error) => {
                let text = error.to_string();
                wrong.push((row, error));
                (Vec::new(), Some(text))
            }
        };
        rows.push(Row { row, conversations, copied, error });
    }
    rows.sort_by_key(|row| row.row);
    pairs::leave_out(path, wrong, rows.len())?;
    Ok(rows)
}

/// What there is to score in a record.
fn conversations_of(
    row: usize,
    object: &Map<String, Value>,
) -> Result<Vec<Conversation>, FieldError> {
    let conversations = match pairs::present(object, "messages") {
        Some(value) => {
            let truncated = object.get("truncated").and_then(Value::as_bool).unwrap_or(false);
            let messages = pairs::messages("messages", value, Role::Assistant)?;
            vec![Conversation { messages, truncated }]
        }
        None => {
            let pair = pairs::of_record(row, object)?;
            pair.map(|pair| vec![pair.chosen, pair.rejected]).unwrap_or_default()
        }
    };
    let is_empty = |conversation: &Conversation| conversation.messages.is_empty();
    if conversations.is_empty() || conversations.iter().any(is_empty) {
        let got = Value::Array(Vec::new());
        return Err(FieldError::new("messages", "at least one message", &got));
    }
    Ok(conversations)
}

/// The fields that are asked for.
fn copied_of(
    object: &Map<String, Value>,
    copy: &[String],
) -> Result<Vec<(String, Value)>, FieldError> {
    let field = |name: &String| match object.get(name) {
        Some(value) => Ok((name.clone(), value.clone())),
        None => Err(FieldError::columns("copy", format!("a column `{name}`"), object)),
    };
    copy.iter().map(field).collect()
}
