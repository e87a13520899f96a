//! Conversations and verdicts by a server.

use super::*;

/// Replies with the length of what it is asked; judges the side that holds "good" better.
fn talking_server(request: &Value, n_good: usize) -> Answer {
    let messages = request["messages"].as_array().unwrap();
    let text = messages.last().unwrap()["content"].as_str().unwrap();
    if request["logprobs"] == json!(true) {
        let (a, b) = (text.find("[Assistant A]"), text.find("[Assistant B]"));
        let (Some(a), Some(b)) = (a, b) else {
            return answer(&json!({"choices": [{"logprobs": {"content": [{"top_logprobs": [
                {"token": "A", "logprob": -0.1}]}]}}]}));
        };
        // Four of five for the good side shown first, three of five shown second: p 0.8 and 0.4.
        let p_a: f64 = match (text[a..b].contains("good"), text[b..].contains("good")) {
            (true, false) => 0.8,
            (false, true) => 0.4,
            _ => 0.5,
        };
        let top = [("A", p_a), ("B", 1.0 - p_a)]
            .map(|(token, p)| json!({"token": token, "logprob": p.ln()}));
        return answer(&json!({"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}));
    }
    let seed = request["seed"].as_u64().unwrap_or(0); // the first request has none
    let word = if seed as usize % 10 < n_good { "good" } else { "bad" };
    answer(&json!({
        "choices": [{"message": {"content": format!("{word} {seed}")}, "finish_reason": "stop"}],
        "usage": {"completion_tokens": 2},
    }))
}

fn answer(body: &Value) -> Answer {
    Answer::Http(200, "", body.to_string())
}

fn converse_by_server(
    prompts: &Path,
    output: &Path,
    url: &str,
    concurrency: &str,
) -> anyhow::Result<()> {
    let flags = ["--engine-url", url, "--concurrency", concurrency, "--attempts", "1"];
    let inputs = conversations::Inputs {
        prompts: prompts.to_owned(),
        model: "served".to_owned(),
        original: None,
    };
    conversations::run(&conversations_config(&flags), &inputs, output, &Work::Compute)
}

#[test]
fn identical_replies_give_identical_rows_and_a_broken_run_continues() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 70);
    let healthy = serve(|_, request| talking_server(request, 5));
    let name = "conversations.parquet";
    let (one, eight) = (dir.path().join("one"), dir.path().join("eight"));
    converse_by_server(&prompts, &one, &healthy.url, "1").unwrap();
    converse_by_server(&prompts, &eight, &healthy.url, "8").unwrap();
    assert_eq!(bytes(one.join(name)), bytes(eight.join(name)));

    // A server that goes down for good in the second unit (after the probe and 32 · 2 · 3 replies)
    // and comes back for the second run, at the same address.
    let down = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
    let flag = std::sync::Arc::clone(&down);
    let mortal = serve(move |number, request| {
        if number > 250 && flag.load(std::sync::atomic::Ordering::SeqCst) {
            return Answer::Http(500, "", "down".to_owned());
        }
        talking_server(request, 5)
    });
    let broken = dir.path().join("broken");
    let error = converse_by_server(&prompts, &broken, &mortal.url, "4").unwrap_err();
    assert!(error.to_string().contains("down"), "{error}");
    assert!(broken.join("shards/conversations-000000.parquet").exists());
    assert!(!broken.join("run.json").exists());
    down.store(false, std::sync::atomic::Ordering::SeqCst);
    let before = mortal.requests.lock().unwrap().len();
    converse_by_server(&prompts, &broken, &mortal.url, "4").unwrap();
    assert_eq!(bytes(one.join(name)), bytes(broken.join(name)));
    // Only the two missing units were asked for: 38 prompts, two samples, three turns, one probe.
    assert_eq!(mortal.requests.lock().unwrap().len() - before, 38 * 2 * 3 + 1);
    // And a third run asks for nothing.
    converse_by_server(&prompts, &broken, &mortal.url, "4").unwrap();
    assert_eq!(mortal.requests.lock().unwrap().len() - before, 38 * 2 * 3 + 1);
}

#[test]
fn a_servers_logprobs_become_votes_and_preferences() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write_prompts(dir.path(), 40);
    let server = serve(|_, request| talking_server(request, 5));
    let samples = dir.path().join("conversations");
    converse_by_server(&prompts, &samples, &server.url, "4").unwrap();
    let output = dir.path().join("preferences");
    judge(&samples, Some("served"), &output, &["--judge-url", &server.url]).unwrap();
    let rows: Vec<ConversationRow> = parquet::read(samples.join("conversations.parquet")).unwrap();
    let pairs = pairs(&output, Aspect::ACTION);
    assert!(pairs.len() > 5, "{}", pairs.len());
    for pair in &pairs {
        // Only pairs of a good and a bad answer are decided.
        assert!(pair.chosen[0].content.starts_with("good"), "{pair:?}");
        assert!(pair.rejected[0].content.starts_with("bad"), "{pair:?}");
        assert_eq!((pair.score_chosen, pair.score_rejected), (5, 0));
        // logit 0.8 = ln 4, logit 0.4 of the other shown first = ln (2/3): sigmoid of half of
        // ln 4 - ln (2/3) = ln 6 is sqrt 6 / (1 + sqrt 6) = 0.71010.
        assert!((pair.chosen_prob - 0.7101).abs() < 1e-4, "{}", pair.chosen_prob);
    }
    let judgements: Vec<JudgementRow> = parquet::read(output.join("judgements.parquet")).unwrap();
    assert_eq!(judgements.len(), 40 * 3 * 5);
    let torn = judgements.iter().filter(|row| row.p_sample0 == Some(0.5)).count();
    assert!(
        torn > 0 && judgements.iter().all(|row| (row.p_sample0 == Some(0.5)) == row.vote.is_none())
    );
    assert_eq!(rows.len(), 80);
    // Two servers share the questions, and give the same verdicts.
    let (second, both) = (serve(|_, request| talking_server(request, 5)), dir.path().join("both"));
    let urls = format!("{},{}", server.url, second.url);
    judge(&samples, Some("served"), &both, &["--judge-url", &urls]).unwrap();
    let name = "judgements.parquet";
    assert_eq!(bytes(both.join(name)), bytes(output.join(name)));
    assert!(second.requests.lock().unwrap().len() > 100);
    // A flip exchanges the sides.
    let flipped = dir.path().join("flipped");
    judge(&samples, Some("served"), &flipped, &["--judge-url", &server.url, "--flip"]).unwrap();
    let flipped = self::pairs(&flipped, Aspect::ACTION);
    assert_eq!(flipped.len(), pairs.len());
    assert!(flipped.iter().all(|pair| pair.chosen[0].content.starts_with("bad")));
}

