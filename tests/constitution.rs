//! Constitutions of other virtues and turns through every stage to a page: columns, reward models, metrics, tables and page have
//! their names, a run carries its own, and one of other turns is refused on the way.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use arete_records::rows::{ConversationRow, JudgementRow, PreferenceRow, RolloutRow, ScoreRow};
use arete_records::{jsonl, parquet};

/// Settings for a model of 220 kB.
const RECIPE: &str = r#"
[run]
seed = 7
device = "cpu"
dtype = "f32"
threads = 1
constitution = "own.toml"

[prompts]
limit = 40
max_chars = 120

[demonstrations]
source = "self"
few_shot = 1
max_new_tokens = 16
exemplars = "{data}/demonstrations/exemplars.jsonl"

[sft]
rank = 2
epochs = 1
max_steps = 2
batch_size = 8
max_length = 400

[conversations]
max_new_tokens = 16
temperature = 1.0

[preferences]
method = "likelihood"
truncated = "keep"
min_pairs = 8

[reward]
rank = 2
epochs = 1
batch_size = 8
learning_rate = 1e-3

[ppo]
rank = 2
iterations = 2
rollout_size = 4
value_warmup = 0
max_new_tokens = 8
temperature = 1.0
probe_every = 1
probe_prompts = 2

[scoring]
max_new_tokens = 8
temperature = 1.0
draws = 200
"#;

const STAGES: [&str; 9] = [
    "prompts",
    "demonstrations",
    "sft",
    "conversations",
    "preferences",
    "reward",
    "ppo",
    "scoring",
    "report",
];

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the repository")
}

fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the path of this test");
    let path = test.ancestors().nth(2).expect("target/release").join(format!("arete-{name}"));
    assert!(path.is_file(), "{} is missing: run `make build`", path.display());
    path
}

/// A directory with a recipe and a constitution, in which the stages run.
struct Run {
    dir: tempfile::TempDir,
}

impl Run {
    fn new(constitution: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data = repository().join("data");
        let recipe = RECIPE.replace("{data}", data.to_str().unwrap());
        fs_err::write(dir.path().join("recipe.toml"), recipe).unwrap();
        fs_err::write(dir.path().join("own.toml"), constitution).unwrap();
        Self { dir }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join("run").join(path)
    }

    fn try_run(&self, program_name: &str, arguments: &[&str]) -> Output {
        Command::new(program(program_name))
            .current_dir(self.dir.path())
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .expect("the program starts")
    }

