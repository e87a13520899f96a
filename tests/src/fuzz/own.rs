//! What we wrote ourselves, and disks, hands or other versions may have changed: recipes, constitutions, marks of stages,
//! journals, checkpoints, statistics, and the page's reading of a run.

use anyhow::Result;
use arete_chain::sample::Journal as _;
use arete_chain::words::BagOfWords;
use arete_chain::{Constitution, Reading, yardstick};
use arete_curation::calibrate::Ballot;
use arete_curation::judge::Method;
use arete_pipeline::cluster::Cluster;
use arete_ppo::journal::Journal;
use arete_records::hashes::sha256_file;
use arete_records::redact::{redacted, userinfo};
use arete_records::rows::PromptRow;
use arete_records::{Message, ScoreStats, Virtue, hex, left_out, memory_refused, split_of};
use arete_scoring::endpoint::Endpoint;
use arete_scoring::{RunFiles, doctor};
use arete_stage::inputs;
use arete_stage::metrics::MetricsWriter;
use arete_stage::recipe::{Recipe, Setting};
use arete_stage::run::RunJson;
use arete_stage::units::{Shard, Units};
use arete_training::CheckpointStore;
use clap::Command;
use fs_err as fs;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{Kind, Place, Target, same};

pub(super) const TARGETS: &[Target] = &[
    Target {
        name: "recipe",
        reads: "a recipe, as every stage's settings",
        kind: Kind::Text,
        seeds: &["recipes"],
        n_quick: 400,
        run: recipe,
    },
    Target {
        name: "set",
        reads: "--set TABLE.KEY=VALUE, with its alternatives",
        kind: Kind::Text,
        seeds: &[],
        n_quick: 3000,
        run: set,
    },
    Target {
        name: "words",
        reads: "words of flags: an endpoint, a shard, a rule of combining rewards",
        kind: Kind::Text,
        seeds: &[],
        n_quick: 3000,
        run: words_of_flags,
    },
    Target {
        name: "constitution",
        reads: "a constitution",
        kind: Kind::Text,
        seeds: &[
            "data/constitution.toml",
            "tests/fixtures/constitution.toml",
            "tests/fixtures/confucian.toml",
        ],
        n_quick: 1000,
        run: constitution,
    },
    Target {
        name: "cluster",
        reads: "a file of rates for the simulated clock of a cluster",
        kind: Kind::Text,
        seeds: &[],
        n_quick: 2000,
        run: cluster,
    },
    Target {
        name: "run_json",
        reads: "run.json, and the inputs it vouches for",
        kind: Kind::Json,
        seeds: &[],
        n_quick: 2000,
        run: run_json,
    },
    Target {
        name: "metrics",
        reads: "metrics.jsonl and its events, to go on with",
        kind: Kind::JsonLines,
        seeds: &[],
        n_quick: 500,
        run: metrics,
    },
    Target {
        name: "metrics_seal",
        reads: "the seal of metrics.jsonl",
        kind: Kind::Json,
        seeds: &[],
        n_quick: 500,
        run: metrics_seal,
    },
    Target {
        name: "events",
        reads: "TensorBoard's events, to go on with",
        kind: Kind::Binary,
        seeds: &[],
        n_quick: 500,
        run: events,
    },
    Target {
        name: "journal",
        reads: "the journal of a rollout",
        kind: Kind::JsonLines,
        seeds: &[],
        n_quick: 1000,
        run: journal,
    },
    Target {
        name: "unit",
        reads: "a finished unit of work and its seal",
        kind: Kind::Json,
        seeds: &[],
        n_quick: 300,
        run: unit,
    },
    Target {
        name: "checkpoint_manifest",
        reads: "MANIFEST.json of a checkpoint",
        kind: Kind::Json,
        seeds: &[],
        n_quick: 1000,
        run: checkpoint_manifest,
    },
    Target {
        name: "checkpoint_tensors",
        reads: "the tensors of a checkpoint whose manifest fits them",
        kind: Kind::HeadedJson,
        seeds: &["crates/ppo/tests/goldens/functions.safetensors"],
        n_quick: 1000,
        run: checkpoint_tensors,
    },
    Target {
        name: "left_out",
        reads: "left_out.jsonl",
        kind: Kind::JsonLines,
        seeds: &[],
        n_quick: 1000,
        run: items_left_out,
    },
    Target {
        name: "score_stats",
        reads: "score_stats.json",
        kind: Kind::Json,
        seeds: &[],
        n_quick: 1000,
        run: score_stats,
    },
    Target {
        name: "reading",
        reads: "reading.json",
        kind: Kind::Json,
        seeds: &[],
        n_quick: 1000,
        run: reading,
    },
    Target {
        name: "bag_of_words",
        reads: "words.json",
        kind: Kind::Json,
        seeds: &[],
        n_quick: 1000,
        run: bag_of_words,
    },
    Target {
        name: "yardstick",
        reads: "yardstick.json",
        kind: Kind::Json,
        seeds: &[],
        n_quick: 1000,
        run: yardstick_card,
    },
    Target {
        name: "calibration",
        reads: "calibration.json",
        kind: Kind::Json,
        seeds: &[],
        n_quick: 1000,
        run: calibration,
    },
    Target {
        name: "page",
        reads: "the numbers of a run's trainers, for diagnosis and page",
        kind: Kind::JsonLines,
        seeds: &[],
        n_quick: 500,
        run: page,
    },
    Target {
        name: "redaction",
        reads: "any text that is shown",
        kind: Kind::Text,
        seeds: &["tests/fixtures/exemplars.jsonl"],
        n_quick: 3000,
        run: redaction,
    },
];

