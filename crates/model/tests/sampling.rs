//! How tokens are drawn: distribution, top-k, top-p, stop tokens and texts, streams.

#![expect(clippy::unwrap_used, reason = "a test: a failure here is the finding")]

use std::path::Path;

use arete_model::generate::{self, Completion, Options, Request, Sampling, Stream};
use arete_model::{Batch, Device, FinishReason, Kind, LoadOptions, Model, Source};

fn model() -> Model {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-chat");
    let options = LoadOptions { device: Device::Cpu, dtype: Kind::Float, nf4: None };
    Model::load(&Source::Directory(path), &options).unwrap()
}

fn request(samples: u64, max_new_tokens: usize) -> Request {
    Request {
        prompt_ids: vec![1, 40, 41, 42, 43],
        streams: (0..samples).map(|sample| Stream { seed: 5, prompt: 0, sample }).collect(),
        tails: Vec::new(),
        max_new_tokens,
        turns: 1,
        extra_tokens: 0,
    }
}

fn sample(model: &Model, request: Request, options: &Options) -> Vec<Completion> {
    let tokenizer = Some(&model.tokenizer);
    generate::complete(&model.decoder, tokenizer, None, &[request], options).unwrap().remove(0)
}

/// The model's own distribution of the next token, by libtorch's softmax.
fn next_token(model: &Model, ids: &[i64], temperature: f64) -> Vec<f64> {
    let _guard = tch::no_grad_guard();
    let batch = Batch::from_sequences(&[ids]);
    let logits = model.decoder.logits(&model.decoder.forward(&batch, None).unwrap()).unwrap();
    let last = logits.get(-1).to_kind(Kind::Double) / temperature;
    Vec::try_from(last.softmax(-1, Kind::Double)).unwrap()
}

fn counts(completions: &[Completion], vocabulary: usize) -> Vec<f64> {
    let mut out = vec![0.0; vocabulary];
    for completion in completions {
        out[completion.token_ids[0] as usize] += 1.0;
    }
    out
}

/// Pearson's statistic over the tokens expected at least five times, the rest as one class.
fn chi_square(counts: &[f64], probabilities: &[f64], n: f64) -> (f64, usize) {
    let (mut statistic, mut classes, mut rest) = (0.0, 0, (0.0, 0.0));
    for (count, probability) in counts.iter().zip(probabilities) {
        let expected = n * probability;
        if expected >= 5.0 {
            statistic += (count - expected).powi(2) / expected;
            classes += 1;
        } else {
            rest = (rest.0 + count, rest.1 + expected);
        }
    }
    if rest.1 > 0.0 {
        statistic += (rest.0 - rest.1).powi(2) / rest.1;
        classes += 1;
    }
    (statistic, classes)
}

/// Prompts in flight share the slots of their common beginning, also when the one that brought them is gone.
#[test]
fn prompts_with_a_common_beginning_have_the_completions_they_have_alone() {
    let model = model();
    let vocabulary = model.config.vocab_size as i64;
    let request = |i: i64| Request {
        // 40, 43, … tokens, of which the first 16, 17, … are the first prompt's.
        prompt_ids: (0..40 + 3 * i)
            .map(|k| 5 + (k * 7 + if k < 16 + i { 0 } else { i }) % (vocabulary - 5))
            .collect(),
        streams: vec![Stream { seed: 5, prompt: i as u64, sample: 0 }],
        max_new_tokens: 3 + 2 * i as usize,
        ..request(1, 1)
    };
    let requests: Vec<Request> = (0..8).map(request).collect();
    let mut options = Options::new(Sampling::at(1.0), Vec::new());
    let run = |requests: &[Request], options: &Options| {
        generate::complete(&model.decoder, None, None, requests, options).unwrap()
    };
    let alone: Vec<_> =
        requests.iter().flat_map(|one| run(std::slice::from_ref(one), &options)).collect();
    for max_rows in [64, 3, 2] {
        options.max_rows = max_rows;
        assert_eq!(run(&requests, &options), alone, "{max_rows} in flight");
    }
}

