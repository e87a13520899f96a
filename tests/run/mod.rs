//! A tiny pipeline: its recipe, its stages' commands, and the hashes of what it left.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use arete_records::hashes::sha256_file;
use arete_records::parquet::{self, Row};

/// Prompts of the run.
pub(crate) const N_PROMPTS: usize = 48;

/// Settings for a model of 220 kB: everything small, f32, one thread.
const RECIPE: &str = r#"
[run]
seed = 7
device = "cpu"
dtype = "f32"
threads = 1

[prompts]
limit = 48
max_chars = 120

[demonstrations]
source = "mix"
few_shot = 1
max_new_tokens = 24
constitution = "{data}/constitution.toml"
exemplars = "{data}/demonstrations/exemplars.jsonl"

[sft]
rank = 2
epochs = 1
max_steps = 4
batch_size = 8
max_length = 400
eval_every = 2
checkpoint_every = 2

[conversations]
max_new_tokens = {max_new_tokens}
temperature = 1.0
constitution = "{data}/constitution.toml"

[preferences]
method = "likelihood"
truncated = "{truncated}"
constitution = "{data}/constitution.toml"
exemplars = "{data}/demonstrations/exemplars.jsonl"

[reward]
rank = 2
epochs = 1
batch_size = 10
learning_rate = 1e-3
eval_every = 2
checkpoint_every = 2

[dpo]
rank = 2
epochs = 1
batch_size = 10
learning_rate = 1e-3
eval_every = 2
checkpoint_every = 2

[yardstick]
rank = 2
epochs = 1
max_steps = 2
batch_size = 10

[ppo]
rank = 2
iterations = 3
rollout_size = 8
value_warmup = 0
max_new_tokens = 16
temperature = 1.0
learning_rate = 1e-3
probe_every = 1
probe_prompts = 3
checkpoint_every = 1

[scoring]
max_new_tokens = 16
temperature = 1.0
draws = 500
"#;

/// The stages in order, with where their results go.
pub(crate) const STAGES: [(&str, &str); 10] = [
    ("prompts", "prompts"),
    ("demonstrations", "demonstrations"),
    ("sft", "sft"),
    ("conversations", "conversations"),
    ("preferences", "preferences"),
    ("reward", "reward"),
    ("yardstick", "yardstick"),
    ("ppo", "ppo"),
    ("scoring", "scoring"),
    ("report", "report"),
];

pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the repository")
}

/// The programs lie where `cargo test --workspace` and `make build` put them, beside the tests' directory.
pub(crate) fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the path of this test");
    let name = if name == "arete" { name.to_owned() } else { format!("arete-{name}") };
    let path = test.ancestors().nth(2).expect("target/release").join(name);
    assert!(path.is_file(), "{} is missing: run `make build`", path.display());
    path
}

/// A directory in which the pipeline runs; commands name everything inside it by relative paths, so that two of them can be
/// compared byte by byte.
pub(crate) struct Pipeline {
    dir: PathBuf,
    /// Variables of every stage's environment.
    environment: &'static [(&'static str, &'static str)],
}

impl Pipeline {
    /// An empty one with the recipe and labelled pairs.
    pub(crate) fn new(name: &str, truncated: &str, max_new_tokens: usize) -> Self {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("pipeline").join(name);
        if dir.exists() {
            fs_err::remove_dir_all(&dir).unwrap();
        }
        fs_err::create_dir_all(&dir).unwrap();
        let data = repository().join("data");
        let recipe = RECIPE
            .replace("{data}", data.to_str().unwrap())
            .replace("{truncated}", truncated)
            .replace("{max_new_tokens}", &max_new_tokens.to_string());
        fs_err::write(dir.join("recipe.toml"), recipe).unwrap();
        let pairs: Vec<String> = (0..40)
            .map(|idx| {
                let say =
                    |reply: &str| format!("\n\nHuman: Is case {idx} fair?\n\nAssistant: {reply}");
                let (chosen, rejected) = (say("I would ask first and listen."), say("Who cares."));
                serde_json::json!({ "chosen": chosen, "rejected": rejected }).to_string()
            })
            .collect();
        fs_err::write(dir.join("pairs.jsonl"), pairs.join("\n")).unwrap();
        Self { dir, environment: &[] }
    }

    /// Sets variables of every stage's environment.
    pub(crate) fn with(mut self, environment: &'static [(&'static str, &'static str)]) -> Self {
        self.environment = environment;
        self
    }

    /// A copy with all that it has come to.
    pub(crate) fn copied(&self, name: &str) -> Self {
        let copy = Self::new(name, "keep", 24);
        copy_tree(&self.dir, &copy.dir);
        copy
    }

    /// Puts a folder of the run back as it is in `other`.
    pub(crate) fn put_back(&self, folder: &str, other: &Self) {
        fs_err::remove_dir_all(self.at(folder)).unwrap();
        copy_tree(&other.at(folder), &self.at(folder));
    }

    pub(crate) fn at(&self, path: &str) -> PathBuf {
        self.dir.join("run").join(path)
    }

