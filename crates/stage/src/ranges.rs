//! Numbers that no setting can sensibly have, refused by the name of the flag or key before anything is computed with them.

use std::path::Path;

use arete_records::Refusal;
use clap::ArgMatches;
use clap::parser::ValueSource;
use serde_json::{Map, Value};

use crate::Error;

/// Largest whole number of a setting: what is counted here (tokens, rows, steps) is held in memory.
const MOST: u64 = 1 << 31;
/// Settings that may be any number.
const ANY: [&str; 1] = ["seed"];

/// Looks at what was given on the command line; `settings` is how it was understood, under the names clap has.
///
/// # Errors
///
/// [`Error::Records`] naming the flag.
pub(crate) fn check_flags(
    matches: &ArgMatches,
    settings: &Map<String, Value>,
) -> Result<(), Error> {
    for (key, value) in settings {
        if let Value::Object(inner) = value {
            check_flags(matches, inner)?;
            continue;
        }
        let given = matches.try_contains_id(key).unwrap_or(false)
            && matches.value_source(key) == Some(ValueSource::CommandLine);
        if !given || ANY.contains(&key.as_str()) {
            continue;
        }
        let raw = matches.try_get_raw(key).ok().flatten().and_then(|mut raw| raw.next());
        let raw = raw.map(|raw| raw.to_string_lossy().into_owned()).unwrap_or_default();
        // JSON has no infinities: what was one is null.
        let is_endless =
            value.is_null() && raw.parse().is_ok_and(|number: f64| !number.is_finite());
        if let Some(expected) = expected(value).or_else(|| is_endless.then(|| FINITE.to_owned())) {
            let flag = format!("--{}", key.replace('_', "-"));
            return Err(arete_records::Error::from(Refusal::setting(flag, expected, raw)).into());
        }
    }
    Ok(())
}

/// Looks at a value of a recipe.
///
/// # Errors
///
/// [`Error::Records`] naming the file, the table and the key.
pub(crate) fn check_entry(path: &Path, table: &str, key: &str, value: &Value) -> Result<(), Error> {
    if let Value::Object(inner) = value {
        return inner.iter().try_for_each(|(inner, value)| {
            check_entry(path, &format!("{table}.{key}"), inner, value)
        });
    }
    match expected(value) {
        Some(expected) if !ANY.contains(&key) => {
            let refusal =
                Refusal::file(path, format!("key `{key}` in `[{table}]`"), expected, value);
            Err(arete_records::Error::from(refusal).into())
        }
        _ => Ok(()),
    }
}

const FINITE: &str = "a finite number";

/// What would be accepted in place of a number out of range.
fn expected(value: &Value) -> Option<String> {
    let number = value.as_number()?;
    let is_too_large = match (number.as_u64(), number.as_i64()) {
        (Some(number), _) => number > MOST,
        (None, Some(number)) => number.unsigned_abs() > MOST,
        (None, None) => {
            return (number.as_f64()?.abs() > 1e30).then(|| "a number below 1e30".to_owned());
        }
    };
    is_too_large.then(|| format!("a whole number of at most {MOST}"))
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, FromArgMatches};
    use serde::{Deserialize, Serialize};

    #[derive(Debug, clap::Args, Serialize, Deserialize)]
    struct Inner {
        #[arg(long, default_value_t = 3)]
        rows: usize,
    }

    #[derive(Debug, clap::Args, Serialize, Deserialize)]
    struct Config {
        #[arg(long, default_value_t = 0.1)]
        learning_rate: f64,
        #[arg(long)]
        score_clip: Option<f64>,
        #[arg(long, default_value_t = 1)]
        draws: usize,
        #[arg(long, default_value_t = 1)]
        seed: u64,
        #[arg(long, default_value = "x")]
        title: String,
        #[command(flatten)]
        #[serde(flatten)]
        inner: Inner,
    }

    #[derive(Debug, clap::Parser)]
    struct Cli {
        #[command(flatten)]
        config: Config,
    }

    fn resolve(arguments: &[&str], recipe: Option<&str>) -> Result<Config, String> {
        let matches = Cli::command().try_get_matches_from([&["x"], arguments].concat()).unwrap();
        Cli::from_arg_matches(&matches).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        fs_err::write(file.path(), recipe.unwrap_or_default()).unwrap();
        let recipe = recipe.map(|_| file.path());
        crate::recipe::resolve(&matches, "sft", recipe).map_err(|error| {
            assert!(matches!(
                crate::exit::class_of(&error),
                Some(arete_records::Class::Setting | arete_records::Class::Data)
            ));
            error.to_string()
        })
    }

    #[test]
    fn absurd_numbers_name_their_flag() {
        for recipe in [None, Some("[run]\nseed = 1\n")] {
            for (arguments, flag) in [
                (["--learning-rate", "inf"], "--learning-rate"),
                (["--learning-rate", "NaN"], "--learning-rate"),
                (["--learning-rate", "1e300"], "--learning-rate"),
                (["--score-clip", "-inf"], "--score-clip"),
                (["--draws", "18446744073709551615"], "--draws"),
                (["--draws", "10000000000"], "--draws"),
                (["--rows", "18446744073709551615"], "--rows"),
            ] {
                let given = format!("{}={}", arguments[0], arguments[1]);
                let error = resolve(&[&given], recipe).unwrap_err();
                assert!(error.starts_with(flag) && error.contains(arguments[1]), "{error}");
            }
            for fine in [
                "--seed=18446744073709551615",
                "--title=inf",
                "--title=99999999999999",
                "--draws=1000000000",
            ] {
                resolve(&[fine], recipe).unwrap();
            }
        }
        for (recipe, key) in [
            ("[sft]\ndraws = 10000000000\n", "`draws` in `[sft]`"),
            ("[sft]\nlearning_rate = inf\n", "learning_rate"),
            ("[sft]\nrows = 9223372036854775807\n", "`rows` in `[sft]`"),
        ] {
            let error = resolve(&[], Some(recipe)).unwrap_err();
            assert!(error.contains(key), "{error}");
        }
    }
}
