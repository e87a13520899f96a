//! `arete launch`: one program as several processes on this machine, or on each of several, each told which one it is.
//!
//! The variables are torchrun's, so any program that knows these can be launched. Lines are shown with the rank they come from,
//! signals are passed on, and when one process fails the others are ended too; its exit code is ours.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use arete_model::machine;
use arete_stage::cli::printable;
use arete_stage::exit::Usage;
use arete_training::ranks::LAUNCHED;
use clap::Args;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// How long the others have to end by themselves when one has failed: they tell each other.
const GRACE: Duration = Duration::from_secs(10);
/// And then, after SIGTERM, before they are killed.
const LAST_GRACE: Duration = Duration::from_secs(10);
/// Between two looks at the processes.
const LOOK: Duration = Duration::from_millis(20);

/// What is launched.
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Example:\n  arete launch --processes 2 -- arete-reward train --preferences runs/demo/preferences \
    --conversations runs/demo/conversations --model runs/demo/sft/merged --output runs/demo/reward"
)]
pub struct LaunchArgs {
    /// How many processes on this machine
    #[arg(long, short = 'n', value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub processes: u64,
    /// How many machines run this command, with as many processes each
    #[arg(long, value_name = "N", default_value_t = 1, requires = "address",
          value_parser = clap::value_parser!(u64).range(1..=4096))]
    pub nodes: u64,
    /// Which machine this is, from 0
    #[arg(long, value_name = "N", default_value_t = 0, requires = "nodes")]
    pub node_rank: u64,
    /// Where rank 0 listens: name or address of machine 0, and a free port there [default: this machine alone]
    #[arg(long, value_name = "HOST:PORT")]
    pub address: Option<String>,
    /// The program and its arguments; a program of Arete's is found beside this one
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// Runs the processes to their end; the exit code of the first that failed, else 0.
///
/// # Errors
///
/// A program that cannot be started.
pub fn run(arguments: &LaunchArgs) -> Result<u8> {
    let n = usize::try_from(arguments.processes)?;
    let (program, rest) =
        arguments.command.split_first().ok_or_else(|| Usage("no command is given".to_owned()))?;
    let program = beside(program);
    let (host, port) = address(arguments)?;
    let first = usize::try_from(arguments.node_rank)? * n;
    let n_ranks = usize::try_from(arguments.nodes)? * n;
    let threads = (machine::allowed_cores() / n).max(1);
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let mut ranks = Vec::new();
    for local_rank in 0..n {
        let rank = first + local_rank;
        let mut command = Command::new(&program);
        command
            .args(rest)
            .env("RANK", rank.to_string())
            .env("LOCAL_RANK", local_rank.to_string())
            .env("WORLD_SIZE", n_ranks.to_string())
            .env("LOCAL_WORLD_SIZE", n.to_string())
            .env("MASTER_ADDR", &host)
            .env("MASTER_PORT", port.to_string())
            .env(LAUNCHED, "1")
            .stdin(Stdio::piped()) // held open: its end tells that this program is gone
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0); // the terminal's Ctrl-C comes to us alone, and each process gets it once
        if std::env::var_os("OMP_NUM_THREADS").is_none() {
            command.env("OMP_NUM_THREADS", threads.to_string());
        }
        match command.spawn() {
            Ok(child) => ranks.push(Rank::new(rank, child)),
            Err(error) => {
                end(&mut ranks, Duration::ZERO);
                return Err(error).with_context(|| format!("starting {}", program.display()));
            }
        }
    }
    let code = wait(&mut ranks, &mut signals);
    for rank in ranks {
        rank.readers.into_iter().for_each(|reader| drop(reader.join()));
    }
    Ok(code)
}

/// A process and the threads that show its lines.
struct Rank {
    rank: usize,
    child: Child,
    status: Option<ExitStatus>,
    readers: Vec<std::thread::JoinHandle<()>>,
}

impl Rank {
    fn new(rank: usize, mut child: Child) -> Self {
        let mut readers = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            readers.push(std::thread::spawn(move || show(rank, stdout, &mut std::io::stdout())));
        }
        if let Some(stderr) = child.stderr.take() {
            readers.push(std::thread::spawn(move || show(rank, stderr, &mut std::io::stderr())));
        }
        Self { rank, child, status: None, readers }
    }

    fn is_running(&self) -> bool {
        self.status.is_none()
    }

    /// Sends a signal to the process and what it started.
    fn signal(&self, signal: i32) {
        if self.is_running() {
            // The standard library sends SIGKILL alone.
            let kill = format!(
                "kill -s {signal} -- -{0} 2>/dev/null || kill -s {signal} {0}",
                self.child.id()
            );
            let _ = Command::new("sh").args(["-c", &kill]).stderr(Stdio::null()).status();
        }
    }
}

/// Copies lines with the rank before each.
fn show(rank: usize, from: impl Read, to: &mut impl Write) {
    let mut reader = BufReader::new(from);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
        let text = printable(String::from_utf8_lossy(&line).trim_end());
        // One write a line; whoever read them may be gone.
        let _ = to.write_all(format!("[{rank}] {text}\n").as_bytes());
        line.clear();
    }
}

