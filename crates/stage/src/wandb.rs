//! A run of Weights & Biases as its client leaves it offline, for `wandb sync`: one file of Protocol Buffers in a log's framing.
//!
//! # Source
//!
//! wandb 0.19, `wandb/sdk/internal/datastore.py` (LevelDB's log format behind a header of its own; CRC-32 of the type and the
//! data) and `wandb/proto/wandb_internal.proto` (`Record`: 1 `num`, 2 `history`, 3 `summary`, 17 `run`, 18 `exit`, 20 `final`,
//! 21 `header`).

use std::collections::BTreeMap;

use serde_json::Value;

use crate::crc;
use crate::protobuf::{put_bytes, put_number, put_text};

/// Of a block, whose last bytes are zero where no record's header fits.
const BLOCK: usize = 32_768;
/// Sum, length and type of a record.
const HEADER: usize = 7;
/// `:W&B`, 0xbee1, version 0.
const BEGINNING: [u8; 7] = [b':', b'W', b'&', b'B', 0xe1, 0xbe, 0];

/// What W&B calls a run: the training of one stage.
#[derive(Debug, Clone, Default)]
pub struct WandbRun {
    /// By which W&B knows it: eight letters or digits.
    pub id: String,
    /// The project that it goes to.
    pub project: String,
    /// What groups it with the other stages of a run.
    pub group: String,
    /// The stage.
    pub job_type: String,
    /// What it is called.
    pub name: String,
    /// Seconds since 1970.
    pub started_s: u64,
    /// Settings.
    pub config: Vec<(String, Value)>,
    /// Numbers by step.
    pub history: BTreeMap<u64, BTreeMap<String, Value>>,
}

impl WandbRun {
    /// The contents of `run-ID.wandb`.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut records = vec![(21, header()), (17, self.run())];
        let mut last: BTreeMap<&str, &Value> = BTreeMap::new();
        for (step, values) in &self.history {
            let mut history = Vec::new();
            let own = values.iter().map(|(name, value)| (name.as_str(), value.clone()));
            for (name, value) in own.chain([("_step", (*step).into())]) {
                put_bytes(&mut history, 1, &item(name, &value));
            }
            let mut number = Vec::new();
            put_number(&mut number, 1, *step);
            put_bytes(&mut history, 2, &number);
            records.push((2, history));
            last.extend(values.iter().map(|(name, value)| (name.as_str(), value)));
        }
        let mut summary = Vec::new();
        for (name, value) in last {
            put_bytes(&mut summary, 1, &item(name, value));
        }
        records.push((3, summary));
        let mut exit = Vec::new();
        put_number(&mut exit, 1, 0);
        records.push((18, exit));
        records.push((20, Vec::new()));
        let mut log = Log(BEGINNING.to_vec());
        for (at, (field, message)) in (1..).zip(records) {
            let mut record = Vec::new();
            put_number(&mut record, 1, at);
            put_bytes(&mut record, field, &message);
            log.put(&record);
        }
        log.0
    }

    fn run(&self) -> Vec<u8> {
        let mut config = Vec::new();
        for (name, value) in &self.config {
            put_bytes(&mut config, 1, &item(name, value));
        }
        let mut started = Vec::new();
        put_number(&mut started, 1, self.started_s);
        let mut run = Vec::new();
        put_text(&mut run, 1, &self.id);
        put_text(&mut run, 3, &self.project);
        put_bytes(&mut run, 4, &config);
        put_text(&mut run, 6, &self.group);
        put_text(&mut run, 7, &self.job_type);
        put_text(&mut run, 8, &self.name);
        put_bytes(&mut run, 17, &started);
        run
    }
}

fn header() -> Vec<u8> {
    let mut version = Vec::new();
    put_text(&mut version, 1, concat!("arete ", env!("CARGO_PKG_VERSION")));
    let mut header = Vec::new();
    put_bytes(&mut header, 1, &version);
    header
}

/// A name with its value as JSON: `ConfigItem`, `HistoryItem` and `SummaryItem` have the same fields.
fn item(name: &str, value: &Value) -> Vec<u8> {
    let mut item = Vec::new();
    put_text(&mut item, 1, name);
    put_text(&mut item, 16, &value.to_string());
    item
}

/// Records in blocks.
struct Log(Vec<u8>);

impl Log {
    fn put(&mut self, mut data: &[u8]) {
        let room = BLOCK - self.0.len() % BLOCK;
        if room < HEADER {
            self.0.resize(self.0.len() + room, 0);
        }
        let mut is_first = true;
        loop {
            let room = BLOCK - self.0.len() % BLOCK - HEADER;
            let (part, rest) = data.split_at(data.len().min(room));
            // FULL, FIRST, MIDDLE or LAST.
            let kind = match (is_first, rest.is_empty()) {
                (true, true) => 1,
                (true, false) => 2,
                (false, false) => 3,
                (false, true) => 4,
            };
            let sum = crc32(&[&[kind], part].concat());
            let length = u16::try_from(part.len()).expect("a block is smaller than that");
            self.0.extend_from_slice(&sum.to_le_bytes());
            self.0.extend_from_slice(&length.to_le_bytes());
            self.0.push(kind);
            self.0.extend_from_slice(part);
            if rest.is_empty() {
                return;
            }
            (data, is_first) = (rest, false);
        }
    }
}

/// CRC-32 (IEEE 802.3): reflected polynomial 0xedb88320.
fn crc32(bytes: &[u8]) -> u32 {
    const TABLE: crc::Table = crc::table(0xedb8_8320);
    crc::of(bytes, &TABLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32_gives_the_published_check_value() {
        // The catalogue of CRC algorithms, CRC-32/ISO-HDLC.
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn records_are_framed_by_the_letter() {
        let mut log = Log(BEGINNING.to_vec());
        log.put(b"ab");
        // Python: zlib.crc32(b"ab", zlib.crc32(b"\x01")) = 0x21d9e9b7.
        let mut expected = BEGINNING.to_vec();
        expected.extend_from_slice(&0x21d9_e9b7_u32.to_le_bytes());
        expected.extend_from_slice(&[2, 0, 1, b'a', b'b']);
        assert_eq!(log.0, expected);
        // Over the end of a block: first part, last part.
        let mut log = Log(BEGINNING.to_vec());
        log.put(&vec![7; BLOCK]);
        assert_eq!(log.0[13], 2); // FIRST
        assert_eq!(log.0[BLOCK + 6], 4); // LAST
        assert_eq!(log.0.len(), 7 + 7 + 7 + BLOCK);
        // Less than a header's room is zeros.
        let mut log = Log(vec![0; BLOCK - 3]);
        log.put(b"x");
        assert_eq!(log.0.len(), BLOCK + 7 + 1);
        assert_eq!((log.0[BLOCK - 1], log.0[BLOCK + 6]), (0, 1));
        // Exactly a header's room: an empty first part, as the client leaves it.
        let mut log = Log(vec![0; BLOCK - 7]);
        log.put(b"x");
        assert_eq!((log.0[BLOCK - 1], log.0[BLOCK + 6], log.0[BLOCK + 7]), (2, 4, b'x'));
    }
}
