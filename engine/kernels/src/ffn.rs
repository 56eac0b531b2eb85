//! The gated feed-forward `down(silu(gate(x)) · up(x))`, grouped by expert; a dense layer is one group of all rows.
//!
//! Gate and up lie interleaved in one packed matrix: panel `2j` holds 16 rows of gate, panel `2j + 1` the same rows of
//! up, so that one tile makes both and the product never leaves the core. Each expert's weights are read once per
//! call, however many rows use it. A token's sum over its experts is taken in the order of the groups, so give them
//! in ascending expert index: the result then depends on nothing else.

use std::{cmp::Reverse, ops::Range};

use crate::{
    activation::silu_mul,
    format::{Format, Layout, PANEL, Packed},
    isa::{Isa, for_each_width},
    matmul::{
        TaskSize,
        activations::{Activations, Converted, Writer},
        new_sums, prefetch, walk,
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

    /// The row of that matrix which holds row `row` of gate (`up` 0) or up (1).
    #[must_use]
    pub fn gate_up_row(&self, row: usize, up: usize) -> usize {
        (row / PANEL * 2 + up) * PANEL + row % PANEL
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

/// `out[row] += Σ over groups in order of weight · ffn(x[row])`; `x` and `out` are `[rows, hidden]`.
///
/// # Panics
/// When a slice has not the size that the layout needs, or a row's index lies outside.
pub fn grouped_ffn(pool: &Pool, isa: Isa, layout: FfnLayout, x: &[f32], groups: &[Group<'_>], out: &mut [f32]) {
    let rows: Vec<_> = groups.iter().map(|group| group.rows).collect();
    let mut ffn = GroupedFfn::new(pool, isa, layout, x, &rows);
    let gate_up: Vec<_> = groups.iter().map(|group| group.gate_up).enumerate().collect();
    ffn.gate_up(&gate_up);
    let down: Vec<_> = groups.iter().map(|group| group.down).enumerate().collect();
    ffn.add_down(&down, out);
}

/// A grouped feed-forward whose weights come some groups at a time. The first half of the work takes groups in any
/// order; the second half fixes the order of the sums.
pub struct GroupedFfn<'a> {
    pool: &'a Pool,
    isa: Isa,
    layout: FfnLayout,
    /// How many there are of `activations`.
    rows: usize,
    activations: Activations<'a>,
    groups: &'a [&'a [WeightedRow]],
    /// Where each group's rows begin in `inner`.
    starts: Vec<usize>,
    /// Whether a group's part of `inner` was computed.
    done: Vec<bool>,
    /// silu(gate) · up of every row of every group, in the form that the down product takes.
    inner: Converted,
}

impl<'a> GroupedFfn<'a> {
    /// Of `x` `[rows, hidden]`, for groups with these rows.
    ///
    /// # Panics
    /// When `x` has not the size that the layout needs, or a row's index lies outside.
    #[must_use]
    pub fn new(pool: &'a Pool, isa: Isa, layout: FfnLayout, x: &'a [f32], groups: &'a [&'a [WeightedRow]]) -> Self {
        assert!(x.len().is_multiple_of(layout.hidden), "{} activations in rows of {}", x.len(), layout.hidden);
        let rows = x.len() / layout.hidden;
        assert!(groups.iter().all(|group| group.iter().all(|row| (row.row as usize) < rows)), "row of a group");
        let mut total = 0;
        let starts = groups
            .iter()
            .map(|group| {
                total += group.len();
                total - group.len()
            })
            .collect();
        Self {
            pool,
            isa,
            layout,
            rows,
            activations: Activations::new(pool, isa, layout.format, x, layout.hidden),
            groups,
            starts,
            done: vec![false; groups.len()],
            inner: Converted::zeroed(pool, isa, layout.format, total, layout.intermediate),
        }
    }

    /// silu(gate) · up of the groups given by their index with their gate|up.
    ///
    /// # Panics
    /// When there is no such group, it has been given before, or the weights have another layout.
    pub fn gate_up(&mut self, weights: &[(usize, Packed<'_>)]) {
        let Self { pool, isa, layout, activations, groups, starts, done, inner, .. } = self;
        let (isa, matrix) = (*isa, layout.gate_up());
        assert!(weights.iter().all(|(_, weights)| weights.layout() == matrix), "layout of gate|up");
        for (group, _) in weights {
            assert!(!std::mem::replace(&mut done[*group], true), "group {group} is given twice");
        }
        let writer = inner.writer();
        let size = TaskSize::new(isa, layout.format, most_rows(groups));
        // Columns of the intermediate; what shares a scale stays together.
        let columns_per_task = (size.fair_panels(pool, &matrix, weights.len()) / 2 * PANEL)
            .next_multiple_of(Writer::unit(layout.format))
            .min(layout.intermediate);
        let tasks_per_group = layout.intermediate.div_ceil(columns_per_task);
        // The largest first: what one thread still does while the others have nothing left is small.
        let mut order: Vec<_> = weights.iter().collect();
        order.sort_by_key(|(group, _)| Reverse(groups[*group].len()));
        pool.run(weights.len() * tasks_per_group, |task| {
            let ((group, gate_up), part) = (order[task / tasks_per_group], task % tasks_per_group);
            let (rows, start) = (groups[*group], starts[*group]);
            let columns = part * columns_per_task..layout.intermediate.min((part + 1) * columns_per_task);
            let panels = columns.start / PANEL * 2..columns.end.div_ceil(PANEL) * 2;
            let width = panels.len() * PANEL;
            let mut tile = new_sums();
            let mut sums = vec![0.0; width * rows.len().min(size.chunk)];
            for (chunk, rows) in rows.chunks(size.chunk).enumerate() {
                let pointers: Vec<_> = rows.iter().map(|row| activations.row(row.row as usize)).collect();
                // SAFETY: the pointers are rows of activations made for this format and k.
                unsafe {
                    walk(isa, &pointers, gate_up, panels.clone(), &mut tile, |row, panel, products| {
                        let at = row * (width / PANEL) + panel - panels.start;
                        // One by one: known sizes are copied without a call.
                        for (sum, product) in sums.as_chunks_mut().0[at..].iter_mut().zip(products) {
                            *sum = *product;
                        }
                    });
                }
                for (row, sums) in sums.chunks_exact_mut(width).take(rows.len()).enumerate() {
                    gated(isa, sums);
                    let row = start + chunk * size.chunk + row;
                    // SAFETY: each task has its own rows and columns.
                    unsafe { writer.write(row, columns.start, &sums[..columns.len()]) };
                }
            }
        });
    }

    /// `out[row] += weight · down(inner)` of the groups given by their index with their down, in the order given;
    /// their [`GroupedFfn::gate_up`] comes before. Each task owns a range of output columns and walks the groups in
    /// order, so no partial sums are kept.
    ///
    /// # Panics
    /// When there is no such group, its gate|up was not given, or the weights or `out` `[rows, hidden]` have another layout.
    pub fn add_down(&self, weights: &[(usize, Packed<'_>)], out: &mut [f32]) {
        let (matrix, hidden) = (self.layout.down(), self.layout.hidden);
        assert!(weights.iter().all(|(_, weights)| weights.layout() == matrix), "layout of down");
        assert!(weights.iter().all(|(group, _)| self.done[*group]), "down before gate|up");
        assert_eq!(out.len(), self.rows * hidden, "outputs");
        let size = TaskSize::new(self.isa, matrix.format, most_rows(self.groups));
        let panels_per_task = size.fair_panels(self.pool, &matrix, 1);
        let target = SharedSlice::new(out);
        self.pool.run(matrix.panels().div_ceil(panels_per_task), |task| {
            let panels = task * panels_per_task..matrix.panels().min((task + 1) * panels_per_task);
            let mut tile = new_sums();
            for (index, (group, down)) in weights.iter().enumerate() {
                if let Some((_, next)) = weights.get(index + 1) {
                    prefetch(next, panels.start);
                }
                let (rows, start) = (self.groups[*group], self.starts[*group]);
                let pointers: Vec<_> = (0..rows.len()).map(|row| self.inner.row(start + row)).collect();
                // SAFETY: the pointers are rows in the form of `down`'s format and k.
                unsafe {
                    walk(self.isa, &pointers, down, panels.clone(), &mut tile, |row, panel, sums| {
                        let WeightedRow { row, weight } = rows[row];
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
}

/// Rows of the largest group.
fn most_rows(groups: &[&[WeightedRow]]) -> usize {
    groups.iter().map(|rows| rows.len()).max().unwrap_or(0)
}

for_each_width! {
    /// Pairs of panels `[gate | up]` to silu(gate) · up, which then stands without gaps at the front.
    fn gated(sums: &mut [f32]) {
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
}

#[cfg(test)]
mod tests;
