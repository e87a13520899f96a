//! The conversation of a chain: prompt, answer, and each further question with its reply.

use arete_records::{Aspect, Message, Refusal, Role};

/// The messages of a chain: the prompt, the answer, and each further question with its reply.
#[must_use]
pub fn conversation(prompt: &[Message], replies: [&str; 3]) -> Vec<Message> {
    let mut messages = prompt.to_vec();
    for (aspect, reply) in Aspect::ALL.into_iter().zip(replies) {
        messages.extend(aspect.question().map(Message::user));
        messages.push(Message::assistant(reply));
    }
    messages
}

/// The messages up to and including the reply of `aspect`.
///
/// `messages` end with a chain's reply, of any aspect from this one on.
///
/// # Errors
///
/// [`Refusal::BadSetting`] if the conversation has no reply of that aspect.
pub fn aspect_conversation(messages: &[Message], aspect: Aspect) -> Result<&[Message], Refusal> {
    Ok(&messages[..reply_ends(messages, aspect)?.1])
}

/// The messages before the answer: context and question, which all samples of a prompt share.
///
/// # Errors
///
/// [`Refusal::BadSetting`] if the messages are not a chain.
pub fn prompt_of(messages: &[Message]) -> Result<&[Message], Refusal> {
    Ok(&messages[..reply_ends(messages, Aspect::Action)?.0])
}

/// The length of the prompt, and the end of the reply of `aspect`.
fn reply_ends(messages: &[Message], aspect: Aspect) -> Result<(usize, usize), Refusal> {
    let mut ends = [None; 3];
    let mut end = messages.len();
    for asked in [Aspect::Consequence, Aspect::Motivation] {
        if let [.., question, reply] = &messages[..end]
            && reply.role == Role::Assistant
            && question.role == Role::User
            && Some(question.content.trim()) == asked.question()
        {
            ends[asked.index()] = Some(end);
            end -= 2;
        }
    }
    if let [_, .., answer] = &messages[..end]
        && answer.role == Role::Assistant
        && (ends[1].is_some() || ends[2].is_none())
    {
        ends[0] = Some(end);
        if let Some(reply) = ends[aspect.index()] {
            return Ok((end - 1, reply));
        }
    }
    let found: Vec<_> = messages.iter().map(|m| m.role.name()).collect();
    Err(Refusal::setting(
        "messages",
        format!("a prompt and the turns of a chain through its {aspect}"),
        format!("[{}]", found.join(", ")),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_comes_apart_where_it_was_put_together() {
        let prompt =
            [Message::system("s"), Message::user("q"), Message::assistant("a"), Message::user("p")];
        let messages = conversation(&prompt, ["one", "two", "three"]);
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
        assert_eq!(prompt_of(&messages).unwrap(), prompt);
        for (aspect, n) in Aspect::ALL.into_iter().zip([5, 7, 9]) {
            assert_eq!(aspect_conversation(&messages, aspect).unwrap(), &messages[..n]);
            // A conversation cut at an aspect has the aspects before it, and no later one.
            let cut = &messages[..n];
            assert_eq!(prompt_of(cut).unwrap(), prompt);
            for later in &Aspect::ALL[aspect.index() + 1..] {
                assert!(aspect_conversation(cut, *later).is_err());
            }
        }
        for not_a_chain in [&messages[..4], &messages[..6], &messages[4..5], &[]] {
            let error = prompt_of(not_a_chain).unwrap_err();
            assert!(error.to_string().contains("a prompt and the turns of a chain"), "{error}");
        }
    }
}
