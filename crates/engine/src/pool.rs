//! Requests beside each other, in threads of their own: a signal is answered while a server hangs.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use arete_stage::interrupt::{self, Interrupted};

/// How often a signal is looked for while answers are awaited.
pub(crate) const LOOK: Duration = Duration::from_millis(100);

/// Works on every job, at most `concurrency` at once. `done` receives results as they come, with the job's index. The first
/// error stops the work; of those that came, the earliest job's is returned. A signal stops it at once: requests under way are
/// left to themselves, and nothing of them is kept.
///
/// # Errors
///
/// What `work` or `done` return; a signal.
pub fn each<J, R, E>(
    concurrency: usize,
    jobs: Vec<J>,
    work: impl Fn(&J) -> Result<R, E> + Send + Sync + 'static,
    mut done: impl FnMut(usize, R) -> Result<(), E>,
) -> Result<(), E>
where
    J: Send + Sync + 'static,
    R: Send + 'static,
    E: From<Interrupted> + Send + 'static,
{
    let (n_jobs, next) = (jobs.len(), Arc::new(AtomicUsize::new(0)));
    let (shared, (sender, results)) = (Arc::new((jobs, work)), channel());
    for _ in 0..concurrency.min(n_jobs) {
        let (sender, next, shared) = (sender.clone(), Arc::clone(&next), Arc::clone(&shared));
        std::thread::spawn(move || {
            let (jobs, work) = &*shared;
            loop {
                let idx = next.fetch_add(1, Ordering::Relaxed);
                let Some(job) = jobs.get(idx) else { return };
                if sender.send((idx, work(job))).is_err() {
                    return;
                }
            }
        });
    }
    drop((sender, shared));
    let mut failed: Option<(usize, E)> = None;
    loop {
        let (idx, result) = match results.recv_timeout(LOOK) {
            Ok(found) => found,
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                if let Err(interrupted) = interrupt::check() {
                    next.store(n_jobs, Ordering::Relaxed);
                    return Err(interrupted.into());
                }
                continue;
            }
        };
        if let Err(error) = result.and_then(|result| done(idx, result)) {
            next.store(n_jobs, Ordering::Relaxed); // no job begins any more
            if failed.as_ref().is_none_or(|(earliest, _)| idx < *earliest) {
                failed = Some((idx, error));
            }
        }
    }
    failed.map_or(Ok(()), |(_, error)| Err(error))
}
