//! Preferences: judges, contrasts, pairings, virtues without a vote.

use super::*;

#[test]
fn contrast_samples_under_two_personas_and_labels_by_construction() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 24);
    let samples = dir.path().join("conversations");
    let rows = converse(&prompts, &samples, &["--personas", "contrast"]);
    for row in &rows {
        let expected = if row.sample == 0 { "virtuous" } else { "vicious" };
        assert_eq!(row.persona.as_deref(), Some(expected));
        assert!(row.messages.iter().all(|message| message.role != Role::System));
    }
    let output = dir.path().join("preferences");
    judge(&samples, None, &output, &["--method", "contrast"]).unwrap();
    for (place, aspect) in Aspect::SHIPPED.into_iter().enumerate() {
        let pairs = pairs(&output, aspect);
        assert!(pairs.len() > 15);
        for pair in pairs {
            let virtuous =
                rows.iter().find(|row| row.prompt_id == pair.prompt_id && row.sample == 0).unwrap();
            assert_eq!(pair.chosen[0].content, virtuous.turns[0].text);
            assert_eq!(pair.chosen.len(), 1 + 2 * place);
            // Nobody voted, and nobody is said to have.
            assert_eq!((pair.score_chosen, pair.score_rejected), (0, 0));
            assert_eq!(pair.chosen_prob, 1.0);
        }
    }
    assert!(!output.join("judgements.parquet").exists());
    let counts = RunJson::read(&output).unwrap().counts;
    assert_eq!(counts["judgements"], json!(0));
    assert_eq!(counts["action"]["labelled_by"], json!("construction"));
    assert!(counts["action"].get("votes").is_none(), "{counts:?}");
    // The control exchanges the sides here, too.
    let flipped = dir.path().join("flipped");
    judge(&samples, None, &flipped, &["--method", "contrast", "--flip"]).unwrap();
    let [straight, turned] = [&output, &flipped].map(|dir| pairs(dir, Aspect::ACTION));
    assert_eq!(straight[0].chosen, turned[0].rejected);
    // Without personas there is nothing to label by.
    let plain = dir.path().join("plain");
    converse(&prompts, &plain, &[]);
    let error = judge(&plain, None, &dir.path().join("no"), &["--method", "contrast"]).unwrap_err();
    assert!(error.to_string().contains("personas"), "{error}");
}

#[test]
fn every_method_of_a_local_judge_gives_five_verdicts_a_pair() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 12);
    let samples = dir.path().join("conversations");
    converse(&prompts, &samples, &[]);
    for method in ["pairwise-logits", "pairwise-text", "pointwise-logits", "likelihood"] {
        let output = dir.path().join(method);
        // The tiny model says anything: most verdicts may abstain, and then no pair is left.
        let flags =
            ["--method", method, "--min-pairs", "0", "--few-shot", "1", "--verdict-tokens", "3"];
        judge(&samples, Some(&fixture()), &output, &flags).unwrap();
        let rows: Vec<JudgementRow> = parquet::read(output.join("judgements.parquet")).unwrap();
        assert_eq!(rows.len() % 5, 0);
        assert!(rows.len() > 100, "{}", rows.len());
        assert!(rows.iter().all(|row| row.method == method && row.judge == "tiny-chat"));
        for row in &rows {
            for p in [row.p_ab, row.p_ba, row.p_sample0].into_iter().flatten() {
                assert!((0.0..=1.0).contains(&p), "{row:?}");
            }
            assert!(row.p_sample0.is_some() || row.vote.is_none());
        }
        if method == "likelihood" {
            assert!(rows.iter().all(|row| row.p_sample0.is_some()));
        }
    }
}

#[test]
fn shared_prefixes_give_the_probabilities_of_unshared_ones() {
    let prefix = "word and another word, ".repeat(12);
    let queries: Vec<Query> = (0..24)
        .map(|idx| Query {
            messages: vec![Message::user(format!(
                "{prefix} pair {} question {}",
                idx / 5,
                idx % 5
            ))],
            opening: "Assistant".to_owned(),
        })
        .collect();
    for (dtype, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 1e-3)] {
        let options = LoadOptions { device: Device::Cpu, dtype, nf4: None };
        let mut local = LocalEngine::load(&fixture(), None, &options).unwrap();
        let masses = |local: LocalEngine| {
            let engine = engine::Engine::Local(Box::new(local));
            let masses = engine.label_masses(&queries, Labels::AB).unwrap();
            let engine::Engine::Local(local) = engine else { panic!("it is local") };
            (*local, masses)
        };
        let (returned, shared) = masses(local);
        local = returned;
        local.share_prefixes = false;
        let (_, unshared) = masses(local);
        for (a, b) in shared.iter().zip(&unshared) {
            assert!(a.first > 0.0 && a.second > 0.0);
            let (p, q) = (a.first / (a.first + a.second), b.first / (b.first + b.second));
            assert!((p - q).abs() <= tolerance, "{dtype:?}: {p} {q}");
            assert!((a.first - b.first).abs() <= tolerance * a.first.max(1e-3));
        }
    }
}

