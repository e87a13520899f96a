//! What Python's texts, numbers and Jinja2's filters do that minijinja's do otherwise, or not at all.
//!
//! # Source
//!
//! Python 3.11, `str`; Jinja2 3.1, `filters.py`, `tests.py`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use minijinja::value::{Kwargs, Object, ObjectRepr, Rest, Value, ValueKind, from_args};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State};
use minijinja_contrib::{filters, globals, pycompat};

use super::methods::{self, Side, padded};
use super::source::STORE;
use super::{check_extent, check_widths, wrap};

/// Adds everything here to an environment.
pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(|state, value, method, args| {
        if method == "format" {
            check_widths(state, value.as_str().unwrap_or_default(), args)?;
        }
        let own = match value.as_str() {
            Some(text) => methods::of_text(state, text, method, args)?,
            None => methods::of_container(value, method, args)?,
        };
        own.map_or_else(|| pycompat::unknown_method_callback(state, value, method, args), Ok)
    });
    environment.set_formatter(|out, state, value| {
        if !matches!(state.auto_escape(), AutoEscape::None) {
            return minijinja::escape_formatter(out, state, value);
        }
        let written = match value.kind() {
            ValueKind::Undefined => return Ok(()),
            ValueKind::Number if is_float(value) => out.write_str(&float(value)),
            ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => {
                check_extent(value)?;
                out.write_str(&repr(value))
            }
            _ => write!(out, "{value}"),
        };
        written.map_err(|_| Error::new(ErrorKind::WriteFailure, "formatting failed"))
    });
    // Python's None is not iterable; minijinja's is.
    environment.add_test("iterable", |value: &Value| {
        !value.is_none() && (value.as_str().is_some() || value.try_iter().is_ok())
    });
    // Whatever has a length and items.
    environment.add_test("sequence", |value: &Value| {
        let kinds = [ValueKind::Undefined, ValueKind::String, ValueKind::Seq, ValueKind::Map];
        kinds.contains(&value.kind())
    });
    environment.add_filter(STORE, store);
    environment.add_filter("attr", |value: &Value, name: &Value| {
        // Items are no attributes in Python; namespaces have attributes only.
        let is_dict = value.kind() == ValueKind::Map && !is_namespace(value);
        if is_dict { Ok(Value::UNDEFINED) } else { value.get_item(name) }
    });
    environment.add_filter("string", |value: &Value| {
        check_extent(value)?;
        Ok::<_, Error>(if value.as_str().is_some() { value.clone() } else { text_of(value).into() })
    });
    environment.add_filter("trim", |value: &Value, chars: Option<&str>| {
        Ok::<_, Error>(match chars {
            Some(chars) => strip_chars(&text_of(value), chars).to_owned(),
            None => strip(&text_of(value)).to_owned(),
        })
    });
    environment.add_filter("e", escaped);
    environment.add_filter("escape", escaped);
    environment.add_filter("forceescape", |value: &Value| escape(&text_of(value)));
    environment.add_filter("center", |state: &mut State, value: &Value, width: Option<usize>| {
        padded(state, &text_of(value), width.unwrap_or(80), ' ', Side::Center)
    });
    environment.add_filter("wordcount", |value: &Value| {
        let text = text_of(value);
        let words = text.split(|c: char| !(c.is_alphanumeric() || c == '_'));
        words.filter(|word| !word.is_empty()).count()
    });
    environment.add_filter("wordwrap", wrap::wordwrap);
    environment.add_filter("indent", wrap::indent);
    environment.add_filter("unique", unique);
    environment.add_filter("urlencode", urlencode);
    environment.add_filter("striptags", filters::striptags);
    environment.add_filter("truncate", truncate);
    environment.add_filter("filesizeformat", |value: &Value, binary: Option<bool>| {
        let number = f64::try_from(value.clone()).ok();
        let number = number.or_else(|| value.as_str()?.trim().parse().ok());
        let number = number.ok_or_else(|| wrong("filesizeformat: not a number"))?;
        Ok::<_, Error>(filters::filesizeformat(number, binary))
    });
    environment.add_filter("int", int);
    environment.add_filter("float", |value: &Value, default: Option<Value>, kwargs: Kwargs| {
        let named: Option<Value> = kwargs.get("default")?;
        kwargs.assert_all_used()?;
        let number = match value.as_str() {
            Some(text) => python_number(text).and_then(|text| text.parse::<f64>().ok()),
            None => f64::try_from(value.clone()).ok(),
        };
        let default = default.or(named).unwrap_or_else(|| Value::from(0.0));
        Ok::<_, Error>(number.map_or(default, Value::from))
    });
    environment.add_function("joiner", globals::joiner);
    environment.add_function("cycler", |items: Rest<Value>| match items.0.is_empty() {
        true => Err(wrong("cycler: at least one item has to be provided")),
        false => Ok(Value::from_object(Cycler { items: items.0, at: AtomicUsize::new(0) })),
    });
    environment
        .add_function("lipsum", || Err::<Value, _>(wrong("lipsum: random text is not supported")));
    environment.add_function("dict", dict);
    environment.add_global("self", Value::from_pairs(std::iter::empty::<(&str, Value)>()));
}

