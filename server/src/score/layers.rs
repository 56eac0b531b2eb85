//! Passages in super-batches, layer by layer, for models that memory doesn't hold.

use std::path::PathBuf;

use anyhow::{Context, Result};
use cadre_engine::{
    experts::ExpertStore,
    kv::KvDtype,
    model::{Model, ModelInfo},
    nn::Format,
    score::{LayerMajor, LayerMajorConfig},
};
use cadre_models::LoadedModel;

use crate::{
    engine::{EngineOptions, Loaded, Opened},
    memory::{self, ExpertMemory},
    progress,
};

/// Experts that are being read while others are used.
const READING: u64 = 16;
/// Memory for the logits of rows that are scored.
const LOGITS_BYTES: usize = 64 << 20;

/// What scores layer by layer.
pub struct Layers {
    /// The lane itself.
    pub lane: LayerMajor,
    /// The experts that memory doesn't hold.
    pub store: Option<ExpertStore>,
    /// Where hidden states wait between layers, if not in memory.
    pub spill: Option<PathBuf>,
}

impl Layers {
    /// Loads the model, for super-batches of `rows` rows and passages of `max_model_len` tokens. What doesn't fit goes into
    /// `folder`.
    ///
    /// # Errors
    /// When it can't be read, or doesn't fit the memory.
    pub fn start(
        options: &EngineOptions,
        opened: Opened,
        rows: usize,
        max_model_len: usize,
        folder: PathBuf,
    ) -> Result<Self> {
        let Opened { compute, checkpoint, budget, .. } = opened;
        let LoadedModel { decoder, formats, experts } = progress::weights("loading weights", |report| {
            cadre_models::load(&checkpoint, &options.formats, budget.placement(), &compute, report)
        })?;
        let info = decoder.info().clone();
        let of_weights = if formats.dense == Format::F32 { KvDtype::F32 } else { KvDtype::Bf16 };
        let config = LayerMajorConfig {
            chunk_rows: options.max_num_batched_tokens,
            max_model_len,
            kv_dtype: options.kv_dtype.unwrap_or(of_weights),
        };
        let loaded = Loaded::all(&info, experts.as_ref());
        let stored = loaded.experts.unwrap_or_default();
        let needs = Needs {
            held: loaded
                .weights
                .saturating_add(step_bytes(&info, config.chunk_rows))
                .saturating_add(config.kv_bytes(&info)),
            rows: rows as u64 * 4 * info.hidden_size as u64,
            layer: info.moe_layers.iter().map(|layer| layer.experts as u64).max().unwrap_or(0),
            experts: ExpertMemory {
                slot_bytes: stored.slot,
                count: info.moe_layers.iter().map(|layer| layer.experts as u64).sum(),
                least: info.moe_layers.iter().map(|layer| layer.top_k as u64).max().unwrap_or(1),
                staging_bytes: stored.staging,
            },
        };
        let Split { slots, spills } = needs.split(budget.bytes(), experts.is_some())?;
        tracing::info!(?slots, spills, rows, "scoring goes layer by layer");
        let store = match experts {
            Some(experts) => Some(experts.open(slots.context("experts stay on disk only within a budget")?)?),
            None => None,
        };
        let lane = LayerMajor::new(Box::new(decoder), compute, config);
        Ok(Self { lane, store, spill: spills.then_some(folder) })
    }
}

fn step_bytes(info: &ModelInfo, chunk_rows: usize) -> u64 {
    let scored = (LOGITS_BYTES / (4 * info.vocab_size.max(1))).clamp(1, chunk_rows.max(1));
    memory::step_bytes(info.hidden_size, info.vocab_size, chunk_rows, scored)
}

/// What the lane takes, in bytes.
#[derive(Debug, Clone, Copy)]
struct Needs {
    /// The process with its weights, but for experts in the store, and what a chunk takes.
    held: u64,
    /// The hidden states of a super-batch.
    rows: u64,
    /// Experts of the largest layer.
    layer: u64,
    experts: ExpertMemory,
}

/// How the memory is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Split {
    /// Experts in memory; none if all weights are.
    slots: Option<usize>,
    /// Hidden states wait on disk.
    spills: bool,
}

impl Needs {
    /// Hidden states are in memory if that leaves room for the experts of two layers: one that computes, and the next one that is
    /// read meanwhile. Else these are worth more: a file of hidden states is read and written in order.
    fn split(self, budget: Option<u64>, is_stored: bool) -> Result<Split> {
        let Some(budget) = budget else { return Ok(Split { slots: None, spills: false }) };
        let held_with_rows = self.held.saturating_add(self.rows);
        if !is_stored {
            let spills = held_with_rows > budget;
            memory::check(budget, if spills { self.held } else { held_with_rows })?;
            return Ok(Split { slots: None, spills });
        }
        let two_layers = (2 * self.layer + READING).min(self.experts.count);
        let wanted = two_layers.saturating_mul(self.experts.slot_bytes).saturating_add(self.experts.staging_bytes);
        let spills = held_with_rows.saturating_add(wanted) > budget;
        let slots = self.experts.slots(budget, if spills { self.held } else { held_with_rows })?;
        Ok(Split { slots: Some(slots), spills })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn needs() -> Needs {
        let experts = ExpertMemory { slot_bytes: MIB, count: 640, least: 8, staging_bytes: 0 };
        Needs { held: 100 * MIB, rows: 50 * MIB, layer: 64, experts }
    }

    #[test]
    fn hidden_states_make_room_for_two_layers() {
        let split = |mib: u64| needs().split(Some(mib * MIB), true).unwrap();
        assert_eq!(split(1000), Split { slots: Some(640), spills: false });
        assert_eq!(split(294), Split { slots: Some(144), spills: false });
        assert_eq!(split(293), Split { slots: Some(193), spills: true });
        assert_eq!(split(108), Split { slots: Some(8), spills: true });
        assert!(needs().split(Some(107 * MIB), true).is_err());
    }

    #[test]
    fn a_model_in_memory_needs_no_slots() {
        let split = |mib: Option<u64>| needs().split(mib.map(|mib| mib * MIB), false);
        assert_eq!(split(None).unwrap(), Split { slots: None, spills: false });
        assert_eq!(split(Some(150)).unwrap(), Split { slots: None, spills: false });
        assert_eq!(split(Some(149)).unwrap(), Split { slots: None, spills: true });
        assert!(split(Some(99)).is_err());
    }
}
