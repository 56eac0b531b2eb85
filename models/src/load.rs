//! From a checkpoint to a model: every weight read once, and packed as it is read, unless it is packed already.

use cadre_engine::{compute::Compute, model::Model};

use crate::{
    Error, Result,
    checkpoint::Checkpoint,
    formats::{FormatOptions, Formats},
    registry,
    stored_experts::UnopenedExperts,
    weights::{LoadProgress, Loader},
};

/// A model that can compute.
pub struct LoadedModel {
    /// The model.
    pub model: Box<dyn Model>,
    /// What its weights are packed as.
    pub formats: Formats,
    /// The routed experts, if they were left on disk: to be opened before the model computes.
    pub experts: Option<UnopenedExperts>,
}

/// Where a model's routed experts go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// Into memory, all of them.
    Resident,
    /// Nowhere yet: they stay on disk, for the expert store to read.
    Stored,
}

/// Reads all weights, and packs them if they aren't yet, on the pool of `compute`; `on_bytes` is told, from several
/// threads, how far it is. Experts that `placement` leaves on disk are only looked up.
///
/// # Errors
/// When a tensor is missing, left over, of another shape than the configuration asks for, or cannot be read; when the
/// checkpoint is a pack in other formats than those asked for.
pub fn load(
    checkpoint: &Checkpoint,
    options: &FormatOptions,
    placement: Placement,
    compute: &Compute,
    on_bytes: &(dyn Fn(LoadProgress) + Sync),
) -> Result<LoadedModel> {
    let architecture = registry::find(checkpoint.config())?;
    let tensors = checkpoint.tensors()?;
    let formats = match tensors.pack() {
        None => options.resolve(tensors.main_type()),
        Some(pack) if is_as_asked(pack.formats, options) => pack.formats,
        Some(pack) => {
            let (asked, found) = (options.to_string(), pack.formats.to_string());
            return Err(Error::PackFormat { checkpoint: checkpoint.name().to_owned(), asked, found });
        }
    };
    let mut loader = Loader::new(&tensors, compute, formats, on_bytes);
    if placement == Placement::Stored {
        loader = loader.leaving_experts();
    }
    let model = (architecture.build)(checkpoint.config(), &loader.root())?;
    loader.finish()?;
    let left = loader.take_left();
    Ok(LoadedModel { model: Box::new(model), formats, experts: left.map(|left| left.unopened(tensors)) })
}

/// Whether a pack in `formats` has all that `options` ask for.
fn is_as_asked(formats: Formats, options: &FormatOptions) -> bool {
    let experts = options.experts.or(options.format).unwrap_or(formats.experts);
    let dense = options.dense.or(options.format).unwrap_or(formats.dense);
    (experts, dense) == (formats.experts, formats.dense)
}

#[cfg(test)]
mod tests;
