//! Rollouts on servers: what comes of them, who is refused, and that kills and deaths change no byte.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use arete_ppo::{TrainInputs, train};
use arete_records::Class;
use arete_records::hashes::sha256_file;
use arete_stage::run::RunJson;

use crate::common::{adapter_sum, by_rule, config, metric, prepared, rollout, tiny_chat};
use crate::stand_in::{StandIn, Weights};

/// Replies of a run of these settings: statistics and two probes of four prompts besides rollouts of 8, three turns each.
const FLAGS: [&str; 4] = ["--programmed-reward", "letter:e", "--learning-rate", "5e-3"];

fn flags(servers: &[&StandIn]) -> Vec<String> {
    let urls: Vec<&str> = servers.iter().map(|server| server.url.as_str()).collect();
    let urls = urls.join(",");
    let of_f32 = ["--engine-tolerance", "0.02", "--engine-difference", "0.02"];
    let patience = ["--attempts", "2", "--backoff-s", "0.01", "--engine-wait-s", "60"];
    let flags = [&["--engine-urls", &urls][..], &of_f32, &patience].concat();
    flags.into_iter().map(str::to_owned).collect()
}

fn train_on(servers: &[&StandIn], more: &[&str], inputs: &TrainInputs) -> anyhow::Result<()> {
    let servers = flags(servers);
    let servers: Vec<&str> = servers.iter().map(String::as_str).collect();
    train(&config(&[&FLAGS[..], &servers, more].concat()), inputs)
}

#[test]
fn a_policy_learns_from_replies_of_servers_however_many() {
    let dir = tempfile::tempdir().unwrap();
    let servers = [StandIn::serve(&tiny_chat()), StandIn::serve(&tiny_chat())];
    let inputs = by_rule(dir.path(), "two");
    train_on(&[&servers[0], &servers[1]], &[], &inputs).unwrap();
    let output = &inputs.output;
    let n_replies = servers.iter().map(StandIn::n_replies).sum::<usize>();
    assert_eq!(n_replies, 3 * (2 * 8 + 2 * 4 + 12));
    assert!(servers.iter().all(|server| server.n_replies() > 0));
    for difference in metric(output, "sampler_trainer_difference") {
        assert!(difference <= 1e-4, "{difference}");
    }
    assert_eq!(metric(output, "first_log_ratio"), [0.0, 0.0]);
    let share = metric(output, "engine/ess");
    assert!(share.len() == 2 && share.iter().all(|share| (share - 1.0).abs() < 1e-6), "{share:?}");
    // Rollouts 1 and 2 and the last probe: three versions, each under a name of its own, and none is left.
    let loads = servers[0].requests("/v1/load_lora_adapter");
    let names: Vec<&str> = loads.iter().map(|load| load["lora_name"].as_str().unwrap()).collect();
    assert_eq!(names.len(), 3, "{names:?}");
    assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "{names:?}");
    assert_eq!(servers[0].requests("/v1/unload_lora_adapter").len(), 3);
    assert!(!output.join("engines").exists());
    let run = RunJson::read(output).unwrap();
    assert_eq!(run.config["engines"], "vllm");
    let recorded = run.config.to_string();
    assert!(!recorded.contains("http") && !recorded.contains("concurrency"), "{recorded}");

    // One server, other requests side by side: the same bytes.
    let one = by_rule(dir.path(), "one");
    train_on(&[&servers[1]], &["--concurrency", "3"], &one).unwrap();
    assert_eq!(adapter_sum(&one.output), adapter_sum(output));
    assert_eq!(rollout(&one.output, 2), rollout(output, 2));
    assert_eq!(RunJson::read(&one.output).unwrap().fingerprint, run.fingerprint);
}

