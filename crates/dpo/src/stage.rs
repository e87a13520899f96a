//! The stage: from files to files.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use arete_chain::Constitution;
use arete_chain::memory::{self, PROMPT_TOKENS, Shape};
use arete_model::adapter::{self, AdapterMeta, Task};
use arete_model::machine::Machine;
use arete_model::{Adapter, Chat, LoadOptions, Model, Source, adapter::merge};
use arete_records::left_out::{self, LeftOut};
use arete_records::{Refusal, Split};
use arete_stage::dry::DryRun;
use arete_stage::run::{self, Completion, StageSpec, Start};
use arete_stage::timings;
use arete_training::evaluation::{self, Report};
use arete_training::order::Plan;
use arete_training::{
    AdamW, Outcome, Ranks, Select, runtime, too_few_pairs, train as train_loop, within_positions,
};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::Config;
use crate::data::{self, Pair, PairSet, PairSource, Pairs, ReadPairs, Rendering};
use crate::loss::LossSettings;
use crate::model::pair_logprobs;
use crate::objective::DirectPreference;

/// Settings that say how long it is trained: with more of them, training goes on.
const AMOUNTS: [&str; 2] = ["epochs", "max_steps"];
/// Pairs whose log-probabilities are compared between the merged model and the adapter.
const N_COMPARED: usize = 4;

/// The contents of `evaluation.json`: how often the policy's implicit reward (beta times the log-ratio of a whole reply)
/// tells the better side of pairs it has not seen.
#[derive(Debug, Serialize)]
struct Evaluations {
    /// All pairs.
    #[serde(flatten)]
    all: Report,
    /// Those of each aspect.
    aspects: BTreeMap<String, Report>,
}

/// Trains on `pairs` and writes adapter and merged model into `output`.
///
/// # Errors
///
/// Bad settings or data, an unusable model, an interrupt, a full disk.
pub fn train(config: &Config, pairs: &PairSource, output: &Path) -> Result<()> {
    config.check()?;
    let ranks = Ranks::join(config.steps.shards.virtual_shards)?;
    ranks.finish(train_on(&ranks, config, pairs, output))
}

/// What [`train`] would do; nothing is written.
///
/// # Errors
///
/// As [`train`], as far as it shows before the model is loaded.
pub fn dry_run(config: &Config, pairs: &PairSource, output: &Path) -> Result<DryRun> {
    let found = run::asking(|| train(config, pairs, output))?;
    let device = Some(config.compute.device.as_str());
    let shape = Shape::of(config.model.as_deref().unwrap_or_default(), device, PROMPT_TOKENS)?;
    let mut plan = DryRun::new("dpo", config, found);
    for set in pairs.sets(&config.aspects)? {
        let ReadPairs { train, validation, left_out } = set.read(config.columns())?;
        for (split, (_, pairs)) in [(Split::Train, train), (Split::Validation, validation)] {
            plan = plan.counting(format!("{}/{split}", set.name), pairs.len());
        }
        if !left_out.is_empty() {
            plan = plan.counting("left_out", left_out.len());
        }
    }
    Ok(plan.taking(Some(shape.need(&config.demand()?).to_json())))
}

fn train_on(ranks: &Ranks, config: &Config, pairs: &PairSource, output: &Path) -> Result<()> {
    let name =
        config.model.as_deref().ok_or_else(|| Refusal::setting("model", "a base model", "none"))?;
    let source = Source::fetch(name)?;
    let sets = pairs.sets(&config.aspects)?;
    let mut inputs: Vec<_> = sets.iter().flat_map(PairSet::inputs).collect();
    let constitution = match pairs {
        PairSource::Preferences(dir) => Constitution::carried(dir)?,
        PairSource::Pairs(_) => None,
    };
    inputs
        .extend(constitution.iter().map(|own| ("constitution".to_owned(), own.path().to_owned())));
    let mut recorded = config.clone();
    if let Some(path) = source.local_path() {
        inputs.push(("model".to_owned(), path.to_owned()));
        recorded.model = None; // its contents are an input; where they lie changes nothing
    }
    let mut recorded = serde_json::to_value(&recorded).expect("settings are numbers and words");
    arete_training::forget_harmless(&mut recorded, &[]);
    let spec = StageSpec { stage: "dpo", output, config: recorded, seed: config.seed, inputs };
    let run = match ranks.begin(spec, &AMOUNTS)? {
        Start::UpToDate(_) => {
            run::say_up_to_date(output);
            return Ok(());
        }
        Start::Run(run) => run,
    };
    if let Some(own) = &constitution {
        own.leave(run.output())?;
    }

    let options = config.compute.start_on(ranks)?;
    let saving = memory::admit("dpo", &source, options.device, &config.demand()?)?;
    let model = Model::load(&source, &options)?;
    let max_length = within_positions(&model.config, config.max_length);
    let data = Data::read(config, &sets, &model.chat()?, max_length)?;
    data.report();
    left_out::write(run.output(), &data.left_out)?;
    data.check(config, pairs.path())?;
    let mut adapter =
        Adapter::new("dpo", &model.config, &config.lora.config(), config.seed, options.device)?;
    adapter.set_trainable(true);
    let (outcome, evaluated) =
        optimise(ranks, config, &model, &adapter, &data, (output, run.fingerprint()), saving)?;
    if !ranks.is_first() {
        return Ok(());
    }
    adapter.set_trainable(false);
    if let Some(rewards) = evaluated {
        write_evaluation(config, &sets, &data, &rewards, output)?;
    }

    let meta = AdapterMeta::of(&model, name, Task::CausalLm);
    adapter::save(&output.join("adapter"), &adapter, None, &meta)?;
    let difference = write_merged(&source, model, &adapter, &data, &options, output)?;
    let mut counts = data.counts(&sets, &outcome);
    counts.insert("max_logprob_difference_merged".to_owned(), difference.into());
    if let Some(bytes) = runtime::peak_rss_bytes() {
        tracing::info!(mib = bytes >> 20, "peak memory");
        timings::log(output, "memory", 0.0, &[("peak_rss_bytes", bytes.into())])?;
    }
    Machine::write(output)?;
    run.finish(Completion {
        device: runtime::device_name(options.device),
        dtype: runtime::dtype_name(options.dtype).to_owned(),
        counts,
    })?;
    Ok(())
}

