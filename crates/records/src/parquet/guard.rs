//! Refuses Parquet files that claim more than their size makes plausible, before the library
//! allocates what they claim.
//!
//! The `parquet` crate trusts a few numbers of a file: the children of a schema element, the
//! length of a list, the unpacked size of a page, the number of values behind one repeated
//! dictionary entry. Each turns a file of some hundred bytes into gigabytes of memory. Here the
//! footer and every page header are walked first, with nothing allocated from a claimed number.

use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use parquet::basic::Type as PhysicalType;
use parquet::column::page::Page;
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData};
use parquet::file::reader::FileReader;
use parquet::file::serialized_reader::SerializedFileReader;

use crate::Error;

/// How a Parquet file begins and ends.
pub(super) const MAGIC: &[u8] = b"PAR1";

/// `PAR1` at both ends, and the footer's length.
const MIN_FILE_BYTES: u64 = 12;
const MAX_FOOTER_BYTES: u64 = 16 << 20;
const MAX_SCHEMA_ELEMENTS: u64 = 4096;
const MAX_SCHEMA_DEPTH: usize = 24;
const MAX_LIST_OF_STRUCTS: u64 = 1 << 16;
const MAX_COLUMN_CHUNKS: u64 = 200_000;
const MAX_PAGE_BYTES: u64 = 512 << 20;
/// Nesting of Thrift structs; Parquet's own is 6.
const MAX_THRIFT_DEPTH: usize = 16;

/// How much a file may hold, given its size in bytes.
struct Budget {
    n_rows: u64,
    n_values: u64,
    unpacked_bytes: u64,
    text_bytes: u64,
}

impl Budget {
    fn of(file_bytes: u64) -> Self {
        Self {
            n_rows: 100_000 + 16 * file_bytes,
            n_values: 1_000_000 + 64 * file_bytes,
            unpacked_bytes: (64 << 20) + 256 * file_bytes,
            text_bytes: (64 << 20) + 256 * file_bytes,
        }
    }
}

/// Walks the footer: magic, length, nesting, list lengths, shape of the schema tree.
pub(super) fn check_footer(path: &Path, file: &fs_err::File) -> Result<(), Error> {
    let file_bytes = file.metadata()?.len();
    let damaged = |what: &str, expected: String, got: String| Error::Damaged {
        path: path.to_owned(),
        what: what.to_owned(),
        expected,
        got,
    };
    if file_bytes < MIN_FILE_BYTES {
        return Err(damaged(
            "file size",
            format!("at least {MIN_FILE_BYTES} bytes of Parquet"),
            file_bytes.to_string(),
        ));
    }
    let mut tail = [0u8; 8];
    read_at(path, file, file_bytes - 8, &mut tail)?;
    if tail[4..] != *MAGIC {
        return Err(damaged(
            "last four bytes",
            "PAR1 (is this Parquet, and complete?)".to_owned(),
            format!("{:?}", String::from_utf8_lossy(&tail[4..])),
        ));
    }
    let footer_bytes = u64::from(u32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]));
    let limit = MAX_FOOTER_BYTES.min(file_bytes - 8);
    if footer_bytes > limit {
        let expected = format!("at most {limit} bytes");
        return Err(damaged("footer length", expected, footer_bytes.to_string()));
    }
    let mut footer = vec![0u8; usize::try_from(footer_bytes).expect("at most 16 MiB")];
    read_at(path, file, file_bytes - 8 - footer_bytes, &mut footer)?;
    walk_footer(&mut Thrift { bytes: &footer, at: 0 }).map_err(|bad| bad.in_file(path, "footer"))
}

