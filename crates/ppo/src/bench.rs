//! `arete-ppo bench`: iterations at the setting that the peers were measured at, phase by phase, beside this machine's
//! matrix products.
//!
//! Three reward models with random adapters and heads cost what trained ones do. No token ends a reply, so that every run
//! does the same work.

use anyhow::Result;
use arete_chain::{CutReply, Reading, Turns};
use arete_model::bench::{Table, products_per_s};
use arete_model::{Adapter, Chat, Model, ScalarHead, Source};
use arete_records::Message;
use arete_training::Ranks;
use arete_training::runtime::{self, Dtype};
use clap::{Args, FromArgMatches};

use crate::Config;
use crate::config::{Algorithm, CriticKind, RolloutKind};
use crate::iteration::{Iteration, Outcome, Phase};
use crate::models::Models;
use crate::prompts::Prompt;
use crate::rollout::{Conversation, Sampler};
use crate::scorer::RewardModels;
use crate::update::{Optimisers, Rates};

/// Which iteration is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Case {
    /// Answers alone, the value head on the policy's hidden states; every prompt begins differently.
    Trunk,
    /// The same with a value adapter.
    Adapter,
    /// The first, but all prompts begin with the chat template's own system prompt, as a run's do.
    Template,
    /// The three-turn chain after such prompts.
    Chain,
    /// The same with four samples a prompt that are compared with each other, and no critic.
    Rloo,
}

/// Samples a prompt of [`Case::Rloo`].
const SAMPLES: usize = 4;

/// What to measure.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Hugging Face directory, GGUF file or hub id
    #[arg(long)]
    pub model: String,
    /// Which iterations, separated by commas
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "trunk,adapter,template,chain,rloo"
    )]
    pub cases: Vec<Case>,
    /// Conversations of an iteration; of one prompt each, but in the case rloo
    #[arg(long, default_value_t = 32)]
    pub prompts: usize,
    /// Tokens of a prompt, template included
    #[arg(long, default_value_t = 40)]
    pub prompt_tokens: usize,
    /// Tokens of an answer
    #[arg(long, default_value_t = 48)]
    pub new_tokens: usize,
    /// Tokens of each reply of a chain
    #[arg(long, default_value_t = 32)]
    pub chain_tokens: usize,
    /// Number format
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    /// Where to compute
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// CPU threads; 0 = one a core
    #[arg(long, default_value_t = 0)]
    pub threads: u32,
}

/// Runs one iteration of each case and prints the table.
///
/// # Errors
///
/// What loading the model or an iteration gives.
pub fn run(arguments: &Arguments) -> Result<()> {
    runtime::set_threads(arguments.threads);
    let device = runtime::device(&arguments.device)?;
    let options = runtime::load_options(device, arguments.dtype, false, false);
    let model = Model::load(&Source::parse(&arguments.model)?, &options)?;
    let decoder = &model.decoder;
    let ceiling = Ceiling {
        linear: products_per_s(decoder, 512, false)?,
        whole: products_per_s(decoder, 512, true)?,
        decoding: products_per_s(decoder, arguments.prompts, true)?,
    };
    let mut table = Table::default();
    for &case in &arguments.cases {
        let config = config(case, arguments);
        // A small one first: libraries set themselves up in the first calls.
        let rollout_size = config.samples_per_prompt.max(2);
        iterate(&model, &Config { max_new_tokens: 2, rollout_size, ..config.clone() }, case, 8)?;
        let outcome = iterate(&model, &config, case, arguments.prompt_tokens)?;
        report(&mut table, case, &config, &outcome, &ceiling);
    }
    Ok(table.write(&mut std::io::stdout().lock(), decoder)?)
}

