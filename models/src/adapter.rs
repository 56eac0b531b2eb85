//! LoRA adapters in the layout of PEFT: which modules of a model they adapt, and the files that hold them.
//!
//! An adapter of an expert comes in two forms. *Per expert*, as hub checkpoints name the experts' modules: gate, up and
//! down have adapters of their own. *Fused*, as transformers 5 stacks them: gate and up share one, and a file has the
//! adapters of all experts of a layer in one tensor. In memory both are adapters of rows of one expert's matrix.

mod average;
mod config;
mod file;
mod targets;
#[cfg(test)]
mod tests;

use cadre_engine::train::{
    parameters::{Parameter, ParameterId, Parameters},
    places::{Place, PlaceInfo},
    trained::{Adapter, Trained},
};

pub use average::{Averaged, average};
pub use config::AdapterConfig;
pub use file::{CONFIG_FILE, WEIGHTS_FILE};
pub use targets::{LoraOptions, LoraPlan};

use crate::Result;

/// How the adapters of routed experts are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdapterLayout {
    /// Gate and up of an expert share one; a file stacks all experts of a layer.
    Fused,
    /// Gate, up and down of an expert have their own.
    PerExpert,
}

/// Adapters of a decoder.
#[derive(Debug)]
pub struct Lora {
    /// What they adapt.
    pub trained: Trained,
    /// Their numbers.
    pub parameters: Parameters,
    /// How they are saved.
    pub files: AdapterFiles,
}

/// How the adapters of a decoder are saved.
#[derive(Debug)]
pub struct AdapterFiles {
    /// What PEFT's adapter_config.json says of them.
    pub config: AdapterConfig,
    /// Where each of them lies in adapter_model.safetensors.
    entries: Vec<Entry>,
}

/// One adapter, and where it lies in a file.
#[derive(Debug, Clone, PartialEq)]
struct Entry {
    place: Place,
    /// Its outputs among those of the place.
    rows: std::ops::Range<usize>,
    inputs: usize,
    rank: usize,
    scale: f32,
    at: At,
}

/// Where an adapter lies in a file.
#[derive(Debug, Clone, PartialEq)]
enum At {
    /// In tensors of its own.
    Module(String),
    /// In those of all of a layer's experts.
    Stack {
        /// `….mlp.experts`
        experts: String,
        part: Part,
        expert: usize,
        count: usize,
    },
}

/// The two matrices of a fused expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    GateUp,
    Down,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::GateUp => "gate_up_proj",
            Self::Down => "down_proj",
        }
    }
}

impl Lora {
    /// The adapters of `entries`; their numbers come from `values`: A, then B.
    fn assemble(
        config: AdapterConfig,
        entries: Vec<Entry>,
        mut values: impl FnMut(usize, &Entry) -> Result<[Vec<f32>; 2]>,
    ) -> Result<Self> {
        let (mut trained, mut parameters) = (Trained::default(), Parameters::default());
        for (index, entry) in entries.iter().enumerate() {
            let [a, b] = values(index, entry)?;
            let name = entry.name();
            let mut push = |side: &str, shape: [usize; 2], values| -> Result<ParameterId> {
                let parameter = Parameter { name: format!("{name}.{side}.weight"), shape: shape.to_vec(), values };
                Ok(parameters.push(parameter)?)
            };
            let a = push("lora_A", [entry.rank, entry.inputs], a)?;
            let b = push("lora_B", [entry.rows.len(), entry.rank], b)?;
            let adapter = Adapter { rows: entry.rows.clone(), a, b, rank: entry.rank, scale: entry.scale };
            trained.of_mut(entry.place).adapters.push(adapter);
        }
        Ok(Self { trained, parameters, files: AdapterFiles { config, entries } })
    }
}

impl Entry {
    /// What its tensors are called in memory: as in a file, but each expert has its own.
    fn name(&self) -> String {
        match &self.at {
            At::Module(name) => name.clone(),
            At::Stack { experts, part, expert, .. } => format!("{experts}.{expert}.{}", part.name()),
        }
    }
}

/// `….experts` of a routed expert's place, and which one it is of how many.
fn stack_of(info: &PlaceInfo, places: &[PlaceInfo]) -> Option<(String, Part, usize, usize)> {
    let (part, layer, expert) = match info.place {
        Place::GateUp { layer, expert } => (Part::GateUp, layer, expert),
        Place::Down { layer, expert } => (Part::Down, layer, expert),
        _ => return None,
    };
    // `….experts.7.gate_proj` without its last two components.
    let experts = info.modules.first()?.name.rsplitn(3, '.').nth(2)?.to_owned();
    let of_layer = |other: &&PlaceInfo| matches!(other.place, Place::Down { layer: of, .. } if of == layer);
    Some((experts, part, expert, places.iter().filter(of_layer).count()))
}
