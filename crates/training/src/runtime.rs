//! What a training stage needs to know of its machine: device, dtype and threads as flags, and how much memory it took.

pub use arete_model::bench::peak_rss_bytes;
pub use arete_model::machine::{Dtype, device, device_name, dtype_name, load_options, set_threads};