/// Has a stage's settings resolved, and what came out resolved again.
fn resolved<C: clap::Args + Serialize + DeserializeOwned>(
    recipe: &Recipe,
    stage: &str,
) -> Result<()> {
    let matches = C::augment_args(Command::new("stage")).get_matches_from(["stage"]);
    let config: C = recipe.resolve(&matches, stage)?;
    // A number that JSON cannot hold would come back as none.
    let value = serde_json::to_value(&config)?;
    let again: C = serde_json::from_value(value.clone())?;
    same("settings", &value, &serde_json::to_value(&again)?)
}

fn recipe(place: &Place, input: &[u8]) -> Result<()> {
    let recipe = Recipe::read(Some(&place.put("x.toml", input)?), &[])?;
    let outcomes = [
        resolved::<arete_curation::prompts::PromptsConfig>(&recipe, "prompts"),
        resolved::<arete_curation::demonstrations::DemonstrationsConfig>(&recipe, "demonstrations"),
        resolved::<arete_curation::conversations::ConversationsConfig>(&recipe, "conversations"),
        resolved::<arete_curation::preferences::PreferencesConfig>(&recipe, "preferences"),
        resolved::<arete_sft::Config>(&recipe, "sft"),
        resolved::<arete_reward::Config>(&recipe, "reward"),
        resolved::<arete_dpo::Config>(&recipe, "dpo"),
        resolved::<arete_ppo::Config>(&recipe, "ppo"),
        resolved::<arete_scoring::ScoreConfig>(&recipe, "scoring"),
    ];
    let mut first = Ok(());
    for outcome in outcomes {
        if let Err(error) = outcome {
            super::judge(&error)?;
            first = first.and(Err(error));
        }
    }
    first
}

fn set(_: &Place, input: &[u8]) -> Result<()> {
    let text = String::from_utf8_lossy(input);
    let refused = |reason: String| arete_records::Refusal::setting("--set", "a setting", reason);
    let setting: Setting = text.parse().map_err(refused)?;
    let again: Setting = setting.to_string().parse().map_err(refused)?;
    same("setting", &setting, &again)?;
    for alternative in setting.alternatives().map_err(refused)? {
        Recipe::read(None, std::slice::from_ref(&alternative))?;
        let again: Setting = alternative.to_string().parse().map_err(refused)?;
        same("alternative", &alternative, &again)?;
    }
    Ok(())
}

fn words_of_flags(_: &Place, input: &[u8]) -> Result<()> {
    let text = String::from_utf8_lossy(input);
    if let Ok(endpoint) = text.parse::<Endpoint>() {
        same("endpoint", &endpoint.to_string().parse::<Endpoint>().ok(), &Some(endpoint))?;
    }
    if let Ok(weights) = text.parse::<arete_ppo::config::Weights>() {
        let again: Result<arete_ppo::config::Weights, String> = weights.to_string().parse();
        same("weights", &again.ok(), &Some(weights))?;
    }
    if let Ok(reward) = text.parse::<arete_ppo::config::ProgrammedReward>() {
        let again: Result<arete_ppo::config::ProgrammedReward, String> = reward.to_string().parse();
        same("reward", &again.ok(), &Some(reward))?;
    }
    memory_refused(&text);
    let shard: Shard = text.parse()?;
    same("shard", &shard.to_string().parse::<Shard>()?, &shard)
}

fn constitution(place: &Place, input: &[u8]) -> Result<()> {
    let constitution = Constitution::load(&place.put("x.toml", input)?)?;
    constitution.personas().ok();
    for turn in constitution.turns.names() {
        constitution.fitting(turn).ok();
    }
    let dir = place.fresh("left")?;
    constitution.leave(&dir)?;
    let Some(again) = Constitution::carried(&dir)? else { return Ok(()) };
    same("turns", &again.turns, &constitution.turns)?;
    same("virtues", &again.virtue_names(), &constitution.virtue_names())
}

