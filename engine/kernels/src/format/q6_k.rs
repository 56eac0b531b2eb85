//! `q6_k`: super-blocks of 256 weights in 16 parts of 16, each with a signed 8-bit scale;
//! value = (d · scale) · (q − 32), q of 6 bits.
//!
//! A panel is a sequence of super-blocks: `d` f16 `[16]`, 32 zero bytes, `scales` i8 `[16][16]`, then for each 64
//! inputs the low four bits of q in nibble pairs `[8][16][4]` and the high two bits in `[4][16][4]` bytes: byte
//! (h, n, b) has those of row n's input 16h + 4t + b at bit 2t. The last super-block ends with k's padding: it may have
//! 4, 8 or 12 parts.
//!
//! A weight that is NaN or infinite makes its super-block NaN; one beyond the scales' range (2.6e8) makes it NaN or
//! infinite.

use std::array::from_fn;

use half::f16;

use super::{
    INTEGER_K, PANEL, SUPER_BLOCK, blocks,
    blocks::{greatest_magnitude, read_f16, round, round_to_byte, write_f16},
};

/// Weights of a part.
const PART: usize = 16;
/// Parts of a super-block.
const PARTS: usize = SUPER_BLOCK / PART;
/// Bytes of a panel's super-block before the parts' scales.
pub(super) const HEAD_BYTES: usize = 4 * PANEL;
/// Bytes of 64 inputs in a panel: their four parts' scales and their quants.
pub(super) const UNIT_BYTES: usize = UNIT_SCALES + UNIT_QUANTS;
const UNIT_SCALES: usize = INTEGER_K / PART * PANEL;
const UNIT_QUANTS: usize = UNIT_LOW + INTEGER_K * PANEL / 4;
const UNIT_LOW: usize = INTEGER_K * PANEL / 2;
/// Zero among the quants, and how far they reach below it; above, one less.
const ZERO: u8 = 32;
const REACH: f32 = 32.0;

/// One row's 256 weights.
pub(super) struct Block {
    d: f16,
    scales: [i8; PARTS],
    quants: [u8; SUPER_BLOCK],
}

/// A number of each part.
type Parts = [f32; PARTS];

/// Each part's scale: of 19 about the one that makes the greatest weight the greatest quant, the one whose
/// least-squares fit is the best, where errors weigh more the greater the weight is.
#[inline(always)]
fn search(values: &[f32; SUPER_BLOCK]) -> Parts {
    // Input i of all parts side by side: one part in each vector lane.
    let mut x: [Parts; PART] = from_fn(|i| from_fn(|part| values[part * PART + i]));
    let mut greatest = [0.0_f32; PARTS];
    for x in &x {
        for part in 0..PARTS {
            greatest[part] = if x[part].abs() > greatest[part].abs() { x[part] } else { greatest[part] };
        }
    }
    // In units of the greatest, so that no product leaves the range. Weights this small are zeros: no scale is.
    let inverse = greatest.map(|greatest| if greatest.abs() > 1e-30 { 1.0 / greatest } else { 0.0 });
    for x in &mut x {
        for part in 0..PARTS {
            x[part] *= inverse[part];
        }
    }
    let (mut best_scale, mut best_gain) = ([0.0; PARTS], [0.0; PARTS]);
    for step in -9_i16..=9 {
        let steps = -(REACH + 0.1 * f32::from(step));
        let (mut sum_xq, mut sum_qq) = ([0.0; PARTS], [0.0; PARTS]);
        for x in &x {
            for part in 0..PARTS {
                let w = x[part].abs();
                let q = round(x[part] * steps);
                let q = if q < REACH - 1.0 { q } else { REACH - 1.0 };
                let q = if q > -REACH { q } else { -REACH };
                sum_xq[part] += w * x[part] * q;
                sum_qq[part] += w * q * q;
            }
        }
        for part in 0..PARTS {
            // How much the fit takes off the weighted squares of the values.
            let scale = sum_xq[part] / sum_qq[part];
            let gain = scale * sum_xq[part];
            let better = gain > best_gain[part];
            best_gain[part] = if better { gain } else { best_gain[part] };
            best_scale[part] = if better { scale } else { best_scale[part] };
        }
    }
    from_fn(|part| best_scale[part] * greatest[part])
}

/// The 64-input units of super-block `index` and where it lies in a panel.
#[inline(always)]
fn bounds(panel_bytes: usize, index: usize) -> (usize, std::ops::Range<usize>) {
    const WHOLE: usize = HEAD_BYTES + SUPER_BLOCK / INTEGER_K * UNIT_BYTES;
    let bytes = index * WHOLE..panel_bytes.min((index + 1) * WHOLE);
    ((bytes.len() - HEAD_BYTES) / UNIT_BYTES, bytes)
}

