//! The contract of a tile, in plain Rust.
//!
//! `sums[r][p][n]` = Σ over ascending k of `x[r][k] · panel[p][k][n]`, each product added to one running f32 sum.
//! Vector tiers may fuse a product and its addition (one rounding in place of two) and nothing else; AMX's bf16 keeps two
//! sums, see `amx/bf16.rs`.
//!
//! The integer formats have the same bits on every tier. A block's products are added as integers, exactly; then
//! - with one scale a block: `y = fma(f32(Σ w·x), d·s, y)`, blocks in ascending order, `d` the weights' scale and `s` the
//!   activations';
//! - with super-blocks: `y = fma(f32(Σ over parts of scale · Σ w·x), d·s, y)`, and with minima then
//!   `y = fma(-f32(Σ over parts of minimum · Σ x), dmin·s, y)`.

use half::f16;

use super::{
    MXFP4_UNSIGNED, Sums,
    activations::{IntegerRow, offset},
};
use crate::format::{BLOCK, Format, INTEGER_K, PANEL, SUPER_BLOCK, mxfp4::half_scale};

/// # Safety
/// Rows of `k` f32 values and panels of `[k][16]` f32 values.
pub(super) unsafe fn tile_f32(rows: &[*const u8], panels: &[*const u8], k: usize, sums: &mut Sums) {
    for (row, sums) in rows.iter().zip(sums) {
        for (panel, sums) in panels.iter().zip(sums) {
            *sums = [0.0; PANEL];
            // SAFETY: the caller promises the sizes; activations are aligned as f32, panels to 64 bytes.
            let (x, w) = unsafe {
                (
                    std::slice::from_raw_parts(row.cast::<f32>(), k),
                    std::slice::from_raw_parts(panel.cast::<[f32; PANEL]>(), k),
                )
            };
            for (x, w) in x.iter().zip(w) {
                for (sum, w) in sums.iter_mut().zip(w) {
                    *sum += x * w;
                }
            }
        }
    }
}

/// # Safety
/// Rows of `k` bf16 values and panels of `[k / 2][16][2]` bf16 values, `k` even.
pub(super) unsafe fn tile_bf16(rows: &[*const u8], panels: &[*const u8], k: usize, sums: &mut Sums) {
    for (row, sums) in rows.iter().zip(sums) {
        for (panel, sums) in panels.iter().zip(sums) {
            *sums = [0.0; PANEL];
            // SAFETY: the caller promises the sizes; both are aligned as u16.
            let (x, w) = unsafe {
                (
                    std::slice::from_raw_parts(row.cast::<[u16; 2]>(), k / 2),
                    std::slice::from_raw_parts(panel.cast::<[[u16; 2]; PANEL]>(), k / 2),
                )
            };
            for (x, w) in x.iter().zip(w) {
                for (sum, w) in sums.iter_mut().zip(w) {
                    *sum += widen(x[0]) * widen(w[0]);
                    *sum += widen(x[1]) * widen(w[1]);
                }
            }
        }
    }
}

fn widen(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// # Safety
/// Rows in the form of `format`, which is an integer one, and panels of `k` padded inputs.
pub(super) unsafe fn tile_integer(format: Format, rows: &[*const u8], panels: &[*const u8], k: usize, sums: &mut Sums) {
    let layout = IntegerRow::new(format, k);
    for (row, sums) in rows.iter().zip(sums) {
        for (panel, sums) in panels.iter().zip(sums) {
            // SAFETY: the caller promises the sizes.
            let (row, panel) = unsafe {
                (
                    std::slice::from_raw_parts(*row, layout.bytes),
                    std::slice::from_raw_parts(*panel, format.panel_bytes(k)),
                )
            };
            let row = Row { format, k, layout, bytes: row };
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = match format {
                    Format::Q4K => q4_k(&row, panel, n),
                    Format::Q6K => q6_k(&row, panel, n),
                    _ => blocks(&row, panel, n),
                };
            }
        }
    }
}

/// A row of int8 activations.
struct Row<'a> {
    format: Format,
    k: usize,
    layout: IntegerRow,
    bytes: &'a [u8],
}

impl Row<'_> {
    fn scale(&self, block: usize) -> f32 {
        f32::from_bits(u32::from_le_bytes(self.four(self.layout.scales + 4 * block)))
    }

    fn four(&self, at: usize) -> [u8; 4] {
        std::array::from_fn(|byte| self.bytes[at + byte])
    }

    /// Σ over `inputs` inputs from `start` on of the signed weights times the activations.
    fn dot(&self, start: usize, inputs: usize, weight: impl Fn(usize) -> u8) -> i32 {
        let weight = |input| i32::from(weight(input)) - offset(self.format);
        (start..start + inputs).map(|input| weight(input) * i32::from(self.bytes[input].cast_signed())).sum()
    }
}

