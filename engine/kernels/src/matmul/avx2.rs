//! Tiles in AVX2: a panel is two registers of 8 outputs, its *sides*.
//!
//! Floats: a step of k loads each panel once and multiplies it with every row, sums in registers.
//!
//! Integers: `vpmaddubsw` multiplies 4 unsigned weights of 8 outputs with 4 activations of one row into 16-bit sums of
//! two, and saturates; what may be added up before the sums are widened depends on the format's largest weight. A
//! block's weights of one side are unpacked once, into 8 registers, and then meet every row.

use std::arch::{
    asm,
    x86_64::{
        __m256, __m256i, _MM_HINT_T0, _mm_loadl_epi64, _mm_loadu_si128, _mm_prefetch, _mm256_abs_epi8,
        _mm256_add_epi16, _mm256_add_epi32, _mm256_and_si256, _mm256_blend_epi16, _mm256_blendv_epi8,
        _mm256_broadcastsi128_si256, _mm256_castsi256_ps, _mm256_cmpgt_epi8, _mm256_cmpgt_epi32, _mm256_cvtepi8_epi32,
        _mm256_cvtepi32_ps, _mm256_cvtepu8_epi16, _mm256_cvtepu8_epi32, _mm256_cvtph_ps, _mm256_fmadd_ps,
        _mm256_fnmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_mul_ps,
        _mm256_or_si256, _mm256_packs_epi32, _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32,
        _mm256_set1_epi64x, _mm256_set1_ps, _mm256_setzero_ps, _mm256_setzero_si256, _mm256_shuffle_epi8,
        _mm256_slli_epi16, _mm256_slli_epi32, _mm256_sllv_epi32, _mm256_srai_epi32, _mm256_srli_epi16,
        _mm256_storeu_ps, _mm256_sub_epi32, _mm256_xor_si256,
    },
};

use super::{INTEGER_ROWS, MXFP4_UNSIGNED, Sums, activations::IntegerRow};
use crate::format::{BLOCK, Format, INTEGER_K, SUPER_BLOCK};

/// How far ahead of the loads a panel is fetched. Panels lie one after the other, so this reaches into the next one.
const PREFETCH_BYTES: usize = 2048;

/// Rows of q4_k that meet a step of weights by turns.
const TURNS: usize = 4;

/// Fetches `bytes` bytes further on, for few rows: they wait for memory, many reuse the panel from the cache.
#[inline]
#[target_feature(enable = "avx2")]
fn prefetch(rows: usize, at: *const u8, bytes: usize) {
    if rows <= 8 {
        for line in (0..bytes).step_by(64) {
            // Past the end of the memory it is harmless: it never faults.
            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(PREFETCH_BYTES + line).cast());
        }
    }
}

/// One kind of float weights: how a step of k is loaded and multiplied.
trait Kind {
    /// Eight outputs' weights of one step, or a row's activation of that step in all lanes.
    type Step: Copy;
    /// Places of k in a step.
    const PLACES: usize;

    /// 32 bytes of a panel.
    ///
    /// # Safety
    /// Here and below: the machine has the tier; the bytes lie in the panel, or in the row.
    unsafe fn weights(panel: *const u8) -> Self::Step;

    /// 4 bytes of a row.
    unsafe fn activation(row: *const u8) -> Self::Step;

    /// `sums + x · weights`
    unsafe fn multiply_add(sums: __m256, x: Self::Step, weights: Self::Step) -> __m256;
}

/// f32 weights and activations.
struct F32;
/// bf16 weights and activations, widened to f32 by a shift.
struct Bf16;

/// Most rows and panels of a tile of `rows` rows of f32 or bf16 weights: at least 8 sums, or the additions wait for each
/// other; at most 12 beside f32 weights and 8 beside bf16 weights, which take twice the registers; and equal tiles.
pub(super) fn float_shape(format: Format, rows: usize) -> (usize, usize) {
    match rows {
        0..=1 => (1, 4),
        2 => (2, 2),
        _ => (rows.div_ceil(rows.div_ceil(if format == Format::F32 { 6 } else { 4 })), 1),
    }
}

