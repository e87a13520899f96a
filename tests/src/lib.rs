//! What tests of the whole workspace share; the tests themselves lie beside this folder.

pub mod fuzz;
