//! The words every stage shares: splits, finish reasons.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Error;

/// Which part of the data a prompt belongs to.
///
/// Training reads `train`; probes, best checkpoints and score statistics read `validation`; only
/// scoring reads `test`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// 80 % of the prompts.
    Train,
    /// 10 % of the prompts.
    Validation,
    /// 10 % of the prompts.
    Test,
}

impl Split {
    /// Every split.
    pub const ALL: [Self; 3] = [Self::Train, Self::Validation, Self::Test];

    /// The lower-case name used in columns and file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "validation",
            Self::Test => "test",
        }
    }
}

/// Why a reply ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// The model ended its turn (or a stop string appeared).
    Stop,
    /// The token limit cut it off.
    Length,
}

impl FinishReason {
    /// Both reasons.
    pub const ALL: [Self; 2] = [Self::Stop, Self::Length];

    /// The lower-case name used in columns.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

macro_rules! named {
    ($($type:ident: $what:literal),*) => {$(
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.name())
            }
        }

        impl FromStr for $type {
            type Err = Error;

            fn from_str(name: &str) -> Result<Self, Error> {
                Self::ALL.into_iter().find(|x| x.name() == name).ok_or_else(|| Error::Name {
                    what: $what,
                    expected: Self::ALL.map(Self::name).join(", "),
                    got: name.to_owned(),
                })
            }
        }
    )*};
}
named!(Split: "split", FinishReason: "finish reason");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_and_display_as_serde_writes_them() {
        for split in Split::ALL {
            assert_eq!(split.to_string().parse::<Split>().unwrap(), split);
            assert_eq!(serde_json::to_value(split).unwrap(), split.name());
        }
        for reason in FinishReason::ALL {
            assert_eq!(reason.to_string().parse::<FinishReason>().unwrap(), reason);
            assert_eq!(serde_json::to_value(reason).unwrap(), reason.name());
        }
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let error = "dev".parse::<Split>().unwrap_err().to_string();
        assert_eq!(error, "unknown split `dev`, expected one of: train, validation, test");
    }
}
