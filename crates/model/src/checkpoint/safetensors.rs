//! Safetensors files: read one tensor at a time, written with the same bytes every time.
//!
//! Nothing in a file is believed before it is checked, so a damaged or hostile one gives an [`Error::Field`] and
//! never a panic; a tensor is read straight into its own memory, so the peak is one tensor.
//!
//! # Source
//!
//! The format as the `safetensors` crate 0.8 has it (`src/tensor.rs`); stricter in that a name given twice is
//! refused and a header may have 25 MB only. Files written are equal, byte for byte, to those of its Python
//! `save_file(tensors, path, {"format": "pt"})`.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use fs_err::File;
use serde::Deserialize;
use serde::de::{Error as _, MapAccess, Visitor};
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use super::bytes;
use crate::Error;
use crate::json::stand_in;

/// Largest accepted header; a 70B model's has under a megabyte.
const MAX_HEADER_BYTES: u64 = 25 << 20;
const MAX_DIMS: usize = 8;
const METADATA: &str = "__metadata__";
/// Dtypes of the format that libtorch has, the widest first: the order in which tensors are written.
const DTYPES: [(&str, Kind); 10] = [
    ("I64", Kind::Int64),
    ("F64", Kind::Double),
    ("F32", Kind::Float),
    ("I32", Kind::Int),
    ("BF16", Kind::BFloat16),
    ("F16", Kind::Half),
    ("I16", Kind::Int16),
    ("I8", Kind::Int8),
    ("U8", Kind::Uint8),
    ("BOOL", Kind::Bool),
];

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

