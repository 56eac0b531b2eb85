//! A checkpoint written again with other numbers: the same files, tensors, names and shapes.
//!
//! Tensors that nothing is said of are copied byte by byte; of the others a few MiB at a time are in memory. A file is
//! written under another name and gets its own when it is safe on disk; weights come after the small files, the index
//! comes last. So what was interrupted is never taken for whole. The same call goes on: a file that is there must have
//! exactly the bytes that would be written, which is looked at; one that hasn't is in the way, whatever it is.

mod changes;
mod shard;

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    ops::Range,
    path::Path,
    sync::atomic::AtomicBool,
};

use cadre_engine::train::parameters::Parameters;
use serde_json::{Value, json};

pub use changes::{Norms, PartChange, Rewritten, TensorChange};

use crate::{
    Error, Result,
    checkpoint::Checkpoint,
    files::{
        Files,
        write::{UNFINISHED, create_directory, write_whole},
    },
    json,
    tensors::{INDEX_FILE, StoredType, TensorSet},
    weights::LoadProgress,
};
use shard::{Shard, Writing};

/// What checkpoints call the embedding, and the head.
const EMBEDDINGS: [&str; 2] = ["model.embed_tokens.weight", "model.word_embeddings.weight"];
const HEAD: &str = "lm_head.weight";

/// How a checkpoint is written again.
#[derive(Clone, Copy)]
pub struct Rewriting<'a> {
    /// The directory; nothing else may be in it.
    pub output: &'a Path,
    /// The type that all tensors get; `None`: each keeps its own.
    pub dtype: Option<StoredType>,
    /// Once it is set, writing ends with [`Error::Interrupted`].
    pub stop: &'a AtomicBool,
    /// Is told how far it is.
    pub on_bytes: &'a (dyn Fn(LoadProgress) + Sync),
}

/// What becomes of some rows of a tensor. Rows are counted along its first axis.
pub(crate) type Change<'a> = Box<dyn Fn(Range<usize>, &mut [f32]) + 'a>;

/// The tensors that change, by name.
pub(crate) type Changes<'a> = HashMap<String, Change<'a>>;

/// Writes `checkpoint` with the numbers of `replaced` in place of its own: weights and biases that were trained
/// themselves, by their names on the hub. A name such as `q_proj+k_proj+v_proj.bias` stands for several tensors one after
/// the other.
///
/// # Errors
/// When a name is no tensor of the checkpoint, or of another size; when the checkpoint is a pack or can't be read; when
/// `output` holds something else or can't be written to.
pub fn write_checkpoint(
    checkpoint: &Checkpoint,
    replaced: &Parameters,
    rewriting: &Rewriting<'_>,
) -> Result<Rewritten> {
    let tensors = plain_tensors(checkpoint)?;
    // Some checkpoints store the tied head all the same: what is trained of the embedding is trained of it.
    let is_tied = checkpoint.config().get("tie_word_embeddings") == Some(&Value::Bool(true));
    let tied_head = tensors.find(HEAD).filter(|_| is_tied);
    let mut changes = Changes::new();
    for parameter in replaced.iter() {
        let names = tensor_names(&parameter.name);
        let (mut rest, mut found) = (parameter.values.as_slice(), Vec::new());
        for name in names {
            let missing = || Error::MissingTensor {
                files: tensors.describe(),
                tensor: name.clone(),
                expected: parameter.shape.clone(),
            };
            let info = tensors.info(tensors.find(&name).ok_or_else(missing)?);
            found.push(info.shape.clone());
            let count: usize = info.shape.iter().product();
            let Some((values, others)) = rest.split_at_checked(count) else { break };
            rest = others;
            let row = count / info.shape.first().copied().unwrap_or(1).max(1);
            let replace = move |rows: Range<usize>, out: &mut [f32]| {
                out.copy_from_slice(&values[rows.start * row..rows.end * row]);
            };
            if tied_head.is_some() && EMBEDDINGS.contains(&name.as_str()) {
                changes.insert(HEAD.to_owned(), Box::new(replace));
            }
            changes.insert(name, Box::new(replace));
        }
        let sizes = found.iter().map(|shape| shape.iter().product::<usize>());
        if sizes.sum::<usize>() != parameter.values.len() {
            let (file, found) = (tensors.describe(), found.concat());
            let (tensor, expected) = (parameter.name.clone(), parameter.shape.clone());
            return Err(Error::TensorShape { file, tensor, expected, found });
        }
    }
    rewrite(checkpoint, &tensors, &changes, &|_| Ok(()), rewriting)
}

/// Whether `checkpoint` can be written again.
///
/// # Errors
/// When it is a pack, or can't be read.
pub fn check(checkpoint: &Checkpoint) -> Result<()> {
    plain_tensors(checkpoint).map(|_| ())
}

/// `a+b.bias` is `a.bias` and `b.bias`.
fn tensor_names(joined: &str) -> Vec<String> {
    let (modules, kind) = joined.rsplit_once('.').unwrap_or((joined, ""));
    modules.split('+').map(|module| format!("{module}.{kind}")).collect()
}

/// The tensors of a checkpoint that is no pack.
pub(crate) fn plain_tensors(checkpoint: &Checkpoint) -> Result<TensorSet> {
    let tensors = checkpoint.tensors()?;
    match tensors.pack() {
        None => Ok(tensors),
        Some(pack) => {
            let (checkpoint, found) = (checkpoint.name().to_owned(), pack.formats.to_string());
            Err(Error::AlreadyPacked { checkpoint, found })
        }
    }
}

