//! Activations in the form that the tiles of a weight format take.
//!
//! | weights | a row of activations |
//! |---|---|
//! | `f32` | `[k]` f32 |
//! | `bf16` | `[k]` bf16, rounded to nearest; on the tier `avx512` these values as f32, so that no tile widens them |
//! | `q8_0`, `q4_0`, `mxfp4` | `[k]` int8, then for each block of 32 inputs an f32 scale `[k / 32]` and an i32 correction `[k / 32]` |
//! | `q4_k` | `[k]` int8, then for each super-block of 256 an f32 scale, then the sum of each 32 inputs as i16 `[k / 32]` |
//! | `q6_k` | the same scales, then an i32 correction for each 16 inputs `[k / 16]` |
//!
//! k is padded as the weights are. A block's scale is its largest magnitude / 127. Kernels multiply unsigned weights:
//! a *correction* is what the sum of a block starts from, minus the weights' offset times the sum of the activations.
//! A block with a NaN or an infinity gets the scale NaN: what is broken stays visible.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    _mm_storeu_si128, _mm512_and_si512, _mm512_cvtepi32_epi8, _mm512_cvtps_epi32, _mm512_loadu_ps, _mm512_loadu_si512,
    _mm512_max_epu32, _mm512_mul_ps, _mm512_reduce_add_epi32, _mm512_reduce_max_epu32, _mm512_set1_epi32,
    _mm512_set1_ps, _mm512_setzero_si512,
};

use crate::{
    activation::LANES,
    format::{BLOCK, Format, SUPER_BLOCK, round_to_bf16},
    isa::Isa,
    pool::Pool,
    shared::{SharedSlice, zeroed},
};

/// What is added to a format's quants to make them unsigned; `mxfp4` counts in halves, from -12 to 12.
pub(crate) const fn offset(format: Format) -> i32 {
    match format {
        Format::Q8_0 => 128,
        Format::Q4_0 => 8,
        Format::Q6K => 32,
        Format::Mxfp4 => 12,
        Format::F32 | Format::Bf16 | Format::Q4K => 0,
    }
}

/// Where the parts of a row of int8 activations lie, in bytes; `k` is padded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct IntegerRow {
    /// The f32 scales, after the int8 values.
    pub scales: usize,
    /// The corrections or sums.
    pub sums: usize,
    /// All.
    pub bytes: usize,
}

impl IntegerRow {
    /// Of activations for `format`.
    pub(crate) fn new(format: Format, k: usize) -> Self {
        let (scales, sums) = match format {
            Format::Q4K => (k.div_ceil(SUPER_BLOCK), k / BLOCK * 2),
            Format::Q6K => (k.div_ceil(SUPER_BLOCK), k / 16 * 4),
            _ => (k / BLOCK, k / BLOCK * 4),
        };
        let start = k + scales.next_multiple_of(2) * 4;
        Self { scales: k, sums: start, bytes: (start + sums).next_multiple_of(8) }
    }
}

/// Rows of activations in a format's form.
pub(crate) enum Activations<'a> {
    /// As they come.
    F32 { values: &'a [f32], k: usize },
    /// Converted.
    Converted(Converted),
}

impl<'a> Activations<'a> {
    /// `x` is `[rows, k]`.
    pub(crate) fn new(pool: &Pool, isa: Isa, format: Format, x: &'a [f32], k: usize) -> Self {
        if format == Format::F32 {
            return Self::F32 { values: x, k };
        }
        let mut converted = Converted::zeroed(pool, isa, format, x.len() / k, k);
        let writer = converted.writer();
        let rows_per_task = (32_768 / k).max(1);
        pool.run((x.len() / k).div_ceil(rows_per_task), |task| {
            let rows = x[task * rows_per_task * k..].chunks_exact(k).take(rows_per_task);
            for (index, row) in rows.enumerate() {
                // SAFETY: each row belongs to one task.
                unsafe { writer.write(task * rows_per_task + index, 0, row) };
            }
        });
        Self::Converted(converted)
    }

    /// The start of row `index`.
    pub(crate) fn row(&self, index: usize) -> *const u8 {
        match self {
            Self::F32 { values, k } => values[index * k..(index + 1) * k].as_ptr().cast(),
            Self::Converted(converted) => converted.row(index),
        }
    }
}

/// Rows of activations in a format's form, in memory of their own.
pub(crate) struct Converted {
    isa: Isa,
    format: Format,
    /// Inputs, padded.
    k: usize,
    /// 8-byte words of a row.
    stride: usize,
    words: Vec<u64>,
}

impl Converted {
    /// `rows` rows of `k` zeros, for the tier `isa`.
    pub(crate) fn zeroed(pool: &Pool, isa: Isa, format: Format, rows: usize, k: usize) -> Self {
        let k = format.padded_k(k);
        let bytes = match format {
            Format::F32 => k * 4,
            Format::Bf16 if isa == Isa::Avx512 => k * 4,
            Format::Bf16 => k * 2,
            _ => IntegerRow::new(format, k).bytes,
        };
        let stride = bytes.div_ceil(8);
        Self { isa, format, k, stride, words: zeroed(pool, rows * stride) }
    }

