//! Scores of conversations: reward models over the policy's own base, the yardstick, and rewards by rule.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Result, bail};
use arete_chain::reward_model::{Base, MIN_STD, adapter_dir, read_stats, standardise};
use arete_chain::yardstick::Place;
use arete_chain::{Reading, RewardModel, Transcript, Turns};
use arete_engine::ServerConfig;
use arete_engine::journal::ScoreJournal;
use arete_engine::scores::{self, Scorers};
use arete_model::{Adapter, LoadOptions, Model, ScalarHead, Source};
use arete_records::{Aspect, FinishReason, Refusal, ScoreStats, stats};
use arete_stage::exit::BadInput;

use crate::config::{ProgrammedReward, RolloutKind, Weights};
use crate::iteration::all_alike;
use crate::length::LengthTrend;
use crate::prompts::Prompt;
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
    /// What logs, metrics and weights call it: a turn, a virtue, or any other name.
    pub name: String,
    /// Place of the turn it reads through.
    turn: usize,
    scorer: Scorer,
    /// What it weighs in the ensemble.
    weight: f64,
    /// What its scores are standardised with; none until they are known.
    pub stats: Option<ScoreStats>,
    /// What a reply's length explains of its standardised scores, if that is taken from them.
    pub length_trend: Option<LengthTrend>,
}

impl Member {
    fn new(name: &str, turn: usize, scorer: Scorer) -> Self {
        let stats = match &scorer {
            // What never varies cannot be standardised: it is paid as it is.
            Scorer::Rule(ProgrammedReward::Constant) => Some(ScoreStats {
                mean: 0.0,
                std: 1.0,
                source: "a constant".to_owned(),
                ..ScoreStats::of(&[], "", "")
            }),
            Scorer::Model(_) | Scorer::Rule(_) => None,
        };
        Self { name: name.to_owned(), turn, scorer, weight: 1.0, stats, length_trend: None }
    }
}

/// The turns that are asked for, with their places.
pub(crate) fn asked(turns: &Turns, kind: RolloutKind) -> impl Iterator<Item = (usize, Aspect)> {
    turns.names().into_iter().enumerate().take(kind.n_turns(turns.len()))
}

/// The reply that a reward model reads: its own turn's if it is named as one that is asked for, else the answer.
fn turn_of(name: &str, turns: &Turns, kind: RolloutKind) -> usize {
    let mut asked = asked(turns, kind);
    asked.find(|(_, aspect)| aspect.name() == name).map_or(0, |(place, _)| place)
}

/// The reward models of a run.
#[derive(Debug)]
pub struct RewardModels {
    /// Its members, those of a directory first and in the order of turns.
    pub members: Vec<Member>,
    /// Servers that score with the members in this process's place.
    served: Option<Served>,
}

/// Servers of reward models, and what they answered.
#[derive(Debug)]
struct Served {
    servers: Scorers,
    journal: RefCell<ScoreJournal>,
}

/// Conversations that servers' scores are compared on.
const COMPARED: usize = 8;

/// Scores of a rollout.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores {
    /// Names of the reward models, `[K]`.
    pub names: Vec<String>,
    /// The reply that each reads through, `[K]`.
    pub turns: Vec<usize>,
    /// What each weighs, `[K]`.
    pub weights: Vec<f64>,
    /// Raw, `[B][K]`.
    pub raw: Vec<Vec<f64>>,
    /// Standardised, and without what length explains where that is taken from them, `[B][K]`.
    pub z: Vec<Vec<f64>>,
    /// Tokens that the reward models read, in all.
    pub n_tokens: usize,
}

impl Scores {
    /// Mean over the members, one a conversation.
    pub fn z_means(&self) -> Vec<f64> {
        self.z.iter().map(|row| stats::mean(row)).collect()
    }

    /// A member's scores in `of`, one a conversation.
    #[must_use]
    pub fn column(of: &[Vec<f64>], member: usize) -> Vec<f64> {
        of.iter().map(|row| row[member]).collect()
    }
}

