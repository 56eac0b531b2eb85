//! The gated feed-forward `down(silu(gate(x)) · up(x))`, grouped by expert; a dense layer is one group of all rows.
//!
//! Gate and up lie interleaved in one packed matrix: panel `2j` holds 16 rows of gate, panel `2j + 1` the same rows of
//! up, so that one tile makes both and the product never leaves the core. Each expert's weights are read once per
//! call, however many rows use it. A token's sum over its experts is taken in the order of the groups, so give them
//! in ascending expert index: the result then depends on nothing else.

use std::ops::Range;

use crate::{
    activation::silu_mul,
    format::{Format, Layout, PANEL, Packed},
    isa::Isa,
    matmul::{
        TASK_BYTES,
        activations::{Activations, Converted, Writer},
        new_sums, panels_per_task, prefetch, walk,
    },
    pool::Pool,
    shared::SharedSlice,
};

/// The sizes of one expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FfnLayout {
    /// The weights' format.
    pub format: Format,
    /// Inputs and outputs.
    pub hidden: usize,
    /// Width between gate|up and down.
    pub intermediate: usize,
}

impl FfnLayout {
    /// The interleaved matrix of gate and up; each is padded to whole panels.
    #[must_use]
    pub fn gate_up(&self) -> Layout {
        Layout { format: self.format, n: 2 * self.intermediate.next_multiple_of(PANEL), k: self.hidden }
    }

    /// The matrix of down.
    #[must_use]
    pub fn down(&self) -> Layout {
        Layout { format: self.format, n: self.hidden, k: self.intermediate }
    }
}

/// One expert's weights and the rows that use it.
#[derive(Debug, Clone, Copy)]
pub struct Group<'a> {
    /// Laid out as [`FfnLayout::gate_up`].
    pub gate_up: Packed<'a>,
    /// Laid out as [`FfnLayout::down`].
    pub down: Packed<'a>,
    /// The rows, each with the weight of this expert's output in its sum.
    pub rows: &'a [WeightedRow],
}

/// A row of the batch and the weight of an expert's output in its sum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WeightedRow {
    /// Index of the row.
    pub row: u32,
    /// What the output is multiplied with.
    pub weight: f32,
}

