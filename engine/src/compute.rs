//! What computes: the worker pool and the instruction tier of the kernels.

use std::sync::Arc;

use cadre_kernels::{
    format::Format,
    isa::{Isa, NoSuchTier},
    pool::Pool,
    roofline::{self, MatrixKind},
};

use crate::Result;

/// The worker pool and the tier; cheap to clone, made once per process.
#[derive(Clone)]
pub struct Compute {
    /// The persistent workers.
    pub pool: Arc<Pool>,
    /// The kernels' instruction tier.
    pub isa: Isa,
}

impl Compute {
    /// `threads` workers (the calling thread is one of them) and the best tier of this machine.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        Self { pool: Arc::new(Pool::new(threads)), isa: Isa::detect() }
    }

    /// Whether this machine has the tier that the environment variable `CADRE_CPU` asks for.
    ///
    /// # Errors
    /// When it hasn't.
    pub fn check_tier() -> Result<(), NoSuchTier> {
        Isa::requested().map(drop)
    }

    /// Measures this machine's limits for a model whose weights have `format`, reading a buffer of `buffer_bytes`: more
    /// than the caches hold. Takes about half a second.
    ///
    /// # Errors
    /// When the buffer can't be had.
    pub fn roofline(&self, format: Format, buffer_bytes: usize) -> Result<Roofline> {
        let kind = if format == Format::F32 {
            MatrixKind::F32
        } else if format == Format::Bf16 {
            MatrixKind::Bf16
        } else {
            MatrixKind::Int8
        };
        Ok(Roofline {
            read_bandwidth: roofline::read_bandwidth(&self.pool, buffer_bytes)?,
            matrix_rate: roofline::matrix_rate(&self.pool, self.isa, kind),
        })
    }
}

/// What a machine can do at most.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Roofline {
    /// Bytes per second that all threads together read from memory.
    pub read_bandwidth: f64,
    /// Operations per second, two a multiply-add, of all threads together in the instruction that products are made of.
    pub matrix_rate: f64,
}
