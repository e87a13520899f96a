//! Chains sampled by servers, turn by turn, tokens in and tokens out: text is never tokenised anew between turns.
//!
//! All samples of a start go to one server, which has computed their beginning already; a server with nothing to do takes from
//! one that has too much. A server that fails loses the replies in flight, which others are asked for; it is looked for from time to
//! time and comes back with the adapter and a canary. Every reply is written to the [journal](crate::journal::Journal) before anything is made of it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Instant;

use arete_chain::sample::{SampledChain, Start};
use arete_model::Chat;
use arete_model::generate::{Completion, Sampling, Sequence};
use arete_stage::interrupt::{self, Interrupted};

use crate::dialect::{Draw, Prompt};
use crate::fleet::{Answers, Link, Trouble, bring_up};
use crate::http::{Failure, FailureKind};
use crate::journal::{self, Journal};
use crate::pool::LOOK;
use crate::spread::{FEW_ATTEMPTS, LOOK_FOR, is_gone};
use crate::{Error, Fleet, request_seed};

/// Whose replies are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// The model itself.
    Base,
    /// The adapter that the servers hold.
    Adapter,
}

/// What is asked of servers.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Whose replies.
    pub weights: Weights,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Tokens that end a turn.
    pub stop_ids: Vec<i64>,
    /// Most tokens of one turn.
    pub max_new_tokens: usize,
}

/// Why servers will not have a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused(pub String);

/// What came of sampling beside the chains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Tokens that servers sampled.
    pub n_sampled: usize,
    /// Replies that the journal knew.
    pub n_known: usize,
    /// Replies that were asked for again because a server was lost.
    pub n_lost: usize,
}

/// Samples every start and hands over each chain, with its start and its sample's number, as it ends; of chains that every server
/// would refuse, the reason. `ready` is called once before the first request, and not at all if the journal knows every reply.
///
/// # Errors
///
/// [`Error::Server`] for answers that make no sense, [`Error::NoneLeft`]; a journal that cannot be written; what `ready` or `ended`
/// return, which stops the sampling; a signal.
pub fn sample<E: From<Error>>(
    fleet: &mut Fleet,
    chat: &Chat<'_>,
    starts: &[Start<'_>],
    asked: &Asked,
    journal: &mut Journal,
    ready: &mut dyn FnMut(&mut Fleet) -> Result<(), E>,
    ended: &mut dyn FnMut(usize, usize, Result<SampledChain, Refused>) -> Result<(), E>,
) -> Result<Counts, E> {
    let mut counts = Counts::default();
    let mut open = Vec::new();
    for (start, of_start) in starts.iter().enumerate() {
        for sample in 0..of_start.streams.len() {
            let mut chain = Open { start, sample, turns: Vec::new(), appended: Vec::new() };
            let whole = loop {
                let Some(reply) = journal.reply(&chain.request(of_start, asked)) else {
                    break None;
                };
                counts.n_known += 1;
                if let Some(whole) =
                    chain.take(chat, of_start, reply.clone()).map_err(Error::from)?
                {
                    break Some(whole);
                }
            };
            match whole {
                Some(whole) => ended(start, sample, Ok(whole))?,
                None => open.push(chain),
            }
        }
    }
    if counts.n_known > 0 {
        tracing::info!(known = counts.n_known, chains = open.len(), "sampling continued");
    }
    if open.is_empty() {
        return Ok(counts);
    }
    ready(fleet)?;
    let (sender, arrivals) = channel();
    let servers = fleet.servers.iter().map(|_| Queue::default()).collect();
    let mut desk = Desk {
        fleet,
        chat,
        starts,
        asked,
        open,
        servers,
        in_flight: BTreeMap::new(),
        n_tickets: 0,
        sender,
        none_since: None,
        counts,
    };
    desk.route();
    desk.run(&arrivals, journal, ended)
}

/// A chain that has not ended.
struct Open {
    start: usize,
    sample: usize,
    turns: Vec<Completion>,
    appended: Vec<Vec<i64>>,
}

impl Open {
    fn token_ids(&self, start: &Start<'_>) -> Vec<i64> {
        self.sequence().token_ids(&start.prompt_ids)
    }

    fn sequence(&self) -> Sequence {
        let (turns, appended) = (self.turns.clone(), self.appended.clone());
        Sequence { request: self.start, stream: self.sample, turns, appended }
    }

    fn seed(&self, start: &Start<'_>) -> u64 {
        let stream = start.streams[self.sample];
        request_seed(stream.seed, stream.prompt, stream.sample, self.turns.len())
    }

    /// What the journal knows the next reply by.
    fn request(&self, start: &Start<'_>, asked: &Asked) -> String {
        let role = match asked.weights {
            Weights::Base => "base",
            Weights::Adapter => "adapter",
        };
        journal::request(role, &self.token_ids(start), &asked.draw(self.seed(start)))
    }

    /// Takes in a reply; the whole chain, if it was the last.
    fn take(
        &mut self,
        chat: &Chat<'_>,
        start: &Start<'_>,
        reply: Completion,
    ) -> Result<Option<SampledChain>, arete_model::Error> {
        let end_was_sampled = reply.token_ids.last() == Some(&chat.end_of_turn_id());
        self.turns.push(reply);
        match start.questions.get(self.turns.len() - 1) {
            Some(question) => {
                self.appended.push(chat.next_turn(end_was_sampled, question)?);
                Ok(None)
            }
            None => SampledChain::new(chat, start, &self.sequence()).map(Some),
        }
    }
}

impl Asked {
    fn draw(&self, seed: u64) -> Draw<'_> {
        let (max_new_tokens, stop_ids) = (self.max_new_tokens, self.stop_ids.as_slice());
        Draw { sampling: self.sampling, seed, max_new_tokens, stop_ids }
    }
}

