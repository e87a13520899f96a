//! A decoding step's large kernels as functions of tensors: one launch each on a GPU, and by the same call, on the same tables, the
//! CPU's own kernels for tensors that lie there.

#![expect(unsafe_code, reason = "kernels read and write tensors through raw addresses")]

use tch::{Device, Kind, Tensor};

use super::launch::{
    Absmax, Checked, Packed, address, aligned, dense_aligned, format_of, gpu, gpu_index, lend,
    multiply_into, run,
};
use super::plan::{self, AttentionAddresses, AttentionShape, Scratch};
use crate::Error;
use crate::nf4::{Nf4Tensor, Scales};
use crate::ops::{self, WeightRef};

/// Rows of x that [`nf4_rows`] takes in one launch.
const ROWS_AT_ONCE: i64 = 64;
/// Rows from which a matrix is better unpacked for cuBLAS: five passes over the packed weights take about as long as unpacking them and
/// reading the result back.
pub(super) const MOST_PACKED_ROWS: i64 = 256;

// ---- attention ----

/// Which keys every row of a step sees, on the device that attends: made once a step, used by every layer.
#[derive(Debug)]
pub struct AttentionTables {
    shape: AttentionShape,
    /// `[S, 5]` and `[P, 2]` i64 on the device.
    segments: Tensor,
    spans: Tensor,
    rows: u32,
    n_segments: u32,
    /// The most that a row has.
    splits: u32,
    /// One more than the highest slot of a span.
    slots: i64,
}

impl AttentionTables {
    /// The decoder's tables: per segment its first row, rows, first position, first span and spans; per span its first slot and
    /// length.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the kernels do not take the shape, segments do not follow one another, or the spans of a segment do not
    /// hold the keys of its last row.
    pub fn new(
        segments: &[[i64; 5]],
        spans: &[[i64; 2]],
        shape: AttentionShape,
        device: Device,
    ) -> Result<Self, Error> {
        check_shape(shape)?;
        let wrong = |what: String| Error::Invalid {
            name: "attention tables",
            expected: "segments one after another, each with spans that hold its keys".to_owned(),
            got: what,
        };
        let (mut rows, mut splits) = (0, 1);
        for (i, &[row, n_rows, position, span, n_spans]) in segments.iter().enumerate() {
            let own = usize::try_from(span)
                .ok()
                .zip(usize::try_from(n_spans).ok())
                .and_then(|(span, n)| spans.get(span..span.checked_add(n)?))
                .ok_or_else(|| wrong(format!("segment {i} with spans that are not there")))?;
            let keys: i64 = own.iter().map(|&[_, length]| length).sum();
            let last = position + n_rows - 1;
            let fits = row == rows && n_rows > 0 && position >= 0 && last < keys;
            if !fits || own.iter().any(|&[slot, length]| slot < 0 || length < 0) {
                return Err(wrong(format!(
                    "segment {i}: row {row}, {n_rows} rows from position {position}, {keys} keys"
                )));
            }
            rows += n_rows;
            let last = u32::try_from(last).map_err(|_| wrong(format!("position {last}")))?;
            splits = splits.max(shape.most_splits(last));
        }
        let table = |values: &[i64], width: i64| -> Result<Tensor, Error> {
            Ok(Tensor::from_slice(values).f_view([-1, width])?)
        };
        // One copy to the device for both.
        let both = [segments.as_flattened(), spans.as_flattened()].concat();
        let both = table(&both, 1)?.f_to_device(device)?;
        let cut = 5 * segments.len() as i64;
        Ok(Self {
            shape,
            segments: both.f_narrow(0, 0, cut)?.f_view([-1, 5])?,
            spans: both.f_narrow(0, cut, 2 * spans.len() as i64)?.f_view([-1, 2])?,
            rows: u32::try_from(rows).map_err(|_| wrong(format!("{rows} rows")))?,
            n_segments: u32::try_from(segments.len()).map_err(|_| wrong("too many".to_owned()))?,
            splits,
            slots: spans.iter().map(|&[slot, length]| slot + length).max().unwrap_or(0),
        })
    }
}

fn check_shape(shape: AttentionShape) -> Result<(), Error> {
    let AttentionShape { heads, kv_heads, head_size, .. } = shape;
    if kv_heads > 0
        && heads > 0
        && heads.is_multiple_of(kv_heads)
        && (8..=plan::MAX_HEAD_SIZE).contains(&head_size)
        && head_size.is_multiple_of(8)
    {
        return Ok(());
    }
    Err(Error::Invalid {
        name: "attention heads",
        expected: format!(
            "query heads a multiple of the key heads, of a multiple of 8 numbers up to {}",
            plan::MAX_HEAD_SIZE
        ),
        got: format!("{heads} over {kv_heads} of {head_size}"),
    })
}

