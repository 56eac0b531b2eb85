//! The matrices of a decoder, by where they stand.

use crate::nn::{Decoder, DenseFfn, ExpertModules, Ffn, FfnLayout, Format, Matrix, Module};

/// A matrix of a decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// The projection to queries, keys and values.
    Qkv {
        /// The layer.
        layer: usize,
    },
    /// The projection of attention's output.
    AttentionOutput {
        /// The layer.
        layer: usize,
    },
    /// The router.
    Router {
        /// The layer.
        layer: usize,
    },
    /// Gate, then up, of a routed expert.
    GateUp {
        /// The layer.
        layer: usize,
        /// The expert.
        expert: usize,
    },
    /// Down of a routed expert.
    Down {
        /// The layer.
        layer: usize,
        /// The expert.
        expert: usize,
    },
    /// Gate, then up, of the feed-forward that all tokens use.
    SharedGateUp {
        /// The layer.
        layer: usize,
    },
    /// Down of it.
    SharedDown {
        /// The layer.
        layer: usize,
    },
    /// The head.
    Head,
}

/// A place, and the sizes and modules of its matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct PlaceInfo {
    /// The place.
    pub place: Place,
    /// Inputs.
    pub inputs: usize,
    /// What its weights are packed as.
    pub format: Format,
    /// The modules whose outputs its rows are, in order.
    pub modules: Vec<Module>,
}

impl PlaceInfo {
    /// Outputs.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.modules.iter().map(|module| module.rows).sum()
    }
}

/// All matrices of a decoder but the embedding, layer by layer.
#[must_use]
pub fn places(decoder: &Decoder) -> Vec<PlaceInfo> {
    let parts = &decoder.parts;
    let mut all = Vec::new();
    for (layer, parts) in parts.layers.iter().enumerate() {
        all.push(of_matrix(Place::Qkv { layer }, &parts.attention.qkv));
        all.push(of_matrix(Place::AttentionOutput { layer }, &parts.attention.output.weight));
        let shared = match &parts.ffn {
            Ffn::Dense(ffn) => Some(ffn),
            Ffn::Moe(ffn) => {
                all.push(of_matrix(Place::Router { layer }, &ffn.router));
                for (expert, modules) in ffn.experts.modules().iter().enumerate() {
                    let places = [Place::GateUp { layer, expert }, Place::Down { layer, expert }];
                    all.extend(of_expert(places, ffn.experts.layout(), modules));
                }
                ffn.shared.as_ref()
            }
        };
        if let Some(DenseFfn { weights }) = shared {
            let places = [Place::SharedGateUp { layer }, Place::SharedDown { layer }];
            all.extend(weights.modules().iter().flat_map(|modules| of_expert(places, weights.layout(), modules)));
        }
    }
    all.push(of_matrix(Place::Head, decoder.head()));
    all
}

fn of_matrix(place: Place, matrix: &Matrix) -> PlaceInfo {
    let layout = matrix.layout();
    PlaceInfo { place, inputs: layout.k, format: layout.format, modules: matrix.modules().to_vec() }
}

fn of_expert([gate_up, down]: [Place; 2], layout: FfnLayout, modules: &ExpertModules) -> [PlaceInfo; 2] {
    let FfnLayout { format, hidden, intermediate } = layout;
    let module = |name: &String, rows| Module { name: name.clone(), rows };
    let pair = vec![module(&modules.gate, intermediate), module(&modules.up, intermediate)];
    [
        PlaceInfo { place: gate_up, inputs: hidden, format, modules: pair },
        PlaceInfo { place: down, inputs: intermediate, format, modules: vec![module(&modules.down, hidden)] },
    ]
}
