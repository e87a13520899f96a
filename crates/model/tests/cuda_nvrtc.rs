//! The CUDA kernels, compiled to machine code for every GPU generation from Turing to Blackwell: no GPU is needed
//! for that, only NVRTC, which `scripts/setup-nvrtc.sh` fetches.

#![expect(clippy::print_stderr, reason = "a skipped test says why")]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use arete_model::cuda::nvrtc::{self, Arch};
use arete_model::cuda::plan::{Format, Program};
use arete_model::cuda::{self, CudaError, Packed};
use arete_model::{
    Error, LoadOptions, Model, Nf4Options, Source,
    nf4::{Nf4Tensor, Scales},
};
use tch::{Device, Kind, Tensor};

/// Generations the kernels are compiled for: those that differ most, or with `ARETE_TORTURE=1` all from Turing to Blackwell.
fn architectures() -> &'static [u32] {
    let torture = std::env::var_os("ARETE_TORTURE").is_some_and(|value| value == "1");
    if torture { &[75, 80, 86, 89, 90, 100, 120] } else { &[75, 80, 90] }
}

/// Fetches NVRTC once; `false` with a printed reason where that is impossible.
fn nvrtc_is_here() -> bool {
    static HERE: OnceLock<bool> = OnceLock::new();
    *HERE.get_or_init(|| {
        // A test binary needs libtorch loaded to find what lies beside it.
        assert_eq!(Tensor::from(1i64).numel(), 1);
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/setup-nvrtc.sh");
        let output = Command::new("bash").arg(script).output().expect("bash runs");
        let messages = String::from_utf8_lossy(&output.stderr).into_owned()
            + &String::from_utf8_lossy(&output.stdout);
        if output.status.success() {
            return true;
        }
        assert!(
            messages.contains("cannot be reached") || messages.contains("python3"),
            "fetching NVRTC failed: {messages}"
        );
        eprintln!("skipped: {}", messages.trim());
        false
    })
}

// ---- what the machine code says about itself ----

#[derive(Clone, Copy, Debug, Default)]
struct Usage {
    registers: u32,
    /// Stack of a thread, which is where spilled registers would go.
    frame_bytes: u32,
}

/// Registers per kernel, and no stack, from the cubin's `.nv.info` section: records of format, attribute and size, of
/// which those for a kernel hold the index of its symbol and a number.
fn usage(cubin: &[u8]) -> BTreeMap<String, Usage> {
    const PAIR: u8 = 4;
    const REGISTERS: u8 = 0x2f;
    const FRAME_BYTES: u8 = 0x11;
    let u16_at = |at: usize| u16::from_le_bytes(cubin[at..at + 2].try_into().expect("two bytes"));
    let u32_at = |at: usize| u32::from_le_bytes(cubin[at..at + 4].try_into().expect("four bytes"));
    let u64_at = |at: usize| u64::from_le_bytes(cubin[at..at + 8].try_into().expect("eight bytes"));
    assert_eq!(&cubin[..5], b"\x7fELF\x02", "64-bit ELF");
    assert_eq!(u16_at(18), 190, "machine: CUDA");
    let (table, entry, n) = (u64_at(40) as usize, usize::from(u16_at(58)), usize::from(u16_at(60)));
    let header = |section: usize| table + section * entry;
    let bytes = |section: usize| {
        let start = u64_at(header(section) + 24) as usize;
        start..start + u64_at(header(section) + 32) as usize
    };
    let text = |section: usize, at: u32| {
        let start = bytes(section).start + at as usize;
        let length = cubin[start..].iter().position(|&b| b == 0).expect("names end");
        std::str::from_utf8(&cubin[start..start + length]).expect("ASCII")
    };
    let names = usize::from(u16_at(62));
    let section = |name: &str| {
        (0..n).find(|&i| text(names, u32_at(header(i))) == name).expect("the section exists")
    };
    let symbols = section(".symtab");
    let symbol_names = u32_at(header(symbols) + 40) as usize;
    let mut found: BTreeMap<String, Usage> = BTreeMap::new();
    let mut records = bytes(section(".nv.info"));
    while !records.is_empty() {
        let at = records.start;
        let (format, attribute, size) = (cubin[at], cubin[at + 1], usize::from(u16_at(at + 2)));
        records.start += if format == PAIR { 4 + size } else { 4 };
        if format == PAIR && size == 8 {
            let symbol = bytes(symbols).start + 24 * u32_at(at + 4) as usize;
            let usage = found.entry(text(symbol_names, u32_at(symbol)).to_owned()).or_default();
            match attribute {
                REGISTERS => usage.registers = u32_at(at + 8),
                FRAME_BYTES => usage.frame_bytes = u32_at(at + 8),
                _ => {}
            }
        }
    }
    // What kernels call (a division's slow path, say) is listed too, with `$` in its name.
    assert!(found.values().all(|usage| usage.frame_bytes == 0), "a stack is used: {found:?}");
    found.retain(|name, _| !name.contains('$'));
    found
}

