//! One budget for the whole process: what stays in memory, and how much of it the experts get.

use anyhow::{Result, ensure};
use cadre_engine::model::ModelInfo;
use cadre_models::{Placement, Stored, Summary};

use crate::host;

/// What a process takes besides weights, keys, values and a step's activations.
const BASE_BYTES: u64 = 32 << 20;
/// Activations that a step holds at once, in multiples of its hidden states in f32.
const STEP_COPIES: u64 = 16;
/// Of the free memory, what is used when no budget is given and the model doesn't fit: the rest of the machine lives too.
const SHARE_OF_FREE: f64 = 0.9;

/// How much memory the process may use, and where that puts the experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Bytes for everything; `None`: nothing is short.
    pub bytes: Option<u64>,
    /// Where routed experts go.
    pub placement: Placement,
}

impl Budget {
    /// For a model: `asked` bytes, or if none are asked for what is free. `kv_bytes` are the KV cache's.
    pub fn new(asked: Option<u64>, kv_bytes: u64, model: &Summary) -> Self {
        let other_bytes = kv_bytes + BASE_BYTES + host::rss_bytes().unwrap_or(0);
        Self::of(asked, host::free_memory_bytes(), other_bytes, model.total_bytes, is_pack(model))
    }

    fn of(asked: Option<u64>, free: Option<u64>, other_bytes: u64, weight_bytes: u64, is_pack: bool) -> Self {
        let needed = weight_bytes.saturating_add(other_bytes);
        let stored = |bytes| Self { bytes: Some(bytes), placement: Placement::Stored };
        match (asked, free) {
            (Some(asked), _) if needed > asked => stored(asked),
            // A checkpoint that isn't packed may take less or more memory than its files, and can't be read in parts.
            (None, Some(free)) if is_pack && needed > free => stored((free as f64 * SHARE_OF_FREE) as u64),
            _ => Self { bytes: asked, placement: Placement::Resident },
        }
    }
}

fn is_pack(model: &Summary) -> bool {
    model.types.iter().any(|(stored, _)| matches!(stored, Stored::Packed(_)))
}

/// What one step needs: activations of `tokens`, logits of `sequences`.
pub fn step_bytes(info: &ModelInfo, tokens: usize, sequences: usize) -> u64 {
    let hidden = (tokens * info.hidden_size * size_of::<f32>()) as u64;
    let logits = (sequences * info.vocab_size * size_of::<f32>()) as u64;
    STEP_COPIES * hidden + 2 * logits + BASE_BYTES
}

/// The experts' part of a budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertMemory {
    /// Bytes of one slot.
    pub slot_bytes: u64,
    /// Experts in all.
    pub count: u64,
    /// The fewest slots that a model may have.
    pub least: u64,
}

impl ExpertMemory {
    /// The slots that fit into `budget` beside `taken` bytes: as many as there are experts, if they do.
    ///
    /// # Errors
    /// When there is room for too few.
    pub fn slots(self, budget: u64, taken: u64) -> Result<usize> {
        let room = budget.saturating_sub(taken) / self.slot_bytes.max(1);
        let least = taken + self.least * self.slot_bytes;
        ensure!(
            room >= self.least,
            "--memory is {}, but this model needs at least {}: {} for dense weights, KV cache and activations, and {} for \
             {} experts at a time; allow more, or use a smaller format, --kv-memory or --max-num-batched-tokens",
            mebibytes(budget),
            mebibytes(least),
            mebibytes(taken),
            mebibytes(self.least * self.slot_bytes),
            self.least,
        );
        Ok(usize::try_from(room.min(self.count))?)
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn what_fits_is_resident_and_what_does_not_is_stored() {
        let of = |asked, free| Budget::of(asked, free, GIB, 8 * GIB, true);
        assert_eq!(of(None, Some(16 * GIB)), Budget { bytes: None, placement: Placement::Resident });
        assert_eq!(of(Some(9 * GIB), Some(GIB)), Budget { bytes: Some(9 * GIB), placement: Placement::Resident });
        assert_eq!(of(Some(9 * GIB - 1), None).placement, Placement::Stored);
        let chosen = of(None, Some(4 * GIB));
        assert_eq!(chosen.placement, Placement::Stored);
        assert!(chosen.bytes.is_some_and(|bytes| bytes < 4 * GIB && bytes > 3 * GIB));
        // Not packed: nobody asked for a budget, so it is tried as ever.
        assert_eq!(Budget::of(None, Some(GIB), 0, 8 * GIB, false).placement, Placement::Resident);
    }

    #[test]
    fn experts_get_what_is_left() {
        let experts = ExpertMemory { slot_bytes: 4 << 20, count: 100, least: 8 };
        assert_eq!(experts.slots(2 * GIB, GIB).unwrap(), 100);
        assert_eq!(experts.slots(GIB + (200 << 20), GIB).unwrap(), 50);
        let error = experts.slots(GIB, GIB).unwrap_err().to_string();
        assert!(error.contains("1024 MiB") && error.contains("1056 MiB") && error.contains("--memory"), "{error}");
    }
}
