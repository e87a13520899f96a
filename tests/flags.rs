//! The flags of every program: one name, one default and one spelling for one thing, and exit codes as README lists them.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

#[expect(dead_code, reason = "the test of the pipeline uses the rest")]
mod run;

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use run::{program, repository, text};

const PROGRAMS: [&str; 8] =
    ["arete", "model", "curation", "sft", "reward", "dpo", "ppo", "scoring"];

/// A flag as `--help` shows it.
#[derive(Debug, Clone, Default)]
struct Flag {
    /// `arete-reward score`.
    command: String,
    name: String,
    /// `DIR`, `FILE`; none of a switch.
    value: Option<String>,
    default: Option<String>,
}

fn help(name: &str, words: &[&str]) -> String {
    let output = Command::new(program(name)).args(words).arg("--help").output().unwrap();
    assert!(output.status.success(), "{name} {words:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// Names under a heading of a help text.
fn subcommands(help: &str) -> Vec<String> {
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let names = listed.take_while(|line| line.starts_with("  "));
    let names = names.filter(|line| !line.starts_with("   "));
    let names = names.filter_map(|line| line.split_whitespace().next());
    names.filter(|name| *name != "help").map(str::to_owned).collect()
}

/// Every flag of a help text: lines such as `      --device <DEVICE>`, with `[default: auto]` somewhere below.
fn flags(command: &str, help: &str) -> Vec<Flag> {
    let mut found: Vec<Flag> = Vec::new();
    for line in help.lines() {
        let start = line.trim_start().trim_start_matches("-h, ").trim_start_matches("-V, ");
        let is_flag = line.starts_with("  ") && line.len() - line.trim_start().len() <= 6;
        if let Some(rest) = start.strip_prefix("--").filter(|_| is_flag) {
            let mut words = rest.splitn(2, ' ');
            let name = words.next().unwrap_or_default().trim_end_matches("...").to_owned();
            // Where no flag has a long help, the short one stands on the same line.
            let value = words.next().and_then(|rest| rest.trim().split("  ").next());
            let value = value.map(str::to_owned);
            found.push(Flag { command: command.to_owned(), name, value, default: None });
        }
        let default = line.split_once("[default: ").and_then(|(_, rest)| rest.split_once(']'));
        if let (Some(flag), Some((default, _))) = (found.last_mut(), default) {
            flag.default = Some(default.to_owned());
        }
    }
    found
}

/// Every flag of every program and subcommand.
fn all() -> Vec<Flag> {
    let mut found = Vec::new();
    for name in PROGRAMS {
        let shown = if name == "arete" { name.to_owned() } else { format!("arete-{name}") };
        for sub in subcommands(&help(name, &[])) {
            found.extend(flags(&format!("{shown} {sub}"), &help(name, &[&sub])));
        }
    }
    found
}

#[test]
fn one_thing_has_one_name_and_one_default_everywhere() {
    let all = all();
    let named = |name: &'static str| all.iter().filter(move |flag| flag.name == name);
    assert!(all.len() > 300, "only {} flags were found", all.len());
    // Flags that mean the same wherever they stand.
    for (name, default, fewest) in [
        ("device", "auto", 14),
        ("dtype", "auto", 14),
        ("nf4", "false", 14),
        ("double-quantize", "false", 14),
        ("threads", "0", 5),
        ("seed", "0", 10),
        ("targets", "q,k,v,o,gate,up,down", 4),
        ("rank", "16", 4),
        ("top-k", "0", 5),
        ("top-p", "1", 5),
    ] {
        // `arete` takes the recipe's.
        let own = named(name).filter(|flag| !flag.command.starts_with("arete "));
        let own: Vec<&Flag> = own.collect();
        assert!(own.len() >= fewest, "--{name}: {} of {fewest}", own.len());
        for flag in own {
            assert_eq!(flag.default.as_deref(), Some(default), "{flag:?}");
        }
    }
    // What takes a place takes it under one name.
    for name in ["pairs", "recipe"] {
        for flag in named(name) {
            let value = flag.value.as_deref().unwrap_or_default();
            assert!(value.starts_with("<F"), "a file, and nothing else: {flag:?}");
        }
    }
    for wrong in
        ["single", "single-quantization", "rewards-dir", "double-quantise", "quantize-double"]
    {
        assert_eq!(named(wrong).count(), 0, "--{wrong}");
    }
    for command in ["arete-scoring score", "arete-ppo train"] {
        assert!(named("rewards").any(|flag| flag.command == command), "{command}");
    }
    // Several values are printed as they parse: between commas.
    for flag in &all {
        let default = flag.default.as_deref().unwrap_or_default();
        let is_list = !default.contains('"')
            && !default.starts_with("as many")
            && default.split(' ').count() > 3;
        let is_text = ["WORDS", "TEXT", "DIR", "FILE", "MODEL", "PATH", "NAME"];
        let value = flag.value.as_deref().unwrap_or_default();
        assert!(!is_list || is_text.iter().any(|kind| value.contains(kind)), "{flag:?}");
    }
}

#[test]
fn every_stage_can_be_tried_without_doing_it() {
    let all = all();
    let can: BTreeSet<&str> =
        all.iter().filter(|flag| flag.name == "dry-run").map(|flag| &*flag.command).collect();
    for command in [
        "arete run",
        "arete sweep",
        "arete push",
        "arete-curation prompts",
        "arete-curation demonstrations",
        "arete-curation conversations",
        "arete-curation preferences",
        "arete-curation calibrate",
        "arete-sft train",
        "arete-reward train",
        "arete-dpo train",
        "arete-ppo train",
        "arete-scoring score",
        "arete-scoring distil",
        "arete-scoring report",
    ] {
        assert!(can.contains(command), "{command}: {can:?}");
    }
}

/// Ways to fail, with the code that README gives each.
#[test]
fn exit_codes_are_those_that_readme_lists() {
    let readme = fs_err::read_to_string(repository().join("README.md")).unwrap();
    let (_, listed) = readme.split_once("Exit codes, of every program:").unwrap();
    let (listed, _) = listed.split_once("\n\n").unwrap();
    let codes: BTreeMap<i32, String> = listed
        .split(';')
        .filter_map(|part| {
            let part = part.trim().trim_end_matches('.').replace('\n', " ");
            let (code, meaning) = part.split_once(' ')?;
            Some((code.trim_end_matches(',').parse().ok()?, meaning.to_owned()))
        })
        .collect();
    let expected = [0, 1, 2, 65, 69, 70, 71, 74, 130];
    assert_eq!(codes.keys().copied().collect::<Vec<_>>(), expected, "{codes:?}");

    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let model = repository().join("tests/fixtures/tiny-chat");
    let model = model.to_str().unwrap();
    fs_err::write(at("broken.jsonl"), "{\"prompt\": \"a\"}\nnot json\n").unwrap();
    fs_err::write(at("unknown.toml"), "[prompts]\nlimt = 3\n").unwrap();
    fs_err::write(at("good.jsonl"), "{\"prompt\": \"Is it fair to ask?\"}\n".repeat(3)).unwrap();
    fs_err::write(at("taken"), "a file").unwrap();
    let code = |name: &str, words: &[&str]| {
        let output = Command::new(program(name)).args(words).output().unwrap();
        (output.status.code(), text(&output.stderr))
    };
    let is = |expected: i32, name: &str, words: &[&str]| {
        let (found, stderr) = code(name, words);
        assert_eq!(found, Some(expected), "{name} {words:?}: {stderr}");
        assert!(codes.contains_key(&expected), "{expected}");
    };
    is(0, "model", &["inspect", "--model", model]);
    is(2, "model", &["inspect", "--no-such-flag"]);
    for (name, words) in [
        ("model", &["generate", "--model", model, "--prompt", "a", "--device", "tpu"][..]),
        (
            "curation",
            &["prompts", "--input", &at("good.jsonl"), "--output", &at("o1"), "--limit", "many"],
        ),
        ("arete", &["run", "--set", "no table"]),
    ] {
        is(2, name, words);
    }
    is(65, "curation", &["prompts", "--input", &at("broken.jsonl"), "--output", &at("o2")]);
    let recipe = at("unknown.toml");
    is(
        65,
        "curation",
        &["prompts", "--input", &at("good.jsonl"), "--output", &at("o3"), "--recipe", &recipe],
    );
    is(65, "scoring", &["report", "--run", &at("nothing")]);
    let server = ["--engine-url", "http://127.0.0.1:9", "--attempts", "1", "--model", "m"];
    let prompts = at("o4");
    is(0, "curation", &["prompts", "--input", &at("good.jsonl"), "--output", &prompts]);
    let words = ["conversations", "--prompts", &prompts, "--output", &at("o5")];
    is(69, "curation", &[&words[..], &server].concat());
    // The system refuses: where a directory should be there is a file.
    let inside = at("taken/inside");
    is(74, "curation", &["prompts", "--input", &at("good.jsonl"), "--output", &inside]);
}
