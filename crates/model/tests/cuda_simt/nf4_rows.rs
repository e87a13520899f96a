//! Packed products on emulated tensor cores, against sums in f64 of weights rounded once.

use arete_model::cuda::plan::{self, Format, Launch};
use arete_model::cuda::table::{Call, OPERATIONS, Target};

use crate::machine::{Build, Job, output_of, run, run_in_all_orders};
use crate::numbers::{Goldens, Random, encoded, epsilon, numbers};
use crate::packed::{Packed, Scales};

struct Shape {
    outputs: u32,
    inputs: u32,
    block_size: i64,
    double: bool,
    multiprocessors: u32,
}

const SHAPES: [Shape; 8] = [
    // a quarter of a group of columns, one output
    Shape { outputs: 1, inputs: 32, block_size: 32, double: false, multiprocessors: 1 },
    Shape { outputs: 7, inputs: 64, block_size: 64, double: true, multiprocessors: 132 },
    // three quarters of a group; blocks longer than a row and not dividing it
    Shape { outputs: 33, inputs: 96, block_size: 32, double: false, multiprocessors: 1 },
    Shape { outputs: 130, inputs: 192, block_size: 128, double: false, multiprocessors: 1 },
    // SmolLM2's width: four and a half groups, two blocks that share the second of three tiles
    Shape { outputs: 300, inputs: 576, block_size: 64, double: true, multiprocessors: 1 },
    // one tile shared by two blocks, and by more than two
    Shape { outputs: 40, inputs: 1_088, block_size: 64, double: false, multiprocessors: 132 },
    Shape { outputs: 129, inputs: 2_176, block_size: 64, double: true, multiprocessors: 132 },
    // four blocks over five tiles: parts of two tiles and whole ones in between
    Shape { outputs: 640, inputs: 512, block_size: 256, double: false, multiprocessors: 1 },
];

const FORMATS: [Format; 2] = [Format::BF16, Format::F16];

fn job(packed: &Packed, x: &[f32], format: Format, rows: u32, multiprocessors: u32) -> Job {
    let (outputs, inputs) = (packed.outputs, packed.inputs);
    let scratch = plan::nf4_rows_scratch(rows, outputs, inputs, multiprocessors);
    let mut buffers = vec![
        vec![0xaa; (rows * outputs * format.size()) as usize],
        encoded(&x[..(rows * inputs) as usize], format),
        vec![0xff; scratch.partials as usize * 4],
        vec![0; scratch.arrivals as usize * 4],
    ];
    buffers.extend(packed.buffers());
    let addresses = packed.addresses(5);
    let launch = plan::nf4_rows(1, 2, format, rows, &addresses, [3, 4], multiprocessors);
    assert_eq!(of_the_table(packed, format, rows, multiprocessors), std::slice::from_ref(&launch));
    Job { launch, buffers }
}

/// What the decoder's call becomes: absmax in f32, or in eight bits with map and factors behind the codebook.
fn of_the_table(packed: &Packed, format: Format, rows: u32, multiprocessors: u32) -> Vec<Launch> {
    let operation = OPERATIONS.iter().find(|operation| operation.name == "packed product");
    let (absmax, map, nested) = match packed.scales {
        Scales::Single(_) => (7, 0, 0),
        Scales::Double(_) => (7, 8, 9),
    };
    let Packed { outputs, inputs, block_size, .. } = *packed;
    let call = Call {
        format,
        addresses: &[1, 2, 5, absmax, 6, map, nested],
        numbers: &[rows.into(), outputs.into(), inputs.into(), block_size],
        reals: &[],
    };
    let target = Target { arch: 80, multiprocessors };
    let launches = operation.expect("it is one").launches(&call, target, &mut |_| Ok([3, 4]));
    launches.expect("sizes that kernels take")
}

