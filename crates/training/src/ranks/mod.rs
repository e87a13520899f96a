//! The processes that train together: which one this is, what they tell each other, and how they end.
//!
//! Every process holds the whole base, the whole adapters and their optimiser, and computes the gradients of some of a batch's
//! shards ([`crate::shards`]); these are summed shard by shard, so that every process takes the same step, to the bit, however many there
//! are. Rank 0 alone writes: it opens the output directory, logs and checkpoints, and finishes the stage when the others have
//! left. The others start from what it found, and refuse to work on other inputs or settings than its own.

mod environment;
mod group;
mod watch;

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use arete_records::{Class, hex};
use arete_stage::interrupt::{self, Interrupted};
use arete_stage::run::{self, RunJson, StageSpec, Start};
use arete_stage::timings;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

pub use self::environment::{LAUNCHED, Place, SINGLE};
use self::group::Group;
use self::watch::Watch;
use crate::checkpoint::{Loaded, deserialize, serialize};
use crate::shards::cut;
use crate::{Error, class_within};

/// How long the others wait for rank 0 where it works alone.
const PATIENCE: Duration = Duration::from_secs(30 * 24 * 3600);
/// How long a failed operation waits for the watch to say whose fault it is.
const VERDICT: Duration = Duration::from_secs(25);

/// This process among those that train together.
pub struct Ranks {
    place: Place,
    links: Option<Links>,
    traffic: Cell<Traffic>,
    /// Where another than rank 0 writes what nobody reads.
    scratch: RefCell<Vec<tempfile::TempDir>>,
    /// Meetings so far.
    n_met: Cell<u64>,
}

struct Links {
    group: Group,
    watch: Watch,
}

/// What went over the network.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Traffic {
    /// Sent by this process.
    pub n_bytes: u64,
    /// Spent in operations, waiting for the others among it.
    pub seconds: f64,
}

impl std::fmt::Debug for Ranks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ranks").field("place", &self.place).finish_non_exhaustive()
    }
}

impl Ranks {
    /// One process.
    pub fn alone() -> Self {
        Self {
            place: Place::alone(),
            links: None,
            traffic: Cell::default(),
            scratch: RefCell::default(),
            n_met: Cell::new(0),
        }
    }

    /// Meets the other processes that this one's environment speaks of, if any; `n_shards` is what each batch is cut into.
    ///
    /// # Errors
    ///
    /// [`Error::Stage`] for variables that cannot be; [`Error::Invalid`] if there are more processes than shards;
    /// [`Error::Ranks`] if the others do not come.
    pub fn join(n_shards: usize) -> Result<Self, Error> {
        if n_shards == 0 {
            let (expected, got) = ("at least 1".to_owned(), "0".to_owned());
            return Err(Error::Invalid { name: "virtual_shards", expected, got });
        }
        // While a stage is only asked how it stands, there is nothing to meet for.
        if run::is_asking() {
            return Ok(Self::alone());
        }
        let place = Place::of_this_process().map_err(arete_records::Error::from)?;
        if place.n_ranks > n_shards {
            let expected = format!("at least as many as the {} processes", place.n_ranks);
            let got = n_shards.to_string();
            return Err(Error::Invalid { name: "virtual_shards", expected, got });
        }
        let Some((host, port)) = place.address.clone() else { return Ok(Self::alone()) };
        tracing::debug!(
            rank = place.rank,
            n_ranks = place.n_ranks,
            host,
            port,
            "meeting the others"
        );
        if std::env::var_os(LAUNCHED).is_some() {
            end_with_launcher();
        }
        let group = Group::join(&place, &host, port)?;
        // The watch first: who dies while the others connect is missed at once.
        let watch = Watch::start(&place, &host, &group)?;
        group.connect(&place, is_local(&host))?;
        if place.rank == 0 {
            tracing::info!(n_ranks = place.n_ranks, "processes train together");
        }
        Ok(Self { place, links: Some(Links { group, watch }), ..Self::alone() })
    }

