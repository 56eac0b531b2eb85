//! Dense products over packed weights: `y = x · Wᵀ`.
//!
//! One primitive does the work, the *tile*: some rows of activations times a few panels of weights, over the whole of
//! k, sums in registers. `portable.rs` is its contract; the other files have the vector tiers. The sum of one output is
//! taken in ascending k in one order, whatever the tile's shape, so a row's result does not depend on its neighbours,
//! on the number of threads or on how the work was cut.

pub(crate) mod activations;
#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(target_arch = "x86_64")]
mod vnni;

use std::ops::Range;

use activations::{Activations, Converted};

use crate::{
    ffn::WeightedRow,
    format::{Format, Layout, PANEL, Packed, mxfp4},
    isa::Isa,
    pool::Pool,
    shared::SharedSlice,
};

/// Most rows of a tile of f32 or bf16 weights. 12 rows by 2 panels keep 24 sums in the 32 vector registers.
const FLOAT_ROWS: usize = 12;
/// Most rows of a tile of integer weights: of one panel 16 sums, the 8 registers of a block's weights, and some to work with.
const INTEGER_ROWS: usize = 16;
/// Most rows of any tile.
const TILE_ROWS: usize = INTEGER_ROWS;
/// Most panels of one tile: enough independent sums to outrun the memory when there is one row. Eight would be slower:
/// their streams lie a power of two apart and evict each other from the nearest cache.
const TILE_PANELS: usize = 4;
/// A tile's results: rows by panels of 16 outputs.
pub(crate) type Sums = [[[f32; PANEL]; TILE_PANELS]; TILE_ROWS];

/// Room for [`walk`]; it is 4 KiB, so tasks make it once.
pub(crate) fn new_sums() -> Sums {
    [[[0.0; PANEL]; TILE_PANELS]; TILE_ROWS]
}

/// The values of the 16 codes of `mxfp4` in halves, made unsigned by their offset.
const MXFP4_UNSIGNED: [u8; 16] = {
    let mut unsigned = [0; 16];
    let mut code = 0;
    while code < 16 {
        unsigned[code] = (mxfp4::VALUES[code] as i32 + activations::offset(Format::Mxfp4)) as u8;
        code += 1;
    }
    unsigned
};

/// What one task should take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TaskSize {
    /// Weight bytes that it streams if there are enough: long enough for the prefetchers to settle.
    bytes: usize,
    /// Rows that it holds at most, so that many rows with few panels still spread over all threads.
    rows: usize,
    /// Rows whose sums, f32, stay in the near caches until they are converted.
    pub chunk: usize,
    /// Tasks for each thread that a product is cut into at most: more are fairer, fewer lay rows side by side less often.
    shares: usize,
    /// Panels of a tile of as many rows: a task takes whole tiles.
    panels: usize,
}

impl TaskSize {
    /// For products of up to `rows` rows each.
    pub(crate) fn new(isa: Isa, format: Format, rows: usize) -> Self {
        let size = Self { bytes: 256 << 10, rows: 240, chunk: 48, shares: 4, panels: 2 };
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx if amx::lays(format, rows) => {
                Self { bytes: 4 << 20, rows: 2 * amx::ROWS_AT_A_TIME, chunk: amx::ROWS_AT_A_TIME, shares: 2, ..size }
            }
            #[cfg(target_arch = "x86_64")]
            _ if vnni::many::takes(isa, format, rows) => Self { panels: TILE_PANELS, ..size },
            _ => size,
        }
    }

    /// Panels that stream so many bytes, but few enough that every thread gets some of `matrices` such matrices; whole tiles.
    pub(crate) fn fair_panels(self, pool: &Pool, layout: &Layout, matrices: usize) -> usize {
        let fair = (matrices * layout.panels()).div_ceil(self.shares * pool.threads());
        (self.bytes / layout.panel_bytes()).min(fair).max(1).next_multiple_of(self.panels)
    }
}

/// `y[row] = x[row] · Wᵀ` for `x` `[rows, k]` and `W` `[n, k]`; `y` is `[rows, n]`.
///
/// # Panics
/// When a slice has not the size that the matrix needs.
pub fn matmul(pool: &Pool, isa: Isa, x: &[f32], weights: &Packed<'_>, y: &mut [f32]) {
    let layout = weights.layout();
    let inputs = Inputs::new(pool, isa, layout.format, x, layout.k);
    products(pool, &inputs, inputs.rows, |row| row, weights, y);
}

/// Rows that several products take some of: converted once to the form that their weights' format and the tier take.
pub struct Inputs<'a> {
    isa: Isa,
    activations: Activations<'a>,
    format: Format,
    rows: usize,
    k: usize,
}

impl<'a> Inputs<'a> {
    /// `x` is `[rows, k]`, for weights of `format`.
    ///
    /// # Panics
    /// When `x` is not a whole number of rows.
    #[must_use]
    pub fn new(pool: &Pool, isa: Isa, format: Format, x: &'a [f32], k: usize) -> Self {
        assert!(x.len().is_multiple_of(k), "{} activations in rows of {k}", x.len());
        Self { isa, activations: Activations::new(pool, isa, format, x, k), format, rows: x.len() / k, k }
    }
}

