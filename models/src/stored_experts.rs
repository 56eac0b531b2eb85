//! The experts that a load left on disk, for the expert store: where each lies, and how it is read.

mod plain;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cadre_engine::{
    experts::{ExpertId, ExpertStore, FetchError, StoredExperts, Tier},
    nn::FfnLayout,
};

use crate::{
    Result,
    tensors::{PackedLayout, TensorSet},
};
use plain::PlainTier;

/// The experts that a load left there, layer by layer.
#[derive(Default)]
pub(crate) struct LeftOnDisk {
    store: Arc<OnceLock<ExpertStore>>,
    layers: Mutex<Vec<Layer>>,
}

/// One layer's experts.
struct Layer {
    experts: Vec<ExpertTensors>,
    layout: FfnLayout,
}

/// The numbers of one expert's tensors.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ExpertTensors {
    /// A pack has one.
    Packed(usize),
    /// Gate, up and down.
    Plain([usize; 3]),
}

impl ExpertTensors {
    /// All of them.
    pub(crate) fn all(&self) -> &[usize] {
        match self {
            Self::Packed(tensor) => std::slice::from_ref(tensor),
            Self::Plain(tensors) => tensors,
        }
    }
}

impl LeftOnDisk {
    /// Leaves the next layer's experts there.
    pub(crate) fn leave(&self, experts: Vec<ExpertTensors>, layout: FfnLayout) -> StoredExperts {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        let stored = StoredExperts::new(layers.len(), experts.len(), layout, Arc::clone(&self.store));
        layers.push(Layer { experts, layout });
        stored
    }

    /// What the store is opened with.
    pub(crate) fn unopened(self, tensors: TensorSet) -> UnopenedExperts {
        let layers = self.layers.into_inner().unwrap_or_else(PoisonError::into_inner);
        UnopenedExperts { tensors, layers, store: self.store }
    }
}

/// Experts that a load left on disk; the model can't compute before they are opened.
pub struct UnopenedExperts {
    tensors: TensorSet,
    layers: Vec<Layer>,
    store: Arc<OnceLock<ExpertStore>>,
}

/// What it takes to read an expert of a checkpoint that isn't packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conversion {
    /// Bytes read for the largest expert.
    pub read_bytes: usize,
    /// Bytes that a pack in the same format would have of it.
    pub packed_bytes: usize,
    /// Memory that experts take between disk and slot.
    pub staging_bytes: usize,
}

impl UnopenedExperts {
    /// Bytes of a slot: those of the largest expert, with its padding.
    #[must_use]
    pub fn slot_bytes(&self) -> usize {
        let bytes = |layer: &Layer| PackedLayout::Expert(layer.layout).bytes();
        self.layers.iter().map(bytes).max().map_or(0, |bytes| bytes as usize)
    }

    /// How many experts there are, in all layers together.
    #[must_use]
    pub fn count(&self) -> usize {
        self.layers.iter().map(|layer| layer.experts.len()).sum()
    }

    /// How they are converted when they are read; `None` for those of a pack, which aren't.
    #[must_use]
    pub fn conversion(&self) -> Option<Conversion> {
        if self.tensors.pack().is_some() {
            return None;
        }
        Some(Conversion {
            read_bytes: plain::read_bytes(&self.tensors, &self.layers),
            packed_bytes: self.slot_bytes(),
            staging_bytes: plain::staging_bytes(&self.tensors, &self.layers),
        })
    }

    /// Opens the store with `slots` slots, at least one; no expert is read yet.
    ///
    /// # Errors
    /// When the memory can't be had.
    pub fn open(mut self, slots: usize) -> Result<ExpertStore> {
        let slot_bytes = self.slot_bytes();
        let experts: Vec<usize> = self.layers.iter().map(|layer| layer.experts.len()).collect();
        self.tensors.bypass_page_cache();
        let tier: Box<dyn Tier> = if self.tensors.pack().is_some() {
            Box::new(PackTier { name: self.tensors.describe(), tensors: self.tensors, layers: self.layers })
        } else {
            Box::new(PlainTier::new(self.tensors, self.layers)?)
        };
        let store = ExpertStore::new(tier, slots, slot_bytes, &experts);
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
        let Some(ExpertTensors::Packed(tensor)) = layer.experts.get(id.expert as usize) else {
            return Err(failed("there is no such one".to_owned()));
        };
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
