//! What a run's preferences and reward models are of: a directory each, named as a turn of the chain, or otherwise, as a virtue.
//!
//! Of a turn's name it is about that turn's reply; of every other name about the answer. PPO, scoring and the page go by it.

use std::path::{Path, PathBuf};

use arete_model::Error;
use arete_records::Aspect;
use arete_records::hashes::{RUN_JSON, STAGE_JSON};

use crate::Turns;

/// A set of preferences, or the reward model trained on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its name: a turn's, or a virtue's.
    pub name: Aspect,
    /// Place of the turn whose reply it is about.
    pub turn: usize,
    /// Its directory.
    pub dir: PathBuf,
}

impl Member {
    /// The one of that name among those in `dir`.
    pub fn new(dir: &Path, name: Aspect, turns: &Turns) -> Self {
        Self { name, turn: turns.place(name).unwrap_or(0), dir: dir.join(name.name()) }
    }

    /// Whether it is named as the turn that it is about.
    pub fn is_of_turn(&self, turns: &Turns) -> bool {
        turns.place(self.name).is_some()
    }
}

/// The reward models in `dir`, finished or not.
///
/// # Errors
///
/// [`Error::Io`].
pub fn reward_models(dir: &Path, turns: &Turns) -> Result<Vec<Member>, Error> {
    let marks = ["adapter", RUN_JSON, STAGE_JSON];
    members(dir, turns, |own| marks.iter().any(|mark| own.join(mark).exists()))
}

/// The reward models in `dir`, one at least.
///
/// # Errors
///
/// [`Error::Field`] if there is none, [`Error::Io`].
pub fn some_reward_models(dir: &Path, turns: &Turns) -> Result<Vec<Member>, Error> {
    let found = reward_models(dir, turns)?;
    if found.is_empty() {
        let expected = format!(
            "a directory for each reward model ({}/adapter, say)",
            dir.join(turns.answer().name()).display()
        );
        return Err(Error::Field {
            path: dir.to_owned(),
            field: "reward models".to_owned(),
            expected,
            found: "none".to_owned(),
        });
    }
    Ok(found)
}

/// The sets of preferences in `dir` that there is something to learn from.
///
/// # Errors
///
/// [`Error::Io`].
pub fn preference_sets(dir: &Path, turns: &Turns) -> Result<Vec<Member>, Error> {
    members(dir, turns, |own| own.join("train.parquet").is_file())
}

/// Directories in `dir` that are some, in the order of the replies they are about; those named as their turn before others. What
/// cannot be a name (`action.old-1`, where results were set aside) is none.
fn members(dir: &Path, turns: &Turns, is: impl Fn(&Path) -> bool) -> Result<Vec<Member>, Error> {
    let mut found = Vec::new();
    if dir.is_dir() {
        for entry in fs_err::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name().to_str().and_then(|name| Aspect::new(name).ok());
            if let Some(name) = name.filter(|_| is(&entry.path())) {
                found.push(Member::new(dir, name, turns));
            }
        }
    }
    found.sort_by_key(|own| (own.turn, !own.is_of_turn(turns), own.name));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_and_virtues_are_found_in_the_order_of_what_they_read() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["motivation", "respect", "action", "honesty", "action.old-1", ".hidden"] {
            fs_err::create_dir_all(dir.path().join(name).join("adapter")).unwrap();
        }
        fs_err::create_dir_all(dir.path().join("empty")).unwrap();
        fs_err::create_dir_all(dir.path().join("consequence")).unwrap();
        fs_err::write(dir.path().join("consequence/stage.json"), "{}").unwrap(); // still at work
        let found = reward_models(dir.path(), &Turns::default()).unwrap();
        let of = |own: &Member| (own.name.name(), own.turn);
        let expected =
            [("action", 0), ("honesty", 0), ("respect", 0), ("motivation", 1), ("consequence", 2)];
        assert_eq!(found.iter().map(of).collect::<Vec<_>>(), expected);
        assert_eq!(found[1].dir, dir.path().join("honesty"));
        assert!(preference_sets(dir.path(), &Turns::default()).unwrap().is_empty());
        fs_err::write(dir.path().join("honesty/train.parquet"), "").unwrap();
        let sets = preference_sets(dir.path(), &Turns::default()).unwrap();
        assert_eq!(sets.iter().map(of).collect::<Vec<_>>(), [("honesty", 0)]);
        let none = some_reward_models(&dir.path().join("nowhere"), &Turns::default());
        assert!(none.unwrap_err().to_string().contains("action/adapter"), "the first is named");
    }
}
