//! The products of attention in AVX2: two registers hold one place of 16 keys, or one token of 16 places of values. What is
//! multiplied is f32, whatever is stored.

use std::{
    arch::x86_64::{
        __m256, _MM_HINT_T1, _mm_loadu_si128, _mm_prefetch, _mm256_and_si256, _mm256_cvtepi8_epi16, _mm256_cvtepi32_ps,
        _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps,
        _mm256_slli_epi32, _mm256_srai_epi32, _mm256_storeu_ps, _mm256_storeu_si256,
    },
    ops::Range,
};

use half::bf16;

use super::{
    AttentionInput, BLOCK_TOKENS,
    storage::Stored,
    walk::{self, Expand, Products, STEP_TOKENS, Scores, State, Task, Weights},
};
use crate::{activation::LANES, shared::SharedSlice};

/// Products of f32.
pub(super) struct Avx2;

/// Values of a register.
const WIDTH: usize = LANES / 2;

/// [`walk::attend`], compiled as a whole for AVX2.
///
/// # Safety
/// The machine has the features; as for [`walk::attend`].
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn attend<T: Stored>(
    task: &Task<'_>,
    input: &AttentionInput<'_>,
    cache: &[u8],
    out: &SharedSlice<f32>,
) where
    Avx2: Expand<T>,
{
    // SAFETY: the caller's promise.
    unsafe { walk::attend::<T, Avx2>(task, input, cache, out) }
}

/// The sums of `Q` queries over `P` panels of 16 lanes each: eight registers, so many as hide the latency of a multiply-add,
/// and leave room for its operands.
type Sums<const Q: usize, const P: usize> = [[[__m256; 2]; P]; Q];

/// How many queries are multiplied at once, of so many.
const fn at_once(queries: usize) -> usize {
    match queries {
        4.. => 4,
        2.. => 2,
        _ => 1,
    }
}

/// How many panels beside so many queries, of so many.
const fn beside(queries: usize, panels: usize) -> usize {
    let most = 4 / queries;
    if panels < most { 1 } else { most }
}

/// 16 lanes.
///
/// # Safety
/// The machine has AVX2; the lanes can be read.
#[inline(always)]
unsafe fn load(lanes: *const f32) -> [__m256; 2] {
    // SAFETY: the caller's promise.
    unsafe { [_mm256_loadu_ps(lanes), _mm256_loadu_ps(lanes.add(WIDTH))] }
}

/// As [`load`].
///
/// # Safety
/// The machine has AVX2; the lanes can be written.
#[inline(always)]
unsafe fn store(lanes: *mut f32, values: [__m256; 2]) {
    // SAFETY: the caller's promise.
    unsafe {
        _mm256_storeu_ps(lanes, values[0]);
        _mm256_storeu_ps(lanes.add(WIDTH), values[1]);
    }
}

/// `sums[q][p] += rows[q] · panels[p]` over `steps`.
///
/// # Safety
/// The machine has AVX2 and FMA; the steps lie in each of the `Q` rows, which lie `stride` apart, and in the panels.
#[inline(always)]
unsafe fn accumulate<const Q: usize, const P: usize>(
    sums: &mut Sums<Q, P>,
    rows: *const f32,
    stride: usize,
    panels: [*const f32; P],
    steps: Range<usize>,
) {
    for step in steps {
        // SAFETY: the caller's promise.
        unsafe {
            let panels = panels.map(|panel| load(panel.add(step * LANES)));
            for (q, sums) in sums.iter_mut().enumerate() {
                let x = _mm256_set1_ps(*rows.add(q * stride + step));
                for (sum, panel) in sums.as_flattened_mut().iter_mut().zip(panels.as_flattened()) {
                    *sum = _mm256_fmadd_ps(x, *panel, *sum);
                }
            }
        }
    }
}

/// The scores of `Q` queries against `P` blocks.
///
/// # Safety
/// The machine has AVX2 and FMA.
#[inline(always)]
unsafe fn scores<const Q: usize, const P: usize>(
    queries: &[f32],
    keys: &[&[f32]],
    scores: &mut [Scores],
    block: usize,
) {
    let places = queries.len() / Q;
    assert_eq!(scores.len(), Q, "queries");
    let panels: [_; P] = std::array::from_fn(|p| {
        assert_eq!(keys[block + p].len(), places * BLOCK_TOKENS, "keys of {places} places");
        keys[block + p].as_ptr()
    });
    // SAFETY: the caller's promise, and the sizes just asserted; 16 values fill two registers.
    unsafe {
        let mut sums = [[[_mm256_setzero_ps(); 2]; P]; Q];
        accumulate::<Q, P>(&mut sums, queries.as_ptr(), places, panels, 0..places);
        for (sums, scores) in sums.iter().zip(scores) {
            for (sum, scores) in sums.iter().zip(&mut scores[block..]) {
                store(scores.as_mut_ptr(), *sum);
            }
        }
    }
}

