//! The page from its templates, every text in it escaped.

use arete_records::redact;
use arete_records::stats::Interval;
use minijinja::value::{Serde, Value};
use minijinja::{Environment, UndefinedBehavior, context, escape_formatter};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::view::Page;
use crate::table;

macro_rules! templates {
    ($($name:literal),+ $(,)?) => { [$(($name, include_str!(concat!("templates/", $name)))),+] };
}

pub(crate) const TEMPLATES: [(&str, &str); 12] = templates![
    "page.html.jinja",
    "macros.html.jinja",
    "head.html.jinja",
    "score.html.jinja",
    "diagnosis.html.jinja",
    "replies.html.jinja",
    "ppo.html.jinja",
    "gold.html.jinja",
    "reward.html.jinja",
    "judge.html.jinja",
    "data.html.jinja",
    "provenance.html.jinja",
];
pub(crate) const STYLE: &str = include_str!("templates/page.css");
pub(crate) const SCRIPT: &str = include_str!("templates/page.js");

/// The whole page.
pub(crate) fn render(page: &Page<'_>) -> String {
    let context = context! {
        page => Serde(page),
        retokenised => table::RETOKENISED,
        circular => table::CIRCULAR,
        style => STYLE,
        script => SCRIPT,
        script_sha256 => base64(&Sha256::digest(SCRIPT)),
        version => env!("CARGO_PKG_VERSION"),
    };
    let rendered =
        environment().get_template("page.html.jinja").and_then(|template| template.render(context));
    rendered.expect("the templates read what the view holds")
}

/// The templates, which know numbers as the terminal's tables show them; one that is not known stays none.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_formatter(|out, state, value| match value.as_str() {
        Some(text) if !value.is_safe() => {
            let shown = redact::redacted(text).replace(is_unseen, "\u{fffd}");
            escape_formatter(out, state, &Value::from(shown))
        }
        _ => escape_formatter(out, state, value),
    });
    environment.add_filter("number", |x: Option<f64>| x.map(|x| table::number(x, false)));
    environment.add_filter("signed", |x: Option<f64>| x.map(|x| table::number(x, true)));
    environment.add_filter("percent", |x: Option<f64>| x.map(table::percent));
    environment.add_filter("probability", table::probability);
    environment.add_filter("digits", |x: Option<f64>, n: usize, unit: Option<String>| {
        x.map(|x| format!("{x:.n$}{}", unit.unwrap_or_default()))
    });
    let of_interval = |show: fn(&Interval) -> String| {
        move |own: Value| -> Result<String, minijinja::Error> {
            Ok(show(&Interval::deserialize(own)?))
        }
    };
    environment.add_filter("interval", of_interval(|own| table::interval(own, true)));
    environment.add_filter("bounds", of_interval(table::bounds));
    environment.add_filter("rate", of_interval(table::rate));
    for (name, source) in TEMPLATES {
        environment.add_template(name, source).expect("the templates are well-formed");
    }
    environment
}

/// Control characters, which no browser shows and HTML forbids, and marks that would reorder text beyond their reply.
fn is_unseen(c: char) -> bool {
    c.is_control() && !matches!(c, '\n' | '\t')
        || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Base64 (RFC 4648, with padding), for the page's content security policy.
pub(crate) fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for group in bytes.chunks(3) {
        let bits = group.iter().fold(0_u32, |bits, &byte| bits << 8 | u32::from(byte))
            << (8 * (3 - group.len()));
        for place in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * place) & 63) as usize];
            out.push(if place <= group.len() { char::from(digit) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_hostile_gets_through() {
        let shown = |template: &str, text: &str| {
            let mut environment = environment();
            environment.add_template_owned("x.html.jinja", template.to_owned()).unwrap();
            environment.get_template("x.html.jinja").unwrap().render(context! { text }).unwrap()
        };
        assert_eq!(
            shown("{{ text }}", "</p><script>alert(\"1\")</script> & 'x'"),
            "&lt;&#x2f;p&gt;&lt;script&gt;alert(&quot;1&quot;)&lt;&#x2f;script&gt; &amp; &#x27;x&#x27;"
        );
        assert_eq!(
            shown("{{ text }}", "a\u{0}b\u{1b}[2J\nc\u{202e}d"),
            "a\u{fffd}b\u{fffd}[2J\nc\u{fffd}d"
        );
        redact::hide("hf_page_secret");
        assert_eq!(
            shown("{{ text }}", "http://bob:pw@host/v1?key=hf_page_secret"),
            "http:&#x2f;&#x2f;***@host&#x2f;v1?key=***"
        );
        let html = shown(
            "{% from 'macros.html.jinja' import table, row, not_run %}{{ not_run(text) }}\
             {% call(own) table(text, [text], [text], [text]) %}{{ row([own], [own]) }}{% endcall %}",
            "<b>",
        );
        assert!(!html.contains("<b>") && html.matches("&lt;b&gt;").count() == 6, "{html}");
    }

    #[test]
    fn base64_as_in_the_rfc() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }
}
