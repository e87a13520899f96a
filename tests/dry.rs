//! `--dry-run` of every program that has a stage: it says what would be done, and leaves nothing behind.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

#[expect(dead_code, reason = "the test of the pipeline uses the rest")]
mod run;

use run::{Pipeline, STAGES, text};
use serde_json::Value;

#[test]
fn every_stage_says_what_it_would_do_and_writes_nothing() {
    let pipeline = Pipeline::new("dry", "keep", 24);
    for (stage, dir) in STAGES {
        let dry = |expected: &str| -> Value {
            let output = pipeline.command(stage).arg("--dry-run").output().unwrap();
            assert!(output.status.success(), "{stage}: {}", text(&output.stderr));
            let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
            assert_eq!(plan["would"][0]["is"], expected, "{stage}: {plan}");
            plan
        };
        let plan = dry("missing");
        assert!(!pipeline.at(dir).exists(), "{stage} left something behind");
        assert!(plan["settings"].is_object(), "{plan}");
        let counts = plan["counts"].as_object().unwrap();
        let n = |name: &str| counts.get(name).and_then(Value::as_u64).unwrap_or_default();
        let loads = plan["memory"]["peak_bytes"].as_u64().unwrap_or_default();
        match stage {
            "prompts" => assert_eq!((n("kept"), loads), (48, 0), "{plan}"),
            "report" => assert_eq!(loads, 0, "{plan}"),
            // A program of some hundred megabytes, a model of 220 kB.
            _ => assert!((100 << 20..1 << 30).contains(&loads), "{stage}: {plan}"),
        }
        match stage {
            "sft" | "ppo" => assert!(n("train") >= 20 && n("validation") > 0, "{plan}"),
            "reward" => assert!(n("action/train") >= 20 && n("motivation/train") >= 20, "{plan}"),
            "yardstick" => assert!(n("train") + n("validation") + n("test") == 40, "{plan}"),
            "scoring" => assert!(n("test") > 0 && n("models") == 3, "{plan}"),
            _ => {}
        }
        pipeline.run(stage);
        let files = pipeline.files();
        assert!(dry("complete")["would"][0]["does"].as_str().unwrap().starts_with("nothing"));
        assert_eq!(pipeline.files(), files, "{stage} touched its results");
    }
}
