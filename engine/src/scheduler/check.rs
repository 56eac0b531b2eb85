//! The invariants of the scheduler, as assertions for tests.

use std::collections::HashMap;

use super::{BACKGROUND_PART, BLOCK_SIZE, Scheduler, StepPlan, blocks_for};
use crate::{
    kv::blocks::BlockId,
    request::Priority,
    sequence::{Sequence, SequenceId},
};

impl Scheduler {
    /// Asserts what must hold between any two calls.
    pub(crate) fn check(&self) {
        self.pool.check();
        assert!(self.running.len() <= self.config.max_num_seqs, "too many run");
        for priority in Priority::ALL {
            let count = self.running_ids(priority, |_| true).len();
            assert!(count <= self.config.max_num_batched_tokens, "more run than a step has tokens");
        }
        for (id, sequence) in &self.waiting {
            assert!(!self.running.contains_key(id), "{id:?} runs and waits");
            assert_eq!((sequence.computed, sequence.registered, sequence.block_table.len()), (0, 0, 0), "{id:?}");
        }
        self.running.values().for_each(check_running);
        self.check_owners();
    }

    /// Asserts what must hold of a plan that was just made.
    pub(crate) fn check_plan(&self, plan: &StepPlan) {
        assert!(plan.num_tokens() <= self.config.max_num_batched_tokens, "over the budget");
        let scored: usize = plan.sequences.iter().map(|planned| planned.scored.len()).sum();
        assert!(scored <= self.config.max_scored_rows, "{scored} scored rows");
        let mut seen = Vec::new();
        for planned in &plan.sequences {
            let sequence = self.running.get(&planned.id).expect("what is planned runs");
            assert!(!seen.contains(&planned.id), "{:?} is planned twice", planned.id);
            seen.push(planned.id);
            assert_eq!(planned.positions.start, sequence.computed);
            assert!(!planned.positions.is_empty() && planned.positions.end <= sequence.tokens().len());
            assert_eq!(sequence.block_table.len(), blocks_for(planned.positions.end), "{:?}", planned.id);
            let unscored = sequence.unscored();
            let expected = unscored.start.max(planned.positions.start)..unscored.end.min(planned.positions.end);
            assert!(planned.scored == expected || (expected.is_empty() && planned.scored.is_empty()));
            assert!(
                unscored.is_empty() || unscored.start >= planned.positions.start,
                "an unscored position is skipped"
            );
            let unrouted = sequence.unrouted();
            let expected = unrouted.map_or(0, |start| planned.positions.end.saturating_sub(start));
            assert_eq!((planned.routed.end, planned.routed.len()), (planned.positions.end, expected));
            assert!(unrouted.is_none_or(|start| start >= planned.positions.start), "an untold position is skipped");
        }
        let last = self.running.last_key_value().map(|(id, _)| id);
        assert!(plan.preempted.iter().all(|id| Some(id) > last), "one that precedes others was preempted");
        let first = self.first_running();
        assert!(first.is_none_or(|id| seen.contains(&id)), "the first is not planned");
        assert_eq!(first.is_none(), self.waiting.is_empty() && plan.is_empty(), "something waits but nothing runs");
        self.check_priorities(plan);
    }

    /// Background sequences take what interactive ones leave.
    fn check_priorities(&self, plan: &StepPlan) {
        let priority = |id: SequenceId| id.request.priority;
        let last_admitted = plan.admitted.iter().map(|one| priority(one.id)).max();
        let first_preempted = plan.preempted.iter().map(|&id| priority(id)).min();
        let overlap = last_admitted.zip(first_preempted).is_some_and(|(admitted, preempted)| admitted >= preempted);
        assert!(!overlap, "admitted into blocks that ran out");
        let waits = |id: &SequenceId| priority(*id) == Priority::Interactive && !self.waits_for_prompt(*id);
        if self.waiting.keys().any(waits) {
            assert_ne!(last_admitted, Some(Priority::Background), "admitted before an interactive one");
        }
        let interactive =
            self.running.keys().chain(self.waiting.keys()).any(|&id| priority(id) == Priority::Interactive);
        if interactive {
            assert_eq!(self.first_running().map(priority), Some(Priority::Interactive), "no interactive one runs");
            let background = plan.sequences.iter().filter(|one| priority(one.id) == Priority::Background);
            let tokens: usize = background.map(|one| one.positions.len()).sum();
            assert!(tokens <= self.config.max_num_batched_tokens.div_ceil(BACKGROUND_PART), "{tokens} tokens");
        }
    }

    /// Every hold of a block is by exactly one table each, and what is shared is full, computed and the same prefix.
    fn check_owners(&self) {
        let mut holders: HashMap<BlockId, Vec<(usize, &Sequence)>> = HashMap::new();
        for sequence in self.running.values() {
            for (at, &block) in sequence.block_table.iter().enumerate() {
                holders.entry(block).or_default().push((at, sequence));
            }
        }
        for (block, refs) in self.pool.refs().into_iter().enumerate() {
            let held = holders.remove(&(block as BlockId)).unwrap_or_default();
            assert_eq!(refs as usize, held.len(), "block {block} is counted wrongly");
            let Some((first, others)) = held.split_first() else { continue };
            for (at, other) in others {
                let end = (first.0 + 1) * BLOCK_SIZE;
                assert!(
                    *at == first.0 && end <= other.computed && end <= first.1.computed,
                    "block {block} is not full"
                );
                assert_eq!(first.1.tokens()[..end], other.tokens()[..end], "block {block} is shared by two prefixes");
                assert_eq!(first.1.request().adapter, other.request().adapter, "block {block} is of two adapters");
            }
        }
    }
}

fn check_running(sequence: &Sequence) {
    let id = sequence.id();
    assert!(sequence.computed < sequence.tokens().len(), "{id:?} has nothing to compute");
    assert!(sequence.registered * BLOCK_SIZE <= sequence.computed, "{id:?} registered what isn't computed");
    let blocks = sequence.block_table.len();
    assert!(blocks_for(sequence.computed) <= blocks && blocks <= blocks_for(sequence.tokens().len()), "{id:?}");
}