pub(super) fn wrong(what: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, what)
}

/// Python's idea of white space: Unicode's, and four separators of ASCII.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1C'..='\x1F').contains(&c)
}

fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

fn strip_chars<'a>(text: &'a str, chars: &str) -> &'a str {
    text.trim_matches(|c| chars.contains(c))
}

/// A number as Python's `int` and `float` read it, ready for Rust: without white space and digit separators.
fn python_number(text: &str) -> Option<String> {
    let text = strip(text);
    let digits = text.trim_start_matches(['+', '-']);
    let is_fine = !digits.starts_with('_') && !digits.ends_with('_') && !digits.contains("__");
    let text = text.strip_prefix('+').unwrap_or(text);
    is_fine.then(|| text.chars().filter(|c| *c != '_').map(ascii_digit).collect())
}

/// Decimal digits of other scripts come in runs of ten that begin at a multiple of ten or of sixteen, mostly.
pub(super) fn is_decimal(c: char) -> bool {
    matches!(u32::from(c),
        0x660..=0x669 | 0x6F0..=0x6F9 | 0x7C0..=0x7C9 | 0x966..=0x96F | 0x9E6..=0x9EF | 0xA66..=0xA6F
        | 0xAE6..=0xAEF | 0xB66..=0xB6F | 0xBE6..=0xBEF | 0xC66..=0xC6F | 0xCE6..=0xCEF | 0xD66..=0xD6F
        | 0xE50..=0xE59 | 0xED0..=0xED9 | 0xF20..=0xF29 | 0x1040..=0x1049 | 0x17E0..=0x17E9
        | 0x1810..=0x1819 | 0xFF10..=0xFF19)
}

/// Digits of other scripts count as those of ASCII.
fn ascii_digit(c: char) -> char {
    if c.is_ascii() || !is_decimal(c) {
        return c;
    }
    // The runs of Indian scripts begin at a 6 in hexadecimal, the others at a 0.
    let code = u32::from(c);
    let first = if (0x900..0xE00).contains(&code) { 6 } else { 0 };
    char::from_digit((code & 0xF) - first, 10).unwrap_or(c)
}

/// Jinja2's `int`: whole numbers, also out of text, else `default` (0).
fn int(
    value: &Value,
    default: Option<Value>,
    base: Option<u32>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let default = default.or(kwargs.get("default")?).unwrap_or_else(|| Value::from(0));
    let base = base.or(kwargs.get("base")?).unwrap_or(10);
    kwargs.assert_all_used()?;
    let whole = |number: f64| number.is_finite().then(|| Value::from(number.trunc() as i128));
    let number = match (value.as_str(), value.kind()) {
        (Some(text), _) => python_number(text).and_then(|text| {
            let lower = text.to_lowercase();
            let prefix = match base {
                16 => "0x",
                8 => "0o",
                2 => "0b",
                _ => "",
            };
            let digits = lower.strip_prefix(prefix).unwrap_or(&lower);
            let base = if (2..=36).contains(&base) { base } else { 10 };
            let exact = i128::from_str_radix(digits, base).ok().map(Value::from);
            exact.or_else(|| whole(text.parse().ok()?))
        }),
        (None, ValueKind::Number) if is_float(value) => whole(f64::try_from(value.clone())?),
        (None, ValueKind::Number) => Some(value.clone()),
        (None, ValueKind::Bool) => Some(Value::from(i64::from(value.is_true()))),
        _ => None,
    };
    Ok(number.unwrap_or(default))
}

fn dict(entries: Option<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let mut pairs: Vec<(Value, Value)> = Vec::new();
    let mut put = |key: Value, value: Value| match pairs.iter_mut().find(|(known, _)| *known == key)
    {
        Some((_, known)) => *known = value,
        None => pairs.push((key, value)),
    };
    if let Some(entries) = entries {
        for entry in entries.try_iter()? {
            if entries.kind() == ValueKind::Map {
                let value = entries.get_item(&entry)?;
                put(entry, value);
            } else {
                let pair: Vec<Value> = entry.try_iter()?.collect();
                let Ok([key, value]) = <[Value; 2]>::try_from(pair) else {
                    return Err(wrong("dict: an entry must be a pair"));
                };
                put(key, value);
            }
        }
    }
    for key in kwargs.args() {
        put(Value::from(key), kwargs.get(key)?);
    }
    kwargs.assert_all_used()?;
    Ok(Value::from_pairs(pairs))
}

