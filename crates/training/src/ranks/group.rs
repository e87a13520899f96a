//! libtorch's c10d: a store where processes find each other, and Gloo's collective operations over it (`csrc/group.cpp`).
//!
//! Every process calls the same operations in the same order. Tensors are contiguous and lie on the CPU.

#![expect(unsafe_code, reason = "c10d is called through a C interface")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::time::Duration;

use tch::Tensor;

use super::Place;
use crate::Error;

type Raw = *const c_void;

unsafe extern "C" {
    fn arete_group_error() -> *const c_char;
    fn arete_group_join(
        host: *const c_char,
        port: u16,
        rank: c_int,
        n_ranks: c_int,
        join_ms: i64,
        out: *mut *mut c_void,
    ) -> c_int;
    fn arete_group_connect(
        group: *mut c_void,
        rank: c_int,
        n_ranks: c_int,
        interface: *const c_char,
        address: *const c_char,
        operation_ms: i64,
    ) -> c_int;
    fn arete_group_leave(group: *mut c_void);
    fn arete_group_set(group: *mut c_void, key: *const c_char, value: *const u8, n: usize)
    -> c_int;
    fn arete_group_get(
        group: *mut c_void,
        key: *const c_char,
        wait_ms: i64,
        value: *mut u8,
        capacity: usize,
        n: *mut usize,
    ) -> c_int;
    fn arete_group_broadcast(group: *mut c_void, values: Raw, root: c_int) -> c_int;
    fn arete_group_sum(group: *mut c_void, values: Raw) -> c_int;
    fn arete_group_gather(group: *mut c_void, all: Raw, own: Raw) -> c_int;
    fn arete_group_exchange(
        group: *mut c_void,
        received: Raw,
        sent: Raw,
        n_received: *const i64,
        n_sent: *const i64,
        n_ranks: usize,
    ) -> c_int;
}

/// How long processes wait for each other to come.
pub(super) const JOIN: Duration = Duration::from_secs(300);
/// How long one operation may take; that a process has died is noticed by other means and much sooner.
const OPERATION: Duration = Duration::from_secs(1800);
/// Longest value that is read from the store.
const CAPACITY: usize = 4096;

/// A process's end of the group.
#[derive(Debug)]
pub(super) struct Group {
    handle: *mut c_void,
    n_ranks: usize,
}

impl Group {
    /// Finds the store at `host` and `port`, where rank 0 opens it.
    pub(super) fn join(place: &Place, host: &str, port: u16) -> Result<Self, Error> {
        let host = text(host)?;
        let mut handle = std::ptr::null_mut();
        let (rank, n_ranks) = (number(place.rank), number(place.n_ranks));
        // SAFETY: the host's name ends in NUL and lives through the call; `handle` is a place for one pointer.
        let failed = unsafe {
            let wait = milliseconds(JOIN);
            arete_group_join(host.as_ptr(), port, rank, n_ranks, wait, &raw mut handle)
        };
        check(failed)?;
        Ok(Self { handle, n_ranks: place.n_ranks })
    }

    /// Connects with every other process; then operations are possible.
    pub(super) fn connect(&self, place: &Place, is_local: bool) -> Result<(), Error> {
        // PyTorch's own variable for machines with several networks.
        let interface = std::env::var("GLOO_SOCKET_IFNAME").ok().filter(|name| !name.is_empty());
        let interface = interface.map(|name| text(&name)).transpose()?;
        let address = is_local.then(|| text("127.0.0.1")).transpose()?;
        let pointer =
            |text: &Option<CString>| text.as_ref().map_or(std::ptr::null(), |text| text.as_ptr());
        // SAFETY: the handle is `join`'s; the strings end in NUL and live through the call.
        check(unsafe {
            arete_group_connect(
                self.handle,
                number(place.rank),
                number(place.n_ranks),
                pointer(&interface),
                pointer(&address),
                milliseconds(OPERATION),
            )
        })
    }

