//! The one place where a CPU tensor's memory is seen as plain bytes or numbers.
//!
//! Reading a file straight into the memory of a fresh tensor keeps the peak at one tensor: no
//! mapped file and no second copy.

use fs_err::File;
use fs_err::os::unix::fs::FileExt as _;
use tch::{Device, Kind, Tensor};

use crate::Error;

#[cfg(target_endian = "big")]
compile_error!("checkpoints are little endian and are read without swapping bytes");

/// Plain numbers a tensor's memory may be seen as.
pub(crate) trait Plain: Copy + Send {}
impl Plain for u8 {}
impl Plain for u16 {}
impl Plain for f32 {}

/// Makes a contiguous CPU tensor whose elements `fill` writes, every one of them.
///
/// `T` is `u8` for the tensor's bytes, or a number as wide as one element (`u16` for bf16 and f16,
/// since tch calls `half::bf16` Half).
///
/// # Shapes
///
/// - output: `shape`, dtype `kind`; `fill` gets its elements (or bytes) in row-major order.
///
/// # Errors
///
/// Whatever `fill` returns, or [`Error::Torch`] when libtorch cannot allocate.
pub(crate) fn filled<T: Plain>(
    shape: &[i64],
    kind: Kind,
    fill: impl FnOnce(&mut [T]) -> Result<(), Error>,
) -> Result<Tensor, Error> {
    let width = size_of::<T>();
    assert!(width == 1 || width == kind.elt_size_in_bytes(), "T is a byte or one element");
    let tensor = Tensor::f_empty(shape, (kind, Device::Cpu))?;
    let n = tensor.numel() * kind.elt_size_in_bytes() / width;
    if n > 0 {
        #[expect(unsafe_code, reason = "tch offers no view of a tensor's memory")]
        // SAFETY: the tensor was just made: contiguous on the CPU, `n * width` bytes aligned to 64,
        // known to nobody else while `fill` runs; memory handed out through C counts as
        // initialised, and every bit pattern is a valid `Plain` number.
        fill(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr() as *mut T, n) })?;
    }
    Ok(tensor)
}

/// The bytes of a contiguous CPU tensor, for writing it to a file.
///
/// # Panics
///
/// If the tensor is not on the CPU or not contiguous: the caller makes it so first.
pub(crate) fn bytes_of(tensor: &Tensor) -> &[u8] {
    assert!(tensor.device() == Device::Cpu && tensor.is_contiguous(), "made contiguous by caller");
    let n_bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
    if n_bytes == 0 {
        return &[];
    }
    #[expect(unsafe_code, reason = "tch offers no view of a tensor's memory")]
    // SAFETY: checked above: contiguous CPU memory of `n_bytes`, borrowed as long as the tensor.
    unsafe {
        std::slice::from_raw_parts(tensor.data_ptr() as *const u8, n_bytes)
    }
}

/// Reads `buffer.len()` bytes at `offset`.
///
/// # Errors
///
/// [`Error::Io`] naming the file, also when it is shorter.
pub(crate) fn read_at(file: &File, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
    Ok(file.read_exact_at(buffer, offset)?)
}