/// Pairs of both splits as tokens.
#[derive(Default)]
struct Data {
    train: Pairs,
    validation: Pairs,
    left_out: Vec<LeftOut>,
}

impl Data {
    fn read(config: &Config, sets: &[PairSet], chat: &Chat<'_>, max_length: usize) -> Result<Self> {
        let Config { over_length, label, .. } = *config;
        let rendering = Rendering { max_length, over_length, label };
        let mut data = Self::default();
        for (idx, set) in sets.iter().enumerate() {
            let ReadPairs { train, validation, left_out } = set.read(config.columns())?;
            data.left_out.extend(left_out);
            for (out, (path, pairs)) in
                [(&mut data.train, train), (&mut data.validation, validation)]
            {
                data::tokenize(out, &path, &pairs, idx, chat, &rendering)?;
            }
        }
        data.left_out.extend_from_slice(&data.train.left_out);
        data.left_out.extend_from_slice(&data.validation.left_out);
        Ok(data)
    }

    fn sum(&self, count: fn(&Pairs) -> usize) -> usize {
        count(&self.train) + count(&self.validation)
    }

    fn report(&self) {
        let (cut, dropped) = (self.sum(|p| p.n_cut), self.sum(|p| p.n_dropped));
        let (identical, empty) = (self.sum(|p| p.n_identical), self.sum(|p| p.n_empty));
        if cut + dropped + identical + empty > 0 {
            tracing::warn!(
                cut,
                dropped,
                identical,
                empty,
                "pairs longer than max_length, or identical"
            );
        }
        if self.validation.pairs.is_empty() {
            tracing::warn!("no validation pairs: the run is not evaluated");
        }
    }

    fn check(&self, config: &Config, from: &Path) -> Result<()> {
        let Pairs { pairs, n_dropped, n_identical, n_empty, .. } = &self.train;
        let expected = config.min_pairs.max(1);
        if pairs.len() >= expected {
            return Ok(());
        }
        let reason = format!(
            "{n_dropped} dropped for their length, {n_identical} identical after cutting, {n_empty} with nothing left to compare, {} \
             records left out, that prefer neither side among them",
            self.left_out.len()
        );
        Err(too_few_pairs(from, expected, pairs.len(), &reason).into())
    }

