//! The rows that hold something for every turn of a chain: in files a column each, named after the turn.
//!
//! Which turns there are is the constitution's affair; a file's columns say which it has.

use std::fmt;

use serde::de::{IgnoredAny, MapAccess};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Aspect, FinishReason, Message, Split};

/// What stands before a turn's name in the column of why its reply ended.
pub(crate) const FINISH_REASON: &str = "finish_reason_";
/// The same of the number of its tokens.
pub(crate) const N_TOKENS: &str = "n_tokens_";
/// The same of its raw score.
pub(crate) const SCORE: &str = "score_";
/// The same of its standardised score.
pub(crate) const Z: &str = "z_";

/// One turn of a sampled chain: columns `<turn>`, `finish_reason_<turn>`, `n_tokens_<turn>`.
#[derive(Debug, Clone, PartialEq)]
pub struct TurnRow {
    /// The turn.
    pub aspect: Aspect,
    /// Its reply.
    pub text: String,
    /// Why the reply ended.
    pub finish_reason: FinishReason,
    /// Tokens sampled for it.
    pub n_tokens: i32,
}

/// A row of `conversations.parquet`: one sampled chain, a reply a turn.
#[derive(Debug, Clone, PartialEq)]
pub struct ConversationRow {
    /// Id of the prompt.
    pub prompt_id: String,
    /// Split of the prompt.
    pub split: Split,
    /// Which of the prompt's samples: 0 or 1.
    pub sample: i32,
    /// Name of the persona the sample was drawn under, if any.
    pub persona: Option<String>,
    /// The whole conversation: prompt, answer, and each further question with its reply.
    pub messages: Vec<Message>,
    /// The turns, in the order of the chain; the first is the answer.
    pub turns: Vec<TurnRow>,
    /// Seed of the sample's random stream.
    pub seed: u64,
}

impl ConversationRow {
    /// The turns' names, in the order of the chain.
    pub fn aspects(&self) -> impl Iterator<Item = Aspect> {
        self.turns.iter().map(|turn| turn.aspect)
    }

    /// Place of a turn in the chain; none if the chain has no such turn.
    pub fn place(&self, aspect: Aspect) -> Option<usize> {
        self.turns.iter().position(|turn| turn.aspect == aspect)
    }

    /// A turn; none if the chain has no such turn.
    pub fn turn(&self, aspect: Aspect) -> Option<&TurnRow> {
        self.turns.iter().find(|turn| turn.aspect == aspect)
    }

    /// Whether the token limit cut the reply of a turn.
    pub fn is_cut(&self, aspect: Aspect) -> bool {
        self.turn(aspect).is_some_and(|turn| turn.finish_reason == FinishReason::Length)
    }
}

/// One turn of a conversation sampled during PPO: columns `score_<turn>`, `z_<turn>`, `n_tokens_<turn>`,
/// `finish_reason_<turn>`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RolloutTurn {
    /// The turn.
    pub aspect: Aspect,
    /// Raw score of its reward model, if it has one.
    pub score: Option<f32>,
    /// Standardised score of its reward model.
    pub z: Option<f32>,
    /// Tokens sampled for its reply; none if the turn was not asked for.
    pub n_tokens: Option<i32>,
    /// Why its reply ended.
    pub finish_reason: Option<FinishReason>,
}

/// A row of `rollouts/*.parquet`: one conversation sampled during PPO, and its reward.
#[derive(Debug, Clone, PartialEq)]
pub struct RolloutRow {
    /// PPO iteration, from 1.
    pub iteration: i32,
    /// Id of the prompt.
    pub prompt_id: String,
    /// The whole conversation.
    pub messages: Vec<Message>,
    /// The turns of the chain, in its order, asked for or not.
    pub turns: Vec<RolloutTurn>,
    /// What PPO maximised, summed over the conversation.
    pub reward: f32,
    /// KL estimate of policy against reference, in nats, summed over the policy's own tokens.
    pub kl: f32,
}

impl RolloutRow {
    /// A turn; none if the chain has no such turn.
    pub fn turn(&self, aspect: Aspect) -> Option<&RolloutTurn> {
        self.turns.iter().find(|turn| turn.aspect == aspect)
    }

