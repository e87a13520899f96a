//! The pipeline as one list: each stage with its name, what it reads and leaves, and how it is run.
//!
//! A stage's name is also that of its table in a recipe and of its directory in a run.

use anyhow::Result;
use arete_curation::conversations::{self, ConversationsConfig};
use arete_curation::demonstrations::{self, DemonstrationsConfig};
use arete_curation::preferences::{self, PreferencesConfig};
use arete_curation::prompts::{self, PromptsConfig};
use arete_curation::stage::Work;
use arete_reward::PreferenceSource;
use arete_scoring::{ReportInputs, ScoreConfig, ScoreInputs};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::memory;
use crate::setup::Setup;

/// A stage of the pipeline.
pub struct Stage {
    /// Its name.
    pub name: &'static str,
    /// The stages whose results it reads, as far as they are in.
    pub reads: &'static [&'static str],
    /// What it leaves, in one line.
    pub writes: &'static str,
    /// Whether it is in when its table does not say.
    pub by_default: bool,
    /// Its settings, read from the recipe and checked.
    pub settings: fn(&Setup) -> Result<Value>,
    /// Does its work, or nothing where that is done.
    pub run: fn(&Setup) -> Result<()>,
    /// What is counted of its memory; none where it loads no model.
    pub demand: Option<memory::DemandOf>,
}

/// Every stage, in the order in which they run.
pub static PIPELINE: [Stage; 10] = [
    Stage {
        name: "prompts",
        reads: &[],
        writes: "prompts, split into train, validation and test",
        by_default: true,
        settings: |setup| setup.checked("prompts", PromptsConfig::check),
        run: run_prompts,
        demand: None,
    },
    Stage {
        name: "demonstrations",
        reads: &["prompts"],
        writes: "answers criticised and revised under the constitution, exemplars",
        by_default: true,
        settings: |setup| setup.checked("demonstrations", DemonstrationsConfig::check),
        run: run_demonstrations,
        demand: Some(memory::demonstrations),
    },
    Stage {
        name: "sft",
        reads: &["demonstrations"],
        writes: "the fine-tuned model: adapter and merged",
        by_default: true,
        settings: |setup| setup.checked("sft", arete_sft::Config::check),
        run: run_sft,
        demand: Some(memory::sft),
    },
    Stage {
        name: "conversations",
        reads: &["prompts", "sft"],
        writes: "two samples of the chain for each prompt: answer, motivation, consequence",
        by_default: true,
        settings: |setup| setup.checked("conversations", ConversationsConfig::check),
        run: run_conversations,
        demand: Some(memory::conversations),
    },
    Stage {
        name: "preferences",
        reads: &["conversations", "sft"],
        writes: "the judge's votes, and pairs of an aspect (or a virtue) each",
        by_default: true,
        settings: |setup| setup.checked("preferences", PreferencesConfig::check),
        run: run_preferences,
        demand: Some(memory::preferences),
    },
    Stage {
        name: "reward",
        reads: &["preferences", "conversations", "sft"],
        writes: "one reward model a set of preferences",
        by_default: true,
        settings: |setup| setup.checked("reward", arete_reward::Config::check),
        run: run_reward,
        demand: Some(memory::reward),
    },
    Stage {
        name: "dpo",
        reads: &["preferences", "sft"],
        writes: "a policy from the preferences themselves: adapter and merged",
        by_default: false,
        settings: |setup| setup.checked("dpo", arete_dpo::Config::check),
        run: run_dpo,
        demand: Some(memory::dpo),
    },
    Stage {
        name: "ppo",
        reads: &["prompts", "reward", "sft"],
        writes: "the policy: adapter, merged, its rollouts",
        by_default: true,
        settings: |setup| setup.checked("ppo", arete_ppo::Config::check),
        run: run_ppo,
        demand: Some(memory::ppo),
    },
    Stage {
        name: "scoring",
        reads: &["prompts", "reward", "sft", "dpo", "ppo"],
        writes: "Score of the original, the fine-tuned and the trained models",
        by_default: true,
        settings: |setup| setup.checked("scoring", ScoreConfig::check),
        run: run_scoring,
        demand: Some(memory::scoring),
    },
    Stage {
        name: "report",
        reads: &["scoring"],
        writes: "report.html",
        by_default: true,
        settings: |setup| setup.checked("report", |_: &ReportConfig| Ok(())),
        run: run_report,
        demand: None,
    },
];

/// Settings of the page: the `[report]` table of a recipe.
#[derive(Debug, Clone, clap::Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReportConfig {
    /// Most prompts shown side by side; 0 = all
    #[arg(long, default_value_t = 300, value_name = "N")]
    pub max_samples: usize,
}

impl Stage {
    /// The stage of that name.
    pub fn named(name: &str) -> Option<&'static Self> {
        PIPELINE.iter().find(|stage| stage.name == name)
    }

    /// Where it comes in the order.
    pub fn position(&self) -> usize {
        PIPELINE.iter().position(|stage| stage.name == self.name).expect("it is in the list")
    }
}

/// Names of the stages, in order.
pub fn names() -> Vec<&'static str> {
    PIPELINE.iter().map(|stage| stage.name).collect()
}

