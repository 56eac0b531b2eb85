//! Tiles in NEON with the int8 dot product: a panel is four registers of 4 outputs, its *quarters*.
//!
//! Floats: a step of k loads each panel once and multiplies it with every row, sums in registers.
//!
//! Integers: one `sdot` multiplies 4 signed weights of 4 outputs with 4 activations of one row. Unsigned weights below
//! 128 pass for signed ones, and a sum starts from its correction; the bytes of `q8_0` are made signed. A block's
//! weights of one quarter are unpacked once, into 8 registers, and then meet every row.

use std::{
    arch::{
        aarch64::{
            float32x4_t, int16x8_t, int32x4_t, uint8x16_t, uint32x4_t, vandq_u8, vandq_u32, vbslq_u32, vcltq_u32,
            vcreate_u8, vcvt_f32_f16, vcvtq_f32_s32, vdupq_n_s16, vdupq_n_s32, vdupq_n_u8, vdupq_n_u32, veorq_u8,
            vfmaq_f32, vfmsq_f32, vget_high_s16, vget_low_s16, vget_low_u16, vld1_u8, vld1_u16, vld1q_f32, vld1q_u8,
            vmlal_s16, vmlaq_s32, vmovl_s8, vmovl_s16, vmovl_u8, vmovl_u16, vmulq_n_f32, vorrq_u8, vpaddq_s32,
            vqtbl1q_u8, vreinterpret_f16_u16, vreinterpret_s8_u8, vreinterpretq_f32_u32, vreinterpretq_s16_s32,
            vreinterpretq_s16_u16, vreinterpretq_s32_u32, vreinterpretq_u32_u8, vshlq_n_u8, vshlq_n_u32, vshlq_u32,
            vshrq_n_u8, vst1q_f32, vsubq_u32,
        },
        asm,
    },
    array::from_fn,
};

use super::{INTEGER_ROWS, MXFP4_UNSIGNED, Sums, activations::IntegerRow};
use crate::format::{BLOCK, Format, INTEGER_K, PANEL, SUPER_BLOCK};

/// Quarters of a panel, and their outputs.
const QUARTERS: usize = 4;

/// Most rows of a tile of f32 or bf16 weights: 20 sums of the 32 registers, 8 of weights and some to work with.
const FLOAT_ROWS: usize = 5;

/// Most rows and panels of a tile of `rows` rows of f32 or bf16 weights: 8 sums or more, or the additions wait for
/// each other, and rows cut into equal tiles.
pub(super) fn float_shape(rows: usize) -> (usize, usize) {
    match rows {
        0..=2 => (2, 2),
        _ => (rows.div_ceil(rows.div_ceil(FLOAT_ROWS)), 1),
    }
}

/// The contract is in `portable.rs`.
///
/// # Safety
/// The machine has NEON and its int8 dot product; rows and panels have the sizes that format and `k` say; no more rows
/// and panels than `tile_shape` says.
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
            Format::F32 => by_shape!(F32: 1 x 1, 2 x 1, 3 x 1, 4 x 1, 5 x 1, 1 x 2, 2 x 2),
            Format::Bf16 => by_shape!(Bf16: 1 x 1, 2 x 1, 3 x 1, 4 x 1, 5 x 1, 1 x 2, 2 x 2),
            Format::Q8_0 => blocks::<Q8_0>(rows, panels[0], k, sums),
            Format::Q4_0 => blocks::<Q4_0>(rows, panels[0], k, sums),
            Format::Mxfp4 => blocks::<Mxfp4>(rows, panels[0], k, sums),
            Format::Q4K => q4_k(rows, panels[0], k, sums),
            Format::Q6K => q6_k(rows, panels[0], k, sums),
        }
    }
}

/// One kind of float weights: how a step of k is widened and multiplied.
trait Kind {
    /// Four outputs' weights of one step, or a row's activation of that step in all lanes.
    type Step: Copy;
    /// Places of k in a step.
    const PLACES: usize;

    /// The step in `bits`.
    ///
    /// # Safety
    /// Here and below: the machine has the tier.
    unsafe fn step(bits: uint32x4_t) -> Self::Step;

