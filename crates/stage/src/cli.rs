//! What every program does the same way: the flags of a stage, logs, text for a terminal.

use std::io::IsTerminal;
use std::path::PathBuf;

use tracing_indicatif::IndicatifLayer;
use tracing_indicatif::filter::IndicatifFilter;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, fmt};

use arete_records::redact;

use crate::progress;

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
        self.0.write_all(redact::redacted(&String::from_utf8_lossy(bytes)).as_bytes())?;
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
    fn control_characters_never_reach_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\u{9b}\tc\nd é🙂"), "a\\u{1b}[2Jb\\u{9b}\tc\nd é🙂");
    }
}
