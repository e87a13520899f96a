//! Safe calls into the decoder's C++ operations (`csrc/ops.cpp`).
//!
//! The callers in this crate guarantee shapes; the C++ side turns libtorch's exceptions into messages.

#![expect(unsafe_code, reason = "the C++ operations are called through a C interface")]

use std::ffi::{CStr, c_char, c_int, c_void};

use serde::Serialize;
use tch::{Kind, Tensor};

use crate::Error;
use crate::batch::Tables;
use crate::checkpoint::config::ModelConfig;
use crate::machine::Waiting;
use crate::nf4::{Nf4Tensor, Scales};

mod there;

use there::takes_flash;
pub(crate) use there::{
    gpu_shaped, join_factors, numbers_on, on_host, read_drawn, sample_there, upload,
};

type Raw = *const c_void;

/// How one row of logits is turned into a token; mirrors the C++ struct.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct SampleSettings {
    pub(crate) temperature: f32,
    pub(crate) top_k: i64,
    pub(crate) top_p: f32,
}

/// The tensors of a packed matrix, null where it has none; mirrors the C++ struct. `absmax` is f32, or u8 where there is a map.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawPacked {
    codes: Raw,
    absmax: Raw,
    codebook: Raw,
    map: Raw,
    nested: Raw,
}

impl RawPacked {
    const NONE: Self = Self {
        codes: std::ptr::null(),
        absmax: std::ptr::null(),
        codebook: std::ptr::null(),
        map: std::ptr::null(),
        nested: std::ptr::null(),
    };

    fn of(weight: &Nf4Tensor) -> Self {
        let (codes, codebook) = (raw(&weight.codes), raw(&weight.codebook));
        match &weight.absmax {
            Scales::Single(absmax) => Self { codes, absmax: raw(absmax), codebook, ..Self::NONE },
            Scales::Double { codes: absmax, map, nested } => {
                Self { codes, absmax: raw(absmax), codebook, map: raw(map), nested: raw(nested) }
            }
        }
    }
}

unsafe extern "C" {
    fn arete_last_error() -> *const c_char;
    fn arete_kernels_name() -> *const c_char;
    fn arete_libtorch_isa() -> *const c_char;
    fn arete_isa_cap() -> i32;
    fn arete_amx_state() -> i32;
    fn arete_libtorch_version() -> *const c_char;
    fn arete_wait_briefly() -> i32;
    fn arete_packed_rows() -> i64;
    fn arete_trained_linear(x: Raw, weight: Raw, out: *mut Raw) -> c_int;
    #[cfg(test)]
    fn arete_decide_isa_cap(leaf7_edx: u32, set_by_user: bool) -> i32;
    fn arete_rms_norm(
        x: Raw,
        delta: Raw,
        weight: Raw,
        eps: f64,
        out: *mut Raw,
        sum: *mut Raw,
    ) -> c_int;
    fn arete_swiglu(gate_up: Raw, out: *mut Raw) -> c_int;
    fn arete_linear(
        x: Raw,
        dense: Raw,
        packed: RawPacked,
        outputs: i64,
        inputs: i64,
        block_size: i64,
        a: Raw,
        b: Raw,
        allow_packed: bool,
        out: *mut Raw,
    ) -> c_int;
    fn arete_attention(
        qkv: Raw,
        positions: Raw,
        cos_sin: Raw,
        segments: Raw,
        spans: Raw,
        trees: Raw,
        heads: i64,
        kv_heads: i64,
        head_size: i64,
        window: i64,
        force_composite: bool,
        query_starts: Raw,
        key_starts: Raw,
        sources: Raw,
        longest_query: i64,
        longest_key: i64,
        out: *mut Raw,
    ) -> c_int;
    fn arete_cached_attention(
        qkv: Raw,
        positions: Raw,
        cos_sin: Raw,
        segments: Raw,
        spans: Raw,
        trees: Raw,
        slots: Raw,
        keys: Raw,
        values: Raw,
        heads: i64,
        kv_heads: i64,
        head_size: i64,
        window: i64,
        segments_there: Raw,
        spans_there: Raw,
        out: *mut Raw,
    ) -> c_int;
    #[cfg(feature = "cuda")]
    fn arete_attend(
        q: Raw,
        keys: Raw,
        values: Raw,
        segments: Raw,
        spans: Raw,
        heads: i64,
        kv_heads: i64,
        head_size: i64,
        window: i64,
        out: *mut Raw,
    ) -> c_int;
    fn arete_token_logprobs(
        hidden: Raw,
        weight: Raw,
        targets: Raw,
        temperature: f64,
        want_entropy: bool,
        logprob: *mut Raw,
        entropy: *mut Raw,
    ) -> c_int;
    fn arete_logits(hidden: Raw, weight: Raw, few_rows: bool, out: *mut Raw) -> c_int;
    fn arete_sample(
        logits: Raw,
        uniform: *const f64,
        settings: *const SampleSettings,
        token: *mut i64,
        logprob: *mut f32,
    ) -> c_int;
    fn arete_composite() -> bool;
    fn arete_upload(values: *const i64, n: i64, device: i32, out: *mut Raw) -> c_int;
    fn arete_read(values: Raw, to: *mut i64) -> c_int;
    fn arete_join_factors(
        a0: Raw,
        a1: Raw,
        a2: Raw,
        b0: Raw,
        b1: Raw,
        b2: Raw,
        sizes: *const i64,
        scale: f64,
        format: i32,
        a: *mut Raw,
        b: *mut Raw,
    ) -> c_int;
    fn arete_sample_there(
        logits: Raw,
        sources: Raw,
        uniforms: Raw,
        temperature: f32,
        top_k: i64,
        top_p: f32,
        out: *mut Raw,
    ) -> c_int;
    fn arete_nf4_quantize(
        input: Raw,
        codebook: Raw,
        block_size: i64,
        codes: Raw,
        absmax: Raw,
    ) -> c_int;
    fn arete_nf4_dequantize(
        packed: RawPacked,
        outputs: i64,
        inputs: i64,
        block_size: i64,
        bf16_out: bool,
        out: *mut Raw,
    ) -> c_int;
}

