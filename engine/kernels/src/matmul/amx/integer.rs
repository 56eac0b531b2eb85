//! Integer weights on the tile registers, with the bits of `portable.rs`.
//!
//! - One scale for 32 inputs: these fill half the depth of a register. Each block's sums go through memory, where 16
//!   outputs of a row are converted, scaled and added as in `vnni`.
//! - Super-blocks: scale · quant, an integer, is cut into two digits that fit a byte each, high · 2^shift + low, so
//!   that the sums of all 256 inputs gather in two registers: 8 products of a whole depth, and one way through memory. A
//!   product of half the depth for each part would take as long, or twice that for parts of 16, and then eight or sixteen
//!   times as many sums would go through memory, and be multiplied by scales.
//! - Minima: Σ minimum · sum over the 8 parts of a super-block is a product too. A minimum has 6 bits and a sum 13, whose
//!   digits of 7 and 6 are bf16 numbers as they are: one bf16 product gives it exactly.
//!
//! Weights are unpacked once for all rows; then each 16 rows are multiplied while the sums of those before are added, a
//! product and a part of the rows by turns, so that neither waits for the other.

use std::{
    arch::x86_64::{
        __m512, __m512i, _mm_loadu_si128, _mm256_and_si256, _mm256_castps_si256, _mm256_cvtepi16_epi32,
        _mm256_cvtepi32_ps, _mm256_loadu_si256, _mm256_or_si256, _mm256_set1_epi32, _mm256_srai_epi32,
        _mm256_srli_epi32, _mm256_storeu_si256, _mm512_add_epi32, _mm512_and_si512, _mm512_castps_si512,
        _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps, _mm512_cvtepu8_epi32, _mm512_cvtepu16_epi32, _mm512_fmadd_ps,
        _mm512_fnmadd_ps, _mm512_load_ps, _mm512_load_si512, _mm512_loadu_ps, _mm512_maddubs_epi16,
        _mm512_mask_blend_epi8, _mm512_mul_ps, _mm512_mullo_epi16, _mm512_or_si512, _mm512_set1_epi8,
        _mm512_set1_epi16, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512,
        _mm512_slli_epi16, _mm512_slli_epi32, _mm512_srli_epi16, _mm512_srli_epi32, _mm512_store_si512,
        _mm512_storeu_ps, _mm512_sub_epi8, _mm512_sub_epi16,
    },
    ops::Range,
};

use super::{
    Workspace, grow, prefetch,
    registers::{
        LINE, Line, ROWS, Shape, W, W2, X, X2, load, multiply_bf16, multiply_signed, multiply_unsigned, store, zero,
    },
};
use crate::{
    format::{BLOCK, Format, INTEGER_K, PANEL, SUPER_BLOCK},
    matmul::{
        activations::{IntegerRow, offset},
        vnni::{Blocks, Mxfp4, Q4_0, Q8_0, half_floats, nibbles, six_bits},
    },
};

