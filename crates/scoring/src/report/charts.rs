//! Every section's charts: the curves of the table, and what other files hold (estimates, distributions, calibration).

use anyhow::Result;
use arete_chain::NullRulers;
use arete_chain::verdicts::virtues_of;
use arete_records::Aspect;
use arete_records::rows::{JudgementRow, ScoreRow};
use arete_records::stats::{self, Interval};

use super::curves;
use super::drawing::{Chart, Colour, Cross, Estimate, Series, Unit};
use crate::front::Point;
use crate::gold::{Gold, GoldPoint};
use crate::judge::Verdicts;
use crate::run_files::{Reward, RunFiles, Scoring};
use crate::summary::{Difference, Scale, Scope, Summary};
use crate::table::interval;

/// The charts of every section that has any, in the order of the page.
pub(crate) fn all(run: &RunFiles) -> Result<Vec<(&'static str, Vec<Chart>)>> {
    let mut score = Vec::new();
    if let Some(scoring) = &run.scoring {
        score.extend(scores(&scoring.summary)?);
        score.extend(differences(&scoring.summary)?);
        score.extend(distribution(scoring)?);
    }
    score.extend(front(run)?);
    let mut ppo = Vec::new();
    if run.ppo.is_some() {
        ppo.extend(curves::of("ppo", run)?);
        ppo.extend(score_against_kl(run)?);
    }
    let mut reward = Vec::new();
    if !run.rewards.is_empty() {
        reward.extend(accuracy(run)?);
        reward.extend(curves::of("reward", run)?);
        reward.extend(calibration(run)?);
        reward.extend(best_of(run)?);
    }
    let mut judge = Vec::new();
    if let Some(rows) = run.judgements.as_ref().filter(|rows| !rows.is_empty()) {
        judge.extend(votes(rows)?);
        judge.extend(first_shown(rows)?);
    }
    let data = curves::of("data", run)?;
    let mut sections =
        vec![("score", score), ("ppo", ppo), ("reward", reward), ("judge", judge), ("data", data)];
    if let Some(found) = &run.gold {
        sections.push(("gold", gold(found)?));
    }
    Ok(sections)
}

fn scores(summary: &Summary) -> Result<Option<Chart>> {
    let models: Vec<Estimate> = summary
        .models
        .iter()
        .enumerate()
        .filter_map(|(at, model)| {
            let score = model.score(Scale::Standardised, Scope::All)?;
            Some(Estimate {
                name: model.name.clone(),
                colour: Colour::of_model(at),
                interval: score.score,
                reference: None,
            })
        })
        .collect();
    Chart::estimates(
        "score",
        "Standardised Score",
        "Each model's Score with its 95 % interval, scores standardised by each reward model's own statistics.",
        Unit::Number,
        &models,
        None,
    )
}

fn differences(summary: &Summary) -> Result<Option<Chart>> {
    let Some(Difference { first, last, circular, .. }) = summary.headline(Scale::Standardised)
    else {
        return Ok(None);
    };
    let circular = if *circular { " (circular)" } else { "" };
    let aspects = summary.aspects();
    let place = |aspect| aspects.iter().position(|own| *own == aspect).unwrap_or(0);
    let differences: Vec<Estimate> = Scope::every(&aspects)
        .into_iter()
        .filter_map(|scope| {
            let difference = summary.difference(first, last, Scale::Standardised, scope)?;
            Some(Estimate {
                name: scope.name().to_owned(),
                colour: scope.aspect().map_or(Colour(2), |aspect| Colour::of_turn(place(aspect))),
                interval: difference.mean.interval,
                reference: None,
            })
        })
        .collect();
    Chart::estimates(
        "score-difference",
        &format!("{last} − {first}, mean standardised score{circular}"),
        "Paired over the same prompts. An interval across the dashed line leaves open whether there is any difference.",
        Unit::Number,
        &differences,
        Some(0.0),
    )
}

