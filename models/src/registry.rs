//! The one table of architectures.

use cadre_engine::nn::Decoder;

use crate::{Error, Result, bailing_moe, bailing_moe_v2, config::ConfigFile, olmoe, qwen3_moe, weights::Weights};

/// One architecture.
pub(crate) struct Architecture {
    /// config.json's `model_type`.
    pub model_type: &'static str,
    /// The class that config.json's `architectures` names.
    class: &'static str,
    /// Another `model_type` that some of the hub's configurations of this class have.
    also: Option<&'static str>,
    /// transformers stacks the experts of a layer in one parameter.
    pub stacks_experts: bool,
    /// Assembles a model from its configuration and tensors.
    pub build: fn(&ConfigFile, &Weights<'_>) -> Result<Decoder>,
}

const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        model_type: "bailing_moe",
        class: "BailingMoeForCausalLM",
        also: None,
        stacks_experts: false,
        build: bailing_moe::build,
    },
    Architecture {
        model_type: "bailing_moe_v2",
        class: "BailingMoeV2ForCausalLM",
        also: Some("bailing_moe"),
        stacks_experts: false,
        build: bailing_moe_v2::build,
    },
    Architecture {
        model_type: "olmoe",
        class: "OlmoeForCausalLM",
        also: None,
        stacks_experts: true,
        build: olmoe::build,
    },
    Architecture {
        model_type: "qwen3_moe",
        class: "Qwen3MoeForCausalLM",
        also: None,
        stacks_experts: true,
        build: qwen3_moe::build,
    },
];

/// The names of all supported architectures.
pub fn architectures() -> impl Iterator<Item = &'static str> {
    ARCHITECTURES.iter().map(|row| row.model_type)
}

/// The architecture that `config` names by its `model_type`; the class decides where two share one.
pub(crate) fn find(config: &ConfigFile) -> Result<&'static Architecture> {
    let classes = config.get("architectures").and_then(|classes| classes.as_array());
    let by_class = |class: &str| classes.is_some_and(|classes| classes.iter().any(|found| found == class));
    let found = config.model_type()?;
    let row = ARCHITECTURES.iter().find(|row| row.also == Some(found) && by_class(row.class));
    row.or_else(|| ARCHITECTURES.iter().find(|row| row.model_type == found)).ok_or_else(|| Error::UnknownArchitecture {
        file: config.label().to_owned(),
        found: found.to_owned(),
        known: architectures().collect::<Vec<_>>().join(", "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Result<&'static str> {
        find(&ConfigFile::read("config.json".to_owned(), text.as_bytes())?).map(|row| row.model_type)
    }

    #[test]
    fn the_class_decides_where_two_share_a_model_type() {
        let class = r#""architectures": ["BailingMoeV2ForCausalLM"]"#;
        assert_eq!(found(&format!(r#"{{"model_type": "bailing_moe", {class}}}"#)).unwrap(), "bailing_moe_v2");
        assert_eq!(found(r#"{"model_type": "bailing_moe"}"#).unwrap(), "bailing_moe");
        assert_eq!(found(r#"{"model_type": "olmoe", "architectures": ["OfAFork"]}"#).unwrap(), "olmoe");
        assert!(found(&format!(r#"{{"model_type": "llama", {class}}}"#)).is_err());
    }
}
