//! A judge that costs nothing: a bag of words and length, trained on labelled pairs of replies.
//!
//! Logistic regression on the difference of the two sides. It stands beside the yardstick: what both see is more than a
//! peculiarity of either.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use arete_model::Error;
use arete_records::{atomic, files, stats};
use serde::{Deserialize, Serialize};

use crate::rulers::words;

/// Name of the file beside a fold of the yardstick.
pub const FILE: &str = "words.json";
/// Weight of the likelihood against the penalty ½ ‖w‖².
const STRENGTH: f64 = 0.02;
/// Texts in which a word must occur.
const FEWEST: usize = 5;
/// Characters that weigh as much as one word.
const CHARACTERS: f64 = 100.0;

/// The contents of `words.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BagOfWords {
    /// What the presence of a word adds to the score.
    pub weights: BTreeMap<String, f64>,
    /// What a hundred characters add.
    pub length: f64,
    /// Mean score of the texts that it is standardised by.
    pub mean: f64,
    /// Their standard deviation.
    pub std: f64,
}

impl BagOfWords {
    /// Trains it on pairs of texts, the better first. Scores are not standardised yet.
    ///
    /// # Source
    ///
    /// L2-regularised logistic regression without intercept, ½ ‖w‖² + c Σ log(1 + exp(−w·x)), x = better − worse: scikit-learn's
    /// `LogisticRegression` (C = c / 2 on each pair both ways round). It has one minimum; found by Newton's method.
    #[must_use]
    pub fn train(pairs: &[[String; 2]]) -> Self {
        let bags: Vec<[BTreeSet<String>; 2]> =
            pairs.iter().map(|pair| [0, 1].map(|side| words(&pair[side]).collect())).collect();
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for word in bags.iter().flatten().flatten() {
            *counts.entry(word).or_insert(0) += 1;
        }
        let vocabulary: BTreeMap<&str, usize> = counts
            .into_iter()
            .filter(|(_, count)| *count >= FEWEST)
            .enumerate()
            .map(|(idx, (word, _))| (word, idx))
            .collect();
        let length = vocabulary.len();
        let differences: Vec<Vec<(usize, f64)>> = bags
            .iter()
            .zip(pairs)
            .map(|([better, worse], texts)| {
                let only = |own: &BTreeSet<String>, other: &BTreeSet<String>, sign: f64| {
                    let own = own.difference(other).filter_map(|word| vocabulary.get(&**word));
                    own.map(|&idx| (idx, sign)).collect::<Vec<_>>()
                };
                let mut row = only(better, worse, 1.0);
                row.extend(only(worse, better, -1.0));
                row.push((length, characters(&texts[0]) - characters(&texts[1])));
                row
            })
            .collect();
        let solution = minimise(&differences, length + 1);
        let weights = vocabulary.iter().map(|(word, &idx)| ((*word).to_owned(), solution[idx]));
        Self { weights: weights.collect(), length: solution[length], mean: 0.0, std: 1.0 }
    }

    /// The same, its scores standardised by those of these texts; as it is if they do not vary.
    #[must_use]
    pub fn standardised_by<'a>(self, texts: impl Iterator<Item = &'a str>) -> Self {
        let scores: Vec<f64> = texts.map(|text| self.raw(text)).collect();
        let (mean, std) = (stats::mean(&scores), stats::std(&scores));
        if std > 0.0 { Self { mean, std, ..self } } else { self }
    }

    /// The score of a text.
    #[must_use]
    pub fn score(&self, text: &str) -> f64 {
        (self.raw(text) - self.mean) / self.std
    }

    fn raw(&self, text: &str) -> f64 {
        let found: BTreeSet<String> = words(text).collect();
        let by_words: f64 = found.iter().filter_map(|word| self.weights.get(word)).sum();
        by_words + self.length * characters(text)
    }

    /// Reads `words.json` of a fold; none if there is no such file.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if it is damaged, [`Error::Io`].
    pub fn read(dir: &Path) -> Result<Option<Self>, Error> {
        let path = dir.join(FILE);
        if !path.is_file() {
            return Ok(None);
        }
        let bytes = files::read_small(&path)?;
        serde_json::from_slice(&bytes).map(Some).map_err(|error| Error::Field {
            path,
            field: "JSON".to_owned(),
            expected: "a bag of words (weights, length, mean, std)".to_owned(),
            found: error.to_string(),
        })
    }

    /// Writes `words.json`.
    ///
    /// # Errors
    ///
    /// [`Error::Records`] if the disk refuses.
    pub fn write(&self, dir: &Path) -> Result<(), Error> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("words and numbers serialise");
        bytes.push(b'\n');
        Ok(atomic::write(dir.join(FILE), &bytes)?)
    }
}

