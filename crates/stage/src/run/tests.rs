//! Tests of when a stage runs, what it removes, and what it records.

use serde_json::json;

use super::*;
use arete_records::hashes::{sha256_file, sha256_path};

struct Fixture {
    dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let fixture = Self { dir: tempfile::tempdir().unwrap() };
        fs_err::write(fixture.input(), b"input 1").unwrap();
        fixture
    }

    fn input(&self) -> PathBuf {
        self.dir.path().join("input.parquet")
    }

    fn output(&self) -> PathBuf {
        self.dir.path().join("out")
    }

    fn begin(&self, config: Value, seed: u64) -> Result<Start, Error> {
        begin(StageSpec {
            stage: "sft",
            output: &self.output(),
            config,
            seed,
            inputs: vec![("prompts".to_owned(), self.input())],
        })
    }

    #[track_caller]
    fn run(&self, config: Value) -> StageRun {
        match self.begin(config, 1).unwrap() {
            Start::Run(run) => run,
            Start::UpToDate(_) => panic!("expected work to do"),
        }
    }

    #[track_caller]
    fn complete(&self, config: Value) {
        let run = self.run(config);
        fs_err::create_dir_all(run.output().join("merged")).unwrap();
        fs_err::write(run.output().join("merged/model.safetensors"), b"weights").unwrap();
        fs_err::write(run.output().join("metrics.jsonl"), b"{}\n").unwrap();
        fs_err::write(run.output().join("timings.jsonl"), b"{}\n").unwrap();
        let counts = json!({"rows": 3}).as_object().unwrap().clone();
        let done = Completion { device: "cpu".to_owned(), dtype: "bf16".to_owned(), counts };
        run.finish(done).unwrap();
    }

    fn files(&self) -> Vec<String> {
        arete_records::hashes::walk(&self.output(), &|_| false).unwrap()
    }

    #[track_caller]
    fn is_up_to_date(&self, config: Value) {
        match self.begin(config, 1).unwrap() {
            Start::UpToDate(_) => {}
            Start::Run(_) => panic!("expected it to be up to date"),
        }
    }
}

#[test]
fn a_complete_stage_is_up_to_date_until_something_changes() {
    let fixture = Fixture::new();
    fixture.complete(json!({"rank": 16}));
    fixture.is_up_to_date(json!({"rank": 16}));
    fixture.is_up_to_date(json!({"rank": 16}));

    let run = fixture.run(json!({"rank": 8}));
    assert!(!run.is_resumed());
    assert_eq!(fixture.files(), [".lock", "stage.json"]);
    drop(run);

    fixture.complete(json!({"rank": 16}));
    assert!(matches!(fixture.begin(json!({"rank": 16}), 2).unwrap(), Start::Run(_)));

    fixture.complete(json!({"rank": 16}));
    fs_err::write(fixture.input(), b"input 2").unwrap(); // same length
    fixture.complete(json!({"rank": 16}));
    fixture.is_up_to_date(json!({"rank": 16}));
}

#[test]
fn run_json_records_everything_and_no_time() {
    let fixture = Fixture::new();
    fixture.complete(json!({"rank": 16, "alpha": 32.0}));
    let run = RunJson::read(fixture.output()).unwrap();
    assert_eq!((run.stage.as_str(), run.seed), ("sft", 1));
    assert_eq!(run.config, json!({"alpha": 32.0, "rank": 16}));
    assert_eq!((run.device.as_str(), run.dtype.as_str()), ("cpu", "bf16"));
    assert_eq!(run.counts["rows"], 3);
    // printf 'input 1' | sha256sum
    let input = "99d3a91e7e87eb4997107275226155498555e34322ffebe829e79cb7daeca5b9";
    assert_eq!(run.inputs["prompts"], input);
    let names: Vec<&String> = run.outputs.keys().collect();
    assert_eq!(names, ["merged/model.safetensors", "metrics.jsonl"]);
    assert_eq!(run.outputs["metrics.jsonl"].size, 3);
    let first = fs_err::read(fixture.output().join("run.json")).unwrap();
    fs_err::remove_dir_all(fixture.output()).unwrap();
    fixture.complete(json!({"alpha": 32.0, "rank": 16})); // other order of keys
    assert_eq!(fs_err::read(fixture.output().join("run.json")).unwrap(), first);
}

