//! Packs a model to four bits (NF4) while it is read, and compares what both predict.
//!
//! Run: `cargo run --release -p arete-model --example quantise -- MODEL 'The virtue I value most is'`

use std::io::Write;

use anyhow::Context;
use arete_model::{Batch, Kind, LoadOptions, Model, Nf4Options, Source, Tensor};

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let source = Source::parse(&arguments.next().context("the first argument is the model")?)?;
    let text = arguments.next().context("the second argument is the text")?;
    let mut out = std::io::stdout().lock();
    let _no_grad = arete_model::no_grad_guard();
    for nf4 in [None, Some(Nf4Options::default())] {
        let model = Model::load(&source, &LoadOptions { nf4, ..LoadOptions::default() })?;
        let batch = Batch::from_sequences(&[model.tokenizer.encode(&text, true)?]);
        let hidden = model.decoder.forward(&batch, None)?;
        let last = Tensor::from_slice(&[batch.n_tokens() as i64 - 1]);
        let logits = model.decoder.logits(&hidden.index_select(0, &last))?; // [1, V]
        let (values, ids) = logits.softmax(-1, Kind::Float).topk(3, -1, true, true);
        let held = if nf4.is_some() { "four bits" } else { "as it is" };
        writeln!(out, "{held}: {} MiB of weights", model.decoder.n_bytes() >> 20)?;
        for (id, value) in Vec::<i64>::try_from(ids.view([-1]))?
            .into_iter()
            .zip(Vec::<f32>::try_from(values.view([-1]))?)
        {
            writeln!(out, "  {value:.3}  {:?}", model.tokenizer.decode(&[id])?)?;
        }
    }
    Ok(())
}
