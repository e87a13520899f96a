//! Recipes: one TOML file whose tables hold the stages' settings.
//!
//! Precedence, weakest first: the defaults that clap knows, the recipe's `[run]` table, the
//! recipe's table of the stage, environment variables that clap reads, flags on the command line.

use std::path::Path;

use clap::ArgMatches;
use clap::parser::ValueSource;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::Error;

/// The tables a recipe may hold: one a stage, and `run` for what stages share.
pub const TABLES: [&str; 13] = [
    "prompts",
    "demonstrations",
    "sft",
    "conversations",
    "preferences",
    "calibrate",
    "reward",
    "ppo",
    "dpo",
    "scoring",
    "run",
    "yardstick",
    "model",
];

/// The keys of `[run]`: each is the default of every stage that has a setting of that name.
pub const RUN_KEYS: [&str; 6] = ["seed", "model", "device", "dtype", "threads", "constitution"];

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
/// wrong type; [`Error::Config`] if `matches` do not hold `C`.
pub fn resolve<C: clap::Args + Serialize + DeserializeOwned>(
    matches: &ArgMatches,
    stage: &str,
    recipe: Option<&Path>,
) -> Result<C, Error> {
    let config_error = |reason: String| Error::Config { stage: stage.to_owned(), reason };
    let parsed = C::from_arg_matches(matches).map_err(|error| config_error(error.to_string()))?;
    let Some(path) = recipe else {
        return Ok(parsed);
    };
    let flags = match serde_json::to_value(&parsed) {
        Ok(Value::Object(flags)) => flags,
        Ok(_) => return Err(config_error("does not serialise to a table".to_owned())),
        Err(error) => return Err(config_error(error.to_string())),
    };
    let entries = applicable_entries(path, stage, &flags)?;

    let mut settings = flags.clone();
    for entry in &entries {
        overlay(&mut settings, &entry.key, &entry.value, matches);
    }
    serde_json::from_value(Value::Object(settings)).map_err(|error| {
        blame::<C>(path, &flags, &entries, matches)
            .unwrap_or_else(|| config_error(error.to_string()))
    })
}

/// A recipe's value that concerns the stage.
struct Entry {
    table: String,
    key: String,
    value: Value,
}

/// The shared values that the stage has settings for, then the stage's own, names checked.
fn applicable_entries(
    path: &Path,
    stage: &str,
    flags: &Map<String, Value>,
) -> Result<Vec<Entry>, Error> {
    let mut tables = read_tables(path, stage)?;
    let mut entries = Vec::new();
    for (key, value) in tables.remove("run").unwrap_or_default() {
        check_key(path, "run", &key, RUN_KEYS.into_iter())?;
        if flags.contains_key(&key) {
            entries.push(Entry { table: "run".to_owned(), key, value });
        }
    }
    for (key, value) in tables.remove(stage).unwrap_or_default() {
        check_key(path, stage, &key, flags.keys().map(String::as_str))?;
        if let (Value::Object(known), Value::Object(inner)) = (&flags[&key], &value) {
            for inner_key in inner.keys() {
                let table = format!("{stage}.{key}");
                check_key(path, &table, inner_key, known.keys().map(String::as_str))?;
            }
        }
        entries.push(Entry { table: stage.to_owned(), key, value });
    }
    Ok(entries)
}

type Tables = std::collections::BTreeMap<String, Map<String, Value>>;

fn read_tables(path: &Path, stage: &str) -> Result<Tables, Error> {
    let recipe_error = |reason: String| Error::Recipe { path: path.to_owned(), reason };
    let n_bytes = fs_err::metadata(path)?.len();
    if n_bytes > MAX_RECIPE_BYTES {
        let reason = format!("expected at most {MAX_RECIPE_BYTES} bytes, got {n_bytes}");
        return Err(recipe_error(reason));
    }
    let bytes = fs_err::read(path)?;
    let text = String::from_utf8(bytes).map_err(|error| recipe_error(error.to_string()))?;
    // TOML leaves it to the reader what a line end is; the text of a template is the same on every system.
    let text = text.replace("\r\n", "\n");
    let document: toml::Table =
        toml::from_str(&text).map_err(|error| recipe_error(error.to_string()))?;
    let mut tables = Tables::new();
    for (name, value) in document {
        if !TABLES.contains(&name.as_str()) && name != stage {
            let known = TABLES.into_iter();
            return Err(Error::UnknownTable {
                path: path.to_owned(),
                nearest: nearest(&name, known.clone()),
                known: known.collect::<Vec<_>>().join(", "),
                table: name,
            });
        }
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

/// The first of the recipe's values that alone makes the settings unreadable.
fn blame<C: DeserializeOwned>(
    path: &Path,
    flags: &Map<String, Value>,
    entries: &[Entry],
    matches: &ArgMatches,
) -> Option<Error> {
    entries.iter().find_map(|entry| {
        let mut settings = flags.clone();
        overlay(&mut settings, &entry.key, &entry.value, matches);
        let error = serde_json::from_value::<C>(Value::Object(settings)).err()?;
        Some(Error::RecipeValue {
            path: path.to_owned(),
            table: entry.table.clone(),
            key: entry.key.clone(),
            got: entry.value.to_string(),
            reason: error.to_string(),
        })
    })
}

#[cfg(test)]
mod tests;
