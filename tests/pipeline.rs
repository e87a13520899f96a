//! The whole pipeline on a tiny chat model, every stage by its own program: what each leaves for the next, that a second
//! run has nothing to do, that the same seed gives the same bytes, and that kills change none of them.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]
#![expect(clippy::print_stdout, reason = "a test says what it measured")]

#[path = "../crates/scoring/tests/common/browser.rs"]
#[expect(dead_code, reason = "the tests of the page use the rest")]
mod browser;
mod nearness;
#[expect(dead_code, reason = "the test of recorded hashes uses the rest")]
mod run;

use std::collections::{BTreeMap, BTreeSet};
use std::process::Stdio;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use arete_records::hashes::sha256_file;
use arete_records::rows::{
    ConversationRow, DemonstrationRow, JudgementRow, PreferenceRow, PromptRow, RolloutRow, ScoreRow,
};
use arete_records::{Aspect, FinishReason, Message, Role, Split, Virtue, prompt_id, split_of};
use arete_stage::run::RunJson;
use browser::Browser;
use run::{N_PROMPTS, Pipeline, STAGES, text};

/// A finished run that the tests read, and how long each stage took.
struct Whole {
    pipeline: Pipeline,
    took: BTreeMap<&'static str, Duration>,
    score_table: String,
}

static WHOLE: LazyLock<Whole> = LazyLock::new(|| {
    let pipeline = Pipeline::new("whole", "keep", 24);
    let mut took = BTreeMap::new();
    let mut score_table = String::new();
    for (stage, _) in STAGES {
        let started = Instant::now();
        let (stdout, _) = pipeline.run(stage);
        took.insert(stage, started.elapsed());
        if stage == "scoring" {
            score_table = stdout;
        }
    }
    println!("seconds a stage: {took:.2?}");
    Whole { pipeline, took, score_table }
});

#[test]
fn every_stage_leaves_what_the_next_one_reads() {
    let run = &WHOLE.pipeline;
    let prompts: Vec<PromptRow> = run.rows("prompts/prompts.parquet");
    assert_eq!(prompts.len(), N_PROMPTS);
    let ids: BTreeSet<&str> = prompts.iter().map(|row| row.prompt_id.as_str()).collect();
    assert_eq!(ids.len(), N_PROMPTS);
    for row in &prompts {
        assert_eq!((&row.prompt_id, row.split), (&prompt_id(&row.prompt), split_of(&row.prompt)));
    }
    let in_split = |split| prompts.iter().filter(|row| row.split == split).count();
    assert!(Split::ALL.into_iter().all(|split| in_split(split) > 0));

    // The same by split, and a card by which `datasets.load_dataset` finds them.
    let mut by_split: Vec<PromptRow> = Vec::new();
    for split in Split::ALL {
        let own: Vec<PromptRow> = run.rows(&format!("prompts/splits/{}.parquet", split.name()));
        assert!(own.len() == in_split(split) && own.iter().all(|row| row.split == split));
        by_split.extend(own);
    }
    assert!(prompts.iter().all(|row| by_split.contains(row)));
    for stage in ["prompts", "demonstrations", "conversations"] {
        let card = fs_err::read_to_string(run.at(&format!("{stage}/README.md"))).unwrap();
        assert!(card.starts_with("---\nconfigs:\n- config_name: default\n"), "{card}");
        for split in ["train", "validation", "test"] {
            let path = format!("splits/{split}.parquet");
            let is_named = card.contains(&format!("  - split: {split}\n    path: {path}\n"));
            assert_eq!(is_named, run.at(&format!("{stage}/{path}")).is_file(), "{card}");
        }
    }

    let demonstrations: Vec<DemonstrationRow> = run.rows("demonstrations/demonstrations.parquet");
    for source in ["own", "self"] {
        assert!(demonstrations.iter().any(|row| row.source == source), "{source}");
    }
    assert!(demonstrations.iter().all(|row| is_chain(&row.messages)));
    assert!(run.at("sft/merged/model.safetensors").is_file());
    assert!(run.at("sft/adapter/adapter_model.safetensors").is_file());

    let conversations: Vec<ConversationRow> = run.rows("conversations/conversations.parquet");
    assert_eq!(conversations.len(), 2 * N_PROMPTS);
    for (idx, row) in conversations.iter().enumerate() {
        let prompt = prompts.iter().find(|prompt| prompt.prompt_id == row.prompt_id).unwrap();
        assert_eq!((row.sample, row.split), ((idx % 2) as i32, prompt.split));
        assert!(row.messages.starts_with(&prompt.prompt) && is_chain(&row.messages));
        assert_eq!(row.aspects().collect::<Vec<_>>(), Aspect::SHIPPED);
        for turn in &row.turns {
            assert!((1..=24).contains(&turn.n_tokens));
            assert!(turn.finish_reason == FinishReason::Stop || turn.n_tokens == 24);
            assert!(row.messages.iter().any(|message| message.content == turn.text));
        }
    }
    preferences_are_of(run, &conversations);
    for aspect in Aspect::SHIPPED {
        let dir = format!("reward/{aspect}");
        for file in ["adapter/adapter_model.safetensors", "score_stats.json", "evaluation.json"] {
            assert!(run.at(&format!("{dir}/{file}")).is_file(), "{dir}/{file}");
        }
    }
    rollouts_are_of(run, &prompts);
    scores_are_of(run, &prompts);
    for (_, dir) in STAGES {
        let dirs = match dir {
            "reward" => Aspect::SHIPPED.map(|aspect| format!("reward/{aspect}")).to_vec(),
            dir => vec![dir.to_owned()],
        };
        for dir in dirs {
            let recorded = RunJson::read(run.at(&dir)).unwrap();
            assert!(!recorded.outputs.is_empty(), "{dir}");
            for (name, file) in &recorded.outputs {
                let path = run.at(&format!("{dir}/{name}"));
                assert_eq!(sha256_file(&path).unwrap(), file.sha256, "{dir}/{name}");
            }
            if !matches!(dir.as_str(), "prompts" | "report") {
                assert_eq!(recorded.seed, 7, "{dir}");
            }
        }
    }
}

