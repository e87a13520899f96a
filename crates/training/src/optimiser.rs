//! AdamW over all parameters at once.
//!
//! The parameters, their gradients and both moments each lie in one flat tensor; the adapter's tensors become views
//! of it. A step is then a dozen operations however many tensors there are.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use crate::Error;

/// The constants of [`AdamW`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay per step, times the learning rate.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    /// PyTorch's betas and eps; no weight decay, as in transformers' `TrainingArguments`.
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// Adam with decoupled weight decay.
///
/// # Source
///
/// Kingma & Ba 2015 (arXiv:1412.6980), algorithm 1; Loshchilov & Hutter 2019 (arXiv:1711.05101), algorithm 2, in the form
/// of PyTorch's `torch.optim.AdamW` (the decay is `learning_rate · weight_decay`, eps is added after the bias correction).
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    names: Vec<String>,
    shapes: Vec<Vec<i64>>,
    /// Where each tensor starts in the flat ones; one more entry than there are tensors.
    offsets: Vec<i64>,
    /// The tensors the caller trains; views of `values` and `gradients`.
    leaves: Vec<Tensor>,
    values: Tensor,
    gradients: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    n_steps: u64,
}

/// Refuses what would silently be no clipping, or a decay that grows.
///
/// # Errors
///
/// [`Error::Invalid`].
pub fn check_settings(max_grad_norm: f64, weight_decay: f64) -> Result<(), Error> {
    for (name, value) in [("max_grad_norm", max_grad_norm), ("weight_decay", weight_decay)] {
        if !(value.is_finite() && value >= 0.0) {
            let (expected, got) = ("a number of at least 0".to_owned(), value.to_string());
            return Err(Error::Invalid { name, expected, got });
        }
    }
    Ok(())
}

impl AdamW {
    /// Takes over the storage of named f32 tensors that require gradients (call `set_trainable(true)` before).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no tensor, two share a name, or one is not f32, on another device than the first, or
    /// does not require gradients; [`Error::Model`] if memory runs out.
    pub fn new(parameters: Vec<(String, Tensor)>, config: AdamWConfig) -> Result<Self, Error> {
        check_parameters(&parameters)?;
        let (names, mut leaves): (Vec<String>, Vec<Tensor>) = parameters.into_iter().unzip();
        let shapes: Vec<Vec<i64>> = leaves.iter().map(Tensor::size).collect();
        let mut offsets = vec![0];
        for leaf in &leaves {
            offsets.push(offsets[offsets.len() - 1] + leaf.numel() as i64);
        }
        // Each leaf needs a gradient tensor of its own before that can be made a view of the flat one. A backward pass
        // then adds to it in place.
        for leaf in &leaves {
            (leaf.sum(Kind::Float) * 0.0).f_backward()?;
        }
        let _guard = tch::no_grad_guard();
        let flat: Vec<Tensor> = leaves.iter().map(|leaf| leaf.detach().reshape([-1])).collect();
        let values = Tensor::f_cat(&flat, 0)?; // [P]
        let gradients = values.f_zeros_like()?;
        for (idx, leaf) in leaves.iter_mut().enumerate() {
            leaf.f_set_data(&view(&values, &offsets, &shapes, idx))?;
            leaf.grad().f_set_data(&view(&gradients, &offsets, &shapes, idx))?;
        }
        let (first_moment, second_moment) = (values.f_zeros_like()?, values.f_zeros_like()?);
        Ok(Self {
            config,
            names,
            shapes,
            offsets,
            leaves,
            values,
            gradients,
            first_moment,
            second_moment,
            n_steps: 0,
        })
    }

    /// Number of trained numbers.
    pub fn n_parameters(&self) -> usize {
        self.values.numel()
    }

    /// Steps taken so far.
    pub fn n_steps(&self) -> u64 {
        self.n_steps
    }

    /// Sets every gradient to 0.
    pub fn zero_grad(&mut self) {
        let _guard = tch::no_grad_guard();
        let _ = self.gradients.zero_();
    }

    /// The gradients at hand, `[P]` f32: a view.
    pub(crate) fn gradients(&self) -> &Tensor {
        &self.gradients
    }

