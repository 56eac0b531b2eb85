//! CPU kernels of cadre: slices in, slices out. No tensors, no models, no files.
//!
//! - [`buffer`]: memory for weights and caches, 64-byte aligned, in huge pages.
//! - [`slots`]: equal parts of such memory, for weights that come and go.
//! - [`format`](mod@format): the packed weight formats: panels of 16 output columns.
//! - [`pool`]: the persistent worker pool that every parallel kernel runs on.
//! - [`isa`]: the instruction tier, chosen once at start.
//! - [`matmul`]: dense products over packed weights.
//! - [`ffn`]: the gated feed-forward of dense layers and experts, grouped by expert.
//! - [`attention`]: attention over paged keys and values.
//! - [`gradient`]: what training adds: the backward passes, attention over whole sequences.
//! - [`qkv`]: from the fused projection to queries, keys and values: bias, clip, norm and position.
//! - [`roofline`]: the machine's own limits: memory's read rate and the rate of multiply-adds.
//! - [`norm`], [`rope`], [`router`], [`rows`], [`activation`]: the small ops.
//! - [`logits`]: passes over the vocabulary, for the sampler.
//!
//! What a kernel may assume of its slices: the sizes that its contract names (it asserts them once, at the entry),
//! f32 activations in rows without gaps, packed weights in a [`buffer::Buffer`] or any slice of the right size.
//! Every sum has one fixed order that depends neither on the number of rows nor on the number of threads: a row's
//! result has the same bits alone and in any batch.

pub mod activation;
pub mod attention;
pub mod buffer;
pub mod ffn;
pub mod format;
pub mod gradient;
pub mod isa;
pub mod logits;
pub mod matmul;
pub mod norm;
pub mod pool;
pub mod qkv;
pub mod roofline;
pub mod rope;
pub mod router;
pub mod rows;
mod shared;
pub mod slots;
#[cfg(test)]
mod test_support;
