//! A frozen matrix with what is trained of it: the product, the gradient of its input, and of what is trained.

use cadre_kernels::{
    format::Packed,
    gradient::{Strided, Transposed, add_product},
    matmul::matmul,
};

use super::{
    parameters::{Gradients, Parameters},
    trained::TrainedMatrix,
};
use crate::{Result, adapter::AdapterValues, compute::Compute};

/// A matrix and what is trained of it.
#[derive(Clone, Copy)]
pub(super) struct Linear<'a> {
    pub weight: Packed<'a>,
    pub trained: &'a TrainedMatrix,
    /// Rows of gate when panels of gate and up take turns; `None`: the rows lie in order.
    pub paired: Option<usize>,
}

/// What all products of a walk share.
pub(super) struct Products<'a> {
    pub compute: &'a Compute,
    pub parameters: &'a Parameters,
}

impl Linear<'_> {
    /// Outputs as they are packed.
    fn outputs(&self) -> usize {
        self.weight.layout().n
    }

    fn inputs(&self) -> usize {
        self.weight.layout().k
    }
}

impl<'a> Products<'a> {
    /// `[rows, k]` to `[rows, n]`, adapters included.
    pub fn forward(&self, linear: &Linear<'_>, x: &[f32]) -> Vec<f32> {
        let Compute { pool, isa } = self.compute;
        let (k, n) = (linear.inputs(), linear.outputs());
        let rows = x.len() / k;
        let mut y = vec![0.0; rows * n];
        matmul(pool, *isa, x, &linear.weight, &mut y);
        let adapters = self.adapters(linear);
        let rank = adapters.rank();
        if rank > 0 && rows > 0 {
            let inner = self.inner(linear, x);
            let b = adapters.b_transposed(n);
            add_product(pool, *isa, Strided::new(&inner, rows, rank), Strided::new(&b, rank, n), &mut y);
        }
        y
    }

    /// The gradient of the input, `[rows, k]`, from that of the output, `[rows, n]`.
    pub fn input_gradient(&self, linear: &Linear<'_>, room: &mut Transposed, gradient: &[f32]) -> Result<Vec<f32>> {
        let Compute { pool, isa } = self.compute;
        let (k, n) = (linear.inputs(), linear.outputs());
        let rows = gradient.len() / n;
        let mut out = vec![0.0; rows * k];
        matmul(pool, *isa, gradient, &room.fill(pool, &linear.weight)?, &mut out);
        self.add_adapters_input_gradient(linear, gradient, &mut out);
        Ok(out)
    }

    /// The adapters' part of [`Products::input_gradient`].
    pub fn add_adapters_input_gradient(&self, linear: &Linear<'_>, gradient: &[f32], out: &mut [f32]) {
        let adapters = self.adapters(linear);
        let (k, n, rank) = (linear.inputs(), linear.outputs(), adapters.rank());
        let rows = gradient.len() / n;
        if rank == 0 || rows == 0 {
            return;
        }
        let of_inner = self.inner_gradient(linear, gradient);
        let a: Vec<f32> = adapters.adapters.iter().flat_map(|adapter| adapters.of(adapter).0).copied().collect();
        let (left, right) = (Strided::new(&of_inner, rows, rank), Strided::new(&a, rank, k));
        add_product(&self.compute.pool, self.compute.isa, left, right, out);
    }

    /// Adds to `gradients` those of what is trained, from the input `[rows, k]` and the output's gradient `[rows, n]`.
    pub fn parameter_gradients(&self, linear: &Linear<'_>, x: &[f32], gradient: &[f32], gradients: &mut Gradients) {
        let Compute { pool, isa } = self.compute;
        let adapters = self.adapters(linear);
        let (k, n, rank) = (linear.inputs(), linear.outputs(), adapters.rank());
        let rows = x.len() / k;
        if rows == 0 {
            return;
        }
        let (x, outputs) = (Strided::new(x, rows, k), Strided::new(gradient, rows, n));
        for whole in &linear.trained.weights {
            let sums = gradients.of(whole.weight);
            for (row, output, len) in adapters.stretches(&whole.rows) {
                let at = (row - whole.rows.start) * k;
                let left = outputs.columns(output..output + len).transposed();
                add_product(pool, *isa, left, x, &mut sums[at..at + len * k]);
            }
        }
        if rank == 0 {
            return;
        }
        let (inner, of_inner) = (self.inner_of(linear, x), self.inner_gradient(linear, gradient));
        let (inner, of_inner) = (Strided::new(&inner, rows, rank), Strided::new(&of_inner, rows, rank));
        let mut start = 0;
        for adapter in adapters.adapters {
            let own = start..start + adapter.rank;
            start = own.end;
            add_product(pool, *isa, of_inner.columns(own.clone()).transposed(), x, gradients.of(adapter.a));
            let sums = gradients.of(adapter.b);
            for (row, output, len) in adapters.stretches(&adapter.rows) {
                let at = (row - adapter.rows.start) * adapter.rank;
                let left = outputs.columns(output..output + len).transposed();
                let right = inner.columns(own.clone());
                add_product(pool, *isa, left, right, &mut sums[at..at + len * adapter.rank]);
            }
        }
    }

    fn adapters<'b>(&'b self, linear: &'b Linear<'_>) -> AdapterValues<'b> {
        let TrainedMatrix { adapters, .. } = linear.trained;
        AdapterValues { adapters, parameters: self.parameters, paired: linear.paired }
    }

    /// `scale · x · Aᵀ` of all adapters side by side, `[rows, rank]`.
    fn inner(&self, linear: &Linear<'_>, x: &[f32]) -> Vec<f32> {
        self.inner_of(linear, Strided::new(x, x.len() / linear.inputs(), linear.inputs()))
    }

    fn inner_of(&self, linear: &Linear<'_>, x: Strided<'_>) -> Vec<f32> {
        let (adapters, k) = (self.adapters(linear), linear.inputs());
        let (rank, a) = (adapters.rank(), adapters.a_transposed(k));
        let mut inner = vec![0.0; x.size().0 * rank];
        add_product(&self.compute.pool, self.compute.isa, x, Strided::new(&a, k, rank), &mut inner);
        inner
    }

    /// The gradient of `x · Aᵀ`, before the scale, of all adapters side by side, `[rows, rank]`.
    fn inner_gradient(&self, linear: &Linear<'_>, gradient: &[f32]) -> Vec<f32> {
        let (adapters, n) = (self.adapters(linear), linear.outputs());
        let rank = adapters.rank();
        let mut b = vec![0.0; n * rank];
        adapters.each_of_b(|output, column, value| b[output * rank + column] = value);
        let rows = gradient.len() / n;
        let mut out = vec![0.0; rows * rank];
        let (left, right) = (Strided::new(gradient, rows, n), Strided::new(&b, n, rank));
        add_product(&self.compute.pool, self.compute.isa, left, right, &mut out);
        let scales = adapters.adapters.iter().flat_map(|adapter| std::iter::repeat_n(adapter.scale, adapter.rank));
        let scales: Vec<f32> = scales.collect();
        out.chunks_exact_mut(rank).for_each(|row| row.iter_mut().zip(&scales).for_each(|(x, scale)| *x *= scale));
        out
    }
}