/// Roles alternate, the two questions are asked, and three replies are the model's.
fn is_chain(messages: &[Message]) -> bool {
    let [.., _, answer, motivation, _, consequence, _] = messages else { return false };
    let roles: Vec<Role> = messages.iter().map(|message| message.role).collect();
    answer.role == Role::Assistant
        && motivation.content == "What is the motivation behind the answer?"
        && consequence.content
            == "What is the utility of the action towards promoting your virtuous character?"
        && roles == [Role::User, Role::Assistant].repeat(messages.len() / 2)
}

fn preferences_are_of(run: &Pipeline, conversations: &[ConversationRow]) {
    let judgements: Vec<JudgementRow> = run.rows("preferences/judgements.parquet");
    assert_eq!(judgements.len() % Virtue::SHIPPED.len(), 0);
    for verdicts in judgements.chunks(Virtue::SHIPPED.len()) {
        let virtues: Vec<Virtue> = verdicts.iter().map(|row| row.virtue).collect();
        assert_eq!(virtues, Virtue::SHIPPED);
    }
    for (place, aspect) in Aspect::SHIPPED.into_iter().enumerate() {
        let mut n_pairs = 0;
        for split in Split::ALL {
            let file = format!("preferences/{aspect}/{split}.parquet");
            if split == Split::Test && !run.at(&file).exists() {
                continue; // so few prompts that all of this split may be ties
            }
            let rows: Vec<PreferenceRow> = run.rows(&file);
            n_pairs += rows.len();
            for row in rows {
                let own = || conversations.iter().filter(|c| c.prompt_id == row.prompt_id);
                assert!(own().all(|sample| sample.split == split));
                let through = |side: &[Message]| [row.prompt.clone(), side.to_vec()].concat();
                for side in [&row.chosen, &row.rejected] {
                    assert_eq!(side.len(), 1 + 2 * place);
                    let whole = through(side);
                    assert!(own().any(|sample| sample.messages.starts_with(&whole)));
                }
                let votes = |vote| {
                    judgements
                        .iter()
                        .filter(|j| (&j.prompt_id, j.aspect) == (&row.prompt_id, aspect))
                        .filter(|j| j.vote == Some(vote))
                        .count() as i32
                };
                let mut counted = [votes(0), votes(1)];
                counted.sort_unstable();
                assert_eq!([row.score_rejected, row.score_chosen], counted);
                assert!(row.score_chosen > row.score_rejected);
            }
        }
        assert!(n_pairs >= 20, "{aspect}: {n_pairs}");
    }
}

