use cadre_kernels::{ffn::WeightedRow, rows};

use super::{FfnPlace, LoadedAdapter, loaded::LowRank};
use crate::{compute::Compute, model::StepBatch, train::places::Place};

/// Which adapter each row of some activations has.
#[derive(Debug, Default)]
pub struct RowAdapters<'a> {
    adapters: Vec<&'a LoadedAdapter>,
    /// Of each row, its place in `adapters`; empty if no row has one.
    of_row: Vec<Option<usize>>,
}

impl<'a> RowAdapters<'a> {
    /// Of the rows of a step's token axis.
    #[must_use]
    pub fn of(batch: &'a StepBatch) -> Self {
        let mut own = Self::default();
        if batch.sequences.iter().all(|sequence| sequence.adapter.is_none()) {
            return own;
        }
        for sequence in &batch.sequences {
            let place = sequence.adapter.as_deref().map(|adapter| own.place(adapter));
            own.of_row.resize(sequence.rows.end, place);
        }
        own
    }

    fn place(&mut self, adapter: &'a LoadedAdapter) -> usize {
        self.adapters.iter().position(|known| *known == adapter).unwrap_or_else(|| {
            self.adapters.push(adapter);
            self.adapters.len() - 1
        })
    }

    /// Of some of the rows, in their order.
    pub(crate) fn select(&self, rows: impl Iterator<Item = usize>) -> Self {
        if self.of_row.is_empty() {
            return Self::default();
        }
        Self { adapters: self.adapters.clone(), of_row: rows.map(|row| self.of_row[row]).collect() }
    }

    /// Whether a row's adapter changes the products with the matrix at `place`.
    pub(crate) fn adapt(&self, place: Place) -> bool {
        self.adapters.iter().any(|adapter| adapter.of(place).is_some())
    }

    /// Whether a row's adapter changes a feed-forward.
    pub(crate) fn adapt_ffn(&self, ffn: FfnPlace) -> bool {
        self.adapters.iter().any(|adapter| adapter.adapts(ffn))
    }

    /// Whether the adapter of this row, if it has one, changes a feed-forward.
    pub(crate) fn adapts_row(&self, row: usize, ffn: FfnPlace) -> bool {
        self.of_row.get(row).copied().flatten().is_some_and(|place| self.adapters[place].adapts(ffn))
    }

    /// Adds what the rows' adapters make of `x` to its products `y` with the matrix at `place`.
    pub(crate) fn add(&self, compute: &Compute, place: Place, x: &[f32], y: &mut [f32]) {
        for (index, adapter) in self.adapters.iter().enumerate() {
            let Some(matrix) = adapter.of(place) else { continue };
            let own = self.of_row.iter().enumerate().filter(|(_, of)| **of == Some(index));
            let rows: Vec<_> = own.map(|(row, _)| WeightedRow { row: row as u32, weight: 1.0 }).collect();
            if !rows.is_empty() {
                add_to_rows(compute, matrix, &rows, x, y);
            }
        }
    }
}

/// The sum of a row is the same whichever rows there are beside it: what is added is first computed by itself.
fn add_to_rows(compute: &Compute, matrix: &LowRank, rows: &[WeightedRow], x: &[f32], y: &mut [f32]) {
    let mut inputs = vec![0.0; rows.len() * matrix.inputs()];
    rows::gather(&compute.pool, x, matrix.inputs(), rows, &mut inputs);
    rows::scatter_add(&compute.pool, &matrix.product(compute, &inputs), matrix.outputs(), rows, y);
}
