//! The slots, the threads that fill them, and leases on them.

use std::{
    collections::VecDeque,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use cadre_kernels::{
    buffer::AllocError,
    slots::{SlotReader, Slots},
};

use super::{
    ExpertId, FetchError, Tier,
    cache::{Lane, SlotCache},
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
    slots: Slots,
    state: Mutex<State>,
    /// Something is in the queue, or the store ends.
    wanted: Condvar,
    /// A slot is no longer being filled.
    landed: Condvar,
}

struct State {
    cache: SlotCache,
    /// What each slot is good for.
    contents: Vec<Content>,
    /// Misses that no reader has begun with.
    queue: VecDeque<(ExpertId, usize)>,
    fetched_bytes: u64,
    stalled: Duration,
    stop: bool,
}

#[derive(Clone)]
enum Content {
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
                contents: vec![Content::Ready; slots],
                queue: VecDeque::new(),
                fetched_bytes: 0,
                stalled: Duration::ZERO,
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
            evictions: counters.evictions,
            fetched_bytes: state.fetched_bytes,
            stalled: state.stalled,
        }
    }

    /// How often decode used each expert, aged, as `[layer][expert]`: what [`seed`](Self::seed) takes at the next start.
    #[must_use]
    pub fn profile(&self) -> Vec<Vec<u32>> {
        self.shared.lock().cache.profile()
    }

    /// Begins with the uses of an earlier run.
    ///
    /// # Errors
    /// If `profile` is of a model with other layers or numbers of experts.
    pub fn seed(&self, profile: &[Vec<u32>]) -> crate::Result<()> {
        self.shared.lock().cache.seed(profile)
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
                self.shared.wanted.notify_one();
            }
            held.push(Held { slot: acquired.slot, given: false });
        }
        Lease { shared: &self.shared, held }
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

impl Shared {
    /// The lock; every change under it is whole before anything in it can panic.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a reader does.
    fn serve(&self) {
        let mut state = self.lock();
        loop {
            if state.stop {
                return;
            }
            let Some((id, slot)) = state.queue.pop_front() else {
                state = self.wanted.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(state);
            // A panic in a tier is one failed fetch: nobody waits for ever.
            let fetched = catch_unwind(AssertUnwindSafe(|| self.tier.fetch(id, &mut self.slots.write(slot))));
            let fetched = fetched.unwrap_or_else(|_| {
                Err(FetchError { id, tier: self.tier.name().to_owned(), reason: "the reader panicked".to_owned() })
            });
            state = self.lock();
            state.contents[slot] = match fetched {
                Ok(bytes) => {
                    state.fetched_bytes += bytes as u64;
                    Content::Ready
                }
                Err(error) => Content::Failed(error),
            };
            self.landed.notify_all();
        }
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
