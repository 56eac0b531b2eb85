//! bf16 weights on the tile registers.
//!
//! The sums of a pass stay in four registers over the whole of k: 32 rows by 2 panels, where each load is multiplied
//! twice, or up to 16 rows by 4 panels. Every number of rows takes this way, since `tdpbf16ps` adds in an order of its own.

use std::{
    arch::x86_64::{_MM_HINT_T1, _mm_prefetch},
    ops::Range,
};

use super::{
    Workspace, prefetch,
    registers::{LINE, Line, ROWS, Shape, W, W2, X, X2, load, multiply_bf16, store, zero_sums},
};
use crate::{format::PANEL, matmul::panels_at_once};

/// Most panels of a pass.
const PANELS: usize = 4;

/// The contract is in `mod.rs`.
///
/// # Safety
/// As for [`super::walk`].
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn walk(
    workspace: &mut Workspace,
    k: usize,
    rows: &[*const u8],
    panels: Range<usize>,
    panel_start: impl Fn(usize) -> *const u8,
    mut sink: impl FnMut(usize, usize, &[[f32; PANEL]]),
) {
    let units = k * 2 / LINE;
    // SAFETY: the caller's promises.
    let lines = unsafe {
        workspace.configure(Shape::Whole);
        workspace.lay(rows, units)
    };
    let width = if rows.len() > ROWS { 2 } else { PANELS };
    let mut panel = panels.start;
    while panel < panels.end {
        let count = panels_at_once(panels.end - panel, width);
        // The rows by turns fetch the panels that follow.
        let share = (count * ROWS).div_ceil(rows.len().div_ceil(2 * ROWS));
        let starts: [_; PANELS] = std::array::from_fn(|index| panel_start(panel + index.min(count - 1)));
        for (block, some) in rows.chunks(2 * ROWS).enumerate() {
            let sums = workspace.sums(some.len(), count).cast::<u8>();
            // SAFETY: the caller's promises; there are lines and sums for the rows.
            unsafe {
                let x = lines.add(block * 2 * ROWS * units);
                let start = starts[0].wrapping_add((count * ROWS + block * share) * units * LINE);
                let ahead = Ahead { start, lines: share };
                match (some.len() > ROWS, count) {
                    (true, 2) => tall::<2>(x, [starts[0], starts[1]], units, ahead, sums),
                    (true, _) => tall::<1>(x, [starts[0]], units, ahead, sums),
                    (_, 1) => wide::<1>(x, [starts[0]], units, sums),
                    (_, 2) => wide::<2>(x, [starts[0], starts[1]], units, sums),
                    _ => wide::<4>(x, starts, units, sums),
                }
            }
            workspace.each_row(some.len(), count, |row, sums| sink(block * 2 * ROWS + row, panel, sums));
        }
        panel += count;
    }
}

/// What a pass fetches into the second cache: so many lines a unit.
struct Ahead {
    start: *const u8,
    lines: usize,
}

/// 32 rows by `P` panels, 1 or 2; register 0 and 1 have the first rows' sums, 2 and 3 the others'.
///
/// # Safety
/// As for [`super::walk`]; `lines` are those of `units` units; `sums` leads to room for 32 rows by `P` panels.
#[target_feature(enable = "avx512f")]
unsafe fn tall<const P: usize>(lines: *const Line, panels: [*const u8; P], units: usize, ahead: Ahead, sums: *mut u8) {
    // SAFETY: the caller's promises.
    unsafe {
        zero_sums();
        for unit in 0..units {
            let at = unit * ROWS * LINE;
            for line in 0..ahead.lines {
                // Past the end of the memory it is harmless.
                _mm_prefetch::<_MM_HINT_T1>(ahead.start.wrapping_add((unit * ahead.lines + line) * LINE).cast());
            }
            let x = lines.add(unit * ROWS).cast::<u8>();
            load::<X>(x, LINE);
            load::<W>(panels[0].add(at), LINE);
            multiply_bf16::<0, X, W>();
            load::<X2>(x.add(units * ROWS * LINE), LINE);
            if P == 2 {
                load::<W2>(panels[1].add(at), LINE);
                multiply_bf16::<1, X, W2>();
            }
            multiply_bf16::<2, X2, W>();
            if P == 2 {
                multiply_bf16::<3, X2, W2>();
            }
        }
        let stride = P * LINE;
        store::<0>(sums, stride);
        store::<2>(sums.add(ROWS * stride), stride);
        if P == 2 {
            store::<1>(sums.add(LINE), stride);
            store::<3>(sums.add(ROWS * stride + LINE), stride);
        }
    }
}

/// 16 rows by `P` panels, 1, 2 or 4, a register each.
///
/// # Safety
/// As for [`tall`], of 16 rows.
#[target_feature(enable = "avx512f")]
unsafe fn wide<const P: usize>(lines: *const Line, panels: [*const u8; P], units: usize, sums: *mut u8) {
    // SAFETY: the caller's promises.
    unsafe {
        zero_sums();
        for unit in 0..units {
            let weights = |panel: usize| {
                let at = panels[panel].add(unit * ROWS * LINE);
                prefetch(at, ROWS * LINE);
                at
            };
            load::<X>(lines.add(unit * ROWS).cast(), LINE);
            load::<W>(weights(0), LINE);
            multiply_bf16::<0, X, W>();
            if P >= 2 {
                load::<W2>(weights(1), LINE);
                multiply_bf16::<1, X, W2>();
            }
            if P == 4 {
                load::<W>(weights(2), LINE);
                multiply_bf16::<2, X, W>();
                load::<W2>(weights(3), LINE);
                multiply_bf16::<3, X, W2>();
            }
        }
        let stride = P * LINE;
        store::<0>(sums, stride);
        if P >= 2 {
            store::<1>(sums.add(LINE), stride);
        }
        if P == 4 {
            store::<2>(sums.add(2 * LINE), stride);
            store::<3>(sums.add(3 * LINE), stride);
        }
    }
}
