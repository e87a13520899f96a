//! Reading demonstrations, and which of their tokens are imitated.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

use std::path::{Path, PathBuf};

use arete_model::{Device, Kind, LoadOptions, Model, Source};
use arete_records::rows::DemonstrationRow;
use arete_records::{Message, Split, parquet};
use arete_sft::config::OverLength;
use arete_sft::data::{self, Demonstration, Example};

fn model(path: &str) -> Model {
    let source = Source::Directory(Path::new(env!("CARGO_MANIFEST_DIR")).join(path));
    let options = LoadOptions { device: Device::Cpu, dtype: Kind::Float, nf4: None };
    Model::load(&source, &options).unwrap()
}

fn one(model: &Model, messages: &[Message], n_context: usize) -> Example {
    let row = Demonstration { row: 1, split: Split::Train, messages: messages.to_vec(), n_context };
    let chat = model.chat().unwrap();
    let over_length = OverLength::Drop;
    let mut examples =
        data::tokenize(Path::new("x"), &[row], Split::Train, &chat, 500, over_length).unwrap();
    examples.examples.remove(0)
}

/// The text of the tokens to imitate, others as `_`.
fn imitated(model: &Model, example: &Example) -> String {
    let mut text = String::new();
    for (&id, &target) in example.token_ids.iter().zip(&example.target) {
        let piece = model.tokenizer.decode(&[id]).unwrap();
        // Special tokens decode to nothing; the end of turn shows as ⏹.
        text += match (target, piece.is_empty()) {
            (true, true) => "⏹",
            (true, false) => &piece,
            (false, _) => "_",
        };
    }
    text
}

#[test]
fn chatml_imitates_replies_with_their_end() {
    let model = model("../../tests/fixtures/tiny-chat");
    let turns = [
        Message::user("Any tips?"),
        Message::assistant("Plan it."),
        Message::user("ok"),
        Message::assistant("Wait."),
    ];
    let text = imitated(&model, &one(&model, &turns, 0));
    let spoken: Vec<&str> = text.split('_').filter(|part| !part.is_empty()).collect();
    assert_eq!(spoken, ["Plan it.⏹", "Wait.⏹"]);
    assert!(text.ends_with('_'), "the line break after the end of turn is not the model's: {text}");
    // The first reply as context.
    let text = imitated(&model, &one(&model, &turns, 3));
    let spoken: Vec<&str> = text.split('_').filter(|part| !part.is_empty()).collect();
    assert_eq!(spoken, ["Wait.⏹"]);
}

#[test]
fn the_inst_template_imitates_replies_with_their_end() {
    let model = model("../model/tests/goldens/gradients/base");
    let turns = [
        Message::user("Hi"),
        Message::assistant("Yes"),
        Message::user("x"),
        Message::assistant("No"),
    ];
    let text = imitated(&model, &one(&model, &turns, 0));
    // <s> [INST] Hi [/INST] | Yes</s> | [INST] x [/INST] | No</s>: one character, one token.
    assert_eq!(text, format!("{} Yes⏹{} No⏹", "_".repeat(18), "_".repeat(16)));
}

#[test]
fn cutting_is_counted() {
    let model = model("../../tests/fixtures/tiny-chat");
    let chat = model.chat().unwrap();
    let row = |text: &str| Demonstration {
        row: 1,
        split: Split::Train,
        messages: vec![Message::user("Any tips?"), Message::assistant(text)],
        n_context: 0,
    };
    let rows = [row("Plan it."), row("Plan it, then listen, and plan it again, and then listen.")];
    let short = one(&model, &rows[0].messages, 0).token_ids.len();
    let cut = |max_length: usize, over_length: OverLength| {
        data::tokenize(Path::new("x"), &rows, Split::Train, &chat, max_length, over_length).unwrap()
    };
    let kept = cut(short, OverLength::TruncateRight);
    assert_eq!((kept.examples.len(), kept.n_truncated, kept.n_empty), (2, 1, 0));
    assert_eq!(kept.examples[1].token_ids.len(), short);
    let dropped = cut(short, OverLength::Drop);
    assert_eq!((dropped.examples.len(), dropped.n_dropped), (1, 1));
    // Nothing of the replies is left: no example at all.
    let nothing = cut(8, OverLength::TruncateRight);
    assert_eq!((nothing.examples.len(), nothing.n_empty), (0, 2));
    assert_eq!(cut(500, OverLength::Drop).examples.len(), 2);
}

