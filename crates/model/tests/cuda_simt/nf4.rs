//! Dequantise, quantise and the product without tensor cores.

use arete_model::cuda::plan::{self, Format};
use half::f16;

use crate::machine::{Build, Job, output_of, run, run_in_all_orders};
use crate::numbers::{Goldens, Random, bytes_of, encoded, floats, numbers};
use crate::packed::{Packed, Scales};

const BLOCKS: [i64; 5] = [32, 64, 128, 256, 1024];

fn assert_same(name: &str, got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len(), "{name}");
    let wrong = got.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits());
    if let Some(i) = wrong {
        panic!("{name}: element {i} is {:e}, expected {:e}", got[i], expected[i]);
    }
}

// ---- dequantise and quantise: equal to bitsandbytes, bit for bit ----

/// bitsandbytes' packed tensors with what they must unpack to.
fn dequantize_cases() -> Vec<(String, Packed, Format, Vec<u8>)> {
    let mut cases = Vec::new();
    let blocks = Goldens::read("nf4_blocks.safetensors");
    let codebook = blocks.get("codebook");
    let packed = |codes, scales, n: usize, block_size| Packed {
        codes,
        codebook: codebook.clone(),
        scales,
        outputs: 1,
        inputs: n as u32,
        block_size,
    };
    for block in BLOCKS {
        for format in Format::ALL {
            let key = format!("{block}.{}", format.name());
            let expected = blocks.get(&format!("{key}.dequantised"));
            let codes = blocks.get(&format!("{key}.codes"));
            let scales = Scales::Single(blocks.get(&format!("{key}.absmax")));
            let n = expected.len() / format.size() as usize;
            cases.push((key, packed(codes, scales, n, block), format, expected));
        }
    }
    let double = |key: &str| blocks.get(&format!("64.f32.double.{key}"));
    let expected = double("dequantised");
    let scales =
        Scales::double(double("codes"), blocks.get("map"), &double("absmax"), &double("offset"));
    let matrix = packed(blocks.get("64.f32.codes"), scales, expected.len() / 4, 64);
    cases.push(("64.f32.double".into(), matrix, Format::F32, expected));

    // Not `narrow`: where a block crosses the end of a row, bitsandbytes' own CPU kernel takes the wrong
    // absmax (its CUDA kernels and its plain Python do not).
    for (file, names) in [
        ("nf4.safetensors", &["square", "ragged", "edges"][..]),
        ("nf4_nested.safetensors", &["nested"][..]), // two blocks of nested scales
    ] {
        let goldens = Goldens::read(file);
        let map = Goldens::read("nf4.safetensors").get("nested_codebook");
        for name in names {
            let get = |key: &str| goldens.get(&format!("{name}.{key}"));
            let n = goldens.shape(&format!("{name}.weight")).iter().product();
            if *name != "nested" {
                for (key, format) in
                    [("dequantised", Format::F32), ("dequantised_bf16", Format::BF16)]
                {
                    let matrix = packed(get("codes"), Scales::Single(get("absmax")), n, 64);
                    cases.push((format!("{name}.{key}"), matrix, format, get(key)));
                }
            }
            let scales = Scales::double(
                get("double.absmax"),
                map.clone(),
                &get("double.nested_absmax"),
                &get("double.nested_offset"),
            );
            let matrix = packed(get("double.codes"), scales, n, 64);
            let expected = get("double.dequantised");
            cases.push((format!("{name}.double"), matrix, Format::F32, expected));
        }
    }
    cases
}

fn check_dequantize(run: impl Fn(&[Job]) -> Vec<Vec<Vec<u8>>>) {
    let cases = dequantize_cases();
    let jobs: Vec<Job> =
        cases.iter().map(|(_, packed, format, _)| packed.dequantize(*format)).collect();
    for ((name, _, format, expected), buffers) in cases.iter().zip(run(&jobs)) {
        assert_same(name, &numbers(&buffers[0], *format), &numbers(expected, *format));
    }
}

#[test]
fn dequantise_equals_bitsandbytes() {
    check_dequantize(|jobs| run_in_all_orders(Build::Plain, jobs));
}

