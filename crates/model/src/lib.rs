//! Mistral/Llama decoder over libtorch: loading, chat templates, NF4, LoRA, generation, log-probabilities.

pub mod adapter_files;
mod batch;
mod cache;
pub mod chain;
pub mod checkpoint;
pub mod commands;
pub mod config;
pub mod cuda;
mod decoder;
mod error;
pub mod generate;
mod head;
pub mod hub;
pub mod logprobs;
mod lora;
pub mod merge;
mod model;
pub mod nf4;
mod ops;
pub mod random;
pub mod template;
pub mod tokenizer;

pub use batch::{Batch, BatchBuilder, SegmentIdx};
pub use chain::{Chat, Rendered};
pub use checkpoint::{Checkpoint, Source};
pub use config::ModelConfig;
pub use decoder::{Decoder, LoadOptions, Pass, default_dtype};
pub use error::Error;
pub use head::ScalarHead;
pub use lora::{Adapter, LoraConfig, LoraPair, Target};
pub use model::Model;
pub use nf4::Nf4Options;
pub use ops::kernels_name;
pub use tch::{Device, Kind, Tensor};
pub use template::ChatTemplate;
pub use tokenizer::Tokenizer;
