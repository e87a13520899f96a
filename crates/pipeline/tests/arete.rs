//! `arete` on the tiny chat model: plan, refusals, a whole run and a second one, what makes which stage stale, kills, sweeps,
//! starter folders, spellings of recipes. Every path has a blank in it.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]
#![expect(clippy::print_stdout, reason = "a test says what it measured")]

mod common;

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use arete_records::hashes::{sha256_file, walk};
use common::{
    HELLO, STAGES, arete, bytes, done, ended, folder, not_complete, ran, repository, results, run,
    send, states, text, until, with_recipe,
};
use serde_json::{Value, json};

#[test]
fn hello_runs_every_stage_and_a_second_run_does_nothing() {
    let hello = &*HELLO;
    for stage in STAGES {
        let dirs = match stage {
            "reward" => {
                ["action", "motivation", "consequence"].map(|a| format!("reward/{a}")).to_vec()
            }
            stage => vec![stage.to_owned()],
        };
        for dir in dirs {
            assert!(hello.dir.join(&dir).join("run.json").is_file(), "{dir}");
        }
    }
    let page = hello.dir.join("report/report.html");
    assert!(
        hello.ran.stdout.ends_with(&format!("report: {}\n", page.display())),
        "{}",
        hello.ran.stdout
    );
    assert!(hello.ran.stdout.contains("original") && hello.ran.stdout.contains("final"));
    // Twenty seconds on an idle machine; this one builds and tests beside it.
    assert!(hello.took < Duration::from_secs(120), "{:?}", hello.took);

    assert_eq!(not_complete(&hello.recipe(), &hello.dir, &["--exit-code"]), []);
    let before = results(&hello.dir);
    let again = done(&["hello", "--run", text(&hello.dir)]);
    for stage in STAGES {
        let mut line = again.stderr.lines().filter(|line| line.starts_with(stage));
        assert!(line.next_back().unwrap().ends_with("up to date"), "{stage}: {}", again.stderr);
    }
    assert_eq!(results(&hello.dir), before);
    assert_eq!(again.stdout, hello.ran.stdout);
}

#[test]
fn a_dry_run_shows_the_whole_plan_and_writes_nothing() {
    let dir = folder("dry");
    let run_dir = dir.join("my run");
    let plan = done(&with_recipe("run", &HELLO.recipe(), &run_dir, &["--dry-run"])).stdout;
    let at = |stage: &str| {
        plan.find(&format!("\n  {stage}")).unwrap_or_else(|| panic!("{stage}: {plan}"))
    };
    let places = STAGES.map(at);
    assert!(places.is_sorted(), "{plan}");
    assert!(plan.lines().skip(1).all(|line| line.ends_with("runs")), "{plan}");
    assert!(plan.contains(" GB"), "{plan}");
    assert!(!run_dir.exists());
    // DPO is in where it is asked for; of the others, what a stage needs and no more.
    let plan = |words: &[&str]| {
        let words = [words, &["--dry-run"]].concat();
        let text = done(&with_recipe("run", &HELLO.recipe(), &run_dir, &words)).stdout;
        let stage = |line: &str| line.split_whitespace().next().unwrap().to_owned();
        text.lines().skip(1).map(stage).collect::<Vec<_>>()
    };
    assert_eq!(plan(&["--until", "conversations"]), STAGES[..4]);
    assert_eq!(plan(&["--from", "ppo"]), STAGES[6..]);
    assert_eq!(plan(&["--only", "reward"]), ["reward"]);
    let with_dpo = plan(&["--set", "dpo.enabled=true"]);
    assert_eq!(with_dpo, [&STAGES[..6], &["dpo"], &STAGES[6..]].concat());
    // Without SFT nobody reads demonstrations.
    let without = plan(&["--set", "sft.enabled=false"]);
    assert_eq!(without, [&STAGES[..1], &STAGES[3..]].concat());
    // Of a complete run: nothing to do, and how long each took.
    let plan = done(&with_recipe("run", &HELLO.recipe(), &HELLO.dir, &["--dry-run"])).stdout;
    assert!(plan.lines().skip(1).all(|line| line.ends_with("up to date")), "{plan}");
    assert!(plan.lines().skip(1).all(|line| line.contains(" s ")), "{plan}");
}