/// The contract is in `portable.rs`.
///
/// # Safety
/// The machine has AVX2, FMA and F16C; rows and panels have the sizes that format and `k` say; no more rows and panels
/// than `tile_shape` says.
pub(super) unsafe fn tile(format: Format, rows: &[*const u8], panels: &[*const u8], k: usize, sums: &mut Sums) {
    macro_rules! by_shape {
        ($kind:ty: $($r:literal x $p:literal),*) => {
            match (rows.len(), panels.len()) {
                $(($r, $p) => floats::<$kind, $r, $p>(rows, panels, k, sums),)*
                (rows, panels) => unreachable!("tile of {rows} rows by {panels} panels"),
            }
        };
    }
    // SAFETY: the caller's promises, and the counts just matched.
    unsafe {
        match format {
            Format::F32 => by_shape!(F32: 1 x 1, 2 x 1, 3 x 1, 4 x 1, 5 x 1, 6 x 1, 1 x 2, 2 x 2, 1 x 4),
            Format::Bf16 => by_shape!(Bf16: 1 x 1, 2 x 1, 3 x 1, 4 x 1, 1 x 2, 2 x 2, 1 x 4),
            // The sums of one row stay in registers: a fifth faster with the K formats.
            _ if rows.len() == 1 => integers::<1>(format, rows, panels[0], k, sums),
            _ => integers::<INTEGER_ROWS>(format, rows, panels[0], k, sums),
        }
    }
}

