use super::Matrix;
use crate::{Result, Tensor, compute::Compute, ops};

/// `x · Wᵀ + bias` with frozen packed weights.
#[derive(Debug)]
pub struct Linear {
    pub(crate) weight: Matrix,
    pub(crate) bias: Option<Vec<f32>>,
}

impl Linear {
    /// From its weight `[n, k]` and bias `[n]`.
    #[must_use]
    pub fn new(weight: Matrix, bias: Option<Vec<f32>>) -> Self {
        Self { weight, bias }
    }

    /// `[rows, k]` to `[rows, n]`.
    ///
    /// # Errors
    /// When `x` has another width.
    pub fn forward(&self, compute: &Compute, x: &Tensor) -> Result<Tensor> {
        ops::linear(compute, x, &self.weight, self.bias.as_deref())
    }

    pub(crate) fn parameters(&self) -> usize {
        self.weight.parameters() + self.bias.as_ref().map_or(0, Vec::len)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.weight.bytes() + 4 * self.bias.as_ref().map_or(0, Vec::len)
    }
}
