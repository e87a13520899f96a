//! What programs say of files without an end, numbers without a sense, and a system that has no more to give.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

#[expect(dead_code, reason = "the test of the pipeline uses the rest")]
mod run;

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use run::{program, repository};

/// Runs words of a command line in the repository, after a line of shell; exit code and what it said on stderr.
fn says(before: &str, words: &[&str], stdin: Option<&str>) -> (Option<i32>, String) {
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("{before}; exec \"$@\"")).arg("sh");
    command.arg(program(words[0])).args(&words[1..]).current_dir(repository());
    command.env("OMP_NUM_THREADS", "1").stdin(Stdio::piped());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut pipe = child.stdin.take().unwrap();
    pipe.write_all(stdin.unwrap_or_default().as_bytes()).unwrap();
    drop(pipe);
    let output = child.wait_with_output().unwrap();
    (output.status.code(), run::text(&output.stderr))
}

#[track_caller]
fn refused(words: &[&str], code: i32, needles: &[&str]) {
    let (found, stderr) = says(":", words, None);
    assert_eq!(found, Some(code), "{words:?}: {stderr}");
    for needle in needles {
        assert!(stderr.contains(needle), "{words:?}: expected `{needle}` in: {stderr}");
    }
}

const MODEL: &str = "tests/fixtures/tiny-chat";

/// `--constitution /dev/zero` took all memory before it said anything.
#[test]
fn devices_are_no_settings() {
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("output");
    let output = output.to_str().unwrap();
    let zero = "/dev/zero";
    let expected = ["/dev/zero", "expected a regular file"];
    refused(&["arete", "run", "--recipe", zero], 65, &expected);
    let prompts = ["curation", "prompts", "--input", "data/prompts", "--output", output];
    refused(&[&prompts[..], &["--recipe", zero]].concat(), 65, &expected);
    let of = ["--prompts", "tests/fixtures/earlier/v1/prompts", "--model", MODEL];
    let conversations = [&["curation", "conversations", "--output", output], &of[..]].concat();
    refused(&[&conversations[..], &["--constitution", zero]].concat(), 65, &expected);
    let from = ["--conversations", "tests/fixtures/earlier/v1/conversations", "--judge", MODEL];
    let preferences = [&["curation", "preferences", "--output", output], &from[..]].concat();
    refused(&[&preferences[..], &["--calibration", zero]].concat(), 65, &expected);
}

/// Every stage's own program asks the plan before it loads a model, as `arete run` does.
#[test]
fn what_no_machine_has_room_for_is_refused_before_a_model_is_loaded() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name).to_str().unwrap().to_owned();
    let say = |reply: &str| serde_json::json!([{"role": "user", "content": "Is it fair?"}, {"role": "assistant", "content": reply}]);
    let (chats, pairs) = (at("chats.jsonl"), at("pairs.jsonl"));
    let rows = (0..4).map(|_| {
        serde_json::json!({"messages": say("I would ask."), "split": "train"}).to_string() + "\n"
    });
    fs_err::write(&chats, rows.collect::<String>()).unwrap();
    let rows = (0..20).map(|idx| {
        let chosen = say(&format!("I would ask {idx}."));
        serde_json::json!({"chosen": chosen, "rejected": say("Who cares.")}).to_string() + "\n"
    });
    fs_err::write(&pairs, rows.collect::<String>()).unwrap();
    let earlier = "tests/fixtures/earlier/v1";
    let of = |part: &str| format!("{earlier}/{part}");
    let (prompts, preferences) = (of("prompts"), of("preferences"));
    let training = ["--batch-size", "100000000", "--micro-batch-tokens", "2000000000"];
    let training = [&training[..], &["--max-length", "100000"]].concat();
    let sampling = ["--max-new-tokens", "100000000"];
    let [model, cpu] = [["--model", MODEL], ["--device", "cpu"]];
    for (words, more) in [
        (vec!["sft", "train", "--demonstrations", &chats, model[0], model[1]], &training[..]),
        (vec!["reward", "train", "--pairs", &pairs, model[0], model[1]], &training),
        (vec!["dpo", "train", "--preferences", &preferences, model[0], model[1]], &training),
        (
            vec![
                "ppo",
                "train",
                "--prompts",
                &prompts,
                "--programmed-reward",
                "letter:e",
                model[0],
                model[1],
            ],
            &sampling,
        ),
        (vec!["curation", "conversations", "--prompts", &prompts, model[0], model[1]], &sampling),
        (vec!["curation", "demonstrations", "--prompts", &prompts, model[0], model[1]], &sampling),
    ] {
        let output = at(&format!("{}-{}", words[0], words[1]));
        let words = [&words[..], &cpu, more, &["--output", &output]].concat();
        let parts =
            [" needs ", " GB of memory (", "this machine has", "ARETE_IGNORE_ROOM=1 runs anyway"];
        refused(&words, 71, &parts);
        assert!(!Path::new(&output).join("run.json").exists());
    }
    let output = at("anyway");
    let words = ["sft", "train", "--demonstrations", &chats, "--output", &output];
    let words = [&words[..], &model, &cpu, &training, &["--max-steps", "1"]].concat();
    let (code, stderr) = says("export ARETE_IGNORE_ROOM=1", &words, None);
    assert!(code == Some(0) && stderr.contains("sft: needs "), "{code:?}: {stderr}");
}

