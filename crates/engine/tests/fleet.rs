//! The fleet against servers that behave, fail and lie: each refused or survived by name.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

#[path = "support/stand_in.rs"]
mod stand_in;

use std::path::{Path, PathBuf};
use std::time::Duration;

use arete_chain::Turns;
use arete_chain::sample::{SampledChain, Start};
use arete_engine::canary::{Canary, Looks};
use arete_engine::chains::{self, Asked, Counts};
use arete_engine::fleet::Tenant;
use arete_engine::journal::{Journal, ScoreJournal};
use arete_engine::scores::{Scorers, Served};
use arete_engine::{Dialect, EngineArgs, Error, Fleet, ServerConfig};
use arete_model::adapter::{self, AdapterMeta, Task};
use arete_model::generate::{Sampling, Stream};
use arete_model::{
    Adapter, Device, Kind, LoadOptions, LoraConfig, Message, Model, ScalarHead, Source, Target,
    Tensor, random,
};
use stand_in::{StandIn, Weights};

fn tiny_chat() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-chat")
}

fn tiny_model() -> Model {
    let options = LoadOptions { device: Device::Cpu, dtype: Kind::Float, nf4: None };
    Model::load(&Source::Directory(tiny_chat()), &options).unwrap()
}

/// An adapter whose outputs differ from the base's by so much.
fn adapter(model: &Model, seed: u64, size: f64) -> Adapter {
    let lora = LoraConfig { rank: 4, alpha: 8.0, targets: Target::ALL.to_vec() };
    let adapter = Adapter::new("policy", &model.config, &lora, seed, Device::Cpu).unwrap();
    let _guard = tch::no_grad_guard();
    for (idx, (name, mut tensor)) in adapter.parameters().into_iter().enumerate() {
        if name.contains("lora_B") {
            let values = random::normal(seed, &format!("b{idx}"), tensor.numel(), size);
            tensor.copy_(&Tensor::from_slice(&values).view_as(&tensor));
        }
    }
    adapter
}

fn args(servers: &[&StandIn]) -> EngineArgs {
    EngineArgs {
        engine_urls: Some(servers.iter().map(|server| server.url.clone()).collect()),
        engine_adapter_dir: None,
        engine_server_dir: None,
        engine_model: None,
        engine_dialect: Dialect::Vllm,
        engine_tolerance: 0.02,
        engine_wait_s: 2.0,
    }
}

fn config() -> ServerConfig {
    ServerConfig { concurrency: 4, attempts: 3, timeout_s: 5.0, backoff_s: 0.002 }
}

fn connect(model: &Model, args: &EngineArgs, dir: &Path) -> Result<Fleet, Error> {
    connect_with(model, args, &config(), dir)
}

fn connect_with(
    model: &Model,
    args: &EngineArgs,
    config: &ServerConfig,
    dir: &Path,
) -> Result<Fleet, Error> {
    let canary = Canary::of(model, &model.chat().unwrap()).unwrap();
    let dir = dir.join("engines");
    Fleet::connect(args, config, Tenant { run: "run", dir: &dir, is_first: true }, canary)
}

fn load(fleet: &mut Fleet, model: &Model, adapter: &Adapter) -> Result<(), Error> {
    let values = fleet.canary().under(model, adapter).unwrap();
    let meta = AdapterMeta::of(model, "tiny", Task::CausalLm);
    fleet
        .load(values, |path| Ok::<_, Error>(adapter::save(path, adapter, None, &meta)?))
        .map(|_| ())
}

/// Adapters that a server lists.
fn listed(server: &StandIn) -> Vec<String> {
    let body: serde_json::Value = {
        let agent: ureq::Agent = ureq::Agent::config_builder().build().into();
        let url = format!("{}/v1/models", server.url);
        agent.get(&url).call().unwrap().body_mut().read_json().unwrap()
    };
    let cards = body["data"].as_array().unwrap();
    let names = cards.iter().filter(|card| !card["parent"].is_null());
    names.map(|card| card["id"].as_str().unwrap().to_owned()).collect()
}

fn looks(error: &Error) -> Looks {
    match error {
        Error::Weights { verdict, .. } => verdict.looks,
        other => panic!("{other}"),
    }
}