    /// The standardised scores there are, in the order of the chain.
    pub fn z(&self) -> Vec<f64> {
        self.turns.iter().filter_map(|turn| turn.z.map(f64::from)).collect()
    }

    /// Number of turns that were asked for.
    pub fn n_asked(&self) -> usize {
        self.turns.iter().filter(|turn| turn.n_tokens.is_some()).count()
    }
}

/// Turns found in columns, in the order of the chain: that of the columns, unless all are the shipped ones, whose order is
/// known whatever a program made of the columns'.
pub(crate) fn in_chain_order(mut aspects: Vec<Aspect>) -> Vec<Aspect> {
    if aspects.iter().all(|aspect| Aspect::SHIPPED.contains(aspect)) {
        aspects.sort();
    }
    aspects
}

impl Serialize for ConversationRow {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("prompt_id", &self.prompt_id)?;
        map.serialize_entry("split", &self.split)?;
        map.serialize_entry("sample", &self.sample)?;
        map.serialize_entry("persona", &self.persona)?;
        map.serialize_entry("messages", &self.messages)?;
        for turn in &self.turns {
            map.serialize_entry(turn.aspect.name(), &turn.text)?;
        }
        for turn in &self.turns {
            map.serialize_entry(&format!("{FINISH_REASON}{}", turn.aspect), &turn.finish_reason)?;
        }
        for turn in &self.turns {
            map.serialize_entry(&format!("{N_TOKENS}{}", turn.aspect), &turn.n_tokens)?;
        }
        map.serialize_entry("seed", &self.seed)?;
        map.end()
    }
}

impl Serialize for RolloutRow {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("iteration", &self.iteration)?;
        map.serialize_entry("prompt_id", &self.prompt_id)?;
        map.serialize_entry("messages", &self.messages)?;
        for turn in &self.turns {
            map.serialize_entry(&format!("{SCORE}{}", turn.aspect), &turn.score)?;
        }
        for turn in &self.turns {
            map.serialize_entry(&format!("{Z}{}", turn.aspect), &turn.z)?;
        }
        map.serialize_entry("reward", &self.reward)?;
        map.serialize_entry("kl", &self.kl)?;
        for turn in &self.turns {
            map.serialize_entry(&format!("{N_TOKENS}{}", turn.aspect), &turn.n_tokens)?;
        }
        for turn in &self.turns {
            map.serialize_entry(&format!("{FINISH_REASON}{}", turn.aspect), &turn.finish_reason)?;
        }
        map.end()
    }
}

/// Values by turn, in the order in which the turns come up.
struct ByTurn<T>(Vec<(Aspect, T)>);

impl<T> ByTurn<T> {
    fn put<E: serde::de::Error>(&mut self, name: &str, value: T) -> Result<(), E> {
        let aspect = Aspect::new(name).map_err(E::custom)?;
        if self.0.iter().any(|(own, _)| *own == aspect) {
            return Err(E::custom(format!("a second value of the turn `{aspect}`")));
        }
        self.0.push((aspect, value));
        Ok(())
    }

    fn take<E: serde::de::Error>(&mut self, aspect: Aspect, before: &str) -> Result<T, E> {
        let place = self.0.iter().position(|(own, _)| *own == aspect);
        let place = place.ok_or_else(|| E::custom(format!("missing field `{before}{aspect}`")))?;
        Ok(self.0.remove(place).1)
    }
}

fn needed<T, E: serde::de::Error>(value: Option<T>, field: &'static str) -> Result<T, E> {
    value.ok_or_else(|| E::missing_field(field))
}

