use std::{
    ops::Range,
    sync::{Mutex, PoisonError},
};

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
        let tasks = PackTask::split((), layout, bytes.chunks_exact_mut(layout.panel_bytes()));
        pack(compute, layout.format, tasks, |(), rows, values| read_rows(rows, values))?;
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
            *partial[part].lock().unwrap_or_else(PoisonError::into_inner) = sums;
        });
        let mut total = vec![0.0; self.layout.k];
        for sums in partial {
            let sums = sums.into_inner().unwrap_or_else(PoisonError::into_inner);
            total.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
        }
        total.into_iter().map(|sum| sum.sqrt() as f32).collect()
    }
}

/// Neighbouring panels that one task packs, and the rows of `source` `[n, k]` that fill them.
pub(super) struct PackTask<'a, S> {
    source: S,
    k: usize,
    rows: Range<usize>,
    panels: Vec<&'a mut [u8]>,
}

impl<'a, S: Copy> PackTask<'a, S> {
    /// The tasks that fill the panels of a matrix.
    pub(super) fn split(source: S, layout: Layout, panels: impl Iterator<Item = &'a mut [u8]>) -> Vec<Self> {
        let panels_per_task = (TASK_VALUES / (PANEL * layout.k)).max(1);
        let mut tasks: Vec<Self> = Vec::new();
        for (index, panel) in panels.enumerate() {
            let end = layout.n.min((index + 1) * PANEL);
            match tasks.last_mut().filter(|task| task.panels.len() < panels_per_task) {
                Some(task) => {
                    task.panels.push(panel);
                    task.rows.end = end;
                }
                None => {
                    let rows = index * PANEL..end;
                    tasks.push(Self { source, k: layout.k, rows, panels: vec![panel] });
                }
            }
        }
        tasks
    }
}

/// Runs the tasks on all threads; the error that came first wins.
pub(super) fn pack<S: Copy + Send, E: Send>(
    compute: &Compute,
    format: Format,
    tasks: Vec<PackTask<'_, S>>,
    read_rows: impl Fn(S, Range<usize>, &mut [f32]) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let tasks: Vec<_> = tasks.into_iter().map(Mutex::new).collect();
    let error = Mutex::new(None);
    let lock_error = || error.lock().unwrap_or_else(PoisonError::into_inner);
    compute.pool.run(tasks.len(), |index| {
        if lock_error().is_some() {
            return;
        }
        let mut task = tasks[index].lock().unwrap_or_else(PoisonError::into_inner);
        let mut values = vec![0.0; task.rows.len() * task.k];
        if let Err(found) = read_rows(task.source, task.rows.clone(), &mut values) {
            lock_error().get_or_insert(found);
            return;
        }
        let k = task.k;
        for (panel, rows) in task.panels.iter_mut().zip(values.chunks(PANEL * k)) {
            pack_panel(format, k, rows, panel);
        }
    });
    error.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}
