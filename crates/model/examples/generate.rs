//! Answers a question, token by token.
//!
//! Run: `cargo run --release -p arete-model --example generate -- MODEL 'How do I apologise?'`
//! (MODEL: a Hugging Face directory, a GGUF file or a hub id)

use std::io::Write;

use anyhow::Context;
use arete_model::generate::{self, Options, Request, Sampling, Stream};
use arete_model::{LoadOptions, Message, Model, Source};

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let source = Source::parse(&arguments.next().context("the first argument is the model")?)?;
    let question = arguments.next().context("the second argument is the question")?;
    let model = Model::load(&source, &LoadOptions::default())?;

    let request = Request {
        prompt_ids: model.chat()?.render_prompt(&[Message::user(question)])?,
        streams: vec![Stream { seed: 0, prompt: 0, sample: 0 }],
        tails: Vec::new(),
        max_new_tokens: 200,
        turns: 1,
        extra_tokens: 0,
    };
    let options = Options::new(Sampling::at(0.7), model.stop_ids()?);
    let mut text = model.tokenizer.stream();
    let mut show = |token| {
        let mut out = std::io::stdout().lock();
        Ok(write!(out, "{}", text.push(token)?).and_then(|()| out.flush())?)
    };
    let tokenizer = Some(&model.tokenizer);
    let completion = generate::stream::<arete_model::Error>(
        &model.decoder,
        tokenizer,
        None,
        &request,
        &options,
        &mut show,
    )?;
    let n = completion.token_ids.len();
    writeln!(std::io::stdout(), "\n({n} tokens, ended by {:?})", completion.finish_reason)?;
    Ok(())
}
