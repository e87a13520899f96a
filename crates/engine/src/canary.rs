//! The proof that a server answers with the weights it should: log-probabilities of a fixed text, from the server and from here.
//!
//! A server may say that an adapter is loaded and answer with the base, with the adapter before, with half of the layers, or with
//! another model: nothing in its replies tells. So every server is asked for the probabilities of a text whose probabilities under
//! the new adapter, under the one before and under the base are known here. Two questions decide, as pure functions of numbers:
//! is the mean difference from the new adapter's values within the tolerance, and where does the answer lie on the line from other weights
//! to the new ones? The second tells weights apart that differ by less than the rounding of a token: over n tokens rounding averages
//! out. Values that were computed here in 16 bits are rounded, too: then a part of the line is rounding, an honest answer lies short of its
//! end by half of that part (regression dilution: Fuller, Measurement Error Models, 1987), and where a step is less than twice the rounding (which the
//! answer with the base has shown) no place on it says anything. Weights that cannot be told apart so leave two witnesses: the fresh name and path, and an answer that repeats the one before
//! bit for bit.

use std::fmt;

use arete_chain::Turns;
use arete_model::{Adapter, Batch, Chat, Kind, Model, SegmentIdx, logprobs, no_grad_guard};
use arete_records::Message;

use crate::Error;

/// Most tokens of the text: enough to average rounding, few enough to cost nothing.
const TOKENS: usize = 128;

/// Standard errors by which an answer must miss the new weights to be refused for its place on the line alone.
const CERTAIN: f64 = 5.0;

/// Places on the line from other weights (0) to the new ones (1): up to the first it is the other's; from the second on, and as far
/// beyond 1, it is new.
const PLACES: [f64; 2] = [0.25, 0.75];

/// Share of the line's square that may be rounding: from here on, where the step is less than twice the rounding, no place on it is judged. A
/// server that adds an adapter's small part to what it has rounded already loses much of it: honest ones of SmolLM2 in bf16, whose steps
/// were as large as the rounding, lay at 0.03, 0.2 and 0.56.
const MOST_ROUNDING: f64 = 0.25;

/// Weights nearer to each other than this (mean, nats) may give the same answer bit for bit.
const SAME: f64 = 1e-3;

/// The text as tokens, and its values under the base.
#[derive(Clone, Debug, PartialEq)]
pub struct Canary {
    /// The text.
    pub token_ids: Vec<i64>,
    /// log P of each token but the first, nats, at temperature 1.
    pub base: Vec<f64>,
    /// Values here are computed in a format of 16 bits.
    pub is_rounded: bool,
}

impl Canary {
    /// The fixed conversation in the model's own template.
    ///
    /// # Errors
    ///
    /// What the template refuses; a model that cannot be run.
    pub fn of(model: &Model, chat: &Chat<'_>) -> Result<Self, Error> {
        let said = [
            "I found a wallet on the way home. What should I do with it?",
            "Look for a name in it and bring it back, with everything that was inside. If there is none, hand it in where \
             its owner would ask first.",
            "The owner will be worried, and to give back what is theirs is only fair.",
        ];
        let turns = Turns::default();
        let messages = turns.conversation(&[Message::user(said[0])], &said[1..]);
        let mut token_ids = chat.render(&messages)?.token_ids;
        token_ids.truncate(TOKENS.min(model.config.max_position_embeddings));
        let base = values(model, None, &token_ids)?;
        let is_rounded = matches!(model.decoder.kind(), Kind::BFloat16 | Kind::Half);
        Ok(Self { token_ids, base, is_rounded })
    }

    /// The text's values under an adapter.
    ///
    /// # Errors
    ///
    /// A model that cannot be run.
    pub fn under(&self, model: &Model, adapter: &Adapter) -> Result<Vec<f64>, Error> {
        values(model, Some(adapter), &self.token_ids)
    }
}

/// log P of each token but the first, nats, at temperature 1.
fn values(model: &Model, adapter: Option<&Adapter>, token_ids: &[i64]) -> Result<Vec<f64>, Error> {
    let _guard = no_grad_guard();
    let batch = Batch::from_sequences(&[token_ids]);
    let first = batch.rows(SegmentIdx(0)).start;
    let rows: Vec<usize> = (1..token_ids.len()).map(|at| first + at).collect();
    let hidden = model.decoder.forward(&batch, adapter)?;
    let found = logprobs::of_rows(&model.decoder, &hidden, &batch, &rows, 1.0, false)?;
    let found = found.logprob.to_kind(Kind::Double).to_device(arete_model::Device::Cpu);
    Ok(Vec::<f64>::try_from(found).map_err(arete_model::Error::from)?)
}

