//! `arete-model generate` and `arete-model chat`.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use arete_records::Message;
use arete_stage::cli;
use serde_json::json;

use super::lines::{self, Line};
use super::{LoadedAdapter, ModelArgs, ranged};
use arete_model::generate::{self, Completion, Options, Request, Sampling, Stream};
use arete_model::{Adapter, Error, Model};

/// No model has more tokens in its vocabulary, or positions.
const MOST_TOKENS: u64 = 1 << 24;

fn parse_temperature(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite() && *number >= 0.0);
    number.ok_or_else(|| "expected a number of at least 0".to_owned())
}

fn parse_top_p(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| *number > 0.0 && *number <= 1.0);
    number.ok_or_else(|| "expected a number above 0, at most 1".to_owned())
}

/// Settings of sampling.
#[derive(Debug, clap::Args)]
struct SamplingArgs {
    /// Divides the logits; 0 takes the most probable token
    #[arg(long, default_value_t = 0.7, value_parser = parse_temperature)]
    temperature: f64,
    /// Only the k most probable tokens; 0 for all
    #[arg(long, default_value_t = 0, value_parser = ranged(0, MOST_TOKENS))]
    top_k: usize,
    /// Only the smallest set of tokens with this mass; 1 for all
    #[arg(long, default_value_t = 1.0, value_parser = parse_top_p)]
    top_p: f64,
    /// Most new tokens
    #[arg(long, default_value_t = 128, value_parser = ranged(1, MOST_TOKENS))]
    max_new_tokens: usize,
    /// Text that ends a completion; may be repeated
    #[arg(long = "stop", value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    stop: Vec<String>,
    /// Seed of all random streams
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl SamplingArgs {
    /// `stop_ids`: the tokens that end a completion.
    fn options(&self, stop_ids: Vec<i64>) -> Options {
        let Self { temperature, top_k, top_p, .. } = *self;
        let mut options = Options::new(Sampling { temperature, top_k, top_p }, stop_ids);
        options.stop_strings = self.stop.clone();
        options
    }

    fn request(&self, prompt_ids: Vec<i64>, prompt: u64) -> Request {
        Request {
            prompt_ids,
            streams: vec![Stream { seed: self.seed, prompt, sample: 0 }],
            tails: Vec::new(),
            max_new_tokens: self.max_new_tokens,
            turns: 1,
            extra_tokens: 0,
        }
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct Generate {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// One user turn to answer
    #[arg(long, required_unless_present = "jsonl", conflicts_with = "jsonl")]
    prompt: Option<String>,
    /// What the model is told before it
    #[arg(long, value_name = "TEXT", requires = "prompt")]
    system: Option<String>,
    /// Lines of {"messages": […]} (answered through the chat template) or {"text": …} (continued as it is)
    #[arg(long, value_name = "FILE")]
    jsonl: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Chat {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// What the model is told before the talk
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
}

pub(crate) fn run(arguments: &Generate) -> anyhow::Result<()> {
    if let Some(path) = &arguments.jsonl {
        return run_lines(arguments, path);
    }
    let mut messages = told(arguments.system.as_deref());
    messages.push(Message::user(arguments.prompt.clone().unwrap_or_default()));
    let (mut model, adapter) = arguments.model.load()?;
    model.decoder.set_packed_decoding(true);
    let prompt_ids = model.chat()?.render_prompt(&messages)?;
    let options = arguments.sampling.options(model.stop_ids()?);
    let request = arguments.sampling.request(prompt_ids, 0);
    show(&model, adapter.as_ref().map(|loaded| &loaded.adapter), &request, &options)?;
    Ok(())
}

/// The messages that stand before the first turn.
fn told(system: Option<&str>) -> Vec<Message> {
    system.map(Message::system).into_iter().collect()
}

/// Samples one reply, writing its text to stdout as it comes, and a line break after it.
fn show(
    model: &Model,
    adapter: Option<&Adapter>,
    request: &Request,
    options: &Options,
) -> anyhow::Result<Completion> {
    let mut text = model.tokenizer.stream();
    let put = |piece: &str| {
        let mut out = std::io::stdout().lock();
        write!(out, "{}", cli::printable(piece)).and_then(|()| out.flush())
    };
    let (mut started, mut blank) = (false, String::new());
    let completion = generate::stream(
        &model.decoder,
        Some(&model.tokenizer),
        adapter,
        request,
        options,
        &mut |token| -> anyhow::Result<()> {
            if options.stop_ids.contains(&token) {
                return Ok(()); // not part of the reply, special or not
            }
            let piece = text.push(token)?;
            // White space at the ends of a reply is not part of it (`Chat::reply_text`).
            blank.push_str(if started { &piece } else { piece.trim_start() });
            started |= !blank.is_empty();
            let shown = blank.trim_end().len();
            let rest = blank.split_off(shown);
            put(&std::mem::replace(&mut blank, rest)).context("writing to stdout")
        },
    )?;
    put("\n").context("writing to stdout")?;
    Ok(completion)
}

fn run_lines(arguments: &Generate, path: &Path) -> anyhow::Result<()> {
    let lines = lines::read(path)?;
    let (model, adapter) = arguments.model.load()?;
    let adapter = adapter.as_ref().map(|loaded: &LoadedAdapter| &loaded.adapter);
    // A model without a template still continues text, up to its own end of text.
    let only_text = lines.iter().all(|(_, line)| matches!(line, Line::Text { .. }));
    let (chat, stop_ids) = match model.chat() {
        Ok(chat) => (Some(chat), model.stop_ids()?),
        Err(_) if only_text => (None, model.config.eos_token_ids.clone()),
        Err(error) => return Err(error.into()),
    };
    let mut requests = Vec::with_capacity(lines.len());
    for (prompt, line) in lines.iter().enumerate() {
        let render =
            |chat: &arete_model::Chat<'_>, messages: &[Message]| chat.render_prompt(messages);
        let ids = lines::token_ids(path, line, &model, chat.as_ref(), render)?;
        if ids.is_empty() {
            let (path, number) = (path.display(), line.0);
            let what = format!("{path}, line {number}: expected text of at least one token");
            return Err(arete_stage::exit::BadInput(what).into());
        }
        requests.push(arguments.sampling.request(ids, prompt as u64));
    }
    let options = arguments.sampling.options(stop_ids);
    let progress =
        arete_records::progress::start("generating", "completions", requests.len() as u64);
    let print = |completion: &Completion| -> anyhow::Result<()> {
        let text = match &chat {
            Some(chat) => chat.reply_text(&completion.token_ids)?,
            None => model.tokenizer.decode(&completion.token_ids)?,
        };
        lines::print(&json!({
            "text": text,
            "token_ids": completion.token_ids,
            "logprobs": completion.logprobs,
            "finish_reason": completion.finish_reason,
        }))
    };
    // Lines are printed in the order of the input, each as soon as all before it are.
    let (mut waiting, mut next, mut failure) = (BTreeMap::new(), 0, None);
    let sampled = generate::run(
        &model.decoder,
        Some(&model.tokenizer),
        adapter,
        &requests,
        &options,
        &mut |_| Ok(Vec::new()),
        &mut |mut sequence| {
            progress.inc(1);
            waiting.insert(sequence.request, sequence.turns.pop().expect("one turn was sampled"));
            while let Some(completion) = waiting.remove(&next) {
                next += 1;
                if let Err(error) = print(&completion) {
                    failure = Some(error);
                    return Err(Error::Io(std::io::ErrorKind::Other.into())); // ends the run
                }
            }
            Ok(())
        },
    );
    match failure {
        Some(error) => Err(error),
        None => Ok(sampled?),
    }
}

/// A talk on stdin and stdout; an empty line or the end of the input ends it.
pub(crate) fn chat(arguments: &Chat) -> anyhow::Result<()> {
    let (mut model, adapter) = arguments.model.load()?;
    model.decoder.set_packed_decoding(true);
    let chat = model.chat()?;
    let options = arguments.sampling.options(model.stop_ids()?);
    let adapter = adapter.as_ref().map(|loaded| &loaded.adapter);
    let mut messages = told(arguments.system.as_deref());
    let mut input = BufReader::new(std::io::stdin());
    loop {
        write!(std::io::stdout().lock(), "> ").and_then(|()| std::io::stdout().flush())?;
        let mut line = String::new();
        if input.read_line(&mut line)? == 0 || line.trim().is_empty() {
            return Ok(());
        }
        messages.push(Message::user(line.trim()));
        let prompt_ids = chat.render_prompt(&messages)?;
        let request = arguments.sampling.request(prompt_ids, messages.len() as u64);
        let completion = show(&model, adapter, &request, &options)?;
        messages.push(Message::assistant(chat.reply_text(&completion.token_ids)?));
    }
}