    /// Ends the common work with its result: the others learn of an error, and end too.
    ///
    /// # Errors
    ///
    /// That of `result`.
    pub fn finish<T>(&self, result: anyhow::Result<T>) -> anyhow::Result<T> {
        if let Some(Links { watch, .. }) = &self.links {
            match result.as_ref().map_err(|error| (class_within(error), error)) {
                // A signal was agreed on: everybody stops at the same place.
                Ok(_) | Err((Some(Class::Signal(_)), _)) => watch.leave(),
                Err((class, error)) => watch.fail(self.place.rank, class, &format!("{error:#}")),
            }
        }
        result
    }

    /// Which one this is, from 0.
    pub fn rank(&self) -> usize {
        self.place.rank
    }

    /// Whether this process writes.
    pub fn is_first(&self) -> bool {
        self.place.rank == 0
    }

    /// How many processes there are.
    pub fn n_ranks(&self) -> usize {
        self.place.n_ranks
    }

    /// Which GPU this process takes of its machine's.
    pub fn local_rank(&self) -> usize {
        self.place.local_rank
    }

    /// The run of `n` items (shards, prompts, conversations) that is a rank's.
    pub fn part_of(&self, n: usize, rank: usize) -> Range<usize> {
        cut(n, self.place.n_ranks)[rank].clone()
    }

    /// The run of `n` items that is this process's.
    pub fn own_part(&self, n: usize) -> Range<usize> {
        self.part_of(n, self.place.rank)
    }

    /// What went over the network since the last time this was asked.
    pub fn take_traffic(&self) -> Traffic {
        self.traffic.take()
    }

    /// Notes the traffic since the last time in `timings.jsonl`, if there is any.
    ///
    /// # Errors
    ///
    /// [`Error::Stage`] if the line cannot be written.
    pub fn log_traffic(&self, output: &Path, step: (&str, u64)) -> Result<(), Error> {
        let Traffic { n_bytes, seconds } = self.take_traffic();
        if self.links.is_none() || !self.is_first() {
            return Ok(());
        }
        let n_ranks = self.n_ranks() as u64;
        let fields =
            [(step.0, step.1.into()), ("n_bytes", n_bytes.into()), ("n_ranks", n_ranks.into())];
        Ok(timings::log(output, "communication", seconds, &fields)?)
    }

    // ---- the stage's frame ----

    /// Opens the stage's output directory on rank 0; the others go along with what it found, in a directory of their own
    /// that is thrown away.
    ///
    /// # Errors
    ///
    /// Those of [`run::begin_growing`]; [`Error::Ranks`] if a process has other inputs or settings than rank 0.
    pub fn begin(&self, spec: StageSpec<'_>, amounts: &[&str]) -> Result<Start, Error> {
        if self.links.is_none() {
            return Ok(run::begin_growing(spec, amounts)?);
        }
        if self.is_first() {
            let own = Opening::of(&spec)?;
            let start = run::begin_growing(spec, amounts)?;
            let complete = match &start {
                Start::UpToDate(complete) => Some(complete.clone()),
                Start::Run(_) => None,
            };
            self.share(Some(&Opening { complete, ..own }))?;
            return Ok(start);
        }
        let first: Opening = self.share(None)?;
        let scratch = tempfile::Builder::new().prefix("arete-rank-").tempdir()?;
        // A folder inside, for hashes are remembered beside a stage's output.
        let output = scratch.path().join("run");
        let spec = StageSpec { output: &output, ..spec };
        first.check(&Opening::of(&spec)?, self.place.rank)?;
        if let Some(complete) = first.complete {
            return Ok(Start::UpToDate(complete));
        }
        let start = run::begin(spec)?;
        self.scratch.borrow_mut().push(scratch);
        Ok(start)
    }

