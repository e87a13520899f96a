//! A run's setup: recipe and flags read once, and what every stage gets from them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use arete_records::files;
use arete_stage::clock;
use arete_stage::exit::Usage;
use arete_stage::recipe::{Recipe, Setting};
use arete_stage::rounds;
use clap::Args;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::stages::{PIPELINE, Stage};

/// Where prompts come from when nobody says.
const PROMPTS: &str = "data/prompts";

/// The copy of a recipe with what the command line set, for the page.
const RECIPE_AS_RUN: &str = "recipe-as-run.toml";

/// Most rounds of a run.
const MOST_ROUNDS: u64 = 1000;

/// A round of how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round {
    /// From 1.
    pub number: u64,
    /// All of the run.
    pub of: u64,
}

/// What a run is made from and where it goes.
#[derive(Debug, Clone, Default, Args)]
pub struct SetupArgs {
    /// Recipe (TOML): one table a stage; a stage without one takes its defaults
    #[arg(long, value_name = "FILE")]
    pub recipe: Option<PathBuf>,
    /// Directory of the run, with one directory a stage; {date} in it is today's [default: runs/ and the recipe's name]
    #[arg(long, value_name = "DIR")]
    pub run: Option<PathBuf>,
    /// A value over the recipe's: ppo.kl_coef=0.02; may be repeated
    #[arg(long = "set", value_name = "TABLE.KEY=VALUE")]
    pub set: Vec<Setting>,
    /// The original model: directory, GGUF file or hub id [default: the recipe's `run.model`]
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,
    /// Files, directories or hub ids of the prompts [default: the recipe's `run.prompts`, else data/prompts]
    #[arg(long, num_args = 1.., value_name = "PATH")]
    pub prompts: Vec<String>,
    /// Another judge than the fine-tuned model
    #[arg(long, value_name = "MODEL")]
    pub judge: Option<String>,
    /// Human preference pairs: scoring asks every model which side it finds likelier
    #[arg(long, value_name = "FILE")]
    pub pairs: Option<PathBuf>,
    /// A reward model from human pairs, by which probes and Scores are measured as well
    #[arg(long, value_name = "DIR")]
    pub yardstick: Option<PathBuf>,
    /// Where every stage computes: cpu, cuda, cuda:N, or auto [default: the recipe's]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// Rounds: what one has tuned answers, is judged, teaches reward models and is tuned again in the next; each goes to
    /// RUN/round-K [default: as many as the run has, if it has rounds]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=MOST_ROUNDS))]
    pub rounds: Option<u64>,
    /// The one of them that a stage's process belongs to
    #[arg(long, hide = true, requires = "rounds")]
    pub round: Option<u64>,
}

impl SetupArgs {
    /// The same as words of a command line.
    pub fn to_words(&self) -> Vec<OsString> {
        let mut words: Vec<OsString> = Vec::new();
        let mut put = |flag: &str, value: OsString| words.extend([flag.into(), value]);
        let path = |path: &PathBuf| path.clone().into_os_string();
        self.recipe.iter().for_each(|recipe| put("--recipe", path(recipe)));
        self.run.iter().for_each(|run| put("--run", path(run)));
        self.set.iter().for_each(|setting| put("--set", setting.to_string().into()));
        self.model.iter().for_each(|model| put("--model", model.into()));
        self.judge.iter().for_each(|judge| put("--judge", judge.into()));
        self.pairs.iter().for_each(|pairs| put("--pairs", path(pairs)));
        self.yardstick.iter().for_each(|yardstick| put("--yardstick", path(yardstick)));
        self.device.iter().for_each(|device| put("--device", device.into()));
        self.rounds.iter().for_each(|rounds| put("--rounds", rounds.to_string().into()));
        self.round.iter().for_each(|round| put("--round", round.to_string().into()));
        self.prompts.iter().for_each(|prompts| put("--prompts", prompts.into()));
        words
    }
}

/// Recipe and flags, read.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The run's directory.
    pub dir: PathBuf,
    /// Inputs of the stage `prompts`.
    pub prompts: Vec<String>,
    /// The judge, if it is not the model itself.
    pub judge: Option<String>,
    /// Labelled pairs that scoring asks about.
    pub pairs: Option<PathBuf>,
    /// A reward model that only watches.
    pub yardstick: Option<PathBuf>,
    /// The round that it is the setup of, of a run with rounds; the last one, for what is done once.
    pub round: Option<Round>,
    recipe: Recipe,
    recipe_path: Option<PathBuf>,
    set: Vec<Setting>,
    model: Option<String>,
    device: Option<String>,
}

