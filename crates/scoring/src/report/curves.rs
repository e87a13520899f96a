//! The curves of the page, in one table: from which file and under which names, what they are called, in which unit, and in
//! which section they stand.

use anyhow::Result;
use arete_records::Aspect;
use arete_records::rows::RolloutRow;
use arete_records::stats;

use super::drawing::{Chart, Colour, Series, Unit};
use crate::run_files::{Metrics, RolloutReply, RunFiles, rollout_reply};

/// A chart of numbers that a training logged in its `metrics.jsonl`.
struct Curve {
    /// The page's section.
    section: &'static str,
    file: File,
    /// Name of the chart's file.
    name: &'static str,
    title: &'static str,
    unit: Unit,
    caption: &'static str,
    lines: &'static [Line],
}

/// Whose `metrics.jsonl`.
#[derive(Clone, Copy)]
enum File {
    Sft,
    /// One of each aspect's reward model.
    Reward,
    Ppo,
}

/// A line, or one line a turn and a virtue.
#[derive(Clone, Copy)]
struct Line {
    /// Name and colour; none for one line a turn or virtue, each with its own.
    who: Option<(&'static str, Colour)>,
    /// The names it may be logged under, the first that occurs counts; `{}` is the aspect.
    keys: &'static [&'static str],
    /// What the rollouts that were kept show instead, where it was not logged.
    kept: Kept,
}

#[derive(Clone, Copy)]
enum Kept {
    Nothing,
    Reply(fn(RolloutReply) -> Option<f64>),
    Row(fn(&RolloutRow) -> Option<f64>),
}

const fn line(name: &'static str, colour: u8, keys: &'static [&'static str]) -> Line {
    Line { who: Some((name, Colour(colour))), keys, kept: Kept::Nothing }
}

const fn aspects(keys: &'static [&'static str], kept: Kept) -> Line {
    Line { who: None, keys, kept }
}

/// The chart of accuracies while reward models train.
const VALIDATION: &str = "reward-validation";

const CURVES: [Curve; 16] = [
    Curve {
        section: "ppo",
        file: File::Ppo,
        name: "ppo-policy-loss",
        title: "PPO loss, policy",
        unit: Unit::Number,
        caption: "The report's Figure 3.1. The clipped objective is near zero by construction; its sign says little.",
        lines: &[line("policy", 2, &["loss/policy_avg"])],
    },
    Curve {
        section: "ppo",
        file: File::Ppo,
        name: "ppo-value-loss",
        title: "PPO loss, critic",
        unit: Unit::Number,
        caption: "Squared error of the critic's values; it should fall as the critic learns what replies earn.",
        lines: &[line("critic", 1, &["loss/value_avg"])],
    },
    Curve {
        section: "ppo",
        file: File::Ppo,
        name: "ppo-reward",
        title: "Mean reward",
        unit: Unit::Number,
        caption: "The report's Figure 3.2: the ensemble's score, and what is left of it after the KL penalty.",
        lines: &[
            line("score", 2, &["objective/scores"]),
            line("less KL penalty", 0, &["objective/rlhf_reward"]),
        ],
    },
    Curve {
        section: "ppo",
        file: File::Ppo,
        name: "ppo-reward-models",
        title: "Score by reward model",
        unit: Unit::Number,
        caption: "Standardised: 0 is where the base began, 1 is one standard deviation of its replies.",
        lines: &[aspects(&["z_{}"], Kept::Reply(|reply| reply.z))],
    },
    Curve {
        section: "ppo",
        file: File::Ppo,
        name: "ppo-probe",
        title: "Held-out probe",
        unit: Unit::Number,
        caption: "The same scores on validation prompts: if rollouts rise and this falls, the policy games the reward models.",
        lines: &[line("mean", 2, &["probe/z_mean"]), aspects(&["probe/z_{}"], Kept::Nothing)],
    },
    Curve {
        section: "ppo",
        file: File::Ppo,
        name: "ppo-yardstick",
        title: "Yardstick on the held-out probe",
        unit: Unit::Number,
        caption: "Score of a reward model that PPO never sees, of the answers alone; standardised on its own held-out pairs where it has statistics.",
        lines: &[line("yardstick", 1, &["probe/yardstick"])],
    },
    Curve {
        section: "ppo",
        file: File::Ppo,
        name: "ppo-kl",
        title: "KL from the reference",
        unit: Unit::Nats,
        caption: "Nats a conversation, summed over the policy's own tokens. Near zero, nothing was learned.",
        lines: &[line("KL", 3, &["objective/kl"])],
    },
    Curve {
        section: "ppo",
        file: File::Ppo,
        name: "ppo-length",
        title: "Tokens per reply",
        unit: Unit::Tokens,
        caption: "Mean length of the replies in each rollout. Rewards that rise with length alone are no progress.",
        lines: &[aspects(&["length_{}"], Kept::Reply(|reply| reply.n_tokens))],
    },
    Curve {
        section: "ppo",
        file: File::Ppo,
        name: "ppo-truncation",
        title: "Replies cut off",
        unit: Unit::PerCent,
        caption: "A cut reply has no end, so the last token its score is paid to is arbitrary.",
        lines: &[aspects(&["truncated_{}"], Kept::Reply(|reply| reply.truncated))],
    },
    Curve {
        section: "ppo",
        file: File::Ppo,
        name: "ppo-entropy",
        title: "Entropy of the policy",
        unit: Unit::Nats,
        caption: "Nats per token. A collapse means the policy says one thing only.",
        lines: &[line("entropy", 4, &["policy/entropy_avg", "objective/entropy"])],
    },
    Curve {
        section: "ppo",
        file: File::Ppo,
        name: "ppo-clip",
        title: "Clipped ratios",
        unit: Unit::PerCent,
        caption: "Part of the tokens whose probability moved beyond the clip range within an iteration.",
        lines: &[line("clipped", 5, &["policy/clipfrac_avg"])],
    },
    Curve {
        section: "ppo",
        file: File::Ppo,
        name: "ppo-disagreement",
        title: "Disagreement of the reward models",
        unit: Unit::Number,
        caption: "Standard deviation of the standardised scores of a conversation.",
        lines: &[Line {
            kept: Kept::Row(disagreement),
            ..line("disagreement", 0, &["ensemble_disagreement"])
        }],
    },
    Curve {
        section: "ppo",
        file: File::Ppo,
        name: "ppo-explained-variance",
        title: "Variance the critic explains",
        unit: Unit::Number,
        caption: "1 = the critic knows what every token will earn; 0 = it knows no more than the mean.",
        lines: &[line("explained", 1, &["explained_variance"])],
    },
    Curve {
        section: "reward",
        file: File::Reward,
        name: "reward-loss",
        title: "Training loss",
        unit: Unit::Number,
        caption: "Bradley–Terry loss; 0.693 is what a coin has.",
        lines: &[aspects(&["loss"], Kept::Nothing)],
    },
    Curve {
        section: "reward",
        file: File::Reward,
        name: VALIDATION,
        title: "Validation accuracy",
        unit: Unit::PerCent,
        caption: "On the validation pairs, while training. Dashed: the best rule that knows nothing, on the same pairs.",
        lines: &[aspects(&["eval_accuracy"], Kept::Nothing)],
    },
    Curve {
        section: "data",
        file: File::Sft,
        name: "sft-loss",
        title: "SFT loss",
        unit: Unit::Nats,
        caption: "Cross-entropy per imitated token, nats.",
        lines: &[line("training", 0, &["loss"]), line("validation", 1, &["eval_loss"])],
    },
];

