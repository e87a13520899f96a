//! `arete-model logprobs`: the log-probability of every token of every line.

use std::path::PathBuf;

use serde_json::json;

use super::{ModelArgs, lines};
use arete_model::{Adapter, Batch, Device, Model, logprobs};

/// Lines go through the model together up to this many tokens; their numbers do not depend on it.
const TOKENS_AT_A_TIME: usize = 2048;

#[derive(Debug, clap::Args)]
pub(crate) struct Logprobs {
    #[command(flatten)]
    model: ModelArgs,
    /// Lines of {"messages": […]} (through the chat template, nothing opened at the end) or {"text": …}
    #[arg(long, value_name = "FILE")]
    jsonl: PathBuf,
}

pub(crate) fn run(arguments: &Logprobs) -> anyhow::Result<()> {
    let path = &arguments.jsonl;
    let lines = lines::read(path)?;
    let (model, adapter) = arguments.model.load()?;
    let adapter = adapter.as_ref().map(|loaded| &loaded.adapter);
    let chat = model.chat().ok();
    let mut sequences = Vec::with_capacity(lines.len());
    for line in &lines {
        sequences.push(lines::token_ids(path, line, &model, chat.as_ref(), |chat, messages| {
            Ok(chat.render(messages)?.token_ids)
        })?);
    }
    let _guard = tch::no_grad_guard();
    let progress = arete_records::progress::start("logprobs", "lines", lines.len() as u64);
    let mut rest = sequences.as_slice();
    while !rest.is_empty() {
        let mut n_tokens = 0;
        let fits = |ids: &&Vec<i64>| {
            n_tokens += ids.len();
            n_tokens <= TOKENS_AT_A_TIME
        };
        let n = rest.iter().take_while(fits).count().max(1);
        let (together, after) = rest.split_at(n);
        rest = after;
        for (ids, logprobs) in together.iter().zip(score(&model, adapter, together)?) {
            lines::print(&json!({"token_ids": ids, "logprobs": logprobs}))?;
        }
        progress.inc(n as u64);
    }
    Ok(())
}

/// Per sequence one number a token; none for the first, which nothing predicts.
fn score(
    model: &Model,
    adapter: Option<&Adapter>,
    sequences: &[Vec<i64>],
) -> anyhow::Result<Vec<Vec<Option<f32>>>> {
    let filled: Vec<&Vec<i64>> = sequences.iter().filter(|ids| !ids.is_empty()).collect();
    let batch = Batch::from_sequences(&filled);
    let predicted: Vec<usize> = batch
        .predecessors()
        .iter()
        .enumerate()
        .filter_map(|(row, predecessor)| predecessor.map(|_| row))
        .collect();
    let mut found = Vec::new();
    if !predicted.is_empty() {
        let hidden = model.decoder.forward(&batch, adapter)?;
        let rows = logprobs::of_rows(&model.decoder, &hidden, &batch, &predicted, 1.0, false)?;
        found = Vec::<f32>::try_from(&rows.logprob.to_device(Device::Cpu))?;
    }
    let mut found = found.into_iter();
    let numbers = |ids: &Vec<i64>| {
        (0..ids.len()).map(|at| (at > 0).then(|| found.next()).flatten()).collect()
    };
    Ok(sequences.iter().map(numbers).collect())
}