/// What an answer should be, and what it must not be; each with what the same server answered then, if it was asked.
#[derive(Clone, Debug)]
pub struct Known<'a> {
    /// Values of the weights that the server should have.
    pub new: &'a [f64],
    /// Values of the base, and the server's own.
    pub base: (&'a [f64], Option<&'a [f64]>),
    /// Values of the adapter before, and the server's own; none if there was none.
    pub before: Option<(&'a [f64], Option<&'a [f64]>)>,
    /// These values are rounded to 16 bits on the way, as a server's are.
    pub is_rounded: bool,
}

/// Which weights an answer looks like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Looks {
    /// Those that the server should have.
    New,
    /// The base's: the adapter is not used.
    Base,
    /// Those of the adapter before: stale.
    Before,
    /// On the way from the base, or from the adapter before, to the new: a part of the layers, say.
    Half {
        /// How far on the way.
        place: f64,
    },
    /// None of these.
    Other,
}

/// What a canary found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// Which weights the answer looks like.
    pub looks: Looks,
    /// Mean difference from the new weights' values, nats.
    pub difference: f64,
    /// Mean difference of the new weights' values from those of the adapter before, or the base: what could be told apart at all.
    pub step: f64,
    /// What was allowed.
    pub tolerance: f64,
}

impl Verdict {
    /// Whether the server may be used.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.looks == Looks::New
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { looks, difference, step, tolerance } = self;
        match looks {
            Looks::New => f.write_str("answers with the new weights")?,
            Looks::Base => f.write_str(
                "answers with the base: the adapter is not used (one of several replicas behind this address, say), or an older one is that \
                 had learned nothing",
            )?,
            Looks::Before => f.write_str("answers with the adapter before: its weights are stale")?,
            Looks::Half { place } => write!(
                f,
                "answers with weights {:.0} % of the way to the new ones: half-loaded",
                100.0 * place
            )?,
            Looks::Other => {
                f.write_str("answers with other weights than any known here (another model, or damaged)")?;
            }
        }
        write!(
            f,
            "; mean difference of log-probabilities {difference:.4} nats, allowed {tolerance} (engine_tolerance), the new weights differ from \
             the old by {step:.4}"
        )
    }
}

/// Judges an answer.
///
/// # Panics
///
/// If the values are not of one text: equally many.
#[must_use]
pub fn judge(served: &[f64], known: &Known<'_>, tolerance: f64) -> Verdict {
    assert_eq!(served.len(), known.new.len(), "values of one text");
    let difference = mean_difference(served, known.new);
    let step = mean_difference(known.new, known.before.map_or(known.base.0, |(before, _)| before));
    // An adapter that has learned nothing yet is the base.
    let before =
        known.before.iter().filter(|(before, _)| mean_difference(before, known.base.0) >= SAME);
    let others = before.map(|before| (Looks::Before, before));
    let others: Vec<_> = others.chain([(Looks::Base, &known.base)]).collect();
    let verdict = |looks| Verdict { looks, difference, step, tolerance };
    let noise = known.base.1.map(|served| squared_difference(served, known.base.0));
    let (mut half, mut is_other) = (None, false);
    let is_far = difference.is_nan() || difference > tolerance;
    for (looks, (old, served_then)) in &others {
        let step = mean_difference(known.new, old);
        if step >= SAME && served_then.is_some_and(|then| then == served) {
            return verdict(*looks);
        }
        let Some(Place { place, error, rounding }) = Place::of(served, old, known.new) else {
            continue;
        };
        let rounding = match noise {
            Some(noise) => noise / squared_difference(known.new, old),
            None if known.is_rounded => rounding,
            None => 0.0,
        };
        if rounding >= MOST_ROUNDING && !is_far {
            continue;
        }
        let dilution = if known.is_rounded { rounding.min(1.0) / 2.0 } else { 0.0 };
        let miss = (1.0 - dilution - place).abs();
        if miss <= 1.0 - PLACES[1] || miss <= CERTAIN * error {
            // Nearly there, and yet not: a few layers may have little to say.
            if is_far && place < 1.0 && difference <= step / 2.0 {
                half = half.or(Some(place));
            }
            continue;
        }
        // It is not the new one. Is it the other, or a part of the way? A part of the layers lies beside the line, but not far from it.
        let off = mean_difference(served, &between(old, known.new, place));
        let is_near = off <= tolerance.max(step);
        if place <= PLACES[0] && off <= tolerance {
            return verdict(*looks);
        } else if (PLACES[0]..1.0).contains(&place) && is_near {
            half = half.or(Some(place));
        } else {
            is_other = true;
        }
    }
    match half {
        Some(place) => verdict(Looks::Half { place }),
        None if is_other || is_far => verdict(Looks::Other),
        None => verdict(Looks::New),
    }
}

