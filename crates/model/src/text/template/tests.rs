use serde_json::Value as Json;

use super::*;

pub(crate) fn golden() -> Json {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/templates.json");
    serde_json::from_slice(&fs_err::read(path).unwrap()).unwrap()
}

pub(crate) fn variables() -> Vec<(&'static str, String)> {
    [("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")]
        .map(|(name, token)| (name, token.to_owned()))
        .to_vec()
}

/// A published template, by its name in the golden.
pub(crate) fn published(name: &str) -> ChatTemplate {
    let golden = golden();
    let source = golden["templates"][name].as_str().unwrap();
    ChatTemplate::new(Path::new(name), source, variables()).unwrap()
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(Path::new("test.jinja"), source, variables()).unwrap()
}

#[test]
fn text_is_that_of_transformers() {
    let golden = golden();
    let mut n_refused = 0;
    for case in golden["cases"].as_array().unwrap() {
        let name = case["template"].as_str().unwrap();
        let index = usize::try_from(case["conversation"].as_u64().unwrap()).unwrap();
        let messages: Vec<Message> =
            serde_json::from_value(golden["conversations"][index].clone()).unwrap();
        let prompt = case["add_generation_prompt"].as_bool().unwrap();
        let got = published(name).render(&messages, prompt);
        match (&case["text"], &case["refused"], got) {
            (Json::String(text), _, Ok(got)) => assert_eq!(&got, text, "{name} {index}"),
            (_, Json::String(message), Err(Error::TemplateRefused { message: got, .. })) => {
                n_refused += 1;
                assert_eq!(&got, message, "{name} {index}");
            }
            (_, _, got) => panic!("{name} {index}: {got:?}, expected {case}"),
        }
    }
    assert!(n_refused >= 10, "{n_refused}");
}

#[test]
fn only_some_templates_refuse_a_system_role() {
    let expected = [
        ("smollm2", false),
        ("chatml", false),
        ("llama2", false),
        ("mistral_2023", true),
        ("mistral_2024", false),
    ];
    for (name, refuses) in expected {
        assert_eq!(published(name).refuses_system(), refuses, "{name}");
    }
    let dropping =
        "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}";
    assert!(template(dropping).refuses_system(), "the text would be lost");
    let moving = "{% set s = messages[0].content if messages[0].role == 'system' else '' %}\
                  {% for m in messages if m.role != 'system' %}{{ s if loop.last else '' }}{{ m.content }}{% endfor %}";
    assert!(template(moving).refuses_system(), "earlier turns would change");
}

#[test]
fn a_refused_system_text_goes_to_the_first_user() {
    let mistral = published("mistral_2023");
    let messages = [Message::system("Be kind."), Message::user("Hi"), Message::assistant("Hello")];
    let (fitted, prepended) = mistral.fit(&messages).unwrap();
    assert!(prepended);
    assert_eq!(*fitted, [Message::user("Be kind.\n\nHi"), Message::assistant("Hello")]);
    assert_eq!(
        mistral.render(&fitted, false).unwrap(),
        "<s>[INST] Be kind.\n\nHi [/INST]Hello</s>"
    );
    let (same, prepended) = mistral.fit(&messages[1..]).unwrap();
    assert!(!prepended && *same == messages[1..]);
    let (same, prepended) = published("chatml").fit(&messages).unwrap();
    assert!(!prepended && *same == messages);
    assert!(matches!(mistral.fit(&messages[..1]), Err(Error::Invalid { .. })));
}

#[test]
fn endless_and_greedy_templates_stop() {
    let hostile = [
        "{% for a in range(25000) %}{% for b in range(25000) %}x{% endfor %}{% endfor %}",
        "{{ 'x' * 1000000000 }}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{% set ns = namespace(l=[1]) %}{% for i in range(99) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l|tojson }}",
        "{% set ns = namespace(l=[1]) %}{% for i in range(99999) %}{% set ns.l = [ns.l] %}{% endfor %}{{ ns.l|tojson }}",
        "{% set ns = namespace(l=[1]) %}{% for i in range(99999) %}{% set ns.l = [ns.l] %}{% endfor %}{{ ns.l }}",
        "{% set ns = namespace(l=[1]) %}{% for i in range(99) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
        "{% set ns = namespace(l=[1]) %}{% for i in range(99) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l|string }}",
    ];
    for source in hostile {
        let error = template(source).render(&[Message::user("Hi")], true).unwrap_err();
        assert!(
            matches!(error, Error::TemplateBudget { .. } | Error::Template { .. }),
            "{source}: {error}"
        );
    }
    // As deep as the instructions go: neither printing nor freeing may overflow the stack.
    let deep = "{% set ns = namespace(l=[1]) %}{% for i in range(4000) %}{% set ns.l = [ns.l] %}{% endfor %}";
    assert_eq!(template(deep).render(&[], false).unwrap(), "");
    for end in ["{{ ns.l }}", "{{ ns.l ~ '' }}", "{{ ns.l|tojson }}"] {
        let _ = template(&format!("{deep}{end}")).render(&[], false);
    }
    let endless = template(hostile[0]).render(&[], false).unwrap_err().to_string();
    assert_eq!(
        endless,
        "test.jinja: chat template: expected at most 500000 instructions, it wanted more"
    );
    let long = "{% for i in range(400) %}{{ messages[0].content }}{% endfor %}";
    let error = template(long).render(&[Message::user("x".repeat(20_000))], false).unwrap_err();
    assert!(matches!(error, Error::TemplateBudget { what: "bytes of text", .. }), "{error}");
    let error = ChatTemplate::new(Path::new("big"), &" ".repeat(300_000), Vec::new()).unwrap_err();
    assert!(matches!(error, Error::TemplateBudget { what: "bytes", .. }), "{error}");
}

