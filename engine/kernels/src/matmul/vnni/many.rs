//! Many rows: a tile of 6 rows by 4 panels keeps its 24 integer sums in registers, so that each product's operands are one
//! spread activation for all panels and one load of weights for all rows, and no sum waits for the one before it. (12 rows
//! by 2 panels take 14 loads for as many products in place of 10, and more pointers than the machine has registers for.)
//!
//! k goes by in super-blocks: these of four panels are unpacked into the first cache, and then meet every row.

use std::{
    arch::{
        asm,
        x86_64::{
            __m512, __m512i, _mm_loadu_si128, _mm256_loadu_si256, _mm512_add_epi16, _mm512_add_epi32, _mm512_add_ps,
            _mm512_cvtepi32_ps, _mm512_cvtepu8_epi16, _mm512_cvtepu8_epi32, _mm512_dpbusd_epi32, _mm512_dpwssd_epi32,
            _mm512_fmadd_ps, _mm512_fnmadd_ps, _mm512_loadu_ps, _mm512_maddubs_epi16, _mm512_mul_ps, _mm512_or_si512,
            _mm512_set1_epi16, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512,
            _mm512_slli_epi16, _mm512_slli_epi32, _mm512_srai_epi16, _mm512_srli_epi16, _mm512_storeu_ps,
            _mm512_sub_epi16, _mm512_ternarylogic_epi32,
        },
    },
    ops::Range,
};

use super::{Blocks, Mxfp4, Q4_0, Q8_0, Steps, half_floats, nibbles, prefetch, six_bits};
use crate::{
    format::{BLOCK, Format, INTEGER_K, PANEL, SUPER_BLOCK},
    isa::Isa,
    matmul::{TILE_PANELS, activations::IntegerRow},
};

/// More rows than these are many: fewer wait for memory, which several streams slow down.
const FEW: usize = 8;
/// Most rows of a tile.
const ROWS: usize = 6;

/// Whether a product of so many rows goes this way.
pub(in crate::matmul) fn takes(isa: Isa, format: Format, rows: usize) -> bool {
    let vnni = matches!(isa, Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx);
    vnni && !matches!(format, Format::F32 | Format::Bf16) && rows > FEW
}

/// One register of each panel.
type Each<T> = [T; TILE_PANELS];
/// The sums of a row.
type Totals = Each<[f32; PANEL]>;

/// A super-block of the panels of a tile: what [`Steps`] has, one block after the other, and what the format scales its sums
/// with.
struct Weights {
    steps: [Each<__m512i>; SUPER_BLOCK / 4],
    /// Of each block of 32 inputs; of `q4_k` the integers, as floats.
    scales: [Each<__m512>; SUPER_BLOCK / BLOCK],
    /// `q4_k`: the minima of two blocks each, as 16-bit integers.
    minima: [Each<__m512i>; SUPER_BLOCK / BLOCK / 2],
    /// `q6_k`: the higher bytes of what `steps` has the lower bytes of.
    high: [Each<__m512i>; SUPER_BLOCK / 4],
    /// `q4_k` and `q6_k`: what scales and minima are multiples of.
    scale: Each<__m512>,
    minimum: Each<__m512>,
}

impl Weights {
    /// Keeps a block's steps of panel `index`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn put(&mut self, block: usize, index: usize, steps: Steps) {
        for (panels, step) in self.steps[8 * block..].iter_mut().zip(steps) {
            panels[index] = step;
        }
    }
}

/// Calls `sink(row, first_panel, sums)` with the products of every row and panel; whole tiles of panels.
///
/// # Safety
/// The machine has AVX-512 F/BW/DQ/VL and VNNI; each row pointer leads to activations in the form of the format and `k`, and
/// each pointer that `panel_start` gives to a panel of it.
pub(in crate::matmul) unsafe fn walk(
    format: Format,
    k: usize,
    rows: &[*const u8],
    panels: Range<usize>,
    panel_start: impl Fn(usize) -> *const u8,
    sink: impl FnMut(usize, usize, &[[f32; PANEL]]),
) {
    // SAFETY: the caller's promises.
    unsafe {
        match format {
            Format::Q8_0 => super_blocks::<OneScale<Q8_0>>(k, rows, panels, panel_start, sink),
            Format::Q4_0 => super_blocks::<OneScale<Q4_0>>(k, rows, panels, panel_start, sink),
            Format::Mxfp4 => super_blocks::<OneScale<Mxfp4>>(k, rows, panels, panel_start, sink),
            Format::Q4K => super_blocks::<Q4K>(k, rows, panels, panel_start, sink),
            Format::Q6K => super_blocks::<Q6K>(k, rows, panels, panel_start, sink),
            Format::F32 | Format::Bf16 => unreachable!("{format} is no integer format"),
        }
    }
}

