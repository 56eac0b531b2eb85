//! A safetensors file of f32 tensors.

use std::{borrow::Cow, io::Write as _, path::Path};

use serde_json::{Map, json};

use super::{Stored, StoredType, header::encode_header};
use crate::{Error, Result, files::write::write_safely};

/// A tensor that is written: its shape, and its values row after row.
pub(crate) struct Written<'a> {
    pub shape: Vec<usize>,
    pub values: Cow<'a, [f32]>,
}

/// Writes the file `name`, which is there whole or not at all.
pub(crate) fn write_tensors<'a>(
    directory: &Path,
    name: &str,
    tensors: impl IntoIterator<Item = (String, &'a Written<'a>)>,
) -> Result<()> {
    let tensors: Vec<_> = tensors.into_iter().collect();
    let shapes = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shape.clone()));
    write_one_by_one(directory, name, &shapes.collect::<Vec<_>>(), &|index| Ok(tensors[index].1.values.clone()))
}

/// The same for tensors of these names and shapes whose `values` are asked for one after the other.
pub(crate) fn write_one_by_one<'a>(
    directory: &Path,
    name: &str,
    shapes: &[(String, Vec<usize>)],
    values: &dyn Fn(usize) -> Result<Cow<'a, [f32]>>,
) -> Result<()> {
    const TYPE: StoredType = StoredType::F32;
    // What transformers and PEFT look for.
    let mut header = Map::from_iter([("__metadata__".to_owned(), json!({"format": "pt"}))]);
    let mut begin = 0;
    for (name, shape) in shapes {
        let end = begin + shape.iter().product::<usize>() * TYPE.bytes();
        let entry = json!({"dtype": Stored::Plain(TYPE).name(), "shape": shape, "data_offsets": [begin, end]});
        header.insert(name.clone(), entry);
        begin = end;
    }
    let header = encode_header(header, TYPE.bytes());
    write_safely(directory, name, &mut |file| {
        file.write_all(&header)?;
        for (index, (name, shape)) in shapes.iter().enumerate() {
            let values = values(index)?;
            let (expected, found) = (shape.iter().product::<usize>(), values.len());
            if expected != found {
                let detail = format!("{name}: expected {expected} numbers for {shape:?}, found {found}");
                return Err(Error::Encode { detail }.into());
            }
            file.write_all(&TYPE.round(&values))?;
        }
        Ok(())
    })
}
