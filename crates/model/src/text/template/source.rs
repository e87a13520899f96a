//! A template's text as minijinja must see it to mean what it means to Jinja2.
//!
//! What differs is in the lexer, which minijinja does not let others change: line ends, escapes in literals, the first line of
//! `raw`. What a template stores in a namespace passes through a filter that keeps it free of cycles. Everything else is copied.
//!
//! # Source
//!
//! Jinja2 3.1, `lexer.py`.

/// The filter that stored values pass through: `value|__store(namespace)`.
pub(super) const STORE: &str = "__store";

/// Operators that one tag may have, and `elif` branches one template; published ones have dozens. Each is a level of the tree that
/// minijinja parses, compiles and frees by recursion: some ten thousand of them are the end of a stack, and of the process.
pub(super) const MAX_OPERATORS: usize = 1000;

/// Whether no tag has more than [`MAX_OPERATORS`], and the template no more `elif`.
pub(super) fn is_shallow(source: &str) -> bool {
    let mut n_branches = 0;
    let mut rest = source;
    while let Some(at) = rest.find('{') {
        rest = &rest[at..];
        let taken = if rest.starts_with("{#") {
            rest.find("#}").map_or(rest.len(), |end| end + 2)
        } else if let Some(raw) = raw_block(rest) {
            raw.end
        } else if rest.starts_with("{%") || rest.starts_with("{{") {
            let (text, end) = tag(rest);
            let inner = text[2..].trim_start_matches(['-', '+']).trim_start();
            n_branches += usize::from(text.starts_with("{%") && inner.starts_with("elif"));
            if n_operators(&text[2..]) > MAX_OPERATORS || n_branches > MAX_OPERATORS {
                return false;
            }
            end
        } else {
            1
        };
        rest = &rest[taken..];
    }
    true
}

/// What nests an expression deeper without a bracket that closes again, outside of texts.
fn n_operators(text: &str) -> usize {
    let (mut n, mut at) = (0, 0);
    let mut word_begins = true;
    while let Some(c) = text[at..].chars().next() {
        let rest = &text[at..];
        if c == '\'' || c == '"' {
            let Some(length) = literal_length(rest) else { return n };
            at += length;
            word_begins = true;
            continue;
        }
        let is_word_part = c.is_alphanumeric() || c == '_';
        if word_begins && is_word_part {
            let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_'));
            let word = &rest[..end.unwrap_or(rest.len())];
            n += usize::from(["not", "and", "or", "if", "in", "is"].contains(&word));
        }
        n += usize::from(".+-*/%~|<>=!([".contains(c));
        word_begins = !is_word_part;
        at += c.len_utf8();
    }
    n
}

/// Rewrites a template.
pub(super) fn rewritten(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len() + source.len() / 8);
    let mut rest = source.as_str();
    while let Some(at) = rest.find('{') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let taken = if rest.starts_with("{#") {
            let end = rest.find("#}").map_or(rest.len(), |end| end + 2);
            out.push_str(&rest[..end]);
            end
        } else if let Some(raw) = raw_block(rest) {
            out.push_str(&rest[..raw.begin]);
            // minijinja drops a line end after the tag, Jinja2 does not.
            if rest[..raw.begin].ends_with("%}")
                && !rest[..raw.begin].ends_with("-%}")
                && rest[raw.begin..].starts_with('\n')
            {
                out.push('\n');
            }
            out.push_str(&rest[raw.begin..raw.end]);
            raw.end
        } else if rest.starts_with("{%") || rest.starts_with("{{") {
            let (text, end) = tag(rest);
            out.push_str(&text);
            end
        } else {
            out.push('{');
            1
        };
        rest = &rest[taken..];
    }
    out.push_str(rest);
    out
}

struct Raw {
    /// End of `{% raw %}`.
    begin: usize,
    /// End of `{% endraw %}`.
    end: usize,
}

/// A raw block at the beginning of `text`.
fn raw_block(text: &str) -> Option<Raw> {
    let begin = simple_tag(text, "raw")?;
    let mut at = begin;
    loop {
        at += text[at..].find("{%")?;
        if let Some(length) = simple_tag(&text[at..], "endraw") {
            return Some(Raw { begin, end: at + length });
        }
        at += 2;
    }
}

/// The length of `{% name %}` at the beginning of `text`, with its marks of white space.
fn simple_tag(text: &str, name: &str) -> Option<usize> {
    let inner = text.strip_prefix("{%")?;
    let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner).trim_start();
    let rest = inner.strip_prefix(name)?.trim_start();
    let rest = rest.strip_prefix(['-', '+']).unwrap_or(rest);
    Some(text.len() - rest.strip_prefix("%}")?.len())
}

