//! What a store has done, in numbers: for `/metrics`, `cadre bench` and the line at the end of `generate`.

use std::{fmt, time::Duration};

use super::cache::LayerCounters;

/// The upper ends, in seconds, of the ranges that [`StoreCounters::fetch_seconds`] counts; one more has no end.
pub const FETCH_SECONDS: [f64; 15] =
    [1e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 7.5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2.5e-1, 5e-1, 1.0];

/// The upper ends of the ranges that [`StoreCounters::active_per_step`] counts; one more has no end.
pub const ACTIVE_PER_STEP: [f64; 15] =
    [8.0, 16.0, 32.0, 64.0, 128.0, 192.0, 256.0, 384.0, 512.0, 768.0, 1024.0, 1536.0, 2048.0, 4096.0, 8192.0];

const BUCKETS: usize = 16;

/// What a store has done since it began, or between two moments.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StoreCounters {
    /// Uses of experts by layer, counted once a step: those that found them in a slot, and those that fetched them.
    pub layers: Vec<LayerCounters>,
    /// Experts that made room for others.
    pub evictions: u64,
    /// Misses whose expert was being read, or had been, before it was wanted.
    pub ahead_used: u64,
    /// Bytes of the slots of experts that were read ahead for nothing.
    pub ahead_wasted_bytes: u64,
    /// Bytes fetched.
    pub fetched_bytes: u64,
    /// How long each fetch took, in seconds, from when it was begun.
    pub fetch_seconds: Histogram,
    /// How many different experts each step used, all layers together.
    pub active_per_step: Histogram,
    /// Time that computing waited for them.
    pub stalled: Duration,
}

impl StoreCounters {
    /// Uses of experts that lay in a slot.
    #[must_use]
    pub fn hits(&self) -> u64 {
        self.layers.iter().map(|layer| layer.hits).sum()
    }

    /// Uses of experts that had to be fetched.
    #[must_use]
    pub fn misses(&self) -> u64 {
        self.layers.iter().map(|layer| layer.misses).sum()
    }

    /// Uses that found their expert in memory, as a part of all; 1 if there were none.
    #[must_use]
    pub fn hit_rate(&self) -> f64 {
        rate(self.hits(), self.misses())
    }

    /// The same of each layer.
    pub fn layer_hit_rates(&self) -> impl Iterator<Item = f64> {
        self.layers.iter().map(|layer| rate(layer.hits, layer.misses))
    }

    /// What was done since `earlier`, a moment of the same store.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let before = |layer: usize| earlier.layers.get(layer).copied().unwrap_or_default();
        let layers = self.layers.iter().enumerate().map(|(index, layer)| LayerCounters {
            hits: layer.hits - before(index).hits,
            misses: layer.misses - before(index).misses,
        });
        Self {
            layers: layers.collect(),
            evictions: self.evictions - earlier.evictions,
            ahead_used: self.ahead_used - earlier.ahead_used,
            ahead_wasted_bytes: self.ahead_wasted_bytes - earlier.ahead_wasted_bytes,
            fetched_bytes: self.fetched_bytes - earlier.fetched_bytes,
            fetch_seconds: self.fetch_seconds.since(&earlier.fetch_seconds),
            active_per_step: self.active_per_step.since(&earlier.active_per_step),
            stalled: self.stalled.saturating_sub(earlier.stalled),
        }
    }
}

fn rate(hits: u64, misses: u64) -> f64 {
    let uses = hits + misses;
    if uses == 0 { 1.0 } else { hits as f64 / uses as f64 }
}

impl fmt::Display for StoreCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "experts: {:.1} % of {} uses were in memory", 100.0 * self.hit_rate(), self.hits() + self.misses())?;
        let (least, most) = self.layer_hit_rates().fold((1.0, 0.0), |(a, b), rate| (rate.min(a), rate.max(b)));
        if self.layers.len() > 1 {
            write!(f, " (by layer {:.0} to {:.0} %)", 100.0 * least, 100.0 * most)?;
        }
        write!(
            f,
            ", {:.0} different ones a step, {} made room, {:.2} GB were read in {:.1} ms each, computing waited {:.2} s \
             for them",
            self.active_per_step.mean(),
            self.evictions,
            self.fetched_bytes as f64 / 1e9,
            1e3 * self.fetch_seconds.mean(),
            self.stalled.as_secs_f64()
        )
    }
}

/// How many values fell into each of some ranges, and what they add up to there.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Histogram {
    buckets: [Bucket; BUCKETS],
}

