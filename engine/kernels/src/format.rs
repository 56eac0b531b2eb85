//! Packed weight formats.
//!
//! A weight matrix `[n, k]` (rows are outputs, as on the hub) is packed into panels of [`PANEL`] rows. Within a panel
//! the rows lie side by side, so that one vector register holds the same input place of 16 outputs:
//!
//! | format | panel | padding |
//! |---|---|---|
//! | `f32` | `[k][16]` f32 | – |
//! | `bf16` | `[k / 2][16][2]` bf16: the pairs that `vdpbf16ps` and AMX tiles take | k to a multiple of 32 |
//!
//! Rows are padded to a multiple of 16. Padding is zero and stays without effect. One form serves all tiers.

use std::fmt;

use half::bf16;

/// Output rows in a panel.
pub const PANEL: usize = 16;

/// How a weight matrix is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// 32-bit floats.
    F32,
    /// The upper half of 32-bit floats. Activations are rounded to bf16 before they are multiplied; sums are f32.
    Bf16,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

impl Format {
    /// `k` with its padding.
    #[must_use]
    pub fn padded_k(self, k: usize) -> usize {
        match self {
            Self::F32 => k,
            Self::Bf16 => k.next_multiple_of(32),
        }
    }

    /// Bytes of one stored value.
    #[must_use]
    pub fn value_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// The sizes of a packed matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Layout {
    /// The format.
    pub format: Format,
    /// Rows: outputs.
    pub n: usize,
    /// Columns: inputs.
    pub k: usize,
}

impl Layout {
    /// Panels, the last one padded.
    #[must_use]
    pub fn panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    /// Bytes of one panel.
    #[must_use]
    pub fn panel_bytes(&self) -> usize {
        PANEL * self.format.padded_k(self.k) * self.format.value_bytes()
    }

    /// Bytes of the whole matrix.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.panels() * self.panel_bytes()
    }
}

/// A packed matrix: its sizes and its bytes, which lie wherever they lie.
#[derive(Debug, Clone, Copy)]
pub struct Packed<'a> {
    layout: Layout,
    bytes: &'a [u8],
}

impl<'a> Packed<'a> {
    /// The matrix in `bytes`.
    ///
    /// # Panics
    /// When `bytes` has not the size that the layout needs.
    #[must_use]
    pub fn new(layout: Layout, bytes: &'a [u8]) -> Self {
        assert_eq!(bytes.len(), layout.bytes(), "bytes of a packed matrix of {layout:?}");
        Self { layout, bytes }
    }

    /// Its sizes.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The bytes of panel `index`.
    pub(crate) fn panel(&self, index: usize) -> &'a [u8] {
        let size = self.layout.panel_bytes();
        &self.bytes[index * size..(index + 1) * size]
    }

    /// Row `row` as f32 into `out` `[k]`: an embedding's look-up.
    ///
    /// # Panics
    /// When `row` or `out` does not fit the layout.
    pub fn unpack_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.layout.n, "row {row} of {}", self.layout.n);
        assert_eq!(out.len(), self.layout.k, "values of a row");
        let panel = self.panel(row / PANEL);
        for (index, value) in out.iter_mut().enumerate() {
            *value = read(self.layout.format, panel, row % PANEL, index);
        }
    }
}

/// The value of row `row` and column `column` of one panel.
pub(crate) fn read(format: Format, panel: &[u8], row: usize, column: usize) -> f32 {
    let at = offset(format, row, column);
    match format {
        Format::F32 => f32::from_le_bytes([panel[at], panel[at + 1], panel[at + 2], panel[at + 3]]),
        Format::Bf16 => bf16::from_le_bytes([panel[at], panel[at + 1]]).to_f32(),
    }
}

fn offset(format: Format, row: usize, column: usize) -> usize {
    match format {
        Format::F32 => (column * PANEL + row) * 4,
        Format::Bf16 => ((column / 2 * PANEL + row) * 2 + column % 2) * 2,
    }
}

/// Packs up to 16 rows of `k` values each, one after the other in `rows`, into `panel`; what lies past the rows and
/// past `k` becomes zero.
///
/// # Panics
/// When `rows` is not a whole number of at most 16 rows, or `panel` has not a panel's size.
pub fn pack_panel(format: Format, k: usize, rows: &[f32], panel: &mut [u8]) {
    let layout = Layout { format, n: PANEL, k };
    assert_eq!(panel.len(), layout.panel_bytes(), "bytes of a panel of {layout:?}");
    assert!(k > 0 && rows.len().is_multiple_of(k) && rows.len() / k <= PANEL, "{} values in rows of {k}", rows.len());
    panel.fill(0);
    for (row, values) in rows.chunks_exact(k).enumerate() {
        match format {
            Format::F32 => {
                for (value, place) in values.iter().zip(panel[offset(format, row, 0)..].chunks_mut(4 * PANEL)) {
                    place[..4].copy_from_slice(&value.to_le_bytes());
                }
            }
            Format::Bf16 => {
                // A pair at a time; an odd last value stands beside the padding's zero.
                for (pair, place) in values.chunks(2).zip(panel[offset(format, row, 0)..].chunks_mut(4 * PANEL)) {
                    let bits = |index: usize| pair.get(index).map_or(0, |value| u32::from(round_to_bf16(*value)));
                    place[..4].copy_from_slice(&(bits(0) | bits(1) << 16).to_le_bytes());
                }
            }
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

/// Packs a whole matrix `[n, k]` of f32 values.
///
/// # Panics
/// When a slice has not the size that the layout needs.
pub fn pack(layout: Layout, values: &[f32], bytes: &mut [u8]) {
    assert_eq!(values.len(), layout.n * layout.k, "values of a matrix of {layout:?}");
    assert_eq!(bytes.len(), layout.bytes(), "bytes of a packed matrix of {layout:?}");
    let panels = bytes.chunks_exact_mut(layout.panel_bytes());
    for (rows, panel) in values.chunks(PANEL * layout.k).zip(panels) {
        pack_panel(layout.format, layout.k, rows, panel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn packing_keeps_every_value(n in 1_usize..70, k in 1_usize..70, seed: u64) {
            for format in [Format::F32, Format::Bf16] {
                let layout = Layout { format, n, k };
                let values: Vec<f32> = (0..n * k)
                    .map(|i| bf16::from_f32(((seed.wrapping_mul(i as u64 + 1) >> 40) as f32 - 8e6) / 1e6).to_f32())
                    .collect();
                let mut bytes = vec![0xff; layout.bytes()];
                pack(layout, &values, &mut bytes);
                let packed = Packed::new(layout, &bytes);
                let mut row = vec![0.0; k];
                for (index, expected) in values.chunks(k).enumerate() {
                    packed.unpack_row(index, &mut row);
                    prop_assert_eq!(&row, expected);
                }
            }
        }
    }
}
