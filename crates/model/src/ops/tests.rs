//! The products against libtorch's in f64, and those on tiles against Intel's definition, at every instruction-set level.

use tch::Device;

use super::*;
use crate::levels::at_every_level;
use crate::{Nf4Options, random};

fn matrix(purpose: &str, rows: i64, columns: i64, kind: Kind) -> Tensor {
    let values = random::symmetric(5, purpose, (rows * columns) as usize, 1.0);
    Tensor::from_slice(&values).view([rows, columns]).to_kind(kind)
}

/// The largest error of `found` against `expected`, in units of what a sum with these magnitudes may lose.
fn error(found: &Tensor, expected: &Tensor, magnitude: &Tensor, sums: f64) -> f64 {
    // One rounding to the result's format, and `sums` in f32 relative to the magnitudes.
    let unit = if found.kind() == Kind::BFloat16 { 1.0 / 256.0 } else { 1.0 / (1 << 24) as f64 };
    let allowed = expected.abs() * unit + magnitude * (sums / (1 << 24) as f64) + 1e-30;
    ((found.to_kind(Kind::Double) - expected).abs() / allowed).max().double_value(&[])
}

fn wide(tensor: &Tensor) -> Tensor {
    tensor.detach().to_kind(Kind::Double)
}

/// Rows, inputs, outputs, rank: odd ones, less than a tile, more than a panel's steps and more than a block of rows.
const SIZES: [[i64; 4]; 6] = [
    [1, 1, 1, 1],
    [5, 33, 7, 2],
    [13, 128, 40, 24],
    [37, 577, 65, 3],
    [3, 2500, 33, 8],
    [530, 40, 24, 5],
];

#[test]
fn products_here() {
    for kind in [Kind::Float, Kind::BFloat16] {
        for [rows, inputs, outputs, rank] in SIZES {
            let x = matrix("x", rows, inputs, kind).set_requires_grad(true);
            let w = matrix("w", outputs, inputs, kind);
            let a = matrix("a", rank, inputs, kind).set_requires_grad(true);
            let b = matrix("b", outputs, rank, kind).set_requires_grad(true);
            let grad_y = matrix("grad", rows, outputs, kind);
            let y = linear(&x, &WeightRef::Dense(&w), Some((&a, &b)), false).unwrap();
            (&y * &grad_y).sum(Kind::Float).backward();
            let what = format!("{kind:?}, {rows} × {inputs} × {outputs}, rank {rank}");
            let no_adapter = linear(&x.detach(), &WeightRef::Dense(&w), None, false).unwrap();
            let [xw, ww, aw, bw, gw] = [&x, &w, &a, &b, &grad_y].map(wide);
            // What lies between two products is rounded to the format: the expected values are too.
            let round = |tensor: Tensor| tensor.to_kind(kind).to_kind(Kind::Double);
            let down = round(xw.matmul(&aw.tr()));
            let grad_down = round(gw.matmul(&bw));
            // Magnitudes: the same sums of absolute values, those between included.
            let [xm, wm, am, bm, gm] = [&xw, &ww, &aw, &bw, &gw].map(Tensor::abs);
            let (down_m, grad_down_m) = (xm.matmul(&am.tr()), gm.matmul(&bm));
            let close = |name: &str, found: &Tensor, expected: Tensor, magnitude: Tensor| {
                // A sum of n numbers loses about the root of n roundings; in bf16 what lies between loses one of its own.
                let n = (rows + inputs + outputs + rank) as f64;
                let between = if kind == Kind::BFloat16 && name != "x W" { 65536.0 } else { 0.0 };
                let error = error(found, &expected, &magnitude, 8.0 + 4.0 * n.sqrt() + between);
                assert!(error <= 1.0, "{what}: {name} by {error}");
            };
            close("x W", &no_adapter, xw.matmul(&ww.tr()), xm.matmul(&wm.tr()));
            let y_expected = xw.matmul(&ww.tr()) + down.matmul(&bw.tr());
            close("y", &y.detach(), y_expected, xm.matmul(&wm.tr()) + down_m.matmul(&bm.tr()));
            let grad_x = gw.matmul(&ww) + grad_down.matmul(&aw);
            close("grad x", &x.grad(), grad_x, gm.matmul(&wm) + grad_down_m.matmul(&am));
            close("grad a", &a.grad(), grad_down.tr().matmul(&xw), grad_down_m.tr().matmul(&xm));
            close("grad b", &b.grad(), gw.tr().matmul(&down), gm.tr().matmul(&down_m));
        }
    }
}

