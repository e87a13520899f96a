//! Replies by servers: the base and adapters over it there, other models here.

use arete_engine::EngineArgs;
use arete_stage::run::RunJson;

use super::*;
use crate::stand_in::{StandIn, Weights};

fn on(server: &StandIn) -> ScoreConfig {
    let here = ScoreConfig { temperature: 0.0, ..config() };
    let urls = Some(vec![server.url.clone()]);
    ScoreConfig { engines: EngineArgs { engine_urls: urls, ..here.engines.clone() }, ..here }
}

#[test]
fn servers_answer_for_the_base_and_its_adapters_as_the_models_here() {
    let run = Run::new(5);
    score(&ScoreConfig { temperature: 0.0, ..config() }, &run.inputs()).unwrap();
    let server = StandIn::serve(&fixture());
    let inputs = ScoreInputs { output: run.at("served"), ..run.inputs() };
    score(&on(&server), &inputs).unwrap();
    for name in ["original", "final"] {
        let file = format!("replies/{name}.parquet");
        let read = |stage: &str| -> Vec<ConversationRow> {
            parquet::read(run.at(stage).join(&file)).unwrap()
        };
        assert_eq!(read("served"), read("scoring"), "{name}");
    }
    assert_eq!(server.n_replies(), 2 * 5 * 3);
    assert_eq!(server.requests("/v1/load_lora_adapter").len(), 1);
    assert_eq!(server.requests("/v1/unload_lora_adapter").len(), 1);
    let config = RunJson::read(&inputs.output).unwrap().config;
    assert_eq!(config["engines"], "vllm");
    assert!(!config.to_string().contains("http"), "{config}");
    assert!(!inputs.output.join("shards").exists());

    // One that answers with the base in the adapter's place.
    server.set(|behaviour| behaviour.weights = Weights::Base);
    let inputs = ScoreInputs { output: run.at("lied to"), ..run.inputs() };
    let error = score(&on(&server), &inputs).unwrap_err().to_string();
    assert!(error.contains(&server.url) && error.contains("answers with the base"), "{error}");
}
