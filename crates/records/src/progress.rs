//! Progress of long work, counted in units by libraries and shown by programs.
//!
//! A library calls [`start`] and counts; a program that wants to show it sets a [`Reporter`] once. Without one, counting
//! costs next to nothing and shows nothing.

use std::fmt;
use std::sync::OnceLock;

/// Shows progress: what a program sets with [`set_reporter`].
pub trait Reporter: Send + Sync {
    /// Work of `total` units begins.
    fn start(&self, name: &'static str, unit: &'static str, total: u64) -> Box<dyn Tracker>;
}

/// One piece of work that is shown; ends when dropped.
pub trait Tracker: Send + Sync {
    /// `n` more units are done.
    fn inc(&self, n: u64);
    /// `n` units were done by an earlier run: they do not count towards the rate.
    fn skip(&self, n: u64);
    /// A short note to show beside the count (a loss, a file name).
    fn message(&self, message: &str);
}

static REPORTER: OnceLock<Box<dyn Reporter>> = OnceLock::new();

/// Shows all progress by `reporter` from now on; the first one stays.
pub fn set_reporter(reporter: Box<dyn Reporter>) {
    if REPORTER.set(reporter).is_err() {
        tracing::debug!("progress was set up before");
    }
}

/// Begins work of `total` units. Done when dropped.
pub fn start(name: &'static str, unit: &'static str, total: u64) -> Progress {
    Progress { tracker: REPORTER.get().map(|reporter| reporter.start(name, unit, total)) }
}

/// Work in progress.
pub struct Progress {
    tracker: Option<Box<dyn Tracker>>,
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Progress").field("shown", &self.tracker.is_some()).finish()
    }
}

impl Progress {
    /// Counts `n` more units as done.
    pub fn inc(&self, n: u64) {
        if let Some(tracker) = &self.tracker {
            tracker.inc(n);
        }
    }

    /// Counts `n` units that an earlier run did already: they do not count towards the rate.
    pub fn skip(&self, n: u64) {
        if let Some(tracker) = &self.tracker {
            tracker.skip(n);
        }
    }

    /// Shows a short note beside the count (a loss, a file name).
    pub fn message(&self, message: impl AsRef<str>) {
        if let Some(tracker) = &self.tracker {
            tracker.message(message.as_ref());
        }
    }
}
