//! What the runtime asks of an architecture: a forward pass cut at layer boundaries, over one flat axis of tokens.

use std::{ops::Range, sync::Arc};

use crate::{Result, Tensor, adapter::LoadedAdapter, compute::Compute, experts::Lane, kv::KvCache, ops::Routes};

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

    /// Hidden states `[rows, hidden]` of the batch's logit rows to logits `[rows, vocab]`, final norm included.
    ///
    /// # Errors
    /// When an op fails.
    fn head(&self, step: &mut StepContext<'_>, hidden: &Tensor) -> Result<Tensor>;
}

/// A model that others use too: nothing of it changes.
impl<M: Model + Sync> Model for Arc<M> {
    fn info(&self) -> &ModelInfo {
        (**self).info()
    }

    fn embed(&self, step: &mut StepContext<'_>) -> Result<Tensor> {
        (**self).embed(step)
    }

    fn layer(&self, step: &mut StepContext<'_>, index: usize, hidden: Tensor) -> Result<Tensor> {
        (**self).layer(step, index, hidden)
    }

    fn head(&self, step: &mut StepContext<'_>, hidden: &Tensor) -> Result<Tensor> {
        (**self).head(step, hidden)
    }
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
    /// Bytes of all routed experts.
    #[must_use]
    pub fn routed_bytes(&self) -> u64 {
        self.moe_layers.iter().map(|layer| layer.experts as u64 * layer.expert_bytes).sum()
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
    /// What is added to the model for it.
    pub adapter: Option<Arc<LoadedAdapter>>,
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
    /// What experts are wanted for.
    pub lane: Lane,
}

/// What the router of one layer chose in a step.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerRoutes {
    /// The layer's number among all layers.
    pub layer: usize,
    /// Its choice for each token of the step.
    pub routes: Routes,
}
