//! Which kernel to launch, over how many blocks, with which arguments: pure arithmetic on shapes.
//!
//! Addresses are opaque numbers here. On a GPU they are torch's pointers (`launch.rs`); the tests under
//! `tests/simt` number their buffers and run the same launches on the CPU.

use tch::Kind;

mod decoding;
pub mod rows;

pub use decoding::{
    AttentionAddresses, AttentionShape, MAX_HEAD_SIZE, SPLIT, Scratch, attention,
    attention_scratch, nf4_rows, nf4_rows_at_once, nf4_rows_scratch, tensor_cores,
};

/// Threads of a block, `kThreads` in the kernels.
const THREADS: u32 = 256;
const WARP: u32 = 32;
const WARPS: u32 = THREADS / WARP;
/// Codes one thread reads at a time when multiplying.
pub const CHUNK: u32 = 32;
/// Groups of 8 codes a thread unpacks.
const GROUPS: u64 = 4;
/// The codebook in shared memory.
const TABLE_BYTES: u32 = 64;
/// Shared memory spent on activations; with the sums it stays under the 48 KiB every GPU grants unasked.
const MAX_TILE_BYTES: u32 = 36 * 1024;
/// Warps that share output columns where there are too few of them.
const MAX_SPLITS: u32 = 4;
/// Warps per multiprocessor below which columns are shared.
const WANTED_WARPS: u32 = 16;
/// Rows the fused kernel takes in one call of [`multiply`]; more are better unpacked for a matrix product.
pub const MAX_ROWS: u32 = 16;

/// A file of kernels, compiled as one; the larger ones once per number format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Program {
    /// `dequantize.cu`
    Dequantize,
    /// `quantize.cu`
    Quantize,
    /// `multiply.cu` for one format of activations.
    Multiply(Format),
    /// `nf4_rows.cu` for one format of activations, bf16 or f16.
    Nf4Rows(Format),
    /// `attention.cu` for one format.
    Attention(Format),
    /// `rows.cu` for one format.
    Rows(Format),
    /// `vocabulary.cu` for one format.
    Vocabulary(Format),
}

impl Program {
    /// All of them.
    pub const ALL: [Self; 16] = [
        Self::Dequantize,
        Self::Quantize,
        Self::Multiply(Format::F32),
        Self::Multiply(Format::BF16),
        Self::Multiply(Format::F16),
        Self::Nf4Rows(Format::BF16),
        Self::Nf4Rows(Format::F16),
        Self::Attention(Format::F32),
        Self::Attention(Format::BF16),
        Self::Attention(Format::F16),
        Self::Rows(Format::F32),
        Self::Rows(Format::BF16),
        Self::Rows(Format::F16),
        Self::Vocabulary(Format::F32),
        Self::Vocabulary(Format::BF16),
        Self::Vocabulary(Format::F16),
    ];

    /// The names of its kernels.
    pub fn kernels(self) -> Vec<String> {
        let each = |stem: &str| {
            Format::ALL.iter().map(|format| format!("{stem}_{}", format.name())).collect()
        };
        let sizes = |stem: &str, format: Format, sizes: &[u32]| {
            sizes.iter().map(|size| format!("{stem}_{}_{size}", format.name())).collect()
        };
        let of = |stems: &[&str], format: Format| {
            stems.iter().map(|stem| format!("{stem}_{}", format.name())).collect()
        };
        match self {
            Self::Dequantize => each("dequantize"),
            Self::Quantize => each("quantize"),
            Self::Multiply(Format::F32) => sizes("multiply", Format::F32, &[1, 2, 4, 8]),
            Self::Multiply(format) => sizes("multiply", format, &[1, 2, 4, 8, 16]),
            Self::Nf4Rows(format) => sizes("nf4_rows", format, &[8, 16, 32, 64]),
            Self::Attention(format) => sizes("attention", format, &[1, 2, 4, 8]),
            Self::Rows(format) => of(&rows::KERNELS, format),
            Self::Vocabulary(format) => of(&rows::VOCABULARY_KERNELS, format),
        }
    }

