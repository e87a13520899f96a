//! The stage: from files to files.

mod read;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use arete_chain::constitution::Constitution;
use arete_chain::memory;
use arete_chain::reading::{self, Side};
use arete_chain::reward_model::sequence_scores;
use arete_chain::yardstick::fold_dir;
use arete_chain::{CutReply, Member, Reading, Turns};
use arete_model::adapter::{self, AdapterMeta, Task};
use arete_model::machine::Machine;
use arete_model::{Adapter, Chat, LoadOptions, Model, ScalarHead, Source, adapter::merge};
use arete_records::{Aspect, Refusal, ScoreStats, Split, score_stats};
use arete_stage::run::{self, Completion, StageRun, StageSpec, Start};
use arete_stage::timings;
use arete_training::evaluation::{self, write_json};
use arete_training::order::Plan;
use arete_training::{
    AdamW, Outcome, Ranks, Select, runtime, too_few_pairs, train as train_loop, within_positions,
};
use serde_json::{Map, Value};

use self::read::Data;
use crate::config::OverLength;
use crate::data::{Pair, Pairs};
use crate::model::pair_scores;
use crate::objective::BradleyTerry;
use crate::statistics::{Asked, BaseReplies, Scored, StatsSampling};
use crate::{Config, folds, sets};

/// Settings that say how long it is trained: with more of them, training goes on.
const AMOUNTS: [&str; 2] = ["epochs", "max_steps"];
/// Name of the head among the trained tensors (peft's key of a saved module).
const HEAD: &str = "base_model.model.score.weight";
/// Name of the file in a conversations directory.
const CONVERSATIONS: &str = "conversations.parquet";
/// Conversations whose scores are compared between the merged model and the adapter.
const N_COMPARED: usize = 16;

/// Scores of the chosen and the rejected side, one entry a pair.
type PairScores = Vec<[f64; 2]>;

/// Where preferences come from.
#[derive(Clone, Debug)]
pub enum PreferenceSource {
    /// `DIR/<name>/{train,validation}.parquet`, a set of a turn's reply each, or of a virtue.
    Stage {
        /// The directory.
        dir: PathBuf,
        /// The sets to train on, a reward model each; none for all that there are.
        sets: Vec<Aspect>,
    },
    /// A file of pairs, for one reward model.
    Pairs(PathBuf),
}

/// What to train on and where to write.
#[derive(Clone, Debug)]
pub struct TrainInputs {
    /// The pairs.
    pub preferences: PreferenceSource,
    /// Human pairs that are mixed in with those of a set, as the settings say how many and about what.
    pub mixed: Option<PathBuf>,
    /// Directory with `conversations.parquet`, from which the score statistics are taken; without it, from both sides
    /// of the validation pairs.
    pub conversations: Option<PathBuf>,
    /// For sets, the directory with one directory each; for pairs, the directory itself.
    pub output: PathBuf,
}

/// One reward model to train.
struct Job {
    name: String,
    /// The set of preferences, and the turn that it is about; none of pairs.
    set: Option<Member>,
    /// All turns of the chain.
    turns: Turns,
    /// Of a cross-fitted yardstick.
    fold: Option<usize>,
    /// The files of the stage, or the pairs twice.
    train: PathBuf,
    validation: PathBuf,
    /// Pairs that nothing is selected by.
    test: Option<PathBuf>,
    /// Human pairs beside those of the set.
    mixed: Option<PathBuf>,
    conversations: Option<PathBuf>,
    run: StageRun,
}

/// Trains a reward model for every set of preferences (or for the pairs), the base loaded once.
///
/// # Errors
///
/// Bad settings or data, an unusable model, an interrupt, a full disk.
pub fn train(config: &Config, inputs: &TrainInputs) -> Result<()> {
    config.check()?;
    if config.folds > 0 && matches!(inputs.preferences, PreferenceSource::Stage { .. }) {
        bail!(Refusal::setting(
            "folds",
            "0 for judged preferences: folds are of human pairs (--pairs)",
            config.folds,
        ));
    }
    let ranks = Ranks::join(config.steps.shards.virtual_shards)?;
    ranks.finish(train_on(&ranks, config, inputs))
}