    /// Runs a program; what it printed.
    fn run(&self, program_name: &str, arguments: &[&str]) -> String {
        let output = self.try_run(program_name, arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {}\n{stderr}", output.status);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs a stage as the Makefile does; what it printed.
    fn stage(&self, stage: &str) -> String {
        let model = repository().join("tests/fixtures/tiny-chat");
        let prompts = repository().join("data/prompts");
        let (model, prompts) = (model.to_str().unwrap(), prompts.to_str().unwrap());
        let base = "run/sft/merged";
        let (name, from): (&str, &[&str]) = match stage {
            "prompts" => ("curation", &["prompts", "--input", prompts]),
            "demonstrations" => {
                ("curation", &["demonstrations", "--prompts", "run/prompts", "--model", model])
            }
            "sft" => {
                ("sft", &["train", "--demonstrations", "run/demonstrations", "--model", model])
            }
            "conversations" => {
                ("curation", &["conversations", "--prompts", "run/prompts", "--model", base])
            }
            "preferences" => (
                "curation",
                &["preferences", "--conversations", "run/conversations", "--judge", base],
            ),
            "reward" => (
                "reward",
                &[
                    "train",
                    "--preferences",
                    "run/preferences",
                    "--conversations",
                    "run/conversations",
                    "--model",
                    base,
                ],
            ),
            "ppo" => (
                "ppo",
                &["train", "--prompts", "run/prompts", "--rewards", "run/reward", "--model", base],
            ),
            "scoring" => (
                "scoring",
                &[
                    "score",
                    "--prompts",
                    "run/prompts",
                    "--original",
                    model,
                    "--sft",
                    base,
                    "--final",
                    "run/ppo",
                    "--reward",
                    "run/reward",
                ],
            ),
            "report" => ("scoring", &["report", "--run", "run"]),
            other => unreachable!("{other}"),
        };
        let output = format!("run/{stage}");
        let shared = ["--recipe", "recipe.toml", "--output", output.as_str()];
        self.run(name, &[from, &shared[..]].concat())
    }

    fn columns(&self, path: &str) -> BTreeSet<String> {
        let rows = parquet::read_json(self.at(path)).unwrap();
        rows[0].keys().cloned().collect()
    }

    fn page(&self) -> String {
        fs_err::read_to_string(self.at("report/report.html")).unwrap()
    }
}

fn set(names: &str) -> BTreeSet<String> {
    names.split(' ').map(str::to_owned).collect()
}

const CONFUCIAN: &str = include_str!("fixtures/confucian.toml");

#[test]
fn four_virtues_and_two_turns_reach_the_page() {
    let run = Run::new(CONFUCIAN);
    let mut table = String::new();
    for stage in STAGES {
        let printed = run.stage(stage);
        if stage == "scoring" {
            table = printed;
        }
    }
    // Every stage that works by it carries it, byte for byte.
    for stage in [
        "demonstrations",
        "conversations",
        "preferences",
        "reward/deed",
        "reward/reason",
        "ppo",
        "scoring",
    ] {
        let copy = fs_err::read_to_string(run.at(&format!("{stage}/constitution.toml"))).unwrap();
        assert_eq!(copy, CONFUCIAN, "{stage}");
    }
    let columns = run.columns("conversations/conversations.parquet");
    let expected = "prompt_id split sample persona messages deed reason finish_reason_deed \
                    finish_reason_reason n_tokens_deed n_tokens_reason seed";
    assert_eq!(columns, set(expected));
    let rows: Vec<ConversationRow> =
        parquet::read(run.at("conversations/conversations.parquet")).unwrap();
    for row in &rows {
        let [.., deed, asked, reason] = row.messages.as_slice() else { panic!("{row:?}") };
        assert_eq!(asked.content, "Why is this the right thing to do?");
        let names = row.turns.iter().map(|turn| turn.aspect.name()).collect::<Vec<_>>();
        assert_eq!(names, ["deed", "reason"]);
        assert_eq!([&row.turns[0].text, &row.turns[1].text], [&deed.content, &reason.content]);
    }
    judged_by(&run, &["ren", "yi", "li", "zhi"], &["deed", "reason"]);
    let rewards: BTreeSet<String> = fs_err::read_dir(run.at("reward"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with('.'))
        .collect();
    assert_eq!(rewards, set("deed reason"));
    let metrics = jsonl::read(run.at("ppo/metrics.jsonl")).unwrap();
    let logged: BTreeSet<String> =
        metrics.iter().flat_map(|(_, line)| line.as_object().unwrap().keys().cloned()).collect();
    for name in ["score_deed", "z_reason", "length_deed", "probe/truncated_reason"] {
        assert!(logged.contains(name), "{name} in {logged:?}");
    }
    assert!(!logged.iter().any(|key| key.contains("action") || key.contains("motivation")));
    let rollouts: Vec<RolloutRow> =
        parquet::read(run.at("ppo/rollouts/iteration-000001.parquet")).unwrap();
    assert!(rollouts.iter().all(|row| row.z().len() == 2 && row.n_asked() == 2));
    let scores: Vec<ScoreRow> = parquet::read(run.at("scoring/scores.parquet")).unwrap();
    let scored: BTreeSet<String> = scores.iter().map(|row| row.aspect.to_string()).collect();
    assert_eq!(scored, set("deed reason"));
    assert!(table.contains("test prompts × 2 reward models"), "{table}");
    let header = table.lines().find(|line| line.starts_with("model ")).unwrap();
    assert!(header.ends_with("deed  reason"), "{header}");
    let page = run.page();
    for shown in ["deed", "reason", "ren", "zhi", "2 reward models", "reward&#x2f;reason"] {
        assert!(page.contains(shown), "{shown}");
    }
    for not_shown in ["motivation", "consequence", "humility", "all five", "three reward models"] {
        assert!(!page.contains(not_shown), "{not_shown}");
    }
    let diagnosis = run.run("scoring", &["doctor", "--run", "run"]);
    assert!(diagnosis.contains("deed ") && diagnosis.contains("reason "), "{diagnosis}");

    another_constitution_is_refused(&run);
    an_answer_asks_for_one_reward_model(&run);
}

/// Every virtue has its verdict on every pair, in the constitution's order, and its vote in the scores.
fn judged_by(run: &Run, virtues: &[&str], aspects: &[&str]) {
    let judgements: Vec<JudgementRow> =
        parquet::read(run.at("preferences/judgements.parquet")).unwrap();
    assert_eq!(judgements.len() % virtues.len(), 0);
    for verdicts in judgements.chunks(virtues.len()) {
        let names: Vec<&str> = verdicts.iter().map(|row| row.virtue.name()).collect();
        assert_eq!(names, virtues);
    }
    for (place, aspect) in aspects.iter().enumerate() {
        let file = format!("preferences/{aspect}/train.parquet");
        let pairs: Vec<PreferenceRow> = parquet::read(run.at(&file)).unwrap();
        assert!(pairs.len() >= 8, "{aspect}: {}", pairs.len());
        for pair in pairs {
            assert_eq!(pair.chosen.len(), 1 + 2 * place);
            // By likelihood all virtues say the same.
            assert_eq!((pair.score_chosen, pair.score_rejected), (virtues.len() as i32, 0));
        }
    }
}

/// The shipped constitution has other turns than the conversations: it is refused by the name of the first.
fn another_constitution_is_refused(run: &Run) {
    let shipped = repository().join("data/constitution.toml");
    let output = run.try_run(
        "curation",
        &[
            "preferences",
            "--conversations",
            "run/conversations",
            "--judge",
            "run/sft/merged",
            "--recipe",
            "recipe.toml",
            "--constitution",
            shipped.to_str().unwrap(),
            "--output",
            "run/other",
        ],
    );
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(65), "{stderr}");
    assert!(
        stderr.contains("turn 1: expected `deed`") && stderr.contains("found `action`"),
        "{stderr}"
    );
    // So are reward models of two constitutions, and a reward model of a turn that there is not.
    fs_err::remove_file(run.at("reward/reason/constitution.toml")).unwrap();
    let output = run.try_run(
        "ppo",
        &[
            "train",
            "--prompts",
            "run/prompts",
            "--rewards",
            "run/reward",
            "--model",
            "run/sft/merged",
            "--recipe",
            "recipe.toml",
            "--output",
            "run/other-ppo",
        ],
    );
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(65), "{stderr}");
    assert!(stderr.contains("reward/reason: turn 1: expected `deed`"), "{stderr}");
    fs_err::write(run.at("reward/reason/constitution.toml"), CONFUCIAN).unwrap();
    let output = run.try_run(
        "reward",
        &[
            "train",
            "--aspect",
            "motivation",
            "--preferences",
            "run/preferences",
            "--model",
            "run/sft/merged",
            "--recipe",
            "recipe.toml",
            "--output",
            "run/other-reward",
        ],
    );
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("a turn of the constitution: deed, reason"), "{stderr}");
}

