//! How surprised is a model by a text? One line a token.
//!
//! Run: `cargo run --release -p arete-model --example logprobs -- MODEL 'Honesty is the best policy.'`

use std::io::Write;

use anyhow::Context;
use arete_model::{Batch, LoadOptions, Model, Source, logprobs};

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let source = Source::parse(&arguments.next().context("the first argument is the model")?)?;
    let text = arguments.next().context("the second argument is the text")?;
    let model = Model::load(&source, &LoadOptions::default())?;
    let token_ids = model.tokenizer.encode(&text, true)?;

    let _no_grad = arete_model::no_grad_guard();
    let batch = Batch::from_sequences(&[&token_ids]);
    let hidden = model.decoder.forward(&batch, None)?; // [N, D]
    let rows: Vec<usize> = (1..token_ids.len()).collect(); // nothing predicts the first token
    let found = logprobs::of_rows(&model.decoder, &hidden, &batch, &rows, 1.0, false)?;
    let logprobs = Vec::<f32>::try_from(&found.logprob)?;

    let mut out = std::io::stdout().lock();
    for (token, logprob) in token_ids[1..].iter().zip(&logprobs) {
        writeln!(out, "{logprob:8.3}  {}", model.tokenizer.decode_with_special(&[*token])?)?;
    }
    let mean = logprobs.iter().sum::<f32>() / logprobs.len().max(1) as f32;
    writeln!(out, "perplexity {:.2}", (-mean).exp())?;
    Ok(())
}
