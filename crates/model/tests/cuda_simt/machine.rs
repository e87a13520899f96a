//! The machine's programs, one a kernel file, and their runs.

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use arete_model::cuda::plan::{Argument, Launch, Program};
use sha2::{Digest, Sha256};

pub(crate) const CRATE: &str = env!("CARGO_MANIFEST_DIR");

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Build {
    Plain,
    Sanitised,
}

impl Build {
    fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Sanitised => "sanitised",
        }
    }

    fn flags(self) -> &'static [&'static str] {
        match self {
            Self::Plain => &["-O2"],
            Self::Sanitised => {
                &["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
            }
        }
    }
}

/// The program for the file of `program`, compiled when its sources change.
fn machine(program: Program, build: Build) -> PathBuf {
    type Cell = Arc<OnceLock<PathBuf>>;
    static MACHINES: OnceLock<Mutex<HashMap<(&'static str, Build), Cell>>> = OnceLock::new();
    let cell = {
        let machines = MACHINES.get_or_init(Mutex::default);
        let mut machines = machines.lock().unwrap_or_else(PoisonError::into_inner);
        machines.entry((program.name(), build)).or_default().clone()
    };
    cell.get_or_init(|| compile(program.name(), build)).clone()
}

fn compile(file: &'static str, build: Build) -> PathBuf {
    let of_file = Program::ALL.iter().filter(|program| program.name() == file);
    let kernels: Vec<String> = of_file
        .flat_map(|program| program.kernels())
        .map(|kernel| format!("KERNEL({kernel})"))
        .collect();
    let sources = [
        format!("{CRATE}/tests/simt/main.cpp"),
        format!("{CRATE}/tests/simt/simt.h"),
        format!("{CRATE}/src/cuda/kernels/common.cuh"),
        format!("{CRATE}/src/cuda/kernels/{file}"),
    ];
    let always = ["-std=c++17", "-ffp-contract=off", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"];
    let arguments: Vec<String> = always
        .iter()
        .chain(build.flags())
        .map(ToString::to_string)
        .chain([
            format!("-I{CRATE}/src/cuda/kernels"),
            format!("-I{CRATE}/tests/simt"),
            format!("-DARETE_FILE=\"{file}\""),
            format!("-DARETE_KERNELS={}", kernels.join(", ")),
            sources[0].clone(),
        ])
        .collect();
    let mut hash = Sha256::new();
    for part in &arguments {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    for source in &sources {
        hash.update(fs_err::read(source).expect("the kernels exist"));
    }
    let hash: String = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let stem = format!("simt-{}-{}-", file.trim_end_matches(".cu"), build.name());
    let out = folder.join(format!("{stem}{hash}"));
    if out.exists() {
        return out;
    }
    for entry in fs_err::read_dir(folder).expect("cargo made the folder").flatten() {
        if entry.file_name().to_string_lossy().starts_with(&stem) {
            let _ = fs_err::remove_file(entry.path()); // another process may have been quicker
        }
    }
    let unfinished = folder.join(format!("unfinished-{stem}{}", std::process::id()));
    let status = Command::new("g++").args(&arguments).arg("-o").arg(&unfinished).status();
    assert!(status.expect("g++ runs").success(), "g++ refused {file}");
    fs_err::rename(&unfinished, &out).expect("the same folder");
    out
}

/// A launch and its buffers: address 1 is the first one.
#[derive(Clone)]
pub(crate) struct Job {
    pub(crate) launch: Launch,
    pub(crate) buffers: Vec<Vec<u8>>,
}

/// The machine's input for the jobs, one after another, threads and blocks in the given order.
fn input_of(jobs: &[Job], order: u64) -> Vec<u8> {
    let mut input = Vec::new();
    for Job { launch, buffers } in jobs {
        let mut number = |value: u32| input.extend(value.to_le_bytes());
        number(launch.kernel.len() as u32);
        input.extend(launch.kernel.as_bytes());
        let mut number = |value: u32| input.extend(value.to_le_bytes());
        number(launch.grid[0]);
        number(launch.grid[1]);
        number(launch.threads);
        number(launch.shared_bytes);
        input.extend(order.to_le_bytes());
        input.extend((launch.arguments.len() as u32).to_le_bytes());
        for argument in &launch.arguments {
            match *argument {
                Argument::Int(value) => {
                    input.push(0);
                    input.extend(value.to_le_bytes());
                }
                Argument::Float(value) => {
                    input.push(0);
                    input.extend(value.to_bits().to_le_bytes());
                }
                Argument::Long(value) => {
                    input.push(1);
                    input.extend(value.to_le_bytes());
                }
                Argument::Address(0) => input.push(3),
                Argument::Address(address) => {
                    let buffer = &buffers[address as usize - 1];
                    input.push(2);
                    input.extend((buffer.len() as u64).to_le_bytes());
                    input.extend(buffer);
                }
            }
        }
    }
    input
}

/// What the machine does with the jobs, all of one kernel file.
pub(crate) fn output_of(build: Build, jobs: &[Job], order: u64) -> Output {
    let input = input_of(jobs, order);
    let mut child = Command::new(machine(jobs[0].launch.program, build))
        .env("ASAN_OPTIONS", "detect_leaks=0")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the machine starts");
    let mut stdin = child.stdin.take().expect("piped");
    let writer = std::thread::spawn(move || {
        // A machine that stops early closes the pipe; its exit status says so.
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output().expect("the machine runs");
    writer.join().expect("the writer does not panic");
    output
}

/// The buffers after the launches, job by job.
pub(crate) fn run(build: Build, jobs: &[Job], order: u64) -> Vec<Vec<Vec<u8>>> {
    let output = output_of(build, jobs, order);
    let messages = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "the machine stopped with {}: {messages}", output.status);
    let mut rest = &output.stdout[..];
    let outputs = jobs
        .iter()
        .map(|job| {
            let mut buffers = job.buffers.clone();
            for argument in &job.launch.arguments {
                if let Argument::Address(address @ 1..) = *argument {
                    let buffer = &mut buffers[address as usize - 1];
                    let (own, others) = rest.split_at(buffer.len());
                    buffer.copy_from_slice(own);
                    rest = others;
                }
            }
            buffers
        })
        .collect();
    assert!(rest.is_empty(), "the machine wrote more than its buffers");
    outputs
}

/// Runs under three orders, which must agree to the bit in every buffer; a missing barrier would show.
pub(crate) fn run_in_all_orders(build: Build, jobs: &[Job]) -> Vec<Vec<Vec<u8>>> {
    let outputs = run(build, jobs, 0);
    for order in [1, 20_240_607] {
        for ((job, first), other) in jobs.iter().zip(&outputs).zip(run(build, jobs, order)) {
            assert!(*first == other, "{} depends on the order of threads", job.launch.kernel);
        }
    }
    outputs
}
