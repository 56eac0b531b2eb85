//! Equal parts of one buffer, each of them written by one thread or read by several at a time: the places in memory of
//! weights that come and go.

use std::{
    ops::{Deref, DerefMut},
    sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use crate::{
    buffer::{AllocError, Buffer},
    shared::SharedSlice,
};

/// The parts.
pub struct Slots {
    slot_bytes: usize,
    /// One a slot; whoever holds it may touch the slot's bytes.
    locks: Vec<RwLock<()>>,
    bytes: SharedSlice<u8>,
    /// Keeps the memory; touched through `bytes` only.
    _buffer: Buffer<u8>,
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
        Ok(Self { slot_bytes, locks: (0..count).map(|_| RwLock::new(())).collect(), bytes, _buffer: buffer })
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.locks.len()
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
        let lock = self.locks[index].read().unwrap_or_else(PoisonError::into_inner);
        let start = self.bytes.pointer(index * self.slot_bytes, self.slot_bytes);
        // SAFETY: `pointer` checked the bounds; the lock keeps writers of this slot away, other slots don't overlap it,
        // and the buffer outlives the borrow of `self`.
        SlotReader { bytes: unsafe { std::slice::from_raw_parts(start, self.slot_bytes) }, _lock: lock }
    }

    /// The bytes of slot `index` to be written, once nobody else reads or writes them.
    ///
    /// # Panics
    /// When there is no such slot.
    pub fn write(&self, index: usize) -> SlotWriter<'_> {
        let lock = self.locks[index].write().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the lock keeps everybody else away from this slot, other slots don't overlap it, and the buffer
        // outlives the borrow of `self`.
        SlotWriter { bytes: unsafe { self.bytes.part(index * self.slot_bytes, self.slot_bytes) }, _lock: lock }
    }
}

/// A slot that is being read.
pub struct SlotReader<'a> {
    bytes: &'a [u8],
    _lock: RwLockReadGuard<'a, ()>,
}

impl Deref for SlotReader<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes
    }
}

/// A slot that is being written.
pub struct SlotWriter<'a> {
    bytes: &'a mut [u8],
    _lock: RwLockWriteGuard<'a, ()>,
}

impl Deref for SlotWriter<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes
    }
}

impl DerefMut for SlotWriter<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_apart() {
        let slots = Slots::zeroed(3, 64).unwrap();
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
        let slots = Slots::zeroed(1, 1 << 16).unwrap();
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
