//! What both generations of Ling share: the config's fields, fused attention, shared experts.

use cadre_engine::nn::{Attention, Ffn, HeadNorms, RouterOptions};
use serde::Deserialize;

use crate::{
    Result,
    blocks::{DecoderConfig, dense_ffn, linear, matrix, moe_ffn},
    config::ConfigFile,
    weights::Weights,
};

#[derive(Debug, Deserialize)]
pub(crate) struct BailingConfig {
    pub intermediate_size: usize,
    pub moe_intermediate_size: usize,
    pub num_experts: usize,
    pub num_experts_per_tok: usize,
    num_shared_experts: Option<usize>,
    #[serde(default = "yes")]
    norm_topk_prob: bool,
    #[serde(default)]
    first_k_dense_replace: usize,
    #[serde(default)]
    use_bias: bool,
    #[serde(default)]
    use_qkv_bias: bool,
}

pub(crate) fn yes() -> bool {
    true
}

impl BailingConfig {
    /// One expert's weight is not normalised: it would always be 1.
    pub fn normalises(&self) -> bool {
        self.norm_topk_prob && self.num_experts_per_tok > 1
    }
}

/// Refuses options that no published model of either generation uses.
pub(crate) fn supported(file: &ConfigFile) -> Result<()> {
    file.supports("multi_gate", &[false])?;
    file.supports("norm_softmax", &[false])?;
    file.supports("use_rmsnorm", &[true])
}

/// `query_key_value` and `dense`.
pub(crate) fn attention(
    common: &DecoderConfig,
    config: &BailingConfig,
    weights: &Weights<'_>,
    norms: Option<HeadNorms>,
) -> Result<Attention> {
    let (sizes, hidden) = (common.attention(), common.hidden_size);
    let rows = sizes.query_rows() + 2 * sizes.kv_rows();
    let bias = config.use_qkv_bias.then(|| weights.at("query_key_value").vector("bias", rows)).transpose()?;
    Ok(Attention {
        config: sizes,
        qkv: matrix(weights, "query_key_value", rows, hidden)?,
        qkv_bias: bias,
        norms,
        output: linear(weights, "dense", hidden, sizes.query_rows(), config.use_bias)?,
    })
}

/// Dense in the leading layers, experts after; `router` gives the options for the weights of this layer's router.
pub(crate) fn bailing_ffn(
    common: &DecoderConfig,
    config: &BailingConfig,
    index: usize,
    weights: &Weights<'_>,
    router: impl FnOnce(&Weights<'_>) -> Result<RouterOptions>,
) -> Result<Ffn> {
    let hidden = common.hidden_size;
    if index < config.first_k_dense_replace {
        return Ok(Ffn::Dense(dense_ffn(weights, hidden, config.intermediate_size)?));
    }
    let shared = match config.num_shared_experts {
        None | Some(0) => None,
        Some(count) => {
            Some(dense_ffn(&weights.at("shared_experts"), hidden, count.saturating_mul(config.moe_intermediate_size))?)
        }
    };
    let options = router(&weights.at("gate"))?;
    let sizes = [hidden, config.moe_intermediate_size];
    Ok(Ffn::Moe(moe_ffn(weights, config.num_experts, sizes, options, shared)?))
}
