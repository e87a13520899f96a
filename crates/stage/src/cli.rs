//! What every program does the same way: the flags of a stage, logs, text for a terminal.

use std::fmt::Debug;
use std::io::IsTerminal;
use std::path::PathBuf;

use tracing::field::Field;
use tracing_indicatif::IndicatifLayer;
use tracing_indicatif::filter::IndicatifFilter;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::fmt::format::{FormatFields, Writer, debug_fn};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, fmt};

use arete_records::redact;

use crate::{progress, ranges};

/// Flags that every stage takes.
#[derive(Debug, Clone, clap::Args)]
pub struct StageArgs {
    /// Recipe (TOML) whose table of this stage gives the settings; flags override it
    #[arg(long, value_name = "FILE")]
    pub recipe: Option<PathBuf>,
    /// Directory that receives the results; run.json in it marks the stage as complete
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// Say what would be done, as JSON: settings, rows, memory; write nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// The command line, as clap reads it. A number that no setting can have ends the program with exit code 2 and the flag's name.
pub fn matches(mut command: clap::Command) -> clap::ArgMatches {
    let matches = command.get_matches_mut();
    if let Err(refusal) = ranges::check_given(&command, &matches) {
        command.error(clap::error::ErrorKind::ValueValidation, refusal).exit();
    }
    matches
}

/// [`matches()`], as a program's own type.
#[must_use]
pub fn parse<T: clap::Parser>() -> T {
    T::from_arg_matches(&matches(T::command())).unwrap_or_else(|error| error.exit())
}

/// Logs to stderr from now on, at the level of `RUST_LOG` (default: info). Progress is shown as
/// bars if stderr is a terminal, else as a plain line every few seconds.
pub fn init_tracing() {
    init_tracing_at("info");
}

/// [`init_tracing`] with another level where `RUST_LOG` names none.
pub fn init_tracing_at(level: &str) {
    let mut plain = false;
    let levels = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let result = if std::io::stderr().is_terminal() {
        let bars = IndicatifLayer::new();
        let lines = fmt::layer()
            .fmt_fields(fields())
            .with_writer(Redacting(bars.get_stderr_writer()))
            .with_target(false)
            .without_time()
            .with_ansi(std::env::var_os("NO_COLOR").is_none());
        tracing_subscriber::registry()
            .with(lines.with_filter(levels))
            .with(bars.with_filter(IndicatifFilter::new(false)))
            .try_init()
    } else {
        plain = true;
        let lines = fmt::layer()
            .fmt_fields(fields())
            .with_writer(Redacting(std::io::stderr))
            .with_target(false)
            .without_time()
            .with_ansi(false);
        tracing_subscriber::registry().with(lines.with_filter(levels)).try_init()
    };
    if let Err(error) = result {
        tracing::debug!(%error, "logging was set up before");
    }
    progress::show(plain);
}

/// Digits of a number in the log that say something.
const DIGITS: usize = 4;

/// `name=value` for each field, the message without its name; numbers with [`DIGITS`] digits at most.
fn fields() -> impl for<'writer> FormatFields<'writer> + Send + Sync + 'static {
    debug_fn(|out: &mut Writer<'_>, field: &Field, value: &dyn Debug| {
        let text = format!("{value:?}");
        match field.name() {
            "message" => write!(out, "{text}"),
            name => write!(out, "{name}={}", shortened(&text).as_deref().unwrap_or(&text)),
        }
    })
    .delimited(" ")
}

/// A number with a fraction in at most [`DIGITS`] digits; none where it has no more, or the text is no such number.
fn shortened(text: &str) -> Option<String> {
    let is_number = |c: char| c.is_ascii_digit() || ".eE+-".contains(c);
    let digits = text.split(['e', 'E']).next()?.chars().filter(char::is_ascii_digit);
    let n_digits = digits.skip_while(|digit| *digit == '0').count();
    if n_digits <= DIGITS || !text.contains('.') || !text.chars().all(is_number) {
        return None;
    }
    let value: f64 = text.parse().ok()?;
    let rounded: f64 = format!("{value:.*e}", DIGITS - 1).parse().ok()?;
    // As Rust shows it: 0.001234, 12350000, 1.234e-7.
    Some(format!("{rounded:?}").trim_end_matches(".0").to_owned())
}

/// Writes lines of the log without secrets. A line comes whole, in one call.
struct Redacting<M>(M);

impl<'a, M: fmt::MakeWriter<'a>> fmt::MakeWriter<'a> for Redacting<M> {
    type Writer = Redacting<M::Writer>;

    fn make_writer(&'a self) -> Self::Writer {
        Redacting(self.0.make_writer())
    }
}

impl<W: std::io::Write> std::io::Write for Redacting<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        let line = redact::redacted(text.trim_end_matches('\n'));
        let end = if text.ends_with('\n') { "\n" } else { "" };
        self.0.write_all(format!("{}{end}", redact::cut(&line)).as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

/// Text for a terminal: secrets are hidden, control characters (which could move the cursor, or worse) are escaped,
/// line ends and tabs stay.
pub fn printable(text: &str) -> String {
    redact::redacted(text).chars().fold(String::with_capacity(text.len()), |mut out, c| {
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

    #[test]
    fn numbers_of_the_log_have_four_digits() {
        for (text, expected) in [
            ("0.6931471805599453", Some("0.6931")),
            ("-0.00123456", Some("-0.001235")),
            ("1.2345678e-7", Some("1.235e-7")),
            ("12345.678", Some("12350")),
            ("99999.9", Some("100000")),
            ("0.5", None),
            ("1e-5", None),
            ("0.0001234", None),
            ("123456789", None), // a count
            ("1.2.3456", None),
            ("v1.23456", None),
            ("NaN", None),
        ] {
            assert_eq!(shortened(text).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn lines_of_the_log_are_as_they_were_but_for_digits() {
        let lines = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
        let layer = fmt::layer()
            .fmt_fields(fields())
            .with_writer({
                let lines = lines.clone();
                move || Kept(lines.clone())
            })
            .with_target(false)
            .without_time()
            .with_ansi(false);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            tracing::info!(step = 3, loss = 0.712_345_678_901_234_5, name = "a b", "optimised");
        });
        let text = String::from_utf8(lines.lock().unwrap().clone()).unwrap();
        assert_eq!(text, " INFO optimised step=3 loss=0.7123 name=\"a b\"\n");
    }

    /// What was written, kept.
    struct Kept(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

    impl std::io::Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn control_characters_never_reach_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\u{9b}\tc\nd é🙂"), "a\\u{1b}[2Jb\\u{9b}\tc\nd é🙂");
    }
}
