//! Norms, SwiGLU, the rotary embedding and LoRA's products and factors against sums and formulas in f64: three number formats, ragged
//! widths, three thread orders, a row alone and among 64.

use arete_model::cuda::plan::rows::{self, AddNorm, AddNormBackward, Factors, Heads, Rotate};
use arete_model::cuda::plan::{Format, Launch};

use crate::machine::{Build, Job, run, run_in_all_orders};
use crate::numbers::{Random, bytes_of, encoded, floats, numbers};

type Runner<'a> = &'a dyn Fn(&[Job]) -> Vec<Vec<Vec<u8>>>;

/// Half a unit in the last place, relative.
pub(crate) fn epsilon(format: Format) -> f64 {
    match format {
        Format::F32 => 2f64.powi(-24),
        Format::BF16 => 2f64.powi(-8),
        Format::F16 => 2f64.powi(-11),
    }
}

/// Numbers that the format has.
fn values(n: usize, format: Format, random: &mut Random) -> Vec<f32> {
    let raw: Vec<f32> = (0..n).map(|_| random.number()).collect();
    numbers(&encoded(&raw, format), format)
}

/// Bytes that no kernel should leave.
fn unwritten(n: usize, format: Format) -> Vec<u8> {
    vec![0xaa; n * format.size() as usize]
}

/// `expected` is a number and what rounding of the sums may make of it; the result's own rounding comes on top, `roundings` times.
#[track_caller]
fn assert_close(name: &str, got: &[f32], expected: &[(f64, f64)], format: Format, roundings: f64) {
    assert_eq!(got.len(), expected.len(), "{name}");
    for (i, (got, (expected, slack))) in got.iter().zip(expected).enumerate() {
        // 2^-25: half of f16's smallest number.
        let tolerance =
            slack + 1.01 * roundings * epsilon(format) * expected.abs() + 2f64.powi(-25);
        let gap = (f64::from(*got) - expected).abs();
        assert!(gap <= tolerance, "{name}, number {i}: {got}, expected {expected} ± {tolerance:e}");
    }
}

/// The rows `picked` of buffer `from` of the job with all rows are what a job with that row alone gives.
#[track_caller]
fn assert_alone(name: &str, all: &[u8], n_rows: usize, alone: &[(usize, Vec<u8>)]) {
    let bytes = all.len() / n_rows;
    for (row, own) in alone {
        assert_eq!(bytes, own.len(), "{name}");
        assert!(
            all[row * bytes..(row + 1) * bytes] == own[..],
            "{name}: row {row} has other bits alone"
        );
    }
}

/// The row that is computed alone, too, among so many.
fn alone_of(all_rows: usize) -> [usize; 1] {
    [3 * all_rows / 5]
}
/// Whole vectors of every format; none of any; several rounds of a block, ragged.
const WIDTHS: [usize; 3] = [64, 3, 546];
/// Several rounds of a block's threads, vector by vector.
const LONG: usize = 2304;

fn widths(format: Format) -> Vec<usize> {
    WIDTHS.into_iter().chain((format == Format::BF16).then_some(LONG)).collect()
}

fn row_of(x: &[f32], row: usize, width: usize) -> &[f32] {
    &x[row * width..(row + 1) * width]
}

// ---- norms ----

