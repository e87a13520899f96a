//! LoRA adapters: several over one base, switchable per call.
//!
//! An adapted linear layer computes `x Wᵀ + scale · (x Aᵀ) Bᵀ` with `scale = alpha / rank`. The masters are f32;
//! for a forward pass they are cast to the compute dtype and fused like the base's matrices (query, key and value
//! into one, gate and up into one), the scale folded into B. See `adapter.rs` for peft's files.
//!
//! # Source
//!
//! Hu et al. 2021 (arXiv:2106.09685), section 4.1; initial values as peft's `reset_lora_parameters`.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::checkpoint::config::ModelConfig;
use crate::{Error, ops};

/// A linear layer of a decoder block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// Query projection.
    Q,
    /// Key projection.
    K,
    /// Value projection.
    V,
    /// Attention output projection.
    O,
    /// Gate of the feed-forward network.
    Gate,
    /// Up projection of the feed-forward network.
    Up,
    /// Down projection of the feed-forward network.
    Down,
}

impl Target {
    /// Every linear layer, in the order of the forward pass.
    pub const ALL: [Self; 7] =
        [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Name of the module in Hugging Face checkpoints, below `model.layers.N.`.
    pub fn module(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    /// Last part of [`Target::module`], as peft's `target_modules` lists it.
    pub fn short_name(self) -> &'static str {
        self.module().rsplit('.').next().expect("module names have parts")
    }

    /// (outputs, inputs) of the layer.
    pub fn size(self, config: &ModelConfig) -> (usize, usize) {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let queries = config.num_heads * config.head_size;
        let keys = config.num_kv_heads * config.head_size;
        match self {
            Self::Q => (queries, hidden),
            Self::K | Self::V => (keys, hidden),
            Self::O => (hidden, queries),
            Self::Gate | Self::Up => (inner, hidden),
            Self::Down => (hidden, inner),
        }
    }
}

/// Largest rank: above the width of any model.
pub(crate) const MAX_RANK: usize = 65_535;

/// The shape of an adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    /// Rank R of the update.
    pub rank: usize,
    /// Numerator of the scale, `alpha / rank`.
    pub alpha: f64,
    /// The layers adapted, in every block.
    pub targets: Vec<Target>,
}

impl LoraConfig {
    /// `alpha / rank`.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }
}

impl Default for LoraConfig {
    /// Rank 16, alpha 32, every linear layer.
    fn default() -> Self {
        Self { rank: 16, alpha: 32.0, targets: Target::ALL.to_vec() }
    }
}

/// The two factors of one layer's update.
#[derive(Debug)]
pub struct LoraPair {
    /// A: `[R, in]` f32.
    pub lora_a: Tensor,
    /// B: `[out, R]` f32.
    pub lora_b: Tensor,
}

/// A named LoRA adapter for every block of a decoder.
#[derive(Debug)]
pub struct Adapter {
    /// What logs and errors call it.
    pub name: String,
    /// Rank, scale and layers.
    pub config: LoraConfig,
    /// Per block, one optional pair per [`Target`] in [`Target::ALL`]'s order.
    pub(crate) layers: Vec<[Option<LoraPair>; 7]>,
}

/// An adapter's factors for one block, fused and in the compute dtype.
#[derive(Debug)]
pub(crate) struct PreparedLayer {
    pub(crate) qkv: Option<(Tensor, Tensor)>,
    pub(crate) output: Option<(Tensor, Tensor)>,
    pub(crate) gate_up: Option<(Tensor, Tensor)>,
    pub(crate) down: Option<(Tensor, Tensor)>,
}

impl Adapter {
    /// A fresh adapter: A uniform in ±1/sqrt(in) (Kaiming with a = √5), B zero, so that it changes nothing yet.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the rank is 0 or absurd, or no layer is named.
    pub fn new(
        name: &str,
        model: &ModelConfig,
        config: &LoraConfig,
        seed: u64,
        device: Device,
    ) -> Result<Self, Error> {
        if !(1..=MAX_RANK).contains(&config.rank) {
            return Err(Error::Invalid {
                name: "rank",
                expected: format!("a whole number from 1 to {MAX_RANK}"),
                got: config.rank.to_string(),
            });
        }
        if config.targets.is_empty() {
            return Err(Error::Invalid {
                name: "targets",
                expected: "at least one".to_owned(),
                got: "none".to_owned(),
            });
        }
        let rank = config.rank as i64;
        let layers = (0..model.num_layers)
            .map(|layer| {
                Target::ALL.map(|target| {
                    config.targets.contains(&target).then(|| {
                        let (outputs, inputs) = target.size(model);
                        let purpose = format!("lora_a/{name}/{layer}/{}", target.module());
                        let limit = 1.0 / (inputs as f64).sqrt();
                        let values =
                            crate::random::symmetric(seed, &purpose, config.rank * inputs, limit);
                        LoraPair {
                            lora_a: Tensor::from_slice(&values).view([rank, -1]).to_device(device),
                            lora_b: Tensor::zeros([outputs as i64, rank], (Kind::Float, device)),
                        }
                    })
                })
            })
            .collect();
        Ok(Self { name: name.to_owned(), config: config.clone(), layers })
    }

