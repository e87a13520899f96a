//! One step of all sequences in flight: the decoder over their new tokens, and a draw for each.
//!
//! On the GPU's path everything that a step reads goes to the device in one copy, and what was drawn comes back in one: nothing
//! else waits.

use tch::{Kind, Tensor};

use super::{Generator, Run};
use crate::batch::Tables;
use crate::ops::SampleSettings;
use crate::{Error, ops};

/// The rows of one step, as the decoder takes them.
#[derive(Default)]
pub(super) struct Rows {
    token_ids: Vec<i64>,
    positions: Vec<i64>,
    slots: Vec<i64>,
    segments: Vec<[i64; 5]>,
    spans: Vec<[i64; 2]>,
}

impl Rows {
    fn tables(&self) -> Tables {
        Tables::new(&self.segments, &self.spans, &[0, self.segments.len() as i64])
    }

    /// Adds tokens at `position`, stored from `slot` on, that see `seen` (the own tokens last).
    pub(super) fn push(
        &mut self,
        token_ids: &[i64],
        position: usize,
        slot: usize,
        seen: impl Iterator<Item = Run>,
    ) -> usize {
        let row = self.token_ids.len();
        let n = token_ids.len();
        let first_span = self.spans.len();
        self.spans.extend(seen.map(|run| [run.start as i64, run.length as i64]));
        let n_spans = self.spans.len() - first_span;
        self.segments.push([
            row as i64,
            n as i64,
            position as i64,
            first_span as i64,
            n_spans as i64,
        ]);
        self.token_ids.extend_from_slice(token_ids);
        self.positions.extend((position..position + n).map(|p| p as i64));
        self.slots.extend((slot..slot + n).map(|s| s as i64));
        row + n - 1
    }
}

/// The same on the decoder's device.
struct Inputs {
    token_ids: Tensor,
    positions: Tensor,
    slots: Tensor,
    tables: Tables,
}

/// What a step drew, one entry a sequence in flight.
pub(super) struct Drawn {
    pub(super) tokens: Vec<i64>,
    pub(super) logprobs: Vec<f32>,
    /// What it was drawn from, for a look at what is not finite.
    pub(super) logits: Tensor,
}

/// Rows of hidden states that differ, and which of them each sequence draws from: those that share a row (a prompt's last token)
/// share its product.
struct Sources {
    rows: Vec<i64>,
    of: Vec<i64>,
}

impl Sources {
    fn new(last_rows: &[i64]) -> Self {
        let mut rows = last_rows.to_vec();
        rows.dedup();
        let mut at = 0;
        let source = |row: &i64| {
            while rows[at] != *row {
                at += 1;
            }
            at as i64
        };
        let of = last_rows.iter().map(source).collect();
        Self { rows, of }
    }

    fn are_shared(&self) -> bool {
        self.rows.len() < self.of.len()
    }
}

impl Generator<'_> {
    /// Computes `rows` and draws a token after each of `last_rows` by its uniform number.
    pub(super) fn draw(
        &self,
        rows: &Rows,
        last_rows: &[i64],
        uniforms: &[f64],
    ) -> Result<Drawn, Error> {
        let sampling = self.options.sampling;
        let settings = SampleSettings {
            temperature: sampling.temperature as f32,
            top_k: sampling.top_k as i64,
            top_p: sampling.top_p as f32,
        };
        let sources = Sources::new(last_rows);
        if ops::gpu_shaped(self.decoder.device(), self.decoder.kind()) {
            self.draw_there(rows, &sources, uniforms, settings)
        } else {
            self.draw_here(rows, &sources, uniforms, settings)
        }
    }

    /// On the CPU's own path.
    fn draw_here(
        &self,
        rows: &Rows,
        sources: &Sources,
        uniforms: &[f64],
        settings: SampleSettings,
    ) -> Result<Drawn, Error> {
        let device = self.decoder.device();
        let there = |numbers: &[i64]| Tensor::from_slice(numbers).f_to_device(device);
        let inputs = Inputs {
            token_ids: there(&rows.token_ids)?,
            positions: there(&rows.positions)?,
            slots: there(&rows.slots)?,
            tables: rows.tables(),
        };
        let hidden = self.forward(&inputs)?; // [N, D]
        let hidden = hidden.f_index_select(0, &there(&sources.rows)?)?;
        let mut logits = self.decoder.unchecked_logits(&hidden)?;
        if sources.are_shared() {
            logits = logits.f_index_select(0, &there(&sources.of)?)?; // [active, V]
        }
        let (tokens, logprobs) = ops::sample(&logits, uniforms, &vec![settings; uniforms.len()])?;
        Ok(Drawn { tokens, logprobs, logits })
    }

    /// On the GPU's path.
    fn draw_there(
        &self,
        rows: &Rows,
        sources: &Sources,
        uniforms: &[f64],
        settings: SampleSettings,
    ) -> Result<Drawn, Error> {
        let (segments, spans) = (rows.segments.as_flattened(), rows.spans.as_flattened());
        let bits: Vec<i64> = uniforms.iter().map(|u| u.to_bits().cast_signed()).collect();
        let parts: [&[i64]; 8] = [
            &rows.token_ids,
            &rows.positions,
            &rows.slots,
            segments,
            spans,
            &sources.rows,
            &sources.of,
            &bits,
        ];
        let all = ops::upload(&parts.concat(), self.decoder.device())?;
        let mut start = 0;
        let [token_ids, positions, slots, segments, spans, source_rows, sources_of, bits] = parts
            .map(|part| {
                let n = part.len() as i64;
                start += n;
                all.narrow(0, start - n, n)
            });
        let mut tables = rows.tables();
        tables.there = Some([segments, spans]);
        let inputs = Inputs { token_ids, positions, slots, tables };
        let mut hidden = self.forward(&inputs)?; // [N, D]
        if sources.rows.len() < rows.token_ids.len() {
            hidden = hidden.f_index_select(0, &source_rows)?;
        }
        let logits = self.decoder.unchecked_logits(&hidden)?;
        let sources_of = sources.are_shared().then_some(&sources_of);
        let uniforms = bits.f_view_dtype(Kind::Double)?;
        let drawn = ops::sample_there(&logits, sources_of, &uniforms, settings)?;
        let (tokens, logprobs) = ops::read_drawn(&drawn)?;
        Ok(Drawn { tokens, logprobs, logits })
    }

    fn forward(&self, inputs: &Inputs) -> Result<Tensor, Error> {
        let Inputs { token_ids, positions, slots, tables } = inputs;
        let decoder = self.decoder;
        let mut hidden = decoder.embed(token_ids)?; // [N, D]
        let mut delta: Option<Tensor> = None;
        for (idx, (keys, values)) in self.cache.layers.iter().enumerate() {
            let adapter = self.prepared.as_ref().map(|layers| &layers[idx]);
            let attend = |qkv: &Tensor| {
                let (cos_sin, config) = (decoder.cos_sin(), decoder.config());
                ops::cached_attention(qkv, positions, cos_sin, tables, slots, keys, values, config)
            };
            let (stream, added) = decoder.block(idx, &hidden, delta.as_ref(), adapter, attend)?;
            (hidden, delta) = (stream, Some(added));
        }
        let delta = delta.expect("a decoder has at least one block");
        decoder.final_norm(&hidden, &delta)
    }
}
