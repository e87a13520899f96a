//! Runs one of this crate's unit tests at every instruction-set level of the CPU, each in a process of its own.

use std::process::{Command, Stdio};

/// What forces each level: ours, oneDNN's, libtorch's own kernels' and MKL's. AMX is emulated where the CPU has none; a level above
/// the CPU's own runs at that.
const LEVELS: [(&str, &[(&str, &str)]); 4] = [
    ("AMX", &[("ARETE_CPU_KERNELS", "amx")]),
    (
        "AVX-512 BF16",
        &[("ARETE_CPU_KERNELS", "avx512"), ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")],
    ),
    (
        "AVX2",
        &[
            ("ARETE_CPU_KERNELS", "avx2"),
            ("ONEDNN_MAX_CPU_ISA", "AVX2"),
            ("ATEN_CPU_CAPABILITY", "avx2"),
            ("MKL_ENABLE_INSTRUCTIONS", "AVX2"),
        ],
    ),
    (
        "baseline",
        &[
            ("ARETE_CPU_KERNELS", "baseline"),
            ("ONEDNN_MAX_CPU_ISA", "SSE41"),
            ("ATEN_CPU_CAPABILITY", "default"),
            ("MKL_ENABLE_INSTRUCTIONS", "SSE4_2"),
            ("MKL_CBWR", "COMPATIBLE"),
        ],
    ),
];

/// Runs the test of this full name at every level.
///
/// # Panics
///
/// If it fails at one, or no test has the name.
#[track_caller]
pub(crate) fn at_every_level(test: &str) {
    let start = |(level, variables): (&'static str, &[(&str, &str)])| {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .env_remove("DNNL_MAX_CPU_ISA")
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        (level, child.unwrap())
    };
    let children: Vec<_> = LEVELS.into_iter().map(start).collect();
    for (level, child) in children {
        let output = child.wait_with_output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{level}: {stdout}{stderr}");
        assert!(stdout.contains("1 passed"), "{level}: {stdout}");
    }
}
