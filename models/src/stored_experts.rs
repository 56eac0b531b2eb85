//! A pack's experts for the expert store: where each lies, and how it is read.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cadre_engine::{
    experts::{ExpertId, ExpertStore, FetchError, StoredExperts, Tier},
    nn::FfnLayout,
};

use crate::{
    Result,
    tensors::{PackedLayout, TensorSet},
};

/// The experts that a load left in the pack, layer by layer.
#[derive(Default)]
pub(crate) struct LeftInPack {
    store: Arc<OnceLock<ExpertStore>>,
    layers: Mutex<Vec<Layer>>,
}

/// One layer's experts.
struct Layer {
    /// The number of each one's tensor.
    tensors: Vec<usize>,
    layout: FfnLayout,
}

impl LeftInPack {
    /// Leaves the next layer's experts there; `tensors` are their numbers.
    pub(crate) fn leave(&self, tensors: Vec<usize>, layout: FfnLayout) -> StoredExperts {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        let experts = StoredExperts::new(layers.len(), tensors.len(), layout, Arc::clone(&self.store));
        layers.push(Layer { tensors, layout });
        experts
    }

    /// What the store is opened with.
    pub(crate) fn unopened(self, tensors: TensorSet) -> UnopenedExperts {
        let layers = self.layers.into_inner().unwrap_or_else(PoisonError::into_inner);
        UnopenedExperts { tier: PackTier { name: tensors.describe(), tensors, layers }, store: self.store }
    }
}

/// Experts that a load left in the pack; the model can't compute before they are opened.
pub struct UnopenedExperts {
    tier: PackTier,
    store: Arc<OnceLock<ExpertStore>>,
}

impl UnopenedExperts {
    /// Bytes of a slot: those of the largest expert, with its padding.
    #[must_use]
    pub fn slot_bytes(&self) -> usize {
        let bytes = |layer: &Layer| PackedLayout::Expert(layer.layout).bytes();
        self.tier.layers.iter().map(bytes).max().map_or(0, |bytes| bytes as usize)
    }

    /// How many experts there are, in all layers together.
    #[must_use]
    pub fn count(&self) -> usize {
        self.tier.layers.iter().map(|layer| layer.tensors.len()).sum()
    }

    /// Opens the store with `slots` slots, at least one; no expert is read yet.
    ///
    /// # Errors
    /// When the memory can't be had.
    pub fn open(mut self, slots: usize) -> Result<ExpertStore> {
        let slot_bytes = self.slot_bytes();
        let experts: Vec<usize> = self.tier.layers.iter().map(|layer| layer.tensors.len()).collect();
        self.tier.tensors.bypass_page_cache();
        let store = ExpertStore::new(Box::new(self.tier), slots, slot_bytes, &experts);
        let store = store.map_err(cadre_engine::Error::from)?;
        // The cell is this load's own: nobody else has filled it.
        Ok(self.store.get_or_init(|| store).clone())
    }
}

/// A pack on disk.
struct PackTier {
    name: String,
    tensors: TensorSet,
    layers: Vec<Layer>,
}

impl Tier for PackTier {
    fn name(&self) -> &str {
        &self.name
    }

    fn fetch(&self, id: ExpertId, out: &mut [u8]) -> Result<usize, FetchError> {
        let failed = |reason: String| FetchError { id, tier: self.name.clone(), reason };
        let layer = self.layers.get(id.layer as usize).ok_or_else(|| failed("there is no such layer".to_owned()))?;
        let tensor = layer.tensors.get(id.expert as usize).ok_or_else(|| failed("there is no such one".to_owned()))?;
        let bytes = PackedLayout::Expert(layer.layout).bytes() as usize;
        let room = out.len();
        let out = out.get_mut(..bytes).ok_or_else(|| failed(format!("it has {bytes} bytes, its slot {room}")))?;
        self.tensors.read_direct(*tensor, out).map_err(|error| failed(error.to_string()))?;
        let data = &out[..PackedLayout::Expert(layer.layout).data_bytes() as usize];
        let (expected, found) = (self.tensors.info(*tensor).checksum, crc32fast::hash(data));
        if expected == Some(found) {
            return Ok(bytes);
        }
        let file = self.tensors.label(*tensor);
        Err(failed(format!(
            "{file} is damaged: expected checksum {:08x}, found {found:08x}; remove it and run `cadre pack` again",
            expected.unwrap_or(0)
        )))
    }
}
