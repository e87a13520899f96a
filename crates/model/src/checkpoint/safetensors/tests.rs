//! Tests of reading and writing safetensors files.

use proptest::prelude::*;

use super::*;
use crate::checkpoint::tests::torture;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/safetensors/mixed.safetensors")
}

/// What `scripts/goldens/safetensors_file.py` puts into the golden file.
fn contents() -> Vec<(String, Tensor)> {
    let ramp = |n: i64, shape: &[i64], kind| {
        Tensor::arange(n, (Kind::Int64, Device::Cpu)).to_kind(kind).view(shape)
    };
    [
        ("flag", Tensor::from_slice(&[true, false, true])),
        ("bytes", ramp(5, &[5], Kind::Uint8)),
        ("small", ramp(3, &[3], Kind::Int8)),
        ("half", ramp(6, &[2, 3], Kind::Half) / 4),
        ("brain", ramp(6, &[3, 2], Kind::BFloat16) / 4),
        ("short", ramp(2, &[2], Kind::Int16)),
        ("whole", ramp(2, &[2], Kind::Int)),
        ("z.weight", ramp(4, &[2, 2], Kind::Float) / 8),
        ("a.weight", ramp(4, &[4, 1], Kind::Float) / -8),
        ("scalar", Tensor::from(0.5f32)),
        ("empty", Tensor::zeros([0, 3], (Kind::Float, Device::Cpu))),
        ("double", ramp(2, &[2], Kind::Double) / 3),
        ("long", ramp(2, &[2], Kind::Int64)),
        ("ünï \"x\"\n", ramp(1, &[1], Kind::Float)),
    ]
    .into_iter()
    .map(|(name, tensor)| (name.to_owned(), tensor))
    .collect()
}

fn same(a: &Tensor, b: &Tensor) -> bool {
    a.kind() == b.kind() && a.size() == b.size() && a.equal(b)
}

#[test]
fn files_of_the_python_package_are_read_and_written_alike() {
    let file = SafetensorsFile::open(&golden()).unwrap();
    assert_eq!(file.metadata()["format"], "pt");
    let contents = contents();
    assert_eq!(file.names().count(), contents.len());
    for (name, expected) in &contents {
        let found = file.tensor(name).unwrap();
        assert!(same(&found, expected), "{name}: {found} {expected}");
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("mixed.safetensors");
    write_safetensors(&path, &contents).unwrap();
    assert!(fs_err::read(&path).unwrap() == fs_err::read(golden()).unwrap(), "other bytes");
    assert_eq!(fs_err::read_dir(directory.path()).unwrap().count(), 1, "nothing left over");
}

#[test]
fn views_and_gradients_are_written_as_seen() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.safetensors");
    let whole =
        Tensor::from_slice(&[0f32, 1.0, 2.0, 3.0, 4.0, 5.0]).view([2, 3]).set_requires_grad(true);
    let turned = whole.transpose(0, 1); // [3, 2]
    write_safetensors(&path, &[("turned".to_owned(), turned)]).unwrap();
    let read = SafetensorsFile::open(&path).unwrap().tensor("turned").unwrap();
    assert!(same(&read, &Tensor::from_slice(&[0f32, 3.0, 1.0, 4.0, 2.0, 5.0]).view([3, 2])));
}

#[test]
fn a_write_that_fails_leaves_what_was_there() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.safetensors");
    fs_err::write(&path, "old").unwrap();
    let complex = Tensor::zeros([1], (Kind::ComplexFloat, Device::Cpu));
    let one = || Tensor::from(1f32);
    for bad in [
        vec![("a".to_owned(), one()), ("c".to_owned(), complex)],
        vec![("a".to_owned(), one()), ("a".to_owned(), one())],
        vec![("__metadata__".to_owned(), one())],
    ] {
        assert!(matches!(write_safetensors(&path, &bad), Err(Error::Invalid { .. })));
        assert_eq!(fs_err::read_to_string(&path).unwrap(), "old");
        assert_eq!(fs_err::read_dir(directory.path()).unwrap().count(), 1);
    }
    let nowhere = directory.path().join("missing/x.safetensors");
    let error = write_safetensors(&nowhere, &[("a".to_owned(), one())]).unwrap_err();
    assert!(error.to_string().contains("missing"), "{error}");
    // A directory in the way: the rename fails after everything was written.
    fs_err::create_dir(directory.path().join("taken")).unwrap();
    assert!(
        write_safetensors(&directory.path().join("taken"), &[("a".to_owned(), one())]).is_err()
    );
    assert_eq!(fs_err::read_dir(directory.path()).unwrap().count(), 2, "no temporary file");
}

fn file_of(header: &str, n_data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(std::iter::repeat_n(1, n_data));
    bytes
}

/// Opens bytes as a file and, if they pass, reads everything.
fn open_bytes(bytes: &[u8]) -> Result<SafetensorsFile, Error> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.safetensors");
    fs_err::write(&path, bytes).unwrap();
    let file = SafetensorsFile::open(&path)?;
    for name in file.names() {
        let _ = file.tensor(name)?;
    }
    Ok(file)
}

