//! Tensors on disk: safetensors headers, the index of a sharded checkpoint, stored types.
//!
//! Nothing here reads a weight or allocates by a number from a file that the file's own size does not justify.

mod header;
mod packed;
mod set;
mod stored;
mod write;

pub(crate) use header::{TensorInfo, encode_header, read_header, read_header_json};
pub(crate) use packed::{ALIGNMENT, PackInfo, PackedEntry, PackedLayout};
pub(crate) use set::{INDEX_FILE, SINGLE_FILE, TensorSet, is_plain_name, shards_of};
pub use stored::{Stored, StoredType};
pub(crate) use write::{Written, write_one_by_one, write_tensors};
