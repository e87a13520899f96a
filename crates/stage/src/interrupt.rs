//! SIGINT and SIGTERM: the first asks a stage to stop at its next safe point, the second ends it.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::Error;

/// A signal asked the stage to stop. Partial work is kept; the same command continues it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("interrupted by {}; the same command continues", signal_name(*.signal))]
pub struct Interrupted {
    /// The signal's number: 2 (SIGINT) or 15 (SIGTERM).
    pub signal: i32,
}

fn signal_name(signal: i32) -> &'static str {
    match signal {
        SIGINT => "SIGINT",
        SIGTERM => "SIGTERM",
        _ => "a signal",
    }
}

struct Flags {
    interrupted: Arc<AtomicBool>,
    terminated: Arc<AtomicBool>,
}

static FLAGS: OnceLock<Flags> = OnceLock::new();

/// Catches SIGINT and SIGTERM from now on. Only for programs that call [`check`] between units of
/// work. A second signal ends the process at once, with exit code 130 or 143.
///
/// # Errors
///
/// [`Error::Io`] if the handlers cannot be installed.
pub fn install() -> Result<(), Error> {
    let flags =
        FLAGS.get_or_init(|| Flags { interrupted: Arc::default(), terminated: Arc::default() });
    for (signal, seen) in [(SIGINT, &flags.interrupted), (SIGTERM, &flags.terminated)] {
        // Registered first, so it runs first: ends the process only if either flag is set already.
        for earlier in [&flags.interrupted, &flags.terminated] {
            flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(earlier))?;
        }
        flag::register(signal, Arc::clone(seen))?;
    }
    Ok(())
}

/// Fails once a signal has come in. Call it where stopping loses nothing.
///
/// # Errors
///
/// [`Interrupted`] with the signal.
pub fn check() -> Result<(), Interrupted> {
    let Some(flags) = FLAGS.get() else {
        return Ok(());
    };
    for (signal, seen) in [(SIGINT, &flags.interrupted), (SIGTERM, &flags.terminated)] {
        if seen.load(Ordering::Relaxed) {
            return Err(Interrupted { signal });
        }
    }
    Ok(())
}