#[test]
fn draws_follow_the_softmax() {
    let model = model();
    let n = 4000;
    for temperature in [0.7, 1.3] {
        let request = request(n, 1);
        let mut options = Options::new(Sampling::at(temperature), Vec::new());
        options.max_rows = n as usize;
        let probabilities = next_token(&model, &request.prompt_ids, temperature);
        let completions = sample(&model, request, &options);
        let counts = counts(&completions, probabilities.len());
        let (statistic, classes) = chi_square(&counts, &probabilities, n as f64);
        // Mean = degrees of freedom, variance twice that: six standard deviations above is never chance.
        let freedom = (classes - 1) as f64;
        assert!(classes > 2, "{classes}");
        assert!(statistic < freedom + 6.0 * (2.0 * freedom).sqrt(), "{statistic} of {freedom}");
        for completion in &completions {
            let expected = probabilities[completion.token_ids[0] as usize].ln();
            assert!((f64::from(completion.logprobs[0]) - expected).abs() < 1e-4);
        }
    }
}

#[test]
fn top_k_and_top_p_draw_from_the_most_probable_alone() {
    let model = model();
    let n = 500;
    let probabilities = next_token(&model, &request(1, 1).prompt_ids, 1.0);
    let mut order: Vec<usize> = (0..probabilities.len()).collect();
    order.sort_by(|a, b| probabilities[*b].total_cmp(&probabilities[*a]));
    let draw = |top_k: usize, top_p: f64| {
        let sampling = Sampling { temperature: 1.0, top_k, top_p };
        let mut options = Options::new(sampling, Vec::new());
        options.max_rows = n as usize;
        let counts = counts(&sample(&model, request(n, 1), &options), probabilities.len());
        let drawn: Vec<usize> = (0..counts.len()).filter(|token| counts[*token] > 0.0).collect();
        (drawn, counts)
    };
    let allowed = &order[..3];
    let (drawn, counts) = draw(3, 1.0);
    assert!(drawn.iter().all(|token| allowed.contains(token)), "{drawn:?} {allowed:?}");
    assert_eq!(drawn.len(), 3, "500 draws meet all three");
    let kept: f64 = allowed.iter().map(|token| probabilities[*token]).sum();
    let renormalised: Vec<f64> = probabilities
        .iter()
        .enumerate()
        .map(|(token, p)| if allowed.contains(&token) { p / kept } else { 0.0 })
        .collect();
    let (statistic, _) = chi_square(&counts, &renormalised, n as f64);
    assert!(statistic < 2.0 + 6.0 * 2.0, "{statistic}");

    // The smallest set whose mass reaches p.
    let p = probabilities[order[0]] + probabilities[order[1]] + 1e-3;
    assert!(probabilities[order[2]] > 2e-3);
    let (drawn, _) = draw(0, p);
    assert!(drawn.iter().all(|token| order[..3].contains(token)), "{drawn:?}");
    assert!(drawn.contains(&order[2]));
    assert_eq!(draw(1, 1.0).0, vec![order[0]]);
    assert_eq!(draw(0, 1e-6).0, vec![order[0]]);
}

#[test]
fn sequences_end_at_stop_tokens_stop_texts_or_the_limit() {
    let model = model();
    let free = Options::new(Sampling::GREEDY, Vec::new());
    let whole = sample(&model, request(1, 12), &free).remove(0);
    assert_eq!((whole.token_ids.len(), whole.finish_reason), (12, FinishReason::Length));

    let stop = whole.token_ids[7];
    let at = whole.token_ids.iter().position(|id| *id == stop).unwrap();
    let stopped = sample(&model, request(1, 12), &Options { stop_ids: vec![stop], ..free.clone() });
    assert_eq!(stopped[0].token_ids, whole.token_ids[..=at]);
    assert_eq!(stopped[0].finish_reason, FinishReason::Stop);

    // A text that spans tokens ends the completion with the token that completes it.
    let text = model.tokenizer.decode(&whole.token_ids).unwrap();
    let characters: Vec<char> = text.chars().collect();
    let wanted: String =
        characters[characters.len() / 2..characters.len() / 2 + 3].iter().collect();
    let n = (1..=12)
        .find(|n| model.tokenizer.decode(&whole.token_ids[..*n]).unwrap().contains(&wanted))
        .unwrap();
    let stop_strings = vec!["never there at all".to_owned(), wanted];
    let stopped = sample(&model, request(1, 12), &Options { stop_strings, ..free.clone() });
    assert_eq!(stopped[0].token_ids, whole.token_ids[..n]);
    assert_eq!(stopped[0].finish_reason, FinishReason::Stop);
    let without = Options { stop_strings: vec!["a".to_owned()], ..free.clone() };
    let refused = generate::complete(&model.decoder, None, None, &[request(1, 2)], &without);
    assert!(refused.unwrap_err().to_string().contains("tokenizer"));
}

