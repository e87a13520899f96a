//! Launches of `rows.cu` and `vocabulary.cu`: what lies between the products of a block, and what follows the last one.

use super::{Argument, Format, Launch, Program, THREADS, WARPS};

/// The kernels of `rows.cu`, without their formats.
pub(super) const KERNELS: [&str; 10] = [
    "add_norm",
    "add_norm_backward",
    "swiglu",
    "swiglu_backward",
    "rotate",
    "rotate_backward",
    "lora_down",
    "lora_up",
    "lora_join",
    "lora_part",
];
/// Those of `vocabulary.cu`.
pub(super) const VOCABULARY_KERNELS: [&str; 2] = ["token_logprob", "sample"];

/// Threads of a block of `vocabulary.cu`.
const VOCABULARY_THREADS: u32 = 512;
/// Its sums in shared memory, `Shared` in the kernels, and the tokens of a tile.
const VOCABULARY_BYTES: u32 = 2584;
const TILE: u32 = 256;
/// Rows that share one reading of LoRA's factors, `kLoraRows` in the kernels.
const LORA_ROWS: u32 = 4;
/// Most rows of LoRA's products by our kernels; more are a matrix product's work.
pub const MAX_LORA_ROWS: u32 = 64;
/// Layers whose factors are joined.
pub const PARTS: usize = 3;

fn address(address: u64) -> Argument {
    Argument::Address(address)
}

fn int(value: u32) -> Argument {
    Argument::Int(value.cast_signed())
}

fn rows(kernel: &str, format: Format, grid: [u32; 2], sums: u32) -> Launch {
    Launch {
        program: Program::Rows(format),
        kernel: format!("{kernel}_{}", format.name()),
        grid,
        threads: THREADS,
        shared_bytes: WARPS * sums * 4,
        arguments: Vec::new(),
    }
}

impl Launch {
    fn with(mut self, arguments: impl IntoIterator<Item = Argument>) -> Self {
        self.arguments.extend(arguments);
        self
    }
}

/// The tensors of an RMS norm of `x + delta`, `[n_rows, width]` each but for `weight` `[width]` and `inverse` `[n_rows]` f32.
#[derive(Clone, Copy, Debug)]
pub struct AddNorm {
    /// Result.
    pub out: u64,
    /// `x + delta`; null without `delta`.
    pub sum: u64,
    /// 1 / RMS of each row, for the backward pass; may be null.
    pub inverse: u64,
    /// First summand.
    pub x: u64,
    /// Second summand; may be null.
    pub delta: u64,
    /// What the normalised values are multiplied with.
    pub weight: u64,
}

/// RMS norm of `x + delta` and the sum itself.
pub fn add_norm(at: AddNorm, format: Format, n_rows: u32, width: u32, eps: f32) -> Launch {
    rows("add_norm", format, [n_rows, 1], 1)
        .with([at.out, at.sum, at.inverse, at.x, at.delta, at.weight].map(address))
        .with([int(width), Argument::Float(eps)])
}

/// The tensors of [`add_norm`]'s backward pass.
#[derive(Clone, Copy, Debug)]
pub struct AddNormBackward {
    /// Gradient to both summands.
    pub grad_x: u64,
    /// Gradient to the result.
    pub grad_out: u64,
    /// Gradient to the sum; may be null.
    pub grad_sum: u64,
    /// What the forward pass summed.
    pub sum: u64,
    /// As there.
    pub weight: u64,
    /// As there.
    pub inverse: u64,
}

/// Backward pass of [`add_norm`].
pub fn add_norm_backward(at: AddNormBackward, format: Format, n_rows: u32, width: u32) -> Launch {
    rows("add_norm_backward", format, [n_rows, 1], 1)
        .with([at.grad_x, at.grad_out, at.grad_sum, at.sum, at.weight, at.inverse].map(address))
        .with([int(width)])
}

fn element_grid(format: Format, n_rows: u32, width: u32) -> [u32; 2] {
    let vector = 16 / format.size();
    let at_once = if width.is_multiple_of(vector) { vector } else { 1 };
    [n_rows, width.div_ceil(THREADS * at_once)]
}