/// Lines of a panel's unpacked weights: two digits of a super-block, and a register of minima.
pub(super) const WEIGHTS: usize = MINIMA + ROWS;
/// Where the minima begin.
const MINIMA: usize = 2 * SUPER_BLOCK / 4;
/// Parts of a super-block that have a minimum of their own.
const PARTS: usize = SUPER_BLOCK / BLOCK;
/// Panels that meet the same activations: these come from the second cache, half as often as for one panel.
pub(super) const PANELS: usize = 2;
/// Blocks of a group, one for each register of sums.
const GROUP: usize = 4;
/// Units of a group of blocks, and of a super-block.
const GROUP_UNITS: usize = GROUP * BLOCK / INTEGER_K;
const SUPER_BLOCK_UNITS: usize = SUPER_BLOCK / INTEGER_K;
/// The register of the minima's products: super-blocks have one operand of activations at a time.
const BELOW: u8 = X2;
/// Rows whose sums are added beside a product.
const QUARTER: usize = ROWS / 4;
/// The contract is in `mod.rs`.
///
/// # Safety
/// As for [`super::walk`].
pub(super) unsafe fn walk(
    workspace: &mut Workspace,
    format: Format,
    k: usize,
    rows: &[*const u8],
    panels: Range<usize>,
    panel_start: impl Fn(usize) -> *const u8,
    mut sink: impl FnMut(usize, usize, &[[f32; PANEL]]),
) {
    let is_super = matches!(format, Format::Q4K | Format::Q6K);
    let units = k / INTEGER_K;
    let row_groups = rows.len().div_ceil(ROWS);
    // SAFETY: the caller's promises.
    let activations = unsafe {
        workspace.configure(if is_super { Shape::Whole } else { Shape::Half });
        lay_scales(workspace, format, k, rows);
        workspace.lay(rows, units)
    };
    for first in panels.clone().step_by(PANELS) {
        let count = PANELS.min(panels.end - first);
        let tile = Tile {
            starts: std::array::from_fn(|index| panel_start(first + index.min(count - 1))),
            panels: count,
            units,
            row_groups,
            activations,
            scales: workspace.scales.as_ptr().cast(),
            part_sums: workspace.part_sums.as_ptr(),
            weights: workspace.weights.as_mut_ptr(),
            products: workspace.products.as_mut_ptr(),
            sums: workspace.sums(rows.len(), count),
        };
        // SAFETY: the caller's promises, and the pointers just made.
        unsafe {
            match format {
                Format::Q8_0 => tile.blocks::<Q8_0>(offset(format)),
                Format::Q4_0 => tile.blocks::<Q4_0>(offset(format)),
                Format::Mxfp4 => tile.blocks::<Mxfp4>(offset(format)),
                Format::Q4K => tile.super_blocks::<Q4K>(),
                Format::Q6K => tile.super_blocks::<Q6K>(),
                Format::F32 | Format::Bf16 => unreachable!("{format} is no integer format"),
            }
        }
        workspace.each_row(rows.len(), count, |row, sums| sink(row, first, sums));
    }
}

/// Lays the rows' scales side by side, `[groups][rows][4]` of blocks and `[super-blocks][rows]`; and of `q4_k` the sums
/// of each super-block's parts as two digits, bf16 pairs at the front of a line: `[super-blocks][rows]` lines.
///
/// # Safety
/// As for [`super::walk`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn lay_scales(workspace: &mut Workspace, format: Format, k: usize, rows: &[*const u8]) {
    let layout = IntegerRow::new(format, k);
    let is_super = matches!(format, Format::Q4K | Format::Q6K);
    let (inputs, scales) = if is_super { (SUPER_BLOCK, 1) } else { (GROUP * BLOCK, GROUP) };
    let (groups, padded) = (k.div_ceil(inputs), rows.len().next_multiple_of(ROWS));
    grow(&mut workspace.scales, (groups * padded * scales).div_ceil(PANEL));
    let lines = workspace.scales.as_mut_ptr().cast::<f32>();
    let per_row = (layout.sums - layout.scales) / size_of::<f32>();
    for group in 0..groups {
        let count = scales.min(per_row - group * scales);
        for (index, row) in rows.iter().enumerate() {
            // SAFETY: the row has so many scales of the group, and there is room for them.
            unsafe {
                let from = row.add(layout.scales).cast::<f32>().add(group * scales);
                lines.add((group * padded + index) * scales).copy_from_nonoverlapping(from, count);
            }
        }
    }
    if format != Format::Q4K {
        return;
    }
    grow(&mut workspace.part_sums, groups * padded);
    for group in 0..groups {
        let count = PARTS.min(k / BLOCK - group * PARTS);
        for (index, row) in rows.iter().enumerate() {
            let mut sums = [0_i16; PARTS];
            // SAFETY: the row has so many sums of the super-block, and there is a line for them, whose other half stays 0.
            unsafe {
                let from = row.add(layout.sums).cast::<i16>().add(group * PARTS);
                sums.as_mut_ptr().copy_from_nonoverlapping(from, count);
                let sums = _mm256_cvtepi16_epi32(_mm_loadu_si128(sums.as_ptr().cast()));
                let high = _mm256_cvtepi32_ps(_mm256_srai_epi32::<6>(sums));
                let low = _mm256_cvtepi32_ps(_mm256_and_si256(sums, _mm256_set1_epi32(63)));
                let high = _mm256_srli_epi32::<16>(_mm256_castps_si256(high));
                let line = workspace.part_sums.as_mut_ptr().add(group * padded + index);
                _mm256_storeu_si256(line.cast(), _mm256_or_si256(high, _mm256_castps_si256(low)));
            }
        }
    }
}

