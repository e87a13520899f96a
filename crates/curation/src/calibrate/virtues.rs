//! A virtue at a time: whether a judge tells the pairs apart that differ in that virtue alone, and may vote by it.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, bail};
use arete_records::rows::JudgementRow;
use arete_records::stats::normal_quantile;
use arete_records::{Refusal, Virtue, files, stats};
use arete_stage::run::{RUN_JSON, RunJson};
use serde::{Deserialize, Serialize};

use super::{Agreement, Labelled};
use crate::judge::Method;
use crate::stage;

/// Largest `calibration.json` that is read, in bytes.
const MAX_BYTES: u64 = 16 << 20;

/// What a method makes of one virtue's pairs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VirtueLine {
    /// The virtue.
    pub virtue: Virtue,
    /// The method.
    pub method: String,
    /// Judged examples shown.
    pub few_shot: usize,
    /// Agreement of that virtue's verdict with the labels, among decided pairs; its interval is 95 % for all virtues of the
    /// method together.
    pub agreement: Agreement,
    /// Pairs of the virtue, decided or not.
    pub n_pairs: usize,
    /// What choosing the shorter side would give (95 % by itself).
    pub shorter: Agreement,
    /// What choosing the side shown first would give.
    pub first_shown: Agreement,
    /// The same judge and method asked by the other virtues about these pairs, their mean: where it is no less, the judge
    /// tells good from bad and not this virtue from another. None if no other virtue decided a pair.
    pub other_virtues: Option<f64>,
    /// Whether the virtue may vote: its interval lies above one half.
    pub may_vote: bool,
}

/// The virtues of one method on the held-out pairs that differ in one virtue; empty if there are no such pairs. A
/// virtue without pairs of its own has a line that says so, and no vote.
pub(super) fn examine(
    pairs: &[Labelled],
    rows: &[JudgementRow],
    virtues: &[Virtue],
    method: Method,
    few_shot: usize,
) -> Vec<VirtueLine> {
    if pairs.iter().all(|pair| pair.about.is_none()) {
        return Vec::new();
    }
    let z = normal_quantile(1.0 - 0.025 / virtues.len().max(1) as f64);
    let line = |&virtue: &Virtue| {
        let is_own = |pair: &&Labelled| pair.about.is_some_and(|about| about.virtue == virtue);
        let own: Vec<&Labelled> = pairs.iter().filter(is_own).collect();
        let outcomes = |by: Virtue| -> Vec<bool> {
            let of = |pair: &&Labelled| {
                let row = rows.iter().find(|row| row.prompt_id == pair.id && row.virtue == by)?;
                Some(row.vote? == i32::from(pair.better_sample() == 1))
            };
            own.iter().filter_map(of).collect()
        };
        let shorter = own.iter().filter_map(|pair| {
            let [zero, one] = pair.n_chars();
            (zero != one).then(|| usize::from(one < zero) == pair.better_sample())
        });
        let others: Vec<bool> =
            virtues.iter().filter(|&&other| other != virtue).flat_map(|&v| outcomes(v)).collect();
        let shares: Vec<f64> =
            others.iter().map(|&is_right| f64::from(u8::from(is_right))).collect();
        let agreement = Agreement::at(outcomes(virtue), z);
        VirtueLine {
            virtue,
            method: method.name().to_owned(),
            few_shot,
            agreement,
            n_pairs: own.len(),
            shorter: Agreement::of(shorter),
            first_shown: Agreement::of(own.iter().map(|pair| pair.better_sample() == 0)),
            other_virtues: (!shares.is_empty()).then(|| stats::mean(&shares)),
            may_vote: agreement.low > 0.5,
        }
    };
    virtues.iter().map(line).collect()
}

/// The lines for people, and who may not vote; nothing without lines.
pub(super) fn markdown(lines: &[VirtueLine]) -> String {
    if lines.is_empty() {
        return String::new();
    }
    let heads = [
        "virtue",
        "method",
        "few-shot",
        "pairs",
        "decided",
        "agreement %",
        "95 % interval, all virtues together",
        "asked by the other virtues %",
        "shorter %",
        "first shown %",
        "may vote",
    ];
    let percent = |share: f64| format!("{:.1}", 100.0 * share);
    let interval = |a: &Agreement| format!("{} to {}", percent(a.low), percent(a.high));
    let ruler = |a: &Agreement| format!("{} [{}]", percent(a.estimate), interval(a));
    let rows: Vec<Vec<String>> = (lines.iter())
        .map(|line| {
            let is_empty = line.agreement.n == 0;
            let shown = |text: String| if is_empty { "–".to_owned() } else { text };
            vec![
                line.virtue.name().to_owned(),
                line.method.clone(),
                line.few_shot.to_string(),
                line.n_pairs.to_string(),
                line.agreement.n.to_string(),
                shown(percent(line.agreement.estimate)),
                shown(interval(&line.agreement)),
                line.other_virtues.map_or("–".to_owned(), percent),
                shown(ruler(&line.shorter)),
                shown(ruler(&line.first_shown)),
                if line.may_vote { "yes" } else { "no" }.to_owned(),
            ]
        })
        .collect();
    format!(
        "A virtue at a time, on held-out pairs that differ in it alone:\n\n{}\n",
        stage::table(&heads, &rows)
    )
}