/// Registers per kernel from the compiler's log, which must report no stack and no spills.
fn reported(log: &str) -> BTreeMap<String, u32> {
    let mut found = BTreeMap::new();
    let mut kernel = None;
    for line in log.lines() {
        if let Some(name) = line.split("Function properties for ").nth(1) {
            kernel = Some(name.trim().to_owned());
        } else if line.contains("bytes stack frame") {
            let clean = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads";
            assert!(line.trim().ends_with(&format!(" {clean}")), "{kernel:?}: {line}");
        } else if let Some(rest) = line.split(": Used ").nth(1) {
            let n = rest.split(' ').next().and_then(|n| n.parse().ok()).expect("a number");
            found.insert(kernel.take().expect("named before"), n);
        }
    }
    found
}

/// So that as many blocks have room on a multiprocessor as `__launch_bounds__` promises.
fn most_registers(program: Program, kernel: &str) -> u32 {
    let size = kernel.rsplit('_').next().expect("never empty");
    match (program, size) {
        // Blocks of 256 threads: two, and one for the most rows.
        (Program::Multiply(_), "16") | (Program::Multiply(Format::F32), "8") => 255,
        // Blocks of 128 threads: four, three, two.
        (Program::Nf4Rows(_), "64") => 255,
        (Program::Nf4Rows(_), "32") | (Program::Attention(_), "4" | "8") => 168,
        _ => 128,
    }
}

#[test]
fn every_kernel_compiles_for_every_generation_without_spills() {
    if !nvrtc_is_here() {
        return;
    }
    let check = |program: Program, arch: u32| -> Vec<(String, u32)> {
        let compiled = nvrtc::compile(program, Arch(arch))
            .unwrap_or_else(|error| panic!("{program:?} for sm_{arch}: {error}"));
        let (usage, reported) = (usage(&compiled.image), reported(&compiled.log));
        assert_eq!(usage.len(), program.kernels().len(), "{program:?}: {usage:?}");
        program
            .kernels()
            .into_iter()
            .map(|kernel| {
                let Usage { registers, .. } = usage[&kernel];
                assert_eq!(registers, reported[&kernel], "{kernel} for sm_{arch}");
                let most = most_registers(program, &kernel);
                assert!(
                    (8..=most).contains(&registers),
                    "{kernel} for sm_{arch}: {registers} registers"
                );
                (kernel, registers)
            })
            .collect()
    };
    let mut table: BTreeMap<String, Vec<u32>> = BTreeMap::new();
    for &arch in architectures() {
        let check = &check;
        let programs: Vec<_> = std::thread::scope(|scope| {
            let running: Vec<_> = Program::ALL
                .into_iter()
                .filter(|program| program.runs_on(arch))
                .map(|program| scope.spawn(move || check(program, arch)))
                .collect();
            running.into_iter().map(|thread| thread.join().expect("see above")).collect()
        });
        for (kernel, registers) in programs.into_iter().flatten() {
            table.entry(kernel).or_default().push(registers);
        }
    }
    println!("registers for sm_{:?}, no spills", architectures());
    for (kernel, registers) in table {
        println!("{kernel:20} {registers:?}");
    }
}

// ---- instructions, counted in the machine code ----

