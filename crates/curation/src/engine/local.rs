//! The model in this process: whole units of conversations in one batch, verdicts from the logits
//! of the last rows of a tree of prompts.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, bail};
use arete_chain::sample::{self, SampledChain, Sampler, Start};
use arete_model::generate::{Options, Sampling, Stream};
use arete_model::{
    Adapter, Batch, BatchBuilder, Chat, Decoder, LoadOptions, Model, SegmentIdx, Source, logprobs,
};
use arete_records::{Message, Refusal};
use tch::{Kind, Tensor};

use super::{Chain, Drawing, Labels, Outcome, Parts, Query, Reply};
use crate::judge::verdict::{LabelMass, MIN_MASS};

/// Tokens in one forward pass of a judge: long enough for full matrix speed, short enough for the
/// activations to stay in cache.
const TOKENS_PER_PASS: usize = 2048;

/// A pass is at least this many times as long as the prefix that all queries share (judged
/// examples), because every pass computes it anew.
const PASS_PER_PREFIX: usize = 4;

/// A loaded model, perhaps with an adapter.
#[derive(Debug)]
pub struct LocalEngine {
    model: Model,
    adapter: Option<Adapter>,
    name: String,
    /// Whether common prefixes are computed once; false only to measure what that gains.
    pub share_prefixes: bool,
    /// Whether a reply may end before its token limit; false only to measure speed.
    pub ends_turns: bool,
    /// Ids of the tokens that verdicts began with instead of a label, and how often.
    instead: Mutex<BTreeMap<i64, usize>>,
}

impl LocalEngine {
    /// Loads a model, and an adapter (a peft directory) over it.
    ///
    /// # Errors
    ///
    /// A model or adapter that cannot be loaded, or an adapter of another base.
    pub fn load(
        model: &str,
        adapter: Option<&std::path::Path>,
        options: &LoadOptions,
    ) -> Result<Self> {
        let loaded = Model::load(&Source::parse(model)?, options)?;
        let mut name = model.trim_end_matches('/').rsplit('/').next().unwrap_or(model).to_owned();
        let adapter = match adapter {
            None => None,
            Some(dir) => {
                let device = loaded.decoder.device();
                let read = arete_model::adapter::load(dir, "judge", &loaded.config, device)?;
                read.meta.check_base(&loaded)?;
                let label = dir.file_name().unwrap_or(dir.as_os_str()).to_string_lossy();
                name = format!("{name}+{label}");
                Some(read.adapter)
            }
        };
        let (share_prefixes, ends_turns) = (true, true);
        Ok(Self {
            model: loaded,
            adapter,
            name,
            share_prefixes,
            ends_turns,
            instead: Mutex::default(),
        })
    }

    /// The model's name: the last part of its path, and the adapter's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The model's weights.
    pub fn decoder(&self) -> &Decoder {
        &self.model.decoder
    }

    pub(super) fn model(&self) -> &Model {
        &self.model
    }

