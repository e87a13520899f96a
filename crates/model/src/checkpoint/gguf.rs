//! GGUF files: checked parsing of header, metadata and tensor table, and exact dequantisation.
//!
//! Everything a file claims is checked before it is believed: counts against the bytes left,
//! products for overflow, offsets against the file's end. A damaged or hostile file gives an
//! [`Error::Field`], never a panic and never an allocation larger than a small multiple of the file.
//!
//! # Source
//!
//! The format: ggml's `docs/gguf.md`, versions 2 and 3. Dequantisation follows, operation by
//! operation, `gguf/quants.py` of the PyPI package `gguf` 0.19.0, so results are equal to the bit.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use fs_err::File;
use tch::{Kind, Tensor};

use super::bytes;
use crate::Error;
use crate::json;
use crate::machine::runtime::dtype_name;

pub use self::metadata::{Metadata, Value};

mod blocks;
mod header;
mod metadata;

use self::header::{HeaderReader, TableEntry};

const MAGIC: &[u8; 4] = b"GGUF";
/// Tensors a file may declare: 70B models have under a thousand.
const MAX_TENSORS: u64 = 1 << 16;
/// Metadata entries a file may declare.
const MAX_ENTRIES: u64 = 1 << 16;
/// Header bytes (metadata and tensor table) a file may have; large vocabularies take about 10 MB.
const MAX_HEADER_BYTES: u64 = 256 << 20;
/// Elements of all metadata arrays together; the largest vocabularies have under a million tokens.
const MAX_ARRAY_ELEMENTS: u64 = 1 << 23;
const MAX_STRING_BYTES: u64 = 16 << 20;
const MAX_NAME_BYTES: u64 = 1 << 16;
const MAX_DIMS: u32 = 4;
const MAX_NESTING: usize = 4;
const ALIGNMENT_KEY: &str = "general.alignment";
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_ALIGNMENT: u64 = 1 << 20;

/// How a GGUF tensor's elements are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(non_camel_case_types, reason = "ggml's own names")]
pub enum GgmlType {
    /// 32-bit floats.
    F32,
    /// 16-bit IEEE floats.
    F16,
    /// bfloat16.
    BF16,
    /// Blocks of 32: f16 scale, 8-bit signed.
    Q8_0,
    /// Blocks of 32: f16 scale, 4-bit minus 8.
    Q4_0,
    /// Blocks of 32: f16 scale and minimum, 4-bit.
    Q4_1,
    /// Blocks of 32: f16 scale, 5-bit minus 16.
    Q5_0,
    /// Blocks of 32: f16 scale and minimum, 5-bit.
    Q5_1,
    /// Blocks of 256: eight 6-bit scales and minima, 4-bit.
    Q4_K,
    /// Blocks of 256: eight 6-bit scales and minima, 5-bit.
    Q5_K,
    /// Blocks of 256: sixteen 8-bit scales, 6-bit minus 32.
    Q6_K,
}

impl GgmlType {
    /// Every type this crate reads, with ggml's number for it.
    const SUPPORTED: [(u32, Self); 11] = [
        (0, Self::F32),
        (1, Self::F16),
        (30, Self::BF16),
        (8, Self::Q8_0),
        (2, Self::Q4_0),
        (3, Self::Q4_1),
        (6, Self::Q5_0),
        (7, Self::Q5_1),
        (12, Self::Q4_K),
        (13, Self::Q5_K),
        (14, Self::Q6_K),
    ];

    fn from_id(id: u32) -> Option<Self> {
        Self::SUPPORTED.iter().find(|(known, _)| *known == id).map(|(_, ggml_type)| *ggml_type)
    }

