//! Any bytes as `config.json` and, after a zero byte, `generation_config.json`: read without a panic, and what was read can be
//! written and read again.
#![no_main]

use arete_model::{Kind, ModelConfig};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|content: &[u8]| {
    let directory = std::env::temp_dir().join(format!("arete-fuzz-config-{}", std::process::id()));
    fs_err::create_dir_all(&directory).expect("the temporary directory can be written");
    let mut parts = content.splitn(2, |byte| *byte == 0);
    for name in ["config.json", "generation_config.json"] {
        let part = parts.next().unwrap_or_default();
        fs_err::write(directory.join(name), part).expect("the directory can be written");
    }
    if let Ok(config) = ModelConfig::from_directory(&directory) {
        let json = config.to_json(Kind::Float);
        let again = ModelConfig::from_json(&directory.join("config.json"), &json);
        again.expect("what was accepted is accepted when written");
        if config.num_layers < 1000 {
            let _ = config.expected_tensors();
        }
    }
});
