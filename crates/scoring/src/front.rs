//! The front of two virtues (or turns): what each policy gained in the one and in the other, and which of them no other beats in both.
//!
//! In: runs that were scored by the same reward models, as those of a sweep over `ppo.weights` are, or one run in which soups were scored
//! beside its policy. Out: [`FILE`] with a point a policy and its paired intervals, from which the page draws.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use arete_records::stats::Interval;
use arete_records::{Aspect, Refusal, atomic, files};
use serde::{Deserialize, Serialize};

use crate::compare::ScoredRun;
use crate::score;
use crate::summary::{Scale, Scope};
use crate::table::{Text, interval, row};

/// Directory of a run, or of a sweep, that holds the front.
pub const DIR: &str = "front";
/// The file in it.
pub const FILE: &str = "front.json";

/// The contents of `front.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Front {
    /// What the policies are measured by: the names of two reward models.
    pub axes: [Aspect; 2],
    /// The model that gains are counted from.
    pub first: String,
    /// A policy each.
    pub points: Vec<Point>,
}

/// What a policy gained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// What it is called: its run's arm, and the model where a run has several.
    pub name: String,
    /// The directory of its run, without what is before.
    pub run: String,
    /// Its name in that run.
    pub model: String,
    /// Of mean standardised score on the same prompts, on either axis, with the paired 95 % interval of this run alone.
    pub gains: [Interval; 2],
    /// Whether no other policy is better on one axis and at least as good on the other, by the estimates.
    pub on_front: bool,
}

impl Front {
    /// Of every model that the runs scored after `first`.
    ///
    /// # Errors
    ///
    /// A refused file if a run has no scores on an axis, did not score `first`, or was scored by other reward models than the run before it.
    pub fn of(runs: &[ScoredRun], axes: [Aspect; 2], first: &str) -> Result<Self> {
        let mut points = Vec::new();
        for run in runs {
            check(run, &runs[0], axes)?;
            let summary = &run.summary;
            let models: Vec<&str> = summary.models.iter().map(|own| own.name.as_str()).collect();
            let Some(at) = models.iter().position(|name| *name == first) else {
                bail!(refused(run, "models", first.to_owned(), models.join(", ")));
            };
            for model in &models[at + 1..] {
                let gain = |axis: Aspect| {
                    let found =
                        summary.difference(first, model, Scale::Standardised, Scope::Of(axis));
                    let found = found.map(|own| own.mean.interval);
                    found.ok_or_else(|| {
                        let expected = format!("{model} - {first}, {axis}");
                        refused(
                            run,
                            "differences",
                            expected,
                            "no prompt that both answered".to_owned(),
                        )
                    })
                };
                points.push(Point {
                    name: match models.len() - at {
                        2 => run.arm.name.clone(),
                        _ => format!("{}: {model}", run.arm.name),
                    },
                    run: directory(&run.arm.run),
                    model: (*model).to_owned(),
                    gains: [gain(axes[0])?, gain(axes[1])?],
                    on_front: false,
                });
            }
        }
        mark(&mut points);
        points.sort_by(|a, b| a.gains[0].estimate.total_cmp(&b.gains[0].estimate));
        Ok(Self { axes, first: first.to_owned(), points })
    }

    /// Reads the front of a run: its own, or that of the sweep it belongs to; with its path. None where there is none.
    ///
    /// # Errors
    ///
    /// A refused file if it is damaged, The system's failure.
    pub fn find(run: &Path) -> Result<Option<(PathBuf, Self)>> {
        let own = run.join(DIR).join(FILE);
        if own.is_file() {
            return Ok(Some((own.clone(), read(&own)?)));
        }
        let canonical = fs_err::canonicalize(run)?;
        let Some(sweep) = canonical.parent().map(|dir| dir.join(DIR).join(FILE)) else {
            return Ok(None);
        };
        if !sweep.is_file() {
            return Ok(None);
        }
        let found = read(&sweep)?;
        let is_of_it = found.points.iter().any(|point| point.run == directory(&canonical));
        Ok(is_of_it.then_some((sweep, found)))
    }

    /// Writes it into a directory.
    ///
    /// # Errors
    ///
    /// A file's failure if that fails.
    pub fn write(&self, dir: &Path) -> Result<()> {
        fs_err::create_dir_all(dir)?;
        let mut bytes = serde_json::to_vec_pretty(self).expect("numbers and words serialise");
        bytes.push(b'\n');
        Ok(atomic::write(dir.join(FILE), &bytes)?)
    }