/// # Safety
/// As for [`tile`]; `rows` and `panels` have `R` and `P` entries.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn floats<K: Kind, const R: usize, const P: usize>(
    rows: &[*const u8],
    panels: &[*const u8],
    k: usize,
    sums: &mut Sums,
) {
    let mut registers = [[[_mm256_setzero_ps(); 2]; P]; R];
    for step in 0..k / K::PLACES {
        // SAFETY: `step < k / PLACES` steps of 64 bytes lie in each panel and of 4 bytes in each row.
        unsafe {
            let mut weights = [[K::weights(panels[0].add(step * 64)); 2]; P];
            for (weights, panel) in weights.iter_mut().zip(panels) {
                let at = panel.add(step * 64);
                prefetch(R, at, 64);
                *weights = [K::weights(at), K::weights(at.add(32))];
            }
            for (registers, row) in registers.iter_mut().zip(rows) {
                let x = K::activation(row.add(step * 4));
                for (register, weights) in registers.as_flattened_mut().iter_mut().zip(weights.as_flattened()) {
                    *register = K::multiply_add(*register, x, *weights);
                }
            }
        }
    }
    for (registers, sums) in registers.iter().zip(sums) {
        for (sides, sums) in registers.iter().zip(sums) {
            store(sides, sums);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(sides: &[__m256; 2], sums: &mut [f32; 16]) {
    for (side, sums) in sides.iter().zip(sums.chunks_exact_mut(8)) {
        // SAFETY: 8 f32 values fill the register exactly.
        unsafe { _mm256_storeu_ps(sums.as_mut_ptr(), *side) };
    }
}

/// Writes the sums of the first `rows` rows of a tile of one panel.
#[inline]
#[target_feature(enable = "avx2")]
fn store_rows<const R: usize>([left, right]: &[[__m256; R]; 2], rows: usize, sums: &mut Sums) {
    for (sums, (left, right)) in sums.iter_mut().zip(left.iter().zip(right)).take(rows) {
        store(&[*left, *right], &mut sums[0]);
    }
}

impl Kind for F32 {
    type Step = __m256;
    const PLACES: usize = 1;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn weights(panel: *const u8) -> Self::Step {
        // SAFETY: the caller's promise.
        unsafe { _mm256_loadu_ps(panel.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn activation(row: *const u8) -> Self::Step {
        // SAFETY: the caller's promise.
        unsafe { four_as_float(row) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn multiply_add(sums: __m256, x: Self::Step, weights: Self::Step) -> __m256 {
        _mm256_fmadd_ps(x, weights, sums)
    }
}

impl Kind for Bf16 {
    type Step = (__m256, __m256);
    const PLACES: usize = 2;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn weights(panel: *const u8) -> Self::Step {
        // SAFETY: the caller's promise.
        widen(unsafe { _mm256_loadu_si256(panel.cast()) })
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn activation(row: *const u8) -> Self::Step {
        // SAFETY: the caller's promise.
        widen(unsafe { four(row) })
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn multiply_add(sums: __m256, x: Self::Step, weights: Self::Step) -> __m256 {
        _mm256_fmadd_ps(x.1, weights.1, _mm256_fmadd_ps(x.0, weights.0, sums))
    }
}

/// The lower and the upper bf16 of each pair as f32.
#[inline]
#[target_feature(enable = "avx2")]
fn widen(pairs: __m256i) -> (__m256, __m256) {
    let upper = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
    (_mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)), _mm256_castsi256_ps(_mm256_and_si256(pairs, upper)))
}

/// A tile of at most `R` rows of an integer format.
///
/// # Safety
/// As for [`tile`].
unsafe fn integers<const R: usize>(format: Format, rows: &[*const u8], panel: *const u8, k: usize, sums: &mut Sums) {
    assert!(rows.len() <= R, "tile of {} rows", rows.len());
    // SAFETY: the caller's promises.
    unsafe {
        match format {
            Format::Q8_0 => q8_0::<R>(rows, panel, k, sums),
            Format::Q4_0 => blocks::<Q4_0, R>(rows, panel, k, sums),
            Format::Mxfp4 => blocks::<Mxfp4, R>(rows, panel, k, sums),
            Format::Q4K => q4_k::<R>(rows, panel, k, sums),
            Format::Q6K => q6_k::<R>(rows, panel, k, sums),
            Format::F32 | Format::Bf16 => unreachable!("{format} is no integer format"),
        }
    }
}

/// Weights of 4 inputs of 8 outputs, for each step of a block.
type Steps = [__m256i; 8];

/// A 4-bit format with one scale for 32 inputs; two blocks make a unit.
trait Blocks {
    /// Bytes of a unit.
    const UNIT: usize;

    /// The scales of side `side` of the unit's block `half`.
    ///
    /// # Safety
    /// Here and below: the machine has the tier; `unit` leads to a whole unit, `x` to 32 activations.
    unsafe fn scales(unit: *const u8, half: usize, side: usize) -> __m256;

    /// The unsigned weights of side `side` of the unit's block `half`.
    unsafe fn steps(unit: *const u8, half: usize, side: usize) -> Steps;

    /// Σ weights · activations
    unsafe fn dot(weights: &Steps, x: *const u8) -> __m256i;
}

struct Q4_0;
struct Mxfp4;

/// # Safety
/// As for [`integers`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn blocks<K: Blocks, const R: usize>(rows: &[*const u8], panel: *const u8, k: usize, sums: &mut Sums) {
    let layout = IntegerRow::new(Format::Q4_0, k);
    let mut totals = [[_mm256_setzero_ps(); R]; 2];
    for block in 0..k / BLOCK {
        let half = block % 2;
        // SAFETY: the unit lies in the panel, the block's inputs, scale and correction lie in each row.
        unsafe {
            let unit = panel.add(block / 2 * K::UNIT);
            prefetch(rows.len(), unit.add(half * K::UNIT / 2), K::UNIT / 2);
            for (side, totals) in totals.iter_mut().enumerate() {
                let scales = K::scales(unit, half, side);
                let weights = K::steps(unit, half, side);
                for (row, total) in rows.iter().zip(totals) {
                    let correction = four(row.add(layout.sums + 4 * block));
                    let sum = _mm256_add_epi32(correction, K::dot(&weights, row.add(block * BLOCK)));
                    let x = four_as_float(row.add(layout.scales + 4 * block));
                    *total = multiply_add(sum, _mm256_mul_ps(scales, x), *total);
                }
            }
        }
    }
    store_rows(&totals, rows.len(), sums);
}

/// Unsigned 8-bit weights would saturate; magnitudes do not. Their signs go to the activations: for w < 0,
/// w · x = |w| · (!x + 1), so that a sum starts from the magnitudes of the negative weights. Tried: weights in two
/// nibbles, and 16-bit weights with `vpmaddwd` (219 and 224 GOP/s at 512 rows in place of 245, 2 cores of Zen 4).
///
/// # Safety
/// As for [`integers`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q8_0<const R: usize>(rows: &[*const u8], panel: *const u8, k: usize, sums: &mut Sums) {
    const UNIT: usize = 1088;
    let layout = IntegerRow::new(Format::Q8_0, k);
    let mut totals = [[_mm256_setzero_ps(); R]; 2];
    let mut integers = [_mm256_setzero_si256(); R];
    for block in 0..k / BLOCK {
        let half = block % 2;
        // SAFETY: the unit lies in the panel, the block's inputs and scale lie in each row.
        unsafe {
            let unit = panel.add(block / 2 * UNIT);
            prefetch(rows.len(), unit.add(half * UNIT / 2), UNIT / 2);
            for (side, totals) in totals.iter_mut().enumerate() {
                let scales = half_floats(unit.add(half * 32 + side * 16));
                // Four steps' magnitudes and signs take 8 registers.
                for part in 0..2 {
                    let quants = unit.add(64 + half * 512 + part * 256 + side * 32);
                    let (magnitudes, signs, start) = magnitudes_and_signs(quants);
                    for (index, row) in rows.iter().enumerate() {
                        let mut sum = start;
                        for (step, (magnitude, sign)) in magnitudes.iter().zip(&signs).enumerate() {
                            let x = _mm256_xor_si256(four(row.add(block * BLOCK + part * 16 + step * 4)), *sign);
                            // 2 · 127 · 127 and -2 · 128 · 128 fit 16 bits.
                            sum = _mm256_add_epi32(sum, halves(_mm256_maddubs_epi16(*magnitude, x)));
                        }
                        if part == 0 {
                            integers[index] = sum;
                        } else {
                            let sum = _mm256_add_epi32(integers[index], sum);
                            let x = four_as_float(row.add(layout.scales + 4 * block));
                            totals[index] = multiply_add(sum, _mm256_mul_ps(scales, x), totals[index]);
                        }
                    }
                }
            }
        }
    }
    store_rows(&totals, rows.len(), sums);
}

/// Of one side's weights of 4 steps: the magnitudes, ones where they are negative, and the sum of those magnitudes.
///
/// # Safety
/// The machine has the tier; `quants` leads to the side's part of 256 bytes of weights plus 128.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn magnitudes_and_signs(quants: *const u8) -> ([__m256i; 4], [__m256i; 4], __m256i) {
    let weights: [_; 4] = std::array::from_fn(|step| {
        // SAFETY: the caller's promise.
        let unsigned = unsafe { _mm256_loadu_si256(quants.add(64 * step).cast()) };
        _mm256_xor_si256(unsigned, _mm256_set1_epi8(-128))
    });
    let magnitudes = weights.map(|weights| _mm256_abs_epi8(weights));
    let signs = weights.map(|weights| _mm256_cmpgt_epi8(_mm256_setzero_si256(), weights));
    let mut negative = _mm256_setzero_si256();
    for (magnitude, sign) in magnitudes.iter().zip(&signs) {
        let pairs = _mm256_maddubs_epi16(_mm256_and_si256(*magnitude, *sign), _mm256_set1_epi8(1));
        negative = _mm256_add_epi16(negative, pairs);
    }
    (magnitudes, signs, halves(negative))
}

/// # Safety
/// As for [`integers`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q4_k<const R: usize>(rows: &[*const u8], panel: *const u8, k: usize, sums: &mut Sums) {
    let layout = IntegerRow::new(Format::Q4K, k);
    let mut totals = [[_mm256_setzero_ps(); R]; 2];
    let mut block = panel;
    for at in (0..k).step_by(SUPER_BLOCK) {
        let parts = SUPER_BLOCK.min(k - at) / BLOCK;
        // SAFETY: the super-block lies in the panel, its inputs, scales and sums lie in each row.
        unsafe {
            let scales = block.add(64);
            let minima = scales.add(parts * 16);
            let quants = minima.add(parts * 16);
            prefetch(rows.len(), block, 64 + parts * 32);
            let mut integers = [[_mm256_setzero_si256(); R]; 2];
            for part in 0..parts {
                let at = at + part * BLOCK;
                let quants = quants.add(part * 256);
                prefetch(rows.len(), quants, 256);
                for (side, integers) in integers.iter_mut().enumerate() {
                    let weights = nibbles(quants.add(side * 32));
                    let scale = _mm256_cvtepu8_epi32(_mm_loadl_epi64(scales.add(part * 16 + side * 8).cast()));
                    let scale = pairs(scale, scale);
                    // 8 · 2 · 15 · 127 fits 16 bits.
                    let take = |integer: &mut __m256i, dot| {
                        *integer = _mm256_add_epi32(*integer, _mm256_madd_epi16(dot, scale));
                    };
                    let (turns, others) = rows.as_chunks::<TURNS>();
                    let (of_turns, of_others) = integers.split_at_mut(turns.len() * TURNS);
                    for (rows, integers) in turns.iter().zip(of_turns.chunks_exact_mut(TURNS)) {
                        let dots = dots(&weights, rows.map(|row| row.add(at)));
                        integers.iter_mut().zip(dots).for_each(|(integer, dot)| take(integer, dot));
                    }
                    for (row, integer) in others.iter().zip(of_others) {
                        take(integer, dot(&weights, row.add(at)));
                    }
                }
            }
            for (index, row) in rows.iter().enumerate() {
                let mut below = [_mm256_setzero_si256(); 2];
                for pair in 0..parts / 2 {
                    let x = four(row.add(layout.sums + at / BLOCK * 2 + pair * 4));
                    for (side, below) in below.iter_mut().enumerate() {
                        let minima = _mm_loadu_si128(minima.add(pair * 32 + side * 16).cast());
                        let product = _mm256_madd_epi16(_mm256_cvtepu8_epi16(minima), x);
                        *below = _mm256_add_epi32(*below, product);
                    }
                }
                let x = four_as_float(row.add(layout.scales + at / SUPER_BLOCK * 4));
                for (side, (totals, integers)) in totals.iter_mut().zip(&integers).enumerate() {
                    let total = &mut totals[index];
                    let (scale, minimum) = (half_floats(block.add(side * 16)), half_floats(block.add(32 + side * 16)));
                    *total = multiply_add(integers[index], _mm256_mul_ps(scale, x), *total);
                    *total = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(below[side]), _mm256_mul_ps(minimum, x), *total);
                }
            }
            block = quants.add(parts * 256);
        }
    }
    store_rows(&totals, rows.len(), sums);
}

/// # Safety
/// As for [`integers`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q6_k<const R: usize>(rows: &[*const u8], panel: *const u8, k: usize, sums: &mut Sums) {
    let layout = IntegerRow::new(Format::Q6K, k);
    let mut totals = [[_mm256_setzero_ps(); R]; 2];
    let mut block = panel;
    for at in (0..k).step_by(SUPER_BLOCK) {
        let units = SUPER_BLOCK.min(k - at) / INTEGER_K;
        // SAFETY: the super-block lies in the panel, its inputs, scales and corrections lie in each row.
        unsafe {
            let scales = block.add(64);
            let quants = scales.add(units * 64);
            prefetch(rows.len(), block, 64 + units * 64);
            let mut integers = [[_mm256_setzero_si256(); R]; 2];
            for half in 0..units * 2 {
                let low = quants.add(half / 2 * 768);
                let (low, high) = (low.add(half % 2 * 256), low.add(512 + half % 2 * 128));
                prefetch(rows.len(), low, 256);
                prefetch(rows.len(), high, 128);
                let at = at + half * BLOCK;
                for (side, integers) in integers.iter_mut().enumerate() {
                    let weights = six_bits(low.add(side * 32), high.add(side * 32));
                    let scale = [0, 1].map(|part| {
                        let scales = scales.add((half * 2 + part) * 16 + side * 8);
                        _mm256_cvtepi8_epi32(_mm_loadl_epi64(scales.cast()))
                    });
                    // The corrections are multiples of 32; without it, and with it in the scales, they fit 16 bits.
                    let larger = _mm256_slli_epi16::<5>(pairs(scale[0], scale[1]));
                    let scale = scale.map(|scale| pairs(scale, scale));
                    for (integer, row) in integers.iter_mut().zip(rows) {
                        let corrections = row.add(layout.sums + at / 16 * 4).cast::<i64>().read_unaligned();
                        let corrections = _mm256_srai_epi32::<5>(_mm256_set1_epi64x(corrections));
                        let corrections = _mm256_packs_epi32(corrections, corrections);
                        let mut sum = _mm256_madd_epi16(corrections, larger);
                        for (index, two) in weights.chunks_exact(2).enumerate() {
                            // 2 · 2 · 63 · 127 fits 16 bits, and no more.
                            let two = dot(two, row.add(at + index * 8));
                            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(two, scale[index / 2]));
                        }
                        *integer = _mm256_add_epi32(*integer, sum);
                    }
                }
            }
            for (index, row) in rows.iter().enumerate() {
                let x = four_as_float(row.add(layout.scales + at / SUPER_BLOCK * 4));
                for (side, (totals, integers)) in totals.iter_mut().zip(&integers).enumerate() {
                    let scale = _mm256_mul_ps(half_floats(block.add(side * 16)), x);
                    totals[index] = multiply_add(integers[index], scale, totals[index]);
                }
            }
            block = quants.add(units * 768);
        }
    }
    store_rows(&totals, rows.len(), sums);
}

/// Σ over the steps of unsigned weights · activations, in 16-bit halves that must not overflow.
///
/// # Safety
/// The machine has the tier; `x` leads to 4 activations a step.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn dot(weights: &[__m256i], x: *const u8) -> __m256i {
    let mut sum = _mm256_setzero_si256();
    for (step, weights) in weights.iter().enumerate() {
        // SAFETY: the caller's promise.
        let product = _mm256_maddubs_epi16(*weights, unsafe { four(x.add(4 * step)) });
        sum = if step == 0 { product } else { _mm256_add_epi16(sum, product) };
    }
    sum
}

