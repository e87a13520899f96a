//! A stage's process: started, listened to, passed every signal, waited for.

use std::collections::VecDeque;
use std::io::{BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use arete_records::atomic;
use arete_stage::cli::printable;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::memory::IGNORE;
use crate::setup::SetupArgs;

/// Lines of a failed stage's log that are shown.
const SHOWN_LINES: usize = 12;
/// Columns of the live line.
const COLUMNS: usize = 100;
/// Set for a stage's process: see [`take_signals`].
const CHILD: &str = "ARETE_STAGE_OF_A_RUN";

/// How a stage's process ended.
pub(super) struct Ended {
    /// Its exit code; 128 and the signal's number if a signal ended it.
    pub(super) code: u8,
    /// The end of its log.
    pub(super) last_lines: String,
}

/// Runs `arete stage NAME` to its end, if asked for whether there is room or not. Its log goes to `log`, and to stderr whole or as one live line under its label.
pub(super) fn run(
    name: &str,
    label: &str,
    setup: &SetupArgs,
    ignore_room: bool,
    log: &Path,
    show_all: bool,
) -> Result<Ended> {
    fs_err::create_dir_all(atomic::parent(log))?;
    // A second run of a stage at work is refused by the stage: what it says goes behind the first one's log.
    let mut log = fs_err::OpenOptions::new().create(true).append(true).open(log)?;
    if log.file().try_lock().is_ok() {
        log.set_len(0)?;
    }
    let program = std::env::current_exe().context("finding this program")?;
    // A group of its own: the terminal's Ctrl-C comes to us alone, and the stage gets it once.
    let mut child = Command::new(program)
        .arg("stage")
        .arg(name)
        .args(setup.to_words())
        .env(CHILD, "1")
        .envs(ignore_room.then_some((IGNORE, "1")))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .context("starting it")?;
    let stderr = child.stderr.take().context("its log")?;
    let mut stdin = child.stdin.take().context("its standard input")?;
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let handle = signals.handle();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for signal in signals.forever() {
                // It may have ended in this very moment: then nothing is left to be told.
                let _ = stdin.write_all(&[u8::try_from(signal).unwrap_or_default()]);
            }
        });
        let ended = listen(label, &mut child, stderr, &mut log, show_all);
        handle.close();
        ended
    })
}

/// Copies the log until it ends, then waits.
fn listen(
    name: &str,
    child: &mut Child,
    stderr: impl Read,
    log: &mut fs_err::File,
    show_all: bool,
) -> Result<Ended> {
    let mut last = VecDeque::new();
    let mut live = Live { name, started: Instant::now(), shown: false };
    for line in lines(BufReader::new(stderr)) {
        let line = line?;
        writeln!(log, "{line}")?;
        if show_all {
            writeln!(std::io::stderr(), "{line}")?;
        } else {
            live.show(&line)?;
        }
        last.push_back(line);
        if last.len() > SHOWN_LINES {
            last.pop_front();
        }
    }
    live.clear()?;
    let code = code_of(child.wait()?);
    Ok(Ended { code, last_lines: Vec::from(last).join("\n") })
}

fn code_of(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}

/// Lines as text, whatever bytes they hold.
fn lines(mut reader: impl std::io::BufRead) -> impl Iterator<Item = std::io::Result<String>> {
    std::iter::from_fn(move || {
        let mut line = Vec::new();
        match reader.read_until(b'\n', &mut line) {
            Ok(0) => None,
            Ok(_) => Some(Ok(printable(String::from_utf8_lossy(&line).trim_end()))),
            Err(error) => Some(Err(error)),
        }
    })
}

/// One line on the terminal that is written over.
struct Live<'a> {
    name: &'a str,
    started: Instant,
    shown: bool,
}

impl Live<'_> {
    fn show(&mut self, line: &str) -> std::io::Result<()> {
        let seconds = self.started.elapsed().as_secs();
        let text = format!("{:<14}  {seconds:>5} s  {}", self.name, line.trim());
        let text: String = text.chars().take(COLUMNS).collect();
        self.shown = true;
        write!(std::io::stderr(), "\r\x1b[2K{text}")
    }

    fn clear(&mut self) -> std::io::Result<()> {
        if std::mem::take(&mut self.shown) {
            write!(std::io::stderr(), "\r\x1b[2K")
        } else {
            Ok(())
        }
    }
}

/// Takes signals from the pipeline that started this process: their numbers come through standard input. Its end is SIGTERM: a
/// pipeline that was killed leaves no stage behind.
pub(super) fn take_signals() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    std::thread::spawn(|| {
        let mut number = [0];
        loop {
            let signal = match std::io::stdin().read(&mut number) {
                Ok(0) | Err(_) => SIGTERM,
                Ok(_) => i32::from(number[0]),
            };
            // The handlers are installed: the work ends at its next safe point.
            let _ = signal_hook::low_level::raise(signal);
            if number[0] == 0 || signal == SIGTERM {
                return;
            }
        }
    });
}