#[test]
fn partial_work_of_the_same_settings_stays() {
    let fixture = Fixture::new();
    let run = fixture.run(json!({"rank": 16}));
    assert!(!run.is_resumed());
    fs_err::write(run.output().join("shard-0.parquet"), b"rows").unwrap();
    fs_err::write(run.output().join(".shard-1.parquet.tmp-4711-0"), b"ro").unwrap();
    drop(run); // killed

    let run = fixture.run(json!({"rank": 16}));
    assert!(run.is_resumed());
    assert_eq!(fixture.files(), [".lock", "shard-0.parquet", "stage.json"]);
    drop(run);

    let run = fixture.run(json!({"rank": 8}));
    assert!(!run.is_resumed());
    assert_eq!(fixture.files(), [".lock", "stage.json"]);
}

#[test]
fn a_kill_while_clearing_is_noticed() {
    let fixture = Fixture::new();
    fixture.complete(json!({"rank": 16}));
    // What is there when killed between the mark and the removal, and after run.json is gone.
    let partial: StageJson = {
        let run = fixture.run(json!({"rank": 8}));
        read_json(&run.output().join(STAGE_JSON)).unwrap()
    };
    for run_json_gone in [false, true] {
        fs_err::remove_dir_all(fixture.output()).unwrap();
        fixture.complete(json!({"rank": 16}));
        write_stage_json(&fixture.output(), &partial.origin, &[], Some("out.old-7")).unwrap();
        if run_json_gone {
            fs_err::remove_file(fixture.output().join(RUN_JSON)).unwrap();
        }
        let run = fixture.run(json!({"rank": 8}));
        assert!(!run.is_resumed());
        assert_eq!(fixture.files(), [".lock", "stage.json"]);
        // What the kill left went to the place that was named before it.
        let aside = fixture.dir.path().join("out.old-7");
        assert!(aside.join("merged/model.safetensors").exists());
        fs_err::remove_dir_all(aside).unwrap();
    }
}

#[test]
fn what_would_be_discarded_is_set_aside() {
    let fixture = Fixture::new();
    fixture.complete(json!({"rank": 16}));
    let weights = fs_err::read(fixture.output().join("merged/model.safetensors")).unwrap();
    let run = fixture.run(json!({"rank": 8}));
    fs_err::write(run.output().join("shard-0.parquet"), b"rows").unwrap();
    drop(run); // killed
    drop(fixture.run(json!({"rank": 4})));
    let aside = |n: u32| fixture.dir.path().join(format!("out.old-{n}"));
    assert_eq!(fs_err::read(aside(1).join("merged/model.safetensors")).unwrap(), weights);
    assert_eq!(RunJson::read(aside(1)).unwrap().config, json!({"rank": 16}));
    assert_eq!(fs_err::read(aside(2).join("shard-0.parquet")).unwrap(), b"rows");
    // Nothing was there any more: nothing is set aside.
    drop(fixture.run(json!({"rank": 2})));
    assert!(!aside(3).exists());
}

#[test]
fn directories_that_were_empty_stay() {
    let fixture = Fixture::new();
    fixture.complete(json!({"rank": 16}));
    let kept = ["notes", "merged/notes"].map(|name| fixture.output().join(name));
    kept.iter().for_each(|dir| fs_err::create_dir_all(dir).unwrap());
    drop(fixture.run(json!({"rank": 8})));
    assert!(fixture.dir.path().join("out.old-1/merged/model.safetensors").exists());
    for dir in kept {
        assert!(dir.is_dir(), "{}", dir.display());
    }
}