fn check_add_norm(run: Runner<'_>, all_rows: usize) {
    const EPS: f32 = 1e-5;
    let mut random = Random(11);
    for format in Format::ALL {
        for (width, has_delta) in
            widths(format).into_iter().flat_map(|width| [(width, true), (width, false)])
        {
            let x = values(all_rows * width, format, &mut random);
            let delta = values(all_rows * width, format, &mut random);
            let weight = values(width, format, &mut random);
            let job = |x: &[f32], delta: &[f32]| {
                let n_rows = x.len() / width;
                let at = AddNorm {
                    out: 1,
                    sum: if has_delta { 2 } else { 0 },
                    inverse: 3,
                    x: 4,
                    delta: if has_delta { 5 } else { 0 },
                    weight: 6,
                };
                let launch = rows::add_norm(at, format, n_rows as u32, width as u32, EPS);
                let out = unwritten(x.len(), format);
                let buffers = vec![
                    out.clone(),
                    out,
                    unwritten(n_rows, Format::F32),
                    encoded(x, format),
                    encoded(delta, format),
                    encoded(&weight, format),
                ];
                Job { launch, buffers }
            };
            let mut jobs = vec![job(&x, &delta)];
            jobs.extend(
                alone_of(all_rows)
                    .map(|row| job(row_of(&x, row, width), row_of(&delta, row, width))),
            );
            let outputs = run(&jobs);
            let name = format!("{}, width {width}, delta {has_delta}", jobs[0].launch.kernel);
            let sum: Vec<f32> = if has_delta {
                let sum: Vec<f32> = x.iter().zip(&delta).map(|(x, delta)| x + delta).collect();
                let sum = encoded(&sum, format);
                assert!(outputs[0][1] == sum, "{name}: the sum");
                numbers(&sum, format)
            } else {
                x.clone()
            };
            let mut expected = Vec::new();
            for row in 0..all_rows {
                let own = row_of(&sum, row, width);
                let squares: f64 = own.iter().map(|&x| f64::from(x).powi(2)).sum();
                let inverse = 1.0 / (squares / width as f64 + f64::from(EPS)).sqrt();
                let got = f64::from(floats(&outputs[0][2])[row]);
                assert!((got - inverse).abs() <= 1e-6 * inverse, "{name}: {got} {inverse}");
                expected.extend(own.iter().zip(&weight).map(|(&x, &weight)| {
                    let out = f64::from(x) * inverse * f64::from(weight);
                    (out, 1e-6 * out.abs())
                }));
            }
            assert_close(&name, &numbers(&outputs[0][0], format), &expected, format, 2.0);
            for buffer in [0, 2] {
                let alone = alone_of(all_rows)
                    .into_iter()
                    .zip(&outputs[1..])
                    .map(|(row, own)| (row, own[buffer].clone()));
                assert_alone(&name, &outputs[0][buffer], all_rows, &alone.collect::<Vec<_>>());
            }
        }
    }
}

fn check_add_norm_backward(run: Runner<'_>, all_rows: usize) {
    let mut random = Random(12);
    for format in Format::ALL {
        for (width, has_sum) in
            widths(format).into_iter().flat_map(|width| [(width, true), (width, false)])
        {
            let [grad_out, grad_sum, sum] =
                [0; 3].map(|_| values(all_rows * width, format, &mut random));
            let weight = values(width, format, &mut random);
            let inverse: Vec<f32> = (0..all_rows).map(|_| 1.5 + random.number()).collect();
            let job = |rows_: std::ops::Range<usize>| {
                let part = |x: &[f32]| encoded(&x[rows_.start * width..rows_.end * width], format);
                let grad_sum_at = if has_sum { 3 } else { 0 };
                let at = AddNormBackward {
                    grad_x: 1,
                    grad_out: 2,
                    grad_sum: grad_sum_at,
                    sum: 4,
                    weight: 5,
                    inverse: 6,
                };
                let launch = rows::add_norm_backward(at, format, rows_.len() as u32, width as u32);
                let buffers = vec![
                    unwritten(rows_.len() * width, format),
                    part(&grad_out),
                    part(&grad_sum),
                    part(&sum),
                    encoded(&weight, format),
                    bytes_of(&inverse[rows_.clone()]),
                ];
                Job { launch, buffers }
            };
            let mut jobs = vec![job(0..all_rows)];
            jobs.extend(alone_of(all_rows).map(|row| job(row..row + 1)));
            let outputs = run(&jobs);
            let name = format!("{}, width {width}, sum {has_sum}", jobs[0].launch.kernel);
            let mut expected = Vec::new();
            for (row, &factor) in inverse.iter().enumerate() {
                let [g, gs, x] = [&grad_out, &grad_sum, &sum].map(|all| row_of(all, row, width));
                let factor = f64::from(factor);
                let terms =
                    || (0..width).map(|i| f64::from(g[i]) * f64::from(weight[i]) * f64::from(x[i]));
                let share = factor * factor / width as f64;
                let (mean, size) =
                    (terms().sum::<f64>() * share, terms().map(f64::abs).sum::<f64>() * share);
                expected.extend((0..width).map(|i| {
                    let (own, x) = (f64::from(g[i]) * f64::from(weight[i]), f64::from(x[i]));
                    let more = if has_sum { f64::from(gs[i]) } else { 0.0 };
                    let slack = 40.0 * 2f64.powi(-24) * factor * (own.abs() + x.abs() * size);
                    ((own - x * mean) * factor + more, slack + 2f64.powi(-23) * more.abs())
                }));
            }
            assert_close(&name, &numbers(&outputs[0][0], format), &expected, format, 1.0);
            let alone = alone_of(all_rows)
                .into_iter()
                .zip(&outputs[1..])
                .map(|(row, own)| (row, own[0].clone()));
            assert_alone(&name, &outputs[0][0], all_rows, &alone.collect::<Vec<_>>());
        }
    }
}

