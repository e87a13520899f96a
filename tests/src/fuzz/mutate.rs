//! Inputs made of other inputs, the same ones for the same number: bytes, texts, trees of JSON, and fields of binary headers.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::{Map, Value};

/// Longest input that is made.
const MOST_BYTES: usize = 64 << 10;

/// Whole numbers at which readers go wrong.
const NUMBERS: [u64; 18] = [
    0,
    1,
    2,
    7,
    8,
    0x7f,
    0x80,
    0xff,
    0x100,
    0x7fff,
    0xffff,
    0x10000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    0xffff_ffff_ffff_ffff,
];

/// Texts at which readers of texts go wrong.
const WORDS: [&str; 48] = [
    "",
    " ",
    "\0",
    "\n",
    "\r\n",
    "\t",
    "\"",
    "\\",
    "'",
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    "=",
    ".",
    "/",
    "..",
    "-1",
    "0",
    "1e999",
    "-1e999",
    "1e-400",
    "0.1",
    "NaN",
    "-Infinity",
    "null",
    "true",
    "false",
    "18446744073709551615",
    "-9223372036854775809",
    "\u{feff}",
    "\u{2028}",
    "\u{202e}",
    "\u{1b}[2J",
    "\u{fffd}",
    "é",
    "🙂",
    "e\u{301}\u{301}",
    "\\ud800",
    "{{",
    "{% for x in range(99999) %}",
    "{% endfor %}",
    "</script>",
    "http://u:p@h/",
    "\n\nHuman: ",
    "\n\nAssistant: ",
];

/// What an input is made of, which decides how it is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One JSON document.
    Json,
    /// One JSON document a line.
    JsonLines,
    /// A text of lines.
    Text,
    /// Numbers of fixed width between texts.
    Binary,
    /// Eight bytes of length, so many bytes of JSON, and bytes: safetensors.
    HeadedJson,
}

/// A source of changed inputs.
pub struct Mutator<'a> {
    seeds: &'a [Vec<u8>],
    kind: Kind,
    random: ChaCha8Rng,
}

impl<'a> Mutator<'a> {
    /// The inputs numbered `number` of a target; the seeds are what they are made of.
    pub fn new(seeds: &'a [Vec<u8>], kind: Kind, target: &str, number: u64) -> Self {
        // FNV-1a of the name: another target has other inputs of the same number.
        let hash = target.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let mut random = ChaCha8Rng::seed_from_u64(hash);
        random.set_stream(number);
        Self { seeds, kind, random }
    }