fn train_on(ranks: &Ranks, config: &Config, inputs: &TrainInputs) -> Result<()> {
    let model_name =
        config.model.as_deref().ok_or_else(|| Refusal::setting("model", "a base model", "none"))?;
    let source = Source::fetch(model_name)?;
    let conversations = inputs
        .conversations
        .as_ref()
        .map(|path| if path.is_dir() { path.join(CONVERSATIONS) } else { path.clone() });
    let sampling = StatsSampling::new(config, conversations.as_deref())?;
    let jobs = open_jobs(ranks, config, inputs, conversations.as_ref(), sampling, &source)?;
    if !jobs.is_empty() {
        train_jobs(ranks, config, model_name, source, sampling, jobs)?;
    }
    if !ranks.is_first() {
        return Ok(());
    }
    match &inputs.preferences {
        PreferenceSource::Pairs(pairs) if config.folds > 0 => {
            folds::write_card(config, pairs, &inputs.output)
        }
        _ => Ok(()),
    }
}

fn train_jobs(
    ranks: &Ranks,
    config: &Config,
    model_name: &str,
    source: Source,
    sampling: StatsSampling,
    jobs: Vec<Job>,
) -> Result<()> {
    let options = config.compute.start_on(ranks)?;
    let saving = memory::admit("reward", &source, options.device, &config.demand()?)?;
    let model = Model::load(&source, &options)?;
    let base = Base {
        ranks,
        config,
        name: model_name,
        source,
        options,
        saving,
        max_length: within_positions(&model.config, config.max_length),
        model,
        sampling,
        replies: BaseReplies::default(),
    };
    for job in jobs {
        let name = job.name.clone();
        base.train(job)?;
        if ranks.is_first() {
            tracing::info!(name, "reward model written");
        }
    }
    Ok(())
}

/// Opens the run of every reward model that is not up to date.
fn open_jobs(
    ranks: &Ranks,
    config: &Config,
    inputs: &TrainInputs,
    conversations: Option<&PathBuf>,
    sampling: StatsSampling,
    source: &Source,
) -> Result<Vec<Job>> {
    let mut jobs = Vec::new();
    type Wanted = (Option<Member>, Option<usize>, PathBuf, PathBuf);
    let (carried, wanted): (_, Vec<Wanted>) = match &inputs.preferences {
        PreferenceSource::Stage { dir, sets } => {
            let carried = Constitution::carried(dir)?;
            let turns = carried.as_ref().map_or_else(Turns::default, |own| own.turns.clone());
            let of = |set: Member| {
                let output = inputs.output.join(set.name.name());
                (Some(set.clone()), None, set.dir, output)
            };
            let wanted = sets::wanted(dir, &turns, sets)?.into_iter().map(of).collect();
            (carried, wanted)
        }
        PreferenceSource::Pairs(file) if config.folds > 0 => {
            let of = |fold| (None, Some(fold), file.clone(), fold_dir(&inputs.output, fold));
            (None, (0..config.folds).map(of).collect())
        }
        PreferenceSource::Pairs(file) => {
            (None, vec![(None, None, file.clone(), inputs.output.clone())])
        }
    };
    let turns = carried.as_ref().map_or_else(Turns::default, |own| own.turns.clone());
    for (set, fold, data, output) in wanted {
        let (train, validation) = match set {
            Some(_) => (data.join("train.parquet"), data.join("validation.parquet")),
            None => (data.clone(), data.clone()),
        };
        let test = set.as_ref().map(|_| data.join("test.parquet")).filter(|path| path.is_file());
        let mut files = vec![("train".to_owned(), train.clone())];
        if set.is_some() {
            if validation.exists() {
                files.push(("validation".to_owned(), validation.clone()));
            }
            files.extend(test.iter().map(|file| ("test".to_owned(), file.clone())));
            files.extend(inputs.mixed.iter().map(|file| ("pairs".to_owned(), file.clone())));
            files.extend(
                conversations.iter().map(|&file| ("conversations".to_owned(), file.clone())),
            );
        }
        let mut recorded = config.clone();
        if let Some(path) = source.local_path() {
            files.push(("model".to_owned(), path.to_owned()));
            recorded.model = None; // its contents are an input; where they lie changes nothing
        }
        if let Some(own) = &carried {
            files.push(("constitution".to_owned(), own.path().to_owned()));
        }
        let name = match (&set, fold) {
            (Some(set), _) => set.name.name().to_owned(),
            (None, Some(fold)) => format!("yardstick, fold {fold}"),
            (None, None) => "yardstick".to_owned(),
        };
        let mut recorded = serde_json::to_value(&recorded).expect("settings are numbers and words");
        let unused: &[&str] = match inputs.mixed {
            Some(_) => &[],
            None => &["pairs_weight", "pairs_aspect"],
        };
        arete_training::forget_harmless(&mut recorded, unused);
        // Not a setting: reward models of versions that recorded no reading rule are trained again.
        recorded["reading"] = "as trained".into();
        if set.is_some() && conversations.is_some() {
            recorded["stats_sampling"] = serde_json::json!(sampling);
        }
        // Nor this: the figures of versions that knew one null ruler, and no pairs of the test split, are taken again.
        recorded["evaluation"] = "beside null rulers".into();
        recorded["fold"] = fold.into();
        recorded["aspect"] = set.as_ref().map_or(Value::Null, |set| set.name.name().into());
        let stage = if set.is_some() { "reward" } else { "yardstick" };
        let spec = StageSpec {
            stage,
            output: &output,
            config: recorded,
            seed: config.seed,
            inputs: files,
        };
        match ranks.begin(spec, &AMOUNTS)? {
            Start::UpToDate(_) => run::say_up_to_date(&output),
            Start::Run(run) => {
                if let Some(own) = &carried {
                    own.leave(run.output())?;
                }
                let conversations = set.as_ref().and(conversations.cloned());
                let turns = turns.clone();
                jobs.push(Job {
                    name,
                    set,
                    turns,
                    fold,
                    train,
                    validation,
                    test,
                    mixed: inputs.mixed.clone(),
                    conversations,
                    run,
                });
            }
        }
    }
    Ok(jobs)
}