/// A reward model on disk, and what it is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedReward {
    /// Its name: a turn, a virtue, or any other of letters, digits, `_` and `-`.
    pub name: String,
    /// The directory with `adapter/`, and `score_stats.json` if it has one.
    pub dir: PathBuf,
}

impl FromStr for NamedReward {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_name = |name: &str| {
            let is_good = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
            !name.is_empty() && name.chars().all(is_good)
        };
        match text.split_once('=') {
            Some((name, dir)) if is_name(name) && !dir.is_empty() => {
                Ok(Self { name: name.to_owned(), dir: dir.into() })
            }
            _ => Err(format!(
                "expected NAME=DIR with a name of letters, digits, _ and -, got {text}"
            )),
        }
    }
}

impl RewardModels {
    /// Loads reward models: `adapter` and `score_stats.json` in each directory.
    ///
    /// # Errors
    ///
    /// A refused reward model if a head is missing or statistics are unusable; The model's failure if a file is, or the model
    /// was trained on another base.
    pub fn load(
        rewards: &[NamedReward],
        model: &Model,
        turns: &Turns,
        kind: RolloutKind,
    ) -> Result<Self> {
        let members = rewards
            .iter()
            .map(|NamedReward { name, dir }| {
                let reward = RewardModel::over(&dir.join("adapter"), name, model)?;
                let stats = read_stats(dir, Some(model))?;
                let turn = turn_of(name, turns, kind);
                Ok(Member { stats, ..Member::new(name, turn, Scorer::Model(reward)) })
            })
            .collect::<Result<_>>()?;
        Ok(Self { members, served: None })
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
            .map(|((turn, aspect), (adapter, head))| {
                let reward = RewardModel::of(Some(adapter), head, reading.clone());
                let stats = ScoreStats { mean: 0.0, std: 1.0, ..ScoreStats::of(&[], "", "") };
                let member = Member::new(aspect.name(), turn, Scorer::Model(reward));
                Member { stats: Some(stats), ..member }
            })
            .collect();
        Self { members, served: None }
    }

    /// Members that score by rule: one for each reply.
    pub fn programmed(rule: &ProgrammedReward, turns: &Turns, kind: RolloutKind) -> Self {
        let member = |(turn, aspect): (usize, Aspect)| {
            Member::new(aspect.name(), turn, Scorer::Rule(rule.clone()))
        };
        Self { members: asked(turns, kind).map(member).collect(), served: None }
    }

    /// Has servers score with the members, after their scores of a few conversations were found to be those of the members here.
    ///
    /// # Errors
    ///
    /// [`arete_engine::Error`] naming a server that cannot be used, or gives other scores.
    pub(crate) fn serve(
        &mut self,
        (urls, config, tolerance): (&[String], &ServerConfig, f64),
        named: &[NamedReward],
        turns: &Turns,
        base: Base<'_>,
        prompts: &[Prompt],
        journal: &Path,
    ) -> Result<()> {
        const REPLIES: [&str; 3] = [
            "Tell the truth, and say it kindly.",
            "I would rather be trusted than admired.",
            "Whoever asks again will know what to expect, and so will I.",
        ];
        let wanted: Vec<scores::Served> = named
            .iter()
            .map(|NamedReward { name, dir }| scores::Served {
                name: name.clone(),
                adapter: adapter_dir(dir),
            })
            .collect();
        let servers = Scorers::connect(urls, config, &wanted)?;
        for Member { name, turn, scorer, stats, .. } in &self.members {
            let Scorer::Model(reward) = scorer else { continue };
            let replies: Vec<&str> = REPLIES.into_iter().cycle().take(turn + 1).collect();
            let read = |prompt: &Prompt| {
                let messages = turns.conversation(&prompt.messages, &replies);
                let finish_reasons = vec![FinishReason::Stop; replies.len()];
                reward.token_ids(base, &Transcript { messages: &messages, finish_reasons })
            };
            let sequences: Vec<Vec<i64>> =
                prompts.iter().take(COMPARED).map(read).collect::<Result<_, _>>()?;
            let own = reward.sequence_scores(base.model, &sequences, base.micro_batch_tokens)?;
            let spread = stats.as_ref().map_or_else(|| stats::std(&own), |stats| stats.std);
            let difference =
                servers.check(name, &sequences, &own, spread.max(MIN_STD), tolerance)?;
            tracing::info!(
                reward = name,
                servers = servers.n_servers(),
                conversations = own.len(),
                difference,
                "servers score as the reward model here, in standard deviations"
            );
        }
        let journal = RefCell::new(ScoreJournal::open(journal)?);
        self.served = Some(Served { servers, journal });
        Ok(())
    }

