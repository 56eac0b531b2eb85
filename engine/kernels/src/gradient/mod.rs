//! What training adds to the kernels: the backward passes. All of it is f32 but for products with frozen weights, which
//! take the gradient in the form that the transposed weights have (see [`Transposed`]).
//!
//! Sums have one fixed order, as everywhere: gradients don't depend on the number of threads.

mod attention;
mod dropout;
mod loss;
mod norm;
mod product;
mod qkv;
mod router;
mod silu;
mod transposed;

pub use attention::{Heads, attention, attention_backward};
pub use dropout::dropout;
pub use loss::cross_entropy;
pub use norm::rms_norm_backward;
pub use product::{Strided, add_product};
pub use qkv::{QkvGradients, split_qkv_backward};
pub use router::{RouterLosses, route_backward, scores};
pub use silu::{gated_silu, gated_silu_backward};
pub use transposed::Transposed;

use crate::{
    activation::{self, LANES},
    norm::tree,
};

/// `e^map(value)` in place of each value; returns their sum, of sixteen running sums.
#[inline(always)]
fn exp_in_place(values: &mut [f32], map: impl Fn(f32) -> f32) -> f32 {
    let mut sums = [0.0; LANES];
    for values in values.chunks_mut(LANES) {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        lanes.iter_mut().zip(&*values).for_each(|(lane, value)| *lane = map(*value));
        let exps = activation::exp(lanes);
        sums.iter_mut().zip(exps).for_each(|(sum, exp)| *sum += exp);
        values.copy_from_slice(&exps[..values.len()]);
    }
    tree(sums, |a, b| a + b)
}

#[cfg(test)]
mod tests;