/// Some rows by one or two panels.
struct Tile {
    starts: [*const u8; PANELS],
    panels: usize,
    /// 64 inputs each.
    units: usize,
    /// 16 rows each; what comes of rows past the last one is not used.
    row_groups: usize,
    /// The rows as [`Workspace::lay`] lays them.
    activations: *const Line,
    /// As [`lay_scales`] lays them.
    scales: *const f32,
    part_sums: *const Line,
    weights: *mut Line,
    products: *mut Line,
    /// `[rows][panels][16]`
    sums: *mut f32,
}

/// What is multiplied at a time: a group of blocks or a super-block of a panel, with 16 rows.
#[derive(Clone, Copy)]
struct Step {
    group: usize,
    rows: usize,
    panel: usize,
}

impl Tile {
    /// Of `size` units each, group `group`'s; the last one may have fewer.
    fn group(&self, group: usize, size: usize) -> Range<usize> {
        group * size..self.units.min((group + 1) * size)
    }

    /// The step after `step`, or the first one: the panels by turns, which meet the same activations, then the rows, then
    /// the groups.
    #[inline(always)]
    fn after(&self, step: Option<Step>, groups: usize) -> Option<Step> {
        let next = match step {
            None => Step { group: 0, rows: 0, panel: 0 },
            Some(step) if step.panel + 1 < self.panels => Step { panel: step.panel + 1, ..step },
            Some(Step { group, rows, .. }) if rows + 1 < self.row_groups => Step { group, rows: rows + 1, panel: 0 },
            Some(Step { group, .. }) => Step { group: group + 1, rows: 0, panel: 0 },
        };
        (next.group < groups).then_some(next)
    }

    /// Where a panel's weights are unpacked to.
    ///
    /// # Safety
    /// The workspace has room for so many panels.
    #[inline(always)]
    unsafe fn unpacked(&self, panel: usize) -> *mut Line {
        // SAFETY: the caller's promise.
        unsafe { self.weights.add(panel * WEIGHTS) }
    }

    /// Unit `unit` of the 16 rows of `step`: `[16]` lines.
    ///
    /// # Safety
    /// This and all below: as for [`super::walk`], and the pointers lead to what the fields' names say.
    #[inline(always)]
    unsafe fn x(&self, step: Step, unit: usize) -> *const u8 {
        // SAFETY: the unit lies in the activations' lines.
        unsafe { self.activations.add((step.rows * self.units + unit) * ROWS).cast() }
    }