    /// The checkpoint that rank 0 found, for all.
    ///
    /// # Errors
    ///
    /// [`Error::Ranks`].
    pub fn share_checkpoint<S: Serialize + DeserializeOwned>(
        &self,
        found: Option<Loaded<S>>,
    ) -> Result<Option<Loaded<S>>, Error> {
        if self.links.is_none() {
            return Ok(found);
        }
        let found = match found {
            Some(Loaded { step, tensors, state }) => {
                let tensors: Vec<(String, Tensor)> = tensors.into_iter().collect();
                Some((step, serialize(&tensors)?, state))
            }
            None => None,
        };
        let head = found.as_ref().map(|(step, _, state)| (step, state));
        let head = self.is_first().then(|| serde_json::to_vec(&head).expect("a state serialises"));
        let head = self.broadcast(head.as_deref())?;
        let head: Option<(u64, S)> = parse(&head)?;
        let Some((step, state)) = head else { return Ok(None) };
        let bytes = self.broadcast(found.as_ref().map(|(_, tensors, _)| tensors.as_slice()))?;
        let tensors = deserialize(&bytes).map_err(|what| Error::Ranks { what })?;
        Ok(Some(Loaded { step, tensors, state }))
    }

    /// Puts rank 0's file, if it has it, where the others look for theirs.
    ///
    /// # Errors
    ///
    /// [`Error::Ranks`]; [`Error::Io`] if the file cannot be read or written.
    pub fn share_file(&self, path: &Path) -> Result<(), Error> {
        if self.links.is_none() {
            return Ok(());
        }
        let own = (self.is_first() && path.exists()).then(|| fs_err::read(path)).transpose()?;
        let found: Option<Vec<u8>> = self.share(self.is_first().then_some(&own))?;
        if let Some(found) = found.filter(|_| !self.is_first()) {
            fs_err::write(path, found)?;
        }
        Ok(())
    }

    /// Has the others wait until rank 0 comes, however long it works alone.
    ///
    /// # Errors
    ///
    /// [`Error::Ranks`].
    pub fn meet(&self) -> Result<(), Error> {
        let Some(Links { group, .. }) = &self.links else { return Ok(()) };
        let meeting = self.n_met.get() + 1;
        self.n_met.set(meeting);
        let key = format!("arete/meeting/{meeting}");
        self.timed(0, || match self.is_first() {
            true => group.set(&key, b"here"),
            false => group.get(&key, PATIENCE).map(drop),
        })
    }

    /// Fails on every process once a signal has come in on any. Call it where stopping loses nothing.
    ///
    /// # Errors
    ///
    /// [`Error::Interrupted`] with the signal.
    pub fn check_interrupt(&self) -> Result<(), Error> {
        self.agree(interrupt::check().map_err(Error::from), signal_of)
    }

    /// The result of what every process does by itself, but that a signal on one is a signal on all.
    ///
    /// # Errors
    ///
    /// That of `result`, or [`Interrupted`].
    pub fn agree<T, E: From<Interrupted> + From<Error>>(
        &self,
        result: Result<T, E>,
        signal_of: fn(&E) -> Option<i32>,
    ) -> Result<T, E> {
        if self.links.is_none() {
            return result;
        }
        let own = match &result {
            Ok(_) => 0,
            Err(error) => match signal_of(error) {
                Some(signal) => u8::try_from(signal).unwrap_or(u8::MAX),
                None => return result, // the others end when this process does
            },
        };
        let signal = self.gather(&[own])?.into_iter().flatten().max().unwrap_or(0);
        match signal {
            0 => result,
            signal => Err(Interrupted { signal: i32::from(signal) }.into()),
        }
    }

    // ---- operations ----

