//! From a checkpoint's tensors to the blocks that architectures share. The tensors' names are the architectures'.

use cadre_engine::nn::{
    Attention, AttentionConfig, DecoderLayer, DecoderParts, DenseFfn, Ffn, FfnLayout, Format, HeadNorms, Linear,
    Matrix, MoeFfn, RmsNorm, Rope, RouterOptions,
};
use serde::Deserialize;

use crate::{Result, config::ConfigFile, weights::Weights};

/// The fields of config.json that all decoders have.
#[derive(Debug, Deserialize)]
pub(crate) struct DecoderConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: Option<usize>,
    pub head_dim: Option<usize>,
    pub rms_norm_eps: f32,
    #[serde(default)]
    pub tie_word_embeddings: bool,
    pub pad_token_id: Option<i64>,
}

impl DecoderConfig {
    /// The attention's sizes.
    pub fn attention(&self) -> AttentionConfig {
        AttentionConfig {
            num_heads: self.num_attention_heads,
            num_kv_heads: self.num_key_value_heads.unwrap_or(self.num_attention_heads),
            head_dim: self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads),
            clip: None,
        }
    }
}

/// The parts of a decoder: `model.layers.N.{input,post_attention}_layernorm` and the rest of each layer from `layer`;
/// the embedding is called `embedding`.
pub(crate) fn decoder_parts(
    file: &ConfigFile,
    config: &DecoderConfig,
    weights: &Weights<'_>,
    embedding: &str,
    layer: impl Fn(usize, &Weights<'_>) -> Result<(Attention, Ffn)>,
) -> Result<DecoderParts> {
    file.supports("hidden_act", &["silu"])?;
    file.supports("use_sliding_window", &[false])?;
    let (model, vocab, hidden) = (weights.at("model"), config.vocab_size, config.hidden_size);
    let norm = |weights: &Weights<'_>, name| {
        let norm = weights.at(name);
        Ok::<_, crate::Error>(RmsNorm::new(norm.module(), norm.vector("weight", hidden)?, config.rms_norm_eps))
    };
    let layers = (0..config.num_hidden_layers).map(|index| {
        let weights = model.at(format!("layers.{index}"));
        let (attention, ffn) = layer(index, &weights)?;
        Ok(DecoderLayer {
            attention_norm: norm(&weights, "input_layernorm")?,
            attention,
            ffn_norm: norm(&weights, "post_attention_layernorm")?,
            ffn,
        })
    });
    let rope = file.rope(config.attention().head_dim)?;
    if config.tie_word_embeddings {
        // Some checkpoints store the tied head all the same.
        weights.ignore("lm_head.weight");
    }
    Ok(DecoderParts {
        layers: layers.collect::<Result<_>>()?,
        embedding: model.at(embedding).matrix_as(weights.formats().embedding, &[("weight", vocab)], hidden)?,
        padding_token: config.pad_token_id.and_then(|id| u32::try_from(id).ok()),
        norm: norm(&model, "norm")?,
        head: (!config.tie_word_embeddings).then(|| matrix(weights, "lm_head", vocab, hidden)).transpose()?,
        max_position_embeddings: rope.max_positions(),
        rope: Rope::new(rope),
    })
}

/// `NAME.weight` `[rows, columns]`.
pub(crate) fn matrix(weights: &Weights<'_>, name: &str, rows: usize, columns: usize) -> Result<Matrix> {
    weights.at(name).matrix(&[("weight", rows)], columns)
}

/// `NAME.weight` `[rows, columns]` and, if `bias`, `NAME.bias` `[rows]`.
pub(crate) fn linear(weights: &Weights<'_>, name: &str, rows: usize, columns: usize, bias: bool) -> Result<Linear> {
    let vector = bias.then(|| weights.at(name).vector("bias", rows)).transpose()?;
    Ok(Linear::new(matrix(weights, name, rows, columns)?, vector))
}

/// `q_proj`, `k_proj` and `v_proj` as one projection, with their biases if `bias`.
pub(crate) fn separate_qkv(
    weights: &Weights<'_>,
    sizes: &AttentionConfig,
    hidden: usize,
    bias: bool,
) -> Result<(Matrix, Option<Vec<f32>>)> {
    let parts = [("q_proj", sizes.query_rows()), ("k_proj", sizes.kv_rows()), ("v_proj", sizes.kv_rows())];
    let names = parts.map(|(name, rows)| (format!("{name}.weight"), rows));
    let matrix = weights.matrix(&names.each_ref().map(|(name, rows)| (name.as_str(), *rows)), hidden)?;
    let bias = bias.then(|| {
        let biases = parts.iter().map(|(name, rows)| weights.at(name).vector("bias", *rows));
        biases.collect::<Result<Vec<_>>>().map(|biases| biases.concat())
    });
    Ok((matrix, bias.transpose()?))
}

/// Norms of queries and keys, of the widths that their weights have.
pub(crate) fn head_norms(
    weights: &Weights<'_>,
    [query, key]: [&str; 2],
    [query_width, key_width]: [usize; 2],
    eps: f32,
) -> Result<HeadNorms> {
    Ok(HeadNorms {
        modules: [weights.at(query).module(), weights.at(key).module()],
        query: weights.at(query).vector("weight", query_width)?,
        key: weights.at(key).vector("weight", key_width)?,
        eps,
    })
}

/// `gate_proj`, `up_proj` and `down_proj` as one feed-forward.
pub(crate) fn dense_ffn(weights: &Weights<'_>, hidden: usize, intermediate: usize) -> Result<DenseFfn> {
    let layout = FfnLayout { format: weights.formats().dense, hidden, intermediate };
    Ok(DenseFfn { weights: weights.experts(1, layout, |_| String::new())? })
}

/// The router `gate` and `experts.N` of `count` experts.
pub(crate) fn moe_ffn(
    weights: &Weights<'_>,
    count: usize,
    [hidden, intermediate]: [usize; 2],
    options: RouterOptions,
    shared: Option<DenseFfn>,
) -> Result<MoeFfn> {
    let layout = FfnLayout { format: weights.formats().experts, hidden, intermediate };
    Ok(MoeFfn {
        router: weights.at("gate").matrix_as(Format::F32, &[("weight", count)], hidden)?,
        options,
        experts: weights.routed_experts(count, layout, |expert| format!("experts.{expert}"))?,
        shared,
    })
}
