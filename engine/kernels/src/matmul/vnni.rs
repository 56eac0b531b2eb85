//! Tiles of the integer formats in AVX-512 VNNI: a register holds 4 inputs of 16 outputs, and one `vpdpbusd` multiplies
//! them with 4 activations of one row. With one panel it reads and spreads these by itself; two panels share them.
//!
//! A block's weights are unpacked once, into 8 registers a panel, and then meet every row.

use std::{
    arch::{
        asm,
        x86_64::{
            __m512, __m512i, _MM_HINT_T0, _MM_HINT_T1, _mm_loadu_si128, _mm_prefetch, _mm256_loadu_si256,
            _mm512_add_epi32, _mm512_and_si512, _mm512_broadcast_i32x4, _mm512_castsi512_ps, _mm512_cmplt_epu32_mask,
            _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps, _mm512_cvtepu8_epi16, _mm512_cvtepu8_epi32, _mm512_cvtph_ps,
            _mm512_dpbusd_epi32, _mm512_dpwssd_epi32, _mm512_fmadd_ps, _mm512_fnmadd_ps, _mm512_loadu_si512,
            _mm512_mask_blend_epi32, _mm512_mul_ps, _mm512_mullo_epi32, _mm512_set1_epi8, _mm512_set1_epi32,
            _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_shuffle_epi8, _mm512_slli_epi16,
            _mm512_slli_epi32, _mm512_sllv_epi32, _mm512_srli_epi16, _mm512_storeu_ps, _mm512_sub_epi32,
            _mm512_ternarylogic_epi32,
        },
    },
    ops::Range,
};

use super::{INTEGER_ROWS, MXFP4_UNSIGNED, Sums, activations::IntegerRow};
use crate::{
    format::{BLOCK, Format, INTEGER_K, SUPER_BLOCK},
    isa::Isa,
};

/// How far ahead of the loads packed weights are fetched into the second cache. Panels lie one after the other, so this
/// reaches into the next.
const FAR_BYTES: usize = 8192;
/// How far ahead they are fetched on into the first one.
const NEAR_BYTES: usize = 3072;

/// Unsigned weights of 4 inputs of 16 outputs, for each step of a block.
pub(super) type Steps = [__m512i; 8];

/// More rows than these meet two panels at a time: an activation that is spread once for both costs one load in place of two
/// (an Ice Lake at hand took 0.30 ns for a `vpdpbusd` that loads and spreads, and 0.18 between registers). Fewer wait for
/// memory, which two streams slow down.
const SINGLE_ROWS: usize = 8;

/// Most panels of a tile of `rows` rows.
pub(super) fn panels(rows: usize) -> usize {
    if rows > SINGLE_ROWS { 2 } else { 1 }
}

