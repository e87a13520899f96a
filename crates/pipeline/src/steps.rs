//! The steps of a run: its stages in order, and those of every round where it has rounds.

use std::path::Path;

use anyhow::Result;
use arete_stage::exit::Usage;
use arete_stage::rounds;

use crate::setup::{Round, Setup};
use crate::stages::{PIPELINE, Stage};

/// A stage, and the setup that it runs with.
pub struct Step {
    /// The stage.
    pub stage: &'static Stage,
    /// Its setup: that of its round, if the run has rounds.
    pub setup: Setup,
}

impl Step {
    /// What it is called: `reward`, `round-2/reward`.
    pub fn label(&self) -> String {
        match self.round() {
            Some(round) => format!("round-{round}/{}", self.stage.name),
            None => self.stage.name.to_owned(),
        }
    }

    /// The round whose directory it writes to; none of what a run has once.
    pub fn round(&self) -> Option<u64> {
        let name = self.stage.name;
        let is_in_round = rounds::REPEATED.contains(&name) || rounds::ONCE.contains(&name);
        self.setup.round.filter(|_| is_in_round).map(|round| round.number)
    }

    /// The step that it reads a stage's results from, among those before it. From the second round on, what the round before tuned
    /// stands where the fine-tuned model stood.
    pub fn reads<'a>(&self, name: &str, earlier: &'a [Self]) -> Option<&'a Self> {
        let before = self.setup.round.map_or(0, |round| round.number - 1);
        let (name, round) = match (name, self.setup.policy()) {
            ("sft", Ok(Some(policy))) if before > 0 => (policy, Some(before)),
            _ => (name, None),
        };
        let is_that =
            |step: &&Self| step.stage.name == name && (round.is_none() || step.round() == round);
        earlier.iter().rev().find(is_that)
    }
}

/// Every step that is in, in order.
///
/// # Errors
///
/// As [`Setup::has`].
pub fn of(setup: &Setup) -> Result<Vec<Step>> {
    let stages = setup.stages()?;
    let Some(Round { of, .. }) = setup.round else {
        return Ok(stages.into_iter().map(|stage| Step { stage, setup: setup.clone() }).collect());
    };
    let mut steps = Vec::new();
    for number in 1..=of {
        let own = setup.in_round(number);
        for &stage in &stages {
            let is_once = rounds::ONCE.contains(&stage.name);
            if rounds::REPEATED.contains(&stage.name) || (is_once && number == 1) {
                steps.push(Step { stage, setup: own.clone() });
            }
        }
    }
    let is_last = |stage: &&Stage| {
        !rounds::REPEATED.contains(&stage.name) && !rounds::ONCE.contains(&stage.name)
    };
    let last = stages.into_iter().filter(is_last);
    steps.extend(last.map(|stage| Step { stage, setup: setup.in_round(of) }));
    Ok(steps)
}

/// Refuses rounds that cannot be: nothing is tuned, what is tuned is not merged, or a run without rounds is there.
///
/// # Errors
///
/// What is missing, and what to do.
pub fn check(setup: &Setup) -> Result<()> {
    if setup.round.is_none() {
        return Ok(());
    }
    let refuse = |message: String| Err(Usage(message).into());
    let Some(policy) = setup.policy()? else {
        return refuse(
            "--rounds: a round begins with what the one before tuned: put `ppo` or `dpo` in"
                .to_owned(),
        );
    };
    let stage = Stage::named(policy).expect("a name of the list");
    if (stage.settings)(setup)?.get("merge").is_some_and(|merges| merges == false) {
        return refuse(format!(
            "--rounds: a round begins with the merged policy: {policy}.merge = true"
        ));
    }
    if let Some(stage) = without_rounds(&setup.dir) {
        return refuse(format!(
            "{}: holds a run without rounds ({stage}): name another --run, or move its stages into {} to go on from them",
            setup.dir.display(),
            rounds::dir(&setup.dir, 1).display()
        ));
    }
    Ok(())
}

/// A stage of a run without rounds that is there.
fn without_rounds(run: &Path) -> Option<&'static str> {
    let is_in_round = |name: &&str| rounds::REPEATED.contains(name) || rounds::ONCE.contains(name);
    let names = PIPELINE.iter().map(|stage| stage.name).filter(is_in_round);
    names.into_iter().find(|name| run.join(name).exists())
}
