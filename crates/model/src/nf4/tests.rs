//! The product straight from the codes, against a plain one in f64 over the unpacked matrix.

use tch::{Device, Kind, Tensor};

use super::*;
use crate::ops::WeightRef;

fn random(shape: [i64; 2], seed: i64) -> Tensor {
    tch::manual_seed(seed);
    Tensor::randn(shape, (Kind::Float, Device::Cpu))
}

fn packed_product(x: &Tensor, weight: &Nf4Tensor) -> Tensor {
    ops::linear(x, &WeightRef::Nf4(weight), None, true).unwrap()
}

/// Largest magnitude of each run of `size` elements, in the place of each element.
fn block_max(x: &Tensor, size: i64) -> Tensor {
    x.abs().view([-1, size]).amax([1i64], true).expand([-1, size], false).reshape(x.size())
}

#[test]
fn products_from_codes_keep_the_bound_of_their_rounding() {
    for (inputs, block_size) in [(64, 64), (128, 128), (576, 64), (1536, 64)] {
        let options = Nf4Options { double_quantize: false, block_size };
        let weight = random([70, inputs], inputs) * 0.02;
        let weight = Nf4Tensor::quantize(&weight, options).unwrap();
        let exact = weight.dequantize(Kind::Float).unwrap().to_kind(Kind::Double);
        for rows in 1..=4 {
            let x = random([rows, inputs], rows);
            let _ = x.narrow(1, 0, 1).g_mul_scalar_(50.0); // one element far above the others
            let got = packed_product(&x, &weight).to_kind(Kind::Double);
            let wide = x.to_kind(Kind::Double);
            let expected = wide.matmul(&exact.transpose(0, 1));
            // Both factors are rounded to 1 / 16383 of the largest of their 64; with products in f32 on top.
            let step = 0.5001 / 16383.0;
            let x_error = block_max(&wide, 64) * step;
            let w_error = block_max(&exact, block_size as i64) * step;
            let (x_size, w_size) = (wide.abs(), exact.abs() + &w_error);
            let bound = x_error.matmul(&w_size.transpose(0, 1))
                + x_size.matmul(&w_error.transpose(0, 1))
                + x_size.matmul(&w_size.transpose(0, 1)) * 1e-6;
            let within = (got - &expected).abs().le_tensor(&bound);
            assert!(within.all().int64_value(&[]) == 1, "{rows} × {inputs}");
            // And far below what a bf16 product would lose.
            let relative = (packed_product(&x, &weight).to_kind(Kind::Double) - &expected)
                .abs()
                .max()
                .double_value(&[])
                / expected.abs().max().double_value(&[]);
            assert!(relative < 3e-4, "{rows} × {inputs}: {relative}");
        }
    }
}

/// Query, key and value become one matrix with one block size: the kernels would read past the scales of another.
#[test]
fn matrices_packed_differently_are_not_stacked() {
    let pack = |block_size| {
        let options = Nf4Options { double_quantize: false, block_size };
        Nf4Tensor::quantize(&random([4, 64], 7), options).unwrap()
    };
    let refused = |part: Nf4Tensor| Nf4Tensor::stack(&[pack(64), part]).unwrap_err().to_string();
    let text = refused(pack(128));
    assert!(text.contains("4 blocks of 64") && text.contains("2 blocks of 128"), "{text}");
    let cut = Nf4Tensor { absmax: pack(64).absmax.first(3), ..pack(64) };
    assert!(refused(cut).contains("3 blocks of 64"));
    let doubled = Nf4Tensor { codebook: pack(64).codebook * 2.0, ..pack(64) };
    assert!(refused(doubled).contains("codebook"));
    let whole = Nf4Tensor::stack(&[pack(64), pack(64)]).unwrap();
    let expected = pack(64).dequantize(Kind::Float).unwrap();
    let expected = Tensor::cat(&[&expected, &expected], 0);
    assert!(whole.dequantize(Kind::Float).unwrap().equal(&expected));
}

#[test]
fn a_row_has_the_same_bits_beside_others() {
    let weight = random([96, 192], 1);
    let weight = Nf4Tensor::quantize(&weight, Nf4Options::default()).unwrap();
    for kind in [Kind::Float, Kind::BFloat16] {
        let x = random([4, 192], 2).to_kind(kind);
        let together = packed_product(&x, &weight);
        for row in 0..4 {
            let alone = packed_product(&x.narrow(0, row, 1), &weight);
            assert!(alone.equal(&together.narrow(0, row, 1)));
        }
    }
}

