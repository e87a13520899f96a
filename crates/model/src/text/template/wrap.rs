//! Jinja2's `wordwrap` and `indent`.
//!
//! # Source
//!
//! Jinja2 3.1, `filters.py`; Python 3.11, `textwrap.py` (white space kept, tabs not expanded).

use std::ops::Range;

use minijinja::value::{Kwargs, Rest, Value};
use minijinja::{Error, State};

use super::methods::lines;
use super::python::{is_decimal, is_space, text_of, wrong};
use super::{MAX_OUTPUT_BYTES, too_large};

/// `indent(width, first, blank)`: `width` spaces, or that text, before every line but the first and blank ones.
pub(super) fn indent(
    state: &mut State,
    value: &Value,
    given: Rest<Value>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let [width, first, blank] = arguments(&given, &kwargs, ["width", "first", "blank"])?;
    let is_set = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let (first, blank) = (is_set(first), is_set(blank));
    let text = format!("{}\n", text_of(value));
    let lines = lines(&text, false);
    let before = match width {
        Some(width) if width.as_str().is_some() => text_of(&width),
        width => {
            let n = width.map_or(Ok(4), usize::try_from)?;
            if n.saturating_mul(lines.len()) > MAX_OUTPUT_BYTES {
                return Err(too_large());
            }
            " ".repeat(n)
        }
    };
    let n_bytes = before.len().saturating_mul(lines.len());
    if n_bytes > MAX_OUTPUT_BYTES {
        return Err(too_large());
    }
    state.consume_fuel(((n_bytes + text.len()) / 64) as u64)?;
    let mut out = String::with_capacity(n_bytes + text.len());
    for (idx, line) in lines.into_iter().enumerate() {
        if idx > 0 {
            out.push('\n');
        }
        if if idx == 0 { first } else { blank || !line.is_empty() } {
            out.push_str(&before);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// `wordwrap(width, break_long_words, wrapstring, break_on_hyphens)`.
pub(super) fn wordwrap(
    state: &mut State,
    value: &Value,
    given: Rest<Value>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let names = ["width", "break_long_words", "wrapstring", "break_on_hyphens"];
    let [width, long_words, wrap_string, hyphens] = arguments(&given, &kwargs, names)?;
    let is_set = |value: Option<Value>| value.is_none_or(|value| value.is_true());
    let width = width.map_or(Ok(79), usize::try_from)?;
    if width == 0 {
        return Err(wrong("wordwrap: expected a width above 0"));
    }
    let wrap_string = wrap_string.filter(|text| !text.is_none());
    let between = wrap_string.map_or_else(|| "\n".to_owned(), |text| text_of(&text));
    let (breaks_words, at_hyphens) = (is_set(long_words), is_set(hyphens));
    let text = text_of(value);
    // At most a line a character.
    if text.len().saturating_mul(between.len().max(1)) > MAX_OUTPUT_BYTES {
        return Err(too_large());
    }
    state.consume_fuel((text.len() / 8) as u64)?;
    let wrapped: Vec<String> = lines(&text, false)
        .into_iter()
        .map(|line| {
            let line: Vec<char> = line.chars().collect();
            wrap(&line, width, breaks_words, at_hyphens).join(&between)
        })
        .collect();
    Ok(wrapped.join(&between))
}

/// Arguments by place or name.
fn arguments<const N: usize>(
    given: &Rest<Value>,
    kwargs: &Kwargs,
    names: [&str; N],
) -> Result<[Option<Value>; N], Error> {
    if given.0.len() > N {
        return Err(Error::from(minijinja::ErrorKind::TooManyArguments));
    }
    let mut found = [const { None }; N];
    for (idx, name) in names.into_iter().enumerate() {
        let named: Option<Value> = kwargs.get(name)?;
        found[idx] = given.0.get(idx).cloned().or(named);
    }
    kwargs.assert_all_used()?;
    Ok(found)
}

/// `TextWrapper._wrap_chunks`: lines of at most `width` characters, blanks at their ends dropped.
fn wrap(line: &[char], width: usize, breaks_words: bool, at_hyphens: bool) -> Vec<String> {
    let is_blank = |range: &Range<usize>| line[range.clone()].iter().all(|c| is_space(*c));
    let mut waiting = chunks(line, at_hyphens);
    waiting.reverse();
    let mut wrapped: Vec<String> = Vec::new();
    while let Some(next) = waiting.last() {
        if !wrapped.is_empty() && is_blank(next) {
            waiting.pop();
            if waiting.is_empty() {
                break;
            }
        }
        let (mut taken, mut n) = (Vec::new(), 0);
        while let Some(chunk) = waiting.pop_if(|chunk| n + chunk.len() <= width) {
            n += chunk.len();
            taken.push(chunk);
        }
        if let Some(long) = waiting.pop_if(|chunk| chunk.len() > width) {
            if breaks_words {
                let n = piece(&line[long.clone()], width - n, at_hyphens);
                taken.push(long.start..long.start + n);
                if n < long.len() {
                    waiting.push(long.start + n..long.end);
                }
            } else if taken.is_empty() {
                taken.push(long);
            } else {
                waiting.push(long);
            }
        }
        let _ = taken.pop_if(|chunk| is_blank(chunk));
        if let (Some(first), Some(last)) = (taken.first(), taken.last()) {
            wrapped.push(line[first.start..last.end].iter().collect());
        }
    }
    wrapped
}

/// How much of a word that is longer than a line fits in `room` characters: up to its last hyphen there, if anything else stands before it.
fn piece(word: &[char], room: usize, at_hyphens: bool) -> usize {
    let hyphen = word[..room].iter().rposition(|c| *c == '-');
    match hyphen.filter(|at| at_hyphens && word[..*at].iter().any(|c| *c != '-')) {
        Some(at) => at + 1,
        None => room,
    }
}

/// Where a line may be broken: `TextWrapper.wordsep_re`, and `wordsep_simple_re` without hyphens.
fn chunks(line: &[char], at_hyphens: bool) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut start = 0;
    while start < line.len() {
        let end = end_of_chunk(line, start, at_hyphens);
        found.push(start..end);
        start = end;
    }
    found
}

fn end_of_chunk(line: &[char], start: usize, at_hyphens: bool) -> usize {
    let is_white = |at: usize| matches!(line[at], '\t' | '\n' | '\x0B' | '\x0C' | '\r' | ' ');
    let until = |from: usize, white: bool| {
        (from..line.len()).find(|at| is_white(*at) != white).unwrap_or(line.len())
    };
    if is_white(start) {
        return until(start, true);
    }
    let word_end = until(start, false);
    if !at_hyphens {
        return word_end;
    }
    let dashes = |at: usize| is_dash(line, at);
    if let Some(end) = dashes(start) {
        return end;
    }
    let is_end = |at: &usize| {
        let last = *at - 1;
        (last > start && line[last] == '-' && is_hyphen(line, last)) || dashes(*at).is_some()
    };
    // A hyphen belongs to the word before it, a dash does not.
    (start + 1..word_end).find(is_end).unwrap_or(word_end)
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn is_letter(c: char) -> bool {
    is_word(c) && !c.is_ascii_digit() && !is_decimal(c)
}

fn is_word_or_punctuation(c: char) -> bool {
    is_word(c) || "!\"'&.,?".contains(c)
}

/// The end of a dash (two hyphens or more between words) that begins here.
fn is_dash(line: &[char], at: usize) -> Option<usize> {
    let before = *line.get(at.checked_sub(1)?)?;
    let end = at + line[at..].iter().take_while(|c| **c == '-').count();
    let after = *line.get(end)?;
    (end >= at + 2 && is_word_or_punctuation(before) && is_word(after)).then_some(end)
}

/// Whether the hyphen there joins two words of two letters at least (or `a-b-`), so that a line may end with it.
fn is_hyphen(line: &[char], at: usize) -> bool {
    let back = |n: usize| at.checked_sub(n).map(|at| line[at]);
    let letter = |c: Option<char>| c.is_some_and(is_letter);
    let after_word = letter(back(1)) && letter(back(2));
    let after_hyphenated =
        back(1).is_some_and(is_word_or_punctuation) && back(2) == Some('-') && letter(back(3));
    let next = |n: usize| line.get(at + n).copied();
    let before_word =
        letter(next(1)) && (letter(next(2)) || (next(2) == Some('-') && letter(next(3))));
    (after_word || after_hyphenated) && before_word
}