#[test]
fn a_server_with_other_weights_ends_the_run_by_name() {
    let (honest, liar) = (StandIn::serve(&tiny_chat()), StandIn::serve(&tiny_chat()));
    for (weights, words) in [
        (Weights::Stale, "stale"),
        (Weights::Base, "answers with the base"),
        (Weights::Half, "half-loaded"),
        (Weights::Wrong, "other weights"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let inputs = by_rule(dir.path(), "out");
        // The third is the first whose forerunner is not the base.
        liar.set(|behaviour| (behaviour.weights, behaviour.honest_loads) = (weights, 2));
        let error = train_on(&[&honest, &liar], &["--iterations", "3"], &inputs).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(&liar.url) && text.contains(words), "{weights:?}: {text}");
        let class = error.chain().find_map(arete_engine::class_of);
        assert_eq!(class, Some(Class::Unavailable)); // exit code 69
        // The same command goes on once the server does what it should.
        liar.set(|behaviour| behaviour.weights = Weights::Honest);
        train_on(&[&honest, &liar], &["--iterations", "3"], &inputs).unwrap();
        assert!(RunJson::read(&inputs.output).is_ok());
    }
}

#[test]
fn log_probabilities_before_temperature_are_refused_with_the_flag_that_helps() {
    let dir = tempfile::tempdir().unwrap();
    let server = StandIn::serve(&tiny_chat());
    server.set(|behaviour| behaviour.is_raw = true);
    let inputs = by_rule(dir.path(), "out");
    let error = train_on(&[&server], &["--temperature", "0.5"], &inputs).unwrap_err().to_string();
    assert!(error.contains("processed_logprobs"), "{error}");
    assert!(error.contains("engine_difference"), "{error}");
}

#[test]
fn a_server_without_adapters_at_run_time_is_an_error_that_says_how_to_start_it() {
    let dir = tempfile::tempdir().unwrap();
    let server = StandIn::serve(&tiny_chat());
    server.set(|behaviour| behaviour.has_no_adapters = true);
    let error = train_on(&[&server], &[], &by_rule(dir.path(), "out")).unwrap_err().to_string();
    assert!(error.contains("VLLM_ALLOW_RUNTIME_LORA_UPDATING"), "{error}");
}