    /// Gives each member its weight.
    ///
    /// # Errors
    ///
    /// A refused setting if a name is no member's, or nothing is left that weighs.
    pub fn weigh(&mut self, weights: &Weights) -> Result<()> {
        let known: Vec<&str> = self.members.iter().map(|member| member.name.as_str()).collect();
        let unfit = |expected: String, got: String| Refusal::setting("weights", expected, got);
        if let Some(name) = weights.0.keys().find(|name| !known.contains(&name.as_str())) {
            bail!(unfit(format!("names of reward models ({})", known.join(", ")), name.clone(),));
        }
        for member in &mut self.members {
            member.weight = weights.0.get(&member.name).copied().unwrap_or(1.0);
        }
        if self.members.iter().all(|member| member.weight == 0.0) {
            bail!(unfit("a weight above 0".to_owned(), "only 0".to_owned()));
        }
        Ok(())
    }

    /// The members' raw scores, `[B][K]`, and the tokens they read. Each is read after the conversation through the member's reply, whole as the
    /// chat template has it; what else is scored beside it changes nothing but rounding.
    ///
    /// # Errors
    ///
    /// The model's failure if the template refuses a conversation or memory runs out.
    pub fn raw_scores(
        &self,
        base: Base<'_>,
        conversations: &[Conversation],
    ) -> Result<(Vec<Vec<f64>>, usize)> {
        let mut out = vec![Vec::with_capacity(self.members.len()); conversations.len()];
        let mut n_tokens = 0;
        for member in &self.members {
            let turn = member.turn;
            let scores = match &member.scorer {
                Scorer::Model(reward) => {
                    let transcripts = transcripts(conversations, turn);
                    let (scores, n_read) = match &self.served {
                        None => reward.scores(base, &transcripts)?,
                        Some(Served { servers, journal }) => {
                            let read = |transcript| reward.token_ids(base, transcript);
                            let sequences: Vec<Vec<i64>> =
                                transcripts.iter().map(read).collect::<Result<_, _>>()?;
                            let journal = &mut journal.borrow_mut();
                            let scores = servers.scores(&member.name, &sequences, journal)?;
                            (scores, sequences.iter().map(Vec::len).sum())
                        }
                    };
                    n_tokens += n_read;
                    scores
                }
                Scorer::Rule(rule) => conversations.iter().map(|c| rule.score(c, turn)).collect(),
            };
            out.iter_mut().zip(scores).for_each(|(row, score)| row.push(score));
        }
        Ok((out, n_tokens))
    }

    /// Raw and standardised scores, from [`RewardModels::raw_scores`].
    ///
    /// # Errors
    ///
    /// A score that is no number.
    ///
    /// # Panics
    ///
    /// If a member has no statistics yet.
    pub fn scores(
        &self,
        (raw, n_tokens): (Vec<Vec<f64>>, usize),
        conversations: &[Conversation],
        iteration: u64,
        prompt_id: impl Fn(&Conversation) -> String,
    ) -> Result<Scores> {
        for (idx, member) in self.members.iter().enumerate() {
            let scores = Scores::column(&raw, idx);
            let what = format!("score of the {} reward model", member.name);
            check_finite(&scores, conversations, &what, iteration, &prompt_id)?;
        }
        let z_of = |(conversation, row): (&Conversation, &Vec<f64>)| {
            let members = self.members.iter().zip(row);
            members.map(|(member, &score)| member.standardise(score, conversation)).collect()
        };
        let z = conversations.iter().zip(&raw).map(z_of).collect();
        let of = |what: fn(&Member) -> usize| self.members.iter().map(what).collect();
        Ok(Scores {
            names: self.names(),
            turns: of(|member| member.turn),
            weights: self.members.iter().map(|member| member.weight).collect(),
            raw,
            z,
            n_tokens,
        })
    }

