//! Any bytes as a GGUF file: opened, and every tensor read, without a panic.
#![no_main]

use arete_model::Kind;
use arete_model::checkpoint::gguf::Gguf;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|content: &[u8]| {
    let path = std::env::temp_dir().join(format!("arete-fuzz-{}.gguf", std::process::id()));
    fs_err::write(&path, content).expect("the temporary directory can be written");
    if let Ok(file) = Gguf::open(&path) {
        for (name, entry) in file.tensors() {
            let tensor = file.tensor(name).expect("an opened file can be read");
            assert_eq!(tensor.size(), entry.shape);
            let _ = file.tensor_as(name, Kind::BFloat16, Some(2));
        }
    }
});
