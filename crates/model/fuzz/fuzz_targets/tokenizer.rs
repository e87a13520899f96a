//! Any bytes as the files of a tokenizer (`tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`, separated by a zero
//! byte), then a text: loaded, encoded and decoded without a panic.
#![no_main]

use arete_model::Tokenizer;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|content: &[u8]| {
    let directory = std::env::temp_dir().join(format!("arete-fuzz-tokenizer-{}", std::process::id()));
    fs_err::create_dir_all(&directory).expect("the temporary directory can be written");
    let mut parts = content.splitn(4, |byte| *byte == 0);
    for name in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
        let part = parts.next().unwrap_or(b"{}");
        fs_err::write(directory.join(name), part).expect("the directory can be written");
    }
    let text = String::from_utf8_lossy(parts.next().unwrap_or(b"Hello, world")).into_owned();
    if let Ok(tokenizer) = Tokenizer::from_directory(&directory) {
        if let Ok(ids) = tokenizer.encode(&text, true) {
            let _ = tokenizer.decode(&ids);
        }
        let _ = tokenizer.template();
    }
});