/// The rewritten tag at the beginning of `text`, and how long it was.
fn tag(text: &str) -> (String, usize) {
    let close = if text.starts_with("{%") { "%}" } else { "}}" };
    let mut inner = String::new();
    let (mut at, mut depth) = (2, 0usize);
    // Where the assignment's `=` stands in `inner`, the first one outside of brackets.
    let mut equals = None;
    while at < text.len() {
        let rest = &text[at..];
        if depth == 0 && rest.starts_with(close) {
            return (finished(&text[..2], &inner, equals, close), at + 2);
        }
        let c = rest.chars().next().expect("there is more text");
        match c {
            '\'' | '"' => {
                let Some(length) = literal_length(rest) else { break };
                inner.push_str(&literal(&rest[..length]));
                at += length;
                continue;
            }
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            '=' if depth == 0 && equals.is_none() => equals = Some(inner.len()),
            _ => {}
        }
        inner.push(c);
        at += c.len_utf8();
    }
    (text.to_owned(), text.len()) // without an end: minijinja says so
}

/// The tag around `inner`, which may be one that minijinja does not have.
fn finished(open: &str, inner: &str, equals: Option<usize>, close: &str) -> String {
    if open == "{%" {
        let body = inner.strip_prefix(['-', '+']).unwrap_or(inner);
        let body = body.strip_suffix(['-', '+']).unwrap_or(body);
        // What transformers marks the assistant's tokens with, as blocks that only keep their white space control.
        for (name, block) in [("generation", "if true"), ("endgeneration", "endif")] {
            if body.trim() == name {
                return [open, &inner.replace(name, block), close].concat();
            }
        }
        if let Some(stored) = stored(inner, equals) {
            return [open, &stored, close].concat();
        }
    }
    [open, inner, close].concat()
}

/// `set ns.x = value`, or `set ns.x | filter`, with the value through [`STORE`]; none for another tag.
fn stored(inner: &str, equals: Option<usize>) -> Option<String> {
    let end = equals.or_else(|| inner.find('|'))?;
    let (left, right) = inner.split_at(end);
    let target = left.trim_start_matches(['-', '+']).trim_start().strip_prefix("set")?;
    let target = target.strip_prefix(|c: char| c.is_whitespace() || c == '(')?;
    let plain = |c: char| c.is_alphanumeric() || c.is_whitespace() || "_.,()".contains(c);
    if !target.chars().all(plain) {
        return None;
    }
    // What each attribute that is set belongs to; also in `set ns.a, ns.b = …`.
    let parts = target.split([',', '(', ')']);
    let namespaces: Vec<&str> =
        parts.filter_map(|part| Some(part.rsplit_once('.')?.0.trim())).collect();
    if namespaces.is_empty() {
        return None;
    }
    let (value, mark) = match right.strip_suffix(['-', '+']) {
        Some(value) => (value, &right[value.len()..]),
        None => (right, ""),
    };
    let store = format!("|{STORE}({})", namespaces.join(", "));
    Some(match equals {
        Some(_) => format!("{left}= ({}){store} {mark}", &value[1..]),
        None => format!("{left}{} {store} {mark}", value.trim_end()),
    })
}

/// The length of the literal that `text` begins with, its quotes included.
fn literal_length(text: &str) -> Option<usize> {
    let mut chars = text.char_indices();
    let (_, quote) = chars.next()?;
    while let Some((at, c)) = chars.next() {
        if c == '\\' {
            chars.next();
        } else if c == quote {
            return Some(at + 1);
        }
    }
    None
}

/// A literal whose escapes minijinja reads as Python reads them.
fn literal(text: &str) -> String {
    let quote = text.chars().next().unwrap_or('"');
    let body = &text[1..text.len() - 1];
    if !body.contains('\\') {
        return text.to_owned();
    }
    let mut out = String::from(quote);
    let mut rest = body;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let (character, length) = escape(rest);
        match character {
            Escaped::Character(c) if c == quote || c == '\\' => out.extend(['\\', c]),
            Escaped::Character(c) => out.push(c),
            Escaped::Nothing => {}
            Escaped::Kept => out.push_str("\\\\"),
            Escaped::Unread => out.push('\\'),
        }
        out.push_str(&rest[..if matches!(character, Escaped::Unread) { length } else { 0 }]);
        rest = &rest[length..];
    }
    out.push_str(rest);
    out.push(quote);
    out
}

