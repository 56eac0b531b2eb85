//! Decides which sequences run in the next step, and with how many tokens each. Continuous batching over paged KV.
//!
//! It holds every sequence and the books of the KV blocks, answers with a [`StepPlan`], and is told what came of it.
//! It touches no tensor, no clock and no I/O, and it never panics: there is nothing here that could fail at run time.
//!
//! Sequences are in order of precedence everywhere: by priority, then by arrival.
//!
//! A step's budget of tokens goes first to decodes (one token each), then to the prompts under way, then to waiting
//! sequences in their order: of interactive ones, and what they leave to background ones in the same way. While an
//! interactive sequence runs, all background ones together get no more than an eighth of a step, because each of their
//! tokens is waited for. A prompt larger than what is left of the budget is computed in chunks.
//!
//! When a decode finds no block, the last running sequence is preempted: it gives its blocks back, returns to its
//! place in the queue, and is computed again later, its generated tokens included. Background sequences also give way to
//! interactive ones that wait for a place or for blocks.
//!
//! Invariants:
//! - Every sequence is in exactly one of `running` and `waiting`; a waiting one holds no block and has nothing computed.
//! - At most `max_num_seqs` run, and of one priority never more than `max_num_batched_tokens`; a plan has at most that many
//!   tokens.
//! - In a plan a sequence's positions start at what it has computed; its blocks cover exactly what the plan computes.
//! - A block is in two tables only if it is full, computed and cached; writing goes to blocks in one table.
//! - The first running sequence is in every plan: it may take the blocks of all others, and they suffice for any
//!   sequence of `max_model_len` tokens. If an interactive one waits, an interactive one runs. So no interactive one starves, and
//!   background ones end once interactive ones leave them something.
//! - Requests of one priority are first admitted in the order of arrival, background ones when no interactive one waits. A
//!   request's further choices wait until the first one has computed the prompt, then share its full blocks; only they may be
//!   overtaken, and only while they wait for that.
//! - A sequence is preempted for those that precede it only, and after all that it precedes.
//! - A prompt's hit in the prefix cache leaves at least its last token to be computed, and every token whose experts are
//!   still to be told.

#[cfg(test)]
mod check;
mod plan;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound::{Excluded, Included, Unbounded},
    sync::Arc,
};

pub use plan::{Admission, Planned, StepPlan};

use crate::{
    Error, Result,
    adapter::LoadedAdapter,
    kv::blocks::{BLOCK_SIZE, BlockPool, BlockTokens, Parent, PrefixCounters, blocks_for},
    request::{Priority, Request},
    sequence::{RequestId, Sequence, SequenceId},
};

/// The limits that a scheduler keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// The most sequences that run at once.
    pub max_num_seqs: usize,
    /// The most tokens of one step.
    pub max_num_batched_tokens: usize,
    /// The longest sequence, prompt and generated tokens together.
    pub max_model_len: usize,
    /// The most prompt positions of one step whose logits are wanted to score by: each costs a row of logits.
    pub max_scored_rows: usize,
    /// Whether requests share computed prefixes. The choices of one request always do.
    pub enable_prefix_caching: bool,
}

/// Background sequences get one part in this many of a step's tokens while interactive ones run.
const BACKGROUND_PART: usize = 8;

/// Where a request was when it was cancelled: the furthest that one of its sequences had come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// None of its sequences was running.
    Queue,
    /// Its prompt was being computed.
    Prefill,
    /// It was generating.
    Decode,
}

/// Every sequence that has not ended, and the books of the KV blocks.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    pool: BlockPool,
    running: BTreeMap<SequenceId, Sequence>,
    waiting: BTreeMap<SequenceId, Sequence>,
}

