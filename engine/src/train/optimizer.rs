//! AdamW (Loshchilov and Hutter, arXiv:1711.05101), as torch computes it.
//!
//! Finite numbers stay finite, without a look at each: rates and decays of at most 1 only shrink a weight, and a step is the
//! learning rate times a few at most, because no first moment is far above the root of the second. That holds for gradients
//! up to 1e19, whose squares an f32 has; those that aren't finite are for the [`guard`](super::guard) to hold back.

use std::sync::{Mutex, PoisonError};

use cadre_kernels::pool::Pool;

use super::parameters::{Gradients, Parameters};
use crate::{Error, Result};

/// Numbers that one task of an update changes: enough to be worth a task, and few enough to spread over threads.
const CHUNK: usize = 16 << 10;

/// What doesn't change from update to update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWOptions {
    /// What is kept of the mean of gradients.
    pub beta1: f64,
    /// What is kept of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the root of the mean square.
    pub eps: f64,
    /// What is taken off the weights, times the learning rate. Vectors (norms and biases) don't decay.
    pub weight_decay: f64,
}

impl Default for AdamWOptions {
    /// torch's.
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

/// What AdamW remembers: a checkpoint that restores it bit for bit goes on as if nothing had been.
#[derive(Debug, Clone, PartialEq)]
pub struct AdamWState {
    /// The updates made.
    pub updates: u64,
    /// Means of gradients, a list a parameter.
    pub first_moments: Vec<Vec<f32>>,
    /// Means of squared gradients, a list a parameter.
    pub second_moments: Vec<Vec<f32>>,
}

/// The optimizer.
#[derive(Debug, Clone)]
pub struct AdamW {
    options: AdamWOptions,
    state: AdamWState,
}

impl AdamW {
    /// One that has made no update.
    #[must_use]
    pub fn new(options: AdamWOptions, parameters: &Parameters) -> Self {
        let zeros: Vec<Vec<f32>> = parameters.iter().map(|parameter| vec![0.0; parameter.values.len()]).collect();
        Self { options, state: AdamWState { updates: 0, first_moments: zeros.clone(), second_moments: zeros } }
    }

    /// One that goes on from where another stood.
    ///
    /// # Errors
    /// When the state is of other parameters.
    pub fn from_state(options: AdamWOptions, parameters: &Parameters, state: AdamWState) -> Result<Self> {
        parameters.check_sizes("the optimizer's first moments", state.first_moments.iter().map(Vec::as_slice))?;
        parameters.check_sizes("the optimizer's second moments", state.second_moments.iter().map(Vec::as_slice))?;
        Ok(Self { options, state })
    }

    /// What a checkpoint stores.
    #[must_use]
    pub fn state(&self) -> &AdamWState {
        &self.state
    }

    /// One update, in place. Every number changes by itself, so the result doesn't depend on the number of threads.
    ///
    /// # Errors
    /// When the parameters or gradients are others than those it was made for, or the learning rate or the decay isn't from
    /// 0 to 1; then nothing has changed.
    pub fn update(
        &mut self,
        pool: &Pool,
        parameters: &mut Parameters,
        gradients: &Gradients,
        learning_rate: f64,
    ) -> Result<()> {
        parameters.check_sizes("the optimizer's moments", self.state.first_moments.iter().map(Vec::as_slice))?;
        parameters.check_sizes("the gradient", gradients.iter())?;
        for (what, value) in [("learning rate", learning_rate), ("weight decay", self.options.weight_decay)] {
            if !(0.0..=1.0).contains(&value) {
                return Err(Error::Config(format!("the {what} of an update: expected 0 to 1, found {value}")));
            }
        }
        self.state.updates += 1;
        let rates = self.options.rates(self.state.updates, learning_rate);
        let moments = self.state.first_moments.iter_mut().zip(&mut self.state.second_moments);
        let mut chunks = Vec::new();
        for ((parameter, gradient), (first, second)) in parameters.iter_mut().zip(gradients.iter()).zip(moments) {
            let keep = if parameter.shape.len() >= 2 { rates.keep } else { 1.0 };
            let values = parameter.values.chunks_mut(CHUNK).zip(gradient.chunks(CHUNK));
            let moments = first.chunks_mut(CHUNK).zip(second.chunks_mut(CHUNK));
            chunks.extend(values.zip(moments).map(|((values, gradient), (first, second))| {
                Mutex::new(Chunk { values, gradient, first, second, keep })
            }));
        }
        // Each lock is taken once: it hands a chunk to the thread that changes it.
        pool.run(chunks.len(), |index| {
            chunks[index].lock().unwrap_or_else(PoisonError::into_inner).update(rates);
        });
        Ok(())
    }
}

/// The factors of one update.
#[derive(Debug, Clone, Copy)]
struct Rates {
    /// What decay leaves of a weight.
    keep: f32,
    /// What a gradient adds to the first moment, and what is kept of the second and a squared gradient adds to it.
    first_gain: f32,
    second_keep: f32,
    second_gain: f32,
    /// The root of the second moment's bias correction.
    second_root: f32,
    eps: f32,
    /// The learning rate with the first moment's bias corrected.
    step_size: f32,
}

impl AdamWOptions {
    fn rates(&self, update: u64, learning_rate: f64) -> Rates {
        let bias = |beta: f64| 1.0 - beta.powf(update as f64);
        Rates {
            keep: (1.0 - learning_rate * self.weight_decay) as f32,
            first_gain: (1.0 - self.beta1) as f32,
            second_keep: self.beta2 as f32,
            second_gain: (1.0 - self.beta2) as f32,
            second_root: bias(self.beta2).sqrt() as f32,
            eps: self.eps as f32,
            step_size: (learning_rate / bias(self.beta1)) as f32,
        }
    }
}

/// A part of a parameter with all that belongs to it.
struct Chunk<'a> {
    values: &'a mut [f32],
    gradient: &'a [f32],
    first: &'a mut [f32],
    second: &'a mut [f32],
    keep: f32,
}

impl Chunk<'_> {
    fn update(&mut self, rates: Rates) {
        let moments = self.first.iter_mut().zip(self.second.iter_mut());
        for ((value, gradient), (first, second)) in self.values.iter_mut().zip(self.gradient).zip(moments) {
            *first += rates.first_gain * (gradient - *first);
            *second = rates.second_keep * *second + rates.second_gain * gradient * gradient;
            let root = second.sqrt() / rates.second_root + rates.eps;
            *value = *value * self.keep - rates.step_size * (*first / root);
        }
    }
}

#[cfg(test)]
mod tests;