/// `y[i] = x[rows[i]] · Wᵀ`: [`matmul`] of some rows, `y` is `[rows.len(), n]`.
///
/// # Panics
/// When there is no such row, the inputs are for other weights, or `y` has not the size that the matrix needs.
pub fn matmul_rows(pool: &Pool, inputs: &Inputs<'_>, rows: &[WeightedRow], weights: &Packed<'_>, y: &mut [f32]) {
    assert!(rows.iter().all(|row| (row.row as usize) < inputs.rows), "rows of {}", inputs.rows);
    products(pool, inputs, rows.len(), |row| rows[row].row as usize, weights, y);
}

/// The products of `rows` of the inputs, which `pick` names.
fn products(
    pool: &Pool,
    inputs: &Inputs<'_>,
    rows: usize,
    pick: impl Fn(usize) -> usize + Sync,
    weights: &Packed<'_>,
    y: &mut [f32],
) {
    let layout = weights.layout();
    let n = layout.n;
    assert_eq!((inputs.format, inputs.k), (layout.format, layout.k), "inputs of a product");
    assert_eq!(y.len(), rows * n, "outputs of {rows} rows by {n}");
    let activations = &inputs.activations;
    let size = TaskSize::new(inputs.isa, layout.format, rows);
    let panels_per_task = size.fair_panels(pool, &layout, 1);
    let panel_tasks = layout.panels().div_ceil(panels_per_task);
    let row_tasks = rows.div_ceil(size.rows);
    let target = SharedSlice::new(y);
    pool.run(panel_tasks * row_tasks, |task| {
        let first = task % row_tasks * size.rows;
        let pointers: Vec<_> = (first..rows.min(first + size.rows)).map(|row| activations.row(pick(row))).collect();
        let start = task / row_tasks * panels_per_task;
        let panels = start..layout.panels().min(start + panels_per_task);
        // SAFETY: the pointers are rows of activations made for this matrix's format and k, and for this tier.
        unsafe {
            walk(inputs.isa, &pointers, weights, panels, &mut new_sums(), |row, panel, sums| {
                let columns = panel * PANEL..n.min((panel + sums.len()) * PANEL);
                // SAFETY: each task has its own rows and columns.
                let out = target.part((first + row) * n + columns.start, columns.len());
                copy(sums, out);
            });
        }
    });
}

/// A tile's results of one row, as many as there is room for. Known sizes are copied without a call.
#[inline(always)]
pub(crate) fn copy(sums: &[[f32; PANEL]], out: &mut [f32]) {
    let (whole, rest) = out.as_chunks_mut::<PANEL>();
    whole.iter_mut().zip(sums).for_each(|(out, sums)| *out = *sums);
    if let Some(sums) = sums.get(whole.len()) {
        rest.iter_mut().zip(sums).for_each(|(out, sum)| *out = *sum);
    }
}

/// Calls `sink(row, first_panel, sums)` with the products of every row and panel, several panels at a time. Each weight
/// is read from memory once.
///
/// # Safety
/// Each pointer must lead to a row of activations in the form of the weights' format and k on the tier.
pub(crate) unsafe fn walk(
    isa: Isa,
    rows: &[*const u8],
    weights: &Packed<'_>,
    panels: Range<usize>,
    sums: &mut Sums,
    sink: impl FnMut(usize, usize, &[[f32; PANEL]]),
) {
    let layout = weights.layout();
    let k = layout.format.padded_k(layout.k);
    // SAFETY: the caller promises the rows; the panels are whole.
    unsafe { walk_panels(isa, layout.format, k, rows, panels, |index| weights.panel(index).as_ptr(), sums, sink) }
}

/// [`walk`] over panels wherever they lie.
///
/// # Safety
/// Each row pointer must lead to a row of activations in the form of the format and `k` on the tier, and each pointer that
/// `panel` gives to a panel of it.
#[allow(clippy::too_many_arguments, reason = "the loop of every product: each is one of its sizes")]
pub(crate) unsafe fn walk_panels(
    isa: Isa,
    format: Format,
    k: usize,
    rows: &[*const u8],
    panels: Range<usize>,
    panel_start: impl Fn(usize) -> *const u8,
    sums: &mut Sums,
    mut sink: impl FnMut(usize, usize, &[[f32; PANEL]]),
) {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Amx && amx::takes(format, rows.len()) {
        // SAFETY: the caller's promises.
        return unsafe { amx::walk(format, k, rows, panels, panel_start, sink) };
    }
    let mut panel = panels.start;
    #[cfg(target_arch = "x86_64")]
    if vnni::many::takes(isa, format, rows.len()) {
        let tiles = panel..panels.end - panels.len() % TILE_PANELS;
        panel = tiles.end;
        // SAFETY: the caller's promises.
        unsafe { vnni::many::walk(format, k, rows, tiles, &panel_start, &mut sink) };
    }
    let (tile_rows, tile_panels) = tile_shape(isa, format, rows.len());
    while panel < panels.end {
        let count = panels_at_once(panels.end - panel, tile_panels);
        let mut pointers = [std::ptr::null(); TILE_PANELS];
        for (index, pointer) in pointers.iter_mut().take(count).enumerate() {
            *pointer = panel_start(panel + index);
        }
        for (block, rows) in rows.chunks(tile_rows).enumerate() {
            // SAFETY: the caller's promises.
            unsafe { tile(isa, format, rows, &pointers[..count], k, sums) };
            for (row, sums) in sums.iter().take(rows.len()).enumerate() {
                sink(block * tile_rows + row, panel, &sums[..count]);
            }
        }
        panel += count;
    }
}

