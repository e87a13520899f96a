//! From a program's result to its exit code: every way to fail in one match.

use std::error::Error as StdError;
use std::fmt::Write as _;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use arete_records::{Class, Classified, redact};
use signal_hook::consts::SIGXFSZ;

use crate::cli::printable;
use crate::inputs;
use crate::interrupt::Interrupted;

/// Bad input that a program found itself.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BadInput(pub String);

/// Flags that do not go together.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// A server that does not answer.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unavailable(pub String);

/// More memory or disk than the machine has.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct OutOfRoom(pub String);

/// The exit code of a class of failure, as `sysexits.h` numbers them where it has a number.
pub fn code(class: Class) -> u8 {
    match class {
        Class::ClosedPipe => 0,
        Class::Other => 1,
        Class::Setting => 2,
        Class::Data => 65,
        Class::Unavailable => 69,
        Class::Memory => 71,
        Class::System => 74,
        Class::Signal(signal) => u8::try_from(128 + signal).unwrap_or(1),
    }
}

/// What an error is, asked of the libraries above this crate.
pub type ClassOf = fn(&(dyn StdError + 'static)) -> Option<Class>;

/// Exit code of a broken promise of ours: a panic that nobody expected (`EX_SOFTWARE`).
pub const INTERNAL: u8 = 70;

/// Runs a program to its exit code: [`exit_code`] of what `work` returns. A panic is reported in one line like any other failure,
/// with exit code 71 if it was for want of memory, else [`INTERNAL`]; a file that reaches the limit of its size is an error of
/// writing and not a signal.
pub fn run(work: impl FnOnce() -> anyhow::Result<()> + Send, class_of: ClassOf) -> ExitCode {
    static PANIC: Mutex<Option<String>> = Mutex::new(None);
    // Libraries are run under `catch_unwind`, too: what they say is told by whoever caught it.
    let loud = std::env::var_os("RUST_BACKTRACE").is_some_and(|value| value != "0");
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        *PANIC.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic.to_string());
        if loud {
            usual(panic);
        }
    }));
    if let Err(error) = signal_hook::flag::register(SIGXFSZ, Arc::default()) {
        tracing::debug!(%error, "SIGXFSZ not caught");
    }
    match on_own_stack(|| catch_unwind(AssertUnwindSafe(work))) {
        Err(error) => {
            let what =
                format!("no memory for a thread with {STACK_BYTES} bytes of stack ({error})");
            exit_code(Err(OutOfRoom(what).into()), class_of)
        }
        Ok(Ok(result)) => exit_code(result, class_of),
        Ok(Err(_)) => {
            let panic = PANIC.lock().unwrap_or_else(PoisonError::into_inner).take();
            let panic = panic.unwrap_or_else(|| "a panic without a message".to_owned());
            let (text, code) = match arete_records::memory_refused(&panic) {
                Some(what) => (format!("error: {what}\n  {MEMORY_ADVICE}"), code(Class::Memory)),
                None => {
                    let what = "this is a fault of the program, please report it";
                    (format!("error: {}\n  {what}", panic.replace('\n', " ")), INTERNAL)
                }
            };
            let _ = writeln!(std::io::stderr(), "{}", printable(&text));
            ExitCode::from(code)
        }
    }
}

/// Stack of a program's work, whatever the limit of the system's is (`ulimit -s`): libtorch takes some hundred KiB of it.
const STACK_BYTES: usize = 16 << 20;

fn on_own_stack<T: Send>(work: impl FnOnce() -> T + Send) -> std::io::Result<T> {
    std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().name("main".to_owned()).stack_size(STACK_BYTES);
        Ok(builder.spawn_scoped(scope, work)?.join().expect("work catches its panics"))
    })
}

/// What can be done where memory runs out.
pub(crate) const MEMORY_ADVICE: &str = "out of memory: compute less at a time (micro_batch_tokens, batch, max_new_tokens, max_rows), keep less for the \
                                        backward pass (recompute), hold the model in 16 bits (--dtype bf16) or in four (--nf4), take a \
                                        smaller model, or free memory";

/// Turns a program's result into its exit code, printing `error: …` and its causes on stderr.
///
/// `class_of` knows the errors of the libraries that the program uses; those of this crate and of `records` are known.
/// The outermost cause that is known decides. A reader of stdout that went away is no failure.
pub fn exit_code(result: anyhow::Result<()>, class_of: ClassOf) -> ExitCode {
    let Err(error) = result else {
        return ExitCode::SUCCESS;
    };
    if error.chain().any(|cause| known(cause, class_of) == Some(Class::ClosedPipe)) {
        return ExitCode::from(code(Class::ClosedPipe));
    }
    let class = error.chain().find_map(|cause| known(cause, class_of)).unwrap_or(Class::Other);
    let mut text = text_of(&error);
    if class == Class::Memory {
        write!(text, "\n  {MEMORY_ADVICE}").expect("writing to a String cannot fail");
    }
    // If stderr is closed there is nobody left to tell.
    let _ = writeln!(std::io::stderr(), "{}", printable(&text));
    ExitCode::from(code(class))
}

/// What is said of an error: itself and its causes, a line each. Files may hold anything, and so may what is said of them:
/// of a long cause beginning and end are told.
#[must_use]
pub fn text_of(error: &anyhow::Error) -> String {
    let said = |error: String| redact::cut(&inputs::as_given(&error)).into_owned();
    let mut text = format!("error: {}", said(error.to_string()));
    for cause in error.chain().skip(1) {
        write!(text, "\n  caused by: {}", said(cause.to_string()))
            .expect("writing to a String cannot fail");
    }
    text
}

