//! Cross-entropy over the vocabulary, and its gradient in place.

use super::exp_in_place;
use crate::{
    isa::{Isa, for_each_width},
    pool::Pool,
    shared::SharedSlice,
};

/// `losses[row] = ln Σ e^logits[row] - logits[row][targets[row]]`; then `logits` `[rows, vocab]` hold the gradient of
/// `Σ weights[row] · losses[row]`.
///
/// # Panics
/// When the sizes don't match, or a target lies outside of the vocabulary.
pub fn cross_entropy(pool: &Pool, isa: Isa, logits: &mut [f32], targets: &[u32], weights: &[f32], losses: &mut [f32]) {
    let rows = targets.len();
    assert_eq!((weights.len(), losses.len()), (rows, rows), "weights and losses of {rows} rows");
    let vocab = logits.len().checked_div(rows).unwrap_or(0);
    assert_eq!(logits.len(), rows * vocab, "logits of {rows} rows");
    let (logits, losses) = (SharedSlice::new(logits), SharedSlice::new(losses));
    pool.run(rows, |row| {
        // SAFETY: each task has its own row.
        let (logits, loss) = unsafe { (logits.part(row * vocab, vocab), losses.part(row, 1)) };
        of_row(isa, logits, targets[row] as usize, weights[row], loss);
    });
}

for_each_width! {
    fn of_row(logits: &mut [f32], target: usize, weight: f32, loss: &mut [f32]) {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let of_target = logits[target];
        let sum = exp_in_place(logits, |logit| logit - max);
        loss[0] = (sum.ln() + max) - of_target;
        let factor = weight / sum;
        logits.iter_mut().for_each(|logit| *logit *= factor);
        logits[target] -= weight;
    }
}