impl blocks::Block<SUPER_BLOCK> for Block {
    const GGUF_BYTES: usize = 210;

    #[inline(always)]
    fn quantise(values: &[f32; SUPER_BLOCK]) -> Self {
        let zero = Self { d: f16::ZERO, scales: [0; PARTS], quants: [ZERO; SUPER_BLOCK] };
        if !greatest_magnitude(values).is_finite() {
            return Self { d: f16::NAN, ..zero };
        }
        let parts = search(values);
        // The greatest scale becomes −128, the end of the range that has no counterpart.
        let greatest = parts.into_iter().fold(0.0_f32, |a, scale| if scale.abs() > a.abs() { scale } else { a });
        if greatest == 0.0 {
            return zero;
        }
        let d = f16::from_f32(greatest / -128.0);
        let scales = parts.map(|scale| round_to_byte((scale / greatest * -128.0).min(127.0)).cast_signed());
        let mut block = Self { d, scales, ..zero };
        let parts = block.quants.chunks_exact_mut(PART).zip(values.chunks_exact(PART));
        for ((quants, values), scale) in parts.zip(scales) {
            let scale = d.to_f32() * f32::from(scale);
            let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
            for (quant, value) in quants.iter_mut().zip(values) {
                *quant = round_to_byte((value * inverse).clamp(-REACH, REACH - 1.0) + REACH);
            }
        }
        block
    }

    fn from_gguf(bytes: &[u8]) -> Self {
        let (low, rest) = bytes.split_at(128);
        let (high, rest) = rest.split_at(64);
        let (scales, d) = rest.split_at(PARTS);
        let mut quants = [0; SUPER_BLOCK];
        for ((quants, low), high) in quants.chunks_exact_mut(128).zip(low.chunks_exact(64)).zip(high.chunks_exact(32)) {
            blocks::nibbles_from_gguf(low, quants);
            for (i, quant) in quants.iter_mut().enumerate() {
                *quant |= (high[i % 32] >> (i / 32 * 2) & 3) << 4;
            }
        }
        Self { d: read_f16(d, 0), scales: from_fn(|part| scales[part].cast_signed()), quants }
    }

    fn values(&self) -> [f32; SUPER_BLOCK] {
        let d = self.d.to_f32();
        from_fn(|i| d * f32::from(self.scales[i / PART]) * (f32::from(self.quants[i]) - REACH))
    }

    #[inline(always)]
    fn place(&self, panel: &mut [u8], index: usize, row: usize) {
        let (units, bytes) = bounds(panel.len(), index);
        let (head, rest) = panel[bytes].split_at_mut(HEAD_BYTES);
        write_f16(head, 2 * row, self.d);
        let (scales, rest) = rest.split_at_mut(units * UNIT_SCALES);
        for (scale, place) in self.scales.iter().zip(scales.chunks_exact_mut(PANEL)) {
            place[row] = scale.cast_unsigned();
        }
        for (quants, unit) in self.quants.chunks_exact(INTEGER_K).zip(rest.chunks_exact_mut(UNIT_QUANTS)) {
            let (low, high) = unit.split_at_mut(UNIT_LOW);
            let low_bits: [u8; INTEGER_K] = from_fn(|i| quants[i] & 15);
            blocks::place_nibbles(&low_bits, low, row);
            let high_bits: [u8; INTEGER_K / 4] = from_fn(|i| {
                let at = i / 4 * 16 + i % 4;
                quants[at] >> 4 | quants[at + 4] >> 4 << 2 | quants[at + 8] >> 4 << 4 | quants[at + 12] >> 4 << 6
            });
            blocks::place_bytes(&high_bits, high, row);
        }
    }

    fn read(panel: &[u8], index: usize, row: usize) -> Self {
        let (units, bytes) = bounds(panel.len(), index);
        let (head, rest) = panel[bytes].split_at(HEAD_BYTES);
        let (scales, rest) = rest.split_at(units * UNIT_SCALES);
        let mut block = Self { d: read_f16(head, 2 * row), scales: [0; PARTS], quants: [ZERO; SUPER_BLOCK] };
        for (scale, place) in block.scales.iter_mut().zip(scales.chunks_exact(PANEL)) {
            *scale = place[row].cast_signed();
        }
        for (quants, unit) in block.quants.chunks_exact_mut(INTEGER_K).zip(rest.chunks_exact(UNIT_QUANTS)) {
            let (low, high) = unit.split_at(UNIT_LOW);
            blocks::read_nibbles(low, row, quants);
            let mut high_bits = [0; INTEGER_K / 4];
            blocks::read_bytes(high, row, &mut high_bits);
            for (i, quant) in quants.iter_mut().enumerate() {
                *quant |= (high_bits[i / 16 * 4 + i % 4] >> (i / 4 % 4 * 2) & 3) << 4;
            }
        }
        block
    }
}
