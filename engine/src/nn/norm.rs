use crate::{Result, Tensor, compute::Compute, ops};

/// Root-mean-square norm over the whole width.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    pub(crate) module: String,
    pub(crate) weight: Vec<f32>,
    pub(crate) eps: f32,
    /// The weight isn't as stored.
    pub(crate) is_divided: bool,
}

impl RmsNorm {
    /// From the module's full name, its weight `[width]` and what is added to the mean square.
    #[must_use]
    pub fn new(module: String, weight: Vec<f32>, eps: f32) -> Self {
        Self { module, weight, eps, is_divided: false }
    }

    /// `[rows, width]` to the same.
    ///
    /// # Errors
    /// When `x` has another width.
    pub fn forward(&self, compute: &Compute, x: &Tensor) -> Result<Tensor> {
        ops::rms_norm(compute, x, &self.weight, self.eps)
    }

    /// The norm with each place of its output divided by `divisors`.
    #[must_use]
    pub fn divided_by(mut self, divisors: &[f32]) -> Self {
        self.is_divided = true;
        self.weight.iter_mut().zip(divisors).for_each(|(weight, divisor)| *weight /= divisor);
        self
    }

    pub(crate) fn parameters(&self) -> usize {
        self.weight.len()
    }
}
