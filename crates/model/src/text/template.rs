//! Chat templates: the Jinja programs that turn a conversation into the text a model was trained on.
//!
//! A template comes with the model, from anyone. It runs in minijinja, which has no way out to the
//! system, with a bound on instructions, output and source size. The environment is the one that
//! transformers gives templates, so the text is the same, character for character.

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use arete_records::{Message, Role};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{AutoEscape, Environment, ErrorKind, State};
use serde::Serialize;

use crate::Error;

mod methods;
mod python;
mod source;
mod wrap;

/// A template longer than this is refused; the longest published ones have about 30 KB.
pub(crate) const MAX_SOURCE_BYTES: u64 = 256 << 10;
/// Instructions a rendering may take, and 64 times as many bytes it may create.
const MAX_FUEL: u64 = 500_000;
/// The longest text a template may write.
const MAX_OUTPUT_BYTES: usize = 4 << 20;
/// Stack for compiling a template, whose operators are levels of a tree, and for rendering one that has `namespace`: only
/// through one can a loop nest a list in itself, some 50,000 deep before its instructions end, and printing or freeing that
/// takes about 400 bytes of stack a level. Everything else nests at most 500 deep.
const STACK_BYTES: usize = 64 << 20;
/// The widest indentation of JSON; the usual ones are 2 and 4.
const MAX_INDENT: i64 = 100;
/// The name of the one template in each environment.
const NAME: &str = "chat_template";

/// The day that templates asking for today's date are given, so that runs can be repeated.
/// It is the date Llama 3's own template falls back to.
pub const DEFAULT_DATE: Date = Date { year: 2024, month: 7, day: 26 };

/// A calendar day (proleptic Gregorian).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Date {
    /// Year, such as 2024.
    pub year: i32,
    /// Month, 1 to 12.
    pub month: u8,
    /// Day of the month, 1 to 31.
    pub day: u8,
}

/// A compiled chat template with the special tokens it may name.
///
/// Cloning is cheap.
#[derive(Clone)]
pub struct ChatTemplate(Arc<Inner>);

struct Inner {
    environment: Environment<'static>,
    path: PathBuf,
    source: String,
    variables: Vec<(String, String)>,
    refuses_system: OnceLock<bool>,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("path", &self.0.path).finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Compiles `source`; `path` names its origin in messages, `variables` are what the template
    /// knows beside the conversation (`bos_token`, `eos_token`, …).
    ///
    /// # Errors
    ///
    /// [`Error::TemplateBudget`] above 256 KiB, [`Error::Template`] if it does not compile.
    pub fn new(
        path: &Path,
        source: &str,
        variables: Vec<(&'static str, String)>,
    ) -> Result<Self, Error> {
        Self::with_date(path, source, variables, DEFAULT_DATE)
    }

    /// As [`Self::new`], with the day that `strftime_now` tells.
    ///
    /// # Errors
    ///
    /// As [`Self::new`].
    pub fn with_date(
        path: &Path,
        source: &str,
        variables: Vec<(&'static str, String)>,
        date: Date,
    ) -> Result<Self, Error> {
        let named = variables.into_iter().map(|(name, text)| (name.to_owned(), text));
        Self::compile(path, source, named.collect(), date)
    }

    /// As [`Self::with_date`], with variables whose names are the model's own.
    pub(crate) fn compile(
        path: &Path,
        source: &str,
        variables: Vec<(String, String)>,
        date: Date,
    ) -> Result<Self, Error> {
        if source.len() as u64 > MAX_SOURCE_BYTES {
            let path = path.to_path_buf();
            return Err(Error::TemplateBudget { path, what: "bytes", limit: MAX_SOURCE_BYTES });
        }
        if !source::is_shallow(source) {
            let (path, what) = (path.to_path_buf(), "operators in one tag, or branches of `if`");
            return Err(Error::TemplateBudget { path, what, limit: source::MAX_OPERATORS as u64 });
        }
        let mut environment = environment(date);
        let rewritten = source::rewritten(source);
        let compiled = on_large_stack(|| environment.add_template_owned(NAME, rewritten))?;
        compiled.map_err(|error| explain(path, &error))?;
        Ok(Self(Arc::new(Inner {
            environment,
            path: path.to_path_buf(),
            source: source.to_owned(),
            variables,
            refuses_system: OnceLock::new(),
        })))
    }

    /// The template's text, as the model's author wrote it.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.0.source
    }

    /// Where the template comes from, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The text of `messages`; with `add_generation_prompt`, followed by whatever opens an
    /// assistant's turn. The messages are rendered as they are: see [`Self::fit`] for templates
    /// that take no system message.
    ///
    /// # Errors
    ///
    /// [`Error::TemplateRefused`] if the template raises an exception, [`Error::TemplateBudget`] if
    /// it needs more than 500,000 instructions or writes more than 4 MiB, [`Error::Template`] if it
    /// fails.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, Error> {
        let inner = &*self.0;
        let messages: Value = messages
            .iter()
            .map(|m| Value::from_pairs([("role", m.role.name()), ("content", &m.content)]))
            .collect();
        // Special tokens that the model lacks stay undefined, as in transformers.
        let special =
            inner.variables.iter().map(|(name, text)| (name.as_str(), Value::from(text.as_str())));
        let context = Value::from_pairs(special.chain([
            ("messages", messages),
            ("add_generation_prompt", add_generation_prompt.into()),
            ("tools", ().into()),
            ("documents", ().into()),
        ]));
        let rendering = || -> Result<Vec<u8>, minijinja::Error> {
            let template = inner.environment.get_template(NAME)?;
            let mut text = Bounded(Vec::new());
            template.render_captured_to(context, &mut text)?;
            Ok(text.0)
        };
        let text = if inner.source.contains("namespace") {
            on_large_stack(rendering)?
        } else {
            rendering()
        };
        let text = text.map_err(|error| explain(&inner.path, &error))?;
        Ok(String::from_utf8(text).expect("minijinja writes UTF-8"))
    }

