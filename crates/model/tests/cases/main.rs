//! Nothing wrong in silence: models, adapters, tokenizers and templates of the kinds that were once read wrongly, each with
//! what others make of it.
//!
//! Expected values are those of transformers, peft, Jinja2 and llama.cpp (`scripts/goldens/`), or follow from a model that has
//! such values elsewhere in the tests.

#![expect(clippy::unwrap_used, reason = "a test: a failure here is the finding")]

mod common;
mod finite;
mod limits;
mod outputs;
mod prompts;
mod tokens;
mod wrong_model;
