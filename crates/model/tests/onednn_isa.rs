//! That oneDNN's instruction set can still be chosen when a program's constructors run, which `csrc/isa.h` counts on: libtorch's own
//! must not have asked for it by then.

#![expect(clippy::unwrap_used, reason = "a test: a failure here is the finding")]
#![expect(unsafe_code, reason = "a constructor, and the environment it writes")]

use std::process::{Command, Stdio};

use arete_model::{Device, Kind, OnednnIsa, Tensor};

/// Runs before main, as the constructor of `csrc/isa.h` does.
#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = {
    extern "C" fn choose() {
        if let Some(isa) = std::env::var_os("ARETE_TEST_ISA") {
            // SAFETY: no other thread runs before main.
            unsafe { std::env::set_var("ONEDNN_MAX_CPU_ISA", isa) };
        }
    }
    choose
};

/// A convolution, which libtorch gives to oneDNN on every CPU.
#[test]
fn one_convolution() {
    tch::set_num_threads(2);
    let ones = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, Device::Cpu));
    let (x, w) = (ones(&[32, 16, 32, 32]), ones(&[16, 16, 3, 3]));
    let y = x.conv2d(&w, None::<Tensor>, 1, 0, 1, 1);
    assert_eq!(y.max().double_value(&[]), 144.0);
    let _ = OnednnIsa::current(); // links the constructor of csrc/isa.h and panics if it did not run
}

/// What oneDNN says it runs on in a process that starts with these variables.
fn isa(variables: &[(&str, &str)]) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "one_convolution", "--nocapture"])
        .env_remove("ONEDNN_MAX_CPU_ISA")
        .env_remove("DNNL_MAX_CPU_ISA")
        .env_remove("MKLDNN_MAX_CPU_ISA")
        .env("ONEDNN_VERBOSE", "1")
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let line = text.lines().find_map(|line| line.split_once("info,cpu,isa:"));
    line.unwrap_or_else(|| panic!("no instruction set in {text}")).1.to_owned()
}

#[test]
fn onednn_sees_what_a_constructor_chose() {
    let own = isa(&[]);
    assert_ne!(own, "Intel SSE4.1", "the CPU has no more, so that nothing can be seen");
    assert!(!own.contains("AMX"), "the rows of its products are not equal: {own}");
    assert_eq!(isa(&[("ARETE_TEST_ISA", "SSE41")]), "Intel SSE4.1");
    // The user's own choice stays, under each of its names.
    for name in ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKLDNN_MAX_CPU_ISA"] {
        assert_eq!(isa(&[(name, "SSE41")]), "Intel SSE4.1", "{name}");
    }
}
