//! Best of n: how much the ensemble's own favourite of n samples gains over an average sample.
//!
//! If choosing among n samples by the ensemble does not raise its score, neither can PPO. By its own score even noise has
//! favourites; whether they are better, a yardstick says that no recipe has trained.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use arete_chain::constitution::{Turns, carried_by_reward_models};
use arete_chain::reward_model::{Base, adapter_dir, standardise};
use arete_chain::yardstick::{self, Place};
use arete_chain::{Member, Yardstick, members, reading};
use arete_model::machine;
use arete_model::machine::Machine;
use arete_records::rows::{ConversationRow, PromptRow, RolloutRow};
use arete_records::stats::{self, Interval, Resampling};
use arete_records::{Aspect, Refusal, Split, atomic, files, parquet, score_stats};
use arete_stage::interrupt;
use arete_stage::run::{self, Completion, StageSpec, Start};
use serde::{Deserialize, Serialize};
use serde_json::{Map, json};

use crate::config::ScoreConfig;
use crate::policies::{Policy, Shelf};
use crate::replies::{Drawing, sample_chains};
use crate::rewards::{answers, aspect_scores, standardised};
use crate::run_files::rollout_reply;

/// Prompts sampled together: with 16 samples each, a full batch.
const PROMPTS_TOGETHER: usize = 4;

/// The contents of `best_of.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BestOf {
    /// Samples a prompt.
    pub n: usize,
    /// Prompts.
    pub n_prompts: usize,
    /// Where the samples are from.
    pub from: String,
    /// Mean ensemble score of a sample (the mean of the reward models' standardised scores).
    pub mean: f64,
    /// Expected ensemble score of the best of k samples, k = 1, 2, 4, …, n.
    pub curve: Vec<(usize, f64)>,
    /// Score of the best of n less the mean, with its bootstrap interval (prompts redrawn).
    pub gain: Interval,
    /// The same for each reward model's own score.
    pub gain_by_aspect: BTreeMap<Aspect, f64>,
    /// Yardstick score of the ensemble's best of n less the mean of all n, with its bootstrap interval.
    #[serde(default)]
    pub yardstick_gain: Option<Interval>,
}

impl BestOf {
    /// From the samples' standardised scores (one an aspect), prompt by prompt; none without two samples of a prompt. `n` = the fewest
    /// samples of a prompt.
    pub fn of(
        samples: &[Vec<Vec<f64>>],
        aspects: &[Aspect],
        from: &str,
        resampling: Resampling,
    ) -> Option<Self> {
        let n = samples.iter().map(Vec::len).min().filter(|&n| n >= 2)?;
        let ensemble: Vec<Vec<f64>> = samples
            .iter()
            .map(|samples| samples[..n].iter().map(|z| stats::mean(z)).collect())
            .collect();
        let best = |k: usize, scores: &[f64]| expected_best(k, scores);
        let gains: Vec<Vec<f64>> =
            ensemble.iter().map(|scores| vec![best(n, scores) - stats::mean(scores)]).collect();
        let gain = stats::bootstrap(&gains, stats::mean, resampling).interval;
        let over_prompts = |of: &dyn Fn(&[f64]) -> f64| {
            stats::mean(&ensemble.iter().map(|scores| of(scores)).collect::<Vec<f64>>())
        };
        let mut ks: Vec<usize> =
            std::iter::successors(Some(1), |k| Some(2 * k)).take_while(|k| *k < n).collect();
        ks.push(n);
        let by_aspect = |place: usize| {
            let gains: Vec<f64> = samples
                .iter()
                .map(|samples| {
                    let own: Vec<f64> = samples[..n].iter().map(|z| z[place]).collect();
                    best(n, &own) - stats::mean(&own)
                })
                .collect();
            stats::mean(&gains)
        };
        Some(Self {
            n,
            n_prompts: samples.len(),
            from: from.to_owned(),
            mean: over_prompts(&stats::mean),
            curve: ks.into_iter().map(|k| (k, over_prompts(&|scores| best(k, scores)))).collect(),
            gain,
            gain_by_aspect: aspects
                .iter()
                .enumerate()
                .map(|(place, &aspect)| (aspect, by_aspect(place)))
                .collect(),
            yardstick_gain: None,
        })
    }