/// Adds to `P` panels of places of `Q` queries, from `panel` on.
///
/// # Safety
/// The machine has AVX2 and FMA.
#[inline(always)]
unsafe fn add_values<const Q: usize, const P: usize>(
    weights: &[Weights<f32>],
    tokens: &Range<usize>,
    values: &[&[f32]],
    sums: &mut [f32],
    panel: usize,
) {
    let places = sums.len() / Q;
    assert!(weights.len() == Q && (panel + P) * LANES <= places, "{P} panels from {panel} on of {places} places");
    // SAFETY: the caller's promise, and the sizes asserted.
    unsafe {
        let target = sums.as_mut_ptr().add(panel * LANES);
        let mut sums: Sums<Q, P> =
            std::array::from_fn(|q| std::array::from_fn(|p| load(target.add(q * places + p * LANES))));
        let blocks = values.iter().enumerate().take(tokens.end.div_ceil(BLOCK_TOKENS));
        for (block, values) in blocks.skip(tokens.start / BLOCK_TOKENS) {
            assert_eq!(values.len(), places * BLOCK_TOKENS, "values of {places} places");
            let at = block * BLOCK_TOKENS;
            let (start, end) = (tokens.start.saturating_sub(at), BLOCK_TOKENS.min(tokens.end - at));
            let panels = std::array::from_fn(|p| values.as_ptr().add((panel + p) * LANES * BLOCK_TOKENS));
            let rows = weights.as_ptr().cast::<f32>().add(at);
            accumulate::<Q, P>(&mut sums, rows, STEP_TOKENS, panels, start..end);
        }
        for (q, sums) in sums.iter().enumerate() {
            for (p, sum) in sums.iter().enumerate() {
                store(target.add(q * places + p * LANES), *sum);
            }
        }
    }
}

impl Products for Avx2 {
    type Operand = f32;

    #[inline(never)]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn scores<const Q: usize>(queries: &[f32], keys: &[&[f32]], out: &mut [Scores; Q]) {
        let places = queries.len() / Q;
        let mut q = 0;
        while q < Q {
            let taken = at_once(Q - q);
            let (queries, out) = (&queries[q * places..][..taken * places], &mut out[q..][..taken]);
            let mut block = 0;
            while block < keys.len() {
                let blocks = beside(taken, keys.len() - block);
                // SAFETY: the caller's promise.
                unsafe {
                    match (taken, blocks) {
                        (4, _) => scores::<4, 1>(queries, keys, out, block),
                        (2, 2) => scores::<2, 2>(queries, keys, out, block),
                        (2, _) => scores::<2, 1>(queries, keys, out, block),
                        (_, 4) => scores::<1, 4>(queries, keys, out, block),
                        _ => scores::<1, 1>(queries, keys, out, block),
                    }
                }
                block += blocks;
            }
            q += taken;
        }
    }

    #[inline(never)]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn add_values<const Q: usize>(
        weights: &[Weights<f32>],
        tokens: Range<usize>,
        values: &[&[f32]],
        sums: &mut [f32],
    ) {
        let places = sums.len() / Q;
        let mut q = 0;
        while q < Q {
            let taken = at_once(Q - q);
            let (weights, sums) = (&weights[q..][..taken], &mut sums[q * places..][..taken * places]);
            let mut panel = 0;
            while panel < places / LANES {
                let panels = beside(taken, places / LANES - panel);
                // SAFETY: the caller's promise.
                unsafe {
                    match (taken, panels) {
                        (4, _) => add_values::<4, 1>(weights, &tokens, values, sums, panel),
                        (2, 2) => add_values::<2, 2>(weights, &tokens, values, sums, panel),
                        (2, _) => add_values::<2, 1>(weights, &tokens, values, sums, panel),
                        (_, 4) => add_values::<1, 4>(weights, &tokens, values, sums, panel),
                        _ => add_values::<1, 1>(weights, &tokens, values, sums, panel),
                    }
                }
                panel += panels;
            }
            q += taken;
        }
    }

    #[inline(always)]
    unsafe fn round(values: [f32; LANES]) -> [f32; LANES] {
        values
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn softmax(state: &mut State, scores: &mut [[f32; LANES]]) -> f32 {
        walk::softmax(state, scores)
    }

    /// As AVX-512 has it.
    #[inline(always)]
    fn prefetch(bytes: &[u8]) {
        for line in bytes.chunks(64) {
            // SAFETY: a prefetch never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) };
        }
    }
}

impl Expand<f32> for Avx2 {
    const STORED: bool = true;

    #[inline(always)]
    unsafe fn expand<'a>(stored: &'a [f32], _: &'a mut [f32]) -> &'a [f32] {
        stored
    }
}

impl Expand<bf16> for Avx2 {
    const STORED: bool = false;

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn expand<'a>(stored: &'a [bf16], scratch: &'a mut [f32]) -> &'a [f32] {
        let upper = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
        for (stored, out) in stored.chunks_exact(2 * LANES).zip(scratch.chunks_exact_mut(2 * LANES)) {
            for half in [0, WIDTH] {
                // SAFETY: 32 values each, of which 16 are read, and 8 written twice.
                unsafe {
                    let pairs = _mm256_loadu_si256(stored.as_ptr().add(2 * half).cast());
                    let [first, second] = [half, LANES + half].map(|at| out.as_mut_ptr().add(at));
                    _mm256_storeu_si256(first.cast(), _mm256_slli_epi32::<16>(pairs));
                    _mm256_storeu_si256(second.cast(), _mm256_and_si256(pairs, upper));
                }
            }
        }
        scratch
    }
}

impl Expand<i8> for Avx2 {
    const STORED: bool = false;

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn expand<'a>(stored: &'a [i8], scratch: &'a mut [f32]) -> &'a [f32] {
        for (stored, out) in stored.chunks_exact(2 * LANES).zip(scratch.chunks_exact_mut(2 * LANES)) {
            for half in [0, WIDTH] {
                // SAFETY: 32 values each, of which 16 are read, and 8 written twice.
                unsafe {
                    let pairs = _mm256_cvtepi8_epi16(_mm_loadu_si128(stored.as_ptr().add(2 * half).cast()));
                    let first = _mm256_srai_epi32::<16>(_mm256_slli_epi32::<16>(pairs));
                    _mm256_storeu_ps(out.as_mut_ptr().add(half), _mm256_cvtepi32_ps(first));
                    let second = _mm256_srai_epi32::<16>(pairs);
                    _mm256_storeu_ps(out.as_mut_ptr().add(LANES + half), _mm256_cvtepi32_ps(second));
                }
            }
        }
        scratch
    }
}
