//! Compiles the decoder's C++ operations against the libtorch that `LIBTORCH` names.

use std::path::PathBuf;

const INSTRUCTION_SETS: &[(&str, &[&str])] = &[
    ("avx512", &["-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"]),
    ("avx2", &["-march=x86-64-v3"]),
    ("baseline", &["-march=x86-64-v2"]),
];

fn main() {
    println!("cargo:rerun-if-changed=csrc");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let libtorch = PathBuf::from(
        std::env::var("LIBTORCH").expect("LIBTORCH is set by .cargo/config.toml; run `make setup`"),
    );
    assert!(
        libtorch.join("include/ATen/ATen.h").exists(),
        "no libtorch at {}: run `make setup`",
        libtorch.display()
    );
    for (name, flags) in INSTRUCTION_SETS {
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
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .opt_level(2)
        .file("csrc/ops.cpp")
        .include(libtorch.join("include"))
        .include(libtorch.join("include/torch/csrc/api/include"))
        .flag("-fopenmp")
        .flag("-Wno-unused-parameter")
        .flag("-Wno-psabi")
        .compile("arete_ops");
    // ops needs the kernels, so they come after it on the link line.
    for (name, _) in INSTRUCTION_SETS {
        println!("cargo:rustc-link-lib=static=arete_kernels_{name}");
    }
    println!("cargo:rustc-link-search=native={}", libtorch.join("lib").display());
    println!("cargo:rustc-link-lib=dylib=gomp");
}
