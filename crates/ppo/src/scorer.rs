//! Scores of conversations: reward models over the policy's own base, the yardstick, and rewards by rule.

use std::path::Path;

use arete_model::{
    Adapter, Chat, Decoder, LoadOptions, Model, ScalarHead, Source, Tensor, adapter_files,
};
use arete_records::{Aspect, FinishReason, ScoreStats, score_stats, stats};
use arete_training::order;
use tch::{Device, Kind};

use crate::Error;
use crate::config::{ProgrammedReward, RolloutKind};
use crate::packing::Packed;
use crate::rollout::Conversation;

/// A spread below this is none: scores are f32 numbers of order 1.
const MIN_STD: f64 = 1e-6;

/// What gives a score.
#[derive(Debug)]
enum Judge {
    Model { adapter: Adapter, head: ScalarHead },
    Rule(ProgrammedReward),
}

/// One member of the ensemble.
#[derive(Debug)]
pub struct Member {
    /// What it scores.
    pub aspect: Aspect,
    judge: Judge,
    /// What its scores are standardised with; none until they are known.
    pub stats: Option<ScoreStats>,
}

/// The ensemble.
#[derive(Debug)]
pub struct Ensemble {
    /// Its members, in the order of aspects.
    pub members: Vec<Member>,
    kind: RolloutKind,
}

/// Scores of a rollout.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores {
    /// Raw, `[B][K]`.
    pub raw: Vec<Vec<f64>>,
    /// Standardised, `[B][K]`.
    pub z: Vec<Vec<f64>>,
    /// Tokens that the reward models read, in all.
    pub n_tokens: usize,
}

impl Scores {
    /// `[B, K]` f32, standardised.
    pub fn z_tensor(&self) -> Tensor {
        let flat: Vec<f32> = self.z.iter().flatten().map(|&z| z as f32).collect();
        Tensor::from_slice(&flat).view([self.z.len() as i64, -1])
    }

    /// Mean over the members, one a conversation.
    pub fn z_means(&self) -> Vec<f64> {
        self.z.iter().map(|row| stats::mean(row)).collect()
    }
}

/// How scores are computed.
#[derive(Clone, Copy, Debug)]
pub struct Scoring<'a> {
    /// The base.
    pub decoder: &'a Decoder,
    /// Its chat template.
    pub chat: &'a Chat<'a>,
    /// Most tokens in one forward pass.
    pub budget: usize,
}

impl Ensemble {
    /// Loads the reward models of a directory: `<aspect>/adapter`, `<aspect>/score_stats.json`.
    ///
    /// # Errors
    ///
    /// [`Error::NotAReward`] if a head is missing or statistics are unusable; [`Error::Model`] if a file is, or the model
    /// was trained on another base.
    pub fn load(dir: &Path, model: &Model, kind: RolloutKind) -> Result<Self, Error> {
        let members = Aspect::ALL
            .into_iter()
            .map(|aspect| {
                let dir = dir.join(aspect.name());
                let (adapter, head) = load_reward(&dir.join("adapter"), aspect.name(), model)?;
                let stats = read_stats(&dir, Some(&model.base_sha256))?;
                Ok(Member { aspect, judge: Judge::Model { adapter, head }, stats })
            })
            .collect::<Result<_, Error>>()?;
        Ok(Self { members, kind })
    }

    /// The three aspects' reward models as they are given, their scores taken as standardised already.
    pub fn of_models(models: [(Adapter, ScalarHead); 3], kind: RolloutKind) -> Self {
        let members = Aspect::ALL
            .into_iter()
            .zip(models)
            .map(|(aspect, (adapter, head))| Member {
                aspect,
                judge: Judge::Model { adapter, head },
                stats: Some(ScoreStats {
                    mean: 0.0,
                    std: 1.0,
                    n: 0,
                    split: String::new(),
                    base_sha256: String::new(),
                }),
            })
            .collect();
        Self { members, kind }
    }

    /// Members that score by rule: one for each reply.
    pub fn programmed(rule: &ProgrammedReward, kind: RolloutKind) -> Self {
        let members = Aspect::ALL
            .into_iter()
            .take(kind.n_turns())
            .map(|aspect| Member { aspect, judge: Judge::Rule(rule.clone()), stats: None })
            .collect();
        Self { members, kind }
    }

    /// The reply that a member scores.
    fn turn_of(&self, member: &Member) -> usize {
        match self.kind {
            RolloutKind::Chain => member.aspect.index(),
            RolloutKind::Answer => 0,
        }
    }

