//! Agreement of every method with the labels, and what follows from it.

use std::collections::{BTreeMap, HashMap};

use arete_chain::rulers::NullRulers;
use arete_chain::verdicts::Verdicts;
use arete_chain::verdicts::virtues_of;
use arete_records::rows::JudgementRow;
use arete_records::stats::{Interval, normal_quantile, pearson, wilson};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::virtues::VirtueLine;
use super::{Labelled, virtues};
use crate::judge::Method;
use crate::judge::verdict::Tally;
use crate::stage::{self, cell};

/// 97.5 % quantile of the normal distribution: 95 % intervals.
const Z95: f64 = 1.959_963_984_540_054;

/// Successes of a choice between two.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// Pairs decided.
    pub n: u64,
    /// Of those, the ones decided as labelled.
    pub agreed: u64,
    /// Their share.
    pub estimate: f64,
    /// Lower end of its 95 % interval (Wilson).
    pub low: f64,
    /// Upper end of its 95 % interval (Wilson).
    pub high: f64,
}

impl Agreement {
    pub(super) fn of(outcomes: impl IntoIterator<Item = bool>) -> Self {
        Self::at(outcomes, Z95)
    }

    /// With an interval of another level: `z` standard deviations.
    pub(super) fn at(outcomes: impl IntoIterator<Item = bool>, z: f64) -> Self {
        let (mut n, mut agreed) = (0, 0);
        for outcome in outcomes {
            n += 1;
            agreed += u64::from(outcome);
        }
        if n == 0 {
            return Self { n, agreed, estimate: 0.5, low: 0.0, high: 1.0 };
        }
        let Interval { estimate, low, high } = wilson(agreed, n, z);
        Self { n, agreed, estimate, low, high }
    }
}

/// A line of the calibration table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Line {
    /// The file, or `all`.
    pub set: String,
    /// The method, or `shorter` for the baseline.
    pub method: String,
    /// Judged examples shown.
    pub few_shot: usize,
    /// A virtue, or `votes` for the five together.
    pub by: String,
    /// Agreement with the labels, among decided pairs.
    pub agreement: Agreement,
    /// What knows nothing of what is right, on the decided pairs; none of the baseline, which is one of them.
    pub null_rulers: Option<NullRulers>,
    /// Share of undecided pairs, per cent.
    pub tie_percent: Value,
    /// Share of verdicts abstained, per cent.
    pub abstained_percent: Value,
    /// Share of one-order verdicts for the side shown first, per cent.
    pub first_position_percent: Value,
    /// Share of pairs for which both orders name the same side, per cent.
    pub swap_consistency_percent: Value,
    /// Correlation of P(sample 0) with the difference of lengths in characters.
    pub length_correlation: Option<f64>,
    /// Whether the sides should be exchanged: below one half with its whole interval on one half of
    /// the data, and again on the other.
    pub flip: bool,
}

/// The table and what follows from it.
#[derive(Debug, Clone, Serialize)]
pub struct Calibration {
    /// The judge's name.
    pub judge: String,
    /// Pairs by set.
    pub pairs: BTreeMap<String, usize>,
    /// Every line.
    pub table: Vec<Line>,
    /// Every virtue by itself, on the pairs that differ in it alone.
    pub virtues: Vec<VirtueLine>,
    /// What to use.
    pub recommendation: Recommendation,
}

/// What to use.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recommendation {
    /// The method whose interval lies highest above one half; `None` if none does.
    pub method: Option<String>,
    /// Its judged examples.
    pub few_shot: usize,
    /// Whether with its sides exchanged.
    pub flip: bool,
    /// The reason in words.
    pub reason: String,
}

/// What choosing the shorter side gives.
pub(super) fn baseline(pairs: &[Labelled]) -> Vec<Line> {
    sets_of(pairs)
        .into_iter()
        .map(|set| {
            let own: Vec<&Labelled> = in_set(pairs, &set).collect();
            let outcomes = own.iter().filter_map(|pair| {
                let [zero, one] = pair.n_chars();
                (zero != one).then(|| usize::from(one < zero) == pair.better_sample())
            });
            let agreement = Agreement::of(outcomes);
            Line {
                set: set.clone(),
                method: "shorter".to_owned(),
                few_shot: 0,
                by: "length".to_owned(),
                agreement,
                null_rulers: None,
                tie_percent: stage::percent(own.len() - agreement.n as usize, own.len()),
                abstained_percent: json!(0.0),
                first_position_percent: Value::Null,
                swap_consistency_percent: Value::Null,
                length_correlation: None,
                flip: false,
            }
        })
        .collect()
}