/// Attention of every row over its own keys in the cache, in one launch on a GPU.
///
/// # Shapes
///
/// - `q`: `[N, H·E]` f32, bf16 or f16, rotated, one row a row of the tables.
/// - `keys`, `values`: `[slots, K·E]`, the rows' own already among them.
/// - result: `[N, H·E]`.
///
/// # Errors
///
/// [`Error::Shape`] or [`Error::Invalid`] if the parts do not fit together, [`Error::Cuda`] if the GPU cannot be used.
///
/// # Source
///
/// softmax(q kᵀ / √E) v in f32. On a GPU over splits of 128 positions merged in their order (flash decoding), so a row's bits do not
/// depend on the other rows.
pub fn attend(
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    tables: &AttentionTables,
) -> Result<Tensor, Error> {
    let AttentionShape { heads, kv_heads, head_size, .. } = tables.shape;
    let format = format_of("q", q)?;
    let rows = i64::from(tables.rows);
    let parts = [
        ("q", q, rows, heads * head_size),
        ("keys", keys, tables.slots, kv_heads * head_size),
        ("values", values, tables.slots, kv_heads * head_size),
    ];
    for (name, tensor, length, width) in parts {
        let width = i64::from(width);
        let long_enough = |got: i64| if name == "q" { got == length } else { got >= length };
        if !matches!(tensor.size()[..], [got, columns] if long_enough(got) && columns == width) {
            return Err(Error::Shape { name, expected: vec![length, width], got: tensor.size() });
        }
        if tensor.kind() != q.kind() || tensor.device() != q.device() {
            return Err(Error::Invalid {
                name,
                expected: format!("{:?} on {:?}, as q", q.kind(), q.device()),
                got: format!("{:?} on {:?}", tensor.kind(), tensor.device()),
            });
        }
    }
    if tables.segments.device() != q.device() {
        return Err(Error::Invalid {
            name: "attention tables",
            expected: format!("tables on {:?}, as q", q.device()),
            got: format!("some on {:?}", tables.segments.device()),
        });
    }
    let q = dense_aligned(q)?;
    for (name, cache) in [("keys", keys), ("values", values)] {
        aligned(name, cache)?;
        if !cache.is_contiguous() {
            let got = "a view with gaps".to_owned();
            return Err(Error::Invalid { name, expected: "a contiguous cache".to_owned(), got });
        }
    }
    let Device::Cuda(index) = q.device() else {
        return ops::attend(&q, keys, values, &tables.segments, &tables.spans, tables.shape);
    };
    let out = Tensor::f_empty(q.size(), (q.kind(), q.device()))?; // [N, H·E]
    if rows == 0 {
        return Ok(out);
    }
    let need = plan::attention_scratch(tables.shape, tables.rows, tables.splits);
    with_scratch(index, need, |[partials, arrivals]| {
        let at = AttentionAddresses {
            out: address(&out),
            q: address(&q),
            keys: address(keys),
            values: address(values),
            segments: address(&tables.segments),
            spans: address(&tables.spans),
            partials,
            arrivals,
        };
        let (rows, n_segments) = (tables.rows, tables.n_segments);
        let launch = plan::attention(&at, format, tables.shape, rows, n_segments, tables.splits);
        // SAFETY: the extents were compared above, the tables when they were made; torch frees memory in the order of the stream.
        unsafe { run(index, &launch) }
    })?;
    Ok(out)
}

// ---- packed products ----

/// `x Wᵀ` with W packed: on tensor cores in launches of 64 rows each where the GPU has them for the dtype of `x`, else by the kernel
/// without them in launches of [`plan::MAX_ROWS`]; the weights are rounded to the dtype of `x` but by the latter.
///
/// # Shapes
///
/// - `x`: `[N, inputs]` f32, bf16 or f16, inputs a multiple of 32.
/// - result: `[N, outputs]` in the dtype of `x`.
///
/// # Errors
///
/// [`Error::Shape`] or [`Error::Invalid`] if the parts do not fit together, [`Error::Cuda`] if the GPU cannot be used.
///
/// # Source
///
/// bitsandbytes' `dequantize_4bit`, whose weights the trainer's products take too. A row's bits do not depend on the other rows.
pub fn nf4_rows(x: &Tensor, weight: &Packed<'_>) -> Result<Tensor, Error> {
    let y = Tensor::f_empty(
        [x.size().first().copied().unwrap_or(0), weight.outputs],
        (x.kind(), x.device()),
    )?;
    nf4_rows_into(x, weight, &y)?;
    Ok(y)
}

