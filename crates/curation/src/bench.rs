//! Speed of conversations and judging, beside what the model's matrix products alone would give in the same run.

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, bail};
use arete_chain::Turns;
use arete_model::bench::{Table, products_per_s};
use arete_model::generate::Sampling;
use arete_records::{Message, Refusal};
use clap::{Args, FromArgMatches};

use crate::config::ComputeConfig;
use crate::engine::{Chain, Drawing, Engine, Labels, LocalEngine, Query};
use crate::judge::verdict::LabelMass;
use crate::judge::{Judge, Pair};
use crate::judge::{JudgeConfig, Method};
use crate::prompts::{self, Context, Selection};
use arete_chain::Constitution;
use arete_stage::units::UNIT;

/// New tokens a turn, as in the peers' measurements.
const NEW_TOKENS: usize = 32;

/// Rows of the products that judging is compared with: enough for their full speed.
const JUDGE_ROWS: usize = 512;

/// Tokens of the two conversations a judge is shown, with everything around them.
const PAIR_TOKENS: usize = 300;

/// Words that end the judge's question, so that it has 25 tokens from where the virtues part.
const QUESTION: &str = "Please reply with the letter A or B only, and write nothing else.";

/// Settings of `bench`.
#[derive(Debug, Clone, clap::Args)]
pub struct BenchConfig {
    /// Prompts of the conversations
    #[arg(long, default_value = "data/prompts", value_name = "PATH")]
    pub prompts: PathBuf,
    /// Constitution (TOML) with the virtue questions
    #[arg(long, default_value = "data/constitution.toml", value_name = "FILE")]
    pub constitution: PathBuf,
    /// Pairs judged
    #[arg(long, default_value_t = 4, value_name = "N")]
    pub n_pairs: usize,
    /// Where the model computes.
    #[command(flatten)]
    pub compute: ComputeConfig,
}

/// Measures both and writes the table to `out`.
///
/// # Errors
///
/// A model or file that cannot be read, a setting of 0, a closed `out`.
pub fn run(config: &BenchConfig, model: &str, out: &mut impl Write) -> Result<()> {
    if config.n_pairs == 0 {
        bail!(Refusal::setting("n_pairs", "at least 1", "0"));
    }
    let engine = LocalEngine::load(model, None, &config.compute.load_options()?)?;
    let mut engine = Engine::Local(Box::new(engine));
    let mut table = Table::default();
    let chains = chains(config)?;
    conversations(&mut engine, &chains, &mut table)?;
    judging(&mut engine, config, &chains, &mut table)?;
    Ok(table.write(out, local(&mut engine).decoder())?)
}

/// Two samples of the chain for a unit's prompts.
fn chains(config: &BenchConfig) -> Result<Vec<Chain>> {
    let selection = Selection {
        context: Context::Opening,
        limit: UNIT,
        max_of_split: [0; 3],
        max_chars: 400,
        source: None,
        columns: Vec::new(),
        seed: 0,
    };
    let rows = prompts::gather(std::slice::from_ref(&config.prompts), &selection)?.rows;
    let questions: Vec<String> =
        Turns::default().questions().into_iter().map(str::to_owned).collect();
    let chain = |(key, row): (u64, arete_records::rows::PromptRow)| Chain {
        messages: row.prompt,
        questions: questions.clone(),
        key,
        samples: vec![0, 1],
    };
    Ok((0..).zip(rows).map(chain).collect())
}

/// New tokens a second of whole conversations: prompts and questions computed, no turn ending early.
fn conversations(engine: &mut Engine, chains: &[Chain], table: &mut Table) -> Result<()> {
    let rows: usize = chains.iter().map(|chain| chain.samples.len()).sum();
    local(engine).ends_turns = false;
    let drawing = |max_new_tokens| Drawing {
        seed: 0,
        sampling: Sampling::at(0.7),
        max_new_tokens,
        is_verdict: false,
    };
    let bound = products_per_s(local(engine).decoder(), rows, true)?;
    engine.chains(chains, &drawing(1))?;
    let started = Instant::now();
    let replies = engine.chains(chains, &drawing(NEW_TOKENS))?;
    let elapsed_s = started.elapsed().as_secs_f64();
    let n_new: usize = replies.iter().flatten().flatten().map(|reply| reply.n_tokens).sum();
    table.push(
        format!("conversations, {rows} in flight, 3 turns of {NEW_TOKENS}, new"),
        n_new as f64 / elapsed_s,
        "tokens/s",
        Some(bound),
        "ceiling: products of the new tokens alone",
    );
    local(engine).ends_turns = true;
    Ok(())
}

