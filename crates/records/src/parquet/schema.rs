//! The columns of every row, their Hugging Face features, and the comparison with a file's columns.

use std::path::Path;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, FieldRef, Schema};
use serde_json::{Map, Value, json};

use super::Row;
use crate::rows::{
    ConversationRow, DemonstrationRow, JudgementRow, PreferenceRow, PromptRow, RolloutRow, ScoreRow,
};
use crate::turn_rows::{FINISH_REASON, N_TOKENS, SCORE, Z, in_chain_order};
use crate::{Aspect, Error};

impl Row for PromptRow {
    const NAME: &'static str = "prompt";

    fn fields() -> Vec<FieldRef> {
        vec![text("prompt_id"), text("split"), text("source"), messages("prompt")]
    }
}

impl Row for DemonstrationRow {
    const NAME: &'static str = "demonstration";

    fn fields() -> Vec<FieldRef> {
        vec![
            text("prompt_id"),
            text("split"),
            text("source"),
            text("initial"),
            list_of_structs("rounds", vec![text("principle"), text("critique"), text("revision")]),
            messages("messages"),
        ]
    }
}

impl Row for ConversationRow {
    const NAME: &'static str = "conversation";

    fn fields() -> Vec<FieldRef> {
        conversation_fields(&Aspect::SHIPPED)
    }

    fn fields_of(rows: &[Self]) -> Result<Vec<FieldRef>, String> {
        Ok(conversation_fields(&turns_of(rows, |row| row.aspects().collect())?))
    }

    fn fields_in(schema: &Schema) -> Vec<FieldRef> {
        conversation_fields(&turns_in(schema, &[FINISH_REASON, N_TOKENS]))
    }
}

fn conversation_fields(turns: &[Aspect]) -> Vec<FieldRef> {
    let each = |before: &'static str, kind: DataType| {
        turns.iter().map(move |turn| column(&format!("{before}{turn}"), kind.clone()))
    };
    let mut fields = vec![
        text("prompt_id"),
        text("split"),
        column("sample", DataType::Int32),
        nullable("persona", DataType::Utf8),
        messages("messages"),
    ];
    fields.extend(each("", DataType::Utf8));
    fields.extend(each(FINISH_REASON, DataType::Utf8));
    fields.extend(each(N_TOKENS, DataType::Int32));
    fields.push(column("seed", DataType::UInt64));
    fields
}

/// The turns that all rows have; without rows, the shipped ones.
fn turns_of<T>(rows: &[T], aspects: impl Fn(&T) -> Vec<Aspect>) -> Result<Vec<Aspect>, String> {
    let Some(first) = rows.first().map(&aspects) else { return Ok(Aspect::SHIPPED.into()) };
    let shown = |turns: &[Aspect]| turns.iter().map(|t| t.name()).collect::<Vec<_>>().join(", ");
    match rows.iter().map(&aspects).enumerate().find(|(_, own)| *own != first) {
        None => Ok(first),
        Some((idx, own)) => {
            Err(format!("row {idx} has the turns {}, the first {}", shown(&own), shown(&first)))
        }
    }
}

/// The turns that a file has a column of with any of these words before their name; without any, the shipped ones, so that
/// what is missing is told by name.
fn turns_in(schema: &Schema, before: &[&str]) -> Vec<Aspect> {
    let mut turns: Vec<Aspect> = Vec::new();
    for field in schema.fields() {
        let name = before.iter().find_map(|before| field.name().strip_prefix(before));
        if let Some(aspect) = name.and_then(|name| Aspect::new(name).ok())
            && !turns.contains(&aspect)
        {
            turns.push(aspect);
        }
    }
    if turns.is_empty() { Aspect::SHIPPED.into() } else { in_chain_order(turns) }
}

impl Row for JudgementRow {
    const NAME: &'static str = "judgement";

    fn fields() -> Vec<FieldRef> {
        vec![
            text("prompt_id"),
            text("split"),
            text("aspect"),
            text("virtue"),
            text("method"),
            text("judge"),
            nullable("p_ab", DataType::Float32),
            nullable("p_ba", DataType::Float32),
            nullable("p_sample0", DataType::Float32),
            nullable("vote", DataType::Int32),
        ]
    }
}

impl Row for PreferenceRow {
    const NAME: &'static str = "preference";

    fn fields() -> Vec<FieldRef> {
        vec![
            messages("prompt"),
            messages("chosen"),
            messages("rejected"),
            column("score_chosen", DataType::Int32),
            column("score_rejected", DataType::Int32),
            column("chosen_prob", DataType::Float32),
            text("prompt_id"),
            column("truncated_chosen", DataType::Boolean),
            column("truncated_rejected", DataType::Boolean),
        ]
    }
}

impl Row for RolloutRow {
    const NAME: &'static str = "rollout";

    fn fields() -> Vec<FieldRef> {
        rollout_fields(&Aspect::SHIPPED)
    }

    fn fields_of(rows: &[Self]) -> Result<Vec<FieldRef>, String> {
        let aspects = |row: &Self| row.turns.iter().map(|turn| turn.aspect).collect();
        Ok(rollout_fields(&turns_of(rows, aspects)?))
    }

    fn fields_in(schema: &Schema) -> Vec<FieldRef> {
        rollout_fields(&turns_in(schema, &[SCORE, Z, N_TOKENS, FINISH_REASON]))
    }
}