/// How far the policy went for its score, iteration by iteration.
fn score_against_kl(run: &RunFiles) -> Result<Option<Chart>> {
    let Some(ppo) = &run.ppo else { return Ok(None) };
    let path = |kl: &str, score: &[&str]| -> Vec<(f64, f64)> {
        let scores = ppo.curve(score);
        let kl = ppo.curve(&[kl]).into_iter();
        kl.filter_map(|(at, kl)| {
            let (_, score) = scores.iter().find(|(own, _)| *own == at)?;
            Some((kl, *score))
        })
        .collect()
    };
    let lines = [
        Series::new("rollouts", Colour(2), path("objective/kl", &["objective/scores"])),
        Series::new("held-out probe", Colour(1), path("probe/kl", &["probe/z_mean"])),
    ];
    Chart::lines(
        "ppo-kl-score",
        "Score against KL",
        "Each point is an iteration: how far from the reference the policy was, and what it scored there. A line that goes to the \
         right without rising pays KL for nothing.",
        "KL, nats a conversation",
        Unit::Number,
        &lines,
    )
}

/// What policies gained in two virtues.
fn front(run: &RunFiles) -> Result<Option<Chart>> {
    let Some((_, front)) = &run.front else { return Ok(None) };
    let cross = |(at, point): (usize, &Point)| Cross {
        name: point.name.clone(),
        colour: Colour::of_virtue(at),
        at: point.gains,
        on_line: point.on_front,
    };
    let crosses: Vec<Cross> = front.points.iter().enumerate().map(cross).collect();
    let [x, y] = front.axes.map(Aspect::name);
    Chart::crosses(
        "front",
        &format!("Front of {x} and {y}"),
        &format!(
            "What each policy gained over {} by either reward model, mean standardised score with its 95 % interval; the line goes \
             through those that no other beats in both.",
            front.first
        ),
        [x, y],
        &crosses,
    )
}

/// The gold judge's and the proxies' view of every path, against √KL.
fn gold(found: &Gold) -> Result<Vec<Chart>> {
    let lines = |value: fn(&GoldPoint) -> f64| -> Vec<Series> {
        let paths = found.paths(value).into_iter().enumerate();
        let line = |(at, (name, points)): (usize, (String, _))| {
            Series::new(name, Colour::of_virtue(at), points)
        };
        paths.map(line).collect()
    };
    let of_gold = Chart::lines(
        "gold",
        "Gained by the gold judge",
        "Mean gain over the base's answers to the same prompts, against how far the policy went: √KL, nats a reply.",
        "√KL",
        Unit::Number,
        &lines(|point| point.gold),
    )?;
    let of_proxies = Chart::lines(
        "gold-proxy",
        "Score by what was climbed",
        "Standardised score of the proxy, or of their ensemble, along the same paths.",
        "√KL",
        Unit::Number,
        &lines(|point| point.proxy),
    )?;
    Ok(of_gold.into_iter().chain(of_proxies).collect())
}

/// How many of a model's scores fall where.
fn distribution(scoring: &Scoring) -> Result<Option<Chart>> {
    const BINS: usize = 16;
    let z = |row: &ScoreRow| f64::from(row.z);
    let low = scoring.scores.iter().map(z).fold(f64::INFINITY, f64::min);
    let high = scoring.scores.iter().map(z).fold(f64::NEG_INFINITY, f64::max);
    if scoring.scores.len() < 2 * BINS || high <= low {
        return Ok(None);
    }
    let width = (high - low) / BINS as f64;
    let series: Vec<Series> = scoring
        .summary
        .models
        .iter()
        .enumerate()
        .map(|(at, model)| {
            let own = scoring.scores.iter().filter(|row| row.model == model.name).map(z);
            let own: Vec<f64> = own.collect();
            let mut counts = [0.0; BINS];
            for z in &own {
                counts[(((z - low) / width) as usize).min(BINS - 1)] += 100.0 / own.len() as f64;
            }
            let points =
                (0..BINS).map(|bin| (low + (bin as f64 + 0.5) * width, counts[bin])).collect();
            Series::new(model.name.clone(), Colour::of_model(at), points)
        })
        .collect();
    Chart::lines(
        "score-distribution",
        "Where the scores lie",
        "Per cent of a model's standardised scores in each of sixteen equal bins.",
        "standardised score",
        Unit::PerCent,
        &series,
    )
}

