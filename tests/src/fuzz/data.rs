//! Files of data: JSON lines, tables, Parquet, prompts, pairs and demonstrations in every layout, answers of servers.

use std::io::Write as _;

use anyhow::Result;
use arete_chain::constitution::Turns;
use arete_chain::exemplars::{self, Use};
use arete_chain::pairs;
use arete_curation::engine::Labels;
use arete_curation::engine::server::{label_mass_of, reply_of};
use arete_curation::prompts::{Context, Selection, gather};
use arete_records::rows::{
    ConversationRow, DemonstrationRow, JudgementRow, PreferenceRow, PromptRow, RolloutRow,
};
use arete_records::table::Column;
use arete_records::{
    Aspect, Message, Virtue, jsonl, normalise, parquet, prompt_id, split_of, table,
};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::Value;

use super::{Kind, Place, Target, same};

const LAYOUTS: &str = "tests/fixtures/cases/layouts";

pub(super) const TARGETS: &[Target] = &[
    Target {
        name: "jsonl",
        reads: "JSON lines, or one array",
        kind: Kind::JsonLines,
        seeds: &["tests/fixtures/exemplars.jsonl", "tests/fixtures/cases/layouts/tables.jsonl"],
        n_quick: 3000,
        run: json_lines,
    },
    Target {
        name: "gzip",
        reads: "a gzipped file of JSON lines",
        kind: Kind::Binary,
        seeds: &["tests/fixtures/cases/layouts/tables_gzip.jsonl.gz"],
        n_quick: 2000,
        run: gzip,
    },
    Target {
        name: "csv",
        reads: "cells between commas",
        kind: Kind::Text,
        seeds: &["tests/fixtures/cases/layouts/tables.csv"],
        n_quick: 3000,
        run: csv,
    },
    Target {
        name: "tsv",
        reads: "cells between tabs",
        kind: Kind::Text,
        seeds: &["tests/fixtures/cases/layouts/tables.tsv"],
        n_quick: 2000,
        run: tsv,
    },
    Target {
        name: "text",
        reads: "a text a line",
        kind: Kind::Text,
        seeds: &["tests/fixtures/cases/layouts/tables.txt"],
        n_quick: 1000,
        run: text,
    },
    Target {
        name: "prompts",
        reads: "prompts in any layout",
        kind: Kind::JsonLines,
        seeds: &[LAYOUTS],
        n_quick: 2000,
        run: prompts,
    },
    Target {
        name: "pairs",
        reads: "preference pairs in any layout",
        kind: Kind::JsonLines,
        seeds: &[LAYOUTS, "crates/reward/tests/goldens/pairs.jsonl"],
        n_quick: 3000,
        run: labelled_pairs,
    },
    Target {
        name: "demonstrations",
        reads: "conversations to imitate, in any layout",
        kind: Kind::JsonLines,
        seeds: &["crates/sft/tests/goldens/data.jsonl", LAYOUTS],
        n_quick: 2000,
        run: demonstrations,
    },
    Target {
        name: "exemplars",
        reads: "exemplars of the chain",
        kind: Kind::JsonLines,
        seeds: &["tests/fixtures/exemplars.jsonl"],
        n_quick: 2000,
        run: exemplars,
    },
    Target {
        name: "parquet",
        reads: "any Parquet file, as records",
        kind: Kind::Binary,
        seeds: &[
            "tests/fixtures/cases/layouts/tables_gzip.parquet",
            "tests/fixtures/cases/layouts/tables_lz4.parquet",
            "tests/fixtures/cases/layouts/tables_snappy.parquet",
            "tests/fixtures/cases/layouts/tables_zstd.parquet",
            "crates/records/tests/data/many_types.pyarrow.parquet",
            "crates/records/tests/data/prompts.datasets.parquet",
        ],
        n_quick: 1000,
        run: parquet_records,
    },
    Target {
        name: "parquet_rows",
        reads: "a Parquet file as the rows of each of our files",
        kind: Kind::Binary,
        seeds: &["crates/records/tests/data/prompts.datasets.parquet"],
        n_quick: 500,
        run: parquet_rows,
    },
    Target {
        name: "column",
        reads: "--column OURS=THEIRS, and the names of turns and virtues",
        kind: Kind::Text,
        seeds: &[],
        n_quick: 2000,
        run: column,
    },
    Target {
        name: "text_of_prompts",
        reads: "the text of a prompt, for its id and split",
        kind: Kind::Text,
        seeds: &["tests/fixtures/cases/layouts/tables.txt"],
        n_quick: 1000,
        run: text_of_prompts,
    },
    Target {
        name: "server_answer",
        reads: "what an OpenAI-compatible server answers",
        kind: Kind::Json,
        seeds: &[],
        n_quick: 3000,
        run: server_answer,
    },
];

