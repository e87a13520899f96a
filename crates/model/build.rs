//! Compiles the decoder's C++ operations against the libtorch that torch-sys found, else the one that `LIBTORCH` names.

use std::env;
use std::path::{Path, PathBuf};

const X86_64: &[(&str, &[&str])] = &[
    (
        "amx",
        &[
            "-march=x86-64-v4",
            "-mavx512bf16",
            "-mamx-tile",
            "-mamx-bf16",
            "-mprefer-vector-width=512",
        ],
    ),
    ("avx512", &["-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"]),
    ("avx2", &["-march=x86-64-v3"]),
    ("baseline", &["-march=x86-64-v2"]),
];

/// What every other kind of CPU runs, and with the feature `portable` this one too: plain loops for the compiler's own target.
const PORTABLE: &[(&str, &[&str])] = &[("portable", &[])];

fn main() {
    println!("cargo:rerun-if-changed=csrc");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-env-changed=LIBTORCH_INCLUDE");
    let Some((include, lib)) = libtorch() else {
        println!(
            "cargo::error=no headers of libtorch were found: set LIBTORCH to the folder of an unpacked libtorch 2.13, \
             the one with include/ and lib/"
        );
        return;
    };
    let portable = env::var_os("CARGO_FEATURE_PORTABLE").is_some()
        || env::var("CARGO_CFG_TARGET_ARCH").as_deref() != Ok("x86_64");
    let tables = if portable { PORTABLE } else { X86_64 };
    for (name, flags) in tables {
        let mut build = cc::Build::new();
        build
            .cpp(true)
            .std("c++20")
            .opt_level(3)
            .file("csrc/kernels.cpp")
            .flag("-fno-math-errno")
            .flag("-Wno-psabi")
            .define("ARETE_KERNELS", Some(format!("kernels_{name}").as_str()))
            .define("ARETE_NAME", Some(format!("\"{name}\"").as_str()));
        for flag in *flags {
            build.flag(flag);
        }
        build.compile(&format!("arete_kernels_{name}"));
    }
    let mut ops = cc::Build::new();
    if portable {
        ops.define("ARETE_PORTABLE", None);
    }
    ops.cpp(true)
        .std("c++20")
        .opt_level(2)
        .file("csrc/ops.cpp")
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .flag("-fopenmp")
        .flag("-Wno-unused-parameter")
        .flag("-Wno-psabi")
        .compile("arete_ops");
    // ops needs the kernels, so they come after it on the link line.
    for (name, _) in tables {
        println!("cargo:rustc-link-lib=static=arete_kernels_{name}");
    }
    println!("cargo:rustc-link-search=native={}", lib.display());
    println!("cargo:rustc-link-lib=dylib=gomp");
    // Build scripts of packages that use this one read it as DEP_ARETE_MODEL_LIBTORCH_LIB.
    println!("cargo:libtorch_lib={}", lib.display());
    // This package's own programs find libtorch where it was linked, unless the caller's flags say where.
    if !env::var("CARGO_ENCODED_RUSTFLAGS").is_ok_and(|flags| flags.contains("-rpath")) {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    }
}

/// The folders of libtorch's headers and libraries.
fn libtorch() -> Option<(PathBuf, PathBuf)> {
    let folder = |name: &str| env::var_os(name).map(PathBuf::from);
    let lib = folder("DEP_TCH_LIBTORCH_LIB").or_else(|| Some(folder("LIBTORCH")?.join("lib")))?;
    let root = folder("LIBTORCH_INCLUDE").or_else(|| lib.parent().map(Path::to_path_buf))?;
    let include = root.join("include");
    include.join("ATen/ATen.h").is_file().then_some((include, lib))
}
