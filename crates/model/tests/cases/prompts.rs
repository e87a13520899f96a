//! Prompts: what Jinja2 renders, and no template that ends the process.

use std::path::Path;

use arete_model::{ChatTemplate, Error, Message};
use serde_json::Value;

use crate::common::*;

fn template(source: &str) -> ChatTemplate {
    let variables = [("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")];
    let variables = variables.map(|(name, token)| (name, token.to_owned())).to_vec();
    ChatTemplate::new(Path::new("test.jinja"), source, variables).unwrap()
}

/// Refused in words, where Jinja2 renders them: minijinja's language lacks them.
const REFUSED: [&str; 9] = [
    "{{ '%s and %d' % ('a', 3) }}",
    "{{ 'n: %s' % 5 }}",
    "varargs",
    "'%x %r'|format",
    "|random",
    ".encode(",
    "{% block",
    "10**20",
    "lipsum",
];

#[test]
fn fragments_are_rendered_as_jinja2_renders_them() {
    let golden: Value =
        serde_json::from_slice(&fs_err::read(golden("jinja.json")).unwrap()).unwrap();
    let messages: Vec<Message> = serde_json::from_value(golden["messages"].clone()).unwrap();
    let (mut n_equal, mut wrong) = (0, Vec::new());
    for case in golden["cases"].as_array().unwrap() {
        let source = case["source"].as_str().unwrap();
        let Some(text) = case["text"].as_str() else { continue };
        let compiled = ChatTemplate::new(
            Path::new("test.jinja"),
            source,
            vec![
                ("bos_token", "<s>".to_owned()),
                ("eos_token", "</s>".to_owned()),
                ("unk_token", "<unk>".to_owned()),
            ],
        );
        match compiled.and_then(|template| template.render(&messages, false)) {
            Ok(got) if got == text => n_equal += 1,
            Ok(got) => wrong.push(format!("{source:?}\n  expected {text:?}\n  found    {got:?}")),
            Err(_) if REFUSED.iter().any(|known| source.contains(known)) => {}
            Err(error) => {
                wrong.push(format!("{source:?}\n  expected {text:?}\n  refused: {error}"))
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {}\n{}", wrong.len(), wrong.len() + n_equal, wrong.join("\n"));
    assert!(n_equal >= 200, "{n_equal}");
}

#[test]
fn a_template_that_opens_a_thought_keeps_its_system_turn() {
    let source = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}\
                  {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}";
    let template = template(source);
    assert!(!template.refuses_system());
    let messages = [Message::system("Be kind."), Message::user("Hi")];
    let (fitted, prepended) = template.fit(&messages).unwrap();
    assert!(!prepended && *fitted == messages);
    // transformers 5.24, apply_chat_template.
    let expected = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n";
    assert_eq!(template.render(&fitted, true).unwrap(), expected);
    // One that moves the system text with the last turn still cannot take it.
    let moving = "{% for m in messages %}{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}\
                  {% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}";
    assert!(self::template(moving).refuses_system());
}

#[test]
fn line_ends_of_other_systems_are_line_ends() {
    let source = "{% for m in messages %}\n<|im_start|>{{ m['role'] }}\n{{ m['content'] ~ '\n' }}<|im_end|>\n{% endfor %}\n\
                  {% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}\n";
    let messages = [Message::user("one\r\ntwo")];
    let expected = template(source).render(&messages, true).unwrap();
    assert_eq!(expected, "<|im_start|>user\none\r\ntwo\n<|im_end|>\n<|im_start|>assistant\n");
    for ends in ["\r\n", "\r"] {
        assert_eq!(
            template(&source.replace('\n', ends)).render(&messages, true).unwrap(),
            expected,
            "{ends:?}"
        );
    }
}

#[test]
fn nothing_contains_itself() {
    for source in [
        "{% set n = namespace() %}{% set n.x = n %}{{ n }}",
        "{% set n = namespace() %}{% set n.x = [1, {'a': (n,)}] %}{{ n }}",
        "{% set n = namespace() %}{% set m = namespace(n=n) %}{% set n.x = m %}{{ m }}",
        "{% set n = namespace() %}{% set m = namespace() %}{% set n.m = m %}{% set m.n = n %}{{ n == m }}",
        "{% set n = namespace() %}{% set n.x, y = n, 1 %}{{ n }}",
        "{% set n = namespace() %}{% set (n.x) = n %}{{ n ~ '' }}",
        "{% set n = namespace() %}{% set n.x = n.items() %}{% set n.y = n.items() %}{{ n }}{{ n.y }}",
        "{% set n = namespace() %}{% set n.x = cycler(n) %}{{ n }}",
        "{% set n = namespace() %}{% set n.x = joiner(n) %}{{ n|string }}",
        "{% set n = namespace() %}{% set n.x | default(n, true) %}{% endset %}{{ n }}",
        "{% set n = namespace() %}{% set n.m = namespace() %}{% set n.m.x = n %}{{ n|tojson }}",
        "{% set n = namespace() %}{% set n.x = {n: 1} %}{{ n }}",
        "{% macro f() %}{{ n }}{% endmacro %}{% set n = namespace() %}{% set n.x = f %}{{ n }}{{ n.x() }}",
    ] {
        // Refused, or rendered: what matters is that it comes back.
        match template_or_refused(source)
            .map(|template| template.render(&[Message::user("Hi")], true))
        {
            Some(Err(Error::Template { .. } | Error::TemplateBudget { .. })) | None => {}
            Some(Ok(text)) => assert!(text.len() < 1000, "{source}: {text}"),
            Some(Err(error)) => panic!("{source}: {error}"),
        }
    }
    let scratch = Scratch::new();
    let model = scratch.copy(&tiny_chat(), "model");
    fs_err::write(
        model.join("chat_template.jinja"),
        "{% set n = namespace() %}{% set n.x = n %}{{ n }}",
    )
    .unwrap();
    refuses(
        &["generate", "--model", text(&model), "--prompt", "hi"],
        65,
        &["a namespace cannot be stored in itself"],
    );
}

fn template_or_refused(source: &str) -> Option<ChatTemplate> {
    ChatTemplate::new(Path::new("test.jinja"), source, Vec::new()).ok()
}
