//! AdamW against PyTorch's (`scripts/goldens/training.py`), and what it does with gradients that are not finite.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

use std::collections::BTreeMap;

use arete_training::{AdamW, AdamWConfig, Error};
use tch::{Kind, Tensor};

fn goldens() -> BTreeMap<String, Tensor> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/adamw.safetensors");
    Tensor::read_safetensors(path).unwrap().into_iter().collect()
}

fn optimiser(goldens: &BTreeMap<String, Tensor>) -> (AdamW, [Tensor; 2]) {
    let leaves =
        ["a", "b"].map(|name| goldens[&format!("start.{name}")].copy().set_requires_grad(true));
    let named = ["a", "b"].iter().zip(&leaves);
    let parameters = named.map(|(name, leaf)| ((*name).to_owned(), leaf.shallow_clone())).collect();
    let config = AdamWConfig { weight_decay: 0.1, ..AdamWConfig::default() };
    (AdamW::new(parameters, config).unwrap(), leaves)
}

/// Puts the gradients of a step there through a backward pass, in two halves, as micro-batches would.
fn backward(goldens: &BTreeMap<String, Tensor>, leaves: &[Tensor; 2], step: usize) {
    for _ in 0..2 {
        for (name, leaf) in ["a", "b"].iter().zip(leaves) {
            let gradient = &goldens[&format!("grad.{step}.{name}")];
            (leaf * gradient * 0.5).sum(Kind::Float).backward();
        }
    }
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    f64::try_from((a.detach() - b).abs().max()).unwrap()
}

#[test]
fn six_steps_are_those_of_pytorch() {
    let goldens = goldens();
    let rates: Vec<f64> = Vec::try_from(&goldens["learning_rate"]).unwrap();
    let norms: Vec<f32> = Vec::try_from(&goldens["norm"]).unwrap();
    let (mut optimiser, leaves) = optimiser(&goldens);
    for (step, rate) in rates.into_iter().enumerate() {
        backward(&goldens, &leaves, step);
        let norm = optimiser.step(rate, Some(1.0), step as u64 + 1).unwrap();
        assert!((norm - f64::from(norms[step])).abs() < 1e-6 * norm, "norm of step {step}");
        for (name, leaf) in ["a", "b"].iter().zip(&leaves) {
            let difference = largest_difference(leaf, &goldens[&format!("{step}.{name}")]);
            assert!(difference < 1e-6, "{name} after step {step}: {difference}");
        }
    }
}

#[test]
fn a_saved_state_continues_to_the_bit() {
    let goldens = goldens();
    let rate = 1e-2;
    let (mut whole, whole_leaves) = optimiser(&goldens);
    let (mut first, first_leaves) = optimiser(&goldens);
    for step in 0..3 {
        backward(&goldens, &whole_leaves, step);
        whole.step(rate, None, 1).unwrap();
        backward(&goldens, &first_leaves, step);
        first.step(rate, None, 1).unwrap();
    }
    let state: BTreeMap<String, Tensor> =
        first.state("x").into_iter().map(|(name, tensor)| (name, tensor.copy())).collect();
    let (mut second, second_leaves) = optimiser(&goldens);
    backward(&goldens, &second_leaves, 0); // gradients left over are not to count
    second.load_state("x", &state).unwrap();
    for step in 3..6 {
        backward(&goldens, &whole_leaves, step);
        whole.step(rate, None, 1).unwrap();
        backward(&goldens, &second_leaves, step);
        second.step(rate, None, 1).unwrap();
    }
    for (ours, theirs) in whole.state("x").iter().zip(second.state("x")) {
        assert_eq!(ours.0, theirs.0);
        assert!(ours.1.equal(&theirs.1), "{}", ours.0);
    }
    assert!(whole_leaves[0].equal(&second_leaves[0]));
}

#[test]
fn a_state_of_another_shape_is_refused() {
    let goldens = goldens();
    let (mut optimiser, leaves) = optimiser(&goldens);
    let mut state: BTreeMap<String, Tensor> = optimiser.state("x").into_iter().collect();
    state.insert(
        "x/second_moment/b".to_owned(),
        Tensor::zeros([4], (Kind::Float, tch::Device::Cpu)),
    );
    let error = optimiser.load_state("x", &state).unwrap_err().to_string();
    assert!(error.contains("`x/second_moment/b`") && error.contains("got shape [4]"), "{error}");
    state.remove("x/second_moment/b");
    assert!(optimiser.load_state("x", &state).is_err());
    assert!(leaves[0].equal(&goldens["start.a"]));
}

#[test]
fn a_gradient_that_is_not_finite_is_named_and_changes_nothing() {
    let goldens = goldens();
    for bad in [f64::NAN, f64::INFINITY] {
        let (mut optimiser, leaves) = optimiser(&goldens);
        backward(&goldens, &leaves, 0);
        (leaves[1].get(2) * bad).backward();
        let before: Vec<Tensor> =
            optimiser.state("x").into_iter().map(|(_, tensor)| tensor.copy()).collect();
        match optimiser.step(1e-2, Some(1.0), 7).unwrap_err() {
            Error::NonFinite { step: 7, what } => assert_eq!(what, "the gradient of b"),
            other => panic!("{other}"),
        }
        for (before, (name, after)) in before.iter().zip(optimiser.state("x")) {
            assert!(before.equal(&after), "{name}");
        }
        assert_eq!(optimiser.n_steps(), 0);
    }
}

#[test]
fn unusable_parameters_are_refused() {
    let tensor = || Tensor::zeros([2], (Kind::Float, tch::Device::Cpu)).set_requires_grad(true);
    let refuse = |parameters: Vec<(&str, Tensor)>| {
        let named = parameters.into_iter().map(|(name, tensor)| (name.to_owned(), tensor));
        AdamW::new(named.collect(), AdamWConfig::default()).unwrap_err().to_string()
    };
    assert!(refuse(vec![]).contains("got none"));
    assert!(refuse(vec![("a", tensor()), ("a", tensor())]).contains("`a` twice"));
    assert!(refuse(vec![("a", tensor().detach())]).contains("requires_grad false"));
    let half = Tensor::zeros([2], (Kind::BFloat16, tch::Device::Cpu)).set_requires_grad(true);
    assert!(refuse(vec![("a", half)]).contains("BFloat16"));
}