#[test]
fn adapters_are_loaded_everywhere_under_fresh_names_and_the_old_ones_go() {
    let (model, dir) = (tiny_model(), tempfile::tempdir().unwrap());
    let servers = [StandIn::serve(&tiny_chat()), StandIn::serve(&tiny_chat())];
    let args = args(&[&servers[0], &servers[1]]);
    let mut fleet = connect(&model, &args, dir.path()).unwrap();
    // A fresh adapter is the base; what is behind a slow file system is seen at the third look.
    servers[0].set(|behaviour| behaviour.unseen = 2);
    let mut seen = Vec::new();
    for size in [0.0, 0.05, 0.051] {
        load(&mut fleet, &model, &adapter(&model, 1, size)).unwrap();
        let name = fleet.adapter().unwrap().to_owned();
        for server in &servers {
            assert_eq!(listed(server), std::slice::from_ref(&name));
        }
        assert!(dir.path().join("engines").join(&name).join("adapter_config.json").is_file());
        assert_eq!(fs_err::read_dir(dir.path().join("engines")).unwrap().count(), 1);
        assert!(!seen.contains(&name));
        seen.push(name);
    }
    // Killed here, and started again: what is left goes before anything is loaded.
    drop(fleet);
    let fleet = connect(&model, &args, dir.path()).unwrap();
    assert!(servers.iter().all(|server| listed(server).is_empty()));
    assert_eq!(fs_err::read_dir(dir.path().join("engines")).unwrap().count(), 0);
    fleet.close().unwrap();
}

#[test]
fn servers_with_other_weights_are_refused_by_name() {
    let (model, dir) = (tiny_model(), tempfile::tempdir().unwrap());
    let (honest, liar) = (StandIn::serve(&tiny_chat()), StandIn::serve(&tiny_chat()));
    let (first, second) = (adapter(&model, 1, 0.05), adapter(&model, 2, 0.05));
    for (weights, expected, words) in [
        (Weights::Stale, Looks::Before, "stale"),
        (Weights::Base, Looks::Base, "answers with the base"),
        (Weights::Wrong, Looks::Other, "other weights"),
        (Weights::Half, Looks::Half { place: 0.5 }, "half-loaded"),
    ] {
        liar.set(|behaviour| behaviour.weights = Weights::Honest);
        let mut fleet = connect(&model, &args(&[&honest, &liar]), dir.path()).unwrap();
        load(&mut fleet, &model, &first).unwrap();
        liar.set(|behaviour| behaviour.weights = weights);
        let error = load(&mut fleet, &model, &second).unwrap_err();
        match (looks(&error), expected) {
            (Looks::Half { place }, Looks::Half { .. }) => {
                assert!((0.25..1.0).contains(&place), "{place}"); // the second layer has less to say
            }
            (found, expected) => assert_eq!(found, expected, "{error}"),
        }
        let text = error.to_string();
        assert!(text.contains(&liar.url) && text.contains(words), "{text}");
        // All or none: the honest one has let go of it, and holds the one before.
        assert_eq!(listed(&honest), [fleet.adapter().unwrap().to_owned()]);
        fleet.close().unwrap();
    }
}

#[test]
fn a_small_step_is_told_from_none() {
    // 0.1 % of the adapter, as one iteration at a small learning rate may move it.
    let (model, dir) = (tiny_model(), tempfile::tempdir().unwrap());
    let server = StandIn::serve(&tiny_chat());
    let mut fleet = connect(&model, &args(&[&server]), dir.path()).unwrap();
    load(&mut fleet, &model, &adapter(&model, 1, 0.05)).unwrap();
    load(&mut fleet, &model, &adapter(&model, 1, 0.0501)).unwrap();
    server.set(|behaviour| behaviour.weights = Weights::Stale);
    let error = load(&mut fleet, &model, &adapter(&model, 1, 0.0502)).unwrap_err();
    assert_eq!(looks(&error), Looks::Before, "{error}");
}