/// A header entry as stored.
#[derive(Debug, Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// A header as stored; a name given twice is refused (serde_json's own maps keep the last).
struct RawHeader {
    metadata: BTreeMap<String, String>,
    entries: Vec<(String, RawEntry)>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut seen = std::collections::HashSet::new();
                let mut header = RawHeader { metadata: BTreeMap::new(), entries: Vec::new() };
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) {
                        return Err(A::Error::custom(format!("{name:?} is there twice")));
                    }
                    if name == METADATA {
                        header.metadata = map.next_value()?;
                    } else {
                        let entry = map
                            .next_value()
                            .map_err(|error| A::Error::custom(format!("{name:?}: {error}")))?;
                        header.entries.push((name, entry));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
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
        let file = arete_records::files::open_regular(path)?;
        let file_bytes = file.metadata()?.len();
        let fail = |field: &str, expected: String, found: String| {
            Err(Error::field(path, field, expected, found))
        };
        if file_bytes < 8 {
            let expected = "at least 8 bytes".to_owned();
            return fail("file size", expected, format!("{file_bytes} bytes"));
        }
        let mut length = [0; 8];
        bytes::read_at(&file, 0, &mut length)?;
        let header_bytes = u64::from_le_bytes(length);
        let limit = MAX_HEADER_BYTES.min(file_bytes - 8);
        if header_bytes > limit {
            let mut begin = vec![0; file_bytes.min(256) as usize];
            bytes::read_at(&file, 0, &mut begin)?;
            if let Some(found) = stand_in(&begin) {
                return fail("content", "safetensors".to_owned(), found.to_owned());
            }
            let expected = format!("at most {limit} bytes");
            return fail("header length", expected, format!("{header_bytes} bytes"));
        }
        let mut header = vec![0; header_bytes as usize];
        bytes::read_at(&file, 8, &mut header)?;
        let RawHeader { metadata, entries: raw } = match serde_json::from_slice(&header) {
            Ok(header) => header,
            Err(error) => {
                return fail("header", "a JSON object of tensors".to_owned(), error.to_string());
            }
        };
        let data_start = 8 + header_bytes;
        let mut ranges: Vec<([u64; 2], &str)> =
            raw.iter().map(|(name, entry)| (entry.data_offsets, name.as_str())).collect();
        ranges.sort_unstable();
        let mut end = 0;
        for ([start, stop], name) in ranges {
            if start != end || stop < start {
                let expected = format!("data from byte {end} on (no holes, no overlaps)");
                return fail(name, expected, format!("bytes {start} to {stop}"));
            }
            end = stop;
        }
        if data_start.checked_add(end) != Some(file_bytes) {
            let expected = format!("{} bytes in all", data_start.saturating_add(end));
            return fail("file size", expected, format!("{file_bytes} bytes"));
        }
        let mut entries = BTreeMap::new();
        for (name, entry) in raw {
            let entry = check_entry(path, &name, &entry, data_start)?;
            entries.insert(name, entry);
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

    /// Reads one tensor as stored, on the CPU; floats are finite, all of them.
    ///
    /// # Shapes
    ///
    /// - output: [`SafetensorsFile::shape`], dtype [`SafetensorsFile::kind`].
    ///
    /// # Errors
    ///
    /// [`Error::MissingTensor`], [`Error::Io`], or [`Error::Field`] naming the tensor if a number in it is NaN or infinite.
    pub fn tensor(&self, name: &str) -> Result<Tensor, Error> {
        let entry = self.entries.get(name).ok_or_else(|| Error::MissingTensor {
            path: self.path.clone(),
            name: name.to_owned(),
        })?;
        bytes::filled::<u8>(&entry.shape, entry.kind, |out| self.read(name, entry, out))
    }

    /// The bytes of one tensor, whatever they stand for: `[n_bytes]` u8, on the CPU.
    ///
    /// # Errors
    ///
    /// [`Error::MissingTensor`], or [`Error::Io`].
    pub(crate) fn raw(&self, name: &str) -> Result<Tensor, Error> {
        let entry = self.entries.get(name).ok_or_else(|| Error::MissingTensor {
            path: self.path.clone(),
            name: name.to_owned(),
        })?;
        let n: i64 = entry.shape.iter().product();
        let n_bytes = n * entry.kind.elt_size_in_bytes() as i64;
        bytes::filled::<u8>(&[n_bytes], Kind::Uint8, |out| {
            bytes::read_at(&self.file, entry.offset, out)
        })
    }

    fn read(&self, name: &str, entry: &Entry, out: &mut [u8]) -> Result<(), Error> {
        bytes::read_finite_at((&self.path, &self.file), name, entry.kind, entry.offset, out)
    }
}

/// Matrices as stored, of one dtype and width, one below the other: each read straight into its place.
///
/// # Shapes
///
/// - output: `[Σ rows, columns]`, in the dtype they have.
///
/// # Errors
///
/// As [`SafetensorsFile::tensor`]; `None` unless all are matrices of the same dtype and width.
pub(crate) fn stacked(parts: &[(&SafetensorsFile, &str)]) -> Result<Option<Tensor>, Error> {
    let entries: Option<Vec<&Entry>> =
        parts.iter().map(|(file, name)| file.entries.get(*name)).collect();
    let Some(entries) = entries.filter(|entries| !entries.is_empty()) else { return Ok(None) };
    let (kind, columns) = (entries[0].kind, entries[0].shape.last().copied().unwrap_or(0));
    let alike = |entry: &&Entry| {
        entry.kind == kind && entry.shape.len() == 2 && entry.shape.last() == Some(&columns)
    };
    if !entries.iter().all(alike) {
        return Ok(None);
    }
    let rows = entries.iter().map(|entry| entry.shape[0]).sum();
    let tensor = bytes::filled::<u8>(&[rows, columns], kind, |mut out| {
        for ((file, name), entry) in parts.iter().zip(&entries) {
            let n: i64 = entry.shape.iter().product();
            let (part, rest) = out.split_at_mut(n as usize * kind.elt_size_in_bytes());
            file.read(name, entry, part)?;
            out = rest;
        }
        Ok(())
    })?;
    Ok(Some(tensor))
}

/// One header entry, whose range is known to lie in the file.
fn check_entry(path: &Path, name: &str, raw: &RawEntry, data_start: u64) -> Result<Entry, Error> {
    let fail = |expected: String, found: String| Err(Error::field(path, name, expected, found));
    let Some((_, kind)) = DTYPES.into_iter().find(|(dtype, _)| *dtype == raw.dtype) else {
        let expected = format!("a dtype among {}", DTYPES.map(|(dtype, _)| dtype).join(", "));
        return fail(expected, raw.dtype.chars().take(40).collect());
    };
    if raw.shape.len() > MAX_DIMS {
        let found = format!("{} dimensions", raw.shape.len());
        return fail(format!("at most {MAX_DIMS} dimensions"), found);
    }
    let n_bytes = raw
        .shape
        .iter()
        .try_fold(kind.elt_size_in_bytes() as u64, |bytes, &size| bytes.checked_mul(size));
    let [start, stop] = raw.data_offsets;
    if n_bytes != Some(stop - start) {
        let expected = match n_bytes {
            Some(n) => format!("{n} bytes for {} {:?}", raw.dtype, raw.shape),
            None => "a shape whose bytes can be counted".to_owned(),
        };
        return fail(expected, format!("{} bytes for {:?}", stop - start, raw.shape));
    }
    // Sizes beside a zero can be anything up to here.
    let shape: Option<Vec<i64>> =
        raw.shape.iter().map(|&size| i64::try_from(size).ok().filter(|n| *n < 1 << 40)).collect();
    let Some(shape) = shape else {
        return fail("sizes below 2^40".to_owned(), format!("{:?}", raw.shape));
    };
    Ok(Entry { kind, shape, offset: data_start + start })
}

/// Writes tensors, whole or not at all: the widest dtype first, then by name, so that every tensor is aligned.
///
/// The header's metadata is `{"format": "pt"}` only: transformers needs it, and more keys would not keep their
/// order everywhere.
///
/// # Errors
///
/// [`Error::Invalid`] for a dtype the format lacks or a name given twice, [`Error::Io`] if writing fails.
pub fn write_safetensors(path: &Path, tensors: &[(String, Tensor)]) -> Result<(), Error> {
    let invalid = |name, expected: &str, got| {
        Err(Error::Invalid { name, expected: expected.to_owned(), got })
    };
    let mut sorted = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        match DTYPES.iter().position(|(_, kind)| *kind == tensor.kind()) {
            Some(rank) => sorted.push((rank, name, tensor)),
            None => {
                let got = format!("{:?} for {name}", tensor.kind());
                return invalid("tensor dtype", "one safetensors can store", got);
            }
        }
    }
    sorted.sort_by_key(|(rank, name, _)| (*rank, *name));

    let mut header = Map::new();
    header.insert(METADATA.to_owned(), json!({"format": "pt"}));
    let mut offset = 0u64;
    for (rank, name, tensor) in &sorted {
        let (dtype, kind) = DTYPES[*rank];
        let end = offset + (tensor.numel() * kind.elt_size_in_bytes()) as u64;
        let entry = json!({"dtype": dtype, "shape": tensor.size(), "data_offsets": [offset, end]});
        if header.insert((*name).clone(), entry).is_some() {
            return invalid("tensor name", "each name once, none __metadata__", (*name).clone());
        }
        offset = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');

    let temporary = beside(path)?;
    let result = write_and_sync(&temporary, &header, &sorted).and_then(|()| {
        fs_err::rename(&temporary, path)?;
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        Ok(arete_records::atomic::sync_dir(parent.unwrap_or(Path::new(".")))?)
    });
    if result.is_err() {
        // The first error is the one to report.
        let _ = fs_err::remove_file(&temporary);
    }
    result
}

fn write_and_sync(
    path: &Path,
    header: &[u8],
    tensors: &[(usize, &String, &Tensor)],
) -> Result<(), Error> {
    let mut file = File::create(path)?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header)?;
    for (_, _, tensor) in tensors {
        let tensor = tensor.detach().f_to_device(Device::Cpu)?.f_contiguous()?;
        file.write_all(bytes::bytes_of(&tensor))?;
    }
    Ok(file.sync_all()?)
}

/// A fresh name beside `path`, of the form that `arete_records::atomic::sweep` removes.
fn beside(path: &Path) -> Result<PathBuf, Error> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
        let expected = "the name of a file, in UTF-8".to_owned();
        return Err(Error::Invalid { name: "path", expected, got: path.display().to_string() });
    };
    let counter = COUNTER.fetch_add(1, Ordering::Relaxed);
    Ok(path.with_file_name(format!(".{name}.tmp-{}-{counter}", std::process::id())))
}

#[cfg(test)]
mod tests;
