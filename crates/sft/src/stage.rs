//! The stage: from files to files.

use std::path::Path;

use anyhow::{Result, bail};
use arete_chain::memory::{self, PROMPT_TOKENS, Shape};
use arete_model::adapter::{self, AdapterMeta, Task};
use arete_model::machine::Machine;
use arete_model::{Adapter, Batch, LoadOptions, Model, Source, adapter::merge};
use arete_records::{Refusal, Split, left_out};
use arete_stage::dry::DryRun;
use arete_stage::run::{self, Completion, StageSpec, Start};
use arete_training::order::Plan;
use arete_training::{AdamW, Ranks, runtime, train as train_loop, within_positions};
use serde_json::{Map, Value};
use tch::{Kind, Tensor};

use crate::Config;
use crate::data::{self, Example, Examples};
use crate::objective::CrossEntropy;

/// Settings that say how long it is trained: with more of them, training goes on.
const AMOUNTS: [&str; 2] = ["epochs", "max_steps"];

/// Rows whose logits are compared between the merged and the unmerged model.
const COMPARED_ROWS: usize = 128;

/// Trains on `demonstrations` (a file, or the directory of that stage) and writes adapter and merged model into `output`.
///
/// # Errors
///
/// Bad settings or data, an unusable model, an interrupt, a full disk.
pub fn train(config: &Config, demonstrations: &Path, output: &Path) -> Result<()> {
    config.check()?;
    let ranks = Ranks::join(config.steps.shards.virtual_shards)?;
    ranks.finish(train_on(&ranks, config, demonstrations, output))
}

/// What [`train`] would do; nothing is written.
///
/// # Errors
///
/// As [`train`], as far as it shows before the model is loaded.
pub fn dry_run(config: &Config, demonstrations: &Path, output: &Path) -> Result<DryRun> {
    let found = run::asking(|| train(config, demonstrations, output))?;
    let columns = config.column.as_deref().unwrap_or_default();
    let (rows, left_out) = data::read(demonstrations, columns)?;
    let n_in = |split| rows.iter().filter(|row| row.split == split).count();
    let device = Some(config.compute.device.as_str());
    let shape = Shape::of(config.model.as_deref().unwrap_or_default(), device, PROMPT_TOKENS)?;
    Ok(DryRun::new("sft", config, found)
        .counting("train", n_in(Split::Train))
        .counting("validation", n_in(Split::Validation))
        .counting("left_out", left_out.len())
        .taking(Some(shape.need(&config.demand()?).to_json())))
}

fn train_on(ranks: &Ranks, config: &Config, demonstrations: &Path, output: &Path) -> Result<()> {
    let model_name = config
        .model
        .as_deref()
        .ok_or_else(|| Refusal::setting("model", "a model to start from", "none"))?;
    let source = Source::fetch(model_name)?;
    let file = data::file_of(demonstrations);
    let mut inputs = vec![("demonstrations".to_owned(), file.clone())];
    let mut recorded = config.clone();
    if let Some(path) = source.local_path() {
        inputs.push(("model".to_owned(), path.to_owned()));
        recorded.model = None; // its contents are an input; where they lie changes nothing
    }
    let mut recorded = serde_json::to_value(&recorded).expect("settings are numbers and words");
    arete_training::forget_harmless(&mut recorded, &[]);
    let spec = StageSpec { stage: "sft", output, config: recorded, seed: config.seed, inputs };
    let run = match ranks.begin(spec, &AMOUNTS)? {
        Start::UpToDate(_) => {
            run::say_up_to_date(output);
            return Ok(());
        }
        Start::Run(run) => run,
    };

    let options = config.compute.start_on(ranks)?;
    let device = options.device;
    let saving = memory::admit("sft", &source, device, &config.demand()?)?;
    let (rows, mut left_out) = data::read(&file, config.column.as_deref().unwrap_or_default())?;
    let model = Model::load(&source, &options)?;
    let chat = model.chat()?;
    let max_length = within_positions(&model.config, config.max_length);
    let tokenize =
        |split: Split| data::tokenize(&file, &rows, split, &chat, max_length, config.over_length);
    let (mut train, mut validation) = (tokenize(Split::Train)?, tokenize(Split::Validation)?);
    left_out.append(&mut train.left_out);
    left_out.append(&mut validation.left_out);
    left_out::write(run.output(), &left_out)?;
    report(&train, &validation);
    if train.examples.is_empty() {
        bail!(nothing_left(&file, rows.len(), &train));
    }

    let mut adapter =
        Adapter::new("sft", &model.config, &config.lora.config(), config.seed, device)?;
    adapter.set_trainable(true);
    let mut optimiser = AdamW::new(adapter.parameters(), config.steps.adamw())?;
    let plan = Plan {
        n_examples: train.examples.len(),
        batch_size: config.batch_size,
        epochs: config.epochs,
        max_steps: config.steps.max_steps,
        seed: config.seed,
    };
    plan.check()?;
    let n_steps = plan.total_steps();
    tracing::info!(
        examples = train.examples.len(),
        steps = n_steps,
        parameters = optimiser.n_parameters(),
        dtype = runtime::dtype_name(options.dtype),
        nf4 = config.compute.nf4,
        "training"
    );
    let Config { learning_rate, warmup_ratio, .. } = *config;
    let loop_config =
        config.steps.loop_config(learning_rate, warmup_ratio, n_steps, options.dtype)?;
    let mut objective = CrossEntropy {
        decoder: &model.decoder,
        adapter: &adapter,
        train: &train.examples,
        validation: &validation.examples,
        passes: config.compute.passes(config.steps.micro_batch_tokens, saving),
    };
    let outcome = train_loop(
        ranks,
        &mut objective,
        &mut optimiser,
        &plan,
        &loop_config,
        output,
        run.fingerprint(),
    )?;
    if !ranks.is_first() {
        return Ok(());
    }

    let meta = AdapterMeta::of(&model, model_name, Task::CausalLm);
    adapter::save(&output.join("adapter"), &adapter, None, &meta)?;
    let compared = if validation.examples.is_empty() { &train } else { &validation };
    let compared = probe(&compared.examples);
    let unmerged = logits(&model, Some(&adapter), &compared)?;
    drop(optimiser);
    drop(model);
    let merged = output.join("merged");
    let dtype = merge::output_dtype(&source, options.dtype)?;
    // Into what the adapter was trained over: packed, if that was packed.
    merge::write_model(&source, Some(&adapter), None, &merged, dtype, options.nf4, Map::new())?;
    let merged_options = LoadOptions { nf4: None, ..options };
    let merged_model = Model::streamed(&Source::Directory(merged), &merged_options)?;
    let difference = largest_difference(&unmerged, &logits(&merged_model, None, &compared)?)?;
    tracing::info!(difference, "largest |Δlogit| between merged model and adapter");

    let mut counts = Map::new();
    let mut count = |name: &str, value: Value| counts.insert(name.to_owned(), value);
    count("train", train.examples.len().into());
    count("validation", validation.examples.len().into());
    count("truncated", (train.n_truncated + validation.n_truncated).into());
    count("dropped", (train.n_dropped + validation.n_dropped).into());
    count("nothing_to_imitate", (train.n_empty + validation.n_empty).into());
    count("steps", outcome.state.global_step.into());
    count("num_tokens", outcome.state.num_tokens.into());
    count("selected_step", outcome.selected_step.into());
    count("max_logit_difference", difference.into());
    if let Some(bytes) = runtime::peak_rss_bytes() {
        tracing::info!(mib = bytes >> 20, "peak memory");
        let fields = [("peak_rss_bytes", bytes.into())];
        arete_stage::timings::log(output, "memory", 0.0, &fields)?;
    }
    Machine::write(output)?;
    run.finish(Completion {
        device: runtime::device_name(device),
        dtype: runtime::dtype_name(options.dtype).to_owned(),
        counts,
    })?;
    Ok(())
}

