//! Counts what a GPU would be sent, without one (`csrc/launches.h`): our kernels by the launcher's own plan, libtorch's by its
//! operators' calls.

#![expect(unsafe_code, reason = "the counter is C++'s")]

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int};

use crate::cuda;
use crate::cuda::table::OPERATIONS;

unsafe extern "C" {
    fn arete_override_composite(chosen: c_int);
    fn arete_start_counting(dry: bool);
    fn arete_stop_counting() -> *const c_char;
}

/// Launches by operation or operator.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Launches {
    /// Of our kernels.
    pub(crate) ours: i64,
    /// Of libtorch's.
    pub(crate) libtorch: i64,
    /// Either, by name.
    pub(crate) by_name: BTreeMap<String, i64>,
}

impl Launches {
    pub(crate) fn all(&self) -> i64 {
        self.ours + self.libtorch
    }

    fn read(report: &str) -> Self {
        let mut found = Self::default();
        for line in report.lines() {
            let (name, n) = line.rsplit_once(' ').expect("a name and a number");
            let n = n.parse().expect("a number");
            match name {
                "ours" => found.ours = n,
                "libtorch" => found.libtorch = n,
                name => {
                    let fused = name.strip_prefix("fused ").map(|operation| {
                        let operation: usize = operation.parse().expect("its number");
                        format!("our {}", OPERATIONS[operation].name)
                    });
                    found.by_name.insert(fused.unwrap_or_else(|| name.to_owned()), n);
                }
            }
        }
        found
    }
}

/// While it lives, this thread takes the GPU's path on the CPU, or its own.
pub(crate) struct Path(());

impl Path {
    pub(crate) fn of_gpu(wanted: bool) -> Self {
        // SAFETY: the function sets a number of this thread.
        unsafe { arete_override_composite(c_int::from(wanted)) };
        Self(())
    }
}

impl Drop for Path {
    fn drop(&mut self) {
        // SAFETY: as above; -1 leaves it to the environment.
        unsafe { arete_override_composite(-1) };
    }
}

/// What `work` would launch on a GPU; `dry` leaves products, the bulk of the work, uncomputed: their results are zero.
pub(crate) fn count<T>(dry: bool, work: impl FnOnce() -> T) -> (T, Launches) {
    struct Stop;
    impl Drop for Stop {
        fn drop(&mut self) {
            // SAFETY: this thread counts.
            let _ = unsafe { arete_stop_counting() };
        }
    }
    cuda::register();
    let _path = Path::of_gpu(true);
    // SAFETY: this thread does not count yet; `Stop` or the end of this function ends it.
    unsafe { arete_start_counting(dry) };
    let stop = Stop;
    let out = work();
    std::mem::forget(stop);
    // SAFETY: this thread counts; the text lives until it counts again.
    let report = unsafe { CStr::from_ptr(arete_stop_counting()) };
    (out, Launches::read(&report.to_string_lossy()))
}