/// The instruction set the CPU kernels were chosen for (`amx`, `avx512`, `avx2`, `baseline`, `portable`; `amx-emulated` in tests).
pub fn kernels_name() -> String {
    // SAFETY: the function returns a static, NUL-terminated string.
    unsafe { CStr::from_ptr(arete_kernels_name()) }.to_string_lossy().into_owned()
}

/// The instruction set of libtorch's own kernels, as libtorch names it.
pub(crate) fn libtorch_isa() -> String {
    // SAFETY: the function returns a NUL-terminated string that lives as long as the process.
    unsafe { CStr::from_ptr(arete_libtorch_isa()) }.to_string_lossy().into_owned()
}

/// Whether our products in bf16 are one instruction here, so that it is the faster number format.
pub(crate) fn multiplies_bf16() -> bool {
    matches!(kernels_name().as_str(), "amx" | "avx512")
}

/// What became of the CPU's matrix tiles (AMX); mirrors `AmxState` of `csrc/isa.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Amx {
    /// The CPU has none, or not with the vectors that the kernels around it need.
    Missing,
    /// bf16 products run on them.
    Used,
    /// The system does not let this process use them.
    Refused,
    /// They do not compute what Intel's manual defines: vectors are used instead.
    Wrong,
    /// Tests asked for an emulation.
    Emulated,
    /// `ARETE_CPU_KERNELS` asked for something else.
    NotWanted,
}

impl Amx {
    /// What was found when the kernels were chosen.
    pub fn current() -> Self {
        // SAFETY: the function reads a number that is set once.
        match unsafe { arete_amx_state() } {
            0 => Self::Missing,
            1 => Self::Used,
            2 => Self::Refused,
            3 => Self::Wrong,
            4 => Self::Emulated,
            5 => Self::NotWanted,
            _ => unreachable!("the states of csrc/isa.h are these"),
        }
    }
}

/// The version of libtorch that was compiled against.
pub(crate) fn libtorch_version() -> String {
    // SAFETY: the function returns a static, NUL-terminated string.
    unsafe { CStr::from_ptr(arete_libtorch_version()) }.to_string_lossy().into_owned()
}

/// Most rows that are multiplied with packed weights as they are on the CPU, where that is allowed.
pub(crate) fn packed_rows() -> i64 {
    // SAFETY: the function returns a constant.
    unsafe { arete_packed_rows() }
}