    /// Whether the template cannot keep a system message where it belongs: it raises an exception,
    /// leaves the text out, or moves it as the conversation grows (so that a reply sampled in one
    /// turn would be conditioned on other text in the next).
    #[must_use]
    pub fn refuses_system(&self) -> bool {
        *self.0.refuses_system.get_or_init(|| {
            let system = "Probe of the system role.";
            let opening = [Message::system(system), Message::user("Probe of the first turn.")];
            let mut grown = opening.to_vec();
            grown.push(Message::assistant("Probe of the reply."));
            grown.push(Message::user("Probe of the second turn."));
            // What opens the assistant's turn is left out: it can be more than what stands before a reply that is there (`<think>`).
            match (self.render(&opening, false), self.render(&grown, false)) {
                (Ok(opening), Ok(grown)) => {
                    !opening.contains(system) || !grown.starts_with(&opening)
                }
                _ => true,
            }
        })
    }

    /// The conversation in the form the template takes: unchanged, or, if the template refuses a
    /// system role, with the leading system text put before the first user's, an empty line
    /// between. The flag tells which, for the records.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if system text has no user turn to go to.
    pub fn fit<'a>(&self, messages: &'a [Message]) -> Result<(Cow<'a, [Message]>, bool), Error> {
        let n_system = messages.iter().take_while(|m| m.role == Role::System).count();
        if n_system == 0 || !self.refuses_system() {
            return Ok((Cow::Borrowed(messages), false));
        }
        let (system, rest) = messages.split_at(n_system);
        let [Message { role: Role::User, content }, rest @ ..] = rest else {
            return Err(Error::Invalid {
                name: "messages",
                expected: "a user turn after the system message, which this model's chat \
                           template cannot take on its own"
                    .to_owned(),
                got: match rest.first() {
                    Some(_) => "another role".to_owned(),
                    None => "the end of the conversation".to_owned(),
                },
            });
        };
        let mut text = String::new();
        for message in system {
            text.push_str(&message.content);
            text.push_str("\n\n");
        }
        text.push_str(content);
        let mut fitted = vec![Message::user(text)];
        fitted.extend_from_slice(rest);
        Ok((Cow::Owned(fitted), true))
    }
}

fn on_large_stack<T: Send>(
    call: impl FnOnce() -> Result<T, minijinja::Error> + Send,
) -> io::Result<Result<T, minijinja::Error>> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK_BYTES);
        let panicked = |_| Err(minijinja::Error::new(ErrorKind::InvalidOperation, "panicked"));
        let started = thread.spawn_scoped(scope, call).map_err(|error| {
            let what = format!("no memory for a stack of {STACK_BYTES} bytes ({error})");
            io::Error::new(io::ErrorKind::OutOfMemory, what)
        });
        Ok(started?.join().unwrap_or_else(panicked))
    })
}

/// The environment transformers gives to templates (`utils/chat_template_utils.py`,
/// `_cached_compile_jinja_template`).
fn environment(date: Date) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_syntax(
        SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .expect("the default delimiters are valid"),
    );
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(MAX_FUEL));
    python::add_to(&mut environment);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", move |format: &str| strftime(date, format));
    environment.add_filter("tojson", to_json);
    environment.add_filter("pprint", |value: &Value| {
        check_extent(value)?;
        Ok::<_, minijinja::Error>(minijinja::filters::pprint(value))
    });
    environment
}