/// Writes `checkpoint`, whose tensors are `tensors`, with `changes`. `check` sees what came of them before the checkpoint
/// is whole, and may refuse it.
pub(crate) fn rewrite(
    checkpoint: &Checkpoint,
    tensors: &TensorSet,
    changes: &Changes<'_>,
    check: &dyn Fn(&[TensorChange]) -> Result<()>,
    rewriting: &Rewriting<'_>,
) -> Result<Rewritten> {
    let Rewriting { output, dtype, stop, on_bytes } = *rewriting;
    let shards = Shard::plan(tensors, dtype)?;
    let mut texts = BTreeMap::new();
    for (name, bytes) in checkpoint.files_beside_weights()? {
        let bytes = if name == "config.json" { config(&name, &bytes, dtype)? } else { bytes.into_owned() };
        texts.insert(name, bytes);
    }
    // Beside a single file an index is of no consequence, and may name other ones.
    let index = if shards.iter().any(Shard::is_only) { None } else { checkpoint.index()? };
    let index = index.map(|bytes| index_text(&bytes, &shards, dtype)).transpose()?;

    create_directory(output)?;
    let known: Vec<&str> = shards.iter().map(|shard| shard.file.as_str()).chain([INDEX_FILE]).collect();
    refuse_others(output, |name| texts.contains_key(name) || known.contains(&name))?;
    let files = Files::Directory(output.to_owned());
    let mut was_finished = true;
    let mut missing = Vec::new();
    let small = texts.iter().map(|(name, bytes)| (name.as_str(), bytes)).chain(index.iter().map(|i| (INDEX_FILE, i)));
    for (name, bytes) in small {
        match files.read(name)? {
            None => missing.push((name, bytes)),
            Some(there) if *there == **bytes => {}
            Some(_) => return Err(in_the_way(&files.label(name), "another one")),
        }
    }
    was_finished &= missing.is_empty();
    let there = shards.iter().map(|shard| shard.there(output)).collect::<Result<Vec<_>>>()?;
    was_finished &= there.iter().all(Option::is_some);

    for (name, bytes) in missing.iter().filter(|(name, _)| *name != INDEX_FILE) {
        write_whole(output, name, bytes)?;
    }
    let layers = checkpoint.config().count("num_hidden_layers")?;
    let progress = LoadProgress { done_bytes: 0, total_bytes: tensors.iter().map(|info| info.bytes).sum() };
    let mut writing = Writing { tensors, changes, dtype, layers, stop, on_bytes, progress, found: Vec::new() };
    for (index, (shard, there)) in shards.iter().zip(&there).enumerate() {
        let last = index + 1 == shards.len();
        let check = |found: &[TensorChange]| if last { check(found) } else { Ok(()) };
        match there {
            Some(source) => writing.compare(shard, source, &check)?,
            None => writing.write(shard, output, &check)?,
        }
    }
    if let Some((name, bytes)) = missing.iter().find(|(name, _)| *name == INDEX_FILE) {
        write_whole(output, name, bytes)?;
    }
    let copied = tensors.len() - writing.found.len();
    Ok(Rewritten { was_finished, copied, changes: writing.found })
}

/// Refuses files in `output` that aren't known and might be read together with those that are. Directories and hidden
/// files are of no consequence, and neither is what an interrupted run left.
fn refuse_others(output: &Path, is_known: impl Fn(&str) -> bool) -> Result<()> {
    let failed = |reason| Error::Read { file: output.display().to_string(), reason };
    for entry in fs::read_dir(output).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let known = name.strip_suffix(UNFINISHED).unwrap_or(&name);
        if !is_known(known) && !name.starts_with('.') && !entry.path().is_dir() {
            return Err(in_the_way(&entry.path().display().to_string(), "a file that is no part of it"));
        }
    }
    Ok(())
}

/// `file` isn't what would be written.
fn in_the_way(file: &str, found: &str) -> Error {
    Error::OutputInTheWay {
        file: file.to_owned(),
        expected: "nothing but what this command writes, from the same files".to_owned(),
        found: found.to_owned(),
    }
}

/// config.json, which says what type the weights have.
fn config(file: &str, bytes: &[u8], dtype: Option<StoredType>) -> Result<Vec<u8>> {
    let Some(dtype) = dtype else { return Ok(bytes.to_vec()) };
    let mut fields = json::object(file, bytes)?;
    // The name that transformers 4 knows too.
    if !fields.contains_key("dtype") {
        fields.insert("torch_dtype".to_owned(), Value::Null);
    }
    for name in ["dtype", "torch_dtype"] {
        fields.get_mut(name).into_iter().for_each(|value| *value = json!(dtype.long_name()));
    }
    text(&Value::Object(fields))
}

/// The index, whose sizes change with the type.
fn index_text(bytes: &[u8], shards: &[Shard], dtype: Option<StoredType>) -> Result<Vec<u8>> {
    if dtype.is_none() {
        return Ok(bytes.to_vec());
    }
    let mut fields = json::object(INDEX_FILE, bytes)?;
    if let Some(total) = fields.get_mut("metadata").and_then(|metadata| metadata.get_mut("total_size")) {
        *total = json!(shards.iter().map(|shard| shard.data_bytes).sum::<u64>());
    }
    text(&Value::Object(fields))
}

fn text(value: &Value) -> Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(|error| Error::Encode { detail: error.to_string() })?;
    bytes.push(b'\n');
    Ok(bytes)
}

#[cfg(test)]
mod tests;
