//! Round trips, other people's files, and files that lie.

use std::path::PathBuf;

use arrow::array::{
    ArrayRef, BooleanArray, DictionaryArray, Int32Array, ListArray, RecordBatch, StringArray,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field};
use proptest::prelude::*;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::json;

use super::*;
use crate::rows::{
    ConversationRow, DemonstrationRow, JudgementRow, PreferenceRow, PromptRow, RolloutRow,
    RolloutTurn, Round, ScoreRow, TurnRow,
};
use crate::{Aspect, FinishReason, Message, Split, Virtue};

// ---- rows of every kind, at random ----

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(String::new()),
        ".{0,40}",
        "[\\x00-\\x7f]{0,20}",
        "(Human: |\r\n|🙂|\u{301}){0,9}"
    ]
}

fn messages() -> impl Strategy<Value = Vec<Message>> {
    let message = (0..3usize, text()).prop_map(|(role, content)| match role {
        0 => Message::system(content),
        1 => Message::user(content),
        _ => Message::assistant(content),
    });
    proptest::collection::vec(message, 0..4)
}

fn split() -> impl Strategy<Value = Split> {
    proptest::sample::select(Split::ALL.to_vec())
}

fn aspect() -> impl Strategy<Value = Aspect> {
    proptest::sample::select(Aspect::SHIPPED.to_vec())
}

fn finish_reason() -> impl Strategy<Value = FinishReason> {
    proptest::sample::select(FinishReason::ALL.to_vec())
}

fn number() -> impl Strategy<Value = f32> {
    // NaN is unequal to itself and is not in any of our rows.
    any::<f32>().prop_filter("not NaN", |x| !x.is_nan())
}

fn prompts() -> impl Strategy<Value = PromptRow> {
    (text(), split(), text(), messages()).prop_map(|(prompt_id, split, source, prompt)| PromptRow {
        prompt_id,
        split,
        source,
        prompt,
    })
}

fn demonstrations() -> impl Strategy<Value = DemonstrationRow> {
    let round = (text(), text(), text()).prop_map(|(principle, critique, revision)| Round {
        principle,
        critique,
        revision,
    });
    let rounds = proptest::collection::vec(round, 0..3);
    (text(), split(), text(), text(), rounds, messages()).prop_map(
        |(prompt_id, split, source, initial, rounds, messages)| DemonstrationRow {
            prompt_id,
            split,
            source,
            initial,
            rounds,
            messages,
        },
    )
}

fn conversations(turns: &'static [Aspect]) -> impl Strategy<Value = ConversationRow> {
    let replies = proptest::collection::vec((text(), finish_reason(), any::<i32>()), turns.len());
    let head = (text(), split(), any::<i32>(), proptest::option::of(text()), messages());
    (head, replies, any::<u64>()).prop_map(
        |((prompt_id, split, sample, persona, messages), replies, seed)| {
            let turn = |(&aspect, (text, finish_reason, n_tokens))| TurnRow {
                aspect,
                text,
                finish_reason,
                n_tokens,
            };
            let turns = turns.iter().zip(replies).map(turn).collect();
            ConversationRow { prompt_id, split, sample, persona, messages, turns, seed }
        },
    )
}

fn judgements() -> impl Strategy<Value = JudgementRow> {
    let p = || proptest::option::of(number());
    let virtue = proptest::sample::select(Virtue::SHIPPED.to_vec());
    let verdict = (p(), p(), p(), proptest::option::of(0..2));
    (text(), split(), aspect(), virtue, text(), text(), verdict).prop_map(
        |(prompt_id, split, aspect, virtue, method, judge, (p_ab, p_ba, p_sample0, vote))| {
            JudgementRow {
                prompt_id,
                split,
                aspect,
                virtue,
                method,
                judge,
                p_ab,
                p_ba,
                p_sample0,
                vote,
            }
        },
    )
}

fn preferences() -> impl Strategy<Value = PreferenceRow> {
    (messages(), messages(), messages(), 0..6, 0..6, number(), text(), any::<(bool, bool)>())
        .prop_map(
            |(
                prompt,
                chosen,
                rejected,
                score_chosen,
                score_rejected,
                chosen_prob,
                prompt_id,
                cut,
            )| {
                PreferenceRow {
                    prompt,
                    chosen,
                    rejected,
                    score_chosen,
                    score_rejected,
                    chosen_prob,
                    prompt_id,
                    truncated_chosen: cut.0,
                    truncated_rejected: cut.1,
                }
            },
        )
}

