use std::{ops::Range, sync::Mutex};

use cadre_kernels::{
    buffer::{AllocError, Buffer},
    format::{Format, Layout, PANEL, Packed, pack_panel},
};

use crate::compute::Compute;

/// Source values that one task reads and packs at a time: reads of about a mebibyte, and little scratch memory.
const TASK_VALUES: usize = 1 << 19;

/// A frozen weight matrix `[n, k]`, packed for the kernels.
#[derive(Debug)]
pub struct Matrix {
    layout: Layout,
    bytes: Buffer,
}

impl Matrix {
    /// Packs the matrix whose rows `read_rows` gives: called from several threads, for disjoint ranges of rows, it
    /// fills `[rows, k]` values. Nothing but the packed form is held.
    ///
    /// # Errors
    /// The first error of `read_rows`, or when memory cannot be had.
    pub fn from_rows<E: From<AllocError> + Send>(
        compute: &Compute,
        layout: Layout,
        read_rows: impl Fn(Range<usize>, &mut [f32]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        let mut bytes = Buffer::zeroed(layout.bytes())?;
        let panels: Vec<_> = bytes.chunks_exact_mut(layout.panel_bytes()).collect();
        pack_rows(compute, layout.format, layout.k, layout.n, panels, read_rows)?;
        Ok(Self { layout, bytes })
    }

    /// Its sizes.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The packed form.
    #[must_use]
    pub fn packed(&self) -> Packed<'_> {
        Packed::new(self.layout, &self.bytes)
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Parameters.
    #[must_use]
    pub fn parameters(&self) -> usize {
        self.layout.n * self.layout.k
    }

    /// The L2 norm of each of the k columns, over all rows.
    #[must_use]
    pub fn column_norms(&self, compute: &Compute) -> Vec<f32> {
        /// Fixed, so that the sums don't depend on the number of threads.
        const PARTS: usize = 64;
        let partial: Vec<Mutex<Vec<f64>>> = (0..PARTS).map(|_| Mutex::new(vec![0.0; self.layout.k])).collect();
        compute.pool.run(PARTS, |part| {
            let mut row = vec![0.0; self.layout.k];
            let mut sums = vec![0.0; self.layout.k];
            for index in part * self.layout.n / PARTS..(part + 1) * self.layout.n / PARTS {
                self.packed().unpack_row(index, &mut row);
                sums.iter_mut().zip(&row).for_each(|(sum, x)| *sum += f64::from(*x) * f64::from(*x));
            }
            *partial[part].lock().unwrap_or_else(std::sync::PoisonError::into_inner) = sums;
        });
        let mut total = vec![0.0; self.layout.k];
        for sums in partial {
            let sums = sums.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
            total.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
        }
        total.into_iter().map(|sum| sum.sqrt() as f32).collect()
    }
}

/// Fills `panels` from the rows of a matrix `[n, k]`, in parallel; the error that came first wins.
pub(super) fn pack_rows<E: Send>(
    compute: &Compute,
    format: Format,
    k: usize,
    n: usize,
    panels: Vec<&mut [u8]>,
    read_rows: impl Fn(Range<usize>, &mut [f32]) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let panels_per_task = (TASK_VALUES / (PANEL * k)).max(1);
    let mut tasks: Vec<Mutex<Vec<&mut [u8]>>> = Vec::new();
    let mut panels = panels.into_iter();
    loop {
        let task: Vec<_> = panels.by_ref().take(panels_per_task).collect();
        if task.is_empty() {
            break;
        }
        tasks.push(Mutex::new(task));
    }
    let error = Mutex::new(None);
    let lock_error = || error.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    compute.pool.run(tasks.len(), |index| {
        if lock_error().is_some() {
            return;
        }
        let mut panels = tasks[index].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let start = index * panels_per_task * PANEL;
        let rows = start..n.min(start + panels.len() * PANEL);
        let mut values = vec![0.0; rows.len() * k];
        if let Err(found) = read_rows(rows, &mut values) {
            lock_error().get_or_insert(found);
            return;
        }
        for (panel, rows) in panels.iter_mut().zip(values.chunks(PANEL * k)) {
            pack_panel(format, k, rows, panel);
        }
    });
    error.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).map_or(Ok(()), Err)
}
