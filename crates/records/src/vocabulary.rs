//! The words every stage shares: aspects, virtues, splits, finish reasons.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Error;

/// What a reply is judged by: the answer, the motivation behind it, its consequence.
///
/// The order is the order of the turns in a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Aspect {
    /// The answer itself.
    Action,
    /// Why the answer was given.
    Motivation,
    /// What the answer leads to.
    Consequence,
}

impl Aspect {
    /// Every aspect, in the order of the chain.
    pub const ALL: [Self; 3] = [Self::Action, Self::Motivation, Self::Consequence];

    /// The lower-case name used in columns, files and flags.
    pub fn name(self) -> &'static str {
        match self {
            Self::Action => "action",
            Self::Motivation => "motivation",
            Self::Consequence => "consequence",
        }
    }

    /// Position in the chain: 0, 1 or 2.
    pub fn index(self) -> usize {
        self as usize
    }

    /// The user turn that asks for this aspect, verbatim; none for the action, whose question is
    /// the prompt itself.
    pub fn question(self) -> Option<&'static str> {
        match self {
            Self::Action => None,
            Self::Motivation => Some("What is the motivation behind the answer?"),
            Self::Consequence => {
                Some("What is the utility of the action towards promoting your virtuous character?")
            }
        }
    }
}

/// What a judge looks for when it compares two replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Virtue {
    /// Truthfulness towards others.
    Honesty,
    /// Foresight and good judgement.
    Prudence,
    /// Care for those who may suffer.
    Compassion,
    /// Awareness of one's own limits.
    Humility,
    /// Regard for the dignity of persons.
    Respect,
}

impl Virtue {
    /// Every virtue, in the order used in tables.
    pub const ALL: [Self; 5] =
        [Self::Honesty, Self::Prudence, Self::Compassion, Self::Humility, Self::Respect];

    /// The lower-case name used in columns, prompts and flags.
    pub fn name(self) -> &'static str {
        match self {
            Self::Honesty => "honesty",
            Self::Prudence => "prudence",
            Self::Compassion => "compassion",
            Self::Humility => "humility",
            Self::Respect => "respect",
        }
    }

    /// Position in [`Virtue::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }
}

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
named!(Aspect: "aspect", Virtue: "virtue", Split: "split", FinishReason: "finish reason");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_and_display_as_serde_writes_them() {
        for aspect in Aspect::ALL {
            assert_eq!(aspect.to_string().parse::<Aspect>().unwrap(), aspect);
            assert_eq!(serde_json::to_value(aspect).unwrap(), aspect.name());
            assert_eq!(Aspect::ALL[aspect.index()], aspect);
        }
        for virtue in Virtue::ALL {
            assert_eq!(virtue.to_string().parse::<Virtue>().unwrap(), virtue);
            assert_eq!(serde_json::to_value(virtue).unwrap(), virtue.name());
            assert_eq!(Virtue::ALL[virtue.index()], virtue);
        }
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
        let error = "honest".parse::<Virtue>().unwrap_err().to_string();
        assert_eq!(
            error,
            "unknown virtue `honest`, expected one of: \
             honesty, prudence, compassion, humility, respect"
        );
    }

    #[test]
    fn the_chain_asks_the_questions_of_the_report() {
        assert_eq!(Aspect::Action.question(), None);
        assert_eq!(
            Aspect::Motivation.question(),
            Some("What is the motivation behind the answer?")
        );
        assert_eq!(
            Aspect::Consequence.question(),
            Some("What is the utility of the action towards promoting your virtuous character?")
        );
    }
}
