//! Scores of conversations: reward models over the policy's own base, the yardstick, and rewards by rule.

use std::path::Path;

use arete_chain::reward_model::{Base, MIN_STD, read_stats, standardise};
use arete_chain::{Reading, RewardModel, Transcript, Turns};
use arete_model::{Adapter, LoadOptions, Model, ScalarHead, Source, Tensor};
use arete_records::{Aspect, ScoreStats, stats};

use crate::Error;
use crate::config::{ProgrammedReward, RolloutKind};
use crate::rollout::Conversation;

/// What gives a score.
#[derive(Debug)]
enum Scorer {
    Model(RewardModel),
    Rule(ProgrammedReward),
}

/// One of the reward models.
#[derive(Debug)]
pub struct Member {
    /// What it scores.
    pub aspect: Aspect,
    /// Place of that turn in the chain.
    pub(crate) turn: usize,
    scorer: Scorer,
    /// What its scores are standardised with; none until they are known.
    pub stats: Option<ScoreStats>,
}

/// The reward models of a run.
#[derive(Debug)]
pub struct RewardModels {
    /// Its members, in the order of their turns.
    pub members: Vec<Member>,
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

impl RewardModels {
    /// Loads the reward models of the turns that are asked for: `<turn>/adapter`, `<turn>/score_stats.json`.
    ///
    /// # Errors
    ///
    /// [`Error::NotAReward`] if a head is missing or statistics are unusable; [`Error::Model`] if a file is, or the model
    /// was trained on another base.
    pub fn load(
        dir: &Path,
        model: &Model,
        turns: &Turns,
        kind: RolloutKind,
    ) -> Result<Self, Error> {
        let members = asked(turns, kind)
            .map(|(turn, aspect)| {
                let dir = dir.join(aspect.name());
                let reward = RewardModel::over(&dir.join("adapter"), aspect.name(), model)?;
                let stats = read_stats(&dir, Some(&model.base_sha256))?;
                Ok(Member { aspect, turn, scorer: Scorer::Model(reward), stats })
            })
            .collect::<Result<_, Error>>()?;
        Ok(Self { members })
    }

    /// Reward models of the first turns as they are given, their scores taken as standardised already.
    pub fn of_models(
        models: Vec<(Adapter, ScalarHead)>,
        reading: &Reading,
        turns: &Turns,
        kind: RolloutKind,
    ) -> Self {
        let members = asked(turns, kind)
            .zip(models)
            .map(|((turn, aspect), (adapter, head))| Member {
                aspect,
                turn,
                scorer: Scorer::Model(RewardModel::of(Some(adapter), head, reading.clone())),
                stats: Some(ScoreStats {
                    mean: 0.0,
                    std: 1.0,
                    n: 0,
                    split: String::new(),
                    base_sha256: String::new(),
                    n_prompts: 0,
                    source: String::new(),
                }),
            })
            .collect();
        Self { members }
    }

    /// Members that score by rule: one for each reply.
    pub fn programmed(rule: &ProgrammedReward, turns: &Turns, kind: RolloutKind) -> Self {
        let member = |(turn, aspect)| {
            let scorer = Scorer::Rule(rule.clone());
            Member { aspect, turn, scorer, stats: None }
        };
        Self { members: asked(turns, kind).map(member).collect() }
    }

    /// The members' turns.
    pub fn aspects(&self) -> Vec<Aspect> {
        self.members.iter().map(|member| member.aspect).collect()
    }

    /// The members' raw scores, `[B][K]`, and the tokens they read. Each is read after the conversation through the member's reply, whole as the
    /// chat template has it; what else is scored beside it changes nothing but rounding.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] if the template refuses a conversation or memory runs out.
    pub fn raw_scores(
        &self,
        base: Base<'_>,
        conversations: &[Conversation],
    ) -> Result<(Vec<Vec<f64>>, usize), Error> {
        let mut out = vec![Vec::with_capacity(self.members.len()); conversations.len()];
        let mut n_tokens = 0;
        for member in &self.members {
            let turn = member.turn;
            let scores = match &member.scorer {
                Scorer::Model(reward) => {
                    let (scores, n_read) =
                        reward.scores(base, &transcripts(conversations, turn))?;
                    n_tokens += n_read;
                    scores
                }
                Scorer::Rule(rule) => conversations.iter().map(|c| rule.score(c, turn)).collect(),
            };
            out.iter_mut().zip(scores).for_each(|(row, score)| row.push(score));
        }
        Ok((out, n_tokens))
    }

