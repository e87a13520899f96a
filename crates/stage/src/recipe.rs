//! Recipes: one TOML file whose tables hold the stages' settings.
//!
//! Precedence, weakest first: the defaults that clap knows, the recipe's `[run]` table, the
//! recipe's table of the stage, environment variables that clap reads, flags on the command line.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use clap::ArgMatches;
use clap::parser::ValueSource;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{Error, ranges};

/// The tables a recipe may hold: one a stage, and `run` for what stages share.
pub const TABLES: [&str; 14] = [
    "prompts",
    "demonstrations",
    "sft",
    "conversations",
    "preferences",
    "calibrate",
    "reward",
    "dpo",
    "ppo",
    "scoring",
    "report",
    "run",
    "yardstick",
    "model",
];

/// The keys of `[run]`: each is the default of every stage that has a setting of that name. The last four say what the
/// pipeline is made from, where its command line does not.
pub const RUN_KEYS: [&str; 10] = [
    "seed",
    "model",
    "device",
    "dtype",
    "threads",
    "constitution",
    "prompts",
    "judge",
    "pairs",
    "yardstick",
];

/// The key by which a table leaves its stage out of the pipeline; no stage has a setting of that name.
pub const ENABLED: &str = "enabled";

/// What stands for the recipe's path in errors about values of `--set`.
const SET: &str = "--set";

/// Largest recipe that is read, in bytes.
const MAX_RECIPE_BYTES: u64 = 1 << 20;

/// The settings of a stage: clap's defaults, overlaid by the recipe's `[run]` and `[<stage>]`
/// tables, overlaid by what was given on the command line.
///
/// `matches` are those of the (sub)command that holds `C`'s arguments. `C`'s fields serialise under
/// the names clap knows them by (its own field names); a nested `#[command(flatten)]` struct is
/// a nested table, or none with `#[serde(flatten)]`.
///
/// ```no_run
/// #[derive(clap::Args, serde::Serialize, serde::Deserialize)]
/// #[serde(deny_unknown_fields)]
/// struct Config {
///     /// Step size at the start.
///     #[arg(long, default_value_t = 2e-4)]
///     learning_rate: f64,
/// }
///
/// #[derive(clap::Parser)]
/// struct Cli {
///     #[command(flatten)]
///     stage: arete_stage::cli::StageArgs,
///     #[command(flatten)]
///     config: Config,
/// }
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use clap::{CommandFactory, FromArgMatches};
/// let matches = Cli::command().get_matches();
/// let recipe = Cli::from_arg_matches(&matches)?.stage.recipe;
/// let config: Config = arete_stage::recipe::resolve(&matches, "sft", recipe.as_deref())?;
/// # Ok(()) }
/// ```
///
/// # Errors
///
/// [`Error::Io`], [`Error::Recipe`] if the recipe is not readable; [`Error::UnknownTable`],
/// [`Error::UnknownKey`], naming the nearest known one; [`Error::RecipeValue`] if a value has the
/// wrong type; [`Error::Records`] if a number is out of every range; [`Error::Config`] if `matches` do not hold `C`.
pub fn resolve<C: clap::Args + Serialize + DeserializeOwned>(
    matches: &ArgMatches,
    stage: &str,
    recipe: Option<&Path>,
) -> Result<C, Error> {
    let Some(path) = recipe else {
        let parsed = C::from_arg_matches(matches).map_err(|error| config_error(stage, &error))?;
        if let Ok(Value::Object(flags)) = serde_json::to_value(&parsed) {
            ranges::check_flags(matches, &flags)?;
        }
        return Ok(parsed);
    };
    Recipe::read_for(Some(path), &[], stage)?.resolve(matches, stage)
}

fn config_error(stage: &str, reason: &dyn std::fmt::Display) -> Error {
    Error::Config { stage: stage.to_owned(), reason: reason.to_string() }
}

/// A value given on the command line: `TABLE.KEY=VALUE`, the value as in a recipe; what is not TOML is a text.
#[derive(Debug, Clone, PartialEq)]
pub struct Setting {
    /// The table.
    pub table: String,
    /// The key, dotted where it stands in a table of its own.
    pub key: String,
    value: Value,
}

