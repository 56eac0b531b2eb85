//! Tiles of floats in AVX-512: one register holds 16 outputs; a step of k loads each panel once and multiplies it with
//! every row. Nothing is fetched ahead by hand: the loads run far enough ahead by themselves, and with fetches one row
//! streams at 35 GB/s in place of 46 (Zen 4).

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_and_si512, _mm512_castsi512_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps,
    _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512,
    _mm512_slli_epi32, _mm512_storeu_ps,
};

use super::Sums;

/// One kind of weights: how a step of k is loaded and multiplied.
pub(super) trait Kind {
    /// Sixteen outputs' weights of one step, or a row's activation of that step in all lanes.
    type Step: Copy;
    /// Places of k in a step.
    const PLACES: usize;
    /// Bytes of a row in a step.
    const ROW_BYTES: usize;

    /// Nothing.
    ///
    /// # Safety
    /// This and the functions below: the machine has the kind's instructions.
    unsafe fn zero() -> Self::Step;

    /// 64 bytes of a panel.
    ///
    /// # Safety
    /// They lie in the panel.
    unsafe fn weights(panel: *const u8) -> Self::Step;

    /// [`Kind::ROW_BYTES`] bytes of a row.
    ///
    /// # Safety
    /// They lie in the row.
    unsafe fn activation(row: *const u8) -> Self::Step;

    /// `sums + x · weights`
    ///
    /// # Safety
    /// As above.
    unsafe fn multiply_add(sums: __m512, x: Self::Step, weights: Self::Step) -> __m512;

    /// [`accumulate`] for fixed counts of rows and panels, compiled for the kind's instructions.
    ///
    /// # Safety
    /// As for [`tile`]; `rows` and `panels` have `R` and `P` entries.
    unsafe fn fixed<const R: usize, const P: usize>(
        rows: &[*const u8],
        panels: &[*const u8],
        k: usize,
        sums: &mut Sums,
    );
}

/// f32 weights and activations.
pub(super) struct F32;
/// bf16 weights and activations, multiplied in pairs by `vdpbf16ps`.
pub(super) struct Bf16Pairs;
/// bf16 weights, widened to f32 by a shift, and activations that have been: faster where `vdpbf16ps` runs at half rate.
pub(super) struct WidenedBf16;

/// The contract is in `portable.rs`.
///
/// # Safety
/// The machine has the tier; rows and panels have the sizes that `k` says; at most 12 rows, and 1, 2 or 4 panels,
/// of which 4 come with at most 6 rows.
pub(super) unsafe fn tile<K: Kind>(rows: &[*const u8], panels: &[*const u8], k: usize, sums: &mut Sums) {
    macro_rules! by_shape {
        ($($r:literal x $p:literal),*) => {
            match (rows.len(), panels.len()) {
                // SAFETY: the caller's promises, and the counts just matched.
                $(($r, $p) => unsafe { K::fixed::<$r, $p>(rows, panels, k, sums) },)*
                (rows, panels) => unreachable!("tile of {rows} rows by {panels} panels"),
            }
        };
    }
    by_shape!(
        1 x 1, 2 x 1, 3 x 1, 4 x 1, 5 x 1, 6 x 1, 7 x 1, 8 x 1, 9 x 1, 10 x 1, 11 x 1, 12 x 1,
        1 x 2, 2 x 2, 3 x 2, 4 x 2, 5 x 2, 6 x 2, 7 x 2, 8 x 2, 9 x 2, 10 x 2, 11 x 2, 12 x 2,
        1 x 4, 2 x 4, 3 x 4, 4 x 4, 5 x 4, 6 x 4
    );
}

/// Writes the registers of a tile to its sums.
#[inline]
#[target_feature(enable = "avx512f")]
fn store<const R: usize, const P: usize>(registers: &[[__m512; P]; R], sums: &mut Sums) {
    for (registers, sums) in registers.iter().zip(sums) {
        for (register, sums) in registers.iter().zip(sums) {
            // SAFETY: 16 f32 values fill the register exactly.
            unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), *register) };
        }
    }
}

/// The sums of a tile, all in registers.
///
/// # Safety
/// As for [`Kind::fixed`].
#[inline(always)]
unsafe fn accumulate<K: Kind, const R: usize, const P: usize>(
    rows: &[*const u8],
    panels: &[*const u8],
    k: usize,
    sums: &mut Sums,
) {
    // SAFETY: `step < k / PLACES` steps of 64 bytes lie in each panel and of `ROW_BYTES` in each row.
    unsafe {
        let mut registers = [[_mm512_setzero_ps(); P]; R];
        for step in 0..k / K::PLACES {
            let mut weights = [K::zero(); P];
            for (weight, panel) in weights.iter_mut().zip(panels) {
                *weight = K::weights(panel.add(step * 64));
            }
            for (registers, row) in registers.iter_mut().zip(rows) {
                let x = K::activation(row.add(step * K::ROW_BYTES));
                for (register, weight) in registers.iter_mut().zip(weights) {
                    *register = K::multiply_add(*register, x, weight);
                }
            }
        }
        store(&registers, sums);
    }
}