    /// Elements in one block and the bytes it takes.
    #[must_use]
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::BF16 => (1, 2),
            Self::Q8_0 => (32, 34),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q4_K => (256, 144),
            Self::Q5_K => (256, 176),
            Self::Q6_K => (256, 210),
        }
    }

    /// The dtype [`Gguf::tensor`] gives: the stored one for floats, f32 for quantised blocks.
    #[must_use]
    pub fn kind(self) -> Kind {
        match self {
            Self::F16 => Kind::Half,
            Self::BF16 => Kind::BFloat16,
            _ => Kind::Float,
        }
    }

    fn supported_names() -> String {
        Self::SUPPORTED.map(|(_, ggml_type)| format!("{ggml_type:?}")).join(", ")
    }
}

/// One entry of a GGUF file's tensor table, checked against the file's size.
#[derive(Clone, Debug)]
pub struct GgufTensor {
    /// Rows first, as PyTorch has it (the file stores the reverse).
    pub shape: Vec<i64>,
    /// How the elements are stored.
    pub ggml_type: GgmlType,
    offset: u64,
    n_bytes: u64,
}

impl GgufTensor {
    /// Bytes the tensor takes in the file.
    #[must_use]
    pub fn n_bytes(&self) -> u64 {
        self.n_bytes
    }

    fn row_elements(&self) -> usize {
        self.shape.last().map_or(1, |&n| n as usize)
    }
}

/// An opened GGUF file: its metadata, and tensors read on demand under the names in the file.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    tensors: BTreeMap<String, GgufTensor>,
}

impl Gguf {
    /// Reads and checks header, metadata and tensor table; no tensor data.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the file cannot be read, [`Error::Field`] if anything in it is not as GGUF
    /// has it, or beyond this crate's limits.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = arete_records::files::open_regular(path)?;
        let file_bytes = file.metadata()?.len();
        let mut reader = HeaderReader::new(path, BufReader::new(&file), file_bytes);

        let magic = reader.array::<4>("magic")?;
        if &magic != MAGIC {
            let mut begin = Vec::new();
            File::open(path)?.take(64).read_to_end(&mut begin)?;
            let stand_in = json::stand_in(&begin).map(str::to_owned);
            let found = stand_in.unwrap_or_else(|| format!("{:?}", magic.escape_ascii()));
            return Err(reader.error("magic", "GGUF", found));
        }
        let version = reader.u32("version")?;
        if !(2..=3).contains(&version) {
            let found = match version.swap_bytes() {
                2 | 3 => "a big-endian file".to_owned(),
                _ => version.to_string(),
            };
            return Err(reader.error("version", "2 or 3, little endian", found));
        }
        // A tensor's entry takes at least 24 bytes, a metadata entry at least 13.
        let n_tensors = reader.count("tensor count", MAX_TENSORS, 24)?;
        let n_entries = reader.count("metadata count", MAX_ENTRIES, 13)?;

        let mut entries = HashMap::with_capacity(n_entries);
        for _ in 0..n_entries {
            let key = reader.string("metadata key", MAX_NAME_BYTES)?;
            let value_type = reader.u32(&key)?;
            let value = reader.value(&key, value_type, 0)?;
            if entries.contains_key(&key) {
                return Err(reader.error(&key, "each metadata key once", "it twice"));
            }
            entries.insert(key, value);
        }
        let metadata = Metadata::new(path, entries);
        let alignment = alignment(&metadata)?;

        let mut table = Vec::with_capacity(n_tensors);
        for _ in 0..n_tensors {
            table.push(reader.tensor()?);
        }
        let data_start = reader
            .position
            .checked_next_multiple_of(alignment)
            .filter(|start| *start <= file_bytes || n_tensors == 0)
            .ok_or_else(|| {
                reader.error("tensor data", "to start within the file", "it beyond the end")
            })?;
        let tensors = place_tensors(path, table, data_start, file_bytes, alignment)?;
        drop(reader);
        Ok(Self { path: path.to_path_buf(), file, metadata, tensors })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The key–value metadata: hyper-parameters, tokenizer, chat template.
    #[must_use]
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The tensor table, by the file's own names (`blk.0.attn_q.weight`).
    #[must_use]
    pub fn tensors(&self) -> &BTreeMap<String, GgufTensor> {
        &self.tensors
    }