/// The instructions of every kernel, as nvdisasm writes them, predicates taken off.
fn disassembled(program: Program, arch: u32) -> BTreeMap<String, Vec<String>> {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../.deps/nvdisasm/nvidia");
    let nvdisasm = fs_err::read_dir(root)
        .expect("setup-nvrtc.sh has fetched it")
        .map(|folder| folder.expect("readable").path().join("bin/nvdisasm"))
        .find(|path| path.exists())
        .expect("the wheel has nvdisasm");
    let image = nvrtc::compile(program, Arch(arch)).expect("compiles").image;
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    fs_err::write(file.path(), image).expect("writable");
    let output = Command::new(nvdisasm).arg("-c").arg(file.path()).output().expect("nvdisasm runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut kernels: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut kernel = String::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        if let Some(name) = line.strip_prefix(".text.").and_then(|rest| rest.strip_suffix(':')) {
            name.clone_into(&mut kernel);
        }
        // /*0170*/ @!P0 LDG.E.128 R36, [R36.64] ;
        let code = line.trim().strip_prefix("/*").and_then(|rest| rest.split_once("*/"));
        if let Some((_, code)) = code
            && code.ends_with(';')
        {
            let code = code.trim();
            let bare =
                if code.starts_with('@') { code.split_once(' ').map(|pair| pair.1) } else { None };
            kernels.entry(kernel.clone()).or_default().push(bare.unwrap_or(code).trim().to_owned());
        }
    }
    kernels
}

/// docs/cuda.md derives the budgets: what the issue rate allows beside the memory's.
#[test]
fn instructions_a_weight_stay_within_the_budget() {
    if !nvrtc_is_here() {
        return;
    }
    // A lane's part of one turn: four outputs times 32 columns.
    const WEIGHTS: f64 = 128.0;
    for arch in [80, 90] {
        for (kernel, code) in disassembled(Program::Nf4Rows(Format::BF16), arch) {
            let rows: usize = kernel.rsplit('_').next().expect("a number").parse().expect("rows");
            let products: Vec<usize> =
                (0..code.len()).filter(|&at| code[at].starts_with("HMMA")).collect();
            let (first, last) = (products[0], products[products.len() - 1]);
            // The turn's arithmetic lies between the barrier before its first product and its last one.
            let start =
                (0..first).rfind(|&at| code[at].starts_with("BAR.SYNC")).expect("a barrier");
            let turn = &code[start..=last];
            let count = |name: &str| turn.iter().filter(|code| code.starts_with(name)).count();
            assert_eq!(
                products.len(),
                2 * rows,
                "{kernel} for sm_{arch}: one product a pair of codes"
            );
            let a_weight = turn.len() as f64 / WEIGHTS;
            let budget = 4.6 + rows as f64 / 40.0;
            println!(
                "{kernel} for sm_{arch}: {a_weight:.2} instructions a weight, budget {budget}"
            );
            assert!(a_weight <= budget, "{kernel} for sm_{arch}: {a_weight} > {budget}");
            // One look-up a weight; x comes 16 bytes at a time.
            assert_eq!(count("LDS.128"), rows / 2, "{kernel} for sm_{arch}");
            assert!(count("LDS") <= 128 + 4 + rows / 2, "{kernel} for sm_{arch}: {}", count("LDS"));
            // The next turn's codes, 16 bytes at a time, are asked for before this turn's arithmetic.
            let ahead = code[..start].iter().filter(|code| code.starts_with("LDG.E.128")).count();
            assert!(
                ahead >= 8,
                "{kernel} for sm_{arch}: four at the start, four in the loop: {ahead}"
            );
            assert!(!code.iter().any(|code| code.starts_with("LDL") || code.starts_with("STL")));
        }
    }
}

#[test]
fn attention_moves_sixteen_bytes_at_a_time() {
    if !nvrtc_is_here() {
        return;
    }
    for (kernel, code) in disassembled(Program::Attention(Format::BF16), 80) {
        let count = |name: &str| code.iter().filter(|code| code.starts_with(name)).count();
        // Keys past the L1 cache into shared memory, values into registers, eight of a thread's at a time.
        assert!(count("LDGSTS.E.BYPASS.128") >= 4, "{kernel}: {}", count("LDGSTS"));
        assert!(count("LDG.E.128") >= 16, "{kernel}: {}", count("LDG.E.128"));
        // The first eight are under way before the scores begin with the first multiplication of a key.
        let first = code.iter().position(|code| code.starts_with("FFMA")).expect("scores");
        let ahead = code[..first].iter().filter(|code| code.starts_with("LDG.E.128")).count();
        assert_eq!(ahead, 8, "{kernel}");
        assert!(!code.iter().any(|code| code.starts_with("LDL") || code.starts_with("STL")));
    }
}

#[test]
fn bf16_on_tensor_cores_is_refused_for_turing() {
    if !nvrtc_is_here() {
        return;
    }
    let program = Program::Nf4Rows(Format::BF16);
    assert!(!program.runs_on(75) && program.runs_on(80));
    let error = nvrtc::compile(program, Arch(75)).expect_err("no such instruction");
    assert!(error.to_string().contains("multiply.cu does"), "{error}");
}

