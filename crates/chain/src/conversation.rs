//! The conversation of a chain, and where its replies stand.

use arete_records::rows::ConversationRow;
use arete_records::{Aspect, FinishReason, Message, Refusal, Role};

/// The messages of a chain of `n_turns` through the reply of the turn at `place`, counted from 0.
///
/// # Errors
///
/// [`Refusal::BadSetting`] unless the messages are a prompt and the turns of such a chain, and it has that turn.
pub fn through(messages: &[Message], n_turns: usize, place: usize) -> Result<&[Message], Refusal> {
    let n_prompt = prompt_of(messages, n_turns)?.len();
    if place >= n_turns {
        let expected = format!("a turn of a chain of {n_turns}");
        return Err(Refusal::setting("turn", expected, place + 1));
    }
    Ok(&messages[..n_prompt + 1 + 2 * place])
}

/// The messages before the answer: context and question, which all samples of a prompt share.
///
/// # Errors
///
/// [`Refusal::BadSetting`] unless the messages are a prompt and the turns of a chain of `n_turns`.
pub fn prompt_of(messages: &[Message], n_turns: usize) -> Result<&[Message], Refusal> {
    let n_chain = (2 * n_turns).saturating_sub(1);
    let is_chain = |chain: &[Message]| {
        chain.iter().enumerate().all(|(at, message)| {
            message.role == if at % 2 == 0 { Role::Assistant } else { Role::User }
        })
    };
    if n_turns > 0
        && let Some((prompt @ [.., asked], chain)) =
            messages.len().checked_sub(n_chain).map(|at| messages.split_at(at))
        && asked.role != Role::Assistant
        && is_chain(chain)
    {
        return Ok(prompt);
    }
    let found: Vec<_> = messages.iter().map(|m| m.role.name()).collect();
    let turns = if n_turns == 1 { "turn" } else { "turns" };
    Err(Refusal::setting(
        "messages",
        format!("a prompt and the {n_turns} {turns} of a chain"),
        format!("[{}]", found.join(", ")),
    ))
}

/// The messages of a sampled chain through the reply of `aspect`, and why each of those replies ended.
///
/// # Errors
///
/// [`Refusal::BadSetting`] if the chain has no such turn, or the row's messages are not that chain.
pub fn through_aspect(
    row: &ConversationRow,
    aspect: Aspect,
) -> Result<(&[Message], Vec<FinishReason>), Refusal> {
    let place = row.place(aspect).ok_or_else(|| {
        let turns = crate::constitution::listed(&row.aspects().collect::<Vec<_>>());
        Refusal::setting("aspect", format!("one of the conversation's turns, {turns}"), aspect)
    })?;
    let messages = through(&row.messages, row.turns.len(), place)?;
    Ok((messages, row.turns[..=place].iter().map(|turn| turn.finish_reason).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::constitution::Turns;

    #[test]
    fn a_chain_comes_apart_where_it_was_put_together() {
        let prompt =
            [Message::system("s"), Message::user("q"), Message::assistant("a"), Message::user("p")];
        let messages = Turns::default().conversation(&prompt, &["one", "two", "three"]);
        let contents: Vec<&str> = messages[4..].iter().map(|m| m.content.as_str()).collect();
        assert_eq!(
            contents,
            [
                "one",
                "What is the motivation behind the answer?",
                "two",
                "What is the utility of the action towards promoting your virtuous character?",
                "three"
            ]
        );
        assert_eq!(prompt_of(&messages, 3).unwrap(), prompt);
        for (place, n) in [5, 7, 9].into_iter().enumerate() {
            assert_eq!(through(&messages, 3, place).unwrap(), &messages[..n]);
            // A conversation cut at a turn is a chain of the turns before it, and has no later one.
            let cut = Turns::default().conversation(&prompt, &["one", "two", "three"][..=place]);
            assert_eq!(cut, messages[..n]);
            assert_eq!(prompt_of(&cut, place + 1).unwrap(), prompt);
            assert!(through(&cut, place + 1, place + 1).is_err());
        }
        for not_a_chain in [&messages[..4], &messages[..6], &messages[4..5], &[]] {
            for n_turns in 0..4 {
                let error = prompt_of(not_a_chain, n_turns).unwrap_err();
                assert!(error.to_string().contains("of a chain, got ["), "{error}");
            }
        }
    }
}
