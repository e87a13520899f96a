//! The stage from outside, in one program: linking libtorch once is enough.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]
#![expect(clippy::print_stdout, reason = "a test says what it measured")]

mod bench;
mod common;
mod controls;
mod engines;
mod goldens;
mod groups;
mod loss_scale;
mod refusals;
mod resume;
mod stage;
#[path = "../../../engine/tests/support/stand_in.rs"]
mod stand_in;
