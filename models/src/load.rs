//! From a checkpoint to a model: every weight read once, and packed as it is read, unless it is packed already.

use cadre_engine::{compute::Compute, nn::Decoder};

use crate::{
    Error, Result,
    checkpoint::Checkpoint,
    formats::{FormatOptions, Formats},
    registry,
    stored_experts::{Io, LeftOnDisk, UnopenedExperts},
    tensors::TensorSet,
    weights::{LoadProgress, Loader},
};

/// A model that can compute.
pub struct LoadedModel {
    /// The model.
    pub decoder: Decoder,
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
/// checkpoint is a pack in other formats than those asked for; when `CADRE_IO` is no way of reading.
pub fn load(
    checkpoint: &Checkpoint,
    options: &FormatOptions,
    placement: Placement,
    compute: &Compute,
    on_bytes: &(dyn Fn(LoadProgress) + Sync),
) -> Result<LoadedModel> {
    let io = Io::asked()?;
    let tensors = checkpoint.tensors()?;
    let formats = formats(checkpoint, &tensors, options)?;
    let loader = Loader::new(&tensors, compute, formats, on_bytes);
    let (decoder, left) = build(checkpoint, loader, placement)?;
    let experts = left.map(|left| left.unopened(tensors, io));
    Ok(LoadedModel { decoder, formats, experts })
}

/// A model as [`load`] would load it, but all its matrices are zeros that take no memory.
pub struct Outline {
    /// The model: for its sizes.
    pub decoder: Decoder,
    /// What its weights would be packed as.
    pub formats: Formats,
    /// The routed experts, if they would be left on disk.
    pub experts: Option<UnopenedExperts>,
}

/// What [`load`] would make of the same arguments, from the headers alone.
///
/// # Errors
/// As [`load`], but for those of reading matrices.
pub fn outline(
    checkpoint: &Checkpoint,
    options: &FormatOptions,
    placement: Placement,
    compute: &Compute,
) -> Result<Outline> {
    let io = Io::asked()?;
    let tensors = checkpoint.tensors()?;
    let formats = formats(checkpoint, &tensors, options)?;
    let loader = Loader::new(&tensors, compute, formats, &|_| {}).outlining();
    let (decoder, left) = build(checkpoint, loader, placement)?;
    let experts = left.map(|left| left.unopened(tensors, io));
    Ok(Outline { decoder, formats, experts })
}

/// The formats that the weights get.
fn formats(checkpoint: &Checkpoint, tensors: &TensorSet, options: &FormatOptions) -> Result<Formats> {
    match tensors.pack() {
        None => Ok(options.resolve(tensors.main_type())),
        Some(pack) if is_as_asked(pack.formats, options) => Ok(pack.formats),
        Some(pack) => {
            let (asked, found) = (options.to_string(), pack.formats.to_string());
            Err(Error::PackFormat { checkpoint: checkpoint.name().to_owned(), asked, found })
        }
    }
}

/// The model that `loader` gives, and the experts that it left where they are.
fn build(
    checkpoint: &Checkpoint,
    mut loader: Loader<'_>,
    placement: Placement,
) -> Result<(Decoder, Option<LeftOnDisk>)> {
    let architecture = registry::find(checkpoint.config())?;
    if placement == Placement::Stored {
        loader = loader.leaving_experts();
    }
    let decoder = (architecture.build)(checkpoint.config(), &loader.root())?;
    loader.finish()?;
    Ok((decoder, loader.take_left()))
}

/// Whether a pack in `formats` has all that `options` ask for.
fn is_as_asked(formats: Formats, options: &FormatOptions) -> bool {
    let experts = options.experts.or(options.format).unwrap_or(formats.experts);
    let dense = options.dense.or(options.format).unwrap_or(formats.dense);
    (experts, dense) == (formats.experts, formats.dense)
}

#[cfg(test)]
mod tests;
