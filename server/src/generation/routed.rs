//! The experts that a choice's tokens were routed to, as vLLM tells them: an array `[tokens, layers, top_k]`.

use anyhow::{Result, bail, ensure};
use cadre_engine::model::ModelInfo;

/// Experts that a number of one byte tells apart.
const NARROW: usize = 1 << 8;
/// Experts that a number of two bytes tells apart.
const WIDE: usize = 1 << 16;

/// What the array of a model is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoutedShape {
    /// All layers; those without routed experts have zeros.
    pub layers: usize,
    /// Experts of a token in a layer.
    pub top_k: usize,
    /// Bytes of a number: 1 or 2.
    pub number_bytes: usize,
}

impl RoutedShape {
    /// That of a model.
    ///
    /// # Errors
    /// When it has no routed experts, or they don't fit such an array.
    pub fn of(model: &ModelInfo) -> Result<Self> {
        let Some(first) = model.moe_layers.first() else { bail!("this model has no routed experts") };
        let top_k = first.top_k;
        if let Some(other) = model.moe_layers.iter().find(|layer| layer.top_k != top_k) {
            bail!("expected layers that use equally many experts, found {top_k} and {}", other.top_k);
        }
        let experts = model.moe_layers.iter().map(|layer| layer.experts).max().unwrap_or(0);
        ensure!(experts <= WIDE, "expected at most {WIDE} experts a layer, found {experts}");
        Ok(Self { layers: model.num_layers, top_k, number_bytes: if experts <= NARROW { 1 } else { 2 } })
    }

    /// Bytes of one token's numbers.
    pub fn token_bytes(self) -> usize {
        self.layers * self.top_k * self.number_bytes
    }

    /// Appends the numbers of further tokens.
    pub fn push(self, array: &mut Vec<u8>, experts: &[u32]) {
        array.extend(experts.iter().flat_map(|expert| expert.to_le_bytes().into_iter().take(self.number_bytes)));
    }

    /// The array as a file of NumPy's (`.npy`, version 1.0).
    pub fn npy(self, array: &[u8]) -> Vec<u8> {
        /// What the header's length, with all that is before it, is a multiple of.
        const ALIGNMENT: usize = 64;
        const MAGIC: &[u8] = b"\x93NUMPY\x01\x00";
        let Self { layers, top_k, number_bytes } = self;
        let tokens = array.len() / self.token_bytes().max(1);
        let kind = if number_bytes == 1 { "|u1" } else { "<u2" };
        let about = format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': ({tokens}, {layers}, {top_k}), }}");
        let before = MAGIC.len() + size_of::<u16>();
        let padding = (before + about.len() + 1).next_multiple_of(ALIGNMENT) - before;
        let header = format!("{about:<width$}\n", width = padding - 1);
        let length = u16::try_from(header.len()).unwrap_or(u16::MAX).to_le_bytes();
        [MAGIC, &length, header.as_bytes(), array].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numpy_reads_it() {
        let shape = RoutedShape { layers: 2, top_k: 3, number_bytes: 2 };
        let mut array = Vec::new();
        shape.push(&mut array, &[1, 2, 300, 0, 0, 0]);
        let file = shape.npy(&array);
        assert_eq!(file.len(), 128 + 12);
        let header = "{'descr': '<u2', 'fortran_order': False, 'shape': (1, 2, 3), }";
        assert_eq!(&file[..10], b"\x93NUMPY\x01\x00\x76\x00");
        assert_eq!(std::str::from_utf8(&file[10..128]).unwrap(), format!("{header:<117}\n"));
        assert_eq!(file[128..], [1, 0, 2, 0, 44, 1, 0, 0, 0, 0, 0, 0]);
    }
}
