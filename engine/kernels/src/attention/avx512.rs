//! The products of attention in AVX-512: a register holds one place, or one pair, of 16 keys; or one token, or one
//! pair of tokens, of 16 places of values.

use std::{
    arch::x86_64::{
        __m512, __m512bh, __m512i, _CMP_NLT_UQ, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _MM_HINT_T1,
        _mm_loadu_si128, _mm_prefetch, _mm256_loadu_si256, _mm512_add_ps, _mm512_and_si512, _mm512_cmp_ps_mask,
        _mm512_cvtepi8_epi16, _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps, _mm512_cvtne2ps_pbh, _mm512_cvtneps_pbh,
        _mm512_cvtss_f32, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_fnmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512,
        _mm512_maskz_scalef_ps, _mm512_max_ps, _mm512_mul_ps, _mm512_reduce_max_ps, _mm512_roundscale_ps,
        _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi32, _mm512_srai_epi32, _mm512_storeu_ps,
        _mm512_storeu_si512, _mm512_sub_ps,
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
pub(super) struct F32;
/// Products of bf16 by `vdpbf16ps`: queries and weights are rounded, sums are f32.
pub(super) struct Bf16Pairs;

/// [`walk::attend`], compiled as a whole for AVX-512.
///
/// # Safety
/// The machine has the features; as for [`walk::attend`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn attend<T: Stored>(
    task: &Task<'_>,
    input: &AttentionInput<'_>,
    cache: &[u8],
    out: &SharedSlice<f32>,
) where
    F32: Expand<T>,
{
    // SAFETY: the caller's promise.
    unsafe { walk::attend::<T, F32>(task, input, cache, out) }
}

/// [`walk::attend`], compiled as a whole for AVX-512 with bf16.
///
/// # Safety
/// The machine has the features; as for [`walk::attend`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn attend_bf16<T: Stored>(
    task: &Task<'_>,
    input: &AttentionInput<'_>,
    cache: &[u8],
    out: &SharedSlice<f32>,
) where
    Bf16Pairs: Expand<T>,
{
    // SAFETY: the caller's promise.
    unsafe { walk::attend::<T, Bf16Pairs>(task, input, cache, out) }
}

/// One kind of operands.
trait Kind {
    type Operand: Copy;
    /// 16 lanes of operands.
    type Register: Copy;
    /// Operands of a lane.
    const PAIR: usize;

    /// 64 bytes of a panel; of each pair only the first, unless `whole`.
    ///
    /// # Safety
    /// This and the functions below: the machine has the kind's instructions; and the bytes lie in the panel.
    unsafe fn load(panel: *const Self::Operand, whole: bool) -> Self::Register;

    /// 4 bytes in all lanes.
    ///
    /// # Safety
    /// They can be read.
    unsafe fn broadcast(x: *const Self::Operand) -> Self::Register;

    /// `sums + x · y`
    ///
    /// # Safety
    /// As above.
    unsafe fn multiply_add(sums: __m512, x: Self::Register, y: Self::Register) -> __m512;
}

impl Kind for F32 {
    type Operand = f32;
    type Register = __m512;
    const PAIR: usize = 1;

    #[inline(always)]
    unsafe fn load(panel: *const f32, _: bool) -> Self::Register {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_ps(panel) }
    }

    #[inline(always)]
    unsafe fn broadcast(x: *const f32) -> Self::Register {
        // SAFETY: the caller's promise.
        unsafe { _mm512_set1_ps(*x) }
    }

    #[inline(always)]
    unsafe fn multiply_add(sums: __m512, x: Self::Register, y: Self::Register) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_fmadd_ps(x, y, sums) }
    }
}

impl Kind for Bf16Pairs {
    type Operand = bf16;
    type Register = __m512bh;
    const PAIR: usize = 2;

    #[inline(always)]
    unsafe fn load(panel: *const bf16, whole: bool) -> Self::Register {
        // SAFETY: the caller's promise; both types are 64 plain bytes.
        unsafe {
            let pairs = _mm512_loadu_si512(panel.cast());
            std::mem::transmute(if whole { pairs } else { _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff)) })
        }
    }

    #[inline(always)]
    unsafe fn broadcast(x: *const bf16) -> Self::Register {
        // SAFETY: the caller's promise; both types are 64 plain bytes.
        unsafe { std::mem::transmute(_mm512_set1_epi32(x.cast::<i32>().read_unaligned())) }
    }

    #[inline(always)]
    unsafe fn multiply_add(sums: __m512, x: Self::Register, y: Self::Register) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_dpbf16_ps(sums, x, y) }
    }
}