    /// One tensor: stored floats as they are, quantised blocks as f32.
    ///
    /// # Shapes
    ///
    /// - output: the table's shape, on the CPU; dtype [`GgmlType::kind`].
    ///
    /// # Errors
    ///
    /// [`Error::MissingTensor`], [`Error::Io`] if the file cannot be read, or [`Error::Field`] naming the tensor if a number in
    /// it is NaN or infinite.
    ///
    /// # Source
    ///
    /// `gguf.quants.dequantize` of the PyPI package `gguf` 0.19.0, equal to the bit.
    pub fn tensor(&self, name: &str) -> Result<Tensor, Error> {
        let kind = self.entry(name)?.ggml_type.kind();
        self.tensor_as(name, kind, None)
    }

    /// Like [`tensor`](Self::tensor), in another float dtype (each element rounded once, to nearest
    /// even) and with rotary rows put back in halves.
    ///
    /// GGUF files of the llama family store the rows of Q and K in pairs `(i, i + E/2)` per head,
    /// for interleaved RoPE; with `unpermute_heads = Some(heads)` the rows come out as transformers
    /// has them.
    ///
    /// # Shapes
    ///
    /// - output: the table's shape, on the CPU; dtype `kind`.
    ///
    /// # Errors
    ///
    /// [`Error::MissingTensor`], [`Error::Io`], [`Error::Field`] if the rows are not `heads` heads
    /// of even size, or [`Error::Invalid`] if `kind` is not f32, bf16 or f16.
    ///
    /// # Source
    ///
    /// The inverse of `LlamaModel.permute` in llama.cpp's `convert_hf_to_gguf.py`.
    pub fn tensor_as(
        &self,
        name: &str,
        kind: Kind,
        unpermute_heads: Option<usize>,
    ) -> Result<Tensor, Error> {
        let shape = self.entry(name)?.shape.clone();
        self.filled(&[(name, unpermute_heads)], &shape, kind)
    }

    /// Matrices with the same number of columns, one below the other, each as [`Gguf::tensor_as`] has it: converted
    /// straight into their place, without a copy.
    ///
    /// # Errors
    ///
    /// As [`Gguf::tensor_as`]; [`Error::Field`] if they do not fit below each other.
    pub fn stacked(&self, parts: &[(&str, Option<usize>)], kind: Kind) -> Result<Tensor, Error> {
        let (mut n_rows, mut n_columns) = (0, None);
        for (name, _) in parts {
            match (self.entry(name)?.shape.as_slice(), n_columns) {
                (&[rows, columns], expected) if expected.is_none_or(|n| n == columns) => {
                    n_rows += rows;
                    n_columns = Some(columns);
                }
                (found, _) => {
                    let (expected, found) =
                        ("a matrix as wide as the others", format!("{found:?}"));
                    return Err(Error::field(&self.path, *name, expected, found));
                }
            }
        }
        self.filled(parts, &[n_rows, n_columns.unwrap_or(0)], kind)
    }

    /// A tensor of `shape` filled by `parts`, one after the other.
    fn filled(
        &self,
        parts: &[(&str, Option<usize>)],
        shape: &[i64],
        kind: Kind,
    ) -> Result<Tensor, Error> {
        match kind {
            Kind::Float => bytes::filled::<f32>(shape, kind, |out| {
                self.fill_parts(parts, kind, out, |entry, row, out| {
                    entry.ggml_type.to_f32(row, out);
                    out.iter().fold(true, |all, number| all & number.is_finite())
                })
            }),
            Kind::BFloat16 | Kind::Half => bytes::filled::<u16>(shape, kind, |out| {
                self.fill_parts(parts, kind, out, |entry, row, out| {
                    if entry.ggml_type.kind() == kind {
                        for (out, stored) in out.iter_mut().zip(row.as_chunks::<2>().0) {
                            *out = u16::from_le_bytes(*stored);
                        }
                    } else {
                        let mut wide = vec![0f32; entry.row_elements()];
                        entry.ggml_type.to_f32(row, &mut wide);
                        blocks::round(&wide, kind, out);
                    }
                    let exponent = if kind == Kind::Half { 0x7C00 } else { 0x7F80 };
                    out.iter().fold(true, |all, bits| all & (bits & exponent != exponent))
                })
            }),
            other => Err(Error::Invalid {
                name: "kind",
                expected: "Float, BFloat16 or Half".to_owned(),
                got: format!("{other:?}"),
            }),
        }
    }

