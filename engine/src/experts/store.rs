//! The slots, and what is to be fetched into them.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use cadre_kernels::{buffer::AllocError, slots::Slots};

use super::{
    ExpertId, Fetch, FetchError, Tier, Visit,
    cache::{Lane, SlotCache},
    counters::{StoreCounters, Tally},
};

/// A model's experts within a fixed number of slots in memory, the rest in a [`Tier`]. Clones are the same store.
#[derive(Clone)]
pub struct ExpertStore {
    shared: Arc<Shared>,
    predicts: bool,
}

pub(super) struct Shared {
    tier: Box<dyn Tier>,
    pub(super) slots: Arc<Slots>,
    state: Mutex<State>,
    /// A slot is no longer being filled, or held.
    changed: Condvar,
}

pub(super) struct State {
    pub(super) cache: SlotCache,
    pub(super) experts_per_layer: Vec<usize>,
    /// What each slot is good for.
    pub(super) contents: Vec<Content>,
    /// What is wanted now and the tier has not been given yet.
    pub(super) wanted: VecDeque<Missing>,
    /// What will likely be wanted soon, for a tier that has nothing else to do.
    pub(super) ahead: VecDeque<(ExpertId, Lane)>,
    /// What slots that hold nothing of use are filled with, while nothing else is to be fetched.
    preload: VecDeque<ExpertId>,
    /// A layer, and which of its experts it will likely want, the likeliest first.
    pub(super) predicted: Option<(usize, Vec<usize>)>,
    /// How many the tier works on.
    fetching: usize,
    /// Whether a thread is giving it some.
    giving: bool,
    fetched_bytes: u64,
    pub(super) stalled: Duration,
    pub(super) tally: Tally,
}

/// An expert to be fetched into a slot.
#[derive(Clone, Copy)]
pub(super) struct Missing {
    pub(super) id: ExpertId,
    pub(super) slot: usize,
    /// Its slot is pinned until it has landed, whoever else pins it.
    pub(super) is_ahead: bool,
}

#[derive(Clone)]
pub(super) enum Content {
    /// Of the expert that the cache says, if it says one.
    Ready,
    /// The tier fills it, or will.
    Coming,
    /// The last one could not.
    Failed(FetchError),
}

impl ExpertStore {
    /// A store of `slots` slots (at least one) of `slot_bytes` bytes, a multiple of 4 KiB that holds any expert; layer `l` has
    /// `experts_per_layer[l]` of them.
    ///
    /// # Errors
    /// When memory can't be had.
    pub fn new(
        tier: Box<dyn Tier>,
        slots: usize,
        slot_bytes: usize,
        experts_per_layer: &[usize],
    ) -> Result<Self, AllocError> {
        let slots = slots.max(1);
        let memory = Arc::new(Slots::zeroed(slots, slot_bytes)?);
        if let Err(error) = memory.lock() {
            tracing::debug!(%error, "expert slots are not locked in memory: the system may swap them out");
        }
        let state = Mutex::new(State {
            cache: SlotCache::new(slots, experts_per_layer),
            experts_per_layer: experts_per_layer.to_vec(),
            contents: vec![Content::Ready; slots],
            wanted: VecDeque::new(),
            ahead: VecDeque::new(),
            preload: VecDeque::new(),
            predicted: None,
            fetching: 0,
            giving: false,
            fetched_bytes: 0,
            stalled: Duration::ZERO,
            tally: Tally::default(),
        });
        let shared = Shared { tier, slots: memory, state, changed: Condvar::new() };
        Ok(Self { shared: Arc::new(shared), predicts: false })
    }

    /// The same that wants to know which experts the next layer will likely use, or doesn't: then it reads those ahead
    /// that decode uses more often than not.
    #[must_use]
    pub fn predicting(self, predicts: bool) -> Self {
        Self { predicts, ..self }
    }

    /// Whether [`predict`](Self::predict) is of use.
    #[must_use]
    pub fn predicts(&self) -> bool {
        self.predicts
    }

    /// Experts that the layer after the next one to be visited will likely want in decode, the likeliest first: they are read
    /// while nothing else is.
    pub fn predict(&self, layer: usize, experts: Vec<usize>) {
        self.shared.lock().predicted = Some((layer, experts));
    }