/// Refuses containers that would print as more text than a template may write. Lists share their
/// items, so thirty lines of template make one that prints as gigabytes; fuel is only taken for
/// what has been printed.
fn check_extent(value: &Value) -> Result<(), minijinja::Error> {
    fn walk(value: &Value, left: &mut usize) -> Option<()> {
        let extent = value.as_str().map_or(1, |text| text.len().max(1));
        *left = left.checked_sub(extent)?;
        if matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::Iterable) {
            let is_map = value.kind() == ValueKind::Map;
            for item in value.try_iter().ok()? {
                if is_map {
                    walk(&value.get_item(&item).ok()?, left)?;
                }
                walk(&item, left)?;
            }
        }
        Some(())
    }
    let mut left = MAX_OUTPUT_BYTES;
    walk(value, &mut left).ok_or_else(too_large)
}

/// Widths and precisions of `str.format` are text that is made before anyone counts it. Every number in braces may be one, and
/// any argument where braces stand in braces.
fn check_widths(state: &State, text: &str, args: &[Value]) -> Result<(), minijinja::Error> {
    let (mut depth, mut is_nested, mut total, mut number) = (0_usize, false, 0_usize, 0_usize);
    for c in text.chars() {
        match c {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        is_nested |= depth > 1;
        match c.to_digit(10) {
            Some(digit) if depth > 0 => {
                number = number.saturating_mul(10).saturating_add(digit as usize);
            }
            _ => total = total.saturating_add(std::mem::take(&mut number)),
        }
    }
    total = total.saturating_add(number);
    if is_nested {
        let widths = args.iter().filter_map(|arg| usize::try_from(arg.clone()).ok());
        // Named arguments come as one map.
        let named = args.iter().filter(|arg| arg.kind() == ValueKind::Map);
        let named = named.flat_map(|arg| {
            let keys = arg.try_iter().into_iter().flatten();
            keys.filter_map(|key| usize::try_from(arg.get_item(&key).ok()?).ok())
        });
        total = widths.chain(named).fold(total, usize::saturating_add);
    }
    if total > MAX_OUTPUT_BYTES {
        return Err(too_large());
    }
    state.consume_fuel((total / 64) as u64)
}

fn too_large() -> minijinja::Error {
    minijinja::Error::new(ErrorKind::WriteFailure, "a value too large to print")
        .with_source(io::Error::other(OutputLimit))
}

/// What a template raised on purpose, told apart from its mistakes.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, "raised by the template")
        .with_source(Raised(message)))
}

/// Python's `json.dumps` with transformers' defaults: nothing escaped for HTML or ASCII.
fn to_json(state: &State, value: &Value, kwargs: Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<Value> = kwargs.get("indent")?;
    let ensure_ascii: Option<bool> = kwargs.get("ensure_ascii")?;
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let sort_keys: Option<bool> = kwargs.get("sort_keys")?;
    kwargs.assert_all_used()?;
    check_extent(value)?;
    let indent = indent.filter(|indent| !indent.is_none());
    if indent.as_ref().and_then(Value::as_i64).is_some_and(|indent| indent > MAX_INDENT) {
        return Err(too_large());
    }

    let escaped = minijinja::filters::tojson(
        value,
        indent.clone(),
        Kwargs::from_iter(std::iter::empty::<(&str, Value)>()),
    )?;
    let mut json = without_html_escapes(escaped.as_str().unwrap_or_default());
    // As minijinja's own filter charges: 16 units a byte, 64 units a fuel.
    state.consume_fuel(json.len() as u64 / 4)?;
    if sort_keys == Some(true) || separators.is_some() {
        let separators = match separators.as_deref() {
            None => [", ".to_owned(), ": ".to_owned()],
            Some([item, key]) => [item.clone(), key.clone()],
            Some(_) => return Err(unsupported("tojson: separators must be a pair")),
        };
        if indent.is_some() {
            return Err(unsupported("tojson: indent together with sort_keys or separators"));
        }
        json = reformat(&json, &separators, sort_keys == Some(true))?;
    }
    json = with_python_floats(&json);
    if ensure_ascii == Some(true) {
        json = in_ascii(&json);
    }
    Ok(Value::from(json)) // a plain text, as transformers' own filter gives
}

