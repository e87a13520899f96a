//! Memory that runs out in a training pass: an allocation of libtorch's is refused somewhere within a step, and the step ends with the
//! same bytes; where all are refused, the error says what to set.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]
#![expect(unsafe_code, reason = "an allocator's function is")]

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::path::Path;

use arete_dpo::config::LossType;
use arete_dpo::loss::LossSettings;
use arete_dpo::objective::DirectPreference;
use arete_model::{
    Adapter, Device, Kind, LoadOptions, LoraConfig, Model, ScalarHead, Source, Tensor,
};
use arete_ppo::models::{Learning, Models};
use arete_ppo::packs::PackedRollout;
use arete_ppo::rollout::{Conversation, Reply};
use arete_ppo::update::{Optimisers, Rates, Targets, update};
use arete_records::{Class, FinishReason};
use arete_reward::objective::BradleyTerry;
use arete_sft::objective::CrossEntropy;
use arete_training::{
    AdamW, AdamWConfig, Error, Objective, Passes, Ranks, Reduce, class_of, class_within, shards,
};
use clap::Parser;

// ---- refusing ----

thread_local! {
    /// How many tensors this thread still gets before one is refused; after that all, or none.
    static LEFT: Cell<u64> = const { Cell::new(u64::MAX) };
    static REFUSES_ALL: Cell<bool> = const { Cell::new(false) };
}

/// Bytes from which memory is a tensor's that counts.
const TENSOR_BYTES: usize = 1024;
const ENOMEM: c_int = 12;

unsafe extern "C" {
    fn aligned_alloc(alignment: usize, size: usize) -> *mut c_void;
}

/// Where libtorch gets its tensors' memory: a program's own function comes before the C library's.
#[unsafe(no_mangle)]
extern "C" fn posix_memalign(out: *mut *mut c_void, alignment: usize, size: usize) -> c_int {
    if size >= TENSOR_BYTES {
        let left = LEFT.get();
        LEFT.set(left.saturating_sub(1));
        if left == 0 {
            LEFT.set(if REFUSES_ALL.get() { 0 } else { u64::MAX });
            return ENOMEM;
        }
    }
    // SAFETY: the C library's own, whose memory `free` takes as it takes that of its `posix_memalign`.
    let memory = unsafe { aligned_alloc(alignment, size) };
    if memory.is_null() {
        return ENOMEM;
    }
    // SAFETY: the caller's promise.
    unsafe { out.write(memory) };
    0
}

/// Refuses the tensor after so many others, or from there on all.
fn refuse(after: Option<u64>, all: bool) {
    LEFT.set(after.unwrap_or(u64::MAX));
    REFUSES_ALL.set(all);
}

// ---- training ----

fn model(dtype: Kind) -> Model {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny-chat");
    let options = LoadOptions { device: Device::Cpu, dtype, nf4: None };
    Model::load(&Source::Directory(path), &options).unwrap()
}

fn ids(seed: i64, n: i64) -> Vec<i64> {
    (0..n).map(|k| (seed * 31 + k * 7 + k * k) % 200 + 20).collect()
}

/// A question that both sides share, and an answer each.
fn sides(seed: i64) -> [Vec<i64>; 2] {
    [1, 2].map(|side| [ids(seed, 9), ids(seed + 10 * side, 8 + side)].concat())
}

/// What a trainer is, to be trained two steps of four examples in two shards.
#[derive(Clone, Copy, Debug)]
enum Trainer {
    Sft,
    Reward,
    Dpo,
}

fn values(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.detach().view([-1])).unwrap()
}