impl Setup {
    /// Reads the recipe; flags go before its `[run]` table.
    ///
    /// # Errors
    ///
    /// A recipe that cannot be read, or has a table that no stage reads.
    pub fn new(arguments: &SetupArgs) -> Result<Self> {
        let recipe = match &arguments.recipe {
            Some(path) if !path.exists() => {
                let message = format!("{}: no such file", path.display());
                return Err(std::io::Error::new(std::io::ErrorKind::NotFound, message))
                    .context("reading the recipe");
            }
            path => Recipe::read(path.as_deref(), &arguments.set)?,
        };
        let named = |flag: &Option<String>, key: &str| -> Result<Option<String>> {
            match flag {
                Some(value) => Ok(Some(value.clone())),
                None => Ok(recipe.run_text(key)?.map(str::to_owned)),
            }
        };
        let place = |flag: &Option<PathBuf>, key: &str| -> Result<Option<PathBuf>> {
            let text = flag.as_ref().map(|path| path.to_string_lossy().into_owned());
            Ok(named(&text, key)?.map(PathBuf::from))
        };
        let prompts = if arguments.prompts.is_empty() {
            let shipped = || files::shipped(Path::new(PROMPTS)).to_string_lossy().into_owned();
            vec![named(&None, "prompts")?.unwrap_or_else(shipped)]
        } else {
            arguments.prompts.clone()
        };
        let dir = arguments.run.as_deref().map(dated);
        let dir = dir.unwrap_or_else(|| default_dir(arguments.recipe.as_deref()));
        let rounds = arguments.rounds.or_else(|| rounds::newest(&dir));
        let round = |of| Round { number: arguments.round.unwrap_or(of).min(of), of };
        Ok(Self {
            round: rounds.map(round),
            dir,
            prompts,
            judge: named(&arguments.judge, "judge")?,
            pairs: place(&arguments.pairs, "pairs")?,
            yardstick: place(&arguments.yardstick, "yardstick")?,
            model: named(&arguments.model, "model")?,
            device: arguments.device.clone(),
            set: arguments.set.clone(),
            recipe_path: arguments.recipe.clone(),
            recipe,
        })
    }

    /// The original model.
    ///
    /// # Errors
    ///
    /// None is named.
    pub fn model(&self) -> Result<&str> {
        let message = "name the model: --model, or `model` in the recipe's [run]";
        Ok(self.model.as_deref().ok_or_else(|| Usage(message.to_owned()))?)
    }

    /// What SFT leaves, and the judge where no other is named: the fine-tuned model, or the original where SFT is left out.
    ///
    /// # Errors
    ///
    /// As [`Setup::model`] and [`Setup::has`].
    pub fn fine_tuned(&self) -> Result<String> {
        if self.has("sft")? { Ok(self.place("sft/merged")) } else { Ok(self.model()?.to_owned()) }
    }

    /// What the stages after SFT load and freeze: the fine-tuned model; from the second round on what the round before tuned.
    ///
    /// # Errors
    ///
    /// As [`Setup::fine_tuned`].
    pub fn base(&self) -> Result<String> {
        match self.round {
            Some(round) if round.number > 1 => self.tuned_in(round.number - 1),
            _ => self.fine_tuned(),
        }
    }

    /// The model that a round tuned, merged.
    ///
    /// # Errors
    ///
    /// Nothing is tuned.
    pub fn tuned_in(&self, round: u64) -> Result<String> {
        let policy = self.policy()?.ok_or_else(|| Usage("no stage tunes a policy".to_owned()))?;
        let merged = rounds::place(&self.dir, round, &format!("{policy}/merged"));
        Ok(merged.to_string_lossy().into_owned())
    }

