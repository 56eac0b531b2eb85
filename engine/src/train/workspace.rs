//! Buffers that are used again: fresh memory costs page faults and zeroing, a tenth of a step's time.

use std::cell::{Cell, RefCell};

/// Buffers that nobody uses now.
#[derive(Default)]
pub(super) struct Workspace {
    spare: RefCell<Vec<Spare>>,
    step: Cell<u64>,
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
        let Some(best) = fitting.min_by_key(|&index| spare[index].buffer.capacity()) else { return vec![0.0; len] };
        let mut buffer = spare.swap_remove(best).buffer;
        buffer.resize(len, 0.0);
        buffer
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
            self.spare.borrow_mut().push(Spare { buffer, used: self.step.get() });
        }
    }

    /// A step has ended: what it didn't use goes.
    pub fn end_step(&self) {
        let step = self.step.get();
        self.spare.borrow_mut().retain(|spare| spare.used == step);
        self.step.set(step + 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_that_fits_is_used_again_and_what_a_step_leaves_goes() {
        let workspace = Workspace::default();
        for len in [100, 120, 1000] {
            workspace.give(vec![1.0; len]);
        }
        let buffer = workspace.take(110);
        assert_eq!((buffer.len(), buffer.capacity(), buffer[0]), (110, 120, 1.0));
        assert_eq!(workspace.take(500).capacity(), 500, "a much larger one stays");
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