    fn fill_parts<T: bytes::Plain>(
        &self,
        parts: &[(&str, Option<usize>)],
        kind: Kind,
        mut out: &mut [T],
        convert: impl Fn(&GgufTensor, &[u8], &mut [T]) -> bool + Sync,
    ) -> Result<(), Error> {
        for (name, unpermute_heads) in parts {
            let entry = self.entry(name)?;
            let n: i64 = entry.shape.iter().product();
            let (part, rest) = out.split_at_mut(n as usize);
            let head_rows = self.head_rows(name, entry, *unpermute_heads)?;
            let all_finite =
                self.fill(entry, head_rows, part, |row, out| convert(entry, row, out))?;
            if !all_finite {
                let expected = format!("finite numbers that fit {}", dtype_name(kind));
                return Err(Error::field(&self.path, *name, expected, "NaN or an infinity"));
            }
            out = rest;
        }
        Ok(())
    }

    /// Rows of a head, where the rows of `heads` heads are stored in another order; else 1.
    fn head_rows(
        &self,
        name: &str,
        entry: &GgufTensor,
        heads: Option<usize>,
    ) -> Result<usize, Error> {
        let rows = entry.n_bytes as usize / row_bytes(entry).max(1);
        match heads {
            None => Ok(1),
            Some(heads) if heads > 0 && rows.is_multiple_of(2 * heads) => Ok(rows / heads),
            Some(heads) => {
                let (expected, found) =
                    (format!("rows for {heads} heads of even size"), format!("{rows} rows"));
                Err(Error::field(&self.path, name, expected, found))
            }
        }
    }

    /// The bytes of one tensor as stored (quantised blocks included).
    ///
    /// # Errors
    ///
    /// [`Error::MissingTensor`], or [`Error::Io`] if the file cannot be read.
    pub fn raw(&self, name: &str) -> Result<Vec<u8>, Error> {
        let entry = self.entry(name)?;
        let mut stored = vec![0; entry.n_bytes as usize];
        bytes::read_at(&self.file, entry.offset, &mut stored)?;
        Ok(stored)
    }

    fn entry(&self, name: &str) -> Result<&GgufTensor, Error> {
        self.tensors
            .get(name)
            .ok_or_else(|| Error::MissingTensor { path: self.path.clone(), name: name.to_owned() })
    }

