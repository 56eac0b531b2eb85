//! Plain f32 products, nothing packed: for matrices that change at every step, of which many have few rows or columns.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m512, __mmask16, _mm512_fmadd_ps, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps,
};
use std::ops::Range;

use crate::{isa::Isa, pool::Pool, shared::SharedSlice};

/// Inputs that are worked off before the next block: their part of both sides stays in the caches.
const INPUTS: usize = 256;
/// Columns of a block: four vector registers.
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
        // SAFETY: each task has its own rows and columns.
        unsafe {
            add_block(isa, left.rows(rows.clone()), right.columns(columns.clone()), &|row| {
                target.part((rows.start + row) * right.columns + columns.start, columns.len())
            })
        };
    });
}

/// [`add_product`] on the calling thread.
pub(super) fn add_product_here(isa: Isa, left: Strided<'_>, right: Strided<'_>, out: &mut [f32]) {
    assert_eq!(out.len(), left.rows * right.columns, "product of {} by {}", left.rows, right.columns);
    let target = SharedSlice::new(out);
    for start in (0..right.columns).step_by(COLUMNS) {
        let columns = start..right.columns.min(start + COLUMNS);
        // SAFETY: nobody else has a part of it.
        unsafe {
            add_block(isa, left, right.columns(columns.clone()), &|row| {
                target.part(row * right.columns + columns.start, columns.len())
            })
        };
    }
}

/// At most [`COLUMNS`] columns of a product.
///
/// # Safety
/// `out` gives each row of the result, and nobody else has a part of it.
unsafe fn add_block<'o>(isa: Isa, left: Strided<'_>, right: Strided<'_>, out: &(dyn Fn(usize) -> &'o mut [f32] + '_)) {
    assert_eq!((left.columns, right.column), (right.rows, 1), "inputs of a product, and the columns' stride");
    for start in (0..right.rows).step_by(INPUTS) {
        let inputs = start..right.rows.min(start + INPUTS);
        let (left, right) = (left.columns(inputs.clone()), right.rows(inputs));
        #[cfg(target_arch = "x86_64")]
        if matches!(isa, Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx) {
            left.check();
            right.check();
            // SAFETY: a tier other than portable exists only where `Isa::available` found it; the sizes were checked.
            unsafe { in_registers(left, right, out) };
            continue;
        }
        let _ = isa;
        for row in 0..left.rows {
            let out = out(row);
            for input in 0..left.columns {
                let factor = left.values[row * left.row + input * left.column];
                let values = &right.values[input * right.row..][..right.columns];
                out.iter_mut().zip(values).for_each(|(sum, value)| *sum += factor * value);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Strided<'_> {
    /// All elements lie in the slice.
    fn check(&self) {
        if self.rows > 0 && self.columns > 0 {
            let last = (self.rows - 1) * self.row + (self.columns - 1) * self.column;
            assert!(last < self.values.len(), "a matrix of {} by {}", self.rows, self.columns);
        }
    }
}

/// Blocks of few rows, whose sums stay in registers.
///
/// # Safety
/// The machine has AVX-512; the matrices' elements lie in their slices; as many inputs on both sides, at most
/// [`COLUMNS`] columns, of stride 1.
#[cfg(target_arch = "x86_64")]
unsafe fn in_registers<'o>(left: Strided<'_>, right: Strided<'_>, out: &(dyn Fn(usize) -> &'o mut [f32] + '_)) {
    // As many sums as fit into the 32 registers beside a step's values.
    macro_rules! shapes {
        ($($vectors:literal: $($rows:literal)*,)*) => {
            match right.columns.div_ceil(16) {
                $($vectors => {
                    const MOST: usize = [$($rows),*].len();
                    for start in (0..left.rows).step_by(MOST) {
                        let rows = start..left.rows.min(start + MOST);
                        let out = |row| out(start + row);
                        match rows.len() {
                            // SAFETY: the caller's promises.
                            $($rows => unsafe { block::<$rows, $vectors>(left.rows(rows), right, &out) },)*
                            count => unreachable!("block of {count} rows"),
                        }
                    }
                })*
                _ => {}
            }
        };
    }
    shapes!(1: 1 2 3 4 5 6 7 8 9 10 11 12, 2: 1 2 3 4 5 6 7 8 9 10 11 12, 3: 1 2 3 4 5 6 7 8, 4: 1 2 3 4 5 6,);
}

/// One block, its sums in registers.
///
/// # Safety
/// As for [`in_registers`]; `R` rows and `V` times 16 columns, the last 16 not all used.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn block<'o, const R: usize, const V: usize>(
    left: Strided<'_>,
    right: Strided<'_>,
    out: &(dyn Fn(usize) -> &'o mut [f32] + '_),
) {
    let mut masks: [__mmask16; V] = [0xffff; V];
    masks[V - 1] = (0xffff_u32 >> (V * 16 - right.columns)) as __mmask16;
    let load = |start: *const f32| -> [__m512; V] {
        // SAFETY: the masks leave out what lies behind the columns.
        std::array::from_fn(|index| unsafe { _mm512_maskz_loadu_ps(masks[index], start.wrapping_add(index * 16)) })
    };
    let rows: [&mut [f32]; R] = std::array::from_fn(out);
    let mut sums = [[_mm512_setzero_ps(); V]; R];
    for (sums, row) in sums.iter_mut().zip(&rows) {
        *sums = load(row.as_ptr());
    }
    let (mut factors, mut values) = (left.values.as_ptr(), right.values.as_ptr());
    for _ in 0..left.columns {
        let step = load(values);
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: an element of `left`.
            let factor = _mm512_set1_ps(unsafe { *factors.add(row * left.row) });
            for (sum, step) in sums.iter_mut().zip(step) {
                *sum = _mm512_fmadd_ps(factor, step, *sum);
            }
        }
        factors = factors.wrapping_add(left.column);
        values = values.wrapping_add(right.row);
    }
    for (row, sums) in rows.into_iter().zip(sums) {
        for (index, sum) in sums.into_iter().enumerate() {
            // SAFETY: the masks leave out what lies behind the columns.
            unsafe { _mm512_mask_storeu_ps(row.as_mut_ptr().wrapping_add(index * 16), masks[index], sum) };
        }
    }
}
