//! The comparison as a page.

use arete_records::redact;
use minijinja::value::{Serde, Value};
use minijinja::{Environment, context, escape_formatter};
use serde::Serialize;

use super::{ArmFigure, Comparison, ScoredRun};
use crate::table;

const TEMPLATE: &str = include_str!("page.html.jinja");

/// What the template reads: cells as the terminal's tables show them.
#[derive(Serialize)]
struct View<'a> {
    first: &'a str,
    last: &'a str,
    measure: &'static str,
    phrase: &'static str,
    n_looks: usize,
    runs: Vec<Vec<String>>,
    /// What `circular` means, if any run's gain is.
    circular: Option<&'static str>,
    within: Vec<Vec<String>>,
    between: Vec<Vec<String>>,
    notes: Vec<&'static str>,
    version: &'static str,
}

/// The comparison as one HTML file without scripts or links, every text in it escaped.
#[must_use]
pub fn html(runs: &[ScoredRun], comparison: &Comparison) -> String {
    let Comparison { first, last, measure, within, between, n_looks } = comparison;
    let rows = |figures: &[ArmFigure]| -> Vec<Vec<String>> {
        figures.iter().map(|own| super::figure_row(own.name.clone(), own)).collect()
    };
    let is_circular = runs.iter().any(|run| run.is_circular(first, last));
    let view = View {
        first,
        last,
        measure: measure.name(),
        phrase: measure.phrase(),
        n_looks: *n_looks,
        runs: runs.iter().map(|run| super::run_row(run, first, last)).collect(),
        circular: is_circular.then_some(table::CIRCULAR),
        within: rows(within),
        between: rows(between),
        notes: comparison.notes(),
        version: env!("CARGO_PKG_VERSION"),
    };
    let mut environment = Environment::new();
    environment.set_formatter(|out, state, value| match value.as_str() {
        Some(text) if !value.is_safe() => {
            escape_formatter(out, state, &Value::from(&*redact::redacted(text)))
        }
        _ => escape_formatter(out, state, value),
    });
    environment.add_template("compare.html", TEMPLATE).expect("the template is well-formed");
    let template = environment.get_template("compare.html").expect("it was just added");
    template.render(context! { page => Serde(&view) }).expect("the template reads the view")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_the_tables_and_escapes_names() {
        let scores: Vec<(u32, f32)> = (0..12).map(|prompt| (prompt, prompt as f32)).collect();
        let runs = ["a<b>", "c"].map(|arm| super::super::tests::run(arm, &scores));
        let found = super::super::compare(&runs, "original", "final");
        let page = html(&runs, &found);
        assert!(page.starts_with("<!doctype html>") && !page.contains("a<b>"), "{page}");
        assert!(page.contains("c − a&lt;b&gt;") && page.contains("this run only"), "{page}");
    }
}
