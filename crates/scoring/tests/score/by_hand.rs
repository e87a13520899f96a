//! Perplexity against the sampled tokens, computed by hand.

use super::*;

#[test]
fn perplexity_is_that_of_the_sampled_tokens() {
    let run = Run::new(12);
    let inputs = run.inputs();
    let config = ScoreConfig { temperature: 1.0, ..config() };
    score(&config, &inputs).unwrap();
    let rows: Vec<CoherenceRow> = parquet::read(inputs.output.join("coherence.parquet")).unwrap();
    let prompts: Vec<PromptRow> = parquet::read(run.at("prompts/prompts.parquet")).unwrap();
    let model = Model::load(&Source::Directory(fixture()), &options()).unwrap();
    let policy =
        adapter::load(&run.at("ppo/adapter"), "policy", &model.config, Device::Cpu).unwrap();
    let mut n_other_tokens = 0;
    for (name, adapter) in [("original", None), ("final", Some(&policy.adapter))] {
        let (mut sum, mut n_tokens) = (0.0, 0);
        for prompt in prompts.iter().filter(|prompt| prompt.split == Split::Test) {
            let (sequence, prompt_ids) = sampled_again(&model, adapter, prompt);
            let own = by_hand(&model, &sequence, &prompt_ids);
            for (aspect, (logprobs, turn)) in
                Aspect::SHIPPED.into_iter().zip(own.iter().zip(&sequence.turns))
            {
                let key = (name, aspect, prompt.prompt_id.as_str());
                let row = rows
                    .iter()
                    .find(|row| (row.model.as_str(), row.aspect, row.prompt_id.as_str()) == key)
                    .unwrap();
                let expected: f64 = logprobs.iter().sum();
                assert_eq!(row.n_base_tokens as usize, turn.token_ids.len(), "{row:?}");
                assert!(
                    (f64::from(row.base_logprob) - expected).abs() < 2e-3,
                    "{row:?}, expected {expected}"
                );
                if adapter.is_none() {
                    // The base sampled these itself, at temperature 1: it finds them as likely as then.
                    let sampled: f32 = turn.logprobs.iter().sum();
                    assert!((row.base_logprob - sampled).abs() < 2e-3, "{row:?}, {sampled}");
                }
                sum += expected;
                n_tokens += logprobs.len();
                let text = model.tokenizer.decode_with_special(&turn.token_ids).unwrap();
                let again = model.tokenizer.encode(&text, false).unwrap();
                n_other_tokens += usize::from(again != turn.token_ids);
            }
        }
        let summary = arete_scoring::score::read_summary(&inputs.output).unwrap();
        let own = summary.models.iter().find(|own| own.name == name).unwrap();
        let perplexity = own.coherence.perplexity.unwrap();
        let expected = (-sum / n_tokens as f64).exp();
        assert!((perplexity / expected - 1.0).abs() < 1e-4, "{perplexity}, expected {expected}");
        assert!(!own.retokenised);
    }
    // The test would be an easier one if text in tokens anew were always the tokens that were sampled.
    assert!(n_other_tokens > 0);
}

/// The chain of a prompt, drawn as the stage draws it.
fn sampled_again(
    model: &Model,
    adapter: Option<&Adapter>,
    prompt: &PromptRow,
) -> (Sequence, Vec<i64>) {
    let chat = model.chat().unwrap();
    let turns = Turns::default();
    let questions = turns.questions();
    let prompt_ids = chat.render_prompt(&prompt.prompt).unwrap();
    let key = u64::from_str_radix(&prompt.prompt_id, 16).unwrap();
    let request = Request {
        prompt_ids: prompt_ids.clone(),
        streams: vec![Stream { seed: 0, prompt: key, sample: 0 }],
        tails: Vec::new(),
        max_new_tokens: config().max_new_tokens,
        turns: 3,
        extra_tokens: 200,
    };
    let mut next_turn = |end: TurnEnd<'_>| {
        let ended = end.completion.token_ids.last() == Some(&chat.end_of_turn_id());
        chat.next_turn(ended, questions[end.turn])
    };
    let mut out = None;
    let mut finished = |sequence: Sequence| {
        out = Some(sequence);
        Ok(())
    };
    let options = Options::new(Sampling::at(1.0), model.stop_ids().unwrap());
    generate::run(
        &model.decoder,
        None,
        adapter,
        &[request],
        &options,
        &mut next_turn,
        &mut finished,
    )
    .unwrap();
    (out.unwrap(), prompt_ids)
}

/// log P under the base of every sampled token, turn by turn: the softmax of the row before it, token by token.
fn by_hand(model: &Model, sequence: &Sequence, prompt_ids: &[i64]) -> Vec<Vec<f64>> {
    let _guard = tch::no_grad_guard();
    let token_ids = sequence.token_ids(prompt_ids);
    let hidden = model.decoder.forward(&Batch::from_sequences(&[&token_ids]), None).unwrap();
    let logits = model.decoder.logits(&hidden).unwrap().to_kind(Kind::Double);
    let mut at = prompt_ids.len();
    let mut out = Vec::new();
    for (turn, completion) in sequence.turns.iter().enumerate() {
        let mut own = Vec::new();
        for &token_id in &completion.token_ids {
            let row = Vec::<f64>::try_from(logits.get(at as i64 - 1)).unwrap();
            let total: f64 = row.iter().map(|logit| logit.exp()).sum();
            own.push(row[token_id as usize] - total.ln());
            at += 1;
        }
        at += sequence.appended.get(turn).map_or(0, Vec::len);
        out.push(own);
    }
    out
}
