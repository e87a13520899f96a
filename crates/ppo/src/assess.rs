//! What a rollout is worth: scores, KL and token rewards, and its rows on disk.

use anyhow::Result;
use arete_chain::Turns;
use arete_records::Aspect;
use arete_records::rows::{RolloutRow, RolloutTurn};
use tch::{Kind, Tensor};

use crate::config::{Algorithm, Config};
use crate::prompts::Prompt;
use crate::reward::{Ensemble, combine, missing_eos, place, shares_by_turn, token_rewards};
use crate::rollout::{Conversation, Layout, Reply};
use crate::scorer::Scores;
use arete_records::FinishReason;

/// A rollout with its rewards.
#[derive(Debug)]
pub(crate) struct Assessment {
    /// Raw and standardised scores.
    pub(crate) scores: Scores,
    /// What each turn is paid for them.
    pub(crate) pay: Pay,
    /// `[B]`: what was paid out for scores.
    pub(crate) paid: Vec<f64>,
    /// `[B]`: k1 summed over own tokens, nats.
    pub(crate) kl: Vec<f64>,
    /// `[B]`: Σ of the token rewards.
    pub(crate) reward: Vec<f64>,
    /// `[B, T]` f32.
    pub(crate) token_rewards: Tensor,
}

/// What is paid, and where: turn by turn, or all at the end.
#[derive(Debug)]
pub(crate) struct Pay {
    /// `[B, U]` f32, U = turns that are paid by themselves, or 1.
    pub(crate) amount: Tensor,
    /// `[B, U]` i64: the column each is paid at.
    pub(crate) columns: Tensor,
}

impl Pay {
    /// Standardised scores `z`, `[B][K]`, as they are paid out.
    pub(crate) fn of(
        z: &[Vec<f64>],
        scores: &Scores,
        conversations: &[Conversation],
        layout: &Layout,
        config: &Config,
    ) -> Result<Self> {
        let flat: Vec<f32> = z.iter().flatten().map(|&z| z as f32).collect();
        let mut z = Tensor::from_slice(&flat).view([z.len() as i64, -1]); // [B, K]
        if config.score_clip > 0.0 {
            z = z.clamp(-config.score_clip, config.score_clip);
        }
        let is_cut = |reply: &Reply| reply.finish_reason == FinishReason::Length;
        let truncated: Vec<bool> =
            conversations.iter().flat_map(|c| c.replies.iter().map(is_cut)).collect();
        let truncated = Tensor::from_slice(&truncated).view([conversations.len() as i64, -1]);
        let penalty = missing_eos(&truncated, config.missing_eos_penalty); // [B, turns]
        let weights = &scores.weights;
        if config.pays_per_turn() {
            let amount = shares_by_turn(&z, &scores.turns, weights, &penalty)?;
            return Ok(Self { amount, columns: layout.last_token.shallow_clone() });
        }
        let parameter = match config.ensemble {
            Ensemble::SoftMin => config.soft_min_temperature,
            Ensemble::Mean | Ensemble::MeanMinusStd | Ensemble::Min => config.ensemble_std_weight,
        };
        let score = combine(&z, config.ensemble, weights, parameter)?
            - penalty.mean_dim(1, false, Kind::Float); // [B]
        let columns = layout.last_token.amax(1, true); // [B, 1]
        Ok(Self { amount: score.unsqueeze(1), columns })
    }

    /// `[B, T]` f32: the amounts at their tokens.
    pub(crate) fn placed(&self, layout: &Layout) -> Result<Tensor> {
        place(&self.amount, &self.columns, layout.n_columns())
    }
}

/// Rewards of a rollout whose own tokens have these log-probability differences.
///
/// # Shapes
///
/// - `kl`: `[n]` f32, nats, in the order of conversations.
pub(crate) fn assess(
    scores: Scores,
    conversations: &[Conversation],
    layout: &Layout,
    kl: &Tensor,
    kl_coef: f64,
    config: &Config,
) -> Result<Assessment> {
    let pay = Pay::of(&scores.z, &scores, conversations, layout, config)?;
    let placed = pay.placed(layout)?;
    let kl = layout.spread(kl); // [B, T]
    // GRPO's penalty is part of the loss.
    let in_reward = if config.algorithm == Algorithm::Grpo { 0.0 } else { kl_coef };
    let rewards = token_rewards(&kl, &placed, &layout.valid(), in_reward)?;
    let sums = |tensor: &Tensor| -> Result<Vec<f64>> {
        let sums = tensor.to_kind(Kind::Double).sum_dim_intlist(1, false, Kind::Double);
        Ok(Vec::try_from(sums)?)
    };
    Ok(Assessment {
        paid: sums(&placed)?,
        kl: sums(&kl)?,
        reward: sums(&rewards)?,
        token_rewards: rewards,
        scores,
        pay,
    })
}

