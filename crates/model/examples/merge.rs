//! Merges an adapter into its base: a dense Hugging Face directory that transformers and vLLM load.
//!
//! Run: `cargo run --release -p arete-model --example merge -- MODEL ADAPTER OUTPUT_DIR`

use std::path::Path;

use anyhow::ensure;
use arete_model::{Checkpoint, Device, Kind, Source, adapter, adapter::merge};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    ensure!(arguments.len() == 3, "the arguments are the model, the adapter and the output");
    let source = Source::parse(&arguments[0])?;
    let config = Checkpoint::open(&source)?.config().clone();
    let directory = Path::new(&arguments[1]);
    let loaded = adapter::load(directory, "adapter", &config, Device::Cpu)?;
    let (head, output) = (loaded.head.as_ref(), Path::new(&arguments[2]));
    merge::merge(&source, &loaded.adapter, head, output, Kind::BFloat16, serde_json::Map::new())?;
    Ok(())
}
