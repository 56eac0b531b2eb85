//! The end of the decoder: norm, head and cross-entropy, for the rows that predict something, some at a time: the whole
//! batch's logits never exist at once.

use cadre_kernels::{ffn::WeightedRow, format::PANEL, gradient::cross_entropy, matmul::matmul, rows};

use super::{Batch, layer::Walk, parameters::Gradients, places::Place};
use crate::{Result, nn::Matrix};

/// Logits that exist at a time.
const LOGITS: usize = 16 << 20;
/// Rows of the head that are transposed at a time, in panels of 16.
const HEAD_PANELS: usize = 256;

/// Bytes that the end of the decoder works in: logits and their gradient, and the rows that are transposed.
pub(super) fn bytes(head: &Matrix) -> u64 {
    let (vocab, width) = (head.layout().n, head.layout().k);
    let rows = (LOGITS / vocab).clamp(16, 1024);
    let columns = vocab.min(HEAD_PANELS * PANEL);
    4 * (rows * (vocab + columns + 5 * width) + columns * width) as u64
}

/// The losses of a batch's targets.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct TargetLosses {
    /// Their sum.
    pub loss: f64,
    /// How many of the targets got the highest logit.
    pub correct: usize,
}

impl Walk<'_> {
    /// The losses of the batch's targets; and the gradient of `hidden` `[tokens, width]`, each loss times `weight`, if
    /// `gradients` are wanted.
    pub(super) fn head(
        &self,
        head: &Matrix,
        batch: &Batch,
        hidden: &[f32],
        weight: f32,
        mut gradients: Option<&mut Gradients>,
    ) -> Result<(TargetLosses, Vec<f32>)> {
        let (compute, workspace) = (self.products.compute, self.products.workspace);
        let (pool, isa) = (&compute.pool, compute.isa);
        let (vocab, width) = (head.layout().n, head.layout().k);
        let mut of_hidden = vec![0.0; if gradients.is_some() { hidden.len() } else { 0 }];
        let mut total = TargetLosses::default();
        let rows_at_once = (LOGITS / vocab).clamp(16, 1024);
        for targets in batch.targets.chunks(rows_at_once) {
            let from: Vec<_> = targets.iter().map(|target| WeightedRow { row: target.row, weight: 1.0 }).collect();
            let linear = self.linear(Place::Head, head.packed()).of_rows(&from);
            let mut inputs = workspace.take(targets.len() * width);
            rows::gather(pool, hidden, width, &from, &mut inputs);
            let normed = self.norm(&self.parts.norm, &inputs);
            let mut logits = self.products.forward(&linear, &normed);
            let tokens: Vec<u32> = targets.iter().map(|target| target.token).collect();
            let found = logits.chunks_exact(vocab).zip(&tokens);
            total.correct += found.filter(|(logits, token)| is_highest(logits, **token as usize)).count();
            let mut losses = vec![0.0; targets.len()];
            cross_entropy(pool, isa, &mut logits, &tokens, &vec![weight; targets.len()], &mut losses);
            total.loss += losses.iter().map(|loss| f64::from(*loss)).sum::<f64>();
            let Some(gradients) = gradients.as_deref_mut() else {
                [inputs, normed, logits].into_iter().for_each(|buffer| workspace.give(buffer));
                continue;
            };
            let gradient = self.products.gradient(&linear, &logits);
            self.products.parameter_gradients(&linear, &normed, &gradient, gradients);
            let (mut of_normed, mut part) = (workspace.zeros(normed.len()), workspace.take(normed.len()));
            for start in (0..head.layout().panels()).step_by(HEAD_PANELS) {
                let panels = start..head.layout().panels().min(start + HEAD_PANELS);
                let columns = panels.start * PANEL..vocab.min(panels.end * PANEL);
                let mut of_logits = workspace.take(targets.len() * columns.len());
                for (row, out) in logits.chunks_exact(vocab).zip(of_logits.chunks_exact_mut(columns.len())) {
                    out.copy_from_slice(&row[columns.clone()]);
                }
                matmul(
                    pool,
                    isa,
                    &of_logits,
                    &self.products.room.borrow_mut().fill_panels(pool, isa, &head.packed(), panels)?,
                    &mut part,
                );
                rows::add(pool, &part, &mut of_normed);
                workspace.give(of_logits);
            }
            self.products.add_adapters_input_gradient(&linear, &gradient, &mut of_normed);
            self.products.workspace.give(gradient.of_inner);
            let mut of_inputs = workspace.zeros(inputs.len());
            let trained = (self.trained.norm, gradients);
            self.norm_backward(&self.parts.norm, &inputs, &of_normed, &mut of_inputs, trained);
            rows::scatter_add(pool, &of_inputs, width, &from, &mut of_hidden);
            let buffers = [inputs, normed, logits, of_normed, part, of_inputs];
            buffers.into_iter().for_each(|buffer| workspace.give(buffer));
        }
        Ok((total, of_hidden))
    }
}

fn is_highest(logits: &[f32], token: usize) -> bool {
    logits.iter().enumerate().all(|(index, logit)| *logit < logits[token] || index == token)
}
