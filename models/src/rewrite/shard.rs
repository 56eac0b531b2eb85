//! One file of a checkpoint that is written again.

use std::{fs::File, io::Write as _, path::Path, sync::atomic::AtomicBool};

use serde_json::{Map, Value, json};

use super::{Change, Changes, TensorChange, changes::Norms, in_the_way};
use crate::{
    Error, Result,
    files::{
        Source,
        write::{Stopped, go_on, write_safely},
    },
    json,
    summary::Part,
    tensors::{SINGLE_FILE, Stored, StoredType, TensorInfo, TensorSet, encode_header, read_header_json},
    weights::LoadProgress,
};

/// Numbers of a tensor that are in memory at a time, or one row if that has more.
const NUMBERS: usize = 1 << 20;

/// One file.
pub(super) struct Shard {
    /// Its name.
    pub file: String,
    /// Length and header.
    header: Vec<u8>,
    /// The numbers of its tensors in the order in which they lie.
    tensors: Vec<usize>,
    /// Bytes of its tensors.
    pub data_bytes: u64,
}

impl Shard {
    /// The files of `tensors`, if these get the type `dtype`.
    pub fn plan(tensors: &TensorSet, dtype: Option<StoredType>) -> Result<Vec<Self>> {
        let mut of_file = vec![Vec::new(); tensors.files().len()];
        for index in 0..tensors.len() {
            of_file[tensors.extent(index).0].push(index);
        }
        let plan = |(source, own): (&Source, Vec<usize>)| Self::of_file(source, tensors, own, dtype);
        tensors.files().iter().zip(of_file).map(plan).collect()
    }

    fn of_file(source: &Source, all: &TensorSet, tensors: Vec<usize>, dtype: Option<StoredType>) -> Result<Self> {
        let mut header = json::object(source.label(), &read_header_json(source)?)?;
        let mut data_bytes = 0;
        for index in &tensors {
            let info = all.info(*index);
            let stored = plain(all, *index)?;
            let dtype = dtype.unwrap_or(stored);
            let end = data_bytes + info.elements * dtype.bytes() as u64;
            let entry = header.get_mut(&info.name).and_then(Value::as_object_mut);
            let mut set = |fields: &mut Map<String, Value>| {
                fields.insert("dtype".to_owned(), json!(Stored::Plain(dtype).name()));
                fields.insert("data_offsets".to_owned(), json!([data_bytes, end]));
            };
            entry.into_iter().for_each(&mut set);
            data_bytes = end;
        }
        let header = encode_header(header, StoredType::F32.bytes());
        // The files of a checkpoint lie side by side: what comes after the last slash, or, embedded, the last space.
        let file = source.label().rsplit(['/', ' ']).next().unwrap_or_default().to_owned();
        Ok(Self { file, header, tensors, data_bytes })
    }

    /// Whether it is that of a checkpoint in one file.
    pub fn is_only(&self) -> bool {
        self.file == SINGLE_FILE
    }

    /// The file in `output`, if it is there; its header and size must be this one's.
    pub fn there(&self, output: &Path) -> Result<Option<Source>> {
        let path = output.join(&self.file);
        let Some(source) = Source::open(path.display().to_string(), &path)? else { return Ok(None) };
        let mut header = vec![0; self.header.len()];
        let is_same = source.len() == self.header.len() as u64 + self.data_bytes && {
            source.read_exact_at(0, &mut header)?;
            header == self.header
        };
        if is_same { Ok(Some(source)) } else { Err(in_the_way(source.label(), "another file, or a part of it")) }
    }
}

/// How a tensor that isn't packed is stored.
fn plain(tensors: &TensorSet, index: usize) -> Result<StoredType> {
    match tensors.info(index).stored {
        Stored::Plain(dtype) => Ok(dtype),
        found @ Stored::Packed(_) => Err(Error::TensorEntry {
            file: tensors.label(index).to_owned(),
            tensor: tensors.info(index).name.clone(),
            what: "format",
            expected: "plain numbers".to_owned(),
            found: found.to_string(),
        }),
    }
}

/// Where the bytes of a file go.
enum Sink<'a> {
    /// Into it.
    File(&'a mut File),
    /// Nowhere: they must be there, from this place on.
    There(&'a Source, u64),
}

impl Sink<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), Stopped> {
        match self {
            Self::File(file) => file.write_all(bytes)?,
            Self::There(source, offset) => {
                let mut there = vec![0; bytes.len()];
                source.read_exact_at(*offset, &mut there)?;
                if there != bytes {
                    return Err(in_the_way(source.label(), "other numbers").into());
                }
                *offset += bytes.len() as u64;
            }
        }
        Ok(())
    }
}