/// silu(gate) · up of `gate_up` `[n_rows, 2 width]`, gate first.
pub fn swiglu(out: u64, gate_up: u64, format: Format, n_rows: u32, width: u32) -> Launch {
    rows("swiglu", format, element_grid(format, n_rows, width), 0).with([
        address(out),
        address(gate_up),
        int(width),
    ])
}

/// Backward pass of [`swiglu`].
pub fn swiglu_backward(
    grad_gate_up: u64,
    gate_up: u64,
    grad_out: u64,
    format: Format,
    n_rows: u32,
    width: u32,
) -> Launch {
    rows("swiglu_backward", format, element_grid(format, n_rows, width), 0)
        .with([grad_gate_up, gate_up, grad_out].map(address))
        .with([int(width)])
}

/// Query heads, key/value heads, and the size of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub heads: u32,
    /// Heads of keys and of values.
    pub kv_heads: u32,
    /// Numbers a head.
    pub head_size: u32,
}

impl Heads {
    fn arguments(self) -> [Argument; 3] {
        [self.heads, self.kv_heads, self.head_size].map(int)
    }
}

/// The tensors of the rotary embedding.
#[derive(Clone, Copy, Debug)]
pub struct Rotate {
    /// Queries: `[n_rows, heads, head_size]`.
    pub q: u64,
    /// Keys: `[slots, kv_heads, head_size]`.
    pub k: u64,
    /// Values: as the keys.
    pub v: u64,
    /// All of them: `[n_rows, (heads + 2 kv_heads) head_size]`.
    pub qkv: u64,
    /// `[n_rows]` i64.
    pub positions: u64,
    /// `[n_rows]` i64: where a row's keys and values go; null for the row itself.
    pub slots: u64,
    /// `[positions, head_size]` f32: cosines, then sines.
    pub cos_sin: u64,
}

/// Rotates queries and keys, and puts keys and values into their slots.
pub fn rotate(at: Rotate, format: Format, n_rows: u32, heads: Heads) -> Launch {
    rows("rotate", format, [n_rows, 1], 0)
        .with([at.q, at.k, at.v, at.qkv, at.positions, at.slots, at.cos_sin].map(address))
        .with(heads.arguments())
}

/// The gradient to `qkv` from those to `q`, `k` and `v`, row by row (`slots` is not used).
pub fn rotate_backward(grads: Rotate, format: Format, n_rows: u32, heads: Heads) -> Launch {
    let Rotate { q, k, v, qkv, positions, cos_sin, .. } = grads;
    rows("rotate_backward", format, [n_rows, 1], 0)
        .with([qkv, q, k, v, positions, cos_sin].map(address))
        .with(heads.arguments())
}

/// `down = x Aᵀ`: x `[n_rows, inputs]`, A `[rank, inputs]`.
///
/// # Panics
///
/// If there are more than [`MAX_LORA_ROWS`] rows: a matrix product is the better way.
pub fn lora_down(
    [down, x, a]: [u64; 3],
    format: Format,
    n_rows: u32,
    inputs: u32,
    rank: u32,
) -> Launch {
    assert!(n_rows <= MAX_LORA_ROWS, "at most {MAX_LORA_ROWS} rows, got {n_rows}");
    rows("lora_down", format, [rank, n_rows.div_ceil(LORA_ROWS)], LORA_ROWS)
        .with([down, x, a].map(address))
        .with([n_rows, inputs, rank].map(int))
}

/// `y += down Bᵀ`: down `[n_rows, rank]`, B `[outputs, rank]`.
///
/// # Panics
///
/// As [`lora_down`].
pub fn lora_up(
    [y, down, b]: [u64; 3],
    format: Format,
    n_rows: u32,
    rank: u32,
    outputs: u32,
) -> Launch {
    assert!(n_rows <= MAX_LORA_ROWS, "at most {MAX_LORA_ROWS} rows, got {n_rows}");
    rows("lora_up", format, [outputs.div_ceil(THREADS), n_rows.div_ceil(LORA_ROWS)], 0)
        .with([y, down, b].map(address))
        .with([n_rows, rank, outputs].map(int))
}

