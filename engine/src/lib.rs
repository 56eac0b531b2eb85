//! The machine under every model: blocks, paged KV cache, scheduler, sampler and the thread that steps.
//!
//! A step's way through this crate:
//! 1. [`runtime`] takes new requests from its channel and hands them to the [`scheduler`].
//! 2. The [`scheduler`] decides which [`sequence`]s run and with how many tokens, and owns the books of the
//!    KV blocks ([`kv::blocks`]). It touches no tensor, no clock and no I/O.
//! 3. The plan becomes a [`model::StepBatch`]: one flat axis of tokens.
//! 4. A [`model::Model`] walks it: `embed`, `layer(i)`, `head`. Architectures are assembled from the blocks
//!    in [`nn`], which call only [`ops`]; ops call the kernels of `cadre-kernels` on one worker pool.
//!    Experts that memory doesn't hold come from the store in [`experts`].
//! 5. The [`sampler`] turns logits into tokens; events go back through the request's sink.
//!
//! Scoring may walk it layer by layer over many texts instead: see [`score`].
//!
//! Training walks the same blocks with kernels that keep what a backward pass needs: see [`train`].
//!
//! What is absent on purpose: any architecture's name, HTTP, files, tokenizers.

pub mod adapter;
pub mod compute;
pub mod error;
pub mod experts;
pub mod kv;
pub mod model;
pub mod nn;
pub mod ops;
pub mod request;
pub mod runtime;
pub mod sampler;
pub mod scheduler;
pub mod score;
pub mod sequence;
pub mod train;

pub use candle_core::Tensor;
pub use error::Error;

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;
