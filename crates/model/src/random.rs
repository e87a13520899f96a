//! Counter-based randomness: a value depends on its key alone, never on what was drawn before it.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use sha2::{Digest, Sha256};

/// A ChaCha stream for one purpose.
pub fn stream(seed: u64, purpose: &str) -> ChaCha8Rng {
    let mut hash = Sha256::new();
    hash.update(seed.to_le_bytes());
    hash.update(purpose.as_bytes());
    ChaCha8Rng::from_seed(hash.finalize().into())
}

/// Uniform in [0, 1) with 53 bits.
pub fn uniform(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// `n` draws of a normal distribution with mean 0 (Box-Muller).
pub fn normal(seed: u64, purpose: &str, n: usize, std: f64) -> Vec<f32> {
    let mut rng = stream(seed, purpose);
    let mut out = Vec::with_capacity(n + 1);
    while out.len() < n {
        let radius = (-2.0 * (1.0 - uniform(&mut rng)).ln()).sqrt();
        let angle = std::f64::consts::TAU * uniform(&mut rng);
        out.push((std * radius * angle.cos()) as f32);
        out.push((std * radius * angle.sin()) as f32);
    }
    out.truncate(n);
    out
}

/// `n` draws uniform in [-limit, limit).
pub fn symmetric(seed: u64, purpose: &str, n: usize, limit: f64) -> Vec<f32> {
    let mut rng = stream(seed, purpose);
    (0..n).map(|_| ((2.0 * uniform(&mut rng) - 1.0) * limit) as f32).collect()
}
