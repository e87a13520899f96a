//! The fused operations: which launches each one is on a GPU, and which test on the SIMT machine stands for its kernel.
//!
//! `csrc/fused.h` calls them by number, on the CPU with kernels of its own in their place. A call names addresses and sizes; what
//! it becomes is decided here, for the launcher (`launch.rs`) and for whoever counts launches without a GPU.

use super::plan::rows::{
    self, AddNorm, AddNormBackward, Factors, Heads, Rotate, Sample, TokenLogprob,
};
use super::plan::{
    self, AttentionAddresses, AttentionShape, Format, Launch, PackedAddresses, Scratch,
};
use crate::Error;

/// The GPU that launches are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its generation, 86 for compute capability 8.6.
    pub arch: u32,
    /// Its multiprocessors.
    pub multiprocessors: u32,
}

impl Target {
    /// What is counted where no GPU is at hand: an A100.
    pub const COUNTED: Self = Self { arch: 80, multiprocessors: 108 };
}

/// One call of a fused operation: operands' addresses (0: none) and numbers in the order of `csrc/fused.h`.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// Number format of the activations.
    pub format: Format,
    /// Where the operands are.
    pub addresses: &'a [u64],
    /// Sizes.
    pub numbers: &'a [i64],
    /// Factors.
    pub reals: &'a [f64],
}

/// Gives scratch memory for a launch: addresses of its partials and arrivals.
pub type Lend<'a> = &'a mut dyn FnMut(Scratch) -> Result<[u64; 2], Error>;

type Plan = fn(&Call<'_>, Target, Lend<'_>) -> Result<Vec<Launch>, Error>;

/// A fused operation.
#[derive(Clone, Copy)]
pub struct Operation {
    /// Its name.
    pub name: &'static str,
    /// The kernel file, and the kernels' names up to their number format.
    pub kernels: (&'static str, &'static [&'static str]),
    /// The test that runs them on the SIMT machine: file in `tests/cuda_simt`, function.
    pub simt_test: (&'static str, &'static str),
    plan: Plan,
}

impl std::fmt::Debug for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Operation").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Operation {
    /// The launches of a call.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if a number is not one that kernels take, or what `lend` says.
    pub fn launches(
        &self,
        call: &Call<'_>,
        target: Target,
        lend: Lend<'_>,
    ) -> Result<Vec<Launch>, Error> {
        (self.plan)(call, target, lend)
    }
}

const fn of_rows(
    name: &'static str,
    kernels: &'static [&'static str],
    test: &'static str,
    plan: Plan,
) -> Operation {
    Operation { name, kernels: ("rows.cu", kernels), simt_test: ("rows.rs", test), plan }
}

/// All of them, in the order of `Operation` in `csrc/fused.h`.
pub const OPERATIONS: [Operation; 15] = [
    of_rows("add and norm", &["add_norm"], "add_norm_is_the_formula", add_norm),
    of_rows(
        "add and norm, backward",
        &["add_norm_backward"],
        "add_norm_backward_is_the_derivative",
        add_norm_backward,
    ),
    of_rows("SwiGLU", &["swiglu"], "swiglu_and_its_backward_pass_are_the_formulas", swiglu),
    of_rows(
        "SwiGLU, backward",
        &["swiglu_backward"],
        "swiglu_and_its_backward_pass_are_the_formulas",
        swiglu_backward,
    ),
    of_rows(
        "rotary embedding, cache",
        &["rotate"],
        "rotate_turns_and_puts_into_slots_and_back",
        rotate,
    ),
    of_rows(
        "rotary embedding, backward",
        &["rotate_backward"],
        "rotate_turns_and_puts_into_slots_and_back",
        rotate_backward,
    ),
    of_rows("LoRA, A", &["lora_down"], "lora_products_are_the_plain_sums", lora_down),
    of_rows("LoRA, B", &["lora_up"], "lora_products_are_the_plain_sums", lora_up),
    of_rows("LoRA, factors", &["lora_join"], "lora_factors_are_joined_and_parted", lora_join),
    of_rows(
        "LoRA, gradients of factors",
        &["lora_part"],
        "lora_factors_are_joined_and_parted",
        lora_part,
    ),
    Operation {
        name: "log-probabilities",
        kernels: ("vocabulary.cu", &["token_logprob"]),
        simt_test: ("vocabulary.rs", "token_logprobs_are_those_of_the_softmax"),
        plan: token_logprob,
    },
    Operation {
        name: "sampler",
        kernels: ("vocabulary.cu", &["sample"]),
        simt_test: (
            "vocabulary.rs",
            "samples_are_where_the_cumulative_distribution_passes_the_uniform",
        ),
        plan: sample,
    },
    Operation {
        name: "attention over the cache",
        kernels: ("attention.cu", &["attention"]),
        simt_test: ("attention.rs", "attention_equals_softmax"),
        plan: attend,
    },
    Operation {
        name: "packed product",
        kernels: ("nf4_rows.cu", &["nf4_rows"]),
        simt_test: (
            "nf4_rows.rs",
            "product_equals_the_plain_sum_and_a_row_alone_equals_itself_among_64",
        ),
        plan: nf4_product,
    },
    Operation {
        name: "unpacking",
        kernels: ("dequantize.cu", &["dequantize"]),
        simt_test: ("nf4.rs", "dequantise_equals_bitsandbytes"),
        plan: nf4_dequantize,
    },
];