    /// Leaves a value for the others under a name of its own.
    pub(super) fn set(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        let key = text(key)?;
        // SAFETY: the key ends in NUL, the value has as many bytes as are said.
        check(unsafe { arete_group_set(self.handle, key.as_ptr(), value.as_ptr(), value.len()) })
    }

    /// Waits for a value that another leaves.
    pub(super) fn get(&self, key: &str, wait: Duration) -> Result<Vec<u8>, Error> {
        let key = text(key)?;
        let mut value = vec![0; CAPACITY];
        let mut n = 0;
        // SAFETY: the key ends in NUL; at most CAPACITY bytes are written to `value`, one number to `n`.
        let failed = unsafe {
            arete_group_get(
                self.handle,
                key.as_ptr(),
                milliseconds(wait),
                value.as_mut_ptr(),
                CAPACITY,
                &raw mut n,
            )
        };
        check(failed)?;
        value.truncate(n);
        Ok(value)
    }

    /// Overwrites the values by those of `root`.
    pub(super) fn broadcast(&self, values: &Tensor, root: usize) -> Result<(), Error> {
        // SAFETY: the tensor is alive; the call returns when the operation is done.
        check(unsafe { arete_group_broadcast(self.handle, raw(values), number(root)) })
    }

    /// Overwrites the values by their sum over all processes, in an order of Gloo's own.
    pub(super) fn sum(&self, values: &Tensor) -> Result<(), Error> {
        // SAFETY: as in `broadcast`.
        check(unsafe { arete_group_sum(self.handle, raw(values)) })
    }

    /// Every process's values, `[n_ranks · n]`, in the order of ranks.
    pub(super) fn gather(&self, own: &Tensor) -> Result<Tensor, Error> {
        let n = own.numel() * self.n_ranks;
        let all = Tensor::f_zeros(
            [i64::try_from(n).expect("sizes are small")],
            (own.kind(), own.device()),
        )?;
        // SAFETY: as in `broadcast`; `all` has room for every process's values.
        check(unsafe { arete_group_gather(self.handle, raw(&all), raw(own)) })?;
        Ok(all)
    }

    /// Sends each process its run of `sent` and receives a run from each, as long as `n_sent` and `n_received` say.
    pub(super) fn exchange(
        &self,
        sent: &Tensor,
        n_sent: &[i64],
        n_received: &[i64],
    ) -> Result<Tensor, Error> {
        assert!(
            n_sent.len() == self.n_ranks && n_received.len() == self.n_ranks,
            "a run a process"
        );
        assert_eq!(n_sent.iter().sum::<i64>(), sent.numel() as i64, "everything is sent");
        let received =
            Tensor::f_zeros([n_received.iter().sum::<i64>()], (sent.kind(), sent.device()))?;
        // SAFETY: as in `broadcast`; both counts have `n_ranks` entries, which add up to the tensors' sizes.
        check(unsafe {
            arete_group_exchange(
                self.handle,
                raw(&received),
                raw(sent),
                n_received.as_ptr(),
                n_sent.as_ptr(),
                self.n_ranks,
            )
        })?;
        Ok(received)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: the handle is `join`'s and used no more.
        unsafe { arete_group_leave(self.handle) }
    }
}

/// The `at::Tensor` behind a tensor.
fn raw(tensor: &Tensor) -> Raw {
    tensor.as_ptr().cast()
}

fn text(value: &str) -> Result<CString, Error> {
    CString::new(value).map_err(|_| Error::Invalid {
        name: "address",
        expected: "text without NUL".to_owned(),
        got: value.to_owned(),
    })
}

fn number(n: usize) -> c_int {
    c_int::try_from(n).expect("there are few processes")
}

fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).expect("durations are short")
}

fn check(failed: c_int) -> Result<(), Error> {
    if failed == 0 {
        return Ok(());
    }
    // SAFETY: the message ends in NUL and lives until the next call on this thread.
    let message = unsafe { CStr::from_ptr(arete_group_error()) }.to_string_lossy().into_owned();
    let first = message.lines().next().unwrap_or_default().to_owned();
    Err(Error::Ranks { what: first })
}