/// The sets, and `all` if there are several.
fn sets_of(pairs: &[Labelled]) -> Vec<String> {
    let mut sets: Vec<String> = Vec::new();
    for pair in pairs {
        if !sets.contains(&pair.set) {
            sets.push(pair.set.clone());
        }
    }
    if sets.len() > 1 {
        sets.push("all".to_owned());
    }
    sets
}

fn in_set<'a>(pairs: &'a [Labelled], set: &'a str) -> impl Iterator<Item = &'a Labelled> {
    pairs.iter().filter(move |pair| set == "all" || pair.set == set)
}

/// The table's lines of one method: the votes on every set, each virtue over all pairs that do not differ in another one.
pub(super) fn lines(
    pairs: &[Labelled],
    rows: &[JudgementRow],
    method: Method,
    few_shot: usize,
) -> Vec<Line> {
    let mut by_pair: HashMap<&str, Vec<&JudgementRow>> = HashMap::new();
    for row in rows {
        by_pair.entry(&row.prompt_id).or_default().push(row);
    }
    let sets = sets_of(pairs);
    let mut out = Vec::new();
    for set in &sets {
        let own: Vec<(&Labelled, Vec<&JudgementRow>)> = in_set(pairs, set)
            .map(|pair| (pair, by_pair.get(pair.id.as_str()).cloned().unwrap_or_default()))
            .collect();
        out.push(line(set, method, few_shot, "votes", &own));
    }
    if method != Method::Likelihood {
        for virtue in virtues_of(rows) {
            let own: Vec<(&Labelled, Vec<&JudgementRow>)> = pairs
                .iter()
                .filter(|pair| pair.about.is_none_or(|about| about.virtue == virtue))
                .map(|pair| {
                    let rows = by_pair.get(pair.id.as_str()).cloned().unwrap_or_default();
                    (pair, rows.into_iter().filter(|row| row.virtue == virtue).collect())
                })
                .collect();
            let set = sets.last().expect("there are pairs");
            out.push(line(set, method, few_shot, virtue.name(), &own));
        }
    }
    out
}

fn line(
    set: &str,
    method: Method,
    few_shot: usize,
    by: &str,
    pairs: &[(&Labelled, Vec<&JudgementRow>)],
) -> Line {
    let mut halves: [Vec<bool>; 2] = [Vec::new(), Vec::new()];
    let mut verdicts = Verdicts::default();
    let (mut probabilities, mut lengths) = (Vec::new(), Vec::new());
    let (mut ruled, mut right) = (Vec::new(), Vec::new());
    for (pair, rows) in pairs {
        let tally = Tally::of(rows.iter().copied());
        if let Some(winner) = tally.winner() {
            halves[pair.half()].push(winner == pair.better_sample());
            ruled.push(pair.ruled());
            right.push(f64::from(u8::from(winner == pair.better_sample())));
        }
        for row in rows {
            verdicts.add(row);
        }
        if let Some(p) = tally.p_sample0 {
            let [zero, one] = pair.n_chars();
            probabilities.push(p);
            lengths.push(zero as f64 - one as f64);
        }
    }
    let below = |half: &[bool]| Agreement::of(half.iter().copied()).high < 0.5;
    let flip = below(&halves[0]) && below(&halves[1]);
    let agreement = Agreement::of(halves.concat());
    let correlation =
        if probabilities.len() > 2 { pearson(&probabilities, &lengths) } else { f64::NAN };
    Line {
        set: set.to_owned(),
        method: method.name().to_owned(),
        few_shot,
        by: by.to_owned(),
        agreement,
        null_rulers: NullRulers::beside(&ruled, &right),
        tie_percent: stage::percent(pairs.len() - agreement.n as usize, pairs.len()),
        abstained_percent: stage::percent(verdicts.abstained, verdicts.n),
        first_position_percent: stage::percent(verdicts.first, verdicts.seen),
        swap_consistency_percent: stage::percent(verdicts.consistent, verdicts.both),
        length_correlation: correlation.is_finite().then_some(correlation),
        flip,
    }
}