#[test]
fn written_verdicts_behind_shared_prefixes_are_those_of_unshared_ones() {
    let about = |pair: usize| format!("pair {pair}: {}", "word and another word, ".repeat(6));
    let chains: Vec<Chain> = (0..15)
        .map(|idx| Chain {
            messages: vec![Message::user(format!("{}Which? {}", about(idx / 5), idx % 5))],
            questions: Vec::new(),
            key: idx as u64 / 5,
            samples: vec![idx as u64 % 5],
        })
        .collect();
    let drawing =
        Drawing { seed: 3, sampling: Sampling::at(1.0), max_new_tokens: 9, is_verdict: true };
    let options = LoadOptions { device: Device::Cpu, dtype: Kind::Float, nf4: None };
    let replies = |share: bool| {
        let mut local = LocalEngine::load(&fixture(), None, &options).unwrap();
        local.share_prefixes = share;
        engine::Engine::Local(Box::new(local)).chains(&chains, &drawing).unwrap()
    };
    let (shared, unshared) = (replies(true), replies(false));
    assert_eq!(shared, unshared);
    assert!(shared.windows(2).any(|pair| pair[0] != pair[1]));
}

#[test]
fn damaged_conversations_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 4);
    let samples = dir.path().join("conversations");
    let rows = converse(&prompts, &samples, &[]);
    let try_rows = |name: &str, rows: &[ConversationRow]| {
        let path = dir.path().join(format!("{name}.parquet"));
        parquet::write(&path, rows).unwrap();
        judge(&path, None, &dir.path().join(name), &["--method", "contrast"])
            .unwrap_err()
            .to_string()
    };
    assert!(try_rows("twice", &[rows.clone(), rows.clone()].concat()).contains("twice"));
    assert!(try_rows("one", &rows[..3]).contains("samples 0 and 1"));
    assert!(try_rows("none", &[]).contains("at least one"));
    let mut other = rows.clone();
    other[1].messages[0].content.push('!');
    assert!(try_rows("other", &other).contains("the same prompt"));
    let mut short = rows.clone();
    short[0].messages.truncate(3);
    assert!(try_rows("short", &short).contains("the 5 messages of a chain"));
}