/// [`dot`] of some rows by turns: the sums of one row after the other wait for each other. Other formats gain nothing by it
/// (docs/performance.md).
///
/// # Safety
/// As for [`dot`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn dots(weights: &[__m256i], rows: [*const u8; TURNS]) -> [__m256i; TURNS] {
    let mut sums = [_mm256_setzero_si256(); TURNS];
    for (step, weights) in weights.iter().enumerate() {
        // SAFETY: the caller's promise; and no instruction but a claim that the sums change, or the compiler would take
        // one row after the other.
        unsafe {
            for (sum, row) in sums.iter_mut().zip(rows) {
                let product = _mm256_maddubs_epi16(*weights, four(row.add(4 * step)));
                *sum = if step == 0 { product } else { _mm256_add_epi16(*sum, product) };
            }
            let [a, b, c, d] = &mut sums;
            asm!(
                "/* {0} {1} {2} {3} */",
                inout(ymm_reg) * a,
                inout(ymm_reg) * b,
                inout(ymm_reg) * c,
                inout(ymm_reg) * d,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
    }
    sums
}

/// The sums of both 16-bit halves of each lane.
#[inline]
#[target_feature(enable = "avx2")]
fn halves(sums: __m256i) -> __m256i {
    _mm256_madd_epi16(sums, _mm256_set1_epi16(1))
}

/// 4 bytes in all lanes.
///
/// # Safety
/// The machine has the tier; the bytes lie at `at`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn four(at: *const u8) -> __m256i {
    // SAFETY: the caller's promise.
    _mm256_set1_epi32(unsafe { at.cast::<i32>().read_unaligned() })
}

