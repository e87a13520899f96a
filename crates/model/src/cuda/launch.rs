//! The kernels as functions of tensors: checks, output allocation, launch.

#![expect(unsafe_code, reason = "kernels read and write tensors through raw addresses")]

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::sync::{Mutex, OnceLock, PoisonError};

use tch::{Device, Kind, Tensor};

use super::decoding::MOST_PACKED_ROWS;
use super::ffi::{Function, Gpu, Module};
use super::plan::{self, Format, Launch, PackedAddresses, Program, Scratch};
use super::table::{Call, OPERATIONS, Target};
use super::{CudaError, nvrtc};
use crate::Error;
use crate::nf4::{Nf4Tensor, Scales};

/// The scales of a packed matrix's blocks.
#[derive(Clone, Copy, Debug)]
pub enum Absmax<'a> {
    /// One f32 a block.
    Single(&'a Tensor),
    /// Eight bits a block: `map[code] * nested[block / 256][0] + nested[block / 256][1]`.
    Double {
        /// `[blocks]` u8.
        codes: &'a Tensor,
        /// `[256]` f32, bitsandbytes' signed dynamic map.
        map: &'a Tensor,
        /// `[ceil(blocks / 256), 2]` f32: factor and addend.
        nested: &'a Tensor,
    },
}

/// A packed matrix `[outputs, inputs]` on a GPU.
///
/// # Shapes
///
/// - `codes`: `[ceil(outputs · inputs / 2)]` u8, first element of a pair in the high nibble.
/// - `codebook`: `[16]` f32.
#[derive(Clone, Copy, Debug)]
pub struct Packed<'a> {
    /// Packed codes.
    pub codes: &'a Tensor,
    /// What they stand for.
    pub codebook: &'a Tensor,
    /// The blocks' scales.
    pub absmax: Absmax<'a>,
    /// Rows.
    pub outputs: i64,
    /// Columns.
    pub inputs: i64,
    /// Elements a block: a power of two from 32 on.
    pub block_size: i64,
}

impl<'a> From<&'a Nf4Tensor> for Packed<'a> {
    fn from(weight: &'a Nf4Tensor) -> Self {
        Self {
            codes: &weight.codes,
            codebook: &weight.codebook,
            absmax: match &weight.absmax {
                Scales::Single(absmax) => Absmax::Single(absmax),
                Scales::Double { codes, map, nested } => Absmax::Double { codes, map, nested },
            },
            outputs: weight.outputs,
            inputs: weight.inputs,
            block_size: weight.block_size,
        }
    }
}

/// The matrix `[outputs, inputs]` in `kind` (f32, bf16 or f16).
///
/// # Shapes
///
/// As in [`Packed`].
///
/// # Errors
///
/// [`Error::Shape`] or [`Error::Invalid`] if the parts do not fit together or lie on no GPU, [`Error::Cuda`] if
/// the GPU cannot be used.
///
/// # Source
///
/// codebook\[code\] · absmax in f32, rounded once: bitsandbytes' `dequantize_4bit`.
pub fn dequantize(weight: &Packed<'_>, kind: Kind) -> Result<Tensor, Error> {
    let out = Tensor::f_empty([weight.outputs, weight.inputs], (kind, weight.codes.device()))?;
    dequantize_into(weight, &out)?;
    Ok(out)
}

/// [`dequantize`] into a contiguous tensor of `outputs · inputs` elements that already exists.
///
/// # Errors
///
/// As [`dequantize`].
pub fn dequantize_into(weight: &Packed<'_>, out: &Tensor) -> Result<(), Error> {
    let n = weight.outputs * weight.inputs;
    let format = format_of("out", out)?;
    if out.numel() as i64 != n || !out.is_contiguous() {
        return Err(Error::Shape { name: "out", expected: vec![n], got: out.size() });
    }
    let device = Checked::new(weight)?;
    device.holds("out", out)?;
    aligned("out", out)?;
    // SAFETY: `Checked` and the lines above compared every tensor's extent with what the kernel reads and
    // writes; torch frees their memory in the order of the stream.
    unsafe { device.launch(&plan::dequantize(address(out), format, &device.packed)) }
}

