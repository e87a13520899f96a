//! The launches of a decoding step's large kernels: attention over the cache, and packed products for up to 64 rows at once.

use super::{Argument, Format, Launch, PackedAddresses, Program};

/// Threads of a block of either kernel, `kSplit` and `kRowsThreads`.
const THREADS: u32 = 128;

/// Memory that a launch needs besides its operands, and which later launches on the same stream may use again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scratch {
    /// f32 numbers.
    pub partials: u64,
    /// u32 counters: zero before the launch and after it.
    pub arrivals: u64,
}

// ---- attention ----

/// Positions of a split, `kSplit` in `attention.cu`.
pub const SPLIT: u32 = 128;
/// The longest head the kernel takes.
pub const MAX_HEAD_SIZE: u32 = 256;
/// Query heads of a block at most.
const MAX_HEADS_AT_ONCE: u32 = 8;
/// 16-byte vectors from key to key in shared memory, `kStride`.
const KEY_VECTORS: u32 = 17;

/// What does not change from step to step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: u32,
    /// Key and value heads, a divisor of `heads`.
    pub kv_heads: u32,
    /// Numbers a head: a multiple of 8 up to [`MAX_HEAD_SIZE`].
    pub head_size: u32,
    /// Keys a row sees, its own among them; 0 = all.
    pub window: u32,
}

impl AttentionShape {
    /// Query heads of a block, a template parameter of the kernel.
    fn heads_at_once(self) -> u32 {
        (self.heads / self.kv_heads).next_power_of_two().min(MAX_HEADS_AT_ONCE)
    }

    /// Blocks of a row's split.
    fn parts(self) -> u32 {
        self.kv_heads * (self.heads / self.kv_heads).div_ceil(self.heads_at_once())
    }

    /// Splits of a row at `position` that hold keys it sees.
    pub fn splits(self, position: u32) -> u32 {
        let begin = if self.window > 0 { (position + 1).saturating_sub(self.window) } else { 0 };
        position / SPLIT - begin / SPLIT + 1
    }

    /// The most splits of any row up to `position`; a window may lie over one more than the last row's.
    pub fn most_splits(self, position: u32) -> u32 {
        let whole = position / SPLIT + 1;
        match self.window {
            0 => whole,
            window => whole.min((window - 1).div_ceil(SPLIT) + 1),
        }
    }
}

/// Addresses of an attention's operands.
#[derive(Clone, Copy, Debug)]
pub struct AttentionAddresses {
    /// `[rows, heads · head_size]`.
    pub out: u64,
    /// The same, rotated.
    pub q: u64,
    /// `[slots, kv_heads · head_size]`.
    pub keys: u64,
    /// The same.
    pub values: u64,
    /// `[n_segments, 5]` i64: first row, rows, first position, first span, spans.
    pub segments: u64,
    /// `[…, 2]` i64: first slot, length.
    pub spans: u64,
    /// [`Scratch::partials`].
    pub partials: u64,
    /// [`Scratch::arrivals`].
    pub arrivals: u64,
}

/// What [`attention`] needs for `rows` rows of at most `splits` splits.
pub fn attention_scratch(shape: AttentionShape, rows: u32, splits: u32) -> Scratch {
    let arrivals = u64::from(rows) * u64::from(shape.parts());
    let record = u64::from(shape.heads_at_once()) * u64::from(shape.head_size + 2);
    Scratch { partials: arrivals * u64::from(splits) * record, arrivals }
}

/// Attention of every row over its own keys, in one launch; `splits` is the most that a row has.
///
/// # Panics
///
/// If there are no rows, or a shape the kernel does not take.
pub fn attention(
    at: &AttentionAddresses,
    format: Format,
    shape: AttentionShape,
    rows: u32,
    n_segments: u32,
    splits: u32,
) -> Launch {
    let AttentionShape { heads, kv_heads, head_size, window } = shape;
    assert!((1..=65_535).contains(&rows), "1 to 65,535 rows, got {rows}");
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "{heads} heads over {kv_heads}");
    assert!(
        (8..=MAX_HEAD_SIZE).contains(&head_size) && head_size.is_multiple_of(8),
        "heads of a multiple of 8 numbers up to {MAX_HEAD_SIZE}, got {head_size}"
    );
    let at_once = shape.heads_at_once();
    let addresses =
        [at.out, at.q, at.keys, at.values, at.segments, at.spans, at.partials, at.arrivals];
    let mut arguments: Vec<Argument> = addresses.map(Argument::Address).into();
    arguments.extend(
        [n_segments, heads, kv_heads, head_size, window, splits]
            .map(|value| Argument::Int(value.cast_signed())),
    );
    arguments.push(Argument::Float((1.0 / f64::from(head_size).sqrt()) as f32));
    let row_and_slots = 4 * 4 + SPLIT * 4;
    let weights = at_once * SPLIT * 4;
    let extremes = 2 * (THREADS / 32) * at_once * 4;
    let queries = at_once * head_size * 4;
    Launch {
        program: Program::Attention(format),
        kernel: format!("attention_{}_{at_once}", format.name()),
        grid: [shape.parts() * splits, rows],
        threads: THREADS,
        shared_bytes: row_and_slots + weights + extremes + queries + SPLIT * KEY_VECTORS * 16,
        arguments,
    }
}

