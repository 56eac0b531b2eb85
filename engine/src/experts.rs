//! The expert store: a model's experts within a budget of memory. A [`Tier`] holds all of them; slots in memory hold
//! those that are used; the cache decides which. A step visits a layer with the experts that its tokens chose: those
//! that lie in slots compute while the others are read. Results don't depend on what lay where.

mod cache;
mod counters;
mod store;
#[cfg(test)]
mod tests;
mod threads;
mod tier;
mod visit;

use std::sync::{Arc, OnceLock};

pub use cache::{ExpertId, Lane, LayerCounters, SlotCache};
pub use cadre_kernels::buffer::Buffer;
pub use counters::{ACTIVE_PER_STEP, Bucket, FETCH_SECONDS, Histogram, StoreCounters};
pub use store::ExpertStore;
pub use threads::{BlockingTier, Threads};
pub use tier::{Fetch, FetchError, Tier};
pub use visit::Visit;

use crate::{
    Error, Result,
    nn::{ExpertModules, FfnLayout, expert_bytes},
};

/// The experts of one layer that lie in a store. The store itself comes when all layers are known.
#[derive(Clone)]
pub struct StoredExperts {
    layer: usize,
    count: usize,
    layout: FfnLayout,
    modules: Arc<Vec<ExpertModules>>,
    store: Arc<OnceLock<ExpertStore>>,
}

impl StoredExperts {
    /// `count` experts of layer `layer`, counted among the layers in the store, which `store` will hold.
    #[must_use]
    pub fn new(layer: usize, count: usize, layout: FfnLayout, store: Arc<OnceLock<ExpertStore>>) -> Self {
        Self { layer, count, layout, modules: Arc::default(), store }
    }

    /// The same experts, which know the modules that they come from, expert after expert.
    #[must_use]
    pub fn of_modules(self, modules: Vec<ExpertModules>) -> Self {
        Self { modules: Arc::new(modules), ..self }
    }

    /// The modules that they come from.
    #[must_use]
    pub fn modules(&self) -> &[ExpertModules] {
        &self.modules
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Their sizes.
    #[must_use]
    pub fn layout(&self) -> FfnLayout {
        self.layout
    }

    /// Bytes of all.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.count * expert_bytes(&self.layout)
    }

    /// The store, if it wants to know which of this layer's experts will likely be used; and which of its layers this is.
    pub(crate) fn predicting(&self) -> Option<(&ExpertStore, usize)> {
        self.place().ok().filter(|(store, _)| store.predicts())
    }

    /// The store, and which of its layers this is.
    pub(crate) fn place(&self) -> Result<(&ExpertStore, usize)> {
        let store = self.store.get();
        store.map(|store| (store, self.layer)).ok_or_else(|| Error::Config("the expert store was not opened".into()))
    }
}

impl std::fmt::Debug for StoredExperts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoredExperts").field("layer", &self.layer).field("count", &self.count).finish_non_exhaustive()
    }
}