/// An f32 in all lanes.
///
/// # Safety
/// The machine has the tier; its bytes lie at `at`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn four_as_float(at: *const u8) -> __m256 {
    // SAFETY: the caller's promise.
    _mm256_set1_ps(unsafe { at.cast::<f32>().read_unaligned() })
}

/// `f32(integers) · scales + total`, rounded once.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn multiply_add(integers: __m256i, scales: __m256, total: __m256) -> __m256 {
    _mm256_fmadd_ps(_mm256_cvtepi32_ps(integers), scales, total)
}

/// Lanes of two 16-bit numbers from two registers of 32-bit ones.
#[inline]
#[target_feature(enable = "avx2")]
fn pairs(low: __m256i, high: __m256i) -> __m256i {
    _mm256_blend_epi16::<0xaa>(low, _mm256_slli_epi32::<16>(high))
}

/// 8 f16 values as f32.
///
/// # Safety
/// The machine has the tier; 16 bytes lie at `at`.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn half_floats(at: *const u8) -> __m256 {
    // SAFETY: the caller's promise.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(at.cast()) })
}

/// One side of the 8 steps of 32 inputs in nibble pairs.
///
/// # Safety
/// The machine has the tier; `at` leads to the side's part of 256 bytes of nibble pairs.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn nibbles(at: *const u8) -> Steps {
    let mask = _mm256_set1_epi8(0x0f);
    let mut steps = [mask; 8];
    for (index, pair) in steps.chunks_exact_mut(2).enumerate() {
        // SAFETY: the caller's promise.
        let both = unsafe { _mm256_loadu_si256(at.add(64 * index).cast()) };
        pair[0] = _mm256_and_si256(both, mask);
        pair[1] = _mm256_and_si256(_mm256_srli_epi16::<4>(both), mask);
    }
    steps
}

