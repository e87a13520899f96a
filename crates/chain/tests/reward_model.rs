//! The one reader of reward models: what PPO, scoring and the reward stage each had of their own.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

use std::path::{Path, PathBuf};

use arete_chain::reading::{self, Side};
use arete_chain::reward_model::{Base, MIN_STD, read_stats, standardise};
use arete_chain::{CutReply, Reading, RewardModel, Transcript, Turns, through};
use arete_model::adapter::{self, AdapterMeta, Task};
use arete_model::{
    Adapter, Batch, Device, FinishReason, Kind, LoadOptions, LoraConfig, Message, Model,
    ScalarHead, SegmentIdx, Source, Target, Tensor,
};
use arete_records::{ScoreStats, score_stats};

const STOP: FinishReason = FinishReason::Stop;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-chat")
}

fn tiny_chat() -> Model {
    let options = LoadOptions { device: Device::Cpu, dtype: Kind::Float, nf4: None };
    Model::load(&Source::Directory(fixture()), &options).unwrap()
}

fn parts(model: &Model) -> (Adapter, ScalarHead) {
    let lora = LoraConfig { rank: 4, alpha: 8.0, targets: Target::ALL.to_vec() };
    let adapter = Adapter::new("reward", &model.config, &lora, 3, Device::Cpu).unwrap();
    let _guard = arete_model::no_grad_guard();
    for (idx, (name, mut tensor)) in adapter.parameters().into_iter().enumerate() {
        if name.contains("lora_B") {
            let values = arete_model::random::normal(3, &format!("b{idx}"), tensor.numel(), 0.05);
            tensor.copy_(&Tensor::from_slice(&values).view_as(&tensor));
        }
    }
    (adapter, ScalarHead::normal(model.config.hidden_size, 3, Device::Cpu))
}

fn save(dir: &Path, model: &Model, head: bool) {
    let meta = AdapterMeta::of(model, "tiny-chat", Task::SequenceClassification);
    let (adapter, own) = parts(model);
    adapter::save(&dir.join("adapter"), &adapter, head.then_some(&own), &meta).unwrap();
    Reading::whole(model, CutReply::Trim).write(dir).unwrap();
}

fn chain(i: usize) -> Vec<Message> {
    let prompt = [Message::system("Be good."), Message::user("How do I help a friend?")];
    Turns::default().conversation(
        &prompt,
        &[format!("Ask {i} times.").as_str(), "I care.", "It makes me kind."],
    )
}

fn transcript(messages: &[Message], place: usize) -> Transcript<'_> {
    let messages = through(messages, 3, place).unwrap();
    Transcript { messages, finish_reasons: vec![STOP; place + 1] }
}

/// The reader of PPO shared a common beginning, that of scoring nothing, and neither the aspects of a chain.
#[test]
fn what_is_scored_together_changes_no_score() {
    let model = tiny_chat();
    let chat = model.chat().unwrap();
    let (adapter, head) = parts(&model);
    let reward = RewardModel::of(Some(adapter), head, Reading::whole(&model, CutReply::Trim));
    let chains: Vec<Vec<Message>> = (0..3).map(chain).collect();
    let transcripts: Vec<Transcript<'_>> =
        chains.iter().flat_map(|chain| [0, 1, 2].map(|place| transcript(chain, place))).collect();
    let score = |micro_batch_tokens| {
        let base = Base { model: &model, chat: &chat, micro_batch_tokens };
        reward.scores(base, &transcripts).unwrap()
    };
    let (together, n_tokens) = score(4096);
    // By hand: each sequence alone, its last row through the head.
    let (adapter, head) = parts(&model);
    let _guard = arete_model::no_grad_guard();
    let mut n_alone = 0;
    for (transcript, &score) in transcripts.iter().zip(&together) {
        let token_ids = chat.render(transcript.messages).unwrap().token_ids;
        n_alone += token_ids.len();
        let batch = Batch::from_sequences(&[&token_ids]);
        let hidden = model.decoder.forward(&batch, Some(&adapter)).unwrap();
        let row = batch.last_row(SegmentIdx(0)) as i64;
        let alone = head.forward(&hidden.narrow(0, row, 1)).double_value(&[0]);
        assert!((alone - score).abs() < 1e-6, "{alone} {score}");
    }
    assert_eq!(n_tokens, n_alone);
    for budget in [1, 150] {
        let (apart, n_apart) = score(budget);
        assert_eq!(n_apart, n_tokens);
        assert!(apart.iter().zip(&together).all(|(a, b)| (a - b).abs() < 1e-6));
    }
}

