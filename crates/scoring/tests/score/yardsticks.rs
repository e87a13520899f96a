//! The cross-fitted yardstick: every prompt is scored by a fold that never saw its question.

use super::*;

/// A yardstick of two folds with arbitrary weights, and its card.
fn write_yardstick(dir: &Path, model: &Model) {
    for fold in 0..2 {
        let own = fold_dir(dir, fold);
        let seed = 20 + fold as u64;
        let head = ScalarHead::normal(model.config.hidden_size, seed, Device::Cpu);
        let meta =
            AdapterMeta::of(model, fixture().to_str().unwrap(), Task::SequenceClassification);
        let adapter = adapter(model, "yardstick", seed);
        adapter::save(&own.join("adapter"), &adapter, Some(&head), &meta).unwrap();
        Reading::whole(model, CutReply::Trim).write(&own).unwrap();
        let stats = format!(
            r#"{{"mean": {}, "std": 2.0, "n": 8, "split": "held-out", "base_sha256": ""}}"#,
            0.5 + fold as f64
        );
        fs_err::write(own.join("score_stats.json"), stats).unwrap();
        let texts = |text: &str| text.to_owned();
        let pairs = vec![[texts("help a friend"), texts("go away now")]; 6];
        BagOfWords::train(&pairs[..5 + fold]).write(&own).unwrap();
    }
    let side = |text: &str| [Message::user("q"), Message::assistant(text)];
    let judge = JudgeCard::of(&[Ruled::of(&side("a"), &side("b"))], &[[1.0, 0.0]]).unwrap();
    let fold = || FoldCard { n_train: 1, n_held_out: 1, fingerprint: "x".to_owned() };
    let card = Card {
        folds: vec![fold(), fold()],
        n_pairs: 2,
        shuffled_labels: false,
        reward_model: judge.clone(),
        bag_of_words: judge,
    };
    card.write(dir).unwrap();
}

/// The yardstick's score of an answer by hand: one conversation at a time, by the named fold.
fn fold_score(model: &Model, dir: &Path, fold: usize, row: &ConversationRow) -> f64 {
    let own = fold_dir(dir, fold);
    let loaded = adapter::load(&own.join("adapter"), "x", &model.config, Device::Cpu).unwrap();
    let (messages, finish_reasons) = through_aspect(row, Aspect::ACTION).unwrap();
    let transcript = Transcript { messages, finish_reasons };
    let chat = model.chat().unwrap();
    let token_ids =
        Reading::whole(model, CutReply::Trim).token_ids(&chat, &transcript, 10_000).unwrap();
    let batch = Batch::from_sequences(&[&token_ids]);
    let _guard = tch::no_grad_guard();
    let hidden = model.decoder.forward(&batch, Some(&loaded.adapter)).unwrap();
    let last = hidden.get(batch.last_row(SegmentIdx(0)) as i64).unsqueeze(0);
    let raw = f64::try_from(loaded.head.unwrap().forward(&last).get(0)).unwrap();
    (raw - 0.5 - fold as f64) / 2.0
}

#[test]
fn f5_f6_each_answer_is_measured_by_the_fold_that_never_saw_its_question() {
    let run = Run::new(12);
    let model = Model::load(&Source::Directory(fixture()), &options()).unwrap();
    let yardstick = run.at("yardstick");
    write_yardstick(&yardstick, &model);
    let inputs = ScoreInputs { yardstick: Some(yardstick.clone()), ..run.inputs() };
    let text = score(&config(), &inputs).unwrap();
    assert!(
        text.contains("bag of words, answers") && text.contains(", answer, yardstick"),
        "{text}"
    );
    let replies: Vec<ConversationRow> =
        parquet::read(inputs.output.join("replies/final.parquet")).unwrap();
    let scores: Vec<ScoreRow> = parquet::read(inputs.output.join("scores.parquet")).unwrap();
    let mut by_fold = [0, 0];
    for row in scores.iter().filter(|row| row.model == "final") {
        // One definition: the answer, and nothing else.
        assert_eq!(row.yardstick.is_some(), row.aspect == Aspect::ACTION, "{row:?}");
        let Some(found) = row.yardstick else { continue };
        let reply = replies.iter().find(|reply| reply.prompt_id == row.prompt_id).unwrap();
        let fold = fold_of(&reply.messages, 2);
        by_fold[fold] += 1;
        let expected = fold_score(&model, &yardstick, fold, reply);
        assert!((f64::from(found) - expected).abs() < 1e-4, "{row:?}, expected {expected}");
        let other = fold_score(&model, &yardstick, 1 - fold, reply);
        assert!((f64::from(found) - other).abs() > 1e-3, "the folds are told apart");
        assert!(row.yardstick_words.is_some());
    }
    assert!(by_fold[0] > 0 && by_fold[1] > 0, "{by_fold:?}");
    let summary = arete_scoring::score::read_summary(&inputs.output).unwrap();
    assert_eq!(summary.yardstick_cross_fitted, Some(true));
    assert_eq!(summary.primary.measure, "yardstick");
    assert!(summary.models[1].score(Scale::Yardstick, Scope::All).is_none());

    // A single reward model is marked: nothing says what it has seen.
    let single = ScoreInputs {
        yardstick: Some(fold_dir(&yardstick, 0)),
        output: run.at("single"),
        ..run.inputs()
    };
    let text = score(&config(), &single).unwrap();
    assert!(text.contains("yardstick (not cross-fitted)"), "{text}");
    let summary = arete_scoring::score::read_summary(&single.output).unwrap();
    assert!(summary.primary.reason.contains("may have seen these prompts"));
    // A card without its folds is refused by name.
    fs_err::remove_dir_all(fold_dir(&yardstick, 1)).unwrap();
    let error = score(&config(), &ScoreInputs { output: run.at("missing"), ..inputs }).unwrap_err();
    assert!(error.to_string().contains("fold-1"), "{error}");
}