/// Walks every page header, and adds up rows, values, unpacked bytes and repeated text.
pub(super) fn check_contents(
    path: &Path,
    file: &std::fs::File,
    metadata: &ParquetMetaData,
) -> Result<(), Error> {
    let file_bytes = file.metadata()?.len();
    let budget = Budget::of(file_bytes);
    let (mut n_rows, mut n_values, mut unpacked_bytes, mut text_bytes) = (0u64, 0u64, 0u64, 0u64);
    let reader = SerializedFileReader::new(file.try_clone()?)
        .map_err(|error| super::parquet_error(path, &error))?;
    let within = |what: &str, got: u64, limit: u64| {
        if got <= limit {
            return Ok(());
        }
        Err(Error::Damaged {
            path: path.to_owned(),
            what: what.to_owned(),
            expected: format!("at most {limit} in a file of {file_bytes} bytes"),
            got: got.to_string(),
        })
    };
    for (group_idx, group) in metadata.row_groups().iter().enumerate() {
        let rows = u64::try_from(group.num_rows()).unwrap_or(u64::MAX);
        n_rows = n_rows.saturating_add(rows);
        within("number of rows", n_rows, budget.n_rows)?;
        for (column_idx, column) in group.columns().iter().enumerate() {
            let name = column.column_path().string();
            let bytes = column_chunk(path, file, file_bytes, &name, column)?;
            let pages = walk_pages(&bytes)
                .map_err(|bad| bad.in_file(path, &format!("pages of column `{name}`")))?;
            if u64::try_from(column.num_values()) != Ok(pages.n_values) {
                return Err(Error::Damaged {
                    path: path.to_owned(),
                    what: format!("number of values of column `{name}`"),
                    expected: format!("{}, as its pages hold", pages.n_values),
                    got: column.num_values().to_string(),
                });
            }
            n_values = n_values.saturating_add(pages.n_values);
            unpacked_bytes = unpacked_bytes.saturating_add(pages.unpacked_bytes);
            within("number of values", n_values, budget.n_values)?;
            within("size of the unpacked pages", unpacked_bytes, budget.unpacked_bytes)?;
            let longest = match column.column_type() {
                PhysicalType::BYTE_ARRAY if pages.has_dictionary => {
                    let group = reader
                        .get_row_group(group_idx)
                        .map_err(|error| super::parquet_error(path, &error))?;
                    let mut reader = group
                        .get_column_page_reader(column_idx)
                        .map_err(|error| super::parquet_error(path, &error))?;
                    match reader.get_next_page() {
                        Ok(Some(Page::DictionaryPage { buf, .. })) => longest_entry(&buf),
                        Ok(_) => 0,
                        Err(error) => return Err(super::parquet_error(path, &error)),
                    }
                }
                PhysicalType::FIXED_LEN_BYTE_ARRAY => {
                    u64::try_from(column.column_descr().type_length()).unwrap_or(u64::MAX)
                }
                _ => 0,
            };
            text_bytes = text_bytes
                .saturating_add(pages.n_values.saturating_mul(longest))
                // A record as an object repeats the names of its columns.
                .saturating_add(pages.n_values.saturating_mul(name.len().saturating_sub(64) as u64))
                .saturating_add(pages.shared_prefix_bytes);
            within("size of the repeated text", text_bytes, budget.text_bytes)?;
        }
    }
    Ok(())
}

fn column_chunk(
    path: &Path,
    file: &std::fs::File,
    file_bytes: u64,
    name: &str,
    column: &ColumnChunkMetaData,
) -> Result<Vec<u8>, Error> {
    let first = match column.dictionary_page_offset() {
        // A column without values has no data page, whose offset is then 0.
        Some(offset) if offset > 0 && column.data_page_offset() > 0 => {
            offset.min(column.data_page_offset())
        }
        Some(offset) if offset > 0 => offset,
        _ => column.data_page_offset(),
    };
    let range = u64::try_from(first).ok().zip(u64::try_from(column.compressed_size()).ok());
    let Some((start, length)) =
        range.filter(|(start, n)| start.checked_add(*n).is_some_and(|end| end <= file_bytes))
    else {
        return Err(Error::Damaged {
            path: path.to_owned(),
            what: format!("position of column `{name}`"),
            expected: format!("inside the file's {file_bytes} bytes"),
            got: format!("{} bytes at {first}", column.compressed_size()),
        });
    };
    let mut bytes = vec![0u8; usize::try_from(length).expect("no longer than the file")];
    read_at(path, file, start, &mut bytes)?;
    Ok(bytes)
}