/// `sums[q][p] += rows[q] · panels[p]` over the steps `steps` of a lane's operands each, of the last step only the
/// first operand unless `whole`.
///
/// # Safety
/// The machine has the kind's instructions; the steps lie in each of the `Q` rows, which lie `stride` apart, and in
/// the panels.
#[inline(always)]
unsafe fn accumulate<K: Kind, const Q: usize, const P: usize>(
    sums: &mut [[__m512; P]; Q],
    rows: *const K::Operand,
    stride: usize,
    panels: [*const K::Operand; P],
    steps: Range<usize>,
    whole: bool,
) {
    for step in steps {
        // SAFETY: the caller's promise.
        unsafe {
            let panels = panels.map(|panel| K::load(panel.add(step * LANES * K::PAIR), whole));
            for (q, sums) in sums.iter_mut().enumerate() {
                let x = K::broadcast(rows.add(q * stride + step * K::PAIR));
                for (sum, panel) in sums.iter_mut().zip(panels) {
                    *sum = K::multiply_add(*sum, x, panel);
                }
            }
        }
    }
}

/// The scores against `P` blocks.
///
/// # Safety
/// The machine has the kind's instructions; `queries` and each panel of `keys` have `places` places.
#[inline(always)]
unsafe fn scores<K: Kind, const Q: usize, const P: usize>(
    queries: &[K::Operand],
    keys: &[&[K::Operand]],
    scores: &mut [Scores; Q],
    block: usize,
) {
    let places = queries.len() / Q;
    let panels: [_; P] = std::array::from_fn(|p| {
        assert_eq!(keys[block + p].len(), places * BLOCK_TOKENS, "keys of {places} places");
        keys[block + p].as_ptr()
    });
    // SAFETY: the caller's promise, and the sizes just asserted; 16 values fill a register.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); P]; Q];
        accumulate::<K, Q, P>(&mut sums, queries.as_ptr(), places, panels, 0..places / K::PAIR, true);
        for (sums, scores) in sums.iter().zip(scores) {
            for (sum, scores) in sums.iter().zip(&mut scores[block..]) {
                _mm512_storeu_ps(scores.as_mut_ptr(), *sum);
            }
        }
    }
}

/// Adds to `P` registers of places, from `panel` on.
///
/// # Safety
/// As for [`scores`].
#[inline(always)]
unsafe fn add_values<K: Kind, const Q: usize, const P: usize>(
    weights: &[Weights<K::Operand>],
    tokens: &Range<usize>,
    values: &[&[K::Operand]],
    sums: &mut [f32],
    panel: usize,
) {
    let places = sums.len() / Q;
    assert!(weights.len() == Q && (panel + P) * LANES <= places, "{P} panels from {panel} on of {places} places");
    // SAFETY: the caller's promise, and the sizes asserted.
    unsafe {
        let target = sums.as_mut_ptr().add(panel * LANES);
        let mut sums: [[__m512; P]; Q] =
            std::array::from_fn(|q| std::array::from_fn(|p| _mm512_loadu_ps(target.add(q * places + p * LANES))));
        let blocks = values.iter().enumerate().take(tokens.end.div_ceil(BLOCK_TOKENS));
        for (block, values) in blocks.skip(tokens.start / BLOCK_TOKENS) {
            assert_eq!(values.len(), places * BLOCK_TOKENS, "values of {places} places");
            let at = block * BLOCK_TOKENS;
            let (start, end) = (tokens.start.saturating_sub(at), BLOCK_TOKENS.min(tokens.end - at));
            let panels = std::array::from_fn(|p| values.as_ptr().add((panel + p) * LANES * BLOCK_TOKENS));
            let rows = weights.as_ptr().cast::<K::Operand>().add(at);
            let (first, whole, all) = (start / K::PAIR, end / K::PAIR, end.div_ceil(K::PAIR));
            accumulate::<K, Q, P>(&mut sums, rows, STEP_TOKENS, panels, first..whole, true);
            accumulate::<K, Q, P>(&mut sums, rows, STEP_TOKENS, panels, whole..all, false);
        }
        for (q, sums) in sums.iter().enumerate() {
            for (p, sum) in sums.iter().enumerate() {
                _mm512_storeu_ps(target.add(q * places + p * LANES), *sum);
            }
        }
    }
}