/// Packs `weight` (f32, bf16 or f16, any shape): codes `[ceil(n / 2)]` u8 and absmax `[ceil(n / block_size)]` f32.
///
/// Double quantisation of absmax is left to the CPU ([`crate::nf4::NestedAbsmax`]): a 64th of the numbers, and its mean
/// would depend on the order of summation.
///
/// # Errors
///
/// [`Error::Invalid`] for another dtype, device or block size, [`Error::Cuda`] if the GPU cannot be used.
///
/// # Source
///
/// bitsandbytes 0.50 `quantize_4bit` on the CPU, bit for bit.
pub fn quantize(weight: &Tensor, block_size: i64) -> Result<(Tensor, Tensor), Error> {
    let format = format_of("weight", weight)?;
    let block_log2 = block_log2(block_size)?;
    let index = gpu_index("weight", weight)?;
    let weight = dense_aligned(weight)?;
    let n = weight.numel() as i64;
    let device = weight.device();
    let codes = Tensor::f_empty([n.div_euclid(2) + n % 2], (Kind::Uint8, device))?;
    let absmax = Tensor::f_empty(
        [n.div_euclid(block_size) + i64::from(n % block_size != 0)],
        (Kind::Float, device),
    )?;
    if n > 0 {
        let launch = plan::quantize(
            address(&codes),
            address(&absmax),
            address(&weight),
            format,
            n.cast_unsigned(),
            block_log2,
        );
        // SAFETY: the outputs were just allocated in the sizes the kernel fills, `weight` is dense.
        unsafe { run(index, &launch) }?;
    }
    Ok((codes, absmax))
}

/// `x Wᵀ` by the fused kernel, at most [`plan::MAX_ROWS`] rows.
///
/// # Shapes
///
/// - `x`: `[N, inputs]` f32, bf16 or f16, N ≤ 16, inputs a multiple of 64.
/// - result: `[N, outputs]` in the dtype of `x`.
///
/// # Errors
///
/// [`Error::Shape`] or [`Error::Invalid`] if the parts do not fit together, [`Error::Cuda`] if the GPU cannot be
/// used.
pub fn multiply(x: &Tensor, weight: &Packed<'_>) -> Result<Tensor, Error> {
    let rows = x.size().first().copied().unwrap_or(0);
    let y = Tensor::f_empty([rows, weight.outputs], (x.kind(), x.device()))?; // [N, outputs]
    multiply_into(x, weight, &y)?;
    Ok(y)
}

pub(super) fn multiply_into(x: &Tensor, weight: &Packed<'_>, y: &Tensor) -> Result<(), Error> {
    let format = format_of("x", x)?;
    let [rows, inputs] = x.size()[..] else {
        return Err(Error::Shape { name: "x", expected: vec![-1, weight.inputs], got: x.size() });
    };
    let max_rows = i64::from(plan::MAX_ROWS);
    if inputs != weight.inputs || rows > max_rows {
        let expected = vec![rows.min(max_rows), weight.inputs];
        return Err(Error::Shape { name: "x", expected, got: x.size() });
    }
    if inputs % i64::from(plan::CHUNK) != 0 {
        return Err(Error::Invalid {
            name: "inputs",
            expected: format!("a multiple of {}", plan::CHUNK),
            got: inputs.to_string(),
        });
    }
    let device = Checked::new(weight)?;
    device.holds("x", x)?;
    device.holds("y", y)?;
    if y.size() != [rows, weight.outputs] || y.kind() != x.kind() || !y.is_contiguous() {
        let expected = vec![rows, weight.outputs];
        return Err(Error::Shape { name: "y", expected, got: y.size() });
    }
    if rows == 0 {
        return Ok(());
    }
    let x = dense_aligned(x)?;
    let launch = plan::multiply(
        address(y),
        address(&x),
        format,
        u32::try_from(rows).expect("1 to 16"),
        &device.packed,
        gpu(device.index)?.multiprocessors,
    );
    // SAFETY: `Checked` and the lines above compared every tensor's extent with what the kernel reads and
    // writes; torch frees their memory in the order of the stream.
    unsafe { device.launch(&launch) }
}

