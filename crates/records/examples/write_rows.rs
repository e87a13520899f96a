//! Writes one small file of every kind into a directory, and reads one back.
//!
//! `cargo run --release -p arete-records --example write_rows -- DIR`

use std::path::PathBuf;

use arete_records::rows::{
    ConversationRow, DemonstrationRow, JudgementRow, PreferenceRow, PromptRow, RolloutRow, Round,
    ScoreRow,
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
            action: answer.content.clone(),
            motivation: "Respect.".to_owned(),
            consequence: "Trust".to_owned(),
            finish_reason_action: FinishReason::Stop,
            finish_reason_motivation: FinishReason::Stop,
            finish_reason_consequence: FinishReason::Length,
            n_tokens_action: 11,
            n_tokens_motivation: 3,
            n_tokens_consequence: 1,
            seed: u64::MAX,
        }],
    )?;
    parquet::write(
        dir.join("judgements.parquet"),
        &[JudgementRow {
            prompt_id: id.clone(),
            split,
            aspect: Aspect::Action,
            virtue: Virtue::Respect,
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
            score_action: Some(1.5),
            score_motivation: None,
            score_consequence: None,
            z_action: Some(0.5),
            z_motivation: None,
            z_consequence: None,
            reward: 0.5,
            kl: -0.125,
            n_tokens_action: Some(11),
            n_tokens_motivation: None,
            n_tokens_consequence: None,
            finish_reason_action: Some(FinishReason::Stop),
            finish_reason_motivation: None,
            finish_reason_consequence: None,
        }],
    )?;
    parquet::write(
        dir.join("scores.parquet"),
        &[ScoreRow {
            model: "original".to_owned(),
            prompt_id: id,
            aspect: Aspect::Action,
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
