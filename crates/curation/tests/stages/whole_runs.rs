//! Whole runs: shards joined, kills, demonstrations, the program and its exit codes.

use super::*;

#[test]
fn sharded_judging_and_revising_give_an_unsharded_runs_files() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 80);
    let samples = dir.path().join("conversations");
    converse(&prompts, &samples, &[]);
    let judged = |name: &str, flags: &[&str]| {
        let output = dir.path().join(name);
        let flags = [&["--method", "likelihood"], flags].concat();
        judge(&samples, Some(&fixture()), &output, &flags).unwrap();
        output
    };
    let parts =
        ["1/3", "2/3", "3/3"].map(|part| judged(&part.replace('/', "-"), &["--shard", part]));
    let whole = judged("judged", &[]);
    let merged = dir.path().join("judged-merged");
    merge::merge(&parts, &merged).unwrap();
    assert!(pairs(&whole, Aspect::CONSEQUENCE).len() > 20);
    assert_eq!(contents(&merged), contents(&whole));

    let revised = |name: &str, flags: &[&str]| {
        let (constitution, exemplars) =
            (data("constitution.toml"), data("demonstrations/exemplars.jsonl"));
        let mut all = vec!["--max-new-tokens", "4", "--truncated", "keep"];
        all.extend(["--constitution", &constitution, "--exemplars", &exemplars]);
        all.extend_from_slice(flags);
        let inputs =
            demonstrations::Inputs { prompts: Some(prompts.clone()), model: Some(fixture()) };
        let output = dir.path().join(name);
        demonstrations::run(&config(&all), &inputs, &output, &Work::Compute).unwrap();
        output
    };
    let parts = ["1/2", "2/2"].map(|part| revised(&format!("r{}", &part[..1]), &["--shard", part]));
    let whole = revised("revised", &[]);
    let merged = dir.path().join("revised-merged");
    merge::merge(&parts, &merged).unwrap();
    assert_eq!(contents(&merged), contents(&whole));
}

/// Runs the program again and again, each time killed a little later, until it ends by itself. Shard
/// files that a killed run left must never be written again.
fn kill_until_done(args: &[&str], output: &Path, whole_s: std::time::Duration) -> usize {
    use std::os::unix::fs::MetadataExt;
    let mut shards = std::collections::BTreeMap::new();
    for attempt in 0..200 {
        let mut child = Command::new(env!("CARGO_BIN_EXE_arete-curation"))
            .args(args)
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(whole_s * (attempt + 2) / 14);
        child.kill().unwrap();
        if child.wait().unwrap().success() {
            return attempt as usize;
        }
        let Ok(entries) = fs_err::read_dir(output.join("shards")) else { continue };
        for entry in entries.map(Result::unwrap) {
            let name = entry.file_name().into_string().unwrap();
            // Files under temporary names may come and go, and what has no seal yet is made anew.
            let is_sealed = entry.path().with_file_name(format!(".{name}.seal")).is_file();
            if name.ends_with(".parquet") && !name.contains("tmp") && is_sealed {
                let inode = entry.metadata().unwrap().ino();
                assert_eq!(*shards.entry(name.clone()).or_insert(inode), inode, "{name}");
            }
        }
    }
    panic!("the run never ended");
}

#[test]
fn a_run_killed_at_any_moment_ends_with_an_uninterrupted_runs_files() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (prompts, model) = (write_prompts(dir.path(), 160), fixture());
    let (prompts, samples) = (prompts.to_str().unwrap().to_owned(), at("conversations"));
    let constitution = data("constitution.toml");
    let stages: [(&str, Vec<&str>); 2] = [
        (
            "conversations",
            vec![
                "conversations",
                "--prompts",
                &prompts,
                "--model",
                &model,
                "--max-new-tokens",
                "12",
            ],
        ),
        (
            "preferences",
            vec![
                "preferences",
                "--conversations",
                &samples,
                "--judge",
                &model,
                "--method",
                "likelihood",
                "--truncated",
                "keep",
            ],
        ),
    ];
    for (name, mut args) in stages {
        args.extend(["--constitution", &constitution]);
        let (whole, killed) = (at(name), at(&format!("{name}-killed")));
        let started = std::time::Instant::now();
        let (code, _, stderr) = program(&[&args[..], &["--output", &whole]].concat());
        assert_eq!(code, Some(0), "{stderr}");
        let args = [&args[..], &["--output", &killed]].concat();
        let n_kills = kill_until_done(&args, Path::new(&killed), started.elapsed());
        assert!(n_kills > 1, "{n_kills}");
        assert_eq!(contents(Path::new(&killed)), contents(Path::new(&whole)));
    }
}