/// Weights with the codes and absmax bitsandbytes gives them.
fn quantize_cases() -> Vec<(String, Job, Vec<u8>, Vec<u8>)> {
    let blocks = Goldens::read("nf4_blocks.safetensors");
    let mut inputs = Vec::new();
    for block in BLOCKS {
        for format in Format::ALL {
            let key = format!("{block}.{}", format.name());
            let get = |part: &str| blocks.get(&format!("{key}.{part}"));
            inputs.push((key.clone(), format, block, get("weight"), get("codes"), get("absmax")));
        }
    }
    for (file, names) in [
        ("nf4.safetensors", &["square", "narrow", "ragged", "edges"][..]),
        ("nf4_blocks.safetensors", &["zero", "halfway"][..]),
        ("nf4_nested.safetensors", &["nested"][..]),
    ] {
        let goldens = Goldens::read(file);
        for name in names {
            let get = |part: &str| goldens.get(&format!("{name}.{part}"));
            let (weight, codes, absmax) = (get("weight"), get("codes"), get("absmax"));
            inputs.push(((*name).to_owned(), Format::F32, 64, weight, codes, absmax));
        }
    }
    inputs
        .into_iter()
        .map(|(name, format, block, weight, codes, absmax)| {
            let n = weight.len() as u64 / u64::from(format.size());
            let block_log2 = plan::block_log2(block).expect("a block size of bitsandbytes");
            let launch = plan::quantize(1, 2, 3, format, n, block_log2);
            let buffers = vec![vec![0xaa; codes.len()], vec![0xaa; absmax.len()], weight];
            (name, Job { launch, buffers }, codes, absmax)
        })
        .collect()
}

fn check_quantize(run: impl Fn(&[Job]) -> Vec<Vec<Vec<u8>>>) {
    let cases = quantize_cases();
    let jobs: Vec<Job> = cases.iter().map(|(_, job, ..)| job.clone()).collect();
    for ((name, _, codes, absmax), buffers) in cases.iter().zip(run(&jobs)) {
        assert_same(&format!("{name}: absmax"), &floats(&buffers[1]), &floats(absmax));
        let numbers = |bytes: &[u8]| -> Vec<f32> { bytes.iter().map(|&b| f32::from(b)).collect() };
        assert_same(&format!("{name}: codes"), &numbers(&buffers[0]), &numbers(codes));
    }
}

#[test]
fn quantise_equals_bitsandbytes() {
    check_quantize(|jobs| run_in_all_orders(Build::Plain, jobs));
}

/// Code 15 stands for 1, so a block of them unpacks to its absmax, rounded.
#[test]
fn rounding_to_sixteen_bits_is_to_nearest_even() {
    let codebook = Goldens::read("nf4.safetensors").get("codebook");
    let mut values = vec![
        0.0,
        -0.0,
        1.0,
        65_504.0, // the largest half
        65_519.996,
        65_520.0, // halfway to 65536: infinity
        65_536.0,
        f32::MAX,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MIN_POSITIVE,
        f32::from_bits(1),
        2f32.powi(-14), // the smallest normal half
        2f32.powi(-24), // the smallest half
        2f32.powi(-25), // halfway to zero: even
        2f32.powi(-25) * 1.000_1,
        -2f32.powi(-14) * 0.999_99,
    ];
    let mut random = Random(7);
    while values.len() < 4096 {
        let value = f32::from_bits(random.bits() as u32);
        values.push(value);
        // Exactly halfway between two bf16 values, and between two halves.
        values.push(f32::from_bits(value.to_bits() & 0xffff_0000 | 0x8000));
        values.push(f32::from_bits(random.bits() as u32 & 0x87ff_e000 | 0x3800_1000));
    }
    for format in Format::ALL {
        let packed = Packed {
            codes: vec![0xff; values.len() * 16],
            codebook: codebook.clone(),
            scales: Scales::Single(bytes_of(&values)),
            outputs: values.len() as u32,
            inputs: 32,
            block_size: 32,
        };
        let buffers = run(Build::Plain, &[packed.dequantize(format)], 0);
        let got = numbers(&buffers[0][0], format);
        for (i, value) in values.iter().enumerate() {
            let expected = numbers(&encoded(&[*value], format), format)[0];
            let same = |got: &f32| {
                if expected.is_nan() { got.is_nan() } else { got.to_bits() == expected.to_bits() }
            };
            let own = &got[i * 32..(i + 1) * 32];
            assert!(
                own.iter().all(same),
                "{value:e} to {format:?}: {expected:e}, got {:e}",
                own[0]
            );
        }
    }
}

