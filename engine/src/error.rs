//! The one error of this crate.

/// What can go wrong in the engine. Nothing here is a caller's mistake in a request: those are
/// [`SubmitError`](crate::request::SubmitError)s.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tensor does not have the shape that an op or block needs.
    #[error("{what}: expected shape {expected:?}, found {found:?}")]
    Shape {
        /// The op or weight.
        what: String,
        /// The shape needed.
        expected: Vec<usize>,
        /// The shape found.
        found: Vec<usize>,
    },
    /// A gradient was asked of an op that has no backward.
    #[error("{op} has no backward: detach its inputs, or use it outside of training")]
    NotDifferentiable {
        /// The op's name.
        op: &'static str,
    },
    /// A model's configuration asks for something that no block can do.
    #[error("{0}")]
    Config(String),
    /// Memory could not be had.
    #[error(transparent)]
    Memory(#[from] cadre_kernels::buffer::AllocError),
    /// An expert's weights could not be fetched.
    #[error("{error}")]
    Fetch {
        /// Which one, and why.
        error: crate::experts::FetchError,
        /// The rows of the step whose tokens need it, ascending.
        rows: Vec<u32>,
    },
    /// candle refused an operation.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}