    /// Some input.
    pub fn input(mut self) -> Vec<u8> {
        let mut bytes = match self.seeds.len() {
            0 => Vec::new(),
            n => self.seeds[self.below(n)].clone(),
        };
        for _ in 0..=self.below(4) {
            self.change(&mut bytes);
        }
        bytes.truncate(MOST_BYTES);
        bytes
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.random.next_u64() % (n.max(1) as u64)).unwrap_or(0)
    }

    fn number(&mut self) -> u64 {
        match self.below(4) {
            0 => self.random.next_u64() % 64,
            1 => self.random.next_u64(),
            _ => NUMBERS[self.below(NUMBERS.len())],
        }
    }

    fn word(&mut self) -> String {
        match self.below(8) {
            0 => self.number().to_string(),
            1 => WORDS[self.below(WORDS.len())].repeat(1 + self.below(300)),
            2 => "[".repeat(self.below(400)),
            _ => WORDS[self.below(WORDS.len())].to_owned(),
        }
    }

    fn change(&mut self, bytes: &mut Vec<u8>) {
        let is_structured = self.below(3) > 0;
        match self.kind {
            Kind::Json if is_structured => self.change_json(bytes),
            Kind::JsonLines if is_structured => self.change_line(bytes, Self::change_json),
            Kind::HeadedJson if is_structured => self.change_headed(bytes),
            Kind::Binary => match is_structured {
                true => self.change_field(bytes),
                false => self.change_bytes(bytes),
            },
            _ => match self.below(4) {
                0 => self.change_bytes(bytes),
                1 => self.change_lines(bytes),
                2 => self.change_number(bytes),
                _ => {
                    let (at, word) = (self.below(bytes.len() + 1), self.word());
                    bytes.splice(at..at, word.into_bytes());
                }
            },
        }
    }

    /// Bits, bytes and runs of bytes.
    fn change_bytes(&mut self, bytes: &mut Vec<u8>) {
        let at = self.below(bytes.len() + 1);
        let end = at + self.below((bytes.len() - at).min(64) + 1);
        match self.below(7) {
            0 | 1 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
            2 if at < bytes.len() => bytes[at] = self.random.next_u64().to_le_bytes()[0],
            3 => drop(bytes.drain(at..end)),
            4 => {
                let run = bytes[at..end].to_vec();
                bytes.splice(at..at, run);
            }
            5 => bytes.truncate(at),
            _ => {
                let other = match self.seeds.len() {
                    0 => Vec::new(),
                    n => self.seeds[self.below(n)].clone(),
                };
                let from = self.below(other.len() + 1);
                let to = from + self.below((other.len() - from).min(256) + 1);
                bytes.splice(at..end, other[from..to].iter().copied());
            }
        }
    }

    /// A number of one, two, four or eight bytes.
    fn change_field(&mut self, bytes: &mut [u8]) {
        let width = [1, 2, 4, 8][self.below(4)];
        if bytes.len() < width {
            return;
        }
        // Headers lie at the front, those of Parquet at the end.
        let place = match self.below(4) {
            0 => self.below(bytes.len() - width + 1),
            1 => bytes.len() - width - self.below((bytes.len() - width).min(400) + 1),
            _ => self.below((bytes.len() - width).min(400) + 1),
        };
        let number = self.number();
        let number = if self.below(3) == 0 { number.to_be_bytes() } else { number.to_le_bytes() };
        let low =
            if number[0] == 0 && number[7] != 0 { &number[8 - width..] } else { &number[..width] };
        bytes[place..place + width].copy_from_slice(low);
    }

    /// Whole lines.
    fn change_lines(&mut self, bytes: &mut Vec<u8>) {
        let mut lines: Vec<Vec<u8>> =
            bytes.split_inclusive(|&byte| byte == b'\n').map(<[u8]>::to_vec).collect();
        if lines.is_empty() {
            return;
        }
        let (a, b) = (self.below(lines.len()), self.below(lines.len()));
        match self.below(4) {
            0 => drop(lines.remove(a)),
            1 => lines.swap(a, b),
            2 => lines.insert(b, lines[a].clone()),
            _ => {
                let other = match self.seeds.len() {
                    0 => Vec::new(),
                    n => self.seeds[self.below(n)].clone(),
                };
                let others: Vec<&[u8]> = other.split_inclusive(|&byte| byte == b'\n').collect();
                if !others.is_empty() {
                    lines[a] = others[self.below(others.len())].to_vec();
                }
            }
        }
        *bytes = lines.concat();
    }

    fn change_line(&mut self, bytes: &mut Vec<u8>, change: fn(&mut Self, &mut Vec<u8>)) {
        let mut lines: Vec<Vec<u8>> =
            bytes.split(|&byte| byte == b'\n').map(<[u8]>::to_vec).collect();
        let at = self.below(lines.len());
        change(self, &mut lines[at]);
        *bytes = lines.join(&b'\n');
    }

    /// A run of digits.
    fn change_number(&mut self, bytes: &mut Vec<u8>) {
        let from = self.below(bytes.len() + 1);
        let Some(start) = bytes[from..].iter().position(u8::is_ascii_digit) else { return };
        let start = from + start;
        let n = bytes[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        let other = match self.below(3) {
            0 => WORDS[19 + self.below(12)].to_owned(),
            _ => self.number().to_string(),
        };
        bytes.splice(start..start + n, other.into_bytes());
    }

    /// A node of a tree.
    fn change_json(&mut self, bytes: &mut Vec<u8>) {
        let Ok(mut tree) = serde_json::from_slice::<Value>(bytes) else {
            return self.change_bytes(bytes);
        };
        let n_nodes = count(&tree);
        let mut place = self.below(n_nodes);
        let donor = match self.seeds.len() {
            0 => Value::Null,
            n => {
                let seed = &self.seeds[self.below(n)];
                serde_json::from_slice(seed).unwrap_or(Value::Null)
            }
        };
        self.change_node(&mut tree, &mut place, &donor);
        *bytes = serde_json::to_vec(&tree).unwrap_or_default();
    }

    fn change_node(&mut self, node: &mut Value, place: &mut usize, donor: &Value) {
        if *place == 0 {
            *node = self.other_value(node, donor);
            *place = usize::MAX;
            return;
        }
        *place -= 1;
        match node {
            Value::Array(items) => {
                for item in items {
                    if *place != usize::MAX {
                        self.change_node(item, place, donor);
                    }
                }
            }
            Value::Object(map) => {
                for (_, item) in map.iter_mut() {
                    if *place != usize::MAX {
                        self.change_node(item, place, donor);
                    }
                }
            }
            _ => {}
        }
    }

    fn other_value(&mut self, node: &Value, donor: &Value) -> Value {
        match (self.below(9), node) {
            (0, _) => Value::Null,
            (1, _) => self.number().into(),
            (2, _) => [-1.0, 0.5, 1e300, -1e-300, 2.0][self.below(5)].into(),
            (3, _) => self.word().into(),
            (4, _) => nested(self.below(40), self.below(2) == 0),
            (5, Value::Object(map)) => {
                let mut map = map.clone();
                let key = map.keys().nth(self.below(map.len())).cloned();
                if let Some((key, value)) = key.and_then(|key| map.remove_entry(&key))
                    && self.below(2) == 0
                {
                    map.insert(format!("{key}{}", self.word()), value);
                }
                Value::Object(map)
            }
            (5 | 6, Value::Array(items)) => {
                let mut items = items.clone();
                let at = self.below(items.len());
                match items.get(at).cloned() {
                    Some(item) if self.below(2) == 0 => items.insert(at, item),
                    Some(_) => drop(items.remove(at)),
                    None => items.push(Value::Null),
                }
                Value::Array(items)
            }
            (5 | 6, Value::String(text)) => {
                let mut chars: Vec<char> = text.chars().collect();
                let at = self.below(chars.len() + 1);
                chars.splice(at..at, self.word().chars());
                Value::String(chars.into_iter().collect())
            }
            (6 | 7, Value::Number(number)) => {
                let other = number.as_i64().unwrap_or(0).wrapping_add(self.below(3) as i64 - 1);
                other.into()
            }
            (7, Value::Bool(flag)) => (!flag).into(),
            _ => {
                let mut place = self.below(count(donor));
                find(donor, &mut place).cloned().unwrap_or(Value::Bool(true))
            }
        }
    }

    /// The head's tree, with a length that fits it more often than not.
    fn change_headed(&mut self, bytes: &mut Vec<u8>) {
        let Some((length, rest)) = bytes.split_first_chunk::<8>() else { return };
        let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
        let Some(head) = rest.get(..length) else { return self.change_field(bytes) };
        let (mut head, mut data) = (head.to_vec(), rest[length..].to_vec());
        match self.below(6) {
            0 => self.change_bytes(&mut data),
            1 => self.change_number(&mut head),
            _ => self.change_json(&mut head),
        }
        let length = if self.below(8) == 0 { self.number() } else { head.len() as u64 };
        *bytes = [&length.to_le_bytes()[..], &head, &data].concat();
    }
}