/// Pairs a second of all virtues in both orders, with common prefixes computed once and without.
fn judging(
    engine: &mut Engine,
    config: &BenchConfig,
    chains: &[Chain],
    table: &mut Table,
) -> Result<()> {
    let queries = queries(engine, config, chains)?;
    let n_virtues = Constitution::load(&config.constitution)?.virtues.len();
    let per_pair = 2 * n_virtues;
    let sequences = local(engine).sequences(&queries)?;
    let lengths = prefix_and_question(&sequences[..n_virtues]);
    let bound = products_per_s(local(engine).decoder(), JUDGE_ROWS, false)?;
    let mut found: Vec<(f64, Vec<LabelMass>)> = Vec::new();
    for share in [true, false] {
        local(engine).share_prefixes = share;
        let n_computed = local(engine).n_computed(&sequences);
        engine.label_masses(&queries[..per_pair], Labels::AB)?;
        let started = Instant::now();
        let masses = engine.label_masses(&queries, Labels::AB)?;
        let pairs_per_s = config.n_pairs as f64 / started.elapsed().as_secs_f64();
        let per_pair = n_computed as f64 / config.n_pairs as f64;
        table.push(
            format!(
                "judging, {} tokens and questions of {}, {}",
                lengths.0,
                lengths.1,
                match share {
                    true => "prefixes shared",
                    false => "unshared",
                }
            ),
            pairs_per_s,
            "pairs/s",
            Some(bound / per_pair),
            format!("ceiling: products of the {per_pair:.0} tokens computed a pair"),
        );
        found.push((pairs_per_s, masses));
    }
    local(engine).share_prefixes = true;
    table.push(
        "judging, shared against unshared",
        found[0].0 / found[1].0,
        "times",
        None,
        "aim: 3",
    );
    let difference = largest_difference(&found[0].1, &found[1].1);
    let note = format!("{difference:.1e}; aim: 1e-5 in f32, 1e-3 in bf16");
    table.push(
        "judging, probabilities shared and unshared",
        difference,
        "largest difference",
        None,
        note,
    );
    Ok(())
}

/// The questions about pairs of about [`PAIR_TOKENS`] tokens.
fn queries(engine: &mut Engine, config: &BenchConfig, chains: &[Chain]) -> Result<Vec<Query>> {
    let constitution = Constitution::load(&config.constitution)?;
    let command = JudgeConfig::augment_args(clap::Command::new("bench").no_binary_name(true));
    let matches = command.try_get_matches_from(std::iter::empty::<&str>());
    let mut judge_config = matches
        .and_then(|matches| JudgeConfig::from_arg_matches(&matches))
        .expect("every setting of a judge has a default");
    judge_config.judge_template =
        judge_config.judge_template.replace("Reply with the letter A or B only.", QUESTION);
    let mut out = Vec::new();
    for idx in 0..config.n_pairs {
        let judge = Judge::new(engine, &judge_config, &constitution, &[], Method::PairwiseLogits)?;
        // Other prompts' text, as much of it as it takes.
        let words: Vec<String> = (chains.iter().cycle().skip(idx).take(chains.len()))
            .flat_map(|chain| chain.messages[0].content.split_whitespace().map(str::to_owned))
            .collect();
        let pair = |n_words: usize| {
            let text = |from: usize| {
                words.iter().cycle().skip(from).take(n_words).cloned().collect::<Vec<_>>().join(" ")
            };
            Pair {
                question: chains[idx % chains.len()].messages.clone(),
                sides: [0, words.len() / 2].map(|from| vec![Message::assistant(text(from))]),
                key: idx as u64,
            }
        };
        let n_prefix = |n_words: usize| -> Result<usize> {
            let queries = judge.queries(&[pair(n_words)]);
            let Engine::Local(local) = &*engine else { unreachable!("the bench loads a model") };
            Ok(prefix_and_question(&local.sequences(&queries[..constitution.virtues.len()])?).0)
        };
        let (mut low, mut high) = (1, PAIR_TOKENS);
        while low < high {
            let middle = (low + high) / 2;
            if n_prefix(middle)? < PAIR_TOKENS { low = middle + 1 } else { high = middle }
        }
        out.extend(judge.queries(&[pair(low)]));
    }
    Ok(out)
}

/// Tokens that the five virtues' questions share, and the most that follow.
fn prefix_and_question(sequences: &[Vec<i64>]) -> (usize, usize) {
    let first = &sequences[0];
    let shared = (0..first.len())
        .take_while(|&at| sequences.iter().all(|other| other.get(at) == first.get(at)))
        .count();
    (shared, sequences.iter().map(Vec::len).max().unwrap_or(0) - shared)
}

/// The largest |difference| between the probabilities of a label.
fn largest_difference(one: &[LabelMass], other: &[LabelMass]) -> f64 {
    let p = |mass: &LabelMass| mass.first / (mass.first + mass.second);
    let differences = one
        .iter()
        .zip(other)
        .flat_map(|(a, b)| [a.first - b.first, a.second - b.second, p(a) - p(b)].map(f64::abs));
    differences.fold(0.0, f64::max)
}

fn local(engine: &mut Engine) -> &mut LocalEngine {
    match engine {
        Engine::Local(local) => local,
        Engine::Server(_) | Engine::Fleet(_) => unreachable!("the bench loads a model"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_question_begins_where_the_sequences_part() {
        let sequences = [vec![1, 2, 3, 4], vec![1, 2, 5], vec![1, 2, 3, 4, 5, 6]];
        assert_eq!(prefix_and_question(&sequences), (2, 4));
    }

    #[test]
    fn the_largest_difference_is_found_in_masses_and_ratios() {
        let mass = |first, second| LabelMass { first, second };
        let one = [mass(0.5, 0.25), mass(0.1, 0.1)];
        let difference = largest_difference(&one, &[mass(0.5, 0.25), mass(0.1, 0.3)]);
        assert!((difference - 0.25).abs() < 1e-12); // 1/2 against 1/4
        assert_eq!(largest_difference(&one, &one), 0.0);
    }
}
