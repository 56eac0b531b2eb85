//! The blocks that architectures are assembled from. What differs between two architectures is data in these blocks;
//! an architecture's file names tensors and sizes.

mod attention;
mod decoder;
mod experts;
mod ffn;
mod linear;
mod matrix;
mod norm;
mod packing;
mod probe;
mod rope;

pub use attention::{Attention, AttentionConfig, HeadNorms};
pub use cadre_kernels::{
    ffn::FfnLayout,
    format::{Format, Layout},
    router::{GroupLimit, RouterOptions, Scores},
};
pub use decoder::{Decoder, DecoderLayer, DecoderParts};
pub(crate) use experts::matrices;
pub use experts::{ExpertModules, ExpertPart, Experts, expert_bytes, pack_expert};
pub use ffn::{DenseFfn, Ffn, MoeFfn, RoutedExperts};
pub use linear::Linear;
pub use matrix::{Matrix, Module};
pub use norm::RmsNorm;
pub use packing::PackingError;
pub use probe::{Probe, StepTimes};
pub use rope::{Rope, RopeConfig, RopeScaling};