// ---- the decoder's fused operations ----

/// A call from `csrc/fused.h`; mirrors its `Call`.
#[repr(C)]
struct RawCall {
    operation: i32,
    format: i32,
    device: i32,
    n_addresses: i32,
    n_numbers: i32,
    n_reals: i32,
    addresses: *const u64,
    numbers: *const i64,
    reals: *const f64,
    stream: *mut c_void,
    message: *mut u8,
    message_bytes: i64,
}

unsafe extern "C" {
    fn arete_set_launcher(launcher: extern "C" fn(*const RawCall) -> i64, packed_rows: i64);
}

/// Lets the decoder's operations be counted, as on a GPU with tensor cores. Idempotent.
#[cfg(test)]
pub(crate) fn register() {
    set_launcher(MOST_PACKED_ROWS);
}

fn set_launcher(packed_rows: i64) {
    // SAFETY: the function keeps the pointer of a function that lives as long as the process.
    unsafe { arete_set_launcher(launch_hook, packed_rows) };
}

/// Lets the decoder compute on GPU `index` with activations in `kind`: its kernels are compiled and loaded now, so that a run fails
/// at its start. Idempotent.
///
/// # Errors
///
/// [`Error::Cuda`] if the driver or NVRTC is missing, [`Error::Invalid`] for another dtype than f32, bf16 and f16.
pub fn install(index: usize, kind: Kind) -> Result<(), Error> {
    let format = Format::of(kind).ok_or_else(|| unknown_format("dtype", kind))?;
    let gpu = gpu(index)?;
    let tensor_cores = plan::tensor_cores(format, gpu.arch.0);
    let product = if tensor_cores { Program::Nf4Rows(format) } else { Program::Multiply(format) };
    for program in [
        Program::Dequantize,
        product,
        Program::Attention(format),
        Program::Rows(format),
        Program::Vocabulary(format),
    ] {
        module(index, gpu, program)?;
    }
    set_launcher(if tensor_cores { MOST_PACKED_ROWS } else { i64::from(plan::MAX_ROWS) });
    Ok(())
}

/// Whether libtorch's flash attention takes numbers of this kind on GPU `index`: in 16 bits, from Ampere on.
pub(crate) fn has_flash(index: usize, kind: Kind) -> bool {
    matches!(kind, Kind::BFloat16 | Kind::Half) && gpu(index).is_ok_and(|gpu| gpu.arch.0 >= 80)
}

/// The generation of GPU `index`, 86 for compute capability 8.6.
///
/// # Errors
///
/// [`Error::Cuda`] if it cannot be opened.
pub fn generation(index: usize) -> Result<u32, Error> {
    Ok(gpu(index)?.arch.0)
}

/// Bytes of GPU `index` that nobody holds, and all it has.
pub(super) fn memory(index: usize) -> Result<(u64, u64), Error> {
    Ok(gpu(index)?.memory()?)
}