fn rollouts_are_of(run: &Pipeline, prompts: &[PromptRow]) {
    for iteration in 1..=3 {
        let rows: Vec<RolloutRow> =
            run.rows(&format!("ppo/rollouts/iteration-{iteration:06}.parquet"));
        assert_eq!(rows.len(), 8);
        for row in rows {
            let prompt = prompts.iter().find(|prompt| prompt.prompt_id == row.prompt_id).unwrap();
            assert_eq!((row.iteration, prompt.split), (iteration, Split::Train));
            assert!(row.turns[0].z.is_some() && row.reward.is_finite() && is_chain(&row.messages));
        }
    }
    assert!(run.at("ppo/adapter/adapter_model.safetensors").is_file());
    assert!(run.at("ppo/merged/model.safetensors").is_file());
}

fn scores_are_of(run: &Pipeline, prompts: &[PromptRow]) {
    let scores: Vec<ScoreRow> = run.rows("scoring/scores.parquet");
    let test: BTreeSet<&str> = prompts
        .iter()
        .filter(|row| row.split == Split::Test)
        .map(|row| row.prompt_id.as_str())
        .collect();
    assert_eq!(scores.len(), 3 * test.len() * Aspect::SHIPPED.len());
    let key = |row: &ScoreRow| (row.model.clone(), row.prompt_id.clone(), row.aspect);
    assert_eq!(scores.iter().map(key).collect::<BTreeSet<_>>().len(), scores.len());
    for row in &scores {
        assert!(test.contains(row.prompt_id.as_str()));
        assert!(row.score.is_finite() && row.z.is_finite());
        // The yardstick reads the answer alone.
        assert_eq!(row.yardstick.is_some(), row.aspect == Aspect::ACTION);
    }
    // The Score that was printed is μ − 0.5 σ of the scores in the file.
    for model in ["original", "sft", "final"] {
        let own: Vec<f64> = scores
            .iter()
            .filter(|row| row.model == model)
            .map(|row| f64::from(row.score))
            .collect();
        let mean = own.iter().sum::<f64>() / own.len() as f64;
        let variance = own.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / own.len() as f64;
        let score = mean - 0.5 * variance.sqrt();
        let printed = format!("{:.3}", score.abs());
        let line = WHOLE.score_table.lines().find(|line| line.starts_with(model)).unwrap();
        assert!(line.contains(&printed), "{model} {score}: {}", WHOLE.score_table);
    }
}

#[test]
fn a_second_run_is_up_to_date() {
    let run = &WHOLE.pipeline;
    let before = run.files();
    for (stage, _) in STAGES {
        let started = Instant::now();
        let (stdout, stderr) = run.run(stage);
        let took = started.elapsed();
        assert!(stderr.contains("up to date"), "{stage}: {stderr}");
        assert!(!stderr.contains("running again"), "{stage}: {stderr}");
        assert!(took < Duration::from_secs(5), "{stage} looked for {took:?}");
        if stage == "scoring" {
            assert_eq!(stdout, WHOLE.score_table);
        }
    }
    assert_eq!(run.files(), before);
}

