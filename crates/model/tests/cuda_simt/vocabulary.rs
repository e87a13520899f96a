//! Log-probabilities and the sampler against softmax, sorting and cumulative sums in f64.

use arete_model::cuda::plan::Format;
use arete_model::cuda::plan::rows::{self, Sample, TokenLogprob};

use crate::machine::{Build, Job, run};
use crate::numbers::{Random, bytes_of, encoded, floats, numbers};
use crate::rows::{epsilon, run_in_orders};

type Runner<'a> = &'a dyn Fn(&[Job]) -> Vec<Vec<Vec<u8>>>;

fn longs(values: &[i64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Rows of logits in the format, -10 to 10: random ones, few distinct ones, equal ones, one far above the others, one impossible.
fn logits(n_rows: usize, width: usize, format: Format, random: &mut Random) -> Vec<f32> {
    let mut out = Vec::with_capacity(n_rows * width);
    for row in 0..n_rows {
        let mut own: Vec<f32> = (0..width).map(|_| 10.0 * random.number()).collect();
        match row % 5 {
            1 => own.iter_mut().for_each(|x| *x = (*x / 4.0).round()), // with both zeros
            2 => own.iter_mut().for_each(|x| *x = -3.5),
            3 => own[width / 2] = 60.0,
            4 if width > 1 => own[width - 1] = f32::NEG_INFINITY,
            _ => {}
        }
        out.extend(own);
    }
    numbers(&encoded(&out, format), format)
}

/// Exponentials of a row at an inverse temperature, the largest one 1.
fn weights(row: &[f32], inverse: f32) -> Vec<f64> {
    let top = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    row.iter().map(|&x| ((f64::from(x) - top) * f64::from(inverse)).exp()).collect()
}

fn logprob(row: &[f32], token: usize, inverse: f32) -> f64 {
    let weights = weights(row, inverse);
    let top = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    (f64::from(row[token]) - top) * f64::from(inverse) - weights.iter().sum::<f64>().ln()
}

/// One token; fewer than a tile; a tile; more; more than the block's threads.
const WIDTHS: [usize; 5] = [1, 7, 256, 257, 1537];

// ---- log-probabilities ----

fn check_token_logprob(run: Runner<'_>, n_rows: usize) {
    let mut random = Random(21);
    for (format, width) in
        Format::ALL.into_iter().flat_map(|format| WIDTHS.map(|width| (format, width)))
    {
        for (temperature, derive, want_entropy) in
            [(1.0f32, true, true), (0.7, false, true), (1.5, true, false)]
        {
            let inverse = 1.0 / temperature;
            let all = logits(n_rows, width, format, &mut random);
            let targets: Vec<i64> =
                (0..n_rows).map(|row| ((row * 37 + 5) % width) as i64).collect();
            let job = |rows_: std::ops::Range<usize>| {
                let at = TokenLogprob {
                    logprob: 1,
                    entropy: if want_entropy { 2 } else { 0 },
                    logits: 3,
                    targets: 4,
                };
                let n = rows_.len() as u32;
                let empty = vec![0xaa; 4 * rows_.len()];
                Job {
                    launch: rows::token_logprob(at, format, n, width as u32, inverse, derive),
                    buffers: vec![
                        empty.clone(),
                        empty,
                        encoded(&all[rows_.start * width..rows_.end * width], format),
                        longs(&targets[rows_]),
                    ],
                }
            };
            let last = n_rows - 1;
            let jobs = [job(0..n_rows), job(last..n_rows)];
            let outputs = run(&jobs);
            let name =
                format!("{}, {width} tokens, temperature {temperature}", jobs[0].launch.kernel);
            let bytes = width * format.size() as usize;
            assert!(outputs[0][0][4 * last..] == outputs[1][0], "{name}: alone");
            assert!(outputs[0][1][4 * last..] == outputs[1][1], "{name}: alone");
            assert!(outputs[0][2][bytes * last..] == outputs[1][2], "{name}: alone");
            if !derive {
                assert!(outputs[0][2] == jobs[0].buffers[2], "{name}: the logits stay");
            }
            let (found, entropy) = (floats(&outputs[0][0]), floats(&outputs[0][1]));
            let derived = numbers(&outputs[0][2], format);
            for row in 0..n_rows {
                let own = &all[row * width..(row + 1) * width];
                let target = targets[row] as usize;
                let expected = logprob(own, target, inverse);
                let got = f64::from(found[row]);
                assert!(
                    got == expected || (got - expected).abs() <= 2e-6 + 2e-7 * expected.abs(),
                    "{name}, row {row}: {got}, expected {expected}"
                );
                let weights = weights(own, inverse);
                let total: f64 = weights.iter().sum();
                if want_entropy {
                    let plogp = |w: &f64| if *w > 0.0 { w / total * (w / total).ln() } else { 0.0 };
                    let expected = -weights.iter().map(plogp).sum::<f64>();
                    let got = f64::from(entropy[row]);
                    assert!((got - expected).abs() <= 5e-6, "{name}, row {row}: {got}, {expected}");
                }
                for (i, weight) in weights.iter().enumerate().filter(|_| derive) {
                    let expected =
                        (f64::from(u8::from(i == target)) - weight / total) * f64::from(inverse);
                    let got = f64::from(derived[row * width + i]);
                    let tolerance =
                        1e-6 * f64::from(inverse) + 1.01 * epsilon(format) * expected.abs();
                    assert!(
                        (got - expected).abs() <= tolerance,
                        "{name}: {got}, expected {expected}"
                    );
                }
            }
        }
    }
}

// ---- the sampler ----

#[derive(Clone, Copy, Debug)]
struct Settings {
    temperature: f32,
    top_k: u32,
    top_p: f32,
}

const WHOLE: [Settings; 3] = [
    Settings { temperature: 1.0, top_k: 0, top_p: 1.0 },
    Settings { temperature: 0.7, top_k: 0, top_p: 1.0 },
    Settings { temperature: 0.0, top_k: 0, top_p: 1.0 },
];
const CUT: [Settings; 8] = [
    Settings { temperature: 1.0, top_k: 1, top_p: 1.0 },
    Settings { temperature: 1.0, top_k: 5, top_p: 1.0 },
    Settings { temperature: 1.3, top_k: 40, top_p: 0.9 },
    Settings { temperature: 1.0, top_k: 0, top_p: 0.3 },
    Settings { temperature: 2.0, top_k: 0, top_p: 0.95 },
    Settings { temperature: 0.8, top_k: 100_000, top_p: 0.5 },
    Settings { temperature: 1.0, top_k: 3, top_p: 1e-6 },
    Settings { temperature: 0.0, top_k: 3, top_p: 0.5 },
];

/// The token a uniform draws: all that it may be within a millionth of the distribution.
fn drawable(row: &[f32], uniform: f64, set: Settings) -> Vec<usize> {
    let inverse = if set.temperature == 0.0 { 1.0 } else { 1.0 / set.temperature };
    let weights = weights(row, inverse);
    let mut order: Vec<usize> = (0..row.len()).collect();
    let cut = set.top_k > 0 || set.top_p < 1.0;
    if cut || set.temperature == 0.0 {
        // Equal logits in vocabulary order; the zeros are equal.
        order.sort_by(|&a, &b| (row[b] + 0.0).total_cmp(&(row[a] + 0.0)).then(a.cmp(&b)));
    }
    if set.temperature == 0.0 {
        return vec![order[0]];
    }
    if set.top_k > 0 {
        order.truncate(set.top_k as usize);
    }
    let mut mass = vec![0.0]; // of the first 0, 1, 2, … tokens
    for &i in &order {
        mass.push(mass[mass.len() - 1] + weights[i]);
    }
    // The set may end one sooner or later where its mass meets top_p to within rounding.
    let mut ends = vec![order.len()];
    if set.top_p < 1.0 {
        let whole = mass[order.len()];
        let reaches = |slack: f64| {
            let wanted = (f64::from(set.top_p) + slack) * whole;
            mass.iter().skip(1).position(|&mass| mass >= wanted).map_or(order.len(), |at| at + 1)
        };
        ends = vec![reaches(-1e-6), reaches(1e-6)];
    }
    let mut found = Vec::new();
    for end in ends {
        let (kept, slack) = (mass[end], 1e-6 * mass[end]);
        let drawn = |at: &usize| {
            mass[*at] - slack <= uniform * kept && uniform * kept <= mass[at + 1] + slack
        };
        found.extend((0..end).filter(drawn).map(|at| order[at]));
    }
    found
}

fn check_sample(
    run: Runner<'_>,
    formats: &[Format],
    widths: &[usize],
    settings: &[Settings],
    n_rows: usize,
) {
    let mut random = Random(22);
    for (&format, &width) in
        formats.iter().flat_map(|format| widths.iter().map(move |width| (format, width)))
    {
        let all = logits(n_rows, width, format, &mut random);
        let mut uniforms: Vec<f64> =
            (0..n_rows).map(|_| (random.bits() >> 11) as f64 / (1u64 << 53) as f64).collect();
        uniforms[0] = 0.0;
        uniforms[n_rows - 1] = 1.0 - 2f64.powi(-53);
        // Two draws from one row of logits, as prompts have that were computed once.
        let sources: Vec<i64> =
            (0..n_rows as i64).map(|row| if row == 1 { 0 } else { row }).collect();
        for &set in settings {
            let job = |sources: Option<&[i64]>, uniforms: &[f64]| {
                let at = Sample {
                    drawn: 1,
                    logits: 2,
                    sources: if sources.is_some() { 3 } else { 0 },
                    uniforms: 4,
                };
                let n = uniforms.len();
                let Settings { temperature, top_k, top_p } = set;
                Job {
                    launch: rows::sample(
                        at,
                        format,
                        n as u32,
                        width as u32,
                        temperature,
                        top_k,
                        top_p,
                    ),
                    buffers: vec![
                        vec![0xaa; 8 * n],
                        encoded(&all, format),
                        longs(sources.unwrap_or_default()),
                        uniforms.iter().flat_map(|u| u.to_le_bytes()).collect(),
                    ],
                }
            };
            let last = n_rows - 1;
            let jobs = [
                job(Some(&sources), &uniforms),
                job(Some(&sources[last..]), &uniforms[last..]),
                job(None, &uniforms),
            ];
            let outputs = run(&jobs);
            let name = format!("{}, {width} tokens, {set:?}", jobs[0].launch.kernel);
            assert!(outputs[0][0][8 * last..] == outputs[1][0], "{name}: alone");
            for (sources, output) in [(Some(&sources), &outputs[0]), (None, &outputs[2])] {
                for (row, drawn) in output[0].chunks_exact(8).enumerate() {
                    let token =
                        u32::from_le_bytes(drawn[..4].try_into().expect("four bytes")) as usize;
                    let got =
                        f64::from(f32::from_le_bytes(drawn[4..].try_into().expect("four bytes")));
                    let source = sources.map_or(row, |sources| sources[row] as usize);
                    let own = &all[source * width..(source + 1) * width];
                    let possible = drawable(own, uniforms[row], set);
                    assert!(
                        possible.contains(&token),
                        "{name}, row {row}: {token}, expected of {possible:?}"
                    );
                    let inverse = if set.temperature == 0.0 { 1.0 } else { 1.0 / set.temperature };
                    let expected = logprob(own, token, inverse);
                    assert!(
                        (got - expected).abs() <= 2e-6 + 2e-7 * expected.abs(),
                        "{name}: {got}, expected {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn token_logprobs_are_those_of_the_softmax() {
    check_token_logprob(&|jobs| run_in_orders(jobs), 10);
}

#[test]
fn samples_are_where_the_cumulative_distribution_passes_the_uniform() {
    let run = |jobs: &[Job]| run_in_orders(jobs);
    check_sample(&run, &Format::ALL, &WIDTHS, &WHOLE, 10);
    check_sample(&run, &[Format::BF16], &[600], &WHOLE[..1], 64);
}

#[test]
fn samples_of_the_most_probable_tokens_alone() {
    let in_one_order = |jobs: &[Job]| run(Build::Plain, jobs, 0);
    check_sample(&run_in_orders, &[Format::BF16], &[600], &CUT[2..3], 3);
    check_sample(&in_one_order, &[Format::BF16], &[7, 600], &CUT, 3);
    check_sample(&in_one_order, &[Format::F32, Format::F16], &[600], &CUT[2..5], 3);
}

/// Nothing is drawn from a row with NaN or without a finite number; its neighbours are.
#[test]
fn a_row_that_is_not_finite_says_so() {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut all = vec![0.5f32; 3 * 300];
        all[300 + 7] = bad;
        all[600..].fill(f32::NEG_INFINITY);
        let jobs = [
            Job {
                launch: rows::sample(
                    Sample { drawn: 1, logits: 2, sources: 0, uniforms: 3 },
                    Format::F32,
                    3,
                    300,
                    1.0,
                    0,
                    1.0,
                ),
                buffers: vec![
                    vec![0xaa; 24],
                    bytes_of(&all),
                    [0.5f64; 3].iter().flat_map(|u| u.to_le_bytes()).collect(),
                ],
            },
            Job {
                launch: rows::token_logprob(
                    TokenLogprob { logprob: 1, entropy: 2, logits: 3, targets: 4 },
                    Format::F32,
                    3,
                    300,
                    1.0,
                    true,
                ),
                buffers: vec![vec![0xaa; 12], vec![0xaa; 12], bytes_of(&all), longs(&[1, 2, 3])],
            },
        ];
        let outputs: Vec<_> =
            jobs.iter().flat_map(|job| run(Build::Plain, std::slice::from_ref(job), 0)).collect();
        let halves = floats(&outputs[0][0]);
        let drawn = [halves[1], halves[3], halves[5]];
        for numbers in [drawn.to_vec(), floats(&outputs[1][0]), floats(&outputs[1][1])] {
            let finite: Vec<bool> = numbers.iter().map(|x| x.is_finite()).collect();
            assert_eq!(finite, [true, false, false], "{bad}: {numbers:?}");
        }
        let derived = floats(&outputs[1][2]);
        assert!(derived[..300].iter().all(|x| x.is_finite()));
        assert!(derived[300..].iter().all(|x| x.is_nan()));
    }
}

#[test]
fn no_kernel_of_the_vocabulary_leaves_its_buffers() {
    let run = |jobs: &[Job]| run(Build::Sanitised, jobs, 0);
    check_token_logprob(&run, 3);
    check_sample(&run, &Format::ALL, &[1, 257, 1000], &WHOLE, 3);
    check_sample(&run, &[Format::BF16], &[7, 600], &CUT[2..4], 2);
}
