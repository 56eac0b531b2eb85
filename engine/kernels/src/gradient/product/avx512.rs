//! Blocks in AVX-512: up to 12 rows by 32 columns, or 6 by 64.

use std::arch::x86_64::{
    __m512, __mmask16, _mm512_fmadd_ps, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps,
};

use super::{Rows, Strided};

/// Blocks of few rows, whose sums stay in registers.
///
/// # Safety
/// The machine has AVX-512; the matrices' elements lie in their slices; as many inputs on both sides, at most
/// [`COLUMNS`](super::COLUMNS) columns, of stride 1; `out` as [`super::add_block`] wants it.
pub(super) unsafe fn in_registers(left: Strided<'_>, right: Strided<'_>, out: Rows) {
    // As many sums as fit into the 32 registers beside a step's values.
    macro_rules! shapes {
        ($($vectors:literal: $($rows:literal)*,)*) => {
            match right.columns.div_ceil(16) {
                $($vectors => {
                    const MOST: usize = [$($rows),*].len();
                    for start in (0..left.rows).step_by(MOST) {
                        let rows = start..left.rows.min(start + MOST);
                        let out = out.from(start);
                        match rows.len() {
                            // SAFETY: the caller's promises.
                            $($rows => unsafe { block::<$rows, $vectors>(left.rows(rows), right, out) },)*
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
#[target_feature(enable = "avx512f")]
unsafe fn block<const R: usize, const V: usize>(left: Strided<'_>, right: Strided<'_>, out: Rows) {
    let mut masks: [__mmask16; V] = [0xffff; V];
    masks[V - 1] = (0xffff_u32 >> (V * 16 - right.columns)) as __mmask16;
    let load = |start: *const f32| -> [__m512; V] {
        // SAFETY: the masks leave out what lies behind the columns.
        std::array::from_fn(|index| unsafe { _mm512_maskz_loadu_ps(masks[index], start.wrapping_add(index * 16)) })
    };
    let mut sums = [[_mm512_setzero_ps(); V]; R];
    for (row, sums) in sums.iter_mut().enumerate() {
        *sums = load(out.row(row));
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
    for (row, sums) in sums.into_iter().enumerate() {
        for (index, sum) in sums.into_iter().enumerate() {
            // SAFETY: the row is the caller's, and the masks leave out what lies behind the columns.
            unsafe { _mm512_mask_storeu_ps(out.row(row).wrapping_add(index * 16), masks[index], sum) };
        }
    }
}
