//! TensorBoard event files: TFRecord framing around hand-encoded `Event` messages.
//!
//! # Source
//!
//! Framing: tensorflow/core/lib/io/record_writer.h (length u64, masked CRC-32C of the length, data,
//! masked CRC-32C of the data, little endian). Messages: tensorflow/core/util/event.proto (1
//! `wall_time`, 2 `step`, 3 `file_version`, 5 `summary`), tensorflow/core/framework/summary.proto
//! (1 `value` of 1 `tag`, 2 `simple_value`, 8 `tensor`, 9 `metadata`). Settings: the plugins `text`
//! (tensorboard/plugins/text/metadata.py) and `hparams` (tensorboard/plugins/hparams/plugin_data.proto: 3
//! `session_start_info` of 1 `hparams`, a map to google.protobuf.Value).

use serde_json::Value;

use crate::crc;
use crate::protobuf::{
    FIXED32, VARINT, put_bool, put_bytes, put_double, put_key, put_text, put_varint,
};

/// Key of an event's step.
const STEP_KEY: u8 = 2 << 3;
/// `DT_STRING` of tensorflow/core/framework/types.proto.
const DT_STRING: u64 = 7;

/// The record every event file begins with.
pub(crate) fn header(wall_time_s: f64) -> Vec<u8> {
    let mut event = Vec::new();
    put_double(&mut event, 1, wall_time_s);
    put_bytes(&mut event, 3, b"brain.Event:2");
    record(&event)
}

/// One record with the scalars of a step.
pub(crate) fn scalars(wall_time_s: f64, step: u64, metrics: &[(&str, f64)]) -> Vec<u8> {
    let mut summary = Vec::new();
    for (tag, value) in metrics {
        let mut message = Vec::new();
        put_bytes(&mut message, 1, tag.as_bytes());
        put_key(&mut message, 2, FIXED32);
        #[expect(clippy::cast_possible_truncation, reason = "the format holds f32")]
        message.extend_from_slice(&(*value as f32).to_le_bytes());
        put_bytes(&mut summary, 1, &message);
    }
    let mut event = Vec::new();
    put_double(&mut event, 1, wall_time_s);
    put_key(&mut event, 2, VARINT);
    put_varint(&mut event, step);
    put_bytes(&mut event, 5, &summary);
    record(&event)
}

/// What was set: a table that TensorBoard shows under Text, and the values by which its HParams tab compares runs. An event without
/// a step, as the header is.
pub(crate) fn settings(wall_time_s: f64, table: &str, values: &[(String, Value)]) -> Vec<u8> {
    let mut tensor = Vec::new();
    put_key(&mut tensor, 1, VARINT);
    put_varint(&mut tensor, DT_STRING);
    let shape = [0x12, 2, 0x08, 1]; // one dimension, of size 1
    put_bytes(&mut tensor, 2, &shape);
    put_text(&mut tensor, 8, table);
    let mut text = metadata("settings/text_summary", "text", &[]);
    put_bytes(&mut text, 8, &tensor);

    let mut session = Vec::new();
    for (name, value) in values {
        let mut entry = Vec::new();
        put_text(&mut entry, 1, name);
        let mut held = Vec::new();
        match value {
            Value::Bool(value) => put_bool(&mut held, 4, *value),
            Value::Number(number) => put_double(&mut held, 2, number.as_f64().unwrap_or(f64::NAN)),
            Value::String(text) => put_text(&mut held, 3, text),
            other => put_text(&mut held, 3, &other.to_string()),
        }
        put_bytes(&mut entry, 2, &held);
        put_bytes(&mut session, 1, &entry);
    }
    put_double(&mut session, 5, wall_time_s);
    let mut data = Vec::new();
    put_bytes(&mut data, 3, &session);
    let hparams = metadata("_hparams_/session_start_info", "hparams", &data);

    let mut summary = Vec::new();
    put_bytes(&mut summary, 1, &text);
    put_bytes(&mut summary, 1, &hparams);
    let mut event = Vec::new();
    put_double(&mut event, 1, wall_time_s);
    put_bytes(&mut event, 5, &summary);
    record(&event)
}

/// The tag and the plugin of a summary's value.
fn metadata(tag: &str, plugin: &str, content: &[u8]) -> Vec<u8> {
    let mut data = Vec::new();
    put_text(&mut data, 1, plugin);
    put_bytes(&mut data, 2, content);
    let mut metadata = Vec::new();
    put_bytes(&mut metadata, 1, &data);
    let mut value = Vec::new();
    put_text(&mut value, 1, tag);
    put_bytes(&mut value, 9, &metadata);
    value
}

/// The leading records that are whole and of steps up to `last_step`, at most `n_of_it` of the last; the header and
/// the settings are none of them.
pub(crate) fn kept(file: &[u8], last_step: u64, n_of_it: usize) -> Vec<u8> {
    let mut end = 0;
    let mut left = n_of_it;
    while let Some((event, record_bytes)) = next_record(&file[end..]) {
        let Some(step) = step_of(event) else { break };
        if let Some(step) = step {
            let is_last = step == last_step;
            if step > last_step || (is_last && left == 0) {
                break;
            }
            left -= usize::from(is_last);
        }
        end += record_bytes;
    }
    file[..end].to_vec()
}

fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut bytes = Vec::with_capacity(data.len() + 16);
    bytes.extend_from_slice(&length);
    bytes.extend_from_slice(&masked_crc32c(&length).to_le_bytes());
    bytes.extend_from_slice(data);
    bytes.extend_from_slice(&masked_crc32c(data).to_le_bytes());
    bytes
}

