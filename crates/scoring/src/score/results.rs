//! The stage's last step: the units joined into its files, and what they show.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anyhow::{Result, bail};
use arete_chain::pairs::LabelledPair;
use arete_chain::yardstick::Place;
use arete_chain::{Member, Ruled};
use arete_records::parquet;
use arete_records::rows::{ConversationRow, PromptRow, ScoreRow};
use arete_records::stats::{self, Interval, Resampling};
use arete_records::{Aspect, Refusal, ScoreStats, atomic};

use super::{COHERENCE, POLICY_PREFERENCES, REPLIES, SCORES, SUMMARY, Units, Work};
use crate::coherence::{Coherence, ReplyFacts, repeated_4grams};
use crate::endpoint::Primary;
use crate::policies::same_source;
use crate::rows::{CoherenceRow, MeasureRow, PolicyPreferenceRow, YardstickRow};
use crate::summary::{self, ModelSummary, PreferenceAccuracy, Standardisation, Summary};

/// Mass inside the intervals.
const LEVEL: f64 = 0.95;

impl Work<'_> {
    /// Joins the units and says what they show.
    pub(super) fn join(&self, labelled: &[LabelledPair]) -> Result<()> {
        let plan = self.plan;
        let mut conversations = Vec::new();
        for policy in &plan.policies {
            conversations.push(self.units("replies", policy).read_all::<ConversationRow>()?);
        }
        let shared = shared_prompts(self.prompts, &conversations);
        if shared.is_empty() {
            bail!(Refusal::setting(
                "max_new_tokens",
                "so few that a test prompt and its replies fit every model",
                plan.config.max_new_tokens,
            ));
        }
        let keeps = |prompt_id: &str| shared.contains(prompt_id);
        let mut measures = Vec::new();
        for policy in &plan.policies {
            let mut rows = self.units("scores", policy).read_all::<MeasureRow>()?;
            rows.retain(|row| keeps(&row.prompt_id));
            measures.push(rows);
        }
        for rows in &mut conversations {
            rows.retain(|row| keeps(&row.prompt_id));
        }
        let mut yardstick: Vec<HashMap<String, YardstickRow>> = Vec::new();
        for policy in &plan.policies {
            let rows = match plan.yardstick {
                Some(_) => self.units("yardstick", policy).read_all::<YardstickRow>()?,
                None => Vec::new(),
            };
            yardstick.push(rows.into_iter().map(|row| (row.prompt_id.clone(), row)).collect());
        }
        let mut preferences: Vec<PolicyPreferenceRow> = Vec::new();
        for policy in &plan.policies {
            let units = Units { n_items: labelled.len(), ..self.units("pairs", policy) };
            preferences.extend(units.read_all::<PolicyPreferenceRow>()?);
        }

        let standardisation = self.standardisation(&measures)?;
        let (mut scores, mut coherence) = (Vec::new(), Vec::new());
        let mut retokenised = BTreeSet::new();
        for (((policy, measures), conversations), yardstick) in
            plan.policies.iter().zip(&measures).zip(&conversations).zip(&yardstick)
        {
            let by_prompt: HashMap<&str, &ConversationRow> =
                conversations.iter().map(|row| (row.prompt_id.as_str(), row)).collect();
            if measures.iter().any(|row| row.retokenised) {
                retokenised.insert(policy.name.as_str());
            }
            for row in measures {
                let conversation = by_prompt[row.prompt_id.as_str()];
                let is_turn = plan.turns.place(row.aspect).is_some();
                let read = if is_turn { row.aspect } else { plan.turns.answer() };
                let turn = conversation.turn(read).expect("its turns were scored");
                if let Some(score) = row.score {
                    let Standardisation { mean, std, .. } = standardisation[&row.aspect];
                    let is_beside = plan.beside_yardstick() == Some(row.aspect);
                    let measured = is_beside.then(|| yardstick.get(&row.prompt_id)).flatten();
                    scores.push(ScoreRow {
                        model: policy.name.clone(),
                        prompt_id: row.prompt_id.clone(),
                        aspect: row.aspect,
                        score,
                        z: ((f64::from(score) - mean) / std) as f32,
                        yardstick: measured.map(|own| own.score),
                        yardstick_words: measured.and_then(|own| own.words),
                        n_tokens: turn.n_tokens,
                        finish_reason: turn.finish_reason,
                    });
                }
                if is_turn {
                    let text = turn.text.as_str();
                    coherence.push(CoherenceRow {
                        model: policy.name.clone(),
                        prompt_id: row.prompt_id.clone(),
                        aspect: row.aspect,
                        base_logprob: row.base_logprob,
                        n_base_tokens: row.n_base_tokens,
                        repeated_4grams: repeated_4grams(text).map(|rate| rate as f32),
                        empty: text.trim().is_empty(),
                    });
                }
            }
        }
        let mut summary = self.summarise(
            &scores,
            &coherence,
            &conversations,
            (preferences.as_slice(), labelled),
            standardisation,
            shared.len(),
        )?;
        for (model, rows) in summary.models.iter_mut().zip(&measures) {
            model.retokenised = retokenised.contains(model.name.as_str());
            model.kl = kl_of(rows, self.resampling());
        }
        fs_err::create_dir_all(self.output.join(REPLIES))?;
        for (policy, rows) in plan.policies.iter().zip(&conversations) {
            parquet::write(
                self.output.join(REPLIES).join(format!("{}.parquet", policy.name)),
                rows,
            )?;
        }
        parquet::write(self.output.join(SCORES), &scores)?;
        parquet::write(self.output.join(COHERENCE), &coherence)?;
        if !preferences.is_empty() {
            parquet::write(self.output.join(POLICY_PREFERENCES), &preferences)?;
        }
        let mut bytes = serde_json::to_vec_pretty(&summary).expect("numbers and words serialise");
        bytes.push(b'\n');
        Ok(atomic::write(self.output.join(SUMMARY), &bytes)?)
    }

    /// The reward models' own statistics; where there are none, those of the first model's replies.
    fn standardisation(
        &self,
        measures: &[Vec<MeasureRow>],
    ) -> Result<BTreeMap<Aspect, Standardisation>> {
        let mut out = BTreeMap::new();
        for Member { name: aspect, dir, .. } in &self.plan.members {
            let aspect = *aspect;
            let standardisation = match ScoreStats::read(dir)? {
                // One score for all is nothing to standardise with.
                Some(ScoreStats { mean, std, n, split, source, .. }) if std > 0.0 => {
                    let from = match source.as_str() {
                        "" => format!("{split} conversations of the base"),
                        source => format!("{source}, {split} prompts"),
                    };
                    Standardisation { mean, std, n, from }
                }
                _ => {
                    let name = &self.plan.policies[0].name;
                    tracing::warn!(
                        aspect = aspect.name(),
                        model = name,
                        "no score statistics: standardised by this model's replies"
                    );
                    let scores: Vec<f64> = measures[0]
                        .iter()
                        .filter(|row| row.aspect == aspect)
                        .filter_map(|row| row.score.map(f64::from))
                        .collect();
                    let std = stats::std(&scores);
                    Standardisation {
                        mean: stats::mean(&scores),
                        std: if std > 0.0 { std } else { 1.0 },
                        n: scores.len(),
                        from: format!("replies of {name}"),
                    }
                }
            };
            out.insert(aspect, standardisation);
        }
        Ok(out)
    }

    fn summarise(
        &self,
        scores: &[ScoreRow],
        coherence: &[CoherenceRow],
        conversations: &[Vec<ConversationRow>],
        (preferences, labelled): (&[PolicyPreferenceRow], &[LabelledPair]),
        standardisation: BTreeMap<Aspect, Standardisation>,
        n_prompts: usize,
    ) -> Result<Summary> {
        let config = self.plan.config;
        let resampling = self.resampling();
        let ruled: HashMap<i32, Ruled> = labelled
            .iter()
            .map(|pair| {
                let ruled = Ruled::of(&pair.chosen.messages, &pair.rejected.messages);
                (i32::try_from(pair.row).unwrap_or(i32::MAX), ruled)
            })
            .collect();
        let mut models = Vec::new();
        for ((policy, (_, own_scores)), conversations) in
            self.plan.policies.iter().zip(summary::scores(scores, resampling)).zip(conversations)
        {
            let by_prompt: HashMap<&str, &ConversationRow> =
                conversations.iter().map(|row| (row.prompt_id.as_str(), row)).collect();
            let own: Vec<(Aspect, ReplyFacts<'_>)> = coherence
                .iter()
                .filter(|row| row.model == policy.name)
                .map(|row| {
                    let conversation = by_prompt[row.prompt_id.as_str()];
                    let turn = conversation.turn(row.aspect).expect("its turns were scored");
                    let facts = ReplyFacts {
                        text: &turn.text,
                        n_tokens: turn.n_tokens,
                        finish_reason: turn.finish_reason,
                        base_logprob: f64::from(row.base_logprob),
                        n_base_tokens: row.n_base_tokens,
                    };
                    (row.aspect, facts)
                })
                .collect();
            let of = |wanted: Option<Aspect>| {
                let facts: Vec<ReplyFacts<'_>> = own
                    .iter()
                    .filter(|(aspect, _)| wanted.is_none_or(|wanted| wanted == *aspect))
                    .map(|(_, facts)| facts.clone())
                    .collect();
                Coherence::of(&facts)
            };
            let (logprobs, by_rule): (Vec<(f64, f64)>, Vec<Ruled>) = preferences
                .iter()
                .filter(|row| row.model == policy.name)
                .map(|row| {
                    let both = (f64::from(row.logprob_chosen), f64::from(row.logprob_rejected));
                    (both, ruled[&row.pair].clone())
                })
                .unzip();
            models.push(ModelSummary {
                name: policy.name.clone(),
                source: policy.given.clone(),
                scores: own_scores,
                coherence: of(None),
                coherence_by_aspect: self
                    .plan
                    .turns
                    .names()
                    .into_iter()
                    .map(|aspect| (aspect, of(Some(aspect))))
                    .collect(),
                retokenised: false,
                kl: None,
                preference_accuracy: PreferenceAccuracy::of(&logprobs, &by_rule),
            });
        }
        let mut summary = Summary {
            primary: Primary::default(),
            equal_length: BTreeMap::new(),
            n_prompts,
            n_left_out: self.prompts.len() - n_prompts,
            draws: config.draws,
            level: LEVEL,
            base: self.plan.inputs.base.clone(),
            yardstick: self.plan.inputs.yardstick.as_ref().map(|path| path.display().to_string()),
            yardstick_cross_fitted: self.plan.yardstick.as_ref().map(Place::is_cross_fitted),
            labels: self.plan.labels.clone(),
            standardisation,
            models,
            differences: summary::differences(scores, resampling),
        };
        summary.complete();
        summary.primary =
            Primary::of(&self.plan.config.endpoint()?, &summary, self.is_without_sft());
        Ok(summary)
    }

    fn resampling(&self) -> Resampling {
        let config = self.plan.config;
        Resampling { draws: config.draws, level: LEVEL, seed: config.seed }
    }

    /// Whether the model that the reward models read with, and PPO started from, is the original.
    fn is_without_sft(&self) -> bool {
        let original = self.plan.policies.iter().find(|policy| policy.name == summary::ORIGINAL);
        original.is_some_and(|policy| {
            policy.adapter.is_none() && same_source(&policy.source, &self.plan.base)
        })
    }
}

/// KL from the base a conversation, prompts redrawn; none where it was not measured.
fn kl_of(rows: &[MeasureRow], resampling: Resampling) -> Option<Interval> {
    let mut by_prompt: BTreeMap<&str, f64> = BTreeMap::new();
    for row in rows {
        if let Some(kl) = row.kl {
            *by_prompt.entry(&row.prompt_id).or_default() += f64::from(kl);
        }
    }
    let clusters: Vec<Vec<f64>> = by_prompt.into_values().map(|kl| vec![kl]).collect();
    (!clusters.is_empty()).then(|| stats::bootstrap(&clusters, stats::mean, resampling).interval)
}

/// Ids of the prompts that every model has replied to.
fn shared_prompts<'a>(
    prompts: &'a [PromptRow],
    conversations: &[Vec<ConversationRow>],
) -> BTreeSet<&'a str> {
    let mut shared: BTreeSet<&str> =
        prompts.iter().map(|prompt| prompt.prompt_id.as_str()).collect();
    for rows in conversations {
        let own: BTreeSet<&str> = rows.iter().map(|row| row.prompt_id.as_str()).collect();
        shared.retain(|prompt_id| own.contains(prompt_id));
    }
    shared
}
