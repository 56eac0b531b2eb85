//! Ling-lite and Ling-plus (`bailing_moe`): softmax router, shared experts, fused projections, NormHead.

use cadre_engine::nn::{Decoder, DecoderParts, RouterOptions, Scores};
use serde::Deserialize;

use crate::{
    Result,
    bailing::{BailingConfig, attention, bailing_ffn, supported},
    blocks::{DecoderConfig, decoder_parts},
    config::ConfigFile,
    weights::Weights,
};

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    norm_head: bool,
}

pub(crate) fn build(file: &ConfigFile, weights: &Weights<'_>) -> Result<Decoder> {
    supported(file)?;
    let (common, bailing, config): (DecoderConfig, BailingConfig, Config) =
        (file.parse()?, file.parse()?, file.parse()?);
    let router = RouterOptions {
        scores: Scores::Softmax,
        top_k: bailing.num_experts_per_tok,
        selection_bias: None,
        groups: None,
        normalise: bailing.normalises(),
        scale: 1.0,
    };
    let mut parts = decoder_parts(file, &common, weights, "word_embeddings", |index, layer| {
        let ffn = bailing_ffn(&common, &bailing, index, &layer.at("mlp"), |_| Ok(router.clone()))?;
        Ok((attention(&common, &bailing, &layer.at("attention"), None)?, ffn))
    })?;
    if config.norm_head {
        norm_head(weights, &mut parts);
    }
    Ok(Decoder::new(parts)?)
}

/// NormHead divides each column of the head by its length over the vocabulary. Dividing the head's input is the same
/// product, and leaves the stored weights as they are.
fn norm_head(weights: &Weights<'_>, parts: &mut DecoderParts) {
    let head = parts.head.as_ref().unwrap_or(&parts.embedding);
    let lengths: Vec<f32> = head.column_norms(weights.compute()).iter().map(|length| length + 1e-7).collect();
    parts.norm = parts.norm.clone().divided_by(&lengths);
}
