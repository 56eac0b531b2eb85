//! From a checkpoint to a model: every weight read once, and packed as it is read.

use cadre_engine::{compute::Compute, model::Model, nn::Format};

use crate::{
    Result,
    checkpoint::Checkpoint,
    registry,
    tensors::StoredType,
    weights::{LoadProgress, Loader},
};

/// What weights are computed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dtype {
    /// What loses nothing: bf16 checkpoints stay bf16, f32 and f16 ones are computed in f32.
    #[default]
    Auto,
    /// f32.
    F32,
    /// bf16; rounds other checkpoints' weights.
    Bf16,
}

/// A model that can compute.
pub struct LoadedModel {
    /// The model.
    pub model: Box<dyn Model>,
    /// What its weights are packed as.
    pub format: Format,
}

/// Reads and packs all weights on the pool of `compute`; `on_bytes` is told, from several threads, how far it is.
///
/// # Errors
/// When a tensor is missing, left over, of another shape than the configuration asks for, or cannot be read.
pub fn load(
    checkpoint: &Checkpoint,
    dtype: Dtype,
    compute: &Compute,
    on_bytes: &(dyn Fn(LoadProgress) + Sync),
) -> Result<LoadedModel> {
    let architecture = registry::find(checkpoint.config())?;
    let tensors = checkpoint.tensors()?;
    let format = match (dtype, tensors.main_type()) {
        (Dtype::Bf16, _) | (Dtype::Auto, StoredType::Bf16) => Format::Bf16,
        (Dtype::F32, _) | (Dtype::Auto, StoredType::F32 | StoredType::F16) => Format::F32,
    };
    let loader = Loader::new(&tensors, compute, format, on_bytes);
    let model = (architecture.build)(checkpoint.config(), &loader.root())?;
    loader.finish()?;
    Ok(LoadedModel { model: Box::new(model), format })
}

#[cfg(test)]
mod tests;
