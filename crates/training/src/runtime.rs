//! What a training stage needs to know of its machine: device, dtype and threads as flags, and how much memory it took.

use std::path::Path;

use arete_model::Source;
pub use arete_model::bench::peak_rss_bytes;
pub use arete_model::runtime::{Dtype, device, device_name, dtype_name, load_options, set_threads};

/// The file or directory of a model, unless it is on the hub.
pub fn local_path(source: &Source) -> Option<&Path> {
    match source {
        Source::Directory(path) | Source::Gguf(path) => Some(path),
        Source::Hub { .. } => None,
    }
}
