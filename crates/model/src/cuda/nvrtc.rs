//! Compiles the kernels with NVRTC at run time, and keeps the machine code on disk.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::plan::{Format, Program};
use super::{CudaError, ffi};

const COMMON: &str = include_str!("kernels/common.cuh");
const DEQUANTIZE: &str = include_str!("kernels/dequantize.cu");
const QUANTIZE: &str = include_str!("kernels/quantize.cu");
const MULTIPLY: &str = include_str!("kernels/multiply.cu");
const NF4_ROWS: &str = include_str!("kernels/nf4_rows.cu");
const ATTENTION: &str = include_str!("kernels/attention.cu");
const ROWS: &str = include_str!("kernels/rows.cu");
const VOCABULARY: &str = include_str!("kernels/vocabulary.cu");

/// A GPU generation: compute capability 8.6 is `Arch(86)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Arch(pub u32);

/// What NVRTC makes of a program.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// A cubin (ELF), or PTX text for a GPU this NVRTC does not know yet.
    pub image: Vec<u8>,
    /// The compiler's messages, among them registers and spills per kernel.
    pub log: String,
}

impl Program {
    /// The file's name, for messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dequantize => "dequantize.cu",
            Self::Quantize => "quantize.cu",
            Self::Multiply(_) => "multiply.cu",
            Self::Nf4Rows(_) => "nf4_rows.cu",
            Self::Attention(_) => "attention.cu",
            Self::Rows(_) => "rows.cu",
            Self::Vocabulary(_) => "vocabulary.cu",
        }
    }

    /// The whole source text.
    pub fn source(self) -> String {
        let own = match self {
            Self::Dequantize => DEQUANTIZE,
            Self::Quantize => QUANTIZE,
            Self::Multiply(_) => MULTIPLY,
            Self::Nf4Rows(_) => NF4_ROWS,
            Self::Attention(_) => ATTENTION,
            Self::Rows(_) => ROWS,
            Self::Vocabulary(_) => VOCABULARY,
        };
        format!("#line 1 \"common.cuh\"\n{COMMON}\n#line 1 \"{}\"\n{own}", self.name())
    }

    fn options(self) -> Vec<String> {
        // ptxas -v reports registers and spills; constants that a program leaves unused are no news.
        let mut options: Vec<String> =
            ["--std=c++17", "--ptxas-options=-v", "--diag-suppress=177"].map(String::from).into();
        if let Self::Multiply(format)
        | Self::Nf4Rows(format)
        | Self::Attention(format)
        | Self::Rows(format)
        | Self::Vocabulary(format) = self
        {
            let name = match format {
                Format::F32 => "ARETE_F32",
                Format::BF16 => "ARETE_BF16",
                Format::F16 => "ARETE_F16",
            };
            options.push(format!("--define-macro={name}"));
        }
        options
    }
}

/// Compiles a program for `arch`: to machine code, or to PTX (which the driver finishes) if this NVRTC only
/// knows older ones.
///
/// # Errors
///
/// [`CudaError::Missing`] without NVRTC, [`CudaError::Arch`] if `arch` is older than all it supports,
/// [`CudaError::Compile`] with its messages if it fails.
pub fn compile(program: Program, arch: Arch) -> Result<Compiled, CudaError> {
    let nvrtc = ffi::Nvrtc::open()?;
    let mut options = program.options();
    options.push(target(arch, &nvrtc.architectures()?)?.option());
    let to_ptx = options.last().is_some_and(|option| option.contains("compute_"));
    nvrtc.compile(&program.source(), program.name(), arch, &options, !to_ptx)
}

/// The image of a program for `arch`: from the `cache` folder if it is there, else compiled and kept there.
/// `true` if it was there.
///
/// # Errors
///
/// As [`compile`]. A cache that cannot be written is reported as a warning and is no error.
pub fn image(
    program: Program,
    arch: Arch,
    cache: Option<&Path>,
) -> Result<(Vec<u8>, bool), CudaError> {
    let nvrtc = ffi::Nvrtc::open()?;
    let path = cache.map(|folder| folder.join(cache_name(program, arch, nvrtc.version())));
    if let Some(path) = &path
        && let Ok(image) = fs_err::read(path)
        && !image.is_empty()
    {
        return Ok((image, true));
    }
    let start = std::time::Instant::now();
    let compiled = compile(program, arch)?;
    tracing::info!(
        program = program.name(),
        arch = arch.0,
        seconds = start.elapsed().as_secs_f64(),
        "compiled CUDA kernels"
    );
    if let Some(path) = &path
        && let Err(error) = store(path, &compiled.image)
    {
        tracing::warn!(%error, "compiled CUDA kernels cannot be cached");
    }
    Ok((compiled.image, false))
}