fn size(value: i64) -> Result<u32, Error> {
    u32::try_from(value).ok().filter(|&size| size <= i32::MAX as u32).ok_or_else(|| {
        Error::Invalid {
            name: "size",
            expected: "a number from 0 to 2^31 - 1, as kernels count".to_owned(),
            got: value.to_string(),
        }
    })
}

fn sizes<const N: usize>(call: &Call<'_>) -> Result<[u32; N], Error> {
    let mut out = [0; N];
    for (out, &number) in out.iter_mut().zip(&call.numbers[..N]) {
        *out = size(number)?;
    }
    Ok(out)
}

fn addresses<const N: usize>(call: &Call<'_>) -> [u64; N] {
    call.addresses.try_into().expect("csrc/fused.h names every operand")
}

/// Nothing to compute launches nothing.
fn one(rows: u32, launch: impl FnOnce() -> Launch) -> Vec<Launch> {
    if rows == 0 { Vec::new() } else { vec![launch()] }
}

type Launches = Result<Vec<Launch>, Error>;

fn add_norm(call: &Call<'_>, _: Target, _: Lend<'_>) -> Launches {
    let [out, sum, inverse, x, delta, weight] = addresses(call);
    let [n, width] = sizes(call)?;
    let at = AddNorm { out, sum, inverse, x, delta, weight };
    Ok(one(n, || rows::add_norm(at, call.format, n, width, call.reals[0] as f32)))
}

fn add_norm_backward(call: &Call<'_>, _: Target, _: Lend<'_>) -> Launches {
    let [grad_x, grad_out, grad_sum, sum, weight, inverse] = addresses(call);
    let [n, width] = sizes(call)?;
    let at = AddNormBackward { grad_x, grad_out, grad_sum, sum, weight, inverse };
    Ok(one(n, || rows::add_norm_backward(at, call.format, n, width)))
}

fn swiglu(call: &Call<'_>, _: Target, _: Lend<'_>) -> Launches {
    let [out, gate_up] = addresses(call);
    let [n, width] = sizes(call)?;
    Ok(one(n, || rows::swiglu(out, gate_up, call.format, n, width)))
}

fn swiglu_backward(call: &Call<'_>, _: Target, _: Lend<'_>) -> Launches {
    let [grad, gate_up, grad_out] = addresses(call);
    let [n, width] = sizes(call)?;
    Ok(one(n, || rows::swiglu_backward(grad, gate_up, grad_out, call.format, n, width)))
}

fn heads(call: &Call<'_>) -> Result<(u32, Heads), Error> {
    let [n, heads, kv_heads, head_size] = sizes(call)?;
    Ok((n, Heads { heads, kv_heads, head_size }))
}

fn rotate(call: &Call<'_>, _: Target, _: Lend<'_>) -> Launches {
    let [q, k, v, qkv, positions, slots, cos_sin] = addresses(call);
    let (n, heads) = heads(call)?;
    let at = Rotate { q, k, v, qkv, positions, slots, cos_sin };
    Ok(one(n, || rows::rotate(at, call.format, n, heads)))
}

fn rotate_backward(call: &Call<'_>, _: Target, _: Lend<'_>) -> Launches {
    let [q, k, v, qkv, positions, cos_sin] = addresses(call);
    let (n, heads) = heads(call)?;
    let at = Rotate { q, k, v, qkv, positions, slots: 0, cos_sin };
    Ok(one(n, || rows::rotate_backward(at, call.format, n, heads)))
}

fn lora_down(call: &Call<'_>, _: Target, _: Lend<'_>) -> Launches {
    let [n, inputs, rank] = sizes(call)?;
    Ok(one(n, || rows::lora_down(addresses(call), call.format, n, inputs, rank)))
}

fn lora_up(call: &Call<'_>, _: Target, _: Lend<'_>) -> Launches {
    let [n, rank, outputs] = sizes(call)?;
    Ok(one(n, || rows::lora_up(addresses(call), call.format, n, rank, outputs)))
}

fn factors(
    call: &Call<'_>,
    [joined_a, joined_b]: [u64; 2],
    masters: [u64; 6],
) -> Result<Factors, Error> {
    let [inputs, r0, r1, r2, o0, o1, o2] = sizes(call)?;
    let [a0, a1, a2, b0, b1, b2] = masters;
    Ok(Factors {
        a: [a0, a1, a2],
        b: [b0, b1, b2],
        joined_a,
        joined_b,
        inputs,
        ranks: [r0, r1, r2],
        outputs: [o0, o1, o2],
    })
}

