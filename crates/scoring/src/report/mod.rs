//! The stage `report`: one page that shows a run, with its charts as SVG files beside it.
//!
//! The page needs no network: style, script and drawings are inside. Texts of models and users are escaped, and a content
//! security policy lets no script run but the page's own.

mod charts;
mod html;
mod samples;
mod sections;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use arete_records::atomic;
use arete_stage::run::{self, Completion, StageSpec, Start};
use serde_json::{Map, json};
use sha2::{Digest, Sha256};

pub use charts::{Chart, Colour, Estimate, Series};

use crate::Error;
use crate::run_files::{RunFiles, STAGE_DIRS};
use html::{base64, escape};
use sections::Section;

/// The page's file.
pub const PAGE: &str = "report.html";
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

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
/// [`Error::File`] if the directory holds no run; a damaged file; a full disk.
pub fn report(inputs: &ReportInputs) -> Result<PathBuf, Error> {
    let page = inputs.output.join(PAGE);
    let mut files = Vec::new();
    for dir in STAGE_DIRS {
        // A finished stage's run.json holds the hashes of all its files; of one at work, the metrics are shown.
        let of_stage = ["run.json", "metrics.jsonl"].map(|name| inputs.run.join(dir).join(name));
        if let Some(path) = of_stage.into_iter().find(|path| path.is_file()) {
            files.push((dir.to_owned(), path));
        }
    }
    files.extend(inputs.recipe.iter().map(|recipe| ("recipe".to_owned(), recipe.clone())));
    let rollouts = inputs.run.join("ppo/rollouts");
    if rollouts.is_dir() {
        files.push(("rollouts".to_owned(), rollouts));
    }
    // Checked first, so that a wrong path does not leave an output directory behind.
    let run_files = RunFiles::read(&inputs.run)?;
    let config = json!({ "max_samples": inputs.max_samples, "page": page_version() });
    let spec =
        StageSpec { stage: "report", output: &inputs.output, config, seed: 0, inputs: files };
    let run = match run::begin(spec)? {
        Start::UpToDate(_) => {
            tracing::info!(page = %page.display(), "up to date");
            return Ok(page);
        }
        Start::Run(run) => run,
    };
    let recipe = inputs.recipe.as_ref().map(fs_err::read_to_string).transpose()?;
    let sections = sections::all(&run_files, inputs.max_samples, recipe.as_deref())?;
    let charts: Vec<&Chart> = sections.iter().flat_map(|section| &section.charts).collect();
    fs_err::create_dir_all(inputs.output.join("charts"))?;
    for chart in &charts {
        let path = inputs.output.join("charts").join(format!("{}.svg", chart.name));
        atomic::write(path, chart.standalone().as_bytes())?;
    }
    atomic::write(&page, render(&run_files, &sections).as_bytes())?;
    let counts = Map::from_iter([("charts".to_owned(), charts.len().into())]);
    let none = "none".to_owned();
    run.finish(Completion { device: none.clone(), dtype: none, counts })?;
    Ok(page)
}

/// Changes when the page does: the same run shown by other code is another page.
fn page_version() -> String {
    const CODE: [&str; 13] = [
        STYLE,
        SCRIPT,
        include_str!("charts.rs"),
        include_str!("html.rs"),
        include_str!("mod.rs"),
        include_str!("samples.rs"),
        include_str!("sections.rs"),
        include_str!("../best_of.rs"),
        include_str!("../doctor.rs"),
        include_str!("../../../chain/src/verdicts.rs"),
        include_str!("../run_files.rs"),
        include_str!("../summary.rs"),
        include_str!("../table.rs"),
    ];
    base64(&Sha256::digest(CODE.concat()))
}

/// The whole page.
fn render(run: &RunFiles, sections: &[Section]) -> String {
    let name = escape(&run.name);
    let script_hash = base64(&Sha256::digest(SCRIPT));
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; \
         script-src 'sha256-{script_hash}'; base-uri 'none'; form-action 'none'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{name} · Arete</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
         <header class=\"top\"><p class=\"kicker\">Arete · run report</p><h1>{name}</h1>\n"
    );
    out.push_str(&sections::summary(run));
    out.push_str("</header>\n<nav aria-label=\"Contents\"><ul>");
    for section in sections {
        let _ = write!(out, "<li><a href=\"#{}\">{}</a></li>", section.id, escape(section.title));
    }
    out.push_str("</ul></nav>\n<main>\n");
    for section in sections {
        let Section { id, title, lead, body, charts } = section;
        let _ = write!(out, "<section id=\"{id}\">\n<h2>{}</h2>\n", escape(title));
        if !lead.is_empty() {
            let _ = writeln!(out, "<p class=\"lead\">{}</p>", escape(lead));
        }
        if !charts.is_empty() {
            out.push_str("<div class=\"charts\">\n");
            for chart in charts {
                let _ = writeln!(
                    out,
                    "<figure id=\"chart-{}\"><h3>{}</h3>{}<figcaption>{}</figcaption></figure>",
                    chart.name,
                    escape(&chart.title),
                    chart.inline().trim_end(),
                    escape(&chart.caption)
                );
            }
            out.push_str("</div>\n");
        }
        let _ = write!(out, "{body}\n</section>\n");
    }
    let _ = write!(
        out,
        "</main>\n<footer class=\"end\">Made by arete-scoring {}</footer>\n",
        env!("CARGO_PKG_VERSION")
    );
    let _ = write!(out, "<script>{SCRIPT}</script>\n</body>\n</html>\n");
    out
}

/// Where a run's page goes when nothing else is said.
pub fn default_output(run: &Path) -> PathBuf {
    run.join("report")
}
