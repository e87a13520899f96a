//! The words that settings are said in.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What the policy is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum RolloutKind {
    /// Every turn of the constitution; each reward model scores its own reply.
    Chain,
    /// The answer alone, scored by its own reward model and by those that are named otherwise than a turn.
    Answer,
}

impl RolloutKind {
    /// Replies in a conversation, of a chain of so many turns.
    pub fn n_turns(self, n_chain: usize) -> usize {
        match self {
            Self::Chain => n_chain,
            Self::Answer => 1,
        }
    }
}

/// Where the critic reads its values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum CriticKind {
    /// A head on the policy's hidden states; its gradients reach the policy's adapter too.
    Trunk,
    /// A head on the policy's hidden states that leaves the adapter to the policy.
    TrunkDetached,
    /// A head on an adapter of its own: another forward and backward pass, and one more forward pass in the first update.
    Adapter,
}

/// A reward computed by rule, for tests and for trying out the machinery.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ProgrammedReward {
    /// Part of a reply's letters that are this one, upper and lower case alike.
    Letter(char),
    /// −|n − target| / target, n = tokens sampled for the reply.
    Length(usize),
    /// 1 for every reply: a control, under which nothing may move.
    Constant,
    /// 0 or 1 by a coin that is tossed for every sequence of sampled tokens: a control without anything to learn.
    Coin,
}

impl ProgrammedReward {
    /// Whether it is there to show that nothing is learned from it; reward models beside it are left aside.
    #[must_use]
    pub fn is_control(&self) -> bool {
        matches!(self, Self::Constant | Self::Coin)
    }
}

impl FromStr for ProgrammedReward {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("expected letter:<letter>, length:<tokens>, constant or coin, got {text}");
        match text {
            "constant" => return Ok(Self::Constant),
            "coin" => return Ok(Self::Coin),
            _ => {}
        }
        match text.split_once(':').ok_or_else(wrong)? {
            ("letter", letter) => {
                let mut letters = letter.chars();
                match (letters.next(), letters.next()) {
                    (Some(letter), None) if letter.is_alphabetic() => {
                        Ok(Self::Letter(letter.to_ascii_lowercase()))
                    }
                    _ => Err(wrong()),
                }
            }
            ("length", target) => {
                target.parse().ok().filter(|n| *n > 0).map(Self::Length).ok_or_else(wrong)
            }
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for ProgrammedReward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Letter(letter) => write!(f, "letter:{letter}"),
            Self::Length(target) => write!(f, "length:{target}"),
            Self::Constant => f.write_str("constant"),
            Self::Coin => f.write_str("coin"),
        }
    }
}

impl TryFrom<String> for ProgrammedReward {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<ProgrammedReward> for String {
    fn from(reward: ProgrammedReward) -> Self {
        reward.to_string()
    }
}

/// How the advantage of a token is estimated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    /// By a critic (generalised advantage estimation); clipped ratio of each token.
    Ppo,
    /// Against the mean of the other samples of its prompt; clipped ratio of whole replies; no critic.
    Rloo,
    /// Against mean and standard deviation of all samples of its prompt; clipped ratio of each token; the KL penalty is
    /// part of the loss; no critic.
    Grpo,
}

impl Algorithm {
    /// Whether advantages come from the other samples of the same prompt, and not from a critic.
    #[must_use]
    pub fn is_group(self) -> bool {
        self != Self::Ppo
    }

    /// Its name in recipes.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ppo => "ppo",
            Self::Rloo => "rloo",
            Self::Grpo => "grpo",
        }
    }
}

/// What happens to several rewards before they are compared within a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Aggregation {
    /// They are summed by weight, and the sums are compared.
    SumThenNormalize,
    /// Each is brought to mean 0 and standard deviation 1 within the group first, so that none drowns the others.
    NormalizeThenSum,
}

/// A weight for each reward model, by name: a table in recipes, `NAME=WEIGHT,…` elsewhere.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "WrittenWeights", into = "String")]
pub struct Weights(pub BTreeMap<String, f64>);

#[derive(Deserialize)]
#[serde(untagged, expecting = "a table of weights by name, or NAME=WEIGHT,…")]
enum WrittenWeights {
    Text(String),
    Table(BTreeMap<String, f64>),
}

impl TryFrom<WrittenWeights> for Weights {
    type Error = String;

    fn try_from(written: WrittenWeights) -> Result<Self, String> {
        match written {
            WrittenWeights::Text(text) => text.parse(),
            WrittenWeights::Table(weights) => Ok(Self(weights)),
        }
    }
}

impl fmt::Display for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> =
            self.0.iter().map(|(name, weight)| format!("{name}={weight}")).collect();
        f.write_str(&parts.join(","))
    }
}

impl From<Weights> for String {
    fn from(weights: Weights) -> Self {
        weights.to_string()
    }
}

impl FromStr for Weights {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("expected NAME=WEIGHT,…, got {text}");
        let mut out = BTreeMap::new();
        for part in text.split(',') {
            let (name, weight) = part.split_once('=').ok_or_else(wrong)?;
            let weight: f64 = weight.trim().parse().map_err(|_| wrong())?;
            if !(weight.is_finite() && weight.abs() < 1e9) {
                return Err(wrong());
            }
            if name.trim().is_empty() || out.insert(name.trim().to_owned(), weight).is_some() {
                return Err(wrong());
            }
        }
        Ok(Self(out))
    }
}
