//! One decoder layer, forward with a tape and backward.

use cadre_kernels::{
    format::Packed,
    gradient::{RouterLosses, rms_norm_backward},
    norm::rms_norm,
    rows,
};

use super::{
    Batch, RoutingNoise,
    attention::AttentionTape,
    experts::{FfnTape, RouterTape},
    linear::{Linear, Products},
    parameters::{Gradients, ParameterId},
    places::Place,
    trained::Trained,
    workspace::Workspace,
};
use crate::{
    Result,
    nn::{DecoderParts, RmsNorm},
};

/// A walk through a decoder, either way.
pub(super) struct Walk<'a> {
    pub products: Products<'a>,
    pub parts: &'a DecoderParts,
    pub trained: &'a Trained,
    /// What takes part in the choice of experts.
    pub noise: Option<&'a RoutingNoise>,
}

/// What a layer's backward pass needs of its forward pass beside the input.
pub(super) struct LayerTape {
    attention: AttentionTape,
    /// After attention.
    middle: Vec<f32>,
    ffn: FfnTape,
}

impl LayerTape {
    /// Gives the buffers back.
    pub fn release(self, workspace: &Workspace) {
        workspace.give(self.middle);
        self.attention.release(workspace);
        self.ffn.release(workspace);
    }

    /// The router's logits and choice, if the layer has one.
    pub fn router(&self) -> Option<&RouterTape> {
        self.ffn.router()
    }
}

impl Walk<'_> {
    pub fn linear<'b>(&'b self, place: Place, weight: Packed<'b>) -> Linear<'b> {
        let trained = self.trained.of(place);
        let dropout = self.products.dropout.filter(|_| !trained.adapters.is_empty());
        let mask = dropout.map(|dropout| dropout.mask(place, self.products.first_token.get()));
        Linear { weight, trained, paired: None, mask }
    }

    pub fn norm(&self, norm: &RmsNorm, x: &[f32]) -> Vec<f32> {
        let mut out = self.products.workspace.take(x.len());
        rms_norm(&self.products.compute.pool, x, &norm.weight, norm.eps, &mut out);
        out
    }

    /// Adds the gradient of a norm's input to `of_input`.
    pub fn norm_backward(
        &self,
        norm: &RmsNorm,
        x: &[f32],
        of_output: &[f32],
        of_input: &mut [f32],
        (trained, gradients): (Option<ParameterId>, &mut Gradients),
    ) {
        let compute = self.products.compute;
        let of_weight = trained.map(|id| gradients.of(id));
        rms_norm_backward(&compute.pool, compute.isa, x, &norm.weight, norm.eps, of_output, of_input, of_weight);
    }

    /// Hidden states `[tokens, hidden]` through layer `layer`; the router takes the experts of `replay` if it is given.
    pub fn layer(
        &self,
        layer: usize,
        batch: &Batch,
        input: &[f32],
        replay: Option<&[u32]>,
    ) -> Result<(Vec<f32>, LayerTape)> {
        let parts = &self.parts.layers[layer];
        let pool = &self.products.compute.pool;
        let normed = self.norm(&parts.attention_norm, input);
        let (mut middle, attention) = self.attention(layer, batch, &normed);
        self.products.workspace.give(normed);
        rows::add(pool, input, &mut middle);
        let normed = self.norm(&parts.ffn_norm, &middle);
        let (mut output, ffn) = self.ffn(layer, &normed, replay)?;
        self.products.workspace.give(normed);
        rows::add(pool, &middle, &mut output);
        Ok((output, LayerTape { attention, middle, ffn }))
    }

    /// The gradient of the layer's input: `gradient` is that of its output and becomes it. `losses` are those on the
    /// router.
    #[allow(clippy::too_many_arguments, reason = "a place in the walk, the tape, and the gradients on both sides")]
    pub fn layer_backward(
        &self,
        layer: usize,
        batch: &Batch,
        input: &[f32],
        tape: LayerTape,
        losses: RouterLosses<'_>,
        gradient: &mut [f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let LayerTape { attention, middle, ffn } = tape;
        let parts = &self.parts.layers[layer];
        let vectors = self.trained.vectors(layer);
        let normed = self.norm(&parts.ffn_norm, &middle);
        let of_normed = self.ffn_backward(layer, &normed, ffn, losses, gradient, gradients)?;
        self.norm_backward(&parts.ffn_norm, &middle, &of_normed, gradient, (vectors.ffn_norm, gradients));
        let workspace = self.products.workspace;
        [normed, of_normed, middle].into_iter().for_each(|buffer| workspace.give(buffer));
        let normed = self.norm(&parts.attention_norm, input);
        let of_normed = self.attention_backward(layer, batch, &normed, attention, gradient, gradients)?;
        self.norm_backward(&parts.attention_norm, input, &of_normed, gradient, (vectors.attention_norm, gradients));
        [normed, of_normed].into_iter().for_each(|buffer| workspace.give(buffer));
        Ok(())
    }
}
