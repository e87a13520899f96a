//! What Arete's SFT, reward and PPO stages share: optimiser, schedule, batching, checkpoints, metrics.