/// The contract is in `portable.rs`.
///
/// # Safety
/// The machine has AVX-512 F/BW/DQ/VL and VNNI; rows have the form and panels the size that format and `k` say; one
/// panel or two, and at most [`INTEGER_ROWS`] rows.
pub(super) unsafe fn tile(
    isa: Isa,
    format: Format,
    rows: &[*const u8],
    panels: &[*const u8],
    k: usize,
    sums: &mut Sums,
) {
    /// Compiles the call for each number of rows of one panel, and for any of two, which it names `R` and `P`.
    macro_rules! by_shape {
        ($call:expr) => { by_shape!($call; 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16) };
        ($call:expr; $($r:literal)*) => {
            match (rows.len(), panels.len()) {
                $(($r, 1) => {
                    const R: usize = $r;
                    const P: usize = 1;
                    // SAFETY: the caller's promises, and the counts just matched.
                    unsafe { $call }
                })*
                (..=INTEGER_ROWS, 2) => {
                    const R: usize = INTEGER_ROWS;
                    const P: usize = 2;
                    // SAFETY: as above.
                    unsafe { $call }
                }
                (rows, panels) => unreachable!("tile of {rows} rows by {panels} panels"),
            }
        };
    }
    // With one or two rows the loads themselves run far enough ahead, and fetching on top of that costs (Zen 4, one row of
    // `q4_k`: 35 GB/s without, 28 with), but where the memory answers late (a Xeon with AMX: 16 and 22). With more, the
    // arithmetic of one block fills the core's window and no load of the next is in it.
    let fetches = rows.len() >= 3 || isa == Isa::Amx;
    match format {
        Format::Q8_0 => by_shape!(blocks::<Q8_0, R, P>(fetches, rows, panels, k, sums)),
        Format::Q4_0 => by_shape!(blocks::<Q4_0, R, P>(fetches, rows, panels, k, sums)),
        Format::Mxfp4 => by_shape!(blocks::<Mxfp4, R, P>(fetches, rows, panels, k, sums)),
        Format::Q4K => by_shape!(q4_k::<R, P>(fetches, rows, panels, k, sums)),
        Format::Q6K => by_shape!(q6_k::<R, P>(fetches, rows, panels, k, sums)),
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

/// `start + Σ over these steps of weights · activations` of one row, for each panel's weights.
///
/// # Safety
/// The machine has the tier; `x` leads to 4 activations a step.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn dot<const P: usize>(start: __m512i, weights: &[Steps; P], steps: Range<usize>, x: *const u8) -> [__m512i; P] {
    let mut sums = [start; P];
    for (place, step) in steps.enumerate() {
        // SAFETY: the caller's promise.
        let mut x = _mm512_set1_epi32(unsafe { x.add(4 * place).cast::<i32>().read_unaligned() });
        if P > 1 {
            // Opaque, or each product would load and spread it for itself.
            // SAFETY: no instruction but a claim that `x` changes.
            unsafe { asm!("/* {0} */", inout(zmm_reg) x, options(pure, nomem, nostack, preserves_flags)) };
        }
        for (sum, weights) in sums.iter_mut().zip(weights) {
            *sum = _mm512_dpbusd_epi32(*sum, weights[step], x);
        }
    }
    sums
}

/// # Safety
/// As for [`tile`]; `rows` has at most `R` entries and `panels` has `P`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn blocks<K: Blocks, const R: usize, const P: usize>(
    fetches: bool,
    rows: &[*const u8],
    panels: &[*const u8],
    k: usize,
    sums: &mut Sums,
) {
    let layout = IntegerRow::new(Format::Q8_0, k);
    let mut totals = [[_mm512_setzero_ps(); P]; R];
    for unit in 0..k / INTEGER_K {
        for half in 0..2 {
            let block = 2 * unit + half;
            let (mut scales, mut weights) = ([_mm512_setzero_ps(); P], [[_mm512_setzero_si512(); 8]; P]);
            for (panel, (scales, weights)) in panels.iter().zip(scales.iter_mut().zip(&mut weights)) {
                // SAFETY: the unit lies in the panel.
                unsafe {
                    let at = panel.add(unit * K::UNIT);
                    if half == 0 {
                        prefetch(fetches, at, K::UNIT);
                    }
                    (*scales, *weights) = (K::scales(at, half), K::steps(at, half));
                }
            }
            for (totals, row) in totals.iter_mut().zip(rows) {
                // SAFETY: the block's inputs, scales and corrections lie in each row.
                let (dots, scale) = unsafe {
                    let start = _mm512_set1_epi32(*row.add(layout.sums).cast::<i32>().add(block));
                    let dots = dot(start, &weights, 0..8, row.add(block * BLOCK));
                    (dots, _mm512_set1_ps(*row.add(layout.scales).cast::<f32>().add(block)))
                };
                for (total, (dot, scales)) in totals.iter_mut().zip(dots.iter().zip(&scales)) {
                    *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(*dot), _mm512_mul_ps(*scales, scale), *total);
                }
            }
        }
    }
    store(&totals, sums);
}

/// # Safety
/// As for [`tile`]; `rows` has at most `R` entries and `panels` has `P`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn q4_k<const R: usize, const P: usize>(
    fetches: bool,
    rows: &[*const u8],
    panels: &[*const u8],
    k: usize,
    sums: &mut Sums,
) {
    let layout = IntegerRow::new(Format::Q4K, k);
    let mut totals = [[_mm512_setzero_ps(); P]; R];
    let mut before = 0;
    for at in (0..k).step_by(SUPER_BLOCK) {
        let parts = SUPER_BLOCK.min(k - at) / BLOCK;
        let (scales_at, minima_at) = (before + 64, before + 64 + parts * 16);
        let quants_at = minima_at + parts * 16;
        let mut integers = [[_mm512_setzero_si512(); P]; R];
        for part in 0..parts {
            let (mut scales, mut weights) = ([_mm512_setzero_si512(); P], [[_mm512_setzero_si512(); 8]; P]);
            for (panel, (scales, weights)) in panels.iter().zip(scales.iter_mut().zip(&mut weights)) {
                // SAFETY: the super-block lies in the panel.
                unsafe {
                    let quants = panel.add(quants_at + part * 256);
                    prefetch_twice(fetches, quants, 256);
                    *weights = nibbles(quants);
                    *scales = _mm512_cvtepu8_epi32(_mm_loadu_si128(panel.add(scales_at + part * 16).cast()));
                }
            }
            for (integers, row) in integers.iter_mut().zip(rows) {
                // SAFETY: the part's inputs lie in each row.
                let dots = unsafe { dot(_mm512_setzero_si512(), &weights, 0..8, row.add(at + part * BLOCK)) };
                for (integer, (dot, scales)) in integers.iter_mut().zip(dots.iter().zip(&scales)) {
                    *integer = _mm512_add_epi32(*integer, _mm512_mullo_epi32(*dot, *scales));
                }
            }
        }
        for (index, panel) in panels.iter().enumerate() {
            // SAFETY: the super-block lies in the panel, its scales and sums lie in each row.
            unsafe {
                prefetch_twice(fetches, panel.add(scales_at), parts * 32);
                let (scale, minimum) = (half_floats(panel.add(before)), half_floats(panel.add(before + 32)));
                for (row, (totals, integers)) in rows.iter().zip(totals.iter_mut().zip(&integers)) {
                    let (total, integer) = (&mut totals[index], integers[index]);
                    let x = _mm512_set1_ps(*row.add(layout.scales).cast::<f32>().add(at / SUPER_BLOCK));
                    let sums = row.add(layout.sums + at / BLOCK * 2);
                    let mut below = _mm512_setzero_si512();
                    for pair in 0..parts / 2 {
                        let minima = panel.add(minima_at + pair * 32);
                        let minima = _mm512_cvtepu8_epi16(_mm256_loadu_si256(minima.cast()));
                        let sums = sums.add(pair * 4).cast::<i32>().read_unaligned();
                        below = _mm512_dpwssd_epi32(below, minima, _mm512_set1_epi32(sums));
                    }
                    *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(integer), _mm512_mul_ps(scale, x), *total);
                    *total = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(below), _mm512_mul_ps(minimum, x), *total);
                }
            }
        }
        before = quants_at + parts * 256;
    }
    store(&totals, sums);
}