    /// The members' raw scores, `[B][K]`, and the tokens they read. Each is read after the conversation through the member's reply, whole as the
    /// chat template has it; what else is scored beside it changes nothing but rounding.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] if the template refuses a conversation or memory runs out.
    pub fn raw_scores(
        &self,
        scoring: Scoring<'_>,
        conversations: &[Conversation],
    ) -> Result<(Vec<Vec<f64>>, usize), Error> {
        let mut out = vec![Vec::with_capacity(self.members.len()); conversations.len()];
        let mut n_tokens = 0;
        let mut sequences: Option<(usize, Vec<Vec<i64>>)> = None;
        for member in &self.members {
            let turn = self.turn_of(member);
            let scores = match &member.judge {
                Judge::Model { adapter, head } => {
                    if sequences.as_ref().is_none_or(|(rendered, _)| *rendered != turn) {
                        sequences = Some((turn, render(scoring.chat, conversations, turn)?));
                    }
                    let (_, sequences) = sequences.as_ref().expect("rendered above");
                    n_tokens += sequences.iter().map(Vec::len).sum::<usize>();
                    sequence_scores(scoring, Some(adapter), head, sequences)?
                }
                Judge::Rule(rule) => conversations.iter().map(|c| rule.score(c, turn)).collect(),
            };
            out.iter_mut().zip(scores).for_each(|(row, score)| row.push(score));
        }
        Ok((out, n_tokens))
    }

    /// Raw and standardised scores.
    ///
    /// # Errors
    ///
    /// As [`Ensemble::raw_scores`], and [`Error::NonFiniteScore`].
    ///
    /// # Panics
    ///
    /// If a member has no statistics yet.
    pub fn scores(
        &self,
        scoring: Scoring<'_>,
        conversations: &[Conversation],
        iteration: u64,
        prompt_id: impl Fn(&Conversation) -> String,
    ) -> Result<Scores, Error> {
        let (raw, n_tokens) = self.raw_scores(scoring, conversations)?;
        for (idx, member) in self.members.iter().enumerate() {
            let scores = column(&raw, idx);
            let what = format!("score of the {} reward model", member.aspect);
            check_finite(&scores, conversations, &what, iteration, &prompt_id)?;
        }
        let standardise = |(member, &score): (&Member, &f64)| {
            let stats = member.stats.as_ref().expect("statistics are known before scores are");
            (score - stats.mean) / stats.std
        };
        let z =
            raw.iter().map(|row| self.members.iter().zip(row).map(standardise).collect()).collect();
        Ok(Scores { raw, z, n_tokens })
    }

    /// The scores of each member that is a reward model, a column each.
    pub(crate) fn learned_columns(&self, raw: &[Vec<f64>]) -> Vec<(Aspect, Vec<f64>)> {
        let members = self.members.iter().enumerate();
        members
            .filter(|(_, member)| matches!(member.judge, Judge::Model { .. }))
            .map(|(idx, member)| (member.aspect, column(raw, idx)))
            .collect()
    }

    /// Takes the statistics of members that have none from these scores of the reference.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroVariance`] if a member scores all conversations alike, [`Error::NotANumber`] if it gives no number.
    pub fn calibrate(
        &mut self,
        raw: &[Vec<f64>],
        split: &str,
        base_sha256: &str,
    ) -> Result<(), Error> {
        for (idx, member) in self.members.iter_mut().enumerate() {
            if member.stats.is_some() {
                continue;
            }
            let scores = column(raw, idx);
            if let Some(got) = scores.iter().find(|score| !score.is_finite()) {
                return Err(Error::NotANumber {
                    what: format!("scores of the {} reward model on the reference", member.aspect),
                    got: *got,
                });
            }
            let stats = ScoreStats::of(&scores, split, base_sha256);
            if !(stats.std.is_finite() && stats.std >= MIN_STD) {
                return Err(Error::ZeroVariance {
                    what: format!("scores of the {} reward model on the reference", member.aspect),
                    got: stats.mean,
                    n: stats.n,
                });
            }
            member.stats = Some(stats);
        }
        Ok(())
    }
}

impl ProgrammedReward {
    /// The score of one reply.
    pub fn score(&self, conversation: &Conversation, turn: usize) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "lengths are small")]
        match self {
            Self::Letter(letter) => {
                let text = conversation.reply_text(turn);
                let letters = text.chars().filter(|c| c.is_alphabetic());
                let (mut n, mut hits) = (0usize, 0usize);
                for c in letters {
                    n += 1;
                    hits += usize::from(c.to_ascii_lowercase() == *letter);
                }
                if n == 0 { 0.0 } else { hits as f64 / n as f64 }
            }
            Self::Length(target) => {
                let n = conversation.replies[turn].tokens.len();
                -(n as f64 - *target as f64).abs() / *target as f64
            }
        }
    }
}