    /// `sums + x · weights`
    unsafe fn multiply_add(sums: float32x4_t, x: Self::Step, weights: Self::Step) -> float32x4_t;
}

/// f32 weights and activations.
struct F32;
/// bf16 weights and activations, widened to f32 by a shift.
struct Bf16;

/// # Safety
/// As for [`tile`]; `rows` and `panels` have `R` and `P` entries.
#[target_feature(enable = "neon")]
unsafe fn floats<K: Kind, const R: usize, const P: usize>(
    rows: &[*const u8],
    panels: &[*const u8],
    k: usize,
    sums: &mut Sums,
) {
    // Counts that the compiler knows keep the sums in registers.
    let (rows, panels): ([_; R], [_; P]) = (from_fn(|row| rows[row]), from_fn(|panel| panels[panel]));
    let mut registers = [[[vreinterpretq_f32_u32(vdupq_n_u32(0)); QUARTERS]; R]; P];
    for step in 0..k / K::PLACES {
        for (registers, panel) in registers.iter_mut().zip(panels) {
            // SAFETY: `step < k / PLACES` steps of 64 bytes lie in each panel and of 4 bytes in each row.
            unsafe {
                let mut weights = [K::step(vdupq_n_u32(0)); QUARTERS];
                for (quarter, weights) in weights.iter_mut().enumerate() {
                    *weights = K::step(vreinterpretq_u32_u8(vld1q_u8(panel.add(step * 64 + quarter * 16))));
                }
                for (registers, row) in registers.iter_mut().zip(rows) {
                    let x = K::step(vdupq_n_u32(row.add(step * 4).cast::<u32>().read_unaligned()));
                    for (register, weights) in registers.iter_mut().zip(weights) {
                        *register = K::multiply_add(*register, x, weights);
                    }
                }
            }
        }
    }
    for (panel, registers) in registers.iter().enumerate() {
        for (registers, sums) in registers.iter().zip(&mut *sums) {
            for (register, sums) in registers.iter().zip(sums[panel].as_chunks_mut().0) {
                store(*register, sums);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn load(sums: &[f32; 4]) -> float32x4_t {
    // SAFETY: 4 f32 values fill the register exactly.
    unsafe { vld1q_f32(sums.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn store(register: float32x4_t, sums: &mut [f32; 4]) {
    // SAFETY: 4 f32 values fill the register exactly.
    unsafe { vst1q_f32(sums.as_mut_ptr(), register) };
}

impl Kind for F32 {
    type Step = float32x4_t;
    const PLACES: usize = 1;

    #[inline(always)]
    unsafe fn step(bits: uint32x4_t) -> Self::Step {
        // SAFETY: the caller promises the instructions.
        unsafe { vreinterpretq_f32_u32(bits) }
    }

    #[inline(always)]
    unsafe fn multiply_add(sums: float32x4_t, x: Self::Step, weights: Self::Step) -> float32x4_t {
        // SAFETY: the caller promises the instructions.
        unsafe { vfmaq_f32(sums, x, weights) }
    }
}

impl Kind for Bf16 {
    /// The lower and the upper of each pair.
    type Step = (float32x4_t, float32x4_t);
    const PLACES: usize = 2;

    #[inline(always)]
    unsafe fn step(bits: uint32x4_t) -> Self::Step {
        // SAFETY: the caller promises the instructions.
        unsafe {
            let upper = vandq_u32(bits, vdupq_n_u32(0xffff_0000));
            (vreinterpretq_f32_u32(vshlq_n_u32::<16>(bits)), vreinterpretq_f32_u32(upper))
        }
    }

    #[inline(always)]
    unsafe fn multiply_add(sums: float32x4_t, x: Self::Step, weights: Self::Step) -> float32x4_t {
        // SAFETY: the caller promises the instructions.
        unsafe { vfmaq_f32(vfmaq_f32(sums, x.0, weights.0), x.1, weights.1) }
    }
}

/// Weights of 4 inputs of 4 outputs, for each step of 16 inputs.
type Sixteen = [uint8x16_t; 4];
/// The same of a block of 32.
type Steps = [Sixteen; 2];

/// A format with one scale for 32 inputs; two blocks make a unit.
trait Blocks {
    /// Bytes of a unit.
    const UNIT: usize;
    /// Whether a sum starts from its correction.
    const CORRECTED: bool;

    /// The scales of one quarter of the unit's block `half`.
    ///
    /// # Safety
    /// This and below: the machine has the tier; `unit` leads to a whole unit.
    unsafe fn scales(unit: *const u8, half: usize, quarter: usize) -> float32x4_t;

    /// The weights of one quarter of the unit's block `half`.
    unsafe fn steps(unit: *const u8, half: usize, quarter: usize) -> Steps;
}

struct Q8_0;
struct Q4_0;
struct Mxfp4;

/// # Safety
/// As for [`tile`].
#[target_feature(enable = "neon,dotprod")]
unsafe fn blocks<K: Blocks>(rows: &[*const u8], panel: *const u8, k: usize, sums: &mut Sums) {
    let layout = IntegerRow::new(Format::Q8_0, k);
    clear(rows.len(), sums);
    for block in 0..k / BLOCK {
        for quarter in 0..QUARTERS {
            // SAFETY: the unit lies in the panel, its inputs, scales and corrections lie in each row.
            unsafe {
                let (unit, half) = (panel.add(block / 2 * K::UNIT), block % 2);
                let d = K::scales(unit, half, quarter);
                let weights = K::steps(unit, half, quarter);
                for (row, sums) in rows.iter().zip(&mut *sums) {
                    let correction = *row.add(layout.sums).cast::<i32>().add(block);
                    let scale = *row.add(layout.scales).cast::<f32>().add(block);
                    let start = vdupq_n_s32(if K::CORRECTED { correction } else { 0 });
                    let sum = dot32(start, &weights, row.add(block * BLOCK));
                    let y = &mut sums[0].as_chunks_mut().0[quarter];
                    store(vfmaq_f32(load(y), vcvtq_f32_s32(sum), vmulq_n_f32(d, scale)), y);
                }
            }
        }
    }
}

/// # Safety
/// As for [`tile`].
#[target_feature(enable = "neon,dotprod")]
unsafe fn q4_k(rows: &[*const u8], panel: *const u8, k: usize, sums: &mut Sums) {
    let layout = IntegerRow::new(Format::Q4K, k);
    clear(rows.len(), sums);
    let mut block = panel;
    for at in (0..k).step_by(SUPER_BLOCK) {
        let parts = SUPER_BLOCK.min(k - at) / BLOCK;
        // SAFETY: the super-block lies in the panel, its inputs, scales and sums lie in each row.
        unsafe {
            let scales = block.add(64);
            let minima = scales.add(parts * PANEL);
            let quants = minima.add(parts * PANEL);
            for quarter in 0..QUARTERS {
                let mut integers = [vdupq_n_s32(0); INTEGER_ROWS];
                for part in 0..parts {
                    let weights = nibbles(quants.add(part * 256 + quarter * 16));
                    let scale = vreinterpretq_s32_u32(four_bytes(scales.add(part * PANEL + quarter * 4)));
                    for (integer, row) in integers.iter_mut().zip(rows) {
                        let sum = dot32(vdupq_n_s32(0), &weights, row.add(at + part * BLOCK));
                        *integer = vmlaq_s32(*integer, sum, scale);
                    }
                }
                let mut pairs = [vdupq_n_s16(0); SUPER_BLOCK / BLOCK / 2];
                for (pair, both) in pairs.iter_mut().take(parts / 2).enumerate() {
                    *both = vreinterpretq_s16_u16(vmovl_u8(vld1_u8(minima.add(pair * 32 + quarter * 8))));
                }
                let d = half_floats(block.add(quarter * 8));
                let dmin = half_floats(block.add(32 + quarter * 8));
                for ((row, integer), sums) in rows.iter().zip(integers).zip(&mut *sums) {
                    let scale = *row.add(layout.scales).cast::<f32>().add(at / SUPER_BLOCK);
                    let below = pairs_dot(&pairs[..parts / 2], row.add(layout.sums + at / BLOCK * 2));
                    let y = &mut sums[0].as_chunks_mut().0[quarter];
                    let above = vfmaq_f32(load(y), vcvtq_f32_s32(integer), vmulq_n_f32(d, scale));
                    store(vfmsq_f32(above, vcvtq_f32_s32(below), vmulq_n_f32(dmin, scale)), y);
                }
            }
            block = quants.add(parts * 256);
        }
    }
}

/// # Safety
/// As for [`tile`].
#[target_feature(enable = "neon,dotprod")]
unsafe fn q6_k(rows: &[*const u8], panel: *const u8, k: usize, sums: &mut Sums) {
    let layout = IntegerRow::new(Format::Q6K, k);
    clear(rows.len(), sums);
    let mut block = panel;
    for at in (0..k).step_by(SUPER_BLOCK) {
        let units = SUPER_BLOCK.min(k - at) / INTEGER_K;
        // SAFETY: the super-block lies in the panel, its inputs, scales and corrections lie in each row.
        unsafe {
            let scales = block.add(64);
            let quants = scales.add(units * 4 * PANEL);
            for quarter in 0..QUARTERS {
                let mut integers = [vdupq_n_s32(0); INTEGER_ROWS];
                for part in 0..units * 4 {
                    let at = at + part * 16;
                    let low = quants.add(part / 4 * 768 + quarter * 16);
                    let weights = six_bits(low.add(part % 4 * 128), low.add(512 + part % 4 * 64));
                    let scale = four_signed_bytes(scales.add(part * PANEL + quarter * 4));
                    for (integer, row) in integers.iter_mut().zip(rows) {
                        let start = *row.add(layout.sums).cast::<i32>().add(at / 16);
                        let sum = dot16(vdupq_n_s32(start), &weights, row.add(at));
                        *integer = vmlaq_s32(*integer, sum, scale);
                    }
                }
                let d = half_floats(block.add(quarter * 8));
                for ((row, integer), sums) in rows.iter().zip(integers).zip(&mut *sums) {
                    let scale = *row.add(layout.scales).cast::<f32>().add(at / SUPER_BLOCK);
                    let y = &mut sums[0].as_chunks_mut().0[quarter];
                    store(vfmaq_f32(load(y), vcvtq_f32_s32(integer), vmulq_n_f32(d, scale)), y);
                }
            }
            block = quants.add(units * 768);
        }
    }
}

/// The sums of the first panel of `rows` rows become 0.
fn clear(rows: usize, sums: &mut Sums) {
    for sums in &mut sums[..rows] {
        sums[0] = [0.0; PANEL];
    }
}

/// `start + Σ over 16 inputs of weights · activations`: `vdotq_laneq_s32`, which is not stable yet.
///
/// # Safety
/// The machine has the tier; 16 activations lie at `x`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn dot16(start: int32x4_t, weights: &Sixteen, x: *const u8) -> int32x4_t {
    let mut sum = start;
    // SAFETY: the caller's promise; the instructions touch nothing but these registers.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {w0:v}.16b, {x:v}.4b[0]",
            "sdot {sum:v}.4s, {w1:v}.16b, {x:v}.4b[1]",
            "sdot {sum:v}.4s, {w2:v}.16b, {x:v}.4b[2]",
            "sdot {sum:v}.4s, {w3:v}.16b, {x:v}.4b[3]",
            sum = inout(vreg) sum,
            w0 = in(vreg) weights[0],
            w1 = in(vreg) weights[1],
            w2 = in(vreg) weights[2],
            w3 = in(vreg) weights[3],
            x = in(vreg) vld1q_u8(x),
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// The same over 32.
///
/// # Safety
/// The machine has the tier; 32 activations lie at `x`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn dot32(start: int32x4_t, weights: &Steps, x: *const u8) -> int32x4_t {
    // SAFETY: the caller's promise.
    unsafe { dot16(dot16(start, &weights[0], x), &weights[1], x.add(16)) }
}

/// Σ over pairs of parts of minima · sums, for each of 4 outputs whose two minima lie side by side.
///
/// # Safety
/// The machine has the tier; 4 bytes of sums lie at `sums` for each pair.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn pairs_dot(minima: &[int16x8_t], sums: *const u8) -> int32x4_t {
    let mut low = vdupq_n_s32(0);
    let mut high = low;
    for (pair, minima) in minima.iter().enumerate() {
        // SAFETY: the caller's promise.
        let sums = vdupq_n_s32(unsafe { sums.add(4 * pair).cast::<i32>().read_unaligned() });
        let sums = vget_low_s16(vreinterpretq_s16_s32(sums));
        low = vmlal_s16(low, vget_low_s16(*minima), sums);
        high = vmlal_s16(high, vget_high_s16(*minima), sums);
    }
    vpaddq_s32(low, high)
}

/// 4 f16 values as f32.
///
/// # Safety
/// The machine has the tier; 8 bytes lie at `at`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn half_floats(at: *const u8) -> float32x4_t {
    // SAFETY: the caller's promise.
    vcvt_f32_f16(vreinterpret_f16_u16(unsafe { vld1_u16(at.cast()) }))
}

/// 4 bytes, each in a lane.
///
/// # Safety
/// The machine has the tier; 4 bytes lie at `at`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn four_bytes(at: *const u8) -> uint32x4_t {
    // SAFETY: the caller's promise.
    let bytes = vcreate_u8(u64::from(unsafe { at.cast::<u32>().read_unaligned() }));
    vmovl_u16(vget_low_u16(vmovl_u8(bytes)))
}

/// The same for signed bytes.
///
/// # Safety
/// The machine has the tier; 4 bytes lie at `at`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn four_signed_bytes(at: *const u8) -> int32x4_t {
    // SAFETY: the caller's promise.
    let bytes = vcreate_u8(u64::from(unsafe { at.cast::<u32>().read_unaligned() }));
    vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(bytes))))
}

