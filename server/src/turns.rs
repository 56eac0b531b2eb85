//! Who has a turn, and the threads that give turns: fine-tuning jobs and batches each take one after the other from the storage,
//! until the server ends.

use std::{
    any::Any,
    fmt::Display,
    panic::{self, AssertUnwindSafe},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// How long a thread waits at first, and at most, where the storage has failed.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];

/// The turns of one kind of work.
#[derive(Default)]
pub struct Turns {
    state: Mutex<State>,
    /// There may be something to do.
    changed: Condvar,
}

/// What there is under the lock.
#[derive(Default)]
pub struct State {
    current: Option<Current>,
    /// The server ends.
    pub is_ending: bool,
}

struct Current {
    id: String,
    stop: Arc<AtomicBool>,
}

impl State {
    /// The id of what has its turn.
    pub fn current(&self) -> Option<&str> {
        self.current.as_ref().map(|current| current.id.as_str())
    }

    /// Lets `id` stop if it has its turn; whether it has.
    pub fn stop(&self, id: &str) -> bool {
        let current = self.current.as_ref().filter(|current| current.id == id);
        current.inspect(|current| current.stop.store(true, Ordering::Relaxed)).is_some()
    }
}

/// A turn: while it lives, what it is of is the current one.
pub struct Turn<'a> {
    turns: &'a Turns,
    /// It is to stop.
    pub stop: Arc<AtomicBool>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.turns.state().current = None;
    }
}

impl Turns {
    /// The state, for as long as nobody else may change it.
    pub fn state(&self) -> MutexGuard<'_, State> {
        // Nothing under the lock can leave it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The turn of `id`, which begins; `state` is this one's.
    pub fn begin(&self, state: &mut State, id: &str) -> Turn<'_> {
        let stop = Arc::new(AtomicBool::new(false));
        state.current = Some(Current { id: id.to_owned(), stop: stop.clone() });
        Turn { turns: self, stop }
    }

    /// There may be something to do.
    pub fn wake(&self) {
        // Who is about to wait has either seen what there is to do, or waits by now.
        let _state = self.state();
        self.changed.notify_all();
    }

    /// The server ends: what has its turn stops, and nothing follows.
    pub fn end(&self) {
        let mut state = self.state();
        state.is_ending = true;
        if let Some(current) = &state.current {
            current.stop.store(true, Ordering::Relaxed);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Does a `part` of one thing after the other until the server ends. `next` says of which; while there is none, it is asked
    /// again when somebody [wakes](Self::wake) this, or after `tick`, if that gives a time. After a failure, which is logged as
    /// `waits`, there is a pause.
    pub fn work<T, E: Display>(
        &self,
        waits: &str,
        next: impl Fn(&mut State) -> Result<Option<T>, E>,
        tick: impl Fn() -> Option<Duration>,
        part: impl Fn(T) -> Result<(), E>,
    ) {
        let mut pause = Duration::ZERO;
        while let Some(next) = self.wait(pause, &next, &tick) {
            pause = match next.and_then(&part) {
                Ok(()) => Duration::ZERO,
                Err(error) => {
                    let pause = longer(pause);
                    tracing::error!(error = format!("{error:#}"), seconds = pause.as_secs(), "{waits}");
                    pause
                }
            };
        }
    }

    /// What is next after a pause, or why it isn't known; `None` when the server ends.
    fn wait<T, E>(
        &self,
        pause: Duration,
        next: impl Fn(&mut State) -> Result<Option<T>, E>,
        tick: impl Fn() -> Option<Duration>,
    ) -> Option<Result<T, E>> {
        let paused = self.changed.wait_timeout_while(self.state(), pause, |state| !state.is_ending);
        let (mut state, _) = paused.unwrap_or_else(PoisonError::into_inner);
        loop {
            if state.is_ending {
                return None;
            }
            if let Some(found) = next(&mut state).transpose() {
                return Some(found);
            }
            state = match tick() {
                Some(tick) => self.changed.wait_timeout(state, tick).unwrap_or_else(PoisonError::into_inner).0,
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

/// What `part` gives, or what its panic said.
pub fn unless_panics<T>(part: impl FnOnce() -> T) -> Result<T, String> {
    panic::catch_unwind(AssertUnwindSafe(part)).map_err(|panic| said(&*panic).to_owned())
}

/// What a panic said.
fn said(panic: &(dyn Any + Send)) -> &str {
    let owned = panic.downcast_ref::<String>().map(String::as_str);
    owned.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("its log says why")
}

/// The pause after a failure that follows a pause of this length.
fn longer(pause: Duration) -> Duration {
    let [shortest, longest] = PAUSES;
    (2 * pause).clamp(shortest, longest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_minute() {
        let pauses: Vec<u64> = std::iter::successors(Some(Duration::ZERO), |pause| Some(longer(*pause)))
            .map(|pause| pause.as_secs())
            .take(9)
            .collect();
        assert_eq!(pauses, [0, 1, 2, 4, 8, 16, 32, 60, 60]);
    }
}