/// Mean |a − b|.
#[expect(clippy::cast_precision_loss, reason = "a handful of tokens")]
fn mean_difference(a: &[f64], b: &[f64]) -> f64 {
    let sum: f64 = a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum();
    sum / a.len().max(1) as f64
}

/// Sum of (a − b)².
fn squared_difference(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum()
}

fn between(old: &[f64], new: &[f64], place: f64) -> Vec<f64> {
    old.iter().zip(new).map(|(old, new)| old + place * (new - old)).collect()
}

/// Where an answer lies on the line from `old` (0) to `new` (1), by least squares, with its standard error.
struct Place {
    place: f64,
    error: f64,
    /// How much of the line is rounding if values here are rounded as the server's: of two differences that share nothing but rounding,
    /// an answer's from the middle of the line has three quarters of the line's square.
    rounding: f64,
}

impl Place {
    fn of(served: &[f64], old: &[f64], new: &[f64]) -> Option<Self> {
        let squared = squared_difference(old, new);
        if squared <= 0.0 {
            return None;
        }
        let dots = served.iter().zip(old.iter().zip(new));
        let place: f64 = dots.map(|(s, (old, new))| (s - old) * (new - old)).sum::<f64>() / squared;
        let line = between(old, new, place);
        // Rounding is larger where a token is improbable, and there the weights show most: an error that allows for it (White 1980).
        let steps = old.iter().zip(new).map(|(old, new)| new - old);
        let rest = served.iter().zip(&line).map(|(s, line)| s - line);
        let rounding = rest.clone().map(|r| r.powi(2)).sum::<f64>() / 0.75 / squared;
        let error = rest.zip(steps).map(|(r, d)| (r * d).powi(2)).sum::<f64>().sqrt() / squared;
        place.is_finite().then_some(Self { place, error, rounding })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values that rounding of this size was added to, up or down by a hash of the place.
    fn rounded(values: &[f64], size: f64) -> Vec<f64> {
        let up = |at: u32| at.wrapping_mul(2_654_435_761) >> 31 == 1;
        let rounded = |(at, value): (u32, &f64)| if up(at) { value + size } else { value - size };
        (0..).zip(values).map(rounded).collect()
    }

    fn shifted(values: &[f64], size: f64) -> Vec<f64> {
        // A pattern of its own: every third token rises, every fifth falls.
        let shift = |at: usize| {
            f64::from(u8::from(at.is_multiple_of(3))) - f64::from(u8::from(at.is_multiple_of(5)))
        };
        values.iter().enumerate().map(|(at, value)| value + size * shift(at)).collect()
    }

    fn base() -> Vec<f64> {
        (0..100).map(|at| -0.1 * f64::from(at % 17)).collect()
    }

    fn looks(served: &[f64], new: &[f64], before: &[f64], tolerance: f64) -> Looks {
        let base = base();
        let (base, before, is_rounded) = ((&base[..], None), Some((before, None)), false);
        let known = Known { new, base, before, is_rounded };
        judge(served, &known, tolerance).looks
    }

    #[test]
    fn every_kind_of_weights_is_told_by_name() {
        let base = base();
        let before = shifted(&base, 0.2);
        let new: Vec<f64> = before
            .iter()
            .enumerate()
            .map(|(at, b)| b + if at % 2 == 0 { 0.1 } else { -0.1 })
            .collect();
        for noise in [0.0, 0.01] {
            let answer = |weights: &[f64]| looks(&rounded(weights, noise), &new, &before, 0.02);
            assert_eq!(answer(&new), Looks::New, "{noise}");
            assert_eq!(answer(&before), Looks::Before, "{noise}");
            assert_eq!(answer(&base), Looks::Base, "{noise}");
            let Looks::Half { place } = answer(&between(&before, &new, 0.5)) else {
                panic!("half of the way is half-loaded")
            };
            assert!((place - 0.5).abs() < 0.05, "{place}");
            let foreign: Vec<f64> = base.iter().rev().map(|value| value - 0.3).collect();
            assert_eq!(answer(&foreign), Looks::Other, "{noise}");
            // Twice the step, as of a scale that is read wrongly.
            assert_eq!(answer(&between(&before, &new, 2.0)), Looks::Other, "{noise}");
            let broken = vec![f64::NAN; base.len()];
            assert_eq!(answer(&broken), Looks::Other, "{noise}");
        }
    }

    #[test]
    fn a_step_below_the_rounding_of_a_token_is_seen_over_many() {
        // Rounding of 0.01, a step of 0.006 in half of the tokens: the mean difference alone says nothing.
        let base = base();
        let before = shifted(&base, 0.05);
        let new = shifted(&base, 0.056);
        let (fresh, stale) = (rounded(&new, 0.01), rounded(&before, 0.01));
        assert!((mean_difference(&fresh, &new) - mean_difference(&stale, &new)).abs() < 0.005);
        assert_eq!(looks(&fresh, &new, &before, 0.02), Looks::New);
        // 0.01 a token and 40 shifts of 0.006: standard error 0.01 / (0.006 √40) = 0.26, so a miss of 1 is 4 of them: too few.
        assert_eq!(looks(&stale, &new, &before, 0.02), Looks::New);
        // At a third of that rounding it is 11.
        assert_eq!(looks(&rounded(&before, 0.0033), &new, &before, 0.02), Looks::Before);
    }

    #[test]
    fn an_answer_equal_bit_for_bit_to_the_one_before_is_stale() {
        let base = base();
        let before = shifted(&base, 0.05);
        let new = shifted(&base, 0.056);
        let then = rounded(&before, 0.01);
        let (base, before_then) = ((&base[..], None), Some((&before[..], Some(&then[..]))));
        let known = Known { new: &new, base, before: before_then, is_rounded: false };
        assert_eq!(judge(&then, &known, 0.02).looks, Looks::Before);
        // Where the weights are the same, the answer may be.
        let known = Known { new: &before, ..known };
        assert_eq!(judge(&then, &known, 0.02).looks, Looks::New);
    }

    #[test]
    fn a_fresh_adapter_is_the_base() {
        let base = base();
        let known =
            Known { new: &base, base: (&base, Some(&base)), before: None, is_rounded: false };
        let verdict = judge(&rounded(&base, 0.01), &known, 0.02);
        assert!(verdict.is_good() && verdict.step == 0.0, "{verdict}");
        assert!((verdict.difference - 0.01).abs() < 1e-9);
        // Further off than allowed it is none of the known.
        assert_eq!(judge(&rounded(&base, 0.03), &known, 0.02).looks, Looks::Other);
    }

    /// Seen on a real vLLM: an honest server lay at 0.03 on a line that was rounding for the most part, and was called stale.
    #[test]
    fn where_the_step_is_rounding_an_honest_server_is_not_called_stale() {
        let seen: serde_json::Value =
            serde_json::from_str(include_str!("../tests/fixtures/canary-smollm2.json")).unwrap();
        let values = |by: &str, weights: &str| -> Vec<f64> {
            let values = seen[by][weights].as_array().unwrap();
            values.iter().map(|value| value.as_f64().unwrap()).collect()
        };
        let [base, before, new] = ["base", "before", "new"].map(|name| values("trainer", name));
        let served = ["base", "before", "new"].map(|name| values("server", name));
        let known = Known {
            new: &new,
            base: (&base, Some(&served[0])),
            before: Some((&before, Some(&served[1]))),
            is_rounded: true,
        };
        let looks = served.each_ref().map(|answer| judge(answer, &known, 0.15).looks);
        // The base and the adapter before are known by their bits.
        assert_eq!(looks, [Looks::Base, Looks::Before, Looks::New]);
        // Were the trainer's values exact, and the server's rounding unknown, the same answer would be refused.
        let exact = Known { is_rounded: false, base: (&base, None), ..known.clone() };
        assert_eq!(judge(&served[2], &exact, 0.15).looks, Looks::Before);
        // What is far off is refused as ever.
        let far: Vec<f64> = served[2].iter().map(|value| value - 0.2).collect();
        assert_eq!(judge(&far, &known, 0.15).looks, Looks::Other);
    }

    #[test]
    fn a_step_beyond_rounding_is_told_by_its_place_though_both_round() {
        // Two programs that round by 0.02, each in its own way, and a step of 0.1 in half of the tokens.
        let noise = |salt: u32| {
            move |at: u32| {
                let up = (at * 31 + salt).wrapping_mul(2_654_435_761) >> 31 == 1;
                if up { 0.02 } else { -0.02 }
            }
        };
        let with = |values: &[f64], salt: u32| -> Vec<f64> {
            (0..).zip(values).map(|(at, value)| value + noise(salt)(at)).collect()
        };
        let base = base();
        let (before, new) = (shifted(&base, 0.2), shifted(&base, 0.3));
        let (own_base, own_before, own_new) = (with(&base, 1), with(&before, 2), with(&new, 3));
        let known = Known {
            new: &own_new,
            base: (&own_base, None),
            before: Some((&own_before, None)),
            is_rounded: true,
        };
        let looks = |weights: &[f64]| judge(&with(weights, 4), &known, 0.15).looks;
        assert_eq!(looks(&new), Looks::New);
        assert_eq!(looks(&before), Looks::Before);
        assert!(matches!(looks(&between(&before, &new, 0.5)), Looks::Half { .. }));
    }
}