// ---- SwiGLU ----

fn check_swiglu(run: Runner<'_>, all_rows: usize) {
    let mut random = Random(13);
    for format in Format::ALL {
        for width in widths(format) {
            let mut gate_up = values(all_rows * 2 * width, format, &mut random);
            // Gates from -8 to 8, and extreme ones.
            gate_up.iter_mut().for_each(|x| *x *= 8.0);
            gate_up[0] = -100.0;
            gate_up[1] = 88.0;
            let grad = values(all_rows * width, format, &mut random);
            let job = |gate_up: &[f32]| {
                let n_rows = gate_up.len() / (2 * width);
                Job {
                    launch: rows::swiglu(1, 2, format, n_rows as u32, width as u32),
                    buffers: vec![unwritten(n_rows * width, format), encoded(gate_up, format)],
                }
            };
            let back = |gate_up: &[f32], grad: &[f32]| {
                let n_rows = grad.len() / width;
                Job {
                    launch: rows::swiglu_backward(1, 2, 3, format, n_rows as u32, width as u32),
                    buffers: vec![
                        unwritten(gate_up.len(), format),
                        encoded(gate_up, format),
                        encoded(grad, format),
                    ],
                }
            };
            let mut jobs = vec![job(&gate_up), back(&gate_up, &grad)];
            for row in alone_of(all_rows) {
                jobs.push(job(row_of(&gate_up, row, 2 * width)));
                jobs.push(back(row_of(&gate_up, row, 2 * width), row_of(&grad, row, width)));
            }
            let outputs = run(&jobs);
            let (mut expected, mut expected_back) = (Vec::new(), Vec::new());
            for row in 0..all_rows {
                let (gates, ups) = row_of(&gate_up, row, 2 * width).split_at(width);
                let grads = row_of(&grad, row, width);
                let sigmoid = |gate: f64| 1.0 / (1.0 + (-gate).exp());
                let each = |work: &dyn Fn(f64, f64, f64) -> (f64, f64)| -> Vec<(f64, f64)> {
                    (0..width)
                        .map(|i| work(f64::from(gates[i]), f64::from(ups[i]), f64::from(grads[i])))
                        .collect()
                };
                expected.extend(each(&|gate, up, _| {
                    let out = gate * sigmoid(gate) * up;
                    (out, 1e-6 * out.abs())
                }));
                expected_back.extend(each(&|gate, up, grad| {
                    let s = sigmoid(gate);
                    let out = grad * up * s * (1.0 + gate * (1.0 - s));
                    (out, 2e-6 * (grad * up).abs() * s * (1.0 + gate.abs()))
                }));
                expected_back.extend(each(&|gate, _, grad| {
                    let out = grad * gate * sigmoid(gate);
                    (out, 1e-6 * out.abs())
                }));
            }
            for (i, expected) in [expected, expected_back].iter().enumerate() {
                let name = format!("{}, width {width}", jobs[i].launch.kernel);
                assert_close(&name, &numbers(&outputs[i][0], format), expected, format, 1.0);
                let own = outputs[2 + i..].iter().step_by(2).map(|buffers| buffers[0].clone());
                let alone: Vec<_> = alone_of(all_rows).into_iter().zip(own).collect();
                assert_alone(&name, &outputs[i][0], all_rows, &alone);
            }
        }
    }
}