    pub(super) fn chat(&self) -> Result<Chat<'_>> {
        Ok(self.model.chat()?)
    }

    pub(super) fn n_tokens(&self, messages: &[Message]) -> Result<usize> {
        Ok(self.chat()?.render_prompt(messages)?.len())
    }

    pub(super) fn fits(&self, chain: &Chain, max_new_tokens: usize) -> Result<bool> {
        let chat = self.chat()?;
        let options = Options::new(Sampling::GREEDY, Vec::new());
        let n_tokens =
            self.sampler(&chat, options, max_new_tokens).n_longest(&start(&chat, chain, 0)?)?;
        Ok(n_tokens <= self.model.config.max_position_embeddings)
    }

    fn sampler<'a>(
        &'a self,
        chat: &'a Chat<'a>,
        options: Options,
        max_new_tokens: usize,
    ) -> Sampler<'a> {
        let adapter = self.adapter.as_ref();
        Sampler { model: &self.model, chat, adapter, options, max_new_tokens, joins: false }
    }

    pub(super) fn chains_each(
        &self,
        chains: &[Chain],
        drawing: &Drawing,
        done: &mut dyn FnMut(usize, Outcome) -> Result<()>,
    ) -> Result<()> {
        let chat = self.chat()?;
        let starts: Vec<Start<'_>> = chains
            .iter()
            .map(|chain| start(&chat, chain, drawing.seed))
            .collect::<Result<_, _>>()?;
        let stop_ids = if self.ends_turns { self.model.stop_ids()? } else { Vec::new() };
        let options = Options::new(drawing.sampling, stop_ids);
        let sampler = Sampler {
            joins: drawing.is_verdict && self.share_prefixes,
            ..self.sampler(&chat, options, drawing.max_new_tokens)
        };
        let mut parts = Parts::of(chains);
        sampler.each(&starts, None, &mut |sample, chain| match parts.put(
            chain.prompt,
            sample,
            replies_of(&chain),
        ) {
            Some(whole) => done(chain.prompt, Ok(whole)),
            None => Ok(()),
        })
    }

    pub(super) fn label_masses(&self, queries: &[Query], labels: Labels) -> Result<Vec<LabelMass>> {
        let _guard = tch::no_grad_guard();
        let [first, second] = self.label_ids(labels)?;
        let mut sequences = self.sequences(queries)?;
        let limit = self.model.config.max_position_embeddings;
        let mut n_too_long = 0;
        for sequence in sequences.iter_mut().filter(|sequence| sequence.len() > limit) {
            sequence.clear();
            n_too_long += 1;
        }
        if n_too_long > 0 {
            tracing::warn!(
                questions = n_too_long,
                positions = limit,
                "longer than the judge's positions, counted as abstentions"
            );
        }
        let mut out = vec![LabelMass { first: 0.0, second: 0.0 }; queries.len()];
        for pass in passes(&sequences, self.share_prefixes) {
            let chosen: Vec<&[i64]> = pass.iter().map(|&idx| sequences[idx].as_slice()).collect();
            let (batch, rows) = pack(&chosen, self.share_prefixes);
            let logprobs =
                next_token_logprobs(&self.model.decoder, self.adapter.as_ref(), &batch, &rows)?;
            let first = mass(&logprobs, &first)?;
            let second = mass(&logprobs, &second)?;
            if first.iter().zip(&second).any(|(first, second)| first + second < MIN_MASS) {
                let best = logprobs.f_argmax(1, false).map_err(arete_model::Error::from)?;
                let best = Vec::<i64>::try_from(best).map_err(arete_model::Error::from)?;
                let mut instead = self.instead.lock().unwrap_or_else(PoisonError::into_inner);
                for ((first, second), id) in first.iter().zip(&second).zip(best) {
                    if first + second < MIN_MASS {
                        *instead.entry(id).or_insert(0) += 1;
                    }
                }
            }
            for ((idx, first), second) in pass.into_iter().zip(first).zip(second) {
                out[idx] = LabelMass { first, second };
            }
        }
        Ok(out)
    }

    pub(super) fn instead(&self) -> Vec<(String, usize)> {
        let instead = self.instead.lock().unwrap_or_else(PoisonError::into_inner);
        let mut texts = BTreeMap::new();
        for (&id, n) in instead.iter() {
            let text = self.model.tokenizer.decode(&[id]).unwrap_or_default();
            let text = if text.is_empty() { format!("token {id}") } else { text };
            *texts.entry(text).or_insert(0) += n;
        }
        super::by_frequency(&texts)
    }

    /// The tokens of every query, up to where its label is read.
    ///
    /// # Errors
    ///
    /// A template or tokenizer that refuses the messages.
    pub fn sequences(&self, queries: &[Query]) -> Result<Vec<Vec<i64>>> {
        let chat = self.chat()?;
        let ids = |query: &Query| -> Result<Vec<i64>> {
            let mut ids = chat.render_prompt(&query.messages)?;
            if !query.opening.is_empty() {
                ids.extend(self.model.tokenizer.encode(&query.opening, false)?);
            }
            Ok(ids)
        };
        queries.iter().map(ids).collect()
    }

    /// Tokens that judging these sequences computes: common prefixes once a pass, if they are shared.
    pub fn n_computed(&self, sequences: &[Vec<i64>]) -> usize {
        let packed = |pass: Vec<usize>| {
            let chosen: Vec<&[i64]> = pass.iter().map(|&idx| sequences[idx].as_slice()).collect();
            pack(&chosen, self.share_prefixes).0.n_tokens()
        };
        passes(sequences, self.share_prefixes).into_iter().map(packed).sum()
    }

    /// The tokens that stand for each label.
    fn label_ids(&self, labels: Labels) -> Result<[Vec<i64>; 2]> {
        let ids = [self.spellings(labels.first)?, self.spellings(labels.second)?];
        if ids[0].iter().any(|id| ids[1].contains(id)) {
            bail!(Refusal::setting(
                "method",
                format!("a judge whose tokens tell `{}` from `{}`", labels.first, labels.second),
                self.name.clone()
            ));
        }
        Ok(ids)
    }

    /// Every token that spells the label alone: bare, and after a space in the notations of
    /// byte-level BPE and SentencePiece. Where there is none, the token a label begins with.
    fn spellings(&self, label: &str) -> Result<Vec<i64>> {
        let tokenizer = &self.model.tokenizer;
        let spellings = [label.to_owned(), format!("Ġ{label}"), format!("▁{label}")];
        let ids: BTreeSet<i64> =
            spellings.iter().filter_map(|spelling| tokenizer.token_id(spelling)).collect();
        if ids.is_empty() {
            return Ok(tokenizer.encode(label, false)?.into_iter().take(1).collect());
        }
        Ok(ids.into_iter().collect())
    }

    pub(super) fn reply_logprobs(&self, conversations: &[Vec<Message>]) -> Result<Vec<f64>> {
        let _guard = tch::no_grad_guard();
        let chat = self.chat()?;
        let limit = self.model.config.max_position_embeddings;
        let mut sequences = Vec::with_capacity(conversations.len());
        let mut own = Vec::with_capacity(conversations.len()); // the last message's own tokens
        let mut out = vec![0.0; conversations.len()];
        for (idx, messages) in conversations.iter().enumerate() {
            let context = messages.len().saturating_sub(1);
            let n_prompt = chat.render_prompt(&messages[..context])?.len();
            let mut whole = chat.render(messages)?;
            if whole.token_ids.len() > limit {
                out[idx] = f64::NAN;
                whole.token_ids.clear();
            }
            whole.own[..n_prompt].fill(false);
            sequences.push(whole.token_ids);
            own.push(whole.own);
        }
        for pass in passes(&sequences, self.share_prefixes) {
            let chosen: Vec<&[i64]> = pass.iter().map(|&idx| sequences[idx].as_slice()).collect();
            let (batch, ends) = pack(&chosen, self.share_prefixes);
            let predecessors = batch.predecessors();
            let (mut rows, mut owners) = (Vec::new(), Vec::new());
            for (&idx, end) in pass.iter().zip(ends) {
                let mut row = Some(end as usize);
                for &own in own[idx].iter().rev() {
                    let at = row.expect("as many rows as tokens");
                    if own {
                        rows.push(at);
                        owners.push(idx);
                    }
                    row = predecessors[at];
                }
            }
            if rows.is_empty() {
                continue;
            }
            let hidden = self.model.decoder.forward(&batch, self.adapter.as_ref())?;
            let found = logprobs::of_rows(&self.model.decoder, &hidden, &batch, &rows, 1.0, false)?;
            for (idx, logprob) in owners.into_iter().zip(to_vec(&found.logprob)?) {
                out[idx] += f64::from(logprob);
            }
        }
        Ok(out)
    }
}

