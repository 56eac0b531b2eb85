//! The routing profile of a run whose experts lie in the store: what earlier runs used tells what to keep in memory.

use cadre_engine::experts::ExpertStore;
use cadre_models::{Checkpoint, RoutingProfile};

/// A store, and the file that keeps its profile.
pub struct KeptProfile {
    store: ExpertStore,
    file: RoutingProfile,
}

impl KeptProfile {
    /// Seeds the store with what was kept of earlier runs. What can't be used is said and does no harm.
    pub fn open(store: &ExpertStore, checkpoint: &Checkpoint) -> Option<Self> {
        let file = checkpoint.routing_profile().unwrap_or_else(|error| {
            tracing::warn!(%error, "the routing of this run won't be kept");
            None
        })?;
        match file.read() {
            Ok(None) => {}
            Ok(Some(uses)) => match store.seed(&uses) {
                Ok(()) => tracing::info!("the experts' uses in earlier runs are known"),
                Err(error) => tracing::warn!(%error, "the routing profile is of another model: it is ignored"),
            },
            Err(error) => tracing::warn!(%error, "the routing profile is ignored"),
        }
        Some(Self { store: store.clone(), file })
    }

    /// Keeps the profile for the next run. Where nothing can be written, nothing is kept.
    pub fn keep(&self) {
        let uses = self.store.profile();
        if uses.iter().flatten().all(|&uses| uses == 0) {
            return;
        }
        if let Err(error) = self.file.write(uses) {
            tracing::info!(%error, "the routing profile isn't kept");
        }
    }
}
