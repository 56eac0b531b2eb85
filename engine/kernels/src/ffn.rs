//! The gated feed-forward `down(silu(gate(x)) · up(x))`, grouped by expert; a dense layer is one group of all rows.
//!
//! Gate and up lie interleaved in one packed matrix: panel `2j` holds 16 rows of gate, panel `2j + 1` the same rows of
//! up, so that one tile makes both and the product never leaves the core. Each expert's weights are read once per
//! call, however many rows use it. A token's sum over its experts is taken in the order of the groups, so give them
//! in ascending expert index: the result then depends on nothing else.

use std::ops::Range;

use crate::{
    activation::silu_mul,
    format::{Format, Layout, PANEL, Packed, round_to_bf16},
    isa::Isa,
    matmul::{Activations, TASK_BYTES, panels_per_task, walk},
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

/// The rows between the two products, in the form that the down product takes.
struct Inner {
    /// Bytes of a row.
    stride: usize,
    bytes: Vec<u64>,
}

impl Inner {
    fn row(&self, index: usize) -> *const u8 {
        let words = self.stride / 8;
        self.bytes[index * words..(index + 1) * words].as_ptr().cast()
    }
}

/// silu(gate) · up of every row of every group.
fn gate_and_up(pool: &Pool, isa: Isa, layout: FfnLayout, x: &[f32], groups: &[Group<'_>], starts: &[usize]) -> Inner {
    let matrix = layout.gate_up();
    let activations = Activations::new(pool, layout.format, x, layout.hidden);
    let rows: usize = groups.iter().map(|group| group.rows.len()).sum();
    // Whole panels of outputs are written, and the k of `down` is padded: the wider of the two.
    let width = layout.format.padded_k(layout.intermediate).max(layout.intermediate.next_multiple_of(PANEL));
    let stride = width * layout.format.value_bytes();
    let mut inner = Inner { stride, bytes: vec![0; rows * stride / 8] };
    let target = SharedSlice::new(&mut inner.bytes);
    let panels_per_task = (TASK_BYTES / matrix.panel_bytes()).max(2).next_multiple_of(2);
    let tasks_per_group = matrix.panels().div_ceil(panels_per_task);
    pool.run(groups.len() * tasks_per_group, |task| {
        let (group, part) = (task / tasks_per_group, task % tasks_per_group);
        let pointers: Vec<_> = groups[group].rows.iter().map(|row| activations.row(row.row as usize)).collect();
        let start = part * panels_per_task;
        let panels = start..matrix.panels().min(start + panels_per_task);
        let panel_words = PANEL * layout.format.value_bytes() / 8;
        // SAFETY: the pointers are rows of activations made for this format and k.
        unsafe {
            walk(isa, &pointers, &groups[group].gate_up, panels, |row, panel, sums| {
                let at = (starts[group] + row) * (stride / 8) + panel / 2 * panel_words;
                // SAFETY: each task has its own rows and columns.
                let words = target.part(at, sums.len() / 2 * panel_words);
                for (sums, words) in sums.chunks_exact(2).zip(words.chunks_exact_mut(panel_words)) {
                    store(layout.format, silu_mul(sums[0], sums[1]), words);
                }
            });
        }
    });
    inner
}

/// Sixteen values in the form of activations.
#[inline(always)]
fn store(format: Format, values: [f32; PANEL], words: &mut [u64]) {
    match format {
        Format::F32 => {
            for (word, pair) in words.iter_mut().zip(values.chunks_exact(2)) {
                *word = u64::from(pair[0].to_bits()) | u64::from(pair[1].to_bits()) << 32;
            }
        }
        Format::Bf16 => {
            let rounded = values.map(round_to_bf16);
            for (word, four) in words.iter_mut().zip(rounded.chunks_exact(4)) {
                *word = (0..4).fold(0, |word, i| word | u64::from(four[i]) << (16 * i));
            }
        }
    }
}

/// Each task owns a range of output columns and walks the groups in order, so no partial sums are kept.
fn down(
    pool: &Pool,
    isa: Isa,
    layout: FfnLayout,
    inner: &Inner,
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
        for (group, start) in groups.iter().zip(starts) {
            let pointers: Vec<_> = (0..group.rows.len()).map(|row| inner.row(start + row)).collect();
            // SAFETY: the pointers are rows in the form of `down`'s format and k.
            unsafe {
                walk(isa, &pointers, &group.down, panels.clone(), |row, panel, sums| {
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