#[expect(clippy::cast_precision_loss, reason = "texts are short")]
fn characters(text: &str) -> f64 {
    text.chars().count() as f64 / CHARACTERS
}

/// Newton's method, each step by conjugate gradients: the penalty keeps the Hessian's eigenvalues at 1 and above.
fn minimise(rows: &[Vec<(usize, f64)>], n: usize) -> Vec<f64> {
    const STEPS: usize = 100;
    let mut w = vec![0.0; n];
    for _ in 0..STEPS {
        let margins: Vec<f64> = rows.iter().map(|row| along(row, &w)).collect();
        let mut gradient = w.clone();
        for (row, margin) in rows.iter().zip(&margins) {
            add(&mut gradient, row, -STRENGTH * sigmoid(-margin));
        }
        if dot(&gradient, &gradient) < 1e-24 {
            break;
        }
        let curvature: Vec<f64> =
            margins.iter().map(|m| STRENGTH * sigmoid(*m) * sigmoid(-m)).collect();
        let hessian = |v: &[f64]| {
            let mut out = v.to_vec();
            for (row, curvature) in rows.iter().zip(&curvature) {
                add(&mut out, row, curvature * along(row, v));
            }
            out
        };
        let step = conjugate_gradients(hessian, &gradient);
        // Halved until it descends: far from the minimum a whole step may overshoot.
        let (before, slope) = (objective(rows, &w), dot(&gradient, &step));
        let mut part = 1.0;
        loop {
            let next: Vec<f64> = w.iter().zip(&step).map(|(w, step)| w - part * step).collect();
            if objective(rows, &next) <= before - 1e-4 * part * slope || part < 1e-6 {
                w = next;
                break;
            }
            part /= 2.0;
        }
    }
    w
}

/// ½ ‖w‖² + c Σ log(1 + exp(−w·x)).
fn objective(rows: &[Vec<(usize, f64)>], w: &[f64]) -> f64 {
    let loss: f64 = rows
        .iter()
        .map(|row| {
            let margin = along(row, w);
            // log(1 + e⁻ᵐ) without overflow.
            (-margin.abs()).exp().ln_1p() + (-margin).max(0.0)
        })
        .sum();
    0.5 * dot(w, w) + STRENGTH * loss
}

/// Solves H x = b for a positive definite H.
fn conjugate_gradients(hessian: impl Fn(&[f64]) -> Vec<f64>, b: &[f64]) -> Vec<f64> {
    let mut x = vec![0.0; b.len()];
    let mut rest = b.to_vec();
    let mut direction = rest.clone();
    let mut squares = dot(&rest, &rest);
    let enough = 1e-24 * squares;
    for _ in 0..2 * b.len().max(50) {
        if squares <= enough {
            break;
        }
        let turned = hessian(&direction);
        let part = squares / dot(&direction, &turned);
        for ((x, rest), (direction, turned)) in
            x.iter_mut().zip(&mut rest).zip(direction.iter().zip(&turned))
        {
            *x += part * direction;
            *rest -= part * turned;
        }
        let next = dot(&rest, &rest);
        for (direction, rest) in direction.iter_mut().zip(&rest) {
            *direction = rest + next / squares * *direction;
        }
        squares = next;
    }
    x
}

fn along(row: &[(usize, f64)], w: &[f64]) -> f64 {
    row.iter().map(|&(idx, value)| value * w[idx]).sum()
}

fn add(to: &mut [f64], row: &[(usize, f64)], times: f64) {
    row.iter().for_each(|&(idx, value)| to[idx] += times * value);
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}
