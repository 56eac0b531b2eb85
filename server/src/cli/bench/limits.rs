//! What the machine can do around each run, since neighbours change it.
//!
//! The bound that follows from it: no step is shorter than reading once what it uses takes, from memory or from the disk, nor
//! than its multiply-adds do; keys, values and activations count as nothing. A model that the caches hold may exceed it,
//! and so may one whose memory and disk are read at the same time.

use anyhow::Result;
use cadre_engine::{
    compute::{Compute, Roofline},
    model::Model,
    nn::Format,
};
use cadre_models::{Outline, Placement};

use crate::{
    engine::{Engine, EngineOptions},
    measure::{self, Reader},
    plan::{Machine, Step},
};

/// Measures the machine again and again.
pub(super) struct Limits {
    compute: Compute,
    format: Format,
    /// Reads experts, if those don't fit the memory.
    reader: Option<Reader>,
    last: Machine,
}

impl Limits {
    /// Measures for the first time. `steps`: those that were timed before.
    ///
    /// # Errors
    /// When there is no memory for it, or the experts can't be read.
    pub(super) fn new(engine: &Engine, options: &EngineOptions, steps: Vec<Step>) -> Result<Self> {
        let reader = match &engine.store {
            Some(_) => reader(engine, options)?,
            None => None,
        };
        let last = Machine { read_bandwidth: 0.0, matrix_rate: 0.0, steps, reads: Vec::new() };
        // The experts do most of the work.
        let mut limits = Self { compute: engine.compute.clone(), format: engine.formats.experts, reader, last };
        limits.around()?;
        Ok(limits)
    }

    /// Measures again: the better of this time and the last one, each limit for itself.
    ///
    /// # Errors
    /// When there is no memory for it, or the experts can't be read.
    pub(super) fn around(&mut self) -> Result<Machine> {
        let Roofline { read_bandwidth, matrix_rate } = measure::roofline(&self.compute, self.format)?;
        let reads = self.reader.as_mut().map(Reader::measure).transpose()?.unwrap_or_default();
        let now = Machine { read_bandwidth, matrix_rate, steps: self.last.steps.clone(), reads };
        let before = std::mem::replace(&mut self.last, now.clone());
        Ok(now.max(before))
    }

    /// As it was found the last time.
    pub(super) fn last(&self) -> &Machine {
        &self.last
    }
}

fn reader(engine: &Engine, options: &EngineOptions) -> Result<Option<Reader>> {
    let outline = cadre_models::outline(&engine.checkpoint, &options.formats, Placement::Stored, &engine.compute)?;
    let Outline { decoder, experts, .. } = outline;
    experts.map(|experts| Reader::open(experts, decoder.info())).transpose()
}