impl Kind for F32 {
    type Step = __m512;
    const PLACES: usize = 1;
    const ROW_BYTES: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> Self::Step {
        // SAFETY: the caller promises the instructions.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn weights(panel: *const u8) -> Self::Step {
        // SAFETY: the caller promises the instructions and the bytes.
        unsafe { _mm512_loadu_ps(panel.cast()) }
    }

    #[inline(always)]
    unsafe fn activation(row: *const u8) -> Self::Step {
        // SAFETY: the caller promises the instructions and the bytes.
        unsafe { _mm512_set1_ps(row.cast::<f32>().read_unaligned()) }
    }

    #[inline(always)]
    unsafe fn multiply_add(sums: __m512, x: Self::Step, weights: Self::Step) -> __m512 {
        // SAFETY: the caller promises the instructions.
        unsafe { _mm512_fmadd_ps(x, weights, sums) }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn fixed<const R: usize, const P: usize>(
        rows: &[*const u8],
        panels: &[*const u8],
        k: usize,
        sums: &mut Sums,
    ) {
        // SAFETY: the caller's promises.
        unsafe { accumulate::<Self, R, P>(rows, panels, k, sums) }
    }
}

impl Kind for Bf16Pairs {
    type Step = __m512bh;
    const PLACES: usize = 2;
    const ROW_BYTES: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> Self::Step {
        // SAFETY: the caller promises the instructions.
        unsafe { as_bf16(_mm512_setzero_si512()) }
    }

    #[inline(always)]
    unsafe fn weights(panel: *const u8) -> Self::Step {
        // SAFETY: the caller promises the instructions and the bytes.
        unsafe { as_bf16(_mm512_loadu_si512(panel.cast())) }
    }

    #[inline(always)]
    unsafe fn activation(row: *const u8) -> Self::Step {
        // SAFETY: the caller promises the instructions and the bytes.
        unsafe { as_bf16(_mm512_set1_epi32(row.cast::<i32>().read_unaligned())) }
    }

    #[inline(always)]
    unsafe fn multiply_add(sums: __m512, x: Self::Step, weights: Self::Step) -> __m512 {
        // SAFETY: the caller promises the instructions.
        unsafe { _mm512_dpbf16_ps(sums, x, weights) }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn fixed<const R: usize, const P: usize>(
        rows: &[*const u8],
        panels: &[*const u8],
        k: usize,
        sums: &mut Sums,
    ) {
        // SAFETY: the caller's promises.
        unsafe { accumulate::<Self, R, P>(rows, panels, k, sums) }
    }
}

impl Kind for WidenedBf16 {
    type Step = (__m512, __m512);
    const PLACES: usize = 2;
    const ROW_BYTES: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> Self::Step {
        // SAFETY: the caller promises the instructions.
        unsafe { (_mm512_setzero_ps(), _mm512_setzero_ps()) }
    }

    #[inline(always)]
    unsafe fn weights(panel: *const u8) -> Self::Step {
        // SAFETY: the caller promises the instructions and the bytes.
        unsafe { widen(_mm512_loadu_si512(panel.cast())) }
    }

    #[inline(always)]
    unsafe fn activation(row: *const u8) -> Self::Step {
        // SAFETY: the caller promises the instructions and the bytes.
        unsafe {
            let row = row.cast::<f32>();
            (_mm512_set1_ps(row.read_unaligned()), _mm512_set1_ps(row.add(1).read_unaligned()))
        }
    }

    #[inline(always)]
    unsafe fn multiply_add(sums: __m512, x: Self::Step, weights: Self::Step) -> __m512 {
        // SAFETY: the caller promises the instructions.
        unsafe { _mm512_fmadd_ps(x.1, weights.1, _mm512_fmadd_ps(x.0, weights.0, sums)) }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn fixed<const R: usize, const P: usize>(
        rows: &[*const u8],
        panels: &[*const u8],
        k: usize,
        sums: &mut Sums,
    ) {
        // SAFETY: the caller's promises.
        unsafe { accumulate::<Self, R, P>(rows, panels, k, sums) }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn as_bf16(bits: __m512i) -> __m512bh {
    // SAFETY: both are 64 plain bytes.
    unsafe { std::mem::transmute(bits) }
}

/// The lower and the upper bf16 of each pair as f32.
#[inline]
#[target_feature(enable = "avx512f")]
fn widen(pairs: __m512i) -> (__m512, __m512) {
    let upper = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
    (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), _mm512_castsi512_ps(_mm512_and_si512(pairs, upper)))
}
