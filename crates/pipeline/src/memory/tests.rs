//! Tests against published numbers of parameters, and of what fits after which changes.

use super::*;
use crate::setup::SetupArgs;

fn golden(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/goldens").join(name)
}

fn settings() -> Settings {
    let setup = Setup::new(&SetupArgs::default()).unwrap();
    sft(&setup).unwrap().settings
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
    let extra = Map::new();
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
fn changes_are_made_until_it_fits_and_no_further() {
    let need = |s: &Settings| {
        1000 - 300 * u64::from(s.recompute)
            - 400 * u64::from(s.nf4)
            - u64::from(s.micro_batch_tokens == 512)
    };
    let fit = |bytes| fit(bytes, &TRAINING_KEYS, &settings(), need);
    assert_eq!(fit(1000), Ok(vec![]));
    assert_eq!(fit(700), Ok(vec!["recompute = true".to_owned()]));
    let both = ["recompute = true", "nf4 = true"].map(str::to_owned).to_vec();
    assert_eq!(fit(300), Ok(both));
    assert_eq!(fit(200), Err(299));
}

#[test]
fn passes_hold_whole_items() {
    use super::count::largest_pass;
    assert_eq!(largest_pass(16, 100, 2048).tokens, 1600);
    assert_eq!(largest_pass(16, 300, 2048).tokens, 1800);
    assert_eq!(largest_pass(16, 3000, 2048).tokens, 3000);
}

#[test]
fn settings_that_leave_nothing_to_compute_are_named() {
    for (setting, words) in [
        ("sft.max_length=0", "[sft] max_length: expected at least 1, got 0"),
        ("ppo.max_new_tokens=0", "[ppo] max_new_tokens: expected at least 1"),
    ] {
        let arguments = SetupArgs { set: vec![setting.parse().unwrap()], ..SetupArgs::default() };
        let setup = Setup::new(&arguments).unwrap();
        let demands = [sft(&setup), ppo(&setup)];
        let error = demands.into_iter().find_map(Result::err).expect(setting);
        assert!(error.to_string().contains(words), "{error}");
    }
    let arguments = SetupArgs {
        set: vec![
            "ppo.keep_graph_tokens=0".parse().unwrap(),
            "ppo.rollout=answer".parse().unwrap(),
        ],
        ..SetupArgs::default()
    };
    let demand = ppo(&Setup::new(&arguments).unwrap()).unwrap();
    assert_eq!((demand.settings.keep_graph_tokens, demand.settings.turns), (0, 1));
}