    /// The members' names, in order.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.members.iter().map(|member| member.name.clone()).collect()
    }

    /// The scores of each member that is a reward model, a column each.
    pub(crate) fn learned_columns(&self, raw: &[Vec<f64>]) -> Vec<(&str, Vec<f64>)> {
        let members = self.members.iter().enumerate();
        members
            .filter(|(_, member)| matches!(member.scorer, Scorer::Model(_)))
            .map(|(idx, member)| (member.name.as_str(), Scores::column(raw, idx)))
            .collect()
    }

    /// Whether what is paid never varies, by intention.
    pub(crate) fn is_constant(&self) -> bool {
        let is =
            |member: &Member| matches!(member.scorer, Scorer::Rule(ProgrammedReward::Constant));
        self.members.iter().all(is)
    }

    /// Fits what reply lengths explain of these standardised scores of the reference.
    pub fn fit_length(&mut self, conversations: &[Conversation], raw: &[Vec<f64>]) {
        for (idx, member) in self.members.iter_mut().enumerate() {
            let stats = member.stats.as_ref().expect("statistics are known before trends are");
            let z: Vec<f64> = raw.iter().map(|row| standardise(row[idx], stats)).collect();
            let lengths: Vec<f64> =
                conversations.iter().map(|c| n_reply_tokens(c, member.turn)).collect();
            member.length_trend = Some(LengthTrend::fit(&lengths, &z));
        }
    }

    /// Takes the statistics of members that have none from these scores of the reference's replies, of which equal `prompts` are
    /// samples of one prompt.
    ///
    /// # Errors
    ///
    /// Scores all alike if a member scores all conversations alike, a score that is no number if it gives no number.
    pub fn calibrate(
        &mut self,
        raw: &[Vec<f64>],
        prompts: &[usize],
        split: &str,
        base_sha256: &str,
    ) -> Result<()> {
        for (idx, member) in self.members.iter_mut().enumerate() {
            if member.stats.is_some() {
                continue;
            }
            let what = format!("scores of the {} reward model on the reference", member.name);
            let scores = Scores::column(raw, idx);
            if let Some(got) = scores.iter().find(|score| !score.is_finite()) {
                bail!(BadInput(format!(
                    "{what}: expected finite numbers, got {got}; are its weights damaged, or is f16 too narrow for it?"
                )));
            }
            let source = "replies of the reference".to_owned();
            let stats = ScoreStats {
                source,
                n_prompts: prompts.iter().collect::<BTreeSet<_>>().len(),
                standard_error: stats::clustered_error(&scores, prompts),
                ..ScoreStats::of(&scores, split, base_sha256)
            };
            if !(stats.std.is_finite() && stats.std >= MIN_STD) {
                bail!(all_alike(&what, stats.mean, stats.n));
            }
            member.stats = Some(stats);
        }
        Ok(())
    }
}

impl Member {
    /// A score as it is paid: standard deviations from the mean, less what the reply's length explains.
    fn standardise(&self, score: f64, conversation: &Conversation) -> f64 {
        let stats = self.stats.as_ref().expect("statistics are known before scores are");
        let z = standardise(score, stats);
        let length = n_reply_tokens(conversation, self.turn);
        self.length_trend.as_ref().map_or(z, |trend| z - trend.at(length))
    }
}