// ---- rotary embedding ----

const HEADS: [Heads; 4] = [
    Heads { heads: 4, kv_heads: 2, head_size: 16 },
    Heads { heads: 3, kv_heads: 1, head_size: 6 },
    Heads { heads: 1, kv_heads: 1, head_size: 2 },
    Heads { heads: 9, kv_heads: 3, head_size: 64 },
];

fn check_rotate(run: Runner<'_>, all_rows: usize) {
    const POSITIONS: usize = 50;
    let mut random = Random(14);
    for format in Format::ALL {
        for heads in HEADS {
            let Heads { heads: n, kv_heads: kv, head_size: e } = heads;
            let (n, kv, e) = (n as usize, kv as usize, e as usize);
            let (q_width, k_width) = (n * e, kv * e);
            let width = q_width + 2 * k_width;
            let angles: Vec<f64> =
                (0..POSITIONS * e / 2).map(|_| 3.0 * f64::from(random.number())).collect();
            let mut cos_sin = Vec::new();
            for row in angles.chunks(e / 2) {
                cos_sin.extend(row.iter().map(|angle| angle.cos() as f32));
                cos_sin.extend(row.iter().map(|angle| angle.sin() as f32));
            }
            let qkv = values(all_rows * width, format, &mut random);
            let positions: Vec<i64> =
                (0..all_rows as i64).map(|row| row * 7 % POSITIONS as i64).collect();
            // Every row has a slot of its own among twice as many, the last rows the first ones.
            let slots: Vec<i64> = (0..all_rows as i64).rev().map(|row| 2 * row + 1).collect();
            let longs =
                |values: &[i64]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
            let at = Rotate { q: 1, k: 2, v: 3, qkv: 4, positions: 5, slots: 6, cos_sin: 7 };
            let job = |rows_: std::ops::Range<usize>, cached: bool| {
                let n_slots = if cached { 2 * all_rows } else { rows_.len() };
                let at = Rotate { slots: if cached { 6 } else { 0 }, ..at };
                Job {
                    launch: rows::rotate(at, format, rows_.len() as u32, heads),
                    buffers: vec![
                        unwritten(rows_.len() * q_width, format),
                        unwritten(n_slots * k_width, format),
                        unwritten(n_slots * k_width, format),
                        encoded(&qkv[rows_.start * width..rows_.end * width], format),
                        longs(&positions[rows_.clone()]),
                        longs(&slots[rows_]),
                        bytes_of(&cos_sin),
                    ],
                }
            };
            let mut jobs = vec![job(0..all_rows, true), job(0..all_rows, false)];
            jobs.extend(alone_of(all_rows).map(|row| job(row..row + 1, false)));
            let outputs = run(&jobs);
            let name = format!("{}, {heads:?}", jobs[0].launch.kernel);
            // Of a row: each pair (a, b) of a head turned by its angle, `direction` 1, or back, -1.
            let turned = |from: &[f32], row: usize, direction: f64| -> Vec<(f64, f64)> {
                let own = &cos_sin[positions[row] as usize * e..][..e];
                let mut out = Vec::new();
                for head in from.chunks(e) {
                    for i in 0..e {
                        let j = i % (e / 2);
                        let (c, s) = (f64::from(own[j]), direction * f64::from(own[j + e / 2]));
                        let (a, b) = (f64::from(head[j]), f64::from(head[j + e / 2]));
                        let (first, second) =
                            if i < e / 2 { (a * c, -b * s) } else { (b * c, a * s) };
                        out.push((first + second, 2f64.powi(-23) * (first.abs() + second.abs())));
                    }
                }
                out
            };
            let (mut q, mut k) = (Vec::new(), Vec::new());
            for row in 0..all_rows {
                let own = row_of(&qkv, row, width);
                q.extend(turned(&own[..q_width], row, 1.0));
                k.extend(turned(&own[q_width..q_width + k_width], row, 1.0));
            }
            for plain in [&outputs[0], &outputs[1]] {
                assert_close(&name, &numbers(&plain[0], format), &q, format, 1.0);
            }
            assert_close(&name, &numbers(&outputs[1][1], format), &k, format, 1.0);
            let bytes = k_width * format.size() as usize;
            let mut written = vec![false; 2 * all_rows];
            for row in 0..all_rows {
                let slot = slots[row] as usize;
                written[slot] = true;
                for buffer in [1, 2] {
                    let cached = &outputs[0][buffer][slot * bytes..(slot + 1) * bytes];
                    assert!(
                        cached == &outputs[1][buffer][row * bytes..(row + 1) * bytes],
                        "{name}: slot {slot}"
                    );
                }
                let own = encoded(&row_of(&qkv, row, width)[q_width + k_width..], format);
                assert!(outputs[1][2][row * bytes..(row + 1) * bytes] == own, "{name}: values");
            }
            for (slot, _) in written.iter().enumerate().filter(|(_, written)| !**written) {
                let left = &outputs[0][1][slot * bytes..(slot + 1) * bytes];
                assert!(left.iter().all(|&byte| byte == 0xaa), "{name}: slot {slot} is nobody's");
            }
            for buffer in [0, 1, 2] {
                let alone = alone_of(all_rows)
                    .into_iter()
                    .zip(&outputs[2..])
                    .map(|(row, own)| (row, own[buffer].clone()));
                assert_alone(&name, &outputs[1][buffer], all_rows, &alone.collect::<Vec<_>>());
            }

            let [grad_q, grad_k, grad_v] = [q_width, k_width, k_width]
                .map(|width| values(all_rows * width, format, &mut random));
            let job = |rows_: std::ops::Range<usize>| {
                let part = |x: &[f32]| {
                    let width = x.len() / all_rows;
                    encoded(&x[rows_.start * width..rows_.end * width], format)
                };
                Job {
                    launch: rows::rotate_backward(at, format, rows_.len() as u32, heads),
                    buffers: vec![
                        part(&grad_q),
                        part(&grad_k),
                        part(&grad_v),
                        unwritten(rows_.len() * width, format),
                        longs(&positions[rows_.clone()]),
                        Vec::new(),
                        bytes_of(&cos_sin),
                    ],
                }
            };
            let mut jobs = vec![job(0..all_rows)];
            jobs.extend(alone_of(all_rows).map(|row| job(row..row + 1)));
            let outputs = run(&jobs);
            let name = format!("{}, {heads:?}", jobs[0].launch.kernel);
            let mut expected = Vec::new();
            for row in 0..all_rows {
                expected.extend(turned(row_of(&grad_q, row, q_width), row, -1.0));
                expected.extend(turned(row_of(&grad_k, row, k_width), row, -1.0));
                expected.extend(row_of(&grad_v, row, k_width).iter().map(|&x| (f64::from(x), 0.0)));
            }
            assert_close(&name, &numbers(&outputs[0][3], format), &expected, format, 1.0);
            let alone = alone_of(all_rows)
                .into_iter()
                .zip(&outputs[1..])
                .map(|(row, own)| (row, own[3].clone()));
            assert_alone(&name, &outputs[0][3], all_rows, &alone.collect::<Vec<_>>());
        }
    }
}