    /// Adds what the yardstick says of the ensemble's favourites: its scores, sample by sample.
    ///
    /// # Panics
    ///
    /// Unless there are as many of both.
    #[must_use]
    pub fn with_yardstick(
        self,
        samples: &[Vec<Vec<f64>>],
        yardstick: &[Vec<f64>],
        resampling: Resampling,
    ) -> Self {
        assert_eq!(samples.len(), yardstick.len(), "the same prompts");
        let gains: Vec<Vec<f64>> = samples
            .iter()
            .zip(yardstick)
            .map(|(samples, scores)| {
                assert_eq!(samples.len(), scores.len(), "the same samples");
                let ensemble = samples.iter().map(|z| stats::mean(z));
                let (favourite, _) = ensemble
                    .enumerate()
                    .max_by(|(_, a), (_, b)| a.total_cmp(b))
                    .expect("two samples at least");
                vec![scores[favourite] - stats::mean(scores)]
            })
            .collect();
        let gain = stats::bootstrap(&gains, stats::mean, resampling).interval;
        Self { yardstick_gain: Some(gain), ..self }
    }

    /// From the first PPO iteration's rollouts, where the policy is still the base: prompts with several samples.
    pub fn of_rollouts(rollouts: &[RolloutRow], resampling: Resampling) -> Option<Self> {
        let first = rollouts.first()?.iteration;
        // Of the turns that have a reward model.
        let scored = rollouts.first()?.turns.iter().filter(|turn| turn.z.is_some());
        let aspects: Vec<Aspect> = scored.map(|turn| turn.aspect).collect();
        let mut by_prompt: BTreeMap<&str, Vec<Vec<f64>>> = BTreeMap::new();
        for row in rollouts.iter().filter(|row| row.iteration == first) {
            let z: Option<Vec<f64>> =
                aspects.iter().map(|&aspect| rollout_reply(row, aspect).z).collect();
            if let Some(z) = z.filter(|z| !z.is_empty()) {
                by_prompt.entry(&row.prompt_id).or_default().push(z);
            }
        }
        let samples: Vec<Vec<Vec<f64>>> =
            by_prompt.into_values().filter(|samples| samples.len() >= 2).collect();
        Self::of(&samples, &aspects, "the first rollout", resampling)
    }
}

/// The expected maximum of k of the values drawn without replacement: Σ C(i−1, k−1)/C(n, k) · x₍ᵢ₎ over sorted values.
///
/// # Panics
///
/// Unless 1 ≤ k ≤ number of values.
pub fn expected_best(k: usize, values: &[f64]) -> f64 {
    let n = values.len();
    assert!((1..=n).contains(&k), "k of n values");
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    // P(the largest of the k is x₍ᵢ₎), from the largest downwards: k/n, then each (i−k)/(i−1) of the one before.
    let mut probability = k as f64 / n as f64;
    let mut expected = 0.0;
    for i in (k..=n).rev() {
        expected += probability * sorted[i - 1];
        if i > k {
            probability *= (i - k) as f64 / (i - 1) as f64;
        }
    }
    expected
}

/// What to sample from and to score with.
#[derive(Clone, Debug)]
pub struct BestOfInputs {
    /// Directory (or file) of the prompts; the validation split is used.
    pub prompts: PathBuf,
    /// The model that samples, and that the reward models belong to.
    pub base: String,
    /// Directory of reward models, one a directory: of turns, or of virtues, which read the answer.
    pub rewards: PathBuf,
    /// Directory of a reward model that judges the ensemble's favourites.
    pub yardstick: Option<PathBuf>,
    /// Where the result goes.
    pub output: PathBuf,
}