/// A reward model that takes no part in training: it shows whether the others are being gamed.
#[derive(Debug)]
pub struct Yardstick {
    /// Its own model, where it is merged; else it sits on the policy's base.
    model: Option<Model>,
    adapter: Option<Adapter>,
    head: ScalarHead,
    stats: Option<ScoreStats>,
}

impl Yardstick {
    /// Loads `DIR/adapter` if it was trained on this base, else the merged model in `DIR/merged`.
    ///
    /// # Errors
    ///
    /// [`Error::NotAReward`] if neither can be used.
    pub fn load(dir: &Path, model: &Model, options: &LoadOptions) -> Result<Self, Error> {
        let (adapter_dir, merged) = (dir.join("adapter"), dir.join("merged"));
        let reason = match load_reward(&adapter_dir, "yardstick", model) {
            Ok((adapter, head)) => {
                let stats = read_stats(dir, Some(&model.base_sha256))?;
                return Ok(Self { model: None, adapter: Some(adapter), head, stats });
            }
            Err(reason) => reason,
        };
        if merged.is_dir() {
            tracing::info!(%reason, "yardstick: its merged model, on a base of its own");
            let options = LoadOptions { nf4: None, ..*options };
            let mut own = Model::load(&Source::Directory(merged.clone()), &options)?;
            let head = own.head.take().ok_or_else(|| Error::NotAReward {
                path: merged,
                expected: "a …ForSequenceClassification model",
                got: "one without a score head".to_owned(),
            })?;
            let stats = read_stats(dir, None)?;
            return Ok(Self { model: Some(own), adapter: None, head, stats });
        }
        Err(reason)
    }

    /// Scores of conversations through their answer, standardised if the yardstick has statistics.
    ///
    /// # Errors
    ///
    /// As [`Ensemble::scores`].
    pub fn scores(
        &self,
        scoring: Scoring<'_>,
        conversations: &[Conversation],
        iteration: u64,
        prompt_id: impl Fn(&Conversation) -> String,
    ) -> Result<Vec<f64>, Error> {
        let (adapter, head) = (self.adapter.as_ref(), &self.head);
        let raw = match &self.model {
            None => {
                let sequences = render(scoring.chat, conversations, 0)?;
                sequence_scores(scoring, adapter, head, &sequences)?
            }
            Some(own) => {
                let chat = own.chat()?;
                let sequences = render(&chat, conversations, 0)?;
                let scoring =
                    Scoring { decoder: &own.decoder, chat: &chat, budget: scoring.budget };
                sequence_scores(scoring, adapter, head, &sequences)?
            }
        };
        check_finite(&raw, conversations, "score of the yardstick", iteration, &prompt_id)?;
        let (mean, std) = self.stats.as_ref().map_or((0.0, 1.0), |stats| (stats.mean, stats.std));
        Ok(raw.into_iter().map(|score| (score - mean) / std).collect())
    }
}

/// The scores of one member.
fn column(raw: &[Vec<f64>], member: usize) -> Vec<f64> {
    raw.iter().map(|row| row[member]).collect()
}

/// A score for each conversation that is a number, or an error that names the prompt.
fn check_finite(
    scores: &[f64],
    conversations: &[Conversation],
    what: &str,
    iteration: u64,
    prompt_id: &impl Fn(&Conversation) -> String,
) -> Result<(), Error> {
    match scores.iter().zip(conversations).find(|(score, _)| !score.is_finite()) {
        None => Ok(()),
        Some((&got, conversation)) => Err(Error::NonFiniteScore {
            iteration,
            what: what.to_owned(),
            prompt_id: prompt_id(conversation),
            got,
        }),
    }
}

fn load_reward(dir: &Path, name: &str, model: &Model) -> Result<(Adapter, ScalarHead), Error> {
    let loaded = adapter_files::load(dir, name, &model.config, model.decoder.device())?;
    loaded.meta.check_base(model)?;
    if loaded.meta.base_sha256.is_empty() {
        tracing::warn!(
            path = %dir.display(),
            trained_on = loaded.meta.base_model,
            "the adapter does not say what its base's weights were: nothing checks that they are this model's"
        );
    }
    let head = loaded.head.ok_or_else(|| Error::NotAReward {
        path: dir.to_owned(),
        expected: "an adapter with a score head (modules_to_save)",
        got: "an adapter without".to_owned(),
    })?;
    Ok((loaded.adapter, head))
}