/// What a server has to do.
#[derive(Default)]
struct Queue {
    waiting: VecDeque<usize>,
    n_in_flight: usize,
    /// When it was last looked for, while it is left out; and whether a look is under way.
    looked: Option<Instant>,
    is_sought: bool,
}

/// What comes from threads.
enum Arrival {
    /// What became of the request with this ticket.
    Reply(u64, Result<Completion, Failure>),
    /// What became of looking for a server.
    Found(usize, Result<Answers, Trouble>),
}

/// Sampling at work.
struct Desk<'a, 'b> {
    fleet: &'a mut Fleet,
    chat: &'a Chat<'b>,
    starts: &'a [Start<'a>],
    asked: &'a Asked,
    open: Vec<Open>,
    servers: Vec<Queue>,
    /// Chain and server of each ticket.
    in_flight: BTreeMap<u64, (usize, usize)>,
    n_tickets: u64,
    sender: Sender<Arrival>,
    /// Since when no server works.
    none_since: Option<Instant>,
    counts: Counts,
}

impl Desk<'_, '_> {
    fn run<E: From<Error>>(
        mut self,
        arrivals: &Receiver<Arrival>,
        journal: &mut Journal,
        ended: &mut dyn FnMut(usize, usize, Result<SampledChain, Refused>) -> Result<(), E>,
    ) -> Result<Counts, E> {
        loop {
            self.dispatch();
            self.look_for_servers()?;
            let is_done = self.in_flight.is_empty()
                && self.servers.iter().all(|queue| queue.waiting.is_empty());
            if is_done {
                return Ok(self.counts);
            }
            match arrivals.recv_timeout(LOOK) {
                Ok(Arrival::Reply(ticket, result)) => {
                    // A ticket of a server that was given up meanwhile is no longer there.
                    if let Some((chain, server)) = self.in_flight.remove(&ticket) {
                        self.servers[server].n_in_flight -= 1;
                        self.arrived(chain, server, result, journal, ended)?;
                    }
                }
                Ok(Arrival::Found(server, result)) => self.found(server, result)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => unreachable!("this holds a sender"),
            }
            interrupt::check().map_err(|signal: Interrupted| Error::from(signal))?;
        }
    }