    /// The tensors to train with their peft names (`base_model.model.model.layers.N.….lora_A.weight`), in a fixed order.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        let mut out = Vec::new();
        for (layer, pairs) in self.layers.iter().enumerate() {
            for (target, pair) in Target::ALL.iter().zip(pairs) {
                if let Some(pair) = pair {
                    let module =
                        format!("base_model.model.model.layers.{layer}.{}", target.module());
                    out.push((format!("{module}.lora_A.weight"), pair.lora_a.shallow_clone()));
                    out.push((format!("{module}.lora_B.weight"), pair.lora_b.shallow_clone()));
                }
            }
        }
        out
    }

    /// The pair of one layer, if it is adapted.
    pub fn pair(&self, layer: usize, target: Target) -> Option<&LoraPair> {
        self.layers[layer][target as usize].as_ref()
    }

    /// Turns gradients on or off for every tensor.
    pub fn set_trainable(&mut self, trainable: bool) {
        for pair in self.layers.iter_mut().flatten().flatten() {
            pair.lora_a = pair.lora_a.detach().set_requires_grad(trainable);
            pair.lora_b = pair.lora_b.detach().set_requires_grad(trainable);
        }
    }

    /// A copy whose tensors share nothing with this one.
    pub fn deep_copy(&self, name: &str) -> Self {
        let layers = self
            .layers
            .iter()
            .map(|pairs| {
                std::array::from_fn(|i| {
                    pairs[i].as_ref().map(|pair| LoraPair {
                        lora_a: pair.lora_a.detach().copy(),
                        lora_b: pair.lora_b.detach().copy(),
                    })
                })
            })
            .collect();
        Self { name: name.to_owned(), config: self.config.clone(), layers }
    }

    /// The factors of block `layer`, fused and cast; differentiable when the masters are.
    pub(crate) fn prepare(
        &self,
        model: &ModelConfig,
        layer: usize,
        kind: Kind,
    ) -> Result<PreparedLayer, Error> {
        let pairs = &self.layers[layer];
        let fuse = |targets: &[Target]| fuse(pairs, targets, model, self.config.scale(), kind);
        Ok(PreparedLayer {
            qkv: fuse(&[Target::Q, Target::K, Target::V])?,
            output: fuse(&[Target::O])?,
            gate_up: fuse(&[Target::Gate, Target::Up])?,
            down: fuse(&[Target::Down])?,
        })
    }
}

/// A stacked `[ΣR, in]` and B block-diagonal `[Σout, ΣR]` for layers that share their input.
fn fuse(
    pairs: &[Option<LoraPair>; 7],
    targets: &[Target],
    model: &ModelConfig,
    scale: f64,
    kind: Kind,
) -> Result<Option<(Tensor, Tensor)>, Error> {
    let present: Vec<Option<&LoraPair>> =
        targets.iter().map(|&target| pairs[target as usize].as_ref()).collect();
    let Some(some) = present.iter().flatten().next() else { return Ok(None) };
    let device = some.lora_a.device();
    if ops::gpu_shaped(device, kind) {
        let pair = |part: usize| {
            let pair: &LoraPair = present.get(part).copied().flatten()?;
            Some([&pair.lora_a, &pair.lora_b])
        };
        let outputs = |part: usize| targets.get(part).map_or(0, |t| t.size(model).0 as i64);
        let parts = [0, 1, 2];
        let inputs = some.lora_a.size()[1];
        return ops::join_factors(parts.map(pair), inputs, parts.map(outputs), scale, kind)
            .map(Some);
    }
    if let ([_], Some(pair)) = (targets, present[0]) {
        let b = pair.lora_b.f_mul_scalar(scale)?.f_to_kind(kind)?;
        return Ok(Some((pair.lora_a.f_to_kind(kind)?, b)));
    }
    let a: Vec<&Tensor> = present.iter().flatten().map(|pair| &pair.lora_a).collect();
    let b = present
        .iter()
        .zip(targets)
        .map(|(pair, target)| match pair {
            Some(pair) => Ok(pair.lora_b.shallow_clone()),
            None => Tensor::f_zeros([target.size(model).0 as i64, 0], (Kind::Float, device)),
        })
        .collect::<Result<Vec<_>, _>>()?;
    let b = Tensor::f_block_diag(&b)?.f_mul_scalar(scale)?.f_to_kind(kind)?;
    Ok(Some((Tensor::f_cat(&a, 0)?.f_to_kind(kind)?, b)))
}
