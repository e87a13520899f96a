//! Lines that vouch for themselves: each begins with a hash of what follows. For journals, whose last line a kill may cut.

use sha2::{Digest, Sha256};

use crate::hex;

/// A line, with its end.
#[must_use]
pub fn line(json: &str) -> String {
    format!("{} {json}\n", sum(json.as_bytes()))
}

/// Hands over what whole lines hold, until one does not fit its hash or `take` will not have it; the number of bytes of
/// the lines before.
pub fn read(bytes: &[u8], mut take: impl FnMut(&[u8]) -> bool) -> usize {
    let mut n_good = 0;
    for line in bytes.split_inclusive(|&byte| byte == b'\n') {
        let Some(json) = content(line) else { break };
        if !take(json) {
            break;
        }
        n_good += line.len();
    }
    n_good
}

fn content(line: &[u8]) -> Option<&[u8]> {
    let at = line.iter().position(|&byte| byte == b' ')?;
    let (found, json) = (&line[..at], line[at + 1..].strip_suffix(b"\n")?);
    (found == sum(json).as_bytes()).then_some(json)
}

/// Hex digits of the SHA-256.
fn sum(json: &[u8]) -> String {
    hex(&Sha256::digest(json)[..8])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_whole_or_not_at_all() {
        let whole = line(r#"{"a": 1}"#) + &line("[2]");
        let mut seen = Vec::new();
        let n_good = read(whole.as_bytes(), |json| {
            seen.push(json.to_vec());
            true
        });
        assert_eq!((n_good, seen), (whole.len(), vec![br#"{"a": 1}"#.to_vec(), b"[2]".to_vec()]));
        let first = line(r#"{"a": 1}"#).len();
        assert_eq!(read(&whole.as_bytes()[..whole.len() - 1], |_| true), first);
        assert_eq!(read(whole.as_bytes(), |json| json != b"[2]"), first);
        // Any flipped bit breaks its line.
        for at in 0..8 * first {
            let mut bytes = whole.clone().into_bytes();
            bytes[at / 8] ^= 1 << (at % 8);
            assert_eq!(read(&bytes, |_| true), 0, "{at}");
        }
    }
}