/// The trained tensors after two steps, in the first of which memory is refused, and whether less was kept from there on.
fn trained(
    trainer: Trainer,
    model: &Model,
    recompute: bool,
    after: Option<u64>,
    all: bool,
) -> Result<(Vec<f32>, bool), Error> {
    let config = LoraConfig { rank: 4, ..LoraConfig::default() };
    let mut adapter = Adapter::new("a", &model.config, &config, 3, Device::Cpu).unwrap();
    adapter.set_trainable(true);
    let mut head = ScalarHead::zeros(model.config.hidden_size, Device::Cpu);
    head.set_trainable(true);
    let mut parameters = adapter.parameters();
    let decoder = &model.decoder;
    let passes = Passes::new(30, recompute);
    let examples: Vec<_> = (0..4)
        .map(|seed| arete_sft::data::Example {
            token_ids: ids(seed, 12),
            target: (0..12).map(|token| token > 5).collect(),
        })
        .collect();
    let scored: Vec<_> = (0..4)
        .map(|seed| {
            let [chosen, rejected] = sides(seed)
                .map(|token_ids| arete_reward::data::Sequence { token_ids, n_own_tokens: 4 });
            let (n_shared, chosen_prob, margin) = (9, 0.8, 0.0);
            arete_reward::data::Pair { chosen, rejected, n_shared, chosen_prob, margin }
        })
        .collect();
    let preferred: Vec<_> = (0..4)
        .map(|seed| {
            let [chosen, rejected] = sides(seed).map(|token_ids| {
                let counted = (9..token_ids.len()).collect();
                arete_dpo::data::Sequence { token_ids, counted, n_own_tokens: 4 }
            });
            arete_dpo::data::Pair::new(chosen, rejected, 1.0, 0)
        })
        .collect();
    let mut objective: Box<dyn Objective> = match trainer {
        Trainer::Sft => Box::new(CrossEntropy {
            decoder,
            adapter: &adapter,
            train: &examples,
            validation: &[],
            passes: passes.clone(),
        }),
        Trainer::Reward => {
            parameters.push(("head".to_owned(), head.weight.shallow_clone()));
            Box::new(BradleyTerry {
                decoder,
                adapter: &adapter,
                head: &head,
                train: &scored,
                validation: &[],
                center: 0.0,
                passes: passes.clone(),
                evaluated: None,
            })
        }
        Trainer::Dpo => {
            let loss =
                LossSettings { loss_type: LossType::Sigmoid, beta: 0.1, label_smoothing: 0.0 };
            let (train, validation) = (&preferred[..], &[][..]);
            Box::new(DirectPreference::new(
                decoder,
                &adapter,
                (train, validation),
                loss,
                passes.clone(),
            ))
        }
    };
    let mut optimiser = AdamW::new(parameters, AdamWConfig::default()).unwrap();
    let step = [0, 1, 2, 3];
    for number in 0..2 {
        let mut armed = number == 0;
        let work = |shard: usize| {
            if std::mem::take(&mut armed) {
                refuse(after, all);
            }
            let numbers = objective.accumulate(&step[2 * shard..][..2], &step, 1.0);
            if !all {
                refuse(None, false);
            }
            numbers
        };
        let optimisers = &mut [&mut optimiser];
        let found = shards::accumulate(
            &passes,
            &Ranks::alone(),
            Reduce::Ordered,
            &[2, 2],
            optimisers,
            work,
        );
        refuse(None, false);
        found?;
        optimiser.step(1e-2, Some(1.0), number + 1)?;
    }
    let weights = optimiser.parameters().flat_map(|(_, tensor)| values(tensor)).collect();
    Ok((weights, passes.recompute()))
}

/// Wherever it happens: in the forward pass, in the loss, in the backward pass.
#[test]
fn an_allocation_refused_within_a_step_changes_no_byte() {
    for dtype in [Kind::Float, Kind::BFloat16] {
        let model = model(dtype);
        for trainer in [Trainer::Sft, Trainer::Reward, Trainer::Dpo] {
            let trained = |recompute, after| trained(trainer, &model, recompute, after, false);
            let (expected, saves) = trained(false, None).unwrap();
            assert!(!saves);
            let mut n_refused = 0;
            let mut after = 0;
            loop {
                let (weights, saves) = trained(false, Some(after)).unwrap();
                assert_eq!(weights, expected, "{trainer:?} in {dtype:?}, after {after}");
                if !saves {
                    break; // so many a step does not ask for
                }
                n_refused += 1;
                after = after * 5 / 4 + 1;
            }
            assert!(n_refused >= 10, "{trainer:?}: {n_refused}");
            assert_eq!(trained(true, None).unwrap().0, expected, "{trainer:?}: recomputed");
        }
    }
}

