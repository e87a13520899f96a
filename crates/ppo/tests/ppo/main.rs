//! The stage from outside, in one program: linking libtorch once is enough.

mod bench;
mod common;
mod goldens;
mod refusals;
mod resume;
mod stage;