/// One side of the 8 steps of 32 inputs whose low 4 bits are nibble pairs at `low`, and whose high 2 bits are at `high`.
///
/// # Safety
/// The machine has the tier; the pointers lead to the side's part of 256 and of 128 bytes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn six_bits(low: *const u8, high: *const u8) -> Steps {
    let mask = _mm256_set1_epi8(0x30);
    // SAFETY: the caller's promise.
    let mut steps = unsafe { nibbles(low) };
    for (index, four) in steps.chunks_exact_mut(4).enumerate() {
        // SAFETY: the caller's promise.
        let high = unsafe { _mm256_loadu_si256(high.add(64 * index).cast()) };
        // What a shift carries over from the neighbouring byte falls to the mask.
        let shifted = [_mm256_slli_epi16::<4>(high), _mm256_slli_epi16::<2>(high), high, _mm256_srli_epi16::<2>(high)];
        for (step, high) in four.iter_mut().zip(shifted) {
            *step = _mm256_or_si256(*step, _mm256_and_si256(high, mask));
        }
    }
    steps
}

impl Blocks for Q4_0 {
    const UNIT: usize = 576;

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn scales(unit: *const u8, half: usize, side: usize) -> __m256 {
        // SAFETY: the caller's promises.
        unsafe { half_floats(unit.add(32 * half + 16 * side)) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn steps(unit: *const u8, half: usize, side: usize) -> Steps {
        // SAFETY: the caller's promises.
        unsafe { nibbles(unit.add(64 + 256 * half + 32 * side)) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn dot(weights: &Steps, x: *const u8) -> __m256i {
        // SAFETY: the caller's promise. 8 · 2 · 15 · 127 fits 16 bits.
        halves(unsafe { dot(weights, x) })
    }
}

impl Blocks for Mxfp4 {
    const UNIT: usize = 544;

    /// Half of 2^(e - 127), since the weights count in halves; the two smallest are subnormal.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn scales(unit: *const u8, half: usize, side: usize) -> __m256 {
        // SAFETY: the caller's promises.
        let exponents = _mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(unit.add(16 * half + 8 * side).cast()) });
        let normal = _mm256_slli_epi32::<23>(_mm256_sub_epi32(exponents, _mm256_set1_epi32(1)));
        let subnormal = _mm256_sllv_epi32(_mm256_set1_epi32(0x0020_0000), exponents);
        let small = _mm256_cmpgt_epi32(_mm256_set1_epi32(2), exponents);
        _mm256_castsi256_ps(_mm256_blendv_epi8(normal, subnormal, small))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn steps(unit: *const u8, half: usize, side: usize) -> Steps {
        // SAFETY: the caller's promises; the table has 16 bytes.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(MXFP4_UNSIGNED.as_ptr().cast()));
            nibbles(unit.add(32 + 256 * half + 32 * side)).map(|codes| _mm256_shuffle_epi8(table, codes))
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn dot(weights: &Steps, x: *const u8) -> __m256i {
        let (first, second) = weights.split_at(4);
        // SAFETY: the caller's promise. 4 · 2 · 24 · 127 fits 16 bits.
        let (first, second) = unsafe { (halves(dot(first, x)), halves(dot(second, x.add(16)))) };
        _mm256_add_epi32(first, second)
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::{
        format::{Layout, PANEL, Packed, pack_gguf_panel},
        isa::Isa,
        matmul::matmul,
        pool::Pool,
        test_support::bits,
    };

    #[test]
    fn the_greatest_weights_and_activations_do_not_saturate() {
        let pool = Pool::new(1);
        // GGUF's weights and bytes of a block, and the places of its f16 numbers.
        let formats: [(Format, usize, usize, &[usize]); 5] = [
            (Format::Q8_0, 32, 34, &[0]),
            (Format::Q4_0, 32, 18, &[0]),
            (Format::Mxfp4, 32, 17, &[]),
            (Format::Q4K, 256, 144, &[0, 2]),
            (Format::Q6K, 256, 210, &[208]),
        ];
        let k = 512;
        for (format, weights, bytes, scales) in formats {
            for fill in [0x00, 0x7f, 0x80, 0x77, 0xff_u8] {
                let mut block = vec![fill; bytes];
                for at in scales {
                    block[*at..at + 2].copy_from_slice(&f16::ONE.to_le_bytes());
                }
                let layout = Layout { format, n: PANEL, k };
                let mut panel = vec![0; layout.bytes()];
                pack_gguf_panel(format, k, &block.repeat(PANEL * k / weights), &mut panel);
                for signs in [[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]] {
                    // Some rows by turns, and one that is left over.
                    let rows = TURNS + 1;
                    let x: Vec<f32> = (0..k * rows).map(|i| signs[i % 2]).collect();
                    let [contract, y] = [Isa::Portable, Isa::Avx2].map(|isa| {
                        let mut y = vec![0.0; PANEL * rows];
                        matmul(&pool, isa, &x, &Packed::new(layout, &panel), &mut y);
                        y
                    });
                    assert_eq!(bits(&y), bits(&contract), "{format} of {fill:#x} by {signs:?}");
                }
            }
        }
    }
}
