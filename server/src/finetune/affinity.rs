//! The experts that a run trains because its data use them most (ESFT, Wang et al., arXiv:2407.01906): measured once, and
//! kept in a file as ESFT's own code writes it.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, Result};
use cadre_engine::train::{Trainer, affinity::most_used, places::Place};
use serde::{Deserialize, Serialize};

use super::data::{Data, StepSize, expert_loads};

/// The file in the output directory.
const FILE: &str = "expert_cfg.json";
/// Tokens of the data that are looked at: a layer's counts are then good to some per cent, within a minute or so.
const TOKENS: usize = 16_384;

/// The experts of each layer that are trained.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChosenExperts {
    experts: BTreeMap<usize, Vec<usize>>,
    shared_experts: bool,
    non_expert_modules: bool,
}

impl ChosenExperts {
    /// Those that `data` use most in `trainer`'s decoder: of each layer the fewest that make up `share` of its choices.
    ///
    /// # Errors
    /// When an expert can't be read.
    pub fn measure(trainer: &Trainer, data: &Data, size: StepSize, share: f64) -> Result<Self> {
        let sums = expert_loads(trainer, data, TOKENS, size)?;
        let experts = most_used(&sums, share).into_iter().enumerate().filter(|(_, experts)| !experts.is_empty());
        Ok(Self { experts: experts.collect(), shared_experts: false, non_expert_modules: false })
    }

    /// Those that an earlier start of the run in `output` has kept.
    ///
    /// # Errors
    /// When the file is broken, or can't be read.
    pub fn read(output: &Path) -> Result<Self> {
        let path = output.join(FILE);
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&bytes).with_context(|| format!("{} is broken", path.display()))
    }

    /// Keeps them in `output`.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn write(&self, output: &Path) -> Result<()> {
        let path = output.join(FILE);
        fs::write(&path, serde_json::to_vec_pretty(self)?).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Whether the matrix at `place` is of one of them.
    pub fn has(&self, place: Place) -> bool {
        match place {
            Place::GateUp { layer, expert } | Place::Down { layer, expert } => {
                self.experts.get(&layer).is_some_and(|experts| experts.contains(&expert))
            }
            _ => false,
        }
    }
}
