//! Conversations as hh-rlhf writes them: `"\n\nHuman: …\n\nAssistant: …"`.

use arete_records::{Message, Role};

const MARKERS: [(&str, Role); 2] = [("Human:", Role::User), ("Assistant:", Role::Assistant)];

/// Reads a conversation written as `"\n\nHuman: …\n\nAssistant: …"`; `None` if the text is none.
///
/// A speaker counts only at the start of the text or after a blank line, so that `Human` or `: `
/// inside a turn survive. A text that begins with `Human:` without the blank line in front, and in
/// which nobody answers, is a plain text about humans. A turn that is opened and left empty (the usual
/// end of a prompt) is dropped.
pub fn parse(text: &str) -> Option<Vec<Message>> {
    let turns = turns(text)?;
    Some(turns.into_iter().filter(|message| !message.content.is_empty()).collect())
}

/// [`parse`], empty turns and all: whether a conversation ends with a reply can be told from its last.
pub fn turns(text: &str) -> Option<Vec<Message>> {
    let text = text.replace("\r\n", "\n");
    let is_marked = text.starts_with("\n\n");
    let text = text.trim();
    let (_, n_marker) = speaker_at(text)?;
    if !is_marked && next_turn(text, n_marker) == text.len() {
        return None;
    }
    let mut turns: Vec<(Role, usize, usize)> = Vec::new(); // role, start and end of the content
    let mut from = 0;
    while let Some((role, length)) = speaker_at(&text[from..]) {
        let start = from + length;
        let end = next_turn(text, start);
        turns.push((role, start, end));
        if end == text.len() {
            break;
        }
        from = end + 2;
    }
    let messages = turns
        .into_iter()
        .map(|(role, start, end)| Message { role, content: text[start..end].trim().to_owned() });
    Some(messages.collect())
}

/// [`turns`] of a text that a system text leads, as [`format()`] writes it; `None` if nobody answers in it.
pub fn turns_after_system(text: &str) -> Option<Vec<Message>> {
    let text = text.replace("\r\n", "\n");
    let at = text.find(&format!("\n\n{}", MARKERS[0].0))?;
    let system = text[..at].trim();
    let own = turns(&text[at..])?;
    let is_answered = own.iter().any(|message| message.role == Role::Assistant);
    (is_answered && !system.is_empty())
        .then(|| std::iter::once(Message::system(system)).chain(own).collect())
}

/// Writes a conversation as `"\n\nHuman: …\n\nAssistant: …"`; a system message leads as plain text.
pub fn format(messages: &[Message]) -> String {
    messages
        .iter()
        .map(|message| match message.role {
            Role::System => message.content.clone(),
            Role::User => format!("\n\nHuman: {}", message.content),
            Role::Assistant => format!("\n\nAssistant: {}", message.content),
        })
        .collect()
}

/// The text without blank lines before a speaker, so that [`parse`] reads it as one turn.
pub fn as_one_turn(text: &str) -> String {
    let mut text = text.replace("\r\n", "\n");
    for (name, _) in MARKERS {
        let (opens, continues) = (format!("\n\n{name}"), format!("\n{name}"));
        while text.contains(&opens) {
            text = text.replace(&opens, &continues);
        }
    }
    text
}

fn speaker_at(text: &str) -> Option<(Role, usize)> {
    MARKERS.iter().find(|(name, _)| text.starts_with(name)).map(|(name, role)| (*role, name.len()))
}

/// Where the turn that starts at `from` ends: before the blank line that precedes a speaker.
fn next_turn(text: &str, from: usize) -> usize {
    let starts = MARKERS.iter().filter_map(|(name, _)| text[from..].find(&format!("\n\n{name}")));
    starts.min().map_or(text.len(), |at| from + at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn turns_are_split_at_speakers_after_blank_lines_only() {
        let text = "\n\nHuman: What is this: a test?\nHuman: is a word\n\nAssistant: Yes: it is.\n\n\
                    A Human asked.\n\nHuman: ok\n\nAssistant:";
        assert_eq!(
            parse(text).unwrap(),
            vec![
                Message::user("What is this: a test?\nHuman: is a word"),
                Message::assistant("Yes: it is.\n\nA Human asked."),
                Message::user("ok"),
            ]
        );
    }

    #[test]
    fn text_without_a_leading_speaker_is_no_conversation() {
        assert_eq!(parse("What does \"\n\nHuman: hi\" mean?"), None);
        assert_eq!(parse("Just text\n\nHuman: no"), None);
        assert_eq!(parse(""), None);
        assert_eq!(parse("Human: a history of the word. Who wrote it?"), None);
        assert_eq!(parse("\n\nHuman: hello").unwrap(), [Message::user("hello")]);
    }

    #[test]
    fn three_newlines_before_a_speaker_still_separate() {
        let messages = parse("Human: a\n\n\nAssistant: b").unwrap();
        assert_eq!(messages, vec![Message::user("a"), Message::assistant("b")]);
    }

    #[test]
    fn format_is_the_form_of_the_hub() {
        let messages = [Message::user("a"), Message::assistant("b")];
        assert_eq!(format(&messages), "\n\nHuman: a\n\nAssistant: b");
    }

    proptest! {
        #[test]
        fn parse_undoes_format(texts in prop::collection::vec("[a-zA-Z:, ]{0,8}[a-z][\n]?[a-z: ]{0,8}[a-z]", 1..6)) {
            let messages: Vec<Message> = texts
                .iter()
                .enumerate()
                .map(|(idx, text)| match idx % 2 {
                    0 => Message::user(text.trim()),
                    _ => Message::assistant(text.trim()),
                })
                .collect();
            prop_assert_eq!(parse(&format(&messages)).unwrap(), messages);
        }
    }
}