/// The rows of a rollout or probe: every turn of the chain, with what the reward model of its name and its reply have to
/// show.
pub(crate) fn rows(
    iteration: u64,
    conversations: &[Conversation],
    prompts: &[&Prompt],
    assessment: &Assessment,
    turns: &Turns,
) -> Vec<RolloutRow> {
    let Scores { names, raw, z, .. } = &assessment.scores;
    let row = |(idx, c): (usize, &Conversation)| {
        let turn = |(place, aspect): (usize, Aspect)| {
            let member = names.iter().position(|name| name == aspect.name());
            let number = |of: &[Vec<f64>]| member.map(|member| of[idx][member] as f32);
            let reply = c.replies.get(place);
            RolloutTurn {
                aspect,
                score: number(raw),
                z: number(z),
                n_tokens: reply.map(|reply| reply.tokens.len() as i32),
                finish_reason: reply.map(|reply| reply.finish_reason),
            }
        };
        RolloutRow {
            iteration: i32::try_from(iteration).expect("iterations are few"),
            prompt_id: prompts[c.prompt].prompt_id.clone(),
            messages: c.messages.clone(),
            turns: turns.names().into_iter().enumerate().map(turn).collect(),
            reward: assessment.reward[idx] as f32,
            kl: assessment.kl[idx] as f32,
        }
    };
    conversations.iter().enumerate().map(row).collect()
}

/// What can be said of a rollout or a probe alike: scores, lengths, truncation.
pub(crate) fn describe(
    conversations: &[Conversation],
    turns: &Turns,
    scores: &Scores,
) -> Vec<(String, f64)> {
    let (mean, std) = (arete_records::stats::mean, arete_records::stats::std);
    let mut out = Vec::new();
    for (idx, name) in scores.names.iter().enumerate() {
        let z = Scores::column(&scores.z, idx);
        out.push((format!("score_{name}"), mean(&Scores::column(&scores.raw, idx))));
        out.push((format!("z_{name}"), mean(&z)));
        out.push((format!("score_spread_{name}"), std(&z)));
    }
    out.push(("z_mean".to_owned(), mean(&scores.z_means())));
    let spread: Vec<f64> = scores.z.iter().map(|row| std(row)).collect();
    out.push(("ensemble_disagreement".to_owned(), mean(&spread)));
    let n_turns = conversations.first().map_or(0, |c| c.replies.len());
    for (turn, aspect) in turns.names().into_iter().enumerate().take(n_turns) {
        let lengths: Vec<f64> =
            conversations.iter().map(|c| c.replies[turn].tokens.len() as f64).collect();
        let is_cut = |c: &Conversation| c.replies[turn].finish_reason == FinishReason::Length;
        let cut: Vec<f64> = conversations.iter().map(|c| f64::from(u8::from(is_cut(c)))).collect();
        out.push((format!("length_{aspect}"), mean(&lengths)));
        out.push((format!("truncated_{aspect}"), mean(&cut)));
    }
    out
}

#[cfg(test)]
mod tests {
    use arete_records::Message;
    use clap::Parser;

