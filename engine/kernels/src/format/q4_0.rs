//! `q4_0`: 32 weights share an f16 scale; value = d · (q − 8), q of 4 bits.
//!
//! A panel is a sequence of units of 64 inputs: `d` f16 `[2][16]`, then nibble pairs `[8][16][4]`.
//!
//! A weight that is NaN or infinite, or beyond the scale's range (8 × 65504), makes its block NaN or infinite.

use half::f16;

use super::{BLOCK, PANEL, blocks, blocks::greatest_magnitude};

/// Bytes of a unit of 64 inputs.
pub(super) const UNIT_BYTES: usize = 2 * SCALES + 2 * HALF;
/// Bytes of one block's scales.
const SCALES: usize = 2 * PANEL;
/// Bytes of one block's quants.
const HALF: usize = BLOCK * PANEL / 2;

/// One row's 32 weights.
pub(super) struct Block {
    d: f16,
    quants: [u8; BLOCK],
}

impl blocks::Block<BLOCK> for Block {
    const GGUF_BYTES: usize = 18;

    #[inline(always)]
    fn quantise(values: &[f32; BLOCK]) -> Self {
        // The greatest weight becomes −8, the end of the range that has no counterpart.
        let magnitude = greatest_magnitude(values);
        let greatest = values.iter().find(|value| value.abs() == magnitude).copied().unwrap_or(f32::NAN);
        let d = greatest / -8.0;
        let inverse = 1.0 / d;
        // Of zeros, and of weights so small that the scale is zero as an f16.
        let inverse = if inverse.is_finite() { inverse } else { 0.0 };
        let quants = values.map(|value| ((value * inverse + 8.5) as i32).min(15) as u8);
        Self { d: f16::from_f32(d), quants }
    }

    fn from_gguf(bytes: &[u8]) -> Self {
        let mut quants = [0; BLOCK];
        blocks::nibbles_from_gguf(&bytes[2..], &mut quants);
        Self { d: blocks::read_f16(bytes, 0), quants }
    }

    fn values(&self) -> [f32; BLOCK] {
        let d = self.d.to_f32();
        self.quants.map(|quant| d * (f32::from(quant) - 8.0))
    }

    #[inline(always)]
    fn place(&self, panel: &mut [u8], index: usize, row: usize) {
        let (unit, half) = (&mut panel[index / 2 * UNIT_BYTES..][..UNIT_BYTES], index % 2);
        blocks::write_f16(unit, half * SCALES + 2 * row, self.d);
        blocks::place_nibbles(&self.quants, &mut unit[2 * SCALES + half * HALF..], row);
    }

    fn read(panel: &[u8], index: usize, row: usize) -> Self {
        let (unit, half) = (&panel[index / 2 * UNIT_BYTES..][..UNIT_BYTES], index % 2);
        let mut quants = [0; BLOCK];
        blocks::read_nibbles(&unit[2 * SCALES + half * HALF..], row, &mut quants);
        Self { d: blocks::read_f16(unit, half * SCALES + 2 * row), quants }
    }
}
