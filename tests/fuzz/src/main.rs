//! One fuzz target under libFuzzer: `ARETE_FUZZ=gguf libfuzzer CORPUS -max_total_time=1200`. Without a name all are listed; with
//! `ARETE_FUZZ_SEEDS=DIR` the target's seeds are written there.
#![no_main]

use std::sync::OnceLock;

use arete_tests::fuzz::{Place, Target, targets};
use libfuzzer_sys::fuzz_target;

/// The target that the environment names, and its directory.
fn chosen() -> &'static (&'static Target, Place) {
    static CHOSEN: OnceLock<(&'static Target, Place)> = OnceLock::new();
    CHOSEN.get_or_init(|| {
        // libFuzzer's hook ends the process at any panic; those of libraries are caught.
        std::panic::set_hook(Box::new(|_| {}));
        let name = std::env::var("ARETE_FUZZ").unwrap_or_default();
        let target = targets().into_iter().find(|target| target.name == name);
        let Some(target) = target else {
            targets().iter().for_each(|target| println!("target {}", target.name));
            signal_hook::low_level::exit(2); // libFuzzer takes another exit for a finding
        };
        if let Some(dir) = std::env::var_os("ARETE_FUZZ_SEEDS") {
            for (number, (_, seed)) in target.seeds().expect("seeds").into_iter().enumerate() {
                let path = std::path::Path::new(&dir).join(format!("seed-{number:03}"));
                std::fs::write(path, seed).expect("a corpus that can be written");
            }
            signal_hook::low_level::exit(0);
        }
        (target, Place::new().expect("a directory in memory"))
    })
}

fuzz_target!(|input: &[u8]| {
    let (target, place) = chosen();
    if let Err(error) = target.run(place, input) {
        eprintln!("{}: {error:#}", target.name);
        std::process::abort();
    }
});
