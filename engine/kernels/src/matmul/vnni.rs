//! Tiles of the integer formats in AVX-512 VNNI: a register holds 4 inputs of 16 outputs, and one `vpdpbusd` multiplies
//! them with 4 activations of one row, which it reads and spreads by itself.
//!
//! A block's weights are unpacked once, into 8 registers, and then meet every row.

use std::arch::x86_64::{
    __m512, __m512i, _MM_HINT_T0, _MM_HINT_T1, _mm_loadu_si128, _mm_prefetch, _mm256_loadu_si256, _mm512_add_epi32,
    _mm512_and_si512, _mm512_broadcast_i32x4, _mm512_castsi512_ps, _mm512_cmplt_epu32_mask, _mm512_cvtepi8_epi32,
    _mm512_cvtepi32_ps, _mm512_cvtepu8_epi16, _mm512_cvtepu8_epi32, _mm512_cvtph_ps, _mm512_dpbusd_epi32,
    _mm512_dpwssd_epi32, _mm512_fmadd_ps, _mm512_fnmadd_ps, _mm512_loadu_si512, _mm512_mask_blend_epi32, _mm512_mul_ps,
    _mm512_mullo_epi32, _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512,
    _mm512_shuffle_epi8, _mm512_slli_epi16, _mm512_slli_epi32, _mm512_sllv_epi32, _mm512_srli_epi16, _mm512_storeu_ps,
    _mm512_sub_epi32, _mm512_ternarylogic_epi32,
};

use super::{MXFP4_UNSIGNED, Sums, activations::IntegerRow};
use crate::format::{BLOCK, Format, INTEGER_K, SUPER_BLOCK};

/// How far ahead of the loads packed weights are fetched into the second cache. Panels lie one after the other, so this
/// reaches into the next.
const FAR_BYTES: usize = 8192;
/// How far ahead they are fetched on into the first one.
const NEAR_BYTES: usize = 3072;

/// Unsigned weights of 4 inputs of 16 outputs, for each step of a block.
pub(super) type Steps = [__m512i; 8];

/// The contract is in `portable.rs`.
///
/// # Safety
/// The machine has AVX-512 F/BW/DQ/VL and VNNI; rows have the form and panels the size that format and `k` say; one
/// panel, and at most [`super::INTEGER_ROWS`] rows.
pub(super) unsafe fn tile(format: Format, rows: &[*const u8], panel: *const u8, k: usize, sums: &mut Sums) {
    /// Compiles the call for each number of rows, which it names `R`.
    macro_rules! by_rows {
        ($call:expr) => { by_rows!($call; 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16) };
        ($call:expr; $($r:literal)*) => {
            match rows.len() {
                $($r => {
                    const R: usize = $r;
                    // SAFETY: the caller's promises, and the count just matched.
                    unsafe { $call }
                })*
                rows => unreachable!("tile of {rows} rows"),
            }
        };
    }
    match format {
        Format::Q8_0 => by_rows!(blocks::<Q8_0, R>(rows, panel, k, sums)),
        Format::Q4_0 => by_rows!(blocks::<Q4_0, R>(rows, panel, k, sums)),
        Format::Mxfp4 => by_rows!(blocks::<Mxfp4, R>(rows, panel, k, sums)),
        Format::Q4K => by_rows!(q4_k::<R>(rows, panel, k, sums)),
        Format::Q6K => by_rows!(q6_k::<R>(rows, panel, k, sums)),
        Format::F32 | Format::Bf16 => unreachable!("{format} is no integer format"),
    }
}

/// A format with one scale for 32 inputs; two blocks make a unit.
pub(super) trait Blocks {
    /// Bytes of a unit.
    const UNIT: usize;

    /// The scales of the unit's block `half`.
    ///
    /// # Safety
    /// This and below: the machine has the tier; `unit` leads to a whole unit.
    unsafe fn scales(unit: *const u8, half: usize) -> __m512;

    /// The weights of the unit's block `half`.
    unsafe fn steps(unit: *const u8, half: usize) -> Steps;
}

