//! A plan's tensors: the batch that goes into the model, and the rows of logits that come out.

use crate::{
    Error, Result, Tensor,
    model::{SequenceRows, StepBatch},
    ops,
    scheduler::{Planned, Scheduler, StepPlan},
};

/// The flat tokens of `plan`. The rows of logits come in the plan's order: a sequence's scored positions, then the
/// one that its next token is chosen from.
pub(super) fn of(plan: &StepPlan, scheduler: &Scheduler) -> StepBatch {
    let mut batch = StepBatch::default();
    for planned in &plan.sequences {
        let Some(sequence) = scheduler.sequence(planned.id) else { continue };
        let first_row = batch.token_ids.len();
        let positions = planned.positions.clone();
        let row_of = |position: usize| (first_row + position - positions.start) as u32;
        batch.logit_rows.extend(planned.scored.clone().map(row_of));
        batch.logit_rows.extend(planned.samples.then(|| row_of(positions.end - 1)));
        batch.token_ids.extend_from_slice(&sequence.tokens()[positions.clone()]);
        batch.positions.extend(positions.clone().map(|position| position as u32));
        batch.sequences.push(SequenceRows {
            rows: first_row..batch.token_ids.len(),
            context_len: positions.end,
            block_table: sequence.block_table().to_vec(),
        });
    }
    batch
}

/// How many rows of logits belong to `planned`.
pub(super) fn num_logit_rows(planned: &Planned) -> usize {
    planned.scored.len() + usize::from(planned.samples)
}

/// Calls `read` with the logits, which must be `[rows, vocab]`, as one slice.
pub(super) fn with_logits(logits: &Tensor, shape: [usize; 2], read: impl FnOnce(&[f32])) -> Result<()> {
    if logits.dims() != shape {
        let found = logits.dims().to_vec();
        return Err(Error::Shape { what: "logits of a step".into(), expected: shape.to_vec(), found });
    }
    ops::values(logits, |logits| {
        read(logits);
        Ok(())
    })
}
