use std::path::Path;

use super::*;
use crate::text::template::tests::{golden as templates, published};
use crate::text::tokenizer::tests::{golden, mistral, small, small_vocabulary};

/// The tokenizer and template that go together, for every kind of template we promise.
fn pairs() -> Vec<(&'static str, Tokenizer, ChatTemplate)> {
    vec![
        ("smollm2", small(), published("smollm2")),
        ("chatml", small(), published("chatml")),
        ("mistral_2023", mistral(), published("mistral_2023")),
        ("mistral_2024", mistral(), published("mistral_2024")),
        ("llama2", mistral(), published("llama2")),
    ]
}

/// The tokenizer of Mistral's own `tokenizer.json` of December 2023: the same vocabulary, with a
/// normalizer that puts a space before every text, after special tokens too.
fn mistral_published() -> Tokenizer {
    let directory = tempfile::tempdir().unwrap();
    mistral().save(directory.path()).unwrap();
    let path = directory.path().join("tokenizer.json");
    let mut file: serde_json::Value =
        serde_json::from_slice(&fs_err::read(&path).unwrap()).unwrap();
    file["pre_tokenizer"] = serde_json::Value::Null;
    file["normalizer"] = serde_json::json!({ "type": "Sequence", "normalizers": [
        { "type": "Prepend", "prepend": "▁" },
        { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
    ] });
    fs_err::write(&path, file.to_string()).unwrap();
    Tokenizer::from_directory(directory.path()).unwrap()
}

fn turns(texts: &[&str]) -> Vec<Message> {
    let role = |i: usize, text: &&str| {
        if i.is_multiple_of(2) { Message::user(*text) } else { Message::assistant(*text) }
    };
    texts.iter().enumerate().map(|(i, text)| role(i, text)).collect()
}

/// The conversations that neither start with the assistant nor break the order of roles.
fn conversations() -> Vec<Vec<Message>> {
    let all: Vec<Vec<Message>> =
        serde_json::from_value(templates()["conversations"].clone()).unwrap();
    let orderly = |messages: &Vec<Message>| {
        let start = usize::from(messages[0].role == Role::System);
        messages[start..]
            .iter()
            .enumerate()
            .all(|(i, m)| m.role == if i % 2 == 0 { Role::User } else { Role::Assistant })
    };
    all.into_iter().filter(orderly).collect()
}

fn own_text(tokenizer: &Tokenizer, rendered: &Rendered) -> Vec<String> {
    let mut texts = Vec::new();
    let mut run: Vec<i64> = Vec::new();
    for (&id, &own) in rendered.token_ids.iter().zip(&rendered.own) {
        if own {
            run.push(id);
        } else if !run.is_empty() {
            texts.push(tokenizer.decode_with_special(&std::mem::take(&mut run)).unwrap());
        }
    }
    if !run.is_empty() {
        texts.push(tokenizer.decode_with_special(&run).unwrap());
    }
    texts
}

#[test]
fn own_tokens_are_content_and_end_of_turn() {
    let messages = turns(&["Hi <|im_end|> </s>", "One.", "And?", "Two [INST]."]);
    let expected = [
        // What follows end-of-turn, the line break of ChatML, is not the policy's.
        ("smollm2", ["One.<|im_end|>", "Two [INST].<|im_end|>"], vec![b'\n']),
        ("chatml", ["One.<|im_end|>", "Two [INST].<|im_end|>"], vec![b'\n']),
        ("mistral_2023", ["One.</s>", "Two [INST].</s>"], vec![]),
        ("mistral_2024", ["One.</s>", "Two [INST].</s>"], vec![]),
        ("llama2", ["One. </s>", "Two [INST]. </s>"], vec![]),
    ];
    for ((name, tokenizer, template), (_, own, after)) in pairs().into_iter().zip(expected) {
        let chat = Chat::new(&tokenizer, &template).unwrap();
        let rendered = chat.render(&messages).unwrap();
        assert_eq!(own_text(&tokenizer, &rendered), own, "{name}");
        assert_eq!(rendered.own.len(), rendered.token_ids.len());
        let last = rendered.own.iter().rposition(|&own| own).unwrap();
        assert_eq!(rendered.token_ids[last], chat.end_of_turn_id(), "{name}");
        let rest: Vec<u8> =
            rendered.token_ids[last + 1..].iter().map(|&id| u8::try_from(id).unwrap()).collect();
        assert_eq!(rest, after, "{name}");
        assert!(!rendered.system_prepended);
    }
}

#[test]
fn end_of_turn_tokens() {
    let ids: Vec<i64> = pairs()
        .iter()
        .map(|(_, tokenizer, template)| Chat::new(tokenizer, template).unwrap().end_of_turn_id())
        .collect();
    assert_eq!(ids, [262, 262, 2, 2, 2]);
}

#[test]
fn prompt_reply_and_next_turn_join_to_the_whole_conversation() {
    let mut n_checked = 0;
    let published_file = [
        ("mistral_2023", mistral_published(), published("mistral_2023")),
        ("mistral_2024", mistral_published(), published("mistral_2024")),
        ("llama2", mistral_published(), published("llama2")),
    ];
    for (name, tokenizer, template) in pairs().into_iter().chain(published_file) {
        let chat = Chat::new(&tokenizer, &template).unwrap();
        for messages in conversations() {
            // Replies that begin with white space are not canonical: a tokenizer may merge it
            // with the template's own. The first Mistral template puts nothing between `]` and
            // the reply, so there a bracket merges too.
            let canonical = |m: &Message| {
                m.role != Role::Assistant
                    || m.content == m.content.trim()
                        && !(name == "mistral_2023" && m.content.starts_with('{'))
            };
            if !messages.iter().all(canonical) {
                continue;
            }
            let whole = chat.render(&messages).unwrap();
            let first = usize::from(messages[0].role == Role::System) + 1;
            let mut ids = chat.render_prompt(&messages[..first]).unwrap();
            for turn in messages[first..].chunks(2) {
                assert!(whole.token_ids.starts_with(&ids), "{name} {messages:?}");
                // The reply as sampled: the whole rendering's own tokens from here on.
                let n_own = whole.own[ids.len()..].iter().take_while(|own| **own).count();
                let sampled = &whole.token_ids[ids.len()..ids.len() + n_own];
                assert_eq!(chat.reply_text(sampled).unwrap(), turn[0].content, "{name}");
                ids.extend_from_slice(sampled);
                if let Some(user) = turn.get(1) {
                    ids.extend(chat.next_turn(true, &user.content).unwrap());
                    n_checked += 1;
                }
            }
            let ends_with_user = messages.last().unwrap().role == Role::User;
            let whole_prompt = chat.render_prompt(&messages).unwrap();
            if ends_with_user {
                assert_eq!(ids, whole_prompt, "{name} {messages:?}");
            } else {
                assert_eq!(ids[..], whole.token_ids[..ids.len()], "{name} {messages:?}");
            }
        }
    }
    assert!(n_checked >= 30, "{n_checked}");
}

#[test]
fn a_cut_reply_is_closed_before_the_next_turn() {
    for (name, tokenizer, template) in pairs() {
        let chat = Chat::new(&tokenizer, &template).unwrap();
        let messages = turns(&["Tell me.", "It was the", "And?"]);
        let mut ids = chat.render_truncated(&messages[..2]).unwrap().token_ids;
        ids.extend(chat.next_turn(false, "And?").unwrap());
        assert_eq!(ids, chat.render_prompt(&messages).unwrap(), "{name}");
    }
}

#[test]
fn truncated_rendering_ends_with_the_content() {
    for (name, tokenizer, template) in pairs() {
        let chat = Chat::new(&tokenizer, &template).unwrap();
        let messages = turns(&["Q", "First.", "And?", "Cut off in the"]);
        let whole = chat.render(&messages).unwrap();
        let cut = chat.render_truncated(&messages).unwrap();
        assert!(whole.token_ids.starts_with(&cut.token_ids), "{name}");
        assert!(cut.own.ends_with(&[true]), "{name}");
        let own = own_text(&tokenizer, &cut);
        assert_eq!(own[1].trim(), "Cut off in the", "{name}");
        assert!(own[0].ends_with(&tokenizer.token(chat.end_of_turn_id()).unwrap()), "{name}");
        let open = chat.render_truncated(&messages[..3]).unwrap_err().to_string();
        assert!(open.contains("ends with user"), "{open}");
    }
}

#[test]
fn conversations_have_the_ids_that_mistral_defines() {
    let golden = golden("tokenizer_mistral.json.gz");
    let (tokenizer, template) = (mistral(), published("mistral_2024"));
    let chat = Chat::new(&tokenizer, &template).unwrap();
    for case in golden["chat"].as_array().unwrap() {
        let texts: Vec<&str> =
            case["turns"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
        let ids: Vec<i64> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(chat.render_prompt(&turns(&texts)).unwrap(), ids, "{texts:?}");
    }
    // The first published template gives the same for a single turn, with the tokenizer file of
    // its time.
    let (tokenizer, template) = (mistral_published(), published("mistral_2023"));
    let chat = Chat::new(&tokenizer, &template).unwrap();
    let question = turns(&["What is your favourite condiment?"]);
    let ids: Vec<i64> = serde_json::from_value(golden["chat"][0]["ids"].clone()).unwrap();
    assert_eq!(chat.render_prompt(&question).unwrap(), ids);
}

#[test]
fn refused_system_text_is_prepended_and_recorded() {
    let (tokenizer, template) = (mistral(), published("mistral_2023"));
    let chat = Chat::new(&tokenizer, &template).unwrap();
    let with_system = [Message::system("Be kind."), Message::user("Hi"), Message::assistant("Yo")];
    let without = [Message::user("Be kind.\n\nHi"), Message::assistant("Yo")];
    let rendered = chat.render(&with_system).unwrap();
    assert!(rendered.system_prepended && chat.prepends_system(&with_system));
    let same = chat.render(&without).unwrap();
    assert!(!same.system_prepended && !chat.prepends_system(&without));
    assert_eq!((rendered.token_ids, rendered.own), (same.token_ids, same.own));
}

#[test]
fn templates_without_a_learnable_end_are_refused() {
    let tokenizer = small();
    let refused = |source: &str| {
        let template = ChatTemplate::new(Path::new("t"), source, Vec::new()).unwrap();
        Chat::new(&tokenizer, &template).map(|_| ()).unwrap_err().to_string()
    };
    let plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}";
    assert!(refused(plain).contains("no special token"));
    assert!(refused("{{ messages[0].content }}<|im_end|>").contains("leaves out"));
}

#[test]
fn templates_that_rewrite_earlier_turns_are_refused() {
    let tokenizer = small();
    let source =
        "{{ messages|length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}";
    let template = ChatTemplate::new(Path::new("t"), source, Vec::new()).unwrap();
    let chat = Chat::new(&tokenizer, &template).unwrap();
    let error = chat.render(&turns(&["a", "b", "c", "d"])).unwrap_err().to_string();
    assert!(error.contains("rewrites earlier turns"), "{error}");
}

#[test]
fn a_token_across_the_boundary_is_not_own() {
    // Of two line breaks that begin a reply, the first merges with the template's.
    let (tokenizer, template) = (small(), published("chatml"));
    let chat = Chat::new(&tokenizer, &template).unwrap();
    let rendered = chat.render(&turns(&["Q", "\n\nA"])).unwrap();
    assert_eq!(own_text(&tokenizer, &rendered), ["\nA<|im_end|>"]);
    let merged = rendered.token_ids.iter().position(|&id| id == 259).unwrap();
    assert!(!rendered.own[merged] && rendered.own[merged + 1]);
}

/// Special tokens are cut out longest first, so one may hold the end of turn and what follows it.
#[test]
fn a_special_token_across_the_end_of_a_turn_is_refused() {
    let mut vocabulary = small_vocabulary();
    vocabulary.tokens.push("<|im_end|>\n<|im_start|>".to_owned());
    vocabulary.token_types.push(3);
    let tokenizer = Tokenizer::from_gguf(Path::new("x"), vocabulary).unwrap();
    let template = published("chatml");
    let chat = Chat::new(&tokenizer, &template).unwrap();
    let error = chat.next_turn(true, "Why?").unwrap_err().to_string();
    assert!(error.contains("a longer special token"), "{error}");
}

#[test]
fn bos_is_not_added_twice() {
    let mut vocabulary = small_vocabulary();
    vocabulary.add_bos = Some(true);
    let tokenizer = Tokenizer::from_gguf(Path::new("x"), vocabulary).unwrap();
    let template = published("chatml");
    let chat = Chat::new(&tokenizer, &template).unwrap();
    let ids = chat.render_prompt(&turns(&["Q"])).unwrap();
    assert_eq!(ids[..2], [261, i64::from(b'u')]);
}

proptest::proptest! {
    #[test]
    fn any_canonical_chain_joins(
        question in "[A-Za-z0-9 ,.!?\n<|>é]{0,30}",
        replies in proptest::array::uniform3("[A-Za-z][A-Za-z0-9 ,.\n]{0,20}[a-z.]"),
    ) {
        let (tokenizer, template) = (small(), published("smollm2"));
        let chat = Chat::new(&tokenizer, &template).unwrap();
        const FOLLOW_UPS: [Option<&str>; 3] = [None, Some("Why?"), Some("What for, in the end?")];
        let mut messages = vec![Message::user(question)];
        for (follow_up, reply) in FOLLOW_UPS.into_iter().zip(&replies) {
            messages.extend(follow_up.map(Message::user));
            messages.push(Message::assistant(reply));
        }
        let whole = chat.render(&messages).unwrap();
        let mut ids = chat.render_prompt(&messages[..1]).unwrap();
        for (follow_up, reply) in FOLLOW_UPS.into_iter().zip(&replies) {
            if let Some(question) = follow_up {
                ids.extend(chat.next_turn(true, question).unwrap());
            }
            ids.extend(tokenizer.encode(reply, false).unwrap());
            ids.push(chat.end_of_turn_id());
        }
        ids.push(i64::from(b'\n'));
        proptest::prop_assert_eq!(ids, whole.token_ids);
    }
}
