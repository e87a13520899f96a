//! A model ready to use: decoder, tokenizer and template of one source.

use std::path::PathBuf;

use arete_records::hashes::sha256_path;

use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::{Checkpoint, Source};
use crate::decoder::{Decoder, LoadOptions};
use crate::generate::{self, Options, Request, Sampling, Stream};
use crate::head::ScalarHead;
use crate::text::Chat;
use crate::text::template::ChatTemplate;
use crate::text::tokenizer::Tokenizer;
use crate::{Error, Message};

/// Decoder, tokenizer and chat template of one source.
#[derive(Debug)]
pub struct Model {
    /// The architecture.
    pub config: ModelConfig,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Conversations to text; models that were not trained on any have none.
    pub template: Option<ChatTemplate>,
    /// The weights.
    pub decoder: Decoder,
    /// [`Checkpoint::sha256`]: what adapters remember of their base.
    pub base_sha256: String,
    /// The scalar head, where the source is a reward model.
    pub head: Option<ScalarHead>,
    path: PathBuf,
}

impl Model {
    /// The longest reply of [`Model::reply`], in tokens.
    pub const REPLY_TOKENS: usize = 512;

    /// Opens, reads and, if asked, packs a model.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with its files, named.
    pub fn load(source: &Source, options: &LoadOptions) -> Result<Self, Error> {
        let checkpoint = Checkpoint::open(source)?;
        let decoder = Decoder::load(&checkpoint, options)?;
        let base_sha256 = checkpoint.sha256()?;
        Ok(Self { base_sha256, ..Self::around(&checkpoint, decoder)? })
    }

    /// [`Model::load`] with an empty [`Model::base_sha256`]: the files are read once less, but no adapter can be
    /// checked against this base.
    ///
    /// # Errors
    ///
    /// As [`Model::load`].
    pub fn load_unhashed(source: &Source, options: &LoadOptions) -> Result<Self, Error> {
        let checkpoint = Checkpoint::open(source)?;
        let decoder = Decoder::load(&checkpoint, options)?;
        Self::around(&checkpoint, decoder)
    }

    /// [`Model::load_unhashed`] with the blocks left on disk ([`Decoder::streamed`]).
    ///
    /// # Errors
    ///
    /// As [`Model::load`].
    pub fn streamed(source: &Source, options: &LoadOptions) -> Result<Self, Error> {
        let decoder = Decoder::streamed(Checkpoint::open(source)?, options)?;
        Self::around(&Checkpoint::open(source)?, decoder)
    }

    fn around(checkpoint: &Checkpoint, decoder: Decoder) -> Result<Self, Error> {
        let tokenizer = checkpoint.tokenizer()?;
        tokenizer.warn_of_tokens_without_row();
        let template = match tokenizer.template() {
            Ok(template) => Some(template),
            Err(Error::NoTemplate { .. }) => None,
            Err(error) => return Err(error),
        };
        let config = checkpoint.config().clone();
        let head = match config.sequence_classification {
            true => {
                let weight = checkpoint.tensor("score.weight")?;
                let device = decoder.device();
                Some(ScalarHead::from_weight(&weight, config.hidden_size, device)?)
            }
            false => None,
        };
        let (path, base_sha256) = (checkpoint.path().to_path_buf(), String::new());
        Ok(Self { config, tokenizer, template, decoder, base_sha256, head, path })
    }

    /// Whether `sha256` is what something remembers of this model: [`Model::base_sha256`], or, as written before that was over
    /// weights and configuration only, the sum over all files of its directory.
    ///
    /// # Errors
    ///
    /// [`Error::Io`], if the files must be read for it.
    pub fn is_base(&self, sha256: &str) -> Result<bool, Error> {
        Ok(self.base_sha256 == sha256 || sha256_path(&self.path)? == sha256)
    }

    /// Conversations to tokens, as this model's template has them.
    ///
    /// # Errors
    ///
    /// [`Error::NoTemplate`] if the model has none; what the template refuses.
    pub fn chat(&self) -> Result<Chat<'_>, Error> {
        match &self.template {
            Some(template) => Chat::new(&self.tokenizer, template),
            None => Err(Error::NoTemplate { path: self.path.clone() }),
        }
    }

    /// The model's reply to a conversation: the most probable tokens, at most [`Model::REPLY_TOKENS`], as text. More is in
    /// [`generate`].
    ///
    /// # Errors
    ///
    /// As [`Model::chat`]; a conversation that does not fit the model's positions.
    pub fn reply(&self, messages: &[Message]) -> Result<String, Error> {
        let chat = self.chat()?;
        let prompt_ids = chat.render_prompt(messages)?;
        let room = self.config.max_position_embeddings.saturating_sub(prompt_ids.len());
        let stream = Stream { seed: 0, prompt: 0, sample: 0 };
        let request = Request::new(prompt_ids, vec![stream], room.clamp(1, Self::REPLY_TOKENS));
        let options = Options::new(Sampling::GREEDY, self.stop_ids()?);
        let (decoder, tokenizer) = (&self.decoder, Some(&self.tokenizer));
        let mut replies = generate::complete(decoder, tokenizer, None, &[request], &options)?;
        chat.reply_text(&replies.remove(0).remove(0).token_ids)
    }

    /// Tokens that end a turn: the template's end of turn and the model's ends of text.
    ///
    /// # Errors
    ///
    /// As [`Model::chat`].
    pub fn stop_ids(&self) -> Result<Vec<i64>, Error> {
        let end_of_turn = self.chat()?.end_of_turn_id();
        let others = self.config.eos_token_ids.iter().copied().filter(|id| *id != end_of_turn);
        Ok(std::iter::once(end_of_turn).chain(others).collect())
    }
}