fn cluster(place: &Place, input: &[u8]) -> Result<()> {
    Cluster::load(&place.put("x.toml", input)?).map(drop)
}

fn run_json(place: &Place, input: &[u8]) -> Result<()> {
    place.put("file", b"contents")?;
    place.put("run.json", input)?;
    let looked = inputs::check(place.dir());
    let run = RunJson::read(place.dir())?;
    looked?;
    place.put("run.json", &serde_json::to_vec(&run)?)?;
    same("run.json", &RunJson::read(place.dir())?, &run)
}

fn metrics(place: &Place, input: &[u8]) -> Result<()> {
    let dir = place.fresh("stage")?;
    place.put("stage/metrics.jsonl", input)?;
    let mut writer = MetricsWriter::open_at(&dir, Some(1 << 40))?;
    writer.log(7, &[("loss", f64::NAN)])?;
    writer.flush()?;
    let lines = fs::read(dir.join("metrics.jsonl"))?;
    drop(MetricsWriter::open_at(&dir, Some(u64::MAX))?);
    same("lines", &fs::read(dir.join("metrics.jsonl"))?, &lines)
}

fn metrics_seal(place: &Place, input: &[u8]) -> Result<()> {
    let dir = place.fresh("stage")?;
    let mut writer = MetricsWriter::create(&dir)?;
    writer.log(1, &[("loss", 0.5)])?;
    writer.flush()?;
    place.put("stage/.metrics.jsonl.seal", input)?;
    MetricsWriter::open_at(&dir, Some(1)).map(drop)?;
    Ok(())
}

fn events(place: &Place, input: &[u8]) -> Result<()> {
    let dir = place.fresh("stage")?;
    place.put("stage/metrics.jsonl", b"{\"step\":1}\n")?;
    place.put(&format!("stage/{}", arete_stage::metrics::EVENTS_FILE), input)?;
    MetricsWriter::open_at(&dir, Some(1)).map(drop)?;
    Ok(())
}

/// The lines, each under the hash that its journal gives it.
fn journal(place: &Place, input: &[u8]) -> Result<()> {
    let dir = place.fresh("rollouts")?;
    let mut text = Vec::new();
    for line in input.split(|&byte| byte == b'\n') {
        text.extend(format!("{} ", hex(&Sha256::digest(line)[..8])).into_bytes());
        text.extend(line);
        text.push(b'\n');
    }
    place.put("rollouts/iteration-000003.partial.jsonl", &text)?;
    let known = Journal::open(&dir, 3, 4, 2)?.take_known();
    let again = Journal::open(&dir, 3, 4, 2)?.take_known();
    same("sequences", &format!("{known:?}"), &format!("{again:?}"))?;
    place.put("rollouts/iteration-000004.partial.jsonl", input)?;
    Journal::open(&dir, 4, 4, 2)?.take_known();
    Ok(())
}

/// An input with hashes of real files where it says `aaa…` and `bbb…`.
fn with_sums(input: &[u8], sums: [&str; 2]) -> String {
    let text = String::from_utf8_lossy(input);
    text.replace(&"a".repeat(64), sums[0]).replace(&"b".repeat(64), sums[1])
}

fn unit(place: &Place, input: &[u8]) -> Result<()> {
    let dir = place.fresh("stage")?;
    let units = Units { output: &dir, name: "prompts".to_owned(), n_items: 3, shard: None };
    let prompt = vec![Message::user("Is it fair?")];
    let split = split_of(&prompt);
    let row = PromptRow { prompt_id: "a".to_owned(), split, source: "s".to_owned(), prompt };
    units.write(0, &[row])?;
    let shards = dir.join("shards");
    let seal = fs::read_dir(&shards)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.to_string_lossy().ends_with(".seal"));
    let Some(seal) = seal else { return Ok(()) };
    let vouches = fs::read(&seal)?;
    let real = &serde_json::from_slice::<Value>(&vouches)?["sha256"];
    fs::write(&seal, with_sums(input, [real.as_str().unwrap_or_default(), ""]))?;
    units.left_out()?;
    // A seal that does not fit has the unit made anew.
    let n_missing = units.missing()?.0.len();
    let seal = serde_json::from_slice::<Value>(&fs::read(&seal)?).unwrap_or_default();
    let fits = seal["sha256"] == *real;
    if n_missing == 0 {
        same("the seal fits", &fits, &true)?;
    }
    units.read::<PromptRow>(0).map(drop)?;
    Ok(())
}

fn checkpoint_manifest(place: &Place, input: &[u8]) -> Result<()> {
    let dir = place.fresh("checkpoints")?;
    let store = CheckpointStore::new(&dir, "fingerprint", "f32", 2);
    store.save(3, &[], &serde_json::json!({"a": 1}), &[])?;
    let sum = |name: &str| sha256_file(store.path(3).join(name));
    let sums = [sum("tensors.safetensors")?, sum("trainer_state.json")?];
    let manifest = with_sums(input, [&sums[0], &sums[1]]);
    fs::write(store.path(3).join("MANIFEST.json"), manifest)?;
    store.latest::<Value>()?;
    store.load::<Value>(3).map(drop)?;
    Ok(())
}

