//! Reading prompts out of other people's files: hh-rlhf in its several forms, message lists, plain
//! prompts; then normalising, deduplicating, spreading and splitting them.

mod config;
mod inputs;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail};
use arete_chain::pairs::{self, FieldError};
use arete_records::left_out::{self, LeftOut};
use arete_records::rows::PromptRow;
use arete_records::table::{self, Column};
use arete_records::{
    Message, Refusal, Role, Split, fill_splits, normalise, parquet, prompt_id, split_of,
};
use arete_stage::inputs::Piped;
use arete_stage::run::StageSpec;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::splits;
use crate::stage::{self, Estimate, Place};

pub use self::config::PromptsConfig;
pub(crate) use self::inputs::held_out;
pub use self::inputs::is_hub_id;
use self::inputs::{files, local};

/// How much of a conversation becomes the prompt.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Context {
    /// The first question alone, as the report does.
    Opening,
    /// Everything up to the last question.
    Full,
}

/// What to take from the inputs.
#[derive(Debug, Clone)]
pub struct Selection {
    /// How much of a conversation becomes the prompt.
    pub context: Context,
    /// Most prompts to keep; 0 keeps all.
    pub limit: usize,
    /// Most prompts to keep of the training, validation and test split; 0 keeps all.
    pub max_of_split: [usize; 3],
    /// Longer prompts (in characters, all messages together) are left out.
    pub max_chars: usize,
    /// Name to record as every prompt's source, instead of what the records say.
    pub source: Option<String>,
    /// Columns under other names than ours.
    pub columns: Vec<Column>,
    /// Seed of the spread.
    pub seed: u64,
}

/// How many records were read, and why some are not among the prompts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counts {
    /// Records read.
    pub read: usize,
    /// Records that cannot be used.
    #[serde(skip_serializing_if = "is_zero")]
    pub unusable: usize,
    /// Records whose prompt is empty.
    pub empty: usize,
    /// Prompts longer than `max_chars`.
    pub too_long: usize,
    /// Prompts seen before.
    pub duplicates: usize,
    /// Prompts beyond the limits.
    pub beyond_limit: usize,
    /// Prompts kept.
    pub kept: usize,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(n: &usize) -> bool {
    *n == 0
}

/// Prompts, and what is not among them.
#[derive(Debug, Clone, Default)]
pub struct Gathered {
    /// In the order of the spread.
    pub rows: Vec<PromptRow>,
    /// How many records, and why some are not among the rows.
    pub counts: Counts,
    /// Records that cannot be used, with the reasons.
    pub left_out: Vec<LeftOut>,
}

/// The stage's name.
pub const STAGE: &str = "prompts";

/// Runs the stage.
///
/// # Errors
///
/// Those of [`gather`], a hub that cannot be reached, a full disk.
pub fn run(config: &PromptsConfig, inputs: &[String], output: &Path) -> Result<()> {
    config.check()?;
    let started = Instant::now();
    let mut piped = Piped::default();
    let paths = &local(inputs, &mut piped)?;
    let mut files: Vec<(String, PathBuf)> = Vec::new();
    for (idx, path) in paths.iter().enumerate() {
        files.push((format!("input_{idx}"), path.clone()));
    }
    let settings = crate::config::recorded(config);
    let spec =
        StageSpec { stage: STAGE, output, config: settings, seed: config.seed, inputs: files };
    let Some(run) = stage::begin(spec)? else { return Ok(()) };
    let Gathered { rows, counts, left_out } = gather(paths, &selection(config))?;
    let (sources, splits) = tally(&rows);
    for split in [Split::Train, Split::Validation, Split::Test] {
        if !splits.contains_key(&split) {
            tracing::warn!(
                split = split.name(),
                prompts = rows.len(),
                "no prompt is of this split, which later stages read: three prompts at least give each split one"
            );
        }
    }
    left_out::write(output, &left_out)?;
    tracing::info!(
        read = counts.read,
        kept = counts.kept,
        duplicates = counts.duplicates,
        empty = counts.empty,
        too_long = counts.too_long,
        beyond_limit = counts.beyond_limit,
        splits = ?splits.iter().map(|(split, n)| format!("{split} {n}")).collect::<Vec<_>>(),
        "prompts"
    );
    for (source, n) in &sources {
        tracing::info!(source, n, "prompts from");
    }
    parquet::write(output.join("prompts.parquet"), &rows)?;
    splits::write(output, STAGE, &rows, |row| row.split)?;
    let mut recorded = match serde_json::to_value(counts) {
        Ok(Value::Object(recorded)) => recorded,
        _ => unreachable!("counts are a table"),
    };
    let splits: Map<String, Value> =
        splits.iter().map(|(split, n)| (split.name().to_owned(), (*n).into())).collect();
    recorded.insert("splits".to_owned(), splits.into());
    let sources: Map<String, Value> =
        sources.into_iter().map(|(source, n)| (source, n.into())).collect();
    recorded.insert("sources".to_owned(), sources.into());
    stage::finish(run, STAGE, Place::none(), recorded, started)
}

