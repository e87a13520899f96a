//! `arete plan --cluster`: how long a step of each training stage, and an iteration of PPO, would take on given engines, trainers
//! and links, by a simulated clock.
//!
//! Phases follow each other, as they do in the trainers, and each is as slow as its slowest process: parts are whole prompts,
//! conversations and shards. Lengths are those at which the recipe cuts, so the clock is an upper bound where replies are shorter; rates
//! are yours to measure (`arete-ppo bench` and `arete-reward bench` print them, `timings.jsonl` has them). What is not in it: loading,
//! probes, checkpoints, and one phase going on beside another.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use arete_ppo::config::CriticKind;
use arete_records::files;
use arete_stage::exit::BadInput;
use serde::{Deserialize, Serialize};

use crate::memory::{self, Shape};
use crate::setup::Setup;

/// Bytes of a token of a sampled conversation on its way between processes: id, log-probability and text, as JSON.
const ROLLOUT_BYTES: f64 = 24.0;

/// What there is to compute with: a TOML file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// Processes that train.
    pub trainers: Trainers,
    /// Servers that sample; without them the trainers do.
    pub engines: Option<Engines>,
    /// The network between trainers.
    pub links: Links,
}

/// `[trainers]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trainers {
    /// How many.
    pub n: u64,
    /// Tokens a second that one samples, many conversations at a time.
    pub sampled_tokens_per_s: f64,
    /// Tokens a second through the model and out as scores or log-probabilities.
    pub forward_tokens_per_s: f64,
    /// Tokens a second there and back, with gradients.
    pub trained_tokens_per_s: f64,
}

/// `[engines]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Engines {
    /// How many.
    pub n: u64,
    /// Tokens a second that one samples, many conversations at a time.
    pub sampled_tokens_per_s: f64,
    /// Bytes a second from the trainer's adapter files to an engine.
    pub adapter_bytes_per_s: f64,
    /// Seconds an engine takes to load an adapter that has come.
    pub load_s: f64,
}

/// `[links]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Links {
    /// Bytes a second that one process can send.
    pub bytes_per_s: f64,
    /// Seconds a message takes at least.
    pub latency_s: f64,
}

impl Cluster {
    /// Reads and checks a file.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, an unknown key, a rate that is none.
    pub fn load(path: &Path) -> Result<Self> {
        let wrong = |what: String| BadInput(format!("{}: {what}", path.display()));
        let cluster: Self = toml::from_str(&files::read_text(path, files::MAX_SMALL_BYTES)?)
            .map_err(|error| wrong(error.to_string().trim_end().to_owned()))?;
        let Self { trainers, engines, links } = &cluster;
        let mut rates = vec![
            ("trainers.n", trainers.n as f64),
            ("trainers.sampled_tokens_per_s", trainers.sampled_tokens_per_s),
            ("trainers.forward_tokens_per_s", trainers.forward_tokens_per_s),
            ("trainers.trained_tokens_per_s", trainers.trained_tokens_per_s),
            ("links.bytes_per_s", links.bytes_per_s),
        ];
        let mut times = vec![("links.latency_s", links.latency_s)];
        if let Some(engines) = engines {
            rates.push(("engines.n", engines.n as f64));
            rates.push(("engines.sampled_tokens_per_s", engines.sampled_tokens_per_s));
            rates.push(("engines.adapter_bytes_per_s", engines.adapter_bytes_per_s));
            times.push(("engines.load_s", engines.load_s));
        }
        for (name, value) in rates {
            if !(value.is_finite() && value > 0.0) {
                return Err(wrong(format!("{name}: expected a number above 0, got {value}")).into());
            }
        }
        for (name, value) in times {
            if !(value.is_finite() && value >= 0.0) {
                let message = format!("{name}: expected a number of at least 0, got {value}");
                return Err(wrong(message).into());
            }
        }
        Ok(cluster)
    }
}

/// A stage's step, or PPO's iteration, by the clock.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Clock {
    /// The stage.
    pub stage: &'static str,
    /// `step` or `iteration`.
    pub of: &'static str,
    /// Processes that train.
    pub n_ranks: u64,
    /// Phases in order, with seconds.
    pub phases: Vec<(&'static str, f64)>,
    /// Bytes that a process sends.
    pub sent_bytes: u64,
}

