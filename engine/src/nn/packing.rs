//! How weights come into their packed form, on all threads: packed from rows, or read as they are; and how far the
//! packed form is from its source.

use std::{
    ops::{AddAssign, Range},
    sync::{Mutex, PoisonError},
};

use cadre_kernels::format::{Format, Layout, PANEL, Packed, pack_panel};

use crate::compute::Compute;

/// Source values that one task reads and packs at a time: reads of about a mebibyte, and little scratch memory.
const TASK_VALUES: usize = 1 << 19;
/// Packed bytes that one task reads at a time: whole huge pages, and a disk's full rate.
const TASK_BYTES: usize = 4 << 20;

/// How far packed weights are from their source.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct PackingError {
    /// Σ (packed − source)²
    pub squared_error: f64,
    /// Σ source²
    pub squared_weights: f64,
}

impl PackingError {
    /// The root-mean-square error, as a part of the root-mean-square of the weights.
    #[must_use]
    pub fn relative(&self) -> f64 {
        if self.squared_error == 0.0 { 0.0 } else { (self.squared_error / self.squared_weights).sqrt() }
    }

    fn add(&mut self, packed: f32, source: f32) {
        let (packed, source) = (f64::from(packed), f64::from(source));
        self.squared_error += (packed - source) * (packed - source);
        self.squared_weights += source * source;
    }
}

