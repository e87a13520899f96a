//! Protocol Buffers by hand: the few kinds of fields that TensorBoard's and W&B's files need.
//!
//! # Source
//!
//! protobuf.dev, "Encoding": a key is `field << 3 | wire type`.

pub(crate) const VARINT: u64 = 0;
const FIXED64: u64 = 1;
const LENGTH_DELIMITED: u64 = 2;
pub(crate) const FIXED32: u64 = 5;

pub(crate) fn put_key(out: &mut Vec<u8>, field: u64, wire_type: u64) {
    put_varint(out, field << 3 | wire_type);
}

pub(crate) fn put_varint(out: &mut Vec<u8>, mut number: u64) {
    while number >= 128 {
        out.push(number.to_le_bytes()[0] | 128);
        number >>= 7;
    }
    out.push(number.to_le_bytes()[0]);
}

/// A whole number that is not negative.
pub(crate) fn put_number(out: &mut Vec<u8>, field: u64, number: u64) {
    put_key(out, field, VARINT);
    put_varint(out, number);
}

pub(crate) fn put_bool(out: &mut Vec<u8>, field: u64, value: bool) {
    put_number(out, field, u64::from(value));
}

pub(crate) fn put_double(out: &mut Vec<u8>, field: u64, number: f64) {
    put_key(out, field, FIXED64);
    out.extend_from_slice(&number.to_le_bytes());
}

pub(crate) fn put_bytes(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_key(out, field, LENGTH_DELIMITED);
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

pub(crate) fn put_text(out: &mut Vec<u8>, field: u64, text: &str) {
    put_bytes(out, field, text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_those_of_the_documentation() {
        // protobuf.dev: field 1 = 150 is 08 96 01; field 2 = "testing" is 12 07 74 65 73 74 69 6e 67.
        let mut out = Vec::new();
        put_number(&mut out, 1, 150);
        assert_eq!(out, [0x08, 0x96, 0x01]);
        out.clear();
        put_text(&mut out, 2, "testing");
        assert_eq!(out, [0x12, 0x07, 0x74, 0x65, 0x73, 0x74, 0x69, 0x6e, 0x67]);
    }
}
