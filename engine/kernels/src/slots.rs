//! Equal parts of one buffer, each of them written by one or read by several at a time: the places in memory of
//! weights that come and go.

use std::{
    io,
    ops::{Deref, DerefMut},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use crate::{
    buffer::{AllocError, Buffer},
    shared::SharedSlice,
};

/// The parts.
pub struct Slots {
    count: usize,
    slot_bytes: usize,
    /// Who may touch each slot's bytes.
    uses: Mutex<Vec<Use>>,
    /// A use has ended.
    ended: Condvar,
    bytes: SharedSlice<u8>,
    /// The memory, whose values are touched through `bytes` only.
    buffer: Buffer<u8>,
}

/// What a slot is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    /// So many read it.
    Read(usize),
    /// One writes it.
    Write,
}

impl Slots {
    /// `count` slots of `slot_bytes` zeros, which take no memory before they are written.
    ///
    /// # Errors
    /// When the system refuses the memory.
    pub fn zeroed(count: usize, slot_bytes: usize) -> Result<Self, AllocError> {
        let total = count.checked_mul(slot_bytes).ok_or_else(|| AllocError {
            bytes: usize::MAX,
            reason: format!("{count} slots of {slot_bytes} bytes overflow"),
        })?;
        let mut buffer = Buffer::zeroed(total)?;
        let bytes = SharedSlice::new(&mut buffer);
        let uses = Mutex::new(vec![Use::Read(0); count]);
        Ok(Self { count, slot_bytes, uses, ended: Condvar::new(), bytes, buffer })
    }

    /// Keeps what is written from now on out of the swap space. Nothing else depends on it.
    ///
    /// # Errors
    /// When the system refuses: most let a process lock a few megabytes only (`ulimit -l`).
    pub fn lock(&self) -> io::Result<()> {
        self.buffer.lock()
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Bytes of one.
    #[must_use]
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// The bytes of slot `index`, once nobody writes them.
    ///
    /// # Panics
    /// When there is no such slot.
    pub fn read(&self, index: usize) -> SlotReader<'_> {
        let mut uses = self.uses();
        let readers = loop {
            match uses[index] {
                Use::Read(readers) => break readers,
                Use::Write => uses = self.ended.wait(uses).unwrap_or_else(PoisonError::into_inner),
            }
        };
        uses[index] = Use::Read(readers + 1);
        let start = self.bytes.pointer(index * self.slot_bytes, self.slot_bytes);
        // SAFETY: `pointer` checked the bounds; the use keeps writers of this slot away, other slots don't overlap it,
        // and the buffer outlives the borrow of `self`.
        SlotReader { bytes: unsafe { std::slice::from_raw_parts(start, self.slot_bytes) }, slots: self, index }
    }

    /// The bytes of slot `index` to be written, once nobody else reads or writes them.
    ///
    /// # Panics
    /// When there is no such slot.
    pub fn write(self: &Arc<Self>, index: usize) -> SlotWriter {
        let mut uses = self.uses();
        while uses[index] != Use::Read(0) {
            uses = self.ended.wait(uses).unwrap_or_else(PoisonError::into_inner);
        }
        uses[index] = Use::Write;
        SlotWriter { slots: Arc::clone(self), index }
    }

    /// The lock; every change under it is whole before anything in it can panic.
    fn uses(&self) -> MutexGuard<'_, Vec<Use>> {
        self.uses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, index: usize) {
        let mut uses = self.uses();
        uses[index] = match uses[index] {
            Use::Read(readers) => Use::Read(readers.saturating_sub(1)),
            Use::Write => Use::Read(0),
        };
        drop(uses);
        self.ended.notify_all();
    }
}

/// A slot that is being read.
pub struct SlotReader<'a> {
    bytes: &'a [u8],
    slots: &'a Slots,
    index: usize,
}

impl Deref for SlotReader<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes
    }
}

impl Drop for SlotReader<'_> {
    fn drop(&mut self) {
        self.slots.end(self.index);
    }
}

/// A slot that is being written. Its bytes stay where they are, wherever this is moved to.
pub struct SlotWriter {
    slots: Arc<Slots>,
    index: usize,
}

impl Deref for SlotWriter {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let Slots { bytes, slot_bytes, .. } = &*self.slots;
        let start = bytes.pointer(self.index * slot_bytes, *slot_bytes);
        // SAFETY: `pointer` checked the bounds; the use keeps everybody else away from this slot, other slots don't
        // overlap it, and the buffer lives as long as `slots`.
        unsafe { std::slice::from_raw_parts(start, *slot_bytes) }
    }
}

impl DerefMut for SlotWriter {
    fn deref_mut(&mut self) -> &mut [u8] {
        let Slots { bytes, slot_bytes, .. } = &*self.slots;
        // SAFETY: as above; `part` checks the bounds, and the borrow of `self` is exclusive.
        unsafe { bytes.part(self.index * slot_bytes, *slot_bytes) }
    }
}

impl Drop for SlotWriter {
    fn drop(&mut self) {
        self.slots.end(self.index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_apart() {
        let slots = Arc::new(Slots::zeroed(3, 64).unwrap());
        for index in 0..3 {
            slots.write(index).fill(index as u8 + 1);
        }
        let readers: Vec<_> = (0..3).map(|index| slots.read(index)).collect();
        for (index, reader) in readers.iter().enumerate() {
            assert!(reader.len() == 64 && reader.iter().all(|byte| *byte == index as u8 + 1));
        }
    }

    #[test]
    fn nobody_reads_what_is_half_written() {
        let slots = Arc::new(Slots::zeroed(1, 1 << 16).unwrap());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..200_u8 {
                    slots.write(0).fill(round);
                }
            });
            for _ in 0..200 {
                let reader = slots.read(0);
                let first = reader[0];
                assert!(reader.iter().all(|byte| *byte == first));
            }
        });
    }

    #[test]
    fn more_slots_than_an_address_space_are_refused() {
        assert!(Slots::zeroed(usize::MAX, 2).is_err());
    }
}