impl Clock {
    /// All phases.
    pub fn seconds(&self) -> f64 {
        self.phases.iter().map(|(_, seconds)| seconds).sum()
    }
}

/// A batch that is trained on.
#[derive(Clone, Copy, Debug)]
struct Batch {
    items: u64,
    tokens_each: u64,
    shards: u64,
    /// Trained numbers, of each optimiser.
    parameters: [u64; 2],
}

impl Batch {
    /// Tokens of the process that has most: shards are whole.
    fn slowest_tokens(&self, n_ranks: u64) -> f64 {
        let shards = part(self.shards, n_ranks);
        (part(self.items, self.shards) * shards).min(self.items) as f64 * self.tokens_each as f64
    }

    /// Bytes that a process sends for one optimiser step: its shards' gradients in stretches, then its own sum
    /// (`arete_training::ranks`).
    fn sent_bytes(&self, n_ranks: u64) -> u64 {
        let shards = part(self.shards, n_ranks);
        let of = |n: u64| 4 * n.div_ceil(n_ranks) * (n_ranks - 1) * (shards + 1);
        self.parameters.into_iter().map(of).sum()
    }
}

/// The largest of `n` items' parts.
fn part(n: u64, n_parts: u64) -> u64 {
    n.div_ceil(n_parts)
}

/// A rollout and what is done with it.
#[derive(Clone, Copy, Debug)]
struct Rollout {
    prompts: u64,
    samples: u64,
    own_tokens: u64,
    /// Read by all reward models, of one conversation.
    scored_tokens: u64,
    batch: Batch,
    minibatches: u64,
    epochs: u64,
    /// The first pass is the first update's.
    keeps: bool,
}

fn exchange(links: &Links, bytes: u64, n_ranks: u64, n_operations: u64) -> f64 {
    if n_ranks == 1 {
        return 0.0;
    }
    let messages = n_operations * (n_ranks - 1);
    bytes as f64 / links.bytes_per_s + messages as f64 * links.latency_s
}

/// One step of SFT, reward modelling or DPO.
fn step(stage: &'static str, cluster: &Cluster, batch: Batch, n_ranks: u64) -> Clock {
    let sent_bytes = batch.sent_bytes(n_ranks);
    let learning = batch.slowest_tokens(n_ranks) / cluster.trainers.trained_tokens_per_s;
    // An exchange and a gathering of the gradients; signals, lengths and numbers of the shards.
    let sum = exchange(&cluster.links, sent_bytes, n_ranks, 6);
    let phases = vec![("forward and backward", learning), ("gradients", sum)];
    Clock { stage, of: "step", n_ranks, phases, sent_bytes }
}

/// One iteration of PPO.
fn iteration(cluster: &Cluster, rollout: &Rollout, n_ranks: u64) -> Clock {
    let Rollout { prompts, samples, own_tokens, batch, .. } = *rollout;
    let Cluster { trainers, engines, links } = cluster;
    let conversations = prompts * samples;
    let mut phases = Vec::new();
    let own_part = (part(prompts, n_ranks) * samples) as f64;
    if let Some(engines) = engines {
        let adapter = 4.0 * batch.parameters[0] as f64;
        phases.push((
            "adapter to the engines",
            adapter / engines.adapter_bytes_per_s + engines.load_s,
        ));
        let slowest = part(conversations, engines.n) * own_tokens;
        phases.push(("sampling", slowest as f64 / engines.sampled_tokens_per_s));
    } else {
        phases.push(("sampling", own_part * own_tokens as f64 / trainers.sampled_tokens_per_s));
    }
    let slowest = part(conversations, n_ranks) as f64;
    let forward = |tokens: u64| slowest * tokens as f64 / trainers.forward_tokens_per_s;
    phases.push(("scoring", forward(rollout.scored_tokens)));
    phases.push(("reference", forward(batch.tokens_each)));
    let first = batch.slowest_tokens(n_ranks) / trainers.forward_tokens_per_s;
    let updates =
        rollout.epochs as f64 * batch.slowest_tokens(n_ranks) / trainers.trained_tokens_per_s;
    phases.push(("first pass", if rollout.keeps { 0.0 } else { first }));
    phases.push(("update", updates));
    let steps = rollout.epochs * rollout.minibatches;
    let gradients = steps * batch.sent_bytes(n_ranks);
    let rollouts = own_part * batch.tokens_each as f64 * ROLLOUT_BYTES * (n_ranks - 1) as f64;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a whole number of bytes"
    )]
    let sent_bytes = gradients + rollouts as u64;
    phases.push(("rollouts and gradients", exchange(links, sent_bytes, n_ranks, 12 + 8 * steps)));
    Clock { stage: "ppo", of: "iteration", n_ranks, phases, sent_bytes }
}

