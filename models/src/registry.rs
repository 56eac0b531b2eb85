//! The one table of architectures.

use cadre_engine::nn::Decoder;

use crate::{Error, Result, bailing_moe, bailing_moe_v2, config::ConfigFile, olmoe, qwen3_moe, weights::Weights};

/// Assembles a model from its configuration and tensors.
pub(crate) type Build = fn(&ConfigFile, &Weights<'_>) -> Result<Decoder>;

/// config.json's `model_type`, the class that its `architectures` names, and what builds it.
const ARCHITECTURES: &[(&str, &str, Build)] = &[
    ("bailing_moe", "BailingMoeForCausalLM", bailing_moe::build),
    ("bailing_moe_v2", "BailingMoeV2ForCausalLM", bailing_moe_v2::build),
    ("olmoe", "OlmoeForCausalLM", olmoe::build),
    ("qwen3_moe", "Qwen3MoeForCausalLM", qwen3_moe::build),
];

/// The names of all supported architectures.
pub fn architectures() -> impl Iterator<Item = &'static str> {
    ARCHITECTURES.iter().map(|(name, ..)| *name)
}

/// What builds the architecture that `config` names. The class decides before `model_type`: some of the hub's Ling 2.0
/// configurations have the first generation's `model_type`.
pub(crate) fn find(config: &ConfigFile) -> Result<Build> {
    let classes = config.get("architectures").and_then(|classes| classes.as_array());
    let by_class = |class: &str| classes.is_some_and(|classes| classes.iter().any(|found| found == class));
    let found = config.model_type()?;
    let row = ARCHITECTURES
        .iter()
        .find(|(_, class, _)| by_class(class))
        .or_else(|| ARCHITECTURES.iter().find(|(name, ..)| *name == found));
    row.map(|(.., build)| *build).ok_or_else(|| Error::UnknownArchitecture {
        file: config.label().to_owned(),
        found: found.to_owned(),
        known: architectures().collect::<Vec<_>>().join(", "),
    })
}
