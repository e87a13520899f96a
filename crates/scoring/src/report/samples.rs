//! Replies of all models to the same prompts, side by side, with what the page's script filters and sorts by.

use std::collections::HashMap;
use std::fmt::Write as _;

use arete_chain::prompt_of;
use arete_records::Aspect;
use arete_records::rows::{ConversationRow, ScoreRow};
use arete_records::stats;

use super::html::escape;
use super::sections::{ended, model_colour};
use crate::run_files::Scoring;
use crate::table::number;

/// Everything of one prompt.
struct Sample<'a> {
    /// One a model, in the summary's order.
    replies: Vec<&'a ConversationRow>,
    /// Mean standardised score of each model.
    z: Vec<f64>,
    scores: &'a HashMap<(&'a str, &'a str, Aspect), &'a ScoreRow>,
}

/// The controls, and one card a prompt.
pub(crate) fn side_by_side(scoring: &Scoring, max_samples: usize) -> String {
    let names: Vec<&str> = scoring.replies.iter().map(|(name, _)| name.as_str()).collect();
    let scores: HashMap<(&str, &str, Aspect), &ScoreRow> = scoring
        .scores
        .iter()
        .map(|row| ((row.model.as_str(), row.prompt_id.as_str(), row.aspect), row))
        .collect();
    let by_prompt: Vec<HashMap<&str, &ConversationRow>> = scoring
        .replies
        .iter()
        .map(|(_, rows)| rows.iter().map(|row| (row.prompt_id.as_str(), row)).collect())
        .collect();
    let mut samples = Vec::new();
    for row in scoring.replies.first().map_or(&[][..], |(_, rows)| rows) {
        let id = row.prompt_id.as_str();
        let replies: Option<Vec<&ConversationRow>> =
            by_prompt.iter().map(|own| own.get(id).copied()).collect();
        let Some(replies) = replies else { continue };
        let mean = |name: &&str| {
            let own: Vec<f64> = Aspect::ALL
                .iter()
                .filter_map(|a| scores.get(&(*name, id, *a)))
                .map(|row| f64::from(row.z))
                .collect();
            stats::mean(&own)
        };
        let z = names.iter().map(mean).collect();
        samples.push(Sample { replies, z, scores: &scores });
    }
    let n_all = samples.len();
    if max_samples > 0 {
        samples.truncate(max_samples);
    }
    let pairs = pairs(names.len());
    let mut out = controls(&names, &pairs);
    if samples.len() < n_all {
        let _ = write!(
            out,
            "<p class=\"dim\">The first {} of {n_all} prompts are shown.</p>",
            samples.len()
        );
    }
    out.push_str("<div id=\"samples\">\n");
    for (at, sample) in samples.iter().enumerate() {
        out.push_str(&sample.card(at, &names, &pairs));
    }
    out.push_str("</div>\n<p id=\"none\" class=\"absent\" hidden>No prompt matches.</p>");
    out
}

/// Every two models, the last against the first first.
fn pairs(n_models: usize) -> Vec<(usize, usize)> {
    let mut pairs: Vec<(usize, usize)> =
        (0..n_models).flat_map(|last| (0..last).map(move |first| (first, last))).collect();
    pairs.sort_by_key(|&(first, last)| (std::cmp::Reverse(last), first));
    pairs
}

fn controls(names: &[&str], pairs: &[(usize, usize)]) -> String {
    let mut out = String::from("<form id=\"controls\" class=\"controls\" autocomplete=\"off\">");
    out.push_str(
        "<label class=\"wide\">Search<input id=\"q\" type=\"search\" placeholder=\"words in question or replies\"></label>",
    );
    if !pairs.is_empty() {
        out.push_str("<label>Compare<select id=\"pair\">");
        for (at, &(first, last)) in pairs.iter().enumerate() {
            let _ = write!(
                out,
                "<option value=\"{at}\">{} − {}</option>",
                escape(names[last]),
                escape(names[first])
            );
        }
        out.push_str("</select></label>");
    }
    out.push_str("<label>Show<select id=\"show\"><option value=\"all\">all</option>");
    if !pairs.is_empty() {
        out.push_str(
            "<option value=\"better\">better</option><option value=\"worse\">worse</option><option value=\"same\">same</option>",
        );
    }
    out.push_str("<option value=\"cut\">a reply cut off</option></select></label>");
    out.push_str("<label>Sort<select id=\"sort\"><option value=\"file\">as in the file</option>");
    if !pairs.is_empty() {
        out.push_str(
            "<option value=\"gain\">largest gain first</option><option value=\"loss\">largest loss first</option>\
             <option value=\"change\">largest change first</option>",
        );
    }
    out.push_str("</select></label><label class=\"tick\"><input id=\"open\" type=\"checkbox\"> all turns</label>");
    out.push_str("<output id=\"count\" aria-live=\"polite\"></output></form>\n");
    out
}

