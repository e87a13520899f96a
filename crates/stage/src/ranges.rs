//! Numbers that no setting can sensibly have, refused by the name of the flag or key before anything is computed with them.

use std::any::TypeId;
use std::path::Path;

use arete_records::Refusal;
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command};
use serde_json::{Map, Value};

use crate::Error;

/// Largest whole number of a setting: what is counted here (tokens, rows, steps) is held in memory.
const MOST: u64 = 1 << 31;
/// Most CPU threads; OpenMP makes room for as many as it is asked for.
const MOST_THREADS: u64 = 4096;
/// Largest other number: rates, weights, probabilities and seconds are far below.
const MOST_REAL: f64 = 1e9;
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
        if let Some(expected) =
            expected(key, value).or_else(|| is_endless.then(|| FINITE.to_owned()))
        {
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
    match expected(key, value) {
        Some(expected) if !ANY.contains(&key) => {
            let refusal =
                Refusal::file(path, format!("key `{key}` in `[{table}]`"), expected, value);
            Err(arete_records::Error::from(refusal).into())
        }
        _ => Ok(()),
    }
}

const FINITE: &str = "a finite number";

/// Looks at every number that a command line gives, those of subcommands too, whatever is made of it later.
///
/// # Errors
///
/// The flag, what would be accepted, and what was given.
pub(crate) fn check_given(command: &Command, matches: &ArgMatches) -> Result<(), Refusal> {
    for argument in command.get_arguments() {
        let key = argument.get_id().as_str();
        let given = matches.try_contains_id(key).unwrap_or(false)
            && matches.value_source(key) == Some(ValueSource::CommandLine);
        if !given || ANY.contains(&key) || !is_number(argument) {
            continue;
        }
        for raw in matches.try_get_raw(key).ok().flatten().into_iter().flatten() {
            let raw = raw.to_string_lossy();
            if let Some(expected) = expected_of(&raw) {
                let flag = argument.get_long().map_or(key.to_owned(), |long| format!("--{long}"));
                return Err(Refusal::setting(flag, expected, raw));
            }
        }
    }
    match matches.subcommand() {
        Some((name, inner)) => {
            command.find_subcommand(name).map_or(Ok(()), |command| check_given(command, inner))
        }
        None => Ok(()),
    }
}

fn is_number(argument: &Arg) -> bool {
    let kind = argument.get_value_parser().type_id();
    [
        TypeId::of::<f32>(),
        TypeId::of::<f64>(),
        TypeId::of::<i32>(),
        TypeId::of::<i64>(),
        TypeId::of::<u32>(),
        TypeId::of::<u64>(),
        TypeId::of::<usize>(),
    ]
    .iter()
    .any(|number| kind == *number)
}

fn expected_of(raw: &str) -> Option<String> {
    if let Ok(number) = raw.parse::<i128>() {
        let is_too_large = number.unsigned_abs() > u128::from(MOST);
        return is_too_large.then(|| format!("a whole number of at most {MOST}"));
    }
    let number: f64 = raw.parse().ok()?;
    if !number.is_finite() {
        return Some(FINITE.to_owned());
    }
    (number.abs() > MOST_REAL).then(|| format!("a number of at most {MOST_REAL:e}"))
}

/// What would be accepted in place of a number out of range.
fn expected(key: &str, value: &Value) -> Option<String> {
    let number = value.as_number()?;
    let most = if key == "threads" { MOST_THREADS } else { MOST };
    let is_too_large = match (number.as_u64(), number.as_i64()) {
        (Some(number), _) => number > most,
        (None, Some(number)) => number.unsigned_abs() > most,
        (None, None) => {
            let is_too_large = number.as_f64()?.abs() > MOST_REAL;
            return is_too_large.then(|| format!("a number of at most {MOST_REAL:e}"));
        }
    };
    is_too_large.then(|| format!("a whole number of at most {most}"))
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
        #[arg(long, default_value_t = 0)]
        threads: u32,
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
                (["--learning-rate", "1e10"], "--learning-rate"),
                (["--learning-rate", "18446744073709551615"], "--learning-rate"),
                (["--score-clip", "-inf"], "--score-clip"),
                (["--draws", "18446744073709551615"], "--draws"),
                (["--draws", "10000000000"], "--draws"),
                (["--rows", "18446744073709551615"], "--rows"),
                (["--threads", "1000000000"], "--threads"),
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
                "--threads=256",
            ] {
                resolve(&[fine], recipe).unwrap();
            }
        }
        for (recipe, key) in [
            ("[sft]\ndraws = 10000000000\n", "`draws` in `[sft]`"),
            ("[sft]\nlearning_rate = inf\n", "learning_rate"),
            (
                "[sft]\nthreads = 4097\n",
                "`threads` in `[sft]`: expected a whole number of at most 4096",
            ),
            ("[sft]\nrows = 9223372036854775807\n", "`rows` in `[sft]`"),
        ] {
            let error = resolve(&[], Some(recipe)).unwrap_err();
            assert!(error.contains(key), "{error}");
        }
    }

    /// Commands that have no recipe, too.
    #[test]
    fn every_number_of_a_command_line_is_looked_at() {
        #[derive(clap::Parser)]
        struct Program {
            #[command(subcommand)]
            command: Inside,
        }
        #[derive(clap::Subcommand)]
        enum Inside {
            Work {
                #[arg(long)]
                n_rows: Option<usize>,
                #[arg(long)]
                share: Option<f64>,
                #[arg(long)]
                output: Option<String>,
                #[arg(long)]
                seed: Option<u64>,
            },
        }
        let look = |given: &str| {
            let command = Program::command();
            let matches = command.clone().try_get_matches_from(["x", "work", given]).unwrap();
            super::check_given(&command, &matches).map_err(|refusal| refusal.to_string())
        };
        for (given, expected) in [
            ("--n-rows=18446744073709551615", "--n-rows: expected a whole number of at most"),
            ("--n-rows=10000000000", "--n-rows: expected a whole number of at most"),
            ("--share=1e10", "--share: expected a number of at most 1e9, got 1e10"),
            ("--share=10000000000", "--share: expected a whole number of at most"),
            ("--share=inf", "--share: expected a finite number, got inf"),
            ("--share=NaN", "--share: expected a finite number, got NaN"),
        ] {
            let refused = look(given).unwrap_err();
            assert!(refused.starts_with(expected), "{refused}");
        }
        for fine in ["--output=99999999999", "--seed=18446744073709551615", "--share=0.5"] {
            look(fine).unwrap();
        }
    }
}