/// All that writing the files needs, and what it found so far.
pub(super) struct Writing<'a> {
    pub tensors: &'a TensorSet,
    pub changes: &'a Changes<'a>,
    pub dtype: Option<StoredType>,
    pub layers: Option<u64>,
    pub stop: &'a AtomicBool,
    pub on_bytes: &'a (dyn Fn(LoadProgress) + Sync),
    pub progress: LoadProgress,
    pub found: Vec<TensorChange>,
}

impl Writing<'_> {
    /// Writes the file, which is there whole or not at all; not if `check` refuses what was found in it and before.
    pub fn write(&mut self, shard: &Shard, output: &Path, check: &dyn Fn(&[TensorChange]) -> Result<()>) -> Result<()> {
        write_safely(output, &shard.file, &mut |file| self.put(shard, &mut Sink::File(file), check))
    }

    /// The same for a file that is there already: it must have the bytes that would be written.
    pub fn compare(
        &mut self,
        shard: &Shard,
        there: &Source,
        check: &dyn Fn(&[TensorChange]) -> Result<()>,
    ) -> Result<()> {
        self.put(shard, &mut Sink::There(there, 0), check).map_err(|stopped| match stopped {
            Stopped::Io(reason) => Error::Read { file: there.label().to_owned(), reason },
            Stopped::Other(error) => error,
        })
    }

    fn put(
        &mut self,
        shard: &Shard,
        sink: &mut Sink<'_>,
        check: &dyn Fn(&[TensorChange]) -> Result<()>,
    ) -> Result<(), Stopped> {
        sink.put(&shard.header)?;
        for index in &shard.tensors {
            self.put_tensor(*index, sink)?;
        }
        Ok(check(&self.found)?)
    }

    /// Some rows at a time.
    fn put_tensor(&mut self, index: usize, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        let tensors = self.tensors;
        let info = tensors.info(index);
        let from = plain(tensors, index)?;
        let to = self.dtype.unwrap_or(from);
        let change = self.changes.get(&info.name);
        let numbers = usize::try_from(info.elements).unwrap_or(0);
        let rows = info.shape.first().copied().unwrap_or(1);
        let row = numbers.checked_div(rows).unwrap_or(0);
        let part = Part::of(&info.name, self.layers);
        let mut found =
            TensorChange { name: info.name.clone(), part, numbers: info.elements, changed: 0, norms: Norms::default() };
        let step = NUMBERS.checked_div(row).unwrap_or(1).max(1);
        let mut bytes = Vec::new();
        for start in (0..rows).step_by(step) {
            go_on(self.stop)?;
            let rows = start..rows.min(start + step);
            bytes.resize(rows.len() * row * from.bytes(), 0);
            tensors.read(index, (start * row * from.bytes()) as u64, &mut bytes)?;
            if change.is_none() && from == to {
                sink.put(&bytes)?;
            } else {
                let mut old = vec![0.0; rows.len() * row];
                from.widen(&bytes, &mut old);
                let mut new = old.clone();
                change.into_iter().for_each(|change: &Change<'_>| change(rows.clone(), &mut new));
                let rounded = to.round(&new);
                let mut stored = vec![0.0; new.len()];
                to.widen(&rounded, &mut stored);
                refuse_infinite(info, &new, &stored, to)?;
                found.changed += old.iter().zip(&stored).filter(|(old, stored)| old != stored).count() as u64;
                found.norms.add(&old, &new, &stored);
                sink.put(&rounded)?;
            }
            self.progress.done_bytes += bytes.len() as u64;
            (self.on_bytes)(self.progress);
        }
        if change.is_some() {
            self.found.push(found);
        }
        Ok(())
    }
}

fn refuse_infinite(info: &TensorInfo, new: &[f32], stored: &[f32], dtype: StoredType) -> Result<()> {
    match new.iter().zip(stored).find(|(_, stored)| !stored.is_finite()) {
        None => Ok(()),
        Some((found, _)) => {
            Err(Error::NotStorable { tensor: info.name.clone(), dtype: dtype.to_string(), found: *found })
        }
    }
}
