//! PPO with an ensemble of reward models over one base.