    use super::*;
    use crate::test_tensors::values_of;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        config: Config,
    }

    fn config(args: &[&str]) -> Config {
        let config = Cli::try_parse_from([&["ppo"], args].concat()).unwrap().config;
        config.check().unwrap();
        config
    }

    /// Prompt of two tokens, then replies with one token of the user's between them.
    fn conversation(replies: &[(usize, FinishReason)]) -> Conversation {
        let mut at = 2;
        let replies: Vec<Reply> = replies
            .iter()
            .map(|&(n, finish_reason)| {
                let tokens = at..at + n;
                at += n + 1;
                Reply { tokens, finish_reason }
            })
            .collect();
        let mut messages = vec![Message::user("q")];
        for _ in &replies {
            messages.extend([Message::assistant("a"), Message::user("q")]);
        }
        messages.pop();
        Conversation {
            prompt: 0,
            token_ids: vec![7; at - 1],
            n_prompt: 2,
            replies,
            sampled_logprob: Vec::new(),
            messages,
        }
    }

    /// Standardised scores of the three aspects, which read these replies.
    fn scores(z: Vec<Vec<f64>>, turns: &[usize]) -> Scores {
        Scores {
            names: Aspect::SHIPPED.map(|aspect| aspect.name().to_owned()).to_vec(),
            turns: turns.to_vec(),
            weights: vec![1.0; 3],
            raw: vec![vec![0.0; 3]; z.len()],
            z,
            n_tokens: 0,
        }
    }

    fn pay(
        scores: &Scores,
        conversations: &[Conversation],
        layout: &Layout,
        config: &Config,
    ) -> Result<Tensor> {
        Pay::of(&scores.z, scores, conversations, layout, config)?.placed(layout)
    }

    const STOP: FinishReason = FinishReason::Stop;
    const LENGTH: FinishReason = FinishReason::Length;

    #[test]
    fn own_tokens_have_places_and_user_turns_have_none() {
        let conversations = [
            conversation(&[(2, STOP), (1, STOP), (1, STOP)]), // own columns 0 1, 3, 5
            conversation(&[(1, STOP), (2, STOP), (1, STOP)]), // 0, 2 3, 5
        ];
        let layout = Layout::new(&conversations);
        assert_eq!(layout.n_columns(), 6);
        assert_eq!(values_of(&layout.last_token), [1.0, 3.0, 5.0, 0.0, 3.0, 5.0]);
        let flat = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
        let spread = layout.spread(&flat);
        let expected = [1.0, 2.0, 0.0, 3.0, 0.0, 4.0, 5.0, 0.0, 6.0, 7.0, 0.0, 8.0];
        assert_eq!(values_of(&spread), expected);
        assert_eq!(values_of(&layout.gather(&spread)), values_of(&flat));
        let valid: Vec<f64> = expected.iter().map(|&x| f64::from(u8::from(x > 0.0))).collect();
        assert_eq!(values_of(&layout.valid()), valid);
    }

    #[test]
    fn scores_are_paid_per_turn_or_at_the_end() {
        let conversations = [conversation(&[(2, STOP), (1, LENGTH), (1, STOP)])];
        let layout = Layout::new(&conversations);
        let scores = scores(vec![vec![3.0, 6.0, -1.5]], &[0, 1, 2]);
        // Penalty 1.5 for the second reply, thirds: 1, (6 − 1.5)/3 = 1.5, −0.5.
        let config_of = |args: &[&str]| config(&[&["--missing-eos-penalty", "1.5"], args].concat());
        let paid = pay(&scores, &conversations, &layout, &config_of(&[])).unwrap();
        assert_eq!(values_of(&paid), [0.0, 1.0, 0.0, 1.5, 0.0, -0.5]);
        // At the end: the mean 2.5 (or the minimum −1.5) less a third of the penalty.
        let at_end = config_of(&["--placement", "final"]);
        let paid = pay(&scores, &conversations, &layout, &at_end).unwrap();
        assert_eq!(values_of(&paid), [0.0, 0.0, 0.0, 0.0, 0.0, 2.0]);
        let min = config_of(&["--placement", "final", "--ensemble", "min"]);
        let paid = pay(&scores, &conversations, &layout, &min).unwrap();
        assert_eq!(values_of(&paid), [0.0, 0.0, 0.0, 0.0, 0.0, -2.0]);
        // Mean 2.5, standard deviation √((0.25 + 12.25 + 16) / 3) = √9.5, a third of the penalty.
        let cautious = config_of(&["--placement", "final", "--ensemble", "mean_minus_std"]);
        let paid = values_of(&pay(&scores, &conversations, &layout, &cautious).unwrap());
        assert!((paid[5] - (2.5 - 0.5 * 9.5f64.sqrt() - 0.5)).abs() < 1e-6);
        // Clipped at ±2: (2 + 2 − 1.5)/3 is what the mean becomes, both ways.
        let clipped = config_of(&["--placement", "final", "--score-clip", "2"]);
        let paid = values_of(&pay(&scores, &conversations, &layout, &clipped).unwrap());
        assert!((paid[5] - (2.5 / 3.0 - 0.5)).abs() < 1e-6);
    }

    #[test]
    fn an_answer_is_paid_by_every_reward_model_at_its_end() {
        let conversations = [conversation(&[(3, STOP)]), conversation(&[(1, LENGTH)])];
        let layout = Layout::new(&conversations);
        let scores = scores(vec![vec![1.0, 2.0, 3.0], vec![0.5, 0.5, 0.5]], &[0, 0, 0]);
        // Without clipping, the minimum and the mean less the spread (√(2/3) of the first, none of the second).
        for (ensemble, expected) in
            [("min", 1.0), ("mean_minus_std", 2.0 - 0.5 * (2f64 / 3.0).sqrt())]
        {
            let config = config(&["--rollout", "answer", "--ensemble", ensemble]);
            let paid = values_of(&pay(&scores, &conversations, &layout, &config).unwrap());
            assert!((paid[2] - expected).abs() < 1e-6, "{ensemble}: {paid:?}");
            assert_eq!(paid[3], 0.5 - 1.0); // the cut one, at its only token
        }
        let config = config(&["--rollout", "answer"]);
        let kl = Tensor::from_slice(&[0.5f32, 0.25, -0.25, 1.0]);
        let out = assess(scores, &conversations, &layout, &kl, 0.5, &config).unwrap();
        let expected = [-0.25, -0.125, 2.125, -1.0, 0.0, 0.0];
        assert_eq!(values_of(&out.token_rewards), expected);
        assert_eq!(out.paid, [2.0, -0.5]);
        assert_eq!(out.kl, [0.5, 1.0]);
        assert_eq!(out.reward, [1.75, -1.0]);
        let prompt =
            Prompt { prompt_id: "p".to_owned(), messages: Vec::new(), token_ids: Vec::new() };
        let rows = rows(3, &conversations, &[&prompt], &out, &Turns::default());
        let [action, motivation, consequence] = rows[0].turns[..] else { panic!("three turns") };
        assert_eq!((action.n_tokens, action.z), (Some(3), Some(1.0)));
        // The turns that were not asked for have no reply; their reward models read the answer here.
        assert_eq!((motivation.n_tokens, motivation.finish_reason), (None, None));
        assert_eq!((consequence.z, rows[0].reward), (Some(3.0), 1.75));
        assert_eq!(rows[1].turns[0].finish_reason, Some(LENGTH));
        assert_eq!(rows[0].n_asked(), 1);
    }
}