    fn works(&self, server: usize) -> bool {
        self.fleet.servers[server].down.is_none()
    }

    /// Gives every chain that waits for nobody to the server of its start.
    fn route(&mut self) {
        let all: Vec<usize> = (0..self.open.len()).collect();
        self.give(all);
    }

    fn give(&mut self, chains: Vec<usize>) {
        let working: Vec<usize> = (0..self.servers.len()).filter(|&at| self.works(at)).collect();
        for chain in chains {
            let start = self.open[chain].start;
            // With none left they wait at the first, who gives them on when another is back.
            let server = working.get(start % working.len().max(1)).copied().unwrap_or(0);
            self.servers[server].waiting.push_back(chain);
        }
    }

    /// Sends what servers have room for.
    fn dispatch(&mut self) {
        let concurrency = self.fleet.config.concurrency;
        for server in 0..self.servers.len() {
            while self.works(server) && self.servers[server].n_in_flight < concurrency {
                let Some(chain) = self.next_for(server) else { break };
                self.send(chain, server);
            }
        }
    }

    /// Its own next chain, or one of the busiest server that has no room for it.
    fn next_for(&mut self, server: usize) -> Option<usize> {
        if let Some(own) = self.servers[server].waiting.pop_front() {
            return Some(own);
        }
        let concurrency = self.fleet.config.concurrency;
        let full = self.servers.iter_mut().filter(|queue| queue.n_in_flight >= concurrency);
        full.max_by_key(|queue| queue.waiting.len())?.waiting.pop_back()
    }

    fn send(&mut self, chain: usize, server: usize) {
        let open = &self.open[chain];
        let start = &self.starts[open.start];
        let (token_ids, seed) = (open.token_ids(start), open.seed(start));
        let adapter = match self.asked.weights {
            Weights::Base => None,
            Weights::Adapter => self.fleet.adapter().map(str::to_owned),
        };
        let asked = self.asked.clone();
        let config = &self.fleet.config;
        let others = (0..self.servers.len()).any(|other| other != server && self.works(other));
        let attempts = if others { config.attempts.min(FEW_ATTEMPTS) } else { config.attempts };
        let (link, sender) = (Arc::clone(&self.fleet.servers[server].link), self.sender.clone());
        self.n_tickets += 1;
        let ticket = self.n_tickets;
        self.in_flight.insert(ticket, (chain, server));
        self.servers[server].n_in_flight += 1;
        std::thread::spawn(move || {
            let draw = asked.draw(seed);
            let result = ask(&link, adapter.as_deref(), &token_ids, &draw, attempts);
            // Nobody waits for it any more if this fails.
            let _ = sender.send(Arrival::Reply(ticket, result));
        });
    }

    fn arrived<E: From<Error>>(
        &mut self,
        chain: usize,
        server: usize,
        result: Result<Completion, Failure>,
        journal: &mut Journal,
        ended: &mut dyn FnMut(usize, usize, Result<SampledChain, Refused>) -> Result<(), E>,
    ) -> Result<(), E> {
        let (start, sample) = (self.open[chain].start, self.open[chain].sample);
        let reply = match result {
            Ok(reply) => reply,
            Err(failure) if failure.kind == FailureKind::Request => {
                return ended(start, sample, Err(Refused(failure.reason)));
            }
            Err(failure) if is_gone(&failure) => {
                self.lose(server, chain, &failure.reason);
                return Ok(());
            }
            Err(failure) => {
                let link = &self.fleet.servers[server].link;
                return Err(link.http.error(link.dialect.sample_path(), "reply", &failure).into());
            }
        };
        self.counts.n_sampled += reply.token_ids.len();
        let of_start = &self.starts[start];
        let request = self.open[chain].request(of_start, self.asked);
        let weights = self.fleet.adapter().unwrap_or("base").to_owned();
        journal.append(request, &reply, self.fleet.servers[server].link.http.at(""), &weights)?;
        match self.open[chain].take(self.chat, of_start, reply).map_err(Error::from)? {
            Some(whole) => ended(start, sample, Ok(whole)),
            None => {
                // Before others that have not begun: its beginning is still in the server's cache.
                self.servers[server].waiting.push_front(chain);
                Ok(())
            }
        }
    }