#[test]
fn several_samples_give_every_pair_or_the_best_beside_the_worst() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 30);
    let two = converse(&prompts, &dir.path().join("two"), &[]);
    let samples = dir.path().join("four");
    let four = converse(&prompts, &samples, &["--samples-per-prompt", "4"]);
    assert_eq!(four.len(), 2 * two.len());
    // The first two samples are what they are without the others.
    for (idx, row) in two.iter().enumerate() {
        assert_eq!(row, &four[4 * (idx / 2) + idx % 2]);
    }
    assert_eq!(four.iter().map(|row| row.sample).max(), Some(3));

    let [all, best] = ["all", "best_worst"].map(|pairing| {
        let output = dir.path().join(pairing);
        let flags = ["--method", "likelihood", "--pairing", pairing];
        judge(&samples, Some(&fixture()), &output, &flags).unwrap();
        output
    });
    // Judged are the same pairs, by the samples that they are of.
    assert_eq!(bytes(all.join("judgements.parquet")), bytes(best.join("judgements.parquet")));
    let rows: Vec<JudgementRow> = parquet::read(all.join("judgements.parquet")).unwrap();
    let of_first: std::collections::BTreeSet<&str> = (rows.iter())
        .filter_map(|row| row.prompt_id.strip_prefix(&format!("{}:", four[0].prompt_id)))
        .collect();
    assert_eq!(
        of_first.into_iter().collect::<Vec<_>>(),
        ["0-1", "0-2", "0-3", "1-2", "1-3", "2-3"]
    );
    let (all, best) = (pairs(&all, Aspect::ACTION), pairs(&best, Aspect::ACTION));
    assert!(all.len() > 150 && (25..=30).contains(&best.len()), "{} {}", all.len(), best.len());
    assert!(best.iter().all(|pair| all.contains(pair)));
    let prompts_of_best: std::collections::BTreeSet<&str> =
        best.iter().map(|pair| pair.prompt_id.as_str()).collect();
    assert_eq!(prompts_of_best.len(), best.len());

    for (flags, expected) in [
        (vec!["--samples-per-prompt", "9"], "2 to 8"),
        (vec!["--samples-per-prompt", "1"], "2 to 8"),
        (vec!["--samples-per-prompt", "3", "--personas", "original"], "2 with personas"),
    ] {
        let inputs = conversations::Inputs {
            prompts: prompts.clone(),
            model: fixture(),
            original: Some(fixture()),
        };
        let output = dir.path().join("refused");
        let config = conversations_config(&flags);
        let error = conversations::run(&config, &inputs, &output, &Work::Compute).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn virtues_at_chance_have_no_vote_and_labelled_pairs_are_mixed_in() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 40);
    let samples = dir.path().join("conversations");
    converse(&prompts, &samples, &[]);
    let (virtue_pairs, constitution) = (data("virtues/pairs.jsonl"), data("constitution.toml"));
    let calibration = dir.path().join("calibration");
    let flags = ["--methods", "likelihood", "--limit", "40", "--constitution", &constitution];
    let inputs = calibrate::Inputs { pairs: vec![PathBuf::from(&virtue_pairs)], model: fixture() };
    calibrate::run(&config(&flags), &inputs, &calibration).unwrap();
    let file = calibration.join("calibration.json");
    let mut found: Value = serde_json::from_slice(&bytes(&file)).unwrap();
    let lines = found["virtues"].as_array_mut().unwrap();
    assert_eq!(lines.len(), 5);
    let n_pairs: u64 = lines.iter().map(|line| line["n_pairs"].as_u64().unwrap()).sum();
    assert_eq!(n_pairs, 40);
    assert!(
        fs_err::read_to_string(calibration.join("calibration.md")).unwrap().contains("may vote")
    );
    // A model that knows nothing tells nothing apart; say that it knew honesty.
    for line in lines {
        line["may_vote"] = json!(line["virtue"] == "honesty");
    }
    // Beside its run.json it would be damaged; a file of one's own is believed.
    let told = dir.path().join("told");
    fs_err::create_dir(&told).unwrap();
    fs_err::write(told.join("calibration.json"), found.to_string()).unwrap();

    let output = dir.path().join("preferences");
    let calibration = told.to_str().unwrap();
    let flags = [
        "--method",
        "likelihood",
        "--calibration",
        calibration,
        "--pairs",
        &virtue_pairs,
        "--pairs-weight",
        "0.5",
    ];
    judge(&samples, Some(&fixture()), &output, &flags).unwrap();
    let rows: Vec<JudgementRow> = parquet::read(output.join("judgements.parquet")).unwrap();
    assert!(rows.iter().any(|row| row.vote.is_some()));
    assert!(rows.iter().all(|row| row.vote.is_none() || row.virtue.name() == "honesty"));
    let counts = RunJson::read(&output).unwrap().counts;
    assert_eq!(counts["without_vote"], json!(["prudence", "compassion", "humility", "respect"]));
    let (own, labelled) = (
        counts["action"]["pairs"].as_u64().unwrap(),
        counts["action"]["labelled"].as_u64().unwrap(),
    );
    let rows = pairs(&output, Aspect::ACTION);
    assert_eq!(rows.len() as u64, own + labelled);
    let train: Vec<PreferenceRow> = parquet::read(output.join("action/train.parquet")).unwrap();
    assert_eq!(labelled, ((train.len() as u64 - labelled) as f64 * 0.5).round() as u64);
    // One virtue votes; a labelled pair carries one vote as well.
    assert!(rows.iter().all(|row| (row.score_chosen, row.score_rejected) == (1, 0)));

    let other = judge(
        &samples,
        Some(&fixture()),
        &dir.path().join("x"),
        &["--calibration", calibration, "--method", "pairwise-logits"],
    );
    assert!(other.unwrap_err().to_string().contains("no line of it"));
    let contrast = judge(
        &samples,
        None,
        &dir.path().join("y"),
        &["--calibration", calibration, "--method", "contrast"],
    );
    assert!(contrast.unwrap_err().to_string().contains("asks a judge"));
}
