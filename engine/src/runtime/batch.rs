//! A plan's tensors: the batch that goes into the model, and the rows of logits that come out.

use std::ops::Range;

use crate::{
    Error, Result, Tensor,
    model::{LayerRoutes, SequenceRows, StepBatch},
    ops,
    sampler::{SampleRow, ScoreRow},
    scheduler::{Scheduler, StepPlan},
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
            adapter: sequence.request().adapter.clone(),
        });
    }
    batch
}

/// What a step's rows of logits are wanted for, in the plan's order.
#[derive(Default)]
pub(super) struct LogitRows<'a> {
    /// Those of the targets of each sequence's scored positions.
    pub(super) score: Vec<ScoreRow<'a>>,
    /// The last one of each sequence that samples.
    pub(super) sample: Vec<SampleRow<'a>>,
}

/// Deals `logits`, of rows of `vocab_size`, out to the sequences of `plan`.
///
/// # Errors
/// When a sequence does not run: its rows would go to the next one.
pub(super) fn deal<'a>(
    plan: &StepPlan,
    scheduler: &'a Scheduler,
    logits: &'a [f32],
    vocab_size: usize,
) -> Result<LogitRows<'a>> {
    let mut rows = logits.chunks_exact(vocab_size.max(1));
    let mut dealt = LogitRows::default();
    for planned in &plan.sequences {
        let gone = || Error::Config(format!("{:?} is planned but does not run", planned.id));
        let sequence = scheduler.sequence(planned.id).ok_or_else(gone)?;
        let top = sequence.request().scoring.as_ref().map_or(0, |scoring| scoring.top);
        for (position, logits) in planned.scored.clone().zip(&mut rows) {
            let targets = sequence.targets(position).iter();
            dealt.score.extend(targets.map(|&token| ScoreRow { logits, token, top }));
        }
        let last = if planned.samples { rows.next() } else { None };
        dealt.sample.extend(last.map(|logits| SampleRow { logits, sequence }));
    }
    Ok(dealt)
}

/// The experts of these rows, `[rows, num_layers, top_k]`, with zeros for layers that route nothing.
pub(super) fn experts(routes: &[LayerRoutes], num_layers: usize, rows: Range<usize>) -> Vec<u32> {
    let top_k = routes.iter().map(|layer| layer.routes.top_k).max().unwrap_or(0);
    let mut experts = vec![0; rows.len() * num_layers * top_k];
    for LayerRoutes { layer, routes } in routes {
        let chosen = routes.experts.chunks_exact(routes.top_k).skip(rows.start);
        for (token, chosen) in experts.chunks_exact_mut(num_layers * top_k).zip(chosen) {
            token[layer * top_k..][..routes.top_k].copy_from_slice(chosen);
        }
    }
    experts
}

/// Calls `read` with the logits, which must be `[rows, vocab]`, as one slice.
pub(super) fn with_logits(logits: &Tensor, shape: [usize; 2], read: impl FnOnce(&[f32]) -> Result<()>) -> Result<()> {
    if logits.dims() != shape {
        let found = logits.dims().to_vec();
        return Err(Error::Shape { what: "logits of a step".into(), expected: shape.to_vec(), found });
    }
    ops::values(logits, read)
}