    /// Every process's bytes, in the order of ranks.
    ///
    /// # Errors
    ///
    /// [`Error::Ranks`].
    pub fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        let Some(Links { group, .. }) = &self.links else { return Ok(vec![own.to_vec()]) };
        self.timed(own.len() * (self.n_ranks() - 1), || {
            let lengths = group.gather(&Tensor::from_slice(&[own.len() as i64]))?;
            let lengths: Vec<usize> =
                Vec::<i64>::try_from(lengths)?.into_iter().map(|n| n as usize).collect();
            let longest = lengths.iter().copied().max().unwrap_or(0);
            if longest == 0 {
                return Ok(vec![Vec::new(); self.n_ranks()]);
            }
            let mut padded = own.to_vec();
            padded.resize(longest, 0);
            let all = group.gather(&Tensor::from_slice(&padded))?;
            let all: Vec<u8> = Vec::try_from(all)?;
            let parts = all.chunks(longest).zip(lengths);
            Ok(parts.map(|(part, length)| part[..length].to_vec()).collect())
        })
    }

    /// Every process's numbers, in the order of ranks, to the bit.
    ///
    /// # Errors
    ///
    /// [`Error::Ranks`].
    pub fn gather_f64(&self, own: &[f64]) -> Result<Vec<Vec<f64>>, Error> {
        let bytes: Vec<u8> = own.iter().flat_map(|value| value.to_le_bytes()).collect();
        let number = |bytes: &[u8]| f64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        let numbers = |part: Vec<u8>| part.chunks(8).map(number).collect();
        Ok(self.gather(&bytes)?.into_iter().map(numbers).collect())
    }

    /// Rank 0's bytes; the others give none.
    fn broadcast(&self, own: Option<&[u8]>) -> Result<Vec<u8>, Error> {
        let Some(Links { group, .. }) = &self.links else {
            return Ok(own.unwrap_or_default().to_vec());
        };
        let n_sent = own.map_or(0, <[u8]>::len);
        self.timed(n_sent * (self.n_ranks() - 1), || {
            let length = Tensor::from_slice(&[n_sent as i64]);
            group.broadcast(&length, 0)?;
            let length = i64::try_from(length)?;
            if length == 0 {
                return Ok(Vec::new());
            }
            let bytes = match own {
                Some(own) => Tensor::from_slice(own),
                None => Tensor::f_zeros([length], (Kind::Uint8, Device::Cpu))?,
            };
            group.broadcast(&bytes, 0)?;
            Ok(Vec::try_from(bytes)?)
        })
    }

    /// Rank 0's value; the others give none.
    fn share<T: Serialize + DeserializeOwned>(&self, own: Option<&T>) -> Result<T, Error> {
        let own = own.map(|own| serde_json::to_vec(own).expect("it serialises"));
        parse(&self.broadcast(own.as_deref())?)
    }

    /// The sum of every process's values, in an order of Gloo's own.
    ///
    /// # Shapes
    ///
    /// - `values`: `[P]` f32 on the CPU; overwritten.
    pub(crate) fn sum_fast(&self, values: &Tensor) -> Result<(), Error> {
        let Some(Links { group, .. }) = &self.links else { return Ok(()) };
        let n_ranks = self.n_ranks();
        self.timed(2 * 4 * values.numel() * (n_ranks - 1) / n_ranks, || group.sum(values))
    }

    /// The sum of every process's rows, in the order of ranks and rows: ((row 0 + row 1) + row 2) + …
    ///
    /// Each process gets a stretch of every row, adds it up, and sends the sum to all: 2 P (n − 1) / n numbers a process where each has
    /// one row.
    ///
    /// # Shapes
    ///
    /// - `rows`: `[P]` f32 each, on the CPU; `n_rows`: how many each process has.
    /// - result: `[P]` f32 on the CPU.
    pub(crate) fn sum_in_order(
        &self,
        rows: &[Tensor],
        n_rows: &[usize],
        n: i64,
    ) -> Result<Tensor, Error> {
        let Some(Links { group, .. }) = &self.links else {
            unreachable!("one process adds up as it goes")
        };
        let n_ranks = self.n_ranks() as i64;
        let stretch = (n + n_ranks - 1) / n_ranks;
        let padded = stretch * n_ranks;
        let sent =
            Tensor::f_zeros([n_ranks, rows.len() as i64, stretch], (Kind::Float, Device::Cpu))?;
        for (at, row) in rows.iter().enumerate() {
            let row = row.f_constant_pad_nd([0, padded - n])?.f_view([n_ranks, stretch])?;
            sent.select(1, at as i64).copy_(&row);
        }
        let all: usize = n_rows.iter().sum();
        let n_sent = vec![rows.len() as i64 * stretch; n_rows.len()];
        let n_received: Vec<i64> = n_rows.iter().map(|&n| n as i64 * stretch).collect();
        let n_bytes = 4 * stretch as usize * (self.n_ranks() - 1) * (rows.len() + 1);
        self.timed(n_bytes, || {
            let received = group.exchange(&sent.f_view([-1])?, &n_sent, &n_received)?;
            let received = received.f_view([all as i64, stretch])?;
            let mut sum = received.get(0).copy();
            for row in 1..all as i64 {
                let _ = sum.f_add_(&received.get(row))?;
            }
            Ok(group.gather(&sum)?.narrow(0, 0, n))
        })
    }

    /// Counts what an operation sends and takes; where it fails, the watch gets time to say whose fault that is.
    fn timed<T>(
        &self,
        n_bytes: usize,
        work: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        let started = Instant::now();
        let result = work();
        let mut traffic = self.traffic.get();
        traffic.n_bytes += n_bytes as u64;
        traffic.seconds += started.elapsed().as_secs_f64();
        self.traffic.set(traffic);
        if result.is_err() {
            std::thread::sleep(VERDICT);
        }
        result
    }
}

