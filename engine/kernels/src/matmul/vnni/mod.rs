//! Tiles of the integer formats in AVX-512 VNNI: a register holds 4 inputs of 16 outputs, and one `vpdpbusd` multiplies
//! them with 4 activations of one row.
//!
//! - Few rows, here: a block's weights of one panel are unpacked once, into 8 registers, and then meet every row.
//! - Many rows, in `many.rs`: the sums stay in the registers, and unpacked weights in the first cache.

pub(super) mod many;

use std::{
    arch::x86_64::{
        __m512, __m512i, _MM_HINT_T0, _MM_HINT_T1, _mm_loadu_si128, _mm_prefetch, _mm256_loadu_si256, _mm512_add_epi32,
        _mm512_and_si512, _mm512_broadcast_i32x4, _mm512_castsi512_ps, _mm512_cmplt_epu32_mask, _mm512_cvtepi8_epi32,
        _mm512_cvtepi32_ps, _mm512_cvtepu8_epi16, _mm512_cvtepu8_epi32, _mm512_cvtph_ps, _mm512_dpbusd_epi32,
        _mm512_dpwssd_epi32, _mm512_fmadd_ps, _mm512_fnmadd_ps, _mm512_loadu_si512, _mm512_mask_blend_epi32,
        _mm512_mul_ps, _mm512_mullo_epi32, _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps,
        _mm512_setzero_si512, _mm512_shuffle_epi8, _mm512_slli_epi16, _mm512_slli_epi32, _mm512_sllv_epi32,
        _mm512_srli_epi16, _mm512_storeu_ps, _mm512_sub_epi32, _mm512_ternarylogic_epi32,
    },
    ops::Range,
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

/// One panel; the contract is in `portable.rs`.
///
/// # Safety
/// The machine has AVX-512 F/BW/DQ/VL and VNNI; rows have the form and the panel the size that format and `k` say; at most
/// 16 rows.
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
    // With one or two rows the loads themselves run far enough ahead, and fetching on top of that costs (Zen 4, one row of
    // `q4_k`: 35 GB/s without, 28 with), but where the memory answers late: on Xeons since Sapphire Rapids (B at `q4_k`, a
    // token at a time: 19 tok/s without, 28 with), which half-precision arithmetic tells apart. With more rows, the
    // arithmetic of one block fills the core's window and no load of the next is in it.
    let fetches = rows.len() >= 3 || is_x86_feature_detected!("avx512fp16");
    match format {
        Format::Q8_0 => by_rows!(blocks::<Q8_0, R>(fetches, rows, panel, k, sums)),
        Format::Q4_0 => by_rows!(blocks::<Q4_0, R>(fetches, rows, panel, k, sums)),
        Format::Mxfp4 => by_rows!(blocks::<Mxfp4, R>(fetches, rows, panel, k, sums)),
        Format::Q4K => by_rows!(q4_k::<R>(fetches, rows, panel, k, sums)),
        Format::Q6K => by_rows!(q6_k::<R>(fetches, rows, panel, k, sums)),
        Format::F32 | Format::Bf16 => unreachable!("{format} is no integer format"),
    }
}

/// A format with one scale for 32 inputs; two blocks make a unit.
pub(super) trait Blocks {
    /// What it is.
    const FORMAT: Format;
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

/// Fetches `bytes` bytes that come [`FAR_BYTES`] after `at`, if at all. The first cache takes too few requests at a time to be
/// the target: 4 rows of `q6_k` read 20 GB/s alone, 21 with fetches into the first cache and 37 with fetches into the second.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch(fetches: bool, at: *const u8, bytes: usize) {
    if fetches {
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
fn prefetch_twice(fetches: bool, at: *const u8, bytes: usize) {
    prefetch(fetches, at, bytes);
    if fetches {
        for line in (0..bytes).step_by(64) {
            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(NEAR_BYTES + line).cast());
        }
    }
}

/// `start + Σ over these steps of weights · activations` of one row.
///
/// # Safety
/// The machine has the tier; `x` leads to 4 activations a step.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn dot(start: __m512i, weights: &Steps, steps: Range<usize>, x: *const u8) -> __m512i {
    let mut sum = start;
    for (place, step) in steps.enumerate() {
        // SAFETY: the caller's promise.
        let x = _mm512_set1_epi32(unsafe { x.add(4 * place).cast::<i32>().read_unaligned() });
        sum = _mm512_dpbusd_epi32(sum, weights[step], x);
    }
    sum
}

/// # Safety
/// As for [`tile`]; `rows` has `R` entries.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn blocks<K: Blocks, const R: usize>(
    fetches: bool,
    rows: &[*const u8],
    panel: *const u8,
    k: usize,
    sums: &mut Sums,
) {
    let layout = IntegerRow::new(K::FORMAT, k);
    let mut totals = [_mm512_setzero_ps(); R];
    for block in 0..k / BLOCK {
        // SAFETY: the block lies in the panel; its inputs, scale and correction in each row.
        unsafe {
            let unit = panel.add(block / 2 * K::UNIT);
            if block % 2 == 0 {
                prefetch(fetches, unit, K::UNIT);
            }
            let (scales, weights) = (K::scales(unit, block % 2), K::steps(unit, block % 2));
            for (total, row) in totals.iter_mut().zip(rows) {
                let start = _mm512_set1_epi32(*row.add(layout.sums).cast::<i32>().add(block));
                let dot = dot(start, &weights, 0..8, row.add(block * BLOCK));
                let scale = _mm512_set1_ps(*row.add(layout.scales).cast::<f32>().add(block));
                *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(scales, scale), *total);
            }
        }
    }
    store(&totals, sums);
}