/// The values of one range.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Bucket {
    /// How many.
    pub count: u64,
    /// Their sum.
    pub sum: f64,
}

impl Histogram {
    /// Counts `value` in the first range whose end in `ends` it does not exceed.
    pub fn record(&mut self, value: f64, ends: &[f64; BUCKETS - 1]) {
        let bucket = &mut self.buckets[ends.iter().position(|end| value <= *end).unwrap_or(ends.len())];
        bucket.count += 1;
        bucket.sum += value;
    }

    /// The ranges, in ascending order.
    #[must_use]
    pub fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }

    /// How many values there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.count).sum()
    }

    /// Their mean; 0 if there are none.
    #[must_use]
    pub fn mean(&self) -> f64 {
        let sum: f64 = self.buckets.iter().map(|bucket| bucket.sum).sum();
        sum / self.count().max(1) as f64
    }

    /// The values since `earlier`, a moment of the same histogram.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut buckets = self.buckets;
        for (bucket, before) in buckets.iter_mut().zip(&earlier.buckets) {
            bucket.count -= before.count;
            bucket.sum -= before.sum;
        }
        Self { buckets }
    }
}

/// Counts what the cache's books don't know. No locks: the store has one.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) fetch_seconds: Histogram,
    pub(super) active_per_step: Histogram,
    /// Different experts of the step that is under way.
    active: usize,
}

impl Tally {
    /// An expert was fetched.
    pub(super) fn fetched(&mut self, took: Duration) {
        self.fetch_seconds.record(took.as_secs_f64(), &FETCH_SECONDS);
    }

    /// A step uses so many different experts of `layer`, one of `layers`. It goes through the layers in order, and may
    /// fail before the last.
    pub(super) fn uses(&mut self, layer: usize, layers: usize, experts: usize) {
        if layer == 0 {
            self.active = 0;
        }
        self.active += experts;
        if layer + 1 == layers {
            self.active_per_step.record(self.active as f64, &ACTIVE_PER_STEP);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_counted_in_the_range_that_ends_with_it() {
        let mut histogram = Histogram::default();
        for value in [1e-5, 1e-4, 1.1e-4, 0.8, 7.0] {
            histogram.record(value, &FETCH_SECONDS);
        }
        let counts: Vec<u64> = histogram.buckets().iter().map(|bucket| bucket.count).collect();
        assert_eq!(counts, [2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]);
        assert_eq!(histogram.buckets()[15], Bucket { count: 1, sum: 7.0 });
        assert!(FETCH_SECONDS.is_sorted() && ACTIVE_PER_STEP.is_sorted());
    }

    #[test]
    fn a_step_that_failed_is_not_counted_and_does_not_add_to_the_next() {
        let mut tally = Tally::default();
        tally.uses(0, 3, 5);
        tally.uses(1, 3, 5);
        for layer in 0..3 {
            tally.uses(layer, 3, 4);
        }
        assert_eq!((tally.active_per_step.count(), tally.active_per_step.mean()), (1, 12.0));
    }

    #[test]
    fn what_was_done_between_two_moments() {
        let layer = |hits, misses| LayerCounters { hits, misses };
        let mut tally = Tally::default();
        tally.fetched(Duration::from_millis(4));
        let before = StoreCounters {
            layers: vec![layer(1, 2)],
            fetched_bytes: 7,
            fetch_seconds: tally.fetch_seconds,
            stalled: Duration::from_secs(1),
            ..StoreCounters::default()
        };
        tally.fetched(Duration::from_millis(8));
        let after = StoreCounters {
            layers: vec![layer(4, 3)],
            evictions: 2,
            fetched_bytes: 17,
            fetch_seconds: tally.fetch_seconds,
            stalled: Duration::from_secs(3),
            ..StoreCounters::default()
        };
        let done = after.since(&before);
        assert_eq!((done.hits(), done.misses(), done.hit_rate(), done.evictions), (3, 1, 0.75, 2));
        assert_eq!((done.layers, done.fetched_bytes, done.stalled), (vec![layer(3, 1)], 10, Duration::from_secs(2)));
        assert_eq!(done.fetch_seconds.count(), 1);
        assert!((done.fetch_seconds.mean() - 0.008).abs() < 1e-9);
    }

    #[test]
    fn a_store_without_uses_says_so_in_numbers() {
        let text = StoreCounters::default().to_string();
        assert!(text.contains("100.0 % of 0 uses") && !text.contains("NaN"), "{text}");
    }
}
