//! The header of a GGUF file, read without believing it.

use std::io::Read;
use std::path::Path;

use super::{
    GgmlType, MAX_ARRAY_ELEMENTS, MAX_DIMS, MAX_HEADER_BYTES, MAX_NAME_BYTES, MAX_NESTING,
    MAX_STRING_BYTES, Value,
};
use crate::Error;

/// One entry of the tensor table, before its place in the file is checked.
pub(super) struct TableEntry {
    pub(super) name: String,
    pub(super) shape: Vec<i64>,
    pub(super) ggml_type: GgmlType,
    pub(super) offset: u64,
    pub(super) n_bytes: u64,
}

/// Reads the header field by field; no count is believed before the bytes for it are known to exist.
pub(super) struct HeaderReader<'a, R> {
    path: &'a Path,
    reader: R,
    pub(super) position: u64,
    file_bytes: u64,
    array_elements: u64,
}

impl<'a, R: Read> HeaderReader<'a, R> {
    pub(super) fn new(path: &'a Path, reader: R, file_bytes: u64) -> Self {
        Self { path, reader, position: 0, file_bytes, array_elements: 0 }
    }

    pub(super) fn error(
        &self,
        field: &str,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Error {
        let field: String = field.chars().take(120).collect();
        Error::field(self.path, field, expected, found)
    }

    pub(super) fn left(&self) -> u64 {
        self.file_bytes.min(MAX_HEADER_BYTES).saturating_sub(self.position)
    }

    /// Fills `out` with the next bytes.
    pub(super) fn fill(&mut self, field: &str, out: &mut [u8]) -> Result<(), Error> {
        let n = out.len();
        self.expect_left(field, n as u64)?;
        self.reader.read_exact(out).map_err(|error| {
            self.error(field, format!("{n} bytes"), format!("a read error: {error}"))
        })?;
        self.position += n as u64;
        Ok(())
    }

    pub(super) fn expect_left(&self, field: &str, n: u64) -> Result<(), Error> {
        if n > self.left() {
            let expected = format!("at most {} bytes (the rest of the header)", self.left());
            return Err(self.error(field, expected, format!("{n} bytes")));
        }
        Ok(())
    }

    pub(super) fn array<const N: usize>(&mut self, field: &str) -> Result<[u8; N], Error> {
        let mut out = [0; N];
        self.fill(field, &mut out)?;
        Ok(out)
    }

    pub(super) fn u32(&mut self, field: &str) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }

    pub(super) fn u64(&mut self, field: &str) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }

    /// A count of things that take at least `min_bytes` each.
    pub(super) fn count(
        &mut self,
        field: &str,
        limit: u64,
        min_bytes: u64,
    ) -> Result<usize, Error> {
        let count = self.u64(field)?;
        let limit = limit.min(self.left() / min_bytes);
        if count > limit {
            return Err(self.error(field, format!("at most {limit}"), count.to_string()));
        }
        Ok(count as usize)
    }

    pub(super) fn string(&mut self, field: &str, limit: u64) -> Result<String, Error> {
        let n = self.u64(field)?;
        if n > limit {
            return Err(self.error(field, format!("at most {limit} bytes"), format!("{n} bytes")));
        }
        // Before the allocation, so that a length is no larger than what the file has.
        self.expect_left(field, n)?;
        let mut out = vec![0; n as usize];
        self.fill(field, &mut out)?;
        String::from_utf8(out).map_err(|_| self.error(field, "UTF-8 text", "other bytes"))
    }

    pub(super) fn value(
        &mut self,
        key: &str,
        value_type: u32,
        nesting: usize,
    ) -> Result<Value, Error> {
        Ok(match value_type {
            0 => Value::Unsigned(u64::from(self.array::<1>(key)?[0])),
            1 => Value::Signed(i64::from(i8::from_le_bytes(self.array(key)?))),
            2 => Value::Unsigned(u64::from(u16::from_le_bytes(self.array(key)?))),
            3 => Value::Signed(i64::from(i16::from_le_bytes(self.array(key)?))),
            4 => Value::Unsigned(u64::from(self.u32(key)?)),
            5 => Value::Signed(i64::from(i32::from_le_bytes(self.array(key)?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.array(key)?))),
            7 => match self.array::<1>(key)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => return Err(self.error(key, "0 or 1", other.to_string())),
            },
            8 => Value::String(self.string(key, MAX_STRING_BYTES)?),
            9 => {
                if nesting == MAX_NESTING {
                    let expected = format!("at most {MAX_NESTING} levels of arrays");
                    return Err(self.error(key, expected, "more"));
                }
                let element_type = self.u32(key)?;
                let n = self.count(key, MAX_ARRAY_ELEMENTS, 1)?;
                self.array_elements += n as u64;
                if self.array_elements > MAX_ARRAY_ELEMENTS {
                    let expected = format!("at most {MAX_ARRAY_ELEMENTS} array elements in all");
                    return Err(self.error(key, expected, "more"));
                }
                let mut out = Vec::new();
                for _ in 0..n {
                    out.push(self.value(key, element_type, nesting + 1)?);
                }
                Value::Array(out)
            }
            10 => Value::Unsigned(self.u64(key)?),
            11 => Value::Signed(i64::from_le_bytes(self.array(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            other => {
                return Err(self.error(key, "a value type from 0 to 12", other.to_string()));
            }
        })
    }

    pub(super) fn tensor(&mut self) -> Result<TableEntry, Error> {
        let name = self.string("tensor name", MAX_NAME_BYTES)?;
        let n_dims = self.u32(&name)?;
        if n_dims == 0 || n_dims > MAX_DIMS {
            let expected = format!("1 to {MAX_DIMS} dimensions");
            return Err(self.error(&name, expected, n_dims.to_string()));
        }
        let mut shape = Vec::new();
        let mut elements = 1u64;
        for _ in 0..n_dims {
            let size = self.u64(&name)?;
            elements = match elements.checked_mul(size) {
                Some(n) if size > 0 && n < 1 << 40 => n,
                _ => {
                    return Err(self.error(
                        &name,
                        "sizes above 0, below 2^40 elements",
                        size.to_string(),
                    ));
                }
            };
            shape.push(size as i64);
        }
        shape.reverse(); // the file stores the innermost dimension first
        let id = self.u32(&name)?;
        let Some(ggml_type) = GgmlType::from_id(id) else {
            let expected = format!("a tensor type among {}", GgmlType::supported_names());
            return Err(self.error(&name, expected, format!("ggml type {id}")));
        };
        let (block, block_bytes) = ggml_type.block();
        let columns = *shape.last().expect("at least one dimension") as u64;
        if !columns.is_multiple_of(block as u64) {
            let expected = format!("rows of whole blocks of {block}");
            return Err(self.error(&name, expected, format!("{columns} columns")));
        }
        let n_bytes = elements / block as u64 * block_bytes as u64;
        let offset = self.u64(&name)?;
        Ok(TableEntry { name, shape, ggml_type, offset, n_bytes })
    }
}
