//! The persistent worker pool: workers spin briefly, then park, so that the gap between two kernels of a step costs
//! no wake-up and an idle server uses no CPU.

use std::{
    any::Any,
    hint::spin_loop,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

/// Spins before a waiter parks: about 20 microseconds, longer than the gap between two kernels of a decode step
/// and shorter than a scheduler's time slice, so that a busy neighbour is not starved by waiting.
const SPINS: u32 = 2_000;

/// A fixed set of threads that run the tasks of one job at a time. The caller of [`Pool::run`] is one of them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One job at a time; a second caller waits here.
    callers: Mutex<()>,
}

struct Shared {
    /// Grows by one with each job; workers watch it without taking the lock.
    epoch: AtomicU64,
    stop: AtomicBool,
    slot: Mutex<Slot>,
    job_posted: Condvar,
    worker_left: Condvar,
    /// Workers inside of the current job.
    inside: AtomicUsize,
}

/// The posted job, `None` between jobs. A worker that wakes too late finds `None` and never sees a dead job.
struct Slot {
    job: Option<*const Job<'static>>,
    panic: Option<Box<dyn Any + Send>>,
}

// SAFETY: the pointer is only followed by workers counted in `inside`, and `run` does not return before they left.
unsafe impl Send for Slot {}

struct Job<'a> {
    task: &'a (dyn Fn(usize) + Sync),
    tasks: usize,
    next: AtomicUsize,
}

impl Job<'_> {
    fn work(&self) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.tasks {
                return;
            }
            (self.task)(index);
        }
    }
}

impl Pool {
    /// A pool of `threads` threads, the caller of [`Pool::run`] included; at least one.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            epoch: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            slot: Mutex::new(Slot { job: None, panic: None }),
            job_posted: Condvar::new(),
            worker_left: Condvar::new(),
            inside: AtomicUsize::new(0),
        });
        let workers = (1..threads)
            .filter_map(|index| {
                let shared = Arc::clone(&shared);
                // A thread that cannot be had only costs speed: the others take its tasks.
                std::thread::Builder::new().name(format!("cadre-worker-{index}")).spawn(move || shared.serve()).ok()
            })
            .collect();
        Self { shared, workers, callers: Mutex::new(()) }
    }

    /// How many threads work on a job.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(0)`, …, `task(tasks - 1)`, each once, on all threads, in no fixed order, and returns when all are done.
    ///
    /// # Panics
    /// When a task panics: the panic goes on in the caller, after the other tasks have ended.
    pub fn run(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        if tasks <= 1 || self.workers.is_empty() {
            (0..tasks).for_each(task);
            return;
        }
        let _turn = lock(&self.callers);
        let job = Job { task: &task, tasks, next: AtomicUsize::new(0) };
        self.shared.post(&job);
        let own = catch_unwind(AssertUnwindSafe(|| job.work()));
        let theirs = self.shared.withdraw();
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        if let Some(panic) = theirs {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        {
            let _slot = lock(&self.shared.slot);
            self.shared.job_posted.notify_all();
        }
        for worker in self.workers.drain(..) {
            // A worker's panic was handed to the caller of its job.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn post(&self, job: &Job<'_>) {
        let mut slot = lock(&self.slot);
        // SAFETY: only the lifetime changes; `withdraw` removes the pointer, and waits for all who follow it,
        // before the job it points to ends.
        slot.job = Some(unsafe { std::mem::transmute::<*const Job<'_>, *const Job<'static>>(std::ptr::from_ref(job)) });
        self.epoch.fetch_add(1, Ordering::Release);
        drop(slot);
        self.job_posted.notify_all();
    }

    /// Takes the job back and waits until no worker is inside. Returns a worker's panic, if there was one.
    fn withdraw(&self) -> Option<Box<dyn Any + Send>> {
        lock(&self.slot).job = None;
        let mut spins = 0;
        while self.inside.load(Ordering::Acquire) > 0 && spins < SPINS {
            spins += 1;
            spin_loop();
        }
        let mut slot = lock(&self.slot);
        while self.inside.load(Ordering::Acquire) > 0 {
            slot = self.worker_left.wait(slot).unwrap_or_else(PoisonError::into_inner);
        }
        slot.panic.take()
    }

    fn serve(&self) {
        let mut seen = 0;
        while let Some(job) = self.next_job(&mut seen) {
            // SAFETY: `next_job` counted this worker in `inside`, so the caller of `run` waits for it.
            let outcome = catch_unwind(AssertUnwindSafe(|| unsafe { (*job).work() }));
            let mut slot = lock(&self.slot);
            if let Err(panic) = outcome {
                slot.panic = Some(panic);
            }
            self.inside.fetch_sub(1, Ordering::Release);
            drop(slot);
            self.worker_left.notify_one();
        }
    }

    /// Waits for a job newer than `seen` and enters it; `None` when the pool ends.
    fn next_job(&self, seen: &mut u64) -> Option<*const Job<'static>> {
        loop {
            let mut spins = 0;
            while self.epoch.load(Ordering::Acquire) == *seen && spins < SPINS {
                spins += 1;
                spin_loop();
            }
            let mut slot = lock(&self.slot);
            while self.epoch.load(Ordering::Acquire) == *seen && !self.stop.load(Ordering::Acquire) {
                slot = self.job_posted.wait(slot).unwrap_or_else(PoisonError::into_inner);
            }
            if self.stop.load(Ordering::Acquire) {
                return None;
            }
            *seen = self.epoch.load(Ordering::Acquire);
            if let Some(job) = slot.job {
                self.inside.fetch_add(1, Ordering::AcqRel);
                return Some(job);
            }
        }
    }
}

/// The lock; a panic elsewhere while it was held leaves nothing half-done in these structures.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads);
            for tasks in [0, 1, 2, 7, 1000] {
                let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, |index| {
                    counts[index].fetch_add(1, Ordering::Relaxed);
                });
                assert!(
                    counts.iter().all(|count| count.load(Ordering::Relaxed) == 1),
                    "{threads} threads, {tasks} tasks"
                );
            }
        }
    }

    #[test]
    fn jobs_follow_each_other_without_mixing() {
        let pool = Pool::new(3);
        for round in 0..20_000_usize {
            let sum = AtomicUsize::new(0);
            pool.run(4, |index| {
                sum.fetch_add(round + index, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 4 * round + 6);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            pool.run(8, |index| assert!(index != 5, "task five"));
        }));
        assert!(outcome.is_err());
        let done = AtomicUsize::new(0);
        pool.run(8, |_| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.into_inner(), 8);
    }

    #[test]
    fn callers_on_several_threads_take_turns() {
        let pool = Pool::new(2);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let done = AtomicUsize::new(0);
                        pool.run(3, |_| {
                            done.fetch_add(1, Ordering::Relaxed);
                        });
                        assert_eq!(done.into_inner(), 3);
                    }
                });
            }
        });
    }
}