/// LoRA's factors of up to three layers that share their input.
#[derive(Clone, Copy, Debug)]
pub struct Factors {
    /// `[rank, inputs]` f32 each, or its gradient; null where a layer has none.
    pub a: [u64; PARTS],
    /// `[outputs, rank]` f32 each, or its gradient.
    pub b: [u64; PARTS],
    /// Joined: `[Σ rank, inputs]`, or its gradient.
    pub joined_a: u64,
    /// Joined along a diagonal, times the scale: `[Σ outputs, Σ rank]`, or its gradient.
    pub joined_b: u64,
    /// What the layers read.
    pub inputs: u32,
    /// Each layer's rank, 0 without an adapter.
    pub ranks: [u32; PARTS],
    /// Each layer's outputs, 0 where there is no layer.
    pub outputs: [u32; PARTS],
}

impl Factors {
    fn launch(&self, kernel: &str, format: Format, pointers: [u64; 8], scale: f32) -> Launch {
        let sum = |of: [u32; PARTS]| of.iter().map(|&n| u64::from(n)).sum::<u64>();
        let numbers = sum(self.ranks) * (u64::from(self.inputs) + sum(self.outputs));
        rows(kernel, format, [super::blocks(numbers, u64::from(THREADS)), 1], 0)
            .with(pointers.map(address))
            .with([int(self.inputs)])
            .with(self.ranks.map(int))
            .with(self.outputs.map(int))
            .with([Argument::Float(scale)])
    }
}

/// Joins the factors in the format of the products.
pub fn lora_join(factors: &Factors, format: Format, scale: f32) -> Launch {
    let Factors { joined_a, joined_b, a: [a0, a1, a2], b: [b0, b1, b2], .. } = *factors;
    let pointers = [joined_a, joined_b, a0, a1, a2, b0, b1, b2];
    factors.launch("lora_join", format, pointers, scale)
}

/// Parts the gradients of joined factors.
pub fn lora_part(factors: &Factors, format: Format, scale: f32) -> Launch {
    let Factors { joined_a, joined_b, a: [a0, a1, a2], b: [b0, b1, b2], .. } = *factors;
    let pointers = [a0, a1, a2, b0, b1, b2, joined_a, joined_b];
    factors.launch("lora_part", format, pointers, scale)
}

fn vocabulary(kernel: &str, format: Format, n_rows: u32, tiles: u32) -> Launch {
    Launch {
        program: Program::Vocabulary(format),
        kernel: format!("{kernel}_{}", format.name()),
        grid: [n_rows, 1],
        threads: VOCABULARY_THREADS,
        shared_bytes: VOCABULARY_BYTES + tiles * 8,
        arguments: Vec::new(),
    }
}

/// The tensors of the log-probabilities of given tokens.
#[derive(Clone, Copy, Debug)]
pub struct TokenLogprob {
    /// `[n_rows]` f32.
    pub logprob: u64,
    /// `[n_rows]` f32, or null.
    pub entropy: u64,
    /// `[n_rows, width]`; with `derive` they become the derivative.
    pub logits: u64,
    /// `[n_rows]` i64.
    pub targets: u64,
}

/// Log-probabilities of the targets at a temperature, entropies, and with `derive` the derivative by the logits in their place.
pub fn token_logprob(
    at: TokenLogprob,
    format: Format,
    n_rows: u32,
    width: u32,
    inverse_temperature: f32,
    derive: bool,
) -> Launch {
    vocabulary("token_logprob", format, n_rows, 0)
        .with([at.logprob, at.entropy, at.logits, at.targets].map(address))
        .with([int(width), Argument::Float(inverse_temperature), int(derive.into())])
}

/// The tensors of the sampler.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// `[n_rows]` i64: token in the low half, bits of the log-probability in the high one.
    pub drawn: u64,
    /// `[…, width]`.
    pub logits: u64,
    /// `[n_rows]` i64: the row of logits that each draw reads; null for its own.
    pub sources: u64,
    /// `[n_rows]` f64 in [0, 1).
    pub uniforms: u64,
}

/// Draws a token a row; `top_k` 0 and `top_p` 1 are the whole vocabulary, `temperature` 0 the most probable token.
pub fn sample(
    at: Sample,
    format: Format,
    n_rows: u32,
    width: u32,
    temperature: f32,
    top_k: u32,
    top_p: f32,
) -> Launch {
    vocabulary("sample", format, n_rows, width.div_ceil(TILE))
        .with([at.drawn, at.logits, at.sources, at.uniforms].map(address))
        .with([int(width), Argument::Float(temperature), int(top_k), Argument::Float(top_p)])
}
