//! The gradient of a matrix: the sum over tokens of outer products.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{_mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps};

use std::ops::Range;

use crate::{isa::Isa, pool::Pool, shared::SharedSlice};

/// Rows of the result that one block has.
const ROWS: usize = 6;
/// Columns of the result that one block has: with 6 rows, 24 sums in the 32 vector registers.
const COLUMNS: usize = 64;
/// Tokens that are worked off before the next block: their part of `a` and `b` stays in the caches.
const TOKENS: usize = 256;

/// `out[i][j] += Σ over tokens t of a[t][i] · b[t][j]`, t ascending; `a` is `[tokens, rows]`, `b` `[tokens, columns]`,
/// `out` `[rows, columns]`.
///
/// # Panics
/// When the sizes don't match.
pub fn add_outer(pool: &Pool, isa: Isa, tokens: usize, a: &[f32], b: &[f32], out: &mut [f32]) {
    if tokens == 0 {
        return;
    }
    let (rows, columns) = (a.len() / tokens, b.len() / tokens);
    assert_eq!((a.len(), b.len()), (tokens * rows, tokens * columns), "{tokens} tokens");
    assert_eq!(out.len(), rows * columns, "outer product of {rows} by {columns}");
    let (a, b) =
        (Tokens { values: a, stride: rows, width: rows }, Tokens { values: b, stride: columns, width: columns });
    let target = SharedSlice::new(out);
    pool.run(columns.div_ceil(COLUMNS), |task| {
        let columns_here = task * COLUMNS..columns.min((task + 1) * COLUMNS);
        for start in (0..tokens).step_by(TOKENS) {
            let tokens = start..tokens.min(start + TOKENS);
            // SAFETY: each task has its own columns.
            unsafe { add_columns(isa, tokens, a, b, columns_here.clone(), &target) };
        }
    });
}

/// A stretch of values for each token.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tokens<'a> {
    /// The values.
    pub values: &'a [f32],
    /// From one token's to the next one's.
    pub stride: usize,
    /// How many a token has.
    pub width: usize,
}

/// [`add_outer`] on the calling thread.
pub(super) fn add_outer_here(isa: Isa, tokens: usize, a: Tokens<'_>, b: Tokens<'_>, out: &mut [f32]) {
    assert_eq!(out.len(), a.width * b.width, "outer product");
    let target = SharedSlice::new(out);
    for start in (0..b.width).step_by(COLUMNS) {
        // SAFETY: nobody else has a part of it.
        unsafe { add_columns(isa, 0..tokens, a, b, start..b.width.min(start + COLUMNS), &target) };
    }
}

/// Adds the outer products of some tokens in some columns, at most [`COLUMNS`].
///
/// # Safety
/// Nobody else may use these columns of `out` `[a.width, b.width]`.
unsafe fn add_columns(
    isa: Isa,
    tokens: Range<usize>,
    a: Tokens<'_>,
    b: Tokens<'_>,
    columns: Range<usize>,
    out: &SharedSlice<f32>,
) {
    for first in (0..a.width).step_by(ROWS) {
        let rows = first..a.width.min(first + ROWS);
        // SAFETY: the caller's promise.
        let part = |row: usize| unsafe { out.part(row * b.width + columns.start, columns.len()) };
        #[cfg(target_arch = "x86_64")]
        if matches!(isa, Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx) && columns.len() == COLUMNS {
            let (a, b) = (a.from(&tokens, rows.start), b.from(&tokens, columns.start));
            macro_rules! by_rows {
                ($($rows:literal),*) => {
                    match rows.len() {
                        // SAFETY: a tier other than portable exists only where `Isa::available` found it; the sizes
                        // were checked by `from`.
                        $($rows => unsafe { block::<$rows>(tokens.len(), a, b, std::array::from_fn(|row| part(rows.start + row))) },)*
                        _ => unreachable!("block of {} rows", rows.len()),
                    }
                };
            }
            by_rows!(1, 2, 3, 4, 5, 6);
            continue;
        }
        let _ = isa;
        for row in rows {
            let out = part(row);
            for token in tokens.clone() {
                let (a, b) = (a.values[token * a.stride + row], &b.values[token * b.stride..][columns.clone()]);
                out.iter_mut().zip(b).for_each(|(sum, b)| *sum += a * b);
            }
        }
    }
}

impl Tokens<'_> {
    /// Where the values of `tokens` begin, from `start` on, and the step to the next token.
    fn from(&self, tokens: &Range<usize>, start: usize) -> (*const f32, usize) {
        let last = (tokens.end - 1) * self.stride + self.width;
        assert!(start < self.width && last <= self.values.len() && !tokens.is_empty(), "values of {tokens:?}");
        (self.values[tokens.start * self.stride + start..].as_ptr(), self.stride)
    }
}

/// A whole block, its sums in registers.
///
/// # Safety
/// For each token, `R` values of `a` and 64 of `b` can be read.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn block<const R: usize>(tokens: usize, a: (*const f32, usize), b: (*const f32, usize), out: [&mut [f32]; R]) {
    let mut sums = [[_mm512_setzero_ps(); 4]; R];
    // SAFETY: the caller's promise, and rows of the result have 64 values.
    unsafe {
        for (sums, out) in sums.iter_mut().zip(&out) {
            for (index, sum) in sums.iter_mut().enumerate() {
                *sum = _mm512_loadu_ps(out.as_ptr().add(index * 16));
            }
        }
        for token in 0..tokens {
            let (a, b) = (a.0.add(token * a.1), b.0.add(token * b.1));
            let mut values = [_mm512_setzero_ps(); 4];
            for (index, value) in values.iter_mut().enumerate() {
                *value = _mm512_loadu_ps(b.add(index * 16));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let a = _mm512_set1_ps(*a.add(row));
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum = _mm512_fmadd_ps(a, value, *sum);
                }
            }
        }
        for (sums, out) in sums.into_iter().zip(out) {
            for (index, sum) in sums.into_iter().enumerate() {
                _mm512_storeu_ps(out.as_mut_ptr().add(index * 16), sum);
            }
        }
    }
}
