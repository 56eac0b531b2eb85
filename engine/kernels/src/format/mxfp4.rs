//! `mxfp4` (OCP Microscaling): 32 weights share a power of two, the E8M0 byte e; each is a 4-bit float.
//!
//! A panel is a sequence of units of 64 inputs: `e` u8 `[2][16]`, then nibble pairs `[8][16][4]` of codes.
//!
//! GGUF gives e = 255, the standard's NaN, a value (2^128), so there is no NaN. A block with weights that are NaN or
//! infinite takes e = 255, where the greatest codes overflow: such weights come out infinite (NaN as positive), the
//! others as zero.

use super::{BLOCK, PANEL, blocks, blocks::greatest_magnitude};

/// Bytes of a unit of 64 inputs.
pub(super) const UNIT_BYTES: usize = 2 * SCALES + 2 * HALF;
/// Bytes of one block's scales.
const SCALES: usize = PANEL;
/// Bytes of one block's quants.
const HALF: usize = BLOCK * PANEL / 2;

/// Twice the value of each code; the scale is halved to match.
pub(crate) const VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];
/// Halfway between the magnitudes.
const MIDPOINTS: [f32; 7] = [0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0];

/// One row's 32 weights.
pub(super) struct Block {
    e: u8,
    codes: [u8; BLOCK],
}

/// Half of the scale, `2^(e − 128)`.
pub(crate) fn half_scale(e: u8) -> f32 {
    // Below 2 it is subnormal.
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (u32::from(e) - 1) << 23 })
}

impl blocks::Block<BLOCK> for Block {
    const GGUF_BYTES: usize = 17;

    #[inline(always)]
    fn quantise(values: &[f32; BLOCK]) -> Self {
        let greatest = greatest_magnitude(values);
        if !greatest.is_finite() {
            let codes = values.map(|value| if value.is_finite() { 0 } else { 7 | u8::from(value < 0.0) << 3 });
            return Self { e: u8::MAX, codes };
        }
        // floor(log2(greatest)) − 2, so that the greatest weight is one of 4..8 times the scale.
        let e = (greatest.to_bits() >> 23).saturating_sub(2) as u8;
        let midpoints = MIDPOINTS.map(|midpoint| midpoint * half_scale(e));
        let codes = values.map(|value| {
            let code = midpoints.iter().map(|midpoint| u32::from(value.abs() > *midpoint)).sum::<u32>();
            // Zero has no sign.
            (if value < 0.0 && code > 0 { code | 8 } else { code }) as u8
        });
        Self { e, codes }
    }

    fn from_gguf(bytes: &[u8]) -> Self {
        let mut codes = [0; BLOCK];
        blocks::nibbles_from_gguf(&bytes[1..], &mut codes);
        Self { e: bytes[0], codes }
    }

    fn values(&self) -> [f32; BLOCK] {
        let half_scale = half_scale(self.e);
        self.codes.map(|code| half_scale * f32::from(VALUES[usize::from(code)]))
    }

    #[inline(always)]
    fn place(&self, panel: &mut [u8], index: usize, row: usize) {
        let (unit, half) = (&mut panel[index / 2 * UNIT_BYTES..][..UNIT_BYTES], index % 2);
        unit[half * SCALES + row] = self.e;
        blocks::place_nibbles(&self.codes, &mut unit[2 * SCALES + half * HALF..], row);
    }

    fn read(panel: &[u8], index: usize, row: usize) -> Self {
        let (unit, half) = (&panel[index / 2 * UNIT_BYTES..][..UNIT_BYTES], index % 2);
        let mut codes = [0; BLOCK];
        blocks::read_nibbles(&unit[2 * SCALES + half * HALF..], row, &mut codes);
        Self { e: unit[half * SCALES + row], codes }
    }
}