/// Keeps libtorch's threads from spinning for long while they wait (`csrc/waiting.h`), now that their number is set.
pub(crate) fn wait_briefly() -> Waiting {
    // SAFETY: the function locks what it changes.
    match unsafe { arete_wait_briefly() } {
        0 => Waiting::Briefly,
        1 => Waiting::FromEnvironment,
        _ => Waiting::NotAtAll,
    }
}

/// How oneDNN's instruction set was decided when the program started (`csrc/isa.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IsaCap {
    NoAmx,
    SetByUser,
    Capped,
}

impl IsaCap {
    fn from_code(code: i32) -> Self {
        match code {
            1 => Self::NoAmx,
            2 => Self::SetByUser,
            3 => Self::Capped,
            _ => unreachable!("the constructor of csrc/isa.h runs before main"),
        }
    }
}

pub(crate) fn isa_cap() -> IsaCap {
    // SAFETY: the function reads a number that was set before main.
    IsaCap::from_code(unsafe { arete_isa_cap() })
}

/// The decision itself: features are EDX of CPUID's leaf 7.
#[cfg(test)]
pub(crate) fn decide_isa_cap(leaf7_edx: u32, set_by_user: bool) -> IsaCap {
    // SAFETY: a pure function of numbers.
    IsaCap::from_code(unsafe { arete_decide_isa_cap(leaf7_edx, set_by_user) })
}

fn raw(tensor: &Tensor) -> Raw {
    tensor.as_ptr().cast()
}

fn raw_or_null(tensor: Option<&Tensor>) -> Raw {
    tensor.map_or(std::ptr::null(), raw)
}

/// Takes over a tensor that the C++ side allocated.
fn take(tensor: Raw) -> Tensor {
    // SAFETY: the C++ functions hand out a `new at::Tensor`, which is what tch frees with `delete`.
    unsafe { Tensor::from_ptr(tensor.cast_mut().cast()) }
}

fn check(status: c_int) -> Result<(), Error> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: the function returns a NUL-terminated string that lives until this thread's next failure.
    let message = unsafe { CStr::from_ptr(arete_last_error()) }.to_string_lossy().into_owned();
    Err(tch::TchError::Torch(message).into())
}

/// RMS norm of `x + delta` (or of `x`), both `[N, D]`: the normalised rows and the sum.
pub(crate) fn rms_norm(
    x: &Tensor,
    delta: Option<&Tensor>,
    weight: &Tensor,
    eps: f64,
) -> Result<(Tensor, Tensor), Error> {
    let (mut out, mut sum) = (std::ptr::null(), std::ptr::null());
    // SAFETY: all pointers are live tensors or null where the C++ side allows it.
    check(unsafe {
        arete_rms_norm(raw(x), raw_or_null(delta), raw(weight), eps, &raw mut out, &raw mut sum)
    })?;
    Ok((take(out), take(sum)))
}

/// silu(gate) · up of `[N, 2F]`, gate first: `[N, F]`.
pub(crate) fn swiglu(gate_up: &Tensor) -> Result<Tensor, Error> {
    let mut out = std::ptr::null();
    // SAFETY: `gate_up` is a live tensor.
    check(unsafe { arete_swiglu(raw(gate_up), &raw mut out) })?;
    Ok(take(out))
}

/// The stored form of a weight matrix, as the linear layer takes it.
pub(crate) enum WeightRef<'a> {
    Dense(&'a Tensor),
    Nf4(&'a Nf4Tensor),
}

impl WeightRef<'_> {
    /// `[out, in]`.
    pub(crate) fn size(&self) -> [i64; 2] {
        match self {
            Self::Dense(weight) => [weight.size()[0], weight.size()[1]],
            Self::Nf4(weight) => [weight.outputs, weight.inputs],
        }
    }

    /// The first `outputs` rows, unpacked; of a packed matrix they must fill whole blocks.
    pub(crate) fn first_rows(&self, outputs: i64, kind: Kind) -> Result<Tensor, Error> {
        match self {
            Self::Dense(weight) => Ok(weight.narrow(0, 0, outputs)),
            Self::Nf4(weight) => nf4_dequantize(&weight.first_rows(outputs), kind),
        }
    }
}