    /// Raw and standardised scores.
    ///
    /// # Errors
    ///
    /// As [`RewardModels::raw_scores`], and [`Error::NonFiniteScore`].
    ///
    /// # Panics
    ///
    /// If a member has no statistics yet.
    pub fn scores(
        &self,
        base: Base<'_>,
        conversations: &[Conversation],
        iteration: u64,
        prompt_id: impl Fn(&Conversation) -> String,
    ) -> Result<Scores, Error> {
        let (raw, n_tokens) = self.raw_scores(base, conversations)?;
        for (idx, member) in self.members.iter().enumerate() {
            let scores = column(&raw, idx);
            let what = format!("score of the {} reward model", member.aspect);
            check_finite(&scores, conversations, &what, iteration, &prompt_id)?;
        }
        let standardise = |(member, &score): (&Member, &f64)| {
            let stats = member.stats.as_ref().expect("statistics are known before scores are");
            standardise(score, stats)
        };
        let z =
            raw.iter().map(|row| self.members.iter().zip(row).map(standardise).collect()).collect();
        Ok(Scores { raw, z, n_tokens })
    }

    /// The scores of each member that is a reward model, a column each.
    pub(crate) fn learned_columns(&self, raw: &[Vec<f64>]) -> Vec<(Aspect, Vec<f64>)> {
        let members = self.members.iter().enumerate();
        members
            .filter(|(_, member)| matches!(member.scorer, Scorer::Model(_)))
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
            let source = "replies of the reference".to_owned();
            let stats = ScoreStats { source, ..ScoreStats::of(&scores, split, base_sha256) };
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
    reward: RewardModel,
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
        let reason = match RewardModel::over(&adapter_dir, "yardstick", model) {
            Ok(reward) => {
                let stats = read_stats(dir, Some(&model.base_sha256))?;
                return Ok(Self { model: None, reward, stats });
            }
            Err(reason) => reason,
        };
        if merged.is_dir() {
            tracing::info!(%reason, "yardstick: its merged model, on a base of its own");
            let options = LoadOptions { nf4: None, ..*options };
            let (own, reward) = RewardModel::load(&Source::Directory(merged), None, &options)?;
            return Ok(Self { model: Some(own), reward, stats: read_stats(dir, None)? });
        }
        Err(reason.into())
    }

    /// Scores of conversations through their answer, standardised if the yardstick has statistics.
    ///
    /// # Errors
    ///
    /// As [`RewardModels::scores`].
    pub fn scores(
        &self,
        base: Base<'_>,
        conversations: &[Conversation],
        iteration: u64,
        prompt_id: impl Fn(&Conversation) -> String,
    ) -> Result<Vec<f64>, Error> {
        let transcripts = transcripts(conversations, 0);
        let (raw, _) = match &self.model {
            None => self.reward.scores(base, &transcripts)?,
            Some(model) => {
                let base = Base { model, chat: &model.chat()?, ..base };
                self.reward.scores(base, &transcripts)?
            }
        };
        check_finite(&raw, conversations, "score of the yardstick", iteration, &prompt_id)?;
        let z = |score| self.stats.as_ref().map_or(score, |stats| standardise(score, stats));
        Ok(raw.into_iter().map(z).collect())
    }
}

/// The turns that are asked for, with their places.
pub(crate) fn asked(turns: &Turns, kind: RolloutKind) -> impl Iterator<Item = (usize, Aspect)> {
    turns.names().into_iter().enumerate().take(kind.n_turns(turns.len()))
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

/// Conversations through the reply of a turn.
fn transcripts(conversations: &[Conversation], turn: usize) -> Vec<Transcript<'_>> {
    let through = |conversation: &Conversation| {
        let replies = conversation.replies[..=turn].iter();
        replies.map(|reply| reply.finish_reason).collect()
    };
    conversations
        .iter()
        .map(|conversation| Transcript {
            messages: conversation.messages_through(turn),
            finish_reasons: through(conversation),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use arete_records::Message;

    use super::*;
    use crate::rollout::Reply;

    fn chain(replies: [&str; 3], n_tokens: [usize; 3]) -> Conversation {
        let messages =
            Turns::default().conversation(&[Message::system("s"), Message::user("q")], &replies);
        let mut at = 4;
        let replies = n_tokens
            .map(|n| {
                let tokens = at..at + n;
                at += n + 2;
                Reply { tokens, finish_reason: arete_records::FinishReason::Stop }
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
        let mut rewards = RewardModels::programmed(
            &ProgrammedReward::Letter('e'),
            &Turns::default(),
            RolloutKind::Answer,
        );
        assert_eq!(rewards.members.len(), 1);
        let error = rewards.calibrate(&[vec![0.5], vec![0.5]], "validation", "x").unwrap_err();
        assert!(error.to_string().contains("got 0.5 for all 2"), "{error}");
        rewards.calibrate(&[vec![1.0], vec![3.0]], "validation", "x").unwrap();
        rewards.calibrate(&[vec![100.0], vec![300.0]], "validation", "x").unwrap();
        let stats = rewards.members[0].stats.as_ref().unwrap();
        assert_eq!((stats.mean, stats.std, stats.n), (2.0, 1.0, 2));
    }
}