/// What every reward model shares.
struct Base<'a> {
    ranks: &'a Ranks,
    config: &'a Config,
    name: &'a str,
    source: Source,
    options: LoadOptions,
    /// Keeps as little as can be for the backward pass.
    saving: bool,
    /// Most tokens of a conversation: as set, and within the model's positions.
    max_length: usize,
    model: Model,
    sampling: StatsSampling,
    replies: BaseReplies,
}

impl Base<'_> {
    fn train(&self, job: Job) -> Result<()> {
        let (config, model) = (self.config, &self.model);
        let output = job.run.output().to_owned();
        let chat = model.chat()?;
        let data = self.read(&job, &chat)?;
        report_losses(&data, &job.name);
        if data.train.pairs.len() < config.min_pairs.max(1) {
            let Pairs { n_dropped, n_identical, .. } = data.train;
            let reason = format!(
                "{n_dropped} dropped for their length, {n_identical} identical after cutting"
            );
            bail!(too_few_pairs(
                &job.train,
                config.min_pairs.max(1),
                data.train.pairs.len(),
                &reason
            ));
        }

        let device = self.options.device;
        let mut adapter =
            Adapter::new(&job.name, &model.config, &config.lora.config(), config.seed, device)?;
        adapter.set_trainable(true);
        let head_seed = sets::head_seed(config.seed, job.set.as_ref(), &job.turns);
        let mut head = ScalarHead::normal(model.config.hidden_size, head_seed, device);
        head.set_trainable(true);
        let (outcome, evaluated) = self.optimise(&job, &data, &adapter, &head)?;
        if !self.ranks.is_first() {
            return Ok(());
        }
        adapter.set_trainable(false);
        head.set_trainable(false);

        let scores = match evaluated {
            Some(scores) => scores,
            None => self.validation_scores(&data, &adapter, &head)?,
        };
        let reading = self.reading(&data);
        reading.write(&output)?;
        let stats = self.score_stats(&job, &data, &scores, &chat, (&adapter, &head, &reading))?;
        write_json(&output.join(score_stats::FILE), &stats)?;
        if stats.std == 0.0 {
            tracing::warn!(
                score = stats.mean,
                replies = stats.n,
                "every reply has the same score: this reward model tells nothing apart, and PPO will not take it; \
                 a lower learning_rate, or more pairs, would help"
            );
        }
        self.evaluate(&data, &scores, &adapter, &head, &output)?;
        if job.fold.is_some() {
            let [train, held_out] = &data.read;
            folds::write(
                &output,
                train,
                held_out,
                (data.validation.rows.as_slice(), scores.as_slice()),
            )?;
        }
        let meta = AdapterMeta::of(model, self.name, Task::SequenceClassification);
        adapter::save(&output.join("adapter"), &adapter, Some(&head), &meta)?;
        let mut counts = counts(&data, &outcome);
        if config.merge {
            let difference =
                self.merge(&data, &adapter, &head, &stats, &reading, &output.join("merged"))?;
            counts.insert("max_score_difference_merged".to_owned(), difference.into());
        }
        if let Some(bytes) = runtime::peak_rss_bytes() {
            tracing::info!(mib = bytes >> 20, "peak memory");
            timings::log(&output, "memory", 0.0, &[("peak_rss_bytes", bytes.into())])?;
        }
        Machine::write(&output)?;
        job.run.finish(Completion {
            device: runtime::device_name(device),
            dtype: runtime::dtype_name(self.options.dtype).to_owned(),
            counts,
        })?;
        Ok(())
    }

    /// Writes `evaluation.json`, of pairs that nothing was selected by where there are any: of the test split if the weights were
    /// those that did best on the validation split, else of both.
    fn evaluate(
        &self,
        data: &Data,
        validation: &[[f64; 2]],
        adapter: &Adapter,
        head: &ScalarHead,
        output: &Path,
    ) -> Result<()> {
        let test_pairs: Vec<&Pair> = data.test.pairs.iter().collect();
        let budget = self.config.steps.micro_batch_tokens;
        let test = pair_scores(&self.model.decoder, Some(adapter), head, &test_pairs, budget)?;
        let name = data.validation_name;
        let selected = self.config.steps.select == Select::Best;
        let (split, with_validation, with_test) = match (selected, test.is_empty()) {
            (true, false) => (Split::Test.name().to_owned(), false, true),
            (true, true) => {
                (format!("{name} (the weights were selected on these pairs)"), true, false)
            }
            (false, false) if validation.is_empty() => (Split::Test.name().to_owned(), false, true),
            (false, false) => (format!("{name} and {}", Split::Test), true, true),
            (false, true) => (name.to_owned(), true, false),
        };
        let (mut lengths, mut ruled, mut scores) = (Vec::new(), Vec::new(), Vec::new());
        for (own, own_scores, is_in) in [
            (&data.validation, validation, with_validation),
            (&data.test, test.as_slice(), with_test),
        ] {
            if is_in {
                let length = |pair: &Pair| [pair.chosen.n_own_tokens, pair.rejected.n_own_tokens];
                lengths.extend(own.pairs.iter().map(length));
                ruled.extend(own.ruled.iter().cloned());
                scores.extend_from_slice(own_scores);
            }
        }
        if lengths.is_empty() {
            return Ok(());
        }
        let report = evaluation::report(&split, &lengths, &ruled, &scores);
        write_json(&output.join("evaluation.json"), &report)?;
        tracing::info!(
            split,
            n = report.n,
            accuracy = report.accuracy.estimate,
            low = report.accuracy.low,
            high = report.accuracy.high,
            beside = report.null_rulers.words(),
            "evaluated"
        );
        Ok(())
    }

    /// Trains; also the scores of the validation pairs with the weights it ends with, if it has just computed them.
    fn optimise(
        &self,
        job: &Job,
        data: &Data,
        adapter: &Adapter,
        head: &ScalarHead,
    ) -> Result<(Outcome, Option<PairScores>)> {
        let config = self.config;
        let mut parameters = adapter.parameters();
        parameters.push((HEAD.to_owned(), head.weight.shallow_clone()));
        let mut optimiser = AdamW::new(parameters, config.steps.adamw())?;
        let plan = Plan {
            n_examples: data.train.pairs.len(),
            batch_size: config.batch_size,
            epochs: config.epochs,
            max_steps: config.steps.max_steps,
            seed: config.seed,
        };
        plan.check()?;
        let n_steps = plan.total_steps();
        tracing::info!(
            name = job.name,
            pairs = data.train.pairs.len(),
            steps = n_steps,
            parameters = optimiser.n_parameters(),
            dtype = runtime::dtype_name(self.options.dtype),
            nf4 = config.compute.nf4,
            "training"
        );
        let Config { learning_rate, warmup_ratio, .. } = *config;
        let loop_config =
            config.steps.loop_config(learning_rate, warmup_ratio, n_steps, self.options.dtype)?;
        let mut objective = BradleyTerry {
            decoder: &self.model.decoder,
            adapter,
            head,
            train: &data.train.pairs,
            validation: &data.validation.pairs,
            center: config.center_rewards_coefficient,
            passes: config.compute.passes(config.steps.micro_batch_tokens, self.saving),
            evaluated: None,
        };
        let fingerprint = job.run.fingerprint().to_owned();
        let output = job.run.output();
        let outcome = train_loop(
            self.ranks,
            &mut objective,
            &mut optimiser,
            &plan,
            &loop_config,
            output,
            &fingerprint,
        )?;
        let is_last = outcome.selected_step == outcome.state.global_step;
        Ok((outcome, objective.evaluated.filter(|_| is_last)))
    }

    /// How the reward model is to be read: as it was trained. Open ends are among the pairs only where the preferences stage
    /// left them (`truncated = "keep"`); with `trim` they are closed at a full sentence, with `drop` there are none.
    fn reading(&self, data: &Data) -> Reading {
        let is_open = data.train.n_open > 0;
        let cut_reply = if is_open { CutReply::Open } else { CutReply::Trim };
        Reading {
            max_length: Some(self.max_length),
            cut_side: match self.config.over_length {
                OverLength::TruncateLeft | OverLength::Drop => Side::Left,
                OverLength::TruncateRight => Side::Right,
            },
            ..Reading::whole(&self.model, cut_reply)
        }
    }

    /// Scores of the validation pairs, chosen and rejected.
    fn validation_scores(
        &self,
        data: &Data,
        adapter: &Adapter,
        head: &ScalarHead,
    ) -> Result<PairScores> {
        let pairs: Vec<&Pair> = data.validation.pairs.iter().collect();
        let budget = self.config.steps.micro_batch_tokens;
        Ok(pair_scores(&self.model.decoder, Some(adapter), head, &pairs, budget)?)
    }

    /// Statistics of the scores of what PPO starts from: this base's replies to validation prompts. Without conversations, of the
    /// validation pairs, which are of other models too.
    fn score_stats(
        &self,
        job: &Job,
        data: &Data,
        pair_scores: &[[f64; 2]],
        chat: &Chat<'_>,
        reward: (&Adapter, &ScalarHead, &Reading),
    ) -> Result<ScoreStats> {
        let (adapter, head, reading) = reward;
        let micro_batch_tokens = self.config.steps.micro_batch_tokens;
        let scored =
            Scored { model: &self.model, chat, adapter, head, reading, micro_batch_tokens };
        if let (Some(path), Some(set)) = (&job.conversations, &job.set) {
            let aspect = job.turns.names()[set.turn];
            let asked =
                Asked { path, turns: &job.turns, sampling: self.sampling, seed: self.config.seed };
            let of = self.replies.statistics(asked, aspect, &scored)?;
            if let Some(stats) = of {
                return Ok(stats);
            }
        }
        let stats = |scores: &[f64], n_prompts, split: &str, source: &str| {
            let of = ScoreStats::of(scores, split, &self.model.base_sha256);
            ScoreStats { n_prompts, source: source.to_owned(), ..of }
        };
        if !pair_scores.is_empty() {
            let (split, n) = (data.validation_name, pair_scores.len());
            return Ok(stats(
                &pair_scores.concat(),
                n,
                split,
                "both sides of the validation pairs",
            ));
        }
        tracing::warn!("no validation conversations: score statistics are of training pairs");
        let scores = scored.scores(&both_sides(&data.train.pairs))?;
        let (split, n) = (Split::Train.name(), data.train.pairs.len());
        Ok(stats(&scores, n, split, "both sides of the training pairs"))
    }

    /// Writes the merged model; the largest difference between its scores and the adapter's.
    fn merge(
        &self,
        data: &Data,
        adapter: &Adapter,
        head: &ScalarHead,
        stats: &ScoreStats,
        reading: &Reading,
        output: &Path,
    ) -> Result<f64> {
        let mut extra = Map::new();
        extra.insert("score_mean".to_owned(), stats.mean.into());
        extra.insert("score_std".to_owned(), stats.std.into());
        let rule = serde_json::to_value(reading).expect("words and numbers serialise");
        extra.insert(reading::KEY.to_owned(), rule);
        extra.insert("pad_token_id".to_owned(), self.pad_token_id().into());
        // In the compute dtype even where the source has 16 bits, and into the packed base if the adapter was trained over that:
        // the merged model is to score as the adapter does.
        let LoadOptions { dtype, nf4, .. } = self.options;
        merge::write_model(&self.source, Some(adapter), Some(head), output, dtype, nf4, extra)?;

        let pairs = if data.validation.pairs.is_empty() { &data.train } else { &data.validation };
        let sequences = both_sides(&pairs.pairs[..pairs.pairs.len().min(N_COMPARED / 2)]);
        let budget = self.config.steps.micro_batch_tokens;
        let unmerged =
            sequence_scores(&self.model.decoder, Some(adapter), head, &sequences, budget)?;
        let options = LoadOptions { nf4: None, ..self.options };
        let merged = Model::streamed(&Source::Directory(output.to_owned()), &options)?;
        let head = merged.head.as_ref().expect("it was written with a head");
        let merged = sequence_scores(&merged.decoder, None, head, &sequences, budget)?;
        let difference =
            unmerged.iter().zip(&merged).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        tracing::info!(difference, "largest |Δscore| between merged model and adapter");
        Ok(difference)
    }

    /// A padding token that is never the end of a text: transformers reads the score before the first padding token.
    fn pad_token_id(&self) -> i64 {
        let config = &self.model.config;
        let is_end = |id: &i64| config.eos_token_ids.contains(id);
        config
            .pad_token_id
            .filter(|id| !is_end(id))
            .unwrap_or_else(|| (0..).find(|id| !is_end(id)).expect("some id is no end of text"))
    }
}

