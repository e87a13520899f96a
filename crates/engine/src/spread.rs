//! Requests that any of several servers may answer: each goes to the one that works and has least to do.
//!
//! A server that fails is left out and its requests go to the others; it is looked for from time to time and comes back when it
//! answers again. The last one that works is never left out: what it does not answer in all the attempts of the settings ends the work.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::config::ServerConfig;
use crate::http::{Failure, FailureKind, Http};

/// How often a server that is left out is looked for.
pub(crate) const LOOK_FOR: Duration = Duration::from_secs(2);

/// Attempts at a request that another server could answer.
pub(crate) const FEW_ATTEMPTS: usize = 2;

/// One of several servers.
pub trait Server: std::fmt::Debug + Send + Sync + 'static {
    /// How it is reached.
    fn http(&self) -> &Http;

    /// Makes it fit for requests again after it was lost, and finds out whether it is: one attempt.
    ///
    /// # Errors
    ///
    /// Why it is not.
    fn look(&self) -> Result<(), Failure>;
}

/// Servers, and which of them work.
#[derive(Debug)]
pub struct Spread<S>(Arc<Shared<S>>);

#[derive(Debug)]
struct Shared<S> {
    servers: Vec<Arc<S>>,
    config: ServerConfig,
    states: Mutex<Vec<State>>,
    /// Woken when a server has less to do.
    has_room: Condvar,
}

#[derive(Debug, Default)]
struct State {
    n_in_flight: usize,
    /// When it was last looked for, while it is left out; and whether a look is under way.
    lost: Option<Instant>,
    is_sought: bool,
    /// Why it is not back, as last told.
    reason: String,
}

impl<S> Clone for Spread<S> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<S: Server> Spread<S> {
    /// Servers that all work.
    ///
    /// # Panics
    ///
    /// If there are none.
    #[must_use]
    pub fn new(servers: Vec<Arc<S>>, config: &ServerConfig) -> Self {
        assert!(!servers.is_empty(), "at least one server");
        let states = Mutex::new(servers.iter().map(|_| State::default()).collect());
        let (config, has_room) = (config.clone(), Condvar::new());
        Self(Arc::new(Shared { servers, config, states, has_room }))
    }

    /// The servers.
    #[must_use]
    pub fn servers(&self) -> &[Arc<S>] {
        &self.0.servers
    }

    /// Requests that may be under way at once.
    #[must_use]
    pub fn concurrency(&self) -> usize {
        self.0.config.concurrency * self.0.servers.len()
    }

    /// What `work` gets from a server. Waits until one has room.
    ///
    /// # Errors
    ///
    /// The failure, and whose it is, if it is the request's own matter, or no server answers.
    pub fn ask<R>(
        &self,
        what: &str,
        work: impl Fn(&S) -> Result<R, Failure>,
    ) -> Result<R, (Arc<S>, Failure)> {
        // A request that as many servers as there are did not survive is not given to another.
        for n_lost in 0.. {
            self.look_for_lost();
            let (at, is_alone) = self.take();
            let is_last = is_alone || n_lost == self.servers().len();
            let all = self.0.config.attempts;
            let attempts = if is_last { all } else { all.min(FEW_ATTEMPTS) };
            let server = &self.servers()[at];
            let found = server.http().attempts(attempts, what, || work(server));
            self.put_back(at);
            match found {
                Ok(found) => return Ok(found),
                Err(failure) if is_gone(&failure) && !is_last => self.lose(at, &failure.reason),
                Err(failure) => return Err((Arc::clone(server), failure)),
            }
        }
        unreachable!("the loop returns")
    }

    fn states(&self) -> MutexGuard<'_, Vec<State>> {
        self.0.states.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The server with least to do among those that work, once it has room, and whether no other works.
    fn take(&self) -> (usize, bool) {
        let mut states = self.states();
        loop {
            let works = |(_, state): &(usize, &State)| state.lost.is_none();
            let working = states.iter().enumerate().filter(works);
            let idlest = working.clone().min_by_key(|(_, state)| state.n_in_flight);
            let (at, state) = idlest.expect("the last one is never lost");
            let is_alone = working.count() == 1;
            if state.n_in_flight < self.0.config.concurrency {
                states[at].n_in_flight += 1;
                return (at, is_alone);
            }
            states = self.0.has_room.wait(states).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn put_back(&self, at: usize) {
        self.states()[at].n_in_flight -= 1;
        self.0.has_room.notify_one();
    }

    fn lose(&self, at: usize, reason: &str) {
        let mut states = self.states();
        let n_working = states.iter().filter(|state| state.lost.is_none()).count();
        if n_working > 1 && states[at].lost.is_none() {
            states[at].lost = Some(Instant::now());
            let server = self.servers()[at].http().at("");
            tracing::warn!(server, reason, "left out until it comes back");
        }
    }

    /// Looks for servers that are left out, each in a thread of its own.
    fn look_for_lost(&self) {
        for (at, state) in self.states().iter_mut().enumerate() {
            let is_due = state.lost.is_some_and(|looked| looked.elapsed() >= LOOK_FOR);
            if is_due && !state.is_sought {
                state.is_sought = true;
                let spread = self.clone();
                std::thread::spawn(move || spread.look_for(at));
            }
        }
    }

    fn look_for(&self, at: usize) {
        let server = &self.servers()[at];
        let found = server.look();
        let mut states = self.states();
        let state = &mut states[at];
        state.is_sought = false;
        match found {
            Ok(()) => {
                state.lost = None;
                tracing::info!(server = server.http().at(""), "back");
            }
            Err(failure) => {
                state.lost = Some(Instant::now());
                if state.reason != failure.reason {
                    state.reason = failure.reason;
                    tracing::warn!(
                        server = server.http().at(""),
                        reason = state.reason,
                        "not back"
                    );
                }
            }
        }
    }
}

/// Whether a failure says that the server is gone: passing, and yet not passed; or it came back without what it held.
pub(crate) fn is_gone(failure: &Failure) -> bool {
    failure.kind == FailureKind::Passing || failure.status == Some(404)
}