fn an_answer_asks_for_one_reward_model(run: &Run) {
    let reason = run.at("reward/reason");
    fs_err::rename(&reason, run.at("reason-elsewhere")).unwrap();
    run.run(
        "ppo",
        &[
            "train",
            "--rollout",
            "answer",
            "--prompts",
            "run/prompts",
            "--rewards",
            "run/reward",
            "--model",
            "run/sft/merged",
            "--recipe",
            "recipe.toml",
            "--output",
            "run/ppo-answer",
        ],
    );
    let rows: Vec<RolloutRow> =
        parquet::read(run.at("ppo-answer/rollouts/iteration-000001.parquet")).unwrap();
    for row in rows {
        assert_eq!((row.z().len(), row.n_asked(), row.turns.len()), (1, 1, 2));
        assert_eq!(row.turns[0].z.is_some(), row.turns[0].aspect.name() == "deed");
    }
    fs_err::rename(run.at("reason-elsewhere"), reason).unwrap();
}

#[test]
fn one_virtue_and_one_turn_reach_the_page() {
    let constitution = r#"
[[turn]]
name = "answer"

[virtues]
truth = "Which assistant tells more of the truth?"

[personas]
virtuous = "You tell the truth."
vicious = "You lie."

[[principle]]
id = "truth"
virtue = "truth"
critique = "What is untrue in your last reply?"
revision = "Rewrite it truthfully."
"#;
    let run = Run::new(constitution);
    let mut table = String::new();
    for stage in STAGES {
        let printed = run.stage(stage);
        if stage == "scoring" {
            table = printed;
        }
    }
    judged_by(&run, &["truth"], &["answer"]);
    assert!(table.contains("test prompts × 1 reward model)"), "{table}");
    let page = run.page();
    assert!(page.contains("reward&#x2f;answer") && page.contains("one reward model"));
    for not_shown in ["motivation", "consequence", "honesty", "Fleiss"] {
        assert!(!page.contains(not_shown), "{not_shown}");
    }
    let rollouts: Vec<RolloutRow> =
        parquet::read(run.at("ppo/rollouts/iteration-000001.parquet")).unwrap();
    assert!(rollouts.iter().all(|row| row.messages.len() == 2 && row.z().len() == 1));
}