/// Panels of the next tile where `left` are left and a tile takes `most`: these, or 2, or 1.
fn panels_at_once(left: usize, most: usize) -> usize {
    match left {
        left if left >= most => most,
        left if left >= 2 => 2,
        _ => 1,
    }
}

/// Most rows and panels of a tile of `rows` rows.
fn tile_shape(isa: Isa, format: Format, rows: usize) -> (usize, usize) {
    match format {
        #[cfg(target_arch = "x86_64")]
        Format::F32 | Format::Bf16 if isa == Isa::Avx2 => avx2::float_shape(format, rows),
        #[cfg(target_arch = "aarch64")]
        Format::F32 | Format::Bf16 if isa == Isa::Neon => neon::float_shape(rows),
        Format::F32 | Format::Bf16 if rows <= 6 => (FLOAT_ROWS, TILE_PANELS),
        Format::F32 | Format::Bf16 => (FLOAT_ROWS, 2),
        Format::Q8_0 | Format::Q4_0 | Format::Q4K | Format::Q6K | Format::Mxfp4 => (INTEGER_ROWS, 1),
    }
}

/// One tile on the tier `isa`.
///
/// # Safety
/// As for [`walk`]; each panel pointer leads to a whole panel; rows and panels are no more than [`tile_shape`] says.
unsafe fn tile(isa: Isa, format: Format, rows: &[*const u8], panels: &[*const u8], k: usize, sums: &mut Sums) {
    // SAFETY: the caller's promises; a tier other than portable exists only where `Isa::available` found it.
    unsafe {
        match (isa, format) {
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx, Format::F32) => {
                avx512::tile::<avx512::F32>(rows, panels, k, sums);
            }
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, Format::Bf16) => avx512::tile::<avx512::WidenedBf16>(rows, panels, k, sums),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512Bf16, Format::Bf16) => avx512::tile::<avx512::Bf16Pairs>(rows, panels, k, sums),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx, _) => vnni::tile(format, rows, panels[0], k, sums),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, _) => avx2::tile(format, rows, panels, k, sums),
            #[cfg(target_arch = "aarch64")]
            (Isa::Neon, _) => neon::tile(format, rows, panels, k, sums),
            (_, Format::F32) => portable::tile_f32(rows, panels, k, sums),
            (_, Format::Bf16) => portable::tile_bf16(rows, panels, k, sums),
            _ => portable::tile_integer(format, rows, panels, k, sums),
        }
    }
}

/// Begins to fetch the head of a panel whose walk comes next: the hardware follows a stream only some lines into it, and
/// an expert's part of a task may be short (8 small experts of `q4_k`, one row each: 32 GB/s in place of 27).
pub(crate) fn prefetch(weights: &Packed<'_>, panel: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in weights.panel(panel).chunks(64).take(16) {
        // SAFETY: a prefetch never faults, and SSE is part of x86-64.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (weights, panel);
}

/// Whether the tier `isa` takes less time than `other` for many rows by bf16 and then by int8 weights, by runs of some
/// milliseconds in all on one core.
pub(crate) fn multiplies_faster(isa: Isa, other: Isa) -> bool {
    const K: usize = 512;
    const ROWS: usize = 32;
    let run = |isa| {
        let operands = [Format::Bf16, Format::Q8_0].map(|format| {
            let panel = vec![0_u8; Layout { format, n: PANEL, k: K }.panel_bytes()];
            (format, Converted::zeroed(&Pool::new(1), isa, format, ROWS, K), panel)
        });
        let mut sums = new_sums();
        move || {
            for (format, activations, panel) in &operands {
                let rows: [_; ROWS] = std::array::from_fn(|row| activations.row(row));
                // SAFETY: rows and panels of the format and K.
                unsafe {
                    walk_panels(isa, *format, K, &rows, 0..TILE_PANELS, |_| panel.as_ptr(), &mut sums, |_, _, _| {});
                }
            }
        }
    };
    crate::isa::is_faster(run(isa), run(other))
}

#[cfg(test)]
mod tests;
