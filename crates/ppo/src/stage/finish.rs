//! The results: the selected weights as adapter and merged model, and what the run says of itself.

use anyhow::Result;
use arete_model::adapter::{self, AdapterMeta, Task};
use arete_model::{Batch, LoadOptions, Model, Source, adapter::merge};
use arete_records::parquet;
use arete_records::rows::RolloutRow;
use arete_records::stats::{self, Resampling};
use serde_json::{Map, Value, json};

use super::files::{NamedScores, completions_path, read_scores, scores_path};
use super::state::State;
use super::{POLICY, Stage, round, z_mean};

/// Prompts whose logits are compared between the merged model and the adapter.
const N_COMPARED: usize = 8;

impl Stage<'_> {
    /// Puts the selected weights in place and writes the results; what there is to count.
    pub(super) fn finish(mut self, name: &str, source: &Source) -> Result<Map<String, Value>> {
        let last = self.state.iteration;
        let selected = self.best().unwrap_or(last);
        if selected != last {
            let best = self.store.load::<State>(selected)?;
            self.optimisers.policy.load_parameters(POLICY, &best.tensors)?;
        }
        self.metrics.flush()?;
        self.store.keep_only(&[last, selected])?;
        tracing::info!(selected, "weights selected");
        if selected == 0 && last > 0 {
            tracing::warn!(
                "every probe after an iteration rang the alarm for over-optimisation: the start is the result"
            );
        }
        if let (Some((first, _)), Some(best)) = (&self.state.first_probe, self.state.best)
            && best.score < *first
        {
            tracing::warn!(
                before = round(*first),
                best = round(best.score),
                "no probe after an iteration scored as high as the one before the first"
            );
        }
        self.models.policy.set_trainable(false);
        let policy = &self.models.policy;
        let meta = AdapterMeta::of(self.model, name, Task::CausalLm);
        adapter::save(&self.output.join("adapter"), policy, None, &meta)?;

        let mut counts = Map::new();
        counts.insert("iterations".to_owned(), last.into());
        counts.insert("episodes".to_owned(), self.state.episodes.into());
        counts.insert("train".to_owned(), self.prompts.train.len().into());
        counts.insert("validation".to_owned(), self.prompts.validation.len().into());
        counts.insert("selected_iteration".to_owned(), selected.into());
        if let Some(found) = &self.state.standardisation {
            counts.insert("standardisation".to_owned(), json!(found));
        }
        counts.extend(self.probe_difference(selected, last)?);
        if self.config.merge {
            let difference = self.merge(source)?;
            counts.insert("max_logit_difference_merged".to_owned(), difference.into());
        }
        Ok(counts)
    }

    /// The reward models' mean on validation prompts, before and after, with 95 % intervals of the difference: for the selected
    /// weights, whose interval does not know that they were chosen on these prompts, and for the last, which were not chosen.
    fn probe_difference(&self, selected: u64, last: u64) -> Result<Map<String, Value>> {
        let mut out = Map::new();
        let Some(before) = self.probed_scores(0)? else { return Ok(out) };
        let resampling = Resampling::seeded(self.config.seed);
        for (name, iteration) in
            [("probe_z_difference", selected), ("probe_z_difference_last", last)]
        {
            let Some(after) = self.probed_scores(iteration)? else { continue };
            let change = stats::paired_difference_of(&before, &after, stats::mean, resampling);
            let interval = change.interval;
            let [mean_before, mean_after] = [&before, &after].map(|z| stats::mean(&z.concat()));
            tracing::info!(
                iteration,
                before = round(mean_before),
                after = round(mean_after),
                difference = round(interval.estimate),
                low = round(interval.low),
                high = round(interval.high),
                "ensemble on validation prompts"
            );
            out.insert(name.to_owned(), json!(interval));
            if iteration == selected {
                out.insert("probe_z_before".to_owned(), mean_before.into());
                out.insert("probe_z_after".to_owned(), mean_after.into());
            }
        }
        Ok(out)
    }

    /// Mean standardised score of each probed conversation, if that iteration was probed.
    fn probed_scores(&self, iteration: u64) -> Result<Option<Vec<Vec<f64>>>> {
        let path = completions_path(&self.output, iteration);
        if !path.exists() {
            return Ok(None);
        }
        let named = scores_path(&path);
        if named.exists() {
            let mean = |line: NamedScores| stats::mean(&line.z.into_values().collect::<Vec<_>>());
            return Ok(Some(
                read_scores(&named)?.into_iter().map(|line| vec![mean(line)]).collect(),
            ));
        }
        let rows: Vec<RolloutRow> = parquet::read(path)?;
        Ok(Some(rows.iter().map(|row| vec![z_mean(row)]).collect()))
    }

    /// Writes the merged model; the largest difference between its logits and the adapter's.
    fn merge(&self, source: &Source) -> Result<f64> {
        let output = self.output.join("merged");
        let policy = &self.models.policy;
        let LoadOptions { dtype, nf4, .. } = self.options;
        let dtype = merge::output_dtype(source, dtype)?;
        merge::write_model(source, Some(policy), None, &output, dtype, nf4, Map::new())?;
        let options = LoadOptions { nf4: None, ..self.options };
        let merged = Model::streamed(&Source::Directory(output), &options)?;
        let all = if self.prompts.validation.is_empty() {
            &self.prompts.train
        } else {
            &self.prompts.validation
        };
        let prompts: Vec<&[i64]> =
            all.iter().take(N_COMPARED).map(|prompt| prompt.token_ids.as_slice()).collect();
        let batch = Batch::from_sequences(&prompts);
        let difference = merge::max_logit_difference(&merged, self.model, policy, &batch)?;
        tracing::info!(difference, "largest |Δlogit| between merged model and adapter");
        Ok(difference)
    }
}
