//! Plain f32 products, nothing packed: for matrices that change at every step, of which many have few rows or columns.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use std::ops::Range;

use crate::{isa::Isa, pool::Pool, shared::SharedSlice};

/// Inputs that are worked off before the next block: their part of both sides stays in the caches.
const INPUTS: usize = 256;
/// Columns of a block: four of the widest vector registers.
const COLUMNS: usize = 64;
/// Rows of a task.
const TASK_ROWS: usize = 48;
/// Multiplications of a product that the calling thread does in less time than it takes to wake the others.
const SMALL: usize = 1 << 16;

/// A matrix whose elements lie in strides: element `(i, j)` at `i · row + j · column`.
#[derive(Debug, Clone, Copy)]
pub struct Strided<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    row: usize,
    column: usize,
}

impl<'a> Strided<'a> {
    /// `[rows, columns]`, row after row.
    ///
    /// # Panics
    /// When `values` are not as many.
    #[must_use]
    pub fn new(values: &'a [f32], rows: usize, columns: usize) -> Self {
        assert_eq!(values.len(), rows * columns, "a matrix of {rows} by {columns}");
        Self { values, rows, columns, row: columns, column: 1 }
    }

    /// Some of its columns.
    ///
    /// # Panics
    /// When there are no such columns.
    #[must_use]
    pub fn columns(self, columns: Range<usize>) -> Self {
        assert!(columns.start <= columns.end && columns.end <= self.columns, "{columns:?} of {} columns", self.columns);
        let values = &self.values[(columns.start * self.column).min(self.values.len())..];
        Self { values, columns: columns.len(), ..self }
    }

    /// Some of its rows.
    ///
    /// # Panics
    /// When there are no such rows.
    #[must_use]
    pub fn rows(self, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "{rows:?} of {} rows", self.rows);
        let values = &self.values[(rows.start * self.row).min(self.values.len())..];
        Self { values, rows: rows.len(), ..self }
    }

    /// Rows and columns.
    #[must_use]
    pub fn size(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// Row `index` of a matrix whose columns lie side by side.
    pub(super) fn row(&self, index: usize) -> &'a [f32] {
        assert!(self.column == 1 && index < self.rows, "row {index} of {}", self.rows);
        &self.values[index * self.row..][..self.columns]
    }

    /// Rows become columns.
    #[must_use]
    pub fn transposed(self) -> Self {
        Self { rows: self.columns, columns: self.rows, row: self.column, column: self.row, ..self }
    }
}

/// `out += left · right`: `left` is `[rows, inputs]` in any strides, `right` `[inputs, columns]` with whole rows side by
/// side, `out` `[rows, columns]`. The sum of an element is taken in ascending input.
///
/// # Panics
/// When the sizes don't match, or the columns of `right` don't lie side by side.
pub fn add_product(pool: &Pool, isa: Isa, left: Strided<'_>, right: Strided<'_>, out: &mut [f32]) {
    if left.rows * left.columns * right.columns < SMALL {
        return add_product_here(isa, left, right, out);
    }
    assert_eq!(out.len(), left.rows * right.columns, "product of {} by {}", left.rows, right.columns);
    let (row_tasks, column_tasks) = (left.rows.div_ceil(TASK_ROWS), right.columns.div_ceil(COLUMNS));
    let target = SharedSlice::new(out);
    pool.run(row_tasks * column_tasks, |task| {
        let rows = task % row_tasks * TASK_ROWS..left.rows.min((task % row_tasks + 1) * TASK_ROWS);
        let columns = task / row_tasks * COLUMNS..right.columns.min((task / row_tasks + 1) * COLUMNS);
        let len = (rows.len() - 1) * right.columns + columns.len();
        let start = target.pointer(rows.start * right.columns + columns.start, len);
        // SAFETY: the rows and columns lie in `out`, and each task has its own.
        unsafe { add_block(isa, left.rows(rows), right.columns(columns), Rows { start, stride: right.columns }) };
    });
}

/// [`add_product`] on the calling thread.
pub(super) fn add_product_here(isa: Isa, left: Strided<'_>, right: Strided<'_>, out: &mut [f32]) {
    assert_eq!(out.len(), left.rows * right.columns, "product of {} by {}", left.rows, right.columns);
    let stride = right.columns;
    for start in (0..stride).step_by(COLUMNS) {
        let right = right.columns(start..stride.min(start + COLUMNS));
        // SAFETY: the rows and columns lie in `out`, and nobody else has it.
        unsafe { add_block(isa, left, right, Rows { start: out.as_mut_ptr().wrapping_add(start), stride }) };
    }
}

/// The rows that a block adds to.
#[derive(Clone, Copy)]
struct Rows {
    /// The first element of the first.
    start: *mut f32,
    stride: usize,
}

impl Rows {
    fn row(self, index: usize) -> *mut f32 {
        self.start.wrapping_add(index * self.stride)
    }

    /// Without so many of the first.
    #[cfg(target_arch = "x86_64")]
    fn from(self, index: usize) -> Self {
        Self { start: self.row(index), ..self }
    }
}

/// At most [`COLUMNS`] columns of a product.
///
/// # Safety
/// The rows of `out` that the product has are valid as far as its columns go, and nobody else uses these meanwhile.
unsafe fn add_block(isa: Isa, left: Strided<'_>, right: Strided<'_>, out: Rows) {
    assert_eq!((left.columns, right.column), (right.rows, 1), "inputs of a product, and the columns' stride");
    for start in (0..right.rows).step_by(INPUTS) {
        let inputs = start..right.rows.min(start + INPUTS);
        let (left, right) = (left.columns(inputs.clone()), right.rows(inputs));
        left.check();
        right.check();
        // SAFETY: a tier other than portable exists only where `Isa::available` found it; the sizes were checked, and the
        // caller promises those of `out`.
        unsafe {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => avx512::in_registers(left, right, out),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => avx2::in_registers(left, right, out),
                _ => plain(left, right, out),
            }
        }
    }
}

/// # Safety
/// As for [`add_block`].
unsafe fn plain(left: Strided<'_>, right: Strided<'_>, out: Rows) {
    for row in 0..left.rows {
        // SAFETY: the caller's promise.
        let out = unsafe { std::slice::from_raw_parts_mut(out.row(row), right.columns) };
        for input in 0..left.columns {
            let factor = left.values[row * left.row + input * left.column];
            let values = &right.values[input * right.row..][..right.columns];
            out.iter_mut().zip(values).for_each(|(sum, value)| *sum += factor * value);
        }
    }
}

impl Strided<'_> {
    /// All elements lie in the slice.
    fn check(&self) {
        if self.rows > 0 && self.columns > 0 {
            let last = (self.rows - 1) * self.row + (self.columns - 1) * self.column;
            assert!(last < self.values.len(), "a matrix of {} by {}", self.rows, self.columns);
        }
    }
}