/// Who may vote, as a calibration found it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ballot {
    /// The judge that was examined.
    pub judge: String,
    /// SHA-256 of its model and adapter, by name; none where nothing beside the file says so, and of a server's model, whose name is all
    /// that is known of it.
    pub examined: BTreeMap<String, String>,
    /// The virtues whose judge is at chance, or was not examined.
    pub without_vote: Vec<Virtue>,
}

/// What is read of `calibration.json`.
#[derive(Deserialize)]
struct Examined {
    judge: String,
    virtues: Vec<VirtueLine>,
}

impl Ballot {
    /// Reads `calibration.json` (or the directory it lies in) for a method and its number of judged examples.
    ///
    /// # Errors
    ///
    /// A refused file if it says nothing of the method, or leaves no virtue a vote; an unreadable file.
    pub fn read(path: &Path, virtues: &[Virtue], method: Method, few_shot: usize) -> Result<Self> {
        let path = if path.is_dir() { path.join("calibration.json") } else { path.to_owned() };
        let wrong = |field: &str, expected: String, found: String| {
            Refusal::file(&path, field, expected, found)
        };
        let bytes = files::read_capped(&path, MAX_BYTES)?;
        let Examined { judge, virtues: lines } =
            serde_json::from_slice(&bytes).map_err(|error| {
                let expected = "what `calibrate` writes: judge and virtues".to_owned();
                wrong("JSON", expected, error.to_string())
            })?;
        let own: Vec<&VirtueLine> = (lines.iter())
            .filter(|line| line.method == method.name() && line.few_shot == few_shot)
            .collect();
        if own.is_empty() {
            let expected = format!(
                "{} with {few_shot} judged examples, examined on pairs that differ in one virtue (data/virtues/pairs.jsonl)",
                method.name()
            );
            bail!(wrong("virtues", expected, "no line of it".to_owned()));
        }
        let may_vote =
            |virtue: &Virtue| own.iter().any(|line| line.virtue == *virtue && line.may_vote);
        let without_vote: Vec<Virtue> =
            virtues.iter().copied().filter(|virtue| !may_vote(virtue)).collect();
        if without_vote.len() == virtues.len() {
            let expected = "at least one virtue whose judge is above chance".to_owned();
            bail!(wrong(
                "virtues",
                expected,
                "none: teach the judge (`lessons`) or take another".to_owned(),
            ));
        }
        let dir = path.parent().unwrap_or(Path::new(""));
        let examined = match dir.join(RUN_JSON).is_file() {
            true => files_of(&RunJson::read(dir)?.inputs),
            false => BTreeMap::new(),
        };
        Ok(Self { judge, examined, without_vote })
    }

    /// Refuses another judge than the one examined: by what its files hold, wherever they lie, else by its name. `inputs` are the
    /// hashes of what the votes rest on.
    ///
    /// # Errors
    ///
    /// A refused setting naming both.
    pub fn check_judge(&self, name: &str, inputs: &BTreeMap<String, String>) -> Result<()> {
        let votes = files_of(inputs);
        // Of a server, and of a calibration that was taken out of its directory, a name is all that there is.
        let is_same =
            if self.examined.is_empty() { self.judge == name } else { self.examined == votes };
        if is_same {
            return Ok(());
        }
        let shown = |name: &str, files: &BTreeMap<String, String>| {
            let sums = files.iter().map(|(file, sum)| format!(", {file} {}", short(sum)));
            format!("{name}{}", sums.collect::<String>())
        };
        Err(Refusal::setting(
            "calibration",
            format!("one of the judge that votes ({})", shown(name, &votes)),
            format!("one of {}", shown(&self.judge, &self.examined)),
        )
        .into())
    }
}

/// What a judge is, of a stage's inputs.
fn files_of(inputs: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    const FILES: [&str; 2] = ["judge", "judge_adapter"];
    let is_judge = |(name, _): &(&String, &String)| FILES.contains(&name.as_str());
    inputs.iter().filter(is_judge).map(|(name, sum)| (name.clone(), sum.clone())).collect()
}

/// The beginning of a hash, which tells two of them apart.
fn short(sum: &str) -> &str {
    sum.get(..12).unwrap_or(sum)
}

#[cfg(test)]
mod tests {
    use arete_chain::pairs::About;
    use arete_records::{Aspect, Message, Split};

    use super::*;

    const HONESTY: Virtue = Virtue::HONESTY;
    const PRUDENCE: Virtue = Virtue::PRUDENCE;

