//! Safetensors files: read one tensor at a time, written with the same bytes every time.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use fs_err::File;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use super::bytes;
use crate::Error;

/// Largest accepted header; a 70B model's has under a megabyte.
const MAX_HEADER_BYTES: u64 = 25 << 20;
const MAX_DIMS: usize = 8;

/// Where a tensor lies in the file.
#[derive(Clone, Debug)]
struct Entry {
    kind: Kind,
    shape: Vec<i64>,
    offset: u64,
}

/// An opened file whose header was checked: reading a tensor can only fail on I/O.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    file: File,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

fn kind_of(dtype: &str) -> Option<Kind> {
    Some(match dtype {
        "F64" => Kind::Double,
        "F32" => Kind::Float,
        "F16" => Kind::Half,
        "BF16" => Kind::BFloat16,
        "I64" => Kind::Int64,
        "I32" => Kind::Int,
        "I16" => Kind::Int16,
        "I8" => Kind::Int8,
        "U8" => Kind::Uint8,
        "BOOL" => Kind::Bool,
        _ => return None,
    })
}

fn dtype_of(kind: Kind) -> Option<&'static str> {
    let names = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"];
    names.into_iter().find(|name| kind_of(name) == Some(kind))
}

/// A JSON object that refuses a key given twice, which serde_json would merge.
struct UniqueKeys(Vec<(String, Value)>);