#[test]
fn numbers_that_no_setting_can_have_name_their_flag() {
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("output");
    let output = output.to_str().unwrap();
    let none = scratch.path().join("none");
    let none = none.to_str().unwrap();
    let huge = u64::MAX.to_string();
    for (words, flag) in [
        (&["curation", "lessons", "--pairs", none, "--output", output][..], "--max-chars"),
        (&["curation", "bench", "--model", none], "--n-pairs"),
        (
            &["sft", "train", "--demonstrations", none, "--model", MODEL, "--output", output],
            "--learning-rate",
        ),
        (
            &["reward", "score", "--input", none, "--model", MODEL, "--output", output],
            "--micro-batch-tokens",
        ),
        (&["dpo", "train", "--preferences", none, "--model", MODEL, "--output", output], "--beta"),
        (
            &[
                "ppo",
                "train",
                "--prompts",
                none,
                "--reward",
                none,
                "--model",
                MODEL,
                "--output",
                output,
            ],
            "--kl-coef",
        ),
        (&["scoring", "report", "--run", none], "--max-samples"),
        (&["model", "generate", "--model", MODEL, "--prompt", "hi"], "--max-new-tokens"),
        (&["arete", "doctor", "--run", none], "--best-of"),
    ] {
        for number in [huge.as_str(), "10000000000"] {
            let given = format!("{flag}={number}");
            refused(&[words, &[&given]].concat(), 2, &[flag, number]);
        }
    }
    for number in ["inf", "NaN", "1e10"] {
        for (program, flag) in [("sft", "--learning-rate"), ("curation", "--temperature")] {
            let words: &[&str] = match program {
                "sft" => &["sft", "train", "--demonstrations", none],
                _ => &["curation", "conversations", "--prompts", none],
            };
            let given = format!("{flag}={number}");
            let rest = ["--model", MODEL, "--output", output, &given];
            refused(&[words, &rest].concat(), 2, &[flag, number]);
        }
    }
    assert!(!Path::new(output).exists());
}

/// Where there is room for libtorch's file and not for what it does when it is loaded, it used to end the process by SIGABRT. Below
/// that the loader says that it cannot map the file (127), and nothing of ours runs.
#[test]
fn no_room_for_libtorch_is_exit_code_71() {
    let code_at = |mib: u64| {
        let (code, stderr) =
            says(&format!("ulimit -c 0; ulimit -v {}", mib << 10), &["model", "--version"], None);
        let code = code.unwrap_or_else(|| panic!("{mib} MiB: ended by a signal: {stderr}"));
        let is_said = match code {
            0 => true,
            71 => stderr.contains("out of memory"),
            127 => stderr.contains("shared librar") || stderr.contains("shared object"),
            _ => false,
        };
        assert!(is_said, "{mib} MiB: exit code {code}: {stderr}");
        code
    };
    // The smallest room in which it is loaded, to 4 MiB.
    let (mut below, mut above) = (64, 8192);
    while above - below > 4 {
        let middle = u64::midpoint(below, above);
        match code_at(middle) {
            127 => below = middle,
            _ => above = middle,
        }
    }
    assert_eq!(code_at(above), 71, "{above} MiB");
    for more in [4, 8, 16, 24, 32, 64] {
        code_at(above + more);
    }
}

/// What a system refuses is exit code 74, and nothing is left under a final name.
#[test]
fn files_that_the_system_refuses_are_not_bad_data() {
    let scratch = tempfile::tempdir().unwrap();
    for (limit, reason) in
        [("ulimit -n 6", "Too many open files"), ("ulimit -f 2", "File too large")]
    {
        let output = scratch.path().join(limit);
        let words = ["curation", "prompts", "--input", "data/prompts", "--output"];
        let words = [&words[..], &[output.to_str().unwrap()]].concat();
        let (code, stderr) = says(limit, &words, None);
        assert_eq!(code, Some(74), "{limit}: {stderr}");
        assert!(stderr.contains(reason), "{limit}: {stderr}");
        for file in ["prompts.parquet", "run.json"] {
            assert!(!output.join(file).exists(), "{limit}: {file}");
        }
        // The same command goes through where the system lets it.
        let (code, stderr) = says(":", &words, None);
        assert_eq!(code, Some(0), "{stderr}");
    }
}

