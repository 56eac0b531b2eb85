use super::{forward_only, output, rows_of, with_slice};
use crate::{Result, Tensor, adapter::RowAdapters, compute::Compute, train::places::Place};

/// `y`, the products of `x` with the matrix at `place`, with what the rows' adapters add to them.
///
/// # Errors
/// When the rows of `x` and `y` differ, or a gradient is wanted.
pub fn add_adapters(
    compute: &Compute,
    adapters: &RowAdapters<'_>,
    place: Place,
    x: &Tensor,
    y: Tensor,
) -> Result<Tensor> {
    forward_only("add_adapters", &[x, &y])?;
    if !adapters.adapt(place) {
        return Ok(y);
    }
    let width = y.dims().last().copied().unwrap_or(1);
    rows_of("products with adapters", &y, width)?;
    let mut out = with_slice(&y, |y| Ok(y.to_vec()))?;
    with_slice(x, |x| {
        adapters.add(compute, place, x, &mut out);
        Ok(())
    })?;
    output(out, width)
}