#[test]
fn links_are_neither_followed_nor_moved() {
    let fixture = Fixture::new();
    let thesis = fixture.dir.path().join("thesis");
    fs_err::create_dir(&thesis).unwrap();
    fs_err::write(thesis.join("chapter.txt"), b"years of work").unwrap();
    let run = fixture.run(json!({"rank": 16}));
    std::os::unix::fs::symlink(&thesis, run.output().join("notes")).unwrap();
    std::os::unix::fs::symlink(thesis.join("chapter.txt"), run.output().join("one")).unwrap();
    fs_err::write(run.output().join("shard-0.parquet"), b"rows").unwrap();
    drop(run); // killed
    drop(fixture.run(json!({"rank": 8})));
    assert_eq!(fs_err::read(thesis.join("chapter.txt")).unwrap(), b"years of work");
    let output = fixture.output();
    assert!(output.join("notes").is_symlink() && output.join("one").is_symlink());
    assert!(!output.join("shard-0.parquet").exists());
}

#[test]
fn a_kill_between_run_json_and_the_end_is_complete() {
    let fixture = Fixture::new();
    let run = fixture.run(json!({}));
    let stage = fs_err::read(run.output().join(STAGE_JSON)).unwrap();
    run.finish(Completion::default()).unwrap();
    fs_err::write(fixture.output().join(STAGE_JSON), stage).unwrap();
    fixture.is_up_to_date(json!({}));
    assert_eq!(fixture.files(), [".lock", "run.json"]);
}

#[test]
fn damaged_or_missing_outputs_are_made_again() {
    let fixture = Fixture::new();
    let weights = fixture.output().join("merged/model.safetensors");
    fixture.complete(json!({}));
    fs_err::write(&weights, b"wEights").unwrap(); // same length, other contents
    fixture.complete(json!({}));
    fs_err::remove_file(&weights).unwrap();
    fixture.complete(json!({}));
    fixture.is_up_to_date(json!({}));
}

#[test]
fn what_others_put_there_is_never_deleted() {
    let fixture = Fixture::new();
    fixture.complete(json!({"rank": 16}));
    fs_err::write(fixture.output().join("notes.txt"), b"mine").unwrap();
    fs_err::write(fixture.output().join("ppo.log"), b"log").unwrap();
    let nested = fixture.output().join("nested");
    fs_err::create_dir(&nested).unwrap();
    fs_err::write(nested.join("run.json"), b"{}").unwrap();
    fs_err::write(nested.join("data.parquet"), b"theirs").unwrap();

    drop(fixture.run(json!({"rank": 8})));
    drop(fixture.run(json!({"rank": 4}))); // through stage.json this time
    fixture.complete(json!({"rank": 2}));
    let kept = ["nested/data.parquet", "nested/run.json", "notes.txt", "ppo.log"];
    let files = fixture.files();
    assert!(kept.iter().all(|file| files.iter().any(|f| f == file)), "{files:?}");
    let run = RunJson::read(fixture.output()).unwrap();
    let names: Vec<&String> = run.outputs.keys().collect();
    assert_eq!(names, ["merged/model.safetensors", "metrics.jsonl"]);
}

#[test]
fn a_directory_no_stage_made_is_refused() {
    let fixture = Fixture::new();
    fs_err::create_dir(fixture.output()).unwrap();
    fs_err::write(fixture.output().join("thesis.txt"), b"years of work").unwrap();
    let error = fixture.begin(json!({}), 1).unwrap_err();
    assert!(matches!(&error, Error::ForeignOutput { found, .. } if found == "thesis.txt"));
    assert_eq!(fixture.files(), [".lock", "thesis.txt"]);
}