/// Writes the floats of JSON as Python does: an exponent has a sign and two digits.
fn with_python_floats(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    let (mut rest, mut in_text) = (json, false);
    while let Some(c) = rest.chars().next() {
        let is_number = !in_text && (c == '-' || c.is_ascii_digit());
        let n_bytes = if is_number {
            let is_part = |c: char| c.is_ascii_digit() || "+-.eE".contains(c);
            rest.find(|c| !is_part(c)).unwrap_or(rest.len())
        } else if in_text && c == '\\' {
            1 + rest[1..].chars().next().map_or(0, char::len_utf8)
        } else {
            c.len_utf8()
        };
        in_text ^= c == '"';
        let (piece, after) = rest.split_at(n_bytes);
        let is_float = is_number && piece.contains(['.', 'e', 'E']);
        match piece.parse::<f64>().ok().filter(|_| is_float) {
            Some(number) => text.push_str(&python::float(&Value::from(number))),
            None => text.push_str(piece),
        }
        rest = after;
    }
    text
}

fn unsupported(what: &'static str) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, what)
}

/// Undoes the four escapes that minijinja adds so that JSON can stand in HTML.
fn without_html_escapes(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    let mut rest = json;
    while let Some(at) = rest.find('\\') {
        text.push_str(&rest[..at]);
        let plain = match rest.get(at..at + 6) {
            Some("\\u003c") => Some('<'),
            Some("\\u003e") => Some('>'),
            Some("\\u0026") => Some('&'),
            Some("\\u0027") => Some('\''),
            _ => None,
        };
        // Otherwise a backslash and the character it escapes, which may be a backslash.
        let next = rest[at + 1..].chars().next().map_or(0, char::len_utf8);
        match plain {
            Some(plain) => {
                text.push(plain);
                rest = &rest[at + 6..];
            }
            None => {
                text.push_str(&rest[at..at + 1 + next]);
                rest = &rest[at + 1 + next..];
            }
        }
    }
    text.push_str(rest);
    text
}

/// Rewrites JSON with other separators, `[between items, after keys]`, and keys in order.
fn reformat(
    json: &str,
    separators: &[String; 2],
    sort_keys: bool,
) -> Result<String, minijinja::Error> {
    struct Separated<'a>(&'a [String; 2]);
    impl serde_json::ser::Formatter for Separated<'_> {
        fn begin_array_value<W: ?Sized + io::Write>(
            &mut self,
            writer: &mut W,
            first: bool,
        ) -> io::Result<()> {
            if first { Ok(()) } else { writer.write_all(self.0[0].as_bytes()) }
        }
        fn begin_object_key<W: ?Sized + io::Write>(
            &mut self,
            writer: &mut W,
            first: bool,
        ) -> io::Result<()> {
            if first { Ok(()) } else { writer.write_all(self.0[0].as_bytes()) }
        }
        fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
            writer.write_all(self.0[1].as_bytes())
        }
    }
    let failed = |error: serde_json::Error| {
        minijinja::Error::new(ErrorKind::BadSerialization, "tojson").with_source(error)
    };
    let mut value: serde_json::Value = serde_json::from_str(json).map_err(failed)?;
    if sort_keys {
        value.sort_all_objects();
    }
    let mut text = Bounded(Vec::new());
    let mut serializer = serde_json::Serializer::with_formatter(&mut text, Separated(separators));
    value.serialize(&mut serializer).map_err(failed)?;
    Ok(String::from_utf8(text.0).expect("serde_json writes UTF-8"))
}