/// The replies of a sampled chain.
pub(super) fn replies_of(chain: &SampledChain) -> Vec<Reply> {
    let reply = |(turn, reply): (usize, &sample::Reply)| Reply {
        text: chain.reply_text(turn).to_owned(),
        finish_reason: reply.finish_reason,
        n_tokens: reply.tokens.len(),
    };
    chain.replies.iter().enumerate().map(reply).collect()
}

/// A conversation to continue, its samples as random streams.
pub(super) fn start<'a>(chat: &Chat<'_>, chain: &'a Chain, seed: u64) -> Result<Start<'a>> {
    let stream = |&sample: &u64| Stream { seed, prompt: chain.key, sample };
    let questions = chain.questions.iter().map(String::as_str).collect();
    let streams = chain.samples.iter().map(stream).collect();
    Ok(Start::new(chat, &chain.messages, questions, streams)?)
}

/// log P of every token of the vocabulary after the given rows.
///
/// # Shapes
///
/// - result: `[n, V]` f32, n = `rows.len()`, nats.
fn next_token_logprobs(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    batch: &Batch,
    rows: &[i64],
) -> Result<Tensor> {
    let hidden = decoder.forward(batch, adapter)?; // [N, D]
    let rows = Tensor::from_slice(rows).to_device(decoder.device());
    let logits = decoder.logits(&hidden.index_select(0, &rows))?; // [n, V]
    Ok(logits.to_kind(Kind::Float).log_softmax(-1, Kind::Float))
}

