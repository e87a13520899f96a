//! Runs the fuzz targets, each in a process of its own: over its corpus first, then over inputs made from that.
//!
//! `cargo test --test fuzz` makes a few hundred to thousand inputs a target, the same ones every time. With `--minutes M` (or
//! `ARETE_TORTURE=1` and the filter `torture`, five minutes) each runs so long. An input that breaks a promise is left in
//! `target/tmp/fuzz`; `--input FILE TARGET` tries one again.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program of its own")]

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use arete_tests::fuzz::{Mutator, Outcome, Place, Target, targets};
use fs_err as fs;

/// Address space that one input may add, in KiB.
const MAX_MEMORY_KIB: u64 = 1 << 20;
/// Address space of the process, in KiB: no input takes the machine's memory.
const MAX_PROCESS_KIB: u64 = 12 << 20;
/// Longest that one input may take, also where our crates are compiled without optimisation.
const MAX_TIME: Duration = Duration::from_secs(5);
/// After so long without a new input a process hangs.
const HANGS: Duration = Duration::from_secs(60);

/// How much is run.
#[derive(Clone, Copy, Debug)]
enum Amount {
    /// The target's own number of inputs.
    Quick,
    /// Until so long has passed.
    Time(Duration),
}

fn main() -> ExitCode {
    match run(std::env::args().skip(1).collect()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: Vec<String>) -> Result<ExitCode> {
    let mut filters = Vec::new();
    let mut flags = BTreeMap::new();
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            "--minutes" | "--child" | "--input" | "--progress" | "--from" | "--test-threads" => {
                flags.insert(
                    word.clone(),
                    words.next().with_context(|| format!("{word}: no value"))?,
                );
            }
            word if word.starts_with("--") => {} // flags of cargo's own tests
            _ => filters.push(word),
        }
    }
    let minutes = |text: &String| -> Result<Duration> {
        Ok(Duration::from_secs_f64(60.0 * text.parse::<f64>().context("--minutes")?))
    };
    let mut amount = match flags.get("--minutes") {
        Some(text) => Amount::Time(minutes(text)?),
        None => Amount::Quick,
    };
    if let Some(path) = flags.get("--input") {
        let [name] = &filters[..] else { bail!("--input FILE TARGET") };
        return one_input(named(name)?, Path::new(path));
    }
    if let Some(name) = flags.get("--child") {
        let progress = flags.get("--progress").context("--progress")?;
        let from = flags.get("--from").map_or(Ok(0), |from| from.parse())?;
        return child(named(name)?, amount, from, Path::new(progress));
    }
    if filters.iter().any(|filter| filter == "torture") {
        filters.retain(|filter| filter != "torture");
        if std::env::var_os("ARETE_TORTURE").is_some() {
            amount = Amount::Time(Duration::from_secs(5 * 60));
        }
    }
    let all = targets();
    let wanted: Vec<&Target> = (all.into_iter())
        .filter(|target| {
            filters.is_empty() || filters.iter().any(|f| target.name.contains(f.as_str()))
        })
        .collect();
    Ok(parent(&wanted, amount))
}

fn named(name: &str) -> Result<&'static Target> {
    let found = targets().into_iter().find(|target| target.name == name);
    found.with_context(|| format!("{name}: no such target"))
}

/// Runs every target in a process of its own, as many at once as there are cores.
fn parent(wanted: &[&'static Target], amount: Amount) -> ExitCode {
    let waiting = Mutex::new(wanted.iter());
    let lines = Mutex::new(Vec::new());
    let n_failed = Mutex::new(0);
    let n_cores = match amount {
        Amount::Quick => std::thread::available_parallelism().map_or(1, usize::from),
        Amount::Time(_) => 1,
    };
    let work = || {
        loop {
            let next = waiting.lock().expect("no panic holds it").next();
            let Some(&target) = next else { return };
            let outcome = watched(target, amount);
            let line = match &outcome {
                Ok(report) => {
                    println!("test {} ... ok ({report})", target.name);
                    format!("| `{}` | {} | {report} |", target.name, target.reads)
                }
                Err(error) => {
                    println!("test {} ... FAILED\n{error:#}", target.name);
                    *n_failed.lock().expect("no panic holds it") += 1;
                    format!("| `{}` | {} | FAILED |", target.name, target.reads)
                }
            };
            lines.lock().expect("no panic holds it").push(line);
        }
    };
    println!("\nrunning {} tests", wanted.len());
    std::thread::scope(|scope| {
        for _ in 0..n_cores {
            scope.spawn(work);
        }
    });
    if let Amount::Time(_) = amount {
        println!("\n| target | reads | result |\n|---|---|---|");
        lines.into_inner().expect("no panic holds it").iter().for_each(|line| println!("{line}"));
    }
    let n_failed = n_failed.into_inner().expect("no panic holds it");
    let verdict = if n_failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {verdict}. {} passed; {n_failed} failed; 0 ignored; 0 measured; 0 filtered out",
        wanted.len() - n_failed
    );
    if n_failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs a target's process, and ends it if an input does not end.
fn watched(target: &Target, amount: Amount) -> Result<String> {
    let scratch = tempfile::tempdir()?;
    let (progress, output) = (scratch.path().join("progress"), scratch.path().join("output"));
    fs::write(&progress, [0; 8])?;
    let own = std::env::current_exe()?;
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("ulimit -v {MAX_PROCESS_KIB}; exec \"$@\"")).arg("sh").arg(own);
    command.args(["--child", target.name]).arg("--progress").arg(&progress);
    if let Amount::Time(time) = amount {
        command.arg("--minutes").arg((time.as_secs_f64() / 60.0).to_string());
    }
    let file = fs::File::create(&output)?.into_parts().0;
    command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
    command.env("OMP_NUM_THREADS", "1");
    let mut process = command.spawn()?;
    let number = || fs::read(&progress).map_or(u64::MAX, |bytes| number_of(&bytes));
    let (mut last, mut since) = (number(), Instant::now());
    let status = loop {
        if let Some(status) = process.try_wait()? {
            break status;
        }
        std::thread::sleep(Duration::from_millis(20));
        let now = number();
        if now != last {
            (last, since) = (now, Instant::now());
        }
        if since.elapsed() > HANGS {
            process.kill()?;
            process.wait()?;
            bail!(
                "input {now} of `{}` does not end: {}",
                target.name,
                kept(target, now)?.display()
            );
        }
    };
    let text = fs::read_to_string(&output).unwrap_or_default();
    if status.success() {
        return Ok(text.lines().last().unwrap_or_default().to_owned());
    }
    let tail: Vec<&str> = text.lines().rev().take(12).collect();
    let tail: Vec<&str> = tail.into_iter().rev().collect();
    let input = kept(target, number())?;
    bail!("{status} at input {} ({})\n{}", number(), input.display(), tail.join("\n"))
}

