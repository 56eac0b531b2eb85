use cadre_kernels::rows::sum;

use super::{forward_only, output, rows_of, with_slice};
use crate::{Error, Result, Tensor, compute::Compute, nn::Matrix};

/// Rows `ids` of an embedding: `[ids.len(), hidden]`.
///
/// # Errors
/// When an id lies outside of the vocabulary.
pub fn embed(table: &Matrix, ids: &[u32]) -> Result<Tensor> {
    let layout = table.layout();
    let mut out = vec![0.0; ids.len() * layout.k];
    for (id, row) in ids.iter().zip(out.chunks_exact_mut(layout.k)) {
        if *id as usize >= layout.n {
            return Err(Error::Config(format!("token id {id} is outside of the vocabulary of {}", layout.n)));
        }
        table.packed().unpack_row(*id as usize, row);
    }
    output(out, layout.k)
}

/// `a + b`, both `[rows, width]`.
///
/// # Errors
/// When the shapes differ, or a gradient is wanted.
pub fn add(compute: &Compute, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    forward_only("add", &[a, b])?;
    if a.dims() != b.dims() {
        return Err(Error::Shape { what: "add".into(), expected: a.dims().to_vec(), found: b.dims().to_vec() });
    }
    let width = a.dims().last().copied().unwrap_or(1);
    with_slice(a, |a| with_slice(b, |b| output(sum(&compute.pool, a, b), width)))
}

/// Rows `rows` of `x` `[tokens, width]`.
///
/// # Errors
/// When a row lies outside, or a gradient is wanted.
pub fn select_rows(x: &Tensor, rows: &[u32]) -> Result<Tensor> {
    forward_only("select_rows", &[x])?;
    let width = x.dims().last().copied().unwrap_or(1);
    let tokens = rows_of("input of select_rows", x, width)?;
    if let Some(row) = rows.iter().find(|row| **row as usize >= tokens) {
        return Err(Error::Config(format!("row {row} is outside of a batch of {tokens} tokens")));
    }
    with_slice(x, |x| {
        output(rows.iter().flat_map(|row| &x[*row as usize * width..][..width]).copied().collect(), width)
    })
}

/// A tensor `[rows, width]` of these values, row after row.
///
/// # Errors
/// When there is no memory for it.
pub fn from_values(values: Vec<f32>, width: usize) -> Result<Tensor> {
    output(values, width)
}

/// Gives the values of a tensor, row after row, to `f`.
///
/// # Errors
/// When the tensor is not contiguous f32 on the CPU, and what `f` returns.
pub fn values<T>(x: &Tensor, f: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    with_slice(x, f)
}