/// Launches a call, or counts: the number of launches, or -1 and a message. Called from C++, so it must not unwind.
extern "C" fn launch_hook(call: *const RawCall) -> i64 {
    // SAFETY: C++ passes a live struct whose arrays have the lengths it says.
    let (raw, call) = unsafe {
        let raw = &*call;
        let slice = Call {
            format: Format::ALL[usize::try_from(raw.format).unwrap_or(0)],
            addresses: array(raw.addresses, raw.n_addresses),
            numbers: array(raw.numbers, raw.n_numbers),
            reals: array(raw.reals, raw.n_reals),
        };
        (raw, slice)
    };
    let work = || -> Result<i64, Error> {
        let operation = &OPERATIONS[usize::try_from(raw.operation).expect("an operation")];
        let Ok(index) = usize::try_from(raw.device) else {
            let launches = operation.launches(&call, Target::COUNTED, &mut |_| Ok([0; 2]))?;
            return Ok(launches.len() as i64);
        };
        let gpu = gpu(index)?;
        let target = Target { arch: gpu.arch.0, multiprocessors: gpu.multiprocessors };
        let launches = operation.launches(&call, target, &mut |scratch| lend(index, scratch))?;
        for launch in &launches {
            // SAFETY: `csrc/fused.h` names operands of the extents that the sizes say, contiguous and on this GPU; torch frees
            // their memory in the order of the stream, which is its current one.
            unsafe { run_on(index, launch, raw.stream) }?;
        }
        Ok(launches.len() as i64)
    };
    let message = match std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)) {
        Ok(Ok(launches)) => return launches,
        Ok(Err(error)) => error.to_string(),
        Err(_) => "a launch was planned wrongly".to_owned(), // the panic's message is already on stderr
    };
    let room = usize::try_from(raw.message_bytes).unwrap_or(0);
    let n = message.floor_char_boundary(room.saturating_sub(1));
    // SAFETY: the buffer has `message_bytes` bytes, of which one is left for the final NUL that is there.
    unsafe { std::ptr::copy_nonoverlapping(message.as_ptr(), raw.message, n) };
    -1
}

/// # Safety
///
/// `first` points to `n` values that outlive the call.
unsafe fn array<'a, T>(first: *const T, n: i32) -> &'a [T] {
    match usize::try_from(n) {
        // SAFETY: the caller's promise.
        Ok(n @ 1..) => unsafe { std::slice::from_raw_parts(first, n) },
        _ => &[],
    }
}

/// Scratch memory that a thread's launches share: the stream runs one after another. It grows and is never freed: at the end of
/// the process the driver may be gone before a thread's variables are.
pub(super) fn lend(index: usize, wanted: Scratch) -> Result<[u64; 2], Error> {
    type Memory = HashMap<usize, ManuallyDrop<[Tensor; 2]>>;
    thread_local! {
        static SCRATCH: RefCell<Memory> = RefCell::default();
    }
    SCRATCH.with_borrow_mut(|scratch| {
        let sizes = [wanted.partials, wanted.arrivals].map(|n| n.cast_signed().max(1));
        let short = |held: &[Tensor; 2]| (0..2).any(|i| (held[i].numel() as i64) < sizes[i]);
        if scratch.get(&index).is_none_or(|held| short(held)) {
            let held = scratch.remove(&index);
            let old = held.as_ref().map_or([0; 2], |held| [0, 1].map(|i| held[i].numel() as i64));
            drop(held.map(ManuallyDrop::into_inner)); // given back before its successor is asked for
            let [partials, arrivals] = [0, 1].map(|i| sizes[i].max(old[i]));
            let device = Device::Cuda(index);
            let partials = Tensor::f_empty([partials], (Kind::Float, device))?;
            let arrivals = Tensor::f_zeros([arrivals], (Kind::Int, device))?;
            scratch.insert(index, ManuallyDrop::new([partials, arrivals]));
        }
        let held = &scratch[&index];
        Ok([address(&held[0]), address(&held[1])])
    })
}

// ---- checks ----

/// A packed matrix whose parts fit together and lie on one GPU.
pub(super) struct Checked {
    index: usize,
    device: Device,
    pub(super) packed: PackedAddresses,
}

