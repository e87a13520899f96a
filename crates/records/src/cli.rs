//! What every binary does the same way: logs, progress, exit codes, shared flags.

use std::error::Error as StdError;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::ProgressStyle;
use tracing_indicatif::IndicatifLayer;
use tracing_indicatif::filter::IndicatifFilter;
use tracing_indicatif::span_ext::IndicatifSpanExt;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, fmt};

use crate::interrupt::Interrupted;

/// Flags that every stage takes.
#[derive(Debug, Clone, clap::Args)]
pub struct StageArgs {
    /// Recipe (TOML) whose table of this stage gives the settings; flags override it
    #[arg(long, value_name = "FILE")]
    pub recipe: Option<PathBuf>,
    /// Directory that receives the results; run.json in it marks the stage as complete
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
}

/// Seconds between two plain lines of progress.
const PLAIN_INTERVAL: Duration = Duration::from_secs(5);

/// Set when progress is to be shown as plain lines.
static PLAIN: AtomicBool = AtomicBool::new(false);

/// Logs to stderr from now on, at the level of `RUST_LOG` (default: info). Progress is shown as
/// bars if stderr is a terminal, else as a plain line every few seconds.
pub fn init_tracing() {
    let levels = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let result = if std::io::stderr().is_terminal() {
        let bars = IndicatifLayer::new();
        let lines = fmt::layer()
            .with_writer(bars.get_stderr_writer())
            .with_target(false)
            .without_time()
            .with_ansi(std::env::var_os("NO_COLOR").is_none());
        tracing_subscriber::registry()
            .with(lines.with_filter(levels))
            .with(bars.with_filter(IndicatifFilter::new(false)))
            .try_init()
    } else {
        PLAIN.store(true, Ordering::Relaxed);
        let lines = fmt::layer()
            .with_writer(std::io::stderr)
            .with_target(false)
            .without_time()
            .with_ansi(false);
        tracing_subscriber::registry().with(lines.with_filter(levels)).try_init()
    };
    if let Err(error) = result {
        tracing::debug!(%error, "logging was set up before");
    }
}

/// Opens a span of `total` units of work for libraries to count on; how it is shown is up to the
/// program. Done when dropped.
pub fn progress(name: &'static str, unit: &'static str, total: u64) -> Progress {
    let span = tracing::info_span!(
        "progress",
        name,
        unit,
        total,
        indicatif.pb_show = tracing::field::Empty
    );
    span.pb_set_style(&bar_style(unit));
    span.pb_set_length(total);
    span.pb_set_message(name);
    span.pb_start();
    let now = Instant::now();
    Progress {
        name,
        unit,
        total: AtomicU64::new(total),
        position: AtomicU64::new(0),
        skipped: AtomicU64::new(0),
        span,
        started: now,
        plain: Mutex::new(Plain { last: now, message: String::new(), shown: false }),
    }
}

