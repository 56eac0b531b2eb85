use super::{Attention, Ffn, Matrix, RmsNorm, Rope, RoutedExperts};
use crate::{
    Error, Result, Tensor,
    adapter::RowAdapters,
    experts::Lane,
    model::{Model, ModelInfo, StepContext},
    ops,
    train::places::Place,
};

/// A pre-norm decoder: what all of today's architectures are.
#[derive(Debug)]
pub struct Decoder {
    info: ModelInfo,
    pub(crate) parts: DecoderParts,
}

/// What a [`Decoder`] is made of.
#[derive(Debug)]
pub struct DecoderParts {
    /// `[vocab, hidden]`
    pub embedding: Matrix,
    /// A token whose embedding is never trained (torch's `padding_idx`).
    pub padding_token: Option<u32>,
    /// The rotary positions, shared by all layers.
    pub rope: Rope,
    /// The layers.
    pub layers: Vec<DecoderLayer>,
    /// The norm before the head.
    pub norm: RmsNorm,
    /// `[vocab, hidden]`; `None`: the embedding serves (a tied head).
    pub head: Option<Matrix>,
    /// The length that the position encoding was made for.
    pub max_position_embeddings: usize,
}

/// `x + attention(norm(x))`, then `x + ffn(norm(x))`.
#[derive(Debug)]
pub struct DecoderLayer {
    /// Before attention.
    pub attention_norm: RmsNorm,
    /// Attention.
    pub attention: Attention,
    /// Before the feed-forward.
    pub ffn_norm: RmsNorm,
    /// The feed-forward.
    pub ffn: Ffn,
}

impl DecoderLayer {
    /// Tells the expert store which experts the router of this layer, number `index`, would choose for the hidden states before the
    /// feed-forward of the layer before it, if the store wants to know: what the two layers still add changes few
    /// choices (Eliseev and Mazur, arXiv:2312.17238).
    fn predict_experts(&self, step: &StepContext<'_>, index: usize, hidden: &Tensor) -> Result<()> {
        let (Ffn::Moe(ffn), Lane::Decode) = (&self.ffn, step.lane) else { return Ok(()) };
        let RoutedExperts::Stored(experts) = &ffn.experts else { return Ok(()) };
        let Some((store, layer)) = experts.predicting() else { return Ok(()) };
        let normed = self.ffn_norm.forward(step.compute, hidden)?;
        let routes = ffn.route(step.compute, index, &normed, &RowAdapters::of(step.batch))?;
        store.predict(layer, routes.most_used(experts.count()));
        Ok(())
    }
}

impl Decoder {
    /// Assembles the parts.
    ///
    /// # Errors
    /// When there is no layer, or the layers' key/value heads differ.
    pub fn new(parts: DecoderParts) -> Result<Self> {
        let info = info(&parts)?;
        Ok(Self { info, parts })
    }

    /// Whether the head is a matrix of its own, and its weights are used as they are stored: then what an adapter adds to
    /// its products can be added to its weights.
    #[must_use]
    pub fn has_plain_head(&self) -> bool {
        self.parts.head.is_some() && !self.parts.norm.is_divided
    }

    pub(crate) fn head(&self) -> &Matrix {
        self.parts.head.as_ref().unwrap_or(&self.parts.embedding)
    }
}

fn info(parts: &DecoderParts) -> Result<ModelInfo> {
    let Some(first) = parts.layers.first() else {
        return Err(Error::Config("a decoder needs at least one layer, found none".into()));
    };
    let config = first.attention.config;
    if let Some(other) = parts.layers.iter().find(|layer| layer.attention.config != config) {
        return Err(Error::Config(format!(
            "all layers share one KV cache layout: expected {config:?}, found {:?}",
            other.attention.config
        )));
    }
    let hidden = parts.embedding.layout().k;
    let head = parts.head.as_ref().unwrap_or(&parts.embedding);
    let untied = parts.head.as_ref().map_or((0, 0), |head| (head.parameters(), head.bytes()));
    let mut total = parts.embedding.parameters() + untied.0 + parts.norm.parameters();
    // Looking up one row of the embedding uses one row.
    let mut active = hidden + head.parameters() + parts.norm.parameters();
    let mut bytes = parts.embedding.bytes() + untied.1;
    let mut dense_bytes = head.bytes();
    for layer in &parts.layers {
        let always = layer.attention.parameters() + layer.attention_norm.parameters() + layer.ffn_norm.parameters();
        let (ffn_total, ffn_active) = layer.ffn.parameters();
        total += always + ffn_total;
        active += always + ffn_active;
        bytes += layer.attention.bytes() + layer.ffn.bytes();
        dense_bytes += layer.attention.bytes() + layer.ffn.dense_bytes();
    }
    Ok(ModelInfo {
        num_layers: parts.layers.len(),
        hidden_size: hidden,
        vocab_size: parts.embedding.layout().n,
        num_kv_heads: config.num_kv_heads,
        head_dim: config.head_dim,
        max_position_embeddings: parts.max_position_embeddings,
        total_parameters: total as u64,
        active_parameters: active as u64,
        head_parameters: head.parameters() as u64,
        weight_bytes: bytes as u64,
        dense_bytes: dense_bytes as u64,
        head_bytes: head.bytes() as u64,
        moe_layers: parts.layers.iter().filter_map(|layer| layer.ffn.routed()).collect(),
    })
}

impl Model for Decoder {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn embed(&self, step: &mut StepContext<'_>) -> Result<Tensor> {
        ops::embed(&self.parts.embedding, &step.batch.token_ids)
    }

    fn layer(&self, step: &mut StepContext<'_>, index: usize, hidden: Tensor) -> Result<Tensor> {
        let layer = &self.parts.layers[index];
        let normed = layer.attention_norm.forward(step.compute, &hidden)?;
        let attended = layer.attention.forward(step, &self.parts.rope, index, &normed)?;
        let hidden = ops::add(step.compute, &hidden, &attended)?;
        let normed = layer.ffn_norm.forward(step.compute, &hidden)?;
        // Reading ahead follows on a visit to the store.
        if let (Some(next), Ffn::Moe(_)) = (self.parts.layers.get(index + 1), &layer.ffn) {
            next.predict_experts(step, index + 1, &hidden)?;
        }
        let added = layer.ffn.forward(step, index, &normed)?;
        ops::add(step.compute, &hidden, &added)
    }

    fn head(&self, step: &mut StepContext<'_>, hidden: &Tensor) -> Result<Tensor> {
        let normed = self.parts.norm.forward(step.compute, hidden)?;
        let logits = ops::linear(step.compute, &normed, self.head(), None)?;
        let adapters = RowAdapters::of(step.batch).select(step.batch.logit_rows.iter().map(|row| *row as usize));
        ops::add_adapters(step.compute, &adapters, Place::Head, &normed, logits)
    }
}