fn json_lines(place: &Place, input: &[u8]) -> Result<()> {
    let values = jsonl::read_any(&place.put("x.jsonl", input)?)?;
    let lines: Vec<String> = values.iter().map(|(_, value)| value.to_string()).collect();
    let again = jsonl::read(place.put("y.jsonl", lines.join("\n").as_bytes())?)?;
    let only = |values: Vec<(usize, Value)>| values.into_iter().map(|(_, value)| value).collect();
    same::<Vec<Value>>("values", &only(values), &only(again))
}

fn gzip(place: &Place, input: &[u8]) -> Result<()> {
    jsonl::read(place.put("x.jsonl.gz", input)?).map(drop).or_else(|error| {
        // The same bytes as what was packed: the stream is whole, its contents may be anything.
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(input)?;
        let packed = jsonl::read(place.put("y.jsonl.gz", &encoder.finish()?)?);
        let plain = jsonl::read(place.put("y.jsonl", input)?);
        same("packed and plain", &packed.ok(), &plain.ok())?;
        Err(error.into())
    })
}

/// Reads a table, writes every cell in quotes, and reads that.
fn cells(place: &Place, input: &[u8], ending: &str, separator: &str) -> Result<()> {
    let records = table::read(place.put(&format!("x.{ending}"), input)?)?;
    let Some((_, first)) = records.first() else { return Ok(()) };
    let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
    let names: Vec<String> = first.keys().map(|name| quoted(name)).collect();
    let mut text = names.join(separator);
    for (_, record) in &records {
        let cell = |value: &Value| match value {
            Value::Null => String::new(),
            Value::String(text) => quoted(text),
            other => other.to_string(),
        };
        let cells: Vec<String> = record.values().map(cell).collect();
        text += &format!("\n{}", cells.join(separator));
    }
    let again = table::read(place.put(&format!("y.{ending}"), text.as_bytes())?)?;
    // A line of one empty cell is blank, and blank lines are none.
    if names.len() > 1 {
        same("cells", &records, &again)?;
    }
    Ok(())
}

fn csv(place: &Place, input: &[u8]) -> Result<()> {
    cells(place, input, "csv", ",")
}

fn tsv(place: &Place, input: &[u8]) -> Result<()> {
    cells(place, input, "tsv", "\t")
}

fn text(place: &Place, input: &[u8]) -> Result<()> {
    let records = table::read(place.put("x.txt", input)?)?;
    let lines: Vec<&str> =
        records.iter().filter_map(|(_, record)| record["text"].as_str()).collect();
    let again = table::read(place.put("y.txt", lines.join("\n").as_bytes())?)?;
    same("lines", &lines.len(), &again.len())
}

fn prompts(place: &Place, input: &[u8]) -> Result<()> {
    let mut selection = Selection {
        context: Context::Full,
        limit: 0,
        max_of_split: [0; 3],
        max_chars: 10_000,
        source: None,
        columns: Vec::new(),
        seed: 7,
    };
    let path = place.put("x.jsonl", input)?;
    let whole = gather(std::slice::from_ref(&path), &selection);
    selection.context = Context::Opening;
    let first = gather(std::slice::from_ref(&path), &selection);
    first?;
    let rows = whole?.rows;
    let file = place.at("prompts.parquet");
    parquet::write(&file, &rows)?;
    same("rows", &parquet::read::<PromptRow>(&file)?, &rows)
}