fn read_text(text: &str) -> Result<Vec<Demonstration>, String> {
    let dir = tempfile::tempdir().unwrap();
    let path: PathBuf = dir.path().join("rows.jsonl");
    fs_err::write(&path, text).unwrap();
    data::read(&path, &[]).map(|(rows, _)| rows).map_err(|error| {
        let text = error.to_string();
        text.split_once("rows.jsonl").map_or(text.clone(), |(_, rest)| rest.to_owned())
    })
}

#[test]
fn every_form_of_demonstration_is_read() {
    let rows = read_text(concat!(
        r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "split": "validation"}"#,
        "\n",
        r#"{"prompt": "a", "completion": "b"}"#,
        "\n",
        r#"{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}"#,
        "\n",
    ))
    .unwrap();
    let messages = [Message::user("a"), Message::assistant("b")];
    assert!(rows.iter().all(|row| row.messages == messages));
    assert_eq!(rows[0].split, Split::Validation);
    assert_eq!((rows[0].n_context, rows[1].n_context, rows[2].n_context), (0, 1, 1));
    assert_eq!(rows[1].split, arete_records::split_of(&messages));

    let dir = tempfile::tempdir().unwrap();
    let row = DemonstrationRow {
        prompt_id: "0".to_owned(),
        split: Split::Train,
        source: "own".to_owned(),
        initial: String::new(),
        rounds: Vec::new(),
        messages: messages.to_vec(),
    };
    parquet::write(dir.path().join("demonstrations.parquet"), &[row]).unwrap();
    let rows = data::read(dir.path(), &[]).unwrap().0;
    assert_eq!(rows[0].messages, messages);
}

/// The layout of Dahoas/full-hh-rlhf, as prompt and completion.
/// Magpie has the conversation beside its two parts.
#[test]
fn a_conversation_that_ends_with_the_reply_is_whole() {
    let magpie = r#"{"instruction": "q", "response": "a", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}"#;
    let rows = read_text(magpie).unwrap();
    assert_eq!(rows[0].messages, [Message::user("q"), Message::assistant("a")]);
    let quoted = "Here:\n\nHuman: Hi\n\nAssistant: Hello";
    let text = serde_json::json!({"prompt": "Write a dialogue.", "completion": quoted, "split": "train_sft"});
    let rows = read_text(&text.to_string()).unwrap();
    assert_eq!(rows[0].messages, [Message::user("Write a dialogue."), Message::assistant(quoted)]);
    assert_eq!(rows[0].split, Split::Train);
}

