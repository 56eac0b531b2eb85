//! The hidden states of a super-batch between two layers.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use crate::{Error, Result, Tensor, ops};

/// f32 `[rows, width]`, in memory or in a file.
pub(super) struct Hidden {
    width: usize,
    place: Place,
}

enum Place {
    Memory(Vec<f32>),
    File(File),
}

impl Hidden {
    pub(super) fn new(rows: usize, width: usize, spill: Option<File>) -> Self {
        Self { width, place: spill.map_or_else(|| Place::Memory(vec![0.0; rows * width]), Place::File) }
    }

    pub(super) fn read(&self, rows: Range<usize>) -> Result<Tensor> {
        let count = rows.len() * self.width;
        let values = match &self.place {
            Place::Memory(all) => all[rows.start * self.width..][..count].to_vec(),
            Place::File(file) => {
                let mut bytes = vec![0; count * 4];
                file.read_exact_at(&mut bytes, self.offset(&rows)).map_err(|error| spilling("read", &error))?;
                let (values, _) = bytes.as_chunks();
                values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
            }
        };
        ops::from_values(values, self.width)
    }

    pub(super) fn write(&mut self, rows: Range<usize>, values: &Tensor) -> Result<()> {
        let expected = [rows.len(), self.width];
        if values.dims() != expected {
            let found = values.dims().to_vec();
            return Err(Error::Shape { what: "hidden states of a layer".into(), expected: expected.to_vec(), found });
        }
        let offset = self.offset(&rows);
        ops::values(values, |values| match &mut self.place {
            Place::Memory(all) => {
                all[rows.start * self.width..][..values.len()].copy_from_slice(values);
                Ok(())
            }
            Place::File(file) => {
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                file.write_all_at(&bytes, offset).map_err(|error| spilling("written", &error))
            }
        })
    }

    fn offset(&self, rows: &Range<usize>) -> u64 {
        rows.start as u64 * self.width as u64 * 4
    }
}

fn spilling(done: &str, error: &io::Error) -> Error {
    Error::Config(format!(
        "the file of hidden states that don't fit the memory can't be {done}: {error}: free some disk, or ask for fewer \
         tokens in a super-batch"
    ))
}
