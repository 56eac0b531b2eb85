//! A frozen matrix with what is trained of it: the product, the gradient of its input, and of what is trained.

use std::{
    borrow::Cow,
    cell::{Cell, RefCell},
};

use cadre_kernels::{
    ffn::WeightedRow,
    format::Packed,
    gradient::{Strided, Transposed, add_product, dropout},
    matmul::{Inputs, matmul, matmul_rows},
    rows,
};

use super::{
    dropout::{Dropout, Mask},
    parameters::{Gradients, Parameters},
    trained::TrainedMatrix,
    workspace::Workspace,
};
use crate::{Result, adapter::AdapterValues, compute::Compute};

/// A matrix and what is trained of it.
#[derive(Clone, Copy)]
pub(super) struct Linear<'a> {
    pub weight: Packed<'a>,
    pub trained: &'a TrainedMatrix,
    /// Rows of gate when panels of gate and up take turns; `None`: the rows lie in order.
    pub paired: Option<usize>,
    /// What its adapters don't take of the input.
    pub mask: Option<Mask<'a>>,
}

/// What all products of a walk share.
pub(super) struct Products<'a> {
    pub compute: &'a Compute,
    pub parameters: &'a Parameters,
    pub workspace: &'a Workspace,
    /// For transposed weights.
    pub room: RefCell<Transposed>,
    /// What adapters don't take.
    pub dropout: Option<Dropout>,
    /// The number in the step of the first token of the batch that is walked over.
    pub first_token: Cell<usize>,
}

/// The gradient of a product.
pub(super) struct OutputGradient<'a> {
    /// `[rows, n]`
    values: &'a [f32],
    /// That of what the adapters take between A and B; empty if there are none.
    pub of_inner: Vec<f32>,
}

impl<'a> Linear<'a> {
    /// The same for inputs that are these rows of the batch.
    pub fn of_rows(self, rows: &'a [WeightedRow]) -> Self {
        Self { mask: self.mask.map(|mask| mask.of_rows(rows)), ..self }
    }