#[test]
fn what_is_wrong_is_refused_before_the_first_stage() {
    let dir = folder("refused");
    let run_dir = dir.join("my run");
    let recipe = dir.join("my recipe.toml");
    let hello = fs_err::read_to_string(HELLO.recipe()).unwrap();
    let refused = |recipe_text: &str, words: &[&str], code: i32, expected: &[&str]| {
        fs_err::write(&recipe, recipe_text).unwrap();
        let ran = run(&with_recipe("run", &recipe, &run_dir, words));
        assert_eq!(ran.code, Some(code), "{words:?}: {}", ran.stderr);
        for part in expected {
            assert!(ran.stderr.contains(part), "{part}: {}", ran.stderr);
        }
        assert!(!run_dir.exists(), "{words:?}");
    };
    let typo = hello.replace("[ppo]\n", "[ppo]\nkl_coeff = 0.1\n");
    let nearest = "unknown key `kl_coeff` in `[ppo]`, did you mean `kl_coef`?";
    refused(&typo, &[], 65, &["my recipe.toml", nearest]);
    refused(&typo, &["--until", "prompts"], 65, &[nearest]);
    refused(&hello, &["--set", "ppo.kl_coeff=0.1"], 65, &["--set", nearest]);
    refused(&hello, &["--set", "ppo.iterations=many"], 65, &["key `iterations` in `[ppo]`"]);
    refused(&hello, &["--set", "scoring.draws=0"], 2, &["draws", "at least 1"]);
    // Values that no stage can use, of every table, those of stages that are left out among them.
    for (setting, expected) in [
        ("prompts.max_chars=0", "max_chars: expected at least 1"),
        ("demonstrations.rounds=0", "rounds: expected at least 1"),
        ("sft.rank=0", "rank: expected at least 1"),
        ("sft.alpha=-1", "alpha: expected a number above 0"),
        ("sft.learning_rate=-1", "learning_rate: expected a number of at least 0"),
        ("sft.warmup_ratio=2", "warmup_ratio: expected a number within 0 to 1"),
        ("sft.epochs=0", "epochs: expected at least 1"),
        ("sft.max_length=1", "max_length: expected at least 2"),
        ("conversations.temperature=-1", "temperature: expected a number of at least 0"),
        ("conversations.top_p=2", "top_p: expected a number above 0, at most 1"),
        ("conversations.samples_per_prompt=9", "samples_per_prompt: expected 2 to 8"),
        ("preferences.tie_margin=0.5", "tie_margin: expected a number below one half"),
        ("preferences.judge_template=who", "judge_template: expected a text with {a}"),
        ("reward.folds=1", "folds: expected two or more"),
        ("reward.weight_decay=-1", "weight_decay: expected a number of at least 0"),
        ("dpo.beta=0", "beta: expected a number above 0"),
        ("ppo.rank=0", "rank: expected at least 1"),
        ("scoring.top_p=-1", "top_p: expected a number above 0, at most 1"),
        ("yardstick.batch_size=0", "batch_size: expected at least 1"),
    ] {
        let table = setting.split('.').next().unwrap();
        // The recipe's judge reads likelihoods and is shown no template.
        let method = ["--set", "preferences.method=pairwise-logits", "--set", setting];
        refused(&hello, &method, 2, &[&format!("[{table}]"), expected]);
    }
    let two = dir.join("two.jsonl");
    fs_err::write(&two, "{\"prompt\": \"a?\"}\n{\"prompt\": \"b?\"}\n").unwrap();
    let for_testing = "scoring needs a prompt for testing";
    refused(&hello, &["--prompts", text(&two)], 65, &["two.jsonl", for_testing]);
    let folder = format!("demonstrations.constitution={}", dir.display());
    refused(&hello, &["--set", &folder], 65, &["expected a file, found a directory"]);
    refused(&hello, &["--set", "preferences.pairs=['/no']"], 65, &["/no: no such file"]);
    let calibration = "preferences.calibration=/no";
    refused(&hello, &["--set", calibration], 65, &["/no: no such file"]);
    refused(&hello, &["--set", "calibrate.limits=3"], 65, &["did you mean `limit`?"]);
    refused(&hello, &["--set", "ppo"], 2, &["table.key=value"]);
    refused(&hello, &["--model", "no/where/at all"], 2, &["no/where/at all"]);
    refused(&hello, &["--prompts", "/no such file"], 65, &["/no such file: no such file"]);
    refused(&hello, &["--pairs", "/no pairs"], 65, &["/no pairs: no such file"]);
    refused(&hello, &["--set", "demonstrations.exemplars=no"], 65, &["no: no such file"]);
    refused(&hello, &["--set", "reward.enabled=false"], 2, &["`ppo` reads `reward`"]);
    refused(&hello, &["--set", "sft.enabled=perhaps"], 65, &["expected true or false"]);
    let closed = "http://127.0.0.1:9/v1";
    let url = format!("conversations.engine_url={closed}");
    refused(&hello, &["--set", &url], 69, &["no server answers at 127.0.0.1:9"]);
    let missing = run(&with_recipe("run", &dir.join("no.toml"), &run_dir, &[]));
    assert!(missing.stderr.contains("no.toml: no such file"), "{}", missing.stderr);
    let none = run(&["run", "--run", text(&run_dir), "--prompts", text(&recipe)]);
    assert_eq!(none.code, Some(2));
    assert!(none.stderr.contains("name the model"), "{}", none.stderr);
}

