//! The slots, and the threads that fill them.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use cadre_kernels::{buffer::AllocError, slots::Slots};

use super::{
    ExpertId, FetchError, Tier, Visit,
    cache::{Lane, SlotCache},
    counters::{StoreCounters, Tally},
};

/// Reads in flight: enough to keep a solid-state disk busy with records of some megabytes.
const READERS: usize = 4;

/// A model's experts within a fixed number of slots in memory, the rest in a [`Tier`]. Clones are the same store.
#[derive(Clone)]
pub struct ExpertStore {
    shared: Arc<Shared>,
    /// They end with the last clone.
    _readers: Arc<Readers>,
}

/// The threads that fetch.
struct Readers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

pub(super) struct Shared {
    tier: Box<dyn Tier>,
    pub(super) slots: Slots,
    state: Mutex<State>,
    /// Something is in the queue, or the store ends.
    pub(super) wanted: Condvar,
    /// A slot is no longer being filled.
    landed: Condvar,
}

pub(super) struct State {
    pub(super) cache: SlotCache,
    pub(super) experts_per_layer: Vec<usize>,
    /// What each slot is good for.
    pub(super) contents: Vec<Content>,
    /// What is wanted now and no reader has begun with.
    pub(super) wanted: VecDeque<Fetch>,
    /// What will likely be wanted soon, for readers that have nothing else to do.
    pub(super) ahead: VecDeque<Fetch>,
    fetched_bytes: u64,
    pub(super) stalled: Duration,
    pub(super) tally: Tally,
    stop: bool,
}

/// An expert to be read into a slot.
#[derive(Clone, Copy)]
pub(super) struct Fetch {
    pub(super) id: ExpertId,
    pub(super) slot: usize,
    /// Its slot is pinned until it has landed, whoever else pins it.
    pub(super) is_ahead: bool,
}

#[derive(Clone)]
pub(super) enum Content {
    /// Of the expert that the cache says, if it says one.
    Ready,
    /// A reader fills it, or will.
    Coming,
    /// The last one could not.
    Failed(FetchError),
}

impl ExpertStore {
    /// A store of `slots` slots (at least one) of `slot_bytes` bytes, a multiple of 4 KiB that holds any expert; layer `l` has
    /// `experts_per_layer[l]` of them.
    ///
    /// # Errors
    /// When memory, or a thread to read with, can't be had.
    pub fn new(
        tier: Box<dyn Tier>,
        slots: usize,
        slot_bytes: usize,
        experts_per_layer: &[usize],
    ) -> Result<Self, AllocError> {
        let slots = slots.max(1);
        let shared = Arc::new(Shared {
            tier,
            slots: Slots::zeroed(slots, slot_bytes)?,
            state: Mutex::new(State {
                cache: SlotCache::new(slots, experts_per_layer),
                experts_per_layer: experts_per_layer.to_vec(),
                contents: vec![Content::Ready; slots],
                wanted: VecDeque::new(),
                ahead: VecDeque::new(),
                fetched_bytes: 0,
                stalled: Duration::ZERO,
                tally: Tally::default(),
                stop: false,
            }),
            wanted: Condvar::new(),
            landed: Condvar::new(),
        });
        let mut threads = Vec::new();
        for index in 0..READERS {
            let shared = Arc::clone(&shared);
            let builder = std::thread::Builder::new().name(format!("cadre-reader-{index}"));
            match builder.spawn(move || shared.serve()) {
                Ok(thread) => threads.push(thread),
                // Fewer threads only cost speed.
                Err(error) if threads.is_empty() => {
                    return Err(AllocError { bytes: 0, reason: format!("no thread to read experts with: {error}") });
                }
                Err(_) => break,
            }
        }
        let readers = Readers { shared: Arc::clone(&shared), threads };
        Ok(Self { shared, _readers: Arc::new(readers) })
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
            hits: counters.hits(),
            misses: counters.misses(),
            layers: counters.layers.clone(),
            evictions: counters.evictions,
            ahead_used: counters.ahead_used,
            ahead_wasted: counters.ahead_wasted,
            fetched_bytes: state.fetched_bytes,
            fetch_seconds: state.tally.fetch_seconds,
            active_per_step: state.tally.active_per_step,
            stalled: state.stalled,
        }
    }

    /// A step comes to `layer` and wants these experts of it, in ascending order: takes as many as there is room for, those
    /// in memory first, and begins to fetch the others.
    #[must_use]
    pub fn visit<'a>(&'a self, layer: usize, experts: &'a [usize], lane: Lane) -> Visit<'a> {
        Visit::new(&self.shared, layer, experts, lane)
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.wanted.notify_all();
        for thread in self.threads.drain(..) {
            // One that panicked has nothing left to give back.
            let _ = thread.join();
        }
    }
}

impl State {
    /// A step has come to `layer` and wants these experts of it: what was to be read ahead is wanted now, or no longer.
    pub(super) fn settle_ahead(&mut self, layer: usize, experts: &[usize]) {
        for fetch in std::mem::take(&mut self.ahead) {
            if fetch.id.layer as usize == layer && experts.contains(&(fetch.id.expert as usize)) {
                self.wanted.push_back(fetch);
            } else {
                self.contents[fetch.slot] = Content::Ready;
                self.cache.discard(fetch.slot);
                self.cache.release(fetch.slot);
            }
        }
    }

    fn land(&mut self, Fetch { slot, is_ahead, .. }: Fetch, fetched: Result<usize, FetchError>) {
        match fetched {
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

    /// Waits until a slot is no longer being filled.
    pub(super) fn wait_for_landing<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.landed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// What a reader does.
    fn serve(&self) {
        let mut state = self.lock();
        loop {
            if state.stop {
                return;
            }
            let Some(fetch) = state.wanted.pop_front().or_else(|| state.ahead.pop_front()) else {
                state = self.wanted.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(state);
            let Fetch { id, slot, .. } = fetch;
            let begun = Instant::now();
            // A panic in a tier is one failed fetch: nobody waits for ever.
            let fetched = catch_unwind(AssertUnwindSafe(|| self.tier.fetch(id, &mut self.slots.write(slot))));
            let fetched = fetched.unwrap_or_else(|_| {
                Err(FetchError { id, tier: self.tier.name().to_owned(), reason: "the reader panicked".to_owned() })
            });
            state = self.lock();
            if fetched.is_ok() {
                state.tally.fetched(begun.elapsed());
            }
            state.land(fetch, fetched);
            self.landed.notify_all();
        }
    }
}
