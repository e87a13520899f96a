//! Files of the shipped turns and virtues keep their bytes: the sums are of files that the last version wrote in which turns were
//! fixed fields of the rows and virtues an enum (commit 36e209a), of the same values.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use arete_records::hashes::sha256_file;
use arete_records::parquet::{self, Row};
use arete_records::rows::{ConversationRow, JudgementRow, RolloutRow, RolloutTurn, TurnRow};
use arete_records::{Aspect, FinishReason, Message, Split, Virtue};

const N_ROWS: usize = 300;

fn reason(i: usize) -> FinishReason {
    if i.is_multiple_of(3) { FinishReason::Length } else { FinishReason::Stop }
}

fn text(i: usize, turn: usize) -> String {
    format!("{} reply {i}.{turn} güte\n", "word ".repeat(i % 5))
}

fn messages(i: usize) -> Vec<Message> {
    let mut messages = vec![Message::user(format!("Question {i}?"))];
    for turn in 0..3 {
        if turn > 0 {
            messages.push(Message::user(format!("Asked {turn}")));
        }
        messages.push(Message::assistant(text(i, turn)));
    }
    messages
}

fn id(i: usize) -> String {
    format!("{:016x}", i * 7919)
}

/// Whether a rollout asked for a turn.
fn is_asked(i: usize, turn: usize) -> bool {
    turn == 0 || i.is_multiple_of(2)
}

fn number(i: usize, turn: usize) -> Option<f32> {
    is_asked(i, turn).then_some(i as f32 / 8.0 - turn as f32)
}

fn count(i: usize, turn: usize) -> Option<i32> {
    is_asked(i, turn).then_some((i + turn) as i32)
}

fn conversation(i: usize) -> ConversationRow {
    let turn = |(turn, aspect): (usize, Aspect)| TurnRow {
        aspect,
        text: text(i, turn),
        finish_reason: reason(i + turn),
        n_tokens: ((turn + 1) * i) as i32,
    };
    ConversationRow {
        prompt_id: id(i),
        split: Split::ALL[i % 3],
        sample: (i % 2) as i32,
        persona: (i % 4 == 1).then(|| "virtuous".to_owned()),
        messages: messages(i),
        turns: Aspect::SHIPPED.into_iter().enumerate().map(turn).collect(),
        seed: u64::MAX - i as u64,
    }
}

fn rollout(i: usize) -> RolloutRow {
    let turn = |(turn, aspect): (usize, Aspect)| RolloutTurn {
        aspect,
        score: number(i, turn),
        z: number(i + [1, 2, 2][turn], turn),
        n_tokens: count(i, turn),
        finish_reason: is_asked(i, turn).then(|| reason(i + turn)),
    };
    RolloutRow {
        iteration: 1 + (i / 100) as i32,
        prompt_id: id(i),
        messages: messages(i),
        turns: Aspect::SHIPPED.into_iter().enumerate().map(turn).collect(),
        reward: i as f32 / 16.0,
        kl: -(i as f32) / 32.0,
    }
}

fn judgement(i: usize) -> JudgementRow {
    JudgementRow {
        prompt_id: id(i),
        split: Split::ALL[i % 3],
        aspect: Aspect::SHIPPED[i / 5 % 3],
        virtue: Virtue::SHIPPED[i % 5],
        method: "pairwise-logits".to_owned(),
        judge: "j".to_owned(),
        p_ab: number(i, 1),
        p_ba: number(i, 2),
        p_sample0: number(i, 0),
        vote: count(i, 1),
    }
}

fn sum_of<T: Row + PartialEq + std::fmt::Debug>(rows: &[T]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.parquet");
    parquet::write(&path, rows).unwrap();
    assert_eq!(parquet::read::<T>(&path).unwrap(), rows);
    sha256_file(&path).unwrap()
}

#[test]
fn files_of_the_shipped_names_keep_their_bytes() {
    let conversations: Vec<ConversationRow> = (0..N_ROWS).map(conversation).collect();
    let rollouts: Vec<RolloutRow> = (0..N_ROWS).map(rollout).collect();
    let judgements: Vec<JudgementRow> = (0..N_ROWS).map(judgement).collect();
    let sums = [
        sum_of(&conversations),
        sum_of::<ConversationRow>(&[]),
        sum_of(&rollouts),
        sum_of(&judgements),
    ];
    let expected = [
        "bdb763165c1de8b05edaecaea00ed832af47be4758404a3eebb1d8a9a2006bbf",
        "eb6f5726f7a3071e943fda1483258910da648cd9e66eb73c1a04903f8f6a7309",
        "877f6d646f9f42a73782679d60edcb08045621d59af00148bb991bdb26f4447f",
        "1439b4cfa9d4ce1072c656cac482730bc889b4e020f053186f4e1ee628b3bbd0",
    ];
    assert_eq!(sums, expected);
}