/// # Safety
/// As for [`walk`].
unsafe fn super_blocks<K: Kind>(
    k: usize,
    rows: &[*const u8],
    panels: Range<usize>,
    panel_start: impl Fn(usize) -> *const u8,
    mut sink: impl FnMut(usize, usize, &[[f32; PANEL]]),
) {
    // SAFETY: plain numbers.
    let mut weights: Weights = unsafe { std::mem::zeroed() };
    let mut totals = vec![[[0.0; PANEL]; TILE_PANELS]; rows.len()];
    // Like tiles rather than full ones and a rest: few rows leave sums that wait for each other.
    let tile_rows = rows.len().div_ceil(rows.len().div_ceil(ROWS));
    for first in panels.step_by(TILE_PANELS) {
        totals.fill([[0.0; PANEL]; TILE_PANELS]);
        for start in (0..k).step_by(SUPER_BLOCK) {
            let inputs = start..k.min(start + SUPER_BLOCK);
            let bytes = K::FORMAT.panel_bytes(start)..K::FORMAT.panel_bytes(inputs.end);
            for index in 0..TILE_PANELS {
                // SAFETY: the caller's promises; these bytes of a panel have these inputs.
                unsafe {
                    let panel = panel_start(first + index).add(bytes.start);
                    prefetch(true, panel, bytes.len());
                    K::unpack(panel, inputs.len(), index, &mut weights);
                }
            }
            for (rows, totals) in rows.chunks(tile_rows).zip(totals.chunks_mut(tile_rows)) {
                // SAFETY: as above; there are as many totals as rows, at most `ROWS`.
                unsafe { tile::<K>(rows, k, inputs.clone(), &weights, totals) };
            }
        }
        for (row, totals) in totals.iter().enumerate() {
            sink(row, first, totals);
        }
    }
}

/// # Safety
/// As for [`Kind::add`]; as many totals as rows, at most [`ROWS`].
unsafe fn tile<K: Kind>(rows: &[*const u8], k: usize, inputs: Range<usize>, weights: &Weights, totals: &mut [Totals]) {
    macro_rules! by_rows {
        ($($r:literal)*) => {
            match rows.len() {
                $($r => if let (Some(rows), Some(totals)) = (rows.first_chunk::<$r>(), totals.first_chunk_mut()) {
                    // SAFETY: the caller's promises.
                    unsafe { K::add(rows, k, inputs, weights, totals) }
                })*
                rows => unreachable!("tile of {rows} rows"),
            }
        };
    }
    by_rows!(1 2 3 4 5 6);
}

/// How a format is unpacked, and how its sums are scaled.
trait Kind {
    const FORMAT: Format;

    /// Writes `inputs` inputs of a panel, at most a super-block, to the places of `panel` `index` of the weights.
    ///
    /// # Safety
    /// This and below: the machine has the tier; the panel, from `at` on, has these inputs.
    unsafe fn unpack(at: *const u8, inputs: usize, index: usize, weights: &mut Weights);

    /// Adds the products of these inputs to the totals.
    ///
    /// # Safety
    /// Each row is of `k` inputs.
    unsafe fn add<const R: usize>(
        rows: &[*const u8; R],
        k: usize,
        inputs: Range<usize>,
        weights: &Weights,
        totals: &mut [Totals; R],
    );
}