#[test]
fn status_says_which_key_or_input_makes_exactly_which_stage_stale() {
    let (recipe, dir) = (HELLO.recipe(), &HELLO.dir);
    for (setting, stage, key) in [
        ("conversations.temperature=0.9", "conversations", "temperature"),
        ("reward.learning_rate=2e-3", "reward", "learning_rate"),
        ("ppo.kl_coef=0.02", "ppo", "kl_coef"),
        ("report.max_samples=5", "report", "max_samples"),
    ] {
        let words = ["--set", setting];
        let stale = (stage.to_owned(), "stale".to_owned());
        assert_eq!(not_complete(&recipe, dir, &words), [stale], "{setting}");
        let states = states(&recipe, dir, &words);
        assert_eq!(states[stage]["changes"][0]["key"], key, "{setting}");
        let ran =
            run(&with_recipe("status", &recipe, dir, &[&words[..], &["--exit-code"]].concat()));
        assert_eq!(ran.code, Some(1));
        let line = ran.stdout.lines().find(|line| line.starts_with(stage)).unwrap();
        assert!(line.contains(&format!("recipe key `{key}`")), "{line}");
    }
    // How a result is made changes nothing that was made.
    assert_eq!(not_complete(&recipe, dir, &["--device", "auto"]), []);
    assert_eq!(not_complete(&recipe, dir, &["--device", "cpu"]), []);
    // Another file of prompts is another input, of one stage.
    let other = folder("other prompts").join("prompts.jsonl");
    let prompts = fs_err::read_to_string(dir.join("inputs/prompts.jsonl")).unwrap();
    fs_err::write(&other, prompts.lines().take(60).collect::<Vec<_>>().join("\n")).unwrap();
    let words = ["--prompts", text(&other)];
    assert_eq!(not_complete(&recipe, dir, &words), [("prompts".to_owned(), "stale".to_owned())]);
    let states = states(&recipe, dir, &words);
    assert_eq!(states["prompts"]["changes"][0]["what"], "input");
}

#[test]
fn a_run_that_is_stopped_goes_on_and_ends_with_the_same_bytes() {
    let dir = folder("stopped").join("my run");
    let recipe = HELLO.recipe();
    let words = with_recipe("run", &recipe, &dir, &[]);
    let begin = || arete(&words).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    // The stage's process is gone when nobody holds its lock any more.
    let ended = |stage: &str| ended(&dir.join(stage));

    // Asked to stop while the policy is trained: the stage ends with a checkpoint, and its exit code is the run's.
    let mut child = begin();
    until("PPO begins", || dir.join("ppo/metrics.jsonl").exists());
    send("TERM", &child);
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert!(ended("ppo"));
    let seen = states(&recipe, &dir, &[]);
    assert_eq!(seen["reward"]["state"], "complete");
    assert_eq!(seen["ppo"]["state"], "half_done", "{seen:?}");
    assert!(seen["ppo"]["how_far"].as_str().unwrap().starts_with("checkpoint of step"), "{seen:?}");
    assert_eq!(seen["scoring"]["state"], "missing");

    // Killed outright: no stage stays behind.
    let mut child = begin();
    until("PPO goes on", || !ended("ppo"));
    send("KILL", &child);
    child.wait().unwrap();
    until("its stage ends", || ended("ppo"));

    let ran = done(&words);
    assert!(ran.stderr.lines().any(|line| line.starts_with("sft") && line.ends_with("up to date")));
    let (own, uninterrupted) = (bytes(&dir), bytes(&HELLO.dir));
    assert!(own.len() > 20, "{own:?}");
    assert_eq!(own, uninterrupted);
    assert_eq!(not_complete(&recipe, &dir, &[]), []);
}