/// `x Wᵀ + (x Aᵀ) Bᵀ` for `x` `[N, in]`, `adapter` = (A `[R, in]`, B `[out, R]`, scale folded in).
///
/// `allow_packed`: multiply a few rows by a packed weight without unpacking it (another rounding; see `ops.cpp`).
pub(crate) fn linear(
    x: &Tensor,
    weight: &WeightRef<'_>,
    adapter: Option<(&Tensor, &Tensor)>,
    allow_packed: bool,
) -> Result<Tensor, Error> {
    let mut out = std::ptr::null();
    let (a, b) = (raw_or_null(adapter.map(|pair| pair.0)), raw_or_null(adapter.map(|pair| pair.1)));
    // SAFETY: all pointers are live tensors or null where the C++ side allows it.
    check(unsafe {
        match weight {
            WeightRef::Dense(w) => arete_linear(
                raw(x),
                raw(w),
                RawPacked::NONE,
                w.size()[0],
                w.size()[1],
                0,
                a,
                b,
                allow_packed,
                &raw mut out,
            ),
            WeightRef::Nf4(w) => arete_linear(
                raw(x),
                std::ptr::null(),
                RawPacked::of(w),
                w.outputs,
                w.inputs,
                w.block_size,
                a,
                b,
                allow_packed,
                &raw mut out,
            ),
        }
    })?;
    Ok(take(out))
}

/// `x Wᵀ` of a trained W: `x` `[N, in]`, `weight` `[out, in]`, differentiable in both. On the CPU rows do not depend on each other.
pub(crate) fn trained_linear(x: &Tensor, weight: &Tensor) -> Result<Tensor, Error> {
    let mut out = std::ptr::null();
    // SAFETY: both are live tensors.
    check(unsafe { arete_trained_linear(raw(x), raw(weight), &raw mut out) })?;
    Ok(take(out))
}

/// Rotary embedding and causal attention of a packed batch over its own keys: `[N, H·E]`.
pub(crate) fn attention(
    qkv: &Tensor,
    positions: &Tensor,
    cos_sin: &Tensor,
    tables: &Tables,
    config: &ModelConfig,
    force_composite: bool,
) -> Result<Tensor, Error> {
    let mut out = std::ptr::null();
    let wanted = !force_composite && takes_flash(qkv, config.head_size);
    let sequences = if wanted { Some(tables.sequences(qkv.device())?) } else { None };
    // SAFETY: all pointers are live tensors, or null where the C++ side allows it; the tables were built for this batch.
    check(unsafe {
        arete_attention(
            raw(qkv),
            raw(positions),
            raw(cos_sin),
            raw(&tables.segments),
            raw(&tables.spans),
            raw(&tables.trees),
            config.num_heads as i64,
            config.num_kv_heads as i64,
            config.head_size as i64,
            config.sliding_window.unwrap_or(0) as i64,
            force_composite,
            raw_or_null(sequences.map(|sequences| &sequences.query_starts)),
            raw_or_null(sequences.map(|sequences| &sequences.key_starts)),
            raw_or_null(sequences.and_then(|sequences| sequences.sources.as_ref())),
            sequences.map_or(0, |sequences| sequences.longest_query),
            sequences.map_or(0, |sequences| sequences.longest_key),
            &raw mut out,
        )
    })?;
    Ok(take(out))
}

/// Writes the batch's keys and values into the cache at `slots`, then attends over it: `[N, H·E]`.
#[expect(clippy::too_many_arguments, reason = "mirrors the C++ call")]
pub(crate) fn cached_attention(
    qkv: &Tensor,
    positions: &Tensor,
    cos_sin: &Tensor,
    tables: &Tables,
    slots: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    config: &ModelConfig,
) -> Result<Tensor, Error> {
    let mut out = std::ptr::null();
    // SAFETY: all pointers are live tensors; slots lie inside the cache (the allocator gave them out).
    check(unsafe {
        arete_cached_attention(
            raw(qkv),
            raw(positions),
            raw(cos_sin),
            raw(&tables.segments),
            raw(&tables.spans),
            raw(&tables.trees),
            raw(slots),
            raw(keys),
            raw(values),
            config.num_heads as i64,
            config.num_kv_heads as i64,
            config.head_size as i64,
            config.sliding_window.unwrap_or(0) as i64,
            raw_or_null(tables.there.as_ref().map(|there| &there[0])),
            raw_or_null(tables.there.as_ref().map(|there| &there[1])),
            &raw mut out,
        )
    })?;
    Ok(take(out))
}

