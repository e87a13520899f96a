//! Methods of Python's texts, lists and dicts.
//!
//! # Source
//!
//! Python 3.11, `str`, `list`, `dict`.

use minijinja::value::{Kwargs, Tuple, Value, ValueKind, from_args};
use minijinja::{Error, State};

use super::python::{is_decimal, is_namespace, is_space, wrong};
use super::{MAX_OUTPUT_BYTES, too_large};

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Left,
    Right,
    Center,
}

/// `str.ljust`, `rjust` and `center`: which side the text is on.
pub(super) fn padded(
    state: &State,
    text: &str,
    width: usize,
    fill: char,
    side: Side,
) -> Result<Value, Error> {
    let n = width.saturating_sub(text.chars().count());
    if n > MAX_OUTPUT_BYTES {
        return Err(too_large());
    }
    state.consume_fuel((n / 64) as u64)?;
    let left = match side {
        Side::Left => 0,
        Side::Right => n,
        Side::Center => n / 2 + (n & width & 1),
    };
    let mut out = String::with_capacity(text.len() + n * fill.len_utf8());
    out.extend(std::iter::repeat_n(fill, left));
    out.push_str(text);
    out.extend(std::iter::repeat_n(fill, n - left));
    Ok(out.into())
}

/// Methods of Python's `str` that pycompat lacks or has otherwise; none for the others.
pub(super) fn of_text(
    state: &State,
    text: &str,
    method: &str,
    args: &[Value],
) -> Result<Option<Value>, Error> {
    let all = |is: fn(char) -> bool| Value::from(!text.is_empty() && text.chars().all(is));
    let pad = |side| -> Result<Value, Error> {
        let (width, fill): (usize, Option<char>) = from_args(args)?;
        padded(state, text, width, fill.unwrap_or(' '), side)
    };
    let affix = || -> Result<&str, Error> { Ok(from_args::<(&str,)>(args)?.0) };
    Ok(Some(match method {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            let is_cut = |c: char| chars.map_or(is_space(c), |chars| chars.contains(c));
            let text = if method == "rstrip" { text } else { text.trim_start_matches(is_cut) };
            Value::from(if method == "lstrip" { text } else { text.trim_end_matches(is_cut) })
        }
        "split" | "rsplit" => {
            let kwargs: (Option<Value>, Option<Value>, Kwargs) = from_args(args)?;
            split(text, method == "rsplit", kwargs)?
        }
        "splitlines" => {
            let (keep, kwargs): (Option<bool>, Kwargs) = from_args(args)?;
            let named: Option<bool> = kwargs.get("keepends")?;
            kwargs.assert_all_used()?;
            lines(text, keep.or(named).unwrap_or(false)).into_iter().map(Value::from).collect()
        }
        "partition" | "rpartition" => partition(text, affix()?, method == "rpartition")?,
        "startswith" | "endswith" => Value::from(has_affix(text, method == "startswith", args)?),
        "find" | "rfind" | "index" | "rindex" | "count" => sought(text, method, args)?,
        "title" => Value::from(title(text)),
        "istitle" => Value::from(is_title(text)),
        "swapcase" => Value::from(text.chars().flat_map(swap_case).collect::<String>()),
        "casefold" => Value::from(text.to_lowercase().replace('ß', "ss")),
        "expandtabs" => {
            let (width, kwargs): (Option<usize>, Kwargs) = from_args(args)?;
            let named: Option<usize> = kwargs.get("tabsize")?;
            kwargs.assert_all_used()?;
            Value::from(expand_tabs(state, text, width.or(named).unwrap_or(8))?)
        }
        "isspace" => all(is_space),
        "isdecimal" => {
            all(|c| c.is_ascii_digit() || (c.is_numeric() && !c.is_ascii() && is_decimal(c)))
        }
        "removeprefix" => Value::from(text.strip_prefix(affix()?).unwrap_or(text)),
        "removesuffix" => Value::from(text.strip_suffix(affix()?).unwrap_or(text)),
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let (sign, digits) = match text.strip_prefix(['+', '-']) {
                Some(digits) => (&text[..1], digits),
                None => ("", text),
            };
            let rest = padded(state, digits, width.saturating_sub(sign.len()), '0', Side::Right)?;
            Value::from(format!("{sign}{rest}"))
        }
        "ljust" => pad(Side::Left)?,
        "rjust" => pad(Side::Right)?,
        "center" => pad(Side::Center)?,
        _ => return Ok(None),
    }))
}