fn labelled_pairs(place: &Place, input: &[u8]) -> Result<()> {
    let path = place.put("x.jsonl", input)?;
    let file = pairs::read_file(&path, &[])?;
    for pair in &file.pairs {
        let _ = pair.is_whole();
    }
    same("records", &(file.n_records >= file.left_out.len()), &true)?;
    arete_reward::data::read_pairs(&path, &[])?;
    Ok(())
}

fn demonstrations(place: &Place, input: &[u8]) -> Result<()> {
    let (rows, _) = arete_sft::data::read(&place.put("x.jsonl", input)?, &[])?;
    let has_reply = rows.iter().all(|row| {
        row.messages.iter().any(|message| message.role == arete_records::Role::Assistant)
    });
    same("a reply to imitate", &has_reply, &true)
}

fn exemplars(place: &Place, input: &[u8]) -> Result<()> {
    let path = place.put("x.jsonl", input)?;
    let turns = Turns::default();
    for wanted in [Use::Sft, Use::FewShot, Use::Calibration] {
        for exemplar in exemplars::load(&path, wanted, &turns)? {
            exemplar.conversation(&turns);
            exemplar.split();
        }
    }
    Ok(())
}

fn parquet_records(place: &Place, input: &[u8]) -> Result<()> {
    let records = parquet::read_json(place.put("x.parquet", input)?)?;
    for record in records.into_iter().take(100) {
        pairs::conversation_of(&record).ok();
    }
    Ok(())
}

fn parquet_rows(place: &Place, input: &[u8]) -> Result<()> {
    let path = place.put("x.parquet", input)?;
    let found = [
        parquet::read::<PromptRow>(&path).map(drop),
        parquet::read::<DemonstrationRow>(&path).map(drop),
        parquet::read::<ConversationRow>(&path).map(drop),
        parquet::read::<JudgementRow>(&path).map(drop),
        parquet::read::<PreferenceRow>(&path).map(drop),
        parquet::read::<RolloutRow>(&path).map(drop),
    ];
    // Every refusal is looked at, not the first alone.
    let mut refused = Vec::new();
    for error in found.into_iter().filter_map(Result::err) {
        super::judge(&error.into())?;
        refused.push(());
    }
    match refused.len() {
        6 => Err(arete_records::Refusal::file(&path, "", "rows of ours", "others").into()),
        _ => Ok(()),
    }
}

fn column(_: &Place, input: &[u8]) -> Result<()> {
    let text = String::from_utf8_lossy(input);
    if let Ok(aspect) = Aspect::new(&text) {
        same("turn", &aspect.to_string().parse::<Aspect>()?, &aspect)?;
    }
    if let Ok(virtue) = Virtue::new(&text) {
        same("virtue", &virtue.to_string().parse::<Virtue>()?, &virtue)?;
    }
    let column: Column = text.parse()?;
    same("column", &String::from(column.clone()).parse::<Column>()?, &column)
}

fn text_of_prompts(_: &Place, input: &[u8]) -> Result<()> {
    let text = String::from_utf8_lossy(input);
    let once = normalise(&text);
    let (first, again) = ([Message::user(text)], [Message::user(once.as_str())]);
    same("id", &prompt_id(&first), &prompt_id(&again))?;
    same("split", &split_of(&first), &split_of(&again))
}

fn server_answer(_: &Place, input: &[u8]) -> Result<()> {
    let text = String::from_utf8_lossy(input);
    let is_short = |reason: &str| same("a short reason", &(reason.len() <= 2048), &true);
    let reply = reply_of(&text);
    for labels in [Labels::AB, Labels::YES_NO] {
        match label_mass_of(&text, labels) {
            Ok(mass) => {
                let fits = |p: f64| (0.0..=1.02).contains(&p);
                same("a probability", &(fits(mass.first) && fits(mass.second)), &true)?;
            }
            Err(reason) => is_short(&reason)?,
        }
    }
    match reply {
        Ok(_) => Ok(()),
        Err(reason) => {
            is_short(&reason)?;
            Err(arete_records::Refusal::setting("answer", "a reply", reason).into())
        }
    }
}
