//! What happens where the host's memory runs out.
//!
//! Rust ends a process by SIGABRT then, which says neither what to do nor that it was for memory. Every program of this
//! workspace ends with the exit code for it instead.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Write;

use arete_records::Class;

/// The system's allocator; where it has no more, the program ends.
struct OrExit;

#[global_allocator]
static ALLOCATOR: OrExit = OrExit;

#[expect(unsafe_code, reason = "an allocator's functions are")]
// SAFETY: every call is handed to the system's allocator as it is, and its result is given back unless it is null.
unsafe impl GlobalAlloc for OrExit {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promised.
        or_exit(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promised.
        or_exit(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as the caller promised.
        or_exit(unsafe { System.realloc(pointer, layout, size) }, size)
    }
}

/// Room that libtorch's own initialisers take; where there is less they end the process by SIGABRT.
const LIBTORCH_BYTES: usize = 96 << 20;

/// Looks for that room before any library is initialised.
extern "C" fn look_for_room() {
    let layout = Layout::new::<[u8; LIBTORCH_BYTES]>();
    #[expect(unsafe_code, reason = "an allocator's functions are")]
    // SAFETY: the layout is not empty, and what was given for it is given back.
    unsafe {
        // The compiler leaves out what is given back unused.
        let pointer = or_exit(std::hint::black_box(System.alloc(layout)), layout.size());
        System.dealloc(pointer, layout);
    }
}

#[expect(
    unsafe_code,
    reason = "only the loader calls anything before the libraries' own initialisers"
)]
// SAFETY: the section is a list of functions without arguments that matter; this one needs nothing that main prepares.
#[unsafe(link_section = ".preinit_array")]
#[used]
static BEFORE_LIBRARIES: extern "C" fn() = look_for_room;

fn or_exit(pointer: *mut u8, size: usize) -> *mut u8 {
    if pointer.is_null() {
        end(size);
    }
    pointer
}

/// Says what happened without asking for memory, and ends the process: nothing that runs at an exit is safe any more.
#[cold]
fn end(size: usize) -> ! {
    let mut digits = [0; 20];
    let (mut at, mut rest) = (digits.len(), size);
    while at > 0 && (rest > 0 || at == digits.len()) {
        at -= 1;
        digits[at] = b'0' + u8::try_from(rest % 10).unwrap_or(0);
        rest /= 10;
    }
    let advice = crate::exit::MEMORY_ADVICE.as_bytes();
    let mut stderr = std::io::stderr(); // without a buffer
    for part in [b"error: no memory for ".as_slice(), &digits[at..], b" bytes\n  ", advice, b"\n"] {
        // Whether it is read or not, the process ends.
        let _ = stderr.write_all(part);
    }
    signal_hook::low_level::exit(i32::from(crate::exit::code(Class::Memory)))
}