/// Attention of rotated rows over a cache on the CPU, by the tables of [`crate::cuda::AttentionTables`]: `[N, H·E]`.
#[cfg(feature = "cuda")]
pub(crate) fn attend(
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    segments: &Tensor,
    spans: &Tensor,
    shape: crate::cuda::plan::AttentionShape,
) -> Result<Tensor, Error> {
    let mut out = std::ptr::null();
    // SAFETY: all pointers are live tensors; the caller compared their sizes with the tables.
    check(unsafe {
        arete_attend(
            raw(q),
            raw(keys),
            raw(values),
            raw(segments),
            raw(spans),
            i64::from(shape.heads),
            i64::from(shape.kv_heads),
            i64::from(shape.head_size),
            i64::from(shape.window),
            &raw mut out,
        )
    })?;
    Ok(take(out))
}

/// The target's entry of `log softmax(h Wᵀ / temperature)` per row, and the entropy (empty unless asked for), f32.
pub(crate) fn token_logprobs(
    hidden: &Tensor,
    head: &Tensor,
    targets: &Tensor,
    temperature: f64,
    want_entropy: bool,
) -> Result<(Tensor, Tensor), Error> {
    let (mut logprob, mut entropy) = (std::ptr::null(), std::ptr::null());
    // SAFETY: all pointers are live tensors.
    check(unsafe {
        arete_token_logprobs(
            raw(hidden),
            raw(head),
            raw(targets),
            temperature,
            want_entropy,
            &raw mut logprob,
            &raw mut entropy,
        )
    })?;
    Ok((take(logprob), take(entropy)))
}

/// h Wᵀ without gradients: `[n, V]`.
///
/// `few_rows`: by the kernel for a few rows and a bf16 head on the CPU (another order of sums; see `ops.cpp`).
pub(crate) fn logits(hidden: &Tensor, head: &Tensor, few_rows: bool) -> Result<Tensor, Error> {
    let mut out = std::ptr::null();
    // SAFETY: all pointers are live tensors.
    check(unsafe { arete_logits(raw(hidden), raw(head), few_rows, &raw mut out) })?;
    Ok(take(out))
}

/// Draws one token a row of `logits` `[N, V]`; `uniform` and `settings` have one entry a row.
pub(crate) fn sample(
    logits: &Tensor,
    uniform: &[f64],
    settings: &[SampleSettings],
) -> Result<(Vec<i64>, Vec<f32>), Error> {
    let rows = usize::try_from(logits.size()[0]).expect("sizes are not negative");
    assert!(uniform.len() == rows && settings.len() == rows, "one draw and one setting per row");
    let logits = match logits.kind() {
        Kind::Float | Kind::BFloat16 => logits.to_device(tch::Device::Cpu),
        _ => logits.to_kind(Kind::Float).to_device(tch::Device::Cpu),
    }
    .contiguous();
    let (mut token, mut logprob) = (vec![0i64; rows], vec![0f32; rows]);
    // SAFETY: the slices have one element a row, as the kernel expects.
    check(unsafe {
        arete_sample(
            raw(&logits),
            uniform.as_ptr(),
            settings.as_ptr(),
            token.as_mut_ptr(),
            logprob.as_mut_ptr(),
        )
    })?;
    Ok((token, logprob))
}

/// Packs a matrix (f32 or bf16, contiguous, on the CPU) into NF4 codes and absmax.
pub(crate) fn nf4_quantize(
    input: &Tensor,
    codebook: &Tensor,
    block_size: i64,
    codes: &Tensor,
    absmax: &Tensor,
) -> Result<(), Error> {
    // SAFETY: all pointers are live tensors of the sizes the caller computed.
    check(unsafe {
        arete_nf4_quantize(raw(input), raw(codebook), block_size, raw(codes), raw(absmax))
    })
}

/// The packed matrix in f32 or bf16.
pub(crate) fn nf4_dequantize(weight: &Nf4Tensor, kind: Kind) -> Result<Tensor, Error> {
    let mut out = std::ptr::null();
    // SAFETY: all pointers are live tensors.
    check(unsafe {
        arete_nf4_dequantize(
            RawPacked::of(weight),
            weight.outputs,
            weight.inputs,
            weight.block_size,
            kind == Kind::BFloat16,
            &raw mut out,
        )
    })?;
    Ok(take(out))
}

#[cfg(test)]
mod tests;