/// `sums + Σ over the steps of weights · activations`, of rows whose activations lie `at` bytes after their pointers. Always
/// inlined, which a function with the tier's features can't ask for: called, it would hand the sums over in memory.
///
/// # Safety
/// The machine has the tier; 4 activations a step lie there.
#[inline(always)]
unsafe fn dots<const R: usize>(
    mut sums: [Each<__m512i>; R],
    rows: &[*const u8; R],
    at: usize,
    steps: &[Each<__m512i>; 8],
) -> [Each<__m512i>; R] {
    /// Rows and steps written out: of a loop that is not unrolled the compiler keeps the sums in memory.
    macro_rules! each_row {
        ($step:literal: $($row:literal)*) => {
            $(if $row < R {
                // Opaque, or each product would load and spread the activations for itself.
                let x = opaque(_mm512_set1_epi32(rows[$row].add(at + 4 * $step).cast::<i32>().read_unaligned()));
                let (sum, weights) = (sums[$row], steps[$step]);
                sums[$row] = [
                    _mm512_dpbusd_epi32(sum[0], weights[0], x),
                    _mm512_dpbusd_epi32(sum[1], weights[1], x),
                    _mm512_dpbusd_epi32(sum[2], weights[2], x),
                    _mm512_dpbusd_epi32(sum[3], weights[3], x),
                ];
            })*
        };
    }
    macro_rules! each_step {
        ($($step:literal)*) => { $(each_row!($step: 0 1 2 3 4 5);)* };
    }
    // SAFETY: the caller's promises.
    unsafe {
        each_step!(0 1 2 3 4 5 6 7);
    }
    sums
}

/// `x`, of which the compiler knows no more than that.
#[inline]
#[target_feature(enable = "avx512f")]
fn opaque(mut x: __m512i) -> __m512i {
    // SAFETY: no instruction but a claim that `x` changes.
    unsafe { asm!("/* {0} */", inout(zmm_reg) x, options(pure, nomem, nostack, preserves_flags)) };
    x
}

/// Changes a total by `f`.
#[inline]
#[target_feature(enable = "avx512f")]
fn change(total: &mut [f32; PANEL], f: impl FnOnce(__m512) -> __m512) {
    // SAFETY: 16 f32 values fill a register exactly.
    unsafe { _mm512_storeu_ps(total.as_mut_ptr(), f(_mm512_loadu_ps(total.as_ptr()))) };
}

/// The formats with one scale for 32 inputs.
struct OneScale<K>(std::marker::PhantomData<K>);

