//! A model that answers.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use cadre_engine::{adapter::LoadedAdapter, request::SamplingParams, runtime::RuntimeHandle};
use cadre_models::{ChatTemplate, Checkpoint, GenerationConfig, Tokenizer};

use super::EngineOptions;
use crate::{
    adapters::{AdapterError, Adapters, ServedAdapter},
    generation::{Backend, Machine, RoutedShape},
    metrics::Meters,
    score::pairs::Pairs,
};

/// A model that answers: what HTTP routes and the terminal need of it.
#[derive(Clone)]
pub struct Served {
    /// Its names, the first being the one that answers carry.
    pub names: Vec<String>,
    /// Where it came from.
    pub root: String,
    /// When it was ready, in seconds since 1970.
    pub created: u64,
    /// Takes requests.
    pub backend: Arc<dyn Backend>,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Messages to text.
    pub template: Option<ChatTemplate>,
    /// Pairs of texts to text.
    pub pairs: Pairs,
    /// How tokens are chosen when a request doesn't say.
    pub sampling: SamplingParams,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// Width of the logits.
    pub vocab_size: usize,
    /// The longest sequence.
    pub max_model_len: usize,
    /// Counts and times.
    pub meters: Arc<Meters>,
    /// How the experts of tokens are told, if requests may ask for them.
    pub routed: Option<RoutedShape>,
    /// The adapters that are served beside it.
    pub adapters: Arc<Adapters>,
    /// That which makes this model of the base model, if it isn't the base model itself.
    pub adapter: Option<Arc<LoadedAdapter>>,
}

impl Served {
    /// The base model with the adapter of this name, which is read if it isn't in memory; `None` if there is none.
    ///
    /// # Errors
    /// When it can't be read, or there is no memory for it.
    pub fn adapted(&self, name: &str) -> Result<Option<Self>, AdapterError> {
        let with = |(ServedAdapter { name, root, created }, adapter)| Self {
            names: vec![name],
            root,
            created,
            adapter: Some(adapter),
            ..self.clone()
        };
        Ok(self.adapters.get(name)?.map(with))
    }

    /// The name that answers carry.
    pub fn name(&self) -> &str {
        self.names.first().map_or("", String::as_str)
    }

    /// What a generation needs.
    pub fn machine(&self) -> Machine {
        Machine {
            backend: self.backend.clone(),
            tokenizer: self.tokenizer.clone(),
            meters: self.meters.clone(),
            routed: self.routed,
        }
    }

    pub(super) fn new(
        options: &EngineOptions,
        checkpoint: &Checkpoint,
        handle: RuntimeHandle,
        meters: Arc<Meters>,
        adapters: Arc<Adapters>,
    ) -> Result<Self> {
        let defaults = checkpoint.generation_config();
        let routed = options.return_routed_experts.then(|| RoutedShape::of(handle.info()));
        Ok(Self {
            routed: routed.transpose().context("--enable-return-routed-experts")?,
            names: served_names(options, checkpoint),
            root: options.model.clone().unwrap_or_else(|| checkpoint.name().to_owned()),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs()),
            tokenizer: checkpoint.tokenizer()?,
            template: checkpoint.chat_template()?,
            pairs: Pairs::new(&options.pairs, checkpoint)?,
            sampling: default_sampling(defaults),
            eos_token_ids: defaults.eos_token_ids.clone(),
            vocab_size: handle.info().vocab_size,
            max_model_len: handle.config().max_model_len,
            backend: Arc::new(handle),
            meters,
            adapters,
            adapter: None,
        })
    }
}

/// The names asked for; else the checkpoint's own, and what it was opened by.
pub fn served_names(options: &EngineOptions, checkpoint: &Checkpoint) -> Vec<String> {
    if !options.served_names.is_empty() {
        return options.served_names.clone();
    }
    let own = checkpoint.name().to_owned();
    let asked = options.model.clone().filter(|asked| *asked != own);
    std::iter::once(own).chain(asked).collect()
}

/// The checkpoint's own sampling; it is greedy if the checkpoint says that it doesn't sample.
fn default_sampling(config: &GenerationConfig) -> SamplingParams {
    let default = SamplingParams::default();
    let greedy = config.do_sample == Some(false);
    SamplingParams {
        temperature: if greedy { 0.0 } else { config.temperature.unwrap_or(default.temperature) },
        top_p: config.top_p.unwrap_or(default.top_p),
        top_k: config.top_k.unwrap_or(default.top_k),
        min_p: config.min_p.unwrap_or(default.min_p),
        repetition_penalty: config.repetition_penalty.unwrap_or(default.repetition_penalty),
        ..default
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_that_do_not_sample_are_greedy() {
        let config = GenerationConfig { do_sample: Some(false), temperature: Some(0.7), ..GenerationConfig::default() };
        assert_eq!(default_sampling(&config).temperature, 0.0);
        let config = GenerationConfig { temperature: Some(0.7), top_k: Some(20), ..GenerationConfig::default() };
        assert_eq!(default_sampling(&config).temperature, 0.7);
        assert_eq!(default_sampling(&config).top_k, 20);
    }
}