/// PPO would have failed, scoring lost the beginning, and the score statistics left such conversations out.
#[test]
fn beyond_the_models_positions_the_beginning_goes() {
    let model = tiny_chat();
    let chat = model.chat().unwrap();
    let (adapter, head) = parts(&model);
    let reward = RewardModel::of(Some(adapter), head, Reading::whole(&model, CutReply::Trim));
    let base = Base { model: &model, chat: &chat, micro_batch_tokens: 4096 };
    let long = [Message::user("word ".repeat(3000)), Message::assistant("Yes.")];
    let whole = chat.render(&long).unwrap().token_ids;
    let most = model.config.max_position_embeddings;
    assert!(whole.len() > most, "{}", whole.len());
    let read = Transcript { messages: &long, finish_reasons: vec![STOP] };
    assert_eq!(reward.token_ids(base, &read).unwrap(), whole[whole.len() - most..]);
    assert!(reward.scores(base, &[read]).unwrap().0[0].is_finite());
}

/// PPO checked base and head of a reward model and of its statistics, scoring and best-of only some of these.
#[test]
fn what_is_no_reward_model_of_this_base_is_refused() {
    let model = tiny_chat();
    let dir = tempfile::tempdir().unwrap();
    let refused = |dir: &Path| RewardModel::over(dir, "reward", &model).unwrap_err().to_string();
    save(dir.path(), &model, false);
    assert!(refused(dir.path()).contains("expected an adapter with a score head"));
    save(dir.path(), &model, true);
    RewardModel::over(dir.path(), "reward", &model).unwrap();
    RewardModel::over(&dir.path().join("adapter"), "reward", &model).unwrap();
    let meta = dir.path().join("adapter/arete_adapter.json");
    let text = fs_err::read_to_string(&meta).unwrap().replace(&model.base_sha256, &"0".repeat(64));
    fs_err::write(&meta, text).unwrap();
    assert!(refused(dir.path()).contains("adapter's base"), "{}", refused(dir.path()));
    let no_head = RewardModel::merged(&model, &fixture()).unwrap_err().to_string();
    assert!(no_head.contains("ForSequenceClassification"), "{no_head}");

    assert_eq!(read_stats(dir.path(), None).unwrap(), None);
    let stats = |std: f64| {
        let of = |base: &str| {
            let text = format!(
                r#"{{"mean": 1.0, "std": {std}, "n": 9, "split": "validation", "base_sha256": "{base}"}}"#
            );
            fs_err::write(dir.path().join(score_stats::FILE), text).unwrap();
            read_stats(dir.path(), Some(&model))
        };
        // As written before the sum was over weights and configuration only.
        let earlier = arete_records::hashes::sha256_path(fixture()).unwrap();
        assert_eq!(of(&earlier).is_ok(), std >= MIN_STD);
        (of(&model.base_sha256), of("c"))
    };
    let (good, other_base) = stats(2.0);
    let good: ScoreStats = good.unwrap().unwrap();
    assert_eq!(standardise(5.0, &good), 2.0);
    assert!(other_base.unwrap_err().to_string().contains("statistics of this base"));
    assert!(stats(MIN_STD / 2.0).0.is_err());
}

const LENGTH: FinishReason = FinishReason::Length;