/// What a stage is made from besides its settings and the results of other stages: what stands in the recipe's `[run]`.
///
/// # Errors
///
/// A recipe that does not say where to compute.
pub fn given(setup: &Setup, stage: &str) -> Result<Value> {
    let model = setup.model().ok();
    let given = match stage {
        "prompts" => json!(setup.prompts),
        "preferences" => json!([model, setup.judge]),
        "ppo" => json!([model, setup.yardstick]),
        "scoring" => json!([model, setup.yardstick, setup.pairs]),
        _ => json!(model),
    };
    Ok(json!([given, setup.device()?]))
}

// ---- how each is run: as its own program does ----

fn run_prompts(setup: &Setup) -> Result<()> {
    let config = setup.settings("prompts")?;
    prompts::run(&config, &setup.prompts, &setup.at("prompts"))
}

fn run_demonstrations(setup: &Setup) -> Result<()> {
    let config: DemonstrationsConfig = setup.settings("demonstrations")?;
    let inputs = demonstrations::Inputs {
        prompts: Some(setup.at("prompts")),
        model: Some(setup.model()?.to_owned()),
    };
    demonstrations::run(&config, &inputs, &setup.at("demonstrations"), &Work::Compute)
}

fn run_sft(setup: &Setup) -> Result<()> {
    let mut config: arete_sft::Config = setup.settings("sft")?;
    config.model = Some(setup.model()?.to_owned());
    arete_sft::train(&config, &setup.at("demonstrations"), &setup.at("sft"))
}

fn run_conversations(setup: &Setup) -> Result<()> {
    let config: ConversationsConfig = setup.settings("conversations")?;
    let inputs = conversations::Inputs {
        prompts: setup.at("prompts"),
        model: setup.base()?,
        original: if setup.base()? == setup.model()? {
            None
        } else {
            Some(setup.model()?.to_owned())
        },
    };
    conversations::run(&config, &inputs, &setup.at("conversations"), &Work::Compute)
}

fn run_preferences(setup: &Setup) -> Result<()> {
    let config: PreferencesConfig = setup.settings("preferences")?;
    let judge = match &setup.judge {
        Some(judge) => judge.clone(),
        // In every round the same: a judge that is tuned with the policy would lower its standard with it.
        None => setup.fine_tuned()?,
    };
    let inputs =
        preferences::Inputs { conversations: setup.at("conversations"), judge: Some(judge) };
    preferences::run(&config, &inputs, &setup.at("preferences"), &Work::Compute)
}

fn run_reward(setup: &Setup) -> Result<()> {
    let mut config: arete_reward::Config = setup.settings("reward")?;
    config.model = Some(setup.base()?);
    let inputs = arete_reward::TrainInputs {
        preferences: PreferenceSource::Stage {
            dir: setup.at("preferences"),
            sets: Vec::new(), // all that the preferences hold
        },
        mixed: None, // a recipe mixes them in where pairs are made: [preferences] pairs
        conversations: Some(setup.at("conversations")),
        output: setup.at("reward"),
    };
    arete_reward::train(&config, &inputs)
}

fn run_dpo(setup: &Setup) -> Result<()> {
    let mut config: arete_dpo::Config = setup.settings("dpo")?;
    config.model = Some(setup.base()?);
    let pairs = arete_dpo::PairSource::Preferences(setup.at("preferences"));
    arete_dpo::train(&config, &pairs, &setup.at("dpo"))
}

fn run_ppo(setup: &Setup) -> Result<()> {
    let mut config: arete_ppo::Config = setup.settings("ppo")?;
    config.model = Some(setup.base()?);
    let inputs = arete_ppo::TrainInputs {
        prompts: setup.at("prompts"),
        rewards: config.programmed_reward.is_none().then(|| setup.at("reward")),
        named_rewards: Vec::new(),
        yardstick: setup.yardstick.clone(),
        constitution: None, // the one that the reward models carry
        output: setup.at("ppo"),
    };
    arete_ppo::train(&config, &inputs)
}

fn run_scoring(setup: &Setup) -> Result<()> {
    let config: ScoreConfig = setup.settings("scoring")?;
    let mut models = vec![("original".to_owned(), setup.model()?.to_owned())];
    if setup.has("sft")? {
        models.push(("sft".to_owned(), setup.fine_tuned()?));
    }
    for round in 1..setup.round.map_or(1, |round| round.number) {
        models.push((format!("round-{round}"), setup.tuned_in(round)?));
    }
    // The last model is the one that a run is about: PPO's, or DPO's where that is all there is.
    match (setup.has("dpo")?, setup.has("ppo")?) {
        (true, true) => models.extend([
            ("dpo".to_owned(), setup.place("dpo")),
            ("final".to_owned(), setup.place("ppo")),
        ]),
        (true, false) => models.push(("final".to_owned(), setup.place("dpo"))),
        (false, true) => models.push(("final".to_owned(), setup.place("ppo"))),
        (false, false) => {}
    }
    let inputs = ScoreInputs {
        prompts: setup.at("prompts"),
        models,
        base: setup.base()?,
        rewards: setup.at("reward"),
        yardstick: setup.yardstick.clone(),
        yardstick_base: None,
        pairs: setup.pairs.clone(),
        output: setup.at("scoring"),
    };
    arete_scoring::score(&config, &inputs)?;
    Ok(())
}

fn run_report(setup: &Setup) -> Result<()> {
    let config: ReportConfig = setup.settings("report")?;
    let inputs = ReportInputs {
        run: setup.dir.clone(),
        recipe: setup.recipe_as_run(),
        max_samples: config.max_samples,
        output: setup.at("report"),
    };
    arete_scoring::report(&inputs)?;
    Ok(())
}