pub(super) fn nf4_rows_into(x: &Tensor, weight: &Packed<'_>, y: &Tensor) -> Result<(), Error> {
    let format = format_of("x", x)?;
    let [rows, inputs] = x.size()[..] else {
        return Err(Error::Shape { name: "x", expected: vec![-1, weight.inputs], got: x.size() });
    };
    if inputs != weight.inputs {
        let expected = vec![rows, weight.inputs];
        return Err(Error::Shape { name: "x", expected, got: x.size() });
    }
    if inputs % i64::from(plan::CHUNK) != 0 {
        return Err(Error::Invalid {
            name: "inputs",
            expected: format!("a multiple of {}", plan::CHUNK),
            got: inputs.to_string(),
        });
    }
    if y.size() != [rows, weight.outputs] || y.kind() != x.kind() || !y.is_contiguous() {
        let expected = vec![rows, weight.outputs];
        return Err(Error::Shape { name: "y", expected, got: y.size() });
    }
    if x.device() == Device::Cpu {
        let product = rounded_product(x, weight)?;
        y.shallow_clone().f_copy_(&product)?;
        return Ok(());
    }
    let index = gpu_index("x", x)?;
    let gpu = gpu(index)?;
    let tensor_cores = plan::tensor_cores(format, gpu.arch.0);
    let most = if tensor_cores { ROWS_AT_ONCE } else { i64::from(plan::MAX_ROWS) };
    let checked = Checked::new(weight)?;
    checked.holds("x", x)?;
    checked.holds("y", y)?;
    let x = dense_aligned(x)?;
    let mut first = 0;
    while first < rows {
        let n = (rows - first).min(most);
        let (part, out) = (x.f_narrow(0, first, n)?, y.f_narrow(0, first, n)?);
        first += n;
        if !tensor_cores {
            multiply_into(&part, weight, &out)?;
            continue;
        }
        let n = u32::try_from(n).expect("1 to 64");
        let packed = &checked.packed;
        let need = plan::nf4_rows_scratch(n, packed.outputs, packed.inputs, gpu.multiprocessors);
        with_scratch(index, need, |scratch| {
            let (y, x) = (address(&out), address(&part));
            let launch = plan::nf4_rows(y, x, format, n, packed, scratch, gpu.multiprocessors);
            // SAFETY: `Checked` and the lines above compared every tensor's extent with what the kernel reads and writes; a row of
            // x fills whole vectors; torch frees memory in the order of the stream.
            unsafe { run(index, &launch) }
        })?;
    }
    Ok(())
}

/// The same on the CPU: weights unpacked in f32, rounded once, multiplied by the CPU's own kernels.
fn rounded_product(x: &Tensor, weight: &Packed<'_>) -> Result<Tensor, Error> {
    let absmax = match weight.absmax {
        Absmax::Single(absmax) => Scales::Single(absmax.shallow_clone()),
        Absmax::Double { codes, map, nested } => Scales::Double {
            codes: codes.shallow_clone(),
            map: map.shallow_clone(),
            nested: nested.view([-1, 2]),
        },
    };
    let packed = Nf4Tensor {
        codes: weight.codes.shallow_clone(),
        absmax,
        codebook: weight.codebook.shallow_clone(),
        outputs: weight.outputs,
        inputs: weight.inputs,
        block_size: weight.block_size,
    };
    let blocks = (weight.outputs * weight.inputs)
        .unsigned_abs()
        .div_ceil(weight.block_size.unsigned_abs().max(1));
    if packed.absmax.n_blocks() as u64 != blocks {
        let got = vec![packed.absmax.n_blocks() as i64];
        let expected = vec![blocks.cast_signed()];
        return Err(Error::Shape { name: "absmax", expected, got });
    }
    if x.kind() == Kind::Half {
        let dense = packed.dequantize(Kind::Float)?.f_to_kind(Kind::Half)?; // [outputs, inputs]
        return Ok(x.f_matmul(&dense.f_transpose(0, 1)?)?);
    }
    let dense = packed.dequantize(x.kind())?;
    ops::linear(&x.f_contiguous()?, &WeightRef::Dense(&dense), None, false)
}

// ---- memory between the blocks of a launch ----

/// Hands `work` memory for its partial sums and counters that are zero. Launches on one stream follow one another, so all share it; it
/// grows to what the largest needs.
fn with_scratch(
    index: usize,
    need: Scratch,
    work: impl FnOnce([u64; 2]) -> Result<(), Error>,
) -> Result<(), Error> {
    work(lend(index, need)?)
}