/// The fault: trained on closed replies, reward models read those that the token limit cut without an end of turn, and
/// gave the same text another score.
#[test]
fn f1_identical_text_gets_one_score_whether_it_was_cut_or_ended() {
    let model = tiny_chat();
    let chat = model.chat().unwrap();
    let base = Base { model: &model, chat: &chat, micro_batch_tokens: 4096 };
    let of = |cut_reply| {
        let (adapter, head) = parts(&model);
        RewardModel::of(Some(adapter), head, Reading::whole(&model, cut_reply))
    };
    let whole = chain(4); // every reply ends with a full stop
    let replies = ["Ask 4 times. Then you", "I care. My", "It makes me kind. And"];
    let cut = Turns::default().conversation(&whole[..2], &replies);
    let score = |reward: &RewardModel, messages: &[Message], reasons: [FinishReason; 3]| {
        let read = |place: usize| Transcript {
            messages: through(messages, 3, place).unwrap(),
            finish_reasons: reasons[..=place].to_vec(),
        };
        reward.scores(base, &[0, 1, 2].map(read)).unwrap().0
    };
    let trim = of(CutReply::Trim);
    let ended = score(&trim, &whole, [STOP; 3]);
    assert_eq!(score(&trim, &whole, [LENGTH; 3]), ended);
    assert_eq!(score(&trim, &cut, [LENGTH; 3]), ended);
    // What ended by itself is not touched, full sentence or not; without a full sentence it is closed as it is.
    assert_ne!(score(&trim, &cut, [STOP; 3]), ended);
    let fragment = Turns::default().conversation(&whole[..2], &["no sentence", "none", "nor here"]);
    assert_eq!(score(&trim, &fragment, [LENGTH; 3]), score(&trim, &fragment, [STOP; 3]));
    let close = of(CutReply::Close);
    assert_eq!(score(&close, &cut, [LENGTH; 3]), score(&close, &cut, [STOP; 3]));
    // Only what was trained on open ends reads them open.
    let open = of(CutReply::Open);
    assert_ne!(score(&open, &whole, [LENGTH; 3]), score(&open, &whole, [STOP; 3]));
}

/// Trained on at most so many tokens, a reward model reads no more, and on the same side.
#[test]
fn no_more_is_read_than_was_trained_on() {
    let model = tiny_chat();
    let chat = model.chat().unwrap();
    let messages = chain(1);
    let whole = chat.render(&messages).unwrap().token_ids;
    let read = |max_length, cut_side| {
        let rule = Reading { max_length, cut_side, ..Reading::whole(&model, CutReply::Trim) };
        let transcript = Transcript { messages: &messages, finish_reasons: vec![STOP] };
        rule.token_ids(&chat, &transcript, 2048).unwrap()
    };
    assert_eq!(read(Some(10), Side::Right), whole[..10]);
    assert_eq!(read(Some(10), Side::Left), whole[whole.len() - 10..]);
    assert_eq!(read(None, Side::Right), whole);
}

