//! OLMoE (`olmoe`): softmax router, q/k norm over the whole width; some checkpoints clip the projections.

use cadre_engine::nn::{Attention, AttentionConfig, Decoder, Ffn, RouterOptions, Scores};
use serde::Deserialize;

use crate::{
    Result,
    blocks::{DecoderConfig, decoder_parts, head_norms, linear, moe_ffn, separate_qkv},
    config::ConfigFile,
    weights::Weights,
};

#[derive(Deserialize)]
struct Config {
    intermediate_size: usize,
    #[serde(default)]
    attention_bias: bool,
    clip_qkv: Option<f32>,
    num_experts_per_tok: usize,
    num_experts: usize,
    #[serde(default)]
    norm_topk_prob: bool,
}

pub(crate) fn build(file: &ConfigFile, weights: &Weights<'_>) -> Result<Decoder> {
    let (common, config): (DecoderConfig, Config) = (file.parse()?, file.parse()?);
    let parts = decoder_parts(file, &common, weights, "embed_tokens", |_, layer| {
        let router = RouterOptions {
            scores: Scores::Softmax,
            top_k: config.num_experts_per_tok,
            selection_bias: None,
            groups: None,
            normalise: config.norm_topk_prob,
            scale: 1.0,
        };
        let sizes = [common.hidden_size, config.intermediate_size];
        let ffn = moe_ffn(&layer.at("mlp"), config.num_experts, sizes, router, None)?;
        Ok((attention(&common, &config, &layer.at("self_attn"))?, Ffn::Moe(ffn)))
    })?;
    Ok(Decoder::new(parts)?)
}

fn attention(common: &DecoderConfig, config: &Config, weights: &Weights<'_>) -> Result<Attention> {
    let sizes = AttentionConfig { clip: config.clip_qkv, ..common.attention() };
    let (qkv, qkv_bias) = separate_qkv(weights, &sizes, common.hidden_size, config.attention_bias)?;
    let widths = [sizes.query_rows(), sizes.kv_rows()];
    Ok(Attention {
        config: sizes,
        qkv,
        qkv_bias,
        norms: Some(head_norms(weights, ["q_norm", "k_norm"], widths, common.rms_norm_eps)?),
        output: linear(weights, "o_proj", common.hidden_size, sizes.query_rows(), config.attention_bias)?,
    })
}
