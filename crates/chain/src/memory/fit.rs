//! What of a stage's settings has to change for it to fit.

use super::{Demand, Settings, Shape};

impl Shape {
    /// Whether a stage fits into `bytes`: the changes of its settings that it takes (none if it fits as it is).
    ///
    /// # Errors
    ///
    /// What it needs even after all of them.
    pub fn fitting(&self, demand: &Demand, bytes: u64) -> Result<Vec<String>, u64> {
        let need = |settings: &Settings| self.need_with(demand.role, settings).peak().1;
        fit(bytes, demand.keys, &demand.settings, need)
    }
}

/// A change of one setting that saves memory.
type Change = fn(&mut Settings) -> Option<String>;

/// Changes in the order in which we would make them: those that cost least first.
const CHANGES: [Change; 5] = [
    |s| (!std::mem::replace(&mut s.recompute, true)).then(|| "recompute = true".to_owned()),
    |s| (!std::mem::replace(&mut s.nf4, true)).then(|| "nf4 = true".to_owned()),
    |s| {
        let old = std::mem::replace(&mut s.keep_graph_tokens, 0);
        (old > 0).then(|| "keep_graph_tokens = 0".to_owned())
    },
    |s| {
        let new = s.micro_batch_tokens.min(512);
        let old = std::mem::replace(&mut s.micro_batch_tokens, new);
        (old > new).then(|| format!("micro_batch_tokens = {new}"))
    },
    |s| {
        let new = s.max_rows.min(8);
        let old = std::mem::replace(&mut s.max_rows, new);
        (old > new).then(|| format!("max_rows = {new}"))
    },
];

/// Whether a stage fits into `bytes`: `Ok` with the changes that it takes (none if it fits as it is), `Err` with what it
/// needs even after all of them.
pub(super) fn fit(
    bytes: u64,
    keys: &[&str],
    settings: &Settings,
    need: impl Fn(&Settings) -> u64,
) -> Result<Vec<String>, u64> {
    let (mut settings, mut changes) = (settings.clone(), Vec::new());
    if need(&settings) <= bytes {
        return Ok(changes);
    }
    for change in CHANGES {
        let before = settings.clone();
        let Some(text) = change(&mut settings) else { continue };
        let key = text.split(' ').next().unwrap_or_default();
        if !keys.contains(&key) || need(&settings) >= need(&before) {
            settings = before;
            continue;
        }
        changes.push(text);
        if need(&settings) <= bytes {
            return Ok(changes);
        }
    }
    Err(need(&settings))
}

#[cfg(test)]
mod tests {
    use arete_model::machine::Dtype;

    use super::*;

    #[test]
    fn changes_are_made_until_it_fits_and_no_further() {
        let settings = Settings { micro_batch_tokens: 1024, ..Settings::new(Dtype::Auto, false) };
        let need = |s: &Settings| {
            1000 - 300 * u64::from(s.recompute)
                - 400 * u64::from(s.nf4)
                - u64::from(s.micro_batch_tokens == 512)
        };
        let keys = ["recompute", "nf4", "micro_batch_tokens"];
        let fit = |bytes| fit(bytes, &keys, &settings, need);
        assert_eq!(fit(1000), Ok(vec![]));
        assert_eq!(fit(700), Ok(vec!["recompute = true".to_owned()]));
        let both = ["recompute = true", "nf4 = true"].map(str::to_owned).to_vec();
        assert_eq!(fit(300), Ok(both));
        assert_eq!(fit(200), Err(299));
    }
}
