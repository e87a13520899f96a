//! The calls into NVRTC and the CUDA driver, checked: the libraries are opened on first use, and every status
//! becomes a [`CudaError`].

#![expect(unsafe_code, reason = "NVRTC and the CUDA driver are C libraries")]

use std::ffi::{CStr, CString, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, OnceLock};

use cudarc::driver::result as driver;
use cudarc::driver::result::DriverError;
use cudarc::driver::sys::{CUcontext, CUdevice, CUdevice_attribute, CUfunction, CUmodule};
use cudarc::nvrtc::result as nvrtc;
use cudarc::nvrtc::result::NvrtcError;
use cudarc::nvrtc::sys;

use super::CudaError;
use super::nvrtc::{Arch, Compiled};
use super::plan::{Argument, Launch};
use super::surroundings::{GpuName, Surroundings};

// ---- NVRTC ----

/// NVRTC, opened.
#[derive(Clone, Copy, Debug)]
pub(super) struct Nvrtc {
    version: (i32, i32),
}

impl Nvrtc {
    pub(super) fn open() -> Result<Self, CudaError> {
        static OPENED: LazyLock<Result<Nvrtc, Vec<PathBuf>>> =
            LazyLock::new(|| Nvrtc::search(nvrtc_folders()));
        OPENED.as_ref().copied().map_err(|searched| missing(searched.clone()))
    }

    /// Looks in `folders`, then where the system's loader looks; the folders if it is nowhere.
    fn search(folders: Vec<PathBuf>) -> Result<Self, Vec<PathBuf>> {
        for folder in &folders {
            preload(folder);
        }
        // SAFETY: opens and closes libraries by name; NVRTC runs no code of its own then.
        if !unsafe { sys::is_culib_present() } {
            return Err(folders);
        }
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the library is present, and both pointers are valid.
        let status = unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) };
        if status.result().is_err() { Err(folders) } else { Ok(Self { version: (major, minor) }) }
    }

    pub(super) fn version(self) -> (i32, i32) {
        self.version
    }

    /// The generations this NVRTC writes machine code for.
    pub(super) fn architectures(self) -> Result<Vec<u32>, CudaError> {
        let failed = |error: NvrtcError| CudaError::Driver {
            what: "asking NVRTC for its architectures".to_owned(),
            reason: error.to_string(),
        };
        let mut n = 0;
        // SAFETY: the library is present (self exists) and the pointer is valid.
        unsafe { sys::nvrtcGetNumSupportedArchs(&raw mut n) }.result().map_err(failed)?;
        let mut list = vec![0 as c_int; usize::try_from(n).unwrap_or(0)];
        // SAFETY: the list has as many entries as NVRTC said it would write.
        unsafe { sys::nvrtcGetSupportedArchs(list.as_mut_ptr()) }.result().map_err(failed)?;
        Ok(list.into_iter().map(c_int::cast_unsigned).collect())
    }

    pub(super) fn compile(
        self,
        source: &str,
        name: &'static str,
        arch: Arch,
        options: &[String],
        machine_code: bool,
    ) -> Result<Compiled, CudaError> {
        let failed = |error: NvrtcError, log: String| CudaError::Compile {
            program: name,
            arch: arch.0,
            reason: error.to_string(),
            log,
        };
        let text = |text: &str| CString::new(text).expect("our sources have no NUL");
        let (source, file) = (text(source), text(name));
        let program = OwnedProgram(
            nvrtc::create_program(&source, Some(&file)).map_err(|e| failed(e, String::new()))?,
        );
        // SAFETY: the program was just created and lives until `program` is dropped, after `source` and `file`
        // were last used.
        let outcome = unsafe { nvrtc::compile_program(program.0, options) };
        // SAFETY: as above.
        let log = match unsafe { nvrtc::get_program_log(program.0) } {
            Ok(log) => {
                // SAFETY: NVRTC ends its log with NUL.
                unsafe { CStr::from_ptr(log.as_ptr()) }.to_string_lossy().into_owned()
            }
            Err(error) => format!("no log: {error}"),
        };
        outcome.map_err(|error| failed(error, log.clone()))?;
        let image = if machine_code {
            let mut size = 0usize;
            // SAFETY: the program lives and was compiled for real machine code; the pointer is valid.
            unsafe { sys::nvrtcGetCUBINSize(program.0, &raw mut size) }
                .result()
                .map_err(|error| failed(error, log.clone()))?;
            let mut image = vec![0u8; size];
            // SAFETY: the buffer has the size NVRTC asked for.
            unsafe { sys::nvrtcGetCUBIN(program.0, image.as_mut_ptr().cast()) }
                .result()
                .map_err(|error| failed(error, log.clone()))?;
            image
        } else {
            // SAFETY: the program lives and was compiled. The text keeps its final NUL, which the driver wants.
            let text =
                unsafe { nvrtc::get_ptx(program.0) }.map_err(|error| failed(error, log.clone()))?;
            text.into_iter().map(|c| c.cast_unsigned()).collect()
        };
        Ok(Compiled { image, log })
    }
}