#[test]
fn hostile_headers_are_refused_by_name() {
    let one = r#""a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
    assert!(open_bytes(&file_of(&format!("{{{one}}}"), 4)).is_ok());
    assert!(open_bytes(&file_of(&format!("{{{one}}}    "), 4)).is_ok(), "padded");
    for (header, n_data, words) in [
        ("", 0, "header: expected a JSON object of tensors"),
        ("[]", 0, "header"),
        (&format!("{{{one}}}x"), 4, "header"),
        (&format!("{{{one},{one}}}"), 4, "\"a\" is there twice"),
        (&format!("{{{one}}}"), 3, "file size: expected"),
        (&format!("{{{one}}}"), 5, "file size: expected"),
        (
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#,
            4,
            "a: expected 8 bytes for F32 [2], found 4",
        ),
        (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}}"#, 5, "no holes, no overlaps"),
        (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#, 4, "no holes, no overlaps"),
        (
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
            4,
            "b: expected data from byte 4",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}"#,
            6,
            "b: expected data from byte 4",
        ),
        (
            r#"{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}"#,
            4,
            "a: expected a dtype among I64",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,4]}}"#,
            4,
            "can be counted",
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[0,18446744073709551615],"data_offsets":[0,0]}}"#,
            0,
            "below 2^40",
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}}"#,
            1,
            "at most 8 dimensions",
        ),
        (r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, 4, "\"a\": invalid value"),
        (r#"{"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}}"#, 4, "\"a\": invalid type"),
        (r#"{"a":{"dtype":"F32","shape":[1]}}"#, 4, "missing field `data_offsets`"),
        (
            r#"{"a":{"dtype":"F32","dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#,
            4,
            "duplicate field `dtype`",
        ),
        (r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,2]}}"#, 1, "\"a\""),
        (
            r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[18446744073709551615,18446744073709551615]}}"#,
            0,
            "no holes",
        ),
        (r#"{"__metadata__":{"a":1}}"#, 0, "header"),
    ] {
        let error = open_bytes(&file_of(header, n_data)).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Field { .. }), "{header}: {text}");
        assert!(text.contains("x.safetensors: ") && text.contains(words), "{header}: {text}");
    }
    let mut huge = file_of("{}", 0);
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(open_bytes(&huge).unwrap_err().to_string().contains("header length"));
    let deep = format!("{{\"a\":{}", "[".repeat(100_000));
    assert!(open_bytes(&file_of(&deep, 0)).is_err());
    // More than 25 MB of header, all of it there.
    let padded = format!("{{{one}}}{}", " ".repeat(26 << 20));
    let text = open_bytes(&file_of(&padded, 4)).unwrap_err().to_string();
    assert!(text.contains("header length: expected at most 26214400 bytes"), "{text}");
}

#[test]
fn cut_files_are_refused_at_every_length() {
    let whole = fs_err::read(golden()).unwrap();
    for n in 0..whole.len() {
        let error = open_bytes(&whole[..n]).unwrap_err();
        assert!(matches!(error, Error::Field { .. }), "{n}: {error}");
    }
}

#[test]
fn flipped_bits_never_panic() {
    let whole = fs_err::read(golden()).unwrap();
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        let _ = open_bytes(&bytes);
    }
}

#[test]
fn torture_of_the_safetensors_reader() {
    let whole = fs_err::read(golden()).unwrap();
    torture(&whole, |content| drop(open_bytes(content)));
}

#[test]
fn a_file_cut_after_opening_gives_an_error_naming_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.safetensors");
    write_safetensors(&path, &contents()).unwrap();
    let file = SafetensorsFile::open(&path).unwrap();
    fs_err::OpenOptions::new().write(true).open(&path).unwrap().set_len(100).unwrap();
    let error = file.tensor("z.weight").unwrap_err();
    assert!(
        matches!(error, Error::Io(_)) && error.to_string().contains("x.safetensors"),
        "{error}"
    );
}

proptest! {
    // Each case writes and reads a file; `make torture` fuzzes for longer.
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn any_bytes_give_a_file_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = open_bytes(&bytes);
    }

    #[test]
    fn any_entry_gives_a_file_or_an_error(
        dtype in proptest::sample::select(vec!["F32", "BF16", "U8", "BOOL", "I64", "F8_E4M3", ""]),
        shape in proptest::collection::vec(prop_oneof![0u64..5, Just(u64::MAX), Just(1 << 40)], 0..10),
        offsets in (prop_oneof![Just(0u64), any::<u64>()], prop_oneof![0u64..64, any::<u64>()]),
        n_data in 0usize..64,
    ) {
        let entry = json!({"a": {"dtype": dtype, "shape": shape, "data_offsets": [offsets.0, offsets.1]}});
        if let Ok(file) = open_bytes(&file_of(&entry.to_string(), n_data)) {
            prop_assert_eq!(file.tensor("a").unwrap().numel() as u64, shape.iter().product::<u64>());
        }
    }

    #[test]
    fn what_is_written_is_read_again(
        tensors in proptest::collection::btree_map(".{1,12}", (0usize..DTYPES.len(), 0i64..4, 1i64..4), 0..6)
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.safetensors");
        let tensors: Vec<(String, Tensor)> = tensors
            .into_iter()
            .filter(|(name, _)| name != METADATA)
            .map(|(name, (dtype, rows, columns))| {
                let ramp = Tensor::arange(rows * columns, (Kind::Int64, Device::Cpu));
                (name, ramp.view([rows, columns]).to_kind(DTYPES[dtype].1))
            })
            .collect();
        write_safetensors(&path, &tensors).unwrap();
        let file = SafetensorsFile::open(&path).unwrap();
        prop_assert_eq!(file.names().count(), tensors.len());
        for (name, tensor) in &tensors {
            prop_assert!(same(&file.tensor(name).unwrap(), tensor));
        }
    }
}