impl Scheduler {
    /// A scheduler over `num_blocks` KV blocks.
    ///
    /// # Errors
    /// When a limit is 0, or when the blocks don't hold one sequence of `max_model_len` tokens.
    pub fn new(config: SchedulerConfig, num_blocks: usize) -> Result<Self> {
        let limits = [
            ("max_num_seqs", config.max_num_seqs),
            ("max_num_batched_tokens", config.max_num_batched_tokens),
            ("max_model_len", config.max_model_len),
            ("max_scored_rows", config.max_scored_rows),
        ];
        if let Some((name, _)) = limits.iter().find(|(_, limit)| *limit == 0) {
            return Err(Error::Config(format!("{name} is 0: expected at least 1")));
        }
        let needed = blocks_for(config.max_model_len);
        if num_blocks < needed {
            return Err(Error::Config(format!(
                "a sequence of max_model_len = {} tokens takes {needed} KV blocks of {BLOCK_SIZE} tokens, but there are \
                 {num_blocks}: give the KV cache more memory or lower max_model_len",
                config.max_model_len
            )));
        }
        let pool = BlockPool::new(num_blocks);
        Ok(Self { config, pool, running: BTreeMap::new(), waiting: BTreeMap::new() })
    }

    /// Queues the `n` choices of a request. The number in `id` must be above all earlier ones; the request must fit
    /// `max_model_len`.
    pub fn add(&mut self, id: RequestId, request: &Arc<Request>) {
        for choice in 0..request.n {
            let id = SequenceId { request: id, choice };
            self.waiting.insert(id, Sequence::new(id, Arc::clone(request)));
        }
    }

    /// What the next step computes. Follow it with [`advance`](Self::advance) for each of its sequences, or with
    /// [`fail_running`](Self::fail_running).
    pub fn plan(&mut self) -> StepPlan {
        let mut plan = StepPlan::new(self.config.max_num_batched_tokens, self.config.max_scored_rows);
        let mut may_admit = true;
        for priority in Priority::ALL {
            if self.first_running().is_some_and(|id| id.request.priority < priority) {
                plan.limit(self.config.max_num_batched_tokens.div_ceil(BACKGROUND_PART));
            }
            self.plan_decodes(priority, &mut plan);
            self.plan_prompts(priority, &mut plan);
            // Admitting after a preemption would only take the blocks that ran out.
            may_admit &= plan.preempted.iter().all(|id| id.request.priority > priority);
            may_admit = may_admit && self.admit(priority, &mut plan);
        }
        plan
    }

    /// Notes that a planned sequence's tokens are computed, and offers its full blocks to the prefix cache.
    pub fn advance(&mut self, planned: &Planned) {
        let caching = self.config.enable_prefix_caching;
        if let Some(sequence) = self.running.get_mut(&planned.id) {
            let scope = scope(caching, sequence);
            sequence.computed = planned.positions.end;
            register_full_blocks(&mut self.pool, scope, sequence);
        }
    }

    /// A running sequence.
    #[must_use]
    pub fn sequence(&self, id: SequenceId) -> Option<&Sequence> {
        self.running.get(&id)
    }

    /// A running sequence, to note its tokens and log-probabilities.
    pub fn sequence_mut(&mut self, id: SequenceId) -> Option<&mut Sequence> {
        self.running.get_mut(&id)
    }

    /// Removes a sequence that has ended.
    pub fn finish(&mut self, id: SequenceId) {
        if let Some(sequence) = self.running.remove(&id) {
            self.pool.release(&sequence.block_table);
        }
        self.waiting.remove(&id);
    }

    /// Removes what is left of a request, in whatever state, and says how far it was; `None` if nothing is left.
    pub fn cancel(&mut self, request: RequestId) -> Option<Phase> {
        let phases: Vec<_> = self.phases(request).collect();
        for &(id, _) in &phases {
            self.finish(id);
        }
        phases.into_iter().map(|(_, phase)| phase).max()
    }

    /// Whether the request has a sequence that has not ended.
    #[must_use]
    pub fn has(&self, request: RequestId) -> bool {
        self.phases(request).next().is_some()
    }

