//! The CUDA kernels, executed on the CPU: the same `.cu` files and the same launches, on the SIMT machine of `tests/simt`, against
//! bitsandbytes' values and plain sums; once more under address and undefined-behaviour sanitizers.

mod attention;
mod calls;
mod machine;
mod nf4;
mod nf4_rows;
mod numbers;
mod packed;
mod rows;
mod vocabulary;