fn rollouts(turns: &'static [Aspect]) -> impl Strategy<Value = RolloutRow> {
    let of = proptest::option::of::<BoxedStrategy<f32>>;
    let turn = (
        of(number().boxed()),
        of(number().boxed()),
        proptest::option::of(any::<i32>()),
        proptest::option::of(finish_reason()),
    );
    let head = (any::<i32>(), text(), messages(), number(), number());
    (head, proptest::collection::vec(turn, turns.len())).prop_map(
        |((iteration, prompt_id, messages, reward, kl), found)| {
            let turn = |(&aspect, (score, z, n_tokens, finish_reason))| RolloutTurn {
                aspect,
                score,
                z,
                n_tokens,
                finish_reason,
            };
            let turns = turns.iter().zip(found).map(turn).collect();
            RolloutRow { iteration, prompt_id, messages, turns, reward, kl }
        },
    )
}

/// Turns of another constitution, in an order that is not that of their letters.
fn others() -> &'static [Aspect] {
    static OTHERS: std::sync::LazyLock<Vec<Aspect>> = std::sync::LazyLock::new(|| {
        ["why", "consequence", "deed", "仁"].map(|name| Aspect::new(name).unwrap()).into()
    });
    &OTHERS
}

fn scores() -> impl Strategy<Value = ScoreRow> {
    let of_yardstick = || proptest::option::of(number());
    let numbers = (number(), number(), of_yardstick(), of_yardstick());
    (text(), text(), aspect(), numbers, any::<i32>(), finish_reason()).prop_map(
        |(model, prompt_id, aspect, numbers, n_tokens, finish_reason)| {
            let (score, z, yardstick, yardstick_words) = numbers;
            ScoreRow {
                model,
                prompt_id,
                aspect,
                score,
                z,
                yardstick,
                yardstick_words,
                n_tokens,
                finish_reason,
            }
        },
    )
}

fn round_trip<T: Row + PartialEq + std::fmt::Debug>(rows: &[T]) -> Result<(), TestCaseError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.parquet");
    write(&path, rows).unwrap();
    let bytes = fs_err::read(&path).unwrap();
    prop_assert_eq!(&read::<T>(&path).unwrap(), rows);
    prop_assert_eq!(read_json(&path).unwrap().len(), rows.len());
    write(&path, rows).unwrap();
    prop_assert_eq!(fs_err::read(&path).unwrap(), bytes, "same rows, same bytes");
    prop_assert_eq!(fs_err::read_dir(dir.path()).unwrap().count(), 1, "nothing left behind");
    Ok(())
}

macro_rules! round_trips {
    ($($name:ident: $strategy:expr),* $(,)?) => {
        proptest! {
            #![proptest_config(ProptestConfig::with_cases(24))]
            $(#[test]
            fn $name(rows in proptest::collection::vec($strategy, 0..12)) {
                round_trip(&rows)?;
            })*
        }
    };
}
round_trips! {
    prompts_round_trip: prompts(),
    demonstrations_round_trip: demonstrations(),
    conversations_round_trip: conversations(&Aspect::SHIPPED),
    conversations_of_other_turns_round_trip: conversations(others()),
    judgements_round_trip: judgements(),
    preferences_round_trip: preferences(),
    rollouts_round_trip: rollouts(&Aspect::SHIPPED),
    rollouts_of_other_turns_round_trip: rollouts(&others()[..1]),
    scores_round_trip: scores(),
}

// ---- what files hold ----

fn prompt(content: &str) -> PromptRow {
    PromptRow {
        prompt_id: "0123456789abcdef".to_owned(),
        split: Split::Train,
        source: "own".to_owned(),
        prompt: vec![Message::user(content)],
    }
}

fn file_of(columns: Vec<(&str, ArrayRef)>) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file.parquet");
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(3).unwrap()))
        .set_dictionary_page_size_limit(1 << 30)
        .build();
    let file = fs_err::File::create(&path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    (dir, path)
}

/// What pandas, pyarrow and datasets may have packed a file with.
#[test]
fn files_packed_in_other_ways_are_read() {
    use parquet::basic::{BrotliLevel, GzipLevel};
    for compression in [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(GzipLevel::default()),
        Compression::BROTLI(BrotliLevel::default()),
        Compression::LZ4,
        Compression::LZ4_RAW,
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file.parquet");
        let batch = RecordBatch::try_from_iter([("prompt", strings(&["q"; 100]))]).unwrap();
        let properties = WriterProperties::builder().set_compression(compression).build();
        let file = fs_err::File::create(&path).unwrap();
        let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        let rows = read_json(&path).unwrap_or_else(|error| panic!("{compression}: {error}"));
        assert_eq!((rows.len(), &rows[99]["prompt"]), (100, &json!("q")), "{compression}");
    }
}