#[test]
fn real_templates_use_little_of_the_budget() {
    // 60 turns of 1 KB: an error here would mean honest conversations do not fit.
    let messages: Vec<Message> = (0..60)
        .map(|i| {
            let content = "word ".repeat(200);
            if i % 2 == 0 { Message::user(content) } else { Message::assistant(content) }
        })
        .collect();
    for name in ["smollm2", "chatml", "llama2", "mistral_2023", "mistral_2024"] {
        published(name).render(&messages, true).unwrap();
    }
}

#[test]
fn mistakes_are_told_apart_from_refusals() {
    let broken = ChatTemplate::new(Path::new("t.jinja"), "{% if %}", Vec::new()).unwrap_err();
    assert!(matches!(broken, Error::Template { .. }) && broken.to_string().contains("t.jinja"));
    let unknown = template("{{ nothing.at_all }}").render(&[], false).unwrap_err();
    assert!(matches!(unknown, Error::Template { .. }), "{unknown}");
    for source in ["{% include 'x' %}", "{{ ''.__class__ }}", "{{ strftime_now('%Q') }}"] {
        assert!(template(source).render(&[], false).is_err() || source.contains("__class__"));
    }
    assert_eq!(template("{{ ''.__class__ }}").render(&[], false).unwrap(), "");
}

#[test]
fn dates_are_told_as_c_tells_them() {
    let format = "%d %b %Y|%B %-d, %Y|%A %a|%y-%m-%-m|%H:%M|%I %p|%F|%e|100%%";
    let tell = |year, month, day| strftime(Date { year, month, day }, format).unwrap();
    // From `date -d … +FORMAT` in the C locale.
    assert_eq!(
        tell(2024, 7, 26),
        "26 Jul 2024|July 26, 2024|Friday Fri|24-07-7|00:00|12 AM|2024-07-26|26|100%"
    );
    assert_eq!(
        tell(2000, 2, 9),
        "09 Feb 2000|February 9, 2000|Wednesday Wed|00-02-2|00:00|12 AM|2000-02-09| 9|100%"
    );
    let source = "{{ strftime_now('%Y') }}";
    let date = Date { year: 1999, month: 1, day: 1 };
    let other = ChatTemplate::with_date(Path::new("x"), source, Vec::new(), date).unwrap();
    assert_eq!(other.render(&[], false).unwrap(), "1999");
}

#[test]
fn generation_blocks_keep_their_white_space_control() {
    let cases = [
        ("a {%- generation -%} b {%- endgeneration %} c", "ab c"),
        ("a {% generation %}b{% endgeneration %} c", "a b c"),
        ("{% set generation = 1 %}{{ generation }}", "1"),
        ("{% raw %}{%{% endraw %}", "{%"),
        ("{{ '{%' }}", "{%"),
    ];
    for (source, expected) in cases {
        assert_eq!(template(source).render(&[], false).unwrap(), expected, "{source}");
    }
}

#[test]
fn json_backslashes_are_not_mistaken_for_escapes() {
    let messages = [Message::user(r"\u003c & \\u003c <'> é")];
    // json.dumps of Python 3.11 with ensure_ascii=False.
    let expected = r#""\\u003c & \\\\u003c <'> é""#;
    assert_eq!(
        template("{{ messages[0].content|tojson }}").render(&messages, false).unwrap(),
        expected
    );
}