impl<'de> Deserialize<'de> for ConversationRow {
    /// Of a map with the fields of the row; every key that is none of them is the name of a turn.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = ConversationRow;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a conversation")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<ConversationRow, A::Error> {
                let (mut prompt_id, mut split, mut sample) = (None, None, None);
                let (mut persona, mut messages, mut seed) = (None, None, None);
                let mut texts = ByTurn::<String>(Vec::new());
                let mut reasons = ByTurn::<FinishReason>(Vec::new());
                let mut n_tokens = ByTurn::<i32>(Vec::new());
                while let Some(key) = map.next_key::<String>()? {
                    match key.as_str() {
                        "prompt_id" => prompt_id = Some(map.next_value()?),
                        "split" => split = Some(map.next_value()?),
                        "sample" => sample = Some(map.next_value()?),
                        "persona" => persona = map.next_value()?,
                        "messages" => messages = Some(map.next_value()?),
                        "seed" => seed = Some(map.next_value()?),
                        key => {
                            match (key.strip_prefix(FINISH_REASON), key.strip_prefix(N_TOKENS)) {
                                (Some(turn), _) => reasons.put(turn, map.next_value()?)?,
                                (_, Some(turn)) => n_tokens.put(turn, map.next_value()?)?,
                                _ => texts.put(key, map.next_value()?)?,
                            }
                        }
                    }
                }
                let order = in_chain_order(texts.0.iter().map(|(aspect, _)| *aspect).collect());
                let turn = |aspect: Aspect| {
                    Ok(TurnRow {
                        aspect,
                        text: texts.take(aspect, "")?,
                        finish_reason: reasons.take(aspect, FINISH_REASON)?,
                        n_tokens: n_tokens.take(aspect, N_TOKENS)?,
                    })
                };
                Ok(ConversationRow {
                    prompt_id: needed(prompt_id, "prompt_id")?,
                    split: needed(split, "split")?,
                    sample: needed(sample, "sample")?,
                    persona,
                    messages: needed(messages, "messages")?,
                    turns: order.into_iter().map(turn).collect::<Result<_, A::Error>>()?,
                    seed: needed(seed, "seed")?,
                })
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

impl<'de> Deserialize<'de> for RolloutRow {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = RolloutRow;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a rollout's conversation")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RolloutRow, A::Error> {
                let (mut iteration, mut prompt_id, mut messages) = (None, None, None);
                let (mut reward, mut kl) = (None, None);
                let mut scores = ByTurn::<Option<f32>>(Vec::new());
                let mut z = ByTurn::<Option<f32>>(Vec::new());
                let mut n_tokens = ByTurn::<Option<i32>>(Vec::new());
                let mut reasons = ByTurn::<Option<FinishReason>>(Vec::new());
                while let Some(key) = map.next_key::<String>()? {
                    let after = |before: &str| key.strip_prefix(before);
                    match key.as_str() {
                        "iteration" => iteration = Some(map.next_value()?),
                        "prompt_id" => prompt_id = Some(map.next_value()?),
                        "messages" => messages = Some(map.next_value()?),
                        "reward" => reward = Some(map.next_value()?),
                        "kl" => kl = Some(map.next_value()?),
                        _ => {
                            if let Some(turn) = after(SCORE) {
                                scores.put(turn, map.next_value()?)?;
                            } else if let Some(turn) = after(Z) {
                                z.put(turn, map.next_value()?)?;
                            } else if let Some(turn) = after(N_TOKENS) {
                                n_tokens.put(turn, map.next_value()?)?;
                            } else if let Some(turn) = after(FINISH_REASON) {
                                reasons.put(turn, map.next_value()?)?;
                            } else {
                                map.next_value::<IgnoredAny>()?;
                            }
                        }
                    }
                }
                let order = in_chain_order(scores.0.iter().map(|(aspect, _)| *aspect).collect());
                let turn = |aspect: Aspect| {
                    Ok(RolloutTurn {
                        aspect,
                        score: scores.take(aspect, SCORE)?,
                        z: z.take(aspect, Z)?,
                        n_tokens: n_tokens.take(aspect, N_TOKENS)?,
                        finish_reason: reasons.take(aspect, FINISH_REASON)?,
                    })
                };
                Ok(RolloutRow {
                    iteration: needed(iteration, "iteration")?,
                    prompt_id: needed(prompt_id, "prompt_id")?,
                    messages: needed(messages, "messages")?,
                    turns: order.into_iter().map(turn).collect::<Result<_, A::Error>>()?,
                    reward: needed(reward, "reward")?,
                    kl: needed(kl, "kl")?,
                })
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}