/// Samples `n` chains for every validation prompt (at most `config.n_prompts`) from the base and scores them.
///
/// # Errors
///
/// Bad settings or data, a model that cannot be used, an interrupt, a full disk.
pub fn run(config: &ScoreConfig, n: usize, inputs: &BestOfInputs) -> Result<BestOf> {
    config.check()?;
    if n < 2 {
        bail!(Refusal::setting("best_of", "at least 2 samples", n));
    }
    let base = Policy::resolve("base", &inputs.base, None)?.source;
    let file = if inputs.prompts.is_dir() {
        inputs.prompts.join("prompts.parquet")
    } else {
        inputs.prompts.clone()
    };
    let mut files = vec![("prompts".to_owned(), file.clone())];
    let constitution = carried_by_reward_models(&inputs.rewards)?;
    let turns = constitution.as_ref().map_or_else(Turns::default, |own| own.turns.clone());
    let members = members::some_reward_models(&inputs.rewards, &turns)?;
    let aspects: Vec<Aspect> = members.iter().map(|member| member.name).collect();
    files.extend(constitution.map(|own| ("constitution".to_owned(), own.path().to_owned())));
    if let Some(path) = base.local_path() {
        files.push(("base".to_owned(), path.to_owned()));
    }
    for Member { name: aspect, dir, .. } in &members {
        files.push((format!("reward {aspect}"), adapter_dir(dir)));
        let rule = dir.join(reading::FILE);
        if rule.is_file() {
            files.push((format!("reading {aspect}"), rule));
        }
        files.push((format!("score_stats {aspect}"), dir.join(score_stats::FILE)));
    }
    let yardstick = inputs.yardstick.as_ref().map(|dir| Place::resolve(dir, None)).transpose()?;
    if let (Some(place), Some(dir)) = (&yardstick, &inputs.yardstick) {
        let base = place.source.local_path().map(Path::to_owned);
        files.extend(base.map(|path| ("yardstick base".to_owned(), path)));
        files.extend(yardstick::files(dir)?);
    }
    let mut settings = serde_json::to_value(config).expect("settings are numbers and words");
    settings["n_samples"] = n.into();
    settings["threads"] = 0.into();
    // Not a setting: results of versions that averaged the yardstick over three turns are taken again.
    settings["yardstick"] = "of answers, by fold".into();
    let spec = StageSpec {
        stage: "best-of",
        output: &inputs.output,
        config: settings,
        seed: config.seed,
        inputs: files,
    };
    let path = inputs.output.join("best_of.json");
    let run = match run::begin(spec)? {
        Start::UpToDate(_) => return read(&path),
        Start::Run(run) => run,
    };
    let mut prompts: Vec<PromptRow> = parquet::read(&file)?;
    prompts.retain(|prompt| prompt.split == Split::Validation);
    if config.n_prompts > 0 {
        prompts.truncate(config.n_prompts);
    }
    if prompts.is_empty() {
        bail!(Refusal::file(&file, "split", "at least one validation prompt", "none"));
    }
    let options = config.load_options()?;
    let mut shelf = Shelf::new(options);
    let model = shelf.get(&base)?;
    let chat = model.chat()?;
    let micro_batch_tokens = config.micro_batch_tokens;
    let reader = Base { model, chat: &chat, micro_batch_tokens };
    let reward_models = standardised(&members, &turns, model)?;
    let drawing = Drawing {
        sampling: config.sampling(),
        max_new_tokens: config.max_new_tokens,
        seed: config.seed,
        n_samples: n,
    };
    let progress = arete_records::progress::start("best of n", "prompts", prompts.len() as u64);
    let mut samples: Vec<Vec<Vec<f64>>> = Vec::new();
    let mut all_rows = Vec::new();
    for together in prompts.chunks(PROMPTS_TOGETHER) {
        interrupt::check()?;
        let chains = sample_chains(model, None, together, &turns, &drawing)?;
        let rows: Vec<ConversationRow> = chains.into_iter().map(|(row, _)| row).collect();
        let mut z = vec![Vec::with_capacity(aspects.len()); rows.len()];
        for (read, reward, stats) in &reward_models {
            let scores = aspect_scores(reward, reader, &rows, &[*read])?;
            for (z, score) in z.iter_mut().zip(scores) {
                z.push(standardise(score[0], stats));
            }
        }
        samples.extend(z.chunks(n).map(<[Vec<f64>]>::to_vec));
        all_rows.extend(rows);
        progress.inc(together.len() as u64);
    }
    drop(progress);
    let resampling = Resampling { draws: config.draws, level: 0.95, seed: config.seed };
    let mut best =
        BestOf::of(&samples, &aspects, "validation prompts, sampled from the base", resampling)
            .ok_or_else(|| {
                Refusal::setting(
                    "max_new_tokens",
                    "so few that the replies fit the model",
                    config.max_new_tokens,
                )
            })?;
    if let Some(place) = &yardstick {
        let scores = yardstick_scores(place, &mut shelf, &all_rows, config.micro_batch_tokens)?;
        let scores: Vec<Vec<f64>> = scores.chunks(n).map(<[f64]>::to_vec).collect();
        best = best.with_yardstick(&samples, &scores, resampling);
    }
    let mut bytes = serde_json::to_vec_pretty(&best).expect("numbers and words serialise");
    bytes.push(b'\n');
    atomic::write(&path, &bytes)?;
    let counts = Map::from_iter([("prompts".to_owned(), json!(best.n_prompts))]);
    Machine::write(run.output())?;
    run.finish(Completion {
        device: machine::device_name(options.device),
        dtype: machine::dtype_name(options.dtype).to_owned(),
        counts,
    })?;
    Ok(best)
}

