//! What computes: the worker pool and the instruction tier of the kernels.

use std::sync::Arc;

use cadre_kernels::{isa::Isa, pool::Pool};

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
}