/// What a run would give.
///
/// # Errors
///
/// As [`run`]; nothing is written.
pub fn estimate(config: &PromptsConfig, inputs: &[String]) -> Result<Estimate> {
    config.check()?;
    let mut piped = Piped::default();
    let counts = gather(&local(inputs, &mut piped)?, &selection(config))?.counts;
    let counts = match serde_json::to_value(counts) {
        Ok(Value::Object(counts)) => counts,
        _ => unreachable!("counts are a table"),
    };
    Ok(Estimate { stage: STAGE, counts, n_tokens: None, seconds: None, memory: None })
}

/// How many prompts of each split a run would leave: train, validation, test.
///
/// # Errors
///
/// As [`gather`].
pub fn splits(config: &PromptsConfig, inputs: &[PathBuf]) -> Result<[usize; 3]> {
    let rows = gather(inputs, &selection(config))?.rows;
    Ok(Split::ALL.map(|split| rows.iter().filter(|row| row.split == split).count()))
}

fn selection(config: &PromptsConfig) -> Selection {
    Selection {
        context: config.context,
        limit: config.limit,
        max_of_split: [config.max_train, config.max_validation, config.max_test],
        max_chars: config.max_chars,
        source: config.source.clone(),
        columns: config.column.clone().unwrap_or_default(),
        seed: config.seed,
    }
}

/// Reads every input (a file of any format that [`table`] reads, or a directory of them) into prompts. Records that cannot
/// be used are left out, unless they are more than a [share](left_out::is_share).
///
/// The rows come in the order of a hash of seed and id, whatever the order of the inputs: a limit
/// takes an even spread of all inputs, and a larger limit keeps what a smaller one had. A prompt's split is that of its opening
/// question, unless names hold prompts out (their record or file says so). Three prompts or more give each split one ([`fill_splits`]).
///
/// # Errors
///
/// An unreadable or damaged file, too many records without a usable prompt, or no prompts at all.
pub fn gather(inputs: &[PathBuf], selection: &Selection) -> Result<Gathered> {
    let mut counts = Counts::default();
    let mut seen = HashSet::new();
    let (mut rows, mut left_out) = (Vec::new(), Vec::new());
    let mut held_out = HashMap::new();
    for path in files(inputs)? {
        let of_file = self::held_out(inputs, &path);
        let default_source = table::stem(&path);
        let mut wrong = Vec::new();
        let table = table::read_renamed(&path, &selection.columns)?;
        let n_records = table.n_rows();
        counts.read += table.unreadable.len();
        wrong.extend(pairs::unreadable(table.unreadable));
        for (line, record) in table.records {
            counts.read += 1;
            let messages = match prompt_of(&record, selection.context) {
                Ok(messages) => messages,
                Err(error) => {
                    wrong.push((line, error));
                    continue;
                }
            };
            if !messages.iter().any(|message| message.role == Role::User) {
                counts.empty += 1;
                continue;
            }
            let n_chars: usize = messages.iter().map(|m| m.content.chars().count()).sum();
            if n_chars > selection.max_chars {
                counts.too_long += 1;
                continue;
            }
            let of_record = pairs::named_split(&record).filter(|split| *split != Split::Train);
            if let Some(split) = of_record.or(of_file) {
                held_out.entry(opening(&messages)).or_insert(split);
            }
            let prompt_id = prompt_id(&messages);
            if !seen.insert(prompt_id.clone()) {
                counts.duplicates += 1;
                continue;
            }
            let named = selection.source.clone();
            let source = named
                .or_else(|| record.get("source").and_then(Value::as_str).map(str::to_owned))
                .unwrap_or_else(|| default_source.clone());
            rows.push(PromptRow {
                prompt_id,
                split: split_of(&messages),
                source,
                prompt: messages,
            });
        }
        counts.unusable += wrong.len();
        left_out.extend(pairs::leave_out(&path, wrong, n_records)?);
    }
    if rows.is_empty() {
        bail!(Refusal::file(
            inputs.first().cloned().unwrap_or_default(),
            "prompts",
            "at least one usable prompt",
            format!(
                "{} records, {} empty, {} longer than {} characters",
                counts.read, counts.empty, counts.too_long, selection.max_chars
            )
        ));
    }
    hold_out(&mut rows, &held_out);
    rows.sort_by_cached_key(|row| spread_key(selection.seed, &row.prompt_id));
    fill(&mut rows);
    let n_usable = rows.len();
    let mut n_kept = [0; 3];
    rows.retain(|row| {
        let (most, kept) = match row.split {
            Split::Train => (selection.max_of_split[0], &mut n_kept[0]),
            Split::Validation => (selection.max_of_split[1], &mut n_kept[1]),
            Split::Test => (selection.max_of_split[2], &mut n_kept[2]),
        };
        *kept += 1;
        most == 0 || *kept <= most
    });
    if selection.limit > 0 && rows.len() > selection.limit {
        rows.truncate(selection.limit);
        fill(&mut rows);
    }
    counts.beyond_limit = n_usable - rows.len();
    counts.kept = rows.len();
    Ok(Gathered { rows, counts, left_out })
}