/// Whether all processes are on this machine, as far as rank 0's address tells.
fn is_local(host: &str) -> bool {
    ["localhost", "127.0.0.1", "::1"].contains(&host)
}

/// `arete launch` holds the standard input open as long as it lives; when it is gone, this process stops as at SIGTERM.
fn end_with_launcher() {
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        let _ = signal_hook::low_level::raise(signal_hook::consts::SIGTERM);
    });
}

fn signal_of(error: &Error) -> Option<i32> {
    match error {
        Error::Interrupted(interrupted) => Some(interrupted.signal),
        _ => None,
    }
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(bytes).map_err(|error| Error::Ranks {
        what: format!("rank 0 sent something else than this version does: {error}"),
    })
}

/// What rank 0 says of the run that it opens.
#[derive(Debug, Serialize, Deserialize)]
struct Opening {
    version: String,
    /// SHA-256 of the settings, and of every input by name.
    settings: String,
    inputs: Vec<(String, String)>,
    /// Its results, if there is nothing to do.
    complete: Option<RunJson>,
}

impl Opening {
    fn of(spec: &StageSpec<'_>) -> Result<Self, Error> {
        let mut cache = arete_records::hashes::HashCache::load(spec.output);
        let mut inputs = Vec::new();
        for (name, path) in &spec.inputs {
            inputs.push((name.clone(), cache.sha256_path(path)?));
        }
        cache.save(); // what opens the run next need not hash again
        Ok(Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            settings: hex(&Sha256::digest(spec.config.to_string())),
            inputs,
            complete: None,
        })
    }

    fn check(&self, own: &Self, rank: usize) -> Result<(), Error> {
        let differs =
            |what: &str| Err(Error::Ranks { what: format!("rank {rank} has {what} than rank 0") });
        if self.version != own.version {
            return differs("another version of Arete");
        }
        if self.settings != own.settings {
            return differs("other settings");
        }
        match self.inputs.iter().zip(&own.inputs).find(|(first, own)| first != own) {
            Some((_, (name, _))) => differs(&format!("another `{name}`")),
            None if self.inputs.len() != own.inputs.len() => differs("other inputs"),
            None => Ok(()),
        }
    }
}
