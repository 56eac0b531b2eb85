//! Weights whose rows and columns change places: the gradient of a product's input is a product with them.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m256i, _mm256_loadu_si256, _mm256_permute2x128_si256, _mm256_setr_epi8, _mm256_shuffle_epi8, _mm256_storeu_si256,
    _mm256_unpackhi_epi64, _mm256_unpacklo_epi64,
};

use crate::{
    buffer::{AllocError, Buffer},
    format::{Format, Layout, PANEL, Packed, round_to_bf16},
    isa::Isa,
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
    pub fn fill(&mut self, pool: &Pool, isa: Isa, weights: &Packed<'_>) -> Result<Packed<'_>, AllocError> {
        let panels = 0..weights.layout().panels();
        self.fill_panels(pool, isa, weights, panels)
    }

    /// The same of the rows in some of the panels of 16 rows only: `[k, rows]`.
    ///
    /// # Errors
    /// When memory for it cannot be had.
    pub fn fill_panels(
        &mut self,
        pool: &Pool,
        isa: Isa,
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
                        turn_pairs(isa, &before[after * block_bytes..(after + 1) * block_bytes], block);
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
fn turn_pairs(isa: Isa, before: &[u8], after: &mut [u8]) {
    let (before, _) = before.as_chunks::<64>();
    let (after, _) = after.as_chunks_mut::<64>();
    #[cfg(target_arch = "x86_64")]
    if matches!(isa, Isa::Avx2 | Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx) {
        // SAFETY: a tier other than portable exists only where `Isa::available` found it.
        return unsafe { turn_pairs_avx2(before, after) };
    }
    let _ = isa;
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

/// The same by quarters of 4 by 4 words.
///
/// # Panics
/// When one side has fewer than 8 lines.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn turn_pairs_avx2(before: &[[u8; 64]], after: &mut [[u8; 64]]) {
    let within = _mm256_setr_epi8(
        0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15,
    );
    for (row, column) in [(0, 0), (0, 4), (4, 0), (4, 4)] {
        let [a, b, c, d]: [__m256i; 4] = std::array::from_fn(|line| {
            let words = &before[row + line][column * 8..column * 8 + 32];
            // SAFETY: 32 bytes fill the register exactly.
            _mm256_shuffle_epi8(unsafe { _mm256_loadu_si256(words.as_ptr().cast()) }, within)
        });
        let (ab, cd) = (_mm256_unpacklo_epi64(a, b), _mm256_unpacklo_epi64(c, d));
        let (ab_odd, cd_odd) = (_mm256_unpackhi_epi64(a, b), _mm256_unpackhi_epi64(c, d));
        let lines = [
            _mm256_permute2x128_si256::<0x20>(ab, cd),
            _mm256_permute2x128_si256::<0x20>(ab_odd, cd_odd),
            _mm256_permute2x128_si256::<0x31>(ab, cd),
            _mm256_permute2x128_si256::<0x31>(ab_odd, cd_odd),
        ];
        for (line, words) in lines.into_iter().enumerate() {
            let out = &mut after[column + line][row * 8..row * 8 + 32];
            // SAFETY: 32 bytes take the register exactly.
            unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), words) };
        }
    }
}