    /// The start of row `index`.
    pub(crate) fn row(&self, index: usize) -> *const u8 {
        self.words[index * self.stride..(index + 1) * self.stride].as_ptr().cast()
    }

    /// Writes rows from several tasks.
    pub(crate) fn writer(&mut self) -> Writer<'_> {
        let Self { isa, format, k, stride, .. } = *self;
        Writer { isa, format, k, stride, words: SharedSlice::new(&mut self.words), rows: std::marker::PhantomData }
    }
}

/// Converts values into the rows of a [`Converted`].
pub(crate) struct Writer<'a> {
    isa: Isa,
    format: Format,
    k: usize,
    stride: usize,
    words: SharedSlice<u64>,
    rows: std::marker::PhantomData<&'a mut Converted>,
}

impl Writer<'_> {
    /// Columns that must be written together: what shares a scale.
    pub(crate) fn unit(format: Format) -> usize {
        match format {
            Format::F32 | Format::Bf16 => 16,
            Format::Q4K | Format::Q6K => SUPER_BLOCK,
            Format::Q8_0 | Format::Q4_0 | Format::Mxfp4 => BLOCK,
        }
    }

    /// Converts `values` into the places from `start` on, a multiple of [`Writer::unit`], of row `row`.
    ///
    /// # Safety
    /// No other task may write to the row's same unit, or read the row, at the same time.
    pub(crate) unsafe fn write(&self, row: usize, start: usize, values: &[f32]) {
        debug_assert!(start.is_multiple_of(Self::unit(self.format)), "start of a unit");
        assert!(start + values.len() <= self.k, "{} values from {start} in a row of {}", values.len(), self.k);
        // Only the bytes of these units are written, through pointers: other tasks may write the row's other units.
        let row: *mut u8 = self.words.pointer(row * self.stride, self.stride).cast();
        // SAFETY: a tier other than portable exists only where `Isa::available` found it; the row has the form's size.
        unsafe {
            match self.isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 if self.format == Format::Bf16 => {
                    let out = std::slice::from_raw_parts_mut(row.cast::<f32>().add(start), values.len());
                    round_avx512(values, out);
                }
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => convert_avx512(self.format, self.k, row, start, values),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => convert_avx2(self.format, self.k, row, start, values),
                _ => convert::<Portable>(self.format, self.k, row, start, values),
            }
        }
    }
}

/// The bf16 values nearest to `values`, as f32.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn round_avx512(values: &[f32], out: &mut [f32]) {
    for (out, value) in out.iter_mut().zip(values) {
        *out = f32::from_bits(u32::from(round_to_bf16(*value)) << 16);
    }
}

/// [`convert`] with wider registers.
///
/// # Safety
/// As for [`convert`]; the machine has the features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn convert_avx512(format: Format, k: usize, row: *mut u8, start: usize, values: &[f32]) {
    // SAFETY: the caller's promises.
    unsafe { convert::<Avx512>(format, k, row, start, values) }
}

/// The same.
///
/// # Safety
/// As for [`convert`]; the machine has the features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn convert_avx2(format: Format, k: usize, row: *mut u8, start: usize, values: &[f32]) {
    // SAFETY: the caller's promises.
    unsafe { convert::<Portable>(format, k, row, start, values) }
}

/// # Safety
/// The machine has the tier; `row` is a row of padded width `k` in the form of `format`, aligned to 8 bytes, and `start + values.len() <= k`.
#[inline(always)]
unsafe fn convert<L: Lanes>(format: Format, k: usize, row: *mut u8, start: usize, values: &[f32]) {
    let layout = IntegerRow::new(format, k);
    // SAFETY: the places of `start..start + values.len()` and of their scales and sums lie in the row, and each array
    // begins at a multiple of its values' size.
    unsafe {
        match format {
            Format::F32 => {
                std::slice::from_raw_parts_mut(row.cast::<f32>().add(start), values.len()).copy_from_slice(values);
            }
            Format::Bf16 => {
                let out = std::slice::from_raw_parts_mut(row.cast::<u16>().add(start), values.len());
                out.iter_mut().zip(values).for_each(|(out, value)| *out = round_to_bf16(*value));
            }
            Format::Q8_0 | Format::Q4_0 | Format::Mxfp4 => {
                for index in 0..values.len().div_ceil(BLOCK) {
                    let block = start / BLOCK + index;
                    let quants = row.cast::<i8>().add(block * BLOCK).cast::<[i8; BLOCK]>();
                    let (scale, sums) = quantise::<L, BLOCK, 1>(chunk(values, index, &mut [0.0; BLOCK]), &mut *quants);
                    *row.add(layout.scales).cast::<f32>().add(block) = scale;
                    *row.add(layout.sums).cast::<i32>().add(block) = -offset(format) * sums[0];
                }
            }
            Format::Q4K | Format::Q6K => {
                for index in 0..values.len().div_ceil(SUPER_BLOCK) {
                    let block = start / SUPER_BLOCK + index;
                    let at = block * SUPER_BLOCK;
                    let mut padded = [0.0; SUPER_BLOCK];
                    let values = chunk(values, index, &mut padded);
                    let width = SUPER_BLOCK.min(k - at);
                    let place = row.cast::<i8>().add(at);
                    let (scale, sums) = if width == SUPER_BLOCK {
                        quantise::<L, SUPER_BLOCK, 16>(values, &mut *place.cast())
                    } else {
                        // The row ends within the super-block.
                        let mut quants = [0; SUPER_BLOCK];
                        let result = quantise::<L, SUPER_BLOCK, 16>(values, &mut quants);
                        std::ptr::copy_nonoverlapping(quants.as_ptr(), place, width);
                        result
                    };
                    *row.add(layout.scales).cast::<f32>().add(block) = scale;
                    let places = row.add(layout.sums);
                    if format == Format::Q4K {
                        for (part, sums) in sums.chunks_exact(2).enumerate().take(width / BLOCK) {
                            *places.cast::<i16>().add(at / BLOCK + part) = (sums[0] + sums[1]) as i16;
                        }
                    } else {
                        for (part, sum) in sums.iter().enumerate().take(width / 16) {
                            *places.cast::<i32>().add(at / 16 + part) = -offset(format) * sum;
                        }
                    }
                }
            }
        }
    }
}

