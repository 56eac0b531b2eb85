//! A safetensors file of f32 tensors.

use std::{borrow::Cow, path::Path};

use safetensors::{Dtype, View};

use crate::{Error, Result, pack::write_whole};

/// A tensor that is written: its shape, and its values row after row.
pub(crate) struct Written<'a> {
    pub shape: Vec<usize>,
    pub values: Cow<'a, [f32]>,
}

impl View for &Written<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into()
    }

    fn data_len(&self) -> usize {
        4 * self.values.len()
    }
}

/// Writes the file `name`, which is there whole or not at all.
pub(crate) fn write_tensors<'a>(
    directory: &Path,
    name: &str,
    tensors: impl IntoIterator<Item = (String, &'a Written<'a>)>,
) -> Result<()> {
    // What transformers and PEFT look for.
    let metadata = [("format".to_owned(), "pt".to_owned())].into_iter().collect();
    let bytes = safetensors::serialize(tensors, Some(metadata));
    write_whole(directory, name, &bytes.map_err(|error| Error::Encode { detail: error.to_string() })?)
}