/// What a backslash and what follows it stand for.
#[derive(Clone, Copy)]
enum Escaped {
    Character(char),
    /// A line end: the literal goes on.
    Nothing,
    /// No escape: the backslash is itself.
    Kept,
    /// minijinja says what is wrong with it, or puts two halves of a character together.
    Unread,
}

/// Reads an escape after its backslash, as Python's `unicode-escape`; and its length.
fn escape(rest: &str) -> (Escaped, usize) {
    let Some(c) = rest.chars().next() else { return (Escaped::Kept, 0) };
    let hex = |digits: usize| {
        let code =
            rest.get(1..1 + digits).filter(|text| text.chars().all(|c| c.is_ascii_hexdigit()));
        let code = code.and_then(|text| u32::from_str_radix(text, 16).ok());
        match code.and_then(char::from_u32) {
            Some(c) => (Escaped::Character(c), 1 + digits),
            None => (Escaped::Unread, 1),
        }
    };
    let simple = |c: char| (Escaped::Character(c), 1);
    match c {
        '\n' => (Escaped::Nothing, 1),
        '\\' | '\'' | '"' => simple(c),
        'a' => simple('\x07'),
        'b' => simple('\x08'),
        'f' => simple('\x0C'),
        'n' => simple('\n'),
        'r' => simple('\r'),
        't' => simple('\t'),
        'v' => simple('\x0B'),
        '0'..='7' => {
            let n = rest.chars().take(3).take_while(|c| ('0'..='7').contains(c)).count();
            let code = u32::from_str_radix(&rest[..n], 8).ok().and_then(char::from_u32);
            (code.map_or(Escaped::Kept, Escaped::Character), n)
        }
        'x' => hex(2),
        'u' => hex(4),
        'U' => hex(8),
        _ => (Escaped::Kept, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_means_the_same_stays() {
        for same in [
            "",
            "{",
            "a {b} c",
            "{{ x }}{% if a %}b{% endif %}{# {% generation %} #}",
            "{{ {'a': {'}}': 1}} }}{{ '{% raw %}' }}",
            "{% set x = 1 %}{% set x %}y{% endset %}{% for a.b in c %}{% endfor %}",
            "{{ 'open",
            "{% raw %}{{ x }}",
            "{% raw %}{% generation %}{{ '\\/' }}{% endraw %}",
        ] {
            assert_eq!(rewritten(same), same);
        }
    }

    #[test]
    fn tags_are_found_where_they_are() {
        assert_eq!(
            rewritten("{%- generation -%} a {%endgeneration%}"),
            "{%- if true -%} a {%endif%}"
        );
        assert_eq!(rewritten("{{ '{% generation %}' }}"), "{{ '{% generation %}' }}");
        assert_eq!(rewritten("{% raw %}\na{% endraw %}"), "{% raw %}\n\na{% endraw %}");
        assert_eq!(rewritten("{% raw -%}\na{% endraw %}"), "{% raw -%}\na{% endraw %}");
        assert_eq!(
            rewritten("{%- set ns.x = a, 'b=c' -%}"),
            "{%- set ns.x = ( a, 'b=c' )|__store(ns) -%}"
        );
        assert_eq!(rewritten("{% set ns.x = a == b %}"), "{% set ns.x = ( a == b )|__store(ns) %}");
        assert_eq!(
            rewritten("{% set (a.b.c, d) = v %}"),
            "{% set (a.b.c, d) = ( v )|__store(a.b) %}"
        );
        assert_eq!(rewritten("{% set n.x | upper -%}"), "{% set n.x | upper |__store(n) -%}");
        assert_eq!(rewritten("a\r\nb\rc\n"), "a\nb\nc\n");
    }

    #[test]
    fn literals_are_pythons() {
        for (python, ours) in [
            (r#"'\/'"#, r#"'\\/'"#),
            (r#"'\d\\d'"#, r#"'\\d\\d'"#),
            (r#"'it\'s "x"'"#, r#"'it\'s "x"'"#),
            (r#""\U0001F600\x41\101\u00e9""#, "\"😀AAé\""),
            ("'a\\\nb\\n'", "'ab\n'"),
            (r#"'\a\v'"#, "'\x07\x0B'"),
            (r#"'\ud83d\ude00'"#, r#"'\ud83d\ude00'"#),
        ] {
            assert_eq!(literal(python), ours);
        }
    }
}
