//! The experts that a load left on disk, for the expert store: where each lies, and how it is read.

mod io;
mod pack;
mod plain;
#[cfg(test)]
mod tests;
#[cfg(target_os = "linux")]
mod uring;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cadre_engine::{
    experts::{ExpertStore, StoredExperts, Threads, Tier},
    nn::FfnLayout,
};

pub(crate) use self::io::Io;
use self::{pack::Pack, plain::Plain};
use crate::{
    Error, Result,
    tensors::{PackedLayout, TensorSet},
};

/// Threads that read: of 1 to 8 as fast as any while the cores compute (docs/performance.md).
const THREADS: usize = 4;

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

    /// What the store is opened with; `io`: the way of reading a pack that was asked for.
    pub(crate) fn unopened(self, tensors: TensorSet, io: Option<Io>) -> UnopenedExperts {
        let layers = self.layers.into_inner().unwrap_or_else(PoisonError::into_inner);
        UnopenedExperts { tensors, layers, io, predicting: false, store: self.store }
    }
}

/// Experts that a load left on disk; the model can't compute before they are opened.
pub struct UnopenedExperts {
    tensors: TensorSet,
    layers: Vec<Layer>,
    io: Option<Io>,
    predicting: bool,
    store: Arc<OnceLock<ExpertStore>>,
}

/// What it takes to read an expert of a checkpoint that isn't packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conversion {
    /// Bytes read for the largest expert.
    pub read_bytes: usize,
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
            staging_bytes: plain::staging_bytes(&self.tensors, &self.layers),
        })
    }

    /// The same with a store that is told which experts the next layer will likely use, or isn't.
    #[must_use]
    pub fn predicting(self, predicting: bool) -> Self {
        Self { predicting, ..self }
    }

    /// Opens the store with `slots` slots, at least one; no expert is read yet.
    ///
    /// # Errors
    /// When the memory can't be had, or the way of reading that `CADRE_IO` asks for.
    pub fn open(mut self, slots: usize) -> Result<ExpertStore> {
        let slot_bytes = self.slot_bytes();
        let experts: Vec<usize> = self.layers.iter().map(|layer| layer.experts.len()).collect();
        self.tensors.bypass_page_cache();
        let name = self.tensors.describe();
        let tier: Box<dyn Tier> = if self.tensors.pack().is_some() {
            Pack { name, tensors: self.tensors, layers: self.layers }.open(self.io)?
        } else {
            let failed = |reason| Error::Read { file: name.clone(), reason };
            let plain = Plain::new(name.clone(), self.tensors, self.layers)?;
            Box::new(Threads::start(plain, THREADS).map_err(failed)?)
        };
        let store = ExpertStore::new(tier, slots, slot_bytes, &experts);
        let store = store.map_err(cadre_engine::Error::from)?.predicting(self.predicting);
        // The cell is this load's own: nobody else has filled it.
        Ok(self.store.get_or_init(|| store).clone())
    }
}