/// The data of the first record and the bytes it takes, if it is whole and its sums are right.
fn next_record(file: &[u8]) -> Option<(&[u8], usize)> {
    let (length, rest) = file.split_first_chunk::<8>()?;
    let (length_crc, rest) = rest.split_first_chunk::<4>()?;
    if u32::from_le_bytes(*length_crc) != masked_crc32c(length) {
        return None;
    }
    let n_bytes = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    let (data, rest) = rest.split_at_checked(n_bytes)?;
    let (data_crc, _) = rest.split_first_chunk::<4>()?;
    (u32::from_le_bytes(*data_crc) == masked_crc32c(data)).then_some((data, n_bytes + 16))
}

/// The step of an event as this module writes them; none inside for the header and the settings. None of what is no such event.
fn step_of(event: &[u8]) -> Option<Option<u64>> {
    let rest = event.get(9..)?; // wall_time: one byte of key, eight of double
    let Some((&STEP_KEY, mut rest)) = rest.split_first() else {
        return Some(None);
    };
    let mut step = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, after) = rest.split_first()?;
        step |= u64::from(byte & 127) << shift;
        if byte < 128 {
            return Some(Some(step));
        }
        rest = after;
    }
    None
}

/// TFRecord's mask: sums of sums are weak, so they are rotated and shifted.
fn masked_crc32c(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli): reflected polynomial 0x82f63b78.
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: crc::Table = crc::table(0x82f6_3b78);
    crc::of(bytes, &TABLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_gives_the_published_check_values() {
        // "123456789": the catalogue of CRC algorithms; the others: RFC 3720, appendix B.4.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        let ascending: Vec<u8> = (0..32).collect();
        assert_eq!(crc32c(&ascending), 0x46dd_794e);
    }

    #[test]
    fn a_scalar_event_is_encoded_by_the_letter() {
        // By hand: 0x09 = field 1, fixed64; 1.0 as a double; 0x10 = field 2, varint; 300 = ac 02;
        // 0x2a = field 5, bytes; 0x0a = field 1, bytes; 0x15 = field 2, fixed32; 0.5 as a float.
        let message = [0x0a, 2, b'k', b'l', 0x15, 0, 0, 0, 0x3f];
        let mut event =
            vec![0x09, 0, 0, 0, 0, 0, 0, 0xf0, 0x3f, 0x10, 0xac, 0x02, 0x2a, 11, 0x0a, 9];
        event.extend_from_slice(&message);
        let bytes = scalars(1.0, 300, &[("kl", 0.5)]);
        assert_eq!(&bytes[..8], &(event.len() as u64).to_le_bytes());
        assert_eq!(&bytes[12..bytes.len() - 4], &event[..]);
    }

    #[test]
    fn records_are_kept_up_to_a_step_and_never_in_part() {
        let file = [
            header(1.0),
            scalars(2.0, 1, &[("loss", 1.0)]),
            scalars(3.0, 200, &[("loss", 0.5)]),
            scalars(4.0, 300, &[("loss", 0.25)]),
        ];
        let whole = file.concat();
        assert_eq!(kept(&whole, 300, usize::MAX), whole);
        assert_eq!(kept(&whole, 299, usize::MAX), file[..3].concat());
        assert_eq!(kept(&whole, 0, usize::MAX), file[0]);
        assert_eq!(kept(&whole[..whole.len() - 1], 300, usize::MAX), file[..3].concat());
        let mut flipped = whole.clone();
        flipped[file[0].len() + 20] ^= 1;
        assert_eq!(kept(&flipped, 300, usize::MAX), file[0]);
        assert!(kept(&[], 300, usize::MAX).is_empty());
        // Settings are of no step, also where the last step is the first.
        let set = settings(1.0, "| a |", &[("a".to_owned(), 1.into())]);
        let begun = [file[0].clone(), set, scalars(2.0, 0, &[("loss", 1.0)])];
        assert_eq!(kept(&begun.concat(), 0, 1), begun.concat());
        assert_eq!(kept(&begun.concat(), 0, 0), begun[..2].concat());
    }

    #[test]
    fn settings_are_encoded_by_the_letter() {
        // By hand. HParamsPluginData: 0x1a = field 3, bytes; SessionStartInfo: 0x0a = field 1, an entry of the map; its key 0x0a,
        // its value 0x12: a google.protobuf.Value, 0x11 = field 2, fixed64; 0x29 = field 5, fixed64.
        let number = [0x11, 0, 0, 0, 0, 0, 0, 0xe0, 0x3f]; // 0.5
        let mut session = vec![0x0a, 15, 0x0a, 2, b'l', b'r', 0x12, 9];
        session.extend_from_slice(&number);
        session.extend_from_slice(&[0x29, 0, 0, 0, 0, 0, 0, 0xf0, 0x3f]);
        let bytes = settings(1.0, "| lr |", &[("lr".to_owned(), 0.5.into())]);
        let has = |part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
        let length = u8::try_from(session.len()).unwrap();
        assert!(has(&[&[0x1a, length][..], &session].concat()));
        // A TensorProto: 0x08 7 = DT_STRING, 0x12 = shape, 0x42 = field 8, bytes.
        assert!(has(&[&[0x08, 7, 0x12, 4, 0x12, 2, 0x08, 1, 0x42, 6][..], b"| lr |"].concat()));
    }
}
