//! One file of a pack: what lies where in it, and how it is written.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    fs::File,
    io::{self, Seek, SeekFrom, Write},
    path::Path,
    sync::atomic::AtomicBool,
};

use cadre_engine::nn::{FfnLayout, Layout, PackingError};
use serde_json::{Map, Value, json};

use crate::{
    Error, Result,
    files::{
        Source,
        write::{Stopped, go_on, write_safely},
    },
    summary::layer_of,
    tensors::{ALIGNMENT, PackInfo, PackedEntry, PackedLayout, Stored, TensorSet, encode_header, read_header},
    weights::{Loader, PlannedContent, PlannedTensor},
};

/// Bytes of a vector that are copied at a time.
const COPY_BYTES: usize = 1 << 20;

/// The tensors of one file, in the order in which they lie.
pub(super) struct Shard {
    /// The file's name.
    pub file: String,
    /// Packed ones first, because they lie aligned; then the plain ones, those with larger numbers first.
    pub tensors: Vec<PlannedTensor>,
}

impl Shard {
    /// What belongs to no layer, and then layer after layer, each a file.
    pub(super) fn plan(tensors: Vec<PlannedTensor>, source: &TensorSet) -> Vec<Self> {
        let mut by_layer: BTreeMap<Option<u64>, Vec<PlannedTensor>> = BTreeMap::new();
        for tensor in tensors {
            by_layer.entry(layer_of(&tensor.name)).or_default().push(tensor);
        }
        let count = by_layer.len();
        let file = |index| format!("model-{:05}-of-{count:05}.safetensors", index + 1);
        let shards = by_layer.into_values().enumerate().map(|(index, mut tensors)| {
            tensors.sort_by_key(|tensor| Reverse(stored(&tensor.content, source).alignment()));
            Self { file: file(index), tensors }
        });
        shards.collect()
    }

    /// Bytes of all that it is made from.
    pub(super) fn source_bytes(&self, source: &TensorSet) -> u64 {
        let bytes = |index: &usize| source.info(*index).bytes;
        let of = |tensor: &PlannedTensor| match &tensor.content {
            // Those were read, and counted, when they were planned.
            PlannedContent::Vector(_) => 0,
            PlannedContent::Matrix(_, parts) => parts.iter().map(|part| bytes(&part.tensor)).sum::<u64>(),
            PlannedContent::Expert(_, tensors) => tensors.iter().map(bytes).sum(),
        };
        self.tensors.iter().map(of).sum()
    }
}

/// What is known of a tensor when it lies in the file.
#[derive(Clone, Default)]
struct Written {
    /// How far packing took it from its source.
    error: PackingError,
    /// CRC-32 of its data.
    checksum: u32,
}

/// How a tensor is stored in the pack.
fn stored(content: &PlannedContent, source: &TensorSet) -> Stored {
    match content {
        PlannedContent::Vector(index) => source.info(*index).stored,
        PlannedContent::Matrix(Layout { format, .. }, _) | PlannedContent::Expert(FfnLayout { format, .. }, _) => {
            Stored::Packed(*format)
        }
    }
}

/// All that writing a shard needs.
pub(super) struct Writing<'a> {
    pub loader: &'a Loader<'a>,
    pub tensors: &'a TensorSet,
    pub info: &'a PackInfo,
    pub output: &'a Path,
    pub stop: &'a AtomicBool,
}

