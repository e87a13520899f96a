//! Progress on stderr: bars on a terminal, else a plain line every few seconds.

use std::fmt::Write as _;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use arete_records::progress::{Reporter, Tracker, set_reporter};
use indicatif::ProgressStyle;
use tracing_indicatif::span_ext::IndicatifSpanExt;

use crate::cli::printable;

/// Seconds between two plain lines of progress.
const PLAIN_INTERVAL: Duration = Duration::from_secs(5);

/// Shows the progress that libraries count from now on, as plain lines or as bars.
pub(crate) fn show(plain_lines: bool) {
    set_reporter(Box::new(Stderr { plain_lines }));
}

struct Stderr {
    plain_lines: bool,
}

impl Reporter for Stderr {
    fn start(&self, name: &'static str, unit: &'static str, total: u64) -> Box<dyn Tracker> {
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
        Box::new(Shown {
            plain_lines: self.plain_lines,
            name,
            unit,
            total,
            position: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
            span,
            started: now,
            plain: Mutex::new(Plain { last: now, message: String::new(), shown: None }),
        })
    }
}

fn bar_style(unit: &str) -> ProgressStyle {
    let template = format!("{{msg}} [{{bar:30}}] {{pos}}/{{len}} {unit}, {{per_sec}}, eta {{eta}}");
    ProgressStyle::with_template(&template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

/// One piece of work that is shown.
#[derive(Debug)]
struct Shown {
    plain_lines: bool,
    name: &'static str,
    unit: &'static str,
    total: u64,
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
    /// The position that was shown last.
    shown: Option<u64>,
}

impl Tracker for Shown {
    fn inc(&self, n: u64) {
        self.position.fetch_add(n, Ordering::Relaxed);
        self.span.pb_inc(n);
        self.show(false);
    }

    fn skip(&self, n: u64) {
        self.skipped.fetch_add(n, Ordering::Relaxed);
        self.position.fetch_add(n, Ordering::Relaxed);
        self.span.pb_inc(n);
    }

    fn message(&self, message: &str) {
        let message = printable(message);
        self.span.pb_set_message(&format!("{} {message}", self.name));
        self.plain.lock().unwrap_or_else(PoisonError::into_inner).message = message;
    }
}

impl Shown {
    fn show(&self, last: bool) {
        if !self.plain_lines {
            return;
        }
        let mut plain = self.plain.lock().unwrap_or_else(PoisonError::into_inner);
        let position = self.position.load(Ordering::Relaxed);
        let due = plain.last.elapsed() >= PLAIN_INTERVAL;
        let is_long = plain.shown.is_some() || self.started.elapsed() >= Duration::from_secs(1);
        // What stands there already is not said again.
        if !(due && !last || last && is_long) || plain.shown == Some(position) {
            return;
        }
        plain.last = Instant::now();
        plain.shown = Some(position);
        let mut line = plain_line(&Count {
            name: self.name,
            unit: self.unit,
            position,
            skipped: self.skipped.load(Ordering::Relaxed),
            total: self.total,
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

impl Drop for Shown {
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
        let rate = match 1.0 / rate {
            each if each <= 1.0 => format!("{rate:.1}/s"),
            each if each < 10.0 => format!("{each:.1} s each"),
            each => format!("{each:.0} s each"),
        };
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

#[cfg(test)]
mod tests {
    use super::*;

    fn count(position: u64, skipped: u64, elapsed_s: f64) -> Count {
        Count { name: "conversations", unit: "prompts", position, skipped, total: 48, elapsed_s }
    }

    #[test]
    fn plain_lines_say_how_far_and_how_long() {
        let line = |position, skipped, elapsed_s| plain_line(&count(position, skipped, elapsed_s));
        assert_eq!(line(12, 0, 4.0), "conversations 12/48 prompts, 3.0/s, eta 12 s");
        assert_eq!(line(48, 0, 200.0), "conversations 48/48 prompts, 4.2 s each, 3 min 20 s");
        assert_eq!(line(0, 0, 4.0), "conversations 0/48 prompts");
        // Work of an earlier run does not count towards the rate.
        assert_eq!(line(40, 36, 2.0), "conversations 40/48 prompts, 2.0/s, eta 4 s");
        assert_eq!(line(1, 0, 60.0), "conversations 1/48 prompts, 60 s each, eta 47 min 0 s");
        assert_eq!(line(6, 0, 60.0), "conversations 6/48 prompts, 10 s each, eta 7 min 0 s");
        assert_eq!(duration(7500.0), "2 h 5 min");
    }

    #[test]
    fn progress_counts_without_any_subscriber() {
        let tracker = Stderr { plain_lines: false }.start("loading", "tensors", 3);
        tracker.skip(1);
        tracker.inc(2);
        tracker.message("w\u{7}");
    }
}
