//! Threads that wait for their next work sleep soon: between two pieces of work a process uses hardly any time of the CPU.

#![expect(clippy::unwrap_used, reason = "a test: a failure here is the finding")]

use std::process::{Command, Stdio};
use std::time::Duration;

use arete_model::machine::{Machine, Waiting, allowed_cores};
use arete_model::{Device, Kind, Tensor, machine};

/// Set for the processes that measure.
const MEASURE: &str = "ARETE_TEST_WAITING";
/// Pieces of work, each followed by a rest.
const N_PIECES: u32 = 40;
/// As long as libgomp's threads spin by themselves, and some more.
const REST: Duration = Duration::from_millis(20);

/// Time of the CPU that this process has used, in the kernel's ticks (ten milliseconds).
fn ticks() -> u64 {
    let stat = fs_err::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    fields[11..13].iter().map(|field| field.parse::<u64>().unwrap()).sum()
}

#[test]
fn measured_here() {
    if std::env::var_os(MEASURE).is_none() {
        return; // the test below starts this one
    }
    machine::set_threads(2);
    let waiting = Machine::look().waiting;
    let ones = Tensor::ones([1 << 16], (Kind::Float, Device::Cpu));
    let before = ticks();
    for _ in 0..N_PIECES {
        let _ = &ones + 1.0; // split between the threads
        std::thread::sleep(REST);
    }
    println!("ticks {} {waiting:?}", ticks() - before);
}

/// Ticks of a process with these variables, and how it says that its threads wait.
fn measured(variables: &[(&str, &str)]) -> (u64, String) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "measured_here", "--nocapture"])
        .env_remove("OMP_WAIT_POLICY")
        .env_remove("GOMP_SPINCOUNT")
        .env_remove("OMP_NUM_THREADS")
        .env(MEASURE, "1")
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let words = text.lines().find_map(|line| line.split_once("ticks ")).unwrap().1;
    let (ticks, waiting) = words.split_once(' ').unwrap();
    (ticks.parse().unwrap(), waiting.to_owned())
}

#[test]
fn waiting_threads_use_no_core() {
    if allowed_cores() < 2 {
        return; // libgomp spins briefly by itself where threads outnumber cores
    }
    let (brief, how) = measured(&[]);
    assert_eq!(how, format!("{:?}", Waiting::Briefly));
    let (spinning, how) = measured(&[("GOMP_SPINCOUNT", "100000000")]);
    assert_eq!(how, format!("{:?}", Waiting::FromEnvironment));
    // A thread that spins uses the whole of the rest, on a busy machine what it gets of it.
    assert!(4 * brief < spinning, "{brief} ticks, {spinning} where threads spin");
}