#[test]
fn a_completion_that_repeats_its_prompt_is_the_whole_conversation() {
    let asked = r#"[{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]"#;
    let completions = [r#""\n\nHuman: c\n\nAssistant: d""#, asked, r#"" d""#];
    for prompt in
        [r#""c""#, r#""\n\nHuman: c\n\nAssistant:""#, r#"[{"role": "user", "content": "c"}]"#]
    {
        for completion in completions {
            let line = format!(r#"{{"prompt": {prompt}, "completion": {completion}}}"#);
            let row = &read_text(&line).unwrap()[0];
            let read: Vec<(&str, &str)> =
                row.messages.iter().map(|m| (m.role.name(), m.content.as_str())).collect();
            assert_eq!(read, [("user", "c"), ("assistant", "d")], "{line}");
            assert_eq!(row.n_context, 1, "{line}");
        }
    }
}

#[test]
fn a_prompt_in_the_form_of_hh_rlhf_is_a_conversation() {
    let line = r#"{"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "completion": " d"}"#;
    let row = &read_text(line).unwrap()[0];
    let turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")];
    let read: Vec<(&str, &str)> =
        row.messages.iter().map(|m| (m.role.name(), m.content.as_str())).collect();
    assert_eq!(read, turns);
    assert_eq!(row.n_context, 3);
}

#[test]
fn alpaca_and_sharegpt_are_read() {
    let alpaca = r#"{"instruction": "Translate.", "input": "Hund", "output": "dog"}"#;
    let row = &read_text(alpaca).unwrap()[0];
    assert_eq!(row.messages, [Message::user("Translate.\nHund"), Message::assistant("dog")]);
    assert_eq!(row.n_context, 1);
    let sharegpt =
        r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}"#;
    let row = &read_text(sharegpt).unwrap()[0];
    assert_eq!(row.messages, [Message::user("a"), Message::assistant("b")]);
    assert_eq!(row.n_context, 0);
}

#[test]
fn a_bad_row_among_many_is_left_out_and_no_split_is_empty() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    let mut lines: Vec<String> =
        (0..21).map(|i| format!("{{\"prompt\": \"{i}\", \"completion\": \"b\"}}")).collect();
    lines[4] = "{\"prompt\": \"x\"}".to_owned();
    fs_err::write(&path, lines.join("\n")).unwrap();
    let (rows, left_out) = data::read(&path, &[]).unwrap();
    assert_eq!((rows.len(), left_out.len()), (20, 1));
    assert_eq!(left_out[0].item, "rows.jsonl:5");
    for split in [Split::Train, Split::Validation, Split::Test] {
        assert!(rows.iter().any(|row| row.split == split), "{split:?}");
    }
}

#[test]
fn bad_rows_are_named() {
    let refused = |text: &str| read_text(text).unwrap_err();
    assert!(
        refused(r#"{"text": "a"}"#).starts_with(": row 1: prompt: expected a column `messages`")
    );
    assert!(refused(r#"{"prompt": "a"}"#).contains("row 1: completion: expected"));
    let no_reply = r#"{"messages": [{"role": "user", "content": "a"}]}"#;
    assert!(refused(no_reply).contains("expected a conversation with an assistant's turn"));
    let role = r#"{"messages": [{"role": "robot", "content": "a"}]}"#;
    assert!(refused(role).contains("a role is system, user or assistant"));
    let thought = r#"{"messages": [{"role": "user", "content": "a", "tool_calls": null},
        {"role": "assistant", "content": "b", "reasoning_content": "thought"}]}"#;
    assert!(refused(&thought.replace('\n', "")).contains("`reasoning_content` would be lost"));
    let split = r#"{"prompt": "a", "completion": "b", "split": "mine"}"#;
    assert!(refused(split).contains("split: expected train, validation or test"));
    assert!(refused("[1]").contains("expected an object"));
}

#[test]
fn a_conversation_that_the_template_refuses_is_left_out_and_named() {
    // The tiny model with a template that refuses a word.
    let dir = tempfile::tempdir().unwrap();
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-chat");
    for entry in fs_err::read_dir(&own).unwrap() {
        let entry = entry.unwrap();
        fs_err::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let path = dir.path().join("chat_template.jinja");
    let template = fs_err::read_to_string(&path).unwrap();
    let refusal = "{% for message in messages %}{% if 'unheard' in message['content'] %}\
                   {{ raise_exception('unheard of') }}{% endif %}{% endfor %}";
    fs_err::write(&path, format!("{refusal}{template}")).unwrap();
    let options = LoadOptions { device: Device::Cpu, dtype: Kind::Float, nf4: None };
    let model = Model::load(&Source::Directory(dir.path().to_owned()), &options).unwrap();
    let chat = model.chat().unwrap();
    let rows = |n_bad: usize| -> Vec<Demonstration> {
        let row = |row| {
            let word = if row <= n_bad { "unheard" } else { "heard" };
            let messages = vec![Message::user(word), Message::assistant("Yes.")];
            Demonstration { row, split: Split::Train, messages, n_context: 0 }
        };
        (1..=40).map(row).collect()
    };
    let tokenize = |rows: &[Demonstration]| {
        let file = Path::new("mine.jsonl");
        data::tokenize(file, rows, Split::Train, &chat, 500, OverLength::Drop)
    };
    let found = tokenize(&rows(1)).unwrap();
    assert_eq!((found.examples.len(), found.left_out.len()), (39, 1));
    assert_eq!(found.left_out[0].item, "mine.jsonl:1");
    assert!(found.left_out[0].reason.contains("unheard of"), "{:?}", found.left_out);
    // A tenth of forty is four.
    assert_eq!(tokenize(&rows(4)).unwrap().examples.len(), 36);
    assert!(tokenize(&rows(5)).unwrap_err().to_string().contains("mine.jsonl"));
}
