use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

use cadre_kernels::{
    format::PANEL,
    gradient::{Strided, add_product},
};

use super::{AdapterValues, FfnPlace};
use crate::{
    Error, Result,
    compute::Compute,
    train::{
        parameters::Parameters,
        places::{Place, PlaceInfo},
        trained::Trained,
    },
};

/// A LoRA adapter that requests can name. It never changes: one that is loaded anew is another one, whatever its name.
pub struct LoadedAdapter {
    name: String,
    /// Differs from that of every other one of this process; never 0.
    id: u64,
    matrices: HashMap<Place, LowRank>,
    /// Layers of which a routed expert is adapted.
    routed_layers: HashSet<usize>,
}

/// `x · A · B`: all adapters of one matrix side by side, laid out for products.
pub(super) struct LowRank {
    rank: usize,
    /// `[inputs, rank]`, scaled.
    a: Vec<f32>,
    /// `[rank, outputs]`, the outputs as they are packed.
    b: Vec<f32>,
}

impl LoadedAdapter {
    /// Lays out the adapters `trained`, whose numbers are `parameters`, for a decoder that has `places`. Numbers that are laid out
    /// leave: an adapter is never in memory twice.
    ///
    /// # Errors
    /// When an adapter is of a place that the decoder hasn't.
    pub fn new(name: &str, trained: &Trained, mut parameters: Parameters, places: &[PlaceInfo]) -> Result<Self> {
        static LAST_ID: AtomicU64 = AtomicU64::new(0);
        let mut matrices = HashMap::new();
        for info in places {
            let adapters = &trained.of(info.place).adapters;
            if !adapters.is_empty() {
                let paired = matches!(info.place, Place::GateUp { .. } | Place::SharedGateUp { .. });
                let gate = paired.then_some(info.outputs() / 2);
                let outputs = gate.map_or(info.outputs(), |gate| 2 * gate.next_multiple_of(PANEL));
                let values = AdapterValues { adapters, parameters: &parameters, paired: gate };
                let (a, b) = (values.a_transposed(info.inputs), values.b_transposed(outputs));
                matrices.insert(info.place, LowRank { rank: values.rank(), a, b });
                adapters.iter().flat_map(|adapter| [adapter.a, adapter.b]).for_each(|id| parameters.remove(id));
            }
        }
        let mut adapted = trained.matrices().filter(|(_, matrix)| !matrix.adapters.is_empty());
        if let Some((place, _)) = adapted.find(|(place, _)| !matrices.contains_key(place)) {
            return Err(Error::Config(format!("the adapter {name} is of another model: this one has no {place:?}")));
        }
        let layer = |place: &Place| match place {
            Place::GateUp { layer, .. } | Place::Down { layer, .. } => Some(*layer),
            _ => None,
        };
        let routed_layers = matrices.keys().filter_map(layer).collect();
        Ok(Self { name: name.to_owned(), id: LAST_ID.fetch_add(1, Ordering::Relaxed) + 1, matrices, routed_layers })
    }

    /// What it was called when it was loaded.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its number: keys and values are shared only between requests of the same one.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Bytes that it holds.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.matrices.values().map(|matrix| 4 * (matrix.a.len() + matrix.b.len()) as u64).sum()
    }

    pub(super) fn of(&self, place: Place) -> Option<&LowRank> {
        self.matrices.get(&place)
    }

    /// Whether it changes a feed-forward.
    pub(super) fn adapts(&self, ffn: FfnPlace) -> bool {
        match ffn {
            FfnPlace::Routed(layer) => self.routed_layers.contains(&layer),
            FfnPlace::Shared(_) => ffn.matrices(0).iter().any(|place| self.matrices.contains_key(place)),
        }
    }
}

impl PartialEq for LoadedAdapter {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl Eq for LoadedAdapter {}

impl fmt::Debug for LoadedAdapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoadedAdapter").field("name", &self.name).field("id", &self.id).finish_non_exhaustive()
    }
}

impl LowRank {
    pub fn inputs(&self) -> usize {
        self.a.len() / self.rank
    }

    pub fn outputs(&self) -> usize {
        self.b.len() / self.rank
    }

    /// What it adds to the products of `x` `[rows, inputs]`: `[rows, outputs]`.
    pub fn product(&self, compute: &Compute, x: &[f32]) -> Vec<f32> {
        let Compute { pool, isa } = compute;
        let (inputs, outputs, rank) = (self.inputs(), self.outputs(), self.rank);
        let rows = x.len() / inputs;
        let mut inner = vec![0.0; rows * rank];
        add_product(pool, *isa, Strided::new(x, rows, inputs), Strided::new(&self.a, inputs, rank), &mut inner);
        let mut out = vec![0.0; rows * outputs];
        add_product(pool, *isa, Strided::new(&inner, rows, rank), Strided::new(&self.b, rank, outputs), &mut out);
        out
    }
}