/// The method whose interval lies highest above one half over all sets, as it is or flipped.
///
/// The best of several is chosen, so its interval is that of Bonferroni's correction: 95 % for all of
/// them together. Otherwise one judge in five that only guesses would be recommended.
pub(super) fn recommend(table: &[Line]) -> Recommendation {
    let widest = if table.iter().any(|line| line.set == "all") {
        "all"
    } else {
        table.last().map_or("all", |line| line.set.as_str())
    };
    let candidates: Vec<&Line> =
        table.iter().filter(|line| line.by == "votes" && line.set == widest).collect();
    let z = normal_quantile(1.0 - 0.025 / candidates.len().max(1) as f64);
    let corrected = |line: &Line| wilson(line.agreement.agreed, line.agreement.n, z);
    let floor = |line: &Line| match line.flip {
        true => 1.0 - corrected(line).high,
        false => corrected(line).low,
    };
    let best = candidates.iter().copied().max_by(|a, b| floor(a).total_cmp(&floor(b)));
    let beside = |line: &Line| {
        line.null_rulers.as_ref().map_or("no null ruler".to_owned(), NullRulers::words)
    };
    let figure = |line: &Line| {
        let Interval { low, high, .. } = corrected(line);
        format!(
            "{:.1} % of the labels (95 % interval, corrected for {} methods, {:.1} to {:.1})",
            100.0 * line.agreement.estimate,
            candidates.len(),
            100.0 * low,
            100.0 * high
        )
    };
    if !candidates.is_empty() && candidates.iter().all(|line| line.agreement.n == 0) {
        let shares = candidates.iter().map(|line| {
            let (abstained, tied) = (&line.abstained_percent, &line.tie_percent);
            format!("{}: {abstained} % of verdicts abstained, {tied} % of pairs tied", line.method)
        });
        let shares: Vec<String> = shares.collect();
        let reason = format!(
            "the judge decided no pair ({}): its answers name neither side; use another judge or \
             judge_template, or method = \"contrast\" (labels by construction)",
            shares.join("; ")
        );
        return Recommendation { method: None, few_shot: 0, flip: false, reason };
    }
    match best {
        Some(line) if floor(line) > 0.5 => Recommendation {
            method: Some(line.method.clone()),
            few_shot: line.few_shot,
            flip: line.flip,
            reason: format!(
                "agrees with {}{}; {}; {}",
                figure(line),
                if line.flip { ", so its sides are exchanged" } else { "" },
                by_set(table, line),
                beside(line)
            ),
        },
        best => Recommendation {
            method: None,
            few_shot: 0,
            flip: false,
            reason: format!(
                "no method's interval lies above 50 %{}: use method = \"contrast\" (labels by \
                 construction), or a stronger judge",
                best.map(|line| format!(
                    " (best: {} with {}; {})",
                    line.method,
                    figure(line),
                    beside(line)
                ))
                .unwrap_or_default()
            ),
        },
    }
}

/// A method's agreement on each set by itself: a judge may know the style of one and nothing else.
fn by_set(table: &[Line], best: &Line) -> String {
    let own = table.iter().filter(|line| {
        (&line.method, line.few_shot, line.by.as_str()) == (&best.method, best.few_shot, "votes")
            && line.set != "all"
    });
    let each = own.map(|line| {
        let Agreement { estimate, low, high, .. } = line.agreement;
        format!("{} {:.0} % [{:.0}, {:.0}]", line.set, 100.0 * estimate, 100.0 * low, 100.0 * high)
    });
    format!("by set: {}", each.collect::<Vec<_>>().join(", "))
}