    fn labelled(idx: usize, virtue: Virtue) -> Labelled {
        Labelled {
            id: format!("{idx:016x}"),
            set: "s".to_owned(),
            question: vec![Message::user("q")],
            better: vec![Message::assistant("short")],
            worse: vec![Message::assistant("much longer")],
            about: Some(About { virtue, aspect: Aspect::ACTION }),
        }
    }

    fn row(pair: &Labelled, virtue: Virtue, is_right: bool) -> JudgementRow {
        let better = pair.better_sample();
        let vote = if is_right { better } else { 1 - better };
        JudgementRow {
            prompt_id: pair.id.clone(),
            split: Split::Test,
            aspect: Aspect::ACTION,
            virtue,
            method: "pairwise-logits".to_owned(),
            judge: "j".to_owned(),
            p_ab: None,
            p_ba: None,
            p_sample0: Some(if vote == 0 { 0.9 } else { 0.1 }),
            vote: Some(vote as i32),
        }
    }

    /// Honesty's 60 pairs are told right 50 times by honesty; prudence's 60 pairs 32 times by prudence.
    fn examined() -> Vec<VirtueLine> {
        let pairs: Vec<Labelled> =
            (0..120).map(|i| labelled(i, if i < 60 { HONESTY } else { PRUDENCE })).collect();
        let mut rows = Vec::new();
        for (idx, pair) in pairs.iter().enumerate() {
            let right = if idx < 60 { idx < 50 } else { idx < 92 };
            for virtue in [HONESTY, PRUDENCE] {
                // Asked by the other virtue, honesty's pairs are told right half the time.
                let is_own = pair.about.unwrap().virtue == virtue;
                rows.push(row(pair, virtue, if is_own { right } else { idx % 2 == 0 }));
            }
        }
        let virtues = [HONESTY, PRUDENCE, Virtue::RESPECT];
        examine(&pairs, &rows, &virtues, Method::PairwiseLogits, 0)
    }

    #[test]
    fn each_virtue_is_examined_on_its_own_pairs() {
        let lines = examined();
        let found: Vec<(u64, u64, bool)> =
            lines.iter().map(|l| (l.agreement.agreed, l.agreement.n, l.may_vote)).collect();
        // 32 of 60 is no more than chance; respect was not examined.
        assert_eq!(found, [(50, 60, true), (32, 60, false), (0, 0, false)]);
        assert_eq!(lines[0].other_virtues, Some(0.5));
        assert_eq!(lines[0].shorter.estimate, 1.0);
        // Corrected for three virtues the interval is wider than Wilson's 95 %, 72.0 to 90.7.
        assert!(lines[0].agreement.low < 0.715 && lines[0].agreement.low > 0.65, "{:?}", lines[0]);
        let text = markdown(&lines);
        assert!(text.contains("| respect ") && text.contains("–"), "{text}");
        assert_eq!(markdown(&[]), "");
    }

    fn owned((key, value): (&str, &str)) -> (String, String) {
        (key.to_owned(), value.to_owned())
    }

    #[test]
    fn who_is_at_chance_has_no_vote() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("calibration.json");
        let write = |lines: &[VirtueLine]| {
            let text = serde_json::json!({"judge": "j", "virtues": lines}).to_string();
            fs_err::write(&file, text).unwrap();
        };
        write(&examined());
        let virtues = [HONESTY, PRUDENCE, Virtue::RESPECT];
        let ballot = Ballot::read(dir.path(), &virtues, Method::PairwiseLogits, 0).unwrap();
        assert_eq!(ballot.without_vote, [PRUDENCE, Virtue::RESPECT]);
        let none = BTreeMap::new();
        assert!(ballot.check_judge("j", &none).is_ok());
        let error = ballot.check_judge("k", &none).unwrap_err().to_string();
        assert!(error.contains("one of j"), "{error}");
        // Where the files are known, they decide, and not what the judge is called.
        let inputs = |judge: &str| BTreeMap::from([("judge", judge), ("pairs_0", "x")].map(owned));
        let ballot = Ballot { examined: files_of(&inputs("aaaaaaaaaaaaaaaa")), ..ballot };
        assert!(ballot.check_judge("k", &inputs("aaaaaaaaaaaaaaaa")).is_ok());
        let error = ballot.check_judge("j", &inputs("bbbbbbbbbbbbbbbb")).unwrap_err().to_string();
        assert!(error.contains("(j, judge bbbbbbbbbbbb)"), "{error}");
        assert!(error.contains("one of j, judge aaaaaaaaaaaa"), "{error}");
        let mut with_adapter = inputs("aaaaaaaaaaaaaaaa");
        with_adapter.insert("judge_adapter".to_owned(), "c".to_owned());
        assert!(ballot.check_judge("j", &with_adapter).is_err());
        let error = Ballot::read(&file, &virtues, Method::PairwiseText, 0).unwrap_err().to_string();
        assert!(error.contains("pairwise-text with 0 judged examples"), "{error}");
        let error = Ballot::read(&file, &virtues[1..], Method::PairwiseLogits, 0).unwrap_err();
        assert!(error.to_string().contains("none: teach the judge"), "{error}");
    }
}