/// As pyarrow writes a table of no rows: one group with an empty dictionary page and no data page.
#[test]
fn a_group_without_rows_has_none() {
    use parquet::data_type::ByteArrayType;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file.parquet");
    let schema = parse_message_type("message rows { optional binary prompt (STRING); }").unwrap();
    let file = fs_err::File::create(&path).unwrap();
    let mut writer = SerializedFileWriter::new(file, Arc::new(schema), Arc::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<ByteArrayType>().write_batch(&[], Some(&[]), None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    let metadata = writer.close().unwrap();
    let column = metadata.row_group(0).column(0);
    assert_eq!((column.data_page_offset(), column.num_values()), (0, 0));
    assert!(column.dictionary_page_offset().is_some_and(|offset| offset > 0));
    assert_eq!(read_json(&path).unwrap(), []);
}

fn strings(values: &[&str]) -> ArrayRef {
    Arc::new(StringArray::from(values.to_vec()))
}

#[test]
fn columns_are_those_of_the_design_in_that_order() {
    fn names<T: Row>() -> String {
        T::fields().iter().map(|f| f.name().as_str()).collect::<Vec<_>>().join(" ")
    }
    assert_eq!(names::<PromptRow>(), "prompt_id split source prompt");
    assert_eq!(names::<DemonstrationRow>(), "prompt_id split source initial rounds messages");
    assert_eq!(
        names::<ConversationRow>(),
        "prompt_id split sample persona messages action motivation consequence \
         finish_reason_action finish_reason_motivation finish_reason_consequence \
         n_tokens_action n_tokens_motivation n_tokens_consequence seed"
    );
    assert_eq!(
        names::<JudgementRow>(),
        "prompt_id split aspect virtue method judge p_ab p_ba p_sample0 vote"
    );
    assert_eq!(
        names::<PreferenceRow>(),
        "prompt chosen rejected score_chosen score_rejected chosen_prob prompt_id \
         truncated_chosen truncated_rejected"
    );
    assert_eq!(
        names::<RolloutRow>(),
        "iteration prompt_id messages score_action score_motivation score_consequence \
         z_action z_motivation z_consequence reward kl \
         n_tokens_action n_tokens_motivation n_tokens_consequence \
         finish_reason_action finish_reason_motivation finish_reason_consequence"
    );
    assert_eq!(
        names::<ScoreRow>(),
        "model prompt_id aspect score z yardstick yardstick_words n_tokens finish_reason"
    );
}

#[test]
fn features_are_spelled_as_datasets_spells_them() {
    let string = json!({"dtype": "string", "_type": "Value"});
    let features: Value =
        serde_json::from_str(&schema::huggingface_features(&PromptRow::fields())).unwrap();
    assert_eq!(
        features,
        json!({"info": {"features": {
            "prompt_id": string, "split": string, "source": string,
            "prompt": [{"role": string, "content": string}],
        }}})
    );
}

#[test]
fn more_rows_than_a_group_keep_their_order() {
    let rows: Vec<PromptRow> = (0..25_000).map(|i| prompt(&format!("Question {i}?"))).collect();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("prompts.parquet");
    write(&path, &rows).unwrap();
    assert_eq!(read::<PromptRow>(&path).unwrap(), rows);
}

#[test]
fn the_same_text_many_times_is_not_taken_for_a_bomb() {
    let rows = vec![prompt(&"Is it right? ".repeat(100)); 20_000];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("prompts.parquet");
    write(&path, &rows).unwrap();
    assert_eq!(read::<PromptRow>(&path).unwrap(), rows);
}

#[test]
fn a_prompt_of_a_megabyte_survives() {
    let rows = [prompt(&"é".repeat(1 << 19)), prompt("short")];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("prompts.parquet");
    write(&path, &rows).unwrap();
    assert_eq!(read::<PromptRow>(&path).unwrap(), rows);
}

// ---- other people's files ----

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

#[test]
fn files_written_by_datasets_are_read() {
    // Written by datasets 5.2.0 (tests/data/README.md): other order of columns, one more column.
    let rows: Vec<PromptRow> = read(data("prompts.datasets.parquet")).unwrap();
    let question = Message::user("May I read my sister's diary? é🙂");
    assert_eq!(
        rows,
        [
            PromptRow {
                prompt_id: "0123456789abcdef".to_owned(),
                split: Split::Train,
                source: "hub".to_owned(),
                prompt: vec![question.clone()],
            },
            PromptRow {
                prompt_id: "fedcba9876543210".to_owned(),
                split: Split::Test,
                source: "hub".to_owned(),
                prompt: vec![question, Message::assistant("No.")],
            },
        ]
    );
}

#[test]
fn files_of_any_types_are_read_as_json() {
    // Written by pyarrow (tests/data/README.md).
    let rows = read_json(data("many_types.pyarrow.parquet")).unwrap();
    let rows: Vec<Value> = rows.into_iter().map(Value::Object).collect();
    let expected = [
        json!({"text": "a", "large": "x", "i64": 1, "u64": 1, "f32": 0.5, "b": true,
            "list": ["p"], "nested": {"k": [{"n": 1}]}, "null": null}),
        json!({"text": null, "large": "y", "i64": -2, "u64": 2, "f32": null, "b": false,
            "list": [], "nested": {"k": null}, "null": null}),
        json!({"text": "a", "large": "z", "i64": null, "u64": u64::MAX, "f32": 1.25, "b": null,
            "list": null, "nested": null, "null": null}),
    ];
    for (mut row, expected) in rows.into_iter().zip(expected) {
        let row = row.as_object_mut().unwrap();
        let when = row.remove("when").unwrap();
        assert!(when.is_number() || when.is_null(), "{when}"); // seconds since 1970
        assert_eq!(Value::Object(row.clone()), expected);
    }
}

// ---- wrong columns ----

#[test]
fn two_columns_of_one_name_are_refused() {
    let (_dir, path) = file_of(vec![("prompt", strings(&["x"])), ("prompt", strings(&["y"]))]);
    let error = read_json(&path).unwrap_err().to_string();
    assert!(error.contains("each name once, got two of the name `prompt`"), "{error}");
}

#[test]
fn a_missing_column_is_named_with_those_that_are_there() {
    let (_dir, path) = file_of(vec![("prompt_id", strings(&["x"])), ("text", strings(&["y"]))]);
    let error = read::<PromptRow>(&path).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "{}: column `split` is missing: expected string, got columns prompt_id, text",
            path.display()
        )
    );
}