/// # Safety
/// As for [`tile`]; `rows` has `R` entries.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn q4_k<const R: usize>(fetches: bool, rows: &[*const u8], panel: *const u8, k: usize, sums: &mut Sums) {
    let layout = IntegerRow::new(Format::Q4K, k);
    let mut totals = [_mm512_setzero_ps(); R];
    let mut before = 0;
    for at in (0..k).step_by(SUPER_BLOCK) {
        let parts = SUPER_BLOCK.min(k - at) / BLOCK;
        let (scales_at, minima_at) = (before + 64, before + 64 + parts * 16);
        let quants_at = minima_at + parts * 16;
        let mut integers = [_mm512_setzero_si512(); R];
        // SAFETY: the super-block lies in the panel; its inputs, scales and sums lie in each row.
        unsafe {
            for part in 0..parts {
                let quants = panel.add(quants_at + part * 256);
                prefetch_twice(fetches, quants, 256);
                let weights = nibbles(quants);
                let scales = _mm512_cvtepu8_epi32(_mm_loadu_si128(panel.add(scales_at + part * 16).cast()));
                for (integer, row) in integers.iter_mut().zip(rows) {
                    let dot = dot(_mm512_setzero_si512(), &weights, 0..8, row.add(at + part * BLOCK));
                    *integer = _mm512_add_epi32(*integer, _mm512_mullo_epi32(dot, scales));
                }
            }
            prefetch_twice(fetches, panel.add(scales_at), parts * 32);
            let (scale, minimum) = (half_floats(panel.add(before)), half_floats(panel.add(before + 32)));
            for (total, (integer, row)) in totals.iter_mut().zip(integers.iter().zip(rows)) {
                let x = _mm512_set1_ps(*row.add(layout.scales).cast::<f32>().add(at / SUPER_BLOCK));
                let sums = row.add(layout.sums + at / BLOCK * 2);
                let mut below = _mm512_setzero_si512();
                for pair in 0..parts / 2 {
                    let minima = _mm512_cvtepu8_epi16(_mm256_loadu_si256(panel.add(minima_at + pair * 32).cast()));
                    let sums = sums.add(pair * 4).cast::<i32>().read_unaligned();
                    below = _mm512_dpwssd_epi32(below, minima, _mm512_set1_epi32(sums));
                }
                *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(*integer), _mm512_mul_ps(scale, x), *total);
                *total = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(below), _mm512_mul_ps(minimum, x), *total);
            }
        }
        before = quants_at + parts * 256;
    }
    store(&totals, sums);
}

/// # Safety
/// As for [`tile`]; `rows` has `R` entries.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn q6_k<const R: usize>(fetches: bool, rows: &[*const u8], panel: *const u8, k: usize, sums: &mut Sums) {
    let layout = IntegerRow::new(Format::Q6K, k);
    let mut totals = [_mm512_setzero_ps(); R];
    let mut before = 0;
    for at in (0..k).step_by(SUPER_BLOCK) {
        let units = SUPER_BLOCK.min(k - at) / INTEGER_K;
        let scales_at = before + 64;
        let quants_at = scales_at + units * 64;
        let mut integers = [_mm512_setzero_si512(); R];
        // SAFETY: the super-block lies in the panel; its inputs, scales and corrections lie in each row.
        unsafe {
            for half in 0..2 * units {
                let low = panel.add(quants_at + half / 2 * 768);
                if half % 2 == 0 {
                    prefetch(fetches, low, 768);
                }
                let weights = six_bits(low.add(half % 2 * 256), low.add(512 + half % 2 * 128));
                for quarter in 0..2 {
                    let part = half * 2 + quarter;
                    let at = at + part * 16;
                    let scales = _mm512_cvtepi8_epi32(_mm_loadu_si128(panel.add(scales_at + part * 16).cast()));
                    for (integer, row) in integers.iter_mut().zip(rows) {
                        let start = _mm512_set1_epi32(*row.add(layout.sums).cast::<i32>().add(at / 16));
                        let dot = dot(start, &weights, quarter * 4..quarter * 4 + 4, row.add(at));
                        *integer = _mm512_add_epi32(*integer, _mm512_mullo_epi32(dot, scales));
                    }
                }
            }
            prefetch(fetches, panel.add(before), 64 + units * 64);
            let scale = half_floats(panel.add(before));
            for (total, (integer, row)) in totals.iter_mut().zip(integers.iter().zip(rows)) {
                let x = _mm512_set1_ps(*row.add(layout.scales).cast::<f32>().add(at / SUPER_BLOCK));
                *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(*integer), _mm512_mul_ps(scale, x), *total);
            }
        }
        before = quants_at + units * 768;
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
    const FORMAT: Format = Format::Q8_0;
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
    const FORMAT: Format = Format::Q4_0;
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
    const FORMAT: Format = Format::Mxfp4;
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
