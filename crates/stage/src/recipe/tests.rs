//! Tests of precedence and of what a recipe may hold.

use std::path::PathBuf;

use clap::{Args, Command};
use proptest::prelude::*;
use serde::Deserialize;

use super::*;

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
enum Truncated {
    Drop,
    Keep,
}

#[derive(Debug, PartialEq, Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[arg(long, default_value_t = 2e-4)]
    learning_rate: f64,
    #[arg(long)]
    limit: Option<usize>,
    #[arg(long, value_enum, default_value_t = Truncated::Drop)]
    truncated: Truncated,
    #[arg(long)]
    shuffle: bool,
    #[arg(long, value_delimiter = ',', default_values_t = [0.9, 0.95])]
    betas: Vec<f64>,
    #[command(flatten)]
    lora: Lora,
}

#[derive(Debug, PartialEq, Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Lora {
    #[arg(long, default_value_t = 16)]
    rank: usize,
    #[arg(long, default_value_t = 32.0)]
    alpha: f64,
}

fn defaults() -> Config {
    Config {
        seed: 0,
        learning_rate: 2e-4,
        limit: None,
        truncated: Truncated::Drop,
        shuffle: false,
        betas: vec![0.9, 0.95],
        lora: Lora { rank: 16, alpha: 32.0 },
    }
}

fn resolve_with(recipe: Option<&str>, flags: &[&str]) -> Result<Config, Error> {
    let dir = tempfile::tempdir().unwrap();
    let path: Option<PathBuf> = recipe.map(|text| {
        let path = dir.path().join("x.toml");
        fs_err::write(&path, text).unwrap();
        path
    });
    let command = Config::augment_args(Command::new("stage"));
    let matches = command.try_get_matches_from(["stage"].iter().chain(flags)).expect("valid flags");
    resolve(&matches, "sft", path.as_deref())
}

#[track_caller]
fn error_of(recipe: &str) -> String {
    resolve_with(Some(recipe), &[]).unwrap_err().to_string()
}

#[test]
fn without_recipe_and_flags_the_defaults_hold() {
    assert_eq!(resolve_with(None, &[]).unwrap(), defaults());
    assert_eq!(resolve_with(Some(""), &[]).unwrap(), defaults());
    assert_eq!(resolve_with(Some("[reward]\nrank = 4"), &[]).unwrap(), defaults());
}

#[test]
fn the_recipe_overrides_the_defaults() {
    let recipe = "
        [sft]
        seed = 7
        learning_rate = 1
        limit = 3
        truncated = 'keep'
        shuffle = true
        betas = [0.5]
        lora.rank = 4
    ";
    let expected = Config {
        seed: 7,
        learning_rate: 1.0,
        limit: Some(3),
        truncated: Truncated::Keep,
        shuffle: true,
        betas: vec![0.5],
        lora: Lora { rank: 4, alpha: 32.0 },
    };
    assert_eq!(resolve_with(Some(recipe), &[]).unwrap(), expected);
}

#[test]
fn flags_override_the_recipe_even_with_the_default_value() {
    let recipe =
        "[sft]\nlearning_rate = 1e-3\nlimit = 3\nshuffle = true\nlora = {rank = 4, alpha = 8}";
    let flags = ["--learning-rate", "0.0002", "--limit", "9", "--rank", "16"];
    let config = resolve_with(Some(recipe), &flags).unwrap();
    assert_eq!(config.learning_rate, 2e-4);
    assert_eq!(config.limit, Some(9));
    assert_eq!(config.lora, Lora { rank: 16, alpha: 8.0 });
    assert!(config.shuffle); // not given as a flag
}

#[test]
fn shared_values_are_weaker_than_the_stage_and_stronger_than_defaults() {
    let recipe = "[run]\nseed = 5\nmodel = 'm.gguf'\n[sft]\nlimit = 1";
    assert_eq!(resolve_with(Some(recipe), &[]).unwrap().seed, 5);
    let recipe = "[run]\nseed = 5\n[sft]\nseed = 6";
    assert_eq!(resolve_with(Some(recipe), &[]).unwrap().seed, 6);
    assert_eq!(resolve_with(Some(recipe), &["--seed", "8"]).unwrap().seed, 8);
}

