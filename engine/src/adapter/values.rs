use std::ops::Range;

use cadre_kernels::format::PANEL;

use crate::train::{parameters::Parameters, trained::Adapter};

/// The adapters of one matrix, side by side, and their numbers.
#[derive(Clone, Copy)]
pub(crate) struct AdapterValues<'a> {
    pub adapters: &'a [Adapter],
    pub parameters: &'a Parameters,
    /// Rows of gate when panels of gate and up take turns; `None`: the rows lie in order.
    pub paired: Option<usize>,
}

impl<'a> AdapterValues<'a> {
    /// Of all adapters together.
    pub fn rank(&self) -> usize {
        self.adapters.iter().map(|adapter| adapter.rank).sum()
    }

    /// A and B of an adapter.
    pub fn of(&self, adapter: &Adapter) -> (&'a [f32], &'a [f32]) {
        (&self.parameters.get(adapter.a).values, &self.parameters.get(adapter.b).values)
    }

    /// Each A times its scale, transposed: `[inputs, rank]`.
    pub fn a_transposed(&self, inputs: usize) -> Vec<f32> {
        let rank = self.rank();
        let mut a = vec![0.0; inputs * rank];
        let mut start = 0;
        for adapter in self.adapters {
            for (row, values) in self.of(adapter).0.chunks_exact(inputs).enumerate() {
                let places = a[start + row..].iter_mut().step_by(rank);
                places.zip(values).for_each(|(place, value)| *place = adapter.scale * value);
            }
            start += adapter.rank;
        }
        a
    }

    /// B, transposed: `[rank, outputs]`, the outputs as they are packed; an adapter adds nothing to those that aren't its
    /// own.
    pub fn b_transposed(&self, outputs: usize) -> Vec<f32> {
        let mut b = vec![0.0; self.rank() * outputs];
        self.each_of_b(|output, column, value| b[column * outputs + output] = value);
        b
    }

    /// Every value of the adapters' B, with its output and its place among the ranks.
    pub fn each_of_b(&self, mut take: impl FnMut(usize, usize, f32)) {
        let mut start = 0;
        for adapter in self.adapters {
            let b = self.of(adapter).1;
            for (row, output, len) in self.stretches(&adapter.rows) {
                for place in 0..len {
                    let values = &b[(row - adapter.rows.start + place) * adapter.rank..][..adapter.rank];
                    values.iter().enumerate().for_each(|(column, value)| take(output + place, start + column, *value));
                }
            }
            start += adapter.rank;
        }
    }

    /// Where rows lie among the outputs: stretches of (first of the rows, first output, length).
    pub fn stretches(&self, rows: &Range<usize>) -> Vec<(usize, usize, usize)> {
        let Some(gate) = self.paired else { return vec![(rows.start, rows.start, rows.len())] };
        let mut stretches = Vec::new();
        let mut row = rows.start;
        while row < rows.end {
            let (up, inner) = (row / gate, row % gate);
            let len = (PANEL - inner % PANEL).min(gate - inner).min(rows.end - row);
            stretches.push((row, inner / PANEL * 2 * PANEL + up * PANEL + inner % PANEL, len));
            row += len;
        }
        stretches
    }
}