#[test]
fn products_at_every_level() {
    at_every_level("ops::tests::products_here");
}

/// A trained head's number and gradients, by hand.
#[test]
fn a_trained_linear_layer_by_hand() {
    let x = Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0]).view([2, 2]).set_requires_grad(true);
    let w = Tensor::from_slice(&[10f32, 100.0]).view([1, 2]).set_requires_grad(true);
    let y = trained_linear(&x, &w).unwrap();
    assert_eq!(Vec::<f32>::try_from(y.view([-1])).unwrap(), [210.0, 430.0]);
    (y * Tensor::from_slice(&[1f32, 2.0]).view([2, 1])).sum(Kind::Float).backward();
    assert_eq!(Vec::<f32>::try_from(x.grad().view([-1])).unwrap(), [10.0, 100.0, 20.0, 200.0]);
    assert_eq!(Vec::<f32>::try_from(w.grad().view([-1])).unwrap(), [7.0, 10.0]);
}

/// TDPBF16PS of one element over its inputs, 32 at a time, as Intel's manual (order 325462, volume 2) defines it.
fn tile_element(x: &[f32], w: &[f32]) -> f32 {
    let flush = |v: f32| if v.is_subnormal() { 0.0f32.copysign(v) } else { v };
    let mut total = 0.0f32;
    for (x, w) in x.chunks(32).zip(w.chunks(32)) {
        let (mut even, mut odd) = (0.0f32, 0.0f32);
        for k in (0..x.len()).step_by(2) {
            even = flush(flush(x[k]).mul_add(flush(w[k]), even));
            if k + 1 < x.len() {
                odd = flush(flush(x[k + 1]).mul_add(flush(w[k + 1]), odd));
            }
        }
        total = flush(total + flush(even + odd));
    }
    total
}

/// Numbers of very different sizes, some subnormal, so that the order of a sum shows in its bits.
fn uneven(purpose: &str, rows: i64, columns: i64) -> Tensor {
    let n = (rows * columns) as usize;
    let values = random::symmetric(9, purpose, n, 1.0);
    let sizes = random::symmetric(9, &format!("{purpose} sizes"), n, 1.0);
    let scaled = values.iter().zip(sizes).map(|(value, size)| match size {
        s if s > 0.97 => value * 1e-39,
        s => value * (12.0 * s).exp2(),
    });
    let values: Vec<f32> = scaled.collect();
    Tensor::from_slice(&values).view([rows, columns]).to_kind(Kind::BFloat16)
}

#[test]
fn tiles_here() {
    if !kernels_name().starts_with("amx") {
        return; // the test below starts this one with tiles
    }
    for [rows, inputs, outputs] in [[1, 64, 17], [35, 70, 40], [16, 1, 33], [5, 4100, 3]] {
        let (x, w) = (uneven("x", rows, inputs), uneven("w", outputs, inputs));
        let y = linear(&x, &WeightRef::Dense(&w), None, false).unwrap();
        let rows_of = |tensor: &Tensor| -> Vec<Vec<f32>> {
            Vec::try_from(tensor.to_kind(Kind::Float)).unwrap()
        };
        let (xs, ws) = (rows_of(&x), rows_of(&w));
        let expected: Vec<f32> =
            xs.iter().flat_map(|x| ws.iter().map(|w| tile_element(x, w))).collect();
        let expected = Tensor::from_slice(&expected).view([rows, outputs]);
        assert!(y.equal(&expected.to_kind(Kind::BFloat16)), "{rows} × {inputs} × {outputs}");
    }
}

#[test]
fn tiles_compute_what_intel_defines() {
    at_every_level("ops::tests::tiles_here");
}

/// A packed matrix multiplies as the dense one that it stands for, bit for bit.
#[test]
fn a_packed_matrix_multiplies_as_what_it_stands_for() {
    for kind in [Kind::Float, Kind::BFloat16] {
        let w = Nf4Tensor::quantize(&matrix("w", 48, 128, kind), Nf4Options::default()).unwrap();
        let x = matrix("x", 9, 128, kind).to_device(Device::Cpu);
        let packed = linear(&x, &WeightRef::Nf4(&w), None, false).unwrap();
        let dense = linear(&x, &WeightRef::Dense(&w.dequantize(kind).unwrap()), None, false);
        assert!(packed.equal(&dense.unwrap()), "{kind:?}");
    }
}