/// The `N` values from `index · N` on; zeros stand for what lies past the end, in `padded`.
#[inline(always)]
fn chunk<'a, const N: usize>(values: &'a [f32], index: usize, padded: &'a mut [f32; N]) -> &'a [f32; N] {
    let (whole, rest) = values.as_chunks::<N>();
    match whole.get(index) {
        Some(values) => values,
        None => {
            padded[..rest.len()].copy_from_slice(rest);
            padded
        }
    }
}

/// The steps of quantising, sixteen values at a time.
trait Lanes {
    /// The largest magnitude; NaN or infinite if a value is.
    ///
    /// # Safety
    /// This and below: the machine has the tier.
    unsafe fn largest<const N: usize>(values: &[f32; N]) -> f32;

    /// The integers nearest to `values · inverse`, ties to even, and their sum.
    unsafe fn round(values: &[f32; LANES], inverse: f32, quants: &mut [i8; LANES]) -> i32;
}

/// The contract, in plain Rust.
struct Portable;

impl Lanes for Portable {
    unsafe fn largest<const N: usize>(values: &[f32; N]) -> f32 {
        // As integers, magnitudes compare as the floats do, and a NaN is the largest.
        f32::from_bits(values.iter().fold(0, |largest, value| largest.max(value.to_bits() & 0x7fff_ffff)))
    }

    unsafe fn round(values: &[f32; LANES], inverse: f32, quants: &mut [i8; LANES]) -> i32 {
        let mut sum = 0;
        for (quant, value) in quants.iter_mut().zip(values) {
            *quant = (value * inverse).round_ties_even() as i8;
            sum += i32::from(*quant);
        }
        sum
    }
}

#[cfg(target_arch = "x86_64")]
struct Avx512;

#[cfg(target_arch = "x86_64")]
impl Lanes for Avx512 {
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn largest<const N: usize>(values: &[f32; N]) -> f32 {
        let mut largest = _mm512_setzero_si512();
        for values in values.as_chunks::<LANES>().0 {
            // SAFETY: 16 values fill the register exactly.
            let values = unsafe { _mm512_loadu_si512(values.as_ptr().cast()) };
            largest = _mm512_max_epu32(largest, _mm512_and_si512(values, _mm512_set1_epi32(0x7fff_ffff)));
        }
        f32::from_bits(_mm512_reduce_max_epu32(largest))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn round(values: &[f32; LANES], inverse: f32, quants: &mut [i8; LANES]) -> i32 {
        // SAFETY: 16 values fill the registers exactly.
        unsafe {
            let product = _mm512_mul_ps(_mm512_loadu_ps(values.as_ptr()), _mm512_set1_ps(inverse));
            let integers = _mm512_cvtps_epi32(product);
            _mm_storeu_si128(quants.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(integers));
            _mm512_reduce_add_epi32(integers)
        }
    }
}

/// Writes `values` as the nearest multiples of a scale, ties to even; returns the scale and the sums of the multiples
/// in `PARTS` parts.
///
/// # Safety
/// The machine has the tier.
#[inline(always)]
unsafe fn quantise<L: Lanes, const N: usize, const PARTS: usize>(
    values: &[f32; N],
    quants: &mut [i8; N],
) -> (f32, [i32; PARTS]) {
    let mut sums = [0; PARTS];
    // SAFETY: the caller's promise.
    let largest = unsafe { L::largest(values) };
    let inverse = 127.0 / largest;
    if !largest.is_finite() || !inverse.is_finite() {
        *quants = [0; N];
        return (if largest.is_finite() { 0.0 } else { f32::NAN }, sums);
    }
    let chunks = values.as_chunks::<LANES>().0;
    for (index, (values, quants)) in chunks.iter().zip(quants.as_chunks_mut::<LANES>().0).enumerate() {
        // SAFETY: the caller's promise.
        sums[index * PARTS / (N / LANES)] += unsafe { L::round(values, inverse, quants) };
    }
    (largest / 127.0, sums)
}