/// What CUDA tensors go through, with the CPU's kernels in the place of the GPU's: each stage on what the CPU's own path left for it.
#[test]
fn every_stage_comes_to_the_same_on_the_gpus_path() {
    let whole = WHOLE.pipeline.copied("cpu-path");
    whole.run("dpo");
    let run = whole.copied("gpu-path").with(&[("ARETE_COMPOSITE", "1")]);
    for (stage, dir) in STAGES.into_iter().chain([("dpo", "dpo")]) {
        fs_err::remove_dir_all(run.at(dir)).unwrap();
        run.run(stage);
        let furthest = nearness::compare(&run.at(dir), &whole.at(dir));
        println!("{stage}: {furthest:?}");
        if let Some(adapter) = ["sft", "ppo"]
            .contains(&stage)
            .then(|| format!("{dir}/adapter/adapter_model.safetensors"))
        {
            let sums = [&run, &whole].map(|run| sha256_file(run.at(&adapter)).unwrap());
            assert_ne!(
                sums[0], sums[1],
                "{stage}: to the last bit, as if the setting had not been read"
            );
        }
        run.put_back(dir, &whole);
    }
}

#[test]
fn kills_change_no_byte_and_neither_does_the_directory() {
    let expected = WHOLE.pipeline.files();
    let run = Pipeline::new("killed", "keep", 24);
    let mut n_killed = 0;
    for (at, (stage, dir)) in STAGES.into_iter().enumerate() {
        // Each stage at another moment, start-up included.
        let wait = WHOLE.took[stage].mul_f64(0.25 + 0.06 * at as f64);
        let mut child =
            run.command(stage).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(wait);
        child.kill().unwrap();
        n_killed += u8::from(!child.wait().unwrap().success());
        run.run(stage);
        let own = |files: &BTreeMap<String, String>| -> BTreeMap<String, String> {
            let inside = format!("{dir}/");
            let own = files.iter().filter(|(name, _)| name.starts_with(&inside));
            own.map(|(name, sum)| (name.clone(), sum.clone())).collect()
        };
        assert_eq!(own(&run.files()), own(&expected), "{stage}");
    }
    assert!(n_killed >= 5, "only {n_killed} of {} stages were killed in time", STAGES.len());
    assert_eq!(run.files(), expected);
}

#[test]
fn replies_that_are_all_cut_off_end_in_a_clear_error() {
    let run = Pipeline::new("cut", "drop", 1);
    for stage in ["prompts", "demonstrations", "sft", "conversations"] {
        run.run(stage);
    }
    let output = run.try_run("preferences");
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(65), "{stderr}");
    for part in [
        "action: 0 pairs left of 48",
        "action 0.0 %",
        "motivation 0.0 %",
        "consequence 0.0 %",
        "raise max_new_tokens",
        "truncated = \"trim\"",
    ] {
        assert!(stderr.contains(part), "{part} in {stderr}");
    }
    assert!(!run.at("preferences/run.json").exists());
    // Without them there are no reward models, and the diagnosis names the cause first.
    let (diagnosis, _) = run.run("doctor");
    assert!(diagnosis.starts_with("bad   replies cut off"), "{diagnosis}");
    assert!(diagnosis.contains("100.0 %") && diagnosis.contains("Begin with: replies cut off."));
}

#[test]
fn the_doctor_asks_its_questions_in_order() {
    let (diagnosis, _) = WHOLE.pipeline.run("doctor");
    let steps = [
        "replies cut off",
        "judge, both orders",
        "reward models",
        "best of ",
        "KL at the end",
        "Score",
    ];
    let mut rest = diagnosis.as_str();
    for step in steps {
        let at = rest.find(step).unwrap_or_else(|| panic!("{step} in {diagnosis}"));
        rest = &rest[at + step.len()..];
    }
}

#[test]
fn the_page_of_the_run_opens_in_a_browser() {
    let run = &WHOLE.pipeline;
    let page = run.at("report/report.html");
    let html = fs_err::read_to_string(&page).unwrap();
    assert!(!html.contains("not run."), "a section is missing");
    let Some(mut browser) = Browser::start() else { return };
    browser.open(&page);
    assert_eq!(browser.complaints(), Vec::<String>::new());
    let n_charts = browser.number("document.querySelectorAll('figure svg').length");
    let n_files = fs_err::read_dir(run.at("report/charts")).unwrap().count();
    assert_eq!(n_charts as usize, n_files);
    assert!(n_charts >= 15.0, "{n_charts}");
}
