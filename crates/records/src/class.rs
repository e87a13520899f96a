//! One vocabulary of refusal: what a failure is for whoever called the program, and the two refusals that all crates share.

use std::error::Error as StdError;
use std::fmt;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// What a failure is for whoever called the program; each class has one exit code (`arete_stage::exit`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Flags or settings that cannot be, or do not go together.
    Setting,
    /// Data that cannot be used as it is.
    Data,
    /// A server could not be reached, or refused.
    Unavailable,
    /// Out of memory, on the device or the host.
    Memory,
    /// The system refused to read or write.
    System,
    /// The reader of our output went away: nobody is left to tell.
    ClosedPipe,
    /// A signal asked the work to stop.
    Signal(i32),
    /// Anything else: a broken promise of ours, numbers that diverged.
    Other,
}

/// Errors that say what they are for the caller.
pub trait Classified: StdError + 'static {
    /// What this failure is; none where its causes decide.
    fn class(&self) -> Option<Class>;
}

/// What an error of the standard library or of this crate is; none for errors of other crates.
pub fn class_of(cause: &(dyn StdError + 'static)) -> Option<Class> {
    if let Some(error) = cause.downcast_ref::<std::io::Error>() {
        return Some(io_class(error));
    }
    if let Some(error) = cause.downcast_ref::<crate::Error>() {
        return error.class();
    }
    cause.downcast_ref::<Refusal>().and_then(Refusal::class)
}

/// What a library's message says of memory that it did not get, in one line; none if it is about something else.
pub fn memory_refused(message: &str) -> Option<String> {
    const SIGNS: [&str; 6] = [
        "can't allocate memory",
        "not enough memory",
        "out of memory",
        "bad_alloc",
        "Cannot allocate memory",
        "memory allocation of",
    ];
    let sign = SIGNS.iter().filter_map(|sign| message.find(sign)).min()?;
    // The line it stands in, without what libtorch and Rust put before it.
    let line = message[sign..].lines().next().unwrap_or_default();
    let line: String = line.trim_end_matches(['"', ')', '.']).chars().take(200).collect();
    Some(line.split("\\n").next().unwrap_or_default().to_owned())
}

/// Bad data if the contents were refused, else the system's refusal.
fn io_class(error: &std::io::Error) -> Class {
    match error.kind() {
        ErrorKind::BrokenPipe => Class::ClosedPipe,
        ErrorKind::InvalidData | ErrorKind::UnexpectedEof => Class::Data,
        ErrorKind::OutOfMemory => Class::Memory,
        _ => Class::System,
    }
}

impl Classified for std::io::Error {
    fn class(&self) -> Option<Class> {
        Some(io_class(self))
    }
}

impl Classified for crate::Error {
    fn class(&self) -> Option<Class> {
        Some(match self {
            Self::Io(error) => io_class(error),
            Self::Refused(refusal) => return refusal.class(),
            _ => Class::Data,
        })
    }
}

/// What the user gave cannot be used: the one form in which every crate says so.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A file, or a place in it.
    #[error("{}{at}: {}expected {expected}, got {got}", path.display(), named(field))]
    BadFile {
        /// The file.
        path: PathBuf,
        /// Where in it.
        at: At,
        /// The field, column or key there; empty for the whole.
        field: String,
        /// What would have been accepted.
        expected: String,
        /// What is there.
        got: String,
    },

    /// A setting, by the name the user knows it by.
    #[error("{name}: expected {expected}, got {got}")]
    BadSetting {
        /// The flag or recipe key.
        name: String,
        /// What would have been accepted.
        expected: String,
        /// What was given.
        got: String,
    },
}

fn named(field: &str) -> String {
    if field.is_empty() { String::new() } else { format!("{field}: ") }
}

/// A place in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// The file as a whole.
    File,
    /// A line, counted from 1.
    Line(usize),
    /// A row or record, by its number.
    Row(usize),
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File => Ok(()),
            Self::Line(line) => write!(f, ":{line}"),
            Self::Row(row) => write!(f, ": row {row}"),
        }
    }
}

impl Refusal {
    /// A setting that cannot be.
    pub fn setting(
        name: impl Into<String>,
        expected: impl Into<String>,
        got: impl fmt::Display,
    ) -> Self {
        Self::BadSetting { name: name.into(), expected: expected.into(), got: got.to_string() }
    }

    /// A file that cannot be used, for what its `field` is (empty: as a whole).
    pub fn file(
        path: impl AsRef<Path>,
        field: impl Into<String>,
        expected: impl Into<String>,
        got: impl fmt::Display,
    ) -> Self {
        Self::at(path, At::File, field, expected, got)
    }

    /// A place in a file that cannot be used.
    pub fn at(
        path: impl AsRef<Path>,
        at: At,
        field: impl Into<String>,
        expected: impl Into<String>,
        got: impl fmt::Display,
    ) -> Self {
        let path = path.as_ref().to_owned();
        Self::BadFile {
            path,
            at,
            field: field.into(),
            expected: expected.into(),
            got: got.to_string(),
        }
    }
}

impl Classified for Refusal {
    fn class(&self) -> Option<Class> {
        Some(match self {
            Self::BadFile { .. } => Class::Data,
            Self::BadSetting { .. } => Class::Setting,
        })
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn messages_about_memory_are_told_from_others() {
        let torch = "called `Result::unwrap()` on an `Err` value: Torch(\"[enforce fail at alloc_cpu.cpp:119] err == 0. \
                     DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12 (x)\\nframe #0\")";
        let found = super::memory_refused(torch).unwrap();
        assert_eq!(
            found,
            "can't allocate memory: you tried to allocate 8 bytes. Error code 12 (x)"
        );
        assert!(super::memory_refused("CUDA out of memory. Tried to allocate").is_some());
        assert!(super::memory_refused("std::bad_alloc").is_some());
        assert_eq!(super::memory_refused("index out of bounds"), None);
    }

    use super::*;

    #[test]
    fn refusals_say_what_where_expected_and_got() {
        let text = |refusal: Refusal| refusal.to_string();
        assert_eq!(
            text(Refusal::setting("beta", "a number ≥ 0", -1)),
            "beta: expected a number ≥ 0, got -1"
        );
        assert_eq!(text(Refusal::file("a/b", "", "rows", "none")), "a/b: expected rows, got none");
        assert_eq!(
            text(Refusal::at("f.jsonl", At::Line(3), "prompt", "text", "7")),
            "f.jsonl:3: prompt: expected text, got 7"
        );
        assert_eq!(
            text(Refusal::at("f.parquet", At::Row(0), "chosen", "a reply", "nothing")),
            "f.parquet: row 0: chosen: expected a reply, got nothing"
        );
    }

    #[test]
    fn errors_of_the_system_are_told_from_bad_data() {
        let class = |kind: ErrorKind| class_of(&std::io::Error::from(kind));
        assert_eq!(class(ErrorKind::StorageFull), Some(Class::System));
        assert_eq!(class(ErrorKind::InvalidData), Some(Class::Data));
        assert_eq!(class(ErrorKind::BrokenPipe), Some(Class::ClosedPipe));
        assert_eq!(class_of(&fmt::Error), None);
    }
}