#[test]
fn products_in_bf16_are_those_of_the_unpacked_matrix() {
    let weight = random([64, 256], 4);
    let weight = Nf4Tensor::quantize(&weight, Nf4Options::default()).unwrap();
    let x = random([3, 256], 5).to_kind(Kind::BFloat16);
    let exact = weight.dequantize(Kind::Float).unwrap();
    let expected = x.to_kind(Kind::Float).matmul(&exact.transpose(0, 1));
    let got = packed_product(&x, &weight).to_kind(Kind::Float);
    let relative = (got - &expected).abs().max() / expected.abs().max();
    assert!(relative.double_value(&[]) < 1e-2);
}

#[test]
fn zeros_and_what_is_no_number_come_through() {
    let weight = random([8, 128], 6);
    let weight = Nf4Tensor::quantize(&weight, Nf4Options::default()).unwrap();
    let zeros = Tensor::zeros([1, 128], (Kind::Float, Device::Cpu));
    assert_eq!(packed_product(&zeros, &weight).abs().max().double_value(&[]), 0.0);
    let tiny = &zeros + 1e-38;
    assert!(packed_product(&tiny, &weight).abs().max().double_value(&[]) < 1e-30);
    for bad in [f64::NAN, f64::INFINITY] {
        let x = zeros.copy();
        let _ = x.narrow(1, 100, 1).fill_(bad);
        assert!(packed_product(&x, &weight).isnan().all().int64_value(&[]) == 1, "{bad}");
    }
}

/// What the eight bits stand for, by numpy's arithmetic: (map[code] * factor) + addend, each rounded to f32.
#[test]
fn scales_of_eight_bits_stay_so_and_stand_for_the_same_numbers() {
    let options = |double_quantize| Nf4Options { double_quantize, block_size: 64 };
    let pack = |rows, seed| {
        let weight = random([rows, 256], seed);
        [false, true].map(|double| Nf4Tensor::quantize(&weight, options(double)).unwrap())
    };
    let [plain, double] = pack(100, 8); // 400 blocks: a whole group and a part of one
    let nested = NestedAbsmax::quantize(&plain.absmax.expand());
    let expanded = Vec::<f32>::try_from(double.absmax.expand()).unwrap();
    for (block, (code, found)) in nested.codes.iter().zip(&expanded).enumerate() {
        let product = dynamic_map()[usize::from(*code)] * nested.absmax[block / NESTED_BLOCK];
        assert_eq!(*found, product + nested.offset, "block {block}");
    }
    assert_eq!(expanded.len(), 400);
    assert_eq!((plain.n_bytes(), double.n_bytes()), (12_800 + 1600, 12_800 + 400 + 4 * (256 + 4)));
    // Whole groups below one another stay as they are; behind a part of one the next matrix's group would begin amid another.
    let [_, whole] = pack(64, 9); // 256 blocks
    let dense = |parts: &[&Nf4Tensor]| {
        let parts: Vec<Tensor> = parts.iter().map(|p| p.dequantize(Kind::Float).unwrap()).collect();
        Tensor::cat(&parts, 0)
    };
    let copy = |tensor: &Nf4Tensor| tensor.first_rows(tensor.outputs);
    for (parts, stays) in [([&whole, &double], true), ([&double, &whole], false)] {
        let stacked = Nf4Tensor::stack(&parts.map(copy)).unwrap();
        assert_eq!(matches!(stacked.absmax, Scales::Double { .. }), stays);
        assert!(stacked.dequantize(Kind::Float).unwrap().equal(&dense(&parts)));
    }
    let first = copy(&double).first_rows(70);
    assert!(first.dequantize(Kind::Float).unwrap().equal(&dense(&[&double]).narrow(0, 0, 70)));
    let placed = double.placed(Device::Cpu, false);
    assert!(matches!(placed.absmax, Scales::Single(_)), "the CPU's kernels read f32");
    let found = Vec::<f32>::try_from(placed.absmax.expand()).unwrap();
    assert_eq!(found, expanded);
}
