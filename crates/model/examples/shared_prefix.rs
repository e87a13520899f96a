//! Several questions about one conversation, which is computed once: how a judge reads its verdicts.
//!
//! Run: `cargo run --release -p arete-model --example shared_prefix -- MODEL`

use std::io::Write;

use anyhow::Context;
use arete_model::{Batch, LoadOptions, Model, Source, logprobs};

const CONVERSATION: &str = "A customer got ten euros too much in change. The clerk noticed only in the evening. \
                            The next day the customer brought the money back and apologised.\n";
const VIRTUES: [&str; 5] = ["honest", "prudent", "compassionate", "humble", "respectful"];

fn main() -> anyhow::Result<()> {
    let source = std::env::args().nth(1).context("the first argument is the model")?;
    let model = Model::load(&Source::parse(&source)?, &LoadOptions::default())?;
    let encode = |text: &str| model.tokenizer.encode(text, false);
    let label = |text| model.tokenizer.text_token_id(text).context("the labels are one token each");
    let labels = [label(" Yes")?, label(" No")?];

    // One root, a child for each question, and a child of that for each answer.
    let mut tree = Batch::tree();
    let root = tree.root(&encode(CONVERSATION)?);
    let mut answers = Vec::new();
    for virtue in VIRTUES {
        let question = format!("Question: Was the customer {virtue}? Answer:");
        let question = tree.child(root, &encode(&question)?);
        answers.push(labels.map(|label| tree.child(question, &[label])));
    }
    let batch = tree.build();

    let _no_grad = arete_model::no_grad_guard();
    let hidden = model.decoder.forward(&batch, None)?;
    let rows: Vec<usize> =
        answers.iter().flatten().map(|segment| batch.last_row(*segment)).collect();
    let found = logprobs::of_rows(&model.decoder, &hidden, &batch, &rows, 1.0, false)?;
    let logprobs = Vec::<f32>::try_from(&found.logprob)?;

    let mut out = std::io::stdout().lock();
    for (virtue, pair) in VIRTUES.iter().zip(logprobs.chunks(2)) {
        let yes = 1.0 / (1.0 + (pair[1] - pair[0]).exp());
        writeln!(out, "{virtue:14} P(Yes) = {yes:.2}")?;
    }
    writeln!(out, "{} tokens computed", batch.n_tokens())?;
    Ok(())
}