#[test]
fn the_exit_code_of_a_stage_is_that_of_the_run() {
    let dir = folder("too few").join("my run");
    let recipe = HELLO.recipe();
    let more = ["--until", "preferences", "--set", "preferences.min_pairs=1000"];
    let ran = run(&with_recipe("run", &recipe, &dir, &more));
    assert_eq!(ran.code, Some(65), "{}", ran.stderr);
    assert!(ran.stderr.contains("pairs left"), "{}", ran.stderr);
    assert!(ran.stderr.contains("preferences     ended with exit code 65"), "{}", ran.stderr);
    let log = fs_err::read_to_string(dir.join("logs/preferences.log")).unwrap();
    assert!(log.contains("pairs left"), "{log}");
    // What it is set to on the command line stands where the recipe's values stand.
    let conversations = done(&with_recipe(
        "run",
        &recipe,
        &dir,
        &["--only", "conversations", "--set", "conversations.seed=9"],
    ));
    assert!(conversations.stderr.contains("done in"), "{}", conversations.stderr);
    let recorded = fs_err::read_to_string(dir.join("conversations/run.json")).unwrap();
    let recorded: Value = serde_json::from_str(&recorded).unwrap();
    assert_eq!(recorded["seed"], 9);
    assert!(dir.join("conversations.old-1/run.json").is_file(), "what was there is kept");
}

#[test]
fn damage_is_seen() {
    let dir = folder("damaged").join("my run");
    let recipe = HELLO.recipe();
    done(&with_recipe("run", &recipe, &dir, &["--only", "prompts"]));
    fs_err::write(dir.join("prompts/prompts.parquet"), b"nothing").unwrap();
    let seen = states(&recipe, &dir, &[]);
    assert_eq!(seen["prompts"]["state"], "damaged");
    assert_eq!(seen["prompts"]["file"], "prompts.parquet");
}

#[test]
fn trainings_are_written_as_wandb_s_client_leaves_them_and_once() {
    let output = folder("wandb");
    let words = ["wandb", "--run", text(&HELLO.dir), "--output", text(&output)];
    let first = done(&words).stdout;
    let dirs: Vec<&Path> = first.lines().map(Path::new).collect();
    // SFT, three reward models, PPO.
    assert_eq!(dirs.len(), 5, "{first}");
    for dir in dirs {
        let name = dir.file_name().unwrap().to_str().unwrap();
        let id = name.rsplit('-').next().unwrap();
        assert!(name.starts_with("offline-run-20") && id.len() == 8, "{name}");
        let bytes = fs_err::read(dir.join(format!("run-{id}.wandb"))).unwrap();
        assert!(bytes.starts_with(b":W&B\xe1\xbe\x00") && dir.join("files").is_dir());
    }
    assert_eq!(done(&words).stdout, first, "again, in the same places");
    let none = run(&["wandb", "--run", text(&HELLO.dir.join("prompts"))]);
    assert_eq!(none.code, Some(65), "{}", none.stderr);
}

#[test]
fn a_run_s_name_may_hold_the_date() {
    let dir = folder("dated");
    let named = dir.join("study-{date}");
    done(&with_recipe("run", &HELLO.recipe(), &named, &["--only", "prompts"]));
    let found: Vec<String> = fs_err::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let [found] = &found[..] else { panic!("{found:?}") };
    let digits = found.strip_prefix("study-").unwrap();
    assert!(digits.len() == 10 && digits.split('-').count() == 3, "{found}");
    assert!(dir.join(found).join("prompts/run.json").is_file());
}

