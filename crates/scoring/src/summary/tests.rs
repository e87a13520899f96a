//! Scores and differences of rows made by hand.

use super::*;
use arete_records::Message;

fn row(model: &str, prompt: u32, aspect: Aspect, score: f32) -> ScoreRow {
    ScoreRow {
        model: model.to_owned(),
        prompt_id: format!("{prompt:016x}"),
        aspect,
        score,
        z: score / 2.0,
        yardstick: None,
        yardstick_words: None,
        n_tokens: 3,
        finish_reason: FinishReason::Stop,
    }
}

/// Three scores a prompt.
fn rows(model: &str, prompts: &[[f32; 3]]) -> Vec<ScoreRow> {
    let mut out = Vec::new();
    for (prompt, scores) in (0..).zip(prompts) {
        for (aspect, score) in Aspect::SHIPPED.into_iter().zip(scores) {
            out.push(row(model, prompt, aspect, *score));
        }
    }
    out
}

fn quick() -> Resampling {
    Resampling { draws: 500, level: 0.95, seed: 1 }
}

#[test]
fn the_score_is_that_of_the_report() {
    // All six: 2 4 4 4 5 5 → μ = 4, σ² = (4+0+0+0+1+1)/6 = 1, Score = 3.5.
    let rows = rows("original", &[[2.0, 4.0, 4.0], [4.0, 5.0, 5.0]]);
    let scores = scores(&rows, quick());
    let (name, scores) = &scores[0];
    assert_eq!(name, "original");
    let of = |scale, scope| scores.iter().find(|s| (s.scale, s.scope) == (scale, scope)).unwrap();
    let all = of(Scale::Raw, Scope::All);
    assert_eq!((all.n, all.mean, all.std, all.score.estimate), (6, 4.0, 1.0, 3.5));
    assert!(all.score.low <= 3.5 && all.score.high >= 3.5);
    // The action alone: 2 and 4 → μ = 3, σ = 1, Score = 2.5; standardised: half of everything.
    assert_eq!(of(Scale::Raw, Scope::Of(Aspect::ACTION)).score.estimate, 2.5);
    assert_eq!(of(Scale::Standardised, Scope::All).score.estimate, 1.75);
    assert!(!scores.iter().any(|score| score.scale == Scale::Yardstick));
}

#[test]
fn differences_are_paired_and_count_wins() {
    let mut all = rows("original", &[[0.0; 3], [1.0; 3], [5.0, 6.0, 7.0], [2.0; 3]]);
    all.extend(rows("final", &[[1.0; 3], [2.0; 3], [6.0, 7.0, 8.0], [2.0; 3]]));
    let differences = differences(&all, quick());
    let of =
        |scope| differences.iter().find(|d| (d.scale, d.scope) == (Scale::Raw, scope)).unwrap();
    let d = of(Scope::All);
    assert_eq!((d.first.as_str(), d.last.as_str()), ("original", "final"));
    assert_eq!((d.wins, d.ties, d.losses), (3, 1, 0));
    assert_eq!(d.mean.interval.estimate, 0.75);
    // Sign test of 3 : 0 = 2 · (1/2)³.
    assert!((d.sign_test - 0.25).abs() < 1e-12);
    // 2.8016 = z(0.975) + z(0.8)
    let ratio = d.mean.minimum_detectable_effect / d.mean.standard_error;
    assert!((ratio - 2.801_585).abs() < 1e-5, "{ratio}");
    assert_eq!(of(Scope::Of(Aspect::ACTION)).mean.interval.estimate, 0.75);
}

#[test]
fn only_shared_prompts_are_compared() {
    let mut all = rows("a", &[[1.0; 3], [2.0; 3]]);
    all.extend(rows("b", &[[1.5; 3]]));
    let differences = differences(&all, quick());
    let d = &differences[0];
    assert_eq!((d.wins, d.ties, d.losses), (1, 0, 0));
    assert_eq!(d.mean.interval.estimate, 0.5);
}