pub(super) struct Q8_0;
pub(super) struct Q4_0;
pub(super) struct Mxfp4;

/// Fetches `bytes` bytes that come [`FAR_BYTES`] after `at`, for packed weights that meet more than two rows.
///
/// With one or two rows the loads themselves run far enough ahead, and fetching on top of that costs (one row of
/// `q4_k`: 35 GB/s without, 28 with). With more, the arithmetic of one block fills the core's window and no load of the
/// next is in it. The first cache takes too few requests at a time to be the target: 4 rows of `q6_k` read 20 GB/s
/// alone, 21 with fetches into the first cache and 37 with fetches into the second.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch<const R: usize>(at: *const u8, bytes: usize) {
    if R >= 3 {
        for line in (0..bytes).step_by(64) {
            // Past the end of the memory a prefetch is harmless.
            _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(FAR_BYTES + line).cast());
        }
    }
}

/// [`prefetch`] in two steps, the second into the first cache: `q4_k` gains by it (4 rows: 22 to 30 GB/s), the other
/// formats don't.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch_twice<const R: usize>(at: *const u8, bytes: usize) {
    prefetch::<R>(at, bytes);
    if R >= 3 {
        for line in (0..bytes).step_by(64) {
            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(NEAR_BYTES + line).cast());
        }
    }
}

/// `start + Σ over the steps of weights · activations` of one row.
///
/// # Safety
/// The machine has the tier; `x` leads to 4 activations a step.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn dot(start: __m512i, weights: &[__m512i], x: *const u8) -> __m512i {
    let mut sum = start;
    for (step, weights) in weights.iter().enumerate() {
        // SAFETY: the caller's promise.
        let x = unsafe { x.add(4 * step).cast::<i32>().read_unaligned() };
        sum = _mm512_dpbusd_epi32(sum, *weights, _mm512_set1_epi32(x));
    }
    sum
}

/// # Safety
/// As for [`tile`]; `rows` has `R` entries.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn blocks<K: Blocks, const R: usize>(rows: &[*const u8], panel: *const u8, k: usize, sums: &mut Sums) {
    let layout = IntegerRow::new(Format::Q8_0, k);
    let mut totals = [_mm512_setzero_ps(); R];
    for unit in 0..k / INTEGER_K {
        // SAFETY: the unit lies in the panel, its inputs, scales and corrections lie in each row.
        unsafe {
            let at = panel.add(unit * K::UNIT);
            prefetch::<R>(at, K::UNIT);
            for half in 0..2 {
                let block = 2 * unit + half;
                let scales = K::scales(at, half);
                let weights = K::steps(at, half);
                for (total, row) in totals.iter_mut().zip(rows) {
                    let start = *row.add(layout.sums).cast::<i32>().add(block);
                    let scale = *row.add(layout.scales).cast::<f32>().add(block);
                    let sum = dot(_mm512_set1_epi32(start), &weights, row.add(block * BLOCK));
                    let scales = _mm512_mul_ps(scales, _mm512_set1_ps(scale));
                    *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scales, *total);
                }
            }
        }
    }
    store(&totals, sums);
}

