//! Passes over a row of logits, a block at a time: plain arithmetic, compiled for AVX-512 and for every machine, with
//! the same bits.

use crate::{
    activation::{self, LANES},
    isa::Isa,
    norm::tree,
};

/// Logits of a block: few enough that a block's weights stay in the first cache, many enough that the blocks of a
/// vocabulary are few.
pub const BLOCK: usize = 512;

/// How a logit becomes a weight: `e^((logit - highest) / temperature)`.
#[derive(Debug, Clone, Copy)]
pub struct Weighing {
    /// The logit whose weight is 1.
    pub highest: f32,
    /// Above 0.
    pub temperature: f32,
    /// Lighter logits weigh 0.
    pub least_weight: f32,
}

/// Buckets of [`buckets`].
pub const BUCKETS: usize = 2048;

/// [`BUCKETS`], and the places behind them.
pub const PLACES: usize = BUCKETS + LANES;

/// How a logit's distance from the highest one becomes a bucket.
#[derive(Debug, Clone, Copy)]
pub struct Distance {
    /// No logit is above it.
    pub highest: f32,
    /// Buckets for a distance of 1; not negative.
    pub scale: f32,
}

/// The highest logit of each block of `row`; `peaks` is `[row.len() / BLOCK]`, rounded up. Says whether all logits are
/// finite; NaN is never the highest.
///
/// # Panics
/// When the sizes don't match.
pub fn block_peaks(isa: Isa, row: &[f32], peaks: &mut [f32]) -> bool {
    assert_eq!(peaks.len(), row.len().div_ceil(BLOCK), "peaks of {} logits", row.len());
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the tier is only chosen on a machine that has it.
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => unsafe { avx512::block_peaks(row, peaks) },
        _ => block_peaks_of(row, peaks),
    }
}

/// The weights of `logits` into `weights`, of the same length; 0 for a logit below `bar`. Returns their sum:
/// sixteen running sums in f64, added in turn.
///
/// # Panics
/// When the sizes don't match.
pub fn weigh(isa: Isa, weighing: Weighing, bar: f32, logits: &[f32], weights: &mut [f32]) -> f64 {
    assert_eq!(logits.len(), weights.len(), "logits and weights");
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the tier is only chosen on a machine that has it.
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => unsafe { avx512::weigh(weighing, bar, logits, weights) },
        _ => weigh_all(weighing, bar, logits, weights),
    }
}

/// Each logit's bucket, by how far it is below the highest one: the distance times `scale`, rounded, at most the last
/// bucket. A higher logit is never in a later bucket, since each of the operations is monotone. What is below `bar` goes to
/// one of the [`LANES`] places behind the buckets: in the same one, additions to it would wait for each other.
///
/// # Panics
/// When the sizes don't match.
pub fn buckets(isa: Isa, distance: Distance, bar: f32, logits: &[f32], buckets: &mut [u32]) {
    assert_eq!(logits.len(), buckets.len(), "logits and buckets");
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the tier is only chosen on a machine that has it.
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => unsafe { avx512::buckets(distance, bar, logits, buckets) },
        _ => buckets_of(distance, bar, logits, buckets),
    }
}

#[inline(always)]
fn buckets_of(distance: Distance, bar: f32, logits: &[f32], buckets: &mut [u32]) {
    /// Adding 2^23 rounds to an integer, which then lies in the low bits.
    const ROUND: f32 = 8_388_608.0;
    const LAST: f32 = (BUCKETS - 1) as f32;
    for (lane, (bucket, &logit)) in buckets.iter_mut().zip(logits).enumerate() {
        let scaled = (distance.highest - logit) * distance.scale;
        let scaled = if scaled < LAST { scaled } else { LAST };
        let kept = (scaled + ROUND).to_bits() - ROUND.to_bits();
        *bucket = if logit >= bar { kept } else { (BUCKETS + lane % LANES) as u32 };
    }
}

#[inline(always)]
fn block_peaks_of(row: &[f32], peaks: &mut [f32]) -> bool {
    // Without their sign, the bits of floats ascend with them; infinity and NaN come last.
    let mut largest = [0_i32; LANES];
    for (block, peak) in row.chunks(BLOCK).zip(peaks) {
        let mut highest = [f32::NEG_INFINITY; LANES];
        let mut take = |logits: &[f32]| {
            for ((highest, largest), &logit) in highest.iter_mut().zip(&mut largest).zip(logits) {
                *highest = if logit > *highest { logit } else { *highest };
                *largest = (*largest).max((logit.to_bits() & 0x7fff_ffff) as i32);
            }
        };
        let (chunks, tail) = block.as_chunks::<LANES>();
        chunks.iter().for_each(|chunk| take(chunk));
        take(tail);
        *peak = tree(highest, f32::max);
    }
    largest.iter().all(|&bits| bits < f32::INFINITY.to_bits() as i32)
}

#[inline(always)]
fn weigh_all(weighing: Weighing, bar: f32, logits: &[f32], weights: &mut [f32]) -> f64 {
    let mut sums = [0.0_f64; LANES];
    let (chunks, tail) = logits.as_chunks::<LANES>();
    let (targets, target_tail) = weights.as_chunks_mut::<LANES>();
    for (chunk, target) in chunks.iter().zip(targets) {
        *target = weigh_lanes(weighing, bar, chunk, &mut sums);
    }
    if !tail.is_empty() {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        lanes[..tail.len()].copy_from_slice(tail);
        target_tail.copy_from_slice(&weigh_lanes(weighing, bar, &lanes, &mut sums)[..tail.len()]);
    }
    sums.iter().sum()
}

