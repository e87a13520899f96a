//! Conversations as tokens: what the model is prompted with, which tokens are its own, and what joins one
//! sampled reply to the next turn.
//!
//! Where a reply begins and ends is learned from the template by rendering prefixes of the
//! conversation, never by looking for token ids: a user may write `<|im_end|>` too.

use std::borrow::Cow;
use std::ops::Range;

use arete_records::{Message, Role};

use crate::Error;
use crate::text::template::ChatTemplate;
use crate::text::tokenizer::Tokenizer;

/// Stands for a reply in the conversations rendered to learn a template.
const PLACEHOLDER: &str = "placeholder7f3a91";

/// A rendered conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// Every token of the conversation.
    pub token_ids: Vec<i64>,
    /// True = the policy's own token: the content of an assistant's turn and the token that ends it.
    pub own: Vec<bool>,
    /// The template refuses a system role: system text stands in the first user turn.
    pub system_prepended: bool,
}

/// A tokenizer and a template, together: conversations to tokens.
#[derive(Clone, Debug)]
pub struct Chat<'a> {
    tokenizer: &'a Tokenizer,
    template: &'a ChatTemplate,
    turn: Turn,
}

/// How a template ends an assistant's turn.
#[derive(Clone, Debug)]
struct Turn {
    /// Between the content and the end-of-turn token: nothing for ChatML, a space for Llama-2.
    before_end: String,
    /// The end-of-turn token, in text and as id.
    end: String,
    end_id: i64,
    /// After it, when nothing follows: a line break for ChatML.
    after_end: String,
    /// The ids of `before_end` and the end-of-turn token after a reply.
    closing: Vec<i64>,
}

/// A conversation's text, and the bytes of it that the policy would write.
struct Layout {
    text: String,
    replies: Vec<Reply>,
    system_prepended: bool,
}

struct Reply {
    start: usize,
    content_end: usize,
    /// After the end-of-turn token.
    end: usize,
}

impl<'a> Chat<'a> {
    /// Learns from the template how it ends an assistant's turn.
    ///
    /// # Errors
    ///
    /// [`Error::Template`] if the template leaves out an assistant's text or ends its turn with
    /// text that is no token of its own, so that no model could learn to stop.
    pub fn new(tokenizer: &'a Tokenizer, template: &'a ChatTemplate) -> Result<Self, Error> {
        let probe = [Message::user("Hello."), Message::assistant(PLACEHOLDER)];
        let text = template.render(&probe, false)?;
        let wrong = |reason: &str| Error::Template {
            path: template.path().to_path_buf(),
            reason: reason.to_owned(),
        };
        let (_, tail) = text
            .split_once(PLACEHOLDER)
            .ok_or_else(|| wrong("it leaves out or changes the assistant's text"))?;
        // Some files do not call the token special; one token it is all the same.
        let (at, end, end_id) = first_of(tail, tokenizer.special_tokens())
            .or_else(|| first_of(tail, tokenizer.added_tokens(false)))
            .ok_or_else(|| wrong("it ends an assistant's turn with no special token"))?;
        let before_end = tail[..at].to_owned();
        let after_end = tail[at + end.len()..].to_owned();

        let open = tokenizer.encode(PLACEHOLDER, false)?;
        let closed = tokenizer.encode(&format!("{PLACEHOLDER}{before_end}{end}"), false)?;
        let closing = closed
            .strip_prefix(open.as_slice())
            .filter(|closing| closing.last() == Some(&end_id))
            .ok_or_else(|| wrong("the token that ends an assistant's turn is not one token"))?
            .to_vec();
        let turn = Turn { before_end, end, end_id, after_end, closing };
        Ok(Self { tokenizer, template, turn })
    }

    /// The token that ends an assistant's turn (`<|im_end|>` in ChatML, `</s>` for Mistral).
    #[must_use]
    pub fn end_of_turn_id(&self) -> i64 {
        self.turn.end_id
    }

    /// Whether these messages start with system text that this model's template cannot take, so
    /// that it is put before the first user's text.
    #[must_use]
    pub fn prepends_system(&self, messages: &[Message]) -> bool {
        messages.first().is_some_and(|m| m.role == Role::System) && self.template.refuses_system()
    }

    /// The tokens to sample a reply after: the messages, and what opens an assistant's turn.
    ///
    /// # Errors
    ///
    /// Those of [`ChatTemplate::render`], [`ChatTemplate::fit`] and [`Tokenizer::encode`].
    pub fn render_prompt(&self, messages: &[Message]) -> Result<Vec<i64>, Error> {
        let (messages, _) = self.template.fit(messages)?;
        self.tokenizer.encode(&self.template.render(&messages, true)?, false)
    }

    /// The whole conversation, including what the template puts after the last end of turn.
    ///
    /// # Errors
    ///
    /// Those of [`ChatTemplate::render`], [`ChatTemplate::fit`] and [`Tokenizer::encode`], and
    /// [`Error::Template`] if the template rewrites earlier turns as the conversation grows.
    pub fn render(&self, messages: &[Message]) -> Result<Rendered, Error> {
        self.tokenize(self.lay_out(messages)?)
    }

