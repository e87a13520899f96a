//! Conversations: chains, shards, what is left out, neighbours.

use super::*;

#[test]
fn conversations_are_two_chains_a_prompt_and_shards_join_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 40);
    let rows = converse(&prompts, &dir.path().join("whole"), &[]);
    assert_eq!(rows.len(), 80);
    for (idx, row) in rows.iter().enumerate() {
        assert_eq!(row.sample, (idx % 2) as i32);
        assert_eq!(row.persona, None);
        let roles: Vec<Role> = row.messages.iter().map(|m| m.role).collect();
        assert_eq!(roles, [Role::User, Role::Assistant].repeat(3));
        assert_eq!(row.messages[2].content, "What is the motivation behind the answer?");
        assert_eq!(row.aspects().collect::<Vec<_>>(), Aspect::SHIPPED);
        for (turn, place) in row.turns.iter().zip([1, 3, 5]) {
            assert_eq!(row.messages[place].content, turn.text);
            let n_tokens = turn.n_tokens;
            assert!((1..=6).contains(&n_tokens));
            if turn.finish_reason == FinishReason::Length {
                assert_eq!(n_tokens, 6);
            }
        }
    }
    let differ = rows.chunks(2).filter(|pair| pair[0].messages != pair[1].messages).count();
    assert!(differ > 30, "{differ}");

    let parts = ["1/2", "2/2"].map(|shard| {
        let part = dir.path().join(shard.replace('/', "-"));
        converse(&prompts, &part, &["--shard", shard]);
        part
    });
    assert!(merge::merge(&parts[..1], &dir.path().join("half")).is_err());
    let merged = dir.path().join("merged");
    merge::merge(&parts, &merged).unwrap();
    let name = "conversations.parquet";
    assert_eq!(bytes(merged.join(name)), bytes(dir.path().join("whole").join(name)));
    assert_eq!(contents(&merged), contents(&dir.path().join("whole")));
    write_prompts(dir.path(), 41);
    let error = merge::merge(&parts, &dir.path().join("later")).unwrap_err().to_string();
    assert!(error.contains("its input `prompts` has changed since"), "{error}");
}

#[test]
fn what_a_model_cannot_take_is_left_out_or_abstained_from_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 8);
    let file = prompts.join("prompts.parquet");
    let mut rows: Vec<PromptRow> = parquet::read(&file).unwrap();
    // A megabyte of words, and what fits the model once, but not twice in a judge's question.
    rows[2].prompt = vec![Message::user("many words ".repeat(100_000))];
    let path = dir.path().join("long.parquet");
    parquet::write(&path, &rows).unwrap();
    let samples = dir.path().join("conversations");
    let mut conversations = converse(&path, &samples, &[]);
    assert_eq!(conversations.len(), 14);
    assert!(conversations.iter().all(|row| row.prompt_id != rows[2].prompt_id));
    let run = RunJson::read(&samples).unwrap();
    assert_eq!((&run.counts["prompts"], &run.counts["prompts_too_long"]), (&json!(8), &json!(1)));

    let long = "word ".repeat(1500);
    for row in &mut conversations[..2] {
        row.messages[1].content = format!("{long}{}", row.sample);
        row.turns[0].text = row.messages[1].content.clone();
    }
    let path = dir.path().join("conversations.parquet");
    parquet::write(&path, &conversations).unwrap();
    for method in ["pairwise-logits", "pairwise-text", "pointwise-logits", "likelihood"] {
        let output = dir.path().join(method);
        let flags = ["--method", method, "--min-pairs", "0", "--pointwise-template"];
        let template = format!("{long}{{question}} {{answer}} {{virtue}}?");
        judge(&path, Some(&fixture()), &output, &[&flags[..], &[&template]].concat()).unwrap();
        let rows: Vec<JudgementRow> = parquet::read(output.join("judgements.parquet")).unwrap();
        let of_long = rows.iter().filter(|row| row.prompt_id == conversations[0].prompt_id);
        assert!(of_long.clone().count() >= 15);
        if method == "likelihood" {
            continue; // each conversation fits by itself
        }
        assert!(
            of_long.clone().all(|row| row.p_sample0.is_none() && row.vote.is_none()),
            "{method}"
        );
    }
}

#[test]
fn prompts_of_one_id_are_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 4);
    let mut rows: Vec<PromptRow> = parquet::read(prompts.join("prompts.parquet")).unwrap();
    rows.push(rows[1].clone());
    let path = dir.path().join("twice.parquet");
    parquet::write(&path, &rows).unwrap();
    let inputs =
        conversations::Inputs { prompts: path, model: "none/such".to_owned(), original: None };
    let output = dir.path().join("out");
    let error = conversations::run(&conversations_config(&[]), &inputs, &output, &Work::Compute);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("twice.parquet:5") && error.contains("as in row 2"), "{error}");
    assert!(!output.exists());
}