#[test]
fn another_stages_results_are_refused_and_untouched() {
    let fixture = Fixture::new();
    let begin_reward = |fixture: &Fixture| {
        begin(StageSpec {
            stage: "reward",
            output: &fixture.output(),
            config: json!({}),
            seed: 1,
            inputs: Vec::new(),
        })
        .unwrap_err()
    };
    drop(fixture.run(json!({"rank": 8}))); // unfinished
    let error = begin_reward(&fixture);
    assert!(matches!(&error, Error::OtherStage { owner, .. } if owner == "sft"), "{error}");
    fixture.complete(json!({"rank": 8}));
    let files = fixture.files();
    let error = begin_reward(&fixture).to_string();
    assert!(error.contains("stage `sft`, expected those of `reward`"), "{error}");
    assert_eq!(fixture.files(), files);
    fixture.is_up_to_date(json!({"rank": 8}));
}

#[test]
fn checkpoints_of_other_inputs_are_refused_and_untouched() {
    let fixture = Fixture::new();
    let run = fixture.run(json!({"rank": 16}));
    let checkpoint = run.output().join("checkpoint-000002");
    fs_err::create_dir(&checkpoint).unwrap();
    fs_err::write(checkpoint.join("tensors.safetensors"), b"weights").unwrap();
    drop(run); // killed
    fs_err::write(fixture.input(), b"input 2").unwrap();
    for config in [json!({"rank": 16}), json!({"rank": 8})] {
        let error = fixture.begin(config, 1).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::StaleCheckpoints { .. }), "{text}");
        assert!(text.contains("checkpoint-000002 was made with another input `prompts`"), "{text}");
    }
    assert_eq!(fs_err::read(checkpoint.join("tensors.safetensors")).unwrap(), b"weights");

    // The old input is back: it goes on. Another setting was the user's wish: it starts anew.
    fs_err::write(fixture.input(), b"input 1").unwrap();
    assert!(fixture.run(json!({"rank": 16})).is_resumed());
    assert!(!fixture.run(json!({"rank": 8})).is_resumed());
    assert!(!checkpoint.exists());
}

#[test]
fn a_second_process_is_turned_away_with_the_pid_of_the_first() {
    let fixture = Fixture::new();
    let run = fixture.run(json!({}));
    let error = fixture.begin(json!({}), 1).unwrap_err();
    let pid = std::process::id().to_string();
    assert!(matches!(&error, Error::Locked { pid: other, .. } if *other == pid), "{error}");
    drop(run);
    fixture.run(json!({}));
}

