//! Any bytes as the JSON files of a model directory (configuration, generation configuration and index, separated by a zero
//! byte) and as its one weight file: opened without a panic.
#![no_main]

use arete_model::{Checkpoint, Source};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|content: &[u8]| {
    let directory = std::env::temp_dir().join(format!("arete-fuzz-{}", std::process::id()));
    fs_err::create_dir_all(&directory).expect("the temporary directory can be written");
    let names = [
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "model-00001-of-00001.safetensors",
    ];
    let mut parts = content.splitn(names.len(), |byte| *byte == 0);
    for name in names {
        let part = parts.next().unwrap_or_default();
        fs_err::write(directory.join(name), part).expect("the directory can be written");
    }
    if let Ok(checkpoint) = Checkpoint::open(&Source::Directory(directory)) {
        for name in checkpoint.names() {
            let _ = checkpoint.tensor(&name);
        }
        let _ = checkpoint.config().to_json(arete_model::Kind::Float);
    }
});