/// The steps of 32 inputs in nibble pairs, of one quarter: 16 bytes each, 64 bytes apart.
///
/// # Safety
/// The machine has the tier; the bytes lie at `at`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn nibbles(at: *const u8) -> Steps {
    // SAFETY: the caller's promise.
    unsafe { [sixteen_nibbles(at), sixteen_nibbles(at.add(128))] }
}

/// The same of 16 inputs.
///
/// # Safety
/// The machine has the tier; the bytes lie at `at`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn sixteen_nibbles(at: *const u8) -> Sixteen {
    let mask = vdupq_n_u8(0x0f);
    // SAFETY: the caller's promise.
    let (first, second) = unsafe { (vld1q_u8(at), vld1q_u8(at.add(64))) };
    [vandq_u8(first, mask), vshrq_n_u8::<4>(first), vandq_u8(second, mask), vshrq_n_u8::<4>(second)]
}

/// The steps of 16 inputs of one quarter, whose low 4 bits are nibble pairs at `low`, and whose high 2 bits are at
/// `high`.
///
/// # Safety
/// The machine has the tier; the bytes lie there.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn six_bits(low: *const u8, high: *const u8) -> Sixteen {
    let mask = vdupq_n_u8(0x30);
    // SAFETY: the caller's promise.
    let (mut steps, high) = unsafe { (sixteen_nibbles(low), vld1q_u8(high)) };
    let shifted = [vshlq_n_u8::<4>(high), vshlq_n_u8::<2>(high), high, vshrq_n_u8::<2>(high)];
    for (step, high) in steps.iter_mut().zip(shifted) {
        *step = vorrq_u8(*step, vandq_u8(high, mask));
    }
    steps
}