impl Checked {
    pub(super) fn new(weight: &Packed<'_>) -> Result<Self, Error> {
        let index = gpu_index("codes", weight.codes)?;
        let device = weight.codes.device();
        let block_log2 = block_log2(weight.block_size)?;
        let size = |name, value: i64| {
            u32::try_from(value)
                .ok()
                .filter(|&size| size > 0 && size <= i32::MAX as u32)
                .ok_or_else(|| Error::Invalid {
                    name,
                    expected: "a positive 32-bit number".to_owned(),
                    got: value.to_string(),
                })
        };
        let (outputs, inputs) = (size("outputs", weight.outputs)?, size("inputs", weight.inputs)?);
        let n = weight.outputs * weight.inputs;
        let blocks = n.cast_unsigned().div_ceil(weight.block_size.cast_unsigned()).cast_signed();
        let checked = Self {
            index,
            device,
            packed: PackedAddresses {
                codes: 0,
                codebook: 0,
                absmax: 0,
                absmax_codes: 0,
                absmax_map: 0,
                absmax_nested: 0,
                outputs,
                inputs,
                block_log2,
            },
        };
        let part = |name, tensor: &Tensor, kind, numel: i64| {
            checked.holds(name, tensor)?;
            if tensor.kind() != kind {
                return Err(Error::Invalid {
                    name,
                    expected: format!("{kind:?}"),
                    got: format!("{:?}", tensor.kind()),
                });
            }
            if tensor.numel() as i64 != numel || !tensor.is_contiguous() {
                return Err(Error::Shape { name, expected: vec![numel], got: tensor.size() });
            }
            Ok(address(tensor))
        };
        aligned("codes", weight.codes)?;
        let mut packed = PackedAddresses {
            codes: part("codes", weight.codes, Kind::Uint8, n / 2 + n % 2)?,
            codebook: part("codebook", weight.codebook, Kind::Float, 16)?,
            ..checked.packed
        };
        match weight.absmax {
            Absmax::Single(absmax) => {
                packed.absmax = part("absmax", absmax, Kind::Float, blocks)?;
            }
            Absmax::Double { codes, map, nested } => {
                let groups = (blocks + 255) / 256;
                packed.absmax_codes = part("absmax codes", codes, Kind::Uint8, blocks)?;
                packed.absmax_map = part("absmax map", map, Kind::Float, 256)?;
                packed.absmax_nested = part("nested absmax", nested, Kind::Float, 2 * groups)?;
            }
        }
        Ok(Self { packed, ..checked })
    }

    pub(super) fn holds(&self, name: &'static str, tensor: &Tensor) -> Result<(), Error> {
        if tensor.device() == self.device {
            return Ok(());
        }
        Err(Error::Invalid {
            name,
            expected: format!("a tensor on {:?}", self.device),
            got: format!("one on {:?}", tensor.device()),
        })
    }

    /// # Safety
    ///
    /// As for [`run`].
    unsafe fn launch(&self, launch: &Launch) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { run(self.index, launch) }
    }
}

fn block_log2(block_size: i64) -> Result<u32, Error> {
    plan::block_log2(block_size).ok_or_else(|| Error::Invalid {
        name: "block_size",
        expected: "a power of two from 32 to 65536".to_owned(),
        got: block_size.to_string(),
    })
}

pub(super) fn format_of(name: &'static str, tensor: &Tensor) -> Result<Format, Error> {
    Format::of(tensor.kind()).ok_or_else(|| unknown_format(name, tensor.kind()))
}

fn unknown_format(name: &'static str, kind: Kind) -> Error {
    Error::Invalid { name, expected: "f32, bf16 or f16".to_owned(), got: format!("{kind:?}") }
}

pub(super) fn gpu_index(name: &'static str, tensor: &Tensor) -> Result<usize, Error> {
    match tensor.device() {
        Device::Cuda(index) => Ok(index),
        device => Err(Error::Invalid {
            name,
            expected: "a tensor on a GPU".to_owned(),
            got: format!("one on {device:?}"),
        }),
    }
}

pub(super) fn address(tensor: &Tensor) -> u64 {
    tensor.data_ptr().addr() as u64
}

/// The kernels move 16 bytes at a time.
fn is_aligned(tensor: &Tensor) -> bool {
    address(tensor).is_multiple_of(16)
}

