//! Between messages and tokens: vocabularies, chat templates, conversations rendered and read back.

mod chat;
pub(crate) mod template;
pub(crate) mod tokenizer;

pub use chat::{Chat, Rendered};
pub use template::{ChatTemplate, DEFAULT_DATE, Date};
#[cfg(feature = "gguf")]
pub use tokenizer::GgufVocabulary;
pub use tokenizer::{TextStream, Tokenizer};
