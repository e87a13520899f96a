//! Servers that do a model's work: sampling chains, label probabilities, scores of reward models.
//!
//! In: addresses of servers that hold the base (vLLM, or SGLang as a [dialect]), and adapters of the trainer's. Out: replies as the
//! tokens that were sampled, and a [journal] of every one of them. A [fleet] loads the policy's adapter on every server, all or
//! none, and a [canary] proves by log-probabilities of a fixed text that each answers with those weights; [chains] are sampled
//! turn by turn, a server that dies loses the replies in flight and no more. [scores] come from reward models' adapters on a
//! pooling server. [http] is what every client of a server here shares, [pool] how requests run beside each other, [spread] how those
//! that any server may answer find one that works.
//!
//! Where others differ: nothing is loaded in place or under a name or path that was used before (servers cache by both);
//! the trainer's own log-probabilities are those that it learns with, the server's are compared with them.

pub mod canary;
pub mod chains;
pub mod config;
pub mod dialect;
mod error;
pub mod fleet;
pub mod http;
pub mod journal;
pub mod pool;
pub mod scores;
pub mod spread;

pub use config::{EngineArgs, ServerConfig};
pub use dialect::Dialect;
pub use error::{Error, class_of};
pub use fleet::Fleet;

use sha2::{Digest, Sha256};

/// A seed for one request, which is the same whatever else is asked.
#[must_use]
pub fn request_seed(seed: u64, key: u64, sample: u64, turn: usize) -> u64 {
    let mut hash = Sha256::new();
    for part in [seed, key, sample, turn as u64] {
        hash.update(part.to_le_bytes());
    }
    let digest = hash.finalize();
    // 31 bits: some servers take no more.
    u64::from(u32::from_le_bytes([digest[0], digest[1], digest[2], digest[3]]) >> 1)
}
