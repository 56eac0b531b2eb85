//! The one table of architectures.

use cadre_engine::nn::Decoder;

use crate::{Error, Result, bailing_moe, bailing_moe_v2, config::ConfigFile, olmoe, qwen3_moe, weights::Weights};

/// Assembles a model from its configuration and tensors.
pub(crate) type Build = fn(&ConfigFile, &Weights<'_>) -> Result<Decoder>;

/// config.json's `model_type`, and what builds it.
const ARCHITECTURES: &[(&str, Build)] = &[
    ("bailing_moe", bailing_moe::build),
    ("bailing_moe_v2", bailing_moe_v2::build),
    ("olmoe", olmoe::build),
    ("qwen3_moe", qwen3_moe::build),
];

/// The names of all supported architectures.
pub fn architectures() -> impl Iterator<Item = &'static str> {
    ARCHITECTURES.iter().map(|(name, _)| *name)
}

/// What builds the architecture that `config` names.
pub(crate) fn find(config: &ConfigFile) -> Result<Build> {
    let found = config.model_type()?;
    let row = ARCHITECTURES.iter().find(|(name, _)| *name == found);
    row.map(|(_, build)| *build).ok_or_else(|| Error::UnknownArchitecture {
        file: config.label().to_owned(),
        found: found.to_owned(),
        known: architectures().collect::<Vec<_>>().join(", "),
    })
}
