//! Tests against published numbers of parameters.

use super::*;

fn golden(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/goldens").join(name)
}

fn settings() -> Settings {
    Settings { rank: 16, targets: Target::ALL.to_vec(), ..Settings::new(Dtype::Auto, false) }
}

/// Mistral-7B: 7,241,732,096 parameters, as published; 2 × 32,000 × 4,096 in the vocabulary, 266,240 in norms.
#[test]
fn the_weights_of_mistral_7b_are_counted_right() {
    let path = golden("config/mistral_7b_instruct_v0.2.json");
    let (config, stored) = shape(path.to_str().unwrap()).unwrap();
    let cuda = Device::Cuda(0);
    let dense = settings();
    let angles = 32_768 * 128 * 4;
    let counted = Counter::new(&config, &dense, cuda, stored).weights();
    assert_eq!(counted - angles, 2 * 7_241_732_096);
    // Four bits and a sixteenth of four bytes for each of the blocks' numbers.
    let packed = Settings { nf4: true, ..dense };
    let blocks = 7_241_732_096 - 2 * 32_000 * 4096 - 266_240;
    let counted = Counter::new(&config, &packed, cuda, stored).weights();
    assert_eq!(counted - angles, 2 * (2 * 32_000 * 4096 + 266_240) + blocks / 2 + blocks / 16);
    // With scales in eight bits a sixty-fourth of a byte and 8 bytes for 256 scales; the CPU holds them in f32 all the same.
    let double = Settings { double_quantize: true, ..packed.clone() };
    let saved = blocks / 16 - (blocks / 64 + blocks / 64 / 256 * 8);
    assert_eq!(Counter::new(&config, &double, cuda, stored).weights(), counted - saved);
    let [a, b] = [&double, &packed]
        .map(|settings| Counter::new(&config, settings, Device::Cpu, stored).weights());
    assert_eq!(a, b);
    // peft 0.21: 41,943,040 trainable parameters at rank 16 on all seven layers.
    assert_eq!(Counter::new(&config, &packed, cuda, stored).adapter_size(), 41_943_040);
}

#[test]
fn directories_are_counted_as_they_are_stored() {
    let stored = |directory: &Path| shape(directory.to_str().unwrap()).unwrap().1;
    assert_eq!(stored(&golden("llama_untied")), 4, "f32");
    let directory = tempfile::tempdir().unwrap();
    let half = directory.path().join("half");
    let source = Source::Directory(golden("llama_untied"));
    let extra = serde_json::Map::new();
    arete_model::adapter::merge::write_model(
        &source,
        None,
        None,
        &half,
        Kind::BFloat16,
        None,
        extra,
    )
    .unwrap();
    assert_eq!(stored(&half), 2);
    fs_err::remove_file(half.join("model.safetensors")).unwrap();
    assert_eq!(stored(&half), 2, "a configuration alone");
}

#[test]
fn passes_hold_whole_items() {
    use super::count::largest_pass;
    assert_eq!(largest_pass(16, 100, 2048).tokens, 1600);
    assert_eq!(largest_pass(16, 300, 2048).tokens, 1800);
    assert_eq!(largest_pass(16, 3000, 2048).tokens, 3000);
}