    /// Whether anything of it is.
    pub fn is_trained(&self) -> bool {
        !self.trained.adapters.is_empty() || !self.trained.weights.is_empty()
    }

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
        let mut y = self.workspace.take(x.len() / linear.inputs() * linear.outputs());
        matmul(pool, *isa, x, &linear.weight, &mut y);
        self.add_adapters(linear, x, &mut y);
        y
    }

    /// The same of some rows of inputs that were converted for the frozen weights; `x` has these rows, if there are adapters.
    pub fn forward_rows(&self, linear: &Linear<'_>, inputs: &Inputs<'_>, rows: &[WeightedRow], x: &[f32]) -> Vec<f32> {
        let mut y = self.workspace.take(rows.len() * linear.outputs());
        matmul_rows(&self.compute.pool, inputs, rows, &linear.weight, &mut y);
        self.add_adapters(linear, x, &mut y);
        y
    }

    fn add_adapters(&self, linear: &Linear<'_>, x: &[f32], y: &mut [f32]) {
        let Compute { pool, isa } = self.compute;
        let (adapters, n) = (self.adapters(linear), linear.outputs());
        let (rank, rows) = (adapters.rank(), y.len() / n);
        if rank > 0 && rows > 0 {
            let x = self.dropped(linear, x);
            let (inner, b) = (self.inner(linear, &x), adapters.b_transposed(n));
            self.give(x);
            add_product(pool, *isa, Strided::new(&inner, rows, rank), Strided::new(&b, rank, n), y);
            self.workspace.give(inner);
        }
    }

    /// An output's gradient `[rows, n]`, for the two that follow.
    pub fn gradient<'g>(&self, linear: &Linear<'_>, values: &'g [f32]) -> OutputGradient<'g> {
        let is_adapted = !linear.trained.adapters.is_empty() && !values.is_empty();
        OutputGradient { values, of_inner: if is_adapted { self.inner_gradient(linear, values) } else { Vec::new() } }
    }

    /// The gradient of the input, `[rows, k]`, from that of the output.
    pub fn input_gradient(&self, linear: &Linear<'_>, gradient: &OutputGradient<'_>) -> Result<Vec<f32>> {
        let Compute { pool, isa } = self.compute;
        let rows = gradient.values.len() / linear.outputs();
        let mut out = self.workspace.take(rows * linear.inputs());
        matmul(pool, *isa, gradient.values, &self.room.borrow_mut().fill(pool, *isa, &linear.weight)?, &mut out);
        self.add_adapters_input_gradient(linear, gradient, &mut out);
        Ok(out)
    }

    /// The same of some rows of gradients that were converted for the transposed weights; `gradient` has these rows, if there
    /// are adapters.
    pub fn input_gradient_rows(
        &self,
        linear: &Linear<'_>,
        converted: &Inputs<'_>,
        rows: &[WeightedRow],
        gradient: &OutputGradient<'_>,
    ) -> Result<Vec<f32>> {
        let Compute { pool, isa } = self.compute;
        let mut out = self.workspace.take(rows.len() * linear.inputs());
        matmul_rows(pool, converted, rows, &self.room.borrow_mut().fill(pool, *isa, &linear.weight)?, &mut out);
        self.add_adapters_input_gradient(linear, gradient, &mut out);
        Ok(out)
    }

    /// The adapters' part of [`Products::input_gradient`].
    pub fn add_adapters_input_gradient(&self, linear: &Linear<'_>, gradient: &OutputGradient<'_>, out: &mut [f32]) {
        let adapters = self.adapters(linear);
        let (k, rank) = (linear.inputs(), adapters.rank());
        if gradient.of_inner.is_empty() {
            return;
        }
        let a: Vec<f32> = adapters.adapters.iter().flat_map(|adapter| adapters.of(adapter).0).copied().collect();
        let left = Strided::new(&gradient.of_inner, gradient.of_inner.len() / rank, rank);
        let Compute { pool, isa } = self.compute;
        if linear.mask.is_none() {
            return add_product(pool, *isa, left, Strided::new(&a, rank, k), out);
        }
        let mut product = self.workspace.zeros(out.len());
        add_product(pool, *isa, left, Strided::new(&a, rank, k), &mut product);
        let dropped = self.dropped(linear, &product);
        rows::add(pool, &dropped, out);
        self.give(dropped);
        self.workspace.give(product);
    }

    /// What the adapters take of `x`, or its gradient of `x` as what they take.
    fn dropped<'x>(&self, linear: &Linear<'_>, x: &'x [f32]) -> Cow<'x, [f32]> {
        let Some(mask) = linear.mask else { return Cow::Borrowed(x) };
        let mut out = self.workspace.take(x.len());
        dropout(&self.compute.pool, mask.rate, &mask.keys(x.len() / linear.inputs()), x, &mut out);
        Cow::Owned(out)
    }

    fn give(&self, values: Cow<'_, [f32]>) {
        if let Cow::Owned(values) = values {
            self.workspace.give(values);
        }
    }

    /// Adds to `gradients` those of what is trained, from the input `[rows, k]` and the output's gradient `[rows, n]`.
    pub fn parameter_gradients(
        &self,
        linear: &Linear<'_>,
        x: &[f32],
        gradient: &OutputGradient<'_>,
        gradients: &mut Gradients,
    ) {
        let Compute { pool, isa } = self.compute;
        let adapters = self.adapters(linear);
        let (k, n, rank) = (linear.inputs(), linear.outputs(), adapters.rank());
        let rows = x.len() / k;
        if rows == 0 || !linear.is_trained() {
            return;
        }
        let (values, outputs) = (Strided::new(x, rows, k), Strided::new(gradient.values, rows, n));
        for whole in &linear.trained.weights {
            let sums = gradients.of(whole.weight);
            for (row, output, len) in adapters.stretches(&whole.rows) {
                let at = (row - whole.rows.start) * k;
                let left = outputs.columns(output..output + len).transposed();
                add_product(pool, *isa, left, values, &mut sums[at..at + len * k]);
            }
        }
        if rank == 0 {
            return;
        }
        let taken = self.dropped(linear, x);
        let x = Strided::new(&taken, rows, k);
        let inner = self.inner_of(linear, x);
        let of_inner = Strided::new(&gradient.of_inner, rows, rank);
        let mut start = 0;
        for adapter in adapters.adapters {
            let own = start..start + adapter.rank;
            start = own.end;
            add_product(pool, *isa, of_inner.columns(own.clone()).transposed(), x, gradients.of(adapter.a));
            let sums = gradients.of(adapter.b);
            for (row, output, len) in adapters.stretches(&adapter.rows) {
                let at = (row - adapter.rows.start) * adapter.rank;
                let left = outputs.columns(output..output + len).transposed();
                let right = Strided::new(&inner, rows, rank).columns(own.clone());
                add_product(pool, *isa, left, right, &mut sums[at..at + len * adapter.rank]);
            }
        }
        self.workspace.give(inner);
        self.give(taken);
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
        let mut inner = self.workspace.zeros(x.size().0 * rank);
        add_product(&self.compute.pool, self.compute.isa, x, Strided::new(&a, k, rank), &mut inner);
        inner
    }

    /// The gradient of `x · Aᵀ`, before the scale, of all adapters side by side, `[rows, rank]`.
    fn inner_gradient(&self, linear: &Linear<'_>, gradient: &[f32]) -> Vec<f32> {
        let (adapters, n) = (self.adapters(linear), linear.outputs());
        let rank = adapters.rank();
        let mut b = self.workspace.zeros(n * rank);
        adapters.each_of_b(|output, column, value| b[output * rank + column] = value);
        let rows = gradient.len() / n;
        let mut out = self.workspace.zeros(rows * rank);
        let (left, right) = (Strided::new(gradient, rows, n), Strided::new(&b, n, rank));
        add_product(&self.compute.pool, self.compute.isa, left, right, &mut out);
        self.workspace.give(b);
        let scales = adapters.adapters.iter().flat_map(|adapter| std::iter::repeat_n(adapter.scale, adapter.rank));
        let scales: Vec<f32> = scales.collect();
        out.chunks_exact_mut(rank).for_each(|row| row.iter_mut().zip(&scales).for_each(|(x, scale)| *x *= scale));
        out
    }
}
