//! A look, when a model is loaded, at whether this machine's products are equal row for row (docs/numerics.md, "Equal rows").
//!
//! The products are the decoder's own: its shapes, number format and weights, through the function that every pass calls.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use serde::Serialize;
use tch::{Kind, Tensor};

use crate::ops::{self, Amx, WeightRef};
use crate::{Error, kernels_name, machine};

/// Rows that are computed together, then in parts.
const N_ROWS: i64 = 64;
/// Parts of them (first row, rows): alone at both ends, and a few.
const PARTS: [(i64, i64); 3] = [(0, 1), (N_ROWS - 1, 1), (20, 5)];
/// Most multiplications of one product: outputs are left out above, as the vocabulary has.
const MAX_MULTIPLICATIONS: i64 = 1 << 22;
/// Outputs are left out in steps of so many, so that a packed matrix keeps whole blocks.
const OUTPUT_STEP: i64 = 64;
/// Rank of the adapter on one of the products.
const RANK: i64 = 24;

/// Which instruction set oneDNN, which computes libtorch's bf16 products, may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OnednnIsa {
    /// Any the CPU has: it is without AMX.
    Any,
    /// Nothing above `AVX512_CORE_BF16`: the CPU has AMX, whose products are not equal row for row.
    WithoutAmx,
    /// What `ONEDNN_MAX_CPU_ISA` (or `DNNL_MAX_CPU_ISA`) said when the program started.
    FromEnvironment(String),
}

impl OnednnIsa {
    /// What the program decided when it started.
    pub fn current() -> Self {
        match ops::isa_cap() {
            ops::IsaCap::NoAmx => Self::Any,
            ops::IsaCap::Capped => Self::WithoutAmx,
            ops::IsaCap::SetByUser => {
                let value = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
                let value = value("ONEDNN_MAX_CPU_ISA").or_else(|| value("DNNL_MAX_CPU_ISA"));
                Self::FromEnvironment(value.unwrap_or_default())
            }
        }
    }
}

/// One product, of `rows × inputs` by `inputs × outputs`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ProductTest {
    /// Which of the decoder's matrices.
    pub name: &'static str,
    /// Columns of the result that were computed.
    pub outputs: i64,
    /// Length of the sums.
    pub inputs: i64,
    /// Largest difference between a row among many and in a smaller part, forward or of the gradient to the inputs; 0 where the
    /// bits are equal.
    pub difference: f64,
}

/// What a self-test found, and on what.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SelfTest {
    /// Table of our own kernels (`amx`, `avx512`, `avx2`, `baseline`, `portable`).
    pub kernels: String,
    /// Instruction set of libtorch's own kernels (`AVX512`, `AVX2`, `DEFAULT`).
    pub libtorch: String,
    /// Instruction set of oneDNN.
    pub onednn: OnednnIsa,
    /// Compute dtype (`f32`, `bf16`).
    pub dtype: &'static str,
    /// libtorch's threads.
    pub threads: i32,
    /// The products, in the decoder's order.
    pub products: Vec<ProductTest>,
    /// What the test took, in milliseconds.
    pub milliseconds: f64,
}

impl SelfTest {
    /// Whether every row had the same bits alone and among others.
    pub fn rows_are_equal(&self) -> bool {
        self.products.iter().all(|product| product.difference == 0.0)
    }
}

/// What was found so far in this process.
static FOUND: Mutex<Vec<SelfTest>> = Mutex::new(Vec::new());