/// The peers' settings; everything else as a run has it.
fn config(case: Case, arguments: &Arguments) -> Config {
    let command = Config::augment_args(clap::Command::new("ppo"));
    let defaults = Config::from_arg_matches(&command.get_matches_from(["ppo"]));
    let samples_per_prompt = if case == Case::Rloo { SAMPLES } else { 1 };
    let (rollout, max_new_tokens) = match case {
        Case::Chain | Case::Rloo => (RolloutKind::Chain, arguments.chain_tokens),
        Case::Trunk | Case::Adapter | Case::Template => (RolloutKind::Answer, arguments.new_tokens),
    };
    Config {
        rollout,
        max_new_tokens,
        rollout_size: arguments.prompts.next_multiple_of(samples_per_prompt),
        samples_per_prompt,
        algorithm: if case == Case::Rloo { Algorithm::Rloo } else { Algorithm::Ppo },
        n_minibatches: 1,
        epochs: 2,
        value_warmup: 0,
        target_kl: 0.0,
        value: if case == Case::Adapter { CriticKind::Adapter } else { CriticKind::Trunk },
        ..defaults.expect("every setting has a default")
    }
}

fn iterate(model: &Model, config: &Config, case: Case, n_tokens: usize) -> Result<Outcome> {
    let chat = model.chat()?;
    let own_system = matches!(case, Case::Trunk | Case::Adapter);
    let prompts: Vec<Prompt> = (0..config.n_prompts())
        .map(|idx| prompt(&chat, idx, n_tokens, own_system))
        .collect::<Result<_, _>>()?;
    let turns = Turns::default();
    let sampler = Sampler {
        turns: turns.clone(),
        kind: config.rollout,
        max_new_tokens: config.max_new_tokens,
        temperature: config.temperature,
        stop_ids: Vec::new(),
        samples_per_prompt: config.samples_per_prompt,
        max_rows: config.max_rows,
        seed: 0,
    };
    let reward = |seed| -> Result<_> {
        let (shape, device) = (&model.config, model.decoder.device());
        let adapter = Adapter::new("reward", shape, &config.lora.config(), seed, device)?;
        Ok((adapter, ScalarHead::normal(shape.hidden_size, seed, device)))
    };
    let reading = Reading::whole(model, CutReply::Trim);
    let models = vec![reward(1)?, reward(2)?, reward(3)?];
    let rewards = RewardModels::of_models(models, &reading, &turns, config.rollout);
    let models = Models::new(&model.decoder, config)?;
    let mut optimisers = Optimisers::new(&models, config)?;
    let work = Iteration {
        ranks: &Ranks::alone(),
        config,
        model,
        chat: &chat,
        rewards: &rewards,
        sampler: &sampler,
        serving: None,
        iteration: 1,
        kl_coef: config.kl_coef,
        rates: Rates { policy: config.learning_rate, critic: config.value_learning_rate },
    };
    work.run(&models, &mut optimisers, &prompts.iter().collect::<Vec<_>>(), None)
}

/// Words that are one token each in most vocabularies.
const WORDS: [&str; 24] = [
    "help", "time", "good", "people", "world", "work", "friend", "water", "day", "life", "word",
    "story", "house", "music", "road", "child", "hand", "food", "garden", "school", "letter",
    "city", "night", "plan",
];

/// A prompt of `n_tokens` tokens, or as few as the template leaves room for; with a system message of its own
/// it has no more than the template's markers in common with the others.
fn prompt(chat: &Chat<'_>, idx: usize, n_tokens: usize, own_system: bool) -> Result<Prompt> {
    let word = |k: usize| WORDS[(idx * 7 + k * (1 + idx / WORDS.len())) % WORDS.len()];
    let system = own_system.then(|| Message::system(format!("{} {}", word(0), word(3))));
    let mut text = word(1).to_owned();
    for k in 2.. {
        let messages: Vec<Message> =
            system.iter().cloned().chain([Message::user(text.as_str())]).collect();
        let token_ids = chat.render_prompt(&messages)?;
        if token_ids.len() >= n_tokens {
            return Ok(Prompt { prompt_id: idx.to_string(), messages, token_ids });
        }
        text.push(' ');
        text.push_str(word(k));
    }
    unreachable!("every word adds a token")
}

/// What the matrix products alone would give, tokens a second.
struct Ceiling {
    /// The blocks' linear layers, many rows at a time.
    linear: f64,
    /// Those and the product with the vocabulary.
    whole: f64,
    /// The same, a row a sequence.
    decoding: f64,
}