impl<K: Blocks> Kind for OneScale<K> {
    const FORMAT: Format = K::FORMAT;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn unpack(at: *const u8, inputs: usize, index: usize, weights: &mut Weights) {
        for block in 0..inputs / BLOCK {
            // SAFETY: the caller's promises: the block's unit lies there.
            unsafe {
                let unit = at.add(block / 2 * K::UNIT);
                weights.scales[block][index] = K::scales(unit, block % 2);
                weights.put(block, index, K::steps(unit, block % 2));
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn add<const R: usize>(
        rows: &[*const u8; R],
        k: usize,
        inputs: Range<usize>,
        weights: &Weights,
        totals: &mut [Totals; R],
    ) {
        let layout = IntegerRow::new(K::FORMAT, k);
        let (steps, _) = weights.steps.as_chunks::<8>();
        let blocks = inputs.start / BLOCK..inputs.end / BLOCK;
        for (block, (steps, scales)) in blocks.zip(steps.iter().zip(&weights.scales)) {
            // SAFETY: the block's inputs, scale and correction lie in each row.
            unsafe {
                let mut starts = [[_mm512_setzero_si512(); TILE_PANELS]; R];
                for (start, row) in starts.iter_mut().zip(rows) {
                    *start = [_mm512_set1_epi32(*row.add(layout.sums).cast::<i32>().add(block)); TILE_PANELS];
                }
                let dots = dots(starts, rows, block * BLOCK, steps);
                for (dots, (row, totals)) in dots.iter().zip(rows.iter().zip(totals.iter_mut())) {
                    let x = _mm512_set1_ps(*row.add(layout.scales).cast::<f32>().add(block));
                    for (dot, (scale, total)) in dots.iter().zip(scales.iter().zip(totals)) {
                        let (dot, scale) = (_mm512_cvtepi32_ps(*dot), _mm512_mul_ps(*scale, x));
                        change(total, |total| _mm512_fmadd_ps(dot, scale, total));
                    }
                }
            }
        }
    }
}

struct Q4K;

impl Kind for Q4K {
    const FORMAT: Format = Format::Q4K;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn unpack(at: *const u8, inputs: usize, index: usize, weights: &mut Weights) {
        let parts = inputs / BLOCK;
        // SAFETY: the caller's promises: the super-block has its two scales, then scales, minima and quants of each part.
        unsafe {
            (weights.scale[index], weights.minimum[index]) = (half_floats(at), half_floats(at.add(32)));
            let (scales, minima) = (at.add(64), at.add(64 + parts * 16));
            let quants = minima.add(parts * 16);
            for part in 0..parts {
                let integers = _mm512_cvtepu8_epi32(_mm_loadu_si128(scales.add(part * 16).cast()));
                weights.scales[part][index] = _mm512_cvtepi32_ps(integers);
                weights.put(part, index, nibbles(quants.add(part * 256)));
            }
            for pair in 0..parts / 2 {
                weights.minima[pair][index] = _mm512_cvtepu8_epi16(_mm256_loadu_si256(minima.add(pair * 32).cast()));
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn add<const R: usize>(
        rows: &[*const u8; R],
        k: usize,
        inputs: Range<usize>,
        weights: &Weights,
        totals: &mut [Totals; R],
    ) {
        /// Parts whose scaled sums add up exactly in f32: a sum of 32 products is at most 32 · 15 · 127, a scale 63, and four
        /// of these less than 2²⁴. A product and a sum in floats cost less than a product in 32-bit integers.
        const EXACT: usize = 4;
        let layout = IntegerRow::new(Format::Q4K, k);
        let parts = inputs.len() / BLOCK;
        let (steps, _) = weights.steps.as_chunks::<8>();
        let mut halves = [[[_mm512_setzero_ps(); TILE_PANELS]; R]; SUPER_BLOCK / BLOCK / EXACT];
        for part in 0..parts {
            // SAFETY: the part's inputs lie in each row.
            let dots = unsafe {
                dots([[_mm512_setzero_si512(); TILE_PANELS]; R], rows, inputs.start + part * BLOCK, &steps[part])
            };
            for (sums, dots) in halves[part / EXACT].iter_mut().zip(&dots) {
                for (sum, (dot, scale)) in sums.iter_mut().zip(dots.iter().zip(&weights.scales[part])) {
                    *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(*dot), *scale, *sum);
                }
            }
        }
        let [first, second] = &halves;
        for (index, (row, totals)) in rows.iter().zip(totals).enumerate() {
            // SAFETY: the super-block's scale and sums lie in each row.
            let (x, sums) = unsafe {
                let x = _mm512_set1_ps(*row.add(layout.scales).cast::<f32>().add(inputs.start / SUPER_BLOCK));
                (x, row.add(layout.sums + inputs.start / BLOCK * 2).cast::<i32>())
            };
            let mut below = [_mm512_setzero_si512(); TILE_PANELS];
            for (pair, minima) in weights.minima.iter().take(parts / 2).enumerate() {
                // SAFETY: as above.
                let sums = _mm512_set1_epi32(unsafe { sums.add(pair).read_unaligned() });
                for (below, minima) in below.iter_mut().zip(minima) {
                    *below = _mm512_dpwssd_epi32(*below, *minima, sums);
                }
            }
            for (panel, total) in totals.iter_mut().enumerate() {
                // Rounded once, as the sum in integers would be.
                let sum = _mm512_add_ps(first[index][panel], second[index][panel]);
                let (scale, minimum) = (weights.scale[panel], weights.minimum[panel]);
                let below = _mm512_cvtepi32_ps(below[panel]);
                change(total, |total| {
                    let total = _mm512_fmadd_ps(sum, _mm512_mul_ps(scale, x), total);
                    _mm512_fnmadd_ps(below, _mm512_mul_ps(minimum, x), total)
                });
            }
        }
    }
}

/// The weights of 16 inputs times their scale, as two bytes: 4096 more than that is never negative, and what these add to a
/// sum leaves by the corrections. Then no sum is scaled before its super-block ends.
struct Q6K;

impl Kind for Q6K {
    const FORMAT: Format = Format::Q6K;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn unpack(at: *const u8, inputs: usize, index: usize, weights: &mut Weights) {
        /// a ? b : c
        const SELECT: i32 = 0xca;
        let units = inputs / INTEGER_K;
        let low_bytes = _mm512_set1_epi16(0xff);
        // SAFETY: the caller's promises: the super-block has its scale, then the scales of its parts, then its units' quants.
        unsafe {
            weights.scale[index] = half_floats(at);
            let (scales, quants) = (at.add(64), at.add(64 + units * 64));
            for block in 0..2 * units {
                let low = quants.add(block / 2 * 768);
                let steps = six_bits(low.add(block % 2 * 256), low.add(512 + block % 2 * 128));
                for (half, steps) in steps.as_chunks::<4>().0.iter().enumerate() {
                    let scale = _mm512_cvtepu8_epi32(_mm_loadu_si128(scales.add((2 * block + half) * 16).cast()));
                    // In each 16 bits, for the odd and the even weights.
                    let odd = _mm512_slli_epi16::<8>(_mm512_or_si512(scale, _mm512_slli_epi32::<16>(scale)));
                    let even = _mm512_srli_epi16::<8>(odd);
                    let offset = _mm512_sub_epi16(_mm512_set1_epi16(4096), _mm512_srai_epi16::<3>(odd));
                    for (step, quants) in steps.iter().enumerate() {
                        let even = _mm512_add_epi16(offset, _mm512_maddubs_epi16(*quants, even));
                        let odd = _mm512_add_epi16(offset, _mm512_maddubs_epi16(*quants, odd));
                        let (high, low) = (_mm512_srli_epi16::<8>(even), _mm512_slli_epi16::<8>(odd));
                        let place = 8 * block + 4 * half + step;
                        weights.high[place][index] = _mm512_ternarylogic_epi32::<SELECT>(low_bytes, high, odd);
                        weights.steps[place][index] = _mm512_ternarylogic_epi32::<SELECT>(low_bytes, even, low);
                    }
                }
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn add<const R: usize>(
        rows: &[*const u8; R],
        k: usize,
        inputs: Range<usize>,
        weights: &Weights,
        totals: &mut [Totals; R],
    ) {
        let layout = IntegerRow::new(Format::Q6K, k);
        let (high, _) = weights.high[..inputs.len() / 4].as_chunks::<8>();
        let (low, _) = weights.steps[..inputs.len() / 4].as_chunks::<8>();
        let mut sums = [[_mm512_setzero_si512(); TILE_PANELS]; R];
        for (block, steps) in high.iter().enumerate() {
            // SAFETY: the block's inputs lie in each row.
            sums = unsafe { dots(sums, rows, inputs.start + block * BLOCK, steps) };
        }
        for (sums, row) in sums.iter_mut().zip(rows) {
            // SAFETY: a correction for each 16 inputs lies in each row.
            let corrections = unsafe {
                let first = row.add(layout.sums).cast::<i32>().add(inputs.start / 16);
                std::slice::from_raw_parts(first, inputs.len() / 16)
            };
            // They are of weights that are 32 too large, and here these are 4096 too large.
            let start = _mm512_set1_epi32(corrections.iter().sum::<i32>() * 128);
            for sum in sums {
                *sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(*sum), start);
            }
        }
        for (block, steps) in low.iter().enumerate() {
            // SAFETY: as above.
            sums = unsafe { dots(sums, rows, inputs.start + block * BLOCK, steps) };
        }
        for (sums, (row, totals)) in sums.iter().zip(rows.iter().zip(totals)) {
            // SAFETY: the super-block's scale lies in each row.
            let x = unsafe { *row.add(layout.scales).cast::<f32>().add(inputs.start / SUPER_BLOCK) };
            for (panel, (sum, total)) in sums.iter().zip(totals).enumerate() {
                let (sum, scale) = (_mm512_cvtepi32_ps(*sum), _mm512_mul_ps(weights.scale[panel], _mm512_set1_ps(x)));
                change(total, |total| _mm512_fmadd_ps(sum, scale, total));
            }
        }
    }
}