impl Setting {
    /// One setting for each value of a list separated by commas; itself where there is one value.
    ///
    /// # Errors
    ///
    /// A value that is empty.
    pub fn alternatives(&self) -> Result<Vec<Self>, String> {
        let Value::String(values) = &self.value else { return Ok(vec![self.clone()]) };
        let of = |value: &&str| format!("{}.{}={value}", self.table, self.key).parse();
        let values = between_commas(values);
        if values.iter().any(|value| value.is_empty()) {
            return Err(format!("{self}: expected values between commas"));
        }
        values.iter().map(of).collect()
    }
}

/// The parts between commas that stand in no bracket: `{ a = 1, b = 2 }, { a = 2 }` are two.
fn between_commas(text: &str) -> Vec<&str> {
    let (mut parts, mut from, mut depth) = (Vec::new(), 0, 0_usize);
    for (at, c) in text.char_indices() {
        match c {
            '{' | '[' => depth += 1,
            '}' | ']' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                parts.push(text[from..at].trim());
                from = at + 1;
            }
            _ => {}
        }
    }
    parts.push(text[from..].trim());
    parts
}

impl std::str::FromStr for Setting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("expected table.key=value (ppo.kl_coef=0.02, say), got `{text}`");
        let (name, value) = text.split_once('=').ok_or_else(wrong)?;
        let (table, key) = name.trim().split_once('.').ok_or_else(wrong)?;
        if table.is_empty() || key.split('.').any(str::is_empty) {
            return Err(wrong());
        }
        let value = match toml::from_str::<toml::Table>(&format!("value = {}", value.trim())) {
            Ok(mut parsed) if parsed.len() == 1 => parsed.remove("value").map(to_json),
            _ => None,
        }
        .unwrap_or_else(|| Value::String(value.to_owned()));
        Ok(Self { table: table.to_owned(), key: key.to_owned(), value })
    }
}

impl std::fmt::Display for Setting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}=", self.table, self.key)?;
        // As TOML, which is how it is read again.
        match toml::Value::try_from(&self.value) {
            Ok(value) => write!(f, "{value}"),
            Err(_) => write!(f, "{}", self.value),
        }
    }
}

/// A recipe as read, with what the command line sets on top.
#[derive(Debug, Clone, Default)]
pub struct Recipe {
    path: PathBuf,
    tables: Tables,
    /// Tables and keys that the command line set.
    set: BTreeSet<(String, String)>,
}

impl Recipe {
    /// Reads a recipe (none is an empty one) and puts the settings of the command line over it.
    ///
    /// # Errors
    ///
    /// [`Error::Io`], [`Error::Recipe`] if it is not readable, [`Error::UnknownTable`].
    pub fn read(path: Option<&Path>, settings: &[Setting]) -> Result<Self, Error> {
        Self::read_for(path, settings, "run")
    }

    fn read_for(path: Option<&Path>, settings: &[Setting], stage: &str) -> Result<Self, Error> {
        let mut recipe = match path {
            Some(path) => {
                let (path, tables) = (path.to_owned(), read_tables(path, stage)?);
                Self { path, tables, set: BTreeSet::new() }
            }
            None => Self::default(),
        };
        for setting in settings {
            check_table(Path::new(SET), &setting.table, stage)?;
            let table = recipe.tables.entry(setting.table.clone()).or_default();
            put(table, &setting.key, setting.value.clone());
            let key = setting.key.split('.').next().unwrap_or_default();
            recipe.set.insert((setting.table.clone(), key.to_owned()));
        }
        Ok(recipe)
    }

    /// Whether a table asks for its stage, or for leaving it out; none if it says nothing.
    ///
    /// # Errors
    ///
    /// [`Error::RecipeValue`] if the key is neither true nor false.
    pub fn enabled(&self, table: &str) -> Result<Option<bool>, Error> {
        let Some(value) = self.tables.get(table).and_then(|table| table.get(ENABLED)) else {
            return Ok(None);
        };
        value.as_bool().map(Some).ok_or_else(|| self.wrong(table, ENABLED, "true or false"))
    }

    /// A text of `[run]`.
    ///
    /// # Errors
    ///
    /// [`Error::RecipeValue`] if it is no text.
    pub fn run_text(&self, key: &str) -> Result<Option<&str>, Error> {
        let value = self.tables.get("run").and_then(|table| table.get(key));
        value.map(|v| v.as_str().ok_or_else(|| self.wrong("run", key, "a text"))).transpose()
    }

