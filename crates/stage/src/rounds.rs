//! Rounds: a run whose tuned policy answers, is judged, teaches new reward models and is tuned again.
//!
//! `RUN/round-N/` has the layout of a run. What is done once is in the first; Scores and page of all rounds are in `RUN` itself.

use std::path::{Path, PathBuf};

/// Stages that every round has.
pub const REPEATED: [&str; 5] = ["conversations", "preferences", "reward", "dpo", "ppo"];
/// Stages that the first round has for all of them.
pub const ONCE: [&str; 3] = ["prompts", "demonstrations", "sft"];

/// The directory of a round in a run.
pub fn dir(run: &Path, round: u64) -> PathBuf {
    run.join(format!("round-{round}"))
}

/// The directory of a stage, or of something in it (`sft/merged`), in a run that has come to `round`; of what is neither repeated nor
/// done once, that in the run itself.
pub fn place(run: &Path, round: u64, name: &str) -> PathBuf {
    let stage = name.split('/').next().unwrap_or(name);
    if REPEATED.contains(&stage) {
        dir(run, round).join(name)
    } else if ONCE.contains(&stage) {
        dir(run, 1).join(name)
    } else {
        run.join(name)
    }
}

/// The newest round that a run has; none if it is no run of rounds.
pub fn newest(run: &Path) -> Option<u64> {
    (1..).take_while(|&round| dir(run, round).is_dir()).last()
}

/// Where a stage of a run is, whether it has rounds or not: that of the newest round.
pub fn newest_place(run: &Path, name: &str) -> PathBuf {
    newest(run).map_or_else(|| run.join(name), |round| place(run, round, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_stage_has_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path();
        assert_eq!(newest(run), None);
        assert_eq!(newest_place(run, "ppo"), run.join("ppo"));
        for round in ["round-1", "round-2", "round-4"] {
            fs_err::create_dir(run.join(round)).unwrap();
        }
        assert_eq!(newest(run), Some(2)); // what comes after a gap is none
        assert_eq!(newest_place(run, "reward/action"), run.join("round-2/reward/action"));
        assert_eq!(newest_place(run, "sft/merged"), run.join("round-1/sft/merged"));
        assert_eq!(newest_place(run, "scoring"), run.join("scoring"));
    }
}