// ---- LoRA ----

/// Sums of products with their rounding: `base[i] + Σ x[row] · w[output]`.
fn products(base: Option<&[f32]>, x: &[f32], w: &[f32], inputs: usize) -> Vec<(f64, f64)> {
    let mut out = Vec::new();
    for row in x.chunks(inputs) {
        for weights in w.chunks(inputs) {
            let start = base.map_or(0.0, |base| f64::from(base[out.len()]));
            let terms = row.iter().zip(weights).map(|(&x, &w)| f64::from(x) * f64::from(w));
            let (sum, size) = terms
                .fold((start, start.abs()), |(sum, size), term| (sum + term, size + term.abs()));
            out.push((sum, 40.0 * 2f64.powi(-24) * size));
        }
    }
    out
}

fn check_lora(run: Runner<'_>, all_rows: usize) {
    let mut random = Random(15);
    for format in Format::ALL {
        // Inputs, rank, outputs: whole vectors, none, several rounds.
        for (inputs, rank, outputs) in
            [(64, 16, 40), (67, 3, 300), (2304, 48, 65), (33, 1, 1), (2056, 8, 256)]
        {
            let x = values(all_rows * inputs, format, &mut random);
            let a = values(rank * inputs, format, &mut random);
            let down = values(all_rows * rank, format, &mut random);
            let b = values(outputs * rank, format, &mut random);
            let y = values(all_rows * outputs, format, &mut random);
            let sizes = (inputs as u32, rank as u32, outputs as u32);
            let job = |from: usize, n: usize| -> [Job; 2] {
                let part =
                    |x: &[f32], width: usize| encoded(&x[from * width..(from + n) * width], format);
                let down_launch = rows::lora_down([1, 2, 3], format, n as u32, sizes.0, sizes.1);
                let up_launch = rows::lora_up([1, 2, 3], format, n as u32, sizes.1, sizes.2);
                [
                    Job {
                        launch: down_launch,
                        buffers: vec![
                            unwritten(n * rank, format),
                            part(&x, inputs),
                            encoded(&a, format),
                        ],
                    },
                    Job {
                        launch: up_launch,
                        buffers: vec![part(&y, outputs), part(&down, rank), encoded(&b, format)],
                    },
                ]
            };
            let mut jobs: Vec<Job> = job(0, all_rows).into();
            jobs.extend(alone_of(all_rows).into_iter().flat_map(|row| job(row, 1)));
            jobs.extend(job(2, 5)); // across groups of rows
            let results = run(&jobs);
            let expected = [products(None, &x, &a, inputs), products(Some(&y), &down, &b, rank)];
            for (i, expected) in expected.iter().enumerate() {
                let name = format!(
                    "{}, {inputs} inputs, rank {rank}, {outputs} outputs",
                    jobs[i].launch.kernel
                );
                assert_close(&name, &numbers(&results[i][0], format), expected, format, 1.0);
                let own = |at: usize| results[at * 2 + i][0].clone();
                let alone: Vec<_> = alone_of(all_rows)
                    .into_iter()
                    .enumerate()
                    .map(|(at, row)| (row, own(at + 1)))
                    .collect();
                assert_alone(&name, &results[i][0], all_rows, &alone);
                let five = own(alone_of(all_rows).len() + 1);
                let bytes = five.len() / 5;
                assert!(results[i][0][2 * bytes..7 * bytes] == five, "{name}: five rows");
            }
        }
    }
}

