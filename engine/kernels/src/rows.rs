//! Rows of a matrix, made, picked and added on all threads.

use std::{mem::MaybeUninit, ops::Range};

use crate::{
    ffn::WeightedRow,
    norm::for_row_chunks,
    pool::Pool,
    shared::{SharedSlice, written, zeroed},
};

/// `out[i] = x[rows[i]]`: `x` is `[_, width]`, `out` `[rows.len(), width]`.
///
/// # Panics
/// When a row lies outside, or `out` has another size.
pub fn gather(pool: &Pool, x: &[f32], width: usize, rows: &[WeightedRow], out: &mut [f32]) {
    assert_eq!(out.len(), rows.len() * width, "{} rows of {width}", rows.len());
    let target = SharedSlice::new(out);
    for_row_chunks(pool, rows.len(), width, |range| {
        for index in range {
            // SAFETY: each row belongs to one task.
            let out = unsafe { target.part(index * width, width) };
            out.copy_from_slice(&x[rows[index].row as usize * width..][..width]);
        }
    });
}

/// `out[rows[i]] += weight · y[i]`: `y` is `[rows.len(), width]`, `out` `[_, width]`; no row comes twice.
///
/// # Panics
/// When a row lies outside, the rows don't ascend, or `y` has another size.
pub fn scatter_add(pool: &Pool, y: &[f32], width: usize, rows: &[WeightedRow], out: &mut [f32]) {
    assert_eq!(y.len(), rows.len() * width, "{} rows of {width}", rows.len());
    assert!(rows.windows(2).all(|pair| pair[0].row < pair[1].row), "rows ascend");
    let target = SharedSlice::new(out);
    for_row_chunks(pool, rows.len(), width, |range| {
        for index in range {
            let WeightedRow { row, weight } = rows[index];
            // SAFETY: rows differ, and each belongs to one task.
            let out = unsafe { target.part(row as usize * width, width) };
            out.iter_mut().zip(&y[index * width..][..width]).for_each(|(out, y)| *out += weight * y);
        }
    });
}

/// `out += x`, both of any shape.
///
/// # Panics
/// When the sizes differ.
pub fn add(pool: &Pool, x: &[f32], out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "a sum");
    let target = SharedSlice::new(out);
    for_row_chunks(pool, x.len(), 1, |range| {
        // SAFETY: each value belongs to one task.
        let out = unsafe { target.part(range.start, range.len()) };
        out.iter_mut().zip(&x[range]).for_each(|(out, x)| *out += x);
    });
}

/// `a + b`, both of any shape.
///
/// # Panics
/// When the sizes differ.
#[must_use]
pub fn sum(pool: &Pool, a: &[f32], b: &[f32]) -> Vec<f32> {
    assert_eq!(a.len(), b.len(), "a sum");
    let write = |range: Range<usize>, out: &mut [MaybeUninit<f32>]| {
        for (out, (a, b)) in out.iter_mut().zip(a[range.clone()].iter().zip(&b[range])) {
            out.write(a + b);
        }
    };
    // SAFETY: both have as many values as the range, so all of it is written.
    unsafe { written(pool, a.len(), write) }
}

/// `len` zeros, made on all threads.
#[must_use]
pub fn zeros(pool: &Pool, len: usize) -> Vec<f32> {
    zeroed(pool, len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_picked_and_added_where_they_came_from() {
        let pool = Pool::new(2);
        let rows = [WeightedRow { row: 1, weight: 2.0 }, WeightedRow { row: 3, weight: -1.0 }];
        let x: Vec<f32> = (0..12).map(|x| x as f32).collect();
        let mut out = vec![0.0; 6];
        gather(&pool, &x, 3, &rows, &mut out);
        assert_eq!(out, [3.0, 4.0, 5.0, 9.0, 10.0, 11.0]);
        let mut sums = vec![1.0; 12];
        scatter_add(&pool, &out, 3, &rows, &mut sums);
        assert_eq!(sums, [1.0, 1.0, 1.0, 7.0, 9.0, 11.0, 1.0, 1.0, 1.0, -8.0, -9.0, -10.0]);
        add(&pool, &x, &mut sums);
        assert_eq!(sums[3..6], [10.0, 13.0, 16.0]);
    }

    #[test]
    fn every_value_is_written_whatever_the_tasks() {
        let pool = Pool::new(3);
        for len in [0, 1, 16_384, 100_003] {
            let (a, b): (Vec<f32>, Vec<f32>) = (0..len).map(|index| (index as f32, -0.5 * index as f32)).unzip();
            assert!(sum(&pool, &a, &b).iter().enumerate().all(|(index, sum)| *sum == 0.5 * index as f32), "{len}");
            assert_eq!(zeros(&pool, len), vec![0.0; len]);
        }
    }
}