impl Expand<f32> for F32 {
    const STORED: bool = true;

    #[inline(always)]
    unsafe fn expand<'a>(stored: &'a [f32], _: &'a mut [f32]) -> &'a [f32] {
        stored
    }
}

impl Expand<bf16> for F32 {
    const STORED: bool = false;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn expand<'a>(stored: &'a [bf16], scratch: &'a mut [f32]) -> &'a [f32] {
        let upper = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
        for (stored, out) in stored.chunks_exact(2 * LANES).zip(scratch.chunks_exact_mut(2 * LANES)) {
            // SAFETY: 32 values each.
            unsafe {
                let pairs = _mm512_loadu_si512(stored.as_ptr().cast());
                _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_slli_epi32::<16>(pairs));
                _mm512_storeu_si512(out.as_mut_ptr().add(LANES).cast(), _mm512_and_si512(pairs, upper));
            }
        }
        scratch
    }
}

impl Expand<i8> for F32 {
    const STORED: bool = false;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn expand<'a>(stored: &'a [i8], scratch: &'a mut [f32]) -> &'a [f32] {
        for (stored, out) in stored.chunks_exact(2 * LANES).zip(scratch.chunks_exact_mut(2 * LANES)) {
            // SAFETY: 32 values each.
            unsafe {
                let pairs = _mm512_cvtepi8_epi16(_mm256_loadu_si256(stored.as_ptr().cast()));
                let first = _mm512_srai_epi32::<16>(_mm512_slli_epi32::<16>(pairs));
                _mm512_storeu_ps(out.as_mut_ptr(), _mm512_cvtepi32_ps(first));
                _mm512_storeu_ps(out.as_mut_ptr().add(LANES), _mm512_cvtepi32_ps(_mm512_srai_epi32::<16>(pairs)));
            }
        }
        scratch
    }
}

impl Expand<bf16> for Bf16Pairs {
    const STORED: bool = true;

    #[inline(always)]
    unsafe fn expand<'a>(stored: &'a [bf16], _: &'a mut [bf16]) -> &'a [bf16] {
        stored
    }
}

impl Expand<i8> for Bf16Pairs {
    const STORED: bool = false;

    /// Exact: bf16 has 8 significant bits.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn expand<'a>(stored: &'a [i8], scratch: &'a mut [bf16]) -> &'a [bf16] {
        for (stored, out) in stored.chunks_exact(2 * LANES).zip(scratch.chunks_exact_mut(2 * LANES)) {
            // SAFETY: 32 values each.
            unsafe {
                let widen = |at: usize| {
                    _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(stored.as_ptr().add(at).cast())))
                };
                let pairs = _mm512_cvtne2ps_pbh(widen(LANES), widen(0));
                _mm512_storeu_si512(out.as_mut_ptr().cast(), std::mem::transmute::<__m512bh, __m512i>(pairs));
            }
        }
        scratch
    }
}

/// e^x for x ≤ 0, as [`crate::activation::exp`] has it.
#[inline]
#[target_feature(enable = "avx512f")]
fn exp(x: __m512) -> __m512 {
    let lowest = _mm512_set1_ps(-87.3);
    // In this order a NaN stays one, here and in the comparison.
    let clamped = _mm512_max_ps(lowest, x);
    let seen = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, lowest);
    let power = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(_mm512_mul_ps(
        clamped,
        _mm512_set1_ps(std::f32::consts::LOG2_E),
    ));
    let r = _mm512_fnmadd_ps(power, _mm512_set1_ps(0.693_359_4), clamped);
    let r = _mm512_fnmadd_ps(power, _mm512_set1_ps(-2.121_944_4e-4), r);
    let mut p = _mm512_set1_ps(1.987_569_1e-4);
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(coefficient));
    }
    let p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0)));
    _mm512_maskz_scalef_ps(seen, p, power)
}

