//! The ops that blocks are written in: tensors in and out, kernels within. Blocks call nothing of candle directly.
//!
//! All tensors are f32, on the CPU, `[tokens, width]`. Frozen weights are packed matrices, not tensors. The ops of this
//! module are forward-only: asked for a gradient, each returns [`Error::NotDifferentiable`] in place of cutting the
//! graph silently, as candle's own fused ops do.

mod adapters;
mod attention;
mod ffn;
mod linear;
mod norm;
mod rows;

use candle_core::{CpuStorage, Device, Storage};

pub use adapters::add_adapters;
pub use attention::{attention, split_qkv};
pub use ffn::{FfnAdapters, Routes, grouped_ffn, route, stored_ffn};
pub use linear::linear;
pub use norm::rms_norm;
pub use rows::{add, embed, from_values, select_rows, values};

use crate::{Error, Result, Tensor};

/// The values of a contiguous f32 tensor.
fn with_slice<T>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) => f(&values[start..end]),
        _ => Err(Error::Config(format!(
            "expected a contiguous f32 tensor on the CPU, found {:?} {:?} on {:?}",
            tensor.dtype(),
            tensor.shape(),
            tensor.device()
        ))),
    }
}

/// A `[rows, width]` tensor of an op's output.
fn output(values: Vec<f32>, width: usize) -> Result<Tensor> {
    let rows = values.len() / width;
    Ok(Tensor::from_vec(values, (rows, width), &Device::Cpu)?)
}

/// `[rows, width]` of a tensor whose width must be `expected`.
fn rows_of(what: &str, tensor: &Tensor, expected: usize) -> Result<usize> {
    match tensor.dims() {
        [rows, width] if *width == expected => Ok(*rows),
        found => Err(Error::Shape { what: what.into(), expected: vec![expected], found: found.to_vec() }),
    }
}

/// Refuses inputs that a gradient is wanted of.
fn forward_only(op: &'static str, inputs: &[&Tensor]) -> Result<()> {
    if inputs.iter().any(|input| input.track_op()) { Err(Error::NotDifferentiable { op }) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