fn number_of(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// The input of a number: the seeds first, then what is made of them.
fn input_of(target: &Target, seeds: &[Vec<u8>], number: u64) -> Vec<u8> {
    match usize::try_from(number).ok().and_then(|number| seeds.get(number)) {
        Some(seed) => seed.clone(),
        None => Mutator::new(seeds, target.kind, target.name, number).input(),
    }
}

fn seeds_of(target: &Target) -> Result<Vec<Vec<u8>>> {
    Ok(target.seeds()?.into_iter().map(|(_, bytes)| bytes).collect())
}

/// Leaves an input where it can be looked at.
fn kept(target: &Target, number: u64) -> Result<PathBuf> {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
    fs::create_dir_all(&dir)?;
    let path = dir.join(format!("{}-{number}", target.name));
    fs::write(&path, input_of(target, &seeds_of(target)?, number))?;
    Ok(path)
}

/// Tries input after input; the number of each is written down before it is tried.
fn child(target: &Target, amount: Amount, from: u64, progress: &Path) -> Result<ExitCode> {
    let seeds = seeds_of(target)?;
    let place = Place::new()?;
    let progress = fs::OpenOptions::new().write(true).open(progress)?.into_parts().0;
    let began = Instant::now();
    std::panic::set_hook(Box::new(|_| {})); // those of libraries are caught, ours are told below
    let mut counts = [0_u64; 2];
    let end = match amount {
        Amount::Quick => seeds.len() as u64 + target.n_quick,
        Amount::Time(_) => u64::MAX,
    };
    // What the first input loads (libtorch's tables, say) is no input's.
    let _ = catch_unwind(AssertUnwindSafe(|| target.run(&place, &seeds[0])));
    let mut peak = peak_kib();
    for number in from..end {
        if matches!(amount, Amount::Time(time) if began.elapsed() > time) {
            break;
        }
        progress.write_all_at(&number.to_le_bytes(), 0)?;
        let input = input_of(target, &seeds, number);
        let start = Instant::now();
        let outcome = tried(target, &place, &input)?;
        let took = start.elapsed();
        ensure!(took < MAX_TIME, "it took {took:?}");
        let now = peak_kib();
        ensure!(now < peak + MAX_MEMORY_KIB, "it took {} MiB of address space", (now - peak) >> 10);
        peak = now;
        counts[usize::from(outcome == Outcome::Accepted)] += 1;
    }
    let [n_refused, n_accepted] = counts;
    let s = began.elapsed().as_secs_f64();
    println!("{} inputs, {n_accepted} of them accepted, {s:.1} s", n_refused + n_accepted);
    Ok(ExitCode::SUCCESS)
}

fn tried(target: &Target, place: &Place, input: &[u8]) -> Result<Outcome> {
    match catch_unwind(AssertUnwindSafe(|| target.run(place, input))) {
        Ok(outcome) => outcome,
        Err(panic) => {
            let text = (panic.downcast_ref::<String>().map(String::as_str))
                .or_else(|| panic.downcast_ref::<&str>().copied());
            bail!("panic: {}", text.unwrap_or("without a message"))
        }
    }
}

fn one_input(target: &Target, path: &Path) -> Result<ExitCode> {
    let outcome = tried(target, &Place::new()?, &fs::read(path)?)?;
    println!("{outcome:?}");
    Ok(ExitCode::SUCCESS)
}

/// Most address space that this process has had.
fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}