#[test]
fn servers_that_cannot_hold_adapters_say_what_they_lack() {
    let (model, dir) = (tiny_model(), tempfile::tempdir().unwrap());
    let server = StandIn::serve(&tiny_chat());
    server.set(|behaviour| behaviour.has_no_adapters = true);
    let mut fleet = connect(&model, &args(&[&server]), dir.path()).unwrap();
    let error = load(&mut fleet, &model, &adapter(&model, 1, 0.05)).unwrap_err().to_string();
    assert!(error.contains("VLLM_ALLOW_RUNTIME_LORA_UPDATING"), "{error}");
    assert!(error.contains(&server.url), "{error}");
    assert_eq!(fs_err::read_dir(dir.path().join("engines")).unwrap().count(), 0);
    // Nobody there at the start; another base.
    let nobody = EngineArgs {
        engine_urls: Some(vec!["http://127.0.0.1:9".to_owned()]),
        engine_wait_s: 0.0,
        ..args(&[])
    };
    let error = connect(&model, &nobody, dir.path()).unwrap_err().to_string();
    assert!(error.contains("127.0.0.1:9"), "{error}");
    let mut canary = Canary::of(&model, &model.chat().unwrap()).unwrap();
    canary.base.iter_mut().for_each(|value| *value -= 0.5);
    let tenant = Tenant { run: "run", dir: dir.path(), is_first: true };
    let error = Fleet::connect(&args(&[&server]), &config(), tenant, canary).unwrap_err();
    assert_eq!(looks(&error), Looks::Other, "{error}");
}

fn questions() -> Vec<Vec<Message>> {
    ["Any tips?", "Is it late?", "What comes first?", "Why should I help?", "How do I listen?"]
        .map(|question| vec![Message::user(question)])
        .to_vec()
}

/// Two samples of three turns for each of five questions.
fn sample(
    fleet: &mut Fleet,
    model: &Model,
    weights: chains::Weights,
    journal: &mut Journal,
) -> Result<(Vec<SampledChain>, Counts), Error> {
    let chat = model.chat().unwrap();
    let (turns, questions) = (Turns::default(), questions());
    let start = |(at, messages): (usize, &'_ Vec<Message>)| {
        let stream = |sample| Stream { seed: 5, prompt: at as u64, sample };
        (at, messages.clone(), vec![stream(0), stream(1)])
    };
    let owned: Vec<_> = questions.iter().enumerate().map(start).collect();
    let starts: Vec<Start<'_>> = owned
        .iter()
        .map(|(_, messages, streams)| {
            Start::new(&chat, messages, turns.questions(), streams.clone()).unwrap()
        })
        .collect();
    let asked = Asked {
        weights,
        sampling: Sampling::at(0.8),
        stop_ids: model.stop_ids().unwrap(),
        max_new_tokens: 10,
    };
    let mut out = vec![None; 2 * starts.len()];
    let counts = chains::sample(
        fleet,
        &chat,
        &starts,
        &asked,
        journal,
        &mut |_| Ok::<_, Error>(()),
        &mut |start, sample, chain| {
            out[2 * start + sample] = Some(chain.unwrap());
            Ok(())
        },
    )?;
    Ok((out.into_iter().map(Option::unwrap).collect(), counts))
}

#[test]
fn replies_are_the_tokens_and_log_probabilities_that_the_trainer_finds() {
    let (model, dir) = (tiny_model(), tempfile::tempdir().unwrap());
    let policy = adapter(&model, 1, 0.05);
    for dialect in [Dialect::Vllm, Dialect::Sglang] {
        let server = StandIn::serve(&tiny_chat());
        let args = EngineArgs { engine_dialect: dialect, ..args(&[&server]) };
        let mut fleet = connect(&model, &args, dir.path()).unwrap();
        load(&mut fleet, &model, &policy).unwrap();
        let (chains, _) =
            sample(&mut fleet, &model, chains::Weights::Adapter, &mut Journal::default()).unwrap();
        for chain in &chains {
            assert_eq!(chain.replies.len(), 3);
            let of_policy = logprobs(&model, Some(&policy), chain);
            let difference = difference(&of_policy, &chain.sampled_logprob);
            assert!(difference < 1e-4, "{difference}");
            // And not those of the base, which the adapter is far from.
            assert!(
                self::difference(&logprobs(&model, None, chain), &chain.sampled_logprob) > 0.05
            );
        }
        assert!(chains.iter().any(|chain| chain.token_ids != chains[0].token_ids));
        fleet.close().unwrap();
    }
}