#[test]
fn a_column_of_another_type_is_named_with_both_types() {
    let (_dir, path) = file_of(vec![
        ("prompt_id", strings(&["x"])),
        ("split", strings(&["train"])),
        ("source", strings(&["own"])),
        ("prompt", strings(&["May I?"])),
    ]);
    let error = read::<PromptRow>(&path).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "{}: column `prompt`: expected list<struct<role: string, content: string>>, got string",
            path.display()
        )
    );
    let (_dir, path) = file_of(vec![("prompt_id", Arc::new(Int32Array::from(vec![1])))]);
    let error = read::<PromptRow>(&path).unwrap_err().to_string();
    assert!(error.ends_with("column `prompt_id`: expected string, got int32"), "{error}");
}

#[test]
fn an_unknown_word_or_a_null_names_the_column() {
    let score = |split: ArrayRef| {
        file_of(vec![
            ("prompt_id", strings(&["x"])),
            ("split", split),
            ("aspect", strings(&["action"])),
            ("virtue", strings(&["honesty"])),
            ("method", strings(&["m"])),
            ("judge", strings(&["j"])),
            ("p_ab", Arc::new(arrow::array::Float32Array::from(vec![0.5]))),
            ("p_ba", Arc::new(arrow::array::Float32Array::from(vec![None]))),
            ("p_sample0", Arc::new(arrow::array::Float32Array::from(vec![0.5]))),
            ("vote", Arc::new(Int32Array::from(vec![None]))),
        ])
    };
    let (_dir, path) = score(strings(&["train"]));
    assert_eq!(read::<JudgementRow>(&path).unwrap()[0].p_ba, None);
    let (_dir, path) = score(strings(&["trian"]));
    let error = read::<JudgementRow>(&path).unwrap_err();
    assert!(matches!(error, Error::Row { first_row: 0, end_row: 1, .. }), "{error}");
    assert!(error.to_string().contains("trian") && error.to_string().contains("split"), "{error}");
    let (_dir, path) = score(Arc::new(StringArray::from(vec![None::<&str>])));
    let error = read::<JudgementRow>(&path).unwrap_err().to_string();
    assert!(error.contains("split"), "{error}");
}

// ---- files that are damaged or lie ----