/// `out[row] = Σ over groups in order of weight · ffn(x[row])`; `x` and `out` are `[rows, hidden]`.
///
/// # Panics
/// When a slice has not the size that the layout needs, or a row's index lies outside.
pub fn grouped_ffn(pool: &Pool, isa: Isa, layout: FfnLayout, x: &[f32], groups: &[Group<'_>], out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "inputs and outputs");
    assert!(x.len().is_multiple_of(layout.hidden), "{} activations in rows of {}", x.len(), layout.hidden);
    for group in groups {
        assert_eq!((group.gate_up.layout(), group.down.layout()), (layout.gate_up(), layout.down()), "expert layout");
        assert!(group.rows.iter().all(|row| (row.row as usize) < x.len() / layout.hidden), "row of a group");
    }
    let starts: Vec<usize> = groups
        .iter()
        .scan(0, |next, group| {
            let start = *next;
            *next += group.rows.len();
            Some(start)
        })
        .collect();
    let inner = gate_and_up(pool, isa, layout, x, groups, &starts);
    down(pool, isa, layout, &inner, groups, &starts, out);
}

/// Rows that one task takes at a time: their sums, f32, stay in the nearest caches until they are converted.
const GATE_UP_ROWS: usize = 48;

/// silu(gate) · up of every row of every group, in the form that the down product takes.
fn gate_and_up(
    pool: &Pool,
    isa: Isa,
    layout: FfnLayout,
    x: &[f32],
    groups: &[Group<'_>],
    starts: &[usize],
) -> Converted {
    let matrix = layout.gate_up();
    let activations = Activations::new(pool, isa, layout.format, x, layout.hidden);
    let rows = groups.iter().map(|group| group.rows.len()).sum();
    let mut inner = Converted::zeroed(layout.format, rows, layout.intermediate);
    let writer = inner.writer(isa);
    // Columns of the intermediate; what shares a scale stays together.
    let columns_per_task = (TASK_BYTES / (2 * matrix.panel_bytes()) * PANEL)
        .max(1)
        .next_multiple_of(Writer::unit(layout.format))
        .min(layout.intermediate);
    let tasks_per_group = layout.intermediate.div_ceil(columns_per_task);
    pool.run(groups.len() * tasks_per_group, |task| {
        let (group, part) = (task / tasks_per_group, task % tasks_per_group);
        let columns = part * columns_per_task..layout.intermediate.min((part + 1) * columns_per_task);
        let panels = columns.start / PANEL * 2..columns.end.div_ceil(PANEL) * 2;
        let width = panels.len() * PANEL;
        let mut tile = new_sums();
        let mut sums = vec![0.0; width * groups[group].rows.len().min(GATE_UP_ROWS)];
        for (chunk, rows) in groups[group].rows.chunks(GATE_UP_ROWS).enumerate() {
            let pointers: Vec<_> = rows.iter().map(|row| activations.row(row.row as usize)).collect();
            // SAFETY: the pointers are rows of activations made for this format and k.
            unsafe {
                walk(isa, &pointers, &groups[group].gate_up, panels.clone(), &mut tile, |row, panel, products| {
                    let at = row * (width / PANEL) + panel - panels.start;
                    // One by one: known sizes are copied without a call.
                    for (sum, product) in sums.as_chunks_mut().0[at..].iter_mut().zip(products) {
                        *sum = *product;
                    }
                });
            }
            for (row, sums) in sums.chunks_exact_mut(width).take(rows.len()).enumerate() {
                gated(isa, sums);
                let row = starts[group] + chunk * GATE_UP_ROWS + row;
                // SAFETY: each task has its own rows and columns.
                unsafe { writer.write(row, columns.start, &sums[..columns.len()]) };
            }
        }
    });
    inner
}

/// Pairs of panels `[gate | up]` to silu(gate) · up, which then stands without gaps at the front.
fn gated(isa: Isa, sums: &mut [f32]) {
    #[inline(always)]
    fn plain(sums: &mut [f32]) {
        let (pairs, _) = sums.as_chunks_mut::<{ 2 * PANEL }>();
        for index in 0..pairs.len() {
            let (gate, up) = pairs[index].split_at(PANEL);
            let (mut gates, mut ups) = ([0.0; PANEL], [0.0; PANEL]);
            gates.copy_from_slice(gate);
            ups.copy_from_slice(up);
            let (half, place) = (index / 2, index % 2 * PANEL);
            pairs[half][place..place + PANEL].copy_from_slice(&silu_mul(gates, ups));
        }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn avx512(sums: &mut [f32]) {
        plain(sums);
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn avx2(sums: &mut [f32]) {
        plain(sums);
    }
    match isa {
        // SAFETY: a tier other than portable exists only where `Isa::available` found it.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => unsafe { avx512(sums) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2(sums) },
        _ => plain(sums),
    }
}

/// Each task owns a range of output columns and walks the groups in order, so no partial sums are kept.
fn down(
    pool: &Pool,
    isa: Isa,
    layout: FfnLayout,
    inner: &Converted,
    groups: &[Group<'_>],
    starts: &[usize],
    out: &mut [f32],
) {
    let matrix = layout.down();
    let hidden = layout.hidden;
    let rows = out.len() / hidden;
    let panels_per_task = panels_per_task(pool, &matrix);
    let target = SharedSlice::new(out);
    pool.run(matrix.panels().div_ceil(panels_per_task), |task| {
        let panels = task * panels_per_task..matrix.panels().min((task + 1) * panels_per_task);
        let columns = panels.start * PANEL..hidden.min(panels.end * PANEL);
        for row in 0..rows {
            // SAFETY: each task has its own columns.
            unsafe { target.part(row * hidden + columns.start, columns.len()) }.fill(0.0);
        }
        let mut tile = new_sums();
        for (index, (group, start)) in groups.iter().zip(starts).enumerate() {
            if let Some(next) = groups.get(index + 1) {
                prefetch(&next.down, panels.start);
            }
            let pointers: Vec<_> = (0..group.rows.len()).map(|row| inner.row(start + row)).collect();
            // SAFETY: the pointers are rows in the form of `down`'s format and k.
            unsafe {
                walk(isa, &pointers, &group.down, panels.clone(), &mut tile, |row, panel, sums| {
                    let WeightedRow { row, weight } = group.rows[row];
                    let columns: Range<usize> = panel * PANEL..hidden.min((panel + sums.len()) * PANEL);
                    // SAFETY: each task has its own columns.
                    let out = target.part(row as usize * hidden + columns.start, columns.len());
                    for (out, sum) in out.iter_mut().zip(sums.as_flattened()) {
                        *out += weight * sum;
                    }
                });
            }
        }
    });
}

#[cfg(test)]
mod tests;