fn read_at(
    path: &Path,
    mut file: impl Read + Seek,
    start: u64,
    bytes: &mut [u8],
) -> Result<(), Error> {
    let read = file.seek(SeekFrom::Start(start)).and_then(|_| file.read_exact(bytes));
    read.map_err(|error| {
        let text = format!("reading {}: {error}", path.display());
        std::io::Error::new(error.kind(), text).into()
    })
}

/// Length of the longest entry of a dictionary page of strings: each is a little-endian u32 length
/// and that many bytes.
fn longest_entry(mut page: &[u8]) -> u64 {
    let mut longest = 0;
    while let Some((length, rest)) = page.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        let Some(rest) = rest.get(length..) else { break };
        longest = longest.max(length as u64);
        page = rest;
    }
    longest
}

/// What is wrong with a footer or page header.
#[derive(Debug)]
struct Bad {
    what: &'static str,
    expected: String,
    got: String,
}

impl Bad {
    fn in_file(self, path: &Path, part: &str) -> Error {
        Error::Damaged {
            path: path.to_owned(),
            what: format!("{part}: {}", self.what),
            expected: self.expected,
            got: self.got,
        }
    }

    fn above(what: &'static str, got: u64, limit: u64) -> Result<(), Self> {
        if got <= limit {
            return Ok(());
        }
        Err(Self { what, expected: format!("at most {limit}"), got: got.to_string() })
    }
}

/// `FileMetaData`: field 2 is the flattened schema tree, field 4 the row groups.
fn walk_footer(thrift: &mut Thrift<'_>) -> Result<(), Bad> {
    let mut n_chunks = 0;
    let mut last_id = 0;
    while let Some((id, kind)) = thrift.field(&mut last_id)? {
        match (id, kind) {
            (2, LIST) => walk_schema(thrift)?,
            (4, LIST) => {
                let (n_groups, kind) = thrift.list()?;
                Bad::above("number of row groups", n_groups, MAX_COLUMN_CHUNKS)?;
                if kind != STRUCT {
                    return Err(Thrift::unexpected("a list of row groups", kind));
                }
                for _ in 0..n_groups {
                    let mut last_id = 0;
                    while let Some((id, kind)) = thrift.field(&mut last_id)? {
                        if (id, kind) == (1, LIST) {
                            let (n_columns, kind) = thrift.list()?;
                            n_chunks += n_columns;
                            Bad::above("number of column chunks", n_chunks, MAX_COLUMN_CHUNKS)?;
                            for _ in 0..n_columns {
                                thrift.skip(kind, 0)?;
                            }
                        } else {
                            thrift.skip(kind, 0)?;
                        }
                    }
                }
            }
            _ => thrift.skip(kind, 0)?,
        }
    }
    Ok(())
}

/// The schema is a tree written depth first; each element says how many children follow it.
fn walk_schema(thrift: &mut Thrift<'_>) -> Result<(), Bad> {
    let (n_elements, kind) = thrift.list()?;
    Bad::above("number of schema elements", n_elements, MAX_SCHEMA_ELEMENTS)?;
    if kind != STRUCT {
        return Err(Thrift::unexpected("a list of schema elements", kind));
    }
    // Children still to come, of each open element from the root down.
    let mut open: Vec<u64> = Vec::new();
    for element in 0..n_elements {
        let mut n_children = 0u64;
        let mut last_id = 0;
        while let Some((id, kind)) = thrift.field(&mut last_id)? {
            if (id, kind) == (5, I32) {
                let count = thrift.int()?;
                n_children = u64::try_from(count).map_err(|_| Bad {
                    what: "children of a schema element",
                    expected: "at least 0".to_owned(),
                    got: count.to_string(),
                })?;
            } else {
                thrift.skip(kind, 0)?;
            }
        }
        let left = n_elements - element - 1;
        Bad::above("children of a schema element", n_children, left)?;
        match open.last_mut() {
            Some(parent) => *parent -= 1,
            None if element == 0 => {}
            None => {
                return Err(Bad {
                    what: "schema tree",
                    expected: "one root".to_owned(),
                    got: "more elements after its last child".to_owned(),
                });
            }
        }
        open.push(n_children);
        Bad::above("depth of the schema", open.len() as u64, MAX_SCHEMA_DEPTH as u64)?;
        while open.last() == Some(&0) {
            open.pop();
        }
    }
    if open.is_empty() {
        return Ok(());
    }
    Err(Bad {
        what: "schema tree",
        expected: "as many elements as its counts of children say".to_owned(),
        got: "fewer".to_owned(),
    })
}