/// The self-tests of the models that this process has loaded: one for each number format, set of shapes and number of threads.
pub fn self_tests() -> Vec<SelfTest> {
    FOUND.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Tests the products of a decoder's matrices on the CPU, unless the same was done before, and warns where rows differ.
pub(crate) fn run(kind: Kind, matrices: &[(&'static str, WeightRef<'_>)]) -> Result<(), Error> {
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    let (dtype, threads) = (machine::dtype_name(kind), tch::get_num_threads());
    let sizes = matrices.iter().map(|(name, weight)| {
        let [outputs, inputs] = weight.size();
        (*name, tested_outputs(outputs, inputs), inputs)
    });
    let done = |test: &SelfTest| {
        let products = test.products.iter();
        test.dtype == dtype
            && test.threads == threads
            && products.map(|p| (p.name, p.outputs, p.inputs)).eq(sizes.clone())
    };
    if found.iter().any(done) {
        return Ok(());
    }
    let started = Instant::now();
    let mut products = Vec::new();
    for ((name, weight), (_, outputs, inputs)) in matrices.iter().zip(sizes.clone()) {
        let weight = weight.first_rows(outputs, kind)?;
        // An adapter of a sensible size whose numbers are the weight's own.
        let rank = RANK.min(inputs).min(outputs);
        let a = weight.narrow(0, 0, rank); // [R, in]
        let b = weight.narrow(1, 0, rank).contiguous(); // [out, R]
        let forward =
            |x: &Tensor| ops::linear(x, &WeightRef::Dense(&weight), Some((&a, &b)), false);
        let difference = largest_difference(inputs, kind, forward)?;
        // The gradient's rows are those of the results, which begin with the outputs' numbers.
        let backward = |grad: &Tensor| tch::with_grad(|| gradient_to_inputs(grad, inputs, forward));
        let difference = difference.max(largest_difference(outputs, kind, backward)?);
        products.push(ProductTest { name, outputs, inputs, difference });
    }
    let test = SelfTest {
        kernels: kernels_name(),
        libtorch: ops::libtorch_isa(),
        onednn: OnednnIsa::current(),
        dtype,
        threads,
        products,
        milliseconds: 1e3 * started.elapsed().as_secs_f64(),
    };
    report(&test);
    found.push(test);
    Ok(())
}

/// Outputs of a product that are computed: all, or whole blocks of a packed matrix.
fn tested_outputs(outputs: i64, inputs: i64) -> i64 {
    let affordable = MAX_MULTIPLICATIONS / (N_ROWS * inputs).max(1);
    outputs.min((affordable / OUTPUT_STEP).max(1) * OUTPUT_STEP)
}

/// The largest difference between rows of `product` computed together and in [`PARTS`]; 0 only where all bits are equal.
fn largest_difference(
    inputs: i64,
    kind: Kind,
    product: impl Fn(&Tensor) -> Result<Tensor, Error>,
) -> Result<f64, Error> {
    let numbers = Tensor::f_arange(N_ROWS * inputs, (Kind::Float, tch::Device::Cpu))?;
    let x = (numbers * 0.7).f_sin()?.view([N_ROWS, inputs]).to_kind(kind); // [64, in]
    let together = product(&x)?; // [64, out]
    let mut largest = 0.0f64;
    for (start, rows) in PARTS {
        let part = product(&x.narrow(0, start, rows))?;
        let difference = (part.to_kind(Kind::Double) - together.narrow(0, start, rows)).abs().max();
        largest = largest.max(difference.double_value(&[]));
    }
    Ok(largest)
}

/// The gradient to the inputs `[n, in]` of `forward`, for `grad` `[n, out]`.
fn gradient_to_inputs(
    grad: &Tensor,
    inputs: i64,
    forward: impl Fn(&Tensor) -> Result<Tensor, Error>,
) -> Result<Tensor, Error> {
    let x = Tensor::f_zeros([grad.size()[0], inputs], (grad.kind(), tch::Device::Cpu))?;
    let x = x.set_requires_grad(true);
    (forward(&x)? * grad).f_sum(Kind::Float)?.f_backward()?;
    Ok(x.grad())
}

fn report(test: &SelfTest) {
    let SelfTest { kernels, libtorch, onednn, dtype, threads, products, milliseconds } = test;
    let Some(worst) = products.iter().max_by(|a, b| a.difference.total_cmp(&b.difference)) else {
        return;
    };
    let amx = Amx::current();
    if matches!(amx, Amx::Wrong | Amx::Refused) {
        tracing::warn!(
            ?amx,
            kernels,
            "this CPU's matrix tiles (AMX) are not used: `wrong` means that they differ from Intel's definition (please report the \
             CPU), `refused` that the system does not grant them; products run on vectors, several times slower"
        );
    }
    if test.rows_are_equal() {
        tracing::debug!(kernels, libtorch, ?onednn, dtype, threads, milliseconds, "rows are equal");
        return;
    }
    let (product, difference) = (worst.name, worst.difference);
    tracing::warn!(
        kernels,
        libtorch,
        ?onednn,
        dtype,
        threads,
        product,
        difference,
        "a row's product depends here on how many rows are computed with it: sampling and training will disagree, and results \
         depend on the order of the work (docs/numerics.md, \"Equal rows\"); please report this CPU, and use dtype f32 meanwhile"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{IsaCap, decide_isa_cap};

    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    const AMX_INT8: u32 = 1 << 25;

    #[test]
    fn amx_is_left_out_unless_the_user_chose() {
        // A Xeon of family 6, model 207 has these; a Zen 3 has neither, but other bits of the same register.
        let (sapphire_rapids, zen3) = (AMX_BF16 | AMX_TILE | AMX_INT8, 1 << 4);
        assert_eq!(decide_isa_cap(sapphire_rapids, false), IsaCap::Capped);
        assert_eq!(decide_isa_cap(AMX_TILE, false), IsaCap::Capped);
        assert_eq!(decide_isa_cap(AMX_BF16, false), IsaCap::Capped);
        assert_eq!(decide_isa_cap(zen3, false), IsaCap::NoAmx);
        assert_eq!(decide_isa_cap(AMX_INT8, false), IsaCap::NoAmx);
        for features in [sapphire_rapids, zen3] {
            assert_eq!(decide_isa_cap(features, true), IsaCap::SetByUser);
        }
    }

    /// Panics if the constructor of `csrc/isa.h` did not run; where it capped, oneDNN finds the cap.
    #[test]
    fn the_program_decided_before_its_first_line() {
        let set = std::env::var("ONEDNN_MAX_CPU_ISA").ok();
        match OnednnIsa::current() {
            OnednnIsa::Any => assert_eq!(set, None),
            OnednnIsa::WithoutAmx => assert_eq!(set.as_deref(), Some("AVX512_CORE_BF16")),
            OnednnIsa::FromEnvironment(name) => assert!(!name.is_empty()),
        }
    }

    #[test]
    fn a_product_whose_rows_depend_on_their_number_is_found() {
        let of_rows = |x: &Tensor| Ok(x * (1.0 + 1e-7 * (x.size()[0] == 5) as i64 as f64));
        assert!(largest_difference(8, Kind::Float, of_rows).unwrap() > 0.0);
        assert_eq!(largest_difference(8, Kind::Float, |x| Ok(x * 2.0)).unwrap(), 0.0);
    }

    #[test]
    fn large_matrices_are_cut_to_whole_steps() {
        assert_eq!(tested_outputs(24, 576), 24);
        assert_eq!(tested_outputs(49_152, 64), 1024);
        assert_eq!(tested_outputs(28_672, 4096), 64);
    }
}
