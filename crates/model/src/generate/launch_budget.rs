//! How many launches a GPU would be sent, held to a budget: the same calls on the CPU, counted.
//!
//! A launch of ours is counted by the launcher's own plan of it, and only operations whose kernels exist and run on the SIMT machine
//! are there to be called. An operator of libtorch counts one unless it launches nothing (`csrc/launches.h` lists them).

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test's helpers fail by panicking, and the number is its result"
)]

use super::*;
use crate::batch::Batch;
use crate::cuda::plan::{Format, Program};
use crate::cuda::table::OPERATIONS;
use crate::launches::{Launches, count};
use crate::{LoraConfig, Source, logprobs};
use tch::{Device, Kind};

const MISTRAL_7B_LAYERS: i64 = 32;

fn adapter(decoder: &Decoder) -> Adapter {
    let config = LoraConfig::default();
    Adapter::new("policy", decoder.config(), &config, 1, Device::Cpu).unwrap()
}

/// The count of all layers of Mistral-7B, from those of one layer and of two.
fn of_all_layers(count: impl Fn(&Decoder) -> Launches) -> (i64, Launches) {
    let [one, two] = [1, 2].map(|n_layers| count(&Decoder::of_mistral_7b_shape(n_layers)));
    let each = two.all() - one.all();
    (two.all() + (MISTRAL_7B_LAYERS - 2) * each, two)
}

/// The second step of so many sequences, which computes one token of each.
fn decoding_step(decoder: &Decoder, rows: usize, dry: bool, one_more_call_a_row: bool) -> Launches {
    let adapter = adapter(decoder);
    let request = |i: usize| {
        let prompt = (0..20).map(|k| ((i * 7 + k) % 90 + 3) as i64).collect();
        Request::new(prompt, vec![Stream { seed: 1, prompt: i as u64, sample: 0 }], 4)
    };
    let requests: Vec<Request> = (0..rows).map(request).collect();
    let options = Options { max_rows: rows, ..Options::new(Sampling::at(1.0), Vec::new()) };
    let (generator, _) = count(dry, || {
        let mut generator =
            Generator::new(decoder, None, Some(&adapter), &requests, &options).unwrap();
        assert!(generator.step().unwrap());
        generator
    });
    let mut generator = generator;
    let states = tch::Tensor::zeros([rows as i64, 8], (Kind::Float, Device::Cpu));
    let ((), launches) = count(dry, || {
        assert!(generator.step().unwrap());
        if one_more_call_a_row {
            (0..rows as i64).for_each(|row| drop(states.get(row).relu()));
        }
    });
    assert!(generator.active.iter().all(|sequence| sequence.current.token_ids.len() == 2));
    launches
}

/// Forward and backward pass over a batch, twice, so that the second adds to the gradients of the first: the more of both.
fn training_pass(decoder: &Decoder, batch: &Batch, dry: bool, recompute: bool) -> Launches {
    let mut adapter = adapter(decoder);
    adapter.set_trainable(true);
    let predecessors = batch.predecessors();
    let rows: Vec<usize> =
        (0..batch.n_tokens()).filter(|&row| predecessors[row].is_some()).collect();
    let pass = || {
        let pass = decoder.pass(batch, &adapter, recompute).unwrap();
        let found = logprobs::of_rows(decoder, &pass.hidden, batch, &rows, 1.0, false).unwrap();
        let loss = -found.logprob.mean(Kind::Float);
        pass.backward(&loss).unwrap();
    };
    let [first, second] = [0, 1].map(|_| count(dry, pass).1);
    for (name, parameter) in adapter.parameters() {
        assert!(parameter.grad().defined(), "{name} has a gradient");
    }
    if first.all() > second.all() { first } else { second }
}

/// 1,024 tokens: eight prompts of 32, two answers of 48 to each, all on their own or as trees.
fn batch(trees: bool) -> Batch {
    let ids = |i: i64, n: i64| (0..n).map(|k| (i * 31 + k * 7) % 900 + 3).collect::<Vec<i64>>();
    let mut builder = Batch::tree();
    for i in 0..8 {
        let prompt = builder.root(&ids(i, 32));
        for answer in 0..2 {
            let ids = ids(8 + 2 * i + answer, 48);
            if trees {
                builder.child(prompt, &ids);
            } else {
                builder.root(&ids);
            }
        }
    }
    let batch = builder.build();
    assert_eq!(batch.n_tokens(), 1024);
    batch
}