/// The curves of a section, those left out that have no point.
pub(crate) fn of(section: &str, run: &RunFiles) -> Result<Vec<Chart>> {
    let own = CURVES.iter().filter(|curve| curve.section == section);
    own.filter_map(|curve| curve.chart(run).transpose()).collect()
}

impl Curve {
    fn chart(&self, run: &RunFiles) -> Result<Option<Chart>> {
        let mut lines: Vec<Series> =
            self.lines.iter().flat_map(|line| self.series(line, run)).collect();
        if self.name == VALIDATION {
            lines.extend(null_rulers(run, &lines));
        }
        let (title, factor) = match self.unit {
            Unit::PerCent => (format!("{}, per cent", self.title), 100.0),
            _ => (self.title.to_owned(), 1.0),
        };
        lines.iter_mut().flat_map(|line| &mut line.points).for_each(|(_, y)| *y *= factor);
        let x_label = if matches!(self.file, File::Ppo) { "iteration" } else { "step" };
        Chart::lines(self.name, &title, self.caption, x_label, self.unit, &lines)
    }

    fn series(&self, line: &Line, run: &RunFiles) -> Vec<Series> {
        let of = |aspect: Option<Aspect>, (name, colour): (&str, Colour)| {
            let keys =
                line.keys.iter().map(|key| key.replace("{}", aspect.map_or("", Aspect::name)));
            let logged = self.metrics(run, aspect).map(|own| own.curve(&keys.collect::<Vec<_>>()));
            let points = match (logged.filter(|points| !points.is_empty()), line.kept, aspect) {
                (Some(points), ..) => points,
                (None, Kept::Reply(value), Some(aspect)) => {
                    run.rollout_curve(|row| value(rollout_reply(row, aspect)))
                }
                (None, Kept::Row(value), _) => run.rollout_curve(value),
                (None, ..) => Vec::new(),
            };
            Series::new(name, colour, points)
        };
        match line.who {
            Some(who) => vec![of(None, who)],
            None => (run.names().into_iter().enumerate())
                .map(|(at, aspect)| of(Some(aspect), (aspect.name(), Colour::of_turn(at))))
                .collect(),
        }
    }

    fn metrics<'a>(&self, run: &'a RunFiles, aspect: Option<Aspect>) -> Option<&'a Metrics> {
        match self.file {
            File::Sft => run.sft.as_ref(),
            File::Reward => run.rewards.get(&aspect?).map(|reward| &reward.metrics),
            File::Ppo => run.ppo.as_ref(),
        }
    }
}

/// Beside each reward model's accuracy the best that a rule reaches which knows nothing, where it is of the same pairs.
fn null_rulers(run: &RunFiles, accuracies: &[Series]) -> Vec<Series> {
    let of = |accuracy: &Series| {
        let [(first, _), .., (last, _)] = accuracy.points[..] else { return None };
        let (_, reward) = run.rewards.iter().find(|(name, _)| name.name() == accuracy.name)?;
        let evaluation = reward.evaluation.as_ref().filter(|own| own.split == "validation")?;
        let best = evaluation.null_rulers.as_ref()?;
        let name = format!("{}, best null ruler ({})", accuracy.name, best.best.name());
        Some(Series::bound(name, accuracy.colour, best.best_accuracy(), [first, last]))
    };
    accuracies.iter().filter_map(of).collect()
}

fn disagreement(row: &RolloutRow) -> Option<f64> {
    let z = row.z();
    (z.len() > 1).then(|| stats::std(&z))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_curve_has_a_name_of_its_own_and_a_section_of_the_page() {
        let page = include_str!("templates/page.html.jinja");
        for (at, curve) in CURVES.iter().enumerate() {
            assert!(CURVES[..at].iter().all(|other| other.name != curve.name), "{}", curve.name);
            assert!(page.contains(&format!("(\"{}\", ", curve.section)), "{}", curve.name);
        }
    }
}