/// The same of lists, tuples and dicts. Values do not change, so a copy is the value.
pub(super) fn of_container(
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Option<Value>, Error> {
    let is_list = value.kind() == ValueKind::Seq;
    let is_dict = value.kind() == ValueKind::Map && !is_namespace(value);
    match method {
        "copy" if is_list || is_dict => {
            let () = from_args(args)?;
            Ok(Some(value.clone()))
        }
        "index" if is_list => {
            let (item, start, end): (&Value, Option<i64>, Option<i64>) = from_args(args)?;
            let items: Vec<Value> = value.try_iter()?.collect();
            let (start, end) = indices(items.len(), start, end);
            let at = (start..end.min(items.len())).find(|at| items[*at] == *item);
            Ok(Some(Value::from(at.ok_or_else(|| wrong("the item is not in the list"))?)))
        }
        _ => Ok(None),
    }
}

/// Python's `start` and `end` of `n` items: negative ones count from the end. The start may lie behind the end.
fn indices(n: usize, start: Option<i64>, end: Option<i64>) -> (usize, usize) {
    let from_start = |at: i64| match usize::try_from(at) {
        Ok(at) => at,
        Err(_) => n.saturating_sub(usize::try_from(at.unsigned_abs()).unwrap_or(usize::MAX)),
    };
    (start.map_or(0, from_start), end.map_or(n, |at| from_start(at).min(n)))
}

/// The part of a text between two indices of characters, and where it begins; none where it begins behind its end.
fn part(text: &str, start: Option<i64>, end: Option<i64>) -> Option<(usize, &str)> {
    if start.is_none() && end.is_none() {
        return Some((0, text));
    }
    let byte = |at: usize| text.char_indices().nth(at).map_or(text.len(), |(byte, _)| byte);
    let n = text.chars().count();
    let (start, end) = indices(n, start, end);
    (start <= end).then(|| (start, &text[byte(start)..byte(end)]))
}

/// `str.startswith` and `endswith`, of a text or any of several.
fn has_affix(text: &str, at_start: bool, args: &[Value]) -> Result<bool, Error> {
    let (affix, start, end): (&Value, Option<i64>, Option<i64>) = from_args(args)?;
    let Some((_, text)) = part(text, start, end) else { return Ok(false) };
    let has = |affix: &Value| -> Result<bool, Error> {
        let affix = affix
            .as_str()
            .ok_or_else(|| wrong("startswith and endswith: expected a text or a tuple of texts"))?;
        Ok(if at_start { text.starts_with(affix) } else { text.ends_with(affix) })
    };
    if !matches!(affix.kind(), ValueKind::Seq | ValueKind::Iterable) {
        return has(affix);
    }
    for one in affix.try_iter()? {
        if has(&one)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// `str.find`, `rfind`, `index`, `rindex` and `count`, in characters.
fn sought(text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let (what, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
    let part = part(text, start, end);
    if method == "count" {
        return Ok(Value::from(part.map_or(0, |(_, text)| text.matches(what).count())));
    }
    let found = part.and_then(|(first, text)| {
        let at = if method.starts_with('r') { text.rfind(what) } else { text.find(what) }?;
        Some(first + text[..at].chars().count())
    });
    match found {
        Some(at) => Ok(Value::from(at)),
        None if method.ends_with("find") => Ok(Value::from(-1)),
        None => Err(wrong("substring not found")),
    }
}

/// `str.expandtabs`: up to the next column that `width` divides; columns begin anew at an end of line.
fn expand_tabs(state: &State, text: &str, width: usize) -> Result<String, Error> {
    let n_tabs = text.matches('\t').count();
    if n_tabs.saturating_mul(width) > MAX_OUTPUT_BYTES {
        return Err(too_large());
    }
    state.consume_fuel((n_tabs * width / 64) as u64)?;
    let (mut out, mut column) = (String::with_capacity(text.len()), 0);
    for c in text.chars() {
        match c {
            '\t' => {
                let n = if width == 0 { 0 } else { width - column % width };
                out.extend(std::iter::repeat_n(' ', n));
                column += n;
            }
            _ => {
                out.push(c);
                column = if matches!(c, '\n' | '\r') { 0 } else { column + 1 };
            }
        }
    }
    Ok(out)
}

/// `str.istitle`: upper case begins words and nothing else does; there is a letter.
fn is_title(text: &str) -> bool {
    let (mut after_letter, mut has_letter) = (false, false);
    for c in text.chars() {
        let is_cased = c.is_uppercase() || c.is_lowercase();
        if is_cased && c.is_uppercase() == after_letter {
            return false;
        }
        has_letter |= is_cased;
        after_letter = is_cased;
    }
    has_letter
}

fn swap_case(c: char) -> Vec<char> {
    if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
}

/// `str.title`: a letter after anything else is a beginning, also after an apostrophe.
fn title(text: &str) -> String {
    let mut after_letter = false;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match after_letter {
            true => out.extend(c.to_lowercase()),
            false => out.extend(c.to_uppercase()),
        }
        after_letter = c.is_alphabetic();
    }
    out
}

fn split(
    text: &str,
    from_right: bool,
    (separator, most, kwargs): (Option<Value>, Option<Value>, Kwargs),
) -> Result<Value, Error> {
    let named: (Option<Value>, Option<Value>) = (kwargs.get("sep")?, kwargs.get("maxsplit")?);
    kwargs.assert_all_used()?;
    let separator = separator.or(named.0).filter(|value| !value.is_none());
    let most = match most.or(named.1).map(i64::try_from).transpose()? {
        Some(most @ 0..) => usize::try_from(most).unwrap_or(usize::MAX),
        _ => usize::MAX,
    };
    let pieces: Vec<&str> = match &separator {
        None => split_at_space(text, most, from_right),
        Some(separator) => {
            let separator =
                separator.as_str().ok_or_else(|| wrong("split: a separator must be a string"))?;
            if separator.is_empty() {
                return Err(wrong("empty separator"));
            }
            if from_right {
                let mut pieces: Vec<&str> =
                    text.rsplitn(most.saturating_add(1), separator).collect();
                pieces.reverse();
                pieces
            } else {
                text.splitn(most.saturating_add(1), separator).collect()
            }
        }
    };
    Ok(pieces.into_iter().map(Value::from).collect())
}

fn trimmed(text: &str, from_right: bool) -> &str {
    match from_right {
        true => text.trim_end_matches(is_space),
        false => text.trim_start_matches(is_space),
    }
}

/// Runs of white space part the pieces; what is left after `most` of them stays as it is, but for the side it was cut from.
fn split_at_space(text: &str, most: usize, from_right: bool) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut rest = trimmed(text, from_right);
    while pieces.len() < most && !rest.is_empty() {
        let cut = if from_right { rest.rfind(is_space) } else { rest.find(is_space) };
        let Some(at) = cut else { break };
        let width = rest[at..].chars().next().map_or(1, char::len_utf8);
        let (before, after) = (&rest[..at], &rest[at + width..]);
        let (piece, left) = if from_right { (after, before) } else { (before, after) };
        pieces.push(piece);
        rest = trimmed(left, from_right);
    }
    if !rest.is_empty() {
        pieces.push(rest);
    }
    if from_right {
        pieces.reverse();
    }
    pieces
}

/// `str.splitlines`.
pub(super) fn lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let is_end = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\x0B' | '\x0C' | '\x1C'..='\x1E' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut out = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let line = rest.find(is_end).unwrap_or(rest.len());
        let end = match rest[line..].chars().next() {
            Some('\r') if rest[line..].starts_with("\r\n") => 2,
            Some(c) => c.len_utf8(),
            None => 0,
        };
        out.push(&rest[..if keep_ends { line + end } else { line }]);
        rest = &rest[line + end..];
    }
    out
}

fn partition(text: &str, separator: &str, from_right: bool) -> Result<Value, Error> {
    if separator.is_empty() {
        return Err(wrong("empty separator"));
    }
    let cut = if from_right { text.rsplit_once(separator) } else { text.split_once(separator) };
    let parts = match (cut, from_right) {
        (Some((before, after)), _) => [before, separator, after],
        (None, false) => [text, "", ""],
        (None, true) => ["", "", text],
    };
    Ok(Value::from(Tuple::from(parts.map(Value::from))))
}
