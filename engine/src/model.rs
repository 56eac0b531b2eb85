//! What the runtime asks of an architecture: a forward pass cut at layer boundaries, over one flat axis of tokens.

use std::ops::Range;

use crate::{Result, Tensor, compute::Compute, experts::Lane, kv::KvCache, ops::Routes};

/// A decoder-only language model. Serving walks it batch by batch; a layer-major caller walks one layer over many batches.
pub trait Model: Send {
    /// The sizes that the runtime needs.
    fn info(&self) -> &ModelInfo;

    /// Token ids of the batch to hidden states `[tokens, hidden]`.
    ///
    /// # Errors
    /// When an op fails.
    fn embed(&self, step: &mut StepContext<'_>) -> Result<Tensor>;

    /// Hidden states `[tokens, hidden]` through layer `index`; writes the tokens' keys and values to the KV cache.
    ///
    /// # Errors
    /// When an op fails.
    fn layer(&self, step: &mut StepContext<'_>, index: usize, hidden: Tensor) -> Result<Tensor>;

    /// Hidden states `[rows, hidden]` to logits `[rows, vocab]`, final norm included.
    ///
    /// # Errors
    /// When an op fails.
    fn head(&self, step: &mut StepContext<'_>, hidden: &Tensor) -> Result<Tensor>;
}

/// The whole forward pass: logits `[logit_rows, vocab]` of the rows that the batch names, `None` if it names none.
///
/// # Errors
/// When an op fails.
pub fn forward(model: &dyn Model, step: &mut StepContext<'_>) -> Result<Option<Tensor>> {
    let mut hidden = model.embed(step)?;
    for index in 0..model.info().num_layers {
        hidden = model.layer(step, index, hidden)?;
    }
    if step.batch.logit_rows.is_empty() {
        return Ok(None);
    }
    let rows = crate::ops::select_rows(&hidden, &step.batch.logit_rows)?;
    model.head(step, &rows).map(Some)
}

/// Sizes of a model that the runtime needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelInfo {
    /// Decoder layers.
    pub num_layers: usize,
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Width of the logits.
    pub vocab_size: usize,
    /// Key/value heads of each layer.
    pub num_kv_heads: usize,
    /// Width of a key and of a value.
    pub head_dim: usize,
    /// The longest sequence that the position encoding was made for.
    pub max_position_embeddings: usize,
    /// Parameters in all.
    pub total_parameters: u64,
    /// Parameters that one token uses: of the embedding one row, and the head, though that may be the embedding again.
    pub active_parameters: u64,
    /// Those of them that are the head's, which only tokens with logits use.
    pub head_parameters: u64,
    /// Bytes that the packed weights take.
    pub weight_bytes: u64,
    /// Those of them that every step reads, however many tokens it has: all but the embedding and routed experts.
    pub dense_bytes: u64,
    /// Those of `dense_bytes` that are the head's.
    pub head_bytes: u64,
    /// The routed experts of each layer that has some.
    pub moe_layers: Vec<MoeLayerInfo>,
}

/// Sizes of a layer's routed experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MoeLayerInfo {
    /// How many there are.
    pub experts: usize,
    /// How many of them a token uses.
    pub top_k: usize,
    /// Bytes of one.
    pub expert_bytes: u64,
}

impl ModelInfo {
    /// Bytes of weights that a step with `tokens` tokens reads, if each choice of experts is as likely as any other:
    /// `dense_bytes`, and in each layer E · (1 − (1 − k/E)^tokens) different experts.
    #[must_use]
    pub fn touched_bytes(&self, tokens: usize) -> f64 {
        let experts = self.moe_layers.iter().map(|layer| {
            let missed = 1.0 - layer.top_k as f64 / layer.experts as f64;
            layer.experts as f64 * (1.0 - missed.powf(tokens as f64)) * layer.expert_bytes as f64
        });
        self.dense_bytes as f64 + experts.sum::<f64>()
    }
}

/// The flat tokens of one step.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StepBatch {
    /// `[tokens]` token ids.
    pub token_ids: Vec<u32>,
    /// `[tokens]` each token's position in its sequence.
    pub positions: Vec<u32>,
    /// The sequences, in the order of their rows; together their rows cover the token axis without gaps.
    pub sequences: Vec<SequenceRows>,
    /// Rows of the token axis whose logits are wanted, ascending.
    pub logit_rows: Vec<u32>,
}

impl StepBatch {
    /// How the step uses experts: one that has a part of a prompt touches most of them once, and must not push out those
    /// that decoding comes back to.
    #[must_use]
    pub fn lane(&self) -> Lane {
        if self.token_ids.len() > self.sequences.len() { Lane::Scan } else { Lane::Decode }
    }
}

/// One sequence's part of a [`StepBatch`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceRows {
    /// Its rows on the token axis. The last row's position is `context_len - 1`.
    pub rows: Range<usize>,
    /// Tokens of the sequence whose keys and values are in the cache once this step's are written.
    pub context_len: usize,
    /// The KV blocks that hold them: position `p` lies in block `block_table[p / BLOCK_SIZE]`, place `p % BLOCK_SIZE`.
    pub block_table: Vec<u32>,
}

/// What a model is given besides the hidden states.
pub struct StepContext<'a> {
    /// The worker pool and the kernels' tier.
    pub compute: &'a Compute,
    /// The tokens.
    pub batch: &'a StepBatch,
    /// Keys and values of earlier tokens, and the place for this step's.
    pub kv: &'a mut KvCache,
    /// Where routers note what they chose, layer after layer; `None` if nobody wants to know.
    pub routes: Option<&'a mut Vec<LayerRoutes>>,
}

/// What the router of one layer chose in a step.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerRoutes {
    /// The layer's number among all layers.
    pub layer: usize,
    /// Its choice for each token of the step.
    pub routes: Routes,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_reads_an_expert_once() {
        let layer = |experts, top_k, expert_bytes| MoeLayerInfo { experts, top_k, expert_bytes };
        let info = ModelInfo {
            num_layers: 3,
            hidden_size: 1,
            vocab_size: 1,
            num_kv_heads: 1,
            head_dim: 1,
            max_position_embeddings: 1,
            total_parameters: 0,
            active_parameters: 0,
            head_parameters: 0,
            weight_bytes: 1640,
            dense_bytes: 1000,
            head_bytes: 0,
            moe_layers: vec![layer(4, 1, 100), layer(8, 4, 10)],
        };
        assert_eq!(info.touched_bytes(0), 1000.0);
        assert_eq!(info.touched_bytes(1), 1000.0 + 100.0 + 40.0);
        // The second token's expert is the first's one time in four: 1.75 of 4, and 6 of 8.
        assert_eq!(info.touched_bytes(2), 1000.0 + 175.0 + 60.0);
        assert!((info.touched_bytes(1000) - (1000.0 + 400.0 + 80.0)).abs() < 1e-6);
    }
}