fn known(cause: &(dyn StdError + 'static), class_of: ClassOf) -> Option<Class> {
    class_of(cause).or_else(|| self::class_of(cause))
}

/// What an error of this crate, of `records`, of clap or of the standard library is.
pub fn class_of(cause: &(dyn StdError + 'static)) -> Option<Class> {
    if let Some(interrupted) = cause.downcast_ref::<Interrupted>() {
        return interrupted.class();
    }
    if let Some(error) = cause.downcast_ref::<crate::Error>() {
        return error.class();
    }
    if cause.is::<BadInput>() {
        return Some(Class::Data);
    }
    if cause.is::<Unavailable>() {
        return Some(Class::Unavailable);
    }
    if cause.is::<OutOfRoom>() {
        return Some(Class::Memory);
    }
    if cause.is::<Usage>() || cause.is::<clap::Error>() {
        return Some(Class::Setting);
    }
    arete_records::class_of(cause)
}

impl Classified for Interrupted {
    fn class(&self) -> Option<Class> {
        Some(Class::Signal(self.signal))
    }
}

impl Classified for crate::Error {
    fn class(&self) -> Option<Class> {
        match self {
            Self::Io(error) => error.class(),
            Self::Records(error) => error.class(),
            Self::Interrupted(signal) => signal.class(),
            // A directory that is taken is the system's state, not bad data.
            Self::Locked { .. } => Some(Class::Other),
            Self::Config { .. } | Self::ForeignOutput { .. } => Some(Class::Setting),
            _ => Some(Class::Data),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;
    use std::io;

    #[track_caller]
    fn gives(error: impl Into<anyhow::Error>, code: u8) {
        let code = format!("{:?}", ExitCode::from(code));
        assert_eq!(format!("{:?}", exit_code(Err(error.into()), class_of)), code);
    }

    #[test]
    fn exit_codes_follow_the_cause() {
        let done = format!("{:?}", exit_code(Ok(()), class_of));
        assert_eq!(done, format!("{:?}", ExitCode::SUCCESS));
        gives(anyhow::anyhow!("anything"), 1);
        gives(Usage("--a needs --b".to_owned()), 2);
        gives(BadInput("row 3 is empty".to_owned()), 65);
        gives(io::Error::new(io::ErrorKind::StorageFull, "no space left"), 74);
        gives(io::Error::new(io::ErrorKind::InvalidData, "not UTF-8"), 65);
        gives(Interrupted { signal: 2 }, 130);
        gives(Interrupted { signal: 15 }, 143);
        gives(crate::Error::from(Interrupted { signal: 15 }), 143);
        gives(arete_records::Refusal::setting("a", "b", "c"), 2);
        let parquet = || arete_records::Error::Parquet { path: "x".into(), reason: "y".to_owned() };
        gives(parquet(), 65);
        gives(crate::Error::Records(parquet()), 65);
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
    fn long_messages_are_cut_in_their_middle() {
        let what = "é".repeat(100_000);
        let error = anyhow::anyhow!("x.json: expected a number, got {what}; name another")
            .context("reading x.json");
        let text = text_of(&error);
        assert!(text.starts_with("error: reading x.json\n  caused by: x.json: expected a number"));
        assert!(text.ends_with("é; name another") && text.contains("98245 characters left out"));
        assert!(text.chars().count() < 2000, "{}", text.chars().count());
    }

    #[test]
    fn a_reader_that_went_away_is_no_failure() {
        gives(io::Error::from(io::ErrorKind::BrokenPipe), 0);
        gives(crate::Error::Io(io::ErrorKind::BrokenPipe.into()), 0);
    }

    #[test]
    fn a_panic_is_a_failure_like_others() {
        let code = |work: fn() -> anyhow::Result<()>| format!("{:?}", run(work, class_of));
        let is = |code: u8| format!("{:?}", ExitCode::from(code));
        assert_eq!(code(|| Ok(())), is(0));
        assert_eq!(code(|| Err(BadInput("row 3".to_owned()).into())), is(65));
        assert_eq!(code(|| panic!("index out of bounds")), is(INTERNAL));
        assert_eq!(
            code(|| panic!("DefaultCPUAllocator: can't allocate memory: you tried")),
            is(71)
        );
        // As much stack as a limit of some KiB would not leave.
        fn deep(n: usize) -> usize {
            let room = std::hint::black_box([n; 1024]);
            if n == 0 { 0 } else { deep(n - 1) + room[n % 1024] }
        }
        let use_it = || {
            assert!(deep(1000) > 0);
            Ok(())
        };
        assert_eq!(code(use_it), is(0));
        // Caught by a library's caller, a panic is none of the program's.
        let caught = || {
            assert!(catch_unwind(|| panic!("a parser's")).is_err());
            Ok(())
        };
        assert_eq!(code(caught), is(0));
        drop(std::panic::take_hook());
    }

    #[test]
    fn libraries_above_class_their_own_errors() {
        #[derive(Debug, thiserror::Error)]
        #[error("the GPU is full")]
        struct Full;
        let class_of: ClassOf = |cause| cause.is::<Full>().then_some(Class::Memory);
        let code = exit_code(Err(Full.into()), class_of);
        assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::from(71)));
    }
}
