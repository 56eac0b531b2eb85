//! Integer weights on the tile registers, with the bits of `portable.rs`.
//!
//! - One scale for 32 inputs: these fill half the depth of a register. Each block's sums go through memory, where 16
//!   outputs of a row are converted, scaled and added as in `vnni.rs`: by llvm-mca 30 cycles for 16 rows, against 16 for
//!   the product.
//! - Super-blocks: scale · quant, an integer, is cut into two digits that fit a byte each, high · 2^shift + low, so
//!   that the sums of all 256 inputs gather in two registers: 8 products of a whole depth (128 cycles for 16 rows), and
//!   one way through memory. A product of half the depth for each part would take the same 128 cycles, or 256 for
//!   parts of 16, and then eight or sixteen times as many sums would go through memory, and be multiplied by scales.
//!
//! Weights are unpacked one group ahead of the products, and sums added one behind, so that neither waits: all three
//! kinds of work are independent of each other in any stretch of the program.

use std::arch::x86_64::{
    __m512, __m512i, _mm_loadu_si128, _mm256_loadu_si256, _mm512_add_epi32, _mm512_and_si512, _mm512_cvtepi8_epi32,
    _mm512_cvtepi32_ps, _mm512_cvtepu8_epi16, _mm512_cvtepu8_epi32, _mm512_dpwssd_epi32, _mm512_fmadd_ps,
    _mm512_fnmadd_ps, _mm512_load_si512, _mm512_loadu_ps, _mm512_maddubs_epi16, _mm512_mask_blend_epi8, _mm512_mul_ps,
    _mm512_mullo_epi16, _mm512_or_si512, _mm512_set1_epi8, _mm512_set1_epi16, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_setzero_ps, _mm512_setzero_si512, _mm512_slli_epi16, _mm512_slli_epi32, _mm512_srli_epi16,
    _mm512_store_si512, _mm512_storeu_ps, _mm512_sub_epi8, _mm512_sub_epi16,
};

use super::{
    Workspace, gather, prefetch,
    registers::{HALF_W, HALF_X, LINE, Line, ROWS, W, X, load, multiply_signed, multiply_unsigned, store, zero},
};
use crate::{
    format::{BLOCK, Format, INTEGER_K, PANEL, SUPER_BLOCK},
    matmul::{
        Sums, TILE_PANELS, TILE_ROWS,
        activations::{IntegerRow, offset},
        vnni::{Blocks, Mxfp4, Q4_0, Q8_0, half_floats, nibbles, six_bits},
    },
};

/// Lines of unpacked weights of a group: two digits of a super-block.
pub(super) const WEIGHTS: usize = 2 * SUPER_BLOCK / 4;
/// Blocks of a group, one for each register of sums.
const GROUP: usize = 4;
/// Units of a group of blocks.
const GROUP_UNITS: usize = GROUP * BLOCK / INTEGER_K;
/// Values from a row's sums to the next one's.
const STRIDE: usize = TILE_PANELS * PANEL;

/// # Safety
/// As for [`super::tile`].
pub(super) unsafe fn tile(
    workspace: &mut Workspace,
    format: Format,
    rows: &[*const u8],
    panels: &[*const u8],
    k: usize,
    sums: &mut Sums,
) {
    let lines = workspace.activations(k / INTEGER_K);
    let sums = (&raw mut *sums).cast::<f32>();
    for (index, panel) in panels.iter().enumerate() {
        let job = Tile {
            rows,
            // The first panel's pass lays the rows side by side, the others find them so.
            gathers: index == 0,
            panel: *panel,
            k,
            layout: IntegerRow::new(format, k),
            activations: lines,
            weights: workspace.weights.as_mut_ptr(),
            products: workspace.sums.as_mut_ptr(),
            // SAFETY: the sums are of all panels.
            sums: unsafe { sums.add(index * PANEL) },
        };
        // SAFETY: the caller's promises, and the pointers just made.
        unsafe {
            match format {
                Format::Q8_0 => job.blocks::<Q8_0>(offset(format)),
                Format::Q4_0 => job.blocks::<Q4_0>(offset(format)),
                Format::Mxfp4 => job.blocks::<Mxfp4>(offset(format)),
                Format::Q4K => job.super_blocks::<Q4K>(),
                Format::Q6K => job.super_blocks::<Q6K>(),
                Format::F32 | Format::Bf16 => unreachable!("{format} is no integer format"),
            }
        }
    }
}

/// Up to 32 rows by one panel.
struct Tile<'a> {
    rows: &'a [*const u8],
    /// Whether the rows are still to be laid into `activations`.
    gathers: bool,
    panel: *const u8,
    k: usize,
    layout: IntegerRow,
    activations: *mut Line,
    weights: *mut Line,
    products: *mut Line,
    /// The first row's sums of this panel.
    sums: *mut f32,
}