    /// Whether GPUs of compute capability `arch` (86 for 8.6) run it.
    pub fn runs_on(self, arch: u32) -> bool {
        match self {
            Self::Nf4Rows(format) => tensor_cores(format, arch),
            _ => true,
        }
    }
}

/// A number format the kernels read and write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Format {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    BF16,
    /// IEEE half precision.
    F16,
}

impl Format {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::BF16, Self::F16];

    /// The format of a torch dtype, if the kernels have it.
    pub fn of(kind: Kind) -> Option<Self> {
        match kind {
            Kind::Float => Some(Self::F32),
            Kind::BFloat16 => Some(Self::BF16),
            Kind::Half => Some(Self::F16),
            _ => None,
        }
    }

    /// Its name in kernel names.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::BF16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// Bytes of one number.
    pub fn size(self) -> u32 {
        match self {
            Self::F32 => 4,
            Self::BF16 | Self::F16 => 2,
        }
    }
}

/// One kernel argument.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Argument {
    /// A pointer; 0 is null.
    Address(u64),
    /// A C `int`.
    Int(i32),
    /// A C `long long`.
    Long(i64),
    /// A C `float`.
    Float(f32),
}

/// One kernel launch.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// Where the kernel is.
    pub program: Program,
    /// Its name.
    pub kernel: String,
    /// Blocks in x and y.
    pub grid: [u32; 2],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// Arguments in the order of the kernel's parameters.
    pub arguments: Vec<Argument>,
}

/// Addresses of a packed matrix `[outputs, inputs]`.
#[derive(Clone, Copy, Debug)]
pub struct PackedAddresses {
    /// Codes, two a byte.
    pub codes: u64,
    /// 16 f32.
    pub codebook: u64,
    /// f32, one a block, or null if `absmax_codes` is not.
    pub absmax: u64,
    /// 8-bit codes of absmax, or null.
    pub absmax_codes: u64,
    /// The 256 f32 those codes stand for, or null.
    pub absmax_map: u64,
    /// Two f32 per 256 blocks, a factor and an addend, or null.
    pub absmax_nested: u64,
    /// Rows.
    pub outputs: u32,
    /// Columns.
    pub inputs: u32,
    /// Elements per absmax, a power of two from 32 on.
    pub block_log2: u32,
}

impl PackedAddresses {
    fn arguments(&self) -> [Argument; 6] {
        [
            self.codes,
            self.codebook,
            self.absmax,
            self.absmax_codes,
            self.absmax_map,
            self.absmax_nested,
        ]
        .map(Argument::Address)
    }
}

/// Binary logarithm of a block size the kernels take: a power of two from 32 to 65536.
pub fn block_log2(block_size: i64) -> Option<u32> {
    let size = u32::try_from(block_size).ok()?;
    (size.is_power_of_two() && (32..=65536).contains(&size)).then(|| size.ilog2())
}

/// Unpacks a matrix into `out`, `[outputs, inputs]` in `format`.
pub fn dequantize(out: u64, format: Format, packed: &PackedAddresses) -> Launch {
    let n = u64::from(packed.outputs) * u64::from(packed.inputs);
    let mut arguments = vec![Argument::Address(out)];
    arguments.extend(packed.arguments());
    arguments.push(Argument::Long(n.cast_signed()));
    arguments.push(Argument::Int(packed.block_log2.cast_signed()));
    Launch {
        program: Program::Dequantize,
        kernel: format!("dequantize_{}", format.name()),
        grid: [blocks(n, u64::from(THREADS) * GROUPS * 8), 1],
        threads: THREADS,
        shared_bytes: TABLE_BYTES,
        arguments,
    }
}