// ---- packed products ----

/// Outputs of a block, `kTileOutputs` in `nf4_rows.cu`.
const TILE_OUTPUTS: u32 = 128;
/// Columns taken at a time, `kGroup`.
const GROUP: u32 = 128;
/// Rows of one pass over the weights at most.
const MOST_ROWS: u32 = 64;
/// Blocks a multiprocessor has at a time where registers allow it.
const BLOCKS_PER_MULTIPROCESSOR: u32 = 4;
/// Groups of columns a block has at least: filling and draining its pipeline costs about one.
const LEAST_GROUPS: u32 = 4;

/// Whether GPUs of compute capability `arch` multiply `format` on tensor cores as `nf4_rows.cu` does.
pub fn tensor_cores(format: Format, arch: u32) -> bool {
    match format {
        Format::F32 => false,
        Format::BF16 => arch >= 80,
        Format::F16 => arch >= 75,
    }
}

/// Rows of one pass over the weights, a template parameter of the kernel.
pub fn nf4_rows_at_once(rows: u32) -> u32 {
    rows.next_power_of_two().clamp(8, MOST_ROWS)
}

/// Blocks that share the work on a matrix: by its shape and the GPU alone.
fn nf4_rows_blocks(outputs: u32, inputs: u32, multiprocessors: u32) -> u32 {
    let units = outputs.div_ceil(TILE_OUTPUTS) * inputs.div_ceil(GROUP);
    (units / LEAST_GROUPS).clamp(1, BLOCKS_PER_MULTIPROCESSOR * multiprocessors)
}

/// What [`nf4_rows`] needs.
pub fn nf4_rows_scratch(rows: u32, outputs: u32, inputs: u32, multiprocessors: u32) -> Scratch {
    let at_once = nf4_rows_at_once(rows);
    let passes = u64::from(rows.div_ceil(at_once));
    let blocks = u64::from(nf4_rows_blocks(outputs, inputs, multiprocessors));
    Scratch {
        partials: passes * blocks * 2 * u64::from(TILE_OUTPUTS * at_once),
        arrivals: passes * u64::from(outputs.div_ceil(TILE_OUTPUTS)),
    }
}

/// `y = x Wᵀ` on tensor cores, 64 rows of x in one pass over the weights, on a GPU with `multiprocessors` of them; `scratch` are the
/// addresses of [`nf4_rows_scratch`]'s partials and arrivals.
///
/// How the work is cut depends on the matrix and the GPU only, so a row of y has the same bits whatever the other rows are.
///
/// # Panics
///
/// If there are no rows, K is no multiple of 32, or the format is f32.
pub fn nf4_rows(
    y: u64,
    x: u64,
    format: Format,
    rows: u32,
    packed: &PackedAddresses,
    scratch: [u64; 2],
    multiprocessors: u32,
) -> Launch {
    assert!(rows > 0 && format != Format::F32, "rows in bf16 or f16, got {rows} in {format:?}");
    assert!(packed.inputs.is_multiple_of(32), "K is a multiple of 32, got {}", packed.inputs);
    let at_once = nf4_rows_at_once(rows);
    let mut arguments = vec![Argument::Address(y), Argument::Address(x)];
    arguments.extend(packed.arguments());
    arguments.extend(scratch.map(Argument::Address));
    arguments.extend(
        [rows, packed.outputs, packed.inputs, packed.block_log2]
            .map(|value| Argument::Int(value.cast_signed())),
    );
    let (table, map, flag, stage) = (16 * 4, 256 * 4, 16, at_once * GROUP * 2);
    Launch {
        program: Program::Nf4Rows(format),
        kernel: format!("nf4_rows_{}_{at_once}", format.name()),
        grid: [
            nf4_rows_blocks(packed.outputs, packed.inputs, multiprocessors),
            rows.div_ceil(at_once),
        ],
        threads: THREADS,
        shared_bytes: table + map + flag + 2 * stage,
        arguments,
    }
}
