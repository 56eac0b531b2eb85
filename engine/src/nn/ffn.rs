use super::{ExpertModules, Experts, FfnLayout, Matrix, RouterOptions};
use crate::{
    Result, Tensor,
    adapter::{FfnPlace, RowAdapters},
    compute::Compute,
    experts::StoredExperts,
    model::{LayerRoutes, MoeLayerInfo, StepContext},
    ops::{self, FfnAdapters, Routes},
    train::places::Place,
};

/// The feed-forward of a layer.
#[derive(Debug)]
pub enum Ffn {
    /// One for all tokens.
    Dense(DenseFfn),
    /// Experts, of which each token uses a few.
    Moe(MoeFfn),
}

/// `down(silu(gate(x)) · up(x))`: one expert that all tokens use.
#[derive(Debug)]
pub struct DenseFfn {
    /// Holds the one expert.
    pub weights: Experts,
}

/// A router, its experts, and the expert that all tokens share, if there is one.
#[derive(Debug)]
pub struct MoeFfn {
    /// `[experts, hidden]`, in f32.
    pub router: Matrix,
    /// How the router's logits become a choice.
    pub options: RouterOptions,
    /// The experts.
    pub experts: RoutedExperts,
    /// Added for all tokens.
    pub shared: Option<DenseFfn>,
}

/// The experts that a router chooses from.
#[derive(Debug)]
pub enum RoutedExperts {
    /// All in memory.
    Resident(Experts),
    /// In the expert store.
    Stored(StoredExperts),
}

impl RoutedExperts {
    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        match self {
            Self::Resident(experts) => experts.count(),
            Self::Stored(experts) => experts.count(),
        }
    }

    /// The modules that they come from.
    #[must_use]
    pub fn modules(&self) -> &[ExpertModules] {
        match self {
            Self::Resident(experts) => experts.modules(),
            Self::Stored(experts) => experts.modules(),
        }
    }

    pub(crate) fn layout(&self) -> FfnLayout {
        match self {
            Self::Resident(experts) => experts.layout(),
            Self::Stored(experts) => experts.layout(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Resident(experts) => experts.bytes(),
            Self::Stored(experts) => experts.bytes(),
        }
    }
}

impl Ffn {
    /// `[tokens, hidden]` to the same; `layer` is the number of the layer that it is part of.
    pub(crate) fn forward(&self, step: &mut StepContext<'_>, layer: usize, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(ffn) => {
                ffn.forward(step.compute, x, Some((&RowAdapters::of(step.batch), FfnPlace::Shared(layer))))
            }
            Self::Moe(ffn) => ffn.forward(step, layer, x),
        }
    }

    /// Parameters in all, and those that one token uses.
    pub(crate) fn parameters(&self) -> (usize, usize) {
        match self {
            Self::Dense(ffn) => (ffn.weights.parameters_per_expert(), ffn.weights.parameters_per_expert()),
            Self::Moe(ffn) => {
                let bias = ffn.options.selection_bias.as_ref().map_or(0, Vec::len);
                let shared = ffn.shared.as_ref().map_or(0, |shared| shared.weights.parameters_per_expert());
                let always = ffn.router.parameters() + bias + shared;
                let FfnLayout { hidden, intermediate, .. } = ffn.experts.layout();
                let expert = 3 * hidden * intermediate;
                (always + ffn.experts.count() * expert, always + ffn.options.top_k * expert)
            }
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        let routed = match self {
            Self::Dense(_) => 0,
            Self::Moe(ffn) => ffn.experts.bytes(),
        };
        self.dense_bytes() + routed
    }

    /// Bytes that all tokens use.
    pub(crate) fn dense_bytes(&self) -> usize {
        match self {
            Self::Dense(ffn) => ffn.weights.bytes(),
            Self::Moe(ffn) => ffn.router.bytes() + ffn.shared.as_ref().map_or(0, |shared| shared.weights.bytes()),
        }
    }

    /// The experts that tokens choose from.
    pub(crate) fn routed(&self) -> Option<MoeLayerInfo> {
        match self {
            Self::Dense(_) => None,
            Self::Moe(ffn) => Some(MoeLayerInfo {
                experts: ffn.experts.count(),
                top_k: ffn.options.top_k,
                expert_bytes: ffn.experts.bytes().checked_div(ffn.experts.count()).unwrap_or(0) as u64,
            }),
        }
    }
}

impl DenseFfn {
    pub(super) fn forward(&self, compute: &Compute, x: &Tensor, adapters: Option<FfnAdapters<'_>>) -> Result<Tensor> {
        let tokens = x.dims().first().copied().unwrap_or(0);
        ops::grouped_ffn(compute, x, &self.weights, &Routes::dense(tokens), adapters)
    }
}

impl MoeFfn {
    /// The experts that the router of layer `layer` chooses for each row of `x`, `[tokens, hidden]`.
    pub(super) fn route(
        &self,
        compute: &Compute,
        layer: usize,
        x: &Tensor,
        adapters: &RowAdapters<'_>,
    ) -> Result<Routes> {
        let logits = ops::linear(compute, x, &self.router, None)?;
        let logits = ops::add_adapters(compute, adapters, Place::Router { layer }, x, logits)?;
        ops::route(&logits, &self.options)
    }

    fn forward(&self, step: &mut StepContext<'_>, layer: usize, x: &Tensor) -> Result<Tensor> {
        let compute = step.compute;
        let adapters = RowAdapters::of(step.batch);
        let routes = self.route(compute, layer, x, &adapters)?;
        let of_routed = Some((&adapters, FfnPlace::Routed(layer)));
        let routed = match &self.experts {
            RoutedExperts::Resident(experts) => ops::grouped_ffn(compute, x, experts, &routes, of_routed)?,
            RoutedExperts::Stored(experts) => ops::stored_ffn(compute, x, experts, &routes, of_routed, step.lane)?,
        };
        if let Some(noted) = &mut step.routes {
            noted.push(LayerRoutes { layer, routes });
        }
        match &self.shared {
            Some(shared) => {
                let of_shared = Some((&adapters, FfnPlace::Shared(layer)));
                ops::add(compute, &routed, &shared.forward(compute, x, of_shared)?)
            }
            None => Ok(routed),
        }
    }
}
