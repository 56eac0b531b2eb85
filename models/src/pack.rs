//! Packing: a checkpoint becomes one whose matrices lie as the kernels take them, in formats of one's choice.
//!
//! A pack is a checkpoint in the Hugging Face layout: one safetensors file a layer and one for the rest, an index, and
//! the small files as they were. A matrix (also one that is made of several, as queries, keys and values are) is one
//! tensor, an expert is one tensor; vectors are as they were. [`load`](crate::load::load) reads it without converting.
//!
//! It is written file by file: a file is written under another name, and gets its own when it is safe on disk; the
//! index comes last. So a pack that was interrupted is never taken for a finished one, and the same call goes on after
//! the last file that was finished. No more than one matrix or expert is in memory.

mod shard;

use std::{borrow::Cow, fs, io, path::Path, sync::atomic::AtomicBool};

use cadre_engine::compute::Compute;
use serde_json::{Map, Value, json};

use crate::{
    Error, Result,
    checkpoint::{Checkpoint, open_directory},
    files::{
        Files,
        write::{create_directory, write_whole},
    },
    formats::FormatOptions,
    registry,
    summary::Summary,
    tensors::{INDEX_FILE, PackInfo, SINGLE_FILE},
    weights::{LoadProgress, Loader},
};
use shard::{Shard, Writing};

/// What packing gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Packed {
    /// Whether the same pack was there already, finished: nothing was written.
    pub was_finished: bool,
    /// The checkpoint that was packed.
    pub source: Summary,
    /// The pack.
    pub pack: Summary,
}

/// Packs `checkpoint` into the directory `output` on the pool of `compute`. An unfinished pack of the same checkpoint
/// in the same formats is gone on with. `on_bytes` is told, from several threads, how far it is; once `stop` is set it
/// ends with [`Error::Interrupted`].
///
/// # Errors
/// When the checkpoint cannot be loaded or is a pack, `output` holds something else, or cannot be written to.
pub fn pack(
    checkpoint: &Checkpoint,
    options: &FormatOptions,
    output: &Path,
    compute: &Compute,
    stop: &AtomicBool,
    on_bytes: &(dyn Fn(LoadProgress) + Sync),
) -> Result<Packed> {
    let architecture = registry::find(checkpoint.config())?;
    let tensors = checkpoint.tensors()?;
    if let Some(pack) = tensors.pack() {
        return Err(Error::AlreadyPacked { checkpoint: checkpoint.name().to_owned(), found: pack.formats.to_string() });
    }
    let formats = options.resolve(tensors.main_type());
    let mut loader = Loader::new(&tensors, compute, formats, on_bytes).planning();
    (architecture.build)(checkpoint.config(), &loader.root())?;
    loader.finish()?;
    let shards = Shard::plan(loader.take_plan(), &tensors);

    create_directory(output)?;
    let info = PackInfo { formats, source: tensors.fingerprint()? };
    let writing = Writing { loader: &loader, tensors: &tensors, info: &info, output, stop };
    let done = finished(&writing, &shards)?;
    let index = index(&shards).to_string();
    // No other file may be in the way: what lies beside shards of this pack is the pack's.
    let texts = checkpoint.text_files()?;
    if !done.contains(&true) {
        for (name, bytes) in &texts {
            refuse_another(output, name, bytes)?;
        }
        refuse_another(output, INDEX_FILE, index.as_bytes())?;
    }
    let was_complete = output.join(INDEX_FILE).exists() && done.iter().all(|done| *done);
    if !was_complete {
        // It comes last: with one that is left of a pack that lost a shard, half a pack would be taken for a whole one.
        remove_index(output)?;
        for (shard, done) in shards.iter().zip(done) {
            if done {
                loader.progress(shard.source_bytes(&tensors));
            } else {
                writing.write(shard)?;
            }
        }
    }
    // Also when the shards are all there: the checkpoint may have got another chat template since.
    let mut was_finished = was_complete;
    for (name, bytes) in &texts {
        if there(output, name)?.as_ref() != Some(bytes) {
            write_whole(output, name, bytes)?;
            was_finished = false;
        }
    }
    if !was_complete {
        write_whole(output, INDEX_FILE, index.as_bytes())?;
    }
    let packed = open_directory(output)?;
    Ok(Packed { was_finished, source: checkpoint.summary()?, pack: packed.summary()? })
}

/// Which shards are there already; nothing else may be.
fn finished(writing: &Writing<'_>, shards: &[Shard]) -> Result<Vec<bool>> {
    let output = writing.output;
    let failed = |reason| Error::Read { file: output.display().to_string(), reason };
    for entry in fs::read_dir(output).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
        let foreign = name.ends_with(".safetensors") && !shards.iter().any(|shard| shard.file == name);
        if foreign || name == SINGLE_FILE {
            return Err(Error::OutputInTheWay {
                file: output.join(name).display().to_string(),
                expected: format!("no weights but those of {}", writing.info),
                found: "a file that is no part of it".to_owned(),
            });
        }
    }
    shards.iter().map(|shard| writing.is_finished(shard)).collect()
}

/// The small file `name` of `output`; `None` if there is none.
fn there(output: &Path, name: &str) -> Result<Option<Cow<'static, [u8]>>> {
    Files::Directory(output.to_owned()).read(name)
}

/// Refuses a file `name` that is there and holds anything but `bytes`.
fn refuse_another(output: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    match there(output, name)? {
        Some(there) if *there != *bytes => Err(Error::OutputInTheWay {
            file: output.join(name).display().to_string(),
            expected: "no such file where no shard of the pack is yet, or the pack's own".to_owned(),
            found: "another one".to_owned(),
        }),
        _ => Ok(()),
    }
}

fn remove_index(output: &Path) -> Result<()> {
    let path = output.join(INDEX_FILE);
    match fs::remove_file(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(Error::Write { file: path.display().to_string(), source })
        }
        _ => Ok(()),
    }
}

fn index(shards: &[Shard]) -> Value {
    let tensors = shards.iter().flat_map(|shard| shard.tensors.iter().map(|tensor| (tensor, &shard.file)));
    let map: Map<String, Value> = tensors.map(|(tensor, file)| (tensor.name.clone(), json!(file))).collect();
    json!({"metadata": {}, "weight_map": map})
}

#[cfg(test)]
mod tests;
