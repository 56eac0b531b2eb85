//! bf16 weights on the tile registers.
//!
//! The sums of a pass stay in four registers over the whole of k: 16 rows by up to 4 panels, or 32 rows by 2. Every
//! number of rows takes this way, since `tdpbf16ps` adds in an order of its own.

use super::{
    Workspace, gather, prefetch,
    registers::{LINE, Line, ROWS, W, X, load, multiply_bf16, store, zero},
};
use crate::{
    format::PANEL,
    matmul::{Sums, TILE_PANELS, TILE_ROWS},
};

/// Bytes from a row's sums to the next one's.
const STRIDE: usize = size_of::<Sums>() / TILE_ROWS;

/// # Safety
/// As for [`super::tile`].
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn tile(
    workspace: &mut Workspace,
    rows: &[*const u8],
    panels: &[*const u8],
    k: usize,
    sums: &mut Sums,
) {
    let units = k * 2 / LINE;
    let lines = workspace.activations(units);
    let sums = (&raw mut *sums).cast::<f32>();
    let tall = rows.len() > ROWS;
    let width = if tall { 2 } else { 4 };
    for (index, panels) in panels.chunks(width).enumerate() {
        // The first pass lays the rows side by side, the others find them so.
        let rows = if index == 0 { rows } else { &[] };
        // SAFETY: the caller's promises; there are lines for all units, and sums for all panels.
        unsafe {
            let sums = sums.add(index * width * PANEL);
            match (tall, panels) {
                (false, &[a]) => pass::<false, 1>(rows, lines, [a], units, sums),
                (false, &[a, b]) => pass::<false, 2>(rows, lines, [a, b], units, sums),
                (false, &[a, b, c, d]) => pass::<false, 4>(rows, lines, [a, b, c, d], units, sums),
                (true, &[a]) => pass::<true, 1>(rows, lines, [a], units, sums),
                (true, &[a, b]) => pass::<true, 2>(rows, lines, [a, b], units, sums),
                (_, panels) => unreachable!("pass of {} panels", panels.len()),
            }
        }
    }
}

/// 16 rows, or 32 if `TALL`, by `P` panels; register `C` has the sums of panel `C`, or of rows 16 (C / 2) and panel
/// C % 2. `rows` are still to be laid into `lines`, a unit of 64 bytes ahead of their use.
///
/// # Safety
/// As for [`super::tile`]; `lines` are those of `units` units; `sums` leads to the first panel's of a [`Sums`].
#[target_feature(enable = "avx512f")]
unsafe fn pass<const TALL: bool, const P: usize>(
    rows: &[*const u8],
    lines: *mut Line,
    panels: [*const u8; P],
    units: usize,
    sums: *mut f32,
) {
    // SAFETY: the caller's promises.
    unsafe {
        zero::<0>();
        zero::<1>();
        zero::<2>();
        zero::<3>();
        gather(rows, 0, lines);
        for unit in 0..units {
            if unit + 1 < units {
                gather(rows, unit + 1, lines);
            }
            let x = lines.add(unit * TILE_ROWS).cast::<u8>();
            let weights = |panel: usize| {
                let at = panels[panel].add(unit * ROWS * LINE);
                if !TALL {
                    prefetch(at, ROWS * LINE);
                }
                load::<W>(at, LINE);
            };
            load::<X>(x, LINE);
            weights(0);
            multiply_bf16::<0, X, W>();
            if TALL {
                load::<X>(x.add(ROWS * LINE), LINE);
                multiply_bf16::<2, X, W>();
                if P == 2 {
                    weights(1);
                    multiply_bf16::<3, X, W>();
                    load::<X>(x, LINE);
                    multiply_bf16::<1, X, W>();
                }
            } else {
                if P >= 2 {
                    weights(1);
                    multiply_bf16::<1, X, W>();
                }
                if P == 4 {
                    weights(2);
                    multiply_bf16::<2, X, W>();
                    weights(3);
                    multiply_bf16::<3, X, W>();
                }
            }
        }
        let place = |row: usize, panel: usize| sums.add((row * TILE_PANELS + panel) * PANEL).cast::<u8>();
        store::<0>(place(0, 0), STRIDE);
        if TALL {
            store::<2>(place(ROWS, 0), STRIDE);
        }
        if P >= 2 {
            store::<1>(place(0, 1), STRIDE);
            if TALL {
                store::<3>(place(ROWS, 1), STRIDE);
            }
        }
        if P == 4 {
            store::<2>(place(0, 2), STRIDE);
            store::<3>(place(0, 3), STRIDE);
        }
    }
}