    /// After a failed step: removes every request that has a running sequence, and starts the books of the blocks
    /// afresh, because nothing that they say of the storage can be relied on. Waiting requests stay.
    pub fn fail_running(&mut self) -> Vec<RequestId> {
        let mut failed: Vec<_> = self.running.keys().map(|id| id.request).collect();
        failed.dedup();
        self.running.clear();
        self.pool.reset();
        for &request in &failed {
            self.cancel(request);
        }
        failed
    }

    /// Forgets every cached prefix, so that no later request continues from what a failed one computed.
    pub fn clear_prefix_cache(&mut self) {
        self.pool.clear_cache();
    }

    /// Whether no sequence is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Sequences that run.
    #[must_use]
    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that wait, new or preempted.
    #[must_use]
    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The names of the adapters of running and of waiting sequences, ascending, each once.
    #[must_use]
    pub fn adapters(&self) -> (Vec<String>, Vec<String>) {
        (adapters(self.running.values()), adapters(self.waiting.values()))
    }

    /// KV blocks that sequences hold.
    #[must_use]
    pub fn num_used_blocks(&self) -> usize {
        self.pool.num_used()
    }

    /// KV blocks in all.
    #[must_use]
    pub fn num_blocks(&self) -> usize {
        self.pool.num_blocks()
    }

    /// Prefix reuse between requests so far.
    #[must_use]
    pub fn prefix_counters(&self) -> PrefixCounters {
        self.pool.counters()
    }

    /// The sequences of a request that have not ended, and how far each is.
    fn phases(&self, request: RequestId) -> impl Iterator<Item = (SequenceId, Phase)> {
        let ids = SequenceId { request, choice: 0 }..=SequenceId { request, choice: u32::MAX };
        let running = self
            .running
            .range(ids.clone())
            .map(|(&id, sequence)| (id, if sequence.is_decoding() { Phase::Decode } else { Phase::Prefill }));
        running.chain(self.waiting.range(ids).map(|(&id, _)| (id, Phase::Queue)))
    }

    fn plan_decodes(&mut self, priority: Priority, plan: &mut StepPlan) {
        for id in self.running_ids(priority, Sequence::is_decoding) {
            if plan.budget() == 0 {
                break;
            }
            // Preempting takes the last one, so those planned already, which precede it, stay.
            while self.grow(id, 1) == Some(0) && self.preempt_last(plan) != Some(id) {}
            if let Some(sequence) = self.running.get(&id) {
                plan.push(sequence, 1);
            }
        }
    }

    fn plan_prompts(&mut self, priority: Priority, plan: &mut StepPlan) {
        for id in self.running_ids(priority, |one| !one.is_decoding()) {
            let Some(wanted) = self.running.get(&id).map(|sequence| plan.chunk(sequence)) else { continue };
            let mut given = self.grow(id, wanted).unwrap_or(0);
            // A prompt waits for blocks rather than preempt a decode of its priority, unless that would stop the first.
            while given < wanted
                && (self.last_gives_way_to(priority) || given == 0 && self.first_running() == Some(id))
                && self.preempt_last(plan) != Some(id)
            {
                given = self.grow(id, wanted).unwrap_or(0);
            }
            if let Some(sequence) = self.running.get(&id)
                && given > 0
            {
                plan.push(sequence, given);
            }
        }
    }

    /// Gives a running sequence blocks for up to `wanted` more tokens, and says for how many they suffice.
    fn grow(&mut self, id: SequenceId, wanted: usize) -> Option<usize> {
        let sequence = self.running.get_mut(&id)?;
        Some(grow(&mut self.pool, sequence, wanted))
    }

    /// The running sequences of this priority that are as asked, in their order.
    fn running_ids(&self, priority: Priority, asked: impl Fn(&Sequence) -> bool) -> Vec<SequenceId> {
        let of_it = self.running.values().filter(|one| one.id().request.priority == priority && asked(one));
        of_it.map(Sequence::id).collect()
    }

