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
    let seed = request["seed"].as_u64().unwrap();
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
) -> Result<(), arete_curation::Error> {
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
    // A flip exchanges the sides.
    let flipped = dir.path().join("flipped");
    judge(&samples, Some("served"), &flipped, &["--judge-url", &server.url, "--flip"]).unwrap();
    let flipped = self::pairs(&flipped, Aspect::ACTION);
    assert_eq!(flipped.len(), pairs.len());
    assert!(flipped.iter().all(|pair| pair.chosen[0].content.starts_with("bad")));
}