/// The clocks of every training stage that is in, for one trainer and for all of them.
///
/// # Errors
///
/// Settings that are refused; more trainers than shards.
pub fn clocks(setup: &Setup, shape: &Shape, cluster: &Cluster) -> Result<Vec<Clock>> {
    let mut clocks = Vec::new();
    for stage in setup.stages()? {
        let name = stage.name;
        let demand = match name {
            "sft" => memory::sft(setup)?,
            "reward" => memory::reward(setup)?,
            "dpo" => memory::dpo(setup)?,
            "ppo" => memory::ppo(setup)?,
            _ => continue,
        };
        let counted = shape.training(&demand);
        let (shards, n) = (counted.shards, cluster.trainers.n);
        if n > shards {
            let message = format!(
                "[{name}] virtual_shards: expected at least the {n} trainers, got {shards}"
            );
            return Err(BadInput(message).into());
        }
        for n_ranks in [1, n].into_iter().take(if n == 1 { 1 } else { 2 }) {
            clocks.push(match name {
                "ppo" => iteration(cluster, &rollout(setup, &counted)?, n_ranks),
                _ => {
                    let sides = if name == "sft" { 1 } else { 2 };
                    let batch = Batch {
                        items: counted.batch_size,
                        tokens_each: sides * counted.length,
                        shards,
                        parameters: [counted.adapter, 0],
                    };
                    step(name, cluster, batch, n_ranks)
                }
            });
        }
    }
    Ok(clocks)
}

fn rollout(setup: &Setup, counted: &memory::Training) -> Result<Rollout> {
    let config: arete_ppo::Config = setup.settings("ppo")?;
    let (turns, conversations) = (counted.turns, config.rollout_size as u64);
    // The reward model of turn k reads the conversation through that turn.
    let through =
        |turn: u64| counted.length - (turns - 1 - turn) * (counted.length - counted.prompt) / turns;
    let own_critic = config.value == CriticKind::Adapter && !config.algorithm.is_group();
    let passes = if own_critic { 2 } else { 1 };
    Ok(Rollout {
        prompts: config.n_prompts() as u64,
        samples: config.samples_per_prompt as u64,
        own_tokens: turns * config.max_new_tokens as u64,
        scored_tokens: (0..turns).map(through).sum(),
        batch: Batch {
            items: conversations,
            tokens_each: passes * counted.length,
            shards: counted.shards,
            parameters: [counted.adapter, if own_critic { counted.adapter } else { 0 }],
        },
        minibatches: config.n_minibatches as u64,
        epochs: config.epochs,
        keeps: config.n_minibatches == 1
            && conversations * counted.length <= config.keep_graph_tokens as u64,
    })
}