/// Within the budget, and alike.
fn judge(found: &[i64], budget: i64) -> Result<(), String> {
    let most = *found.iter().max().expect("something was counted");
    if most > budget {
        return Err(format!("{found:?} launches, the budget is {budget}"));
    }
    if found.iter().any(|&n| n != most) {
        return Err(format!("{found:?} launches: they depend on the rows"));
    }
    Ok(())
}

fn print(what: &str, n: i64, of_two_layers: &Launches) {
    println!("launches {n}: {what}; of two layers:");
    for (name, n) in &of_two_layers.by_name {
        println!("  {n:5} {name}");
    }
}

/// An operation may be counted as one launch because of these.
fn assert_that_kernels_run() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda_simt");
    let modules = fs_err::read_to_string(folder.join("main.rs")).unwrap();
    for operation in OPERATIONS {
        let (file, kernels) = operation.kernels;
        for kernel in kernels {
            for format in [Format::BF16, Format::F16] {
                let start = format!("{kernel}_{}", format.name());
                let programs = Program::ALL.iter().filter(|program| program.name() == file);
                let found = programs.flat_map(|program| program.kernels()).any(|name| {
                    name.strip_prefix(&start)
                        .is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
                });
                assert!(found, "{}: no kernel {start} in {file}", operation.name);
            }
        }
        let (file, test) = operation.simt_test;
        let module = file.trim_end_matches(".rs");
        assert!(modules.contains(&format!("mod {module};")), "{module} is not among the tests");
        let tests = fs_err::read_to_string(folder.join(file)).unwrap();
        let written = [format!("#[test]\nfn {test}()"), format!("\n    {test}: check_")];
        let found = written.iter().any(|form| tests.contains(form));
        assert!(found, "{}: no test {test} in {file}", operation.name);
    }
}

#[test]
fn launch_budget_of_a_decoding_step() {
    const BUDGET: i64 = 700;
    assert_that_kernels_run();
    let step =
        |rows: usize, more: bool| of_all_layers(|decoder| decoding_step(decoder, rows, true, more));
    let found = [1, 32, 64].map(|rows| {
        let (n, of_two_layers) = step(rows, false);
        print(&format!("a decoding step of {rows} rows"), n, &of_two_layers);
        n
    });
    judge(&found, BUDGET).unwrap();
    // One more call a row does not pass.
    let more = [1, 32, 64].map(|rows| step(rows, true).0);
    assert_eq!(more.map(|n| n - found[0]), [1, 32, 64]);
    judge(&more, BUDGET).unwrap_err();
}

#[test]
fn launch_budget_of_a_training_pass() {
    const BUDGET: i64 = 4000;
    assert_that_kernels_run();
    for (trees, recompute) in [(false, false), (true, false), (true, true)] {
        let (n, of_two_layers) =
            of_all_layers(|decoder| training_pass(decoder, &batch(trees), true, recompute));
        let what = format!("a training pass, trees {trees}, recompute {recompute}");
        print(&what, n, &of_two_layers);
        judge(&[n], BUDGET).unwrap();
    }
}

/// What is not computed in a dry count makes no difference to it.
#[test]
fn a_dry_count_is_that_of_the_whole_computation() {
    let path =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/gradients/base");
    let options = crate::LoadOptions { device: Device::Cpu, dtype: Kind::Float, nf4: None };
    let checkpoint = crate::Checkpoint::open(&Source::Directory(path)).unwrap();
    let decoder = Decoder::load(&checkpoint, &options).unwrap();
    let [dry, whole] = [true, false].map(|dry| decoding_step(&decoder, 3, dry, false));
    assert_eq!(dry, whole);
    let sequences: Vec<Vec<i64>> =
        (0..3).map(|i| (0..30).map(|k| 3 + (i + k) % 20).collect()).collect();
    let [dry, whole] = [true, false]
        .map(|dry| training_pass(&decoder, &Batch::from_sequences(&sequences), dry, false));
    assert_eq!(dry, whole);
    assert!(whole.ours > 0 && whole.libtorch > 0);
}
