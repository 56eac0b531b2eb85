//! Tiers that block, on threads of their own.

use std::{
    collections::VecDeque,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use super::{ExpertId, Fetch, FetchError, Tier};

/// A [`Tier`] in its simplest form: one that reads an expert while its caller waits.
pub trait BlockingTier: Send + Sync {
    /// What it is called in messages.
    fn name(&self) -> &str;

    /// Fills the front of `out` with the expert's packed bytes, and says how many it read; the rest may be overwritten. Called from several threads
    /// at once. `out` begins at a multiple of 4 KiB in memory and has a multiple of 4 KiB bytes.
    ///
    /// # Errors
    /// When they can't be read.
    fn fetch(&self, id: ExpertId, out: &mut [u8]) -> Result<usize, FetchError>;
}

/// A [`BlockingTier`] on threads. They end after this is dropped, when they have done what they were given: nobody waits for
/// them, for one may be the last to let go of this.
pub struct Threads<T> {
    shared: Arc<Shared<T>>,
    count: usize,
}

struct Shared<T> {
    tier: T,
    state: Mutex<State>,
    /// Something is in the queue, or no more comes.
    given: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Fetch>,
    closed: bool,
}

impl<T: BlockingTier + 'static> Threads<T> {
    /// `tier` on `count` threads, or on fewer if the system has no more.
    ///
    /// # Errors
    /// When it has none.
    pub fn start(tier: T, count: usize) -> io::Result<Self> {
        let shared = Arc::new(Shared { tier, state: Mutex::default(), given: Condvar::new() });
        let mut threads = Self { shared, count: 0 };
        for index in 0..count.max(1) {
            let shared = Arc::clone(&threads.shared);
            match std::thread::Builder::new().name(format!("cadre-reader-{index}")).spawn(move || shared.serve()) {
                Ok(_) => threads.count += 1,
                Err(error) if index == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(threads)
    }
}

impl<T: BlockingTier> Tier for Threads<T> {
    fn name(&self) -> &str {
        self.shared.tier.name()
    }

    fn depth(&self) -> usize {
        self.count
    }

    fn fetch(&self, fetch: Fetch) {
        self.shared.lock().queue.push_back(fetch);
        self.shared.given.notify_one();
    }
}

impl<T> Drop for Threads<T> {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.given.notify_all();
    }
}

impl<T> Shared<T> {
    /// The lock; every change under it is whole before anything in it can panic.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: BlockingTier> Shared<T> {
    /// What a thread does.
    fn serve(&self) {
        while let Some(mut fetch) = self.next() {
            // A panic is one failed fetch, for it drops that; the thread goes on with the others.
            let _ = catch_unwind(AssertUnwindSafe(|| {
                let result = self.tier.fetch(fetch.id(), fetch.buffer());
                fetch.finish(result);
            }));
        }
    }

    /// What to do next; nothing if no more comes.
    fn next(&self) -> Option<Fetch> {
        let mut state = self.lock();
        loop {
            match state.queue.pop_front() {
                None if !state.closed => state = self.given.wait(state).unwrap_or_else(PoisonError::into_inner),
                next => return next,
            }
        }
    }
}