impl Tile<'_> {
    fn units(&self) -> usize {
        self.k / INTEGER_K
    }

    fn tall(&self) -> bool {
        self.rows.len() > ROWS
    }

    /// The activations of 16 rows, from `16 * half` on, in unit `unit`: `[16]` lines.
    ///
    /// # Safety
    /// This and all below: as for [`super::tile`], and the pointers lead to what the fields' names say.
    unsafe fn x(&self, unit: usize, half: usize) -> *const u8 {
        // SAFETY: the unit lies in the activations' lines.
        unsafe { self.activations.add(unit * TILE_ROWS + half * ROWS).cast() }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn gather(&self, units: std::ops::Range<usize>) {
        if self.gathers {
            for unit in units {
                // SAFETY: the rows have the unit.
                unsafe { gather(self.rows, unit, self.activations) };
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn clear(&self) {
        for row in 0..self.rows.len() {
            // SAFETY: the row has sums.
            unsafe { _mm512_storeu_ps(self.sums.add(row * STRIDE), _mm512_setzero_ps()) };
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn blocks<K: Blocks>(&self, offset: i32) {
        let groups = self.units().div_ceil(GROUP_UNITS);
        let halves = 1 + usize::from(self.tall());
        let mut scales = [[_mm512_setzero_ps(); GROUP]; 2];
        // SAFETY: the caller's promises.
        unsafe {
            self.clear();
            scales[0] = self.unpack_blocks::<K>(0, offset);
            let mut last = None;
            for group in 0..groups {
                for half in 0..halves {
                    self.multiply_blocks(group, half);
                    if let Some((group, half)) = last {
                        self.add_blocks(group, half, &scales[group % 2]);
                    }
                    if half == 0 && group + 1 < groups {
                        scales[(group + 1) % 2] = self.unpack_blocks::<K>(group + 1, offset);
                    }
                    self.store_products();
                    last = Some((group, half));
                }
            }
            self.add_blocks(groups - 1, halves - 1, &scales[(groups - 1) % 2]);
        }
    }

    /// The units of group `group`; the last one may have one only.
    fn group(&self, group: usize) -> std::ops::Range<usize> {
        group * GROUP_UNITS..self.units().min((group + 1) * GROUP_UNITS)
    }

    /// Where the weights of group `group` are unpacked to.
    unsafe fn unpacked(&self, group: usize) -> *mut Line {
        // SAFETY: there is room for two.
        unsafe { self.weights.add(group % 2 * WEIGHTS) }
    }

    /// Signed weights of a group, 8 lines a block; returns the blocks' scales.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn unpack_blocks<K: Blocks>(&self, group: usize, offset: i32) -> [__m512; GROUP] {
        let offset = _mm512_set1_epi8(offset as i8);
        let mut scales = [_mm512_setzero_ps(); GROUP];
        // SAFETY: the group's units lie in the panel, and its lines in the workspace.
        unsafe {
            self.gather(self.group(group));
            let lines = self.unpacked(group);
            for (index, unit) in self.group(group).enumerate() {
                let unit = self.panel.add(unit * K::UNIT);
                if !self.tall() {
                    prefetch(unit, K::UNIT);
                }
                for half in 0..2 {
                    let block = 2 * index + half;
                    scales[block] = K::scales(unit, half);
                    for (step, weights) in K::steps(unit, half).into_iter().enumerate() {
                        let line = lines.add(block * (BLOCK / 4) + step);
                        _mm512_store_si512(line.cast(), _mm512_sub_epi8(weights, offset));
                    }
                }
            }
        }
        scales
    }

    /// The products of a group's blocks with 16 rows, in registers 0 to 3.
    #[inline]
    unsafe fn multiply_blocks(&self, group: usize, half: usize) {
        // SAFETY: the group's lines have been filled.
        unsafe {
            let weights = self.unpacked(group).cast::<u8>();
            let units = self.group(group);
            let x = self.x(units.start, half);
            multiply_block::<0>(x, weights);
            multiply_block::<1>(x.add(BLOCK), weights.add(BLOCK / 4 * LINE));
            if units.len() == GROUP_UNITS {
                let x = self.x(units.start + 1, half);
                multiply_block::<2>(x, weights.add(2 * (BLOCK / 4) * LINE));
                multiply_block::<3>(x.add(BLOCK), weights.add(3 * (BLOCK / 4) * LINE));
            }
        }
    }

    /// Adds the stored products of a group with 16 rows to their sums.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn add_blocks(&self, group: usize, half: usize, scales: &[__m512; GROUP]) {
        let scale = self.layout.scales + group * GROUP * size_of::<f32>();
        let count = self.group(group).len() * (INTEGER_K / BLOCK);
        let rows = &self.rows[half * ROWS..self.rows.len().min((half + 1) * ROWS)];
        for (index, row) in rows.iter().enumerate() {
            // SAFETY: the row has scales of the group's blocks, sums, and products.
            unsafe {
                let x = row.add(scale).cast::<f32>();
                let sums = self.sums.add((half * ROWS + index) * STRIDE);
                let mut total = _mm512_loadu_ps(sums);
                for (block, scales) in scales.iter().take(count).enumerate() {
                    let sum = _mm512_load_si512(self.products.add(block * ROWS + index).cast());
                    let scales = _mm512_mul_ps(*scales, _mm512_set1_ps(*x.add(block)));
                    total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scales, total);
                }
                _mm512_storeu_ps(sums, total);
            }
        }
    }

    /// Registers 0 to 3 to memory.
    #[inline]
    unsafe fn store_products(&self) {
        // SAFETY: there is room for four.
        unsafe {
            store::<0>(self.products.cast(), LINE);
            store::<1>(self.products.add(ROWS).cast(), LINE);
            store::<2>(self.products.add(2 * ROWS).cast(), LINE);
            store::<3>(self.products.add(3 * ROWS).cast(), LINE);
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn super_blocks<K: SuperBlocks>(&self) {
        const UNITS: usize = SUPER_BLOCK / INTEGER_K;
        let units = |block: usize| block * UNITS..self.units().min((block + 1) * UNITS);
        let blocks = self.units().div_ceil(UNITS);
        // SAFETY: the caller's promises; all super-blocks but the last one are whole.
        unsafe {
            let at = |block: usize| self.panel.add(block * K::bytes(UNITS));
            self.clear();
            self.unpack_super_block::<K>(0, at(0), units(0));
            for block in 0..blocks {
                self.multiply_super_block(block, units(block));
                if block > 0 {
                    self.add_super_block::<K>(at(block - 1), units(block - 1));
                }
                if block + 1 < blocks {
                    self.unpack_super_block::<K>(block + 1, at(block + 1), units(block + 1));
                }
                self.store_products();
            }
            self.add_super_block::<K>(at(blocks - 1), units(blocks - 1));
        }
    }

    /// The digits of a super-block, for each unit 16 lines of the high ones and 16 of the low ones.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn unpack_super_block<K: SuperBlocks>(&self, block: usize, at: *const u8, units: std::ops::Range<usize>) {
        // SAFETY: the super-block lies in the panel, and its lines in the workspace.
        unsafe {
            self.gather(units.clone());
            if !self.tall() {
                prefetch(at, K::bytes(units.len()));
            }
            let lines = self.unpacked(block);
            for unit in 0..units.len() {
                for half in 0..2 {
                    let (high, low) = K::digits(at, units.len(), 2 * unit + half);
                    let lines = lines.add((4 * unit + half) * (BLOCK / 4));
                    for step in 0..BLOCK / 4 {
                        _mm512_store_si512(lines.add(step).cast(), high[step]);
                        _mm512_store_si512(lines.add(ROWS + step).cast(), low[step]);
                    }
                }
            }
        }
    }

    /// The products of a super-block: high and low digits with the first 16 rows in registers 0 and 1, with the others
    /// in 2 and 3.
    #[inline]
    unsafe fn multiply_super_block(&self, block: usize, units: std::ops::Range<usize>) {
        // SAFETY: the lines have been filled.
        unsafe {
            let weights = self.unpacked(block);
            zero::<0>();
            zero::<1>();
            zero::<2>();
            zero::<3>();
            for (index, unit) in units.enumerate() {
                let high = weights.add(2 * index * ROWS);
                let low = high.add(ROWS);
                load::<W>(high.cast(), LINE);
                load::<X>(self.x(unit, 0), LINE);
                multiply_signed::<0, X, W>();
                if self.tall() {
                    load::<X>(self.x(unit, 1), LINE);
                    multiply_signed::<2, X, W>();
                    load::<W>(low.cast(), LINE);
                    multiply_unsigned::<3, X, W>();
                    load::<X>(self.x(unit, 0), LINE);
                } else {
                    load::<W>(low.cast(), LINE);
                }
                multiply_unsigned::<1, X, W>();
            }
        }
    }

    /// Adds the stored products of the super-block at `at` to the sums.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn add_super_block<K: SuperBlocks>(&self, at: *const u8, units: std::ops::Range<usize>) {
        // SAFETY: the super-block lies in the panel; rows have its scales and sums; there are products of each row.
        unsafe {
            let head = K::head(at, units.len());
            let scale = self.layout.scales + units.start * INTEGER_K / SUPER_BLOCK * size_of::<f32>();
            let part_sums = self.layout.sums + units.start * (INTEGER_K / BLOCK) * size_of::<i16>();
            for (half, rows) in self.rows.chunks(ROWS).enumerate() {
                let products = self.products.add(half * 2 * ROWS);
                let sums = self.sums.add(half * ROWS * STRIDE);
                for (index, row) in rows.iter().enumerate() {
                    let high = _mm512_load_si512(products.add(index).cast());
                    let low = _mm512_load_si512(products.add(ROWS + index).cast());
                    let x = _mm512_set1_ps(*row.add(scale).cast::<f32>());
                    let sums = sums.add(index * STRIDE);
                    let total = _mm512_loadu_ps(sums);
                    _mm512_storeu_ps(sums, K::add(&head, K::combine(high, low), x, row.add(part_sums), total));
                }
            }
        }
    }
}

/// Register `C` = 16 rows' 32 inputs at `x` times the weights of a block.
///
/// # Safety
/// As for the methods of [`Tile`].
#[inline(always)]
unsafe fn multiply_block<const C: u8>(x: *const u8, weights: *const u8) {
    // SAFETY: the caller's promises.
    unsafe {
        zero::<C>();
        load::<HALF_X>(x, LINE);
        load::<HALF_W>(weights, LINE);
        multiply_signed::<C, HALF_X, HALF_W>();
    }
}

/// Weights of 32 inputs: 4 inputs of 16 outputs a step.
type Steps = [__m512i; BLOCK / 4];

/// A format of super-blocks.
trait SuperBlocks {
    /// What the sums of a super-block are scaled with.
    type Head;

    /// Bytes of a super-block of `units` units.
    fn bytes(units: usize) -> usize;

    /// scale · quant of the 32 inputs from `32 * index` on: the high digits, signed, and the low ones, unsigned.
    ///
    /// # Safety
    /// This and below: the machine has the tier; a super-block of `units` units lies at `at`.
    unsafe fn digits(at: *const u8, units: usize, index: usize) -> (Steps, Steps);

    /// Σ scale · quant · x of the sums of both digits.
    unsafe fn combine(high: __m512i, low: __m512i) -> __m512i;

    /// The scales.
    unsafe fn head(at: *const u8, units: usize) -> Self::Head;

    /// `total` and the super-block's part in it; `x` is the activations' scale, `row_sums` leads to the row's sums of
    /// this super-block.
    unsafe fn add(head: &Self::Head, sum: __m512i, x: __m512, row_sums: *const u8, total: __m512) -> __m512;
}

struct Q4K;
struct Q6K;

struct Q4KHead {
    scale: __m512,
    minimum: __m512,
    /// Of two parts each.
    minima: [__m512i; 4],
    pairs: usize,
}

/// scale = 8 · high + low, both 0..=7, and a digit times a quant, 0..=15, is at most 105: two bytes are multiplied as
/// one number of 16 bits, and nothing carries over.
impl SuperBlocks for Q4K {
    type Head = Q4KHead;

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
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn head(at: *const u8, units: usize) -> Q4KHead {
        let mut minima = [_mm512_setzero_si512(); 4];
        // SAFETY: a pair of parts' minima of 16 outputs are 32 bytes, and lie behind the scales.
        unsafe {
            for (pair, minima) in minima.iter_mut().enumerate().take(units) {
                let at = at.add(64 + units * 32 + pair * 32);
                *minima = _mm512_cvtepu8_epi16(_mm256_loadu_si256(at.cast()));
            }
            Q4KHead { scale: half_floats(at), minimum: half_floats(at.add(32)), minima, pairs: units }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn add(head: &Q4KHead, sum: __m512i, x: __m512, row_sums: *const u8, total: __m512) -> __m512 {
        let mut below = _mm512_setzero_si512();
        for (pair, minima) in head.minima.iter().take(head.pairs).enumerate() {
            // SAFETY: the row has two 16-bit sums of each pair of parts.
            let sums = unsafe { row_sums.add(pair * 4).cast::<i32>().read_unaligned() };
            below = _mm512_dpwssd_epi32(below, *minima, _mm512_set1_epi32(sums));
        }
        let total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(head.scale, x), total);
        _mm512_fnmadd_ps(_mm512_cvtepi32_ps(below), _mm512_mul_ps(head.minimum, x), total)
    }
}

/// scale · quant has 13 bits and a sign, -4064 to 4096: high and low byte.
impl SuperBlocks for Q6K {
    type Head = __m512;

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
    unsafe fn head(at: *const u8, _units: usize) -> __m512 {
        // SAFETY: the super-block begins with the scales.
        unsafe { half_floats(at) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn add(head: &__m512, sum: __m512i, x: __m512, _row_sums: *const u8, total: __m512) -> __m512 {
        _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(*head, x), total)
    }
}