impl Blocks for Q8_0 {
    const UNIT: usize = 1088;
    const CORRECTED: bool = false;

    #[inline(always)]
    unsafe fn scales(unit: *const u8, half: usize, quarter: usize) -> float32x4_t {
        // SAFETY: the caller's promises.
        unsafe { half_floats(unit.add(32 * half + 8 * quarter)) }
    }

    #[inline(always)]
    unsafe fn steps(unit: *const u8, half: usize, quarter: usize) -> Steps {
        // SAFETY: the caller's promises.
        unsafe {
            let quants = unit.add(64 + 512 * half + 16 * quarter);
            let mut steps = [[vdupq_n_u8(0x80); 4]; 2];
            for (index, step) in steps.as_flattened_mut().iter_mut().enumerate() {
                *step = veorq_u8(*step, vld1q_u8(quants.add(64 * index)));
            }
            steps
        }
    }
}

impl Blocks for Q4_0 {
    const UNIT: usize = 576;
    const CORRECTED: bool = true;

    #[inline(always)]
    unsafe fn scales(unit: *const u8, half: usize, quarter: usize) -> float32x4_t {
        // SAFETY: the caller's promises.
        unsafe { half_floats(unit.add(32 * half + 8 * quarter)) }
    }

    #[inline(always)]
    unsafe fn steps(unit: *const u8, half: usize, quarter: usize) -> Steps {
        // SAFETY: the caller's promises.
        unsafe { nibbles(unit.add(64 + 256 * half + 16 * quarter)) }
    }
}

