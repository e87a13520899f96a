//! `arete-model soup`: adapters of one base as one.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Context;
use arete_model::adapter;

/// Which adapters, and how much of each.
#[derive(Debug, clap::Args)]
pub(super) struct Soup {
    /// Adapter directories with their weights; weights may be negative, and need not add up to 1
    #[arg(required = true, value_name = "ADAPTER=WEIGHT")]
    adapters: Vec<Ingredient>,
    /// Directory to write
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
}

/// `ADAPTER=WEIGHT`.
#[derive(Clone, Debug)]
struct Ingredient {
    adapter: PathBuf,
    weight: f64,
}

impl FromStr for Ingredient {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // The last `=`: folders may have one in their names.
        let parsed = text.rsplit_once('=').and_then(|(adapter, weight)| {
            let weight: f64 = weight.parse().ok()?;
            (!adapter.is_empty() && weight.is_finite())
                .then(|| Self { adapter: adapter.into(), weight })
        });
        parsed
            .ok_or_else(|| format!("expected ADAPTER=WEIGHT, a directory and a number, got {text}"))
    }
}

/// Writes the sum.
pub(super) fn run(arguments: &Soup) -> anyhow::Result<()> {
    // As everywhere: `runs/demo/ppo` stands for the adapter in it.
    let directory = |path: &PathBuf| {
        let inner = path.join("adapter");
        if inner.is_dir() { inner } else { path.clone() }
    };
    let adapters: Vec<(PathBuf, f64)> = arguments
        .adapters
        .iter()
        .map(|Ingredient { adapter, weight }| (directory(adapter), *weight))
        .collect();
    let rank = adapter::soup(&adapters, &arguments.output)
        .with_context(|| format!("writing {}", arguments.output.display()))?;
    tracing::info!(adapters = adapters.len(), rank, output = %arguments.output.display(), "written");
    Ok(())
}
