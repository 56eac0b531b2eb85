//! A frozen matrix with what is trained of it: the product, the gradient of its input, and of what is trained.

use std::cell::RefCell;

use cadre_kernels::{
    format::{PANEL, Packed},
    gradient::{Strided, Transposed, add_product},
    matmul::matmul,
};

use super::{
    parameters::{Gradients, Parameters},
    trained::{Adapter, TrainedMatrix},
    workspace::Workspace,
};
use crate::{Result, compute::Compute};

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
    pub workspace: &'a Workspace,
    /// For transposed weights.
    pub room: RefCell<Transposed>,
}

impl Linear<'_> {
    /// Outputs as they are packed.
    fn outputs(&self) -> usize {
        self.weight.layout().n
    }

    fn inputs(&self) -> usize {
        self.weight.layout().k
    }

    fn rank(&self) -> usize {
        self.trained.adapters.iter().map(|adapter| adapter.rank).sum()
    }

    /// Where rows lie among the outputs: stretches of (first of the rows, first output, length).
    fn stretches(&self, rows: &std::ops::Range<usize>) -> Vec<(usize, usize, usize)> {
        let Some(gate) = self.paired else { return vec![(rows.start, rows.start, rows.len())] };
        let mut stretches = Vec::new();
        let mut row = rows.start;
        while row < rows.end {
            let (up, inner) = (row / gate, row % gate);
            let len = (PANEL - inner % PANEL).min(gate - inner).min(rows.end - row);
            stretches.push((row, inner / PANEL * 2 * PANEL + up * PANEL + inner % PANEL, len));
            row += len;
        }
        stretches
    }
}

impl<'a> Products<'a> {
    /// `[rows, k]` to `[rows, n]`, adapters included.
    pub fn forward(&self, linear: &Linear<'_>, x: &[f32]) -> Vec<f32> {
        let Compute { pool, isa } = self.compute;
        let (k, n) = (linear.inputs(), linear.outputs());
        let rows = x.len() / k;
        let mut y = self.workspace.take(rows * n);
        matmul(pool, *isa, x, &linear.weight, &mut y);
        if linear.rank() > 0 && rows > 0 {
            let inner = self.inner(linear, x);
            let b = self.b_transposed(linear);
            let rank = linear.rank();
            add_product(pool, *isa, Strided::new(&inner, rows, rank), Strided::new(&b, rank, n), &mut y);
            self.workspace.give(inner);
            self.workspace.give(b);
        }
        y
    }

    /// The gradient of the input, `[rows, k]`, from that of the output, `[rows, n]`.
    pub fn input_gradient(&self, linear: &Linear<'_>, gradient: &[f32]) -> Result<Vec<f32>> {
        let Compute { pool, isa } = self.compute;
        let (k, n) = (linear.inputs(), linear.outputs());
        let rows = gradient.len() / n;
        let mut out = self.workspace.take(rows * k);
        matmul(pool, *isa, gradient, &self.room.borrow_mut().fill(pool, &linear.weight)?, &mut out);
        self.add_adapters_input_gradient(linear, gradient, &mut out);
        Ok(out)
    }

    /// The adapters' part of [`Products::input_gradient`].
    pub fn add_adapters_input_gradient(&self, linear: &Linear<'_>, gradient: &[f32], out: &mut [f32]) {
        let (k, n, rank) = (linear.inputs(), linear.outputs(), linear.rank());
        let rows = gradient.len() / n;
        if rank == 0 || rows == 0 {
            return;
        }
        let of_inner = self.inner_gradient(linear, gradient);
        let a: Vec<f32> = linear.trained.adapters.iter().flat_map(|adapter| self.values(adapter).0).copied().collect();
        let (left, right) = (Strided::new(&of_inner, rows, rank), Strided::new(&a, rank, k));
        add_product(&self.compute.pool, self.compute.isa, left, right, out);
        self.workspace.give(of_inner);
    }