proptest::proptest! {
    /// Pieces of templates in any order: text or an error, within the budget.
    #[test]
    fn any_source_gives_text_or_an_error(
        pieces in proptest::collection::vec(proptest::sample::select(vec![
            "{% for m in messages %}", "{% for i in range(99999999) %}", "{% endfor %}", "{{ m.content }}", "{{ m['role'] * 99999 }}",
            "{% if m.role == 'user' %}", "{% elif %}", "{% else %}", "{% endif %}", "{% set x = x ~ x %}", "{{", "}}", "{%", "%}",
            "{#", "#}", "{% macro f(a) %}", "{% endmacro %}", "{{ f(f) }}", "{{ raise_exception('no') }}", "{{ strftime_now('%d%Q') }}",
            "{% generation %}", "{% endgeneration %}", "{% include 'x' %}", "{{ messages[::-1]|tojson }}", "é\u{0}", "{%- break -%}",
        ]), 0..12),
    ) {
        let messages = [Message::user("Hi"), Message::assistant("Hello.")];
        let path = std::path::Path::new("x.jinja");
        if let Ok(template) = ChatTemplate::new(path, &pieces.concat(), Vec::new())
            && let Ok(text) = template.render(&messages, true)
        {
            proptest::prop_assert!(text.len() <= 4 << 20);
        }
    }
}

/// What ended the process before: a stack of ten thousand levels, gigabytes made by one call.
#[test]
fn deep_expressions_and_wide_texts_are_refused() {
    let many = |begin: &str, part: &str, end: &str| format!("{begin}{}{end}", part.repeat(15_000));
    for source in [
        many("{{ ", "not ", "a }}"),
        many("{{ ", "-", "1 }}"),
        many("{{ a", ".a", " }}"),
        many("{{ a", "[0]", " }}"),
        many("{{ a", "()", " }}"),
        many("{{ 1", "+1", " }}"),
        many("{{ a", "~a", " }}"),
        many("{{ a", "**a", " }}"),
        many("{{ a", " and a", " }}"),
        many("{{ a", " is not a", " }}"),
        many("{{ a", " if a else a", " }}"),
        many("{% if a %}", "{% elif a %}", "{% endif %}"),
        many("{%- if a -%}", "{%- elif a -%}", "{%- endif -%}"),
        many("{% set x = 1", "+1", " %}"),
        many("{{ é", "+1", ""), // a tag without an end
    ] {
        let refused = ChatTemplate::new(Path::new("t"), &source, Vec::new()).unwrap_err();
        let (what, start) = (refused.to_string(), &source[..20]);
        assert!(what.contains("at most 1000 operators"), "{start}: {what}");
    }
    for source in [
        "{{ '{:1000000000}'.format(3) }}",
        "{{ '{:.1000000000}'.format('a') }}",
        "{{ '{:{}}'.format(3, 1000000000) }}",
        "{{ '{:{w}}'.format(3, w=1000000000) }}",
        "{{ {'a': 1} | tojson(indent=1000000000) }}",
    ] {
        let error = template(source).render(&[], false).unwrap_err();
        assert!(matches!(error, Error::TemplateBudget { .. }), "{source}: {error}");
    }
    // What is long without being deep stays.
    let text = "a + b.c ".repeat(2000);
    let list = "1,".repeat(5000);
    let template = template(&format!(
        "{{{{ '{text}' }}}}{{% set x = [{list}] %}}{{{{ '{{:>5}}'.format(7) }}}}"
    ));
    assert_eq!(template.render(&[], false).unwrap(), format!("{text}    7"));
}

/// Jinja2 3.1 and transformers' `tojson` (5.23) on Python 3.11.
#[test]
fn escapes_floats_and_digits_are_pythons() {
    for (source, expected) in [
        (r#"{{ "a/b <x> 'q' \"d\" &"|e }}"#, "a/b &lt;x&gt; &#39;q&#39; &#34;d&#34; &amp;"),
        ("{{ '<'|escape|e }}", "&lt;"),
        ("{{ 'a/b'|e ~ '<' }}", "a/b<"),
        ("{{ none|e }}{{ nothing|e }}{{ [1.0, '<']|e }}", "None[1.0, &#39;&lt;&#39;]"),
        ("{{ [1e-7, 1e20, 0.1, 1.0, 7, -1e16]|tojson }}", "[1e-07, 1e+20, 0.1, 1.0, 7, -1e+16]"),
        (r#"{{ {'1e7': '1e-7 \\" 2e5'}|tojson }}"#, r#"{"1e7": "1e-7 \\\" 2e5"}"#),
        ("{{ [1e-7, 2]|tojson(separators=(',', ':')) }}", "[1e-07,2]"),
        ("{{ ['<']|tojson|e }}", "[&#34;&lt;&#34;]"),
        ("{{ '٣'|int + '-१२'|int + '４'|int }} {{ '٣.٥'|float }} {{ '²'|int }}", "-5 3.5 0"),
    ] {
        let found = template(source).render(&[], false).unwrap();
        assert_eq!(found, expected, "{source}");
    }
}