fn missing(searched: Vec<PathBuf>) -> CudaError {
    CudaError::Missing {
        library: "NVRTC (libnvrtc.so)",
        searched,
        remedy: "install the CUDA build of libtorch with `make setup DEVICE=cuda`",
    }
}

struct OwnedProgram(sys::nvrtcProgram);

impl Drop for OwnedProgram {
    fn drop(&mut self) {
        // SAFETY: created by `create_program`, destroyed once.
        if let Err(error) = unsafe { nvrtc::destroy_program(self.0) } {
            tracing::warn!(%error, "NVRTC could not free a program");
        }
    }
}

/// Where NVRTC lies beside the libtorch in use: in the wheels of `make setup DEVICE=cuda` and of pip's torch,
/// in libtorch's own folder, and where the tests fetch it.
fn nvrtc_folders() -> Vec<PathBuf> {
    let Some(libraries) = libtorch_folder() else { return Vec::new() };
    ["../../nvidia/cu13/lib", "../../nvidia/cuda_nvrtc/lib", ".", "../../../nvrtc/nvidia/cu13/lib"]
        .iter()
        .map(|folder| libraries.join(folder))
        .filter_map(|folder| folder.canonicalize().ok())
        .collect()
}

/// The folder of the libtorch this process has loaded.
fn libtorch_folder() -> Option<PathBuf> {
    let maps = fs_err::read_to_string("/proc/self/maps").ok()?;
    maps.lines().find_map(|line| {
        let path = Path::new(line.get(line.find('/')?..)?);
        let name = path.file_name()?.to_str()?;
        name.starts_with("libtorch_cpu").then(|| path.parent().map(Path::to_path_buf)).flatten()
    })
}

/// Opens NVRTC and its built-ins in `folder` for the rest of the process; the loader then finds them by name,
/// without `LD_LIBRARY_PATH`.
fn preload(folder: &Path) {
    let Ok(entries) = fs_err::read_dir(folder) else { return };
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name.starts_with("libnvrtc") && !name.contains(".alt.")
        })
        .collect();
    found.sort(); // libnvrtc-builtins before libnvrtc
    for path in found {
        // SAFETY: NVIDIA's libraries have no initialisers with preconditions.
        match unsafe { libloading::Library::new(&path) } {
            Ok(library) => std::mem::forget(library),
            Err(error) => {
                tracing::debug!(path = %path.display(), %error, "not a usable NVRTC");
            }
        }
    }
}

/// Loads libtorch's CUDA part beside the libtorch of this process, for good; nothing where that is the CPU's alone.
pub(super) fn load_libtorch_cuda() {
    let Some(path) = libtorch_folder().map(|folder| folder.join("libtorch_cuda.so")) else {
        return;
    };
    if !path.exists() || libtorch_has_cuda() {
        return;
    }
    let flags = libloading::os::unix::RTLD_NOW | libloading::os::unix::RTLD_GLOBAL;
    // SAFETY: libtorch's own library; its initialisers register operators and device hooks, as they do when it is linked.
    match unsafe { libloading::os::unix::Library::open(Some(&path), flags) } {
        Ok(library) => std::mem::forget(library),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "libtorch's CUDA part cannot be loaded");
        }
    }
}