/// The probability of any of `ids`, per row.
fn mass(logprobs: &Tensor, ids: &[i64]) -> Result<Vec<f64>> {
    let columns = Tensor::from_slice(ids).to_device(logprobs.device());
    let mass = logprobs.index_select(1, &columns).exp().sum_dim_intlist(-1, false, Kind::Double);
    Vec::<f64>::try_from(&mass).map_err(|error| arete_model::Error::from(error).into())
}

fn to_vec(tensor: &Tensor) -> Result<Vec<f32>> {
    Vec::<f32>::try_from(tensor).map_err(|error| arete_model::Error::from(error).into())
}

/// Groups of sequences for one forward pass each, empty ones left out. With sharing, sequences are
/// sorted first, so that those with long common prefixes come together.
fn passes(sequences: &[Vec<i64>], share: bool) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> =
        (0..sequences.len()).filter(|&idx| !sequences[idx].is_empty()).collect();
    let lengths: Vec<usize> = sequences.iter().map(Vec::len).collect();
    if !share {
        return by_budget(&lengths, &lengths, &order, TOKENS_PER_PASS);
    }
    order.sort_by(|&a, &b| sequences[a].cmp(&sequences[b]).then(a.cmp(&b)));
    // What a sequence costs is what it does not share with the one before it.
    let mut costs = vec![0; sequences.len()];
    for (place, &idx) in order.iter().enumerate() {
        let shared =
            if place == 0 { 0 } else { common(&sequences[order[place - 1]], &sequences[idx]) };
        costs[idx] = lengths[idx] - shared;
    }
    let prefix = match (order.first(), order.last()) {
        (Some(&first), Some(&last)) if first != last => common(&sequences[first], &sequences[last]),
        _ => 0,
    };
    by_budget(&costs, &lengths, &order, TOKENS_PER_PASS.max(PASS_PER_PREFIX * prefix))
}

/// Cuts `order` into runs of at most `budget` tokens (or one sequence). A sequence costs its whole
/// length where it begins a run, and `costs` of it after another.
fn by_budget(
    costs: &[usize],
    lengths: &[usize],
    order: &[usize],
    budget: usize,
) -> Vec<Vec<usize>> {
    let mut out: Vec<Vec<usize>> = Vec::new();
    let mut used = usize::MAX;
    for &idx in order {
        if used.saturating_add(costs[idx]) > budget {
            out.push(Vec::new());
            used = lengths[idx];
        } else {
            used += costs[idx];
        }
        out.last_mut().expect("the first sequence opens a pass").push(idx);
    }
    out
}