/// The table for people, and the recommendation.
pub(super) fn markdown(calibration: &Calibration) -> String {
    let heads = [
        "pairs",
        "method",
        "few-shot",
        "by",
        "n",
        "agreement %",
        "95 % interval",
        "best null ruler; lead",
        "ties %",
        "abstained %",
        "first-shown %",
        "same in both orders %",
        "r with length",
        "flip",
    ];
    let rows: Vec<Vec<String>> = (calibration.table.iter())
        .map(|line| {
            vec![
                line.set.clone(),
                line.method.clone(),
                line.few_shot.to_string(),
                line.by.clone(),
                line.agreement.n.to_string(),
                format!("{:.1}", 100.0 * line.agreement.estimate),
                format!("{:.1} to {:.1}", 100.0 * line.agreement.low, 100.0 * line.agreement.high),
                line.null_rulers.as_ref().map_or("–".to_owned(), NullRulers::words),
                cell(&line.tie_percent),
                cell(&line.abstained_percent),
                cell(&line.first_position_percent),
                cell(&line.swap_consistency_percent),
                line.length_correlation.map_or("–".to_owned(), |r| format!("{r:.2}")),
                if line.flip { "yes" } else { "no" }.to_owned(),
            ]
        })
        .collect();
    let Recommendation { method, few_shot, reason, .. } = &calibration.recommendation;
    let name = match method {
        Some(method) => format!("`{method}` with {few_shot} judged examples"),
        None => "no judge".to_owned(),
    };
    format!(
        "{}\n{}Recommendation: {name}: {reason}.\n",
        stage::table(&heads, &rows),
        virtues::markdown(&calibration.virtues)
    )
}

pub(super) fn show(table: &[Line], recommendation: &Recommendation) {
    for line in table {
        tracing::info!(
            set = line.set,
            method = line.method,
            few_shot = line.few_shot,
            by = line.by,
            agreement_percent = format!("{:.1}", 100.0 * line.agreement.estimate),
            interval = format!("{:.1}-{:.1}", 100.0 * line.agreement.low, 100.0 * line.agreement.high),
            n = line.agreement.n,
            beside = line.null_rulers.as_ref().map(NullRulers::words),
            tie_percent = %line.tie_percent,
            abstained_percent = %line.abstained_percent,
            first_position_percent = %line.first_position_percent,
            swap_consistency_percent = %line.swap_consistency_percent,
            length_correlation = line.length_correlation.map(|r| format!("{r:.2}")),
            flip = line.flip,
            "calibration"
        );
    }
    let method = recommendation.method.as_deref().unwrap_or("none");
    tracing::info!(method, reason = recommendation.reason, "recommendation");
}

#[cfg(test)]
mod tests {
    use arete_chain::rulers::Ruler;
    use arete_records::{Aspect, Message, Virtue, split_of};

    use super::*;

    fn labelled(idx: usize) -> Labelled {
        Labelled {
            id: format!("{idx:016x}"),
            set: "s".to_owned(),
            question: vec![Message::user("q")],
            better: vec![Message::assistant("short")],
            worse: vec![Message::assistant("much longer")],
            about: None,
        }
    }

    /// Verdicts of a judge that agrees with the labels of the pairs `agrees` names.
    fn rows(pairs: &[Labelled], agrees: impl Fn(usize) -> bool) -> Vec<JudgementRow> {
        let mut rows = Vec::new();
        for (idx, pair) in pairs.iter().enumerate() {
            let sample = if agrees(idx) { pair.better_sample() } else { 1 - pair.better_sample() };
            for virtue in Virtue::SHIPPED {
                rows.push(JudgementRow {
                    prompt_id: pair.id.clone(),
                    split: split_of(&pair.question),
                    aspect: Aspect::ACTION,
                    virtue,
                    method: "pairwise-logits".to_owned(),
                    judge: "test".to_owned(),
                    p_ab: Some(0.9),
                    p_ba: Some(0.8),
                    p_sample0: Some(if sample == 0 { 0.75 } else { 0.25 }),
                    vote: Some(sample as i32),
                });
            }
        }
        rows
    }

