//! The products of attention in AVX-512: sixteen keys or sixteen places in a register, one register a query.

use std::arch::x86_64::{
    _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_storeu_ps,
};

use super::{AttentionInput, KvValue, LANES, Products, Task};
use crate::shared::SharedSlice;

/// [`super::attend`], compiled as a whole for AVX-512.
///
/// # Safety
/// The machine has the features; as for [`super::attend`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn attend<T: KvValue>(
    task: &Task<'_>,
    input: &AttentionInput<'_>,
    cache: &[T],
    out: &SharedSlice<f32>,
) {
    // SAFETY: the caller's promise.
    unsafe { super::attend::<T, Avx512>(task, input, cache, out) }
}

/// The vector tier. Its functions stay functions: inlined into their caller, four variants each, they spill (39 ms in
/// place of 34 for 512 rows over 2048 keys, Zen 4).
struct Avx512;

impl Products for Avx512 {
    #[inline(never)]
    #[target_feature(enable = "avx512f")]
    unsafe fn scores<const Q: usize>(queries: &[f32], keys: &[f32]) -> [[f32; LANES]; Q] {
        let places = keys.len() / LANES;
        assert_eq!(queries.len(), Q * places, "values of {Q} queries");
        let mut registers = [_mm512_setzero_ps(); Q];
        for place in 0..places {
            // SAFETY: `place < places` rows of 16 keys; `Q` queries of `places` values, by the assertion.
            unsafe {
                let keys = _mm512_loadu_ps(keys.as_ptr().add(place * LANES));
                for (q, register) in registers.iter_mut().enumerate() {
                    let x = _mm512_set1_ps(*queries.as_ptr().add(q * places + place));
                    *register = _mm512_fmadd_ps(x, keys, *register);
                }
            }
        }
        let mut scores = [[0.0; LANES]; Q];
        for (scores, register) in scores.iter_mut().zip(registers) {
            // SAFETY: 16 values fill the register exactly.
            unsafe { _mm512_storeu_ps(scores.as_mut_ptr(), register) };
        }
        scores
    }

    #[inline(never)]
    #[target_feature(enable = "avx512f")]
    unsafe fn add_values<const Q: usize>(weights: &[[f32; LANES]; Q], values: &[f32], sums: &mut [f32]) {
        let places = values.len() / LANES;
        assert_eq!((values.len(), sums.len()), (LANES * places, Q * places), "values and sums of {places} places");
        for start in (0..places).step_by(LANES) {
            // The last register may be partly filled: masked loads and stores touch nothing past the row.
            let mask = u16::MAX >> (LANES - LANES.min(places - start));
            let mut registers = [_mm512_setzero_ps(); Q];
            for (q, register) in registers.iter_mut().enumerate() {
                // SAFETY: the mask ends with the row.
                *register = unsafe { _mm512_maskz_loadu_ps(mask, sums.as_ptr().add(q * places + start)) };
            }
            for token in 0..LANES {
                // SAFETY: as above; 16 rows of values by the assertion.
                let values = unsafe { _mm512_maskz_loadu_ps(mask, values.as_ptr().add(token * places + start)) };
                for (register, weights) in registers.iter_mut().zip(weights) {
                    *register = _mm512_fmadd_ps(_mm512_set1_ps(weights[token]), values, *register);
                }
            }
            for (q, register) in registers.into_iter().enumerate() {
                // SAFETY: as above.
                unsafe { _mm512_mask_storeu_ps(sums.as_mut_ptr().add(q * places + start), mask, register) };
            }
        }
    }
}