    /// A server is gone: what it was asked for, and what waits for it, goes to the others.
    fn lose(&mut self, server: usize, chain: usize, reason: &str) {
        self.fleet.is_down(server, reason);
        let mut chains = vec![chain];
        let tickets: Vec<u64> = (self.in_flight.iter())
            .filter(|(_, (_, of))| *of == server)
            .map(|(ticket, _)| *ticket)
            .collect();
        for ticket in tickets {
            chains.extend(self.in_flight.remove(&ticket).map(|(chain, _)| chain));
        }
        self.counts.n_lost += chains.len();
        let queue = &mut self.servers[server];
        queue.n_in_flight = 0;
        queue.looked = Some(Instant::now());
        chains.extend(std::mem::take(&mut queue.waiting));
        self.give(chains);
    }

    /// Looks for servers that are left out; fails once none has worked for as long as the settings allow.
    fn look_for_servers(&mut self) -> Result<(), Error> {
        for server in 0..self.servers.len() {
            let queue = &self.servers[server];
            let is_due = queue.looked.is_none_or(|looked| looked.elapsed() >= LOOK_FOR);
            if self.works(server) || queue.is_sought || !is_due {
                continue;
            }
            let link: Arc<Link> = Arc::clone(&self.fleet.servers[server].link);
            let (answers, proof) = (self.fleet.answers(server), self.fleet.proof());
            let (loaded, sender) = (self.fleet.loaded.clone(), self.sender.clone());
            self.servers[server].is_sought = true;
            std::thread::spawn(move || {
                let found = bring_up(&link, &answers, loaded.as_ref(), &proof, 1);
                let _ = sender.send(Arrival::Found(server, found.map(|(answers, _)| answers)));
            });
        }
        if (0..self.servers.len()).any(|server| self.works(server)) {
            self.none_since = None;
            return Ok(());
        }
        let since = *self.none_since.get_or_insert_with(Instant::now);
        let is_over = since.elapsed().as_secs_f64() > self.fleet.wait_s;
        if is_over { Err(self.fleet.none_left()) } else { Ok(()) }
    }

    fn found(&mut self, server: usize, result: Result<Answers, Trouble>) -> Result<(), Error> {
        let queue = &mut self.servers[server];
        queue.is_sought = false;
        queue.looked = Some(Instant::now());
        match result {
            Ok(answers) => {
                self.fleet.is_up(server, answers);
                // What waited at the first while there was none.
                if self.servers.len() > 1 && self.none_since.is_some() {
                    let waiting = self.servers.iter_mut();
                    let waiting: Vec<usize> =
                        waiting.flat_map(|queue| std::mem::take(&mut queue.waiting)).collect();
                    self.give(waiting);
                }
                Ok(())
            }
            Err(trouble) => match trouble.error(&self.fleet.servers[server].link) {
                // It answers, and with other weights: nothing that passes.
                Ok(error @ Error::Weights { .. }) => Err(error),
                Ok(error) => {
                    self.fleet.is_down(server, &error.to_string());
                    Ok(())
                }
                Err(reason) => {
                    self.fleet.is_down(server, &reason);
                    Ok(())
                }
            },
        }
    }
}

/// One reply of a server.
fn ask(
    link: &Link,
    adapter: Option<&str>,
    token_ids: &[i64],
    draw: &Draw<'_>,
    attempts: usize,
) -> Result<Completion, Failure> {
    let Link { http, dialect, base } = link;
    let salt = adapter.unwrap_or("base");
    let body = dialect.sample(&Prompt { base, adapter, token_ids, salt }, draw);
    http.attempts(attempts, "reply", || {
        let answer = http.json(dialect.sample_path(), Some(&body), draw.max_new_tokens)?;
        dialect.reply(&answer, draw)
    })
}