/// Ranks and outputs of the layers, and what they read.
const FACTORS: [([u32; 3], [u32; 3], u32); 5] = [
    ([4, 4, 4], [16, 8, 8], 24),
    ([16, 0, 0], [40, 0, 0], 64),
    ([0, 8, 8], [12, 6, 6], 33), // queries without an adapter
    ([5, 0, 3], [7, 9, 2], 10),  // keys without one
    ([2, 2, 0], [300, 300, 0], 7),
];

fn check_factors(run: Runner<'_>, _all_rows: usize) {
    const SCALE: f32 = 1.7;
    let mut random = Random(16);
    for format in Format::ALL {
        for (ranks, outputs, inputs) in FACTORS {
            let (rank, height) =
                (ranks.iter().sum::<u32>() as usize, outputs.iter().sum::<u32>() as usize);
            let a: Vec<Vec<f32>> =
                ranks.map(|rank| values((rank * inputs) as usize, Format::F32, &mut random)).into();
            let b: Vec<Vec<f32>> = (0..3)
                .map(|part| {
                    values((ranks[part] * outputs[part]) as usize, Format::F32, &mut random)
                })
                .collect();
            let [grad_a, grad_b] =
                [rank * inputs as usize, height * rank].map(|n| values(n, format, &mut random));
            let place =
                |part: usize, first: u64| if ranks[part] == 0 { 0 } else { first + part as u64 };
            let factors = Factors {
                joined_a: 1,
                joined_b: 2,
                a: [0, 1, 2].map(|part| place(part, 3)),
                b: [0, 1, 2].map(|part| place(part, 6)),
                inputs,
                ranks,
                outputs,
            };
            let job = |launch: Launch, joined: [Vec<u8>; 2], parts: Vec<Vec<u8>>| Job {
                launch,
                buffers: joined.into_iter().chain(parts).collect(),
            };
            let all = || a.iter().chain(&b);
            let jobs = [
                job(
                    rows::lora_join(&factors, format, SCALE),
                    [unwritten(grad_a.len(), format), unwritten(grad_b.len(), format)],
                    all().map(|part| bytes_of(part)).collect(),
                ),
                job(
                    rows::lora_part(&factors, format, SCALE),
                    [encoded(&grad_a, format), encoded(&grad_b, format)],
                    all().map(|part| unwritten(part.len(), Format::F32)).collect(),
                ),
            ];
            let results = run(&jobs);
            let name = format!("{}, {ranks:?}, {outputs:?}", jobs[0].launch.kernel);
            assert!(results[0][0] == encoded(&a.concat(), format), "{name}: A");
            let mut joined = vec![0f32; height * rank];
            let (mut top, mut left) = (0, 0);
            for part in 0..3 {
                let (r, o) = (ranks[part] as usize, outputs[part] as usize);
                let grads = &results[1][2 + part];
                assert!(
                    *grads == bytes_of(&grad_a[left * inputs as usize..][..r * inputs as usize]),
                    "{name}: grad of A"
                );
                let mut own = Vec::new();
                for row in 0..o {
                    for column in 0..r {
                        joined[(top + row) * rank + left + column] =
                            b[part][row * r + column] * SCALE;
                        own.push(grad_b[(top + row) * rank + left + column] * SCALE);
                    }
                }
                assert!(results[1][5 + part] == bytes_of(&own), "{name}: grad of B");
                (top, left) = (top + o, left + r);
            }
            assert!(results[0][1] == encoded(&joined, format), "{name}: B");
        }
    }
}