/// A block with one element other than zero has that element's magnitude as absmax.
#[test]
fn every_half_is_read_exactly() {
    let finite: Vec<u16> =
        (0..0x8000u16).step_by(11).filter(|&h| f16::from_bits(h).is_finite()).collect();
    let mut weight = vec![0u8; finite.len() * 64];
    for (block, half) in finite.iter().enumerate() {
        weight[block * 64 + 2 * (block % 32)..][..2].copy_from_slice(&half.to_le_bytes());
    }
    let n = finite.len() as u64 * 32;
    let launch = plan::quantize(1, 2, 3, Format::F16, n, 5);
    let buffers = vec![vec![0; finite.len() * 16], vec![0; finite.len() * 4], weight];
    let out = run(Build::Plain, &[Job { launch, buffers }], 0);
    let expected: Vec<f32> = finite.iter().map(|&half| f16::from_bits(half).to_f32()).collect();
    assert_eq!(floats(&out[0][1]), expected);
}

// ---- the fused product ----

/// |y − Σ x w| may differ by the rounding of y and by that of f32 sums in any order.
fn assert_product(
    name: &str,
    y: &[f32],
    x: &[f32],
    weights: &[f32],
    packed: &Packed,
    format: Format,
) {
    let epsilon = match format {
        Format::F32 => 0.0,
        Format::BF16 => 2f64.powi(-8),
        Format::F16 => 2f64.powi(-11),
    };
    let (outputs, inputs) = (packed.outputs as usize, packed.inputs as usize);
    for (i, got) in y.iter().enumerate() {
        let (row, output) = (i / outputs, i % outputs);
        let terms = (0..inputs)
            .map(|k| f64::from(x[row * inputs + k]) * f64::from(weights[output * inputs + k]));
        let (sum, magnitude) =
            terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
        // Products and at most K sums of a lane, 2^-24 each, far fewer in practice.
        let tolerance = epsilon * sum.abs() + 40.0 * 2f64.powi(-24) * magnitude + 2f64.powi(-25);
        let gap = (f64::from(*got) - sum).abs();
        assert!(
            gap <= tolerance,
            "{name}: row {row}, output {output}: {got}, expected {sum} ± {tolerance:e}"
        );
    }
}

struct Shape {
    outputs: u32,
    inputs: u32,
    block_size: i64,
    double: bool,
    multiprocessors: u32,
}

const SHAPES: [Shape; 10] = [
    // one chunk pair; fewer outputs than a warp computes
    Shape { outputs: 1, inputs: 64, block_size: 64, double: false, multiprocessors: 1 },
    Shape { outputs: 7, inputs: 64, block_size: 64, double: true, multiprocessors: 132 },
    // the shortest blocks; a row of an odd number of chunks
    Shape { outputs: 5, inputs: 96, block_size: 32, double: false, multiprocessors: 1 },
    // blocks longer than a row and not dividing it
    Shape { outputs: 33, inputs: 192, block_size: 128, double: false, multiprocessors: 1 },
    Shape { outputs: 18, inputs: 320, block_size: 256, double: true, multiprocessors: 132 },
    // SmolLM2's width: 18 chunks, so 14 lanes idle
    Shape { outputs: 65, inputs: 576, block_size: 64, double: false, multiprocessors: 1 },
    // more than one run of chunks: tiles for many rows, two and four warps per column
    Shape { outputs: 19, inputs: 1088, block_size: 64, double: false, multiprocessors: 132 },
    Shape { outputs: 34, inputs: 2176, block_size: 64, double: true, multiprocessors: 1 },
    Shape { outputs: 10, inputs: 4160, block_size: 64, double: false, multiprocessors: 132 },
    // K too long for one tile even with one row
    Shape { outputs: 3, inputs: 20_544, block_size: 64, double: false, multiprocessors: 1 },
];