/// Gives prompts whose opening question is held out by name (their record's, or their file's) the split of that name, and draws
/// the others among the splits that no name holds out. Where nothing would be left to train on, names say nothing.
fn hold_out(rows: &mut [PromptRow], held_out: &HashMap<String, Split>) {
    let own: Vec<Option<Split>> =
        rows.iter().map(|row| held_out.get(&opening(&row.prompt)).copied()).collect();
    if own.iter().all(Option::is_some) {
        return;
    }
    let taken: BTreeSet<Split> = own.iter().flatten().copied().collect();
    for (row, named) in rows.iter_mut().zip(own) {
        let drawn = if taken.contains(&row.split) { Split::Train } else { row.split };
        row.split = named.unwrap_or(drawn);
    }
}

/// The opening question of a prompt.
fn opening(prompt: &[Message]) -> String {
    let asked = prompt.iter().find(|message| message.role == Role::User);
    asked.map_or_else(String::new, |message| message.content.clone())
}

/// Gives every split a prompt where there are enough: prompts of one opening question stay together.
fn fill(rows: &mut [PromptRow]) {
    let mut items: Vec<(String, Split)> =
        rows.iter().map(|row| (opening(&row.prompt), row.split)).collect();
    let n_moved = fill_splits(&mut items);
    if n_moved > 0 {
        tracing::info!(prompts = n_moved, "moved to splits that would have had none");
        for (row, (_, split)) in rows.iter_mut().zip(items) {
            row.split = split;
        }
    }
}

/// Prompts by source, and by split.
pub fn tally(rows: &[PromptRow]) -> (BTreeMap<String, usize>, BTreeMap<Split, usize>) {
    let (mut sources, mut splits) = (BTreeMap::new(), BTreeMap::new());
    for row in rows {
        *sources.entry(row.source.clone()).or_insert(0) += 1;
        *splits.entry(row.split).or_insert(0) += 1;
    }
    (sources, splits)
}

fn spread_key(seed: u64, prompt_id: &str) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(seed.to_le_bytes());
    hash.update(prompt_id.as_bytes());
    hash.finalize().into()
}

/// The prompt of a record, in whichever of the known forms it comes; empty of a record that asks nothing.
fn prompt_of(record: &Map<String, Value>, context: Context) -> Result<Vec<Message>, FieldError> {
    let conversation = pairs::conversation_of(record)?.unwrap_or_default();
    Ok(cut(tidied(conversation), context))
}