#[test]
fn a_damaged_mark_begins_anew_and_loses_nothing() {
    for (n, mark, damage) in [
        (1, "run.json", &b"{\n\"stage\": 3"[..]),
        (2, "run.json", br#"{"stage": "sft", "fingerprint": "aa", "inputz": {}}"#),
        (3, "stage.json", b""),
    ] {
        let fixture = Fixture::new();
        fixture.complete(json!({}));
        fs_err::write(fixture.output().join(mark), damage).unwrap();
        let run = fixture.run(json!({}));
        assert!(!run.is_resumed(), "{n}");
        let aside = fixture.dir.path().join("out.old-1");
        assert!(aside.join("merged/model.safetensors").exists(), "{n}");
        drop(run);
        fixture.complete(json!({}));
        fixture.is_up_to_date(json!({}));
    }
}

#[test]
fn a_run_json_of_another_program_is_named_and_untouched() {
    let fixture = Fixture::new();
    fs_err::create_dir(fixture.output()).unwrap();
    fs_err::write(fixture.output().join("run.json"), b"{\"project\": \"thesis\"}").unwrap();
    let error = fixture.begin(json!({}), 1).unwrap_err().to_string();
    assert!(error.contains("run.json:1: expected what an Arete stage writes"), "{error}");
    assert_eq!(fixture.files(), [".lock", "run.json"]);
}

#[test]
fn a_missing_input_is_named() {
    let fixture = Fixture::new();
    fs_err::remove_file(fixture.input()).unwrap();
    let error = fixture.begin(json!({}), 1).unwrap_err();
    assert!(
        matches!(error, Error::Records(arete_records::Error::Io(_)))
            && error.to_string().contains("input.parquet"),
        "{error}"
    );
}

#[test]
fn changes_are_named_with_both_values() {
    let origin = |config: Value, input: &str| Origin {
        stage: "sft".to_owned(),
        config,
        seed: 1,
        inputs: BTreeMap::from([("prompts".to_owned(), input.to_owned())]),
        versions: BTreeMap::from([("arete".to_owned(), "0.1.0".to_owned())]),
    };
    let old = origin(json!({"lora": {"rank": 16}, "gone": true, "same": [1]}), "aa");
    let mut new = origin(json!({"lora": {"rank": 8}, "added": "x", "same": [1]}), "bb");
    new.seed = 2;
    let change = |what, key: &str, old: &str, new: &str| Change {
        what,
        key: key.to_owned(),
        old: old.to_owned(),
        new: new.to_owned(),
    };
    assert_eq!(
        old.changes(&new),
        [
            change("recipe key", "seed", "1", "2"),
            change("recipe key", "added", "(none)", "\"x\""),
            change("recipe key", "gone", "true", "(none)"),
            change("recipe key", "lora.rank", "16", "8"),
            change("input", "prompts", "aa", "bb"),
        ]
    );
    assert_eq!(old.changes(&old), []);
}

#[test]
fn hashes_are_those_of_sha256sum() {
    let dir = tempfile::tempdir().unwrap();
    fs_err::write(dir.path().join("abc"), b"abc").unwrap();
    // FIPS 180-2, appendix B.1.
    let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    assert_eq!(sha256_file(dir.path().join("abc")).unwrap(), abc);
    assert_eq!(sha256_path(dir.path().join("abc")).unwrap(), abc);
    // printf '%s  abc\n%s  sub/abc\n' $abc $abc | sha256sum
    fs_err::create_dir(dir.path().join("sub")).unwrap();
    fs_err::write(dir.path().join("sub/abc"), b"abc").unwrap();
    for bookkeeping in
        ["run.json", "timings.jsonl", "machine.json", "events.out.tfevents.1.x", ".lock", "a.log"]
    {
        fs_err::write(dir.path().join(bookkeeping), b"now").unwrap();
    }
    assert_eq!(sha256_path(dir.path()).unwrap(), TWO_FILES);
}

const TWO_FILES: &str = "0a9ff896ce9ff9f3018e857f20696470e2193d46846f7e1bde53ccf459fedf3f";

#[test]
fn remembered_hashes_are_used_and_never_stale() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("out");
    fs_err::create_dir(&output).unwrap();
    let file = dir.path().join("model");
    fs_err::write(&file, b"one").unwrap();
    // Changed a moment ago: hashed, but not remembered.
    let mut cache = HashCache::load(&output);
    let one = cache.sha256_file(&file).unwrap();
    // Long enough ago for the next change to get another time: remembered.
    std::thread::sleep(std::time::Duration::from_millis(80));
    assert_eq!(cache.sha256_file(&file).unwrap(), one);
    cache.save();
    assert!(dir.path().join(".hashes.json").exists());
    let remembered = fs_err::read_to_string(dir.path().join(".hashes.json")).unwrap();
    assert!(remembered.contains(&one), "{remembered}");
    fs_err::write(dir.path().join(".hashes.json"), remembered.replace(&one, "as remembered"))
        .unwrap();
    assert_eq!(HashCache::load(&output).sha256_file(&file).unwrap(), "as remembered");

    fs_err::write(&file, b"two").unwrap(); // same size
    let mut cache = HashCache::load(&output);
    let two = cache.sha256_file(&file).unwrap();
    assert_eq!(two, sha256_file(&file).unwrap());
    assert_ne!(two, one);

    fs_err::write(dir.path().join(".hashes.json"), b"garbage").unwrap();
    assert_eq!(HashCache::load(&output).sha256_file(&file).unwrap(), two);
}

