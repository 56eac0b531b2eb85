//! Blocks in AVX2: up to 12 rows by 8 columns, or 6 by 16.

use std::arch::x86_64::{
    __m256, _mm256_cmpgt_epi32, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_maskload_ps, _mm256_maskstore_ps,
    _mm256_set1_epi32, _mm256_set1_ps, _mm256_setr_epi32, _mm256_setzero_ps, _mm256_storeu_ps,
};

use super::{Rows, Strided};

/// Blocks of few rows, whose sums stay in registers.
///
/// # Safety
/// The machine has AVX2 and FMA; the matrices' elements lie in their slices; as many inputs on both sides, the columns of
/// stride 1; `out` as [`super::add_block`] wants it.
pub(super) unsafe fn in_registers(left: Strided<'_>, right: Strided<'_>, out: Rows) {
    // As many sums as fit into the 16 registers beside a step's values.
    macro_rules! shapes {
        ($right:ident, $out:ident, $($vectors:literal: $($rows:literal)*,)*) => {
            match $right.columns.div_ceil(8) {
                $($vectors => {
                    const MOST: usize = [$($rows),*].len();
                    for start in (0..left.rows).step_by(MOST) {
                        let rows = start..left.rows.min(start + MOST);
                        let out = $out.from(start);
                        match rows.len() {
                            // SAFETY: the caller's promises.
                            $($rows => unsafe { block::<$rows, $vectors>(left.rows(rows), $right, out) },)*
                            count => unreachable!("block of {count} rows"),
                        }
                    }
                })*
                _ => {}
            }
        };
    }
    for first in (0..right.columns).step_by(16) {
        let right = right.columns(first..right.columns.min(first + 16));
        let out = Rows { start: out.start.wrapping_add(first), ..out };
        shapes!(right, out, 1: 1 2 3 4 5 6 7 8 9 10 11 12, 2: 1 2 3 4 5 6,);
    }
}

/// One block, its sums in registers.
///
/// # Safety
/// As for [`in_registers`]; `R` rows and `V` times 8 columns, the last 8 not all used.
#[target_feature(enable = "avx2,fma")]
unsafe fn block<const R: usize, const V: usize>(left: Strided<'_>, right: Strided<'_>, out: Rows) {
    let last = right.columns - (V - 1) * 8;
    let mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(last as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    let load = |start: *const f32| -> [__m256; V] {
        std::array::from_fn(|index| {
            let at = start.wrapping_add(index * 8);
            // SAFETY: the mask leaves out what lies behind the columns.
            unsafe { if index + 1 == V { _mm256_maskload_ps(at, mask) } else { _mm256_loadu_ps(at) } }
        })
    };
    let mut sums = [[_mm256_setzero_ps(); V]; R];
    for (row, sums) in sums.iter_mut().enumerate() {
        *sums = load(out.row(row));
    }
    let (mut factors, mut values) = (left.values.as_ptr(), right.values.as_ptr());
    for _ in 0..left.columns {
        let step = load(values);
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: an element of `left`.
            let factor = _mm256_set1_ps(unsafe { *factors.add(row * left.row) });
            for (sum, step) in sums.iter_mut().zip(step) {
                *sum = _mm256_fmadd_ps(factor, step, *sum);
            }
        }
        factors = factors.wrapping_add(left.column);
        values = values.wrapping_add(right.row);
    }
    for (row, sums) in sums.into_iter().enumerate() {
        for (index, sum) in sums.into_iter().enumerate() {
            let at = out.row(row).wrapping_add(index * 8);
            // A masked store takes as long as ten plain ones.
            // SAFETY: the mask leaves out what lies behind the columns.
            unsafe {
                if index + 1 == V && last < 8 {
                    _mm256_maskstore_ps(at, mask, sum);
                } else {
                    _mm256_storeu_ps(at, sum);
                }
            }
        }
    }
}