    #[test]
    fn a_judge_that_abstains_is_named_and_not_the_method() {
        let pairs: Vec<Labelled> = (0..10).map(labelled).collect();
        let silent =
            |row| JudgementRow { p_ab: None, p_ba: None, p_sample0: None, vote: None, ..row };
        let rows: Vec<JudgementRow> = rows(&pairs, |_| true).into_iter().map(silent).collect();
        let mut table = baseline(&pairs);
        table.extend(lines(&pairs, &rows, Method::PairwiseLogits, 0));
        let Recommendation { method, reason, .. } = recommend(&table);
        assert_eq!(method, None);
        assert!(
            reason.contains("decided no pair (pairwise-logits: 100.0 % of verdicts"),
            "{reason}"
        );
    }

    #[test]
    fn agreement_carries_wilson_intervals_and_the_baseline_beside_it() {
        let pairs: Vec<Labelled> = (0..100).map(labelled).collect();
        let rows = rows(&pairs, |idx| idx % 4 != 0);
        let mut table = baseline(&pairs);
        table.extend(lines(&pairs, &rows, Method::PairwiseLogits, 0));
        assert_eq!(table[0].agreement.agreed, 100); // the better side is the shorter one
        let votes = &table[1];
        // 75 of 100 stand beside a rule that is always right: 25 points behind.
        let rulers = votes.null_rulers.as_ref().unwrap();
        assert_eq!((rulers.best, rulers.best_accuracy()), (Ruler::Shorter, 1.0));
        assert_eq!((votes.agreement.n, votes.agreement.agreed), (100, 75));
        // Wilson, 75 of 100, z = 1.96: 0.6570 to 0.8246 (Newcombe 1998's formula by hand).
        assert!((votes.agreement.low - 0.6570).abs() < 2e-4, "{votes:?}");
        assert!((votes.agreement.high - 0.8246).abs() < 2e-4, "{votes:?}");
        assert_eq!(votes.first_position_percent, json!(100.0));
        assert_eq!(votes.swap_consistency_percent, json!(0.0));
        let recommendation = recommend(&table);
        assert_eq!(recommendation.method.as_deref(), Some("pairwise-logits"));
        assert!(!recommendation.flip);
    }

    #[test]
    fn the_best_of_many_needs_more_than_the_best_of_one() {
        let pairs: Vec<Labelled> = (0..100).map(labelled).collect();
        // 60 of 100: 95 % interval 50.2 to 69.1 by itself; 46.8 to 71.9 as one of six (z = 2.638).
        let some = lines(&pairs, &rows(&pairs, |idx| idx % 5 < 3), Method::PairwiseLogits, 0);
        assert_eq!(some[0].agreement.agreed, 60);
        assert_eq!(recommend(&some).method.as_deref(), Some("pairwise-logits"));
        let mut six = some.clone();
        for few_shot in 1..6 {
            six.extend(lines(
                &pairs,
                &rows(&pairs, |idx| idx % 2 == 0),
                Method::PairwiseText,
                few_shot,
            ));
        }
        let recommendation = recommend(&six);
        assert_eq!(recommendation.method, None);
        assert!(recommendation.reason.contains("46.8 to 71.9"), "{}", recommendation.reason);
    }

    #[test]
    fn a_flip_needs_both_halves() {
        let pairs: Vec<Labelled> = (0..200).map(labelled).collect();
        let always_wrong = lines(&pairs, &rows(&pairs, |_| false), Method::PairwiseLogits, 0);
        assert!(always_wrong[0].flip);
        assert!(recommend(&always_wrong).flip);
        // Wrong on one half, right on the other: no flip, no recommendation.
        let torn = rows(&pairs, |idx| pairs[idx].half() == 0);
        let torn = lines(&pairs, &torn, Method::PairwiseLogits, 0);
        assert!(!torn[0].flip);
        let recommendation = recommend(&torn);
        assert_eq!(recommendation.method, None);
        assert!(recommendation.reason.contains("contrast"), "{}", recommendation.reason);
    }

    #[test]
    fn neither_place_nor_half_depends_on_the_other() {
        let pairs: Vec<Labelled> = (0..400).map(labelled).collect();
        for (sample, half) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let n =
                pairs.iter().filter(|p| p.better_sample() == sample && p.half() == half).count();
            assert!((70..=130).contains(&n), "{n}");
        }
    }
}