fn accuracy(run: &RunFiles) -> Result<Option<Chart>> {
    let estimate = |(&aspect, reward): (&Aspect, &Reward)| {
        let evaluation = reward.evaluation.as_ref()?;
        Some(Estimate {
            name: aspect.name().to_owned(),
            colour: Colour::of_turn(run.place(aspect)),
            interval: evaluation.accuracy,
            reference: evaluation.null_rulers.as_ref().map(NullRulers::best_accuracy),
        })
    };
    Chart::estimates(
        "reward-accuracy",
        "Accuracy on unseen pairs",
        "Dot and bar: accuracy with its 95 % interval. Ring: the best rule that knows nothing (shorter, longer, first shown, more \
         hedges, more refusals). Dashed: a coin.",
        Unit::Share,
        &run.rewards.iter().filter_map(estimate).collect::<Vec<_>>(),
        Some(0.5),
    )
}

/// Stated against observed, of the side that a reward model favours.
fn calibration(run: &RunFiles) -> Result<Option<Chart>> {
    let mut lines = Vec::new();
    for (&aspect, reward) in &run.rewards {
        let bins = reward.evaluation.iter().flat_map(|evaluation| &evaluation.calibration);
        let points = bins.map(|bin| (100.0 * bin.stated, 100.0 * bin.observed)).collect();
        lines.push(Series::new(aspect.name(), Colour::of_turn(run.place(aspect)), points));
    }
    if lines.iter().all(|line| line.points.is_empty()) {
        return Ok(None);
    }
    let points = vec![(50.0, 50.0), (100.0, 100.0)];
    lines.push(Series::new("perfect", Colour(0), points));
    Chart::lines(
        "reward-calibration",
        "Calibration, per cent right",
        "Of the pairs for whose better side a reward model stated this probability, how many it got right. Below the grey line \
         it is too sure of itself.",
        "stated probability, per cent",
        Unit::PerCent,
        &lines,
    )
}

fn best_of(run: &RunFiles) -> Result<Option<Chart>> {
    let Some(best) = &run.best_of else { return Ok(None) };
    let points = best.curve.iter().map(|(k, score)| (*k as f64, *score)).collect();
    let by_yardstick = best.yardstick_gain.as_ref().map_or(String::new(), |gain| {
        format!(
            " By the yardstick the answers of the ensemble's favourites gain {}.",
            interval(gain, true)
        )
    });
    Chart::lines(
        "best-of",
        "Best of n",
        &format!(
            "Ensemble score of the best of n samples, {} prompts. If it does not rise, PPO cannot help.{by_yardstick}",
            best.n_prompts
        ),
        "samples",
        Unit::Number,
        &[Series::new("ensemble", Colour(2), points)],
    )
}

/// Share of sample 0 among the votes of each virtue: what it would be if votes were cast blindly is one half.
fn votes(rows: &[JudgementRow]) -> Result<Option<Chart>> {
    let estimates = by_virtue(rows, |verdicts| {
        let [zero, one, _] = verdicts.votes;
        (zero, zero + one)
    });
    Chart::estimates(
        "judge-votes",
        "Votes for sample 0, per cent",
        "Of the votes of each virtue, over all aspects. Samples come in no order, so a fair judge is near the dashed line; under \
         contrasting personas sample 0 is the virtuous one.",
        Unit::PerCent,
        &estimates,
        Some(50.0),
    )
}

fn first_shown(rows: &[JudgementRow]) -> Result<Option<Chart>> {
    let estimates = by_virtue(rows, |verdicts| (verdicts.first, verdicts.seen));
    Chart::estimates(
        "judge-first-shown",
        "First shown preferred, per cent",
        "Of the single verdicts of each virtue. Far from the dashed line the judge follows the place, not the answer.",
        Unit::PerCent,
        &estimates,
        Some(50.0),
    )
}

/// A share in per cent with Wilson's interval for each virtue that has any trials.
fn by_virtue(rows: &[JudgementRow], share: impl Fn(&Verdicts) -> (usize, usize)) -> Vec<Estimate> {
    let mut out = Vec::new();
    for (at, virtue) in virtues_of(rows).into_iter().enumerate() {
        let verdicts = Verdicts::of(rows.iter().filter(|row| row.virtue == virtue));
        let (wins, n) = share(&verdicts);
        if n == 0 {
            continue;
        }
        let Interval { estimate, low, high } = stats::wilson(wins as u64, n as u64, 1.96);
        out.push(Estimate {
            name: virtue.name().to_owned(),
            colour: Colour::of_virtue(at),
            interval: Interval { estimate: 100.0 * estimate, low: 100.0 * low, high: 100.0 * high },
            reference: None,
        });
    }
    out
}
