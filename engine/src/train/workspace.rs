//! Buffers that are used again: fresh memory costs page faults and zeroing, a tenth of a step's time. They stay within a
//! limit: where memory is short, those that have been spare for longest make room for new ones.

use std::cell::{Cell, RefCell};

/// Buffers that nobody uses now.
pub(super) struct Workspace {
    /// The longest spare first.
    spare: RefCell<Vec<Spare>>,
    step: Cell<u64>,
    /// Values that are out, and that are spare.
    out: Cell<usize>,
    kept: Cell<usize>,
    /// The most of both together, as far as that depends on what is spare.
    limit: Cell<usize>,
}

impl Default for Workspace {
    fn default() -> Self {
        Self {
            spare: RefCell::default(),
            step: Cell::new(0),
            out: Cell::new(0),
            kept: Cell::new(0),
            limit: Cell::new(usize::MAX),
        }
    }
}

/// How many values a new buffer for `len` has: one of few sizes, so that it serves others later. Experts have other numbers of
/// rows in each step: buffers made to measure would be made anew, in memory that lies in pieces.
fn size(len: usize) -> usize {
    len.next_multiple_of((len.next_power_of_two() / 8).max(1))
}

struct Spare {
    buffer: Vec<f32>,
    /// The step in which it was last used.
    used: u64,
}

impl Workspace {
    /// `len` values of any kind, for those who overwrite all of them.
    pub fn take(&self, len: usize) -> Vec<f32> {
        let mut spare = self.spare.borrow_mut();
        // One that is much larger would lie half empty as long as it is kept.
        let fits = |spare: &Spare| (len..=len + len / 4).contains(&spare.buffer.capacity());
        let fitting = (0..spare.len()).filter(|&index| fits(&spare[index]));
        let Some(best) = fitting.min_by_key(|&index| spare[index].buffer.capacity()) else {
            let size = size(len);
            self.out.set(self.out.get() + size);
            let beyond = |kept: usize| self.out.get().saturating_add(kept) > self.limit.get();
            let count = spare.iter().take_while(|spare| {
                let is_beyond = beyond(self.kept.get());
                if is_beyond {
                    self.kept.set(self.kept.get() - spare.buffer.capacity());
                }
                is_beyond
            });
            let count = count.count();
            drop(spare.drain(..count));
            let mut buffer = vec![0.0; size];
            buffer.truncate(len);
            return buffer;
        };
        let mut buffer = spare.remove(best).buffer;
        self.kept.set(self.kept.get() - buffer.capacity());
        self.out.set(self.out.get() + buffer.capacity());
        buffer.resize(len, 0.0);
        buffer
    }

    /// Keeps what is out and spare together within so many bytes, if what is out allows that.
    pub fn limit(&self, bytes: u64) {
        self.limit.set(usize::try_from(bytes / 4).unwrap_or(usize::MAX));
    }

    /// `len` zeros.
    pub fn zeros(&self, len: usize) -> Vec<f32> {
        let mut buffer = self.take(len);
        buffer.fill(0.0);
        buffer
    }

    /// A buffer that nobody uses any more.
    pub fn give(&self, buffer: Vec<f32>) {
        if buffer.capacity() > 0 {
            // Some were made elsewhere.
            self.out.set(self.out.get().saturating_sub(buffer.capacity()));
            self.kept.set(self.kept.get() + buffer.capacity());
            self.spare.borrow_mut().push(Spare { buffer, used: self.step.get() });
        }
    }

    /// A step has ended: what it didn't use goes.
    pub fn end_step(&self) {
        let step = self.step.get();
        let mut spare = self.spare.borrow_mut();
        spare.retain(|spare| spare.used == step);
        self.kept.set(spare.iter().map(|spare| spare.buffer.capacity()).sum());
        // What is out now has left for good.
        self.out.set(0);
        self.step.set(step + 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_spare_make_room_within_a_limit() {
        let workspace = Workspace::default();
        workspace.limit(4 * 1088);
        let buffers = [128, 256, 320].map(|len| workspace.take(len));
        buffers.into_iter().for_each(|buffer| workspace.give(buffer));
        let sizes = || workspace.spare.borrow().iter().map(|spare| spare.buffer.capacity()).collect::<Vec<_>>();
        let first = workspace.take(384);
        assert_eq!(sizes(), [128, 256, 320], "1088 in all");
        let second = workspace.take(280);
        assert_eq!((second.capacity(), sizes()), (320, vec![128, 256]), "one was there");
        let third = workspace.take(512);
        assert_eq!(sizes(), [0; 0], "1216 are out");
        [third, first].into_iter().for_each(|buffer| workspace.give(buffer));
        assert_eq!(sizes(), [512, 384]);
        assert_eq!((workspace.take(10).capacity(), sizes()), (10, vec![384]));
    }

    #[test]
    fn a_new_buffer_serves_somewhat_longer_values_later() {
        let workspace = Workspace::default();
        let buffer = workspace.take(900);
        assert_eq!(buffer.len(), 900);
        workspace.give(buffer);
        assert_eq!((workspace.take(1000).len(), workspace.spare.borrow().len()), (1000, 0));
    }

    #[test]
    fn the_smallest_that_fits_is_used_again_and_what_a_step_leaves_goes() {
        let workspace = Workspace::default();
        for len in [100, 120, 1000] {
            workspace.give(vec![1.0; len]);
        }
        let buffer = workspace.take(110);
        assert_eq!((buffer.len(), buffer.capacity(), buffer[0]), (110, 120, 1.0));
        assert_eq!(workspace.take(512).capacity(), 512, "a much larger one stays");
        assert_eq!(workspace.zeros(900), vec![0.0; 900]);
        workspace.give(buffer);
        workspace.end_step();
        assert_eq!(workspace.spare.borrow().len(), 2);
        let again = workspace.take(120);
        workspace.give(again);
        workspace.end_step();
        assert_eq!(workspace.spare.borrow().len(), 1, "one was not used in this step");
    }
}