#[expect(clippy::cast_precision_loss, reason = "lengths are small")]
fn n_reply_tokens(conversation: &Conversation, turn: usize) -> f64 {
    conversation.replies[turn].tokens.len() as f64
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
            Self::Constant => 1.0,
            Self::Coin => {
                let tokens = &conversation.token_ids[conversation.replies[turn].tokens.clone()];
                f64::from(u8::from(is_heads(tokens)))
            }
        }
    }
}

/// The toss that belongs to a sequence of tokens (the parity of its FNV-1a hash).
fn is_heads(tokens: &[i64]) -> bool {
    let bytes = tokens.iter().flat_map(|token| token.to_le_bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    hash.count_ones().is_multiple_of(2)
}

/// The yardstick, which takes no part in training: it shows whether the reward models are being gamed. It reads the answer
/// alone, as everywhere ([`arete_chain::yardstick`]).
#[derive(Debug)]
pub struct Yardstick {
    /// Its own model, unless it sits on the policy's base.
    model: Option<Model>,
    judge: arete_chain::Yardstick,
}

impl Yardstick {
    /// Loads the yardstick in `dir` over `model` if its adapters were trained on it, else with a model of its own.
    ///
    /// # Errors
    ///
    /// As [`Place::resolve`] and [`arete_chain::Yardstick::over`].
    pub fn load(dir: &Path, source: &Source, model: &Model, options: &LoadOptions) -> Result<Self> {
        let (place, own) = match Place::on(dir, source, model)? {
            Some(place) => (place, None),
            None => {
                let place = Place::resolve(dir, None)?;
                let options = LoadOptions { nf4: place.nf4, ..*options };
                tracing::info!(source = %place.source, "yardstick: on a base of its own");
                let own = Model::load(&place.source, &options)?;
                (place, Some(own))
            }
        };
        if !place.is_cross_fitted() {
            tracing::warn!(
                path = %dir.display(),
                "the yardstick is a single reward model, not cross-fitted: it may have seen these prompts (make yardstick)"
            );
        }
        let judge = arete_chain::Yardstick::over(&place, own.as_ref().unwrap_or(model))?;
        Ok(Self { model: own, judge })
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
    ) -> Result<Vec<f64>> {
        let transcripts = transcripts(conversations, 0);
        let scores = match &self.model {
            None => self.judge.scores(base, &transcripts)?,
            Some(model) => {
                let base = Base { model, chat: &model.chat()?, ..base };
                self.judge.scores(base, &transcripts)?
            }
        };
        check_finite(&scores, conversations, "score of the yardstick", iteration, &prompt_id)?;
        Ok(scores)
    }
}

/// A score for each conversation that is a number, or an error that names the prompt.
fn check_finite(
    scores: &[f64],
    conversations: &[Conversation],
    what: &str,
    iteration: u64,
    prompt_id: &impl Fn(&Conversation) -> String,
) -> Result<()> {
    match scores.iter().zip(conversations).find(|(score, _)| !score.is_finite()) {
        None => Ok(()),
        Some((&got, conversation)) => bail!(BadInput(format!(
            "iteration {iteration}: the {what} for prompt {} is {got}, not a finite number",
            prompt_id(conversation)
        ))),
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
        let error =
            rewards.calibrate(&[vec![0.5], vec![0.5]], &[0, 1], "validation", "x").unwrap_err();
        assert!(error.to_string().contains("got 0.5 for all 2"), "{error}");
        rewards.calibrate(&[vec![1.0], vec![3.0]], &[0, 1], "validation", "x").unwrap();
        rewards.calibrate(&[vec![100.0], vec![300.0]], &[0, 1], "validation", "x").unwrap();
        let stats = rewards.members[0].stats.as_ref().unwrap();
        assert_eq!((stats.mean, stats.std, stats.n, stats.n_prompts), (2.0, 1.0, 2, 2));
        // s² = 2, over two prompts.
        assert_eq!(stats.standard_error, Some(1.0));
    }
}