    /// Index of the first row of quarter `quarter` of `step` in what [`lay_scales`] lays; and the row's sums.
    #[inline(always)]
    unsafe fn quarter(&self, step: Step, quarter: usize) -> (usize, *mut f32) {
        let row = step.rows * ROWS + quarter * QUARTER;
        // SAFETY: each row has sums.
        let sums = unsafe { self.sums.add((row * self.panels + step.panel) * PANEL) };
        (step.group * self.row_groups * ROWS + row, sums)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn clear(&self) {
        for index in 0..self.row_groups * ROWS * self.panels {
            // SAFETY: all rows have sums.
            unsafe { _mm512_storeu_ps(self.sums.add(index * PANEL), _mm512_setzero_ps()) };
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn blocks<K: Blocks>(&self, offset: i32) {
        let groups = self.units.div_ceil(GROUP_UNITS);
        // Of this group and the one before.
        let mut scales = [[[_mm512_setzero_ps(); GROUP]; PANELS]; 2];
        let mut last = None;
        // SAFETY: the caller's promises.
        unsafe {
            self.clear();
            loop {
                let next = self.after(last, groups);
                if let Some(Step { group, rows: 0, panel }) = next {
                    scales[group % 2][panel] = self.unpack_blocks::<K>(group, panel, offset);
                }
                if last.is_some() {
                    self.store_products();
                }
                for quarter in 0..GROUP {
                    if let Some(step) = next {
                        self.multiply_block(step, quarter);
                    }
                    if let Some(step) = last {
                        self.add_blocks(step, quarter, &scales[step.group % 2][step.panel]);
                    }
                }
                if next.is_none() {
                    break;
                }
                last = next;
            }
        }
    }

    /// Signed weights of a group, 8 lines a block; returns the blocks' scales.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn unpack_blocks<K: Blocks>(&self, group: usize, panel: usize, offset: i32) -> [__m512; GROUP] {
        let offset = _mm512_set1_epi8(offset as i8);
        let mut scales = [_mm512_setzero_ps(); GROUP];
        // SAFETY: the group's units lie in the panel, and its lines in the workspace.
        unsafe {
            for (index, unit) in self.group(group, GROUP_UNITS).enumerate() {
                let unit = self.starts[panel].add(unit * K::UNIT);
                prefetch(unit, K::UNIT);
                for half in 0..2 {
                    let block = 2 * index + half;
                    scales[block] = K::scales(unit, half);
                    for (step, weights) in K::steps(unit, half).into_iter().enumerate() {
                        let line = self.unpacked(panel).add(block * (BLOCK / 4) + step);
                        _mm512_store_si512(line.cast(), _mm512_sub_epi8(weights, offset));
                    }
                }
            }
        }
        scales
    }

    /// Register `block` = the 16 rows' inputs of block `block` of the group times its weights.
    #[inline(always)]
    unsafe fn multiply_block(&self, step: Step, block: usize) {
        let units = self.group(step.group, GROUP_UNITS);
        if block / 2 >= units.len() {
            return;
        }
        // SAFETY: the group's lines have been filled.
        unsafe {
            load::<X>(self.x(step, units.start + block / 2).add(block % 2 * BLOCK), LINE);
            load::<W>(self.unpacked(step.panel).add(block * (BLOCK / 4)).cast(), LINE);
            macro_rules! multiply {
                ($($register:literal)*) => {
                    match block {
                        $($register => {
                            zero::<$register>();
                            multiply_signed::<$register, X, W>();
                        })*
                        _ => unreachable!("a group has {GROUP} blocks"),
                    }
                };
            }
            multiply!(0 1 2 3);
        }
    }

    /// Registers 0 to 3 to memory.
    #[inline(always)]
    unsafe fn store_products(&self) {
        // SAFETY: there is room for four.
        unsafe {
            store::<0>(self.products.cast(), LINE);
            store::<1>(self.products.add(ROWS).cast(), LINE);
            store::<2>(self.products.add(2 * ROWS).cast(), LINE);
            store::<3>(self.products.add(3 * ROWS).cast(), LINE);
        }
    }

    /// Adds the stored products of a quarter of the rows to their sums.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn add_blocks(&self, step: Step, quarter: usize, scales: &[__m512; GROUP]) {
        // SAFETY: the caller's promises.
        unsafe {
            match self.group(step.group, GROUP_UNITS).len() {
                GROUP_UNITS => self.add_some_blocks::<GROUP>(step, quarter, scales),
                _ => self.add_some_blocks::<{ GROUP / 2 }>(step, quarter, scales),
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn add_some_blocks<const N: usize>(&self, step: Step, quarter: usize, scales: &[__m512; GROUP]) {
        // SAFETY: the rows have scales, sums and products.
        unsafe {
            let (first, sums) = self.quarter(step, quarter);
            for row in 0..QUARTER {
                let (x, sums) = (self.scales.add((first + row) * GROUP), sums.add(row * self.panels * PANEL));
                let mut total = _mm512_loadu_ps(sums);
                for (block, scales) in scales.iter().enumerate().take(N) {
                    let product = self.products.add(block * ROWS + quarter * QUARTER + row);
                    let sum = _mm512_cvtepi32_ps(_mm512_load_si512(product.cast()));
                    total = _mm512_fmadd_ps(sum, _mm512_mul_ps(*scales, _mm512_set1_ps(*x.add(block))), total);
                }
                _mm512_storeu_ps(sums, total);
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn super_blocks<K: SuperBlocks>(&self) {
        let blocks = self.units.div_ceil(SUPER_BLOCK_UNITS);
        let (mut last, mut is_even) = (None, true);
        // SAFETY: the caller's promises; all super-blocks but the last one are whole.
        unsafe {
            self.clear();
            let mut heads = [[K::head(self.starts[0], self.group(0, SUPER_BLOCK_UNITS).len()); PANELS]; 2];
            loop {
                let next = self.after(last, blocks);
                if let Some(Step { group, rows: 0, panel }) = next {
                    heads[group % 2][panel] = self.unpack_super_block::<K>(group, panel);
                }
                if is_even {
                    self.super_step::<K, 0, 1, 2, 3>(next, last, &heads);
                } else {
                    self.super_step::<K, 2, 3, 0, 1>(next, last, &heads);
                }
                if next.is_none() {
                    break;
                }
                (last, is_even) = (next, !is_even);
            }
        }
    }

    /// The digits of a super-block, for each unit 16 lines of the high ones and 16 of the low ones; returns its scales.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn unpack_super_block<K: SuperBlocks>(&self, block: usize, panel: usize) -> Head {
        let units = self.group(block, SUPER_BLOCK_UNITS).len();
        // SAFETY: the super-block lies in the panel, and its lines in the workspace.
        unsafe {
            let at = self.starts[panel].add(block * K::bytes(SUPER_BLOCK_UNITS));
            prefetch(at, K::bytes(units));
            for unit in 0..units {
                for half in 0..2 {
                    let (high, low) = K::digits(at, units, 2 * unit + half);
                    let lines = self.unpacked(panel).add((4 * unit + half) * (BLOCK / 4));
                    for step in 0..BLOCK / 4 {
                        _mm512_store_si512(lines.add(step).cast(), high[step]);
                        _mm512_store_si512(lines.add(ROWS + step).cast(), low[step]);
                    }
                }
            }
            if K::MINIMA {
                for part in 0..PARTS {
                    let minima = if part < 2 * units { K::minima(at, units, part) } else { _mm512_setzero_si512() };
                    _mm512_store_si512(self.unpacked(panel).add(MINIMA + part).cast(), minima);
                }
            }
            K::head(at, units)
        }
    }

    /// Multiplies the high and low digits of step `next` into registers `H` and `L`, its minima into `BELOW`, and adds the
    /// products of step `last`, in `LAST_H`, `LAST_L` and `BELOW`, to their sums.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn super_step<K: SuperBlocks, const H: u8, const L: u8, const LAST_H: u8, const LAST_L: u8>(
        &self,
        next: Option<Step>,
        last: Option<Step>,
        heads: &[[Head; PANELS]; 2],
    ) {
        // SAFETY: the caller's promises.
        unsafe {
            if last.is_some() {
                store::<LAST_H>(self.products.cast(), LINE);
                store::<LAST_L>(self.products.add(ROWS).cast(), LINE);
                if K::MINIMA {
                    store::<BELOW>(self.products.add(2 * ROWS).cast(), LINE);
                }
            }
            zero::<H>();
            zero::<L>();
            if let Some(step) = next.filter(|_| K::MINIMA) {
                zero::<BELOW>();
                load::<X>(self.part_sums.add(self.quarter(step, 0).0).cast(), LINE);
                load::<W>(self.unpacked(step.panel).add(MINIMA).cast(), LINE);
                multiply_bf16::<BELOW, X, W>();
            }
            for quarter in 0..SUPER_BLOCK_UNITS {
                if let Some(step) = next {
                    let units = self.group(step.group, SUPER_BLOCK_UNITS);
                    if quarter < units.len() {
                        let high = self.unpacked(step.panel).add(2 * quarter * ROWS);
                        load::<X>(self.x(step, units.start + quarter), LINE);
                        load::<W>(high.cast(), LINE);
                        multiply_signed::<H, X, W>();
                        load::<W2>(high.add(ROWS).cast(), LINE);
                        multiply_unsigned::<L, X, W2>();
                    }
                }
                if let Some(step) = last {
                    self.add_super_block::<K>(step, quarter, &heads[step.group % 2][step.panel]);
                }
            }
        }
    }

    /// Adds the stored products of a quarter of the rows to their sums.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn add_super_block<K: SuperBlocks>(&self, step: Step, quarter: usize, head: &Head) {
        // SAFETY: the rows have scales, sums and products.
        unsafe {
            let (first, sums) = self.quarter(step, quarter);
            for row in 0..QUARTER {
                let sums = sums.add(row * self.panels * PANEL);
                let product = self.products.add(quarter * QUARTER + row);
                let high = _mm512_load_si512(product.cast());
                let low = _mm512_load_si512(product.add(ROWS).cast());
                let x = _mm512_set1_ps(*self.scales.add(first + row));
                let scale = _mm512_mul_ps(head.scale, x);
                let sum = _mm512_cvtepi32_ps(K::combine(high, low));
                let mut total = _mm512_fmadd_ps(sum, scale, _mm512_loadu_ps(sums));
                if K::MINIMA {
                    let below = _mm512_load_ps(product.add(2 * ROWS).cast());
                    total = _mm512_fnmadd_ps(below, _mm512_mul_ps(head.minimum, x), total);
                }
                _mm512_storeu_ps(sums, total);
            }
        }
    }
}

/// Weights of 32 inputs: 4 inputs of 16 outputs a step.
type Steps = [__m512i; BLOCK / 4];

/// What the sums of a super-block are scaled with.
#[derive(Clone, Copy)]
struct Head {
    scale: __m512,
    /// If the format has [`SuperBlocks::MINIMA`].
    minimum: __m512,
}

/// A format of super-blocks.
trait SuperBlocks {
    /// Whether each part has a minimum.
    const MINIMA: bool;

    /// Bytes of a super-block of `units` units.
    fn bytes(units: usize) -> usize;

    /// scale · quant of the 32 inputs from `32 * index` on: the high digits, signed, and the low ones, unsigned.
    ///
    /// # Safety
    /// This and below: the machine has the tier; a super-block of `units` units lies at `at`.
    unsafe fn digits(at: *const u8, units: usize, index: usize) -> (Steps, Steps);

    /// The minima of part `part` for the digits of [`lay_scales`]: bf16 pairs of 64 · minimum and minimum.
    unsafe fn minima(at: *const u8, units: usize, part: usize) -> __m512i;

    /// Σ scale · quant · x of the sums of both digits.
    unsafe fn combine(high: __m512i, low: __m512i) -> __m512i;

    /// The scales.
    unsafe fn head(at: *const u8, units: usize) -> Head;
}

struct Q4K;
struct Q6K;

/// scale = 8 · high + low, both 0..=7, and a digit times a quant, 0..=15, is at most 105: two bytes are multiplied as
/// one number of 16 bits, and nothing carries over.
impl SuperBlocks for Q4K {
    const MINIMA: bool = true;

    fn bytes(units: usize) -> usize {
        64 + units * 576
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn digits(at: *const u8, units: usize, index: usize) -> (Steps, Steps) {
        // SAFETY: the part's scales and quants lie in the super-block.
        let (scale, mut low) = unsafe {
            let scale = _mm512_cvtepu8_epi32(_mm_loadu_si128(at.add(64 + index * PANEL).cast()));
            (scale, nibbles(at.add(64 + units * 64 + index * 256)))
        };
        let scale = _mm512_or_si512(scale, _mm512_slli_epi32::<16>(scale));
        let (high_digit, low_digit) = (_mm512_srli_epi16::<3>(scale), _mm512_and_si512(scale, _mm512_set1_epi16(7)));
        let mut high = low;
        for (high, low) in high.iter_mut().zip(&mut low) {
            *high = _mm512_mullo_epi16(*high, high_digit);
            *low = _mm512_mullo_epi16(*low, low_digit);
        }
        (high, low)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn combine(high: __m512i, low: __m512i) -> __m512i {
        _mm512_add_epi32(_mm512_slli_epi32::<3>(high), low)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn minima(at: *const u8, units: usize, part: usize) -> __m512i {
        // SAFETY: the minima of 16 outputs are 16 bytes, of two parts by turns, and lie behind the scales.
        let pairs = unsafe { _mm256_loadu_si256(at.add(64 + units * 32 + part / 2 * 32).cast()) };
        let minima = _mm512_cvtepu16_epi32(pairs);
        let minima = if part.is_multiple_of(2) { minima } else { _mm512_srli_epi32::<8>(minima) };
        let minima = _mm512_cvtepi32_ps(_mm512_and_si512(minima, _mm512_set1_epi32(0xff)));
        let high = _mm512_srli_epi32::<16>(_mm512_castps_si512(_mm512_mul_ps(minima, _mm512_set1_ps(64.0))));
        _mm512_or_si512(high, _mm512_castps_si512(minima))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn head(at: *const u8, _units: usize) -> Head {
        // SAFETY: the super-block begins with both.
        unsafe { Head { scale: half_floats(at), minimum: half_floats(at.add(32)) } }
    }
}

/// scale · quant has 13 bits and a sign, -4064 to 4096: high and low byte.
impl SuperBlocks for Q6K {
    const MINIMA: bool = false;

    fn bytes(units: usize) -> usize {
        64 + units * 832
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn digits(at: *const u8, units: usize, index: usize) -> (Steps, Steps) {
        /// The upper byte of each 16 bits.
        const UPPER: u64 = 0xaaaa_aaaa_aaaa_aaaa;
        let (unit, half) = (index / 2, index % 2);
        // SAFETY: the quants lie in the super-block.
        let weights = unsafe {
            let quants = at.add(64 + units * 64 + unit * 768);
            six_bits(quants.add(half * 256), quants.add(512 + half * 128))
        };
        let (mut high, mut low) = ([_mm512_setzero_si512(); 8], [_mm512_setzero_si512(); 8]);
        for quarter in 0..2 {
            // SAFETY: the scales lie in the super-block.
            let scale = unsafe { _mm_loadu_si128(at.add(64 + (2 * index + quarter) * PANEL).cast()) };
            let scale = _mm512_cvtepi8_epi32(scale);
            let even = _mm512_and_si512(scale, _mm512_set1_epi32(0xff));
            let even = _mm512_or_si512(even, _mm512_slli_epi32::<16>(even));
            let odd = _mm512_slli_epi16::<8>(even);
            let zero = _mm512_maddubs_epi16(_mm512_set1_epi8(32), even);
            for step in quarter * 4..quarter * 4 + 4 {
                // Each 16 bits: one quant times the scale, the other times 0.
                let even = _mm512_sub_epi16(_mm512_maddubs_epi16(weights[step], even), zero);
                let odd = _mm512_sub_epi16(_mm512_maddubs_epi16(weights[step], odd), zero);
                high[step] = _mm512_mask_blend_epi8(UPPER, _mm512_srli_epi16::<8>(even), odd);
                low[step] = _mm512_mask_blend_epi8(UPPER, even, _mm512_slli_epi16::<8>(odd));
            }
        }
        (high, low)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn combine(high: __m512i, low: __m512i) -> __m512i {
        _mm512_add_epi32(_mm512_slli_epi32::<8>(high), low)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn minima(_at: *const u8, _units: usize, _part: usize) -> __m512i {
        unreachable!("q6_k has no minima")
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn head(at: *const u8, _units: usize) -> Head {
        // SAFETY: the super-block begins with the scales.
        unsafe { Head { scale: half_floats(at), minimum: _mm512_setzero_ps() } }
    }
}
