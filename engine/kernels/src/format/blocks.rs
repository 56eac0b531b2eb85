//! What the integer formats share: rows are cut into blocks, and a block's quants lie in a panel in groups of four
//! inputs.

use half::f16;

use super::{INTEGER_K, PANEL};

/// One row's `N` weights of an integer format: scales and quants as plain values.
pub(super) trait Block<const N: usize>: Sized {
    /// Its size in GGUF.
    const GGUF_BYTES: usize;

    /// The block whose values are nearest to `values`, as far as the format's search goes.
    fn quantise(values: &[f32; N]) -> Self;

    /// The block in [`Self::GGUF_BYTES`] bytes.
    fn from_gguf(bytes: &[u8]) -> Self;

    /// Its values by GGUF's definition, in GGUF's order of f32 operations.
    fn values(&self) -> [f32; N];

    /// Writes it as block `index` of row `row` of a panel. A super-block at the end of a panel may be cut short.
    fn place(&self, panel: &mut [u8], index: usize, row: usize);

    /// The inverse of [`Self::place`]; what was cut off comes back as zero quants.
    fn read(panel: &[u8], index: usize, row: usize) -> Self;
}

/// Quantises up to 16 rows of `k` values into a zeroed panel.
#[inline(always)]
pub(super) fn pack<B: Block<N>, const N: usize>(k: usize, rows: &[f32], panel: &mut [u8]) {
    // Block by block, not row by row: the 16 rows' parts of a block share their cache lines in the panel.
    for index in 0..k.next_multiple_of(INTEGER_K).div_ceil(N) {
        for (row, values) in rows.chunks_exact(k).enumerate() {
            let values = &values[k.min(index * N)..];
            let mut padded = [0.0; N];
            let whole = values.first_chunk().unwrap_or_else(|| {
                padded[..values.len()].copy_from_slice(values);
                &padded
            });
            B::quantise(whole).place(panel, index, row);
        }
    }
}

/// Places up to 16 rows of GGUF blocks, `k` weights each, into a zeroed panel.
pub(super) fn pack_gguf<B: Block<N>, const N: usize>(k: usize, rows: &[u8], panel: &mut [u8]) {
    assert!(k.is_multiple_of(N), "{k} weights in blocks of {N}");
    let row_bytes = k / N * B::GGUF_BYTES;
    assert!(
        rows.len().is_multiple_of(row_bytes) && rows.len() / row_bytes <= PANEL,
        "{} bytes in rows of {row_bytes}",
        rows.len()
    );
    for (row, blocks) in rows.chunks_exact(row_bytes).enumerate() {
        for (index, block) in blocks.chunks_exact(B::GGUF_BYTES).enumerate() {
            B::from_gguf(block).place(panel, index, row);
        }
        // A lone last block has a neighbour in its unit: zeros.
        for index in k / N..k.next_multiple_of(INTEGER_K).div_ceil(N) {
            B::quantise(&[0.0; N]).place(panel, index, row);
        }
    }
}

/// Row `row` of a panel as f32.
pub(super) fn unpack_row<B: Block<N>, const N: usize>(panel: &[u8], row: usize, out: &mut [f32]) {
    for (index, out) in out.chunks_mut(N).enumerate() {
        out.copy_from_slice(&B::read(panel, index, row).values()[..out.len()]);
    }
}

/// The f16 at `at`.
#[inline(always)]
pub(super) fn read_f16(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Writes an f16 at `at`.
#[inline(always)]
pub(super) fn write_f16(bytes: &mut [u8], at: usize, value: f16) {
    bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

/// Places a row's quants, one byte each, in `[quants / 4][16][4]` bytes.
#[inline(always)]
pub(super) fn place_bytes(quants: &[u8], target: &mut [u8], row: usize) {
    for (group, target) in quants.chunks_exact(4).zip(target.chunks_exact_mut(4 * PANEL)) {
        target[4 * row..4 * row + 4].copy_from_slice(group);
    }
}

/// The inverse of [`place_bytes`].
pub(super) fn read_bytes(source: &[u8], row: usize, quants: &mut [u8]) {
    for (group, source) in quants.chunks_exact_mut(4).zip(source.chunks_exact(4 * PANEL)) {
        group.copy_from_slice(&source[4 * row..4 * row + 4]);
    }
}

/// Places a row's 4-bit quants in `[quants / 8][16][4]` nibble pairs: a byte's low half is an input of the first four
/// of eight, its high half the input four places on.
#[inline(always)]
pub(super) fn place_nibbles(quants: &[u8], target: &mut [u8], row: usize) {
    for (group, target) in quants.chunks_exact(8).zip(target.chunks_exact_mut(4 * PANEL)) {
        for (b, byte) in target[4 * row..4 * row + 4].iter_mut().enumerate() {
            *byte = group[b] | group[b + 4] << 4;
        }
    }
}

/// The inverse of [`place_nibbles`].
pub(super) fn read_nibbles(source: &[u8], row: usize, quants: &mut [u8]) {
    for (group, source) in quants.chunks_exact_mut(8).zip(source.chunks_exact(4 * PANEL)) {
        for (b, byte) in source[4 * row..4 * row + 4].iter().enumerate() {
            group[b] = byte & 15;
            group[b + 4] = byte >> 4;
        }
    }
}

/// GGUF's order of 4-bit quants: a byte of `n / 2` has weight `i` in its low half and weight `i + n / 2` in its high.
pub(super) fn nibbles_from_gguf(bytes: &[u8], quants: &mut [u8]) {
    let (low, high) = quants.split_at_mut(bytes.len());
    for ((byte, low), high) in bytes.iter().zip(low).zip(high) {
        *low = byte & 15;
        *high = byte >> 4;
    }
}

/// The greatest magnitude; NaN if one of the values is.
#[inline(always)]
pub(super) fn greatest_magnitude(values: &[f32]) -> f32 {
    // The bits of a positive float order like integers, with infinity and then NaN at the end.
    f32::from_bits(values.iter().map(|value| value.abs().to_bits().cast_signed()).fold(0, i32::max).cast_unsigned())
}

/// `1.5 × 2^23`: added to a value of magnitude below `2^22`, it leaves the nearest integer (ties to even) in the sum's
/// low bits. Unlike a conversion, it vectorises on every machine.
const ROUNDING: f32 = 12_582_912.0;

/// The nearest integer, for magnitudes below `2^22`.
#[inline(always)]
pub(super) fn round(value: f32) -> f32 {
    (value + ROUNDING) - ROUNDING
}

/// The nearest integer in a byte, two's complement if negative.
#[inline(always)]
pub(super) fn round_to_byte(value: f32) -> u8 {
    (value + ROUNDING).to_bits() as u8
}
