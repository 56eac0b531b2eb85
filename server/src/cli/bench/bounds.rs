//! The most that a machine allows: no step is shorter than reading its weights once takes, nor than its
//! multiply-adds do. Both are held to overlap fully; keys, values and activations count as nothing. A model that the
//! caches hold may exceed it, and so may uneven routing, which reads fewer experts than the bound expects.

use anyhow::Result;
use cadre_engine::{
    compute::{Compute, Roofline},
    nn::Format,
};

use super::{Kind, Run};
use crate::{
    engine::Engine,
    measure,
    plan::{Machine, Reads, Work},
};

/// What a model asks of a machine.
pub(super) struct Bounds {
    compute: Compute,
    format: Format,
    work: Work,
    /// Reads of experts, if they were measured before.
    reads: Vec<Reads>,
}

/// What a run could not exceed, why, and how much of it the run reached.
pub(super) struct Bound {
    pub(super) tokens_per_second: f64,
    pub(super) roofline: Roofline,
    pub(super) share: f64,
}

impl Bounds {
    pub(super) fn new(engine: &Engine, work: Work, measured: Option<&Machine>) -> Self {
        let reads = measured.map_or_else(Vec::new, |machine| machine.reads.clone());
        // The experts do most of the work.
        Self { compute: engine.compute.clone(), format: engine.formats.experts, work, reads }
    }

    /// Measures the machine.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub(super) fn measure(&self) -> Result<Roofline> {
        measure::roofline(&self.compute, self.format)
    }

    /// What the machine, which could do `roofline` around the run, allowed for the `speed` in tokens per second.
    pub(super) fn of(&self, kind: Kind, run: &Run, roofline: Roofline, speed: f64) -> Bound {
        let Roofline { read_bandwidth, matrix_rate } = roofline;
        let machine = Machine { read_bandwidth, matrix_rate, steps: Vec::new(), reads: self.reads.clone() };
        let tokens_per_second = kind.expected(&self.work, run, None, &machine).bound;
        Bound { tokens_per_second, roofline, share: speed / tokens_per_second }
    }
}
