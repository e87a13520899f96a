//! The names that a constitution gives: those of its turns (aspects) and of its virtues.
//!
//! A name is a handle as cheap as a number: each is kept once for the life of the program. The shipped ones are
//! constants; every other comes from a constitution file or from a file of a run.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, OnceLock, PoisonError};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use unicode_normalization::is_nfc;

use crate::Error;

/// Longest name, in bytes: names are parts of columns and directories.
pub const MAX_NAME_BYTES: usize = 48;

/// Most names a program keeps; no constitution has as many, but a hostile file may.
const MAX_NAMES: usize = 10_000;

/// What a name is made of, for messages.
pub const NAME_RULE: &str =
    "a name of at most 48 bytes that begins with a letter, of lower-case letters, digits, - and _";

/// Names that files, columns, metrics or flags use for something else.
const TAKEN_ASPECTS: [&str; 22] = [
    "all",
    "gain",
    "iteration",
    "judgements",
    "kl",
    "mean",
    "messages",
    "model",
    "persona",
    "prompt",
    "prompt_id",
    "prompts",
    "reward",
    "sample",
    "score",
    "seed",
    "shards",
    "split",
    "use",
    "worse",
    "yardstick",
    "none",
];
/// What columns and metrics put before a name.
const TAKEN_PREFIXES: [&str; 6] =
    ["finish_reason_", "length_", "n_tokens_", "score_", "truncated_", "z_"];
/// Names that the judge's tables use for something else.
const TAKEN_VIRTUES: [&str; 4] = ["all", "length", "none", "votes"];

/// The one copy of a name.
fn kept(name: &str) -> Option<&'static str> {
    static NAMES: OnceLock<Mutex<BTreeSet<&'static str>>> = OnceLock::new();
    let names = NAMES.get_or_init(Mutex::default);
    let mut names = names.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = names.get(name) {
        return Some(known);
    }
    if names.len() >= MAX_NAMES {
        return None;
    }
    let name: &'static str = Box::leak(name.to_owned().into_boxed_str());
    names.insert(name);
    Some(name)
}

/// Whether a text is of the form that [`NAME_RULE`] says.
fn is_name(text: &str) -> bool {
    let lower = |c: char| c.is_alphabetic() && !c.is_uppercase();
    text.len() <= MAX_NAME_BYTES
        && is_nfc(text)
        && text.chars().next().is_some_and(lower)
        && text.chars().all(|c| lower(c) || c.is_ascii_digit() || "-_".contains(c))
}

macro_rules! names {
    ($($(#[$about:meta])* $type:ident: $what:literal, $taken:expr, [$($(#[$doc:meta])* $constant:ident = $name:literal),*];)*) => {$(
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub struct $type(&'static str);

        impl $type {
            $($(#[$doc])* pub const $constant: Self = Self($name);)*

            /// Those of the shipped constitution, in its order.
            pub const SHIPPED: [Self; [$($name),*].len()] = [$(Self::$constant),*];

            /// A name, checked.
            ///
            /// # Errors
            ///
            /// [`Error::BadName`] if it is not of the form of a name, or names something else in our files.
            pub fn new(name: &str) -> Result<Self, Error> {
                if let Some(shipped) = Self::SHIPPED.into_iter().find(|own| own.0 == name) {
                    return Ok(shipped);
                }
                let bad = |expected: &str| Error::BadName {
                    what: $what,
                    got: name.chars().take(MAX_NAME_BYTES).collect(),
                    expected: expected.to_owned(),
                };
                if !is_name(name) {
                    return Err(bad(NAME_RULE));
                }
                if $taken(name) {
                    return Err(bad("another name: this one has a meaning in our files"));
                }
                kept(name).map(Self).ok_or_else(|| bad("fewer names in one program"))
            }

            /// As it stands in columns, files, prompts and flags.
            pub fn name(self) -> &'static str {
                self.0
            }

            /// Place among the shipped ones; past them for every other.
            fn rank(self) -> usize {
                Self::SHIPPED.iter().position(|own| own.0 == self.0).unwrap_or(Self::SHIPPED.len())
            }
        }

        /// The shipped ones in their order, then every other by its letters. The order of a constitution is its own.
        impl Ord for $type {
            fn cmp(&self, other: &Self) -> Ordering {
                (self.rank(), self.0).cmp(&(other.rank(), other.0))
            }
        }

        impl PartialOrd for $type {
            fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
                Some(self.cmp(other))
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.0)
            }
        }

        impl FromStr for $type {
            type Err = Error;

            fn from_str(name: &str) -> Result<Self, Error> {
                Self::new(name)
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.0)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Visitor;

                impl serde::de::Visitor<'_> for Visitor {
                    type Value = $type;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str(concat!("the name of a ", $what))
                    }

                    fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<$type, E> {
                        $type::new(name).map_err(E::custom)
                    }
                }
                deserializer.deserialize_str(Visitor)
            }
        }
    )*};
}

