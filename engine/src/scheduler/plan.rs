//! What one step computes.

use std::ops::Range;

use crate::sequence::{Sequence, SequenceId};

/// One sequence's part of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    /// The sequence.
    pub id: SequenceId,
    /// The positions of its tokens that this step computes; those before are in the cache.
    pub positions: Range<usize>,
    /// Positions, among these, whose logits score the next prompt token. May be empty.
    pub scored: Range<usize>,
    /// Positions, among these, whose experts are to be told. May be empty.
    pub routed: Range<usize>,
    /// Whether the last position's logits choose the next token.
    pub samples: bool,
    /// How many of the positions are the prompt's.
    pub prompt_tokens: usize,
}

/// A sequence that left the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admission {
    /// The sequence.
    pub id: SequenceId,
    /// Its leading tokens that were found in the prefix cache.
    pub cached_tokens: usize,
    /// Whether it had never run before.
    pub first_time: bool,
}

/// What one step computes: its sequences in the order of their rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepPlan {
    /// The sequences that run.
    pub sequences: Vec<Planned>,
    /// Those of them that left the queue in this step.
    pub admitted: Vec<Admission>,
    /// Sequences that gave their blocks back and wait again.
    pub preempted: Vec<SequenceId>,
    budget: usize,
    score_budget: usize,
}

impl StepPlan {
    pub(super) fn new(budget: usize, score_budget: usize) -> Self {
        Self { sequences: Vec::new(), admitted: Vec::new(), preempted: Vec::new(), budget, score_budget }
    }

    /// Tokens of this step.
    #[must_use]
    pub fn num_tokens(&self) -> usize {
        self.sequences.iter().map(|planned| planned.positions.len()).sum()
    }

    /// Whether nothing runs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Tokens that still fit.
    pub(super) fn budget(&self) -> usize {
        self.budget
    }

    /// At most so many tokens may follow.
    pub(super) fn limit(&mut self, tokens: usize) {
        self.budget = self.budget.min(tokens);
    }

    /// How many pending tokens of `sequence` both budgets allow.
    pub(super) fn chunk(&self, sequence: &Sequence) -> usize {
        let start = sequence.computed();
        let end = start + sequence.pending().min(self.budget);
        let unscored = sequence.unscored();
        let first_scored = start.max(unscored.start);
        let affordable = first_scored.saturating_add(self.score_budget);
        if affordable >= unscored.end { end - start } else { end.min(affordable) - start }
    }

    /// Adds the next `count` tokens of `sequence`.
    pub(super) fn push(&mut self, sequence: &Sequence, count: usize) {
        let positions = sequence.computed()..sequence.computed() + count;
        let unscored = sequence.unscored();
        let first_scored = positions.start.max(unscored.start);
        let scored = first_scored..positions.end.min(unscored.end).max(first_scored);
        let first_routed =
            sequence.unrouted().map_or(positions.end, |start| start.clamp(positions.start, positions.end));
        self.budget -= count;
        self.score_budget -= scored.len();
        self.sequences.push(Planned {
            id: sequence.id(),
            samples: positions.end == sequence.tokens().len() && sequence.wants_token(),
            prompt_tokens: positions.end.min(sequence.prompt_len()).saturating_sub(positions.start),
            routed: first_routed..positions.end,
            positions,
            scored,
        });
    }

    /// Notes a preemption, and takes the sequence out if it was planned.
    pub(super) fn preempt(&mut self, id: SequenceId) {
        if let Some(at) = self.sequences.iter().position(|planned| planned.id == id) {
            let planned = self.sequences.remove(at);
            self.budget += planned.positions.len();
            self.score_budget += planned.scored.len();
        }
        self.preempted.push(id);
    }
}
