//! Log-probabilities of tokens: the only place where logits and tokens are shifted against each other.

use tch::Tensor;

use crate::batch::Batch;
use crate::decoder::Decoder;
use crate::{Error, ops};

/// What [`of_rows`] returns.
#[derive(Debug)]
pub struct LogProbs {
    /// `[n]` f32, nats.
    pub logprob: Tensor,
    /// `[n]` f32, nats: entropy of the distribution the token was drawn from; `[0]` unless asked for.
    /// Never differentiable.
    pub entropy: Tensor,
}

/// log P(token of each of `rows` | everything before it), at `temperature`; differentiable in `hidden`.
///
/// The token of row i is predicted by the hidden state of the row before it (the parent's last row where a segment
/// begins). Logits are products in the compute dtype; softmax and logarithm are f32 with f64 sums.
///
/// # Shapes
///
/// - `hidden`: `[N, D]`, from [`Decoder::forward`] on `batch`.
/// - `rows`: n rows of the batch; the results are `[n]` f32.
///
/// # Errors
///
/// [`Error::Invalid`] if a row is the first token of its sequence, which nothing predicts, or if the temperature is
/// not positive; as [`Decoder::head`]; without gradients also [`Error::NonFinite`] if a number is NaN or infinite (with them, the
/// trainer looks at the loss).
pub fn of_rows(
    decoder: &Decoder,
    hidden: &Tensor,
    batch: &Batch,
    rows: &[usize],
    temperature: f64,
    want_entropy: bool,
) -> Result<LogProbs, Error> {
    if !(temperature.is_finite() && temperature > 0.0) {
        return Err(Error::Invalid {
            name: "temperature",
            expected: "a positive number".to_owned(),
            got: temperature.to_string(),
        });
    }
    let predecessors = batch.predecessors();
    let mut from = Vec::with_capacity(rows.len());
    let mut targets = Vec::with_capacity(rows.len());
    for &row in rows {
        let Some(predecessor) = predecessors[row] else {
            return Err(Error::Invalid {
                name: "rows",
                expected: "tokens with something before them".to_owned(),
                got: format!("row {row}, the first of its sequence"),
            });
        };
        from.push(predecessor as i64);
        targets.push(batch.token_ids()[row]);
    }
    let from = ops::numbers_on(hidden.device(), &from)?;
    let targets = ops::numbers_on(hidden.device(), &targets)?;
    let (logprob, entropy) = ops::token_logprobs(
        &hidden.f_index_select(0, &from)?,
        decoder.head()?,
        &targets,
        temperature,
        want_entropy,
    )?;
    if !logprob.requires_grad() {
        decoder.check_finite("log-probabilities", &logprob)?;
    }
    Ok(LogProbs { logprob, entropy })
}