#[test]
fn a_link_that_points_upwards_ends_in_an_error() {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(dir.path(), dir.path().join("loop")).unwrap();
    assert!(matches!(sha256_path(dir.path()), Err(arete_records::Error::TooDeep { .. })));
}

/// NFS without lockd answers ENOLCK, Lustre without `-o flock` ENOSYS; a disk that fails answers EIO.
#[test]
fn a_file_system_without_locks_is_told_from_one_that_fails() {
    for (code, without) in [(37, true), (38, true), (95, true), (5, false), (13, false)] {
        let error = std::io::Error::from_raw_os_error(code);
        assert_eq!(is_without_locks(&error), without, "{code}");
    }
}

impl Fixture {
    /// What the directory holds, looked at from outside.
    #[track_caller]
    fn standing(&self, config: Value) -> Standing {
        let before = self.stamps();
        let found = asking(|| self.begin(config, 1).map(drop)).unwrap();
        assert_eq!(self.stamps(), before, "looking changes nothing");
        let [(place, standing)] = &found[..] else { panic!("{found:?}") };
        assert_eq!(*place, self.output());
        standing.clone()
    }

    /// Every file below the folder with its time of change.
    fn stamps(&self) -> Vec<(String, std::time::SystemTime)> {
        let files = arete_records::hashes::walk(self.dir.path(), &|_| false).unwrap();
        let stamp = |file: String| {
            let changed =
                fs_err::metadata(self.dir.path().join(&file)).unwrap().modified().unwrap();
            (file, changed)
        };
        files.into_iter().map(stamp).collect()
    }
}

#[test]
fn looking_says_what_a_run_would_find_and_touches_nothing() {
    let fixture = Fixture::new();
    assert_eq!(fixture.standing(json!({"rank": 16})), Standing::Missing);
    assert!(!fixture.output().exists());
    let run = fixture.run(json!({"rank": 16}));
    assert_eq!(fixture.standing(json!({"rank": 16})), Standing::HalfDone);
    let Standing::HalfDoneOtherwise { changes } = fixture.standing(json!({"rank": 8})) else {
        panic!("other settings")
    };
    assert_eq!((&*changes[0].key, &*changes[0].old, &*changes[0].new), ("rank", "16", "8"));
    drop(run);
    fixture.complete(json!({"rank": 16}));
    assert_eq!(fixture.standing(json!({"rank": 16})), Standing::Complete);
    let Standing::Stale { changes } = fixture.standing(json!({"rank": 8})) else {
        panic!("other settings")
    };
    assert_eq!((&*changes[0].key, changes.len()), ("rank", 1));
    fs_err::write(fixture.input(), b"input 2").unwrap();
    let Standing::Stale { changes } = fixture.standing(json!({"rank": 16})) else {
        panic!("another input")
    };
    assert_eq!((changes[0].what, &*changes[0].key), ("input", "prompts"));
    fs_err::write(fixture.input(), b"input 1").unwrap();
    fs_err::remove_file(fixture.output().join("metrics.jsonl")).unwrap();
    let damaged = |file: &str| Standing::Damaged { file: file.to_owned() };
    assert_eq!(fixture.standing(json!({"rank": 16})), damaged("metrics.jsonl"));
    fs_err::write(fixture.output().join("run.json"), b"{").unwrap();
    assert_eq!(fixture.standing(json!({"rank": 16})), damaged("run.json"));
    fs_err::remove_file(fixture.output().join("run.json")).unwrap();
    let foreign = Standing::Foreign { file: "merged/model.safetensors".to_owned() };
    assert_eq!(fixture.standing(json!({"rank": 16})), foreign);
    // A look is over when it is over.
    fs_err::remove_dir_all(fixture.output()).unwrap();
    fixture.complete(json!({"rank": 16}));
}