/// What the page headers of a column chunk add up to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Pages {
    n_values: u64,
    unpacked_bytes: u64,
    has_dictionary: bool,
    /// Most bytes that pages of `DELTA_BYTE_ARRAY` (each value may repeat the one before) can
    /// unfold to.
    shared_prefix_bytes: u64,
}

/// `PageHeader`: 2 and 3 are sizes, 5 and 8 the headers of data pages, 7 that of a dictionary.
fn walk_pages(bytes: &[u8]) -> Result<Pages, Bad> {
    const DELTA_BYTE_ARRAY: i64 = 7;
    let mut pages = Pages::default();
    let mut thrift = Thrift { bytes, at: 0 };
    while thrift.at < bytes.len() {
        let (mut unpacked, mut packed, mut n_values, mut encoding) = (-1, -1, 0, 0);
        let mut last_id = 0;
        while let Some((id, kind)) = thrift.field(&mut last_id)? {
            match (id, kind) {
                (2, I32) => unpacked = thrift.int()?,
                (3, I32) => packed = thrift.int()?,
                (5 | 8, STRUCT) => {
                    let encoding_id = if id == 5 { 2 } else { 4 };
                    let mut last_id = 0;
                    while let Some((id, kind)) = thrift.field(&mut last_id)? {
                        match (id, kind) {
                            (1, I32) => n_values = thrift.int()?,
                            (id, I32) if id == encoding_id => encoding = thrift.int()?,
                            _ => thrift.skip(kind, 0)?,
                        }
                    }
                }
                (7, STRUCT) => {
                    pages.has_dictionary = true;
                    thrift.skip(kind, 0)?;
                }
                _ => thrift.skip(kind, 0)?,
            }
        }
        let left = (bytes.len() - thrift.at) as u64;
        let packed = u64::try_from(packed).unwrap_or(u64::MAX);
        let unpacked = u64::try_from(unpacked).unwrap_or(u64::MAX);
        let n_values = u64::try_from(n_values).unwrap_or(u64::MAX);
        Bad::above("packed size of a page", packed, left)?;
        Bad::above("unpacked size of a page", unpacked, MAX_PAGE_BYTES)?;
        thrift.at += usize::try_from(packed).expect("no longer than the slice");
        pages.unpacked_bytes = pages.unpacked_bytes.saturating_add(unpacked);
        pages.n_values = pages.n_values.saturating_add(n_values);
        if encoding == DELTA_BYTE_ARRAY {
            pages.shared_prefix_bytes =
                pages.shared_prefix_bytes.saturating_add(n_values.saturating_mul(unpacked));
        }
    }
    Ok(pages)
}

const I32: u8 = 5;
const LIST: u8 = 9;
const STRUCT: u8 = 12;