fn lora_join(call: &Call<'_>, _: Target, _: Lend<'_>) -> Launches {
    let [a, b, masters @ ..]: [u64; 8] = addresses(call);
    let factors = factors(call, [a, b], masters)?;
    Ok(vec![rows::lora_join(&factors, call.format, call.reals[0] as f32)])
}

fn lora_part(call: &Call<'_>, _: Target, _: Lend<'_>) -> Launches {
    let [masters @ .., a, b]: [u64; 8] = addresses(call);
    let factors = factors(call, [a, b], masters)?;
    Ok(vec![rows::lora_part(&factors, call.format, call.reals[0] as f32)])
}

fn token_logprob(call: &Call<'_>, _: Target, _: Lend<'_>) -> Launches {
    let [logprob, entropy, logits, targets] = addresses(call);
    let [n, width, derive] = sizes(call)?;
    let at = TokenLogprob { logprob, entropy, logits, targets };
    let inverse = call.reals[0] as f32;
    Ok(one(n, || rows::token_logprob(at, call.format, n, width, inverse, derive == 1)))
}

fn sample(call: &Call<'_>, _: Target, _: Lend<'_>) -> Launches {
    let [drawn, logits, sources, uniforms] = addresses(call);
    // Cutting nowhere is the same as cutting after the last token.
    let numbers = [call.numbers[0], call.numbers[1], call.numbers[2].min(call.numbers[1])];
    let [n, width, top_k] = sizes(&Call { numbers: &numbers, ..*call })?;
    let at = Sample { drawn, logits, sources, uniforms };
    let (temperature, top_p) = (call.reals[0] as f32, call.reals[1] as f32);
    Ok(one(n, || rows::sample(at, call.format, n, width, temperature, top_k, top_p)))
}

fn attend(call: &Call<'_>, _: Target, lend: Lend<'_>) -> Launches {
    let [out, q, keys, values, segments, spans] = addresses(call);
    let [n, n_segments, heads, kv_heads, head_size, window, last] = sizes(call)?;
    if n == 0 {
        return Ok(Vec::new());
    }
    let shape = AttentionShape { heads, kv_heads, head_size, window };
    let splits = shape.most_splits(last);
    let [partials, arrivals] = lend(plan::attention_scratch(shape, n, splits))?;
    let at = AttentionAddresses { out, q, keys, values, segments, spans, partials, arrivals };
    Ok(vec![plan::attention(&at, call.format, shape, n, n_segments, splits)])
}

/// Where there is a map, absmax is in eight bits.
fn packed(
    [codes, absmax, codebook, map, nested]: [u64; 5],
    [outputs, inputs, block]: [i64; 3],
) -> Result<PackedAddresses, Error> {
    let block_log2 = plan::block_log2(block).ok_or_else(|| Error::Invalid {
        name: "block_size",
        expected: "a power of two from 32 to 65536".to_owned(),
        got: block.to_string(),
    })?;
    let (absmax, absmax_codes) = if map == 0 { (absmax, 0) } else { (0, absmax) };
    Ok(PackedAddresses {
        codes,
        codebook,
        absmax,
        absmax_codes,
        absmax_map: map,
        absmax_nested: nested,
        outputs: size(outputs)?,
        inputs: size(inputs)?,
        block_log2,
    })
}

fn nf4_product(call: &Call<'_>, target: Target, lend: Lend<'_>) -> Launches {
    let [y, x, parts @ ..]: [u64; 7] = addresses(call);
    let n = size(call.numbers[0])?;
    let sizes = [call.numbers[1], call.numbers[2], call.numbers[3]];
    let packed = packed(parts, sizes)?;
    if n == 0 {
        return Ok(Vec::new());
    }
    let format = call.format;
    if plan::tensor_cores(format, target.arch) {
        let (outputs, inputs) = (packed.outputs, packed.inputs);
        let scratch = plan::nf4_rows_scratch(n, outputs, inputs, target.multiprocessors);
        let scratch = lend(scratch)?;
        return Ok(vec![plan::nf4_rows(y, x, format, n, &packed, scratch, target.multiprocessors)]);
    }
    // Without tensor cores sixteen rows at a time, in f32 from weights that are not rounded.
    let bytes = u64::from(format.size());
    let launches = (0..n).step_by(plan::MAX_ROWS as usize).map(|first| {
        let rows = (n - first).min(plan::MAX_ROWS);
        let y = y + u64::from(first) * u64::from(packed.outputs) * bytes;
        let x = x + u64::from(first) * u64::from(packed.inputs) * bytes;
        plan::multiply(y, x, format, rows, &packed, target.multiprocessors)
    });
    Ok(launches.collect())
}

fn nf4_dequantize(call: &Call<'_>, _: Target, _: Lend<'_>) -> Launches {
    let [out, parts @ ..]: [u64; 6] = addresses(call);
    let sizes = [call.numbers[0], call.numbers[1], call.numbers[2]];
    let packed = packed(parts, sizes)?;
    Ok(vec![plan::dequantize(out, call.format, &packed)])
}