fn small_file() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("prompts.parquet");
    write(&path, &[prompt("May I?"), prompt("Should I?"), prompt("May I?")]).unwrap();
    fs_err::read(path).unwrap()
}

fn read_bytes(bytes: &[u8]) -> Result<Vec<PromptRow>, Error> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bytes.parquet");
    fs_err::write(&path, bytes).unwrap();
    read(&path)
}

#[test]
fn a_file_cut_at_any_byte_is_refused() {
    let bytes = small_file();
    for length in 0..bytes.len() {
        let error = read_bytes(&bytes[..length]).expect_err("cut files are refused");
        assert!(!error.is_io(), "cut at {length}: {error}");
    }
    assert_eq!(read_bytes(&bytes).unwrap().len(), 3);
}

#[test]
fn flipped_bits_never_panic() {
    let bytes = small_file();
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    for _ in 0..1000 {
        let mut damaged = bytes.clone();
        for _ in 0..=rng.next_u32() % 3 {
            let index = rng.next_u32() as usize % bytes.len();
            damaged[index] ^= 1 << (rng.next_u32() % 8);
        }
        // Pages carry no sums, so some flips go unseen here; `run.json` has the file's SHA-256.
        let _ = read_bytes(&damaged);
    }
}

#[test]
fn what_is_not_parquet_says_so() {
    for bytes in [&b""[..], b"PAR1", b"{\"prompt\": \"May I?\"}\n", &[0; 64], &[255; 64]] {
        let error = read_bytes(bytes).unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{error}");
    }
    assert!(read::<PromptRow>("no/such.parquet").unwrap_err().is_io());
}

#[track_caller]
fn refused(path: &Path, what: &str) {
    let error = read_json(path).unwrap_err();
    assert!(matches!(error, Error::Damaged { .. }), "{error}");
    assert!(error.to_string().contains(what), "{error}");
}

/// One text, of which the footer says that there are others (`strings(["hello you"], n_values=…)` of
/// `scripts/torture/files/parquet.py`).
#[test]
fn a_column_of_another_number_of_values_than_its_pages_is_refused() {
    for claimed in ["7", "-1"] {
        let path = data(&format!("values_claimed_{claimed}.parquet"));
        let message = read_json(&path).unwrap_err().to_string();
        let expected = format!(
            "number of values of column `prompt`: expected 1, as its pages hold, got {claimed}"
        );
        assert!(message.contains(&expected), "{message}");
    }
}

/// What the system refuses is no damage of the file.
#[test]
fn a_refusal_of_the_system_is_told_from_damage() {
    let error = parquet_error(Path::new("a"), &"External: Too many open files (os error 24)");
    assert!(matches!(error, Error::Io(_)) && error.to_string().starts_with("a: "), "{error}");
    assert!(matches!(parquet_error(Path::new("a"), &"EOF"), Error::Parquet { .. }));
}

#[test]
fn one_long_text_repeated_by_a_dictionary_is_refused() {
    // A few kilobytes on disk, 8 GB in memory.
    let long = "x".repeat(4 << 20);
    let keys = Int32Array::from(vec![0; 2000]);
    let text = DictionaryArray::new(keys, strings(&[&long]));
    let (_dir, path) = file_of(vec![("text", Arc::new(text))]);
    assert!(fs_err::metadata(&path).unwrap().len() < 16 << 10);
    refused(&path, "repeated text");
}

#[test]
fn many_rows_of_nothing_are_refused() {
    let (_dir, path) = file_of(vec![("flag", Arc::new(BooleanArray::from(vec![true; 3_000_000])))]);
    assert!(fs_err::metadata(&path).unwrap().len() < 16 << 10);
    refused(&path, "number of rows");
}

#[test]
fn one_row_of_many_values_is_refused() {
    let n = 5_000_000;
    let list = ListArray::new(
        Arc::new(Field::new("element", DataType::Boolean, false)),
        OffsetBuffer::from_lengths([n]),
        Arc::new(BooleanArray::from(vec![true; n])),
        None,
    );
    let (_dir, path) = file_of(vec![("flags", Arc::new(list))]);
    assert!(fs_err::metadata(&path).unwrap().len() < 16 << 10);
    refused(&path, "number of values");
}

#[test]
fn pages_that_unpack_to_much_are_refused() {
    // 80 MB of zeros in some kilobytes.
    let zeros = "\0".repeat(80 << 20);
    let (_dir, path) = file_of(vec![("text", strings(&[&zeros]))]);
    refused(&path, "unpacked pages");
}
