//! The stage from outside, in one program: linking libtorch once is enough.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

mod bench;
mod common;
mod controls;
mod goldens;
mod groups;
mod loss_scale;
mod refusals;
mod resume;
mod stage;