fn rollout_fields(turns: &[Aspect]) -> Vec<FieldRef> {
    let each = |before: &'static str, kind: DataType| {
        turns.iter().map(move |turn| nullable(&format!("{before}{turn}"), kind.clone()))
    };
    let mut fields =
        vec![column("iteration", DataType::Int32), text("prompt_id"), messages("messages")];
    fields.extend(each(SCORE, DataType::Float32));
    fields.extend(each(Z, DataType::Float32));
    fields.push(column("reward", DataType::Float32));
    fields.push(column("kl", DataType::Float32));
    fields.extend(each(N_TOKENS, DataType::Int32));
    fields.extend(each(FINISH_REASON, DataType::Utf8));
    fields
}

impl Row for ScoreRow {
    const NAME: &'static str = "score";

    fn fields() -> Vec<FieldRef> {
        vec![
            text("model"),
            text("prompt_id"),
            text("aspect"),
            column("score", DataType::Float32),
            column("z", DataType::Float32),
            nullable("yardstick", DataType::Float32),
            nullable("yardstick_words", DataType::Float32),
            column("n_tokens", DataType::Int32),
            text("finish_reason"),
        ]
    }
}

fn column(name: &str, data_type: DataType) -> FieldRef {
    Arc::new(Field::new(name, data_type, false))
}

fn nullable(name: &str, data_type: DataType) -> FieldRef {
    Arc::new(Field::new(name, data_type, true))
}

fn text(name: &str) -> FieldRef {
    column(name, DataType::Utf8)
}

fn messages(name: &str) -> FieldRef {
    list_of_structs(name, vec![text("role"), text("content")])
}

fn list_of_structs(name: &str, fields: Vec<FieldRef>) -> FieldRef {
    // "element" is the name the Parquet specification gives to the items of a list.
    let element = column("element", DataType::Struct(fields.into()));
    column(name, DataType::List(element))
}

/// The value of the schema key `huggingface`, from which `datasets` takes its features.
pub(super) fn huggingface_features(fields: &[FieldRef]) -> String {
    json!({ "info": { "features": features_of(fields) } }).to_string()
}

fn features_of(fields: &[FieldRef]) -> Value {
    let features: Map<String, Value> =
        fields.iter().map(|f| (f.name().clone(), feature_of(f.data_type()))).collect();
    Value::Object(features)
}

fn feature_of(data_type: &DataType) -> Value {
    let dtype = match data_type {
        DataType::Utf8 => "string",
        DataType::Boolean => "bool",
        DataType::Int32 => "int32",
        DataType::UInt64 => "uint64",
        DataType::Float32 => "float32",
        // The list spelling that old and new releases of `datasets` both read.
        DataType::List(element) => return json!([feature_of(element.data_type())]),
        DataType::Struct(fields) => return features_of(fields),
        other => unreachable!("no row has a column of type {other}"),
    };
    json!({ "dtype": dtype, "_type": "Value" })
}

/// Position of a row's column in a file, its type checked.
pub(super) fn find_column(
    path: &Path,
    schema: &Schema,
    expected: &FieldRef,
) -> Result<usize, Error> {
    let Some(index) = schema.fields().iter().position(|f| f.name() == expected.name()) else {
        let names: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
        return Err(Error::MissingColumn {
            path: path.to_owned(),
            column: expected.name().clone(),
            expected: describe(expected.data_type()),
            got: names.join(", "),
        });
    };
    let got = schema.field(index).data_type();
    if !same_type(expected.data_type(), got) {
        return Err(Error::ColumnType {
            path: path.to_owned(),
            column: expected.name().clone(),
            expected: describe(expected.data_type()),
            got: describe(got),
        });
    }
    Ok(index)
}

/// Equal but for what other writers are free to choose: the name of a list's items, whether
/// columns may hold nulls, and the order of a struct's fields.
fn same_type(expected: &DataType, got: &DataType) -> bool {
    match (expected, got) {
        (DataType::List(expected), DataType::List(got)) => {
            same_type(expected.data_type(), got.data_type())
        }
        (DataType::Struct(expected), DataType::Struct(got)) => expected.iter().all(|expected| {
            got.iter().any(|got| {
                got.name() == expected.name() && same_type(expected.data_type(), got.data_type())
            })
        }),
        _ => expected == got,
    }
}

/// A type as it appears in messages: `list<struct<role: string, content: string>>`.
fn describe(data_type: &DataType) -> String {
    match data_type {
        DataType::Utf8 | DataType::LargeUtf8 => "string".to_owned(),
        DataType::Boolean => "bool".to_owned(),
        DataType::List(element) | DataType::LargeList(element) => {
            format!("list<{}>", describe(element.data_type()))
        }
        DataType::Struct(fields) => {
            let fields: Vec<String> = fields
                .iter()
                .map(|f| format!("{}: {}", f.name(), describe(f.data_type())))
                .collect();
            format!("struct<{}>", fields.join(", "))
        }
        other => other.to_string().to_lowercase(),
    }
}

/// Whether every value of a type has a JSON form.
pub(super) fn fits_json(data_type: &DataType) -> bool {
    match data_type {
        DataType::Null
        | DataType::Boolean
        | DataType::Int8
        | DataType::Int16
        | DataType::Int32
        | DataType::Int64
        | DataType::UInt8
        | DataType::UInt16
        | DataType::UInt32
        | DataType::UInt64
        | DataType::Float16
        | DataType::Float32
        | DataType::Float64
        | DataType::Utf8
        | DataType::LargeUtf8
        | DataType::Date32
        | DataType::Date64
        | DataType::Timestamp(_, _) => true,
        DataType::List(element) | DataType::LargeList(element) => fits_json(element.data_type()),
        DataType::Struct(fields) => fields.iter().all(|f| fits_json(f.data_type())),
        _ => false,
    }
}
