//! Tests of requests and stop texts on the small chat model; what is drawn is tested in `tests/sampling.rs`.

use std::path::Path;

use tch::{Device, Kind};

use super::{Completion, Options, Request, Sampling, Stream};
use crate::{Batch, FinishReason, LoadOptions, Model, Source, generate};

fn model() -> Model {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-chat");
    let options = LoadOptions { device: Device::Cpu, dtype: Kind::Float, nf4: None };
    Model::load_unhashed(&Source::Directory(path), &options).unwrap()
}

fn request(samples: u64, max_new_tokens: usize) -> Request {
    Request {
        prompt_ids: vec![1, 40, 41, 42, 43],
        streams: (0..samples).map(|sample| Stream { seed: 5, prompt: 0, sample }).collect(),
        max_new_tokens,
        turns: 1,
        extra_tokens: 0,
    }
}

fn sample(model: &Model, request: Request, options: &Options) -> Vec<Completion> {
    let tokenizer = Some(&model.tokenizer);
    generate::complete(&model.decoder, tokenizer, None, &[request], options).unwrap().remove(0)
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
