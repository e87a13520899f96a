//! Mistral/Llama decoder over libtorch: loading, chat templates, NF4, LoRA, generation, log-probabilities.

mod error;

pub use error::Error;