#[test]
fn the_device_a_name_stood_for_is_compared_and_not_the_name() {
    let fixture = Fixture::new();
    fixture.complete(json!({"device": "auto", "rank": 16})); // which was the CPU
    fixture.is_up_to_date(json!({"device": "cpu", "rank": 16}));
    fixture.is_up_to_date(json!({"device": "auto", "rank": 16}));
    assert!(matches!(
        fixture.standing(json!({"device": "cuda", "rank": 16})),
        Standing::Stale { .. }
    ));
    fixture.complete(json!({"device": "cpu", "rank": 8}));
    fixture.is_up_to_date(json!({"device": "auto", "rank": 8}));
}

impl Fixture {
    #[track_caller]
    fn grow(&self, config: Value) -> StageRun {
        let input = vec![("prompts".to_owned(), self.input())];
        let output = self.output();
        let spec = StageSpec { stage: "sft", output: &output, config, seed: 1, inputs: input };
        match begin_growing(spec, &["epochs"]).unwrap() {
            Start::Run(run) => run,
            Start::UpToDate(_) => panic!("expected work to do"),
        }
    }
}

#[test]
fn more_of_the_same_goes_on_and_fewer_sets_aside() {
    let fixture = Fixture::new();
    fixture.complete(json!({"epochs": 2, "rank": 16}));
    let weights = fs_err::read(fixture.output().join("merged/model.safetensors")).unwrap();
    let of_two = fixture.grow(json!({"epochs": 2, "rank": 8})).fingerprint().to_owned();
    fs_err::remove_dir_all(fixture.output()).unwrap();
    fs_err::remove_dir_all(fixture.dir.path().join("out.old-1")).unwrap();

    fixture.complete(json!({"epochs": 2, "rank": 16}));
    let run = fixture.grow(json!({"epochs": 4, "rank": 16}));
    assert!(run.is_resumed());
    assert!(run.output().join("merged/model.safetensors").exists());
    let lineage = run.fingerprint().to_owned();
    assert_ne!(lineage, of_two, "another rank, another run");
    let aside = |n: u32| fixture.dir.path().join(format!("out.old-{n}"));
    assert_eq!(fs_err::read(aside(1).join("merged/model.safetensors")).unwrap(), weights);
    assert_eq!(RunJson::read(aside(1)).unwrap().config["epochs"], 2);
    drop(run); // killed, and once more made longer
    let run = fixture.grow(json!({"epochs": 5, "rank": 16}));
    assert!(run.is_resumed());
    assert_eq!(run.fingerprint(), lineage, "checkpoints of the same run");
    run.finish(Completion::default()).unwrap();
    let recorded = RunJson::read(fixture.output()).unwrap();
    assert_eq!(recorded.config["epochs"], 5);
    assert_eq!(recorded.counts["went_on_from"], json!({"epochs": 2}));
    assert!(!aside(2).exists());

    // Of work that was stopped, too, it is told what its first steps were paced for.
    fs_err::remove_dir_all(fixture.output()).unwrap();
    drop(fixture.grow(json!({"epochs": 2, "rank": 16})));
    drop(fixture.grow(json!({"epochs": 4, "rank": 16})));
    fixture.grow(json!({"epochs": 5, "rank": 16})).finish(Completion::default()).unwrap();
    let recorded = RunJson::read(fixture.output()).unwrap();
    assert_eq!(recorded.counts["went_on_from"], json!({"epochs": 2}));

    // Fewer, or something else besides: not this run's results.
    assert!(!fixture.grow(json!({"epochs": 3, "rank": 16})).is_resumed());
    assert_eq!(RunJson::read(aside(2)).unwrap().config["epochs"], 5);
    fixture.complete(json!({"epochs": 2, "rank": 16}));
    assert!(!fixture.grow(json!({"epochs": 4, "rank": 8})).is_resumed());
}