/// The yardstick's score of each conversation's answer.
fn yardstick_scores(
    place: &Place,
    shelf: &mut Shelf,
    rows: &[ConversationRow],
    budget: usize,
) -> Result<Vec<f64>> {
    let model = shelf.get_packed(&place.source, place.nf4)?;
    let chat = model.chat()?;
    let judge = Yardstick::over(place, model)?;
    let base = Base { model, chat: &chat, micro_batch_tokens: budget };
    Ok(judge.scores(base, &answers(rows)?)?)
}

fn read(path: &Path) -> Result<BestOf> {
    Ok(serde_json::from_slice(&files::read_small(path)?)
        .map_err(|error| Refusal::file(path, "JSON", "what `doctor --best-of` writes", error))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resampling() -> Resampling {
        Resampling { draws: 200, level: 0.95, seed: 0 }
    }

    #[test]
    fn expected_best_by_hand() {
        let values = [3.0, 1.0, 2.0];
        assert!((expected_best(1, &values) - 2.0).abs() < 1e-12);
        // Pairs {1,2}, {1,3}, {2,3}: maxima 2, 3, 3.
        assert!((expected_best(2, &values) - 8.0 / 3.0).abs() < 1e-12);
        assert!((expected_best(3, &values) - 3.0).abs() < 1e-12);
        // Pairs of 4 values 0, 1, 2, 10: maxima 1, 2, 2, 10, 10, 10.
        assert!((expected_best(2, &[10.0, 0.0, 2.0, 1.0]) - 35.0 / 6.0).abs() < 1e-12);
    }

    #[test]
    fn the_gain_of_the_best_by_hand() {
        // Ensemble scores: prompt 1: 0 and 2; prompt 2: 1 and 1.
        let samples =
            vec![vec![vec![0.0; 3], vec![1.0, 2.0, 3.0]], vec![vec![1.0; 3], vec![0.0, 1.0, 2.0]]];
        let best = BestOf::of(&samples, &Aspect::SHIPPED, "a test", resampling()).unwrap();
        assert_eq!((best.n, best.n_prompts, best.mean), (2, 2, 1.0));
        assert_eq!(best.curve, [(1, 1.0), (2, 1.5)]);
        assert_eq!(best.gain.estimate, 0.5);
        // Action: maxima 1 and 1, means 0.5 and 0.5.
        assert_eq!(best.gain_by_aspect[&Aspect::ACTION], 0.5);
        // Favourites: the second of prompt 1, the first or second of prompt 2 (both 1).
        let by_yardstick =
            best.with_yardstick(&samples, &[vec![5.0, 8.0], vec![3.0, 3.0]], resampling());
        assert_eq!(by_yardstick.yardstick_gain.unwrap().estimate, 0.75);
        assert!(
            BestOf::of(&[vec![vec![0.0; 3]]], &Aspect::SHIPPED, "a test", resampling()).is_none()
        );
        assert!(BestOf::of(&[], &Aspect::SHIPPED, "a test", resampling()).is_none());
    }
}