    /// Puts other gradients in their place, `[P]` f32 on any device.
    pub(crate) fn set_gradients(&mut self, gradients: &Tensor) {
        let _guard = tch::no_grad_guard();
        self.gradients.copy_(gradients);
    }

    /// Multiplies every gradient.
    pub fn scale_gradients(&mut self, factor: f64) {
        let _guard = tch::no_grad_guard();
        let _ = self.gradients.g_mul_scalar_(factor);
    }

    /// Euclidean norm of all gradients together.
    ///
    /// # Errors
    ///
    /// [`Error::NonFinite`] naming the first tensor whose gradient is not finite; `step` is for the message.
    pub fn gradient_norm(&self, step: u64) -> Result<f64, Error> {
        let _guard = tch::no_grad_guard();
        let norm = f64::try_from(self.gradients.norm())?;
        if norm.is_finite() {
            return Ok(norm);
        }
        let is_bad = |idx: usize| -> Result<bool, Error> {
            let gradient = view(&self.gradients, &self.offsets, &self.shapes, idx);
            Ok(i64::try_from(gradient.isfinite().all().to_kind(Kind::Int64))? == 0)
        };
        for (idx, name) in self.names.iter().enumerate() {
            if is_bad(idx)? {
                return Err(Error::NonFinite { step, what: format!("the gradient of {name}") });
            }
        }
        Err(Error::NonFinite { step, what: "the norm of the gradients".to_owned() })
    }

    /// Takes a step with the gradients at hand, scaled down to `max_norm` if they exceed it, and sets them to 0.
    /// Returns their norm before that.
    ///
    /// # Errors
    ///
    /// [`Error::NonFinite`], then nothing has changed.
    ///
    /// # Source
    ///
    /// Clipping as PyTorch's `clip_grad_norm_`: factor `max_norm / (norm + 1e-6)`, at most 1.
    pub fn step(
        &mut self,
        learning_rate: f64,
        max_norm: Option<f64>,
        step: u64,
    ) -> Result<f64, Error> {
        let norm = self.gradient_norm(step)?;
        if let Some(max_norm) = max_norm
            && norm + 1e-6 > max_norm
        {
            self.scale_gradients(max_norm / (norm + 1e-6));
        }
        self.update(learning_rate);
        self.zero_grad();
        Ok(norm)
    }

    #[expect(clippy::cast_precision_loss, reason = "step counts are far below 2^52")]
    fn update(&mut self, learning_rate: f64) {
        let _guard = tch::no_grad_guard();
        let AdamWConfig { beta1, beta2, eps, weight_decay } = self.config;
        self.n_steps += 1;
        let n = self.n_steps as f64;
        let (correction1, correction2) = (1.0 - beta1.powf(n), 1.0 - beta2.powf(n));
        let gradients = &self.gradients;
        if weight_decay != 0.0 {
            let _ = self.values.g_mul_scalar_(1.0 - learning_rate * weight_decay);
        }
        let _ = self.first_moment.lerp_(gradients, 1.0 - beta1);
        let squares = gradients.square().g_mul_scalar_(1.0 - beta2);
        let _ = self.second_moment.g_mul_scalar_(beta2).g_add_(&squares);
        drop(squares);
        let mut denominator = self.second_moment.sqrt();
        let _ = denominator.g_div_scalar_(correction2.sqrt()).g_add_scalar_(eps);
        let mut change = self.first_moment.f_div(&denominator).expect("same shape");
        drop(denominator);
        let _ = change.g_mul_scalar_(learning_rate / correction1);
        let _ = self.values.g_sub_(&change);
    }

    /// Everything a checkpoint needs, under `<prefix>/parameters/<name>`, `<prefix>/first_moment/<name>`,
    /// `<prefix>/second_moment/<name>` and `<prefix>/n_steps`. The tensors are views: write them before the next step.
    pub fn state(&self, prefix: &str) -> Vec<(String, Tensor)> {
        let n_steps = i64::try_from(self.n_steps).expect("step counts are small");
        let mut out = vec![(format!("{prefix}/n_steps"), Tensor::from_slice(&[n_steps]))];
        for (part, flat) in self.parts() {
            for (idx, name) in self.names.iter().enumerate() {
                let tensor = view(flat, &self.offsets, &self.shapes, idx);
                out.push((format!("{prefix}/{part}/{name}"), tensor));
            }
        }
        out
    }