/// A function, not a closure: that was not inlined, so not compiled for the tier either (a draw from 152,000 logits took
/// 550 µs in place of 150, Zen 4).
#[inline(always)]
fn weigh_lanes(weighing: Weighing, bar: f32, logits: &[f32; LANES], sums: &mut [f64; LANES]) -> [f32; LANES] {
    let mut weights = [0.0; LANES];
    for (weight, logit) in weights.iter_mut().zip(logits) {
        *weight = (logit - weighing.highest) / weighing.temperature;
    }
    weights = activation::exp(weights);
    for ((weight, logit), sum) in weights.iter_mut().zip(logits).zip(sums) {
        // A weight that is not a number, of an infinite distance at an infinite temperature, is not kept.
        let keeps = (*weight >= weighing.least_weight) & (*logit >= bar);
        *weight = if keeps { *weight } else { 0.0 };
        *sum += f64::from(*weight);
    }
    weights
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{Distance, Weighing};

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) fn block_peaks(row: &[f32], peaks: &mut [f32]) -> bool {
        super::block_peaks_of(row, peaks)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) fn weigh(weighing: Weighing, bar: f32, logits: &[f32], weights: &mut [f32]) -> f64 {
        super::weigh_all(weighing, bar, logits, weights)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) fn buckets(distance: Distance, bar: f32, logits: &[f32], buckets: &mut [u32]) {
        super::buckets_of(distance, bar, logits, buckets);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{bits, values};

    const LENGTHS: [usize; 9] = [0, 1, 15, 16, 17, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 40];

    fn logits(len: usize) -> Vec<f32> {
        values(len, len as u64).into_iter().map(|value| value * 30.0).collect()
    }

    fn peaks(isa: Isa, row: &[f32]) -> (Vec<f32>, bool) {
        let mut peaks = vec![f32::NAN; row.len().div_ceil(BLOCK)];
        let finite = block_peaks(isa, row, &mut peaks);
        (peaks, finite)
    }

    #[test]
    fn peaks_are_the_highest_of_each_block() {
        for isa in Isa::available() {
            for len in LENGTHS {
                let row = logits(len);
                let expected = row.chunks(BLOCK).map(|block| block.iter().copied().fold(f32::NEG_INFINITY, f32::max));
                assert_eq!(peaks(isa, &row), (expected.collect(), true), "{isa}, {len} logits");
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_seen_wherever_it_is() {
        for isa in Isa::available() {
            for value in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for at in [0, 15, 16, BLOCK - 1, BLOCK, BLOCK + 20] {
                    let mut row = vec![-3.0; BLOCK + 21];
                    row[at] = value;
                    let (peaks, finite) = peaks(isa, &row);
                    assert!(!finite, "{isa}: {value} at {at}");
                    assert!(peaks.iter().all(|&peak| peak == -3.0 || peak == f32::INFINITY), "{peaks:?}");
                }
            }
        }
    }

    #[test]
    fn weights_follow_the_equation_with_the_same_bits_on_each_tier() {
        let weighing = Weighing { highest: 31.0, temperature: 2.5, least_weight: 1e-6 };
        for len in LENGTHS {
            let row = logits(len);
            let mut portable = None;
            for isa in Isa::available() {
                let mut weights = vec![f32::NAN; len];
                let sum = weigh(isa, weighing, -8.0, &row, &mut weights);
                for (&logit, &weight) in row.iter().zip(&weights) {
                    let exact = ((f64::from(logit) - 31.0) / 2.5).exp();
                    let expected = if logit < -8.0 || exact < 1e-6 { 0.0 } else { exact };
                    assert!((f64::from(weight) - expected).abs() <= 1e-5 * expected, "{weight} against {expected}");
                }
                let exact: f64 = weights.iter().map(|&weight| f64::from(weight)).sum();
                assert!((sum - exact).abs() <= 1e-12 * exact, "{sum} against {exact}");
                let found = (bits(&weights), sum.to_bits());
                assert_eq!(&found, portable.get_or_insert_with(|| found.clone()), "{isa}, {len} logits");
            }
        }
    }

    #[test]
    fn buckets_ascend_with_the_distance_on_each_tier() {
        let mut row = logits(3 * BLOCK + 40);
        row.extend([f32::MIN, f32::NEG_INFINITY, 30.0, -0.0]);
        row.sort_by(|a, b| b.total_cmp(a));
        for (scale, last) in [(0.0, 0), (1e-30, 0), (30.0, 900), (1e4, BUCKETS as u32 - 1), (f32::INFINITY, 2047)] {
            for isa in Isa::available() {
                let mut found = vec![u32::MAX; row.len()];
                buckets(isa, Distance { highest: 30.0, scale }, 0.0, &row, &mut found);
                let kept = row.iter().take_while(|logit| **logit >= 0.0).count();
                assert!(found[..kept].is_sorted(), "{isa}, {scale}");
                assert!(found[kept - 1].abs_diff(last) < 30, "{isa}, {scale}: {}", found[kept - 1]);
                assert!(found[kept..].iter().all(|&place| (BUCKETS..PLACES).contains(&(place as usize))));
            }
        }
    }

    #[test]
    fn no_weight_is_not_a_number() {
        let weighing = Weighing { highest: f32::MAX, temperature: f32::INFINITY, least_weight: 0.0 };
        let mut weights = [f32::NAN; 3];
        let sum = weigh(Isa::Portable, weighing, f32::NEG_INFINITY, &[f32::MIN, 0.0, f32::NEG_INFINITY], &mut weights);
        assert_eq!((weights, sum), ([0.0, 1.0, 0.0], 1.0));
    }
}