    fn first_running(&self) -> Option<SequenceId> {
        self.running.first_key_value().map(|(&id, _)| id)
    }

    /// Whether the running sequence that would be preempted first is of a lower priority than this one.
    fn last_gives_way_to(&self, priority: Priority) -> bool {
        self.running.last_key_value().is_some_and(|(id, _)| id.request.priority > priority)
    }

    /// Sends the last running sequence back to the queue, and takes it out of the plan.
    fn preempt_last(&mut self, plan: &mut StepPlan) -> Option<SequenceId> {
        let (id, mut sequence) = self.running.pop_last()?;
        give_back(&mut self.pool, &mut sequence);
        self.waiting.insert(id, sequence);
        plan.preempt(id);
        Some(id)
    }

    /// Starts sequences of this priority that wait; whether none is left that waits for anything but its prompt.
    fn admit(&mut self, priority: Priority, plan: &mut StepPlan) -> bool {
        let mut last = None;
        while let Some(id) = self.next_waiting(priority, last) {
            last = Some(id);
            if !self.waits_for_prompt(id) && !self.admit_one(id, plan) {
                return false; // Whoever comes after it may not overtake.
            }
        }
        true
    }

    fn next_waiting(&self, priority: Priority, after: Option<SequenceId>) -> Option<SequenceId> {
        let lowest = SequenceId { request: RequestId { priority, number: 0 }, choice: 0 };
        let from = after.map_or(Included(lowest), Excluded);
        let next = self.waiting.range((from, Unbounded)).next().map(|(&id, _)| id);
        next.filter(|id| id.request.priority == priority)
    }

    /// Whether this is a further choice of a request whose first choice is just computing the prompt.
    fn waits_for_prompt(&self, id: SequenceId) -> bool {
        let first = SequenceId { choice: 0, ..id };
        id.choice > 0 && self.running.get(&first).is_some_and(|sequence| !sequence.prompt_is_computed())
    }

    /// Starts a waiting sequence if there is a place and there are blocks for all of its tokens, beside those that others
    /// were promised.
    fn admit_one(&mut self, id: SequenceId, plan: &mut StepPlan) -> bool {
        if plan.budget() == 0 || !self.has_place_for(id) {
            return false;
        }
        let Some(mut sequence) = self.waiting.remove(&id) else { return true };
        let scope = scope(self.config.enable_prefix_caching, &sequence);
        sequence.block_table = self.pool.acquire_prefix(scope, &sequence.tokens()[..reusable(&sequence)]);
        sequence.registered = sequence.block_table.len();
        sequence.computed = sequence.registered * BLOCK_SIZE;
        let chunk = plan.chunk(&sequence);
        if chunk == 0 || !self.make_room(&sequence, plan) {
            give_back(&mut self.pool, &mut sequence);
            self.waiting.insert(id, sequence);
            return false;
        }
        self.start(sequence, chunk, plan);
        true
    }

    /// Whether fewer sequences run than may, or one would give its place up.
    fn has_place_for(&self, id: SequenceId) -> bool {
        self.running.len() < self.config.max_num_seqs || self.last_gives_way_to(id.request.priority)
    }

    /// Preempts sequences of lower priority until there is a place and there are blocks for `newcomer`; whether there are.
    fn make_room(&mut self, newcomer: &Sequence, plan: &mut StepPlan) -> bool {
        let priority = newcomer.id().request.priority;
        let needed = missing(newcomer) + self.reserved(priority);
        while self.running.len() == self.config.max_num_seqs || self.pool.num_available() < needed {
            if !self.last_gives_way_to(priority) {
                return false;
            }
            self.preempt_last(plan);
        }
        true
    }