#[test]
fn the_rule_is_found_where_the_model_lies_and_ours_without_one_is_refused() {
    let model = tiny_chat();
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    save(dir.path(), &model, true);
    let rule = Reading::whole(&model, CutReply::Trim);
    for place in [dir.path(), &at("adapter")] {
        assert_eq!(Reading::read(place).unwrap().as_ref(), Some(&rule));
    }
    // Another chat template than the one it was trained with.
    let other = Reading { template_sha256: "0".repeat(64), ..rule.clone() };
    other.write(dir.path()).unwrap();
    let error = RewardModel::over(dir.path(), "reward", &model).unwrap_err().to_string();
    assert!(error.contains("the chat template it was trained with"), "{error}");
    // One that this version does not know.
    fs_err::write(at(reading::FILE), r#"{"cut_reply": "guess"}"#).unwrap();
    let error = Reading::read(dir.path()).unwrap_err().to_string();
    assert!(error.contains("a reading rule that this version knows"), "{error}");

    fs_err::remove_file(at(reading::FILE)).unwrap();
    let old = RewardModel::over(dir.path(), "reward", &model).unwrap_err().to_string();
    assert!(old.contains("made by an older version") && old.contains("train it again"), "{old}");
    // Of another program: closed, whole.
    fs_err::remove_file(at("adapter/arete_adapter.json")).unwrap();
    assert_eq!(Reading::read(dir.path()).unwrap(), None);
    assert_eq!(Reading::of(dir.path(), &model).unwrap().cut_reply, CutReply::Close);
    RewardModel::over(dir.path(), "reward", &model).unwrap();
    // Merged models carry it in their configuration.
    let merged = at("elsewhere/merged");
    fs_err::create_dir_all(&merged).unwrap();
    let config = |text: String| fs_err::write(merged.join("config.json"), text).unwrap();
    config(format!(r#"{{"{}": {}}}"#, reading::KEY, serde_json::to_string(&rule).unwrap()));
    assert_eq!(Reading::read(&merged).unwrap(), Some(rule));
    config(r#"{"score_mean": 0.5, "score_std": 1.0}"#.to_owned());
    assert!(Reading::read(&merged).unwrap_err().to_string().contains("older version"));
    config(r#"{"architectures": ["LlamaForSequenceClassification"]}"#.to_owned());
    assert_eq!(Reading::read(&merged).unwrap(), None);
}

/// A reward model of another program, as transformers saves it, whose padding may be its end of turn.
fn foreign(dir: &Path, pad: i64, spoil: impl Fn(&str, Tensor) -> Tensor) -> Model {
    let model = tiny_chat();
    let (adapter, head) = parts(&model);
    let merged = dir.join("merged");
    let source = Source::Directory(fixture());
    let extra = serde_json::Map::from_iter([("pad_token_id".to_owned(), pad.into())]);
    arete_model::adapter::merge::merge(&source, &adapter, Some(&head), &merged, Kind::Float, extra)
        .unwrap();
    // Nothing after the end of turn.
    let template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}\
                    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    fs_err::write(merged.join("chat_template.jinja"), template).unwrap();
    let weights = merged.join("model.safetensors");
    let file = arete_model::checkpoint::safetensors::SafetensorsFile::open(&weights).unwrap();
    let tensors: Vec<(String, Tensor)> = file
        .names()
        .map(|name| (name.to_owned(), spoil(name, file.tensor(name).unwrap())))
        .collect();
    arete_model::checkpoint::safetensors::write_safetensors(&weights, &tensors).unwrap();
    let options = LoadOptions { device: Device::Cpu, dtype: Kind::Float, nf4: None };
    Model::load(&Source::Directory(merged), &options).unwrap()
}

/// transformers 5.24, `GenericForSequenceClassification.forward`: the last token that is not `config.pad_token_id`.
#[test]
fn a_foreign_reward_model_is_read_before_its_padding() {
    const END: i64 = 2;
    let dir = tempfile::tempdir().unwrap();
    let messages = chain(1);
    let transcript = transcript(&messages, 0);
    for (pad, dropped) in [(END, 1), (0, 0)] {
        let model = foreign(dir.path(), pad, |_, tensor| tensor);
        let chat = model.chat().unwrap();
        let base = Base { model: &model, chat: &chat, micro_batch_tokens: 1000 };
        let whole = chat.render(transcript.messages).unwrap().token_ids;
        assert_eq!(whole.last(), Some(&END));
        let reward = RewardModel::merged(&model, &dir.path().join("merged")).unwrap();
        let read = reward.token_ids(base, &transcript).unwrap();
        assert_eq!(read, whole[..whole.len() - dropped], "padding {pad}");
        let score = reward.scores(base, std::slice::from_ref(&transcript)).unwrap().0[0];
        let _guard = arete_model::no_grad_guard();
        let hidden = model.decoder.forward(&Batch::from_sequences(&[&whole]), None).unwrap();
        let last = (whole.len() - 1 - dropped) as i64;
        let expected = model.head.as_ref().unwrap().forward(&hidden).double_value(&[last]);
        assert!((score - expected).abs() < 1e-5, "{score} {expected}");
    }
}

#[test]
fn scores_that_overflow_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let large = |name: &str, tensor: Tensor| match name.contains("layers.0.self_attn.q_proj")
        || name.contains("layers.0.self_attn.k_proj")
    {
        true => tensor * 1e30,
        false => tensor,
    };
    let model = foreign(dir.path(), 0, large);
    let chat = model.chat().unwrap();
    let base = Base { model: &model, chat: &chat, micro_batch_tokens: 1000 };
    let reward = RewardModel::merged(&model, &dir.path().join("merged")).unwrap();
    let messages = chain(1);
    let error = reward.scores(base, &[transcript(&messages, 0)]).unwrap_err().to_string();
    assert!(error.contains("scores") && error.contains("not finite"), "{error}");
}