    /// The stage whose policy the run is about: PPO's, or DPO's where that is all there is.
    ///
    /// # Errors
    ///
    /// As [`Setup::has`].
    pub fn policy(&self) -> Result<Option<&'static str>> {
        Ok(match (self.has("ppo")?, self.has("dpo")?) {
            (true, _) => Some("ppo"),
            (false, true) => Some("dpo"),
            (false, false) => None,
        })
    }

    /// The same setup in a round of the run.
    #[must_use]
    pub fn in_round(&self, number: u64) -> Self {
        let round = self.round.map(|round| Round { number, ..round });
        Self { round, ..self.clone() }
    }

    /// The directory of a stage.
    pub fn at(&self, name: &str) -> PathBuf {
        match self.round {
            Some(round) => rounds::place(&self.dir, round.number, name),
            None => self.dir.join(name),
        }
    }

    /// The same as a text, for what may also be the name of a model.
    pub fn place(&self, name: &str) -> String {
        self.at(name).to_string_lossy().into_owned()
    }

    /// Whether a stage is in: its table's `enabled`, else the list's default. What nobody would read is not made.
    ///
    /// # Errors
    ///
    /// `enabled` is neither true nor false.
    pub fn has(&self, name: &str) -> Result<bool> {
        let stage = Stage::named(name).expect("a name of the list");
        if !self.recipe.enabled(name)?.unwrap_or(stage.by_default) {
            return Ok(false);
        }
        match name {
            "demonstrations" => self.has("sft"), // which alone reads them
            _ => Ok(true),
        }
    }

    /// Every stage that is in, in order.
    ///
    /// # Errors
    ///
    /// As [`Setup::has`].
    pub fn stages(&self) -> Result<Vec<&'static Stage>> {
        let mut stages = Vec::new();
        for stage in &PIPELINE {
            if self.has(stage.name)? {
                stages.push(stage);
            }
        }
        Ok(stages)
    }

    /// The settings of a stage, by the parser of the stage's own program.
    ///
    /// # Errors
    ///
    /// A key or a value of the recipe that is refused.
    pub fn settings<C: Args + Serialize + DeserializeOwned>(&self, table: &str) -> Result<C> {
        let command = C::augment_args(clap::Command::new("stage").no_binary_name(true));
        let has_device = command.get_arguments().any(|argument| argument.get_id() == "device");
        let flags = self.device.as_deref().filter(|_| has_device);
        let flags: Vec<&str> = flags.iter().flat_map(|device| ["--device", *device]).collect();
        let matches = command.try_get_matches_from(flags)?;
        let settings: C = self.recipe.resolve(&matches, table)?;
        match self.round {
            Some(round) if round.number > 1 && rounds::REPEATED.contains(&table) => {
                later_seed(&settings, round.number - 1)
            }
            _ => Ok(settings),
        }
    }

    /// The settings as they would be recorded, once they are known to be good.
    ///
    /// # Errors
    ///
    /// As [`Setup::settings`]; what the stage's own `check` refuses.
    pub fn checked<C: Args + Serialize + DeserializeOwned>(
        &self,
        table: &str,
        check: impl FnOnce(&C) -> Result<()>,
    ) -> Result<Value> {
        let settings = self.settings::<C>(table)?;
        check(&settings).with_context(|| format!("the settings of [{table}]"))?;
        Ok(serde_json::to_value(settings)?)
    }

    /// The recipe for the page: the file, or a copy in the run that says what the command line set.
    pub fn recipe_as_run(&self) -> Option<PathBuf> {
        let copy =
            Some(self.at(RECIPE_AS_RUN)).filter(|copy| !self.set.is_empty() && copy.is_file());
        copy.or_else(|| self.recipe_path.clone())
    }

    /// Writes that copy, if it is needed.
    ///
    /// # Errors
    ///
    /// I/O.
    pub fn write_recipe_as_run(&self) -> Result<()> {
        if self.set.is_empty() {
            return Ok(());
        }
        let mut text = match &self.recipe_path {
            Some(path) => files::read_text(path, files::MAX_SMALL_BYTES)?,
            None => String::new(),
        };
        text += "\n# Set on the command line:\n";
        self.set.iter().for_each(|setting| text += &format!("# --set {setting}\n"));
        fs_err::create_dir_all(&self.dir)?;
        Ok(arete_records::atomic::write(self.at(RECIPE_AS_RUN), text.as_bytes())?)
    }

    /// The recipe's file.
    pub fn recipe_path(&self) -> Option<&Path> {
        self.recipe_path.as_deref()
    }

    /// The device that all stages are asked to use, if one is.
    ///
    /// # Errors
    ///
    /// The recipe's `device` is no text.
    pub fn device(&self) -> Result<Option<String>> {
        match &self.device {
            Some(device) => Ok(Some(device.clone())),
            None => Ok(self.recipe.run_text("device")?.map(str::to_owned)),
        }
    }
}

/// Settings with another seed: a round that drew the numbers of the one before would sample much the same again.
fn later_seed<C: Serialize + DeserializeOwned>(settings: &C, later: u64) -> Result<C> {
    let mut settings = serde_json::to_value(settings)?;
    if let Some(seed) = settings.get("seed").and_then(Value::as_u64) {
        settings["seed"] = seed.wrapping_add(later).into();
    }
    Ok(serde_json::from_value(settings)?)
}

/// The name of a run, `{date}` in it made today's date (UTC).
pub fn dated(run: &Path) -> PathBuf {
    match run.to_str() {
        Some(name) => PathBuf::from(name.replace("{date}", &clock::today())),
        None => run.to_owned(), // no UTF-8, and no braces that we would know
    }
}

/// `runs/NAME` for a recipe NAME.toml.
fn default_dir(recipe: Option<&Path>) -> PathBuf {
    let name = recipe.and_then(Path::file_stem).unwrap_or("defaults".as_ref());
    Path::new("runs").join(name)
}
