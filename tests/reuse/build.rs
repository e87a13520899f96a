//! The programs find libtorch where it was linked.
fn main() {
    let lib = std::env::var("DEP_ARETE_MODEL_LIBTORCH_LIB").expect("arete-model says where libtorch is");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
}