    /// The conversation up to the content of its last reply, which was cut off: no end of turn.
    ///
    /// # Errors
    ///
    /// As [`Self::render`], and [`Error::Invalid`] if the last message is not the assistant's.
    pub fn render_truncated(&self, messages: &[Message]) -> Result<Rendered, Error> {
        let mut layout = self.lay_out(messages)?;
        match (messages.last(), layout.replies.last_mut()) {
            (Some(Message { role: Role::Assistant, .. }), Some(reply)) => {
                reply.end = reply.content_end;
                layout.text.truncate(reply.content_end);
                self.tokenize(layout)
            }
            (last, _) => Err(Error::Invalid {
                name: "messages",
                expected: "a conversation that ends with the assistant's reply".to_owned(),
                got: last
                    .map_or("none".to_owned(), |m| format!("one that ends with {}", m.role.name())),
            }),
        }
    }

    /// The tokens to append to a sampled reply so that the next can be sampled: the end of turn,
    /// unless the reply's last token was it, what the template puts after it, the user's turn, and
    /// what opens the assistant's.
    ///
    /// For replies that the template leaves as they are, the tokens of prompt, reply and this
    /// together are those of the conversation rendered whole.
    ///
    /// # Errors
    ///
    /// As [`Self::render`].
    pub fn next_turn(&self, end_was_sampled: bool, user: &str) -> Result<Vec<i64>, Error> {
        let probe = [Message::user("Hello."), Message::assistant(PLACEHOLDER), Message::user(user)];
        let text = self.template.render(&probe, true)?;
        let Turn { before_end, end, end_id, closing, .. } = &self.turn;
        let rest = text
            .split_once(PLACEHOLDER)
            .and_then(|(_, tail)| {
                tail.strip_prefix(before_end.as_str())?.strip_prefix(end.as_str())
            })
            .ok_or_else(|| {
                self.moved("the end of an assistant's turn changes with what follows")
            })?;
        // After the end-of-turn token, because some tokenizers treat a text's first word specially.
        let ids = self.tokenizer.encode(&format!("{end}{rest}"), false)?;
        let rest = ids.strip_prefix(&[*end_id]).ok_or_else(|| {
            self.moved("a longer special token runs across the end of an assistant's turn")
        })?;
        let mut next = if end_was_sampled { Vec::new() } else { closing.clone() };
        next.extend_from_slice(rest);
        Ok(next)
    }

    /// The text of a sampled reply, as it goes into a message: up to the end of turn, trimmed.
    ///
    /// # Errors
    ///
    /// As [`Tokenizer::decode`].
    pub fn reply_text(&self, completion_ids: &[i64]) -> Result<String, Error> {
        let end = completion_ids.iter().position(|&id| id == self.turn.end_id);
        let content = &completion_ids[..end.unwrap_or(completion_ids.len())];
        Ok(self.tokenizer.decode(content)?.trim().to_owned())
    }

    fn lay_out(&self, messages: &[Message]) -> Result<Layout, Error> {
        let (messages, system_prepended): (Cow<'_, [Message]>, bool) =
            self.template.fit(messages)?;
        let text = self.template.render(&messages, false)?;
        let Turn { before_end, end, after_end, .. } = &self.turn;
        let tail = format!("{before_end}{end}{after_end}");
        let mut replies = Vec::new();
        for (index, _) in messages.iter().enumerate().filter(|(_, m)| m.role == Role::Assistant) {
            let before = self.template.render(&messages[..index], true)?;
            let through = if index + 1 == messages.len() {
                Cow::Borrowed(text.as_str())
            } else {
                Cow::Owned(self.template.render(&messages[..=index], false)?)
            };
            if !through.starts_with(&before) || !text.starts_with(&*through) {
                return Err(self.moved("it rewrites earlier turns as the conversation grows"));
            }
            let content_end = match through.strip_suffix(&tail) {
                Some(open) if open.len() >= before.len() => open.len(),
                _ => return Err(self.moved("it does not end every assistant's turn alike")),
            };
            let end = content_end + before_end.len() + end.len();
            replies.push(Reply { start: before.len(), content_end, end });
        }
        Ok(Layout { text, replies, system_prepended })
    }

    fn tokenize(&self, layout: Layout) -> Result<Rendered, Error> {
        let encoded = self.tokenizer.encode_with_spans(&layout.text, false)?;
        let own: Vec<Range<usize>> = layout.replies.iter().map(|r| r.start..r.end).collect();
        let mut upcoming = own.iter().peekable();
        let own = encoded
            .spans
            .iter()
            .map(|&(start, end)| {
                while upcoming.next_if(|range| range.end <= start).is_some() {}
                // A token that begins in the prompt could not have been sampled after it.
                upcoming.peek().is_some_and(|range| range.start <= start && end <= range.end)
            })
            .collect();
        let system_prepended = layout.system_prepended;
        Ok(Rendered { token_ids: encoded.ids, own, system_prepended })
    }

    fn moved(&self, reason: &str) -> Error {
        Error::Template { path: self.template.path().to_path_buf(), reason: reason.to_owned() }
    }
}

/// The token that comes first in `text`, the longest of those that begin at one place: where, its text and its id.
fn first_of(text: &str, tokens: Vec<(String, i64)>) -> Option<(usize, String, i64)> {
    let written = tokens.into_iter().filter(|(token, _)| !token.trim().is_empty());
    written
        .filter_map(|(token, id)| Some((text.find(&token)?, token, id)))
        .min_by_key(|(at, token, _)| (*at, std::cmp::Reverse(token.len())))
}

#[cfg(test)]
mod tests;