impl AddAssign for PackingError {
    fn add_assign(&mut self, other: Self) {
        self.squared_error += other.squared_error;
        self.squared_weights += other.squared_weights;
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

/// Packs what `read_rows` gives; the error that came first wins.
pub(super) fn pack<S: Copy + Send, E: Send>(
    compute: &Compute,
    format: Format,
    mut tasks: Vec<PackTask<'_, S>>,
    read_rows: impl Fn(S, Range<usize>, &mut [f32]) -> Result<(), E> + Sync,
) -> Result<(), E> {
    try_each(compute, &mut tasks, |task| {
        let mut values = vec![0.0; task.rows.len() * task.k];
        read_rows(task.source, task.rows.clone(), &mut values)?;
        for (panel, rows) in task.panels.iter_mut().zip(values.chunks(PANEL * task.k)) {
            pack_panel(format, task.k, rows, panel);
        }
        Ok(())
    })
}

/// The same on the calling thread alone, a panel at a time: for rows that lie in memory.
pub(super) fn pack_here<S: Copy>(
    format: Format,
    tasks: Vec<PackTask<'_, S>>,
    mut read_rows: impl FnMut(S, Range<usize>, &mut [f32]),
) {
    let mut values = Vec::new();
    for task in tasks {
        let starts = task.rows.clone().step_by(PANEL);
        for (start, panel) in starts.zip(task.panels) {
            let rows = start..task.rows.end.min(start + PANEL);
            values.resize(rows.len() * task.k, 0.0);
            read_rows(task.source, rows, &mut values);
            pack_panel(format, task.k, &values, panel);
        }
    }
}

/// A stretch of packed bytes of `source` that one task reads.
pub(super) struct ReadTask<'a, S> {
    source: S,
    offset: usize,
    bytes: &'a mut [u8],
}

impl<'a, S: Copy> ReadTask<'a, S> {
    /// The tasks that fill `bytes`, which are all of `source`.
    pub(super) fn split(source: S, bytes: &'a mut [u8]) -> impl Iterator<Item = Self> {
        let stretches = bytes.chunks_mut(TASK_BYTES).enumerate();
        stretches.map(move |(index, bytes)| Self { source, offset: index * TASK_BYTES, bytes })
    }
}

/// Has `read` fill all bytes; the error that came first wins.
pub(super) fn read<S: Copy + Send, E: Send>(
    compute: &Compute,
    mut tasks: Vec<ReadTask<'_, S>>,
    read: impl Fn(S, usize, &mut [u8]) -> Result<(), E> + Sync,
) -> Result<(), E> {
    try_each(compute, &mut tasks, |task| read(task.source, task.offset, task.bytes))
}

/// How far `n` rows of `packed` are from those of `read_rows`; row `row` of the source is row `packed_row(row)`. The
/// sums don't depend on the number of threads.
pub(super) fn packing_error<E: Send>(
    compute: &Compute,
    packed: Packed<'_>,
    n: usize,
    packed_row: impl Fn(usize) -> usize + Sync,
    read_rows: impl Fn(Range<usize>, &mut [f32]) -> Result<(), E> + Sync,
) -> Result<PackingError, E> {
    let k = packed.layout().k;
    let rows_per_task = (TASK_VALUES / k).max(1);
    let starts = (0..n).step_by(rows_per_task);
    let mut tasks: Vec<_> =
        starts.map(|start| (start..n.min(start + rows_per_task), PackingError::default())).collect();
    try_each(compute, &mut tasks, |(rows, error)| {
        let mut source = vec![0.0; rows.len() * k];
        read_rows(rows.clone(), &mut source)?;
        let mut unpacked = vec![0.0; k];
        for (row, source) in rows.clone().zip(source.chunks_exact(k)) {
            packed.unpack_row(packed_row(row), &mut unpacked);
            unpacked.iter().zip(source).for_each(|(packed, source)| error.add(*packed, *source));
        }
        Ok(())
    })?;
    let mut total = PackingError::default();
    tasks.into_iter().for_each(|(_, error)| total += error);
    Ok(total)
}

/// Runs `work` on every task, on all threads, until one fails.
fn try_each<T: Send, E: Send>(
    compute: &Compute,
    tasks: &mut [T],
    work: impl Fn(&mut T) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let tasks: Vec<_> = tasks.iter_mut().map(Mutex::new).collect();
    let error = Mutex::new(None);
    let lock_error = || error.lock().unwrap_or_else(PoisonError::into_inner);
    compute.pool.run(tasks.len(), |index| {
        if lock_error().is_some() {
            return;
        }
        let mut task = tasks[index].lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(found) = work(&mut task) {
            lock_error().get_or_insert(found);
        }
    });
    error.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;
    use crate::nn::{ExpertPart, Experts, FfnLayout, Matrix, expert_bytes, pack_expert};
    use cadre_kernels::buffer::AllocError;

    /// Values that bf16 rounds.
    fn value(row: usize, column: usize) -> f32 {
        1.0 + (row * 37 + column) as f32 / 4099.0
    }

    fn fill(rows: Range<usize>, out: &mut [f32]) {
        let k = out.len() / rows.len();
        rows.zip(out.chunks_exact_mut(k)).for_each(|(row, out)| {
            out.iter_mut().enumerate().for_each(|(column, out)| *out = value(row, column));
        });
    }

    #[derive(Debug)]
    struct Failed;
    impl From<AllocError> for Failed {
        fn from(_: AllocError) -> Self {
            Self
        }
    }

    #[test]
    fn what_was_packed_is_read_back_and_its_error_is_that_of_the_rounding() {
        let (compute, alone) = (Compute::new(3), Compute::new(1));
        let layout = Layout { format: Format::Bf16, n: 1037, k: 2049 };
        let read_rows = |rows, out: &mut [f32]| {
            fill(rows, out);
            Ok::<_, Failed>(())
        };
        let matrix = Matrix::from_rows(&compute, layout, read_rows).unwrap();
        let copy = Matrix::from_packed(&compute, layout, |offset, out| {
            out.copy_from_slice(&matrix.data()[offset..offset + out.len()]);
            Ok::<_, Failed>(())
        });
        assert!(copy.unwrap().data() == matrix.data());

        let error = matrix.packing_error(&compute, read_rows).unwrap();
        assert_eq!(error, matrix.packing_error(&alone, read_rows).unwrap(), "whatever the number of threads");
        let mut expected = PackingError::default();
        for row in 0..layout.n {
            for column in 0..layout.k {
                expected.add(half::bf16::from_f32(value(row, column)).to_f32(), value(row, column));
            }
        }
        assert!((error.relative() - expected.relative()).abs() < 1e-9 && error.relative() > 1e-4, "{error:?}");
    }

    #[test]
    fn experts_are_compared_part_by_part() {
        let compute = Compute::new(2);
        let layout = FfnLayout { format: Format::F32, hidden: 40, intermediate: 37 };
        let offset = |expert, part| expert * 100 + part as usize * 1000;
        let read_rows = |expert, part, rows: Range<usize>, out: &mut [f32]| {
            fill(rows.start + offset(expert, part)..rows.end + offset(expert, part), out);
            Ok::<_, Failed>(())
        };
        let experts = Experts::from_rows(&compute, layout, 3, read_rows).unwrap();
        let error = experts.packing_error(&compute, read_rows).unwrap();
        assert_eq!(error.squared_error, 0.0);
        let other = |expert, part, rows: Range<usize>, out: &mut [f32]| {
            read_rows(expert, part, rows.clone(), out)?;
            if (expert, part) == (2, ExpertPart::Up) && rows.end == 37 {
                out[0] += 1.0;
            }
            Ok::<_, Failed>(())
        };
        let error = experts.packing_error(&compute, other).unwrap();
        assert!((error.squared_error - 1.0).abs() < 1e-5, "{error:?}");
        let copy = Experts::from_packed(&compute, layout, 3, |expert, offset, out| {
            let start = expert * expert_bytes(&layout) + offset;
            out.copy_from_slice(&experts.data()[start..start + out.len()]);
            Ok::<_, Failed>(())
        });
        assert!(copy.unwrap().data() == experts.data());
    }

    #[test]
    fn an_expert_that_is_packed_alone_has_the_same_bits() {
        let compute = Compute::new(2);
        for (format, hidden, intermediate) in
            Format::ALL.iter().flat_map(|format| [(*format, 40, 37), (*format, 300, 16), (*format, 2048, 290)])
        {
            let layout = FfnLayout { format, hidden, intermediate };
            let read_rows = |expert, part, rows: Range<usize>, out: &mut [f32]| {
                let offset = expert * 100 + part as usize * 1000;
                fill(rows.start + offset..rows.end + offset, out);
            };
            let experts = Experts::from_rows(&compute, layout, 2, |expert, part, rows, out| {
                read_rows(expert, part, rows, out);
                Ok::<_, Failed>(())
            });
            // The rest of a slot is its own.
            let mut slot = vec![7; expert_bytes(&layout) + 5];
            pack_expert(layout, &mut slot, |part, rows, out| read_rows(1, part, rows, out));
            let (packed, rest) = slot.split_at(expert_bytes(&layout));
            assert!(packed == &experts.unwrap().data()[expert_bytes(&layout)..], "{layout:?}");
            assert_eq!(rest, [7; 5]);
        }
    }

    #[test]
    fn the_first_failure_ends_it() {
        let compute = Compute::new(2);
        let layout = Layout { format: Format::F32, n: 4096, k: 1024 };
        assert!(Matrix::from_rows(&compute, layout, |_, _| Err(Failed)).is_err());
        assert!(Matrix::from_packed(&compute, layout, |_, _| Err(Failed)).is_err());
        assert_eq!(PackingError::default().relative(), 0.0);
        let none = packing_error(
            &compute,
            Packed::new(Layout { n: 0, ..layout }, &[]),
            0,
            |row| row,
            |_, _| Ok::<_, Infallible>(()),
        );
        assert_eq!(none, Ok(PackingError::default()));
    }
}
