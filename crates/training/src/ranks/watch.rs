//! Who is still there: a connection between rank 0 and every other process, beside the collective operations.
//!
//! A process that dies closes its connection; a machine that goes away falls silent. Either way rank 0 tells the others, and all end
//! with the name of the one that fell, however deep their main threads wait in an operation: the last checkpoint is whole, and the same
//! command goes on from it.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arete_records::Class;
use arete_stage::cli::printable;
use arete_stage::exit;

use super::Place;
use super::group::{Group, JOIN};
use crate::Error;

/// Where rank 0 listens, in the store.
const KEY: &str = "arete/watch";
/// Between two signs of life.
const BEAT: Duration = Duration::from_secs(5);
/// Silence that means death.
const SILENCE: Duration = Duration::from_secs(20);

/// A process at the other end.
struct Peer {
    rank: usize,
    /// Host and process number, for messages.
    name: String,
    stream: TcpStream,
}

struct Shared {
    peers: Mutex<Vec<Peer>>,
    /// This process ends by itself: what it hears is no news.
    is_leaving: AtomicBool,
    n_ranks: usize,
    is_first: bool,
}

/// This process's part of the watch.
pub(super) struct Watch(Arc<Shared>);

impl Watch {
    /// Connects rank 0 with every other process.
    pub(super) fn start(place: &Place, host: &str, group: &Group) -> Result<Self, Error> {
        let is_first = place.rank == 0;
        let peers =
            if is_first { accept(place, host, group)? } else { vec![connect(place, host, group)?] };
        let readers: Vec<(usize, String, TcpStream)> = peers
            .iter()
            .map(|peer| Ok((peer.rank, peer.name.clone(), peer.stream.try_clone()?)))
            .collect::<std::io::Result<_>>()?;
        let shared = Arc::new(Shared {
            peers: Mutex::new(peers),
            is_leaving: AtomicBool::new(false),
            n_ranks: place.n_ranks,
            is_first,
        });
        for (rank, name, stream) in readers {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || shared.listen(rank, &name, stream));
        }
        let beating = Arc::clone(&shared);
        std::thread::spawn(move || {
            while !beating.is_leaving.load(Ordering::Relaxed) {
                beating.tell_all("alive");
                std::thread::sleep(BEAT);
            }
        });
        Ok(Self(shared))
    }

    /// This process is done, and its leaving no news.
    pub(super) fn leave(&self) {
        self.0.is_leaving.store(true, Ordering::Relaxed);
        self.0.tell_all("bye");
    }

    /// This process ends with an error: so do the others.
    pub(super) fn fail(&self, rank: usize, class: Option<Class>, what: &str) {
        self.0.is_leaving.store(true, Ordering::Relaxed);
        let code = exit::code(class.unwrap_or(Class::Other));
        let what = printable(what).replace('\n', " ");
        self.0.tell_all(&format!("fell {rank} {code} {what}"));
    }
}

impl Shared {
    fn peers(&self) -> MutexGuard<'_, Vec<Peer>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell_all(&self, line: &str) {
        for peer in self.peers().iter_mut() {
            // One that is gone is noticed by its reader.
            let _ = peer.stream.write_all(format!("{line}\n").as_bytes());
        }
    }

    /// Hears of one process until it says good-bye or falls.
    fn listen(&self, rank: usize, name: &str, stream: TcpStream) {
        let _ = stream.set_read_timeout(Some(SILENCE));
        let mut lines = BufReader::new(stream);
        loop {
            let mut line = String::new();
            let why = match lines.read_line(&mut line) {
                Ok(0) => "ended without a word: killed, or out of memory".to_owned(),
                Ok(_) => match line.trim_end().split_once(' ') {
                    None if line.trim_end() == "bye" => return,
                    None => continue,
                    Some((_, fallen)) => return self.end_with(fallen, rank, name),
                },
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    format!("was not heard of for {} s", SILENCE.as_secs())
                }
                Err(error) => format!("cannot be reached: {error}"),
            };
            let code = exit::code(Class::System);
            return self.end_with(&format!("{rank} {code} {why}"), rank, name);
        }
    }

    /// Ends this process with the name of the one that fell; rank 0 tells the others before. `fallen`: its rank, its exit
    /// code, why.
    fn end_with(&self, fallen: &str, from: usize, name: &str) {
        if self.is_leaving.swap(true, Ordering::Relaxed) {
            return;
        }
        if self.is_first {
            self.tell_all(&format!("fell {fallen}"));
        }
        let mut parts = fallen.splitn(3, ' ');
        let rank = parts.next().and_then(|rank| rank.parse().ok()).unwrap_or(from);
        let code = parts.next().and_then(|code| code.parse().ok()).unwrap_or(1);
        let why = printable(parts.next().unwrap_or_default());
        let which = if rank == from { format!(" ({name})") } else { String::new() };
        let _ = writeln!(
            std::io::stderr(),
            "error: rank {rank} of {}{which} fell: {why}\n  the last checkpoint is whole: the same command goes on from it, with \
             any number of processes",
            self.n_ranks
        );
        // A signal stopped that one, and stops this one; else it is the system that failed us.
        let code = if code > 128 { code } else { i32::from(exit::code(Class::System)) };
        // At once: the main thread may wait for ever in an operation that the fallen one has no more part in.
        signal_hook::low_level::exit(code);
    }
}

fn accept(place: &Place, host: &str, group: &Group) -> Result<Vec<Peer>, Error> {
    let address = if super::is_local(host) { Ipv4Addr::LOCALHOST } else { Ipv4Addr::UNSPECIFIED };
    let listener = TcpListener::bind(SocketAddr::new(IpAddr::V4(address), 0))?;
    group.set(KEY, listener.local_addr()?.port().to_string().as_bytes())?;
    listener.set_nonblocking(true)?;
    let started = Instant::now();
    let mut peers: Vec<Peer> = Vec::new();
    while peers.len() + 1 < place.n_ranks {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(BEAT))?;
                // A stranger on the port says something else, or nothing.
                let Some((rank, name)) = hello(&stream) else { continue };
                peers.push(Peer { rank, name, stream });
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                if started.elapsed() > JOIN {
                    let what = format!("{} of {} processes came", peers.len() + 1, place.n_ranks);
                    return Err(Error::Ranks { what });
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(peers)
}

/// Reads `hello RANK NAME`, byte by byte: what follows is the reader's.
fn hello(mut stream: &TcpStream) -> Option<(usize, String)> {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < 256 {
        std::io::Read::read_exact(&mut stream, &mut byte).ok()?;
        if byte[0] == b'\n' {
            break;
        }
        line.push(byte[0]);
    }
    let line = String::from_utf8(line).ok()?;
    let (rank, name) = line.strip_prefix("hello ")?.split_once(' ')?;
    Some((rank.parse().ok()?, printable(name)))
}

fn connect(place: &Place, host: &str, group: &Group) -> Result<Peer, Error> {
    let port = group.get(KEY, JOIN)?;
    let port: u16 = std::str::from_utf8(&port).ok().and_then(|port| port.parse().ok()).unwrap_or(0);
    let mut failed = std::io::Error::other(format!("{host}: no such host"));
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, JOIN) {
            Ok(mut stream) => {
                stream.set_nodelay(true)?;
                let line = format!("hello {} {}\n", place.rank, own_name());
                stream.write_all(line.as_bytes())?;
                return Ok(Peer { rank: 0, name: host.to_owned(), stream });
            }
            Err(error) => failed = error,
        }
    }
    Err(failed.into())
}

/// Host and process number.
fn own_name() -> String {
    let host = fs_err::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}, process {}", host.trim(), std::process::id())
}