/// log P of a chain's own tokens at the sampling temperature.
fn logprobs(model: &Model, adapter: Option<&Adapter>, chain: &SampledChain) -> Vec<f32> {
    let _guard = tch::no_grad_guard();
    let batch = arete_model::Batch::from_sequences(&[&chain.token_ids]);
    let rows: Vec<usize> = chain.own_tokens().collect();
    let hidden = model.decoder.forward(&batch, adapter).unwrap();
    let found =
        arete_model::logprobs::of_rows(&model.decoder, &hidden, &batch, &rows, 0.8, false).unwrap();
    Vec::try_from(found.logprob).unwrap()
}

fn difference(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max)
}

#[test]
fn a_server_that_dies_costs_the_replies_in_flight() {
    let (model, dir) = (tiny_model(), tempfile::tempdir().unwrap());
    let policy = adapter(&model, 1, 0.05);
    let alone = StandIn::serve(&tiny_chat());
    let mut fleet = connect(&model, &args(&[&alone]), dir.path()).unwrap();
    load(&mut fleet, &model, &policy).unwrap();
    let adapter = chains::Weights::Adapter;
    let (expected, counts) = sample(&mut fleet, &model, adapter, &mut Journal::default()).unwrap();
    assert_eq!((counts.n_lost, counts.n_known), (0, 0));
    fleet.close().unwrap();

    let servers = [StandIn::serve(&tiny_chat()), StandIn::serve(&tiny_chat())];
    let mut fleet = connect(&model, &args(&[&servers[0], &servers[1]]), dir.path()).unwrap();
    load(&mut fleet, &model, &policy).unwrap();
    servers[0].set(|behaviour| behaviour.dies_after = Some(5));
    servers[1].set(|behaviour| behaviour.failing = 1); // one refusal passes
    let (found, counts) = sample(&mut fleet, &model, adapter, &mut Journal::default()).unwrap();
    // Seeds are those of the conversations, so another server gives the same replies.
    assert_eq!(found, expected);
    assert!((1..=4).contains(&counts.n_lost), "{counts:?}");
    // Thirty replies in all; five of them came from the first, and were not asked for again.
    assert_eq!(servers[1].n_replies() - 1, 30 - 5);
}

#[test]
fn a_server_that_comes_back_gets_the_adapter_and_a_canary() {
    let (model, dir) = (tiny_model(), tempfile::tempdir().unwrap());
    let policy = adapter(&model, 1, 0.05);
    let mut server = StandIn::serve(&tiny_chat());
    let args = EngineArgs { engine_wait_s: 30.0, ..args(&[&server]) };
    let mut fleet = connect(&model, &args, dir.path()).unwrap();
    load(&mut fleet, &model, &policy).unwrap();
    let adapter = chains::Weights::Adapter;
    let (expected, _) = sample(&mut fleet, &model, adapter, &mut Journal::default()).unwrap();
    // Dead after five replies, and started again a moment later without any adapter.
    server.set(|behaviour| behaviour.dies_after = Some(30 + 5));
    let again = std::thread::spawn(move || {
        while server.n_replies() < 35 {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(100));
        server.restart();
        server
    });
    let (found, counts) = sample(&mut fleet, &model, adapter, &mut Journal::default()).unwrap();
    assert_eq!(found, expected);
    assert!(counts.n_lost > 0);
    let server = again.join().unwrap();
    assert_eq!(listed(&server), [fleet.adapter().unwrap().to_owned()]);

    // One that comes back with other weights is refused by name, in the middle of the work.
    server.set(|behaviour| {
        behaviour.dies_after = Some(server.n_replies() + 1);
        behaviour.weights = Weights::Wrong;
    });
    let mut server = server;
    let n_before = server.n_replies();
    server.restart();
    server.set(|behaviour| behaviour.dies_after = None);
    let error = sample(&mut fleet, &model, adapter, &mut Journal::default()).unwrap_err();
    assert_eq!(looks(&error), Looks::Other, "{error}");
    assert!(server.n_replies() > n_before);
}

