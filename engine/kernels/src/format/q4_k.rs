//! `q4_k`: super-blocks of 256 weights in 8 parts of 32, each with a 6-bit scale and a 6-bit minimum;
//! value = (d · scale) · q − dmin · min, q of 4 bits.
//!
//! A panel is a sequence of super-blocks: `d` f16 `[16]`, `dmin` f16 `[16]`, `scales` u8 `[8][16]`, `mins` u8
//! `[4][16][2]` (two neighbouring parts side by side), then nibble pairs `[32][16][4]`. The last super-block ends with
//! k's padding: it may have 2, 4 or 6 parts.
//!
//! A weight that is NaN or infinite makes its super-block NaN; one beyond the scales' range (6e7) makes it NaN or
//! infinite.

use std::array::from_fn;

use half::f16;

use super::{
    BLOCK, PANEL, SUPER_BLOCK, blocks,
    blocks::{greatest_magnitude, read_f16, round, round_to_byte, write_f16},
};

/// Parts of a super-block.
const PARTS: usize = SUPER_BLOCK / BLOCK;
/// Bytes of a panel's super-block before the parts' scales.
pub(super) const HEAD_BYTES: usize = 4 * PANEL;
/// Bytes of a panel's part: scales, minima and quants.
pub(super) const PART_BYTES: usize = 2 * PANEL + BLOCK * PANEL / 2;
/// The greatest scale or minimum.
const MAX_SCALE: f32 = 63.0;
/// The greatest quant.
const MAX_QUANT: f32 = 15.0;

/// One row's 256 weights.
pub(super) struct Block {
    d: f16,
    dmin: f16,
    scales: [u8; PARTS],
    mins: [u8; PARTS],
    quants: [u8; SUPER_BLOCK],
}

/// A number of each part.
type Parts = [f32; PARTS];

/// Each part's scale and (positive) minimum: of 21 cuts of its range into steps, the one whose least-squares fit is
/// the best, where errors weigh more the greater the weight is.
#[inline(always)]
fn search(values: &[f32; SUPER_BLOCK]) -> (Parts, Parts) {
    // Input i of all parts side by side: one part in each vector lane.
    let x: [Parts; BLOCK] = from_fn(|i| from_fn(|part| values[part * BLOCK + i]));
    let (mut min, mut max, mut squares) = ([0.0_f32; PARTS], [f32::NEG_INFINITY; PARTS], [0.0; PARTS]);
    for x in &x {
        for part in 0..PARTS {
            min[part] = if x[part] < min[part] { x[part] } else { min[part] };
            max[part] = if x[part] > max[part] { x[part] } else { max[part] };
            squares[part] += x[part] * x[part];
        }
    }
    let typical: Parts = from_fn(|part| (squares[part] / BLOCK as f32).sqrt());
    let (mut sum_w, mut sum_x, mut sum_xx) = ([0.0; PARTS], [0.0; PARTS], [0.0; PARTS]);
    for x in &x {
        for part in 0..PARTS {
            let w = typical[part] + x[part].abs();
            sum_w[part] += w;
            sum_x[part] += w * x[part];
            sum_xx[part] += w * x[part] * x[part];
        }
    }
    // To begin with, equal steps over the range. The gain of a scale and a minimum is how much they take off the
    // weighted squares of the values; here all but half a step.
    let mut best_scale: Parts = from_fn(|part| (max[part] - min[part]) / MAX_QUANT);
    let mut best_min = min;
    let mut best_gain: Parts = from_fn(|part| sum_xx[part] - sum_w[part] * (best_scale[part] / 2.0).powi(2));
    for step in 0..=20 {
        let steps = MAX_QUANT - 1.0 + 0.1 * step as f32;
        // From the best minimum so far. A part without a range is all minimum.
        let inverse: Parts = from_fn(|part| {
            let range = max[part] - best_min[part];
            if range > 0.0 { steps / range } else { 0.0 }
        });
        let (mut sum_q, mut sum_qq, mut sum_xq) = ([0.0; PARTS], [0.0; PARTS], [0.0; PARTS]);
        for x in &x {
            for part in 0..PARTS {
                let w = typical[part] + x[part].abs();
                let q = round((x[part] - best_min[part]) * inverse[part]);
                let q = if q < MAX_QUANT { q } else { MAX_QUANT };
                let q = if q > 0.0 { q } else { 0.0 };
                sum_q[part] += w * q;
                sum_qq[part] += w * q * q;
                sum_xq[part] += w * q * x[part];
            }
        }
        for part in 0..PARTS {
            let (w, x, q, qq, xq) = (sum_w[part], sum_x[part], sum_q[part], sum_qq[part], sum_xq[part]);
            let determinant = w * qq - q * q;
            let (scale, min) = ((w * xq - x * q) / determinant, (qq * x - q * xq) / determinant);
            // The minimum has no room for a sign.
            let (scale, min) = if min > 0.0 { (xq / qq, 0.0) } else { (scale, min) };
            // In full: a fit to quants that are all but equal is far from the optimum, or not a number.
            let gain = 2.0 * (scale * xq + min * x) - (scale * scale * qq + 2.0 * scale * min * q + min * min * w);
            let better = gain > best_gain[part];
            best_gain[part] = if better { gain } else { best_gain[part] };
            best_scale[part] = if better { scale } else { best_scale[part] };
            best_min[part] = if better { min } else { best_min[part] };
        }
    }
    (best_scale, best_min.map(|min| -min))
}