/// |y − Σ x w| may differ by the rounding of y and by that of f32 sums in any order.
pub(crate) fn assert_product(
    name: &str,
    y: &[f32],
    x: &[f32],
    weights: &[f32],
    inputs: usize,
    format: Format,
) {
    let epsilon = epsilon(format);
    let outputs = weights.len() / inputs;
    for (i, &got) in y.iter().enumerate() {
        let (row, output) = (i / outputs, i % outputs);
        let row = &x[row * inputs..(row + 1) * inputs];
        let column = &weights[output * inputs..(output + 1) * inputs];
        let (mut sum, mut magnitude) = (0.0, 0.0);
        for (&x, &w) in row.iter().zip(column) {
            let term = f64::from(x) * f64::from(w);
            sum += term;
            magnitude += term.abs();
        }
        let tolerance = epsilon * sum.abs() + 8.0 * 2f64.powi(-24) * magnitude + 2f64.powi(-25);
        assert!(
            (f64::from(got) - sum).abs() <= tolerance,
            "{name}: element {i} is {got}, expected {sum} ± {tolerance:e}"
        );
    }
}

fn check(build: Build, shapes: &[Shape], all_rows: &[u32], all_orders: bool) {
    let goldens = Goldens::read("nf4.safetensors");
    let (codebook, map) = (goldens.get("codebook"), goldens.get("nested_codebook"));
    let mut random = Random(11);
    for shape in shapes {
        let Shape { outputs, inputs, block_size, double, multiprocessors } = *shape;
        let packed =
            Packed::random(&codebook, &map, outputs, inputs, block_size, double, &mut random);
        for format in FORMATS {
            // Rounded once, from the exact product in f32: what the trainer multiplies with.
            let weights = numbers(&encoded(&packed.weights(), format), format);
            let most = all_rows.iter().max().expect("some rows") * inputs;
            let x: Vec<f32> = (0..most).map(|_| random.number()).collect();
            let x = numbers(&encoded(&x, format), format);
            let jobs: Vec<Job> = all_rows
                .iter()
                .map(|&rows| job(&packed, &x, format, rows, multiprocessors))
                .collect();
            let outs =
                if all_orders { run_in_all_orders(build, &jobs) } else { run(build, &jobs, 0) };
            let longest = outs.iter().map(|buffers| &buffers[0]).max_by_key(|y| y.len());
            let longest = longest.expect("at least one job");
            for (buffers, job) in outs.iter().zip(&jobs) {
                let (kernel, grid) = (&job.launch.kernel, job.launch.grid);
                let name = format!("{kernel} {grid:?}: {outputs} x {inputs}, double {double}");
                let y = numbers(&buffers[0], format);
                assert_product(&name, &y, &x, &weights, inputs as usize, format);
                assert!(longest.starts_with(&buffers[0]), "{name}: rows depend on their number");
                assert!(buffers[3].iter().all(|&byte| byte == 0), "{name}: counters are left");
            }
        }
    }
}

#[test]
fn product_equals_the_plain_sum_and_a_row_alone_equals_itself_among_64() {
    check(Build::Plain, &SHAPES, &[1, 3, 8, 9, 16, 17, 33, 64, 65], false);
}

#[test]
fn product_does_not_depend_on_the_order_of_threads_and_blocks() {
    check(Build::Plain, &SHAPES[4..7], &[1, 11, 64], true);
}

#[test]
fn no_product_leaves_its_buffers() {
    check(Build::Sanitised, &SHAPES[..5], &[1, 9, 64], false);
    check(Build::Sanitised, &SHAPES[6..7], &[2], false);
}

/// The sanitizers do stop the kernel.
#[test]
fn an_activation_short_is_noticed() {
    let goldens = Goldens::read("nf4.safetensors");
    let mut random = Random(3);
    let (codebook, map) = (goldens.get("codebook"), goldens.get("nested_codebook"));
    let packed = Packed::random(&codebook, &map, 130, 192, 64, true, &mut random);
    let mut short = job(&packed, &[0.5; 3 * 192], Format::BF16, 3, 1);
    short.buffers[1].truncate(3 * 192 * 2 - 16);
    let output = output_of(Build::Sanitised, &[short], 0);
    let messages = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && messages.contains("heap-buffer-overflow"), "{messages}");
}