/// As [`Products::softmax`].
#[inline]
#[target_feature(enable = "avx512f")]
fn softmax(state: &mut State, scores: &mut [[f32; LANES]]) -> f32 {
    // SAFETY: here and below, 16 values fill a register.
    let load = |values: &[f32; LANES]| unsafe { _mm512_loadu_ps(values.as_ptr()) };
    // A NaN may win or lose here: the weights have it anyway.
    let highest = scores.iter().fold(_mm512_set1_ps(state.max), |highest, scores| _mm512_max_ps(highest, load(scores)));
    let max = _mm512_reduce_max_ps(highest);
    let shrink = if max > state.max { _mm512_cvtss_f32(exp(_mm512_set1_ps(state.max - max))) } else { 1.0 };
    state.max = max;
    let mut sums = _mm512_mul_ps(load(&state.sums), _mm512_set1_ps(shrink));
    for scores in scores {
        let weights = exp(_mm512_sub_ps(load(scores), _mm512_set1_ps(max)));
        sums = _mm512_add_ps(sums, weights);
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(scores.as_mut_ptr(), weights) };
    }
    // SAFETY: as above.
    unsafe { _mm512_storeu_ps(state.sums.as_mut_ptr(), sums) };
    shrink
}

/// Into the second cache: a step is as large as the first (20 GB/s into the first, 24 into the second; the first lines
/// of each page alone, for the machine to go on from: 22).
fn prefetch(bytes: &[u8]) {
    for line in bytes.chunks(64) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) };
    }
}

/// Both products of one kind. They stay functions: inlined into their caller, several variants each, they spill.
macro_rules! products {
    ($kind:ident, $operand:ident, $features:literal, $round:expr) => {
        impl Products for $kind {
            type Operand = $operand;

            #[inline(never)]
            #[target_feature(enable = $features)]
            unsafe fn scores<const Q: usize>(
                queries: &[Self::Operand],
                keys: &[&[Self::Operand]],
                out: &mut [Scores; Q],
            ) {
                let mut block = 0;
                while block < keys.len() {
                    // SAFETY: the caller's promise.
                    block += unsafe {
                        match keys.len() - block {
                            4.. if Q <= 6 => {
                                scores::<Self, Q, 4>(queries, keys, out, block);
                                4
                            }
                            2.. => {
                                scores::<Self, Q, 2>(queries, keys, out, block);
                                2
                            }
                            _ => {
                                scores::<Self, Q, 1>(queries, keys, out, block);
                                1
                            }
                        }
                    };
                }
            }

            #[inline(never)]
            #[target_feature(enable = $features)]
            unsafe fn add_values<const Q: usize>(
                weights: &[Weights<Self::Operand>],
                tokens: Range<usize>,
                values: &[&[Self::Operand]],
                sums: &mut [f32],
            ) {
                let panels = sums.len() / Q / LANES;
                let mut panel = 0;
                while panel < panels {
                    // SAFETY: the caller's promise.
                    panel += unsafe {
                        match panels - panel {
                            4.. if Q <= 6 => {
                                add_values::<Self, Q, 4>(weights, &tokens, values, sums, panel);
                                4
                            }
                            2.. => {
                                add_values::<Self, Q, 2>(weights, &tokens, values, sums, panel);
                                2
                            }
                            _ => {
                                add_values::<Self, Q, 1>(weights, &tokens, values, sums, panel);
                                1
                            }
                        }
                    };
                }
            }

            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn round(values: [f32; LANES]) -> [Self::Operand; LANES] {
                $round(values)
            }

            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn softmax(state: &mut State, scores: &mut [[f32; LANES]]) -> f32 {
                softmax(state, scores)
            }

            #[inline(always)]
            fn prefetch(bytes: &[u8]) {
                prefetch(bytes);
            }
        }
    };
}

products!(F32, f32, "avx512f", |values| values);
products!(Bf16Pairs, bf16, "avx512f,avx512bf16", |values: [f32; LANES]| {
    // SAFETY: the caller's promise; the types are plain bytes of the same size.
    unsafe { std::mem::transmute(_mm512_cvtneps_pbh(_mm512_loadu_ps(values.as_ptr()))) }
});