#[test]
fn environment_variables_are_stronger_than_the_recipe() {
    #[derive(Args, Serialize, Deserialize)]
    struct WithEnv {
        // Any variable that is surely set: its text is the value.
        #[arg(long, env = "CARGO_PKG_NAME", default_value = "none")]
        name: String,
    }
    // Cargo sets it for `cargo test`; run by hand it may be missing.
    let Ok(set) = std::env::var("CARGO_PKG_NAME") else {
        eprintln!("skipped: CARGO_PKG_NAME is not set");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.toml");
    fs_err::write(&path, "[sft]\nname = 'from the recipe'").unwrap();
    let matches = WithEnv::augment_args(Command::new("stage")).get_matches_from(["stage"]);
    let config: WithEnv = resolve(&matches, "sft", Some(&path)).unwrap();
    assert_eq!(config.name, set);
}

#[test]
fn an_unknown_key_names_the_nearest_and_the_file() {
    let error = error_of("[sft]\nlearning_rte = 1");
    assert!(error.contains("x.toml: unknown key `learning_rte` in `[sft]`"), "{error}");
    assert!(error.contains("did you mean `learning_rate`?"), "{error}");
    let error = error_of("[sft]\nlearning-rate = 1");
    assert!(error.contains("did you mean `learning_rate`?"), "{error}");
    let error = error_of("[sft.lora]\nrnk = 1");
    assert!(error.contains("unknown key `rnk` in `[sft.lora]`, did you mean `rank`?"), "{error}");
    let error = error_of("[sft]\nzzz = 1");
    assert!(error.contains("`zzz` in `[sft]`, known: seed, learning_rate, limit,"), "{error}");
    let error = error_of("[run]\nsed = 1");
    assert!(error.contains("unknown key `sed` in `[run]`, did you mean `seed`?"), "{error}");
}

#[test]
fn an_unknown_table_names_the_nearest() {
    let error = error_of("[rewards]\nrank = 1");
    assert!(error.contains("x.toml: unknown table `[rewards]`, did you mean `reward`?"), "{error}");
    assert!(error_of("sft = 3").contains("`sft`: expected a table `[sft]`, got 3"));
    // A key outside any table is mistaken for a table, and named.
    assert!(error_of("seed = 3").contains("unknown table `[seed]`"));
}

#[test]
fn a_value_of_another_type_names_key_and_value() {
    let error = error_of("[run]\nseed = 1\n[sft]\nlimit = 4\nlearning_rate = 'high'");
    assert!(error.contains("x.toml: key `learning_rate` in `[sft]`"), "{error}");
    assert!(error.contains("got \"high\"") && error.contains("expected f64"), "{error}");
    let error = error_of("[sft]\ntruncated = 'dropped'");
    assert!(error.contains("key `truncated`") && error.contains("`drop`"), "{error}");
    let error = error_of("[sft]\nlora = 16");
    assert!(error.contains("key `lora`"), "{error}");
    let error = error_of("[run]\nseed = -1");
    assert!(error.contains("key `seed` in `[run]`"), "{error}");
    assert!(error_of("[sft]\nlearning_rate = nan").contains("key `learning_rate`"));
}

#[test]
fn what_is_not_a_recipe_is_refused() {
    assert!(error_of("[sft\n").contains("x.toml: not readable as a recipe"));
    assert!(error_of("[sft]\nseed = 1\nseed = 2").contains("duplicate key"));
    let deep = format!("[sft]\nbetas = {}", "[".repeat(100_000));
    assert!(error_of(&deep).contains("not readable as a recipe"));
    let long = format!("#{}", "x".repeat(2 << 20));
    assert!(error_of(&long).contains("expected at most 1048576 bytes"));
    let dir = tempfile::tempdir().unwrap();
    let matches = Config::augment_args(Command::new("stage")).get_matches_from(["stage"]);
    let missing = resolve::<Config>(&matches, "sft", Some(&dir.path().join("no.toml")));
    assert!(matches!(missing.unwrap_err(), Error::Io(_)));
    let latin1 = dir.path().join("latin1.toml");
    fs_err::write(&latin1, b"[sft]\n# caf\xe9").unwrap();
    assert!(matches!(resolve::<Config>(&matches, "sft", Some(&latin1)), Err(Error::Recipe { .. })));
}

#[test]
fn settings_of_the_command_line_override_the_recipe_and_pass_the_same_checks() {
    let matches = || Config::augment_args(Command::new("stage")).get_matches_from(["stage"]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.toml");
    fs_err::write(&path, "[run]\nseed = 5\n[sft]\nlimit = 3\nlora.rank = 4").unwrap();
    let resolved = |settings: &[&str]| {
        let settings: Vec<Setting> = settings.iter().map(|text| text.parse().unwrap()).collect();
        Recipe::read(Some(&path), &settings)?.resolve::<Config>(&matches(), "sft")
    };
    let config = resolved(&["sft.limit=9", "sft.truncated=keep", "sft.betas=[0.5]"]).unwrap();
    assert_eq!((config.limit, config.seed), (Some(9), 5));
    assert_eq!((config.truncated, config.betas), (Truncated::Keep, vec![0.5]));
    let config = resolved(&["run.seed = 6", "sft.lora.alpha=1e1"]).unwrap();
    assert_eq!((config.seed, config.lora), (6, Lora { rank: 4, alpha: 10.0 }));
    for (setting, expected) in [
        ("sft.learning_rte=1", "--set: unknown key `learning_rte` in `[sft]`, did you mean"),
        ("sfft.limit=1", "--set: unknown table `[sfft]`, did you mean `sft`?"),
        ("sft.limit=many", "--set: key `limit` in `[sft]`"),
    ] {
        let error = resolved(&[setting]).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
    for wrong in ["sft", "limit=3", ".a=1", "sft.=1", "sft.lora..rank=1"] {
        assert!(wrong.parse::<Setting>().is_err(), "{wrong}");
    }
}

#[test]
fn a_table_says_whether_its_stage_is_in() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.toml");
    fs_err::write(&path, "[sft]\nenabled = false\nlimit = 3\n[ppo]\nenabled = 'no'").unwrap();
    let recipe = Recipe::read(Some(&path), &[]).unwrap();
    assert_eq!(recipe.enabled("sft").unwrap(), Some(false));
    assert_eq!(recipe.enabled("reward").unwrap(), None);
    assert!(recipe.enabled("ppo").unwrap_err().to_string().contains("expected true or false"));
    // The program of a stage that is called by itself runs.
    let matches = Config::augment_args(Command::new("stage")).get_matches_from(["stage"]);
    let config: Config = resolve(&matches, "sft", Some(&path)).unwrap();
    assert_eq!(config.limit, Some(3));
}

#[test]
fn a_text_of_several_lines_is_the_same_with_other_line_ends() {
    let config = |text: &str| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.toml");
        fs_err::write(&path, text).unwrap();
        let recipe = Recipe::read(Some(&path), &[]).unwrap();
        recipe.run_text("model").unwrap().unwrap().to_owned()
    };
    // As Python's tomllib reads it.
    assert_eq!(config("[run]\r\nmodel = \"\"\"a\r\nb\"\"\"\r\n"), "a\nb");
    assert_eq!(config("\u{feff}[run]\nmodel = 'm'"), "m");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whoever speaks last in the order default, run, stage, flag is heard; nobody else matters.
    #[test]
    fn the_strongest_voice_is_heard(
        run: Option<u32>, stage: Option<u32>, flag: Option<u32>, other: Option<u32>,
    ) {
        let mut recipe = String::from("[run]\n");
        run.inspect(|seed| recipe.push_str(&format!("seed = {seed}\n")));
        recipe.push_str("[sft]\n");
        stage.inspect(|seed| recipe.push_str(&format!("seed = {seed}\n")));
        recipe.push_str("[ppo]\n");
        other.inspect(|seed| recipe.push_str(&format!("seed = {seed}\n")));
        let flag_text = flag.map(|seed| format!("--seed={seed}"));
        let flags: Vec<&str> = flag_text.as_deref().into_iter().collect();
        let expected = u64::from(flag.or(stage).or(run).unwrap_or(0));
        let config = resolve_with(Some(&recipe), &flags).unwrap();
        prop_assert_eq!(config, Config { seed: expected, ..defaults() });
    }

    #[test]
    fn no_text_makes_it_panic(text in "\\PC{0,200}|\\[sft\\]\n[a-z_]{1,12} = [-a-z0-9.'\\[\\]{}]{0,20}\n") {
        let _ = resolve_with(Some(&text), &[]);
    }
}