impl Writing<'_> {
    /// Writes the shard, which is there whole or not at all.
    pub(super) fn write(&self, shard: &Shard) -> Result<()> {
        write_safely(self.output, &shard.file, &mut |file| self.write_into(shard, file))
    }

    /// The data first: what the header says of it is known after it.
    fn write_into(&self, shard: &Shard, file: &mut File) -> Result<(), Stopped> {
        let mut written = vec![Written::default(); shard.tensors.len()];
        let header = self.header(shard, &written);
        file.seek(SeekFrom::Start(header.len() as u64))?;
        for (tensor, written) in shard.tensors.iter().zip(&mut written) {
            go_on(self.stop)?;
            *written = self.write_tensor(tensor, file)?;
        }
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&self.header(shard, &written))?;
        Ok(())
    }

    /// Writes one tensor.
    fn write_tensor(&self, tensor: &PlannedTensor, file: &mut File) -> Result<Written, Stopped> {
        let written = match &tensor.content {
            PlannedContent::Vector(index) => {
                self.copy(*index, file)?;
                Written::default()
            }
            PlannedContent::Matrix(layout, parts) => {
                let matrix = self.loader.pack_matrix(*layout, parts)?;
                file.write_all(matrix.data())?;
                let error = self.loader.matrix_error(&matrix, parts)?;
                Written { error, checksum: crc32fast::hash(matrix.data()) }
            }
            PlannedContent::Expert(layout, tensors) => {
                let expert = self.loader.pack_experts(*layout, std::slice::from_ref(tensors))?;
                file.write_all(expert.data())?;
                let error = self.loader.experts_error(&expert, std::slice::from_ref(tensors))?;
                Written { error, checksum: crc32fast::hash(expert.data()) }
            }
        };
        if let Some(layout) = tensor.content.layout() {
            let padding = layout.bytes() - layout.data_bytes();
            io::copy(&mut io::Read::take(io::repeat(0), padding), file)?;
        }
        Ok(written)
    }

    fn copy(&self, index: usize, file: &mut File) -> Result<(), Stopped> {
        let total = self.tensors.info(index).bytes;
        let mut bytes = vec![0; COPY_BYTES];
        for offset in (0..total).step_by(COPY_BYTES) {
            let count = usize::try_from(total - offset).unwrap_or(COPY_BYTES).min(COPY_BYTES);
            self.tensors.read(index, offset, &mut bytes[..count])?;
            file.write_all(&bytes[..count])?;
        }
        Ok(())
    }

    /// Length and header, with spaces up to the place where the data begins. Its size does not depend on what was
    /// written.
    fn header(&self, shard: &Shard, written: &[Written]) -> Vec<u8> {
        let (mut metadata, mut entries) = (self.info.metadata(), Map::new());
        let mut begin = 0;
        for (tensor, Written { error, checksum }) in shard.tensors.iter().zip(written) {
            let stored = stored(&tensor.content, self.tensors);
            let (shape, bytes) = self.described(&tensor.content);
            if let Some(layout) = tensor.content.layout() {
                let entry = PackedEntry { layout, error: *error, checksum: *checksum };
                metadata.insert(tensor.name.clone(), Value::String(entry.to_string()));
            }
            let end = begin + bytes;
            let entry = json!({"dtype": stored.name(), "shape": shape, "data_offsets": [begin, end]});
            entries.insert(tensor.name.clone(), entry);
            begin = end;
        }
        let mut header = Map::from_iter([("__metadata__".to_owned(), Value::Object(metadata))]);
        header.append(&mut entries);
        encode_header(header, ALIGNMENT)
    }

    /// A tensor's shape for other readers, and its bytes.
    fn described(&self, content: &PlannedContent) -> (Value, u64) {
        let packed = |layout: PackedLayout| (json!([layout.bytes()]), layout.bytes());
        match content {
            PlannedContent::Vector(index) => {
                let info = self.tensors.info(*index);
                (json!(info.shape), info.bytes)
            }
            PlannedContent::Matrix(layout, _) => packed(PackedLayout::Matrix(*layout)),
            PlannedContent::Expert(layout, _) => packed(PackedLayout::Expert(*layout)),
        }
    }

    /// Whether the shard is there: the same tensors in the same formats, from the same checkpoint. One that is damaged
    /// is not, and is written again.
    pub(super) fn is_finished(&self, shard: &Shard) -> Result<bool> {
        let path = self.output.join(&shard.file);
        let Some(source) = Source::open(path.display().to_string(), &path)? else { return Ok(false) };
        let in_the_way = |expected: String, found: String| {
            Err(Error::OutputInTheWay { file: path.display().to_string(), expected, found })
        };
        let found = match read_header(&source) {
            Ok(found) => found,
            Err(Error::TensorFile { .. } | Error::TensorEntry { .. }) => return Ok(false),
            Err(Error::Pack { what, found, .. }) => {
                return in_the_way(self.info.to_string(), format!("{what} {found}"));
            }
            Err(error) => return Err(error),
        };
        if found.pack.as_ref() != Some(self.info) {
            let found = found.pack.map_or_else(|| "no pack".to_owned(), |pack| pack.to_string());
            return in_the_way(self.info.to_string(), found);
        }
        let names: Vec<_> = found.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        if names != shard.tensors.iter().map(|tensor| tensor.name.as_str()).collect::<Vec<_>>() {
            return in_the_way(format!("{} tensors", shard.tensors.len()), format!("{} others", names.len()));
        }
        Ok(true)
    }
}
