//! LoRA adapters (Hu et al., arXiv:2106.09685) in products with the matrices that they change: for training, and beside
//! the base model for the requests that name one.
//!
//! In serving, a row's adapter adds to that row's products only, and what it adds depends on nothing but the row: so
//! requests for different adapters, and for none, share a step and get the bits that they would get alone. Rows without
//! an adapter take the same way as in a model that has none.

mod loaded;
mod rows;
#[cfg(test)]
mod tests;
mod values;

pub use loaded::LoadedAdapter;
pub use rows::RowAdapters;
pub(crate) use values::AdapterValues;

use crate::train::places::Place;

/// One of a layer's two kinds of feed-forward, by the layer's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FfnPlace {
    /// Of the experts that a router chooses from.
    Routed(usize),
    /// Of the one that all tokens use.
    Shared(usize),
}

impl FfnPlace {
    /// The places of gate|up and of down of one of its experts.
    pub(crate) fn matrices(self, expert: usize) -> [Place; 2] {
        match self {
            Self::Routed(layer) => [Place::GateUp { layer, expert }, Place::Down { layer, expert }],
            Self::Shared(layer) => [Place::SharedGateUp { layer }, Place::SharedDown { layer }],
        }
    }
}