/// Waits for all; the first exit code that is none of success.
fn wait(ranks: &mut [Rank], signals: &mut Signals) -> u8 {
    let mut failed: Option<u8> = None;
    loop {
        for signal in signals.pending() {
            ranks.iter().for_each(|rank| rank.signal(signal));
        }
        for rank in ranks.iter_mut().filter(|rank| rank.is_running()) {
            let Ok(Some(status)) = rank.child.try_wait() else { continue };
            rank.status = Some(status);
            if !status.success() && failed.is_none() {
                failed = Some(code_of(status));
                let _ = writeln!(std::io::stderr(), "rank {} ended first: {status}", rank.rank);
            }
        }
        if ranks.iter().all(|rank| !rank.is_running()) {
            return failed.unwrap_or(0);
        }
        if let Some(code) = failed {
            end(ranks, GRACE);
            return code;
        }
        std::thread::sleep(LOOK);
    }
}

/// Ends all that still run: in time by themselves, else by SIGTERM, else by SIGKILL.
fn end(ranks: &mut [Rank], grace: Duration) {
    await_all(ranks, grace);
    ranks.iter().for_each(|rank| rank.signal(SIGTERM));
    await_all(ranks, LAST_GRACE);
    for rank in ranks.iter_mut().filter(|rank| rank.is_running()) {
        let _ = rank.child.kill();
        rank.status = rank.child.wait().ok();
    }
}

fn await_all(ranks: &mut [Rank], time: Duration) {
    let started = Instant::now();
    while ranks.iter().any(Rank::is_running) && started.elapsed() < time {
        for rank in ranks.iter_mut().filter(|rank| rank.is_running()) {
            rank.status = rank.child.try_wait().ok().flatten();
        }
        std::thread::sleep(LOOK);
    }
}

fn code_of(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}

/// A program of that name beside this one, if there is one.
fn beside(program: &str) -> PathBuf {
    let own = std::env::current_exe().ok();
    let beside = own.and_then(|own| Some(own.parent()?.join(program)));
    let is_name = !program.contains('/') && program.starts_with("arete");
    beside.filter(|path| is_name && path.is_file()).unwrap_or_else(|| program.into())
}

/// Where rank 0 listens: as it is said, else a port of this machine that nobody listens on now.
fn address(arguments: &LaunchArgs) -> Result<(String, u16)> {
    if arguments.node_rank >= arguments.nodes {
        let LaunchArgs { nodes, node_rank, .. } = arguments;
        let message = format!("--node-rank: expected below the {nodes} machines, got {node_rank}");
        return Err(Usage(message).into());
    }
    if let Some(address) = &arguments.address {
        let parts = address.rsplit_once(':').filter(|(host, _)| !host.is_empty());
        let parts = parts.and_then(|(host, port)| Some((host.to_owned(), port.parse().ok()?)));
        let refused = || Usage(format!("--address: expected HOST:PORT, got {address}"));
        return Ok(parts.ok_or_else(refused)?);
    }
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("finding a free port")?;
    Ok(("127.0.0.1".to_owned(), listener.local_addr()?.port()))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        launch: LaunchArgs,
    }

    fn launched(n: &str, script: &str) -> u8 {
        run(&Cli::parse_from(["launch", "--processes", n, "--", "sh", "-c", script]).launch)
            .unwrap()
    }

    #[test]
    fn every_process_is_told_which_one_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let of = |name: &str| dir.path().join(name);
        let script = format!(
            "echo $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR > {}/$RANK",
            dir.path().display()
        );
        assert_eq!(launched("3", &script), 0);
        for rank in 0..3 {
            let told = fs_err::read_to_string(of(&rank.to_string())).unwrap();
            assert_eq!(told, format!("{rank} 3 3 127.0.0.1\n"));
        }
    }

    #[test]
    fn several_machines_count_on() {
        let dir = tempfile::tempdir().unwrap();
        let script = format!(
            "echo $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT > {}/$RANK",
            dir.path().display()
        );
        let words = |more: &[&str]| {
            let words = [&["launch", "-n", "2"], more, &["--", "sh", "-c", &script]].concat();
            Cli::try_parse_from(words).map(|cli| cli.launch)
        };
        let second = ["--nodes", "3", "--node-rank", "2", "--address", "gpu1:29500"];
        assert_eq!(run(&words(&second).unwrap()).unwrap(), 0);
        assert_eq!(fs_err::read_to_string(dir.path().join("5")).unwrap(), "1 6 gpu1 29500\n");
        assert!(words(&["--nodes", "2"]).is_err(), "machines without an address");
        for wrong in [
            ["--nodes", "2", "--node-rank", "2", "--address", "a:1"],
            ["--nodes", "2", "--node-rank", "0", "--address", "a"],
        ] {
            let refused = run(&words(&wrong).unwrap()).unwrap_err().to_string();
            assert!(refused.contains("expected"), "{refused}");
        }
    }

    #[test]
    fn the_first_failure_ends_all_and_gives_its_exit_code() {
        let started = Instant::now();
        let code = launched("2", "trap 'exit 3' TERM; [ $RANK = 1 ] && exit 65; sleep 60 & wait");
        assert_eq!(code, 65);
        assert!(started.elapsed() < GRACE + LAST_GRACE, "{:?}", started.elapsed());
        assert_eq!(launched("2", "[ $RANK = 0 ] && kill -9 $$; true"), 137);
    }

    #[test]
    fn lines_are_shown_with_their_rank() {
        let mut shown = Vec::new();
        show(1, "one\ntwo".as_bytes(), &mut shown);
        assert_eq!(String::from_utf8(shown).unwrap(), "[1] one\n[1] two\n");
    }
}
