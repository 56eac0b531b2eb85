//! The way that passages go: by steps of the runtime, or layer by layer.

use std::{
    ops::ControlFlow,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::{Context, Result};
use cadre_engine::{
    runtime::Runtime,
    score::{Passage, Progress},
};

use super::{layers::Layers, result::Scored, steps};
use crate::{
    engine::{self, Engine, EngineOptions, Opened},
    memory::Budget,
};

/// Which way is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LaneKind {
    /// Requests to the runtime.
    Steps,
    /// Super-batches, layer by layer.
    Layers,
}

/// A way that is ready.
pub enum Lane {
    /// Requests to the runtime, so many at a time.
    Steps {
        /// The engine.
        runtime: Runtime,
        /// Passages under way.
        in_flight: usize,
    },
    /// Super-batches, layer by layer.
    Layers(Box<Layers>),
}

impl Lane {
    /// Loads the model. Without `kind`, it is layer by layer if memory doesn't hold all weights. `rows` are those of a
    /// super-batch; what of them doesn't fit goes into `folder`.
    ///
    /// # Errors
    /// When the model can't be read, or doesn't fit the memory.
    pub fn start(
        options: &EngineOptions,
        kind: Option<LaneKind>,
        rows: usize,
        max_model_len: usize,
        folder: PathBuf,
    ) -> Result<Self> {
        let opened = Opened::new(options)?;
        let by_size = || match opened.budget {
            Budget::Stored { .. } => LaneKind::Layers,
            Budget::Resident { .. } => LaneKind::Steps,
        };
        match kind.unwrap_or_else(by_size) {
            LaneKind::Steps => {
                drop(opened);
                let Engine { runtime, .. } = engine::start(options)?;
                Ok(Self::Steps { runtime, in_flight: 2 * options.max_num_seqs })
            }
            LaneKind::Layers => {
                Layers::start(options, opened, rows, max_model_len, folder).map(|layers| Self::Layers(Box::new(layers)))
            }
        }
    }

    /// Scores `passages`; `tell` is told which part of it is done. None if `stop` is set before the end.
    ///
    /// # Errors
    /// When weights can't be read, the disk can't be written, or the engine fails.
    pub fn score(
        &mut self,
        passages: &[Passage],
        stop: &AtomicBool,
        mut tell: impl FnMut(f64),
    ) -> Result<Option<Vec<Scored>>> {
        match self {
            Self::Steps { runtime, in_flight } => {
                let part = |done: usize| tell(done as f64 / passages.len() as f64);
                steps::score(&runtime.handle(), *in_flight, passages, stop, part)
            }
            Self::Layers(layers) => {
                let Layers { lane, spill, .. } = &mut **layers;
                let spill = spill.as_deref().map(tempfile::tempfile_in).transpose();
                let spill = spill.context("cannot make a file for hidden states that don't fit the memory")?;
                let scores = lane.score(passages, spill, |Progress { done, total }| {
                    tell(done as f64 / total as f64);
                    if stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                })?;
                let told =
                    |scored: Result<_, cadre_engine::sampler::SampleError>| scored.map_err(|error| error.to_string());
                Ok(scores.map(|scores| scores.into_iter().map(told).collect()))
            }
        }
    }

    /// Ends it, and says what it read if it did.
    pub fn end(self) -> Option<String> {
        match self {
            Self::Steps { runtime, .. } => {
                runtime.shutdown(Duration::ZERO);
                None
            }
            Self::Layers(layers) => layers.store.as_ref().map(|store| store.counters().to_string()),
        }
    }
}