impl Sample<'_> {
    fn card(&self, at: usize, names: &[&str], pairs: &[(usize, usize)]) -> String {
        let first = self.replies[0];
        let is_cut = self.replies.iter().any(|row| {
            Aspect::ALL.iter().any(|a| row.finish_reason(*a) == arete_records::FinishReason::Length)
        });
        let differences: Vec<String> = pairs
            .iter()
            .map(|&(first, last)| format!("{:.6}", self.z[last] - self.z[first]))
            .collect();
        let mut out = format!(
            "<article class=\"sample\" data-at=\"{at}\" data-cut=\"{}\" data-diff=\"{}\">",
            u8::from(is_cut),
            differences.join(" ")
        );
        let prompt = prompt_of(&first.messages).unwrap_or(&first.messages);
        if let Some((question, context)) = prompt.split_last() {
            if !context.is_empty() {
                let _ = write!(
                    out,
                    "<details class=\"context\"><summary>{} earlier messages</summary>",
                    context.len()
                );
                for message in context {
                    let _ = write!(
                        out,
                        "<p><b>{}</b> {}</p>",
                        message.role.name(),
                        escape(&message.content)
                    );
                }
                out.push_str("</details>");
            }
            let _ = write!(out, "<h3>{}</h3>", escape(&question.content));
        }
        for aspect in Aspect::ALL {
            out.push_str(&self.turn(aspect, names));
        }
        out.push_str("</article>\n");
        out
    }

    fn turn(&self, aspect: Aspect, names: &[&str]) -> String {
        let z: Vec<String> = names.iter().map(|name| self.z_text(name, aspect)).collect();
        let open = if aspect == Aspect::Action { " open" } else { "" };
        let mut out = format!("<details class=\"turn\"{open}><summary>{}", aspect.name());
        for (at, (name, z)) in names.iter().zip(&z).enumerate() {
            let (class, name) = (model_colour(at).0, escape(name));
            let _ =
                write!(out, " <span class=\"chip m{class}\" title=\"{name}\">{}</span>", escape(z));
        }
        out.push_str("</summary><div class=\"columns\">");
        for (at, (name, row)) in names.iter().zip(&self.replies).enumerate() {
            let text = row.reply(aspect);
            let shown = if text.trim().is_empty() { "(empty)".to_owned() } else { escape(text) };
            let _ = write!(
                out,
                "<section class=\"reply m{}\"><header><b>{}</b><span class=\"n\">{}</span></header><p>{shown}</p>\
                 <footer>{} tokens, {}{}</footer></section>",
                model_colour(at).0,
                escape(name),
                escape(&z[at]),
                row.n_tokens(aspect),
                ended(row.finish_reason(aspect)),
                self.yardstick_text(name, aspect)
            );
        }
        out.push_str("</div></details>");
        out
    }

    /// `, yardstick +0.123`, if there is one.
    fn yardstick_text(&self, name: &str, aspect: Aspect) -> String {
        let row = self.scores.get(&(name, self.replies[0].prompt_id.as_str(), aspect));
        let score = row.and_then(|row| row.yardstick);
        score.map_or_else(String::new, |score| {
            format!(", yardstick {}", number(f64::from(score), true))
        })
    }

    fn z_text(&self, name: &str, aspect: Aspect) -> String {
        let row = self.scores.get(&(name, self.replies[0].prompt_id.as_str(), aspect));
        row.map_or_else(|| "–".to_owned(), |row| number(f64::from(row.z), true))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_model_is_compared_with_the_first_first() {
        assert_eq!(pairs(3), [(0, 2), (1, 2), (0, 1)]);
        assert_eq!(pairs(1), []);
    }
}
