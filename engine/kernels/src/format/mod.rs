//! Packed weight formats.
//!
//! A weight matrix `[n, k]` (rows are outputs, as on the hub) is packed into panels of [`PANEL`] rows. Within a panel
//! the rows lie side by side, so that one vector register holds the same input place of 16 outputs:
//!
//! | format | panel | padding of k |
//! |---|---|---|
//! | `f32` | `[k][16]` f32 | – |
//! | `bf16` | `[k / 2][16][2]` bf16: the pairs that `vdpbf16ps` and AMX tiles take | 32 |
//! | `q8_0` | for each 64 inputs: scales f16 `[2][16]`, quants `[16][16][4]` bytes | 64 |
//! | `q4_0` | for each 64 inputs: scales f16 `[2][16]`, quants `[8][16][4]` nibble pairs | 64 |
//! | `mxfp4` | for each 64 inputs: exponents u8 `[2][16]`, codes `[8][16][4]` nibble pairs | 64 |
//! | `q4_k` | for each 256 inputs: `d`, `dmin` f16 `[16]`, scales u8 `[8][16]`, minima u8 `[4][16][2]`, quants `[32][16][4]` nibble pairs | 64 |
//! | `q6_k` | for each 256 inputs: `d` f16 `[16]`, 32 zeros, scales i8 `[16][16]`; then for each 64 the low bits `[8][16][4]` in nibble pairs and the high bits `[4][16][4]` | 64 |
//!
//! Groups of four inputs are what the integer dot products take (`vpdpbusd`, AMX tiles). A byte of nibble pairs has
//! input `8i + b` in its low half and input `8i + 4 + b` in its high half. The files of the formats have the details.
//!
//! Rows are padded to a multiple of 16. Padding stays without effect: the values of padding rows are zero, and so are
//! those of padding columns, except for the minimum in `q4_k`: there the activations must be zero. One form serves all
//! tiers.

mod blocks;
mod float;
pub(crate) mod mxfp4;
mod q4_0;
mod q4_k;
mod q6_k;
mod q8_0;

use std::{fmt, str::FromStr};

pub(crate) use float::round_to_bf16;

/// Output rows in a panel.
pub const PANEL: usize = 16;

/// Inputs in a block of a 32-weight format.
pub(crate) const BLOCK: usize = 32;
/// Inputs in a super-block of a K format.
pub(crate) const SUPER_BLOCK: usize = 256;
/// The integer formats pad k to this.
pub(crate) const INTEGER_K: usize = 64;

/// How a weight matrix is stored. The integer formats' values are those of GGUF's definition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// 32-bit floats.
    F32,
    /// The upper half of 32-bit floats. Activations are rounded to bf16 before they are multiplied; sums are f32.
    Bf16,
    /// Blocks of 32: an f16 scale and int8 values; 8.5 bits a weight.
    Q8_0,
    /// Blocks of 32: an f16 scale and 4-bit values; 4.5 bits.
    Q4_0,
    /// Super-blocks of 256 in 8 parts with a scale and a minimum each, 4-bit values; 4.5 bits nominally, 4.625 here:
    /// scales and minima take whole bytes.
    Q4K,
    /// Super-blocks of 256 in 16 parts with a scale each, 6-bit values; 6.5625 bits nominally, 6.625 here.
    Q6K,
    /// Blocks of 32: a power of two and 4-bit floats (OCP Microscaling, MXFP4); 4.25 bits.
    Mxfp4,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// No format has this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no weight format: expected one of f32, bf16, q8_0, q4_0, q4_k, q6_k, mxfp4")]
pub struct UnknownFormat(String);

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Self, UnknownFormat> {
        Self::ALL.iter().find(|format| format.name() == name).copied().ok_or_else(|| UnknownFormat(name.to_owned()))
    }
}

