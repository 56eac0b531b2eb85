//! The slots, what is to be fetched into them, and leases on them.

use std::{
    collections::VecDeque,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use cadre_kernels::{
    buffer::AllocError,
    slots::{SlotReader, Slots},
};

use super::{
    ExpertId, Fetch, FetchError, Tier,
    cache::{Lane, SlotCache},
};

/// A model's experts within a fixed number of slots in memory, the rest in a [`Tier`]. Clones are the same store.
#[derive(Clone)]
pub struct ExpertStore {
    shared: Arc<Shared>,
}

/// What a store has done since it began.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StoreCounters {
    /// Uses of experts that lay in a slot, counted once a step and layer.
    pub hits: u64,
    /// Uses of experts that had to be fetched.
    pub misses: u64,
    /// Experts that made room for others.
    pub evictions: u64,
    /// Bytes fetched.
    pub fetched_bytes: u64,
    /// Time that computing waited for them.
    pub stalled: Duration,
}

impl StoreCounters {
    /// Uses that found their expert in memory, as a part of all; 1 if there were none.
    #[must_use]
    pub fn hit_rate(&self) -> f64 {
        let uses = self.hits + self.misses;
        if uses == 0 { 1.0 } else { self.hits as f64 / uses as f64 }
    }
}

impl fmt::Display for StoreCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "experts: {:.1} % of {} uses were in memory, {:.2} GB were read, computing waited {:.2} s for them",
            100.0 * self.hit_rate(),
            self.hits + self.misses,
            self.fetched_bytes as f64 / 1e9,
            self.stalled.as_secs_f64()
        )
    }
}

struct Shared {
    tier: Box<dyn Tier>,
    slots: Arc<Slots>,
    state: Mutex<State>,
    /// A slot is no longer being filled.
    landed: Condvar,
}

struct State {
    cache: SlotCache,
    /// What each slot is good for.
    contents: Vec<Content>,
    /// Misses that the tier has not been given yet.
    queue: VecDeque<(ExpertId, usize)>,
    /// Those that it works on.
    fetching: usize,
    /// Whether a thread is giving it some.
    giving: bool,
    fetched_bytes: u64,
    stalled: Duration,
}

#[derive(Clone)]
enum Content {
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
            contents: vec![Content::Ready; slots],
            queue: VecDeque::new(),
            fetching: 0,
            giving: false,
            fetched_bytes: 0,
            stalled: Duration::ZERO,
        });
        Ok(Self { shared: Arc::new(Shared { tier, slots: memory, state, landed: Condvar::new() }) })
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
            evictions: counters.evictions,
            fetched_bytes: state.fetched_bytes,
            stalled: state.stalled,
        }
    }

    /// Takes as many of `experts` of `layer`, from the first on, as there are slots that nobody holds, and begins to fetch
    /// those that are not there. While a lease lives, its experts stay. At least one is taken if no other lease lives.
    #[must_use]
    pub fn lease(&self, layer: usize, experts: &[usize], lane: Lane) -> Lease<'_> {
        let mut state = self.shared.lock();
        let mut held = Vec::with_capacity(experts.len());
        for &expert in experts {
            let id = ExpertId { layer: layer as u32, expert: expert as u32 };
            let Some(acquired) = state.cache.acquire(id, lane) else { break };
            if !acquired.hit {
                state.contents[acquired.slot] = Content::Coming;
                state.queue.push_back((id, acquired.slot));
            }
            held.push(Held { slot: acquired.slot, given: false });
        }
        self.shared.give(state);
        Lease { shared: &self.shared, held }
    }
}

impl Shared {
    /// The lock; every change under it is whole before anything in it can panic.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the tier what waits in the queue, as much as it works on at once. One thread does it at a time: the others leave
    /// it to that one, and a tier that finishes at once doesn't come back here from within.
    fn give<'a>(self: &'a Arc<Self>, mut state: MutexGuard<'a, State>) {
        if state.giving {
            return;
        }
        state.giving = true;
        while state.fetching < self.tier.depth() {
            let Some((id, slot)) = state.queue.pop_front() else { break };
            state.fetching += 1;
            drop(state);
            let shared = Arc::clone(self);
            let arrived = move |result| shared.arrived(slot, result);
            let fetch = Fetch::new(id, self.tier.name(), self.slots.write(slot), arrived);
            // After a panic the fetch is dropped, and so has failed.
            let _ = catch_unwind(AssertUnwindSafe(|| self.tier.fetch(fetch)));
            state = self.lock();
        }
        state.giving = false;
    }

    /// A fetch into `slot` has ended.
    fn arrived(self: &Arc<Self>, slot: usize, result: Result<usize, FetchError>) {
        let mut state = self.lock();
        state.fetching -= 1;
        state.contents[slot] = match result {
            Ok(bytes) => {
                state.fetched_bytes += bytes as u64;
                Content::Ready
            }
            Err(error) => Content::Failed(error),
        };
        self.landed.notify_all();
        self.give(state);
    }
}

/// Experts of one layer that stay in memory, or are on their way there, while this lives.
pub struct Lease<'a> {
    shared: &'a Shared,
    held: Vec<Held>,
}

struct Held {
    slot: usize,
    /// Whether [`Lease::landed`] has named it.
    given: bool,
}

impl Lease<'_> {
    /// How many were taken.
    #[must_use]
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether none was.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// The experts, by their place in the lease, that are there and were not named before; waits until there is one. None:
    /// all have been named.
    ///
    /// # Errors
    /// When one of them can't be fetched.
    pub fn landed(&mut self) -> Result<Vec<usize>, FetchError> {
        let mut state = self.shared.lock();
        let mut waited_since = None;
        loop {
            let mut landed = Vec::new();
            for (index, held) in self.held.iter_mut().enumerate().filter(|(_, held)| !held.given) {
                match &state.contents[held.slot] {
                    Content::Coming => {}
                    Content::Failed(error) => return Err(error.clone()),
                    Content::Ready => {
                        held.given = true;
                        landed.push(index);
                    }
                }
            }
            if !landed.is_empty() || self.held.iter().all(|held| held.given) {
                state.stalled += waited_since.map_or(Duration::ZERO, |since: Instant| since.elapsed());
                return Ok(landed);
            }
            waited_since.get_or_insert_with(Instant::now);
            state = self.shared.landed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The packed bytes of the expert at this place in the lease, and what its slot holds after them; waits while they
    /// are being fetched.
    ///
    /// # Panics
    /// When there is no such place.
    #[must_use]
    pub fn bytes(&self, index: usize) -> SlotReader<'_> {
        self.shared.slots.read(self.held[index].slot)
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        for Held { slot, .. } in &self.held {
            // A slot that is being filled may not become another expert's.
            while matches!(state.contents[*slot], Content::Coming) {
                state = self.shared.landed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if matches!(state.contents[*slot], Content::Failed(_)) {
                state.cache.discard(*slot);
            }
            state.cache.release(*slot);
        }
    }
}
