//! Ling-mini-2.0, Ling-flash-2.0 and Ling-1T (`bailing_moe_v2`): sigmoid router with a selection bias and limited
//! groups, q/k norm per head, partial rotary positions, leading dense layers.

use cadre_engine::nn::{Decoder, GroupLimit, RouterOptions, Scores};
use serde::Deserialize;

use crate::{
    Result,
    bailing::{BailingConfig, attention, bailing_ffn, supported, yes},
    blocks::{DecoderConfig, decoder_parts, head_norms},
    config::ConfigFile,
    weights::Weights,
};

#[derive(Deserialize)]
struct Config {
    n_group: Option<usize>,
    topk_group: Option<usize>,
    #[serde(default = "one")]
    routed_scaling_factor: f32,
    #[serde(default = "yes")]
    moe_router_enable_expert_bias: bool,
    #[serde(default = "yes")]
    use_qk_norm: bool,
    #[serde(default)]
    num_nextn_predict_layers: usize,
}

fn one() -> f32 {
    1.0
}

pub(crate) fn build(file: &ConfigFile, weights: &Weights<'_>) -> Result<Decoder> {
    supported(file)?;
    file.supports("score_function", &["sigmoid"])?;
    file.supports("norm_head", &[false])?;
    let (common, bailing, config): (DecoderConfig, BailingConfig, Config) =
        (file.parse()?, file.parse()?, file.parse()?);
    // The layers that predict further tokens follow the others; decoding token by token does not use them.
    for extra in 0..config.num_nextn_predict_layers {
        weights.ignore_prefix(&format!("model.layers.{}.", common.num_hidden_layers + extra));
    }
    let parts = decoder_parts(file, &common, weights, "word_embeddings", |index, layer| {
        let attention_weights = layer.at("attention");
        let names = ["query_layernorm", "key_layernorm"];
        let widths = [common.attention().head_dim; 2];
        let norms = config.use_qk_norm.then(|| head_norms(&attention_weights, names, widths, common.rms_norm_eps));
        let attention = attention(&common, &bailing, &attention_weights, norms.transpose()?)?;
        let ffn = bailing_ffn(&common, &bailing, index, &layer.at("mlp"), |gate| router(&bailing, &config, gate))?;
        Ok((attention, ffn))
    })?;
    Ok(Decoder::new(parts)?)
}

fn router(bailing: &BailingConfig, config: &Config, gate: &Weights<'_>) -> Result<RouterOptions> {
    let count = config.n_group.unwrap_or(1);
    let bias = config.moe_router_enable_expert_bias.then(|| gate.vector("expert_bias", bailing.num_experts));
    Ok(RouterOptions {
        scores: Scores::Sigmoid,
        top_k: bailing.num_experts_per_tok,
        selection_bias: bias.transpose()?,
        groups: (count > 1).then(|| GroupLimit { count, keep: config.topk_group.unwrap_or(count) }),
        normalise: bailing.normalises(),
        scale: config.routed_scaling_factor,
    })
}