fn start(dir: &Path, output: &str, servers: &[&StandIn], more: &[(&str, &str)]) -> Child {
    let servers = flags(servers);
    let mut settings: Vec<(&str, &str)> = vec![
        ("--iterations", "4"),
        ("--rollout-size", "8"),
        ("--max-new-tokens", "12"),
        ("--rank", "4"),
        ("--learning-rate", "2e-3"),
        ("--probe-every", "2"),
        ("--probe-prompts", "4"),
        ("--stats-samples", "8"),
        ("--checkpoint-every", "2"),
        ("--device", "cpu"),
        ("--threads", "1"),
        ("--dtype", "f32"),
        ("--value-warmup", "0"),
    ];
    settings.extend(servers.chunks(2).map(|pair| (pair[0].as_str(), pair[1].as_str())));
    settings.retain(|(name, _)| more.iter().all(|(other, _)| other != name));
    let mut command = Command::new(env!("CARGO_BIN_EXE_arete-ppo"));
    command.arg("train").arg("--prompts").arg(dir.join("prompts"));
    command.arg("--rewards").arg(dir.join("reward")).arg("--model").arg(tiny_chat());
    command.arg("--output").arg(dir.join(output));
    for (name, value) in settings.iter().chain(more) {
        command.args([name, value]);
    }
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn sums(output: &Path) -> Vec<(String, String)> {
    let run = RunJson::read(output).unwrap();
    let sum = |file: &String| (file.clone(), sha256_file(output.join(file)).unwrap());
    let files: Vec<(String, String)> = run.outputs.keys().map(sum).collect();
    let has = |part: &str| files.iter().any(|(name, _)| name.contains(part));
    assert!(has("adapter_model") && has("metrics.jsonl") && has("iteration-000004.parquet"));
    assert!(!has("partial") && !has("engines/"), "{files:?}");
    files
}

fn wait_for(child: &mut Child, what: &str, is_there: impl Fn() -> bool) {
    while !is_there() {
        std::thread::sleep(Duration::from_micros(200));
        assert!(child.try_wait().unwrap().is_none(), "it ended before {what}");
    }
}

#[test]
fn kills_and_deaths_in_the_middle_of_an_iteration_change_no_byte() {
    let dir = prepared();
    let dir = dir.path();
    let mut servers = [StandIn::serve(&tiny_chat()), StandIn::serve(&tiny_chat())];
    let both =
        |servers: &[StandIn; 2], output: &str| start(dir, output, &[&servers[0], &servers[1]], &[]);
    assert!(both(&servers, "whole").wait().unwrap().success());
    let expected = sums(&dir.join("whole"));

    // The run is killed in its third rollout, whose journal is the only one left.
    let journal = dir.join("killed/rollouts/iteration-000003.partial.jsonl");
    let mut child = both(&servers, "killed");
    wait_for(&mut child, "its third rollout", || {
        fs_err::metadata(&journal).is_ok_and(|file| file.len() > 0)
    });
    child.kill().unwrap(); // SIGKILL
    child.wait().unwrap();
    assert!(dir.join("killed/engines").exists());
    // What it left on the servers goes when it is started again; one of them dies meanwhile, and is started again.
    let n_before = servers[0].n_replies();
    servers[0].set(|behaviour| behaviour.dies_after = Some(n_before + 7));
    let mut child = both(&servers, "killed");
    wait_for(&mut child, "the server's death", || servers[0].n_replies() > n_before + 7);
    servers[0].restart();
    assert!(child.wait().unwrap().success());
    assert_eq!(sums(&dir.join("killed")), expected);
    assert!(!journal.exists());

    // One server alone that is killed and started again in the middle of a rollout.
    let n_before = servers[1].n_replies();
    let mut child = start(dir, "alone", &[&servers[1]], &[]);
    wait_for(&mut child, "its rollouts", || servers[1].n_replies() > n_before + 50);
    servers[1].restart();
    assert!(child.wait().unwrap().success());
    assert_eq!(sums(&dir.join("alone")), expected);
}

#[test]
fn with_no_server_left_the_program_ends_with_69_and_the_same_command_goes_on() {
    let dir = prepared();
    let dir = dir.path();
    let mut server = StandIn::serve(&tiny_chat());
    let mut child = start(dir, "out", &[&server], &[("--engine-wait-s", "0.2")]);
    wait_for(&mut child, "its rollouts", || server.n_replies() > 60);
    server.kill();
    assert_eq!(child.wait().unwrap().code(), Some(69));
    server.restart();
    assert!(start(dir, "out", &[&server], &[]).wait().unwrap().success());
    assert!(start(dir, "whole", &[&server], &[]).wait().unwrap().success());
    assert_eq!(sums(&dir.join("out")), sums(&dir.join("whole")));
}

#[test]
fn iterations_done_again_repeat_their_bytes_although_servers_would_not() {
    let dir = prepared();
    let dir = dir.path();
    let server = StandIn::serve(&tiny_chat());
    server.set(|behaviour| behaviour.is_moody = true);
    let output = dir.join("out");
    // Nothing between the probe before the first iteration and the end has a checkpoint.
    let rare = [("--checkpoint-every", "0"), ("--probe-every", "0")];
    let rollouts = |n: u64| -> Vec<String> {
        let path = |i| output.join(format!("rollouts/iteration-{i:06}.parquet"));
        (1..=n).map(|i| sha256_file(path(i)).unwrap()).collect()
    };
    let mut child = start(dir, "out", &[&server], &rare);
    wait_for(&mut child, "its third iteration is over", || {
        output.join("rollouts/.iteration-000003.parquet.seal").exists()
    });
    child.kill().unwrap();
    child.wait().unwrap();
    let before = rollouts(3);
    let n_asked = server.n_replies();
    let mut child = start(dir, "out", &[&server], &rare);
    assert!(child.wait().unwrap().success());
    assert_eq!(rollouts(3), before);
    // At most the last rollout and the last probe were asked for: 8 and 4 conversations of three turns.
    let n_asked = server.n_replies() - n_asked;
    assert!(n_asked <= 3 * (8 + 4), "{n_asked}");
    // The same from the beginning comes out otherwise.
    assert!(start(dir, "other", &[&server], &rare).wait().unwrap().success());
    let other = sha256_file(dir.join("other/rollouts/iteration-000001.parquet")).unwrap();
    assert_ne!(other, before[0]);
}
