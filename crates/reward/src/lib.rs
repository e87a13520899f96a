//! Reward models: Bradley-Terry on preference pairs.
