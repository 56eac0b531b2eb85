//! Weights whose rows and columns change places: the gradient of a product's input is a product with them.

use crate::{
    buffer::{AllocError, Buffer},
    format::{Format, Layout, PANEL, Packed, round_to_bf16},
    pool::Pool,
    shared::SharedSlice,
};

/// Room for one transposed matrix at a time; at first it takes none. f32 weights stay f32; all others become bf16, exactly so if they are bf16,
/// and rounded if they are integers with a scale.
#[derive(Debug, Default)]
pub struct Transposed {
    bytes: Buffer,
}

impl Transposed {
    /// What weights of `format` become.
    #[must_use]
    pub fn format(format: Format) -> Format {
        if format == Format::F32 { Format::F32 } else { Format::Bf16 }
    }

    /// `[n, k]` becomes `[k, n]`.
    ///
    /// # Errors
    /// When memory for it cannot be had.
    pub fn fill(&mut self, pool: &Pool, weights: &Packed<'_>) -> Result<Packed<'_>, AllocError> {
        let panels = 0..weights.layout().panels();
        self.fill_panels(pool, weights, panels)
    }

    /// The same of the rows in some of the panels of 16 rows only: `[k, rows]`.
    ///
    /// # Errors
    /// When memory for it cannot be had.
    pub fn fill_panels(
        &mut self,
        pool: &Pool,
        weights: &Packed<'_>,
        panels: std::ops::Range<usize>,
    ) -> Result<Packed<'_>, AllocError> {
        let from = weights.layout();
        let format = Self::format(from.format);
        let rows = from.n.min(panels.end * PANEL) - panels.start * PANEL;
        let layout = Layout { format, n: from.k, k: rows };
        let bytes = layout.bytes();
        if self.bytes.len() < bytes {
            self.bytes = Buffer::zeroed(bytes)?;
        }
        let panel_bytes = layout.panel_bytes();
        // The block of 16 by 16 that one panel before shares with one panel after.
        let block_bytes = PANEL * PANEL * if format == Format::F32 { 4 } else { 2 };
        let target = SharedSlice::new(&mut self.bytes[..bytes]);
        let count = panels.len();
        pool.run(count, |index| {
            let mut rows = Vec::new();
            if from.format != Format::Bf16 {
                rows = unpacked(weights, panels.start + index);
            }
            for after in 0..layout.panels() {
                let start = after * panel_bytes + index * block_bytes;
                // A panel of f32 ends with the last row.
                let len = block_bytes.min((after + 1) * panel_bytes - start);
                // SAFETY: each task has its own block of each panel.
                let block = unsafe { target.part(start, len) };
                match from.format {
                    Format::F32 => f32_block(&rows, from.k, after, block),
                    Format::Bf16 => {
                        let before = weights.panel(panels.start + index);
                        turn_pairs(&before[after * block_bytes..(after + 1) * block_bytes], block);
                    }
                    _ => bf16_block(&rows, from.k, after, block),
                }
                // What pads the inputs to their multiple.
                if index + 1 == count {
                    let end = start + len;
                    // SAFETY: nothing else writes behind the last block.
                    unsafe { target.part(end, (after + 1) * panel_bytes - end) }.fill(0);
                }
            }
        });
        Ok(Packed::new(layout, &self.bytes[..bytes]))
    }
}

/// The rows of one panel, `[16, k]`; those that pad it are zero.
fn unpacked(weights: &Packed<'_>, panel: usize) -> Vec<f32> {
    let Layout { n, k, .. } = weights.layout();
    let mut rows = vec![0.0; PANEL * k];
    for (row, out) in (panel * PANEL..n).zip(rows.chunks_exact_mut(k)) {
        weights.unpack_row(row, out);
    }
    rows
}

/// `[16 rows, k]` from column `16 · after` on to `[rows][16 columns]`.
fn f32_block(rows: &[f32], k: usize, after: usize, block: &mut [u8]) {
    let columns = after * PANEL..k.min((after + 1) * PANEL);
    for (row, out) in rows.chunks_exact(k).zip(block.chunks_exact_mut(4 * PANEL)) {
        out.fill(0);
        for (value, out) in row[columns.clone()].iter().zip(out.chunks_exact_mut(4)) {
            out.copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// The same to `[rows / 2][16 columns][2]` bf16.
fn bf16_block(rows: &[f32], k: usize, after: usize, block: &mut [u8]) {
    let columns = after * PANEL..k.min((after + 1) * PANEL);
    for (pair, out) in rows.chunks_exact(2 * k).zip(block.chunks_exact_mut(4 * PANEL)) {
        out.fill(0);
        let (one, other) = pair.split_at(k);
        let values = one[columns.clone()].iter().zip(&other[columns.clone()]);
        for ((one, other), out) in values.zip(out.chunks_exact_mut(4)) {
            let bits = u32::from(round_to_bf16(*one)) | u32::from(round_to_bf16(*other)) << 16;
            out.copy_from_slice(&bits.to_le_bytes());
        }
    }
}

/// `[8 column pairs][16 rows][2]` to `[8 row pairs][16 columns][2]`, of 2-byte values: eight bytes hold two columns of
/// two rows in both; they change places as wholes, and turn within.
fn turn_pairs(before: &[u8], after: &mut [u8]) {
    let (before, _) = before.as_chunks::<64>();
    let (after, _) = after.as_chunks_mut::<64>();
    let mut words = [[0_u64; 8]; 8];
    for (words, line) in words.iter_mut().zip(before) {
        for (word, bytes) in words.iter_mut().zip(line.as_chunks::<8>().0) {
            let bits = u64::from_le_bytes(*bytes);
            *word = bits & 0xffff_0000_0000_ffff | (bits & 0xffff_0000) << 16 | (bits >> 16) & 0xffff_0000;
        }
    }
    for (index, line) in after.iter_mut().enumerate() {
        for (bytes, words) in line.as_chunks_mut::<8>().0.iter_mut().zip(&words) {
            *bytes = words[index].to_le_bytes();
        }
    }
}
