//! How vocabularies spell bytes and spaces.

/// SentencePiece's stand-in for a space.
pub(super) const METASPACE: &str = "▁";

/// `text` in GPT-2's byte alphabet: a printable character per UTF-8 byte.
pub(super) fn of_bytes(text: &str) -> String {
    text.bytes().map(of_byte).collect()
}

/// GPT-2's `bytes_to_unicode`: printable Latin-1 stands for itself, the other 68 bytes follow in
/// order from U+0100.
pub(super) fn of_byte(byte: u8) -> char {
    let n_before = |first: u8| u32::from(byte - first);
    let shifted = match byte {
        0..=0x20 => 0x100 + n_before(0),
        0x7F..=0xA0 => 0x121 + n_before(0x7F),
        0xAD => 0x143,
        _ => u32::from(byte),
    };
    char::from_u32(shifted).expect("below U+0144, where every value is a character")
}
