//! Checksums of 32 bits by cyclic redundancy, low bit first: of event files.

/// What a byte does to a sum.
pub(crate) type Table = [u32; 256];

/// The table of a reflected polynomial.
pub(crate) const fn table(polynomial: u32) -> Table {
    let mut table = [0u32; 256];
    let mut index = 0;
    while index < 256 {
        let mut crc = index as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ polynomial } else { crc >> 1 };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
}

/// The sum of some bytes.
pub(crate) fn of(bytes: &[u8], table: &Table) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| crc >> 8 ^ table[(crc.to_le_bytes()[0] ^ byte) as usize])
}