/// ENOLCK, ENOSYS and EOPNOTSUPP of locks are told, EINVAL and EOPNOTSUPP of flushing a directory mean that there is nothing to
/// flush: neither ends a stage. Any other refusal does.
#[test]
fn file_systems_that_cannot_lock_or_flush_directories_are_worked_on() {
    let scratch = tempfile::tempdir().unwrap();
    let shim = scratch.path().join("shim.so");
    let source = repository().join("tests/fixtures/cases/file_system.c");
    let mut build = Command::new("cc");
    build.args(["-shared", "-fPIC", "-o"]).arg(&shim).arg(source).arg("-ldl");
    assert!(build.status().unwrap().success());
    let run = |variable: &str, number: i32| {
        let output = scratch.path().join(format!("{variable}-{number}"));
        let before = format!("export LD_PRELOAD={} {variable}={number}", shim.display());
        let words = ["curation", "prompts", "--input", "data/prompts", "--output"];
        says(&before, &[&words[..], &[output.to_str().unwrap()]].concat(), None)
    };
    for number in [37, 38, 95] {
        let (code, stderr) = run("REFUSE_FLOCK", number);
        assert_eq!(code, Some(0), "{number}: {stderr}");
        assert!(stderr.contains("the file system has no locks"), "{number}: {stderr}");
        assert!(stderr.contains(".lock"), "{number}: {stderr}");
    }
    for number in [22, 95] {
        let (code, stderr) = run("REFUSE_FSYNC_OF_DIRECTORIES", number);
        assert_eq!(code, Some(0), "{number}: {stderr}");
    }
    for variable in ["REFUSE_FLOCK", "REFUSE_FSYNC_OF_DIRECTORIES"] {
        let (code, stderr) = run(variable, 5); // EIO
        assert_eq!(code, Some(74), "{stderr}");
        assert!(stderr.contains(variable), "the path: {stderr}");
    }
}

/// Whoever forgets to write to a pipe gets the terminal back by one signal.
#[test]
fn a_signal_is_answered_while_nobody_writes() {
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("output");
    let mut command = Command::new(program("curation"));
    command.args(["prompts", "--input", "-", "--output"]).arg(&output);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let _silent = child.stdin.take(); // open as long as this lives
    // It catches signals before it reads; until then one would end it without a word.
    let status = format!("/proc/{}/status", child.id());
    let catches = || {
        fs_err::read_to_string(&status).is_ok_and(|text| {
            let caught = text.lines().find_map(|line| line.strip_prefix("SigCgt:"));
            let caught = caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
            caught.is_some_and(|mask| mask & (1 << (15 - 1)) != 0)
        })
    };
    let started = std::time::Instant::now();
    while !catches() && started.elapsed().as_secs() < 60 {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let kill = format!("kill -TERM {}", child.id());
    assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    let asked = std::time::Instant::now();
    while child.try_wait().unwrap().is_none() {
        assert!(asked.elapsed().as_secs() < 10, "SIGTERM is not answered");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert!(!output.exists());
}

/// Pairs and demonstrations come through pipes as prompts do; they are hashed first and read afterwards.
#[test]
fn pairs_come_through_standard_input() {
    let scratch = tempfile::tempdir().unwrap();
    let say = |reply: &str| format!("\n\nHuman: Is it fair?\n\nAssistant: {reply}");
    let pairs: String = (0..12)
        .map(|idx| {
            let (chosen, rejected) = (say(&format!("I would ask {idx}.")), say("Who cares."));
            serde_json::json!({ "chosen": chosen, "rejected": rejected }).to_string() + "\n"
        })
        .collect();
    let lessons = scratch.path().join("lessons.jsonl");
    let words = ["curation", "lessons", "--pairs", "-", "--output", lessons.to_str().unwrap()];
    let (code, stderr) = says(":", &words, Some(&pairs));
    assert_eq!(code, Some(0), "{stderr}");
    let file = scratch.path().join("pairs.jsonl");
    fs_err::write(&file, &pairs).unwrap();
    let from_file = scratch.path().join("from-file.jsonl");
    let (file, target) = (file.to_str().unwrap(), from_file.to_str().unwrap());
    let words = ["curation", "lessons", "--pairs", file, "--output", target];
    assert_eq!(says(":", &words, None).0, Some(0));
    assert_eq!(fs_err::read(lessons).unwrap(), fs_err::read(from_file).unwrap());
}
