//! Mistral/Llama decoder over libtorch: loading, chat templates, NF4, LoRA, generation, log-probabilities.
//!
//! Usable alone: [`Model::load`] opens a Hugging Face directory, a GGUF file or a hub id, and the rest works on what it
//! returns. `examples/` has one short program per use: `generate`, `logprobs`, `shared_prefix` (several questions
//! about one conversation that is computed once), `lora_step`, `quantise`, `reward_score`, `merge`.

pub mod adapter;
mod batch;
#[cfg(feature = "cli")]
pub mod bench;
mod cache;
pub mod checkpoint;
pub mod cuda;
mod decoder;
mod error;
pub mod generate;
mod head;
#[cfg(feature = "hub")]
pub mod hub;
mod json;
#[cfg(all(test, feature = "cuda"))]
mod launches;
#[cfg(test)]
mod levels;
pub mod logprobs;
pub mod machine;
mod model;
pub mod nf4;
mod ops;
pub mod random;
mod self_test;
pub mod text;

pub use adapter::{Adapter, LoraConfig, LoraPair, Target};
pub use arete_records::{FinishReason, Message, Role};
pub use batch::{Batch, BatchBuilder, SegmentIdx};
pub use checkpoint::{Checkpoint, Family, ModelConfig, RopeScaling, Source};
pub use decoder::{Decoder, LoadOptions, Pass, default_dtype};
pub use error::{Error, class_of};
pub use head::ScalarHead;
pub use json::read_object as read_json_object;
pub use model::Model;
pub use nf4::Nf4Options;
pub use ops::{Amx, kernels_name};
pub use self_test::{OnednnIsa, ProductTest, SelfTest, self_tests};
pub use tch::{Device, Kind, Tensor, no_grad_guard};
pub use text::{Chat, ChatTemplate, Rendered, Tokenizer};