    fn counts(&self, sets: &[PairSet], outcome: &Outcome) -> Map<String, Value> {
        let of_aspect = |idx: usize| self.train.pairs.iter().filter(|p| p.aspect == idx).count();
        let by_aspect: Map<String, Value> = (sets.iter().enumerate())
            .map(|(idx, set)| (set.name.clone(), of_aspect(idx).into()))
            .collect();
        let numbers: [(&str, Value); 11] = [
            ("train", self.train.pairs.len().into()),
            ("validation", self.validation.pairs.len().into()),
            ("train_of_aspect", by_aspect.into()),
            ("cut", self.sum(|p| p.n_cut).into()),
            ("dropped", self.sum(|p| p.n_dropped).into()),
            ("identical", self.sum(|p| p.n_identical).into()),
            ("empty", self.sum(|p| p.n_empty).into()),
            ("open", self.sum(|p| p.n_open).into()),
            ("steps", outcome.state.global_step.into()),
            ("num_tokens", outcome.state.num_tokens.into()),
            ("selected_step", outcome.selected_step.into()),
        ];
        numbers.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

/// Rewards of the chosen and the rejected side, one entry a pair.
type PairRewards = Vec<[f64; 2]>;

/// Trains; also the rewards of the validation pairs with the weights it ends with.
fn optimise(
    ranks: &Ranks,
    config: &Config,
    model: &Model,
    adapter: &Adapter,
    data: &Data,
    (output, fingerprint): (&Path, &str),
    saving: bool,
) -> Result<(Outcome, Option<PairRewards>)> {
    let mut optimiser = AdamW::new(adapter.parameters(), config.steps.adamw())?;
    let plan = Plan {
        n_examples: data.train.pairs.len(),
        batch_size: config.batch_size,
        epochs: config.epochs,
        max_steps: config.steps.max_steps,
        seed: config.seed,
    };
    plan.check()?;
    let n_steps = plan.total_steps();
    let dtype = model.decoder.kind();
    tracing::info!(
        pairs = data.train.pairs.len(),
        steps = n_steps,
        parameters = optimiser.n_parameters(),
        dtype = runtime::dtype_name(dtype),
        nf4 = config.compute.nf4,
        "training"
    );
    let Config { learning_rate, warmup_ratio, loss_type, beta, label_smoothing, .. } = *config;
    let loop_config = config.steps.loop_config(learning_rate, warmup_ratio, n_steps, dtype)?;
    let mut objective = DirectPreference::new(
        &model.decoder,
        adapter,
        (&data.train.pairs, &data.validation.pairs),
        LossSettings { loss_type, beta, label_smoothing },
        config.compute.passes(config.steps.micro_batch_tokens, saving),
    );
    let outcome = train_loop(
        ranks,
        &mut objective,
        &mut optimiser,
        &plan,
        &loop_config,
        output,
        fingerprint,
    )?;
    if !ranks.is_first() {
        return Ok((outcome, None));
    }
    if outcome.selected_step != outcome.state.global_step || objective.evaluated.is_none() {
        // The weights are others than those last evaluated, or the run was continued after its last step.
        arete_training::Objective::evaluate(&mut objective)?;
    }
    Ok((outcome, objective.evaluated))
}

fn write_evaluation(
    config: &Config,
    sets: &[PairSet],
    data: &Data,
    rewards: &[[f64; 2]],
    output: &Path,
) -> Result<()> {
    let Pairs { pairs, ruled, .. } = &data.validation;
    let split = match config.steps.select {
        Select::Best => format!("{} (the weights were selected on these pairs)", Split::Validation),
        Select::Last => Split::Validation.to_string(),
    };
    let report = |is_wanted: &dyn Fn(&Pair) -> bool| {
        let (mut lengths, mut by_rule, mut own) = (Vec::new(), Vec::new(), Vec::new());
        for ((pair, ruled), rewards) in pairs.iter().zip(ruled).zip(rewards) {
            if is_wanted(pair) {
                lengths.push([pair.chosen.n_own_tokens, pair.rejected.n_own_tokens]);
                by_rule.push(ruled.clone());
                own.push(*rewards);
            }
        }
        (!lengths.is_empty()).then(|| evaluation::report(&split, &lengths, &by_rule, &own))
    };
    let Some(all) = report(&|_| true) else { return Ok(()) };
    tracing::info!(
        n = all.n,
        accuracy = all.accuracy.estimate,
        low = all.accuracy.low,
        high = all.accuracy.high,
        beside = all.null_rulers.words(),
        "evaluated on pairs not trained on"
    );
    let aspects = (sets.iter().enumerate())
        .filter_map(|(idx, set)| Some((set.name.clone(), report(&|pair| pair.aspect == idx)?)))
        .collect();
    let evaluations = Evaluations { all, aspects };
    Ok(evaluation::write_json(&output.join("evaluation.json"), &evaluations)?)
}

/// Writes the merged model; the largest difference between its log-probabilities of whole replies and the adapter's, in
/// nats a token.
fn write_merged(
    source: &Source,
    model: Model,
    adapter: &Adapter,
    data: &Data,
    options: &LoadOptions,
    output: &Path,
) -> Result<f64> {
    let pairs = if data.validation.pairs.is_empty() { &data.train } else { &data.validation };
    let pairs: Vec<&Pair> = pairs.pairs.iter().take(N_COMPARED).collect();
    // One pass: a streamed model reads its weights again for each.
    let unmerged = pair_logprobs(&model.decoder, Some(adapter), &pairs, usize::MAX)?;
    drop(model);
    let merged = output.join("merged");
    let dtype = merge::output_dtype(source, options.dtype)?;
    // Into what the adapter was trained over: packed, if that was packed.
    merge::write_model(source, Some(adapter), None, &merged, dtype, options.nf4, Map::new())?;
    let options = LoadOptions { nf4: None, ..*options };
    let merged = Model::streamed(&Source::Directory(merged), &options)?;
    let merged = pair_logprobs(&merged.decoder, None, &pairs, usize::MAX)?;
    #[expect(clippy::cast_precision_loss, reason = "token counts are far below 2^52")]
    let differences = pairs.iter().zip(unmerged.iter().zip(&merged)).flat_map(|(pair, (a, b))| {
        [pair.chosen.counted.len(), pair.rejected.counted.len()]
            .into_iter()
            .zip(a.iter().zip(b))
            .map(|(n, (a, b))| (a - b).abs() / n as f64)
    });
    let difference = differences.fold(0.0, f64::max);
    tracing::info!(difference, "largest |Δlogprob| a token between merged model and adapter");
    Ok(difference)
}
