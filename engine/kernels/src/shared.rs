//! A slice that the tasks of one parallel job write in disjoint parts.

use std::{mem::MaybeUninit, ops::Range};

use crate::{norm::for_row_chunks, pool::Pool};

/// Shared access to a mutable slice. Safe as long as no two tasks touch the same element.
pub(crate) struct SharedSlice<T> {
    start: *mut T,
    len: usize,
}

// SAFETY: access goes through `part` and `pointer`, whose callers promise disjoint ranges.
unsafe impl<T: Send> Send for SharedSlice<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedSlice<T> {}

impl<T> SharedSlice<T> {
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len() }
    }

    /// Where the elements `start..start + len` lie, for tasks that write parts smaller than an element of what the
    /// pointer leads to.
    pub(crate) fn pointer(&self, start: usize, len: usize) -> *mut T {
        assert!(
            start.checked_add(len).is_some_and(|end| end <= self.len),
            "part {start}+{len} lies outside of a slice of {}",
            self.len
        );
        // SAFETY: in bounds by the check above.
        unsafe { self.start.add(start) }
    }

    /// The elements `start..start + len`.
    ///
    /// # Safety
    /// While the result lives, no other task may hold a part that overlaps it, and the slice given to
    /// [`SharedSlice::new`] must still be borrowed.
    #[allow(clippy::mut_from_ref, reason = "the caller promises disjoint parts")]
    pub(crate) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        let start = self.pointer(start, len);
        // SAFETY: in bounds by the check of `pointer`; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }
}

/// `len` zeros. A thread that touches a page first waits until the system has cleared it, so all of them do.
pub(crate) fn zeroed<T: Copy + Default + Send + Sync>(pool: &Pool, len: usize) -> Vec<T> {
    // SAFETY: `fill` writes all of the part.
    unsafe { written(pool, len, |_, out| out.fill(MaybeUninit::new(T::default()))) }
}

/// `len` values, made on all threads.
///
/// # Safety
/// `write` writes every value of the range that it is given.
pub(crate) unsafe fn written<T: Send>(
    pool: &Pool,
    len: usize,
    write: impl Fn(Range<usize>, &mut [MaybeUninit<T>]) + Sync,
) -> Vec<T> {
    let mut values = Vec::with_capacity(len);
    let target = SharedSlice::new(&mut values.spare_capacity_mut()[..len]);
    for_row_chunks(pool, len, 1, |range| {
        // SAFETY: each value belongs to one task.
        let out = unsafe { target.part(range.start, range.len()) };
        write(range, out);
    });
    // SAFETY: the ranges cover all of the values, and `write` has written each, as the caller promises.
    unsafe { values.set_len(len) };
    values
}
