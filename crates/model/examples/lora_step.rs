//! Trains a LoRA adapter on one sentence by plain gradient steps, and writes it in peft's layout.
//!
//! Run: `cargo run --release -p arete-model --example lora_step -- MODEL OUTPUT_DIR`
//! (`arete_training` has AdamW, schedules and checkpoints)

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use arete_model::adapter::{self, AdapterMeta, Task};
use arete_model::{
    Adapter, Batch, Kind, LoadOptions, LoraConfig, Message, Model, Source, logprobs,
};

const STEPS: usize = 8;
const LEARNING_RATE: f64 = 2.0;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let given = arguments.next().context("the first argument is the model")?;
    let output = PathBuf::from(arguments.next().context("the second argument is the output")?);
    let model = Model::load(&Source::parse(&given)?, &LoadOptions::default())?;
    let (config, device) = (model.decoder.config(), model.decoder.device());
    let mut adapter = Adapter::new("example", config, &LoraConfig::default(), 0, device)?;
    adapter.set_trainable(true);

    let messages = [
        Message::user("What would you rather be, right or kind?"),
        Message::assistant("Kind first, and right as gently as I can."),
    ];
    let rendered = model.chat()?.render(&messages)?;
    let batch = Batch::from_sequences(&[&rendered.token_ids]);
    // Only the assistant's own tokens count.
    let rows: Vec<usize> = (1..rendered.own.len()).filter(|row| rendered.own[*row]).collect();
    for step in 0..STEPS {
        let pass = model.decoder.pass(&batch, &adapter, false)?;
        let found = logprobs::of_rows(&model.decoder, &pass.hidden, &batch, &rows, 1.0, false)?;
        let loss = -found.logprob.mean(Kind::Float);
        writeln!(std::io::stdout(), "step {step}: loss {:.4}", loss.double_value(&[]))?;
        pass.backward(&loss)?;
        let _no_grad = arete_model::no_grad_guard();
        for (_, mut parameter) in adapter.parameters() {
            let mut gradient = parameter.grad();
            let _ = parameter.g_sub_(&(&gradient * LEARNING_RATE));
            let _ = gradient.zero_();
        }
    }
    let meta = AdapterMeta::of(&model, &given, Task::CausalLm);
    adapter::save(&output, &adapter, None, &meta)?;
    writeln!(std::io::stdout(), "wrote {}", output.display())?;
    Ok(())
}
