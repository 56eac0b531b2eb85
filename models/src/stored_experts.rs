//! A pack's experts for the expert store: where each lies, and how it is read.

mod io;
mod pack;
#[cfg(test)]
mod tests;
#[cfg(target_os = "linux")]
mod uring;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cadre_engine::{
    experts::{ExpertStore, StoredExperts},
    nn::FfnLayout,
};

pub(crate) use self::io::Io;
use self::pack::{Layer, Pack};
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

impl LeftInPack {
    /// Leaves the next layer's experts there; `tensors` are their numbers.
    pub(crate) fn leave(&self, tensors: Vec<usize>, layout: FfnLayout) -> StoredExperts {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        let experts = StoredExperts::new(layers.len(), tensors.len(), layout, Arc::clone(&self.store));
        layers.push(Layer { tensors, layout });
        experts
    }

    /// What the store is opened with; `io`: the way of reading that was asked for.
    pub(crate) fn unopened(self, tensors: TensorSet, io: Option<Io>) -> UnopenedExperts {
        let layers = self.layers.into_inner().unwrap_or_else(PoisonError::into_inner);
        UnopenedExperts { pack: Pack { name: tensors.describe(), tensors, layers }, io, store: self.store }
    }
}

/// Experts that a load left in the pack; the model can't compute before they are opened.
pub struct UnopenedExperts {
    pack: Pack,
    io: Option<Io>,
    store: Arc<OnceLock<ExpertStore>>,
}

impl UnopenedExperts {
    /// Bytes of a slot: those of the largest expert, with its padding.
    #[must_use]
    pub fn slot_bytes(&self) -> usize {
        let bytes = |layer: &Layer| PackedLayout::Expert(layer.layout).bytes();
        self.pack.layers.iter().map(bytes).max().map_or(0, |bytes| bytes as usize)
    }

    /// How many experts there are, in all layers together.
    #[must_use]
    pub fn count(&self) -> usize {
        self.pack.layers.iter().map(|layer| layer.tensors.len()).sum()
    }

    /// Opens the store with `slots` slots, at least one; no expert is read yet.
    ///
    /// # Errors
    /// When the memory can't be had, or the way of reading that `CADRE_IO` asks for.
    pub fn open(self, slots: usize) -> Result<ExpertStore> {
        let slot_bytes = self.slot_bytes();
        let experts: Vec<usize> = self.pack.layers.iter().map(|layer| layer.tensors.len()).collect();
        let store = ExpertStore::new(self.pack.open(self.io)?, slots, slot_bytes, &experts);
        let store = store.map_err(cadre_engine::Error::from)?;
        // The cell is this load's own: nobody else has filled it.
        Ok(self.store.get_or_init(|| store).clone())
    }
}