/// Whether the libtorch in this process has its CUDA part.
pub(super) fn libtorch_has_cuda() -> bool {
    fs_err::read_to_string("/proc/self/maps").is_ok_and(|maps| maps.contains("/libtorch_cuda"))
}

// ---- driver ----

pub(super) fn require_driver() -> Result<(), CudaError> {
    // SAFETY: opens and closes libraries by name.
    if unsafe { cudarc::driver::sys::is_culib_present() } {
        return Ok(());
    }
    Err(CudaError::Missing {
        library: "the CUDA driver (libcuda.so)",
        searched: Vec::new(),
        remedy: "install NVIDIA's driver",
    })
}

/// CUDA's version that the driver is for, as it counts, noted for messages.
pub(super) fn driver_version() -> Option<i32> {
    let mut version = 0;
    // SAFETY: the driver's library is present (the caller asked) and the pointer is valid; the call needs no initialisation.
    let status = unsafe { cudarc::driver::sys::cuDriverGetVersion(&raw mut version) };
    status.result().ok()?;
    Surroundings::note_driver(version);
    Some(version)
}

fn failed(what: impl Into<String>) -> impl FnOnce(DriverError) -> CudaError {
    let what = what.into();
    move |error| {
        let name = error
            .error_name()
            .map_or_else(|_| format!("{:?}", error.0), |name| name.to_string_lossy().into_owned());
        let text = error
            .error_string()
            .map_or_else(|_| String::new(), |text| format!(" ({})", text.to_string_lossy()));
        CudaError::Driver { what, reason: format!("{name}{text}") }
    }
}

/// One GPU with torch's context on it.
#[derive(Debug)]
pub(super) struct Gpu {
    context: CUcontext,
    pub(super) arch: Arch,
    pub(super) multiprocessors: u32,
}

// SAFETY: a context handle may be used from any thread (it is made current on each).
unsafe impl Send for Gpu {}
// SAFETY: as above; the driver locks internally.
unsafe impl Sync for Gpu {}

impl Gpu {
    /// The GPU that torch calls `index`.
    pub(super) fn open(index: usize) -> Result<Self, CudaError> {
        static INITIALISED: OnceLock<Result<(), DriverError>> = OnceLock::new();
        require_driver()?;
        driver_version();
        INITIALISED.get_or_init(driver::init).map_err(failed("starting the CUDA driver"))?;
        let device = driver::device::get(c_int::try_from(index).unwrap_or(c_int::MAX))
            .map_err(failed(format!("opening GPU {index}")))?;
        // SAFETY: `device` came from the driver.
        let context = unsafe { driver::primary_ctx::retain(device) }
            .map_err(failed(format!("opening a context on GPU {index}")))?;
        let major =
            attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor =
            attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let multiprocessors =
            attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let arch = 10 * major + minor;
        let name =
            driver::device::get_name(device).unwrap_or_else(|_| "of unknown name".to_owned());
        Surroundings::note_gpu(GpuName { index, name, arch });
        Ok(Self { context, arch: Arch(arch), multiprocessors })
    }

    /// Bytes that nobody holds, and all there are.
    pub(super) fn memory(&self) -> Result<(u64, u64), CudaError> {
        self.with_context(|| {
            let (free, all) = driver::mem_get_info().map_err(failed("asking for free memory"))?;
            Ok((free as u64, all as u64))
        })
    }

    /// Runs `work` with this GPU's context current, then restores the thread's own.
    fn with_context<T>(&self, work: impl FnOnce() -> Result<T, CudaError>) -> Result<T, CudaError> {
        let before = driver::ctx::get_current().map_err(failed("asking for the context"))?;
        if before == Some(self.context) {
            return work();
        }
        // SAFETY: the context was retained and is never released.
        unsafe { driver::ctx::set_current(self.context) }
            .map_err(failed("entering the context"))?;
        let result = work();
        // SAFETY: it was current a moment ago; null means none.
        unsafe { driver::ctx::set_current(before.unwrap_or(std::ptr::null_mut())) }
            .map_err(failed("leaving the context"))?;
        result
    }