/// Input `input` of output `n` in nibble pairs.
fn nibble(pairs: &[u8], n: usize, input: usize) -> u8 {
    let byte = pairs[input / 8 * 64 + n * 4 + input % 4];
    if input % 8 < 4 { byte & 15 } else { byte >> 4 }
}

fn half_float(bytes: &[u8], index: usize) -> f32 {
    f16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]).to_f32()
}

fn blocks(row: &Row<'_>, panel: &[u8], n: usize) -> f32 {
    let mut y = 0.0;
    for (unit, bytes) in panel.chunks_exact(row.format.panel_bytes(INTEGER_K)).enumerate() {
        for half in 0..2 {
            let start = unit * INTEGER_K + half * BLOCK;
            let inner = |input: usize| input - unit * INTEGER_K;
            let (d, sum) = match row.format {
                Format::Q8_0 => {
                    let weight = |input| bytes[64 + inner(input) / 4 * 64 + n * 4 + input % 4];
                    (half_float(bytes, half * PANEL + n), row.dot(start, BLOCK, weight))
                }
                Format::Q4_0 => {
                    let weight = |input| nibble(&bytes[64..], n, inner(input));
                    (half_float(bytes, half * PANEL + n), row.dot(start, BLOCK, weight))
                }
                _ => {
                    let weight = |input| MXFP4_UNSIGNED[usize::from(nibble(&bytes[32..], n, inner(input)))];
                    (half_scale(bytes[half * PANEL + n]), row.dot(start, BLOCK, weight))
                }
            };
            y = (sum as f32).mul_add(d * row.scale(start / BLOCK), y);
        }
    }
    y
}

fn q4_k(row: &Row<'_>, panel: &[u8], n: usize) -> f32 {
    let mut y = 0.0;
    let mut rest = panel;
    for start in (0..row.k).step_by(SUPER_BLOCK) {
        let parts = SUPER_BLOCK.min(row.k - start) / BLOCK;
        let (block, after) = rest.split_at(64 + parts * 288);
        rest = after;
        let (scales, minima) = (&block[64..], &block[64 + parts * PANEL..]);
        let quants = &block[64 + parts * 2 * PANEL..];
        let (mut sum, mut below) = (0, 0);
        for part in 0..parts {
            let at = start + part * BLOCK;
            let scale = i32::from(scales[part * PANEL + n]);
            let minimum = i32::from(minima[(part / 2 * PANEL + n) * 2 + part % 2]);
            sum += scale * row.dot(at, BLOCK, |input| nibble(quants, n, input - start));
            let place = row.layout.sums + at / BLOCK * 2;
            below += minimum * i32::from(i16::from_le_bytes([row.bytes[place], row.bytes[place + 1]]));
        }
        let scale = row.scale(start / SUPER_BLOCK);
        y = (sum as f32).mul_add(half_float(block, n) * scale, y);
        y = (-(below as f32)).mul_add(half_float(block, PANEL + n) * scale, y);
    }
    y
}

fn q6_k(row: &Row<'_>, panel: &[u8], n: usize) -> f32 {
    let mut y = 0.0;
    let mut rest = panel;
    for start in (0..row.k).step_by(SUPER_BLOCK) {
        let inputs = SUPER_BLOCK.min(row.k - start);
        let (block, after) = rest.split_at(64 + inputs / INTEGER_K * 832);
        rest = after;
        let (scales, quants) = block[64..].split_at(inputs / 16 * PANEL);
        let weight = |input: usize| {
            let (unit, inner) = ((input - start) / INTEGER_K, (input - start) % INTEGER_K);
            let (low, high) = quants[unit * 768..].split_at(512);
            let high = high[inner / 16 * 64 + n * 4 + inner % 4] >> (inner % 16 / 4 * 2);
            nibble(low, n, inner) | (high & 3) << 4
        };
        let sum: i32 = (0..inputs / 16)
            .map(|part| i32::from(scales[part * PANEL + n].cast_signed()) * row.dot(start + part * 16, 16, weight))
            .sum();
        y = (sum as f32).mul_add(half_float(block, n) * row.scale(start / SUPER_BLOCK), y);
    }
    y
}
