//! The stage `report`: one page that shows a run, with its charts as SVG files beside it.
//!
//! The same run gives the same page, but for one element that says when and on which machine it was made (`made.rs`).
//!
//! The page needs no network: style, script and drawings are inside. Texts of models and users are escaped, and a content
//! security policy lets no script run but the page's own.
//!
//! `templates/` holds what the page says and how it looks, `view.rs` the numbers in it, `curves.rs` which logged numbers are
//! drawn, `charts.rs` the other charts, `drawing.rs` how a chart is drawn.

mod charts;
mod curves;
mod drawing;
mod made;
mod page;
mod samples;
mod view;

use std::path::{Path, PathBuf};

use anyhow::Result;
use arete_records::{atomic, files};
use arete_stage::rounds;
use arete_stage::run::{self, Completion, StageSpec, Start};
use serde_json::{Map, json};
use sha2::{Digest, Sha256};

pub use drawing::{Chart, Colour, Cross, Estimate, Series, Unit};

use crate::run_files::{self, RunFiles};

/// Largest recipe that is shown.
const MAX_RECIPE_BYTES: u64 = 1 << 20;

/// The page's file.
pub const PAGE: &str = "report.html";

/// What the stage reads and how much it shows.
#[derive(Clone, Debug)]
pub struct ReportInputs {
    /// The run's directory.
    pub run: PathBuf,
    /// The recipe the run was made with, shown in full.
    pub recipe: Option<PathBuf>,
    /// Most prompts shown side by side, the first of the file; 0 = all.
    pub max_samples: usize,
    /// Where the page goes.
    pub output: PathBuf,
}

/// Writes the page and its charts; the page's path.
///
/// # Errors
///
/// A refused file if the directory holds no run; a damaged file; a full disk.
pub fn report(inputs: &ReportInputs) -> Result<PathBuf> {
    let page = inputs.output.join(PAGE);
    // Checked first, so that a wrong path does not leave an output directory behind.
    let run_files = RunFiles::read(&inputs.run)?;
    let mut hashed = Vec::new();
    for dir in run_files.stages.iter().map(|stage| stage.dir.as_str()) {
        // A finished stage's run.json holds the hashes of all its files; of one at work, the metrics are shown.
        let of_stage = ["run.json", "metrics.jsonl"]
            .map(|name| rounds::newest_place(&inputs.run, dir).join(name));
        if let Some(path) = of_stage.into_iter().find(|path| path.is_file()) {
            hashed.push((dir.to_owned(), path));
        }
    }
    hashed.extend(inputs.recipe.iter().map(|recipe| ("recipe".to_owned(), recipe.clone())));
    let gold = inputs.run.join(run_files::GOLD);
    hashed.extend(gold.is_file().then(|| ("gold".to_owned(), gold)));
    let rollouts = rounds::newest_place(&inputs.run, "ppo/rollouts");
    if rollouts.is_dir() {
        hashed.push(("rollouts".to_owned(), rollouts));
    }
    hashed.extend(run_files.front.iter().map(|(path, _)| ("front".to_owned(), path.clone())));
    let config = json!({ "max_samples": inputs.max_samples, "page": page_version() });
    let spec =
        StageSpec { stage: "report", output: &inputs.output, config, seed: 0, inputs: hashed };
    let run = match run::begin(spec)? {
        Start::UpToDate(_) => {
            run::say_up_to_date(&page);
            return Ok(page);
        }
        Start::Run(run) => run,
    };
    let recipe = inputs.recipe.as_deref().map(|path| files::read_text(path, MAX_RECIPE_BYTES));
    let recipe = recipe.transpose()?;
    let charts = charts::all(&run_files)?;
    fs_err::create_dir_all(inputs.output.join("charts"))?;
    let n_charts = charts.iter().map(|(_, own)| own.len()).sum::<usize>();
    for chart in charts.iter().flat_map(|(_, own)| own) {
        let path = inputs.output.join("charts").join(format!("{}.svg", chart.name));
        atomic::write(path, chart.standalone().as_bytes())?;
    }
    let made = made::Made::of(&inputs.run, &run_files);
    let view = view::Page::of(&run_files, &charts, inputs.max_samples, recipe.as_deref(), made);
    atomic::write(&page, page::render(&view).as_bytes())?;
    let counts = Map::from_iter([("charts".to_owned(), n_charts.into())]);
    let none = "none".to_owned();
    run.finish(Completion { device: none.clone(), dtype: none, counts })?;
    Ok(page)
}

/// Changes when the page does: the same run shown by other code is another page.
fn page_version() -> String {
    const CODE: [&str; 16] = [
        include_str!("charts.rs"),
        include_str!("curves.rs"),
        include_str!("drawing.rs"),
        include_str!("drawing/crosses.rs"),
        include_str!("made.rs"),
        include_str!("page.rs"),
        include_str!("samples.rs"),
        include_str!("view.rs"),
        include_str!("../best_of.rs"),
        include_str!("../doctor.rs"),
        include_str!("../front.rs"),
        include_str!("../gold.rs"),
        include_str!("../../../chain/src/verdicts.rs"),
        include_str!("../run_files.rs"),
        include_str!("../summary.rs"),
        include_str!("../table.rs"),
    ];
    let templates = page::TEMPLATES.map(|(_, source)| source).concat();
    page::base64(&Sha256::digest(CODE.concat() + page::STYLE + page::SCRIPT + &templates))
}

/// Where a run's page goes when nothing else is said.
pub fn default_output(run: &Path) -> PathBuf {
    run.join("report")
}