#[test]
fn with_no_server_left_the_error_says_so_and_hangs_end() {
    let (model, dir) = (tiny_model(), tempfile::tempdir().unwrap());
    let policy = adapter(&model, 1, 0.05);
    let mut servers = [StandIn::serve(&tiny_chat()), StandIn::serve(&tiny_chat())];
    let args = EngineArgs { engine_wait_s: 0.3, ..args(&[&servers[0], &servers[1]]) };
    let config = ServerConfig { timeout_s: 1.0, ..config() };
    let mut fleet = connect_with(&model, &args, &config, dir.path()).unwrap();
    load(&mut fleet, &model, &policy).unwrap();
    let adapter = chains::Weights::Adapter;
    let path = dir.path().join("replies.jsonl");
    // One hangs, the other answers: what hung is asked for there.
    servers[0].set(|behaviour| behaviour.hangs = true);
    let mut journal = Journal::open(&path).unwrap();
    let (expected, counts) = sample(&mut fleet, &model, adapter, &mut journal).unwrap();
    assert!(counts.n_lost > 0);
    assert!(servers[1].n_replies() >= 30);
    servers.iter_mut().for_each(StandIn::kill);
    let error = sample(&mut fleet, &model, adapter, &mut Journal::default()).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::NoneLeft { n: 2, .. }), "{text}");
    assert!(text.contains("none of 2 servers is left"), "{text}");
    use arete_records::{Class, Classified};
    assert_eq!(error.class(), Some(Class::Unavailable)); // exit code 69
    // What the journal holds needs no server.
    let mut journal = Journal::open(&path).unwrap();
    let (replayed, counts) = sample(&mut fleet, &model, adapter, &mut journal).unwrap();
    assert_eq!((replayed, counts.n_sampled, counts.n_known), (expected, 0, 30));
}

#[test]
fn a_journal_makes_moody_servers_repeat_themselves() {
    let (model, dir) = (tiny_model(), tempfile::tempdir().unwrap());
    let server = StandIn::serve(&tiny_chat());
    server.set(|behaviour| behaviour.is_moody = true);
    let mut fleet = connect(&model, &args(&[&server]), dir.path()).unwrap();
    let base = chains::Weights::Base;
    let path = dir.path().join("replies.jsonl");
    let (first, _) = sample(&mut fleet, &model, base, &mut Journal::open(&path).unwrap()).unwrap();
    let (other, _) = sample(&mut fleet, &model, base, &mut Journal::default()).unwrap();
    assert_ne!(first, other);
    // Half of the lines, the last of them cut.
    let whole = fs_err::read(&path).unwrap();
    fs_err::write(&path, &whole[..whole.len() / 2]).unwrap();
    let n_before = server.n_replies();
    let mut journal = Journal::open(&path).unwrap();
    let n_kept = journal.n_known();
    assert!((5..25).contains(&n_kept), "{n_kept}");
    let (second, counts) = sample(&mut fleet, &model, base, &mut journal).unwrap();
    assert_eq!((counts.n_known, server.n_replies() - n_before), (n_kept, 30 - n_kept));
    let (third, counts) =
        sample(&mut fleet, &model, base, &mut Journal::open(&path).unwrap()).unwrap();
    assert_eq!(second, third);
    assert_eq!((counts.n_known, counts.n_sampled), (30, 0));
    // What was kept is as it was.
    let kept = first.iter().zip(&third).filter(|(a, b)| a.token_ids == b.token_ids).count();
    assert!(kept > 0 && first != third, "{kept}");
}

/// What two reward models, written below `dir`, score, and their scores.
fn reward_models(dir: &Path) -> (Vec<Vec<i64>>, Vec<Served>, Vec<Vec<f64>>) {
    let model = tiny_model();
    let chat = model.chat().unwrap();
    let sequences: Vec<Vec<i64>> =
        questions().iter().map(|messages| chat.render_prompt(messages).unwrap()).collect();
    let meta = AdapterMeta::of(&model, "tiny", Task::SequenceClassification);
    let (mut rewards, mut own) = (Vec::new(), Vec::new());
    for (seed, name) in [(3, "action"), (4, "motivation")] {
        let adapter = adapter(&model, seed, 0.05);
        let head = ScalarHead::normal(model.config.hidden_size, seed, Device::Cpu);
        let path = dir.join(name);
        adapter::save(&path, &adapter, Some(&head), &meta).unwrap();
        let scores = arete_chain::reward_model::sequence_scores(
            &model.decoder,
            Some(&adapter),
            &head,
            &sequences,
            1024,
        );
        own.push(scores.unwrap());
        rewards.push(Served { name: name.to_owned(), adapter: path });
    }
    (sequences, rewards, own)
}

