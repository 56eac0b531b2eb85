use std::ops::Range;

use cadre_kernels::{
    buffer::{AllocError, Buffer},
    ffn::{FfnLayout, Group, WeightedRow},
    format::{Layout, Packed},
};

use super::packing::{self, PackTask, PackingError, ReadTask, pack, pack_here};
use crate::compute::Compute;

/// One of an expert's three matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpertPart {
    /// `[intermediate, hidden]`, under the activation.
    Gate,
    /// `[intermediate, hidden]`, multiplied with it.
    Up,
    /// `[hidden, intermediate]`.
    Down,
}

/// The experts of one layer, expert after expert in one stretch of memory: gate|up interleaved, then down.
#[derive(Debug)]
pub struct Experts {
    layout: FfnLayout,
    count: usize,
    bytes: Buffer,
    modules: Vec<ExpertModules>,
}

/// The full names of an expert's modules, as on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertModules {
    /// That of [`ExpertPart::Gate`].
    pub gate: String,
    /// That of [`ExpertPart::Up`].
    pub up: String,
    /// That of [`ExpertPart::Down`].
    pub down: String,
}

impl Experts {
    /// Packs `count` experts whose rows `read_rows` gives: called from several threads, for disjoint ranges of rows, it
    /// fills `[rows, columns]` values of one part of one expert. Nothing but the packed form is held.
    ///
    /// # Errors
    /// The first error of `read_rows`, or when memory cannot be had.
    pub fn from_rows<E: From<AllocError> + Send>(
        compute: &Compute,
        layout: FfnLayout,
        count: usize,
        read_rows: impl Fn(usize, ExpertPart, Range<usize>, &mut [f32]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        let mut experts = Self::zeroed(layout, count)?;
        let each = experts.bytes.chunks_exact_mut(expert_bytes(&layout)).enumerate();
        let tasks = each.flat_map(|(expert, bytes)| tasks(layout, expert, bytes)).collect();
        pack(compute, layout.format, tasks, |(expert, part), rows, values| read_rows(expert, part, rows, values))?;
        Ok(experts)
    }

    /// Takes the packed form as `read` gives it: called from several threads, it fills a stretch of bytes of one
    /// expert from an offset on.
    ///
    /// # Errors
    /// The first error of `read`, or when memory cannot be had.
    pub fn from_packed<E: From<AllocError> + Send>(
        compute: &Compute,
        layout: FfnLayout,
        count: usize,
        read: impl Fn(usize, usize, &mut [u8]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        let mut experts = Self::zeroed(layout, count)?;
        let each = experts.bytes.chunks_exact_mut(expert_bytes(&layout)).enumerate();
        let tasks = each.flat_map(|(expert, bytes)| ReadTask::split(expert, bytes)).collect();
        packing::read(compute, tasks, read)?;
        Ok(experts)
    }

    /// Zeros, which take no memory before they are touched: for callers that ask for sizes only.
    ///
    /// # Errors
    /// When the address space cannot be had.
    pub fn zeroed(layout: FfnLayout, count: usize) -> Result<Self, AllocError> {
        let expert_bytes = expert_bytes(&layout);
        let total = expert_bytes.checked_mul(count).ok_or_else(|| AllocError {
            bytes: usize::MAX,
            reason: format!("{count} experts of {expert_bytes} bytes overflow"),
        })?;
        Ok(Self { layout, count, bytes: Buffer::zeroed(total)?, modules: Vec::new() })
    }

    /// The same experts, which know the modules that they come from, expert after expert.
    #[must_use]
    pub fn of_modules(self, modules: Vec<ExpertModules>) -> Self {
        Self { modules, ..self }
    }

    /// The modules that they come from.
    #[must_use]
    pub fn modules(&self) -> &[ExpertModules] {
        &self.modules
    }

    /// How far the packed form is from the rows that it was made of, which `read_rows` gives again.
    ///
    /// # Errors
    /// The first error of `read_rows`.
    pub fn packing_error<E: Send>(
        &self,
        compute: &Compute,
        read_rows: impl Fn(usize, ExpertPart, Range<usize>, &mut [f32]) -> Result<(), E> + Sync,
    ) -> Result<PackingError, E> {
        let FfnLayout { hidden, intermediate, .. } = self.layout;
        let mut total = PackingError::default();
        for expert in 0..self.count {
            let Group { gate_up, down, .. } = self.group(expert, &[]);
            let source = |part| {
                let read_rows = &read_rows;
                move |rows: Range<usize>, out: &mut [f32]| read_rows(expert, part, rows, out)
            };
            let (gate, up) = (source(ExpertPart::Gate), source(ExpertPart::Up));
            total +=
                packing::packing_error(compute, gate_up, intermediate, |row| self.layout.gate_up_row(row, 0), gate)?;
            total += packing::packing_error(compute, gate_up, intermediate, |row| self.layout.gate_up_row(row, 1), up)?;
            total += packing::packing_error(compute, down, hidden, |row| row, source(ExpertPart::Down))?;
        }
        Ok(total)
    }

    /// The packed form's bytes, expert after expert.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        &self.bytes
    }

    /// Their sizes.
    #[must_use]
    pub fn layout(&self) -> FfnLayout {
        self.layout
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Parameters of one expert.
    #[must_use]
    pub fn parameters_per_expert(&self) -> usize {
        3 * self.layout.hidden * self.layout.intermediate
    }

    /// Packs one expert anew, from the rows that `read_rows` gives as in [`pack_expert`].
    pub(crate) fn repack(&mut self, expert: usize, read_rows: impl FnMut(ExpertPart, Range<usize>, &mut [f32])) {
        let size = expert_bytes(&self.layout);
        pack_expert(self.layout, &mut self.bytes[expert * size..(expert + 1) * size], read_rows);
    }

    /// The packed bytes of one expert.
    pub(crate) fn expert(&self, expert: usize) -> &[u8] {
        let size = expert_bytes(&self.layout);
        &self.bytes[expert * size..(expert + 1) * size]
    }

    /// The weights of one expert with the rows that use it.
    pub(crate) fn group<'a>(&'a self, expert: usize, rows: &'a [WeightedRow]) -> Group<'a> {
        let [gate_up, down] = matrices(&self.layout, self.expert(expert));
        Group { gate_up, down, rows }
    }
}

/// gate|up and down of a packed expert, which `bytes` begin with.
pub(crate) fn matrices<'a>(layout: &FfnLayout, bytes: &'a [u8]) -> [Packed<'a>; 2] {
    let (gate_up, down) = bytes.split_at(layout.gate_up().bytes());
    [Packed::new(layout.gate_up(), gate_up), Packed::new(layout.down(), &down[..layout.down().bytes()])]
}

/// Bytes of one packed expert: gate|up, then down.
#[must_use]
pub fn expert_bytes(layout: &FfnLayout) -> usize {
    layout.gate_up().bytes() + layout.down().bytes()
}

/// Packs one expert into the front of `out`, to the bits of [`Experts::from_rows`] but on the calling thread: `read_rows`
/// fills `[rows, columns]` values of one part, of 16 rows at most.
///
/// # Panics
/// When `out` is smaller than [`expert_bytes`].
pub fn pack_expert(layout: FfnLayout, out: &mut [u8], mut read_rows: impl FnMut(ExpertPart, Range<usize>, &mut [f32])) {
    let tasks = tasks(layout, 0, &mut out[..expert_bytes(&layout)]);
    pack_here(layout.format, tasks, |(_, part), rows, values| read_rows(part, rows, values));
}

/// The tasks that fill one expert's panels.
fn tasks(layout: FfnLayout, expert: usize, bytes: &mut [u8]) -> Vec<PackTask<'_, (usize, ExpertPart)>> {
    let FfnLayout { format, hidden, intermediate } = layout;
    let (gate_up, down) = bytes.split_at_mut(layout.gate_up().bytes());
    let (mut gate, mut up) = (Vec::new(), Vec::new());
    for pair in gate_up.chunks_exact_mut(2 * layout.gate_up().panel_bytes()) {
        let (gate_panel, up_panel) = pair.split_at_mut(layout.gate_up().panel_bytes());
        gate.push(gate_panel);
        up.push(up_panel);
    }
    let half = Layout { format, n: intermediate, k: hidden };
    let mut tasks = PackTask::split((expert, ExpertPart::Gate), half, gate.into_iter());
    tasks.extend(PackTask::split((expert, ExpertPart::Up), half, up.into_iter()));
    let down = down.chunks_exact_mut(layout.down().panel_bytes());
    tasks.extend(PackTask::split((expert, ExpertPart::Down), layout.down(), down));
    tasks
}
