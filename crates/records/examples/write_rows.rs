//! Writes one small file of every kind into a directory, and reads one back.
//!
//! `cargo run --release -p arete-records --example write_rows -- DIR`

use std::path::PathBuf;

use arete_records::rows::{
    ConversationRow, DemonstrationRow, JudgementRow, PreferenceRow, PromptRow, RolloutRow,
    RolloutTurn, Round, ScoreRow, TurnRow,
};
use arete_records::{Aspect, FinishReason, Message, Virtue, parquet, prompt_id, split_of};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = std::env::args_os().nth(1).map(PathBuf::from);
    let dir = dir.ok_or("usage: write_rows DIR")?;
    fs_err::create_dir_all(&dir)?;

    let prompt = vec![Message::user("May I read my sister's diary?")];
    let id = prompt_id(&prompt);
    let split = split_of(&prompt);
    let answer = Message::assistant("No. Ask her what is on her mind instead.");
    let mut messages = prompt.clone();
    messages.push(answer.clone());

    let prompts = [PromptRow {
        prompt_id: id.clone(),
        split,
        source: "own".to_owned(),
        prompt: prompt.clone(),
    }];
    parquet::write(dir.join("prompts.parquet"), &prompts)?;
    parquet::write(
        dir.join("demonstrations.parquet"),
        &[DemonstrationRow {
            prompt_id: id.clone(),
            split,
            source: "self".to_owned(),
            initial: "Sure.".to_owned(),
            rounds: vec![Round {
                principle: "respect: do not pry".to_owned(),
                critique: "It breaks her trust.".to_owned(),
                revision: answer.content.clone(),
            }],
            messages: messages.clone(),
        }],
    )?;
    parquet::write(
        dir.join("conversations.parquet"),
        &[ConversationRow {
            prompt_id: id.clone(),
            split,
            sample: 0,
            persona: None,
            messages: messages.clone(),
            turns: vec![
                turn(Aspect::ACTION, &answer.content, FinishReason::Stop, 11),
                turn(Aspect::MOTIVATION, "Respect.", FinishReason::Stop, 3),
                turn(Aspect::CONSEQUENCE, "Trust", FinishReason::Length, 1),
            ],
            seed: u64::MAX,
        }],
    )?;
    parquet::write(
        dir.join("judgements.parquet"),
        &[JudgementRow {
            prompt_id: id.clone(),
            split,
            aspect: Aspect::ACTION,
            virtue: Virtue::RESPECT,
            method: "pairwise-logits".to_owned(),
            judge: "example".to_owned(),
            p_ab: Some(0.75),
            p_ba: None,
            p_sample0: None,
            vote: None,
        }],
    )?;
    parquet::write(
        dir.join("preferences.parquet"),
        &[PreferenceRow {
            prompt: prompt.clone(),
            chosen: vec![answer],
            rejected: vec![Message::assistant("Sure.")],
            score_chosen: 4,
            score_rejected: 1,
            chosen_prob: 0.75,
            prompt_id: id.clone(),
            truncated_chosen: false,
            truncated_rejected: false,
        }],
    )?;
    parquet::write(
        dir.join("rollouts.parquet"),
        &[RolloutRow {
            iteration: 1,
            prompt_id: id.clone(),
            messages,
            turns: vec![
                RolloutTurn {
                    aspect: Aspect::ACTION,
                    score: Some(1.5),
                    z: Some(0.5),
                    n_tokens: Some(11),
                    finish_reason: Some(FinishReason::Stop),
                },
                not_asked(Aspect::MOTIVATION),
                not_asked(Aspect::CONSEQUENCE),
            ],
            reward: 0.5,
            kl: -0.125,
        }],
    )?;
    parquet::write(
        dir.join("scores.parquet"),
        &[ScoreRow {
            model: "original".to_owned(),
            prompt_id: id,
            aspect: Aspect::ACTION,
            score: 1.5,
            z: 0.5,
            yardstick: None,
            yardstick_words: None,
            n_tokens: 11,
            finish_reason: FinishReason::Stop,
        }],
    )?;

    let read: Vec<PromptRow> = parquet::read(dir.join("prompts.parquet"))?;
    assert_eq!(read, prompts, "what was read differs from what was written");
    Ok(())
}

fn turn(aspect: Aspect, text: &str, finish_reason: FinishReason, n_tokens: i32) -> TurnRow {
    TurnRow { aspect, text: text.to_owned(), finish_reason, n_tokens }
}

/// A turn that a rollout of answers alone has not.
fn not_asked(aspect: Aspect) -> RolloutTurn {
    RolloutTurn { aspect, score: None, z: None, n_tokens: None, finish_reason: None }
}
