//! f32 and bf16: values side by side, nothing to search.

use half::bf16;

use super::PANEL;

/// Packs rows of `k` values into a zeroed panel `[k][16]`.
pub(super) fn pack_f32(k: usize, rows: &[f32], panel: &mut [u8]) {
    for (row, values) in rows.chunks_exact(k).enumerate() {
        for (value, place) in values.iter().zip(panel.chunks_exact_mut(4 * PANEL)) {
            place[4 * row..4 * row + 4].copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// Row `row` of a panel `[k][16]`.
pub(super) fn unpack_f32(panel: &[u8], row: usize, out: &mut [f32]) {
    for (value, place) in out.iter_mut().zip(panel.chunks_exact(4 * PANEL)) {
        let at = 4 * row;
        *value = f32::from_le_bytes([place[at], place[at + 1], place[at + 2], place[at + 3]]);
    }
}

/// Rounds rows of `k` values into a zeroed panel `[k / 2][16][2]`.
pub(super) fn pack_bf16(k: usize, rows: &[f32], panel: &mut [u8]) {
    for (row, values) in rows.chunks_exact(k).enumerate() {
        // A pair at a time; an odd last value stands beside the padding's zero.
        for (pair, place) in values.chunks(2).zip(panel.chunks_exact_mut(4 * PANEL)) {
            let bits = |index: usize| pair.get(index).map_or(0, |value| u32::from(round_to_bf16(*value)));
            place[4 * row..4 * row + 4].copy_from_slice(&(bits(0) | bits(1) << 16).to_le_bytes());
        }
    }
}

/// Row `row` of a panel `[k / 2][16][2]`.
pub(super) fn unpack_bf16(panel: &[u8], row: usize, out: &mut [f32]) {
    for (pair, place) in out.chunks_mut(2).zip(panel.chunks_exact(4 * PANEL)) {
        for (value, bytes) in pair.iter_mut().zip(place[4 * row..4 * row + 4].chunks_exact(2)) {
            *value = bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
        }
    }
}

/// The nearest bf16, ties to even; NaN stays NaN.
#[inline(always)]
pub(crate) fn round_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1))) >> 16;
    if value.is_nan() { 0x7fc0 } else { rounded as u16 }
}