fn bar_style(unit: &str) -> ProgressStyle {
    let template = format!("{{msg}} [{{bar:30}}] {{pos}}/{{len}} {unit}, {{per_sec}}, eta {{eta}}");
    ProgressStyle::with_template(&template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

/// Work in progress, counted in units.
#[derive(Debug)]
pub struct Progress {
    name: &'static str,
    unit: &'static str,
    total: AtomicU64,
    position: AtomicU64,
    /// Units that were done before this process started.
    skipped: AtomicU64,
    span: tracing::Span,
    started: Instant,
    plain: Mutex<Plain>,
}

#[derive(Debug)]
struct Plain {
    last: Instant,
    message: String,
    shown: bool,
}

impl Progress {
    /// Counts `n` more units as done.
    pub fn inc(&self, n: u64) {
        self.position.fetch_add(n, Ordering::Relaxed);
        self.span.pb_inc(n);
        self.show(false);
    }

    /// Counts `n` units that an earlier run did already: they do not count towards the rate.
    pub fn skip(&self, n: u64) {
        self.skipped.fetch_add(n, Ordering::Relaxed);
        self.position.fetch_add(n, Ordering::Relaxed);
        self.span.pb_inc(n);
    }

    /// Adds `n` units to the work ahead.
    pub fn add_total(&self, n: u64) {
        self.total.fetch_add(n, Ordering::Relaxed);
        self.span.pb_inc_length(n);
    }

    /// Shows a short note beside the count (a loss, a file name).
    pub fn message(&self, message: impl AsRef<str>) {
        let message = printable(message.as_ref());
        self.span.pb_set_message(&format!("{} {message}", self.name));
        self.plain.lock().unwrap_or_else(PoisonError::into_inner).message = message;
    }

    fn show(&self, last: bool) {
        if !PLAIN.load(Ordering::Relaxed) {
            return;
        }
        let mut plain = self.plain.lock().unwrap_or_else(PoisonError::into_inner);
        let due = plain.last.elapsed() >= PLAIN_INTERVAL;
        if !(due || last && (plain.shown || self.started.elapsed() >= Duration::from_secs(1))) {
            return;
        }
        plain.last = Instant::now();
        plain.shown = true;
        let mut line = plain_line(&Count {
            name: self.name,
            unit: self.unit,
            position: self.position.load(Ordering::Relaxed),
            skipped: self.skipped.load(Ordering::Relaxed),
            total: self.total.load(Ordering::Relaxed),
            elapsed_s: self.started.elapsed().as_secs_f64(),
        });
        if !plain.message.is_empty() {
            line.push_str(", ");
            line.push_str(&plain.message);
        }
        // A closed stderr must not stop the work.
        let _ = writeln!(std::io::stderr(), "{line}");
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.show(true);
    }
}

struct Count {
    name: &'static str,
    unit: &'static str,
    position: u64,
    skipped: u64,
    total: u64,
    elapsed_s: f64,
}

/// `conversations 12/48 prompts, 3.1/s, eta 12 s`; at the end the time it took instead.
fn plain_line(count: &Count) -> String {
    let Count { name, unit, position, skipped, total, elapsed_s } = count;
    let mut line = format!("{name} {position}/{total} {unit}");
    let n_done = position.saturating_sub(*skipped);
    if n_done > 0 && *elapsed_s > 0.0 {
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
        let (n_done, n_left) = (n_done as f64, total.saturating_sub(*position) as f64);
        let rate = n_done / elapsed_s;
        let rate =
            if rate >= 0.1 { format!("{rate:.1}/s") } else { format!("{:.1} s each", 1.0 / rate) };
        let (what, seconds) =
            if n_left > 0.0 { ("eta ", n_left * elapsed_s / n_done) } else { ("", *elapsed_s) };
        write!(line, ", {rate}, {what}{}", duration(seconds))
            .expect("writing to a String cannot fail");
    }
    line
}

/// `12 s`, `3 min 20 s`, `2 h 5 min`.
fn duration(seconds: f64) -> String {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates")]
    let seconds = seconds.round() as u64;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// Bad input that a binary found itself (exit code 65).
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BadInput(pub String);

/// Flags that do not go together (exit code 2).
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// Exit codes, as `sysexits.h` numbers them where it has a number.
pub mod code {
    /// Anything else.
    pub const FAILURE: u8 = 1;
    /// Flags that cannot be used so.
    pub const USAGE: u8 = 2;
    /// Bad input data (`EX_DATAERR`).
    pub const BAD_DATA: u8 = 65;
    /// A server could not be reached or refused (`EX_UNAVAILABLE`).
    pub const UNAVAILABLE: u8 = 69;
    /// Out of memory, on the device or the host.
    pub const OUT_OF_MEMORY: u8 = 71;
    /// The system refused to read or write (`EX_IOERR`).
    pub const IO: u8 = 74;
}

/// How the errors of a library count: one of [`code`]. Lets [`exit_code_of`] look into error
/// types that this crate does not know.
pub trait ExitClass: StdError + 'static {
    /// The exit code of a program that fails with this error; none = ask the causes.
    fn exit_class(&self) -> Option<u8>;
}

impl ExitClass for crate::Error {
    fn exit_class(&self) -> Option<u8> {
        Some(match self {
            // A directory that is taken is the system's state, not bad data.
            Self::Io(error) => return io_class(error),
            Self::Locked { .. } => code::FAILURE,
            Self::Config { .. } | Self::ForeignOutput { .. } => code::USAGE,
            _ => code::BAD_DATA,
        })
    }
}

/// Bad data if the contents were refused, else the system's refusal.
fn io_class(error: &std::io::Error) -> Option<u8> {
    use std::io::ErrorKind::{InvalidData, UnexpectedEof};
    match error.kind() {
        InvalidData | UnexpectedEof => Some(code::BAD_DATA),
        _ => Some(code::IO),
    }
}

/// Turns a program's result into its exit code, printing `error: …` and its causes on stderr.
///
/// 0 success (also when the reader of stdout went away), 2 usage, 65 bad data, 74 I/O, 130 and 143
/// signals, else 1.
pub fn exit_code(result: anyhow::Result<()>) -> ExitCode {
    exit_code_by(result, |_| None)
}

/// [`exit_code`] for programs whose errors include `E`.
pub fn exit_code_of<E: ExitClass>(result: anyhow::Result<()>) -> ExitCode {
    exit_code_by(result, |cause| cause.downcast_ref::<E>().and_then(E::exit_class))
}

/// [`exit_code`] with a say in how each cause counts, asked from the outermost cause inwards.
pub fn exit_code_by(
    result: anyhow::Result<()>,
    classify: impl Fn(&(dyn StdError + 'static)) -> Option<u8>,
) -> ExitCode {
    let Err(error) = result else {
        return ExitCode::SUCCESS;
    };
    if error.chain().any(is_broken_pipe) {
        return ExitCode::SUCCESS;
    }
    let code = error
        .chain()
        .find_map(|cause| classify(cause).or_else(|| class_of(cause)))
        .unwrap_or(code::FAILURE);
    let mut text = format!("error: {error}");
    for cause in error.chain().skip(1) {
        write!(text, "\n  caused by: {cause}").expect("writing to a String cannot fail");
    }
    // If stderr is closed there is nobody left to tell.
    let _ = writeln!(std::io::stderr(), "{}", printable(&text));
    ExitCode::from(code)
}

fn is_broken_pipe(cause: &(dyn StdError + 'static)) -> bool {
    let io = match cause.downcast_ref::<crate::Error>() {
        Some(crate::Error::Io(error)) => Some(error),
        _ => cause.downcast_ref::<std::io::Error>(),
    };
    io.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

fn class_of(cause: &(dyn StdError + 'static)) -> Option<u8> {
    if let Some(interrupted) = cause.downcast_ref::<Interrupted>() {
        return u8::try_from(128 + interrupted.signal).ok();
    }
    if let Some(error) = cause.downcast_ref::<crate::Error>() {
        return error.exit_class();
    }
    if cause.is::<BadInput>() {
        return Some(code::BAD_DATA);
    }
    if cause.is::<Usage>() || cause.is::<clap::Error>() {
        return Some(code::USAGE);
    }
    cause.downcast_ref::<std::io::Error>().and_then(io_class)
}

/// Text for a terminal: control characters (which could move the cursor, or worse) are escaped,
/// line ends and tabs stay.
pub fn printable(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut out, c| {
        if c.is_control() && c != '\n' && c != '\t' {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;
    use std::io;

    #[track_caller]
    fn gives(error: impl Into<anyhow::Error>, code: u8) {
        let code = format!("{:?}", ExitCode::from(code));
        assert_eq!(format!("{:?}", exit_code(Err(error.into()))), code);
    }

    #[test]
    fn exit_codes_follow_the_cause() {
        assert_eq!(format!("{:?}", exit_code(Ok(()))), format!("{:?}", ExitCode::SUCCESS));
        gives(anyhow::anyhow!("anything"), 1);
        gives(Usage("--a needs --b".to_owned()), 2);
        gives(BadInput("row 3 is empty".to_owned()), 65);
        gives(io::Error::new(io::ErrorKind::StorageFull, "no space left"), 74);
        gives(io::Error::new(io::ErrorKind::InvalidData, "not UTF-8"), 65);
        gives(Interrupted { signal: 2 }, 130);
        gives(Interrupted { signal: 15 }, 143);
        gives(crate::Error::Parquet { path: "x".into(), reason: "y".to_owned() }, 65);
        gives(crate::Error::Io(io::Error::other("disk")), 74);
        gives(crate::Error::ForeignOutput { path: "x".into(), found: "y".to_owned() }, 2);
    }

    #[test]
    fn context_does_not_hide_the_cause() {
        let result: Result<(), _> = Err(crate::Error::Io(io::Error::other("disk")));
        let error = result.context("reading prompts").context("in the demo").unwrap_err();
        gives(error, 74);
    }

    #[test]
    fn a_reader_that_went_away_is_no_failure() {
        gives(io::Error::from(io::ErrorKind::BrokenPipe), 0);
        gives(crate::Error::Io(io::ErrorKind::BrokenPipe.into()), 0);
    }

    #[test]
    fn other_crates_classify_their_own_errors() {
        #[derive(Debug, thiserror::Error)]
        #[error("the reward is NaN")]
        struct NonFinite;
        impl ExitClass for NonFinite {
            fn exit_class(&self) -> Option<u8> {
                Some(code::OUT_OF_MEMORY)
            }
        }
        let code = exit_code_of::<NonFinite>(Err(NonFinite.into()));
        assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::from(71)));
    }

    #[test]
    fn control_characters_never_reach_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\u{9b}\tc\nd é🙂"), "a\\u{1b}[2Jb\\u{9b}\tc\nd é🙂");
    }

    fn count(position: u64, skipped: u64, elapsed_s: f64) -> Count {
        Count { name: "conversations", unit: "prompts", position, skipped, total: 48, elapsed_s }
    }

    #[test]
    fn plain_lines_say_how_far_and_how_long() {
        let line = |position, skipped, elapsed_s| plain_line(&count(position, skipped, elapsed_s));
        assert_eq!(line(12, 0, 4.0), "conversations 12/48 prompts, 3.0/s, eta 12 s");
        assert_eq!(line(48, 0, 200.0), "conversations 48/48 prompts, 0.2/s, 3 min 20 s");
        assert_eq!(line(0, 0, 4.0), "conversations 0/48 prompts");
        // Work of an earlier run does not count towards the rate.
        assert_eq!(line(40, 36, 2.0), "conversations 40/48 prompts, 2.0/s, eta 4 s");
        assert_eq!(line(1, 0, 60.0), "conversations 1/48 prompts, 60.0 s each, eta 47 min 0 s");
        assert_eq!(duration(7500.0), "2 h 5 min");
    }

    #[test]
    fn progress_counts_without_any_subscriber() {
        let progress = progress("loading", "tensors", 3);
        progress.skip(1);
        progress.inc(2);
        progress.add_total(1);
        progress.message("w\u{7}");
        assert_eq!(progress.position.load(Ordering::Relaxed), 3);
        assert_eq!(progress.total.load(Ordering::Relaxed), 4);
    }
}
