use std::{
    ops::Range,
    sync::{Mutex, PoisonError},
};

use cadre_kernels::{
    buffer::{AllocError, Buffer},
    format::{Layout, Packed},
};

use super::packing::{self, PackTask, PackingError, ReadTask, pack};
use crate::compute::Compute;

/// A frozen weight matrix `[n, k]`, packed for the kernels.
#[derive(Debug)]
pub struct Matrix {
    layout: Layout,
    bytes: Buffer,
    modules: Vec<Module>,
}

/// A module of the checkpoint whose weight is some rows of a matrix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its full name, as on the hub.
    pub name: String,
    /// How many rows.
    pub rows: usize,
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
        let mut matrix = Self::zeroed(layout)?;
        let tasks = PackTask::split((), layout, matrix.bytes.chunks_exact_mut(layout.panel_bytes()));
        pack(compute, layout.format, tasks, |(), rows, values| read_rows(rows, values))?;
        Ok(matrix)
    }

    /// Takes the packed form as `read` gives it: called from several threads, it fills a stretch of bytes from an
    /// offset on.
    ///
    /// # Errors
    /// The first error of `read`, or when memory cannot be had.
    pub fn from_packed<E: From<AllocError> + Send>(
        compute: &Compute,
        layout: Layout,
        read: impl Fn(usize, &mut [u8]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        let mut matrix = Self::zeroed(layout)?;
        packing::read(compute, ReadTask::split((), &mut matrix.bytes).collect(), |(), offset, out| read(offset, out))?;
        Ok(matrix)
    }

    /// Zeros, which take no memory before they are touched: for callers that ask for sizes only.
    ///
    /// # Errors
    /// When the address space cannot be had.
    pub fn zeroed(layout: Layout) -> Result<Self, AllocError> {
        Ok(Self { layout, bytes: Buffer::zeroed(layout.bytes())?, modules: Vec::new() })
    }

    /// The same matrix, which knows the modules that its rows come from, in their order.
    #[must_use]
    pub fn of_modules(self, modules: Vec<Module>) -> Self {
        Self { modules, ..self }
    }

    /// The modules that the rows come from.
    #[must_use]
    pub fn modules(&self) -> &[Module] {
        &self.modules
    }

    /// How far the packed form is from the rows that it was made of, which `read_rows` gives again.
    ///
    /// # Errors
    /// The first error of `read_rows`.
    pub fn packing_error<E: Send>(
        &self,
        compute: &Compute,
        read_rows: impl Fn(Range<usize>, &mut [f32]) -> Result<(), E> + Sync,
    ) -> Result<PackingError, E> {
        packing::packing_error(compute, self.packed(), self.layout.n, |row| row, read_rows)
    }

    /// Packs the matrix anew, from the rows that `read_rows` gives as in [`Matrix::from_rows`].
    pub(crate) fn repack(&mut self, compute: &Compute, read_rows: impl Fn(Range<usize>, &mut [f32]) + Sync) {
        let layout = self.layout;
        let tasks = PackTask::split((), layout, self.bytes.chunks_exact_mut(layout.panel_bytes()));
        let packed = pack(compute, layout.format, tasks, |(), rows, out| {
            read_rows(rows, out);
            Ok::<_, std::convert::Infallible>(())
        });
        let Ok(()) = packed;
    }

    /// The packed form's bytes.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        &self.bytes
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
