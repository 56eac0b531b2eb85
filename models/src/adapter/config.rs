//! adapter_config.json, as PEFT 0.21 writes it.

use std::collections::{BTreeMap, BTreeSet};

use cadre_engine::train::places::{Place, PlaceInfo};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{At, Entry, LoraOptions, Part};
use crate::{Error, Result, json, targets::last};

/// The fields of adapter_config.json that say what an adapter is. Those that only PEFT's own training needs are left to
/// its defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AdapterConfig {
    /// Always `LORA`.
    pub peft_type: String,
    /// Always `CAUSAL_LM`.
    pub task_type: Option<String>,
    /// The model that it was trained on.
    pub base_model_name_or_path: Option<String>,
    /// The rank.
    pub r: usize,
    /// The product is multiplied with `lora_alpha / r`, or `lora_alpha / √r`.
    pub lora_alpha: f64,
    /// Which of the two.
    #[serde(default)]
    pub use_rslora: bool,
    /// Dropout in training.
    #[serde(default)]
    pub lora_dropout: f64,
    /// The modules with adapters.
    #[serde(default)]
    pub target_modules: Option<Targets>,
    /// The parameters with adapters that are no module's weight in transformers: stacked experts, routers.
    #[serde(default)]
    pub target_parameters: Option<Vec<String>>,
    /// Ranks of modules that have another one.
    #[serde(default)]
    pub rank_pattern: BTreeMap<String, usize>,
    /// Alphas of modules that have another one.
    #[serde(default)]
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Always `none`.
    #[serde(default = "none")]
    pub bias: String,
    /// Always false.
    #[serde(default)]
    pub fan_in_fan_out: bool,
    /// PEFT freezes an adapter that is loaded with it.
    #[serde(default)]
    pub inference_mode: bool,
}

/// `target_modules`: a list, or one pattern.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Targets {
    /// Names, or their ends.
    Names(Vec<String>),
    /// A regular expression, or `all-linear`. What it matches is what the file has.
    Pattern(String),
}

fn none() -> String {
    "none".to_owned()
}

impl AdapterConfig {
    /// What PEFT is told of new adapters.
    pub(super) fn describe(base_model: &str, options: &LoraOptions, places: &[PlaceInfo], entries: &[Entry]) -> Self {
        let (mut modules, mut parameters) = (BTreeSet::new(), BTreeSet::new());
        for entry in entries {
            match &entry.at {
                At::Stack { part, .. } => parameters.insert(part.target()),
                // transformers has no module of a router's weight.
                At::Module(name) if matches!(entry.place, Place::Router { .. }) => {
                    parameters.insert(format!("{}.weight", last_two(name)))
                }
                At::Module(name) => modules.insert(name.as_str()),
            };
        }
        Self {
            peft_type: "LORA".to_owned(),
            task_type: Some("CAUSAL_LM".to_owned()),
            base_model_name_or_path: Some(base_model.to_owned()),
            r: options.rank,
            lora_alpha: options.alpha,
            use_rslora: options.rslora,
            lora_dropout: options.dropout,
            target_modules: Some(Targets::Names(shortest(&modules, places, entries))),
            target_parameters: (!parameters.is_empty()).then(|| parameters.into_iter().collect()),
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            bias: none(),
            fan_in_fan_out: false,
            inference_mode: true,
        }
    }

    /// Reads it; `file` names it in messages.
    pub(super) fn parse(file: &str, bytes: &[u8]) -> Result<Self> {
        let value = Value::Object(json::object(file, bytes)?);
        let refuse = |field: &str, expected: &str| match value.get(field) {
            None | Some(Value::Null | Value::Bool(false)) => Ok(()),
            Some(found) => Err(Error::field(file, field, expected, found)),
        };
        for field in ["modules_to_save", "use_dora", "use_qalora", "use_bdlora", "layer_replication", "lora_bias"] {
            refuse(field, "nothing: cadre adapts with plain LoRA")?;
        }
        refuse("trainable_token_indices", "nothing: cadre adapts with plain LoRA")?;
        let config: Self = serde_json::from_value(value)
            .map_err(|error| Error::Json { file: file.to_owned(), detail: error.to_string() })?;
        let is = |field: &str, expected: &str, found: &str| {
            if expected.eq_ignore_ascii_case(found) { Ok(()) } else { Err(Error::field(file, field, expected, found)) }
        };
        is("peft_type", "LORA", &config.peft_type)?;
        is("bias", "none", &config.bias)?;
        is("fan_in_fan_out", "false", &config.fan_in_fan_out.to_string())?;
        if config.r == 0 {
            return Err(Error::field(file, "r", "at least 1", 0));
        }
        Ok(config)
    }

    /// What the product of an adapter of this rank is multiplied with; `name` is its module's or parameter's.
    pub(super) fn scale(&self, name: &str, rank: usize) -> f32 {
        // PEFT takes a pattern as the end of a name.
        let pattern = self.alpha_pattern.iter().find(|(pattern, _)| {
            let end = pattern.trim_start_matches(".*").trim_start_matches('^');
            name == end || name.ends_with(&format!(".{}", end.trim_start_matches('.')))
        });
        let alpha = pattern.map_or(self.lora_alpha, |(_, alpha)| *alpha);
        (alpha / if self.use_rslora { (rank as f64).sqrt() } else { rank as f64 }) as f32
    }

    /// Whether the stacked experts' `part` has adapters.
    pub(super) fn stacks(&self, part: Part) -> bool {
        let target = part.target();
        let targets = self.target_parameters.iter().flatten();
        targets.into_iter().any(|found| {
            *found == target || target.ends_with(&format!(".{found}")) || found.ends_with(&format!(".{target}"))
        })
    }
}

fn last_two(name: &str) -> &str {
    let start = name.rmatch_indices('.').nth(1).map_or(0, |(index, _)| index + 1);
    &name[start..]
}

/// The modules by their last components, if these match no other module of the model; else by their full names. Experts
/// in a stack are no modules.
fn shortest(modules: &BTreeSet<&str>, places: &[PlaceInfo], entries: &[Entry]) -> Vec<String> {
    let stacked = entries.iter().any(|entry| matches!(entry.at, At::Stack { .. }));
    let is_module = |info: &&PlaceInfo| match info.place {
        Place::Router { .. } => false,
        Place::GateUp { .. } | Place::Down { .. } => !stacked,
        _ => true,
    };
    let short: BTreeSet<&str> = modules.iter().map(|name| last(name)).collect();
    let all = places.iter().filter(is_module).flat_map(|info| &info.modules);
    let mut others = all.filter(|module| !modules.contains(module.name.as_str()));
    if others.any(|module| short.contains(last(&module.name))) {
        modules.iter().map(|name| (*name).to_owned()).collect()
    } else {
        short.into_iter().map(str::to_owned).collect()
    }
}