fn report(train: &Examples, validation: &Examples) {
    let n_truncated = train.n_truncated + validation.n_truncated;
    let n_dropped = train.n_dropped + validation.n_dropped;
    let n_empty = train.n_empty + validation.n_empty;
    if n_truncated + n_dropped + n_empty > 0 {
        tracing::warn!(
            truncated = n_truncated,
            dropped = n_dropped,
            nothing_to_imitate = n_empty,
            "demonstrations longer than max_length"
        );
    }
    if validation.examples.is_empty() {
        tracing::warn!("no demonstrations of split validation: the run is not evaluated");
    }
}

fn nothing_left(path: &Path, n_rows: usize, train: &Examples) -> Refusal {
    let Examples { n_dropped, n_empty, .. } = train;
    let reason = format!(
        "{n_rows} rows; of split train {n_dropped} dropped for their length, {n_empty} with nothing left to imitate"
    );
    Refusal::file(path, "", "demonstrations to train on", format!("none ({reason})"))
}

/// The first examples with [`COMPARED_ROWS`] target tokens between them, cut there.
fn probe(examples: &[Example]) -> Vec<Example> {
    let mut n_left = COMPARED_ROWS;
    let mut out = Vec::new();
    for example in examples {
        if n_left == 0 {
            break;
        }
        let mut example = example.clone();
        for target in &mut example.target {
            *target = *target && n_left > 0;
            n_left -= usize::from(*target);
        }
        let end = example.target.iter().rposition(|&target| target).map_or(0, |last| last + 1);
        example.token_ids.truncate(end);
        example.target.truncate(end);
        out.push(example);
    }
    out
}

/// Logits of the examples' target tokens, `[n, V]` f32.
fn logits(model: &Model, adapter: Option<&Adapter>, examples: &[Example]) -> Result<Tensor> {
    let _guard = tch::no_grad_guard();
    // One pass: a streamed model reads its weights again for each.
    let sequences: Vec<&[i64]> = examples.iter().map(|example| &example.token_ids[..]).collect();
    let batch = Batch::from_sequences(&sequences);
    let targets = examples.iter().flat_map(|example| &example.target);
    let rows: Vec<i64> =
        (0..).zip(targets).filter_map(|(row, &target)| target.then_some(row - 1)).collect();
    let hidden = model.decoder.forward(&batch, adapter)?;
    let rows = Tensor::from_slice(&rows).to_device(hidden.device());
    let logits = model.decoder.logits(&hidden.index_select(0, &rows))?; // [n, V]
    Ok(logits.to_kind(Kind::Float))
}

fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    let difference = f64::try_from((a - b).abs().max()).map_err(arete_model::Error::from)?;
    Ok(difference)
}