/// Jinja2's `unique(case_sensitive, attribute)`.
fn unique(
    state: &mut State,
    values: Value,
    case_sensitive: Option<bool>,
    attribute: Option<Value>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let case_sensitive = case_sensitive.or(kwargs.get("case_sensitive")?).unwrap_or(false);
    let attribute: Option<Value> = attribute.or(kwargs.get("attribute")?);
    kwargs.assert_all_used()?;
    let mut named = vec![("case_sensitive", Value::from(case_sensitive))];
    named.extend(attribute.map(|attribute| ("attribute", attribute)));
    minijinja::filters::unique(state, values, Kwargs::from_iter(named))
}

/// Jinja2's `truncate(length, killwords, end, leeway)`, with its default of five characters more.
fn truncate(value: &Value, given: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let argument = |at: usize, name: &str| -> Result<Option<Value>, Error> {
        let named: Option<Value> = kwargs.get(name)?;
        Ok(given.0.get(at).cloned().or(named))
    };
    let number = |value: Option<Value>, default: usize| value.map_or(Ok(default), usize::try_from);
    let text = text_of(value);
    let length = number(argument(0, "length")?, 255)?;
    let kill_words = argument(1, "killwords")?.is_some_and(|value| value.is_true());
    let end = argument(2, "end")?.map_or_else(|| "...".to_owned(), |end| text_of(&end));
    let leeway = number(argument(3, "leeway")?, 5)?;
    kwargs.assert_all_used()?;
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text);
    }
    let n_end = end.chars().count();
    if length < n_end {
        return Err(wrong("truncate: expected a length of at least that of the end"));
    }
    let kept: String = text.chars().take(length - n_end).collect();
    let kept = if kill_words {
        kept.as_str()
    } else {
        kept.rsplit_once(' ').map_or(kept.as_str(), |(words, _)| words)
    };
    Ok(format!("{kept}{end}"))
}

/// `urllib.parse.quote`; of pairs, a query.
fn urlencode(value: &Value) -> Result<String, Error> {
    fn quoted(text: &str, safe: &str, plus: bool) -> String {
        let mut out = String::with_capacity(text.len());
        for byte in text.bytes() {
            let c = char::from(byte);
            if c.is_ascii_alphanumeric() || "_.-~".contains(c) || safe.contains(c) {
                out.push(c);
            } else if plus && c == ' ' {
                out.push('+');
            } else {
                out.push_str(&format!("%{byte:02X}"));
            }
        }
        out
    }
    if value.as_str().is_some()
        || !matches!(value.kind(), ValueKind::Map | ValueKind::Seq | ValueKind::Iterable)
    {
        return Ok(quoted(&text_of(value), "/", false));
    }
    let mut parts = Vec::new();
    for entry in value.try_iter()? {
        let (key, value) = if value.kind() == ValueKind::Map {
            let found = value.get_item(&entry)?;
            (entry, found)
        } else {
            let pair: Vec<Value> = entry.try_iter()?.collect();
            let Ok([key, value]) = <[Value; 2]>::try_from(pair) else {
                return Err(wrong("urlencode: an entry must be a pair"));
            };
            (key, value)
        };
        parts.push(format!(
            "{}={}",
            quoted(&text_of(&key), "", true),
            quoted(&text_of(&value), "", true)
        ));
    }
    Ok(parts.join("&"))
}

/// Jinja2's `escape`: once only.
fn escaped(value: &Value) -> Result<Value, Error> {
    check_extent(value)?;
    Ok(match value.is_safe() {
        true => value.clone(),
        false => Value::from_safe_string(escape(&text_of(value))),
    })
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            _ => out.push(c),
        }
    }
    out
}

/// Passes `value` on to be stored in one of `namespaces`, unless they are in it: printing or comparing what contains itself has
/// no end. What can be stored is data; of macros, loops and the like nothing says what they hold.
fn store(state: &mut State, value: Value, namespaces: Rest<Value>) -> Result<Value, Error> {
    let value = match value.kind() {
        ValueKind::Iterable => value.try_iter()?.collect::<Vec<_>>().into(), // it may look into a namespace later
        _ => value,
    };
    let mut waiting = vec![value.clone()];
    let mut n_seen = 0u64;
    while let Some(found) = waiting.pop() {
        if found.as_object().is_none() {
            continue;
        }
        if namespaces.0.iter().any(|namespace| minijinja::tests::is_sameas(&found, namespace)) {
            return Err(wrong("a namespace cannot be stored in itself"));
        }
        let is_map = match found.kind() {
            ValueKind::Map => true,
            ValueKind::Seq => false,
            _ => return Err(wrong("only data can be stored in a namespace")),
        };
        for item in found.try_iter()? {
            n_seen += 1;
            if n_seen.is_multiple_of(64) {
                state.consume_fuel(1)?;
            }
            if is_map {
                waiting.push(found.get_item(&item)?);
            }
            waiting.push(item);
        }
    }
    Ok(value)
}