#[test]
fn streamed_tokens_are_those_of_the_batch() {
    let model = model();
    let options = Options::new(Sampling::at(0.9), model.stop_ids().unwrap());
    let expected = sample(&model, request(1, 10), &options).remove(0);
    let mut seen = Vec::new();
    let mut sampled = |token| {
        seen.push(token);
        Ok(())
    };
    let one = request(1, 10);
    let found = generate::stream::<arete_model::Error>(
        &model.decoder,
        None,
        None,
        &one,
        &options,
        &mut sampled,
    )
    .unwrap();
    assert_eq!((&found, &found.token_ids), (&expected, &seen));
    let two = request(2, 10);
    let refused = generate::stream::<arete_model::Error>(
        &model.decoder,
        None,
        None,
        &two,
        &options,
        &mut |_| Ok(()),
    );
    assert!(refused.unwrap_err().to_string().contains("one stream"));
    // A callback's error ends the run at once.
    let mut n = 0;
    let mut stop = |_| {
        n += 1;
        if n == 2 { Err(std::io::Error::other("enough").into()) } else { Ok(()) }
    };
    let refused = generate::stream::<arete_model::Error>(
        &model.decoder,
        None,
        None,
        &one,
        &options,
        &mut stop,
    );
    assert!(refused.unwrap_err().to_string().contains("enough"));
    assert_eq!(n, 2);
}

/// Rows wait for slots and enter as others leave; each still gets its own stream's tokens.
#[test]
fn rows_leave_and_enter() {
    let model = model();
    let requests: Vec<Request> = (0..9)
        .map(|prompt| Request {
            streams: vec![Stream { seed: 1, prompt, sample: 0 }],
            tails: Vec::new(),
            max_new_tokens: 1 + prompt as usize % 4 * 5,
            ..request(1, 1)
        })
        .collect();
    let mut options = Options::new(Sampling::at(1.0), Vec::new());
    let mut by_rows = Vec::new();
    for max_rows in [1, 2, 4, 64] {
        options.max_rows = max_rows;
        let found = generate::complete(&model.decoder, None, None, &requests, &options).unwrap();
        by_rows.push(found);
    }
    assert!(by_rows.windows(2).all(|pair| pair[0] == pair[1]));
    for (request, found) in requests.iter().zip(&by_rows[0]) {
        assert_eq!(found[0].token_ids.len(), request.max_new_tokens);
    }
}

/// What streams are given after a shared prompt is as if it stood in prompts of their own.
#[test]
fn tails_follow_the_prompt() {
    let model = model();
    let options = Options { max_rows: 3, ..Options::new(Sampling::at(0.9), Vec::new()) };
    let tails = [vec![], vec![44], vec![45, 46, 47]];
    let joined = Request { tails: tails.to_vec(), ..request(3, 6) };
    let found = sample(&model, joined.clone(), &options);
    for (stream, tail) in tails.iter().enumerate() {
        let prompt_ids = [&joined.prompt_ids[..], tail].concat();
        let streams = vec![joined.streams[stream]];
        let own = Request { prompt_ids, streams, ..request(1, 6) };
        assert_eq!(sample(&model, own, &options), [found[stream].clone()]);
    }
    let refused = |tails: Vec<Vec<i64>>| {
        let request = Request { tails, ..joined.clone() };
        let found = generate::complete(&model.decoder, None, None, &[request], &options);
        found.unwrap_err().to_string()
    };
    assert!(refused(vec![vec![1]]).contains("one for each of 3 streams, got 1 tails"));
    assert!(refused(vec![vec![1], vec![1_000_000], vec![1]]).contains("1000000"));
    assert!(refused(vec![vec![1], vec![1; 100_000], vec![1]]).contains("100"));
}

