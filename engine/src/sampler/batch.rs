//! The rows of a step, on all threads.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use super::{SampleError, Sampled, Sampler};
use crate::{compute::Compute, request::TokenLogprobs, sequence::Sequence};

/// Logits for a thread to be worth its wake-up.
const LOGITS_PER_THREAD: usize = 16_384;

/// A row of logits to choose a token from.
#[derive(Debug, Clone, Copy)]
pub struct SampleRow<'a> {
    /// `[vocab]`
    pub logits: &'a [f32],
    /// The sequence that the token continues.
    pub sequence: &'a Sequence,
}

/// A row of logits to score a known token by.
#[derive(Debug, Clone, Copy)]
pub struct ScoreRow<'a> {
    /// `[vocab]`
    pub logits: &'a [f32],
    /// The token.
    pub token: u32,
    /// How many of the most likely tokens to report beside it.
    pub top: u32,
}

/// Chooses the tokens of a step's rows on the pool. Results come in the order of the rows, and none depends on the rows
/// beside it or on the number of threads. It holds a [`Sampler`] a thread.
pub struct BatchSampler {
    compute: Compute,
    samplers: Vec<Mutex<Sampler>>,
}

impl BatchSampler {
    /// A sampler on the threads of `compute`.
    #[must_use]
    pub fn new(compute: Compute) -> Self {
        let samplers = (0..compute.pool.threads()).map(|_| Mutex::new(Sampler::new(compute.isa))).collect();
        Self { compute, samplers }
    }

    /// [`Sampler::sample`] of each row.
    pub fn sample(&self, rows: &[SampleRow<'_>]) -> Vec<Result<Sampled, SampleError>> {
        let logits = rows.iter().map(|row| row.logits.len()).sum();
        self.each(rows, logits, |sampler, row| sampler.sample(row.logits, row.sequence))
    }

    /// [`Sampler::score`] of each row.
    pub fn score(&self, rows: &[ScoreRow<'_>]) -> Vec<Result<TokenLogprobs, SampleError>> {
        let logits = rows.iter().map(|row| row.logits.len()).sum();
        self.each(rows, logits, |sampler, row| sampler.score(row.logits, row.token, row.top))
    }

    /// What `work` makes of each row. Threads take the next row as they get free; a panic is its own row's error.
    fn each<R: Sync, T: Send>(
        &self,
        rows: &[R],
        logits: usize,
        work: impl Fn(&mut Sampler, &R) -> Result<T, SampleError> + Sync,
    ) -> Vec<Result<T, SampleError>> {
        let threads = self.samplers.len().min(rows.len()).min(logits.div_ceil(LOGITS_PER_THREAD).max(1));
        let next = AtomicUsize::new(0);
        let results = Mutex::new(Vec::with_capacity(rows.len()));
        self.compute.pool.run(threads, |thread| {
            let mut sampler = self.samplers[thread].lock().unwrap_or_else(PoisonError::into_inner);
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(row) = rows.get(index) else { return };
                // What a panic leaves half done in the working memory is written anew before it is read.
                let outcome = catch_unwind(AssertUnwindSafe(|| work(&mut sampler, row)));
                let result = outcome.unwrap_or(Err(SampleError::Panicked));
                results.lock().unwrap_or_else(PoisonError::into_inner).push((index, result));
            }
        });
        let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
        results.sort_unstable_by_key(|(index, _)| *index);
        results.into_iter().map(|(_, result)| result).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use cadre_kernels::{isa::Isa, pool::Pool};

    use super::*;
    use crate::{
        request::{Priority, Request, SamplingParams, StopParams},
        sequence::{RequestId, SequenceId},
    };

    fn batch_sampler(threads: usize) -> BatchSampler {
        BatchSampler::new(Compute { pool: Arc::new(Pool::new(threads)), isa: Isa::Portable })
    }

    #[test]
    fn a_row_s_panic_or_error_is_its_own() {
        for threads in [1, 3] {
            let sampler = batch_sampler(threads);
            let rows: Vec<u32> = (0..50).collect();
            let results = sampler.each(&rows, usize::MAX, |_, &row| match row {
                7 | 30 => std::panic::resume_unwind(Box::new("a bug")),
                9 => Err(SampleError::NothingAllowed { vocab_size: 3 }),
                row => Ok(row * 2),
            });
            let expected = rows.iter().map(|&row| match row {
                7 | 30 => Err(SampleError::Panicked),
                9 => Err(SampleError::NothingAllowed { vocab_size: 3 }),
                row => Ok(row * 2),
            });
            assert_eq!(results, expected.collect::<Vec<_>>(), "{threads} threads");
        }
    }

    fn logits() -> Vec<f32> {
        (0..60 * 5000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 8) as f32 * 1e-6).collect()
    }

    #[test]
    fn scores_are_the_same_for_any_number_of_threads() {
        let logits = logits();
        let rows = logits.chunks(5000).zip(0..);
        let rows = rows.map(|(logits, token)| ScoreRow { logits, token: token * 83, top: token % 4 });
        let rows: Vec<_> = rows.collect();
        let mut alone = Sampler::new(Isa::Portable);
        let expected: Vec<_> = rows.iter().map(|row| alone.score(row.logits, row.token, row.top)).collect();
        assert!(expected.iter().all(Result::is_ok));
        for threads in [1, 2, 5] {
            assert_eq!(batch_sampler(threads).score(&rows), expected, "{threads} threads");
        }
    }

    #[test]
    fn choices_are_the_same_for_any_number_of_threads() {
        let logits = logits();
        let sequences: Vec<_> = (0..60).map(sequence).collect();
        let rows = logits.chunks(5000).zip(&sequences).map(|(logits, sequence)| SampleRow { logits, sequence });
        let rows: Vec<_> = rows.collect();
        let mut alone = Sampler::new(Isa::Portable);
        let expected: Vec<_> = rows.iter().map(|row| alone.sample(row.logits, row.sequence)).collect();
        assert!(expected.iter().all(Result::is_ok));
        for threads in [1, 2, 5] {
            assert_eq!(batch_sampler(threads).sample(&rows), expected, "{threads} threads");
        }
    }

    /// Greedy and drawn, with filters and without.
    fn sequence(at: u32) -> Sequence {
        let sampling = SamplingParams {
            temperature: if at.is_multiple_of(3) { 0.0 } else { 2.0 },
            top_p: if at.is_multiple_of(2) { 1.0 } else { 0.8 },
            top_k: if at.is_multiple_of(5) { 20 } else { 0 },
            seed: u64::from(at),
            ..SamplingParams::default()
        };
        let stop = StopParams {
            max_tokens: 9,
            min_tokens: at % 2,
            eos_token_ids: vec![0],
            ignore_eos: false,
            stop_token_ids: Vec::new(),
        };
        let logprobs = at.is_multiple_of(4).then_some(3);
        let request = Request {
            prompt: vec![1],
            n: 1,
            sampling,
            stop,
            logprobs,
            scoring: None,
            routed_experts_from: None,
            adapter: None,
            priority: Priority::Interactive,
        };
        Sequence::new(
            SequenceId { request: RequestId { priority: Priority::Interactive, number: 1 }, choice: at },
            Arc::new(request),
        )
    }
}
