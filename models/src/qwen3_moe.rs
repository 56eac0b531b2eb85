//! Qwen3-MoE (`qwen3_moe`): softmax router, q/k norm per head; some layers may be dense.

use cadre_engine::nn::{Attention, Decoder, Ffn, RouterOptions, Scores};
use serde::Deserialize;

use crate::{
    Result,
    blocks::{DecoderConfig, decoder_parts, dense_ffn, head_norms, linear, moe_ffn, separate_qkv},
    config::ConfigFile,
    weights::Weights,
};

#[derive(Deserialize)]
struct Config {
    intermediate_size: usize,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default = "every_layer")]
    decoder_sparse_step: usize,
    #[serde(default)]
    mlp_only_layers: Vec<usize>,
    moe_intermediate_size: usize,
    num_experts_per_tok: usize,
    num_experts: usize,
    #[serde(default)]
    norm_topk_prob: bool,
}

fn every_layer() -> usize {
    1
}

pub(crate) fn build(file: &ConfigFile, weights: &Weights<'_>) -> Result<Decoder> {
    let (common, config): (DecoderConfig, Config) = (file.parse()?, file.parse()?);
    let parts = decoder_parts(file, &common, weights, "embed_tokens", |index, layer| {
        Ok((attention(&common, &config, &layer.at("self_attn"))?, ffn(&common, &config, index, &layer.at("mlp"))?))
    })?;
    Ok(Decoder::new(parts)?)
}

fn attention(common: &DecoderConfig, config: &Config, weights: &Weights<'_>) -> Result<Attention> {
    let (sizes, hidden) = (common.attention(), common.hidden_size);
    let (qkv, qkv_bias) = separate_qkv(weights, &sizes, hidden, config.attention_bias)?;
    Ok(Attention {
        config: sizes,
        qkv,
        qkv_bias,
        norms: Some(head_norms(weights, ["q_norm", "k_norm"], [sizes.head_dim; 2], common.rms_norm_eps)?),
        output: linear(weights, "o_proj", hidden, sizes.query_rows(), config.attention_bias)?,
    })
}

fn ffn(common: &DecoderConfig, config: &Config, index: usize, weights: &Weights<'_>) -> Result<Ffn> {
    let sparse = !config.mlp_only_layers.contains(&index)
        && config.num_experts > 0
        && (index + 1).is_multiple_of(config.decoder_sparse_step);
    if !sparse {
        return Ok(Ffn::Dense(dense_ffn(weights, common.hidden_size, config.intermediate_size)?));
    }
    let router = RouterOptions {
        scores: Scores::Softmax,
        top_k: config.num_experts_per_tok,
        selection_bias: None,
        groups: None,
        normalise: config.norm_topk_prob,
        scale: 1.0,
    };
    let sizes = [common.hidden_size, config.moe_intermediate_size];
    Ok(Ffn::Moe(moe_ffn(weights, config.num_experts, sizes, router, None)?))
}