/// The parts' numbers as an f16 and 6 bits each.
#[inline(always)]
fn share(numbers: Parts) -> (f16, [u8; PARTS]) {
    // Not f32::max, which may take either of 0 and -0: the bits are to be the same everywhere.
    let greatest = numbers.into_iter().fold(0.0, |a, number| if number > a { number } else { a });
    let inverse = if greatest > 0.0 { MAX_SCALE / greatest } else { 0.0 };
    (f16::from_f32(greatest / MAX_SCALE), numbers.map(|number| round_to_byte((number * inverse).clamp(0.0, MAX_SCALE))))
}

/// The parts of super-block `index` and where it lies in a panel.
#[inline(always)]
fn bounds(panel_bytes: usize, index: usize) -> (usize, std::ops::Range<usize>) {
    const WHOLE: usize = HEAD_BYTES + PARTS * PART_BYTES;
    let bytes = index * WHOLE..panel_bytes.min((index + 1) * WHOLE);
    ((bytes.len() - HEAD_BYTES) / PART_BYTES, bytes)
}

/// Where the minimum of a part lies among the minima of the 16 rows.
#[inline(always)]
fn min_place(part: usize, row: usize) -> usize {
    part / 2 * 2 * PANEL + 2 * row + part % 2
}

impl blocks::Block<SUPER_BLOCK> for Block {
    const GGUF_BYTES: usize = 144;

    #[inline(always)]
    fn quantise(values: &[f32; SUPER_BLOCK]) -> Self {
        let zero =
            Self { d: f16::ZERO, dmin: f16::ZERO, scales: [0; PARTS], mins: [0; PARTS], quants: [0; SUPER_BLOCK] };
        if !greatest_magnitude(values).is_finite() {
            return Self { d: f16::NAN, ..zero };
        }
        let (scales, mins) = search(values);
        let (d, scales) = share(scales);
        let (dmin, mins) = share(mins);
        let mut block = Self { d, dmin, scales, mins, ..zero };
        let (d, dmin) = (d.to_f32(), dmin.to_f32());
        for part in 0..PARTS {
            let scale = d * f32::from(scales[part]);
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            let min = dmin * f32::from(mins[part]);
            let at = part * BLOCK..(part + 1) * BLOCK;
            for (quant, value) in block.quants[at.clone()].iter_mut().zip(&values[at]) {
                *quant = round_to_byte(((value + min) * inverse).clamp(0.0, MAX_QUANT));
            }
        }
        block
    }

    fn from_gguf(bytes: &[u8]) -> Self {
        let packed = &bytes[4..16];
        let mut quants = [0; SUPER_BLOCK];
        for (quants, bytes) in quants.chunks_exact_mut(2 * BLOCK).zip(bytes[16..].chunks_exact(BLOCK)) {
            blocks::nibbles_from_gguf(bytes, quants);
        }
        // The first four parts' numbers have six bits of a byte; the others' low four bits share a third run of bytes
        // and their high two bits fill the first two runs.
        let scale = |part: usize| match part {
            0..4 => packed[part] & 63,
            _ => packed[part + 4] & 15 | packed[part - 4] >> 6 << 4,
        };
        let min = |part: usize| match part {
            0..4 => packed[part + 4] & 63,
            _ => packed[part + 4] >> 4 | packed[part] >> 6 << 4,
        };
        Self { d: read_f16(bytes, 0), dmin: read_f16(bytes, 2), scales: from_fn(scale), mins: from_fn(min), quants }
    }

    fn values(&self) -> [f32; SUPER_BLOCK] {
        let (d, dmin) = (self.d.to_f32(), self.dmin.to_f32());
        let mut values = [0.0; SUPER_BLOCK];
        for part in 0..PARTS {
            let scale = d * f32::from(self.scales[part]);
            let min = dmin * f32::from(self.mins[part]);
            let at = part * BLOCK..(part + 1) * BLOCK;
            for (value, quant) in values[at.clone()].iter_mut().zip(&self.quants[at]) {
                *value = scale * f32::from(*quant) - min;
            }
        }
        values
    }

    #[inline(always)]
    fn place(&self, panel: &mut [u8], index: usize, row: usize) {
        let (parts, bytes) = bounds(panel.len(), index);
        let (head, rest) = panel[bytes].split_at_mut(HEAD_BYTES);
        write_f16(head, 2 * row, self.d);
        write_f16(head, 2 * (PANEL + row), self.dmin);
        let (scales, rest) = rest.split_at_mut(parts * PANEL);
        let (mins, quants) = rest.split_at_mut(parts * PANEL);
        for part in 0..parts {
            scales[part * PANEL + row] = self.scales[part];
            mins[min_place(part, row)] = self.mins[part];
        }
        blocks::place_nibbles(&self.quants, quants, row);
    }

    fn read(panel: &[u8], index: usize, row: usize) -> Self {
        let (parts, bytes) = bounds(panel.len(), index);
        let (head, rest) = panel[bytes].split_at(HEAD_BYTES);
        let (scales, rest) = rest.split_at(parts * PANEL);
        let (mins, quants) = rest.split_at(parts * PANEL);
        let mut block = Self {
            d: read_f16(head, 2 * row),
            dmin: read_f16(head, 2 * (PANEL + row)),
            scales: [0; PARTS],
            mins: [0; PARTS],
            quants: [0; SUPER_BLOCK],
        };
        for part in 0..parts {
            block.scales[part] = scales[part * PANEL + row];
            block.mins[part] = mins[min_place(part, row)];
        }
        blocks::read_nibbles(quants, row, &mut block.quants);
        block
    }
}
