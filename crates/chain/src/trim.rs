//! Cutting a reply that the token limit ended at its last full sentence.

/// The reply up to its last full sentence; `None` if no sentence ends in it.
///
/// A sentence ends at `.`, `!`, `?` or `…`, closing quotes and brackets included, where white space
/// or the end of the text follows; the number of a list item (`2.`) and a lone initial (`J.`) end
/// none. A line break after a line of at least three words ends one too.
#[must_use]
pub fn last_sentence(text: &str) -> Option<&str> {
    let text = text.trim_end();
    let mut end = None;
    let mut at = 0;
    while let Some(c) = text[at..].chars().next() {
        let after = at + c.len_utf8();
        if matches!(c, '.' | '!' | '?' | '…') {
            let closed = after
                + text[after..]
                    .chars()
                    .take_while(|c| matches!(c, '"' | '\'' | ')' | ']' | '”' | '’' | '*'))
                    .map(char::len_utf8)
                    .sum::<usize>();
            let followed = text[closed..].chars().next().is_none_or(char::is_whitespace);
            if followed && !(c == '.' && is_label(&text[..at])) {
                end = Some(closed);
            }
        } else if c == '\n' && line_before(&text[..at]).split_whitespace().count() >= 3 {
            end = Some(at);
        }
        at = after;
    }
    end.map(|end| text[..end].trim_end()).filter(|kept| !kept.is_empty())
}

fn line_before(text: &str) -> &str {
    text.rsplit('\n').next().unwrap_or(text)
}

/// Whether the word before a full stop is a list number or a single letter other than `I`.
fn is_label(before: &str) -> bool {
    let word = before.rsplit(char::is_whitespace).next().unwrap_or(before);
    let starts_line = line_before(before).trim() == word;
    let is_number = !word.is_empty() && word.chars().all(|c| c.is_ascii_digit());
    let mut letters = word.chars();
    let is_initial = matches!((letters.next(), letters.next()), (Some(c), None) if c.is_alphabetic() && c != 'I');
    (is_number && starts_line) || is_initial
}

#[cfg(test)]
mod tests {
    use super::last_sentence;

    #[test]
    fn the_last_full_sentence_is_kept() {
        let cases = [
            ("One. Two! Three", Some("One. Two!")),
            ("He said \"stop.\" Then he", Some("He said \"stop.\"")),
            ("No sentence ends here", None),
            ("Pay 3.50 now", None),
            ("First, do this:\n1. Take it.\n2. Put", Some("First, do this:\n1. Take it.")),
            ("Steps:\n1. Put", None),
            ("Ask J. Smith about", None),
            ("A list of things\n- with dash", Some("A list of things")),
            ("Wait… no", Some("Wait…")),
            ("Whole sentence.", Some("Whole sentence.")),
            ("", None),
            ("It was I. Then", Some("It was I.")),
        ];
        for (text, expected) in cases {
            assert_eq!(last_sentence(text), expected, "{text:?}");
        }
    }
}