fn both_sides(pairs: &[Pair]) -> Vec<Vec<i64>> {
    pairs
        .iter()
        .flat_map(|pair| [pair.chosen.token_ids.clone(), pair.rejected.token_ids.clone()])
        .collect()
}

fn report_losses(data: &Data, name: &str) {
    let both = [&data.train, &data.validation];
    let sum = |count: fn(&Pairs) -> usize| both.map(count).iter().sum::<usize>();
    let (cut, dropped) = (sum(|p| p.n_cut), sum(|p| p.n_dropped));
    let identical = sum(|p| p.n_identical);
    if cut + dropped + identical > 0 {
        tracing::warn!(name, cut, dropped, identical, "pairs longer than max_length, or identical");
    }
    if data.validation.pairs.is_empty() {
        tracing::warn!(name, "no validation pairs: the run is not evaluated");
    }
}

fn counts(data: &Data, outcome: &Outcome) -> Map<String, Value> {
    let numbers: [(&str, Value); 10] = [
        ("train", data.train.pairs.len().into()),
        ("validation", data.validation.pairs.len().into()),
        ("test", data.test.pairs.len().into()),
        ("cut", (data.train.n_cut + data.validation.n_cut).into()),
        ("dropped", (data.train.n_dropped + data.validation.n_dropped).into()),
        ("identical", (data.train.n_identical + data.validation.n_identical).into()),
        ("with_shared_prefix", data.train.pairs.iter().filter(|p| p.n_shared > 0).count().into()),
        ("steps", outcome.state.global_step.into()),
        ("num_tokens", outcome.state.num_tokens.into()),
        ("selected_step", outcome.selected_step.into()),
    ];
    numbers.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}