/// A tokenizer with tokens added after training knows more than the model has embeddings for.
#[test]
fn tokens_outside_the_vocabulary_are_named() {
    let model = model();
    let size = model.config.vocab_size as i64;
    let options = Options::new(Sampling::GREEDY, Vec::new());
    for id in [size, -1] {
        let words = format!("vocabulary of {size}, got {id}");
        let refused = model.decoder.forward(&Batch::from_sequences(&[[1, id]]), None);
        let text = refused.unwrap_err().to_string();
        assert!(text.contains(&words), "{text}");
        let asked = Request { prompt_ids: vec![1, id], ..request(1, 2) };
        let refused = generate::complete(&model.decoder, None, None, &[asked], &options);
        assert!(refused.unwrap_err().to_string().contains(&words));
        let two_turns = Request { turns: 2, extra_tokens: 1, ..request(1, 2) };
        let refused = generate::run(
            &model.decoder,
            None,
            None,
            &[two_turns],
            &options,
            &mut |_| Ok(vec![id]),
            &mut |_| Ok(()),
        );
        assert!(refused.unwrap_err().to_string().contains(&words));
    }
}

/// Special tokens have no text in a completion's `decode`; as stop texts they go by their names.
#[test]
fn stop_texts_may_be_special_tokens() {
    let model = model();
    let mut seen = 0;
    for (name, id) in model.tokenizer.special_tokens() {
        // The first draw of a stream decides, so streams are tried until one draws the token.
        let mut asked = request(400, 3);
        asked.prompt_ids = vec![1, 40, 41];
        let mut options = Options::new(Sampling::at(4.0), Vec::new());
        options.max_rows = 400;
        let free = sample(&model, asked.clone(), &options);
        options.stop_strings = vec![name];
        for (free, stopped) in free.iter().zip(sample(&model, asked, &options)) {
            let Some(at) = free.token_ids[..2].iter().position(|token| *token == id) else {
                continue;
            };
            seen += 1;
            assert_eq!(stopped.token_ids, free.token_ids[..=at]);
            assert_eq!(stopped.finish_reason, FinishReason::Stop);
        }
    }
    assert!(seen > 0, "no stream drew a special token");
}

#[test]
fn requests_for_nothing_are_refused() {
    let model = model();
    let options = Options::new(Sampling::GREEDY, Vec::new());
    for asked in [
        request(0, 2),
        request(1, 0),
        Request { turns: 0, ..request(1, 2) },
        Request { prompt_ids: Vec::new(), ..request(1, 2) },
    ] {
        // Beside a request that can be answered: nothing may be sampled before the refusal.
        let requests = [request(1, 2), asked];
        let refused = generate::complete(&model.decoder, None, None, &requests, &options);
        let text = refused.unwrap_err().to_string();
        assert!(text.contains("request: expected at least one prompt token"), "{text}");
    }
}

#[test]
fn sizes_beyond_counting_are_lengths_beyond_the_model() {
    let model = model();
    let mut options = Options::new(Sampling::GREEDY, Vec::new());
    for (turns, max_new_tokens, extra_tokens) in
        [(1, usize::MAX, 0), (3, usize::MAX / 3 + 1, 0), (1 << 60, 1 << 10, 1), (1, 2, usize::MAX)]
    {
        let asked = Request { turns, extra_tokens, ..request(1, max_new_tokens) };
        let refused = generate::complete(&model.decoder, None, None, &[asked], &options);
        let text = refused.unwrap_err().to_string();
        assert!(text.contains("sequence length: expected at most"), "{text}");
    }
    options.max_rows = usize::MAX;
    assert_eq!(sample(&model, request(2, 2), &options).len(), 2);
}