/// As a table in Markdown.
pub fn text(clocks: &[Clock]) -> String {
    let mut text = String::from(
        "\n| stage | trainers | seconds | phases | a process sends |\n|---|---|---|---|---|\n",
    );
    for clock in clocks {
        let phases: Vec<String> = clock
            .phases
            .iter()
            .filter(|(_, seconds)| *seconds > 0.0)
            .map(|(name, seconds)| format!("{name} {seconds:.3}"))
            .collect();
        let Clock { stage, of, n_ranks, sent_bytes, .. } = clock;
        let megabytes = *sent_bytes as f64 / 1e6;
        writeln!(
            text,
            "| {stage}, {of} | {n_ranks} | {:.3} | {} | {megabytes:.1} MB |",
            clock.seconds(),
            phases.join(", ")
        )
        .expect("writing to a String cannot fail");
    }
    text + "\nA simulated clock at the rates of the cluster's file, for replies as long as the recipe lets them be.\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(n: u64) -> Cluster {
        Cluster {
            trainers: Trainers {
                n,
                sampled_tokens_per_s: 100.0,
                forward_tokens_per_s: 1000.0,
                trained_tokens_per_s: 500.0,
            },
            engines: None,
            links: Links { bytes_per_s: 1e6, latency_s: 0.001 },
        }
    }

    #[test]
    fn a_step_by_hand() {
        let batch = Batch { items: 20, tokens_each: 50, shards: 4, parameters: [1001, 0] };
        let one = step("reward", &cluster(1), batch, 1);
        assert_eq!((one.seconds(), one.sent_bytes), (2.0, 0));
        // Ten pairs each; two shards' gradients in stretches of 501 numbers, and the sum of one.
        let two = step("reward", &cluster(2), batch, 2);
        assert_eq!(two.sent_bytes, 4 * 501 * 3);
        assert!((two.seconds() - (1.0 + 0.006_012 + 0.006)).abs() < 1e-12, "{two:?}");
        // Three processes have two, one and one of four shards: no faster than two.
        let three = step("reward", &cluster(3), batch, 3);
        assert_eq!(three.phases[0].1, two.phases[0].1);
    }

    #[test]
    fn an_iteration_by_hand() {
        let batch = Batch { items: 8, tokens_each: 60, shards: 4, parameters: [1000, 0] };
        let rollout = Rollout {
            prompts: 8,
            samples: 1,
            own_tokens: 30,
            scored_tokens: 120,
            batch,
            minibatches: 2,
            epochs: 2,
            keeps: false,
        };
        // 240 sampled at 100; 960, 480, 480 read at 1000; 2 · 480 trained at 500.
        let alone = iteration(&cluster(1), &rollout, 1);
        let expected = [2.4, 0.96, 0.48, 0.48, 1.92, 0.0];
        assert_eq!(alone.phases.iter().map(|phase| phase.1).collect::<Vec<_>>(), expected);
        let two = iteration(&cluster(2), &rollout, 2);
        let computed: f64 = two.phases[..5].iter().map(|phase| phase.1).sum();
        assert!((computed - 6.24 / 2.0).abs() < 1e-12);
        // Four steps of 4 · 500 · 3 bytes, and half the rollout.
        assert_eq!(two.sent_bytes, 4 * 6000 + 4 * 60 * 24);
        let engines =
            Engines { n: 4, sampled_tokens_per_s: 300.0, adapter_bytes_per_s: 4000.0, load_s: 0.5 };
        let with = Cluster { engines: Some(engines), ..cluster(2) };
        let with = iteration(&with, &rollout, 2);
        assert_eq!(with.phases[..2], [("adapter to the engines", 1.5), ("sampling", 0.2)]);
    }

    #[test]
    fn a_file_of_rates_is_checked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cluster.toml");
        let good = "[trainers]\nn = 2\nsampled_tokens_per_s = 1\nforward_tokens_per_s = 1\ntrained_tokens_per_s = 1\n\
                    [links]\nbytes_per_s = 1e9\nlatency_s = 0\n";
        fs_err::write(&path, good).unwrap();
        assert_eq!(Cluster::load(&path).unwrap().trainers.n, 2);
        for (from, to, message) in [
            ("n = 2", "n = 0", "trainers.n: expected a number above 0, got 0"),
            (
                "latency_s = 0",
                "latency_s = -1",
                "links.latency_s: expected a number of at least 0, got -1",
            ),
            ("bytes_per_s", "bytes", "unknown field `bytes`"),
        ] {
            fs_err::write(&path, good.replace(from, to)).unwrap();
            let refused = Cluster::load(&path).unwrap_err().to_string();
            assert!(refused.contains(message), "{refused}");
        }
    }
}