pub(super) fn is_namespace(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.type_name().ends_with("Namespace"))
}

fn is_float(value: &Value) -> bool {
    value.kind() == ValueKind::Number && !value.is_integer()
}

/// Python's `repr` of a float: the shortest digits, an exponent from 16 digits on.
pub(super) fn float(value: &Value) -> String {
    let Ok(number) = f64::try_from(value.clone()) else { return value.to_string() };
    if !number.is_finite() {
        return if number.is_nan() {
            "nan"
        } else if number > 0.0 {
            "inf"
        } else {
            "-inf"
        }
        .to_owned();
    }
    let scientific = format!("{number:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else { return scientific };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if number == 0.0 || (-4..16).contains(&exponent) {
        let text = number.to_string();
        return if text.contains('.') { text } else { format!("{text}.0") };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// Python's `str`.
pub(super) fn text_of(value: &Value) -> String {
    match value.as_str() {
        Some(text) => text.to_owned(),
        None if value.is_undefined() => String::new(),
        None => repr(value),
    }
}

/// Python's `repr`.
fn repr(value: &Value) -> String {
    if let Some(text) = value.as_str() {
        return repr_of_text(text);
    }
    match value.kind() {
        ValueKind::Number if is_float(value) => float(value),
        ValueKind::Seq => {
            let items: Vec<String> =
                value.try_iter().into_iter().flatten().map(|item| repr(&item)).collect();
            match (value.is_tuple(), items.as_slice()) {
                (false, _) => format!("[{}]", items.join(", ")),
                (true, [one]) => format!("({one},)"),
                (true, _) => format!("({})", items.join(", ")),
            }
        }
        ValueKind::Map if !is_namespace(value) => {
            let entries = value.try_iter().into_iter().flatten().map(|key| {
                let found = value.get_item(&key).unwrap_or_default();
                format!("{}: {}", repr(&key), repr(&found))
            });
            format!("{{{}}}", entries.collect::<Vec<_>>().join(", "))
        }
        _ => value.to_string(),
    }
}

fn repr_of_text(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            _ if c == quote => out.extend(['\\', c]),
            _ if is_printable(c) => out.push(c),
            _ => out.push_str(&match u32::from(c) {
                code @ 0..=0xFF => format!("\\x{code:02x}"),
                code @ 0x100..=0xFFFF => format!("\\u{code:04x}"),
                code => format!("\\U{code:08x}"),
            }),
        }
    }
    out.push(quote);
    out
}

/// Jinja2's `cycler`: one item after the other, without end.
#[derive(Debug)]
struct Cycler {
    items: Vec<Value>,
    at: AtomicUsize,
}

impl Object for Cycler {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let current = self.at.load(Ordering::Relaxed) % self.items.len();
        (key.as_str() == Some("current")).then(|| self.items[current].clone())
    }

    fn call_method(
        self: &Arc<Self>,
        _: &mut State<'_, '_>,
        method: &str,
        args: &[Value],
    ) -> Result<Value, Error> {
        let () = from_args(args)?;
        match method {
            "next" => {
                Ok(self.items[self.at.fetch_add(1, Ordering::Relaxed) % self.items.len()].clone())
            }
            "reset" => {
                self.at.store(0, Ordering::Relaxed);
                Ok(().into())
            }
            _ => Err(Error::from(ErrorKind::UnknownMethod)),
        }
    }

    fn render(self: &Arc<Self>, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("<Cycler>") // what it holds may hold it
    }
}

/// Neither control, format, private nor separator, but for the space.
fn is_printable(c: char) -> bool {
    let is_format = matches!(u32::from(c),
        0xAD | 0x600..=0x605 | 0x61C | 0x6DD | 0x70F | 0x890..=0x891 | 0x8E2 | 0x180E | 0x200B..=0x200F
        | 0x202A..=0x202E | 0x2060..=0x206F | 0xFEFF | 0xFFF0..=0xFFFB | 0x110BD | 0x110CD
        | 0x13430..=0x1343F | 0x1BCA0..=0x1BCA3 | 0x1D173..=0x1D17A | 0xE0000..=0xE0FFF
        | 0xE000..=0xF8FF | 0xF0000..=0x10FFFF);
    c == ' ' || !(c.is_control() || c.is_whitespace() || is_format)
}
