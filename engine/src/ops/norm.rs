use cadre_kernels::rows::zeros;

use super::{forward_only, output, rows_of, with_slice};
use crate::{Result, Tensor, compute::Compute};

/// Root-mean-square norm of each row of `x` `[rows, weight.len()]`.
///
/// # Errors
/// When `x` has another width than the weight, or a gradient is wanted.
pub fn rms_norm(compute: &Compute, x: &Tensor, weight: &[f32], eps: f32) -> Result<Tensor> {
    forward_only("rms_norm", &[x])?;
    let rows = rows_of("input of rms_norm", x, weight.len())?;
    let mut out = zeros(&compute.pool, rows * weight.len());
    with_slice(x, |x| {
        cadre_kernels::norm::rms_norm(&compute.pool, x, weight, eps, &mut out);
        Ok(())
    })?;
    output(out, weight.len())
}
