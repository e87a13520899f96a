//! One redaction for messages, `run.json`, cards and pages: secrets that this process knows, and users and passwords in
//! addresses, are never shown.
//!
//! A server may send back what it was sent, an address may hold a password: whatever goes to a terminal, a log or a file
//! that travels passes through [`redacted`].

use std::borrow::Cow;
use std::sync::{PoisonError, RwLock};

/// What stands for a secret.
pub const HIDDEN: &str = "***";

/// Shorter texts are no secrets but words, and hiding them would make messages unreadable.
const SHORTEST: usize = 6;

/// Environment variables that hold a secret.
const VARIABLES: [&str; 4] =
    ["OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN"];

static KNOWN: RwLock<Option<Vec<String>>> = RwLock::new(None);

/// Makes a text a secret from now on.
pub fn hide(secret: &str) {
    let secret = secret.trim();
    if secret.len() < SHORTEST {
        return;
    }
    let mut known = KNOWN.write().unwrap_or_else(PoisonError::into_inner);
    let known = known.get_or_insert_with(of_environment);
    if !known.iter().any(|other| other == secret) {
        known.push(secret.to_owned());
        // Of two secrets of which one holds the other, the longer goes first.
        known.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
    }
}

fn of_environment() -> Vec<String> {
    let values = VARIABLES.iter().filter_map(|name| std::env::var(name).ok());
    let mut secrets: Vec<String> = values.map(|value| value.trim().to_owned()).collect();
    secrets.retain(|secret| secret.len() >= SHORTEST);
    secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
    secrets
}

/// The text without secrets: those of the environment and of [`hide`], and `user:password@` of addresses.
#[must_use]
pub fn redacted(text: &str) -> Cow<'_, str> {
    let mut out = without_userinfo(text);
    if KNOWN.read().unwrap_or_else(PoisonError::into_inner).is_none() {
        KNOWN.write().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(of_environment);
    }
    let known = KNOWN.read().unwrap_or_else(PoisonError::into_inner);
    for secret in known.iter().flatten() {
        if out.contains(secret.as_str()) {
            out = Cow::Owned(out.replace(secret.as_str(), HIDDEN));
        }
    }
    out
}

/// A text of some lines: of a longer one its beginning and its end. Files and servers may say anything, and what is said of
/// them may repeat it.
#[must_use]
pub fn cut(text: &str) -> Cow<'_, str> {
    const FIRST: usize = 1400;
    const LAST: usize = 400;
    let n_chars = text.chars().count();
    if n_chars <= FIRST + LAST + 100 {
        return Cow::Borrowed(text);
    }
    let first: String = text.chars().take(FIRST).collect();
    let last: String = text.chars().skip(n_chars - LAST).collect();
    Cow::Owned(format!("{first} … ({} characters left out) … {last}", n_chars - FIRST - LAST))
}

/// Texts in a JSON value without secrets.
pub fn redact_json(value: &mut serde_json::Value) {
    use serde_json::Value;
    match value {
        Value::String(text) => {
            if let Cow::Owned(redacted) = redacted(text) {
                *text = redacted;
            }
        }
        Value::Array(items) => items.iter_mut().for_each(redact_json),
        Value::Object(map) => map.values_mut().for_each(redact_json),
        _ => {}
    }
}

/// The user and the password of an address, if it has any.
#[must_use]
pub fn userinfo(address: &str) -> Option<&str> {
    let rest = &address[address.find("://")? + 3..];
    let authority = &rest[..rest.find(ends_authority).unwrap_or(rest.len())];
    authority.rfind('@').map(|at| &authority[..at])
}

/// What is said of an address, whether it is one or not: without [`userinfo`], and without what stands before an `@` where a
/// scheme is missing or misspelt. What follows a `?` may be a key.
#[must_use]
pub fn shown_address(address: &str) -> String {
    let (place, query) =
        address.split_once('?').map_or((address, ""), |(place, _)| (place, "?***"));
    let place = match redacted(place) {
        Cow::Borrowed(same) if !same.contains("://") => match same.rsplit_once('@') {
            Some((_, host)) => format!("{HIDDEN}@{host}"),
            None => same.to_owned(),
        },
        place => place.into_owned(),
    };
    place + query
}

fn ends_authority(c: char) -> bool {
    c.is_whitespace() || "/?#\"'<>`".contains(c)
}

fn without_userinfo(text: &str) -> Cow<'_, str> {
    let (mut out, mut rest, mut found) = (String::new(), text, false);
    while let Some(start) = rest.find("://") {
        let (before, after) = rest.split_at(start + 3);
        out.push_str(before);
        rest = match userinfo(&rest[start..]) {
            Some(secret) => {
                found = true;
                out.push_str(HIDDEN);
                &after[secret.len()..]
            }
            None => after,
        };
    }
    if !found {
        return Cow::Borrowed(text);
    }
    out.push_str(rest);
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_and_passwords_of_addresses_are_hidden() {
        for (text, expected) in [
            ("http://bob:hunter2@host:80/v1", "http://***@host:80/v1"),
            ("at https://a@b.c and ftp://x:y:z@[::1]/", "at https://***@b.c and ftp://***@[::1]/"),
            ("http://host/a@b", "http://host/a@b"),
            ("http://host?mail=a@b", "http://host?mail=a@b"),
            ("mail a@b, see http://host", "mail a@b, see http://host"),
            ("http://abc@h", "http://***@h"),
            ("http://p@ss:word@h/", "http://***@h/"),
            ("", ""),
        ] {
            assert_eq!(redacted(text), expected);
        }
    }

    #[test]
    fn what_is_no_address_hides_its_password_too() {
        for (text, expected) in [
            ("bob:hunter2@host:80", "***@host:80"),
            ("http:/bob:hunter2@host", "***@host"),
            ("http//bob:p@ss@host/v1", "***@host/v1"),
            ("HTTP://bob:hunter2@host", "HTTP://***@host"),
            ("http://host/v1?key=abc", "http://host/v1?***"),
            ("localhost:8000", "localhost:8000"),
        ] {
            assert_eq!(shown_address(text), expected);
        }
    }

    #[test]
    fn long_texts_keep_their_beginning_and_their_end() {
        assert!(matches!(cut("short"), Cow::Borrowed("short")));
        let text = format!("first {} last", "é".repeat(10_000));
        let short = cut(&text);
        assert!(short.starts_with("first é") && short.ends_with("é last"), "{short}");
        assert!(short.contains("… (8211 characters left out) …"), "{short}");
    }

    #[test]
    fn known_secrets_are_hidden_wherever_they_stand() {
        hide("canary-0123456789\n");
        hide("canary-0123456789-longer");
        hide("word");
        let text = r#"{"error": "bad: Bearer canary-0123456789-longer, canary-0123456789 word"}"#;
        assert_eq!(redacted(text), r#"{"error": "bad: Bearer ***, *** word"}"#);
        let mut value = serde_json::json!({"a": ["canary-0123456789", 1], "b": "http://u:p@h"});
        redact_json(&mut value);
        assert_eq!(value, serde_json::json!({"a": ["***", 1], "b": "http://***@h"}));
    }
}
