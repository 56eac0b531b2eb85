//! One budget for the whole process: what stays in memory, and how much of it the experts get.

use anyhow::{Result, ensure};
use cadre_models::{FormatOptions, Placement, Summary};

use crate::host;

/// What a process takes besides weights, keys, values and a step's activations.
pub const BASE_BYTES: u64 = 32 << 20;
/// Activations that a step holds at once, in multiples of its hidden states in f32.
const STEP_COPIES: u64 = 16;
/// Of the free memory, what is used when no budget is given and the model doesn't fit: the rest of the machine lives too.
pub const SHARE_OF_FREE: f64 = 0.9;

/// How much memory the process may use, and where that puts the experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Budget {
    /// All weights go into memory; `bytes` for everything, if that is limited.
    Resident { bytes: Option<u64> },
    /// Experts that `bytes` for everything don't hold stay on disk.
    Stored { bytes: u64 },
}

impl Budget {
    /// For a model: `asked` bytes, or if none are asked for what is free. `other_bytes` is what is needed besides weights.
    pub fn new(asked: Option<u64>, other_bytes: u64, model: &Summary, formats: &FormatOptions) -> Self {
        Self::of(asked, host::free_memory_bytes(), model.loaded_bytes(formats).saturating_add(other_bytes))
    }

    fn of(asked: Option<u64>, free: Option<u64>, needed: u64) -> Self {
        match (asked, free) {
            (Some(bytes), _) if needed > bytes => Self::Stored { bytes },
            (None, Some(free)) if needed > free => Self::Stored { bytes: (free as f64 * SHARE_OF_FREE) as u64 },
            _ => Self::Resident { bytes: asked },
        }
    }

    /// Bytes for everything, if they are limited.
    pub fn bytes(self) -> Option<u64> {
        match self {
            Self::Resident { bytes } => bytes,
            Self::Stored { bytes } => Some(bytes),
        }
    }

    /// Where routed experts go.
    pub fn placement(self) -> Placement {
        match self {
            Self::Resident { .. } => Placement::Resident,
            Self::Stored { .. } => Placement::Stored,
        }
    }
}

/// What a step of `tokens` tokens and `sequences` sequences needs: activations, logits, and what comes with them.
pub fn step_bytes(hidden_size: usize, vocab_size: usize, tokens: usize, sequences: usize) -> u64 {
    let floats = |rows: usize, width: usize| (rows as u64).saturating_mul(4 * width as u64);
    let (activations, logits) = (floats(tokens, hidden_size), floats(sequences, vocab_size));
    activations.saturating_mul(STEP_COPIES).saturating_add(logits.saturating_mul(2)).saturating_add(BASE_BYTES)
}

/// Whether a budget holds `needed` bytes.
///
/// # Errors
/// When it doesn't.
pub fn check(budget: u64, needed: u64) -> Result<()> {
    ensure!(
        needed <= budget,
        "--memory is {}, but this model needs at least {}: allow more, or use a smaller format, --kv-memory or \
         --max-num-batched-tokens",
        mebibytes(budget),
        mebibytes(needed)
    );
    Ok(())
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
    /// Bytes for those that are converted when they are read; 0 for a pack.
    pub staging_bytes: u64,
}

impl ExpertMemory {
    /// The slots that fit into `budget` beside `taken` bytes: as many as there are experts, if they do.
    ///
    /// # Errors
    /// When there is room for too few.
    pub fn slots(self, budget: u64, taken: u64) -> Result<usize> {
        let room = budget.saturating_sub(taken).saturating_sub(self.staging_bytes) / self.slot_bytes.max(1);
        let least = taken.saturating_add(self.least_bytes());
        let staging = match self.staging_bytes {
            0 => String::new(),
            bytes => format!(", and {} to convert them, which `cadre pack` would do once", mebibytes(bytes)),
        };
        ensure!(
            room >= self.least,
            "the memory that may be used (--memory) is {}, but this model needs at least {}: {} for dense weights, KV cache and activations, and {} for \
             {} experts at a time{staging}; allow more, or use a smaller format, --kv-memory or --max-num-batched-tokens",
            mebibytes(budget),
            mebibytes(least),
            mebibytes(taken),
            mebibytes(self.least * self.slot_bytes),
            self.least,
        );
        Ok(usize::try_from(room.min(self.count))?)
    }

    /// What the experts take at least.
    pub fn least_bytes(self) -> u64 {
        self.least.saturating_mul(self.slot_bytes).saturating_add(self.staging_bytes)
    }
}

/// A size for people.
pub fn mebibytes(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn what_fits_is_resident_and_what_does_not_is_stored() {
        let of = |asked, free| Budget::of(asked, free, 9 * GIB);
        assert_eq!(of(None, Some(16 * GIB)), Budget::Resident { bytes: None });
        assert_eq!(of(Some(9 * GIB), Some(GIB)), Budget::Resident { bytes: Some(9 * GIB) });
        assert_eq!(of(Some(9 * GIB - 1), None), Budget::Stored { bytes: 9 * GIB - 1 });
        let Budget::Stored { bytes } = of(None, Some(4 * GIB)) else { panic!("it doesn't fit") };
        assert!(bytes < 4 * GIB && bytes > 3 * GIB);
        assert_eq!(of(None, None), Budget::Resident { bytes: None });
    }

    #[test]
    fn a_step_without_limit_does_not_overflow() {
        assert_eq!(step_bytes(1 << 20, 1 << 20, usize::MAX, usize::MAX), u64::MAX);
    }

    #[test]
    fn experts_get_what_is_left() {
        let experts = ExpertMemory { slot_bytes: 4 << 20, count: 100, least: 8, staging_bytes: 0 };
        assert_eq!(experts.slots(2 * GIB, GIB).unwrap(), 100);
        assert_eq!(experts.slots(GIB + (200 << 20), GIB).unwrap(), 50);
        let error = experts.slots(GIB, GIB).unwrap_err().to_string();
        assert!(error.contains("1024 MiB") && error.contains("1056 MiB") && error.contains("--memory"), "{error}");
        assert!(!error.contains("convert"), "{error}");
        // Those that are converted when they are read need room for that too.
        let converted = ExpertMemory { staging_bytes: 40 << 20, ..experts };
        assert_eq!(converted.slots(GIB + (200 << 20), GIB).unwrap(), 40);
        let error = converted.slots(GIB + (71 << 20), GIB).unwrap_err().to_string();
        assert!(error.contains("1096 MiB") && error.contains("40 MiB to convert"), "{error}");
    }
}
