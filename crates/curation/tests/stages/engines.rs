//! Conversations and demonstrations that servers sample for the local model: tokens in and out.

use arete_curation::engine::ServerEngine;
use arete_records::Class;

use super::*;
use crate::stand_in::StandIn;

const GREEDY: [&str; 4] = ["--temperature", "0", "--dtype", "f32"];

fn on(servers: &[&StandIn]) -> Vec<String> {
    let urls: Vec<&str> = servers.iter().map(|server| server.url.as_str()).collect();
    let flags = ["--engine-urls", &urls.join(","), "--attempts", "2", "--backoff-s", "0.01"];
    flags.map(str::to_owned).to_vec()
}

#[test]
fn at_temperature_0_servers_reply_as_the_model_here() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 10);
    let here = converse(&prompts, &dir.path().join("here"), &GREEDY);
    let servers = [StandIn::serve(Path::new(&fixture())), StandIn::serve(Path::new(&fixture()))];
    let on_both = on(&[&servers[0], &servers[1]]);
    let flags: Vec<&str> = GREEDY.into_iter().chain(on_both.iter().map(String::as_str)).collect();
    let output = dir.path().join("there");
    assert_eq!(converse(&prompts, &output, &flags), here);
    assert_eq!(servers.iter().map(StandIn::n_replies).sum::<usize>(), 10 * 2 * 3);
    assert!(servers.iter().all(|server| server.n_replies() > 0));
    let run = RunJson::read(&output).unwrap();
    assert_eq!((&run.config["engines"], run.device.as_str()), (&json!("vllm"), "server"));
    assert!(run.inputs.contains_key("model") && !run.config.to_string().contains("http"));
    assert!(!output.join("shards").exists());

    // Demonstrations, whose revisions answer critiques.
    let demonstrate = |output: &str, more: &[&str]| -> Vec<DemonstrationRow> {
        let (constitution, exemplars) =
            (data("constitution.toml"), data("demonstrations/exemplars.jsonl"));
        let own = ["--source", "self", "--truncated", "keep", "--max-new-tokens", "6"];
        let files = ["--constitution", &constitution, "--exemplars", &exemplars];
        let config: DemonstrationsConfig = config(&[&own[..], &files, more].concat());
        let inputs =
            demonstrations::Inputs { prompts: Some(prompts.clone()), model: Some(fixture()) };
        let output = dir.path().join(output);
        demonstrations::run(&config, &inputs, &output, &Work::Compute).unwrap();
        parquet::read(output.join("demonstrations.parquet")).unwrap()
    };
    assert_eq!(demonstrate("shown there", &flags), demonstrate("shown here", &GREEDY));

    // Text from one server and tokens from several are two things.
    let both = [&flags[..], &["--engine-url", &servers[0].url]].concat();
    let inputs =
        conversations::Inputs { prompts: prompts.clone(), model: fixture(), original: None };
    let config = conversations_config(&both);
    let output = dir.path().join("both");
    let error = conversations::run(&config, &inputs, &output, &Work::Compute).unwrap_err();
    assert!(error.to_string().contains("engine_urls"), "{error}");
    // Nor is a server with tokens a server with text: this one has no chat.
    let chat =
        arete_engine::ServerConfig { concurrency: 1, attempts: 1, timeout_s: 5.0, backoff_s: 0.0 };
    assert!(ServerEngine::connect(&servers[0].url, "tiny", &chat, false).is_err());
}

#[test]
fn a_run_that_lost_its_server_goes_on_with_the_replies_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 40);
    let mut server = StandIn::serve(Path::new(&fixture()));
    server.set(|behaviour| {
        behaviour.is_moody = true;
        behaviour.dies_after = Some(100);
    });
    let on_it = on(&[&server]);
    let words: Vec<&str> = on_it.iter().map(String::as_str).collect();
    let flags = [&words[..], &["--dtype", "f32", "--engine-wait-s", "0"]].concat();
    let output = dir.path().join("out");
    let inputs =
        conversations::Inputs { prompts: prompts.clone(), model: fixture(), original: None };
    let config = conversations_config(&flags);
    let error = conversations::run(&config, &inputs, &output, &Work::Compute).unwrap_err();
    assert!(error.to_string().contains("none of 1 servers is left"), "{error}");
    let class = error.chain().find_map(arete_engine::class_of);
    assert_eq!(class, Some(Class::Unavailable));
    assert!(output.join("shards/replies.partial.jsonl").is_file());
    server.restart();
    let n_before = server.n_replies();
    let rows = converse(&prompts, &output, &flags);
    assert_eq!(rows.len(), 80);
    // The hundred that came are not asked for again, but for those that came as the server was given up.
    let n_asked = server.n_replies() - n_before;
    assert!((140..=156).contains(&n_asked), "{n_asked}");
    assert!(!output.join("shards").exists());
}