fn checkpoint_tensors(place: &Place, input: &[u8]) -> Result<()> {
    let dir = place.fresh("checkpoints")?;
    let store = CheckpointStore::new(&dir, "fingerprint", "f32", 2);
    store.save(3, &[], &serde_json::json!({"a": 1}), &[])?;
    let (path, manifest) = (store.path(3), store.path(3).join("MANIFEST.json"));
    fs::write(path.join("tensors.safetensors"), input)?;
    let mut vouches: Value = serde_json::from_slice(&fs::read(&manifest)?)?;
    vouches["files"]["tensors.safetensors"] =
        serde_json::json!({"n_bytes": input.len(), "sha256": hex(&Sha256::digest(input))});
    fs::write(&manifest, vouches.to_string())?;
    let loaded = store.load::<Value>(3)?;
    let tensors: Vec<(String, _)> = loaded.tensors.into_iter().collect();
    store.save(4, &tensors, &loaded.state, &[])?;
    let again = store.load::<Value>(4)?;
    for (name, tensor) in &tensors {
        let equal = again.tensors.get(name).is_some_and(|other| other.size() == tensor.size());
        same("tensor", &equal, &true)?;
    }
    Ok(())
}

fn items_left_out(place: &Place, input: &[u8]) -> Result<()> {
    let dir = place.fresh("stage")?;
    place.put("stage/left_out.jsonl", input)?;
    let items = left_out::read(&dir)?;
    left_out::write(&dir, &items)?;
    same("items", &left_out::read(&dir)?, &items)
}

fn score_stats(place: &Place, input: &[u8]) -> Result<()> {
    place.put("score_stats.json", input)?;
    let Some(stats) = ScoreStats::read(place.dir())? else { return Ok(()) };
    place.put("score_stats.json", &serde_json::to_vec(&stats)?)?;
    same("statistics", &ScoreStats::read(place.dir())?, &Some(stats))
}

fn reading(place: &Place, input: &[u8]) -> Result<()> {
    place.put("reading.json", input)?;
    let Some(reading) = Reading::read(place.dir())? else { return Ok(()) };
    reading.write(place.dir())?;
    same("rule", &Reading::read(place.dir())?, &Some(reading))
}

fn bag_of_words(place: &Place, input: &[u8]) -> Result<()> {
    place.put("words.json", input)?;
    let Some(words) = BagOfWords::read(place.dir())? else { return Ok(()) };
    let _ = words.score("Is it fair? I would ask first.");
    words.write(place.dir())?;
    same("words", &BagOfWords::read(place.dir())?, &Some(words))
}

fn yardstick_card(place: &Place, input: &[u8]) -> Result<()> {
    place.put("yardstick.json", input)?;
    let Some(card) = yardstick::Card::read(place.dir())? else { return Ok(()) };
    let _ = card.markdown();
    card.write(place.dir())?;
    same("card", &yardstick::Card::read(place.dir())?, &Some(card))
}

fn calibration(place: &Place, input: &[u8]) -> Result<()> {
    let path = place.put("calibration.json", input)?;
    let virtues = [Virtue::HONESTY, Virtue::PRUDENCE];
    let ballot = Ballot::read(&path, &virtues, Method::Likelihood, 0)?;
    ballot.check_judge("judge", &std::collections::BTreeMap::new()).ok();
    Ok(())
}

fn page(place: &Place, input: &[u8]) -> Result<()> {
    let dir = place.fresh("run")?;
    for stage in ["ppo", "sft", "reward/action"] {
        fs::create_dir_all(dir.join(stage))?;
        fs::write(dir.join(stage).join("metrics.jsonl"), input)?;
    }
    let run = RunFiles::read(&dir)?;
    doctor::text(&doctor::diagnose(&run));
    run.end_kl();
    Ok(())
}

fn redaction(_: &Place, input: &[u8]) -> Result<()> {
    let text = String::from_utf8_lossy(input);
    let once = redacted(&text).into_owned();
    same("redacted", &redacted(&once).into_owned(), &once)?;
    let mut rest = once.as_str();
    while let Some(at) = rest.find("://") {
        let hidden = userinfo(&rest[at..]).is_none_or(|secret| secret == "***");
        same("no user and password", &hidden, &true)?;
        rest = &rest[at + 3..];
    }
    let shown = arete_stage::cli::printable(&text);
    let is_plain = !shown.chars().any(|c| c.is_control() && c != '\n' && c != '\t');
    same("no control characters", &is_plain, &true)?;
    Ok(())
}
