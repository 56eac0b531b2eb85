//! Checkpoints as Hugging Face lays them out, and the architectures that cadre can make of them.
//!
//! | part | does |
//! |---|---|
//! | [`checkpoint`] | opens a directory, a hub's id or the embedded default; finds the files |
//! | `hub` | downloads into the cache that huggingface_hub uses |
//! | `files`, `json`, `fnv` | small files whole, weights by positioned reads; a hash that stays the same |
//! | [`config`] | config.json: bounds, rotary embedding; generation_config.json |
//! | `tensors` | safetensors headers and the index of shards, checked against the files' sizes |
//! | `weights`, `blocks` | tensors by name and shape, packed as they are read; every tensor accounted for |
//! | [`formats`] | which format each part of a model gets |
//! | [`mod@pack`] | writes a checkpoint whose weights lie as the kernels take them |
//! | `registry` | the table from `model_type` to the file that builds it |
//! | `qwen3_moe`, `olmoe`, `bailing_moe`, `bailing_moe_v2` | the architectures |
//! | [`load`](mod@load) | from a checkpoint to a model |
//! | [`rewrite`] | a checkpoint written again with other numbers, file by file |
//! | [`mod@merge`] | an adapter merged into a checkpoint's weights |
//! | [`adapter`] | LoRA adapters as PEFT lays them out: what they adapt, and their files |
//! | `routing_profile` | how often a pack's experts were used, kept beside it |
//! | [`tokenizer`], [`text_stream`] | text to tokens, and back, also one by one |
//! | [`chat_template`] | a conversation to a prompt |
//! | [`targets`] | the modules that a user's names stand for |
//! | [`dataset`] | JSON lines to the examples of fine-tuning, and those into bins |
//! | [`training_state`] | what a training run needs to go on |
//! | [`summary`] | what a checkpoint holds, from its headers |
//!
//! To add an architecture: one file that assembles the blocks of `cadre_engine::nn`, one row in `registry`.
//!
//! What a file says is never believed before it is checked: no panic, and no allocation that the file's own size does
//! not justify. There is one [`Error`]; its messages name the file, what was expected and what was found.

pub mod adapter;
mod bailing;
mod bailing_moe;
mod bailing_moe_v2;
mod blocks;
pub mod chat_template;
pub mod checkpoint;
pub mod config;
pub mod dataset;
mod embedded;
mod error;
mod files;
mod fnv;
pub mod formats;
mod hub;
mod json;
pub mod load;
pub mod merge;
mod olmoe;
pub mod pack;
mod qwen3_moe;
mod registry;
pub mod rewrite;
mod routing_profile;
mod stored_experts;
pub mod summary;
pub mod targets;
mod tensors;
#[cfg(test)]
mod testing;
pub mod text_stream;
pub mod tokenizer;
pub mod training_state;
mod weights;

pub use chat_template::{ChatTemplate, RenderOptions};
pub use checkpoint::{Checkpoint, open};
pub use config::GenerationConfig;
pub use dataset::{Dataset, DatasetError, DatasetOptions, Example, LossOn};
pub use error::Error;
pub use formats::{FormatOptions, Formats};
pub use hub::DownloadProgress;
pub use load::{LoadedModel, Outline, Placement, load, outline};
pub use registry::architectures;
pub use routing_profile::RoutingProfile;
pub use stored_experts::{Conversion, UnopenedExperts};
pub use summary::Summary;
pub use tensors::{Stored, StoredType};
pub use text_stream::TextStream;
pub use tokenizer::Tokenizer;
pub use weights::LoadProgress;

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;