    /// The command of a stage, as in the Makefile.
    pub(crate) fn command(&self, stage: &str) -> Command {
        let model = repository().join("tests/fixtures/tiny-chat");
        let prompts = repository().join("data/prompts");
        let (model, prompts) = (model.to_str().unwrap(), prompts.to_str().unwrap());
        let base = "run/sft/merged";
        let (name, arguments): (&str, Vec<&str>) = match stage {
            "prompts" => ("curation", vec!["prompts", "--input", prompts]),
            "demonstrations" => {
                ("curation", vec!["demonstrations", "--prompts", "run/prompts", "--model", model])
            }
            "sft" => {
                ("sft", vec!["train", "--demonstrations", "run/demonstrations", "--model", model])
            }
            "conversations" => {
                ("curation", vec!["conversations", "--prompts", "run/prompts", "--model", base])
            }
            "preferences" => {
                let from = ["preferences", "--conversations", "run/conversations", "--judge", base];
                ("curation", from.to_vec())
            }
            "reward" => {
                let from = ["train", "--aspect", "all", "--preferences", "run/preferences"];
                let of = ["--conversations", "run/conversations", "--model", base];
                ("reward", [&from[..], &of].concat())
            }
            "dpo" => ("dpo", vec!["train", "--preferences", "run/preferences", "--model", base]),
            "yardstick" => ("reward", vec!["train", "--pairs", "pairs.jsonl", "--model", base]),
            "ppo" => {
                let from = ["train", "--prompts", "run/prompts", "--reward", "run/reward"];
                ("ppo", [&from[..], &["--yardstick", "run/yardstick", "--model", base]].concat())
            }
            "scoring" => {
                let models = ["--original", model, "--sft", base, "--final", "run/ppo"];
                let by = ["--reward", "run/reward", "--yardstick", "run/yardstick"];
                let of = ["score", "--prompts", "run/prompts", "--pairs", "pairs.jsonl"];
                ("scoring", [&of[..], &models, &by].concat())
            }
            "report" => ("scoring", vec!["report", "--run", "run"]),
            "doctor" => ("scoring", vec!["doctor", "--run", "run"]),
            other => unreachable!("{other}"),
        };
        let mut command = Command::new(program(name));
        command.current_dir(&self.dir).args(arguments).envs(self.environment.iter().copied());
        if stage != "doctor" {
            command.args(["--recipe", "recipe.toml", "--output", &format!("run/{stage}")]);
        }
        command.stdin(Stdio::null());
        command
    }

    /// The command of a stage with results in another folder of the run and further flags, by its program.
    pub(crate) fn command_to(&self, stage: &str, folder: &str, flags: &[&str]) -> Vec<String> {
        let command = self.command(stage);
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let mut words: Vec<String> = words.map(|word| word.to_str().unwrap().to_owned()).collect();
        let output = words.iter().position(|word| word == "--output").unwrap();
        words[output + 1] = format!("run/{folder}");
        words.extend(flags.iter().map(|&flag| flag.to_owned()));
        words
    }

    /// A program in the pipeline's directory and environment.
    pub(crate) fn words(&self, words: &[String]) -> Command {
        let mut command = Command::new(&words[0]);
        command.current_dir(&self.dir).args(&words[1..]).envs(self.environment.iter().copied());
        command.stdin(Stdio::null());
        command
    }

    pub(crate) fn try_run(&self, stage: &str) -> Output {
        self.command(stage).output().expect("the program starts")
    }

    /// Runs a stage; what it printed and logged.
    pub(crate) fn run(&self, stage: &str) -> (String, String) {
        let output = self.try_run(stage);
        let [stdout, stderr] = [&output.stdout, &output.stderr].map(|b| text(b));
        assert!(output.status.success(), "{stage}: {}\n{stderr}", output.status);
        (stdout, stderr)
    }

    /// Every file but those with times in them, with its hash.
    pub(crate) fn files(&self) -> BTreeMap<String, String> {
        self.files_of("")
    }

    /// Those of a folder of the run.
    pub(crate) fn files_of(&self, folder: &str) -> BTreeMap<String, String> {
        let root = self.dir.join("run").join(folder);
        let (mut files, mut waiting) = (BTreeMap::new(), vec![root.clone()]);
        while let Some(dir) = waiting.pop() {
            for entry in fs_err::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                let is_timed = ["timings.jsonl", "machine.json"].contains(&name.as_str())
                    || name.starts_with("events.out.tfevents");
                if path.is_dir() {
                    waiting.push(path);
                } else if !is_timed && !name.starts_with('.') {
                    let inside = path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
                    let sum = lasting(&path).unwrap_or_else(|| sha256_file(&path).unwrap());
                    files.insert(inside, sum);
                }
            }
        }
        files
    }

    pub(crate) fn rows<T: Row>(&self, path: &str) -> Vec<T> {
        parquet::read(self.at(path)).unwrap()
    }
}

fn copy_tree(from: &Path, to: &Path) {
    fs_err::create_dir_all(to).unwrap();
    for entry in fs_err::read_dir(from).unwrap() {
        let (path, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        if path.is_dir() {
            copy_tree(&path, &to);
        } else {
            fs_err::copy(path, to).unwrap();
        }
    }
}

/// What a page and the record of it hold but for the date and the machine, which stand in one element of the page; none of any
/// other file.
fn lasting(path: &Path) -> Option<String> {
    let read = || fs_err::read_to_string(path).unwrap();
    if path.ends_with("report.html") {
        let html = read();
        let (before, rest) = html.split_once("<aside id=\"made\"").unwrap();
        let (_, after) = rest.split_once("</aside>").unwrap();
        return Some(before.to_owned() + after);
    }
    if path.ends_with("report/run.json") {
        let mut record: serde_json::Value = serde_json::from_str(&read()).unwrap();
        record["outputs"]["report.html"] = serde_json::Value::Null;
        record["sha256"] = serde_json::Value::Null;
        return Some(record.to_string());
    }
    None
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