fn count(node: &Value) -> usize {
    1 + match node {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(map) => map.values().map(count).sum(),
        _ => 0_usize,
    }
}

fn find<'a>(node: &'a Value, place: &mut usize) -> Option<&'a Value> {
    if *place == 0 {
        return Some(node);
    }
    *place -= 1;
    match node {
        Value::Array(items) => items.iter().find_map(|item| find(item, place)),
        Value::Object(map) => map.values().find_map(|item| find(item, place)),
        _ => None,
    }
}

fn nested(depth: usize, is_list: bool) -> Value {
    (0..depth).fold(Value::Null, |inner, _| match is_list {
        true => Value::Array(vec![inner]),
        false => Value::Object(Map::from_iter([("a".to_owned(), inner)])),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_always_gives_the_same_input_and_another_another() {
        let seeds = [br#"{"a": [1, 2, {"b": "text"}]}"#.to_vec(), b"{}".to_vec()];
        let input = |target: &str, number| Mutator::new(&seeds, Kind::Json, target, number).input();
        let inputs: std::collections::BTreeSet<Vec<u8>> = (0..200).map(|n| input("x", n)).collect();
        assert!(inputs.len() > 100, "{}", inputs.len());
        for number in 0..20 {
            assert_eq!(input("x", number), input("x", number));
        }
        assert_ne!(
            (0..5).map(|n| input("x", n)).collect::<Vec<_>>(),
            (0..5).map(|n| input("y", n)).collect::<Vec<_>>()
        );
    }

    #[test]
    fn heads_keep_a_length_that_fits() {
        let head = br#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        let seed = [&(head.len() as u64).to_le_bytes()[..], head, &[0; 8]].concat();
        let fits = |bytes: &[u8]| {
            let (length, rest) = bytes.split_first_chunk::<8>()?;
            let head = rest.get(..usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
            serde_json::from_slice::<Value>(head).ok()
        };
        let n_fit = (0..300)
            .filter(|&n| {
                fits(&Mutator::new(std::slice::from_ref(&seed), Kind::HeadedJson, "s", n).input())
                    .is_some()
            })
            .count();
        assert!(n_fit > 100, "{n_fit}");
    }
}