#[test]
fn an_older_gpu_is_refused_and_a_newer_one_gets_ptx() {
    if !nvrtc_is_here() {
        return;
    }
    let error = nvrtc::compile(Program::Quantize, Arch(70)).expect_err("CUDA 13 dropped Volta");
    assert!(matches!(error, CudaError::Arch { arch: 70, .. }), "{error}");
    let ptx = nvrtc::compile(Program::Quantize, Arch(999)).expect("compiles").image;
    let text = String::from_utf8(ptx).expect("PTX is text");
    assert!(text.contains(".visible .entry quantize_bf16") && text.ends_with('\0'));
}

#[test]
fn machine_code_is_cached_on_disk() {
    if !nvrtc_is_here() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let cache = folder.path().join("deeper");
    let image = || nvrtc::image(Program::Dequantize, Arch(80), Some(&cache)).expect("compiles");
    let (first, cached) = image();
    assert!(!cached);
    let (second, cached) = image();
    assert!(cached && first == second);
    assert_eq!(fs_err::read_dir(&cache).expect("was made").count(), 1, "no temporary file is left");
    // A cache that cannot be written costs time only.
    let file = folder.path().join("file");
    fs_err::write(&file, "").expect("writable");
    let (third, cached) =
        nvrtc::image(Program::Dequantize, Arch(80), Some(&file)).expect("compiles");
    assert!(!cached && third == first);
}

// ---- the kit for a machine with a GPU and no Rust ----

/// It checks that it knows every file of the folder; here, that it knows every kernel of every file.
#[test]
fn the_kit_knows_every_kernel() {
    let kit = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/gpu/kernels.py");
    let output = Command::new("python3").arg(kit).arg("--list").output().expect("python3 runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let listed = String::from_utf8(output.stdout).expect("names");
    let mut ours: Vec<String> = Program::ALL.iter().flat_map(|program| program.kernels()).collect();
    ours.sort();
    assert_eq!(listed.lines().collect::<Vec<_>>(), ours);
}

// ---- without a GPU ----

fn packed_on_the_cpu() -> Nf4Tensor {
    Nf4Tensor {
        codes: Tensor::zeros([2 * 64 / 2], (Kind::Uint8, Device::Cpu)),
        absmax: Scales::Single(Tensor::ones([2], (Kind::Float, Device::Cpu))),
        codebook: Tensor::zeros([16], (Kind::Float, Device::Cpu)),
        outputs: 2,
        inputs: 64,
        block_size: 64,
    }
}

#[test]
fn tensors_on_the_cpu_are_refused() {
    let weight = packed_on_the_cpu();
    let x = Tensor::zeros([1, 64], (Kind::Float, Device::Cpu));
    let errors = [
        cuda::dequantize(&Packed::from(&weight), Kind::BFloat16).expect_err("on the CPU"),
        cuda::multiply(&x, &Packed::from(&weight)).expect_err("on the CPU"),
        cuda::quantize(&x, 64).expect_err("on the CPU"),
        cuda::nf4_linear(&x, &weight).expect_err("on the CPU"),
    ];
    for error in errors {
        assert!(
            error.to_string().contains("expected a tensor on a GPU, got one on Cpu"),
            "{error}"
        );
    }
}

#[test]
fn a_machine_without_a_gpu_is_told_what_is_missing() {
    match cuda::install(0, Kind::BFloat16) {
        Ok(()) => println!("skipped: this machine has a GPU"),
        Err(Error::Cuda(error @ (CudaError::Missing { .. } | CudaError::Driver { .. }))) => {
            println!("{error}");
        }
        Err(error) => panic!("{error}"),
    }
}

/// libtorch itself would panic.
#[test]
fn a_model_for_a_gpu_that_is_not_there_is_refused_and_the_cpu_still_works() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-chat");
    let source = Source::Directory(model);
    for nf4 in [None, Some(Nf4Options::default())] {
        let options = LoadOptions { device: Device::Cuda(97), dtype: Kind::BFloat16, nf4 };
        let error = Model::load(&source, &options).expect_err("nobody has 98 GPUs");
        assert!(matches!(error, Error::Cuda(_)), "{error}");
        assert!(error.to_string().contains("--device cpu"), "{error}");
    }
    let model = Model::load(&source, &LoadOptions::default()).expect("the CPU needs no GPU");
    assert_eq!(model.decoder.device(), Device::Cpu);
}