#[test]
fn reward_models_on_a_server_score_as_here_and_others_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (sequences, rewards, own) = reward_models(dir.path());
    let servers = [StandIn::serve(&tiny_chat()), StandIn::serve(&tiny_chat())];
    let urls: Vec<String> = servers.iter().map(|server| server.url.clone()).collect();
    let scorers = Scorers::connect(&urls, &config(), &rewards).unwrap();
    for (reward, own) in rewards.iter().zip(&own) {
        let path = dir.path().join(format!("{}.jsonl", reward.name));
        let mut journal = ScoreJournal::open(&path).unwrap();
        let found = scorers.scores(&reward.name, &sequences, &mut journal).unwrap();
        // A second attempt asks for nothing, and has the same bits.
        let n_asked =
            servers.iter().map(|server| server.requests("/classify").len()).sum::<usize>();
        let mut journal = ScoreJournal::open(&path).unwrap();
        assert_eq!(scorers.scores(&reward.name, &sequences, &mut journal).unwrap(), found);
        let n_now = servers.iter().map(|server| server.requests("/classify").len()).sum::<usize>();
        assert_eq!(n_now, n_asked);
        assert!(found.iter().zip(own).all(|(a, b)| (a - b).abs() < 1e-5), "{found:?} {own:?}");
        let difference = scorers.check(&reward.name, &sequences, own, 1.0, 0.05).unwrap();
        assert!(difference < 1e-5, "{difference}");
    }
    assert_ne!(own[0], own[1]);
    // The same servers again: nothing is loaded twice.
    Scorers::connect(&urls, &config(), &rewards).unwrap();
    assert_eq!(servers[0].requests("/v1/load_lora_adapter").len(), 2);
    // A server that puts scores through an activation, or has another head.
    servers[1].set(|behaviour| behaviour.divisor = 3.0);
    let error = scorers.check("action", &sequences, &own[0], 1.0, 0.05).unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&servers[1].url) && text.contains("action"), "{text}");
    assert!(matches!(error, Error::Scores { .. }), "{text}");
}

#[test]
fn a_server_of_reward_models_that_was_lost_is_proved_again_before_it_scores() {
    let dir = tempfile::tempdir().unwrap();
    let (sequences, rewards, own) = reward_models(dir.path());
    let mut servers = [StandIn::serve(&tiny_chat()), StandIn::serve(&tiny_chat())];
    let urls: Vec<String> = servers.iter().map(|server| server.url.clone()).collect();
    let one_at_once = ServerConfig { concurrency: 1, ..config() };
    let scorers = Scorers::connect(&urls, &one_at_once, &rewards).unwrap();
    scorers.check("motivation", &sequences, &own[1], 1.0, 0.05).unwrap();
    let many: Vec<Vec<i64>> =
        sequences.iter().cycle().take(12 * sequences.len()).cloned().collect();
    let expected: Vec<f64> = own[1].iter().copied().cycle().take(many.len()).collect();
    let score_all = || {
        let found = scorers.scores("motivation", &many, &mut ScoreJournal::default()).unwrap();
        assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5), "{found:?}");
    };
    // What it was asked for: conversations by that reward model, many at once.
    let n_asked = |server: &StandIn| {
        let asked = server.requests("/classify");
        asked
            .iter()
            .filter(|body| body["input"].as_array().unwrap().len() > sequences.len())
            .count()
    };
    score_all();
    assert!(servers.iter().all(|server| n_asked(server) > 0));
    servers[1].kill();
    score_all();

    // It comes back with another head: left out as before.
    let n_scored = n_asked(&servers[1]);
    servers[1].set(|behaviour| behaviour.divisor = 3.0);
    servers[1].restart();
    let since = std::time::Instant::now();
    let proved = |server: &StandIn| {
        server
            .requests("/classify")
            .iter()
            .filter(|body| body["input"].as_array().unwrap().len() == sequences.len())
            .count()
    };
    let n_proved = proved(&servers[1]);
    while proved(&servers[1]) == n_proved {
        assert!(since.elapsed() < Duration::from_secs(20), "it was not looked for");
        score_all();
        std::thread::sleep(Duration::from_millis(50));
    }
    score_all();
    assert_eq!(n_asked(&servers[1]), n_scored);
    // And then as it was.
    servers[1].set(|behaviour| behaviour.divisor = 0.0);
    while n_asked(&servers[1]) == n_scored {
        assert!(since.elapsed() < Duration::from_secs(40), "it does not come back");
        score_all();
        std::thread::sleep(Duration::from_millis(50));
    }
}