impl Blocks for Mxfp4 {
    const UNIT: usize = 544;
    const CORRECTED: bool = true;

    /// Half of 2^(e - 127), since the weights count in halves; the two smallest are subnormal.
    #[inline(always)]
    unsafe fn scales(unit: *const u8, half: usize, quarter: usize) -> float32x4_t {
        // SAFETY: the caller's promises.
        unsafe {
            let exponents = four_bytes(unit.add(16 * half + 4 * quarter));
            let normal = vshlq_n_u32::<23>(vsubq_u32(exponents, vdupq_n_u32(1)));
            let subnormal = vshlq_u32(vdupq_n_u32(0x0020_0000), vreinterpretq_s32_u32(exponents));
            vreinterpretq_f32_u32(vbslq_u32(vcltq_u32(exponents, vdupq_n_u32(2)), subnormal, normal))
        }
    }

    #[inline(always)]
    unsafe fn steps(unit: *const u8, half: usize, quarter: usize) -> Steps {
        // SAFETY: the caller's promises; the table has 16 bytes.
        unsafe {
            let table = vld1q_u8(MXFP4_UNSIGNED.as_ptr());
            let mut steps = nibbles(unit.add(32 + 256 * half + 16 * quarter));
            for step in steps.as_flattened_mut() {
                *step = vqtbl1q_u8(table, *step);
            }
            steps
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        format::{Layout, Packed},
        isa::Isa,
        matmul::matmul,
        pool::Pool,
        test_support::values,
    };

    /// A file's bytes may be any: quants of -128, scales that are NaN.
    #[test]
    fn a_panel_of_any_bytes_gives_what_portable_gives() {
        if !Isa::available().contains(&Isa::Neon) {
            return;
        }
        let (pool, k) = (Pool::new(1), 704);
        for format in [Format::Q8_0, Format::Q4_0, Format::Mxfp4, Format::Q4K, Format::Q6K] {
            for seed in 0..20 {
                let layout = Layout { format, n: PANEL, k };
                let bytes: Vec<u8> = values(layout.bytes(), seed).iter().map(|v| (v * 8192.0) as i32 as u8).collect();
                let product = |isa| {
                    let mut y = vec![0.0_f32; 3 * PANEL];
                    matmul(&pool, isa, &values(3 * k, seed ^ 1), &Packed::new(layout, &bytes), &mut y);
                    // Which NaN comes out is no part of the contract.
                    y.iter().map(|y| if y.is_nan() { f32::NAN } else { *y }.to_bits()).collect::<Vec<_>>()
                };
                assert_eq!(product(Isa::Neon), product(Isa::Portable), "{format}, seed {seed}");
            }
        }
    }

    #[test]
    fn mxfp4_has_half_of_the_power_of_two_that_each_exponent_names() {
        for exponent in 0..=u8::MAX {
            let expected = 2_f64.powi(i32::from(exponent) - 128) as f32;
            let unit = [exponent; Mxfp4::UNIT];
            let mut scales = [0.0; 4];
            // SAFETY: every AArch64 machine has what this needs; the unit is whole.
            unsafe { store(Mxfp4::scales(unit.as_ptr(), 1, 3), &mut scales) };
            assert_eq!(scales, [expected; 4], "exponent {exponent}");
        }
    }
}