fn check_multiply(build: Build, shapes: &[Shape], all_rows: &[u32], all_orders: bool) {
    let goldens = Goldens::read("nf4.safetensors");
    let (codebook, map) = (goldens.get("codebook"), goldens.get("nested_codebook"));
    let mut random = Random(3);
    for shape in shapes {
        let packed = Packed::random(
            &codebook,
            &map,
            shape.outputs,
            shape.inputs,
            shape.block_size,
            shape.double,
            &mut random,
        );
        let weights = packed.weights();
        for format in Format::ALL {
            let most = 16 * shape.inputs as usize;
            let x: Vec<f32> = (0..most).map(|_| random.number()).collect();
            let x = numbers(&encoded(&x, format), format);
            let part = |rows: u32| &x[..(rows * shape.inputs) as usize];
            let jobs: Vec<Job> = all_rows
                .iter()
                .map(|&rows| packed.multiply(part(rows), format, rows, shape.multiprocessors))
                .collect();
            let outputs =
                if all_orders { run_in_all_orders(build, &jobs) } else { run(build, &jobs, 0) };
            let longest = outputs.iter().map(|buffers| &buffers[0]).max_by_key(|y| y.len());
            let longest = longest.expect("at least one job");
            for ((rows, buffers), job) in all_rows.iter().zip(&outputs).zip(&jobs) {
                let name = format!(
                    "{}: {rows} x {} x {}, blocks of {}, double {}",
                    job.launch.kernel, shape.outputs, shape.inputs, shape.block_size, shape.double
                );
                let y = numbers(&buffers[0], format);
                assert_product(&name, &y, part(*rows), &weights, &packed, format);
                assert!(longest.starts_with(&buffers[0]), "{name}: rows depend on their number");
            }
        }
    }
}

#[test]
fn product_equals_the_plain_sum_and_rows_do_not_depend_on_each_other() {
    check_multiply(Build::Plain, &SHAPES, &[1, 2, 3, 4, 5, 8, 11, 16], false);
}

#[test]
fn product_does_not_depend_on_the_order_of_threads() {
    check_multiply(Build::Plain, &SHAPES[5..7], &[1, 4, 16], true);
}

#[test]
fn product_with_bitsandbytes_weights() {
    let goldens = Goldens::read("nf4.safetensors");
    let packed = Packed {
        codes: goldens.get("square.codes"),
        codebook: goldens.get("codebook"),
        scales: Scales::Single(goldens.get("square.absmax")),
        outputs: 64,
        inputs: 64,
        block_size: 64,
    };
    let weights = floats(&goldens.get("square.dequantised"));
    let mut random = Random(5);
    let x: Vec<f32> = (0..6 * 64).map(|_| random.number()).collect();
    let out = run(Build::Plain, &[packed.multiply(&x, Format::F32, 6, 80)], 0);
    assert_product("square", &floats(&out[0][0]), &x, &weights, &packed, Format::F32);
}

// ---- sanitizers ----

#[test]
fn no_kernel_leaves_its_buffers() {
    check_dequantize(|jobs| run(Build::Sanitised, jobs, 0));
    check_quantize(|jobs| run(Build::Sanitised, jobs, 0));
    check_multiply(Build::Sanitised, &SHAPES[1..7], &[1, 3, 7, 16], false);
}

/// The sanitizers do stop a kernel that goes wrong.
#[test]
fn a_buffer_one_byte_short_is_noticed() {
    let mut job = quantize_cases().swap_remove(1).1;
    job.buffers[0].pop();
    let output = output_of(Build::Sanitised, &[job], 0);
    assert!(!output.status.success());
    let messages = String::from_utf8_lossy(&output.stderr);
    assert!(
        messages.contains("heap-buffer-overflow") && messages.contains("quantize"),
        "{messages}"
    );
}