    /// The settings of a stage: see [`resolve`].
    ///
    /// # Errors
    ///
    /// Those of [`resolve`].
    pub fn resolve<C: clap::Args + Serialize + DeserializeOwned>(
        &self,
        matches: &ArgMatches,
        stage: &str,
    ) -> Result<C, Error> {
        let parsed = C::from_arg_matches(matches).map_err(|error| config_error(stage, &error))?;
        let flags = match serde_json::to_value(&parsed) {
            Ok(Value::Object(flags)) => flags,
            Ok(_) => return Err(config_error(stage, &"does not serialise to a table")),
            Err(error) => return Err(config_error(stage, &error)),
        };
        ranges::check_flags(matches, &flags)?;
        let entries = self.applicable_entries(stage, &flags)?;
        let mut settings = flags.clone();
        for entry in &entries {
            let path = self.place(&entry.table, &entry.key);
            ranges::check_entry(path, &entry.table, &entry.key, &entry.value)?;
            overlay(&mut settings, &entry.key, &entry.value, matches);
        }
        serde_json::from_value(Value::Object(settings)).map_err(|error| {
            self.blame::<C>(&flags, &entries, matches)
                .unwrap_or_else(|| config_error(stage, &error))
        })
    }

    /// Where a value stands, for errors.
    fn place(&self, table: &str, key: &str) -> &Path {
        let is_set = self.set.contains(&(table.to_owned(), key.to_owned()));
        if is_set { Path::new(SET) } else { &self.path }
    }

    fn wrong(&self, table: &str, key: &str, expected: &str) -> Error {
        let got = self.tables.get(table).and_then(|table| table.get(key));
        Error::RecipeValue {
            path: self.place(table, key).to_owned(),
            table: table.to_owned(),
            key: key.to_owned(),
            got: got.map(ToString::to_string).unwrap_or_default(),
            reason: format!("expected {expected}"),
        }
    }

    /// The shared values that the stage has settings for, then the stage's own, names checked.
    fn applicable_entries(
        &self,
        stage: &str,
        flags: &Map<String, Value>,
    ) -> Result<Vec<Entry>, Error> {
        let mut entries = Vec::new();
        for (key, value) in self.tables.get("run").into_iter().flatten() {
            check_key(self.place("run", key), "run", key, RUN_KEYS.into_iter())?;
            if flags.contains_key(key) {
                let (key, value) = (key.clone(), value.clone());
                entries.push(Entry { table: "run".to_owned(), key, value });
            }
        }
        let own = if stage == "run" { None } else { self.tables.get(stage) };
        for (key, value) in own.into_iter().flatten() {
            if key == ENABLED && !flags.contains_key(key) {
                self.enabled(stage)?;
                continue;
            }
            let path = self.place(stage, key);
            check_key(path, stage, key, flags.keys().map(String::as_str))?;
            if let (Value::Object(known), Value::Object(inner)) = (&flags[key], value) {
                for inner_key in inner.keys() {
                    let table = format!("{stage}.{key}");
                    check_key(path, &table, inner_key, known.keys().map(String::as_str))?;
                }
            }
            let (key, value) = (key.clone(), value.clone());
            entries.push(Entry { table: stage.to_owned(), key, value });
        }
        Ok(entries)
    }

    /// The first of the recipe's values that alone makes the settings unreadable.
    fn blame<C: DeserializeOwned>(
        &self,
        flags: &Map<String, Value>,
        entries: &[Entry],
        matches: &ArgMatches,
    ) -> Option<Error> {
        entries.iter().find_map(|entry| {
            let mut settings = flags.clone();
            overlay(&mut settings, &entry.key, &entry.value, matches);
            let error = serde_json::from_value::<C>(Value::Object(settings)).err()?;
            Some(Error::RecipeValue {
                path: self.place(&entry.table, &entry.key).to_owned(),
                table: entry.table.clone(),
                key: entry.key.clone(),
                got: entry.value.to_string(),
                reason: error.to_string(),
            })
        })
    }
}

/// A recipe's value that concerns the stage.
struct Entry {
    table: String,
    key: String,
    value: Value,
}