impl Format {
    /// All of them.
    pub const ALL: &[Self] = &[Self::F32, Self::Bf16, Self::Q8_0, Self::Q4_0, Self::Q4K, Self::Q6K, Self::Mxfp4];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4K => "q4_k",
            Self::Q6K => "q6_k",
            Self::Mxfp4 => "mxfp4",
        }
    }

    /// `k` with its padding.
    #[must_use]
    pub fn padded_k(self, k: usize) -> usize {
        match self {
            Self::F32 => k,
            Self::Bf16 => k.next_multiple_of(32),
            Self::Q8_0 | Self::Q4_0 | Self::Q4K | Self::Q6K | Self::Mxfp4 => k.next_multiple_of(INTEGER_K),
        }
    }

    /// Bytes of a panel of 16 rows.
    #[must_use]
    pub fn panel_bytes(self, k: usize) -> usize {
        let k = self.padded_k(k);
        match self {
            Self::F32 => PANEL * k * 4,
            Self::Bf16 => PANEL * k * 2,
            Self::Q8_0 => k / INTEGER_K * q8_0::UNIT_BYTES,
            Self::Q4_0 => k / INTEGER_K * q4_0::UNIT_BYTES,
            Self::Q4K => k.div_ceil(SUPER_BLOCK) * q4_k::HEAD_BYTES + k / BLOCK * q4_k::PART_BYTES,
            Self::Q6K => k.div_ceil(SUPER_BLOCK) * q6_k::HEAD_BYTES + k / INTEGER_K * q6_k::UNIT_BYTES,
            Self::Mxfp4 => k / INTEGER_K * mxfp4::UNIT_BYTES,
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
        self.format.panel_bytes(self.k)
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
        let row = row % PANEL;
        match self.layout.format {
            Format::F32 => float::unpack_f32(panel, row, out),
            Format::Bf16 => float::unpack_bf16(panel, row, out),
            Format::Q8_0 => blocks::unpack_row::<q8_0::Block, _>(panel, row, out),
            Format::Q4_0 => blocks::unpack_row::<q4_0::Block, _>(panel, row, out),
            Format::Q4K => blocks::unpack_row::<q4_k::Block, _>(panel, row, out),
            Format::Q6K => blocks::unpack_row::<q6_k::Block, _>(panel, row, out),
            Format::Mxfp4 => blocks::unpack_row::<mxfp4::Block, _>(panel, row, out),
        }
    }
}

/// Packs up to 16 rows of `k` values each, one after the other in `rows`, into `panel`; what lies past the rows and
/// past `k` becomes zero. The values are rounded to the format, the same on every machine.
///
/// # Panics
/// When `rows` is not a whole number of at most 16 rows, or `panel` has not a panel's size.
pub fn pack_panel(format: Format, k: usize, rows: &[f32], panel: &mut [u8]) {
    let layout = Layout { format, n: PANEL, k };
    assert_eq!(panel.len(), layout.panel_bytes(), "bytes of a panel of {layout:?}");
    assert!(k > 0 && rows.len().is_multiple_of(k) && rows.len() / k <= PANEL, "{} values in rows of {k}", rows.len());
    panel.fill(0);
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the machine has the feature.
        return unsafe { pack_rows_avx2(format, k, rows, panel) };
    }
    pack_rows(format, k, rows, panel);
}

/// [`pack_rows`], compiled for wider registers; the same bits, as nothing is fused or reordered.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn pack_rows_avx2(format: Format, k: usize, rows: &[f32], panel: &mut [u8]) {
    pack_rows(format, k, rows, panel);
}

#[inline(always)]
fn pack_rows(format: Format, k: usize, rows: &[f32], panel: &mut [u8]) {
    match format {
        Format::F32 => float::pack_f32(k, rows, panel),
        Format::Bf16 => float::pack_bf16(k, rows, panel),
        Format::Q8_0 => blocks::pack::<q8_0::Block, _>(k, rows, panel),
        Format::Q4_0 => blocks::pack::<q4_0::Block, _>(k, rows, panel),
        Format::Q4K => blocks::pack::<q4_k::Block, _>(k, rows, panel),
        Format::Q6K => blocks::pack::<q6_k::Block, _>(k, rows, panel),
        Format::Mxfp4 => blocks::pack::<mxfp4::Block, _>(k, rows, panel),
    }
}

/// Packs up to 16 rows of GGUF's blocks of an integer format, `k` weights each, one after the other in `rows`, into
/// `panel`. The values stay the same, bit for bit: the tests hold the formats to GGUF's definition by it.
///
/// # Panics
/// When `k` is not a whole number of blocks, `rows` not one of at most 16 rows, or `panel` has not a panel's size; and
/// for `f32` and `bf16`, which GGUF stores as plain values: see [`pack_panel`].
pub fn pack_gguf_panel(format: Format, k: usize, rows: &[u8], panel: &mut [u8]) {
    let layout = Layout { format, n: PANEL, k };
    assert_eq!(panel.len(), layout.panel_bytes(), "bytes of a panel of {layout:?}");
    panel.fill(0);
    match format {
        Format::F32 | Format::Bf16 => unreachable!("{format} has no blocks"),
        Format::Q8_0 => blocks::pack_gguf::<q8_0::Block, _>(k, rows, panel),
        Format::Q4_0 => blocks::pack_gguf::<q4_0::Block, _>(k, rows, panel),
        Format::Q4K => blocks::pack_gguf::<q4_k::Block, _>(k, rows, panel),
        Format::Q6K => blocks::pack_gguf::<q6_k::Block, _>(k, rows, panel),
        Format::Mxfp4 => blocks::pack_gguf::<mxfp4::Block, _>(k, rows, panel),
    }
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
mod tests;
