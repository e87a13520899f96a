//! Any bytes as a safetensors file: opened, and every tensor read, without a panic.
#![no_main]

use arete_model::checkpoint::safetensors::SafetensorsFile;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|content: &[u8]| {
    let path = std::env::temp_dir().join(format!("arete-fuzz-{}.safetensors", std::process::id()));
    fs_err::write(&path, content).expect("the temporary directory can be written");
    if let Ok(file) = SafetensorsFile::open(&path) {
        for name in file.names() {
            let tensor = file.tensor(name).expect("an opened file can be read");
            assert_eq!(Some(tensor.size().as_slice()), file.shape(name));
        }
    }
});