    fn parts(&self) -> [(&'static str, &Tensor); 3] {
        [
            ("parameters", &self.values),
            ("first_moment", &self.first_moment),
            ("second_moment", &self.second_moment),
        ]
    }

    /// Puts back what [`AdamW::state`] gave: the trained tensors, both moments and the step count.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`] if a tensor is missing or has another shape; then nothing has changed.
    pub fn load_state(
        &mut self,
        prefix: &str,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<(), Error> {
        let n_steps = i64::try_from(find(tensors, &format!("{prefix}/n_steps"), &[1])?)?;
        self.copy_in(prefix, tensors, &["parameters", "first_moment", "second_moment"])?;
        self.n_steps = u64::try_from(n_steps).unwrap_or(0);
        self.zero_grad();
        Ok(())
    }

    /// Puts back the trained tensors alone.
    ///
    /// # Errors
    ///
    /// As [`AdamW::load_state`].
    pub fn load_parameters(
        &mut self,
        prefix: &str,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<(), Error> {
        self.copy_in(prefix, tensors, &["parameters"])
    }

    fn copy_in(
        &mut self,
        prefix: &str,
        tensors: &BTreeMap<String, Tensor>,
        parts: &[&str],
    ) -> Result<(), Error> {
        let mut copies = Vec::new();
        for (part, flat) in self.parts() {
            if !parts.contains(&part) {
                continue;
            }
            for (idx, name) in self.names.iter().enumerate() {
                let stored = find(tensors, &format!("{prefix}/{part}/{name}"), &self.shapes[idx])?;
                copies.push((view(flat, &self.offsets, &self.shapes, idx), stored));
            }
        }
        let _guard = tch::no_grad_guard();
        for (mut target, stored) in copies {
            target.copy_(stored);
        }
        Ok(())
    }

    /// The trained tensors by name, in the order given to [`AdamW::new`].
    pub fn parameters(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.names.iter().map(String::as_str).zip(&self.leaves)
    }
}

/// The part of a flat tensor that belongs to tensor `idx`.
fn view(flat: &Tensor, offsets: &[i64], shapes: &[Vec<i64>], idx: usize) -> Tensor {
    flat.narrow(0, offsets[idx], offsets[idx + 1] - offsets[idx]).view(shapes[idx].as_slice())
}

fn find<'a>(
    tensors: &'a BTreeMap<String, Tensor>,
    name: &str,
    shape: &[i64],
) -> Result<&'a Tensor, Error> {
    let wrong = |got: String| Error::Checkpoint {
        path: crate::checkpoint::TENSORS.into(),
        field: format!("tensor `{name}`"),
        expected: format!("shape {shape:?}"),
        got,
    };
    let tensor = tensors.get(name).ok_or_else(|| wrong("no such tensor".to_owned()))?;
    if tensor.size() != shape {
        return Err(wrong(format!("shape {:?}", tensor.size())));
    }
    Ok(tensor)
}

fn check_parameters(parameters: &[(String, Tensor)]) -> Result<(), Error> {
    let invalid = |expected: &str, got: String| Error::Invalid {
        name: "parameters",
        expected: expected.to_owned(),
        got,
    };
    let Some((_, first)) = parameters.first() else {
        return Err(invalid("at least one tensor", "none".to_owned()));
    };
    let device: Device = first.device();
    let mut seen = std::collections::BTreeSet::new();
    for (name, tensor) in parameters {
        if !seen.insert(name) {
            return Err(invalid("distinct names", format!("`{name}` twice")));
        }
        if tensor.kind() != Kind::Float || tensor.device() != device || !tensor.requires_grad() {
            return Err(invalid(
                "f32 tensors on one device that require gradients",
                format!(
                    "`{name}`: {:?} on {:?}, requires_grad {}",
                    tensor.kind(),
                    tensor.device(),
                    tensor.requires_grad()
                ),
            ));
        }
    }
    Ok(())
}