fn common(a: &[i64], b: &[i64]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// A batch in which every common prefix is computed once, and the last row of each sequence.
///
/// `sequences` must be sorted if `share`.
fn pack(sequences: &[&[i64]], share: bool) -> (Batch, Vec<i64>) {
    let mut builder = Batch::tree();
    let mut ends = vec![None; sequences.len()];
    if share {
        grow(&mut builder, None, sequences, 0, 0, &mut ends);
    } else {
        for (end, sequence) in ends.iter_mut().zip(sequences) {
            *end = Some(builder.root(sequence));
        }
    }
    let batch = builder.build();
    let row = |end: Option<SegmentIdx>| {
        batch.last_row(end.expect("every sequence ends in a segment")) as i64
    };
    let rows = ends.into_iter().map(row).collect();
    (batch, rows)
}

/// Adds the part after `depth` of sorted `sequences`, which agree up to there, below `parent`.
fn grow(
    builder: &mut BatchBuilder,
    parent: Option<SegmentIdx>,
    sequences: &[&[i64]],
    depth: usize,
    first: usize,
    ends: &mut [Option<SegmentIdx>],
) {
    let mut from = 0;
    while from < sequences.len() {
        let head = sequences[from];
        if head.len() == depth {
            ends[first + from] = parent; // the prefix itself is one of the sequences
            from += 1;
            continue;
        }
        let mut to = from + 1;
        while to < sequences.len() && sequences[to].get(depth) == head.get(depth) {
            to += 1;
        }
        // Sorted, so what the first and the last agree on they all do.
        let shared = common(head, sequences[to - 1]);
        let segment = match parent {
            Some(parent) => builder.child(parent, &head[depth..shared]),
            None => builder.root(&head[depth..shared]),
        };
        grow(builder, Some(segment), &sequences[from..to], shared, first + from, ends);
        from = to;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_prefixes_are_packed_once() {
        let sequences: [&[i64]; 5] =
            [&[1, 2, 3], &[1, 2, 3, 4, 5], &[1, 2, 3, 4, 6], &[1, 7], &[8]];
        let (batch, rows) = pack(&sequences, true);
        // 1 | 2 3 | 4 | 5, 6 below; then 7, then 8.
        assert_eq!(batch.n_tokens(), 8);
        let ids: Vec<i64> = rows.iter().map(|&row| batch.token_ids()[row as usize]).collect();
        assert_eq!(ids, [3, 5, 6, 7, 8]);
        let (batch, rows) = pack(&sequences, false);
        assert_eq!(batch.n_tokens(), 16);
        let ids: Vec<i64> = rows.iter().map(|&row| batch.token_ids()[row as usize]).collect();
        assert_eq!(ids, [3, 5, 6, 7, 8]);
    }

    #[test]
    fn passes_keep_to_the_budget_and_cover_everything_once() {
        let sequences: Vec<Vec<i64>> = (0..40)
            .map(|i| (0..200).map(|t| if t < 150 { t } else { t * 100 + i }).collect())
            .collect();
        for share in [true, false] {
            let passes = passes(&sequences, share);
            let mut all: Vec<usize> = passes.concat();
            all.sort_unstable();
            assert_eq!(all, (0..40).collect::<Vec<_>>());
            for pass in &passes {
                let chosen: Vec<&[i64]> = pass.iter().map(|&idx| &sequences[idx][..]).collect();
                let n_tokens = pack(&chosen, share).0.n_tokens();
                assert!(n_tokens <= TOKENS_PER_PASS, "{n_tokens}");
            }
            // Shared: 150 + 40 · 50 = 2150 tokens; unshared 8000, ten of 200 a pass.
            assert_eq!(passes.len(), if share { 2 } else { 4 });
        }
    }
}