impl Ceiling {
    /// Seconds for `n` tokens through the blocks, and `n_vocabulary` of them through the vocabulary.
    fn seconds(&self, n: usize, n_vocabulary: usize) -> f64 {
        let vocabulary = (1.0 / self.whole - 1.0 / self.linear).max(0.0);
        n as f64 / self.linear + n_vocabulary as f64 * vocabulary
    }

    /// Seconds that a phase's products would take.
    fn of(&self, what: &str, config: &Config, n_own: usize, n_tokens: usize, n_read: usize) -> f64 {
        // A critic with an adapter of its own goes through the blocks once more, there and back.
        let passes = if config.value == CriticKind::Adapter { 2 } else { 1 };
        match what {
            "sampling" => n_own as f64 / self.decoding + self.seconds(n_tokens - n_own, 0),
            "scoring" => self.seconds(n_read, 0),
            "reference" => self.seconds(n_tokens, n_own),
            // The derivative by the hidden states is one more product with the vocabulary.
            "first pass" => self.seconds(passes * n_tokens, 2 * n_own),
            // Back; and for every further epoch there and back.
            _ => {
                let further = config.epochs as usize - 1;
                self.seconds(passes * n_tokens * (1 + 2 * further), 2 * n_own * further)
            }
        }
    }
}

fn report(table: &mut Table, case: Case, config: &Config, outcome: &Outcome, ceiling: &Ceiling) {
    let name = match case {
        Case::Trunk => "answers, value on the trunk",
        Case::Adapter => "answers, value adapter",
        Case::Template => "answers, template's system prompt",
        Case::Chain => "chain",
        Case::Rloo => "chain, rloo, four samples a prompt",
    };
    let conversations = &outcome.conversations;
    let n_own: usize = conversations.iter().map(Conversation::n_own).sum();
    let n_tokens: usize = conversations.iter().map(|c| c.token_ids.len()).sum();
    let n_read = outcome.assessment.scores.n_tokens;
    let bound = |phase: &Phase| ceiling.of(phase.what, config, n_own, n_tokens, n_read);
    let seconds: f64 = outcome.phases.iter().map(|phase| phase.seconds).sum();
    let products: f64 = outcome.phases.iter().map(bound).sum();
    let (n, rate) = (conversations.len(), n_own / conversations.len());
    let peers = match case {
        Case::Chain | Case::Rloo => "",
        _ => "; TRL, one reward model: f32 79.4 s, bf16 52.6 s (Zen 4)",
    };
    let note = format!(
        "{n} conversations, {rate} own of {} tokens; products alone {products:.1} s{peers}",
        n_tokens / n
    );
    table.push(format!("PPO iteration: {name}"), seconds, "s", None, note);
    for phase in &outcome.phases {
        let share = 100.0 * phase.seconds / seconds;
        let note = format!("{:.1} s, {share:.0} %; ceiling: products", phase.seconds);
        let products_per_s = phase.n_tokens as f64 / bound(phase);
        let figure = phase.tokens_per_s();
        table.push(format!("– {}", phase.what), figure, "tokens/s", Some(products_per_s), note);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ceiling_counts_passes_and_vocabulary_products() {
        // 100 tokens/s through the blocks, 50 with the vocabulary: 0.01 s each.
        let ceiling = Ceiling { linear: 100.0, whole: 50.0, decoding: 20.0 };
        let command = Config::augment_args(clap::Command::new("ppo"));
        let config = Config::from_arg_matches(&command.get_matches_from(["ppo"])).unwrap();
        let of = |what: &str, config: &Config| ceiling.of(what, config, 10, 100, 300);
        let close = |a: f64, b: f64| (a - b).abs() < 1e-9;
        assert!(close(of("sampling", &config), 0.5 + 0.9));
        assert!(close(of("scoring", &config), 3.0));
        assert!(close(of("reference", &config), 1.1));
        assert!(close(of("first pass", &config), 1.2));
        assert!(close(of("update", &config), 3.2));
        let own = Config { value: CriticKind::Adapter, epochs: 1, ..config };
        assert!(close(of("first pass", &own), 2.2));
        assert!(close(of("update", &own), 2.0));
    }
}
