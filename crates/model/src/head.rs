//! The scalar head: one number from a hidden state (a reward model's score, a critic's value).

use tch::{Device, Kind, Tensor};

use crate::{Error, ops};

/// A linear map from a hidden state to one number, without bias (transformers' `score`).
#[derive(Debug)]
pub struct ScalarHead {
    /// `[1, D]` f32.
    pub weight: Tensor,
}

impl ScalarHead {
    /// All zeros: every score starts at 0 (the value head's start, Ziegler et al. 2019).
    pub fn zeros(hidden_size: usize, device: Device) -> Self {
        Self { weight: Tensor::zeros([1, hidden_size as i64], (Kind::Float, device)) }
    }

    /// Normal with standard deviation 1 / sqrt(D + 1), drawn from a ChaCha stream.
    ///
    /// # Source
    ///
    /// Stiennon et al. 2020 (arXiv:2009.01325), appendix B; the reward model's start.
    pub fn normal(hidden_size: usize, seed: u64, device: Device) -> Self {
        let std = 1.0 / ((hidden_size + 1) as f64).sqrt();
        let weights = crate::random::normal(seed, "scalar_head", hidden_size, std);
        Self { weight: Tensor::from_slice(&weights).view([1, -1]).to_device(device) }
    }

    /// Wraps a loaded weight.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] unless `weight` is `[1, hidden_size]`.
    pub fn from_weight(weight: &Tensor, hidden_size: usize, device: Device) -> Result<Self, Error> {
        let expected = vec![1, hidden_size as i64];
        if weight.size() != expected {
            return Err(Error::Shape { name: "score.weight", expected, got: weight.size() });
        }
        Ok(Self { weight: weight.to_device(device).to_kind(Kind::Float).copy() })
    }

    /// Turns gradients on or off.
    pub fn set_trainable(&mut self, trainable: bool) {
        self.weight = self.weight.detach().set_requires_grad(trainable);
    }

    /// The number of each row, whose bits on the CPU do not depend on the other rows.
    ///
    /// # Shapes
    ///
    /// - `hidden`: `[n, D]` any float dtype; the result is `[n]` f32.
    ///
    /// # Panics
    ///
    /// If `hidden` has not D columns.
    pub fn forward(&self, hidden: &Tensor) -> Tensor {
        let numbers = ops::trained_linear(&hidden.to_kind(Kind::Float), &self.weight); // [n, 1]
        numbers.expect("rows of the head's length").squeeze_dim(1) // [n]
    }
}