    /// Reads the rows of `entry` and converts each into its place in `out`, on every core; whether `convert` found all numbers
    /// finite.
    ///
    /// Within each group of `head_rows` rows, pairs become halves (no effect for groups of 1).
    fn fill<T: bytes::Plain>(
        &self,
        entry: &GgufTensor,
        head_rows: usize,
        out: &mut [T],
        convert: impl Fn(&[u8], &mut [T]) -> bool + Sync,
    ) -> Result<bool, Error> {
        /// Small enough for the cache, large enough to amortise a read.
        const TARGET_BYTES: usize = 1 << 20;
        /// Below this, starting a thread costs more than it saves.
        const PARALLEL_ELEMENTS: usize = 1 << 17;
        let row_bytes = row_bytes(entry);
        let n_cols = entry.row_elements();
        let group_bytes = row_bytes * head_rows;
        let groups_per_read = (TARGET_BYTES / group_bytes.max(1)).max(1);

        let convert_span = |first_row: usize, out: &mut [T]| -> Result<bool, Error> {
            let (mut stored, mut all_finite) = (Vec::new(), true);
            let mut row = first_row;
            for out in out.chunks_mut(groups_per_read * head_rows * n_cols) {
                let n_rows = out.len() / n_cols;
                stored.resize(n_rows * row_bytes, 0);
                let offset = entry.offset + (row * row_bytes) as u64;
                bytes::read_at(&self.file, offset, &mut stored)?;
                for (i, stored) in stored.chunks_exact(row_bytes).enumerate() {
                    let place = halves_place(i, head_rows);
                    all_finite &= convert(stored, &mut out[place * n_cols..(place + 1) * n_cols]);
                }
                row += n_rows;
            }
            Ok(all_finite)
        };

        let n_groups = out.len() / (head_rows * n_cols).max(1);
        let n_threads = if out.len() < PARALLEL_ELEMENTS {
            1
        } else {
            std::thread::available_parallelism().map_or(1, usize::from)
        };
        let rows_per_thread = n_groups.div_ceil(n_threads).max(1) * head_rows;
        if n_threads == 1 {
            return convert_span(0, out);
        }
        let convert_span = &convert_span;
        std::thread::scope(|scope| {
            let threads: Vec<_> = out
                .chunks_mut(rows_per_thread * n_cols)
                .enumerate()
                .map(|(i, out)| scope.spawn(move || convert_span(i * rows_per_thread, out)))
                .collect();
            threads.into_iter().try_fold(true, |all, thread| {
                Ok(thread.join().expect("row conversion does not panic")? && all)
            })
        })
    }
}

/// Where row `i` of a group of `head_rows` goes: pairs `(2j, 2j + 1)` become halves `(j, j + head_rows / 2)`.
fn halves_place(i: usize, head_rows: usize) -> usize {
    if head_rows == 1 {
        return i;
    }
    let (group, row) = (i / head_rows, i % head_rows);
    group * head_rows + row / 2 + (row % 2) * (head_rows / 2)
}

/// Bytes of one row as stored.
fn row_bytes(entry: &GgufTensor) -> usize {
    let (elements, n_bytes) = entry.ggml_type.block();
    entry.row_elements() / elements * n_bytes
}

/// `general.alignment`: a power of two of at least 8.
fn alignment(metadata: &Metadata) -> Result<u64, Error> {
    let alignment = match metadata.optional_size(ALIGNMENT_KEY)? {
        None => DEFAULT_ALIGNMENT,
        Some(value) => value as u64,
    };
    if !alignment.is_power_of_two() || !(8..=MAX_ALIGNMENT).contains(&alignment) {
        return Err(Error::field(
            metadata.path(),
            ALIGNMENT_KEY,
            format!("a power of two from 8 to {MAX_ALIGNMENT}"),
            alignment.to_string(),
        ));
    }
    Ok(alignment)
}

/// Checks that every tensor lies within the file, once.
fn place_tensors(
    path: &Path,
    table: Vec<TableEntry>,
    data_start: u64,
    file_bytes: u64,
    alignment: u64,
) -> Result<BTreeMap<String, GgufTensor>, Error> {
    let mut tensors = BTreeMap::new();
    for entry in table {
        let TableEntry { name, shape, ggml_type, offset, n_bytes } = entry;
        if !offset.is_multiple_of(alignment) {
            let expected = format!("an offset that is a multiple of {alignment}");
            return Err(Error::field(path, name, expected, offset.to_string()));
        }
        let end = data_start.checked_add(offset).and_then(|start| start.checked_add(n_bytes));
        if end.is_none_or(|end| end > file_bytes) {
            return Err(Error::field(
                path,
                name,
                format!("data within the file's {file_bytes} bytes"),
                format!("{n_bytes} bytes at {offset} after {data_start}"),
            ));
        }
        let tensor = GgufTensor { shape, ggml_type, offset: data_start + offset, n_bytes };
        if tensors.insert(name.clone(), tensor).is_some() {
            return Err(Error::field(path, name, "each tensor once", "it twice"));
        }
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests;
