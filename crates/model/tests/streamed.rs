//! A model whose blocks stay on disk gives the same bits as one in memory.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

use std::path::Path;

use arete_model::{Batch, Device, Kind, LoadOptions, Model, Nf4Options, Source};

fn logits(model: &Model, batch: &Batch) -> Vec<f32> {
    let _guard = tch::no_grad_guard();
    let hidden = model.decoder.forward(batch, None).unwrap();
    Vec::try_from(model.decoder.logits(&hidden).unwrap().to_kind(Kind::Float).view([-1])).unwrap()
}

#[test]
fn streamed_blocks_compute_the_same() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
    let batch = Batch::from_sequences(&[vec![1i64, 5, 9, 14, 3], vec![1, 7, 7]]);
    for name in ["mistral_sliding", "llama_tied_v5", "nf4_llama"] {
        for nf4 in [None, Some(Nf4Options { double_quantize: true, block_size: 32 })] {
            let source = Source::Directory(goldens.join(name));
            let options = LoadOptions { device: Device::Cpu, dtype: Kind::Float, nf4 };
            let held = Model::load(&source, &options).unwrap();
            let streamed = Model::streamed(&source, &options).unwrap();
            assert!(streamed.decoder.n_bytes() < held.decoder.n_bytes(), "{name}: blocks are held");
            assert_eq!(logits(&streamed, &batch), logits(&held, &batch), "{name}, {nf4:?}");
        }
    }
}