#[test]
fn a_sweep_shares_what_its_values_do_not_touch() {
    let dir = folder("sweep").join("my sweep");
    let recipe = HELLO.recipe();
    let setting = ["--set", "ppo.learning_rate=1e-3,3e-3"];
    let plan = done(&with_recipe("sweep", &recipe, &dir, &[&setting[..], &["--dry-run"]].concat()));
    assert!(plan.stderr.contains("2 combinations"), "{}", plan.stderr);
    assert!(!dir.exists());
    let ran = done(&with_recipe("sweep", &recipe, &dir, &setting));
    let names = ["ppo.learning_rate=0.001", "ppo.learning_rate=0.003"];
    for name in names {
        let one = dir.join(name);
        for shared in &STAGES[..6] {
            let link = fs_err::read_link(one.join(shared)).unwrap();
            assert_eq!(link, Path::new("../shared").join(shared));
        }
        assert!(one.join("ppo/run.json").is_file() && one.join("report/report.html").is_file());
        assert!(ran.stdout.contains(&format!("| {name} | final |")), "{}", ran.stdout);
        // Each is a whole run by itself.
        let value = format!("ppo.learning_rate={}", name.rsplit('=').next().unwrap());
        assert_eq!(not_complete(&recipe, &one, &["--set", &value]), []);
    }
    // One of the two is hello's, whose stages were not shared.
    let own = |dir: &Path| sha256_file(dir.join("ppo/adapter/adapter_model.safetensors")).unwrap();
    assert_eq!(own(&dir.join(names[0])), own(&HELLO.dir));
    assert_ne!(own(&dir.join(names[1])), own(&HELLO.dir));
    let table = fs_err::read_to_string(dir.join("sweep.md")).unwrap();
    let page = dir.join("sweep.html");
    assert_eq!(format!("{table}page: {}\n", page.display()), ran.stdout);
    // The combinations share their reward models, by which they are compared without a yardstick.
    assert!(
        table.contains("score, all turns") && table.contains("corrected for 3 looks"),
        "{table}"
    );
    let html = fs_err::read_to_string(page).unwrap();
    assert!(names.iter().all(|name| html.contains(name)) && html.contains("score, all turns"));
    let one = run(&with_recipe("sweep", &recipe, &dir, &["--set", "ppo.kl_coef=0.1"]));
    assert_eq!(one.code, Some(2), "{}", one.stderr);
    let twice = ["--set", "ppo.kl_coef=0.1,0.2", "--set", "ppo.kl_coef=0.3,0.4"];
    let refused = run(&with_recipe("sweep", &recipe, &dir, &twice));
    assert_eq!(refused.code, Some(2), "{}", refused.stderr);
    assert!(refused.stderr.contains("`ppo.kl_coef` comes twice"), "{}", refused.stderr);
}

#[test]
fn a_sweep_over_what_a_stage_is_given_does_not_share_it() {
    let dir = folder("sweep-given");
    let shared = |values: &str| {
        let words = ["--set", values, "--dry-run"];
        let plan = done(&with_recipe("sweep", &HELLO.recipe(), &dir, &words)).stderr;
        plan.lines().find_map(|line| line.split_once("once for all: ")).unwrap().1.to_owned()
    };
    let [all, one] =
        ["data/prompts", "data/prompts/advice.jsonl"].map(|name| repository().join(name));
    assert_eq!(shared(&format!("run.prompts={},{}", text(&all), text(&one))), "");
    let model = repository().join("tests/fixtures/tiny-chat");
    let judges = format!("run.judge={},{}", text(&model), text(&HELLO.dir.join("sft/merged")));
    assert_eq!(shared(&judges), "conversations, demonstrations, prompts, sft");
}

#[test]
fn a_starter_folder_runs_as_it_is_and_is_never_written_over() {
    let dir = folder("new").join("my study");
    let model = repository().join("tests/fixtures/tiny-chat");
    done(&["new", text(&dir), "--model", text(&model)]);
    let files = walk(&dir, &|_| false).unwrap();
    let expected =
        ["README.md", "constitution.toml", "exemplars.jsonl", "prompts.jsonl", "recipe.toml"];
    assert_eq!(files, expected);
    let readme = fs_err::read_to_string(dir.join("README.md")).unwrap();
    assert!(readme.lines().count() <= 10);
    fs_err::write(dir.join("README.md"), "mine").unwrap();
    let again = run(&["new", text(&dir)]);
    assert_eq!(again.code, Some(2), "{}", again.stderr);
    assert_eq!(fs_err::read_to_string(dir.join("README.md")).unwrap(), "mine");
    // The README's own lines, smaller for the test's sake, from within the folder.
    let words = ["--recipe", "recipe.toml", "--run", "run"];
    let smaller = [
        "run.threads=1",
        "prompts.limit=48",
        "sft.max_steps=2",
        "conversations.max_new_tokens=12",
        "preferences.truncated=keep", // so small a model ends no sentence
        "reward.max_steps=2",
        "ppo.iterations=1",
        "ppo.value_warmup=0",
        "ppo.max_new_tokens=12",
        "ppo.probe_prompts=2",
        "scoring.max_new_tokens=12",
        "scoring.draws=200",
    ];
    let set: Vec<&str> = smaller.iter().flat_map(|setting| ["--set", setting]).collect();
    let within = |command: &str, more: &[&str]| {
        let words = [&[command][..], &words, more].concat();
        ran(&arete(&words).current_dir(&dir).output().unwrap())
    };
    let plan = within("run", &["--dry-run"]);
    assert_eq!(plan.code, Some(0), "{}", plan.stderr);
    let whole = within("run", &set);
    assert_eq!(whole.code, Some(0), "{}", whole.stderr);
    assert!(dir.join("run/report/report.html").is_file());
    let page = fs_err::read_to_string(dir.join("run/report/report.html")).unwrap();
    assert!(page.contains("--set ppo.iterations=1"), "the page shows what was set");
    let status = within("status", &[&set[..], &["--exit-code"]].concat());
    assert_eq!(status.code, Some(0), "{}", status.stdout);
}

