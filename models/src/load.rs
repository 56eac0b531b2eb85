//! From a checkpoint to a model: every weight read once, and packed as it is read, unless it is packed already.

use cadre_engine::{compute::Compute, model::Model};

use crate::{
    Error, Result,
    checkpoint::Checkpoint,
    formats::{FormatOptions, Formats},
    registry,
    weights::{LoadProgress, Loader},
};

/// A model that can compute.
pub struct LoadedModel {
    /// The model.
    pub model: Box<dyn Model>,
    /// What its weights are packed as.
    pub formats: Formats,
}

/// Reads all weights, and packs them if they aren't yet, on the pool of `compute`; `on_bytes` is told, from several
/// threads, how far it is.
///
/// # Errors
/// When a tensor is missing, left over, of another shape than the configuration asks for, or cannot be read; when a
/// format is asked for and the checkpoint is a pack.
pub fn load(
    checkpoint: &Checkpoint,
    options: &FormatOptions,
    compute: &Compute,
    on_bytes: &(dyn Fn(LoadProgress) + Sync),
) -> Result<LoadedModel> {
    let architecture = registry::find(checkpoint.config())?;
    let tensors = checkpoint.tensors()?;
    let formats = match tensors.pack() {
        None => options.resolve(tensors.main_type()),
        Some(pack) if options.is_auto() => pack.formats,
        Some(pack) => {
            let (asked, found) = (options.to_string(), pack.formats.to_string());
            return Err(Error::PackFormat { checkpoint: checkpoint.name().to_owned(), asked, found });
        }
    };
    let loader = Loader::new(&tensors, compute, formats, on_bytes);
    let model = (architecture.build)(checkpoint.config(), &loader.root())?;
    loader.finish()?;
    Ok(LoadedModel { model: Box::new(model), formats })
}

#[cfg(test)]
mod tests;
