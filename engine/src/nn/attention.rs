use cadre_kernels::qkv::{QkNorm, QkvOptions};

use super::{Linear, Matrix, Rope};
use crate::{Result, Tensor, adapter::RowAdapters, model::StepContext, ops, train::places::Place};

/// The sizes and options of an [`Attention`] block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionConfig {
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Bound of the projections' absolute value (`clip_qkv` on the hub).
    pub clip: Option<f32>,
}

impl AttentionConfig {
    /// Rows of the queries' projection.
    #[must_use]
    pub fn query_rows(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Rows of the keys' and of the values' projection.
    #[must_use]
    pub fn kv_rows(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }
}

/// RMS norms of queries and keys: a weight of one head's width norms each head, one of the whole width all together.
#[derive(Debug)]
pub struct HeadNorms {
    /// The full names of the two modules.
    pub modules: [String; 2],
    /// Weight of the queries' norm.
    pub query: Vec<f32>,
    /// Weight of the keys' norm.
    pub key: Vec<f32>,
    /// Added to the mean square.
    pub eps: f32,
}

/// Causal self-attention with grouped key/value heads and rotary positions.
#[derive(Debug)]
pub struct Attention {
    /// Sizes and options.
    pub config: AttentionConfig,
    /// The fused projection, rows `[queries | keys | values]`.
    pub qkv: Matrix,
    /// Its bias.
    pub qkv_bias: Option<Vec<f32>>,
    /// Norms of queries and keys.
    pub norms: Option<HeadNorms>,
    /// The projection back to the hidden width.
    pub output: Linear,
}

impl Attention {
    /// `[tokens, hidden]` to the same; reads and writes the KV cache of layer `layer`.
    pub(crate) fn forward(&self, step: &mut StepContext<'_>, rope: &Rope, layer: usize, x: &Tensor) -> Result<Tensor> {
        let options = QkvOptions {
            num_heads: self.config.num_heads,
            num_kv_heads: self.config.num_kv_heads,
            head_dim: self.config.head_dim,
            bias: self.qkv_bias.as_deref(),
            norm: self.norms.as_ref().map(|norms| QkNorm { query: &norms.query, key: &norms.key, eps: norms.eps }),
            clip: self.config.clip,
        };
        let adapters = RowAdapters::of(step.batch);
        let fused = ops::linear(step.compute, x, &self.qkv, None)?;
        let fused = ops::add_adapters(step.compute, &adapters, Place::Qkv { layer }, x, fused)?;
        let qkv = ops::split_qkv(step.compute, &fused, &step.batch.positions, &options, rope)?;
        let scale = 1.0 / (self.config.head_dim as f32).sqrt();
        let attended = ops::attention(step, layer, scale, &qkv)?;
        let output = self.output.forward(step.compute, &attended)?;
        ops::add_adapters(step.compute, &adapters, Place::AttentionOutput { layer }, &attended, output)
    }

    pub(crate) fn parameters(&self) -> usize {
        self.qkv.parameters() + self.output.parameters() + self.vectors()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.qkv.bytes() + self.output.bytes() + 4 * self.vectors()
    }

    fn vectors(&self) -> usize {
        self.qkv_bias.as_ref().map_or(0, Vec::len)
            + self.norms.as_ref().map_or(0, |norms| norms.query.len() + norms.key.len())
    }
}
