use cadre_kernels::rows::zeros;

use super::{forward_only, output, rows_of, with_slice};
use crate::{Result, Tensor, compute::Compute, nn::Matrix};

/// `x · Wᵀ + bias`: `[rows, k]` to `[rows, n]`.
///
/// # Errors
/// When `x` has another width than the matrix, or a gradient is wanted.
pub fn linear(compute: &Compute, x: &Tensor, weight: &Matrix, bias: Option<&[f32]>) -> Result<Tensor> {
    forward_only("linear", &[x])?;
    let n = weight.layout().n;
    let rows = rows_of("input of linear", x, weight.layout().k)?;
    let mut out = zeros(&compute.pool, rows * n);
    with_slice(x, |x| {
        cadre_kernels::matmul::matmul(&compute.pool, compute.isa, x, &weight.packed(), &mut out);
        Ok(())
    })?;
    if let Some(bias) = bias {
        out.chunks_exact_mut(n).for_each(|row| row.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias));
    }
    output(out, n)
}