/// A reader of Thrift's compact protocol that allocates nothing.
struct Thrift<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Thrift<'_> {
    /// The next field's id and type, or none at the end of the struct.
    fn field(&mut self, last_id: &mut i64) -> Result<Option<(i64, u8)>, Bad> {
        let header = self.byte()?;
        if header == 0 {
            return Ok(None);
        }
        *last_id = match header >> 4 {
            0 => self.int()?,
            delta => last_id.saturating_add(i64::from(delta)),
        };
        Ok(Some((*last_id, header & 15)))
    }

    /// A list's length (at most the bytes that are left) and type of element.
    fn list(&mut self) -> Result<(u64, u8), Bad> {
        let header = self.byte()?;
        let length = match header >> 4 {
            15 => self.varint()?,
            short => u64::from(short),
        };
        Bad::above("length of a list", length, (self.bytes.len() - self.at) as u64)?;
        Ok((length, header & 15))
    }

    fn skip(&mut self, kind: u8, depth: usize) -> Result<(), Bad> {
        Bad::above("depth of nesting", depth as u64, MAX_THRIFT_DEPTH as u64)?;
        match kind {
            1 | 2 => {} // a boolean field's value is its type
            3 => self.skip_bytes(1)?,
            4..=6 => {
                self.varint()?;
            }
            7 => self.skip_bytes(8)?,
            8 => {
                let length = self.varint()?;
                self.skip_bytes(length)?;
            }
            9 | 10 => {
                let (length, kind) = self.list()?;
                if kind == STRUCT {
                    Bad::above("length of a list", length, MAX_LIST_OF_STRUCTS)?;
                }
                for _ in 0..length {
                    // In a list, unlike in a struct, a boolean takes a byte.
                    if kind <= 2 { self.skip_bytes(1)? } else { self.skip(kind, depth + 1)? }
                }
            }
            12 => {
                let mut last_id = 0;
                while let Some((_, kind)) = self.field(&mut last_id)? {
                    self.skip(kind, depth + 1)?;
                }
            }
            // Parquet has no maps.
            other => return Err(Self::unexpected("a Thrift type that Parquet uses", other)),
        }
        Ok(())
    }

    fn unexpected(expected: &str, kind: u8) -> Bad {
        Bad { what: "field", expected: expected.to_owned(), got: format!("type {kind}") }
    }

    fn skip_bytes(&mut self, length: u64) -> Result<(), Bad> {
        let left = (self.bytes.len() - self.at) as u64;
        Bad::above("length of a value", length, left)?;
        self.at += usize::try_from(length).expect("no longer than the slice");
        Ok(())
    }

    fn int(&mut self) -> Result<i64, Bad> {
        let zigzag = self.varint()?;
        Ok((zigzag >> 1).cast_signed() ^ -(zigzag & 1).cast_signed())
    }

    fn varint(&mut self) -> Result<u64, Bad> {
        let mut number = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 127) << shift;
            if byte < 128 {
                return Ok(number);
            }
        }
        Err(Bad { what: "number", expected: "at most 10 bytes".to_owned(), got: "more".to_owned() })
    }

    fn byte(&mut self) -> Result<u8, Bad> {
        let byte = self.bytes.get(self.at).copied().ok_or_else(|| Bad {
            what: "end",
            expected: "more bytes".to_owned(),
            got: format!("{} bytes in all", self.bytes.len()),
        })?;
        self.at += 1;
        Ok(byte)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A field of type i32 or i64 `delta` ids after the last one.
    fn int(delta: u8, number: u64) -> Vec<u8> {
        [vec![delta << 4 | I32], varint(number << 1)].concat()
    }

    fn varint(mut number: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        while number >= 128 {
            bytes.push((number % 128) as u8 | 128);
            number /= 128;
        }
        bytes.push(number as u8);
        bytes
    }

    fn list(length: usize, kind: u8) -> Vec<u8> {
        [vec![0xf0 | kind], varint(length as u64)].concat()
    }

    /// `FileMetaData` with a schema of elements that have so many children.
    fn footer(children: &[u64]) -> Vec<u8> {
        let mut bytes = vec![0x20 | LIST]; // field 2
        bytes.extend(list(children.len(), STRUCT));
        for &n in children {
            bytes.extend(int(5, n));
            bytes.push(0);
        }
        bytes.push(0);
        bytes
    }

    fn walk(bytes: &[u8]) -> Result<(), Bad> {
        walk_footer(&mut Thrift { bytes, at: 0 })
    }

    #[track_caller]
    fn refuses(bytes: &[u8], what: &str) {
        let bad = walk(bytes).unwrap_err();
        assert!(bad.what.contains(what), "{bad:?}");
    }

    #[test]
    fn schema_trees_must_add_up() {
        walk(&footer(&[2, 0, 1, 0])).unwrap();
        walk(&footer(&[0])).unwrap();
        refuses(&footer(&[2, 0]), "children"); // one is missing
        refuses(&footer(&[2, 1, 0]), "schema tree");
        refuses(&footer(&[1, 0, 0]), "schema tree"); // one too many
        refuses(&footer(&[0x3fff_ffff, 0]), "children"); // gigabytes, if believed
    }

    #[test]
    fn deep_schemas_are_refused() {
        let chain = |depth: usize| {
            let mut children = vec![1; depth];
            children.push(0);
            footer(&children)
        };
        walk(&chain(10)).unwrap();
        refuses(&chain(1000), "depth of the schema");
        refuses(&chain(100_000), "number of schema elements");
    }

    #[test]
    fn negative_children_are_refused() {
        let mut bytes = vec![0x20 | LIST];
        bytes.extend(list(1, STRUCT));
        bytes.extend([5 << 4 | I32, 1, 0, 0]); // zigzag 1 = −1
        refuses(&bytes, "children");
    }

    #[test]
    fn claimed_lengths_are_checked_against_what_is_there() {
        let mut bytes = vec![0x20 | LIST];
        bytes.extend(list(usize::MAX >> 1, STRUCT));
        refuses(&bytes, "length of a list");
        let mut bytes = vec![0x60 | 8]; // field 6: created_by
        bytes.extend(varint(u64::MAX));
        refuses(&bytes, "length of a value");
        refuses(&[0x10 | I32, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1], "number");
        refuses(&[0x10 | 11, 1], "field"); // a map
    }

    #[test]
    fn endless_nesting_is_refused() {
        refuses(&[0x10 | STRUCT; 5000], "depth of nesting");
        refuses(&[&[0x10 | LIST][..], &[0x10 | LIST; 5000]].concat(), "depth of nesting");
    }

    /// A page header (data page, version 1) followed by so many zero bytes.
    fn page(unpacked: u64, packed: u64, n_values: u64, encoding: u64) -> Vec<u8> {
        let mut bytes = int(1, 0);
        bytes.extend(int(1, unpacked));
        bytes.extend(int(1, packed));
        bytes.push(0x20 | STRUCT); // field 5
        bytes.extend(int(1, n_values));
        bytes.extend(int(1, encoding));
        bytes.extend([0, 0]);
        bytes.extend(vec![0; usize::try_from(packed.min(1000)).unwrap()]);
        bytes
    }

    #[test]
    fn pages_add_up() {
        let pages = walk_pages(&[page(100, 10, 7, 0), page(50, 5, 3, 7)].concat()).unwrap();
        let expected = Pages {
            n_values: 10,
            unpacked_bytes: 150,
            has_dictionary: false,
            shared_prefix_bytes: 150,
        };
        assert_eq!(pages, expected);
        assert_eq!(walk_pages(&[]).unwrap(), Pages::default());
    }

    #[test]
    fn a_page_of_two_gigabytes_is_refused() {
        // The library would allocate it before reading a byte.
        let bad = walk_pages(&page(0x7fff_ffff, 10, 1, 0)).unwrap_err();
        assert_eq!(bad.what, "unpacked size of a page");
        let bad = walk_pages(&page(10, 5000, 1, 0)).unwrap_err();
        assert_eq!(bad.what, "packed size of a page");
        let negative = [0x20 | I32, 1, 0x10 | I32, 1, 0];
        assert_eq!(walk_pages(&negative).unwrap_err().what, "packed size of a page");
        // A header without sizes claims nothing it could be checked against.
        assert!(walk_pages(&[0]).is_err());
    }

    #[test]
    fn the_longest_entry_of_a_dictionary() {
        let page = [&3u32.to_le_bytes()[..], b"abc", &1u32.to_le_bytes(), b"d"].concat();
        assert_eq!(longest_entry(&page), 3);
        assert_eq!(longest_entry(&[]), 0);
        assert_eq!(longest_entry(&u32::MAX.to_le_bytes()), 0); // cut: the library refuses it
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]
        #[test]
        fn no_bytes_make_it_panic_or_hang(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = walk(&bytes);
            let _ = walk_pages(&bytes);
            let _ = longest_entry(&bytes);
        }
    }

    #[test]
    fn a_disk_that_fails_is_told_with_the_path() {
        let dir = tempfile::tempdir().unwrap();
        // A folder can be opened, and refuses to be read.
        let folder = fs_err::File::open(dir.path()).unwrap();
        let error = read_at(Path::new("a.parquet"), folder, 0, &mut [0; 4]).unwrap_err();
        assert!(matches!(error, Error::Io(_)), "{error}");
        assert!(error.to_string().contains("reading a.parquet: "), "{error}");
    }
}