names! {
    /// What a reply is judged by, and with it a turn of the chain: as shipped the answer, the motivation behind it and
    /// its consequence.
    Aspect: "aspect",
    |name: &str| {
        TAKEN_ASPECTS.contains(&name) || TAKEN_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
    },
    [
        /// The answer itself.
        ACTION = "action",
        /// Why the answer was given.
        MOTIVATION = "motivation",
        /// What the answer leads to.
        CONSEQUENCE = "consequence"
    ];
    /// What a judge looks for when it compares two replies.
    Virtue: "virtue",
    |name: &str| TAKEN_VIRTUES.contains(&name),
    [
        /// Truthfulness towards others.
        HONESTY = "honesty",
        /// Foresight and good judgement.
        PRUDENCE = "prudence",
        /// Care for those who may suffer.
        COMPASSION = "compassion",
        /// Awareness of one's own limits.
        HUMILITY = "humility",
        /// Regard for the dignity of persons.
        RESPECT = "respect"
    ];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_and_display_as_serde_writes_them() {
        for name in
            ["action", "motivation", "consequence", "deed", "why-so", "güte", "仁", "turn_2"]
        {
            let aspect: Aspect = name.parse().unwrap();
            assert_eq!((aspect.name(), aspect.to_string().as_str()), (name, name));
            assert_eq!(serde_json::to_value(aspect).unwrap(), name);
            assert_eq!(serde_json::from_value::<Aspect>(name.into()).unwrap(), aspect);
        }
        assert_eq!("honesty".parse::<Virtue>().unwrap(), Virtue::HONESTY);
        assert_eq!(serde_json::to_value(Virtue::RESPECT).unwrap(), "respect");
        let keys = std::collections::BTreeMap::from([(Aspect::new("deed").unwrap(), 1)]);
        let text = serde_json::to_string(&keys).unwrap();
        assert_eq!(text, r#"{"deed":1}"#);
        assert_eq!(
            serde_json::from_str::<std::collections::BTreeMap<Aspect, i32>>(&text).unwrap(),
            keys
        );
    }

    #[test]
    fn the_shipped_ones_come_first_in_their_order() {
        let mut names = ["why", "consequence", "deed", "motivation", "action"]
            .map(|name| Aspect::new(name).unwrap());
        names.sort();
        assert_eq!(names.map(Aspect::name), ["action", "motivation", "consequence", "deed", "why"]);
    }

    #[test]
    fn what_is_no_name_is_refused_with_what_one_is() {
        let long = "a".repeat(49);
        for bad in ["", "Ren", "1st", "a b", "a/b", "..", "a.b", "e\u{301}", "-a", &long] {
            let error = Aspect::new(bad).unwrap_err().to_string();
            assert!(error.contains("begins with a letter"), "{bad}: {error}");
            assert!(Virtue::new(bad).is_err());
        }
        for taken in ["prompt_id", "shards", "score_x", "z_mean", "mean", "all"] {
            let error = Aspect::new(taken).unwrap_err().to_string();
            assert!(error.contains("has a meaning in our files"), "{taken}: {error}");
        }
        assert_eq!(
            Virtue::new("votes").unwrap_err().to_string(),
            "virtue `votes`: expected another name: this one has a meaning in our files"
        );
    }
}