/// Packs `n` numbers at `x` into `codes` (`ceil(n / 2)` bytes) and `absmax` (one f32 a block).
pub fn quantize(
    codes: u64,
    absmax: u64,
    x: u64,
    format: Format,
    n: u64,
    block_log2: u32,
) -> Launch {
    let lanes = WARP.min((1 << block_log2) / 8); // lanes that share a block
    Launch {
        program: Program::Quantize,
        kernel: format!("quantize_{}", format.name()),
        grid: [blocks(n.div_ceil(1 << block_log2), u64::from(THREADS / lanes)), 1],
        threads: THREADS,
        shared_bytes: 0,
        arguments: vec![
            Argument::Address(codes),
            Argument::Address(absmax),
            Argument::Address(x),
            Argument::Long(n.cast_signed()),
            Argument::Int(block_log2.cast_signed()),
        ],
    }
}

/// `y = x Wᵀ` for `rows` ≤ [`MAX_ROWS`] rows of x, on a GPU with `multiprocessors` of them.
///
/// How K is shared among warps depends on the matrix and the GPU only, so a row of y has the same bits
/// whatever the other rows are.
///
/// # Panics
///
/// If there are no rows or too many, or K is no multiple of 32.
pub fn multiply(
    y: u64,
    x: u64,
    format: Format,
    rows: u32,
    packed: &PackedAddresses,
    multiprocessors: u32,
) -> Launch {
    assert!((1..=MAX_ROWS).contains(&rows), "1 to {MAX_ROWS} rows, got {rows}");
    assert!(
        packed.inputs.is_multiple_of(CHUNK),
        "K is a multiple of {CHUNK}, got {}",
        packed.inputs
    );
    let chunks = packed.inputs / CHUNK;
    let splits = splits(packed.outputs, chunks, multiprocessors);
    let run = WARP * splits; // chunks that the warps of one column group take together
    let mut rows_at_once = rows.next_power_of_two().min(if format == Format::F32 { 8 } else { 16 });
    while tile_bytes(format, rows_at_once, run.min(chunks)) > MAX_TILE_BYTES {
        rows_at_once /= 2;
    }
    let tile = if tile_bytes(format, rows_at_once, chunks) <= MAX_TILE_BYTES {
        chunks
    } else {
        let mut tile = run;
        while tile_bytes(format, rows_at_once, tile + run) <= MAX_TILE_BYTES {
            tile += run;
        }
        tile
    };
    let columns = columns_per_warp(rows_at_once);
    let mut arguments = vec![Argument::Address(y), Argument::Address(x)];
    arguments.extend(packed.arguments());
    arguments.extend(
        [rows, packed.outputs, packed.inputs, packed.block_log2, tile, splits]
            .map(|value| Argument::Int(value.cast_signed())),
    );
    Launch {
        program: Program::Multiply(format),
        kernel: format!("multiply_{}_{rows_at_once}", format.name()),
        grid: [packed.outputs.div_ceil(columns * WARPS / splits), rows.div_ceil(rows_at_once)],
        threads: THREADS,
        shared_bytes: TABLE_BYTES
            + WARPS * rows_at_once * columns * 4
            + tile_bytes(format, rows_at_once, tile),
        arguments,
    }
}

/// Output columns a warp computes, `kOutputs` in the kernel.
fn columns_per_warp(rows_at_once: u32) -> u32 {
    if rows_at_once <= 2 { 4 } else { 2 }
}

/// Warps that share a group of columns.
fn splits(outputs: u32, chunks: u32, multiprocessors: u32) -> u32 {
    let warps = outputs.div_ceil(columns_per_warp(1));
    let mut splits = 1;
    while splits < MAX_SPLITS
        && warps * splits < WANTED_WARPS * multiprocessors
        && chunks > WARP * splits
    {
        splits *= 2;
    }
    splits
}

/// Bytes of activations in shared memory, `Layout` in the kernel.
fn tile_bytes(format: Format, rows: u32, chunks: u32) -> u32 {
    let parts = CHUNK * format.size() / 16; // 16-byte vectors a chunk
    let stride = (chunks + 7 - 8 / parts) / 8 * 8 + 8 / parts;
    rows * parts * stride * 16
}

fn blocks(items: u64, per_block: u64) -> u32 {
    u32::try_from(items.div_ceil(per_block)).expect("a matrix has fewer than 2^31 blocks of work")
}