#[test]
fn accuracy_of_a_policy_on_pairs() {
    let side = |text: &str| [Message::user("q"), Message::assistant(text)];
    let ruled = vec![Ruled::of(&side("short"), &side("quite long")); 4];
    let logprobs = [(-1.0, -2.0), (-2.0, -1.0), (-1.0, -1.0), (-0.5, -3.0)];
    let accuracy = PreferenceAccuracy::of(&logprobs, &ruled).unwrap();
    assert_eq!(accuracy.accuracy.estimate, 0.5);
    // The shorter side is right throughout; pairs about one question have no interval.
    assert_eq!((accuracy.null_rulers.best_accuracy(), accuracy.null_rulers.lead), (1.0, None));
    assert!(PreferenceAccuracy::of(&[], &[]).is_none());
}

/// `n` prompts that the yardstick scores alike but for a gain, the last model's replies `shorter` by so many tokens.
fn by_yardstick(n: u32, gain: f32, shorter: impl Fn(u32) -> i32) -> Vec<ScoreRow> {
    let of = |model: &str, gain: f32, shorter: &dyn Fn(u32) -> i32| {
        let row = |prompt| {
            let score = gain + (prompt % 5) as f32 / 10.0;
            let n_tokens = 40 - shorter(prompt);
            ScoreRow {
                yardstick: Some(score),
                yardstick_words: Some(-score),
                n_tokens,
                ..row(model, prompt, Aspect::ACTION, 0.0)
            }
        };
        (0..n).map(row).collect::<Vec<_>>()
    };
    [of("original", 0.0, &|_| 0), of("final", gain, &shorter)].concat()
}

#[test]
fn equal_length_has_a_figure_or_a_reason() {
    // Shorter on two of three prompts, and better by one half whatever the length.
    let overlap = by_yardstick(30, 0.5, |prompt| (prompt % 3) as i32 * 4 - 4);
    let apart = by_yardstick(30, 0.5, |prompt| 5 + (prompt % 3) as i32);
    let mut found = [overlap, apart].map(|rows| {
        let differences = differences(&rows, quick());
        Summary {
            yardstick: Some("y".to_owned()),
            labels: Some(Labels { method: "contrast".to_owned(), personas: "original".to_owned() }),
            differences,
            ..Summary::default()
        }
    });
    found.iter_mut().for_each(Summary::complete);
    let [overlap, apart] = found.map(|summary| summary.equal_length["final - original"].clone());
    assert!((overlap.figure.value.unwrap() - 0.5).abs() < 1e-6, "{overlap:?}");
    assert_eq!((overlap.measure.as_str(), overlap.circular), ("yardstick", false));
    assert_eq!(apart.figure.value, None);
    assert!(apart.figure.reason.unwrap().starts_with("not comparable"), "reason");
}

#[test]
fn scores_are_circular_where_their_labels_were_this_contrast() {
    let mut rows = by_yardstick(12, 0.5, |_| 0);
    rows.extend(
        rows.clone()
            .into_iter()
            .filter(|row| row.model == "final")
            .map(|row| ScoreRow { model: "sft".to_owned(), ..row }),
    );
    let circular = |method: &str, personas: &str| -> Vec<(String, Scale)> {
        let labels = Labels { method: method.to_owned(), personas: personas.to_owned() };
        let differences = differences(&rows, quick());
        let mut summary = Summary { labels: Some(labels), differences, ..Summary::default() };
        summary.complete();
        let all = summary.differences.iter().filter(|own| own.circular);
        all.filter(|own| own.scope == Scope::Of(Aspect::ACTION))
            .map(|own| (comparison(&own.first, &own.last), own.scale))
            .collect()
    };
    let own = [Scale::Raw, Scale::Standardised];
    let expected = ["final - original", "sft - original"];
    let mut found = circular("contrast", "original");
    found.sort();
    let expected: Vec<_> =
        expected.iter().flat_map(|name| own.map(|scale| ((*name).to_owned(), scale))).collect();
    assert_eq!(found, expected);
    assert!(circular("pairwise-logits", "original").is_empty());
    assert!(circular("contrast", "contrast").is_empty());
}