    /// Loads a compiled image onto this GPU.
    pub(super) fn load(&self, image: &[u8]) -> Result<Module, CudaError> {
        self.with_context(|| {
            // SAFETY: the driver copies the image, a cubin or NUL-terminated PTX, and checks its header.
            let module = unsafe { driver::module::load_data(image.as_ptr().cast()) }
                .map_err(failed("loading compiled kernels"))?;
            Ok(Module(module))
        })
    }

    /// Queues a launch on `stream`; null is the legacy default stream.
    ///
    /// # Safety
    ///
    /// `stream` is null or one of this GPU's. The arguments fit the kernel's parameters, and every address is that of memory on this GPU of the extent
    /// the kernel uses, which is not freed before work queued on this stream up to now is done.
    pub(super) unsafe fn launch(
        &self,
        function: Function,
        launch: &Launch,
        stream: *mut c_void,
    ) -> Result<(), CudaError> {
        // The driver reads each argument through a pointer, in its parameter's own size; on little-endian
        // machines the low bytes of a u64 serve all of them.
        const { assert!(cfg!(target_endian = "little")) };
        let mut values: Vec<u64> = launch
            .arguments
            .iter()
            .map(|argument| match *argument {
                Argument::Address(address) => address,
                Argument::Int(value) => u64::from(value.cast_unsigned()),
                Argument::Long(value) => value.cast_unsigned(),
                Argument::Float(value) => u64::from(value.to_bits()),
            })
            .collect();
        let mut pointers: Vec<*mut c_void> =
            values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
        self.with_context(|| {
            let [x, y] = launch.grid;
            // SAFETY: the caller's promise.
            unsafe {
                driver::launch_kernel(
                    function.0,
                    (x, y, 1),
                    (launch.threads, 1, 1),
                    launch.shared_bytes,
                    stream.cast(),
                    &mut pointers,
                )
            }
            .map_err(failed(format!("launching {}", launch.kernel)))
        })
    }
}

fn attribute(device: CUdevice, which: CUdevice_attribute) -> Result<u32, CudaError> {
    // SAFETY: `device` came from the driver.
    let value = unsafe { driver::device::get_attribute(device, which) }
        .map_err(failed("asking for a property of the GPU"))?;
    Ok(value.cast_unsigned())
}

/// Kernels loaded on one GPU for the rest of the process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Module(CUmodule);

// SAFETY: module handles may be used from any thread, and modules are never unloaded.
unsafe impl Send for Module {}

impl Module {
    pub(super) fn function(self, name: &str) -> Result<Function, CudaError> {
        let text = CString::new(name).expect("kernel names have no NUL");
        // SAFETY: the module is loaded and stays so.
        unsafe { driver::module::get_function(self.0, text) }
            .map(Function)
            .map_err(failed(format!("finding kernel {name}")))
    }
}

/// One kernel on one GPU.
#[derive(Clone, Copy, Debug)]
pub(super) struct Function(CUfunction);

// SAFETY: as for modules.
unsafe impl Send for Function {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_without_nvrtc_are_named_in_the_error() {
        // SAFETY: opens and closes libraries by name.
        if unsafe { sys::is_culib_present() } {
            println!("skipped: the system's loader finds NVRTC itself");
            return;
        }
        let (empty, damaged) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for name in ["libnvrtc.so.13", "libnvrtc.so", "libnvrtc-builtins.so.13.0"] {
            fs_err::write(damaged.path().join(name), "no library").unwrap();
        }
        let absent = empty.path().join("absent");
        let folders = vec![empty.path().to_owned(), damaged.path().to_owned(), absent];
        let searched = Nvrtc::search(folders.clone()).unwrap_err();
        assert_eq!(searched, folders);
        let message = missing(searched).to_string();
        assert!(
            message.starts_with("NVRTC (libnvrtc.so) cannot be opened (searched "),
            "{message}"
        );
        for folder in folders {
            assert!(message.contains(folder.to_str().unwrap()), "{message}");
        }
        assert!(
            message.ends_with("`make setup DEVICE=cuda`, or run with --device cpu"),
            "{message}"
        );
    }
}
