//! Compiles the interface to c10d against the libtorch that the model crate was built with.

use std::env;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=csrc");
    let lib = env::var_os("DEP_ARETE_MODEL_LIBTORCH_LIB").map(PathBuf::from);
    let root = env::var_os("LIBTORCH_INCLUDE").map(PathBuf::from);
    let root = root.or_else(|| lib.as_deref().and_then(Path::parent).map(Path::to_path_buf));
    let Some(include) = root.map(|root| root.join("include")) else {
        println!("cargo::error=arete-model did not say where libtorch is");
        return;
    };
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .opt_level(1)
        .file("csrc/group.cpp")
        .include("csrc")
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .flag("-Wno-unused-parameter")
        .flag("-Wno-psabi")
        .compile("arete_group");
}