/// Contents normalised, empty messages left out, and consecutive ones of a role joined.
pub(crate) fn tidied(messages: Vec<Message>) -> Vec<Message> {
    let normal = messages
        .into_iter()
        .map(|message| Message { content: normalise(&message.content), ..message })
        .filter(|message| !message.content.is_empty());
    merged(normal)
}

/// Consecutive messages of one role as one: chat templates want the roles to alternate.
fn merged(messages: impl Iterator<Item = Message>) -> Vec<Message> {
    let mut out: Vec<Message> = Vec::new();
    for message in messages {
        match out.last_mut() {
            Some(last) if last.role == message.role => {
                last.content.push_str("\n\n");
                last.content.push_str(&message.content);
            }
            _ => out.push(message),
        }
    }
    out
}

/// Keeps the opening question, or everything up to the last question.
fn cut(mut messages: Vec<Message>, context: Context) -> Vec<Message> {
    match context {
        Context::Opening => {
            messages.into_iter().find(|m| m.role == Role::User).into_iter().collect()
        }
        Context::Full => {
            let end = messages.iter().rposition(|m| m.role == Role::User).map_or(0, |at| at + 1);
            messages.truncate(end);
            let greeting = messages.iter().take_while(|m| m.role == Role::Assistant).count();
            messages.drain(..greeting); // templates want the human to begin
            messages
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use arete_chain::dialogue;

    use super::inputs::of_splits;
    use super::*;

    /// Rows and counts, as most tests want them.
    fn gather(inputs: &[PathBuf], selection: &Selection) -> Result<(Vec<PromptRow>, Counts)> {
        super::gather(inputs, selection).map(|found| (found.rows, found.counts))
    }

    fn selection() -> Selection {
        Selection {
            columns: Vec::new(),
            context: Context::Opening,
            limit: 0,
            max_of_split: [0; 3],
            max_chars: 4000,
            source: None,
            seed: 0,
        }
    }

    fn file(dir: &tempfile::TempDir, name: &str, text: &str) -> PathBuf {
        let path = dir.path().join(name);
        fs_err::write(&path, text).unwrap();
        path
    }

    fn contents(rows: &[PromptRow]) -> Vec<String> {
        let mut out: Vec<String> = rows.iter().map(|row| dialogue::format(&row.prompt)).collect();
        out.sort();
        out
    }

    #[test]
    fn a_stage_s_folder_gives_its_table_alone() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("prompts");
        fs_err::create_dir_all(own.join("splits")).unwrap();
        let names = [
            "run.json",
            "machine.json",
            "timings.jsonl",
            "prompts.parquet",
            "splits/train.parquet",
        ];
        names.iter().for_each(|name| fs_err::write(own.join(name), "").unwrap());
        assert_eq!(files(std::slice::from_ref(&own)).unwrap(), [own.join("prompts.parquet")]);
        // Elsewhere a folder of that name holds data.
        fs_err::remove_file(own.join("run.json")).unwrap();
        let found = files(std::slice::from_ref(&own)).unwrap();
        assert!(found.contains(&own.join("splits/train.parquet")), "{found:?}");
    }

    #[test]
    fn the_hub_is_asked_for_owner_and_name_alone() {
        for id in ["Anthropic/hh-rlhf", "owner/name@v1", "owner/name/data/train.parquet"] {
            assert!(is_hub_id(id), "{id}");
        }
        for path in ["nothere.jsonl", "nothere/data.jsonl", "nothere/data.csv.gz", "/abs/path"] {
            assert!(!is_hub_id(path), "{path}");
        }
    }

    #[test]
    fn copies_that_editors_and_systems_keep_are_no_data() {
        let dir = tempfile::tempdir().unwrap();
        let line = "{\"prompt\": \"q\"}\n";
        fs_err::create_dir(dir.path().join(".ipynb_checkpoints")).unwrap();
        for name in [".ipynb_checkpoints/prompts-checkpoint.jsonl", "._train.jsonl", "_old.jsonl"] {
            fs_err::write(dir.path().join(name), "{\"prompt\": \"stale\"}\n").unwrap();
        }
        let meant = file(&dir, "prompts.jsonl", line);
        std::os::unix::fs::symlink("user@host.17", dir.path().join(".#prompts.jsonl")).unwrap();
        assert_eq!(files(&[dir.path().to_owned()]).unwrap(), [meant]);
    }

    #[test]
    fn every_form_of_record_gives_its_opening_question() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(
            &dir,
            "x.jsonl",
            concat!(
                r#"{"chosen": "\n\nHuman: first: Human?\n\nAssistant: no\n\nHuman: second\n\nAssistant: yes", "rejected": "x"}"#,
                "\n\n",
                r#"{"prompt": "plain: question"}"#,
                "\n",
                r#"{"messages": [{"role":"system","content":"s"},{"role":"user","content":" listed "},{"role":"assistant","content":"a"}]}"#,
                "\n",
                r#"{"prompt": "plain: question", "source": "again"}"#,
                "\n",
                r#"{"prompt": "   "}"#,
                "\n",
            ),
        );
        let (rows, counts) = gather(&[path], &selection()).unwrap();
        let expected =
            ["\n\nHuman: first: Human?", "\n\nHuman: listed", "\n\nHuman: plain: question"];
        assert_eq!(contents(&rows), expected);
        assert_eq!(
            counts,
            Counts { read: 5, empty: 1, duplicates: 1, kept: 3, ..Counts::default() }
        );
        assert!(rows.iter().all(|row| row.source == "x"));
    }

    #[test]
    fn a_data_sets_splits_are_its_files() {
        let paths = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Vec<_>>();
        // The files of Anthropic/hh-rlhf, of which the last holds no pairs.
        let hh = paths(&[
            "helpful-base/train.jsonl.gz",
            "harmless-base/test.jsonl.gz",
            "red-team-attempts/red_team_attempts.jsonl.gz",
        ]);
        assert_eq!(of_splits(hh.clone()), hh[..2]);
        let sharded = paths(&["data/train-00000-of-00002.parquet", "data/contest.parquet"]);
        assert_eq!(of_splits(sharded.clone()), sharded[..1]);
        let plain = paths(&["questions.jsonl", "more.jsonl"]);
        assert_eq!(of_splits(plain.clone()), plain);
    }

    #[test]
    fn prompts_held_out_by_record_or_file_stay_held_out() {
        let dir = tempfile::tempdir().unwrap();
        let lines = |name: &str, n: usize| -> String {
            (0..n).map(|i| format!("{{\"prompt\": \"{name} {i}\"}}\n")).collect()
        };
        fs_err::create_dir(dir.path().join("dev")).unwrap();
        file(&dir, "test-00000-of-00001.jsonl", &lines("held", 30));
        file(&dir, "dev/contest.jsonl", &lines("seen", 30));
        let named = "{\"prompt\": \"own\", \"split\": \"validation\"}\n";
        // A question that is asked in training, too, is held out.
        file(&dir, "train.jsonl", &(lines("taught", 100) + &lines("held", 1) + named));
        let all_train = lines("taught", 100).replace('}', ", \"split\": \"train\"}");
        file(&dir, "all-train.jsonl", &all_train);
        let splits = |inputs: &[PathBuf], begins: &str| -> BTreeMap<Split, usize> {
            let (mut rows, _) = gather(inputs, &selection()).unwrap();
            rows.retain(|row| row.prompt[0].content.starts_with(begins));
            tally(&rows).1
        };
        let all = [dir.path().to_path_buf()];
        assert_eq!(splits(&all, "held"), BTreeMap::from([(Split::Test, 30)]));
        assert_eq!(splits(&all, "seen"), BTreeMap::from([(Split::Validation, 30)]));
        assert_eq!(splits(&all, "taught"), BTreeMap::from([(Split::Train, 100)]));
        assert_eq!(splits(&all, "own"), BTreeMap::from([(Split::Validation, 1)]));
        // With nothing to train on, or nothing held out, names say nothing; a folder around an input does not either.
        for input in ["test-00000-of-00001.jsonl", "dev/contest.jsonl", "dev", "all-train.jsonl"] {
            assert_eq!(splits(&[dir.path().join(input)], "").len(), 3, "{input}");
        }
        // Where no file is one of validation, some of the others are.
        let two =
            ["test-00000-of-00001.jsonl", "all-train.jsonl"].map(|name| dir.path().join(name));
        let drawn = splits(&two, "taught");
        assert_eq!(drawn.keys().copied().collect::<Vec<_>>(), [Split::Train, Split::Validation]);
    }

    #[test]
    fn full_context_ends_at_the_last_question() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(
            &dir,
            "x.jsonl",
            r#"{"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"}"#,
        );
        let full = Selection { context: Context::Full, ..selection() };
        let (rows, _) = gather(&[path], &full).unwrap();
        assert_eq!(contents(&rows), ["\n\nHuman: a\n\nAssistant: b\n\nHuman: c"]);
    }

    #[test]
    fn a_limit_spreads_over_the_inputs_and_grows_by_adding() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a", "b"] {
            let lines: String =
                (0..50).map(|i| format!("{{\"prompt\": \"{name} {i}\"}}\n")).collect();
            file(&dir, &format!("{name}.jsonl"), &lines);
        }
        let inputs = [dir.path().to_path_buf()];
        let (small, counts) = gather(&inputs, &Selection { limit: 20, ..selection() }).unwrap();
        let (large, _) = gather(&inputs, &Selection { limit: 40, ..selection() }).unwrap();
        assert_eq!(small[..], large[..20]);
        assert_eq!(counts.beyond_limit, 80);
        let (sources, _) = tally(&small);
        assert!(sources["a"] >= 4 && sources["b"] >= 4, "{sources:?}");
        let other = Selection { limit: 20, seed: 1, ..selection() };
        assert_ne!(gather(&inputs, &other).unwrap().0, small);
    }

    #[test]
    fn each_split_has_a_limit_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let lines: String = (0..200).map(|i| format!("{{\"prompt\": \"{i}\"}}\n")).collect();
        let inputs = [file(&dir, "x.jsonl", &lines)];
        let of =
            |max_of_split| gather(&inputs, &Selection { max_of_split, ..selection() }).unwrap();
        let (all, _) = of([0; 3]);
        let n_validation = tally(&all).1[&Split::Validation];
        let (some, counts) = of([30, 0, 5]);
        let (_, splits) = tally(&some);
        assert_eq!(splits[&Split::Train], 30);
        assert_eq!(splits[&Split::Validation], n_validation);
        assert_eq!(splits[&Split::Test], 5);
        assert_eq!((counts.kept, counts.beyond_limit), (some.len(), 200 - some.len()));
        // The first of each split, in the order they would have had anyway.
        let first: Vec<_> = all.iter().filter(|row| row.split == Split::Train).take(30).collect();
        let kept: Vec<_> = some.iter().filter(|row| row.split == Split::Train).collect();
        assert_eq!(kept, first);
    }

    #[test]
    fn a_megabyte_prompt_is_left_out_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        let text = format!("{{\"prompt\": \"{}\"}}\n{{\"prompt\": \"ok\"}}\n", "x".repeat(1 << 20));
        let (rows, counts) = gather(&[file(&dir, "x.jsonl", &text)], &selection()).unwrap();
        assert_eq!((rows.len(), counts.too_long), (1, 1));
    }

    #[test]
    fn damaged_input_is_refused_with_file_and_line() {
        let dir = tempfile::tempdir().unwrap();
        let error = |name: &str, text: &str| {
            gather(&[file(&dir, name, text)], &selection()).unwrap_err().to_string()
        };
        let empty = error("empty.jsonl", "");
        assert!(empty.contains("empty.jsonl") && empty.contains("at least one usable"), "{empty}");
        let missing = error("missing.jsonl", "{\"question\": \"x\"}\n");
        assert!(
            missing.contains("missing.jsonl: row 1") && missing.contains("got question"),
            "{missing}"
        );
        let number = error("number.jsonl", "{\"prompt\": 3}\n{\"prompt\": 4}\n");
        assert!(
            number.contains("number.jsonl: row 1") && number.contains("got 3 (2 of 2"),
            "{number}"
        );
        let path = dir.path().join("utf8.jsonl");
        fs_err::write(&path, b"{\"prompt\": \"\xff\"}\n").unwrap();
        assert!(gather(&[path], &selection()).unwrap_err().to_string().contains("UTF-8"));
    }

    #[test]
    fn a_bad_record_among_many_is_left_out_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let mut lines: Vec<String> = (0..30).map(|i| format!("{{\"prompt\": \"{i}\"}}")).collect();
        lines[7] = "{\"prompt\": 3}".to_owned();
        let path = file(&dir, "x.jsonl", &lines.join("\n"));
        let found = super::gather(&[path], &selection()).unwrap();
        assert_eq!((found.counts.read, found.counts.unusable, found.rows.len()), (30, 1, 29));
        assert_eq!(found.left_out[0].item, "x.jsonl:8");
        assert!(found.left_out[0].reason.contains("expected a text or a list"), "{found:?}");
    }

    /// 21 prompts of which none is of validation: one case of nine.
    #[test]
    fn every_split_of_a_small_set_has_a_prompt() {
        let dir = tempfile::tempdir().unwrap();
        for n in 3..40 {
            let lines: String = (0..n).map(|i| format!("{{\"prompt\": \"{n} {i}\"}}\n")).collect();
            let (rows, _) = gather(&[file(&dir, "x.jsonl", &lines)], &selection()).unwrap();
            assert_eq!(tally(&rows).1.len(), 3, "{n}");
        }
        let lines: String = (0..200).map(|i| format!("{{\"prompt\": \"{i}\"}}\n")).collect();
        let few = Selection { limit: 3, ..selection() };
        let (rows, _) = gather(&[file(&dir, "x.jsonl", &lines)], &few).unwrap();
        assert_eq!(tally(&rows).1.len(), 3);
    }

    /// A pipe can be read once, and is hashed first: it is copied.
    #[test]
    fn a_pipe_is_an_input() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("questions.csv");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
        assert!(made.success());
        let writer = std::thread::spawn({
            let pipe = pipe.clone();
            move || fs_err::write(pipe, "prompt\nIs it fair?\n").unwrap()
        });
        let mut piped = Piped::default();
        let paths = local(&[pipe.to_str().unwrap().to_owned()], &mut piped).unwrap();
        writer.join().unwrap();
        for _ in 0..2 {
            let (rows, _) = gather(&paths, &selection()).unwrap();
            assert_eq!(contents(&rows), ["\n\nHuman: Is it fair?"]);
            assert_eq!(rows[0].source, "questions");
        }
    }

    #[test]
    fn columns_of_other_names_are_prompts() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(&dir, "x.csv", "id,question\n1,\"Is it \"\"fair\"\",\nthen?\"\n2,42\n");
        let columns = vec!["prompt=question".parse().unwrap()];
        let named = Selection { columns, ..selection() };
        let (rows, _) = gather(std::slice::from_ref(&path), &named).unwrap();
        assert_eq!(contents(&rows), ["\n\nHuman: 42", "\n\nHuman: Is it \"fair\",\nthen?"]);
        let columns = vec!["prompt=query".parse().unwrap()];
        let error = gather(&[path], &Selection { columns, ..selection() }).unwrap_err().to_string();
        assert!(
            error.contains("expected a column `query`") && error.contains("`id`, `question`"),
            "{error}"
        );
    }

    #[test]
    fn a_cut_gzip_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let lines: String =
            (0..2000).map(|i| format!("{{\"prompt\": \"question {i}\"}}\n")).collect();
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(lines.as_bytes()).unwrap();
        let bytes = encoder.finish().unwrap();
        let whole = dir.path().join("whole.jsonl.gz");
        fs_err::write(&whole, &bytes).unwrap();
        assert_eq!(gather(&[whole], &selection()).unwrap().1.kept, 2000);
        let half = dir.path().join("half.jsonl.gz");
        fs_err::write(&half, &bytes[..bytes.len() / 2]).unwrap();
        let error = gather(&[half], &selection()).unwrap_err().to_string();
        assert!(error.contains("half.jsonl.gz") && error.contains("gzip"), "{error}");
    }
}
