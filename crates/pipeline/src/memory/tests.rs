//! What of a recipe is counted, and what fits after which changes.

use super::*;
use crate::setup::SetupArgs;

#[test]
fn a_stage_that_does_not_fit_the_gpu_is_refused_with_what_would_fit() {
    use crate::check::{self, Room};
    let setup = Setup::new(&SetupArgs::default()).unwrap();
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../model/tests/goldens/config/mistral_7b_instruct_v0.2.json"
    );
    let shape = Shape::of(path, Some("cuda"), 200).unwrap();
    let steps = crate::steps::of(&setup).unwrap();
    let with_gpu = |bytes: u64| {
        let memory = super::Room { total: Some(bytes), free: Some(bytes) };
        let room = Room { memory, free_disk: None };
        check::room(&setup, &shape, &steps, room)
    };
    with_gpu(1_000_000_000_000).unwrap();
    let message = with_gpu(15_000_000_000).unwrap_err().to_string();
    let parts = ["of the GPU's memory", "free are 15.0 GB", "it fits with ", "nf4 = true"];
    assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    let message = with_gpu(1_000_000_000).unwrap_err().to_string();
    assert!(message.contains("with everything that saves memory it needs"), "{message}");
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
