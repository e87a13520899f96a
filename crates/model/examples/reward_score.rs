//! Scores conversations with a reward model: a merged `…ForSequenceClassification` directory, or a base and an adapter with a head.
//!
//! Run: `cargo run --release -p arete-model --example reward_score -- MODEL [ADAPTER]`

use std::io::Write;
use std::path::Path;

use anyhow::Context;
use arete_model::{Batch, LoadOptions, Message, Model, Source, Tensor, adapter};

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let source = Source::parse(&arguments.next().context("the first argument is the model")?)?;
    let model = Model::load(&source, &LoadOptions::default())?;
    let loaded = match arguments.next() {
        Some(adapter) => {
            let device = model.decoder.device();
            let loaded = adapter::load(Path::new(&adapter), "reward", &model.config, device)?;
            loaded.meta.check_base(&model)?;
            Some(loaded)
        }
        None => None,
    };
    let adapter = loaded.as_ref().map(|loaded| &loaded.adapter);
    let head = loaded.as_ref().and_then(|loaded| loaded.head.as_ref()).or(model.head.as_ref());
    let head = head.context("neither the model nor the adapter has a scalar head")?;

    let question = Message::user("I broke my neighbour's window. What now?");
    let replies = ["Run before anyone sees you.", "Tell them, apologise, and pay for the glass."];
    let chat = model.chat()?;
    let mut sequences = Vec::new();
    for reply in replies {
        sequences.push(chat.render(&[question.clone(), Message::assistant(reply)])?.token_ids);
    }
    let _no_grad = arete_model::no_grad_guard();
    let batch = Batch::from_sequences(&sequences);
    let hidden = model.decoder.forward(&batch, adapter)?;
    let last: Vec<i64> = sequences
        .iter()
        .scan(-1, |end, ids| {
            *end += ids.len() as i64;
            Some(*end)
        })
        .collect();
    let scores = head.forward(&hidden.index_select(0, &Tensor::from_slice(&last))); // [2]
    for (reply, score) in replies.iter().zip(Vec::<f32>::try_from(&scores)?) {
        writeln!(std::io::stdout(), "{score:8.3}  {reply}")?;
    }
    Ok(())
}
