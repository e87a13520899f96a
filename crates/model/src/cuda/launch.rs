//! The kernels as functions of tensors: checks, output allocation, launch.

#![expect(unsafe_code, reason = "kernels read and write tensors through raw addresses")]

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::sync::{Mutex, OnceLock, PoisonError};

use tch::{Device, Kind, Tensor};

use super::ffi::{Function, Gpu, Module};
use super::plan::{self, Format, Launch, PackedAddresses, Program};
use super::{CudaError, nvrtc};
use crate::Error;
use crate::nf4::Nf4Tensor;

/// The scales of a packed matrix's blocks.
#[derive(Clone, Copy, Debug)]
pub enum Absmax<'a> {
    /// One f32 a block.
    Single(&'a Tensor),
    /// Eight bits a block: `map[code] * absmax[block / 256] + offset`.
    Double {
        /// `[blocks]` u8.
        codes: &'a Tensor,
        /// `[ceil(blocks / 256)]` f32.
        absmax: &'a Tensor,
        /// `[256]` f32, bitsandbytes' signed dynamic map.
        map: &'a Tensor,
        /// `[1]` f32.
        offset: &'a Tensor,
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
            absmax: Absmax::Single(&weight.absmax),
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

fn multiply_into(x: &Tensor, weight: &Packed<'_>, y: &Tensor) -> Result<(), Error> {
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

// ---- the decoder's linear layer ----

type Dequantizer = extern "C" fn(
    codes: *const c_void,
    absmax: *const c_void,
    codebook: *const c_void,
    block_size: i64,
    out: *mut c_void,
) -> c_int;

type Multiplier = extern "C" fn(
    x: *const c_void,
    codes: *const c_void,
    absmax: *const c_void,
    codebook: *const c_void,
    block_size: i64,
    y: *mut c_void,
) -> c_int;

unsafe extern "C" {
    fn arete_set_cuda_kernels(
        dequantizer: Dequantizer,
        multiplier: Multiplier,
        multiplier_rows: i64,
    );
}

/// Lets the decoder's linear layers use NF4 weights on GPU `index` with activations in `kind`: unpacked forward
/// and backward, or multiplied as they are where that is allowed. Idempotent.
///
/// # Errors
///
/// [`Error::Cuda`] if the driver or NVRTC is missing, [`Error::Invalid`] for another dtype than f32, bf16 and
/// f16, so that a run fails at its start.
pub fn install(index: usize, kind: Kind) -> Result<(), Error> {
    let format = Format::of(kind).ok_or_else(|| unknown_format("dtype", kind))?;
    let gpu = gpu(index)?;
    for program in [Program::Dequantize, Program::Multiply(format)] {
        module(index, gpu, program)?;
    }
    // SAFETY: the function keeps the pointers of functions that live as long as the process.
    unsafe { arete_set_cuda_kernels(dequantize_hook, multiply_hook, i64::from(plan::MAX_ROWS)) };
    Ok(())
}

/// Unpacks into `out` `[outputs, inputs]`; 0 on success. Called from C++, so it must not unwind.
extern "C" fn dequantize_hook(
    codes: *const c_void,
    absmax: *const c_void,
    codebook: *const c_void,
    block_size: i64,
    out: *mut c_void,
) -> c_int {
    guarded(|| {
        let (codes, absmax, codebook) = (borrow(codes), borrow(absmax), borrow(codebook));
        let out = borrow(out);
        let (outputs, inputs) = out.size2()?;
        let absmax = Absmax::Single(&absmax);
        let (codes, codebook) = (&codes, &codebook);
        dequantize_into(&Packed { codes, codebook, absmax, outputs, inputs, block_size }, &out)
    })
}

/// x Wᵀ into `y` `[N, outputs]`; 0 on success. Called from C++, so it must not unwind.
extern "C" fn multiply_hook(
    x: *const c_void,
    codes: *const c_void,
    absmax: *const c_void,
    codebook: *const c_void,
    block_size: i64,
    y: *mut c_void,
) -> c_int {
    guarded(|| {
        let (codes, absmax, codebook) = (borrow(codes), borrow(absmax), borrow(codebook));
        let (x, y) = (borrow(x), borrow(y));
        let (outputs, inputs) = (y.size2()?.1, x.size2()?.1);
        let absmax = Absmax::Single(&absmax);
        let (codes, codebook) = (&codes, &codebook);
        multiply_into(&x, &Packed { codes, codebook, absmax, outputs, inputs, block_size }, &y)
    })
}

fn guarded(work: impl FnOnce() -> Result<(), Error>) -> c_int {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)) {
        Ok(Ok(())) => 0,
        Ok(Err(error)) => {
            tracing::error!(%error, "an NF4 kernel failed");
            1
        }
        Err(_) => 2, // the panic's message is already on stderr
    }
}

/// Another handle on a tensor that C++ lends for the duration of a call.
fn borrow(tensor: *const c_void) -> Tensor {
    // SAFETY: C++ passes pointers to live tensors.
    unsafe { Tensor::clone_from_ptr(tensor.cast_mut().cast()) }
}

// ---- checks ----

/// A packed matrix whose parts fit together and lie on one GPU.
struct Checked {
    index: usize,
    device: Device,
    packed: PackedAddresses,
}

impl Checked {
    fn new(weight: &Packed<'_>) -> Result<Self, Error> {
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
                absmax_offset: 0,
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
            Absmax::Double { codes, absmax, map, offset } => {
                packed.absmax_codes = part("absmax codes", codes, Kind::Uint8, blocks)?;
                packed.absmax = part("nested absmax", absmax, Kind::Float, (blocks + 255) / 256)?;
                packed.absmax_map = part("absmax map", map, Kind::Float, 256)?;
                packed.absmax_offset = part("absmax offset", offset, Kind::Float, 1)?;
            }
        }
        Ok(Self { packed, ..checked })
    }

    fn holds(&self, name: &'static str, tensor: &Tensor) -> Result<(), Error> {
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

fn format_of(name: &'static str, tensor: &Tensor) -> Result<Format, Error> {
    Format::of(tensor.kind()).ok_or_else(|| unknown_format(name, tensor.kind()))
}

fn unknown_format(name: &'static str, kind: Kind) -> Error {
    Error::Invalid { name, expected: "f32, bf16 or f16".to_owned(), got: format!("{kind:?}") }
}

fn gpu_index(name: &'static str, tensor: &Tensor) -> Result<usize, Error> {
    match tensor.device() {
        Device::Cuda(index) => Ok(index),
        device => Err(Error::Invalid {
            name,
            expected: "a tensor on a GPU".to_owned(),
            got: format!("one on {device:?}"),
        }),
    }
}

fn address(tensor: &Tensor) -> u64 {
    tensor.data_ptr().addr() as u64
}

/// The kernels move 16 bytes at a time.
fn is_aligned(tensor: &Tensor) -> bool {
    address(tensor).is_multiple_of(16)
}

fn aligned(name: &'static str, tensor: &Tensor) -> Result<(), Error> {
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
fn dense_aligned(tensor: &Tensor) -> Result<Tensor, Error> {
    let dense = tensor.f_contiguous()?;
    if is_aligned(&dense) {
        return Ok(dense);
    }
    let mut copy = Tensor::f_empty(dense.size(), (dense.kind(), dense.device()))?;
    copy.f_copy_(&dense)?;
    Ok(copy)
}

// ---- GPUs and loaded kernels, opened once ----

fn gpu(index: usize) -> Result<&'static Gpu, CudaError> {
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

fn function(index: usize, gpu: &Gpu, launch: &Launch) -> Result<Function, CudaError> {
    static FUNCTIONS: OnceLock<Mutex<HashMap<(usize, String), Function>>> = OnceLock::new();
    let mut functions =
        FUNCTIONS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    let key = (index, launch.kernel.clone());
    if let Some(&function) = functions.get(&key) {
        return Ok(function);
    }
    let function = module(index, gpu, launch.program)?.function(&launch.kernel)?;
    functions.insert(key, function);
    Ok(function)
}

/// # Safety
///
/// The arguments are addresses of memory on GPU `index` of the extent the kernel uses, allocated by torch.
unsafe fn run(index: usize, launch: &Launch) -> Result<(), Error> {
    let gpu = gpu(index)?;
    let function = function(index, gpu, launch)?;
    // SAFETY: the caller's promise; torch frees memory in the order of the stream.
    unsafe { gpu.launch(function, launch) }?;
    Ok(())
}