/// # Safety
/// As for [`tile`]; `rows` has at most `R` entries and `panels` has `P`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn q6_k<const R: usize, const P: usize>(
    fetches: bool,
    rows: &[*const u8],
    panels: &[*const u8],
    k: usize,
    sums: &mut Sums,
) {
    let layout = IntegerRow::new(Format::Q6K, k);
    let mut totals = [[_mm512_setzero_ps(); P]; R];
    let mut before = 0;
    for at in (0..k).step_by(SUPER_BLOCK) {
        let units = SUPER_BLOCK.min(k - at) / INTEGER_K;
        let scales_at = before + 64;
        let quants_at = scales_at + units * 64;
        let mut integers = [[_mm512_setzero_si512(); P]; R];
        for half in 0..2 * units {
            let mut weights = [[_mm512_setzero_si512(); 8]; P];
            for (panel, weights) in panels.iter().zip(&mut weights) {
                // SAFETY: the super-block lies in the panel.
                unsafe {
                    let low = panel.add(quants_at + half / 2 * 768);
                    if half % 2 == 0 {
                        prefetch(fetches, low, 768);
                    }
                    *weights = six_bits(low.add(half % 2 * 256), low.add(512 + half % 2 * 128));
                }
            }
            for quarter in 0..2 {
                let part = half * 2 + quarter;
                let at = at + part * 16;
                let mut scales = [_mm512_setzero_si512(); P];
                for (panel, scales) in panels.iter().zip(&mut scales) {
                    // SAFETY: the super-block lies in the panel.
                    let bytes = unsafe { _mm_loadu_si128(panel.add(scales_at + part * 16).cast()) };
                    *scales = _mm512_cvtepi8_epi32(bytes);
                }
                for (integers, row) in integers.iter_mut().zip(rows) {
                    // SAFETY: the part's inputs and correction lie in each row.
                    let dots = unsafe {
                        let start = _mm512_set1_epi32(*row.add(layout.sums).cast::<i32>().add(at / 16));
                        dot(start, &weights, quarter * 4..quarter * 4 + 4, row.add(at))
                    };
                    for (integer, (dot, scales)) in integers.iter_mut().zip(dots.iter().zip(&scales)) {
                        *integer = _mm512_add_epi32(*integer, _mm512_mullo_epi32(*dot, *scales));
                    }
                }
            }
        }
        for (index, panel) in panels.iter().enumerate() {
            // SAFETY: the super-block lies in the panel, its scales lie in each row.
            unsafe {
                prefetch(fetches, panel.add(before), 64 + units * 64);
                let scale = half_floats(panel.add(before));
                for (row, (totals, integers)) in rows.iter().zip(totals.iter_mut().zip(&integers)) {
                    let x = _mm512_set1_ps(*row.add(layout.scales).cast::<f32>().add(at / SUPER_BLOCK));
                    let product = _mm512_mul_ps(scale, x);
                    totals[index] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(integers[index]), product, totals[index]);
                }
            }
        }
        before = quants_at + units * 768;
    }
    store(&totals, sums);
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store<const R: usize, const P: usize>(totals: &[[__m512; P]; R], sums: &mut Sums) {
    for (totals, sums) in totals.iter().zip(sums) {
        for (total, sums) in totals.iter().zip(sums) {
            // SAFETY: 16 f32 values fill the register exactly.
            unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), *total) };
        }
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