fn read_stats(dir: &Path, base_sha256: Option<&str>) -> Result<Option<ScoreStats>, Error> {
    let Some(stats) = ScoreStats::read(dir)? else { return Ok(None) };
    let wrong = |expected, got: String| Error::NotAReward {
        path: dir.join(score_stats::FILE),
        expected,
        got,
    };
    if stats.std < MIN_STD {
        return Err(wrong("a standard deviation above 0", format!("std {}", stats.std)));
    }
    if base_sha256.is_some_and(|base| stats.base_sha256 != base) {
        return Err(wrong("statistics of this base", format!("base_sha256 {}", stats.base_sha256)));
    }
    Ok(Some(stats))
}

/// Conversations through the reply of a turn as the reward models were trained on them: the whole chat template, but no
/// end of turn after a last reply that the token limit cut.
fn render(
    chat: &Chat<'_>,
    conversations: &[Conversation],
    turn: usize,
) -> Result<Vec<Vec<i64>>, Error> {
    conversations
        .iter()
        .map(|conversation| {
            let messages = conversation.messages_through(turn);
            let rendered = match conversation.replies[turn].finish_reason {
                FinishReason::Stop => chat.render(messages)?,
                FinishReason::Length => chat.render_truncated(messages)?,
            };
            Ok(rendered.token_ids)
        })
        .collect()
}

/// The score of each token sequence, read at its last token.
fn sequence_scores(
    scoring: Scoring<'_>,
    adapter: Option<&Adapter>,
    head: &ScalarHead,
    sequences: &[Vec<i64>],
) -> Result<Vec<f64>, Error> {
    let _guard = tch::no_grad_guard();
    let lengths: Vec<usize> = sequences.iter().map(Vec::len).collect();
    let mut out = Vec::with_capacity(sequences.len());
    for run in order::micro_batches(&lengths, scoring.budget)? {
        let part = &sequences[run];
        let packed = Packed::new(part, usize::MAX);
        let last: Vec<i64> = (0..part.len()).map(|idx| packed.last_row(idx) as i64).collect();
        let hidden = scoring.decoder.forward(&packed.batch, adapter)?;
        let last = Tensor::from_slice(&last).to_device(hidden.device());
        let scores = head.forward(&hidden.index_select(0, &last)); // [n]
        out.extend(Vec::<f64>::try_from(scores.to_kind(Kind::Double).to_device(Device::Cpu))?);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use arete_records::Message;

    use super::*;
    use crate::rollout::Reply;

    fn chain(replies: [&str; 3], n_tokens: [usize; 3]) -> Conversation {
        let messages =
            arete_chain::conversation(&[Message::system("s"), Message::user("q")], replies);
        let mut at = 4;
        let replies = n_tokens
            .map(|n| {
                let tokens = at..at + n;
                at += n + 2;
                Reply { tokens, finish_reason: FinishReason::Stop }
            })
            .to_vec();
        Conversation {
            prompt: 0,
            token_ids: vec![0; at - 2],
            n_prompt: 4,
            replies,
            sampled_logprob: Vec::new(),
            messages,
        }
    }

    #[test]
    fn rules_score_their_own_reply() {
        let conversation = chain(["Eel? E!", "none", "42"], [5, 20, 10]);
        let letter = ProgrammedReward::Letter('e');
        let scores: Vec<f64> = (0..3).map(|turn| letter.score(&conversation, turn)).collect();
        assert_eq!(scores, [0.75, 0.25, 0.0]); // E, e, l, E; n, o, n, e; no letter at all
        let length = ProgrammedReward::Length(10);
        let scores: Vec<f64> = (0..3).map(|turn| length.score(&conversation, turn)).collect();
        assert_eq!(scores, [-0.5, -1.0, 0.0]);
        assert_eq!(conversation.messages_through(0).len(), 3);
        assert_eq!(conversation.messages_through(2).len(), 7);
    }

    #[test]
    fn members_are_calibrated_once_and_must_vary() {
        let mut ensemble =
            Ensemble::programmed(&ProgrammedReward::Letter('e'), RolloutKind::Answer);
        assert_eq!(ensemble.members.len(), 1);
        let error = ensemble.calibrate(&[vec![0.5], vec![0.5]], "validation", "x").unwrap_err();
        assert!(error.to_string().contains("got 0.5 for all 2"), "{error}");
        ensemble.calibrate(&[vec![1.0], vec![3.0]], "validation", "x").unwrap();
        ensemble.calibrate(&[vec![100.0], vec![300.0]], "validation", "x").unwrap();
        let stats = ensemble.members[0].stats.as_ref().unwrap();
        assert_eq!((stats.mean, stats.std, stats.n), (2.0, 1.0, 2));
    }
}