    /// Adds to `gradients` those of what is trained, from the input `[rows, k]` and the output's gradient `[rows, n]`.
    pub fn parameter_gradients(&self, linear: &Linear<'_>, x: &[f32], gradient: &[f32], gradients: &mut Gradients) {
        let Compute { pool, isa } = self.compute;
        let (k, n, rank) = (linear.inputs(), linear.outputs(), linear.rank());
        let rows = x.len() / k;
        if rows == 0 {
            return;
        }
        let (x, outputs) = (Strided::new(x, rows, k), Strided::new(gradient, rows, n));
        for whole in &linear.trained.weights {
            let sums = gradients.of(whole.weight);
            for (row, output, len) in linear.stretches(&whole.rows) {
                let at = (row - whole.rows.start) * k;
                let left = outputs.columns(output..output + len).transposed();
                add_product(pool, *isa, left, x, &mut sums[at..at + len * k]);
            }
        }
        if rank == 0 {
            return;
        }
        let buffers = [self.inner_of(linear, x), self.inner_gradient(linear, gradient)];
        let [inner, of_inner] = buffers.each_ref().map(|values| Strided::new(values, rows, rank));
        let mut start = 0;
        for adapter in &linear.trained.adapters {
            let own = start..start + adapter.rank;
            start = own.end;
            add_product(pool, *isa, of_inner.columns(own.clone()).transposed(), x, gradients.of(adapter.a));
            let sums = gradients.of(adapter.b);
            for (row, output, len) in linear.stretches(&adapter.rows) {
                let at = (row - adapter.rows.start) * adapter.rank;
                let left = outputs.columns(output..output + len).transposed();
                let right = inner.columns(own.clone());
                add_product(pool, *isa, left, right, &mut sums[at..at + len * adapter.rank]);
            }
        }
        buffers.into_iter().for_each(|buffer| self.workspace.give(buffer));
    }

    /// A and B of an adapter.
    fn values(&self, adapter: &Adapter) -> (&'a [f32], &'a [f32]) {
        (&self.parameters.get(adapter.a).values, &self.parameters.get(adapter.b).values)
    }

    /// `scale · x · Aᵀ` of all adapters side by side, `[rows, rank]`.
    fn inner(&self, linear: &Linear<'_>, x: &[f32]) -> Vec<f32> {
        self.inner_of(linear, Strided::new(x, x.len() / linear.inputs(), linear.inputs()))
    }

    fn inner_of(&self, linear: &Linear<'_>, x: Strided<'_>) -> Vec<f32> {
        let (rank, k) = (linear.rank(), linear.inputs());
        let mut a = self.workspace.take(k * rank);
        let mut start = 0;
        for adapter in &linear.trained.adapters {
            for (row, values) in self.values(adapter).0.chunks_exact(k).enumerate() {
                let places = a[start + row..].iter_mut().step_by(rank);
                places.zip(values).for_each(|(place, value)| *place = adapter.scale * value);
            }
            start += adapter.rank;
        }
        let mut inner = self.workspace.zeros(x.size().0 * rank);
        add_product(&self.compute.pool, self.compute.isa, x, Strided::new(&a, k, rank), &mut inner);
        self.workspace.give(a);
        inner
    }

    /// The gradient of `x · Aᵀ`, before the scale, of all adapters side by side, `[rows, rank]`.
    fn inner_gradient(&self, linear: &Linear<'_>, gradient: &[f32]) -> Vec<f32> {
        let (rank, n) = (linear.rank(), linear.outputs());
        let mut b = self.workspace.zeros(n * rank);
        self.each_of_b(linear, |output, column, value| b[output * rank + column] = value);
        let rows = gradient.len() / n;
        let mut out = self.workspace.zeros(rows * rank);
        let (left, right) = (Strided::new(gradient, rows, n), Strided::new(&b, n, rank));
        add_product(&self.compute.pool, self.compute.isa, left, right, &mut out);
        self.workspace.give(b);
        let scales =
            linear.trained.adapters.iter().flat_map(|adapter| std::iter::repeat_n(adapter.scale, adapter.rank));
        let scales: Vec<f32> = scales.collect();
        out.chunks_exact_mut(rank).for_each(|row| row.iter_mut().zip(&scales).for_each(|(x, scale)| *x *= scale));
        out
    }

    /// B of all adapters, `[rank, n]`; an adapter adds nothing to outputs that aren't its own.
    fn b_transposed(&self, linear: &Linear<'_>) -> Vec<f32> {
        let n = linear.outputs();
        let mut b = self.workspace.zeros(linear.rank() * n);
        self.each_of_b(linear, |output, column, value| b[column * n + output] = value);
        b
    }

    /// Every value of the adapters' B, with its output and its place among the ranks.
    fn each_of_b(&self, linear: &Linear<'_>, mut take: impl FnMut(usize, usize, f32)) {
        let mut start = 0;
        for adapter in &linear.trained.adapters {
            let b = self.values(adapter).1;
            for (row, output, len) in linear.stretches(&adapter.rows) {
                for place in 0..len {
                    let values = &b[(row - adapter.rows.start + place) * adapter.rank..][..adapter.rank];
                    values.iter().enumerate().for_each(|(column, value)| take(output + place, start + column, *value));
                }
            }
            start += adapter.rank;
        }
    }
}