/// # Safety
/// As for [`tile`]; `rows` has `R` entries.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn q4_k<const R: usize>(rows: &[*const u8], panel: *const u8, k: usize, sums: &mut Sums) {
    let layout = IntegerRow::new(Format::Q4K, k);
    let mut totals = [_mm512_setzero_ps(); R];
    let mut block = panel;
    for at in (0..k).step_by(SUPER_BLOCK) {
        let parts = SUPER_BLOCK.min(k - at) / BLOCK;
        // SAFETY: the super-block lies in the panel, its inputs, scales and sums lie in each row.
        unsafe {
            let scales = block.add(64);
            let minima = scales.add(parts * 16);
            let quants = minima.add(parts * 16);
            let mut integers = [_mm512_setzero_si512(); R];
            for part in 0..parts {
                let at = at + part * BLOCK;
                let quants = quants.add(part * 256);
                prefetch_twice::<R>(quants, 256);
                let weights = nibbles(quants);
                let scale = _mm512_cvtepu8_epi32(_mm_loadu_si128(scales.add(part * 16).cast()));
                for (integer, row) in integers.iter_mut().zip(rows) {
                    let sum = dot(_mm512_setzero_si512(), &weights, row.add(at));
                    *integer = _mm512_add_epi32(*integer, _mm512_mullo_epi32(sum, scale));
                }
            }
            prefetch_twice::<R>(scales, parts * 32);
            let (scale, minimum) = (half_floats(block), half_floats(block.add(32)));
            for (row, (total, integer)) in rows.iter().zip(totals.iter_mut().zip(integers)) {
                let x = _mm512_set1_ps(*row.add(layout.scales).cast::<f32>().add(at / SUPER_BLOCK));
                let sums = row.add(layout.sums + at / BLOCK * 2);
                let mut below = _mm512_setzero_si512();
                for pair in 0..parts / 2 {
                    let minima = _mm512_cvtepu8_epi16(_mm256_loadu_si256(minima.add(pair * 32).cast()));
                    let sums = sums.add(pair * 4).cast::<i32>().read_unaligned();
                    below = _mm512_dpwssd_epi32(below, minima, _mm512_set1_epi32(sums));
                }
                *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(integer), _mm512_mul_ps(scale, x), *total);
                *total = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(below), _mm512_mul_ps(minimum, x), *total);
            }
            block = quants.add(parts * 256);
        }
    }
    store(&totals, sums);
}

/// # Safety
/// As for [`tile`]; `rows` has `R` entries.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn q6_k<const R: usize>(rows: &[*const u8], panel: *const u8, k: usize, sums: &mut Sums) {
    let layout = IntegerRow::new(Format::Q6K, k);
    let mut totals = [_mm512_setzero_ps(); R];
    let mut block = panel;
    for at in (0..k).step_by(SUPER_BLOCK) {
        let units = SUPER_BLOCK.min(k - at) / INTEGER_K;
        // SAFETY: the super-block lies in the panel, its inputs, scales and corrections lie in each row.
        unsafe {
            let scales = block.add(64);
            let quants = scales.add(units * 64);
            let mut integers = [_mm512_setzero_si512(); R];
            for unit in 0..units {
                let low = quants.add(unit * 768);
                prefetch::<R>(low, 768);
                for half in 0..2 {
                    let weights = six_bits(low.add(half * 256), low.add(512 + half * 128));
                    for quarter in 0..2 {
                        let part = (unit * 2 + half) * 2 + quarter;
                        let at = at + part * 16;
                        let scale = _mm512_cvtepi8_epi32(_mm_loadu_si128(scales.add(part * 16).cast()));
                        let weights = &weights[quarter * 4..quarter * 4 + 4];
                        for (integer, row) in integers.iter_mut().zip(rows) {
                            let start = *row.add(layout.sums).cast::<i32>().add(at / 16);
                            let sum = dot(_mm512_set1_epi32(start), weights, row.add(at));
                            *integer = _mm512_add_epi32(*integer, _mm512_mullo_epi32(sum, scale));
                        }
                    }
                }
            }
            prefetch::<R>(block, 64 + units * 64);
            let scale = half_floats(block);
            for (row, (total, integer)) in rows.iter().zip(totals.iter_mut().zip(integers)) {
                let x = _mm512_set1_ps(*row.add(layout.scales).cast::<f32>().add(at / SUPER_BLOCK));
                *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(integer), _mm512_mul_ps(scale, x), *total);
            }
            block = quants.add(units * 768);
        }
    }
    store(&totals, sums);
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store<const R: usize>(totals: &[__m512; R], sums: &mut Sums) {
    for (total, sums) in totals.iter().zip(sums) {
        // SAFETY: 16 f32 values fill the register exactly.
        unsafe { _mm512_storeu_ps(sums[0].as_mut_ptr(), *total) };
    }
}

/// 16 f16 values as f32.
///
/// # Safety
/// The machine has the tier; 32 bytes lie at `at`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn half_floats(at: *const u8) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())) }
}