fn in_ascii(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_ascii() {
            text.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                text.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    text
}

/// C's `strftime` at midnight of `date`, in the C locale.
fn strftime(date: Date, format: &str) -> Result<String, minijinja::Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] =
        ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
    let Date { year, month, day } = date;
    let month_name = MONTHS[usize::from(month.clamp(1, 12)) - 1];
    let day_name = DAYS[weekday(date)];
    let mut text = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        let mut code = chars.next();
        let unpadded = code == Some('-');
        if unpadded {
            code = chars.next();
        }
        let two = |number: u8| {
            if unpadded { number.to_string() } else { format!("{number:02}") }
        };
        match code {
            Some('Y') => text.push_str(&year.to_string()),
            Some('y') => text.push_str(&format!("{:02}", year.rem_euclid(100))),
            Some('m') => text.push_str(&two(month)),
            Some('d') => text.push_str(&two(day)),
            Some('e') => text.push_str(&format!("{day:2}")),
            Some('B') => text.push_str(month_name),
            Some('b' | 'h') => text.push_str(&month_name[..3]),
            Some('A') => text.push_str(day_name),
            Some('a') => text.push_str(&day_name[..3]),
            Some('H' | 'M' | 'S') => text.push_str(&two(0)),
            Some('I') => text.push_str(&two(12)),
            Some('p') => text.push_str("AM"),
            Some('F') => text.push_str(&format!("{year}-{month:02}-{day:02}")),
            Some('T') => text.push_str("00:00:00"),
            Some('j') => {
                let day = day_of_year(date);
                text.push_str(&if unpadded { day.to_string() } else { format!("{day:03}") });
            }
            Some('c') => {
                let (day_name, month_name) = (&day_name[..3], &month_name[..3]);
                text.push_str(&format!("{day_name} {month_name} {day:2} 00:00:00 {year}"));
            }
            Some('x' | 'D') => {
                text.push_str(&format!("{month:02}/{day:02}/{:02}", year.rem_euclid(100)));
            }
            Some('X') => text.push_str("00:00:00"),
            Some('R') => text.push_str("00:00"),
            Some('U') => text.push_str(&two(week_of_year(date, 0))),
            Some('W') => text.push_str(&two(week_of_year(date, 1))),
            Some('C') => text.push_str(&format!("{:02}", year.div_euclid(100))),
            Some('P') => text.push_str("am"),
            Some('r') => text.push_str("12:00:00 AM"),
            Some('k') => text.push_str(if unpadded { "0" } else { " 0" }),
            Some('l') => text.push_str("12"),
            Some('Z' | 'z') => {} // a time without a zone
            Some('w') => text.push_str(&weekday(date).to_string()),
            Some('u') => text.push_str(&((weekday(date) + 6) % 7 + 1).to_string()),
            Some('f') => text.push_str("000000"),
            Some('n') => text.push('\n'),
            Some('t') => text.push('\t'),
            Some('%') => text.push('%'),
            other => {
                let code = other.map_or_else(|| "its end".to_owned(), |code| format!("%{code}"));
                let message = format!("strftime_now: {code} in {format:?} is not supported");
                return Err(minijinja::Error::new(ErrorKind::InvalidOperation, message));
            }
        }
    }
    Ok(text)
}

/// Day of the year, from 1.
fn day_of_year(date: Date) -> u32 {
    let leap = date.year % 4 == 0 && (date.year % 100 != 0 || date.year % 400 == 0);
    let lengths = [31, 28 + u32::from(leap), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let before = usize::from(date.month.clamp(1, 12)) - 1;
    lengths[..before].iter().sum::<u32>() + u32::from(date.day)
}

/// Week of the year, from 0: weeks begin on a day of the week (0 = Sunday), the first one on the first such day.
fn week_of_year(date: Date, first: u32) -> u8 {
    let since = (u32::try_from(weekday(date)).unwrap_or(0) + 7 - first) % 7;
    u8::try_from((day_of_year(date) + 6 - since) / 7).unwrap_or(u8::MAX)
}

/// Day of the week, 0 = Sunday (Sakamoto's method).
fn weekday(date: Date) -> usize {
    const OFFSETS: [i32; 12] = [0, 3, 2, 5, 0, 3, 5, 1, 4, 6, 2, 4];
    let month = usize::from(date.month.clamp(1, 12));
    let year = if month < 3 { date.year - 1 } else { date.year };
    let days = year + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    let day = days + OFFSETS[month - 1] + i32::from(date.day);
    usize::try_from(day.rem_euclid(7)).expect("a remainder of 7 is in 0..7")
}

/// Collects output up to the limit.
struct Bounded(Vec<u8>);

#[derive(Debug, thiserror::Error)]
#[error("output limit reached")]
struct OutputLimit;

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT_BYTES {
            return Err(io::Error::other(OutputLimit));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn explain(path: &Path, error: &minijinja::Error) -> Error {
    let path = path.to_path_buf();
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    let mut reason = String::new();
    while let Some(current) = cause {
        if let Some(Raised(message)) = current.downcast_ref::<Raised>() {
            return Error::TemplateRefused { path, message: message.clone() };
        }
        if current
            .downcast_ref::<minijinja::Error>()
            .is_some_and(|e| e.kind() == ErrorKind::OutOfFuel)
        {
            return Error::TemplateBudget { path, what: "instructions", limit: MAX_FUEL };
        }
        if let Some(inner) = current.downcast_ref::<io::Error>().and_then(io::Error::get_ref)
            && inner.is::<OutputLimit>()
        {
            let limit = MAX_OUTPUT_BYTES as u64;
            return Error::TemplateBudget { path, what: "bytes of text", limit };
        }
        if !reason.is_empty() {
            reason.push_str(": ");
        }
        reason.push_str(&current.to_string());
        cause = current.source();
    }
    Error::Template { path, reason }
}

#[cfg(test)]
pub(crate) mod tests;