#[test]
fn a_step_that_does_not_fit_says_what_to_set() {
    let model = model(Kind::Float);
    for trainer in [Trainer::Sft, Trainer::Reward, Trainer::Dpo] {
        for recompute in [false, true] {
            let error = trained(trainer, &model, recompute, Some(20), true).unwrap_err();
            let full = matches!(error, Error::OutOfMemory { micro_batch_tokens: 30, .. });
            assert!(full && class_of(&error) == Some(Class::Memory), "{trainer:?}: {error:?}");
            let message = error.to_string();
            let parts = ["can't allocate memory", "micro_batch_tokens below 30", "nf4 = true"];
            assert!(parts.iter().all(|part| message.contains(part)), "{message}");
        }
    }
}

// ---- PPO ----

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    config: arete_ppo::Config,
}

/// When memory is refused.
#[derive(Clone, Copy, Debug, PartialEq)]
enum When {
    Never,
    /// In the first pass, whose graphs are kept, after so many tensors.
    FirstPass(u64),
    /// In the first update from them.
    Update(u64),
    /// There, and again.
    Always,
}

/// Weights of policy and critic after an update, and whether graphs would still be kept.
fn updated(model: &Model, value: &str, when: When) -> anyhow::Result<(Vec<f32>, bool)> {
    let flags = ["ppo", "--rank", "4", "--rollout-size", "4", "--epochs", "2", "--value", value];
    let flags = [&flags[..], &["--target-kl", "0", "--micro-batch-tokens", "30"]].concat();
    let config = Cli::try_parse_from(flags).unwrap().config;
    let conversations: Vec<Conversation> = (0..4)
        .map(|seed| Conversation {
            prompt: seed as usize,
            token_ids: ids(seed, 14),
            n_prompt: 6,
            replies: vec![Reply { tokens: 6..14, finish_reason: FinishReason::Stop }],
            sampled_logprob: Vec::new(),
            messages: Vec::new(),
        })
        .collect();
    let ranks = Ranks::alone();
    let models = Models::new(&model.decoder, &config)?;
    let mut optimisers = Optimisers::new(&models, &config)?;
    let packed = PackedRollout::new(&conversations, &config, 1)?;
    let both = Learning::Both;
    if let When::FirstPass(after) = when {
        refuse(Some(after), false);
    }
    let first = packed.first_pass(&ranks, &models, both)?;
    refuse(None, false);
    let n = packed.n_own() as i64;
    let advantage = Tensor::arange(n, (Kind::Float, Device::Cpu)).sin();
    let targets = Targets::of_critic(advantage.copy(), advantage * 0.5);
    match when {
        When::Update(after) => refuse(Some(after), false),
        When::Always => refuse(Some(30), true),
        _ => {}
    }
    let rates = Rates { policy: 1e-2, critic: 1e-2 };
    let report =
        update(&ranks, &models, &mut optimisers, &packed, first, &targets, &config, both, rates, 1);
    refuse(None, false);
    assert_eq!(report?.n_steps, 2);
    let critic = optimisers.critic.iter().flat_map(|critic| critic.parameters());
    let weights =
        optimisers.policy.parameters().chain(critic).flat_map(|(_, tensor)| values(tensor));
    Ok((weights.collect(), models.passes.keeps_graphs()))
}

#[test]
fn an_allocation_refused_within_an_update_changes_no_byte() {
    let model = model(Kind::Float);
    for value in ["trunk", "adapter"] {
        let (expected, keeps) = updated(&model, value, When::Never).unwrap();
        assert!(keeps);
        let places = [0, 3, 10, 25, 45];
        let whens = places.map(When::FirstPass).into_iter().chain(places.map(When::Update));
        for when in whens {
            let (weights, keeps) = updated(&model, value, when).unwrap();
            assert!(!keeps, "{when:?}: not refused");
            assert_eq!(weights, expected, "{value}, {when:?}");
        }
        let error = updated(&model, value, When::Always).unwrap_err();
        assert_eq!(class_within(&error), Some(Class::Memory), "{error:#}");
        assert!(error.to_string().contains("set micro_batch_tokens below 30"), "{error:#}");
    }
}
