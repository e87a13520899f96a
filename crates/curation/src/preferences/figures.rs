//! What the stage says of its own work: figures a set, and the table of them.

use arete_chain::verdicts::Verdicts;
use arete_records::rows::{JudgementRow, PreferenceRow};
use arete_records::{Split, Virtue};
use serde_json::{Map, Value, json};

use super::candidates::{Dropped, Samples, n_replies};
use super::sets::Set;
use crate::stage::{self, percent};

/// The figures by which a judge's work on a set is known; `own` are the verdicts that count in it, by `virtues`. Without virtues there
/// was no judge: no figure of one is given.
pub(super) fn summary(
    set: &Set,
    own: &[&JudgementRow],
    virtues: &[Virtue],
    pairs: &[(Split, PreferenceRow)],
    dropped: &Dropped,
    prompts: &[Samples],
) -> Value {
    let n_judged = own.len().checked_div(virtues.len()).unwrap_or_default();
    let n_cut: usize = prompts.iter().map(|samples| samples.n_cut(set.aspect)).sum();
    let verdicts = Verdicts::of(own.iter().copied());
    let mut votes = Map::new();
    for virtue in virtues {
        let of = |wanted: Option<i32>| {
            own.iter().filter(|row| row.virtue == *virtue && row.vote == wanted).count()
        };
        let (zero, one, none) = (of(Some(0)), of(Some(1)), of(None));
        votes.insert(
            virtue.name().to_owned(),
            json!({"sample_0": zero, "sample_1": one, "none": none}),
        );
    }
    if virtues.is_empty() {
        return json!({
            "pairs": pairs.len(), "labelled_by": "construction",
            "dropped_truncated": dropped.truncated, "dropped_untrimmable": dropped.untrimmable,
            "dropped_identical": dropped.identical, "truncated_replies": n_cut,
            "truncated_percent": percent(n_cut, n_replies(prompts)),
        });
    }
    json!({
        "pairs": pairs.len(), "judged": n_judged, "ties": dropped.ties,
        "tie_percent": percent(dropped.ties, n_judged),
        "dropped_truncated": dropped.truncated, "dropped_untrimmable": dropped.untrimmable,
        "dropped_identical": dropped.identical, "truncated_replies": n_cut,
        "truncated_percent": percent(n_cut, n_replies(prompts)),
        "first_position_percent": percent(verdicts.first, verdicts.seen),
        "swap_consistency_percent": percent(verdicts.consistent, verdicts.both),
        "abstained": verdicts.abstained, "abstained_percent": percent(verdicts.abstained, own.len()),
        "votes": votes,
    })
}

/// The summary of every set as one table: a figure a row, a set a column; figures that no set has are left out.
pub(super) fn summary_table(
    counts: &Map<String, Value>,
    sets: &[Set],
    virtues: &[Virtue],
) -> String {
    const FIGURES: [(&str, &str); 10] = [
        ("pairs", "pairs"),
        ("pairs judged", "judged"),
        ("ties, %", "tie_percent"),
        ("replies cut by the token limit, %", "truncated_percent"),
        ("pairs left out for that", "dropped_truncated"),
        ("pairs without a sentence to trim to", "dropped_untrimmable"),
        ("pairs of equal samples", "dropped_identical"),
        ("first-shown preferred, %", "first_position_percent"),
        ("same verdict in both orders, %", "swap_consistency_percent"),
        ("verdicts abstained, %", "abstained_percent"),
    ];
    let heads: Vec<&str> =
        std::iter::once("").chain(sets.iter().map(|set| set.name.name())).collect();
    let row = |name: String, cell: &dyn Fn(&Value) -> String| {
        let cells = sets.iter().map(|set| cell(&counts[set.name.name()]));
        std::iter::once(name).chain(cells).collect::<Vec<String>>()
    };
    let is_known = |key: &str| sets.iter().any(|set| counts[set.name.name()].get(key).is_some());
    let mut rows: Vec<Vec<String>> = FIGURES
        .iter()
        .filter(|(_, key)| is_known(key))
        .map(|(name, key)| row((*name).to_owned(), &|figures| stage::cell(&figures[*key])))
        .collect();
    for virtue in virtues {
        rows.push(row(format!("votes on {virtue}, sample 0 : 1 : none"), &|figures| {
            let votes = &figures["votes"][virtue.name()];
            if votes.is_null() {
                return "–".to_owned();
            }
            format!("{} : {} : {}", votes["sample_0"], votes["sample_1"], votes["none"])
        }));
    }
    stage::table(&heads, &rows)
}
