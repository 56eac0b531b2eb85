//! Root-mean-square normalisation (Zhang and Sennrich, arXiv:1910.07467).

use crate::{activation::LANES, pool::Pool, shared::SharedSlice};

/// `out[row] = x[row] / sqrt(mean(x[row]²) + eps) · weight`; `x` and `out` are `[rows, weight.len()]`.
///
/// # Panics
/// When the sizes don't match.
pub fn rms_norm(pool: &Pool, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    assert_eq!(x.len(), out.len(), "inputs and outputs");
    assert!(x.len().is_multiple_of(width), "{} values in rows of {width}", x.len());
    let target = SharedSlice::new(out);
    for_row_chunks(pool, x.len() / width, width, |rows| {
        for row in rows {
            // SAFETY: each row belongs to one task.
            let out = unsafe { target.part(row * width, width) };
            out.copy_from_slice(&x[row * width..(row + 1) * width]);
            rms_norm_in_place(out, weight, eps);
        }
    });
}

/// One row, in place.
#[inline(always)]
pub(crate) fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
    let scale = 1.0 / (sum_of_squares(x) / x.len() as f32 + eps).sqrt();
    for (x, weight) in x.iter_mut().zip(weight) {
        *x = *x * scale * weight;
    }
}

/// Sixteen running sums, added in a tree: one fixed order.
#[inline(always)]
pub(crate) fn sum_of_squares(x: &[f32]) -> f32 {
    let mut sums = [0.0; LANES];
    let chunks = x.chunks_exact(LANES);
    let tail = chunks.remainder();
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum += x * x;
        }
    }
    for (sum, x) in sums.iter_mut().zip(tail) {
        *sum += x * x;
    }
    tree(sums, |a, b| a + b)
}

/// Halves a register until one value is left.
#[inline(always)]
pub(crate) fn tree(mut values: [f32; LANES], combine: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            values[i] = combine(values[i], values[i + half]);
        }
        half /= 2;
    }
    values[0]
}

/// Runs `task` over ranges of rows that hold at least some tens of thousands of values: below that, a wake-up costs
/// more than the work.
pub(crate) fn for_row_chunks(pool: &Pool, rows: usize, width: usize, task: impl Fn(std::ops::Range<usize>) + Sync) {
    let rows_per_task = (16_384 / width.max(1)).max(1);
    pool.run(rows.div_ceil(rows_per_task), |index| {
        let start = index * rows_per_task;
        task(start..rows.min(start + rows_per_task));
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{bits, values};

    #[test]
    fn equals_the_equation() {
        for (rows, width) in [(1, 1), (3, 5), (40, 70), (9, 2048)] {
            let (x, weight) = (values(rows * width, 3), values(width, 4));
            let mut out = vec![f32::NAN; x.len()];
            rms_norm(&Pool::new(2), &x, &weight, 1e-6, &mut out);
            for (row, out) in x.chunks(width).zip(out.chunks(width)) {
                let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
                for ((x, weight), y) in row.iter().zip(&weight).zip(out) {
                    let exact = f64::from(*x) / (mean + 1e-6).sqrt() * f64::from(*weight);
                    assert!((f64::from(*y) - exact).abs() < 1e-5 * exact.abs() + 1e-7, "{y} against {exact}");
                }
                let mut alone = vec![0.0; width];
                rms_norm(&Pool::new(1), row, &weight, 1e-6, &mut alone);
                assert_eq!(bits(&alone), bits(out));
            }
        }
    }
}