    /// A table of it.
    pub fn text(&self) -> String {
        let [x, y] = self.axes.map(Aspect::name);
        let mut text = Text::default();
        text.line(format!(
            "What each policy gained over {} in {x} and in {y}, mean standardised score; [95 % interval], of its run only",
            self.first
        ));
        text.line("");
        let mut rows = vec![row(["policy", x, y, "beaten in both"])];
        rows.extend(self.points.iter().map(|point| {
            let [x, y] = point.gains.map(|gain| interval(&gain, true));
            vec![point.name.clone(), x, y, if point.on_front { "no" } else { "yes" }.to_owned()]
        }));
        text.table(1, &rows);
        text.finish()
    }
}

fn read(path: &Path) -> Result<Front> {
    Ok(serde_json::from_slice(&files::read_small(path)?)
        .map_err(|error| Refusal::file(path, "JSON", "what `arete front` writes", error))?)
}

/// The last part of a path.
fn directory(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn refused(run: &ScoredRun, field: &str, expected: String, found: String) -> Refusal {
    let path = run.arm.run.join("scoring").join(score::SUMMARY);
    Refusal::file(&path, field.to_owned(), expected, found)
}

/// Points of several runs stand on the same axes only where the same reward models measured them.
fn check(run: &ScoredRun, first: &ScoredRun, axes: [Aspect; 2]) -> Result<()> {
    let known = run.summary.aspects();
    for axis in axes {
        if !known.contains(&axis) {
            let found = known.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            bail!(refused(run, "scores", format!("scores of {axis}"), found));
        }
        for input in [format!("reward {axis}"), format!("score_stats {axis}")] {
            let sum = |run: &ScoredRun| run.rewards.get(&input).cloned().unwrap_or_default();
            if sum(run) != sum(first) {
                let expected = format!("that of {} ({})", first.arm.run.display(), sum(first));
                bail!(refused(run, &input, expected, sum(run)));
            }
        }
    }
    Ok(())
}

/// Marks the points that no other beats.
fn mark(points: &mut [Point]) {
    let all: Vec<[f64; 2]> =
        points.iter().map(|point| point.gains.map(|gain| gain.estimate)).collect();
    let beats = |a: &[f64; 2], b: &[f64; 2]| a[0] >= b[0] && a[1] >= b[1] && a != b;
    for (point, own) in points.iter_mut().zip(&all) {
        point.on_front = !all.iter().any(|other| beats(other, own));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(name: &str, gains: [f64; 2]) -> Point {
        let gains = gains.map(|at| Interval { estimate: at, low: at - 0.1, high: at + 0.1 });
        let own = |text: &str| text.to_owned();
        Point { name: own(name), run: own("r"), model: own("final"), gains, on_front: false }
    }

    #[test]
    fn the_front_is_what_no_other_beats() {
        let mut points = [
            point("a", [1.0, 0.0]),
            point("b", [0.5, 0.5]),
            point("beaten by b", [0.4, 0.5]),
            point("c", [0.0, 1.0]),
            point("as c", [0.0, 1.0]), // neither beats its equal
            point("beaten by all", [-1.0, -1.0]),
        ];
        mark(&mut points);
        let on_front = points.iter().filter(|point| point.on_front);
        let names: Vec<&str> = on_front.map(|point| point.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "c", "as c"]);
    }

    #[test]
    fn a_front_is_found_beside_its_runs_and_shown_as_a_table() {
        let axes = [Aspect::new("honesty").unwrap(), Aspect::new("respect").unwrap()];
        let mut front =
            Front { axes, first: "sft".to_owned(), points: vec![point("a", [0.25, -0.5])] };
        front.points[0].on_front = true;
        let sweep = tempfile::tempdir().unwrap();
        for run in ["r", "other"] {
            fs_err::create_dir(sweep.path().join(run)).unwrap();
            assert_eq!(Front::find(&sweep.path().join(run)).unwrap(), None);
        }
        front.write(&sweep.path().join(DIR)).unwrap();
        let (_, found) = Front::find(&sweep.path().join("r")).unwrap().unwrap();
        assert_eq!(found, front);
        assert_eq!(Front::find(&sweep.path().join("other")).unwrap(), None, "no point is its");
        let text = front.text();
        assert!(text.contains("+0.250 [+0.150, +0.350]") && text.contains("no"), "{text}");
    }
}
