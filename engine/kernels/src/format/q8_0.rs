//! `q8_0`: 32 weights share an f16 scale; value = d · q, q a signed byte.
//!
//! A panel is a sequence of units of 64 inputs: `d` f16 `[2][16]` (the first block's scales of the 16 rows, then the
//! second's), then bytes `[16][16][4]` of q + 128.
//!
//! A weight that is NaN or infinite, or beyond the scale's range (127 × 65504), makes its block NaN.

use half::f16;

use super::{BLOCK, PANEL, blocks, blocks::greatest_magnitude};

/// Bytes of a unit of 64 inputs.
pub(super) const UNIT_BYTES: usize = 2 * SCALES + 2 * HALF;
/// Bytes of one block's scales.
const SCALES: usize = 2 * PANEL;
/// Bytes of one block's quants.
const HALF: usize = BLOCK * PANEL;

/// One row's 32 weights.
pub(super) struct Block {
    d: f16,
    quants: [i8; BLOCK],
}

impl blocks::Block<BLOCK> for Block {
    const GGUF_BYTES: usize = 34;

    #[inline(always)]
    fn quantise(values: &[f32; BLOCK]) -> Self {
        let d = greatest_magnitude(values) / 127.0;
        let inverse = 1.0 / d;
        // Of zeros, and of weights so small that the scale is zero as an f16.
        let inverse = if inverse.is_finite() { inverse } else { 0.0 };
        let quants = values.map(|value| {
            // Half goes away from zero.
            let magnitude = (value * inverse).abs();
            let whole = magnitude as i32;
            let rounded = whole + i32::from(magnitude - whole as f32 >= 0.5);
            (if value < 0.0 { -rounded } else { rounded }) as i8
        });
        Self { d: f16::from_f32(d), quants }
    }

    fn from_gguf(bytes: &[u8]) -> Self {
        let mut quants = [0; BLOCK];
        quants.iter_mut().zip(&bytes[2..]).for_each(|(quant, byte)| *quant = byte.cast_signed());
        Self { d: blocks::read_f16(bytes, 0), quants }
    }

    fn values(&self) -> [f32; BLOCK] {
        let d = self.d.to_f32();
        self.quants.map(|quant| f32::from(quant) * d)
    }

    #[inline(always)]
    fn place(&self, panel: &mut [u8], index: usize, row: usize) {
        let (unit, half) = (&mut panel[index / 2 * UNIT_BYTES..][..UNIT_BYTES], index % 2);
        blocks::write_f16(unit, half * SCALES + 2 * row, self.d);
        let quants = self.quants.map(|quant| quant.cast_unsigned() ^ 128);
        blocks::place_bytes(&quants, &mut unit[2 * SCALES + half * HALF..], row);
    }

    fn read(panel: &[u8], index: usize, row: usize) -> Self {
        let (unit, half) = (&panel[index / 2 * UNIT_BYTES..][..UNIT_BYTES], index % 2);
        let mut quants = [0; BLOCK];
        blocks::read_bytes(&unit[2 * SCALES + half * HALF..], row, &mut quants);
        let quants = quants.map(|byte| (byte ^ 128).cast_signed());
        Self { d: blocks::read_f16(unit, half * SCALES + 2 * row), quants }
    }
}
