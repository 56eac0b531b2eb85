//! What is trained of a decoder.

use std::{collections::HashMap, ops::Range};

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

use cadre_kernels::gradient::{Strided, add_product};

use super::{
    parameters::{ParameterId, Parameters},
    places::Place,
};
use crate::compute::Compute;

/// What is trained of each matrix, and of what isn't one.
#[derive(Debug, Default)]
pub struct Trained {
    matrices: HashMap<Place, TrainedMatrix>,
    /// The embedding `[vocab, hidden]`.
    pub embedding: Option<ParameterId>,
    /// The norm before the head.
    pub norm: Option<ParameterId>,
    /// Layer by layer; empty if nothing of them is trained.
    pub vectors: Vec<TrainedVectors>,
}

/// What is trained of a layer that isn't a matrix.
#[derive(Debug, Default)]
pub struct TrainedVectors {
    /// The norm before attention.
    pub attention_norm: Option<ParameterId>,
    /// The bias of the projection to queries, keys and values.
    pub qkv_bias: Option<ParameterId>,
    /// The norms of queries and keys.
    pub head_norms: Option<[ParameterId; 2]>,
    /// The bias of attention's output.
    pub output_bias: Option<ParameterId>,
    /// The norm before the feed-forward.
    pub ffn_norm: Option<ParameterId>,
}

/// What is trained of one matrix.
#[derive(Debug, Clone, Default)]
pub struct TrainedMatrix {
    /// Added to its products.
    pub adapters: Vec<Adapter>,
    /// Rows whose weights are trained themselves.
    pub weights: Vec<TrainedRows>,
}

/// `scale · x · Aᵀ · Bᵀ`, added to some outputs of a matrix (Hu et al., arXiv:2106.09685).
#[derive(Debug, Clone)]
pub struct Adapter {
    /// The outputs.
    pub rows: Range<usize>,
    /// A, `[rank, inputs]`.
    pub a: ParameterId,
    /// B, `[rows, rank]`.
    pub b: ParameterId,
    /// The rank.
    pub rank: usize,
    /// What the product is multiplied with.
    pub scale: f32,
}

impl Adapter {
    /// Adds `scale · B · A` to `rows` of the weight, counted from the first that is adapted: a model with that weight needs
    /// no adapter. The product is summed by itself, over ascending ranks, and added once, as PEFT does.
    ///
    /// # Panics
    /// When `weight` isn't `rows` by the adapter's inputs.
    pub fn add_to(&self, compute: &Compute, parameters: &Parameters, rows: Range<usize>, weight: &mut [f32]) {
        let (a, b) = (&parameters.get(self.a).values, &parameters.get(self.b).values);
        let b = Strided::new(&b[rows.start * self.rank..rows.end * self.rank], rows.len(), self.rank);
        let mut product = vec![0.0; weight.len()];
        add_product(&compute.pool, compute.isa, b, Strided::new(a, self.rank, a.len() / self.rank), &mut product);
        weight.iter_mut().zip(product).for_each(|(weight, added)| *weight += self.scale * added);
    }
}

/// Rows of a matrix that are trained.
#[derive(Debug, Clone)]
pub struct TrainedRows {
    /// The rows.
    pub rows: Range<usize>,
    /// The weights, `[rows, inputs]`.
    pub weight: ParameterId,
}

/// Of a matrix of which nothing is trained.
static NOTHING: TrainedMatrix = TrainedMatrix { adapters: Vec::new(), weights: Vec::new() };

impl Trained {
    /// What is trained of the matrix at `place`.
    #[must_use]
    pub fn of(&self, place: Place) -> &TrainedMatrix {
        self.matrices.get(&place).unwrap_or(&NOTHING)
    }

    /// The same, to add to.
    pub fn of_mut(&mut self, place: Place) -> &mut TrainedMatrix {
        self.matrices.entry(place).or_default()
    }

    /// All matrices of which something is trained.
    pub fn matrices(&self) -> impl Iterator<Item = (Place, &TrainedMatrix)> {
        self.matrices.iter().map(|(place, matrix)| (*place, matrix))
    }

    /// Whether weights, or vectors, are trained themselves.
    pub(super) fn has_weights(&self) -> bool {
        self.embedding.is_some()
            || self.norm.is_some()
            || !self.vectors.is_empty()
            || self.matrices.values().any(|matrix| !matrix.weights.is_empty())
    }

    /// What is trained of the layer's vectors.
    pub(super) fn vectors(&self, layer: usize) -> &TrainedVectors {
        static NONE: TrainedVectors = TrainedVectors {
            attention_norm: None,
            qkv_bias: None,
            head_norms: None,
            output_bias: None,
            ffn_norm: None,
        };
        self.vectors.get(layer).unwrap_or(&NONE)
    }
}

/// Where A `[rank, inputs]` of adapter number `index` begins: evenly in ±1/√inputs, as PEFT's (Kaiming with a = √5).
#[must_use]
pub fn initial_a(seed: u64, index: u64, rank: usize, inputs: usize) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(index);
    let bound = 1.0 / (inputs as f32).sqrt();
    // 24 bits fill an f32's fraction.
    let unit = |bits: u32| (bits >> 8) as f32 / (1 << 24) as f32;
    (0..rank * inputs).map(|_| (2.0 * unit(random.next_u32()) - 1.0) * bound).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::parameters::Parameter;

    #[test]
    fn an_adapter_is_added_to_some_rows() {
        let (rank, inputs, outputs) = (2, 3, 4);
        let mut parameters = Parameters::default();
        let mut push = |name: &str, shape: [usize; 2], values: Vec<f32>| {
            parameters.push(Parameter { name: name.into(), shape: shape.to_vec(), values }).unwrap()
        };
        let a = push("a", [rank, inputs], vec![1.0, 2.0, 3.0, -1.0, 0.0, 4.0]);
        let b = push("b", [outputs, rank], vec![9.0, 9.0, 1.0, 10.0, -2.0, 0.5, 9.0, 9.0]);
        let adapter = Adapter { rows: 5..9, a, b, rank, scale: 0.5 };
        let mut weight = vec![100.0; 2 * inputs];
        adapter.add_to(&Compute::new(2), &parameters, 1..3, &mut weight);
        assert_eq!(weight, [95.5, 101.0, 121.5, 98.75, 98.0, 98.0]);
    }
}