// ---- the tests ----

/// Under three thread orders in bf16, which must agree; the other formats differ from it in how numbers are read and written only.
pub(crate) fn run_in_orders(jobs: &[Job]) -> Vec<Vec<Vec<u8>>> {
    if jobs[0].launch.kernel.ends_with("_bf16") {
        run_in_all_orders(Build::Plain, jobs)
    } else {
        run(Build::Plain, jobs, 0)
    }
}

macro_rules! in_every_order {
    ($($test:ident: $check:ident;)*) => {$(
        #[test]
        fn $test() {
            $check(&|jobs| run_in_orders(jobs), 64);
        }
    )*};
}

in_every_order! {
    add_norm_is_the_formula: check_add_norm;
    add_norm_backward_is_the_derivative: check_add_norm_backward;
    swiglu_and_its_backward_pass_are_the_formulas: check_swiglu;
    rotate_turns_and_puts_into_slots_and_back: check_rotate;
    lora_products_are_the_plain_sums: check_lora;
    lora_factors_are_joined_and_parted: check_factors;
}

#[test]
fn no_kernel_of_rows_leaves_its_buffers() {
    let run = |jobs: &[Job]| run(Build::Sanitised, jobs, 0);
    let checks: [fn(Runner<'_>, usize); 6] = [
        check_add_norm,
        check_add_norm_backward,
        check_swiglu,
        check_rotate,
        check_lora,
        check_factors,
    ];
    for check in checks {
        check(&run, 7);
    }
}