/// Removes an image the driver refused from the `cache` folder.
pub(super) fn forget(program: Program, arch: Arch, cache: &Path) -> Result<(), CudaError> {
    let path = cache.join(cache_name(program, arch, ffi::Nvrtc::open()?.version()));
    if let Err(error) = fs_err::remove_file(&path) {
        tracing::warn!(%error, "a damaged file of compiled CUDA kernels cannot be removed");
    }
    Ok(())
}

/// File name of a program's image: SHA-256 of everything that decides its bytes.
pub fn cache_name(program: Program, arch: Arch, nvrtc_version: (i32, i32)) -> String {
    let mut hash = Sha256::new();
    let (major, minor) = nvrtc_version;
    for part in [program.source(), program.options().join(" "), format!("{arch:?} {major}.{minor}")]
    {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    let hex: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{hex}.cubin")
}

/// `$XDG_CACHE_HOME/arete`, else `~/.cache/arete`; nothing without either variable.
pub fn default_cache() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("XDG_CACHE_HOME")
        .filter(|path| path.is_absolute())
        .or_else(|| set("HOME").map(|home| home.join(".cache")))
        .map(|folder| folder.join("arete"))
}

/// Readers see the whole file or none.
fn store(path: &Path, image: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().expect("a file in the cache folder");
    fs_err::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    std::io::Write::write_all(&mut file, image)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

enum Target {
    Machine(u32),
    Virtual(u32),
}

impl Target {
    fn option(&self) -> String {
        match self {
            Self::Machine(arch) => format!("--gpu-architecture=sm_{arch}"),
            Self::Virtual(arch) => format!("--gpu-architecture=compute_{arch}"),
        }
    }
}

fn target(arch: Arch, supported: &[u32]) -> Result<Target, CudaError> {
    if supported.contains(&arch.0) {
        return Ok(Target::Machine(arch.0));
    }
    match supported.iter().filter(|&&known| known < arch.0).max() {
        Some(&closest) => Ok(Target::Virtual(closest)),
        None => Err(CudaError::Arch { arch: arch.0, supported: supported.to_vec() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_machine_code_where_nvrtc_knows_the_gpu_and_ptx_where_the_gpu_is_newer() {
        let supported = [75, 80, 90];
        let option = |arch| target(Arch(arch), &supported).map(|target| target.option());
        assert_eq!(option(80).unwrap(), "--gpu-architecture=sm_80");
        assert_eq!(option(120).unwrap(), "--gpu-architecture=compute_90");
        let message = option(70).unwrap_err().to_string();
        assert!(message.contains("7.0") && message.contains("7.5, 8.0, 9.0"), "{message}");
    }

    #[test]
    fn the_cache_name_depends_on_program_architecture_and_compiler() {
        let name = |program, arch, version| cache_name(program, Arch(arch), version);
        let base = name(Program::Quantize, 80, (13, 0));
        assert_eq!(base, name(Program::Quantize, 80, (13, 0)));
        for other in [
            name(Program::Dequantize, 80, (13, 0)),
            name(Program::Quantize, 86, (13, 0)),
            name(Program::Quantize, 80, (13, 1)),
        ] {
            assert_ne!(base, other);
        }
        assert_ne!(
            name(Program::Multiply(Format::F16), 80, (13, 0)),
            name(Program::Multiply(Format::BF16), 80, (13, 0)),
            "same source, other macro"
        );
    }

    #[test]
    fn a_cached_image_is_stored_whole_and_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("arete").join("x.cubin");
        store(&path, b"first").unwrap();
        store(&path, b"second").unwrap();
        assert_eq!(fs_err::read(&path).unwrap(), b"second");
        assert_eq!(fs_err::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }
}