#[test]
fn demonstrations_are_the_models_revisions_and_the_shipped_exemplars() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 40);
    let (constitution, exemplars) =
        (data("constitution.toml"), data("demonstrations/exemplars.jsonl"));
    let run = |name: &str, flags: &[&str], prompts: Option<&Path>| {
        let mut all = vec![
            "--constitution",
            &constitution,
            "--exemplars",
            &exemplars,
            "--max-new-tokens",
            "6",
            "--truncated",
            "keep",
        ];
        all.extend_from_slice(flags);
        let config: DemonstrationsConfig = config(&all);
        let inputs = demonstrations::Inputs {
            prompts: prompts.map(Path::to_owned),
            model: prompts.map(|_| fixture()),
        };
        let output = dir.path().join(name);
        demonstrations::run(&config, &inputs, &output, &Work::Compute)?;
        let rows: Vec<DemonstrationRow> =
            parquet::read(output.join("demonstrations.parquet")).unwrap();
        Ok::<_, anyhow::Error>(rows)
    };
    let own = run("own", &["--source", "own"], None).unwrap();
    assert!(own.len() >= 100);
    assert!(own.iter().all(|row| row.source == "own" && row.messages.len() == 6));
    let revised = run("self", &["--source", "self", "--rounds", "2"], Some(&prompts)).unwrap();
    assert!(revised.len() > 20, "{}", revised.len()); // an empty revision is left out
    for row in &revised {
        assert_eq!((row.rounds.len(), row.messages.len()), (2, 6));
        assert_eq!(row.messages[1].content, row.rounds[1].revision);
    }
    let principles: std::collections::BTreeSet<&str> =
        revised.iter().flat_map(|row| row.rounds.iter().map(|r| r.principle.as_str())).collect();
    assert!(principles.len() > 8, "{principles:?}");
    let mix = run("mix", &["--source", "mix", "--turns", "answer"], Some(&prompts)).unwrap();
    let n_own = mix.iter().filter(|row| row.source == "own").count();
    assert_eq!(n_own, own.len());
    assert!(mix.iter().any(|row| row.source == "self" && row.messages.len() == 2));
    let error = run("no", &["--source", "self"], None).unwrap_err().to_string();
    assert!(error.contains("--prompts and --model"), "{error}");
}

fn program(args: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_arete-curation")).args(args).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn the_program_resolves_recipes_and_fails_with_the_right_codes() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (recipe, output, input) = (at("recipe.toml"), at("prompts"), data("prompts"));
    fs_err::write(&recipe, "[prompts]\nlimit = 7\ncontext = \"full\"\n").unwrap();
    let prompts = ["prompts", "--input", &input, "--recipe", &recipe, "--output", &output];
    let (code, stdout, stderr) = program(&[&prompts[..], &["--dry-run"]].concat());
    assert_eq!(code, Some(0), "{stderr}");
    let estimate: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(estimate["counts"]["kept"], json!(7));
    assert!(!Path::new(&output).exists());
    let (code, stdout, stderr) = program(&prompts);
    assert_eq!((code, stdout.as_str()), (Some(0), ""), "{stderr}");
    let run = RunJson::read(&output).unwrap();
    assert_eq!((&run.config["limit"], &run.config["context"]), (&json!(7), &json!("full")));
    assert!(program(&prompts).2.contains("up to date"));
    let (_, _, stderr) = program(&[&prompts[..], &["--limit", "9"]].concat());
    assert!(stderr.contains("limit") && stderr.contains("7") && stderr.contains("9"), "{stderr}");

    fs_err::write(&recipe, "[prompts]\nlimt = 7\n").unwrap();
    let (code, _, stderr) = program(&prompts);
    assert_eq!(code, Some(65), "{stderr}");
    assert!(stderr.contains("did you mean `limit`"), "{stderr}");
    let missing = at("missing.jsonl");
    let (code, _, stderr) = program(&["prompts", "--input", &missing, "--output", &at("x")]);
    assert_eq!(code, Some(74), "{stderr}");
    let empty = at("empty.jsonl");
    fs_err::write(&empty, "").unwrap();
    let (code, _, stderr) = program(&["prompts", "--input", &empty, "--output", &at("y")]);
    assert_eq!(code, Some(65), "{stderr}");
    let (code, _, _) = program(&["prompts", "--output", &at("z")]);
    assert_eq!(code, Some(2));
}