/// The 8 steps of 32 inputs in nibble pairs.
///
/// # Safety
/// The machine has the tier; 256 bytes lie at `at`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn nibbles(at: *const u8) -> Steps {
    let mask = _mm512_set1_epi8(0x0f);
    let mut steps = [_mm512_setzero_si512(); 8];
    for (index, pair) in steps.chunks_exact_mut(2).enumerate() {
        // SAFETY: the caller's promise.
        let both = unsafe { _mm512_loadu_si512(at.add(64 * index).cast()) };
        pair[0] = _mm512_and_si512(both, mask);
        pair[1] = _mm512_and_si512(_mm512_srli_epi16::<4>(both), mask);
    }
    steps
}

/// The 8 steps of 32 inputs whose low 4 bits are nibble pairs at `low`, and whose high 2 bits are at `high`.
///
/// # Safety
/// The machine has the tier; 256 bytes lie at `low` and 128 at `high`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn six_bits(low: *const u8, high: *const u8) -> Steps {
    /// a | (b & c)
    const OR_AND: i32 = 0xf8;
    let mask = _mm512_set1_epi8(0x30);
    // SAFETY: the caller's promise.
    let mut steps = unsafe { nibbles(low) };
    for (index, four) in steps.chunks_exact_mut(4).enumerate() {
        // SAFETY: the caller's promise.
        let high = unsafe { _mm512_loadu_si512(high.add(64 * index).cast()) };
        // What a shift carries over from the neighbouring byte falls to the mask.
        let shifted = [_mm512_slli_epi16::<4>(high), _mm512_slli_epi16::<2>(high), high, _mm512_srli_epi16::<2>(high)];
        for (step, high) in four.iter_mut().zip(shifted) {
            *step = _mm512_ternarylogic_epi32::<OR_AND>(*step, high, mask);
        }
    }
    steps
}

impl Blocks for Q8_0 {
    const UNIT: usize = 1088;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn scales(unit: *const u8, half: usize) -> __m512 {
        // SAFETY: the caller's promises.
        unsafe { half_floats(unit.add(32 * half)) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn steps(unit: *const u8, half: usize) -> Steps {
        // SAFETY: the caller's promises.
        unsafe { unit.add(64 + 512 * half).cast::<Steps>().read_unaligned() }
    }
}

impl Blocks for Q4_0 {
    const UNIT: usize = 576;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn scales(unit: *const u8, half: usize) -> __m512 {
        // SAFETY: the caller's promises.
        unsafe { half_floats(unit.add(32 * half)) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn steps(unit: *const u8, half: usize) -> Steps {
        // SAFETY: the caller's promises.
        unsafe { nibbles(unit.add(64 + 256 * half)) }
    }
}

impl Blocks for Mxfp4 {
    const UNIT: usize = 544;

    /// Half of 2^(e - 127), since the weights count in halves; the two smallest are subnormal.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn scales(unit: *const u8, half: usize) -> __m512 {
        // SAFETY: the caller's promises.
        unsafe {
            let exponents = _mm512_cvtepu8_epi32(_mm_loadu_si128(unit.add(16 * half).cast()));
            let normal = _mm512_slli_epi32::<23>(_mm512_sub_epi32(exponents, _mm512_set1_epi32(1)));
            let subnormal = _mm512_sllv_epi32(_mm512_set1_epi32(0x0020_0000), exponents);
            let small = _mm512_cmplt_epu32_mask(exponents, _mm512_set1_epi32(2));
            _mm512_castsi512_ps(_mm512_mask_blend_epi32(small, normal, subnormal))
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn steps(unit: *const u8, half: usize) -> Steps {
        // SAFETY: the caller's promises; the table has 16 bytes.
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(MXFP4_UNSIGNED.as_ptr().cast()));
            let mut steps = nibbles(unit.add(32 + 256 * half));
            for step in &mut steps {
                *step = _mm512_shuffle_epi8(table, *step);
            }
            steps
        }
    }
}