/// The same recipe in the spellings that TOML allows: one parser reads them all.
#[test]
fn every_spelling_of_a_recipe_is_the_same_recipe() {
    let dir = folder("spellings");
    let model = repository().join("tests/fixtures/tiny-chat");
    let model = text(&model);
    let plain = format!("[run]\nmodel = \"{model}\"\n[sft]\nenabled = false\n");
    let spellings = [
        ("plain", plain.clone()),
        ("line ends of Windows", plain.replace('\n', "\r\n")),
        ("byte order mark", format!("\u{feff}{plain}")),
        ("blanks after", plain.replace('\n', "  \n")),
        ("blanks inside brackets", plain.replace("[run]", "[ run ]").replace("[sft]", "[ sft ]")),
        ("indented", plain.replace('\n', "\n  ")),
        ("tabs", plain.replace(" = ", "\t=\t")),
        ("dotted", format!("run.model = \"{model}\"\nsft.enabled = false\n")),
        ("inline", format!("run = {{ model = \"{model}\" }}\nsft = {{ enabled = false }}\n")),
        ("quoted keys", plain.replace("model =", "\"model\" =").replace("enabled", "\"enabled\"")),
        ("single quotes", plain.replace('"', "'")),
        ("a comment with an equals sign", plain.replace("\"\n", "\" # the best = ours\n")),
    ];
    let prompts = dir.join("prompts.jsonl");
    let questions = ["How do I apologise?", "How do I listen?", "How do I wait?"];
    let lines = questions.map(|question| json!({"prompt": question}).to_string());
    fs_err::write(&prompts, lines.join("\n")).unwrap();
    let data = repository().join("data/constitution.toml");
    let constitution = format!("preferences.constitution={}", text(&data));
    for (name, spelling) in spellings {
        let recipe = dir.join("a recipe.toml");
        fs_err::write(&recipe, spelling).unwrap();
        let words = ["--dry-run", "--prompts", text(&prompts), "--set", &constitution];
        let plan = done(&with_recipe("run", &recipe, &dir.join("run"), &words)).stdout;
        let first = plan.lines().next().unwrap();
        assert!(first.ends_with(model), "{name}: {plan}");
        assert!(!plan.contains("\n  sft") && plan.contains("\n  ppo"), "{name}: {plan}");
    }
    // A hash sign in a path is part of it.
    let hash = dir.join("my#model");
    fs_err::create_dir(&hash).unwrap();
    for entry in fs_err::read_dir(model).unwrap() {
        let entry = entry.unwrap();
        fs_err::copy(entry.path(), hash.join(entry.file_name())).unwrap();
    }
    let recipe = dir.join("hash.toml");
    fs_err::write(&recipe, plain.replace(model, text(&hash))).unwrap();
    let words = ["--dry-run", "--prompts", text(&prompts), "--set", &constitution];
    let plan = done(&with_recipe("run", &recipe, &dir.join("run"), &words)).stdout;
    assert!(plan.lines().next().unwrap().ends_with("my#model"), "{plan}");
}

#[test]
fn the_shell_learns_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let completions = done(&["completions", shell]).stdout;
        for word in ["arete", "status", "sweep", "--until"] {
            let word = if shell == "fish" { word.trim_start_matches('-') } else { word };
            assert!(completions.contains(word), "{shell}: {word}");
        }
    }
    let page = done(&["man"]).stdout;
    assert!(page.starts_with(".ie") || page.contains(".TH arete"), "{page}");
    let dir = folder("man").join("pages");
    done(&["man", "--output", text(&dir)]);
    assert!(fs_err::read_to_string(dir.join("arete-run.1")).unwrap().contains("until"));
    let stages = done(&["stages"]).stdout;
    assert!(STAGES.iter().all(|stage| stages.contains(stage)), "{stages}");
}