pub(super) fn aligned(name: &'static str, tensor: &Tensor) -> Result<(), Error> {
    if is_aligned(tensor) {
        return Ok(());
    }
    Err(Error::Invalid {
        name,
        expected: "memory aligned to 16 bytes".to_owned(),
        got: format!("a view at {:#x}", address(tensor)),
    })
}

/// The tensor itself if it is contiguous and aligned, else a copy that is.
pub(super) fn dense_aligned(tensor: &Tensor) -> Result<Tensor, Error> {
    let dense = tensor.f_contiguous()?;
    if is_aligned(&dense) {
        return Ok(dense);
    }
    let mut copy = Tensor::f_empty(dense.size(), (dense.kind(), dense.device()))?;
    copy.f_copy_(&dense)?;
    Ok(copy)
}

// ---- GPUs and loaded kernels, opened once ----

pub(super) fn gpu(index: usize) -> Result<&'static Gpu, CudaError> {
    static GPUS: OnceLock<Mutex<HashMap<usize, &'static Gpu>>> = OnceLock::new();
    let mut gpus = GPUS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(gpu) = gpus.get(&index) {
        return Ok(gpu);
    }
    let gpu = Box::leak(Box::new(Gpu::open(index)?)); // as many as there are GPUs
    gpus.insert(index, gpu);
    Ok(gpu)
}

fn module(index: usize, gpu: &Gpu, program: Program) -> Result<Module, CudaError> {
    static MODULES: OnceLock<Mutex<HashMap<(usize, Program), Module>>> = OnceLock::new();
    let mut modules =
        MODULES.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(&module) = modules.get(&(index, program)) {
        return Ok(module);
    }
    let cache = nvrtc::default_cache();
    let (image, from_cache) = nvrtc::image(program, gpu.arch, cache.as_deref())?;
    let module = match (gpu.load(&image), &cache) {
        (Ok(module), _) => module,
        (Err(error), Some(cache)) if from_cache => {
            tracing::warn!(%error, "cached CUDA kernels are damaged, compiling them again");
            nvrtc::forget(program, gpu.arch, cache)?;
            gpu.load(&nvrtc::image(program, gpu.arch, Some(cache))?.0)?
        }
        (Err(error), _) => return Err(error),
    };
    modules.insert((index, program), module);
    Ok(module)
}

/// The GPU and the loaded kernel of a launch: found once a thread, without locks from then on.
fn function(index: usize, launch: &Launch) -> Result<(&'static Gpu, Function), CudaError> {
    type Found = HashMap<(usize, String), (&'static Gpu, Function)>;
    thread_local! {
        static FOUND: RefCell<Found> = RefCell::default();
    }
    FOUND.with_borrow_mut(|found| {
        // A kernel's name is short: making the key costs less than the call into the driver by far.
        let key = (index, launch.kernel.clone());
        if let Some(&known) = found.get(&key) {
            return Ok(known);
        }
        let gpu = gpu(index)?;
        let known = (gpu, module(index, gpu, launch.program)?.function(&launch.kernel)?);
        found.insert(key, known);
        Ok(known)
    })
}

/// # Safety
///
/// The arguments are addresses of memory on GPU `index` of the extent the kernel uses, allocated by torch.
pub(super) unsafe fn run(index: usize, launch: &Launch) -> Result<(), Error> {
    // SAFETY: the caller's promise; a null stream is the legacy default stream, which is torch's own unless changed.
    unsafe { run_on(index, launch, std::ptr::null_mut()) }
}

/// # Safety
///
/// As for [`run`]; `stream` is one of this GPU's, or null for the legacy default stream.
unsafe fn run_on(index: usize, launch: &Launch, stream: *mut c_void) -> Result<(), Error> {
    let (gpu, function) = function(index, launch)?;
    // SAFETY: the caller's promise; torch frees memory in the order of the stream.
    unsafe { gpu.launch(function, launch, stream) }?;
    Ok(())
}