    fn start(&mut self, mut sequence: Sequence, chunk: usize, plan: &mut StepPlan) {
        let first_time = !std::mem::replace(&mut sequence.started, true);
        let cached_tokens = sequence.computed;
        let may_be_cached = reusable(&sequence) + 1 == sequence.tokens().len();
        if first_time && self.config.enable_prefix_caching && may_be_cached {
            self.pool.count_query(sequence.prompt_len(), cached_tokens);
        }
        let chunk = grow(&mut self.pool, &mut sequence, chunk);
        plan.push(&sequence, chunk);
        plan.admitted.push(Admission { id: sequence.id(), cached_tokens, first_time });
        self.running.insert(sequence.id(), sequence);
    }

    /// Blocks that the running sequences that don't give way to this priority will soon take: what is missing to the prompts
    /// under way, and one each to grow. Admitting into them would cause a preemption within a few steps.
    fn reserved(&self, priority: Priority) -> usize {
        let keep = self.running.values().filter(|one| one.id().request.priority <= priority);
        keep.map(|sequence| missing(sequence) + 1).sum()
    }
}

/// Within which prefixes are shared: among the requests of one adapter, those of none being as one, or, without `caching`,
/// among the choices of one request.
fn scope(caching: bool, sequence: &Sequence) -> u64 {
    let adapter = || sequence.request().adapter.as_ref().map_or(0, |adapter| adapter.id());
    if caching { adapter() } else { sequence.id().request.number }
}

fn adapters<'a>(sequences: impl Iterator<Item = &'a Sequence>) -> Vec<String> {
    let named = sequences.filter_map(|sequence| sequence.request().adapter.as_deref());
    let names: BTreeSet<&str> = named.map(LoadedAdapter::name).collect();
    names.into_iter().map(str::to_owned).collect()
}

/// Blocks for up to `wanted` tokens more than are computed; says for how many of them the table suffices.
fn grow(pool: &mut BlockPool, sequence: &mut Sequence, wanted: usize) -> usize {
    while sequence.block_table.len() < blocks_for(sequence.computed + wanted) {
        let Some(block) = pool.allocate() else { break };
        sequence.block_table.push(block);
    }
    wanted.min(sequence.block_table.len() * BLOCK_SIZE - sequence.computed)
}

/// Takes a sequence's blocks, and with them what it has computed.
fn give_back(pool: &mut BlockPool, sequence: &mut Sequence) {
    pool.release(&sequence.block_table);
    sequence.block_table.clear();
    sequence.registered = 0;
    sequence.computed = 0;
}

/// Blocks that a sequence lacks to hold all of its tokens.
fn missing(sequence: &Sequence) -> usize {
    blocks_for(sequence.tokens().len()).saturating_sub(sequence.block_table.len())
}

/// Leading tokens that may come from the prefix cache: not the last one, whose logits are wanted, no prompt position
/// that is still to be scored, and none whose experts are still to be told.
fn reusable(sequence: &Sequence) -> usize {
    let unscored = sequence.unscored();
    let last = sequence.tokens().len() - 1;
    let scored = if unscored.is_empty() { last } else { unscored.start };
    last.min(scored).min(sequence.unrouted().unwrap_or(last))
}

fn register_full_blocks(pool: &mut BlockPool, scope: u64, sequence: &mut Sequence) {
    while (sequence.registered + 1) * BLOCK_SIZE <= sequence.computed {
        let at = sequence.registered;
        let Some(tokens) = block_tokens(sequence, at) else { break };
        let parent =
            at.checked_sub(1).map_or(Parent::Root(scope), |before| Parent::Block(sequence.block_table[before]));
        sequence.block_table[at] = pool.register(parent, tokens, sequence.block_table[at]);
        sequence.registered += 1;
    }
}

fn block_tokens(sequence: &Sequence, at: usize) -> Option<BlockTokens> {
    sequence.tokens().get(at * BLOCK_SIZE..)?.first_chunk().copied()
}