#[test]
fn damaged_parquet_prompts_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 4);
    let good = bytes(prompts.join("prompts.parquet"));
    let refuse = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        fs_err::write(&path, bytes).unwrap();
        let input = [path.to_str().unwrap().to_owned()];
        let error = prompts::run(&config(&[]), &input, &dir.path().join("x")).unwrap_err();
        let error = error.to_string();
        assert!(error.contains(name), "{error}");
        error
    };
    refuse("cut.parquet", &good[..good.len() / 2]);
    refuse("text.parquet", b"prompt\nwhat is this?\n");
    // A footer that claims four gigabytes.
    let mut hostile = good.clone();
    let at = hostile.len() - 8;
    hostile[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    refuse("hostile.parquet", &hostile);
    // A file of another stage: none of the columns a prompt may be in.
    let samples = dir.path().join("conversations");
    converse(&prompts, &samples, &[]);
    let judged = dir.path().join("judged");
    judge(&samples, Some(&fixture()), &judged, &["--method", "likelihood"]).unwrap();
    let error = refuse("columns.parquet", &bytes(judged.join("judgements.parquet")));
    assert!(error.contains("one of the columns prompt, messages"), "{error}");
}

#[test]
fn a_completion_does_not_depend_on_its_neighbours() {
    let dir = tempfile::tempdir().unwrap();
    let (few, many) = (dir.path().join("few"), dir.path().join("many"));
    fs_err::create_dir_all(&few).unwrap();
    fs_err::create_dir_all(&many).unwrap();
    let mut few = converse(&write_prompts(&few, 5), &few.join("out"), &[]);
    let mut many = converse(&write_prompts(&many, 20), &many.join("out"), &[]);
    // Of few prompts each split is given one: the same prompt may be of another then.
    few.iter_mut().chain(&mut many).for_each(|row| row.split = Split::Train);
    assert_eq!(few[..], many[..10]);
}

#[test]
fn original_draws_the_second_sample_from_the_other_model_and_labels_by_construction() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 40);
    let samples = dir.path().join("conversations");
    let rows = converse(&prompts, &samples, &["--personas", "original"]);
    // Here both models are the same one, so the samples are those of plain sampling, and in their order.
    let plain = converse(&prompts, &dir.path().join("plain"), &[]);
    assert_eq!(rows.len(), plain.len());
    for (row, plain) in rows.iter().zip(&plain) {
        let expected = if row.sample == 0 { "tuned" } else { "original" };
        assert_eq!(row.persona.as_deref(), Some(expected));
        assert_eq!((row.sample, &row.messages), (plain.sample, &plain.messages));
    }
    let output = dir.path().join("preferences");
    judge(&samples, None, &output, &["--method", "contrast"]).unwrap();
    for pair in pairs(&output, Aspect::ACTION) {
        let tuned = rows.iter().find(|row| row.prompt_id == pair.prompt_id).unwrap();
        assert_eq!(pair.chosen[0].content, tuned.turns[0].text);
    }
    let config = conversations_config(&["--personas", "original"]);
    let inputs = conversations::Inputs { prompts, model: fixture(), original: None };
    let error = conversations::run(&config, &inputs, &dir.path().join("no"), &Work::Compute);
    assert!(error.unwrap_err().to_string().contains("--original"));
}

#[test]
fn replies_behind_shared_prefixes_have_the_logprobs_of_unshared_ones() {
    // Two sides under two personas, as the method `likelihood` asks; and one that is too long.
    let mut conversations: Vec<Vec<Message>> = (0..12)
        .map(|idx| {
            vec![
                Message::system(format!("You are persona {}.", idx % 2)),
                Message::user("word and another word, ".repeat(8)),
                Message::assistant(format!("Side {} says so.", idx / 2)),
            ]
        })
        .collect();
    conversations.push(vec![Message::user("many ".repeat(3000)), Message::assistant("x")]);
    let options = LoadOptions { device: Device::Cpu, dtype: Kind::Float, nf4: None };
    let logprobs = |share: bool| {
        let mut local = LocalEngine::load(&fixture(), None, &options).unwrap();
        local.share_prefixes = share;
        engine::Engine::Local(Box::new(local)).reply_logprobs(&conversations).unwrap()
    };
    let (shared, unshared) = (logprobs(true), logprobs(false));
    assert!(shared[12].is_nan() && unshared[12].is_nan());
    for (idx, (a, b)) in shared.iter().zip(&unshared).take(12).enumerate() {
        assert!(*a < -5.0 && (a - b).abs() < 1e-4 * a.abs(), "{idx}: {a} {b}");
        assert!(idx == 0 || shared[idx - 1] != *a);
    }
}
