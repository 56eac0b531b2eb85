//! The contract of a tile, in plain Rust.
//!
//! `sums[r][p][n]` = Σ over ascending k of `x[r][k] · panel[p][k][n]`, each product added to one running f32 sum.
//! Vector tiers may fuse a product and its addition (one rounding in place of two) and nothing else.

use super::Sums;
use crate::format::PANEL;

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
