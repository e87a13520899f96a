//! The sets of preferences that reward models are wanted for.

use std::path::Path;

use anyhow::{Result, bail};
use arete_chain::constitution::listed;
use arete_chain::sample::key_of;
use arete_chain::{Member, Turns, members};
use arete_records::hashes::{RUN_JSON, STAGE_JSON};
use arete_records::{Aspect, Refusal};

/// The sets that reward models are wanted for: all that there are, or those named.
pub(crate) fn wanted(dir: &Path, turns: &Turns, named: &[Aspect]) -> Result<Vec<Member>> {
    let found = members::preference_sets(dir, turns)?;
    if named.is_empty() && !found.is_empty() {
        return complete(dir, turns, found);
    }
    let turns_names = turns.names();
    let known: Vec<Aspect> = {
        let others = found.iter().map(|own| own.name).filter(|name| !turns_names.contains(name));
        turns_names.iter().copied().chain(others).collect()
    };
    let named = if named.is_empty() { &turns_names } else { named };
    let of = |&name: &Aspect| {
        if known.contains(&name) {
            return Ok(Member::new(dir, name, turns));
        }
        let expected = format!("all, or a turn of the constitution: {}", listed(&turns_names));
        let virtues = &known[turns_names.len()..];
        let expected = match virtues {
            [] => expected,
            _ => format!("{expected}; or a set that is there: {}", listed(virtues)),
        };
        Err(Refusal::setting("aspect", &expected, name.name()).into())
    };
    named.iter().map(of).collect()
}

/// These sets, unless the stage that writes them was stopped half-way. Of a turn there need be none.
fn complete(dir: &Path, turns: &Turns, found: Vec<Member>) -> Result<Vec<Member>> {
    if dir.join(STAGE_JSON).is_file() && !dir.join(RUN_JSON).is_file() {
        let expected = format!("{}: preferences that are complete", dir.display());
        bail!(Refusal::setting(
            "preferences",
            &expected,
            "a stage that was stopped: let it end first",
        ));
    }
    let has_turns = found.iter().any(|own| own.is_of_turn(turns));
    for turn in turns.names().into_iter().filter(|_| has_turns) {
        if found.iter().all(|own| own.name != turn) {
            tracing::warn!(%turn, "no preferences about this turn: no reward model of it");
        }
    }
    Ok(found)
}

/// The seed of a reward model's head. Each starts elsewhere: an ensemble whose members start alike errs alike.
pub(crate) fn head_seed(seed: u64, set: Option<&Member>, turns: &Turns) -> u64 {
    let own = match set {
        Some(set) if set.is_of_turn(turns) => set.turn as u64,
        Some(set) => key_of(set.name.name()),
        None => 0,
    };
    seed.wrapping_add(own)
}