/// Conversations of forty prompts with a server that talks.
fn served_conversations(dir: &Path) -> PathBuf {
    let prompts = write_prompts(dir, 40);
    let samples = dir.join("conversations");
    let talking = serve(|_, request| talking_server(request, 5));
    converse_by_server(&prompts, &samples, &talking.url, "4").unwrap();
    samples
}

/// A server without a parser of thoughts: they come in the text, and name both sides.
fn thinking_server(request: &Value, is_cut: bool) -> Answer {
    let messages = request["messages"].as_array().unwrap();
    let text = messages.last().unwrap()["content"].as_str().unwrap();
    let Some((_, sides)) = text.split_once("[Assistant A]") else {
        return talking_server(request, 5);
    };
    let (a, _) = sides.split_once("[Assistant B]").unwrap();
    let thoughts = "<think>\nOkay, who is kinder? Assistant A says that";
    let said = match (is_cut, a.contains("good")) {
        (true, _) => thoughts.to_owned(),
        (false, true) => format!("{thoughts} and B that.\n</think>\n\nA"),
        (false, false) => format!("{thoughts} and B that.\n</think>\n\nB"),
    };
    answer(&json!({
        "choices": [{"message": {"content": said}, "finish_reason": if is_cut { "length" } else { "stop" }}],
        "usage": {"completion_tokens": 16},
    }))
}

#[test]
fn a_judge_that_thinks_aloud_is_read_after_its_thoughts() {
    let dir = tempfile::tempdir().unwrap();
    let samples = served_conversations(dir.path());
    let judge = |is_cut: bool, output: &str| {
        let server = serve(move |_, request| thinking_server(request, is_cut));
        let flags = ["--judge-url", &server.url, "--method", "pairwise-text"];
        judge(&samples, Some("served"), &dir.path().join(output), &flags)
    };
    judge(false, "read").unwrap();
    let pairs = pairs(&dir.path().join("read"), Aspect::ACTION);
    assert!(pairs.len() > 5, "{}", pairs.len());
    for pair in &pairs {
        assert!(pair.chosen[0].content.starts_with("good"), "{pair:?}");
        assert!(pair.rejected[0].content.starts_with("bad"), "{pair:?}");
    }
    // Cut inside its thoughts it has said nothing, whichever side they name.
    let error = judge(true, "cut").unwrap_err().to_string();
    assert!(error.contains("verdict_tokens") && error.contains("<think>"), "{error}");
}

/// A judge whose replies begin with something else than a letter, whatever it is asked.
#[test]
fn a_judge_that_names_no_side_is_told_by_what_it_says() {
    let dir = tempfile::tempdir().unwrap();
    let samples = served_conversations(dir.path());
    for token in ["<think>", "**", "\\n", "token_id:362"] {
        let other = serde_json::from_str::<String>(&format!("\"{token}\"")).unwrap();
        let server = serve(move |_, _| {
            let top = [(other.as_str(), 0.99), ("A", 0.004), ("B", 0.001)]
                .map(|(token, p): (&str, f64)| json!({"token": token, "logprob": p.ln()}));
            answer(&json!({"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}))
        });
        let output = dir.path().join("preferences");
        let flags = ["--judge-url", &server.url, "--method", "pairwise-logits"];
        let error = judge(&samples, Some("served"), &output, &flags).unwrap_err().to_string();
        assert!(error.contains(&format!("got \"{token}\" (")), "{error}");
        assert!(error.contains("pairwise-text"), "{error}");
        assert!(!output.join("run.json").exists());
    }
}

#[test]
fn a_recipe_names_one_judge_or_several() {
    let read = |value: Value| {
        let mut settings = serde_json::to_value(preferences_config(&[])).unwrap();
        settings["judge_url"] = value;
        serde_json::from_value::<PreferencesConfig>(settings)
    };
    let (a, b) = ("http://a:1", "http://b:2");
    assert_eq!(read(json!(a)).unwrap().judge.urls(), Some(&[a.to_owned()][..]));
    assert_eq!(read(json!([a, b])).unwrap().judge.urls(), Some(&[a.to_owned(), b.to_owned()][..]));
    assert_eq!(read(json!(null)).unwrap().judge.urls(), None);
    assert_eq!(read(json!([])).unwrap().judge.urls(), None);
    let flag = preferences_config(&["--judge-url", "http://a:1,http://b:2"]);
    assert_eq!(flag.judge.urls().unwrap().len(), 2);
    let refused = read(json!(5)).unwrap_err().to_string();
    assert!(refused.contains("expected an address, or a list of addresses"), "{refused}");
}