    /// How many slots there are.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.shared.slots.count()
    }

    /// What it has done so far.
    #[must_use]
    pub fn counters(&self) -> StoreCounters {
        let state = self.shared.lock();
        let counters = state.cache.counters();
        StoreCounters {
            layers: counters.layers.clone(),
            evictions: counters.evictions,
            ahead_used: counters.ahead_used,
            ahead_wasted_bytes: counters.ahead_wasted * self.shared.slots.slot_bytes() as u64,
            fetched_bytes: state.fetched_bytes,
            fetch_seconds: state.tally.fetch_seconds,
            active_per_step: state.tally.active_per_step,
            stalled: state.stalled,
        }
    }

    /// How often decode used each expert, aged, as `[layer][expert]`: what [`seed`](Self::seed) takes at the next start.
    #[must_use]
    pub fn profile(&self) -> Vec<Vec<u32>> {
        self.shared.lock().cache.profile()
    }

    /// Begins with the uses of an earlier run: what was used most is fetched into the free slots, while nothing else is to
    /// be fetched, and what prompts have left there makes room for it.
    ///
    /// # Errors
    /// If `profile` is of a model with other layers or numbers of experts.
    pub fn seed(&self, profile: &[Vec<u32>]) -> crate::Result<()> {
        let mut state = self.shared.lock();
        state.cache.seed(profile)?;
        state.preload = state.cache.most_used(self.slots()).into();
        drop(self.shared.give(state));
        Ok(())
    }

    /// A step comes to `layer` and wants these experts of it, in ascending order: takes as many as there is room for, those
    /// in memory first, and begins to fetch the others.
    #[must_use]
    pub fn visit<'a>(&'a self, layer: usize, experts: &'a [usize], lane: Lane) -> Visit<'a> {
        Visit::new(&self.shared, layer, experts, lane)
    }
}

impl State {
    /// What the tier should fetch next.
    fn next(&mut self) -> Option<Missing> {
        if let Some(missing) = self.wanted.pop_front() {
            return Some(missing);
        }
        while let Some((id, lane)) = self.ahead.pop_front() {
            if let Some(slot) = self.cache.take_ahead(id, lane) {
                return Some(self.coming(id, slot));
            }
        }
        while let Some(&id) = self.preload.front() {
            let slot = self.cache.preload(id);
            if slot.is_none() && !self.cache.contains(id) {
                // There is no room now; a scan may leave some.
                break;
            }
            self.preload.pop_front();
            if let Some(slot) = slot {
                return Some(self.coming(id, slot));
            }
        }
        None
    }

    /// One that nobody waits for.
    fn coming(&mut self, id: ExpertId, slot: usize) -> Missing {
        self.contents[slot] = Content::Coming;
        Missing { id, slot, is_ahead: true }
    }

    /// A visit holds a slot no longer, which is not being filled.
    pub(super) fn let_go(&mut self, slot: usize) {
        if matches!(self.contents[slot], Content::Failed(_)) {
            self.cache.discard(slot);
        }
        self.cache.release(slot);
    }

    fn land(&mut self, Missing { slot, is_ahead, .. }: Missing, result: Result<usize, FetchError>) {
        self.fetching -= 1;
        match result {
            Ok(bytes) => {
                self.fetched_bytes += bytes as u64;
                self.contents[slot] = Content::Ready;
            }
            Err(error) => {
                self.contents[slot] = Content::Failed(error);
                if is_ahead {
                    self.cache.discard(slot);
                }
            }
        }
        if is_ahead {
            self.cache.release(slot);
        }
    }
}

impl Shared {
    /// The lock; every change under it is whole before anything in it can panic.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a slot is no longer being filled, or held.
    pub(super) fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells those who wait that slots are no longer held.
    pub(super) fn let_go(&self) {
        self.changed.notify_all();
    }

    /// Gives the tier what it is to fetch, as much as it works on at once. One thread does it at a time: the others leave
    /// it to that one, and a tier that finishes at once doesn't come back here from within.
    pub(super) fn give<'a>(self: &'a Arc<Self>, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        if state.giving {
            return state;
        }
        state.giving = true;
        while state.fetching < self.tier.depth() {
            let Some(missing) = state.next() else { break };
            state.fetching += 1;
            drop(state);
            // Nothing is told of a store that is gone, and nothing more is fetched for it.
            let shared = Arc::downgrade(self);
            let begun = Instant::now();
            let arrived = move |result| {
                if let Some(shared) = shared.upgrade() {
                    shared.arrived(missing, begun, result);
                }
            };
            let fetch = Fetch::new(missing.id, self.tier.name(), self.slots.write(missing.slot), arrived);
            // After a panic the fetch is dropped, and so has failed.
            let _ = catch_unwind(AssertUnwindSafe(|| self.tier.fetch(fetch)));
            state = self.lock();
        }
        state.giving = false;
        state
    }

    /// A fetch has ended, which was `begun` then.
    fn arrived(self: &Arc<Self>, missing: Missing, begun: Instant, result: Result<usize, FetchError>) {
        let mut state = self.lock();
        if result.is_ok() {
            state.tally.fetched(begun.elapsed());
        }
        state.land(missing, result);
        self.changed.notify_all();
        drop(self.give(state));
    }
}
