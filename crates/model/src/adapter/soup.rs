//! Adapters of one base as one adapter: the weighted sum of what each changes, exactly.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use super::{
    AdapterMeta, CONFIG_FILE, HEAD_NAME, MAX_CONFIG_BYTES, META_FILE, WEIGHTS_FILE, config_json,
    peft::rank_and_alpha, read_meta, write_json,
};
use crate::Error;
use crate::adapter::lora::Target;
use crate::adapter::merge::put_in_place;
use crate::checkpoint::safetensors::{SafetensorsFile, write_safetensors};
use crate::json::read_object;
use arete_records::atomic::AtomicDir;

const FACTORS: [&str; 2] = [".lora_A.weight", ".lora_B.weight"];

/// One of the adapters, read.
struct Part {
    path: PathBuf,
    weight: f64,
    rank: usize,
    scale: f64,
    meta: AdapterMeta,
    /// By module: A `[R, in]` and B `[out, R]`, f32.
    pairs: BTreeMap<String, (Tensor, Tensor)>,
}

/// Writes `Σ weight · adapter` as one adapter whose rank is the sum of theirs: A and B one after the other, every weight and
/// scale taken into A. The result is what the adapters give together, up to the rounding of these products.
///
/// Returns the rank.
///
/// # Errors
///
/// [`Error::Field`] for an adapter with a score head or of a kind this crate does not run, [`Error::Invalid`] for adapters of
/// different bases or shapes, a weight that is no number, or no adapter; [`Error::Io`].
///
/// # Source
///
/// peft 0.21's `LoraModel.add_weighted_adapter` with `combination_type = "cat"`; of fine-tuned models "model soups" (Wortsman et
/// al. 2022, arXiv:2203.05482), of rewards Ramé et al. 2023 (arXiv:2306.04488).
pub fn soup(adapters: &[(PathBuf, f64)], output: &Path) -> Result<usize, Error> {
    let parts: Vec<Part> =
        adapters.iter().map(|(path, weight)| read(path, *weight)).collect::<Result<_, _>>()?;
    let Some(first) = parts.first() else {
        return Err(invalid("at least one adapter", "none".to_owned()));
    };
    for part in &parts[1..] {
        check_base(first, part)?;
    }
    let rank: usize = parts.iter().map(|part| part.rank).sum();
    let modules: BTreeSet<&String> = parts.iter().flat_map(|part| part.pairs.keys()).collect();
    let mut tensors = Vec::new();
    for module in modules {
        let (a, b) = joined(&parts, module)?;
        tensors.push((format!("{module}{}", FACTORS[0]), a));
        tensors.push((format!("{module}{}", FACTORS[1]), b));
    }
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let is_in = |target: &&Target| {
        tensors.iter().any(|(name, _)| name.contains(&format!(".{}.", target.module())))
    };
    let targets: Vec<&str> = Target::ALL.iter().filter(is_in).map(|t| t.short_name()).collect();
    let staging = AtomicDir::new(output)?;
    // Alpha and rank alike: a scale of 1.
    let config = config_json(&first.meta, rank, rank as f64, false, &targets);
    write_json(&staging.path().join(CONFIG_FILE), &config)?;
    let meta = serde_json::to_value(&first.meta).expect("plain data serialises");
    write_json(&staging.path().join(META_FILE), &meta)?;
    write_safetensors(&staging.path().join(WEIGHTS_FILE), &tensors)?;
    put_in_place(staging, output)?;
    Ok(rank)
}

fn invalid(expected: &str, got: String) -> Error {
    Error::Invalid { name: "soup", expected: expected.to_owned(), got }
}

fn read(directory: &Path, weight: f64) -> Result<Part, Error> {
    if !weight.is_finite() {
        return Err(invalid(
            "weights that are numbers",
            format!("{}={weight}", directory.display()),
        ));
    }
    let path = directory.join(CONFIG_FILE);
    let config = read_object(&path, MAX_CONFIG_BYTES)?;
    let (rank, alpha) = rank_and_alpha(&path, &config)?;
    let meta = read_meta(directory, &config, false)?;
    let file = SafetensorsFile::open(&directory.join(WEIGHTS_FILE))?;
    let mut pairs = BTreeMap::new();
    for name in file.names() {
        let refuse = |expected: &str| Error::field(file.path(), "tensors", expected, name);
        if name == HEAD_NAME {
            return Err(refuse("a language model's adapter: the scores of two heads are no sum"));
        }
        let Some(module) = FACTORS.iter().find_map(|factor| name.strip_suffix(factor)) else {
            return Err(refuse("LoRA factors (…lora_A.weight, …lora_B.weight)"));
        };
        if pairs.contains_key(module) {
            continue;
        }
        let factor = |factor| -> Result<Tensor, Error> {
            Ok(file.tensor(&format!("{module}{factor}"))?.to_kind(Kind::Float))
        };
        let (a, b) = (factor(FACTORS[0])?, factor(FACTORS[1])?);
        let rank = rank as i64;
        if a.dim() != 2 || b.dim() != 2 || a.size()[0] != rank || b.size()[1] != rank {
            return Err(refuse(&format!("factors of rank {rank}, as the adapter's config says")));
        }
        pairs.insert(module.to_owned(), (a, b));
    }
    let scale = alpha / rank as f64;
    Ok(Part { path: directory.to_owned(), weight, rank, scale, meta, pairs })
}

/// Adapters of another base would add up to nothing that anybody trained.
fn check_base(first: &Part, other: &Part) -> Result<(), Error> {
    let [a, b] = [&first.meta, &other.meta];
    let known = !a.base_sha256.is_empty() && !b.base_sha256.is_empty();
    let is_same = if known { a.base_sha256 == b.base_sha256 } else { a.base_model == b.base_model };
    if is_same && a.quantization == b.quantization {
        return Ok(());
    }
    let describe = |part: &Part| {
        let AdapterMeta { base_model, base_sha256, quantization, .. } = &part.meta;
        let packing = quantization.as_deref().unwrap_or("dense");
        let sum = if base_sha256.is_empty() { "unknown" } else { super::short(base_sha256) };
        format!("{} of {base_model} (sha256 {sum}, {packing})", part.path.display())
    };
    Err(invalid(&format!("adapters of one base, as {}", describe(first)), describe(other)))
}

/// A `[ΣR, in]` and B `[out, ΣR]` of a module; zeros at the end for the adapters that leave it alone.
fn joined(parts: &[Part], module: &str) -> Result<(Tensor, Tensor), Error> {
    let (a, b) = parts.iter().find_map(|part| part.pairs.get(module)).expect("it is some part's");
    let (inputs, outputs) = (a.size()[1], b.size()[0]);
    let zeros = |rows, columns| Tensor::zeros([rows, columns], (Kind::Float, Device::Cpu));
    let (mut rows, mut columns, mut n_empty) = (Vec::new(), Vec::new(), 0);
    for part in parts {
        let Some((a, b)) = part.pairs.get(module) else {
            n_empty += part.rank as i64;
            continue;
        };
        if (a.size()[1], b.size()[0]) != (inputs, outputs) {
            let got = format!("{:?} and {:?} in {}", a.size(), b.size(), part.path.display());
            return Err(invalid(&format!("{module}: {inputs} inputs, {outputs} outputs"), got));
        }
        rows.push(a * part.weight * part.scale);
        columns.push(b.shallow_clone());
    }
    if n_empty > 0 {
        rows.push(zeros(n_empty, inputs));
        columns.push(zeros(outputs, n_empty));
    }
    Ok((Tensor::cat(&rows, 0), Tensor::cat(&columns, 1)))
}