impl<'de> serde::Deserialize<'de> for UniqueKeys {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = UniqueKeys;
            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("an object of tensors")
            }
            fn visit_map<A: serde::de::MapAccess<'de>>(
                self,
                mut map: A,
            ) -> Result<UniqueKeys, A::Error> {
                let mut seen = std::collections::BTreeSet::new();
                let mut out = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, Value>()? {
                    if !seen.insert(key.clone()) {
                        return Err(serde::de::Error::custom(format!("`{key}` is there twice")));
                    }
                    out.push((key, value));
                }
                Ok(UniqueKeys(out))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

impl SafetensorsFile {
    /// Reads and checks the header; no tensor data.
    ///
    /// # Errors
    ///
    /// [`Error::Io`], or [`Error::Field`] for anything that is not as the format has it: header too large, names
    /// twice, unknown dtypes, ranges that do not fit the shapes, holes, overlaps, a file cut short.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path)?;
        let file_bytes = file.metadata()?.len();
        let fail = |field: &str, expected: &str, found: String| {
            Err(Error::field(path, field, expected, found))
        };
        if file_bytes < 8 {
            return fail("file size", "at least 8 bytes", format!("{file_bytes} bytes"));
        }
        let mut length = [0; 8];
        bytes::read_at(&file, 0, &mut length)?;
        let header_bytes = u64::from_le_bytes(length);
        if header_bytes > MAX_HEADER_BYTES.min(file_bytes - 8) {
            let expected = format!("at most {} bytes", MAX_HEADER_BYTES.min(file_bytes - 8));
            return fail("header length", &expected, format!("{header_bytes} bytes"));
        }
        let mut header = vec![0; header_bytes as usize];
        bytes::read_at(&file, 8, &mut header)?;
        let UniqueKeys(pairs) = match serde_json::from_slice(&header) {
            Ok(keys) => keys,
            Err(error) => return fail("header", "a JSON object of tensors", error.to_string()),
        };
        let data_start = 8 + header_bytes;
        let (mut entries, mut metadata) = (BTreeMap::new(), BTreeMap::new());
        let mut ranges = Vec::new();
        for (name, value) in pairs {
            if name == "__metadata__" {
                match serde_json::from_value(value) {
                    Ok(map) => metadata = map,
                    Err(error) => return fail(&name, "strings by name", error.to_string()),
                }
                continue;
            }
            let (entry, range) = parse_entry(path, &name, &value, data_start)?;
            ranges.push((range, name.clone()));
            entries.insert(name, entry);
        }
        ranges.sort();
        let mut end = 0;
        for ([start, stop], name) in ranges {
            if start != end {
                let expected = format!("data from byte {end} on (no holes, no overlaps)");
                return fail(&name, &expected, format!("from byte {start}"));
            }
            end = stop;
        }
        if data_start.checked_add(end) != Some(file_bytes) {
            let expected = format!("{} bytes in all", data_start.saturating_add(end));
            return fail("file size", &expected, format!("{file_bytes} bytes"));
        }
        Ok(Self { path: path.to_path_buf(), file, entries, metadata })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The header's `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Whether a tensor is there.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// A tensor's shape.
    pub fn shape(&self, name: &str) -> Option<&[i64]> {
        self.entries.get(name).map(|entry| entry.shape.as_slice())
    }

    /// A tensor's dtype.
    pub fn kind(&self, name: &str) -> Option<Kind> {
        self.entries.get(name).map(|entry| entry.kind)
    }

    /// Reads one tensor as stored, on the CPU.
    ///
    /// # Errors
    ///
    /// [`Error::MissingTensor`], or [`Error::Io`].
    pub fn tensor(&self, name: &str) -> Result<Tensor, Error> {
        let entry = self.entries.get(name).ok_or_else(|| Error::MissingTensor {
            path: self.path.clone(),
            name: name.to_owned(),
        })?;
        bytes::filled::<u8>(&entry.shape, entry.kind, |out| {
            bytes::read_at(&self.file, entry.offset, out)
        })
    }
}

/// One header entry, and its range in the data.
fn parse_entry(
    path: &Path,
    name: &str,
    value: &Value,
    data_start: u64,
) -> Result<(Entry, [u64; 2]), Error> {
    let fail = |expected: &str| {
        let found: String = value.to_string().chars().take(120).collect();
        Error::field(path, name, expected, found)
    };
    let dtype = value.get("dtype").and_then(Value::as_str).ok_or_else(|| fail("a dtype"))?;
    let kind = kind_of(dtype).ok_or_else(|| fail("a dtype among F64 to F16, BF16, I64 to I8, U8, BOOL"))?;
    let sizes = value.get("shape").and_then(Value::as_array).ok_or_else(|| fail("a shape"))?;
    if sizes.len() > MAX_DIMS {
        return Err(fail("at most 8 dimensions"));
    }
    let mut shape = Vec::with_capacity(sizes.len());
    let mut n_bytes = kind.elt_size_in_bytes() as u64;
    for size in sizes {
        let size = size.as_u64().filter(|size| *size < 1 << 40).ok_or_else(|| fail("sizes"))?;
        n_bytes = n_bytes.checked_mul(size).ok_or_else(|| fail("a shape whose bytes can be counted"))?;
        shape.push(size as i64);
    }
    let range: [u64; 2] = value
        .get("data_offsets")
        .and_then(|range| serde_json::from_value(range.clone()).ok())
        .ok_or_else(|| fail("two data offsets"))?;
    if range[1].checked_sub(range[0]) != Some(n_bytes) {
        return Err(fail(&format!("{n_bytes} bytes, as dtype and shape imply")));
    }
    let offset = data_start.checked_add(range[0]).ok_or_else(|| fail("offsets within the file"))?;
    Ok((Entry { kind, shape, offset }, range))
}

/// Writes tensors in the order given, whole or not at all. The header's metadata is `{"format": "pt"}` only:
/// transformers needs it, and more keys would not keep their order everywhere.
///
/// # Errors
///
/// [`Error::Invalid`] for a dtype the format lacks, [`Error::Io`] if writing fails.
pub fn write_safetensors(path: &Path, tensors: &[(String, Tensor)]) -> Result<(), Error> {
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut offset = 0u64;
    for (name, tensor) in tensors {
        let dtype = dtype_of(tensor.kind()).ok_or_else(|| Error::Invalid {
            name: "tensor dtype",
            expected: "one safetensors can store".to_owned(),
            got: format!("{:?} for {name}", tensor.kind()),
        })?;
        let end = offset + (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64;
        let entry = json!({"dtype": dtype, "shape": tensor.size(), "data_offsets": [offset, end]});
        header.insert(name.clone(), entry);
        offset = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');

    let directory = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    let mut file = tempfile::Builder::new()
        .prefix(".safetensors.tmp-")
        .tempfile_in(directory.unwrap_or(Path::new(".")))?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    for (_, tensor) in tensors {
        let tensor = tensor.detach().to_device(Device::Cpu).contiguous();
        file.write_all(bytes::bytes_of(&tensor))?;
    }
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    if let Some(directory) = directory {
        File::open(directory)?.sync_all()?;
    }
    Ok(())
}