/// Puts a value under a dotted key.
fn put(table: &mut Map<String, Value>, key: &str, value: Value) {
    match key.split_once('.') {
        None => {
            table.insert(key.to_owned(), value);
        }
        Some((outer, inner)) => {
            let entry = table.entry(outer).or_insert_with(|| Value::Object(Map::new()));
            if !entry.is_object() {
                *entry = Value::Object(Map::new());
            }
            if let Value::Object(table) = entry {
                put(table, inner, value);
            }
        }
    }
}

type Tables = BTreeMap<String, Map<String, Value>>;

fn read_tables(path: &Path, stage: &str) -> Result<Tables, Error> {
    let recipe_error = |reason: String| Error::Recipe { path: path.to_owned(), reason };
    let bytes =
        arete_records::files::read_capped(path, MAX_RECIPE_BYTES).map_err(|error| match error {
            arete_records::Error::Io(error) => Error::Io(error),
            other => Error::Records(other),
        })?;
    let text = String::from_utf8(bytes).map_err(|error| recipe_error(error.to_string()))?;
    // A text of several lines is the same whatever system the recipe was written on.
    let text = text.replace("\r\n", "\n");
    let document: toml::Table =
        toml::from_str(&text).map_err(|error| recipe_error(error.to_string()))?;
    let mut tables = Tables::new();
    for (name, value) in document {
        check_table(path, &name, stage)?;
        match to_json(value) {
            Value::Object(table) => tables.insert(name, table),
            other => {
                return Err(recipe_error(format!(
                    "`{name}`: expected a table `[{name}]`, got {other}"
                )));
            }
        };
    }
    Ok(tables)
}

fn check_table(path: &Path, name: &str, stage: &str) -> Result<(), Error> {
    if TABLES.contains(&name) || name == stage {
        return Ok(());
    }
    Err(Error::UnknownTable {
        path: path.to_owned(),
        nearest: nearest(name, TABLES.into_iter()),
        known: TABLES.join(", "),
        table: name.to_owned(),
    })
}

fn to_json(value: toml::Value) -> Value {
    match value {
        toml::Value::String(text) => Value::String(text),
        toml::Value::Integer(number) => number.into(),
        // TOML has inf and nan, JSON has not: they become null and fail to fit their key.
        toml::Value::Float(number) => number.into(),
        toml::Value::Boolean(flag) => flag.into(),
        toml::Value::Datetime(time) => Value::String(time.to_string()),
        toml::Value::Array(items) => items.into_iter().map(to_json).collect(),
        toml::Value::Table(table) => {
            Value::Object(table.into_iter().map(|(key, value)| (key, to_json(value))).collect())
        }
    }
}

fn check_key<'a>(
    path: &Path,
    table: &str,
    key: &str,
    known: impl Iterator<Item = &'a str> + Clone,
) -> Result<(), Error> {
    if known.clone().any(|name| name == key) {
        return Ok(());
    }
    Err(Error::UnknownKey {
        path: path.to_owned(),
        table: table.to_owned(),
        key: key.to_owned(),
        nearest: nearest(key, known.clone()),
        known: known.collect::<Vec<_>>().join(", "),
    })
}

/// The known name most like `name`, if one is like it at all.
fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
    let name = name.to_lowercase().replace('-', "_");
    known
        .map(|candidate| (strsim::jaro_winkler(&name, candidate), candidate))
        .filter(|(similarity, _)| *similarity > 0.6)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate.to_owned())
}

/// Puts a recipe's value in place, unless its flag (or environment variable) was given.
fn overlay(settings: &mut Map<String, Value>, key: &str, value: &Value, matches: &ArgMatches) {
    if let (Some(Value::Object(inner_settings)), Value::Object(inner)) =
        (settings.get_mut(key), value)
    {
        for (key, value) in inner {
            overlay(inner_settings, key, value, matches);
        }
    } else if !given(matches, key) {
        settings.insert(key.to_owned(), value.clone());
    }
}

fn given(matches: &ArgMatches, id: &str) -> bool {
    matches.try_contains_id(id).is_ok()
        && matches!(
            matches.value_source(id),
            Some(ValueSource::CommandLine | ValueSource::EnvVariable)
        )
}

#[cfg(test)]
mod tests;
