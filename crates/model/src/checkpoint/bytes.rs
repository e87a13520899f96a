//! The one place where a CPU tensor's memory is seen as plain bytes or numbers.
//!
//! Reading a file straight into the memory of a fresh tensor keeps the peak at one tensor: no
//! mapped file and no second copy.

use std::path::Path;

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

/// The place of the first float in `bytes` (little endian, of dtype `kind`) that is NaN or infinite; none for integers.
pub(crate) fn first_non_finite(kind: Kind, bytes: &[u8]) -> Option<usize> {
    /// Whole blocks without a branch inside: compilers make wide instructions of them.
    fn find<const N: usize>(bytes: &[u8], is_finite: impl Fn([u8; N]) -> bool) -> Option<usize> {
        const BLOCK: usize = 4096;
        let numbers = bytes.as_chunks::<N>().0;
        let all =
            |block: &&[[u8; N]]| block.iter().fold(true, |all, &number| all & is_finite(number));
        let block = numbers.chunks(BLOCK).position(|block| !all(&block))?;
        let first = numbers[block * BLOCK..].iter().position(|&number| !is_finite(number))?;
        Some(block * BLOCK + first)
    }
    // The exponent of what is not finite is all ones.
    match kind {
        Kind::Half => find(bytes, |n| u16::from_le_bytes(n) & 0x7C00 != 0x7C00),
        Kind::BFloat16 => find(bytes, |n| u16::from_le_bytes(n) & 0x7F80 != 0x7F80),
        Kind::Float => find(bytes, |n| u32::from_le_bytes(n) & 0x7F80_0000 != 0x7F80_0000),
        Kind::Double => find(bytes, |n| u64::from_le_bytes(n) >> 52 & 0x7FF != 0x7FF),
        _ => None,
    }
}

/// What is said of a tensor with a number that is not finite.
pub(crate) fn not_finite(path: &Path, name: &str, place: usize) -> Error {
    let found = format!("NaN or an infinity at element {place}");
    Error::field(path, name, "finite numbers", found)
}

/// Reads a tensor's floats at `offset`, and looks at every one while it is in the cache.
///
/// # Errors
///
/// [`Error::Io`] naming the file, also when it is shorter; [`Error::Field`] naming the tensor if a number is not finite.
pub(crate) fn read_finite_at(
    (path, file): (&Path, &File),
    name: &str,
    kind: Kind,
    mut offset: u64,
    buffer: &mut [u8],
) -> Result<(), Error> {
    const AT_A_TIME: usize = 1 << 20;
    for (idx, part) in buffer.chunks_mut(AT_A_TIME).enumerate() {
        read_at(file, offset, part)?;
        offset += part.len() as u64;
        if let Some(place) = first_non_finite(kind, part) {
            let before = idx * AT_A_TIME / kind.elt_size_in_bytes();
            return Err(not_finite(path, name, before + place));
        }
    }
    Ok(())
}

/// Reads `buffer.len()` bytes at `offset`.
///
/// # Errors
///
/// [`Error::Io`] naming the file, also when it is shorter.
pub(crate) fn read_at(file: &File, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
    Ok(file.read_exact_at(buffer, offset)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_number_that_is_not_finite_is_found() {
        let bad =
            [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0x7F80_0001)];
        let good = [0.0, -0.0, f32::MAX, f32::MIN, f32::MIN_POSITIVE, f32::from_bits(1)];
        for place in [0, 1, 4095, 4096, 9999] {
            for bad in bad {
                let mut numbers: Vec<f32> = good.into_iter().cycle().take(10_000).collect();
                let whole: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
                assert_eq!(first_non_finite(Kind::Float, &whole), None);
                numbers[place] = bad;
                let whole: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
                assert_eq!(first_non_finite(Kind::Float, &whole), Some(place));
            }
        }
        // What libtorch calls finite, for every number of 16 bits.
        let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        for kind in [Kind::Half, Kind::BFloat16] {
            let numbers = filled::<u8>(&[1 << 16], kind, |out| {
                out.copy_from_slice(&all);
                Ok(())
            })
            .unwrap();
            let finite = Vec::<bool>::try_from(&numbers.isfinite()).unwrap();
            for (number, finite) in all.chunks(2).zip(finite) {
                assert_eq!(first_non_finite(kind, number).is_none(), finite, "{kind:?} {number:?}");
            }
        }
        let wide = [1.0, f64::MAX, f64::NAN].map(f64::to_le_bytes).concat();
        assert_eq!(first_non_finite(Kind::Double, &wide), Some(2));
        assert_eq!(first_non_finite(Kind::Int64, &wide), None);
    }
}
